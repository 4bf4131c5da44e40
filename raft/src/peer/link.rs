//! The connection we call another process on: made when first needed, made again when lost.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::BufMut;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, timeout};

use super::Dial;
use super::frame::{self, Frame, Kind, Outbox, Reader};
use super::message::{get_append_result, put_sleep};
use super::snapshot::{Answer, get_answer};
use crate::types::{AppendResult, Vote};
use crate::{GroupId, Position, ProcessId, ReplicaId};

/// A dial that takes longer is taken for failed.
const DIAL_MAX: Duration = Duration::from_secs(2);
/// Between dials: first, and at most. Short against an election, so that a process that is back is found at once.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// What was sent and is not even acknowledged by the other kernel after this long: the connection is dead. A frozen
/// process's kernel acknowledges until its buffers are full.
const UNACKNOWLEDGED_MAX_MS: u32 = 3000;

pub(super) struct Link {
    to: ProcessId,
    dial: Rc<dyn Dial>,
    sessions: Rc<Cell<u64>>,
    state: RefCell<State>,
    changed: Notify,
}

enum State {
    /// Not connected; not to be dialled before the time.
    Down {
        not_before: Option<Instant>,
        backoff: Duration,
    },
    Dialling,
    Up(Rc<Connection>),
    Closed,
}

/// A connection that is up, and who waits for answers on it.
pub(crate) struct Connection {
    pub(super) outbox: Rc<Outbox>,
    sessions: Rc<Cell<u64>>,
    appends: RefCell<HashMap<u64, mpsc::UnboundedSender<AppendResult>>>,
    snapshots: RefCell<HashMap<u64, mpsc::UnboundedSender<Answer>>>,
    calls: RefCell<HashMap<u64, oneshot::Sender<Frame>>>,
    /// The other process last showed itself.
    heard: Cell<Instant>,
}

impl Connection {
    fn next_session(&self) -> u64 {
        self.sessions.set(self.sessions.get() + 1);
        self.sessions.get()
    }

    /// Opens a session of appends; its answers come out of the receiver, which ends with the connection.
    pub(super) fn open(&self) -> (u64, mpsc::UnboundedReceiver<AppendResult>) {
        let session = self.next_session();
        let (answers, receiver) = mpsc::unbounded_channel();
        if !self.outbox.is_closed() {
            self.appends.borrow_mut().insert(session, answers);
        }
        (session, receiver)
    }

    /// The same for a raft snapshot.
    pub(super) fn open_snapshot(&self) -> (u64, mpsc::UnboundedReceiver<Answer>) {
        let session = self.next_session();
        let (answers, receiver) = mpsc::unbounded_channel();
        if !self.outbox.is_closed() {
            self.snapshots.borrow_mut().insert(session, answers);
        }
        (session, receiver)
    }

    pub(super) fn close_session(&self, session: u64) {
        self.appends.borrow_mut().remove(&session);
        self.snapshots.borrow_mut().remove(&session);
    }

    /// One question, one answer; `None` when the connection ends first, or the group is not there.
    pub(super) async fn call(
        &self,
        kind: Kind,
        group: GroupId,
        body: impl FnOnce(&mut bytes::BytesMut),
    ) -> Option<Frame> {
        let session = self.next_session();
        let (answer, receiver) = oneshot::channel();
        if self.outbox.is_closed() {
            return None;
        }
        self.calls.borrow_mut().insert(session, answer);
        let _forget = Forget { connection: self, session };
        self.outbox.frame(kind, group, session, body);
        receiver.await.ok().filter(|frame| frame.kind != Kind::NotHere)
    }

    /// Asks a follower to sleep; false when it does not, or the connection ends first.
    pub async fn sleep(&self, group: GroupId, to: ReplicaId, vote: &Vote, last: Position) -> bool {
        let body = |out: &mut bytes::BytesMut| put_sleep(out, to.0, vote, last);
        let answer = self.call(Kind::Sleep, group, body).await;
        answer.is_some_and(|frame| frame.kind == Kind::Slept && frame.body[..] == [1])
    }

    pub fn wake(&self, group: GroupId, to: ReplicaId) {
        self.outbox.frame(Kind::Wake, group, 0, |out| out.put_u64_le(to.0));
    }

    pub fn show_life(&self) {
        self.outbox.frame(Kind::Alive, GroupId(0), 0, |_| {});
    }

    /// It is up, and the other process showed itself within that time.
    pub fn is_heard(&self, within: Duration) -> bool {
        !self.outbox.is_closed() && self.heard.get().elapsed() < within
    }

    fn fail_all(&self) {
        self.outbox.close();
        self.appends.borrow_mut().clear();
        self.snapshots.borrow_mut().clear();
        self.calls.borrow_mut().clear();
    }

    /// False: this frame has no business here.
    fn answered(&self, frame: Frame) -> bool {
        match frame.kind {
            Kind::Appended => {
                let Some(result) = get_append_result(frame.body) else { return false };
                // A session that is over already does not want to know.
                if let Some(answers) = self.appends.borrow().get(&frame.session) {
                    let _ = answers.send(result);
                }
            }
            Kind::SnapshotAnswer => {
                let Some(answer) = get_answer(frame.body) else { return false };
                if let Some(answers) = self.snapshots.borrow().get(&frame.session) {
                    let _ = answers.send(answer);
                }
            }
            Kind::Alive => self.heard.set(Instant::now()),
            Kind::NotHere | Kind::Voted | Kind::Transferred | Kind::Slept => {
                self.appends.borrow_mut().remove(&frame.session);
                if let Some(answers) = self.snapshots.borrow_mut().remove(&frame.session) {
                    let _ = answers.send(Answer::Refused("the replica is not there".to_owned()));
                }
                if let Some(answer) = self.calls.borrow_mut().remove(&frame.session) {
                    let _ = answer.send(frame);
                }
            }
            Kind::Append
            | Kind::Close
            | Kind::Vote
            | Kind::PreVote
            | Kind::Transfer
            | Kind::TakeOver
            | Kind::Sleep
            | Kind::Wake
            | Kind::Snapshot
            | Kind::SnapshotFrame
            | Kind::SnapshotEnd => return false,
        }
        true
    }
}

/// A call that is given up leaves nothing behind.
struct Forget<'a> {
    connection: &'a Connection,
    session: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.connection.calls.borrow_mut().remove(&self.session);
    }
}

impl Link {
    pub fn new(to: ProcessId, dial: Rc<dyn Dial>, sessions: Rc<Cell<u64>>) -> Self {
        let state = State::Down { not_before: None, backoff: BACKOFF_MIN };
        Self { to, dial, sessions, state: RefCell::new(state), changed: Notify::new() }
    }

    /// The connection, made if need be; an error at once while it is not time to dial again. Cancel-safe.
    pub async fn up(self: &Rc<Self>) -> io::Result<Rc<Connection>> {
        loop {
            let changed = self.changed.notified();
            let dial = {
                let mut state = self.state.borrow_mut();
                match &*state {
                    State::Up(connection) if !connection.outbox.is_closed() => return Ok(connection.clone()),
                    State::Up(_) | State::Dialling => None,
                    State::Closed => return Err(io::ErrorKind::NotConnected.into()),
                    State::Down { not_before: Some(time), .. } if Instant::now() < *time => {
                        return Err(io::ErrorKind::NotConnected.into());
                    }
                    State::Down { backoff, .. } => {
                        let backoff = *backoff;
                        *state = State::Dialling;
                        Some(backoff)
                    }
                }
            };
            if let Some(backoff) = dial {
                tokio::task::spawn_local(self.clone().connect(backoff));
            }
            changed.await;
        }
    }

    /// The connection, if there is one now.
    pub fn connected(&self) -> Option<Rc<Connection>> {
        match &*self.state.borrow() {
            State::Up(connection) if !connection.outbox.is_closed() => Some(connection.clone()),
            _ => None,
        }
    }

    pub fn close(&self) {
        if let State::Up(connection) = self.state.replace(State::Closed) {
            connection.fail_all();
        }
        self.changed.notify_waiters();
    }

    async fn connect(self: Rc<Self>, backoff: Duration) {
        let dialled = match timeout(DIAL_MAX, self.dial.dial(self.to)).await {
            Ok(Ok(stream)) => set_options(&stream).map(|()| stream),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        let stream = match dialled {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(to = %self.to, %error, "cannot reach a peer");
                self.down(Some(Instant::now() + backoff), (backoff * 2).min(BACKOFF_MAX));
                return;
            }
        };
        let (read, write) = stream.into_split();
        let connection = Rc::new(Connection {
            outbox: Rc::default(),
            sessions: self.sessions.clone(),
            appends: RefCell::default(),
            snapshots: RefCell::default(),
            calls: RefCell::default(),
            heard: Cell::new(Instant::now()),
        });
        {
            let mut state = self.state.borrow_mut();
            if matches!(*state, State::Closed) {
                return;
            }
            *state = State::Up(connection.clone());
        }
        self.changed.notify_waiters();
        tracing::info!(to = %self.to, "connected to a peer");
        let writer = tokio::task::spawn_local(frame::send(connection.outbox.clone(), write));
        let error = read_answers(&connection, Reader::new(read)).await;
        writer.abort();
        connection.fail_all();
        tracing::info!(to = %self.to, %error, "lost a peer");
        self.down(None, BACKOFF_MIN);
    }

    fn down(&self, not_before: Option<Instant>, backoff: Duration) {
        let mut state = self.state.borrow_mut();
        if !matches!(*state, State::Closed) {
            *state = State::Down { not_before, backoff };
        }
        drop(state);
        self.changed.notify_waiters();
    }
}

async fn read_answers(connection: &Connection, mut reader: Reader) -> io::Error {
    loop {
        // The writer notices first when a peer does not take anything any more.
        let frame = tokio::select! {
            frame = reader.next() => frame,
            () = connection.outbox.until_closed() => return io::ErrorKind::BrokenPipe.into(),
        };
        match frame {
            Ok(frame) => {
                if !connection.answered(frame) {
                    return io::Error::new(io::ErrorKind::InvalidData, "a frame that makes no sense here");
                }
            }
            Err(error) => return error,
        }
    }
}

pub(super) fn set_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_MAX_MS)?;
    Ok(())
}
