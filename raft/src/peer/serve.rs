//! The connections other processes call us on.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::BufMut;
use evolute_daemon::door::Seat;
use futures::StreamExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::frame::{self, Frame, Kind, Outbox, Reader};
use super::link::set_options;
use super::message::{
    get_append, get_sleep, get_take_over, get_transfer, get_vote_request, put_append_result,
    put_vote_response,
};
use super::snapshot::receive;
use super::{Caller, Peers};
use crate::ReplicaId;
use crate::bounds::{Beyond, Bounded};
use crate::group::Group;
use crate::intake::Taken;
use crate::log::log_bytes;
use crate::types::{AppendRequest, Vote, VoteResponse};

/// Appends of one session that openraft has not taken yet. It takes 64 at a time; a leader sends no more than that
/// before it is answered, so this is never reached by one of ours.
const APPENDS_WAITING_MAX: usize = 256;

/// Serves one connection until it ends.
pub(super) async fn serve(
    peers: Peers,
    stream: TcpStream,
    outbox: Rc<Outbox>,
    caller: Rc<Caller>,
    seat: Option<Seat>,
) {
    let from = stream.peer_addr().ok();
    if let Err(error) = set_options(&stream) {
        tracing::warn!(?from, %error, "a peer's connection cannot be used");
        return;
    }
    let (read, write) = stream.into_split();
    let writer = tokio::task::spawn_local(frame::send(outbox.clone(), write));
    let number = caller.number;
    let mut serving = Serving {
        peers: peers.clone(),
        outbox: outbox.clone(),
        caller,
        sessions: HashMap::new(),
        refused: false,
    };
    let shown_out = async {
        match &seat {
            Some(seat) => seat.has_to_leave(Duration::ZERO).await,
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        ended = serving.run(Reader::seated(read, seat.clone())) => ended,
        () = outbox.until_closed() => Ok(()),
        () = shown_out => Ok(()),
    };
    outbox.close();
    writer.abort();
    // Nonsense is our reason to end it, and says nothing of whoever sent it. When this process ends its connections, it
    // hosts no group any more.
    if !matches!(&ended, Err(error) if error.kind() == io::ErrorKind::InvalidData) {
        peers.lost(number);
    }
    match ended {
        // No program of ours says such a thing: somebody should know of it.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::warn!(?from, %error, "closing a peer's connection");
        }
        Err(error) => tracing::debug!(?from, %error, "a peer's connection ended"),
        Ok(()) => {}
    }
}

struct Serving {
    peers: Peers,
    outbox: Rc<Outbox>,
    caller: Rc<Caller>,
    sessions: HashMap<u64, mpsc::Sender<AppendRequest>>,
    /// Something was not believed, and that was said.
    refused: bool,
}

/// What one session's appends go through on their way to openraft: those with entries wait there for room.
struct Door {
    group: Group,
    waiting: mpsc::Receiver<AppendRequest>,
    /// One for each append that openraft has and has not answered, in its order.
    taken: Rc<RefCell<VecDeque<Taken>>>,
    outbox: Rc<Outbox>,
    session: u64,
}

impl Door {
    /// The next append for openraft. `None`: the session is over, perhaps because there is no room.
    async fn next(mut self) -> Option<(AppendRequest, Self)> {
        let request = self.waiting.recv().await?;
        let bytes = if request.entries.is_empty() { 0 } else { log_bytes(&request.entries) };
        let Some(taken) = self.group.0.intake.wait(bytes).await else {
            // What comes after it is of no use without it.
            tracing::debug!(group = %self.group.id(), bytes, "there is no room for entries");
            self.outbox.frame(Kind::NotHere, self.group.id(), self.session, |_| {});
            return None;
        };
        self.taken.borrow_mut().push_back(taken);
        Some((request, self))
    }
}

fn senseless() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a message that makes no sense")
}

fn impossible(what: Beyond) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A number beyond its bound, whatever replica it is for.
fn bounded(what: &impl Bounded) -> io::Result<()> {
    what.bounded().map_err(impossible)
}

impl Serving {
    async fn run(&mut self, mut reader: Reader) -> io::Result<()> {
        loop {
            let frame = reader.next().await?;
            match frame.kind {
                Kind::Append => self.append(frame).await?,
                Kind::Close => self.close(&frame),
                Kind::Snapshot => self.snapshot(&frame)?,
                Kind::SnapshotFrame | Kind::SnapshotEnd => {
                    receive::piece(self.peers.group(frame.group).as_ref(), &self.outbox, &frame)?;
                }
                Kind::Vote | Kind::PreVote => self.vote(frame)?,
                Kind::Transfer => self.transfer(frame)?,
                Kind::TakeOver => self.take_over(&frame)?,
                Kind::Sleep => self.sleep(&frame)?,
                Kind::Wake => self.wake(&frame)?,
                Kind::Alive => {
                    self.caller.heard.set(Instant::now());
                    self.outbox.frame(Kind::Alive, frame.group, frame.session, |_| {});
                }
                Kind::Appended
                | Kind::Voted
                | Kind::Transferred
                | Kind::NotHere
                | Kind::SnapshotAnswer
                | Kind::Slept => return Err(senseless()),
            }
        }
    }

    /// The group, if the replica that is meant is the one here, and takes part.
    fn replica(&self, frame: &Frame, to: u64) -> Option<Group> {
        let meant = |group: &Group| group.me().replica.0 == to && group.0.takes_part();
        let group = self.peers.group(frame.group).filter(meant);
        if group.is_none() {
            self.outbox.frame(Kind::NotHere, frame.group, frame.session, |_| {});
        }
        group
    }

    /// Whether the group can believe what comes with this vote. If not, it is as if the replica were not here: others may
    /// be well over this connection. An error: nobody says this.
    fn believes(&mut self, group: &Group, frame: &Frame, vote: &Vote) -> io::Result<bool> {
        if vote.leader_id.voted_for == group.me().replica.0 {
            // openraft would take the word of it, and lead.
            return Err(impossible(Beyond::InMyName));
        }
        let Err(what) = group.0.believes(vote.leader_id.term) else { return Ok(true) };
        if !self.refused {
            tracing::warn!(group = %frame.group, kind = ?frame.kind, %what, "refused what a peer says");
            self.refused = true;
        }
        self.outbox.frame(Kind::NotHere, frame.group, frame.session, |_| {});
        Ok(false)
    }

    fn close(&mut self, frame: &Frame) {
        if self.sessions.remove(&frame.session).is_none()
            && let Some(group) = self.peers.group(frame.group)
        {
            receive::close(&group, frame.session);
        }
    }

    fn snapshot(&mut self, frame: &Frame) -> io::Result<()> {
        let (to, begin) = receive::addressee(frame)?;
        bounded(&begin)?;
        if let Some(group) = self.replica(frame, to)
            && self.believes(&group, frame, &begin.vote)?
        {
            receive::begin(&group, &self.outbox, frame.session, begin);
        }
        Ok(())
    }

    async fn append(&mut self, frame: Frame) -> io::Result<()> {
        let (id, session) = (frame.group, frame.session);
        let append = get_append(frame.body.clone()).ok_or_else(senseless)?;
        bounded(&append.request)?;
        let Some(group) = self.replica(&frame, append.to) else {
            self.sessions.remove(&session);
            return Ok(());
        };
        if !self.believes(&group, &frame, &append.request.vote)? {
            self.sessions.remove(&session);
            return Ok(());
        }
        group.0.floor_heard(append.request.vote.leader_id.term, append.floor);
        group.0.append_heard(&append.request.vote, self.caller.number);
        group.0.append_stirs(&append.request, self.caller.number);
        group.0.commit_heard(&append.request.vote, append.request.leader_commit.as_ref());
        let requests = match self.sessions.get(&session) {
            Some(requests) => requests,
            None => {
                let (requests, waiting) = mpsc::channel(APPENDS_WAITING_MAX);
                let Some(raft) = group.0.running() else { return Ok(()) };
                let taken = Rc::<RefCell<VecDeque<Taken>>>::default();
                let outbox = self.outbox.clone();
                let door = Door { group: group.clone(), waiting, taken: taken.clone(), outbox, session };
                let answers = raft.stream_append(Box::pin(futures::stream::unfold(door, Door::next)));
                let outbox = self.outbox.clone();
                tokio::task::spawn_local(async move {
                    let mut answers = std::pin::pin!(answers);
                    while let Some(Ok(result)) = answers.next().await {
                        outbox.frame(Kind::Appended, id, session, |out| put_append_result(out, &result));
                        taken.borrow_mut().pop_front();
                    }
                    taken.borrow_mut().clear();
                });
                self.sessions.entry(session).or_insert(requests)
            }
        };
        // It is gone when the group stopped or refused; the leader hears of that by the answers.
        if requests.send(append.request).await.is_err() {
            self.sessions.remove(&session);
        }
        Ok(())
    }

    fn vote(&mut self, frame: Frame) -> io::Result<()> {
        let (to, request) = get_vote_request(frame.body.clone()).ok_or_else(senseless)?;
        bounded(&request)?;
        let Some(group) = self.replica(&frame, to) else { return Ok(()) };
        if !self.believes(&group, &frame, &request.vote)? {
            return Ok(());
        }
        let outbox = self.outbox.clone();
        group.0.vote_stirs();
        if !request.leadership_transfer
            && let Some(leader) = group.0.stands_by()
        {
            let refused = VoteResponse::new(leader, None, false);
            outbox.frame(Kind::Voted, frame.group, frame.session, |out| put_vote_response(out, &refused));
            return Ok(());
        }
        tokio::task::spawn_local(async move {
            let Some(raft) = group.0.running() else { return };
            let answer = match frame.kind {
                Kind::PreVote => raft.pre_vote(request).await,
                _ => raft.vote(request).await,
            };
            // A replica that stopped does not answer; the candidate's call runs out.
            if let Ok(answer) = answer {
                outbox.frame(Kind::Voted, frame.group, frame.session, |out| put_vote_response(out, &answer));
            }
        });
        Ok(())
    }

    fn take_over(&self, frame: &Frame) -> io::Result<()> {
        let (to, from) = get_take_over(frame.body.clone()).ok_or_else(senseless)?;
        if let Some(group) = self.replica(frame, to) {
            group.hand_over(ReplicaId(from));
        }
        Ok(())
    }

    fn sleep(&mut self, frame: &Frame) -> io::Result<()> {
        let (to, vote, last) = get_sleep(frame.body.clone()).ok_or_else(senseless)?;
        bounded(&vote)?;
        bounded(&last)?;
        let Some(group) = self.replica(frame, to) else { return Ok(()) };
        if !self.believes(&group, frame, &vote)? {
            return Ok(());
        }
        let sleeps = group.0.sleep(&vote, last, &self.caller);
        self.outbox.frame(Kind::Slept, frame.group, frame.session, |out| out.put_u8(u8::from(sleeps)));
        Ok(())
    }

    fn wake(&self, frame: &Frame) -> io::Result<()> {
        let to = frame.body[..].try_into().map(u64::from_le_bytes).map_err(|_| senseless())?;
        if let Some(group) = self.replica(frame, to) {
            group.0.woken(self.caller.number);
        }
        Ok(())
    }

    fn transfer(&mut self, frame: Frame) -> io::Result<()> {
        let (to, request) = get_transfer(frame.body.clone()).ok_or_else(senseless)?;
        bounded(&request)?;
        let Some(group) = self.replica(&frame, to) else { return Ok(()) };
        if !self.believes(&group, &frame, request.from_leader())? {
            return Ok(());
        }
        group.0.stir();
        let outbox = self.outbox.clone();
        tokio::task::spawn_local(async move {
            let Some(raft) = group.0.running() else { return };
            if let Ok(accepted) = raft.handle_transfer_leader(request).await {
                if let Err(error) = accepted {
                    tracing::info!(group = %frame.group, %error, "did not take the leadership");
                }
                outbox.frame(Kind::Transferred, frame.group, frame.session, |_| {});
            }
        });
        Ok(())
    }
}
