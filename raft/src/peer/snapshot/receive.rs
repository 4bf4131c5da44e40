//! The receiving end of a transfer: one task per group that stages what arrives, and then has openraft install it.
//!
//! The transfer belongs to the group, not to the connection it came over: that may break, and the transfer go on over
//! the next. Only the last session that spoke for it counts.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::{ALIVE_EVERY, Answer, Begin, WINDOW, get_begin, get_end, get_frame, put_answer};
use crate::GroupId;
use crate::group::Group;
use crate::machine::{SnapshotData, SnapshotSink, Staged, decode_membership};
use crate::peer::frame::{Frame, Kind, Outbox};
use crate::state::State;
use crate::types::{Raft, Snapshot, SnapshotMeta, Vote, log_id};

/// What is staged waits so long for a sender whose connection broke.
const RESUMES_WITHIN: Duration = Duration::from_secs(60);

/// A raft snapshot that is arriving, or has arrived.
pub(crate) struct Receiving {
    begin: Begin,
    shared: Rc<Shared>,
    pieces: mpsc::UnboundedSender<Piece>,
    staging: JoinHandle<()>,
}

impl Drop for Receiving {
    /// What is staged and not in openraft's hands yet goes with the task.
    fn drop(&mut self) {
        self.staging.abort();
    }
}

enum Piece {
    Frame(Bytes),
    End { frames: u64, consistent_from: u64 },
}

/// What the task and the connections share.
struct Shared {
    group: GroupId,
    session: Cell<u64>,
    outbox: RefCell<Rc<Outbox>>,
    /// Pieces that came, the end included.
    arrived: Cell<u64>,
    /// Frames of them that the owner has staged.
    staged: Cell<u64>,
    outcome: RefCell<Option<Answer>>,
}

impl Shared {
    /// Says where the transfer is, to whoever last spoke for it.
    fn tell(&self) {
        let answer = self
            .outcome
            .borrow()
            .clone()
            .unwrap_or(Answer::Taken { arrived: self.arrived.get(), staged: self.staged.get() });
        let outbox = self.outbox.borrow();
        outbox.frame(Kind::SnapshotAnswer, self.group, self.session.get(), |out| put_answer(out, &answer));
    }

    fn end(&self, outcome: Answer) {
        self.outcome.replace(Some(outcome));
        self.tell();
    }

    /// Does what may take long, and says meanwhile that somebody is here.
    async fn alive<F: Future>(&self, doing: F) -> F::Output {
        let mut doing = pin!(doing);
        loop {
            match timeout(ALIVE_EVERY, &mut doing).await {
                Ok(done) => return done,
                Err(_) => self.tell(),
            }
        }
    }
}

fn senseless() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a message that makes no sense")
}

/// To whom a message of a transfer is addressed.
pub fn addressee(frame: &Frame) -> io::Result<(u64, Begin)> {
    let begin = get_begin(frame.body.clone()).ok_or_else(senseless)?;
    Ok((begin.to, begin))
}

/// A transfer begins, or goes on over this connection.
pub fn begin(group: &Group, outbox: &Rc<Outbox>, session: u64, begin: Begin) {
    let state = &group.0;
    let known = state.receiving.borrow().clone();
    if let Some(known) = known.filter(|known| known.begin == begin) {
        // A connection that is gone may still have had an older one of these in its buffers.
        if session > known.shared.session.get() {
            known.shared.session.set(session);
            known.shared.outbox.replace(outbox.clone());
            known.shared.tell();
        }
        return;
    }
    let shared = Rc::new(Shared {
        group: state.id,
        session: Cell::new(session),
        outbox: RefCell::new(outbox.clone()),
        arrived: Cell::new(0),
        staged: Cell::new(0),
        outcome: RefCell::default(),
    });
    if begin.vote.leader_id.term < state.term.get() {
        return shared.end(Answer::Refused("there is a newer leader".to_owned()));
    }
    tracing::info!(group = %state.id, at = %begin.head.at, "a raft snapshot begins to arrive");
    let (pieces, arriving) = mpsc::unbounded_channel();
    let staging = tokio::task::spawn_local(stage(state.clone(), begin.clone(), shared.clone(), arriving));
    state.receiving.replace(Some(Rc::new(Receiving { begin, shared, pieces, staging })));
}

/// The next frame, or the end. An error: this connection says what cannot be.
pub fn piece(group: Option<&Group>, outbox: &Rc<Outbox>, frame: &Frame) -> io::Result<()> {
    let known = group.and_then(|group| group.0.receiving.borrow().clone());
    let Some(known) = known.filter(|known| known.shared.session.get() == frame.session) else {
        let unknown = |out: &mut bytes::BytesMut| put_answer(out, &Answer::Unknown);
        outbox.frame(Kind::SnapshotAnswer, frame.group, frame.session, unknown);
        return Ok(());
    };
    let (number, piece) = match frame.kind {
        Kind::SnapshotFrame => {
            let (number, frame) = get_frame(frame.body.clone()).ok_or_else(senseless)?;
            (number, Piece::Frame(frame))
        }
        _ => {
            let (frames, consistent_from) = get_end(frame.body.clone()).ok_or_else(senseless)?;
            (frames, Piece::End { frames, consistent_from })
        }
    };
    let shared = &known.shared;
    let arrived = shared.arrived.get();
    // The end needs no room.
    if number != arrived || arrived - shared.staged.get() > WINDOW {
        return Err(senseless());
    }
    shared.arrived.set(arrived + 1);
    // The task is gone when it has refused: then the sender hears of that.
    let _ = known.pieces.send(piece);
    Ok(())
}

/// The sender has given it up, or heard that it is done.
pub fn close(group: &Group, session: u64) {
    let mut receiving = group.0.receiving.borrow_mut();
    if receiving.as_ref().is_some_and(|known| known.shared.session.get() == session) {
        *receiving = None;
    }
}

async fn stage(state: Rc<State>, begin: Begin, shared: Rc<Shared>, arriving: mpsc::UnboundedReceiver<Piece>) {
    let Some(raft) = state.running() else { return };
    let outcome = receive(raft, &state, &begin, &shared, arriving).await;
    let at = begin.head.at;
    match outcome {
        Ok(vote) => return shared.end(Answer::Done(vote)),
        Err(Failed::Refused(why)) => {
            tracing::warn!(group = %state.id, %at, %why, "a raft snapshot is refused");
            shared.end(Answer::Refused(why));
        }
        Err(Failed::Deserted) => {
            tracing::warn!(group = %state.id, %at, "a raft snapshot is given up: its sender does not come back");
        }
        // The sender's connection tells it soon enough.
        Err(Failed::Stopped) => {}
    }
    // Whoever comes again begins anew.
    let mut receiving = state.receiving.borrow_mut();
    if receiving.as_ref().is_some_and(|known| Rc::ptr_eq(&known.shared, &shared)) {
        *receiving = None;
    }
}

/// Why nothing was installed.
enum Failed {
    Refused(String),
    /// The sender did not come back.
    Deserted,
    /// This replica stopped.
    Stopped,
}

async fn receive(
    raft: &Raft,
    state: &State,
    begin: &Begin,
    shared: &Shared,
    mut arriving: mpsc::UnboundedReceiver<Piece>,
) -> Result<Vote, Failed> {
    let head = begin.head.clone();
    // openraft holds the owner; between two of its turns we may ask.
    let sink = raft.with_state_machine(move |machine| {
        let sink = machine.receive(head);
        Box::pin(async move { sink })
    });
    let mut sink: Box<dyn SnapshotSink> = match shared.alive(sink).await {
        Ok(sink) => sink.map_err(|error| Failed::Refused(error.to_string()))?,
        Err(_) => return Err(Failed::Stopped),
    };
    shared.tell();
    let consistent_from = loop {
        match next_piece(shared, &mut arriving).await? {
            Piece::Frame(frame) => {
                let put = shared.alive(sink.put(frame)).await;
                put.map_err(|error| Failed::Refused(error.to_string()))?;
                shared.staged.set(shared.staged.get() + 1);
                shared.tell();
            }
            Piece::End { frames, consistent_from } => {
                assert_eq!(frames, shared.staged.get(), "pieces are taken in the order of their numbers");
                break consistent_from;
            }
        }
    };
    let head = begin.head.clone();
    // openraft asserts it. Only a leader that breaks the rules could have this.
    if state.applied.get().is_some_and(|applied| applied < head.at && head.at.index <= applied.index) {
        return Err(Failed::Refused(format!("{} is not after what is applied here", head.at)));
    }
    let Some(last_membership) = decode_membership(&head.membership) else {
        return Err(Failed::Refused("not a membership".to_owned()));
    };
    let meta = SnapshotMeta { last_log_id: Some(log_id(head.at)), last_membership };
    let snapshot = SnapshotData::Staged(Staged { head, sink, consistent_from });
    let installing = raft.install_full_snapshot(begin.vote, Snapshot { meta, snapshot });
    match shared.alive(installing).await {
        Ok(response) => Ok(response.vote),
        Err(_) => Err(Failed::Stopped),
    }
}

/// Waits for as long as the sender may come back.
async fn next_piece(shared: &Shared, arriving: &mut mpsc::UnboundedReceiver<Piece>) -> Result<Piece, Failed> {
    let mut gone = None;
    loop {
        match timeout(ALIVE_EVERY, arriving.recv()).await {
            Ok(Some(piece)) => return Ok(piece),
            Ok(None) => return Err(Failed::Deserted),
            Err(_) if !shared.outbox.borrow().is_closed() => {
                gone = None;
                shared.tell();
            }
            Err(_) => {
                let since = *gone.get_or_insert_with(Instant::now);
                if since.elapsed() > RESUMES_WITHIN {
                    return Err(Failed::Deserted);
                }
            }
        }
    }
}
