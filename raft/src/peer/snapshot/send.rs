//! The leader's end of a transfer.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use openraft::errors::{ReplicationClosed, Unreachable};
use tokio::sync::mpsc::{UnboundedReceiver, error::TryRecvError};
use tokio::time::{Instant, timeout};

use super::{Answer, Begin, Rate, WINDOW, put_begin, put_end, put_frame};
use crate::bounds::Bounded;
use crate::machine::SnapshotSource;
use crate::peer::frame::Kind;
use crate::peer::link::{Connection, Link};
use crate::state::State;
use crate::types::{SnapshotResponse, StreamingError, Vote};
use crate::{GroupId, SNAPSHOT_FRAME_BYTES_MAX};

/// A receiver speaks every second. One that does not is called on another connection.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// Nothing more was staged for so long: the transfer is given up, and with it the log that is kept for it. openraft
/// begins anew. Of a transfer that was lost before anything was staged nothing is worth keeping: [`SILENCE_MAX`] is
/// enough.
const STALLED_MAX: Duration = Duration::from_secs(60);
/// The same once everything is staged, of a receiver that speaks: it applies what it was at, and installs.
const INSTALLING_MAX: Duration = Duration::from_secs(600);
/// Between two tries to reach the receiver.
const RETRY: Duration = Duration::from_millis(50);

/// Sends what `source` gives to the replica `to`, until it is installed there, refused, or `cancel` is ready.
pub async fn send(
    link: Rc<Link>,
    rate: Rc<Rate>,
    state: Rc<State>,
    to: u64,
    vote: Vote,
    source: Box<dyn SnapshotSource>,
    cancel: impl Future<Output = ReplicationClosed>,
) -> Result<SnapshotResponse, StreamingError> {
    let head = source.head();
    let (group, at) = (state.id, head.at);
    let Some(pinned) = state.pin(to, at.index) else {
        return Err(unreachable("the log after the snapshot is being purged"));
    };
    let begin = Begin { to, transfer: rand::random(), vote, head };
    tracing::info!(%group, to, %at, "sending a raft snapshot");
    let mut sending = Sending {
        link,
        rate,
        state,
        group,
        begin,
        source,
        window: VecDeque::new(),
        staged: 0,
        consistent_from: None,
        moved: Instant::now(),
        spoke: Instant::now(),
        over: None,
    };
    let outcome = tokio::select! {
        outcome = sending.run() => outcome,
        closed = cancel => {
            tracing::info!(%group, to, "a raft snapshot is cancelled");
            return Err(closed.into());
        }
    };
    match outcome {
        Ok(higher) => {
            tracing::info!(%group, to, frames = sending.staged, "a raft snapshot has arrived");
            pinned.arrived();
            Ok(SnapshotResponse::new(higher))
        }
        Err(why) => {
            tracing::warn!(%group, to, %why, "a raft snapshot was not taken");
            Err(unreachable(&why))
        }
    }
}

pub fn unreachable(why: &str) -> StreamingError {
    Unreachable::new(&io::Error::other(why.to_owned())).into()
}

struct Sending {
    link: Rc<Link>,
    rate: Rc<Rate>,
    state: Rc<State>,
    group: GroupId,
    begin: Begin,
    source: Box<dyn SnapshotSource>,
    /// Frames that were read and are not known to be staged; the first has the number `staged`.
    window: VecDeque<Bytes>,
    staged: u64,
    /// Set when the source has no more.
    consistent_from: Option<u64>,
    /// When the transfer came on for the last time.
    moved: Instant,
    /// When the receiver last said how far it is.
    spoke: Instant,
    /// The connection and session it goes over at the moment.
    over: Option<(Rc<Connection>, u64)>,
}

impl Drop for Sending {
    /// Given up, or done: the receiver need not wait for more.
    fn drop(&mut self) {
        if let Some((connection, session)) = self.over.take() {
            connection.close_session(session);
            connection.outbox.frame(Kind::Close, self.group, session, |_| {});
        }
    }
}

/// Why a transfer does not go on here and now.
enum Stop {
    /// On another connection it may.
    Lost,
    /// It never will.
    Refused(String),
}

impl Sending {
    async fn run(&mut self) -> Result<Vote, String> {
        loop {
            match self.session().await {
                Ok(vote) => return Ok(vote),
                Err(Stop::Refused(why)) => return Err(why),
                Err(Stop::Lost) if self.is_stalled() || self.never_began() => {
                    return Err("nothing more is staged".to_owned());
                }
                Err(Stop::Lost) => tokio::time::sleep(RETRY).await,
            }
        }
    }

    /// Goes on over a connection until that is lost.
    async fn session(&mut self) -> Result<Vote, Stop> {
        let connection = self.link.up().await.map_err(|_| Stop::Lost)?;
        let (session, mut answers) = connection.open_snapshot();
        if let Some((old, session)) = self.over.replace((connection.clone(), session)) {
            old.close_session(session);
        }
        connection.outbox.frame(Kind::Snapshot, self.group, session, |out| put_begin(out, &self.begin));
        let (mut next, staged) = match next_answer(&mut answers).await? {
            Answer::Taken { arrived, staged } => (arrived, staged),
            other => return self.heard(other)?.ok_or(Stop::Lost),
        };
        if next < self.staged || next > self.read() + u64::from(self.consistent_from.is_some()) {
            return Err(Stop::Refused(format!(
                "{next} frames have arrived, of {} to {}",
                self.staged,
                self.read()
            )));
        }
        self.is_staged(staged)?;
        loop {
            match answers.try_recv() {
                Ok(answer) => match self.heard(answer)? {
                    Some(vote) => return Ok(vote),
                    None => continue,
                },
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Err(Stop::Lost),
            }
            let unsent =
                usize::try_from(next - self.staged.min(next)).ok().and_then(|at| self.window.get(at));
            if let Some(frame) = unsent {
                let frame = frame.clone();
                self.rate.take(frame.len()).await;
                connection.outbox.frame(Kind::SnapshotFrame, self.group, session, |out| {
                    put_frame(out, next, &frame);
                });
                next += 1;
                self.moved = Instant::now();
            } else if let Some(consistent_from) = self.consistent_from
                && next == self.read()
            {
                connection.outbox.frame(Kind::SnapshotEnd, self.group, session, |out| {
                    put_end(out, next, consistent_from);
                });
                next += 1;
            } else if self.consistent_from.is_none() && (self.window.len() as u64) < WINDOW {
                self.read_more().await?;
            } else {
                let answer = next_answer(&mut answers).await?;
                if let Some(vote) = self.heard(answer)? {
                    return Ok(vote);
                }
                if self.is_stalled() {
                    return Err(Stop::Refused("nothing more is staged".to_owned()));
                }
            }
        }
    }

    /// Frames that were read from the source.
    fn read(&self) -> u64 {
        self.staged + self.window.len() as u64
    }

    async fn read_more(&mut self) -> Result<(), Stop> {
        match self.source.next().await {
            Ok(Some(frame)) if frame.len() > SNAPSHOT_FRAME_BYTES_MAX => {
                Err(Stop::Refused(format!("the owner gave a frame of {} bytes", frame.len())))
            }
            Ok(Some(frame)) => {
                self.window.push_back(frame);
                Ok(())
            }
            Ok(None) => {
                self.consistent_from = self.consistent_from_now();
                Ok(())
            }
            Err(error) => Err(Stop::Refused(format!("the owner cannot go on: {error}"))),
        }
    }

    /// What the frames hold is what this replica had applied, or what a former life of it had: both are behind the first
    /// entry of its own term. Until that is applied its log bounds them, because a leader's has everything that was ever
    /// committed. Not to be waited for: it may take the receiver to commit it.
    fn consistent_from_now(&self) -> Option<u64> {
        let at = match self.state.serves() {
            Some(_) => self.state.applied.get(),
            None => self.state.log().and_then(|log| log.bounds().1),
        };
        at.map(|at| at.index)
    }

    /// The vote with which it was taken, once it was.
    fn heard(&mut self, answer: Answer) -> Result<Option<Vote>, Stop> {
        match answer {
            Answer::Taken { staged, .. } => self.is_staged(staged).map(|()| None),
            Answer::Done(vote) => {
                match vote.bounded().and_then(|()| self.state.believes(vote.leader_id.term)) {
                    Ok(()) => Ok(Some(vote)),
                    Err(what) => Err(Stop::Refused(what.to_string())),
                }
            }
            Answer::Refused(why) => Err(Stop::Refused(why)),
            Answer::Unknown => Err(Stop::Refused("the receiver has forgotten it".to_owned())),
        }
    }

    fn is_staged(&mut self, staged: u64) -> Result<(), Stop> {
        if staged > self.read() {
            return Err(Stop::Refused(format!("{staged} frames are staged, of {}", self.read())));
        }
        self.spoke = Instant::now();
        while self.staged < staged {
            self.window.pop_front();
            self.staged += 1;
            self.moved = Instant::now();
        }
        Ok(())
    }

    fn never_began(&self) -> bool {
        self.staged == 0 && self.moved.elapsed() >= SILENCE_MAX
    }

    fn is_stalled(&self) -> bool {
        let all_is_staged = self.consistent_from.is_some() && self.window.is_empty();
        is_stalled(all_is_staged, self.moved.elapsed(), self.spoke.elapsed())
    }
}

/// A transfer that came on and whose receiver spoke so long ago.
fn is_stalled(all_is_staged: bool, moved: Duration, spoke: Duration) -> bool {
    let installing = all_is_staged && spoke <= STALLED_MAX;
    moved > if installing { INSTALLING_MAX } else { STALLED_MAX }
}

async fn next_answer(answers: &mut UnboundedReceiver<Answer>) -> Result<Answer, Stop> {
    match timeout(SILENCE_MAX, answers.recv()).await {
        Ok(Some(answer)) => Ok(answer),
        Ok(None) | Err(_) => Err(Stop::Lost),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::is_stalled;

    /// The log is kept for the receiver until the transfer is given up.
    #[test]
    fn a_receiver_has_long_to_install_and_one_that_is_not_heard_has_not() {
        let seconds = Duration::from_secs;
        assert!(!is_stalled(true, seconds(500), seconds(1)), "it installs");
        assert!(is_stalled(true, seconds(700), seconds(1)), "it installs for ever");
        assert!(is_stalled(true, seconds(500), seconds(61)), "it is gone");
        assert!(is_stalled(false, seconds(61), seconds(1)), "it takes nothing");
        assert!(!is_stalled(false, seconds(59), seconds(59)), "it may come back");
    }
}
