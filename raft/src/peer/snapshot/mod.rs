//! A raft snapshot on its way from a leader to a replica that needs entries the leader has purged.
//!
//! ```text
//!  StateMachine::snapshot ──frames──▶ send.rs ══ a connection of its own ══▶ receive.rs ──put──▶ StateMachine::receive
//!                                        ▲                                       │
//!                                        └──────── how much is staged ───────────┤ all of it
//!                                                                                ▼
//!                                                       Raft::install_full_snapshot ──▶ StateMachine::install
//! ```
//!
//! What always holds:
//!
//! - Appends never wait behind a snapshot's bytes: snapshots have a connection of their own between two processes, and
//!   a rate that all of a process share.
//! - What is on its way and not staged yet is bounded by [`WINDOW`] frames, on both ends.
//! - A transfer has a random number. A connection that breaks is made again, and the transfer goes on with the next
//!   frame the receiver lacks, while both processes and the leader's term last; otherwise it begins anew.
//! - A receiver has at most one transfer of a group: a new one drops what the old one had staged.
//! - Nothing is installed before all of it is staged, and openraft has accepted the leader's vote.
//!
//! It does not know what is in a frame.

pub(super) mod receive;
pub(super) mod send;

use std::cell::Cell;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::time::Instant;

use super::message::{get_position, get_vote, put_vote};
use crate::SNAPSHOT_FRAME_BYTES_MAX;
use crate::bounds::{Beyond, Bounded};
use crate::machine::{SnapshotHead, decode_membership};
use crate::types::Vote;

/// Frames that may be on their way or waiting to be staged: enough to keep a 10 Gb/s link and a disk busy at once.
pub(super) const WINDOW: u64 = 8;
/// A receiver that has nothing to tell says that it is still there.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// The longest reason for a refusal that is carried.
const REASON_BYTES_MAX: usize = 1024;

/// The first message of a transfer, or of its going on over another connection.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Begin {
    pub to: u64,
    /// Random: which transfer, among all there ever were.
    pub transfer: u64,
    /// The leader's.
    pub vote: Vote,
    pub head: SnapshotHead,
}

impl Bounded for Begin {
    fn bounded(&self) -> Result<(), Beyond> {
        self.vote.bounded()?;
        self.head.at.bounded()?;
        let membership = decode_membership(&self.head.membership);
        membership.map_or(Ok(()), |stored| stored.membership().bounded())
    }
}

/// What a receiver says about a transfer.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Answer {
    /// So many frames have arrived (and the end, which counts as one), and so many of those are staged.
    Taken { arrived: u64, staged: u64 },
    /// openraft has taken it, or refused it for a higher vote.
    Done(Vote),
    /// It cannot be received here.
    Refused(String),
    /// The transfer is not known here (any more).
    Unknown,
}

pub(super) fn put_begin(out: &mut BytesMut, begin: &Begin) {
    out.put_u64_le(begin.to);
    out.put_u64_le(begin.transfer);
    put_vote(out, &begin.vote);
    out.put_u64_le(begin.head.at.term);
    out.put_u64_le(begin.head.at.index);
    out.put_slice(&begin.head.membership);
}

/// Only what a leader can mean: openraft asserts as much.
pub(super) fn get_begin(mut from: Bytes) -> Option<Begin> {
    let (to, transfer) = (from.try_get_u64_le().ok()?, from.try_get_u64_le().ok()?);
    let vote = get_vote(&mut from)?;
    let at = get_position(&mut from)?;
    let membership = decode_membership(&from)?;
    let membership_at = membership.log_id().as_ref().map(crate::types::position);
    let sound = vote.committed && at.term <= vote.leader_id.term && membership_at <= Some(at);
    sound.then_some(Begin { to, transfer, vote, head: SnapshotHead { at, membership: from } })
}

pub(super) fn put_frame(out: &mut BytesMut, number: u64, frame: &[u8]) {
    out.put_u64_le(number);
    out.put_slice(frame);
}

pub(super) fn get_frame(mut from: Bytes) -> Option<(u64, Bytes)> {
    let number = from.try_get_u64_le().ok()?;
    (from.len() <= SNAPSHOT_FRAME_BYTES_MAX).then_some((number, from))
}

/// The number of frames there were, and what the sender has applied by now.
pub(super) fn put_end(out: &mut BytesMut, frames: u64, consistent_from: u64) {
    out.put_u64_le(frames);
    out.put_u64_le(consistent_from);
}

pub(super) fn get_end(mut from: Bytes) -> Option<(u64, u64)> {
    let end = (from.try_get_u64_le().ok()?, from.try_get_u64_le().ok()?);
    from.is_empty().then_some(end)
}

pub(super) fn put_answer(out: &mut BytesMut, answer: &Answer) {
    match answer {
        Answer::Taken { arrived, staged } => {
            out.put_u8(0);
            out.put_u64_le(*arrived);
            out.put_u64_le(*staged);
        }
        Answer::Done(vote) => {
            out.put_u8(1);
            put_vote(out, vote);
        }
        Answer::Refused(reason) => {
            out.put_u8(2);
            out.put_slice(&reason.as_bytes()[..reason.len().min(REASON_BYTES_MAX)]);
        }
        Answer::Unknown => out.put_u8(3),
    }
}

pub(super) fn get_answer(mut from: Bytes) -> Option<Answer> {
    let answer = match from.try_get_u8().ok()? {
        0 => Answer::Taken { arrived: from.try_get_u64_le().ok()?, staged: from.try_get_u64_le().ok()? },
        1 => Answer::Done(get_vote(&mut from)?),
        2 => {
            let reason = String::from_utf8_lossy(&from[..from.len().min(REASON_BYTES_MAX)]).into_owned();
            from.clear();
            Answer::Refused(reason)
        }
        3 => Answer::Unknown,
        _ => return None,
    };
    from.is_empty().then_some(answer)
}

/// Bytes per second that all snapshots of a process together may send.
#[derive(Debug)]
pub(crate) struct Rate {
    bytes_per_second: u64,
    /// What was granted so far is used up by then.
    free_at: Cell<Option<Instant>>,
}

impl Rate {
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), free_at: Cell::new(None) }
    }

    /// Waits until `bytes` more may go, in the order of asking. Dropped while it waits, its grant is lost.
    pub async fn take(&self, bytes: usize) {
        let now = Instant::now();
        let start = self.free_at.get().map_or(now, |at| at.max(now));
        let nanos = u128::from(bytes as u64) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let lasts = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.free_at.set(Some(start + lasts));
        if start > now {
            tokio::time::sleep_until(start).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::{Bytes, BytesMut};
    use proptest::prelude::{any, prop, proptest};

    use super::{
        Answer, Begin, get_answer, get_begin, get_end, get_frame, put_answer, put_begin, put_end, put_frame,
    };
    use crate::machine::{SnapshotHead, encode_membership};
    use crate::types::{LeaderId, Vote};
    use crate::{Position, SNAPSHOT_FRAME_BYTES_MAX, group};

    fn begin() -> Begin {
        let vote = Vote { leader_id: LeaderId { term: 7, voted_for: 3 }, committed: true };
        let membership = encode_membership(&group::no_membership());
        Begin {
            to: 2,
            transfer: 99,
            vote,
            head: SnapshotHead { at: Position { term: 6, index: 5 }, membership },
        }
    }

    fn bytes(put: impl FnOnce(&mut BytesMut)) -> Bytes {
        let mut out = BytesMut::new();
        put(&mut out);
        out.freeze()
    }

    #[test]
    fn every_message_of_a_snapshot_survives_its_bytes() {
        let sent = bytes(|out| put_begin(out, &begin()));
        assert_eq!(get_begin(sent.clone()), Some(begin()));
        for cut in 0..sent.len() {
            assert_eq!(get_begin(sent.slice(..cut)), None, "cut at {cut}");
        }
        let end = bytes(|out| put_end(out, 3, 4));
        assert_eq!(get_end(end.clone()), Some((3, 4)));
        assert_eq!(get_end(end.slice(..15)), None);
        assert_eq!(get_end([&end[..], &[0]].concat().into()), None);
        let answers = [
            Answer::Taken { arrived: 2, staged: 1 },
            Answer::Done(begin().vote),
            Answer::Refused("no".to_owned()),
            Answer::Unknown,
        ];
        for answer in answers {
            assert_eq!(get_answer(bytes(|out| put_answer(out, &answer))), Some(answer));
        }
    }

    #[test]
    fn a_frame_is_bounded_and_a_reason_is_cut() {
        let largest = vec![1; SNAPSHOT_FRAME_BYTES_MAX];
        let sent = bytes(|out| put_frame(out, 5, &largest));
        assert_eq!(get_frame(sent), Some((5, largest.into())));
        assert_eq!(get_frame(bytes(|out| put_frame(out, 5, &vec![1; SNAPSHOT_FRAME_BYTES_MAX + 1]))), None);
        assert_eq!(get_frame(Bytes::from_static(&[0; 7])), None);
        let long = Answer::Refused("ü".repeat(5000));
        let Some(Answer::Refused(reason)) = get_answer(bytes(|out| put_answer(out, &long))) else {
            panic!("a refusal");
        };
        assert!(reason.starts_with("üüü") && reason.len() < 1100);
    }

    #[test]
    fn what_no_leader_can_mean_is_no_beginning() {
        let mut later = begin();
        later.head.at.term = 8;
        assert_eq!(get_begin(bytes(|out| put_begin(out, &later))), None, "a position of a later term");
        let mut candidate = begin();
        candidate.vote.committed = false;
        assert_eq!(get_begin(bytes(|out| put_begin(out, &candidate))), None, "not a leader's vote");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_none_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..150)) {
            let bytes = Bytes::from(bytes);
            let _ = get_begin(bytes.clone());
            let _ = get_frame(bytes.clone());
            let _ = get_end(bytes.clone());
            let _ = get_answer(bytes);
        }

        #[test]
        fn a_changed_byte_never_panics(place: prop::sample::Index, byte: u8) {
            let mut changed = bytes(|out| put_begin(out, &begin())).to_vec();
            let place = place.index(changed.len());
            changed[place] = byte;
            let _ = get_begin(changed.into());
        }
    }
}
