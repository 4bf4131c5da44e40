//! What a term, an index or a number of somebody may be at most, asked wherever one comes in: from another process, or
//! from a disk.
//!
//! Whoever adds one to any of these may do so without looking. A bound has no meaning but that: nothing real comes near
//! one, and between it and the end of 64 bits is more than everything that happens after it can use up.
//!
//! A term is bounded twice. [`TERM_MAX`] alone would let one forged vote use up all terms there are; so a replica also
//! takes no more of them at a time than elections can have used ([`Ceiling`]). That is judged where messages come in,
//! with a clock; what was taken is a function of the log and the votes, as ever.

use std::time::Instant;

use openraft::entry::RaftEntry;
use openraft::raft::StreamAppendError;

use crate::Position;
use crate::types::{
    AppendRequest, AppendResult, LogId, Membership, Payload, TransferRequest, Vote, VoteRequest,
    VoteResponse, position,
};

/// The highest term. At two elections a second for a thousand years a group is at 2³⁶.
pub const TERM_MAX: u64 = 1 << 56;
/// The highest index. A million entries a second, of one group, take two thousand years.
pub const INDEX_MAX: u64 = 1 << 56;
/// The highest number of a replica or a group. They are given one by one.
pub const REPLICA_MAX: u64 = 1 << 56;
/// The highest number of a process: chunkservers have 32 bits.
pub const PROCESS_MAX: u64 = u32::MAX as u64;
/// The highest sequence of a log file: one of 64 MiB a millisecond takes two million years.
pub const FILE_SEQUENCE_MAX: u64 = 1 << 56;
/// Replicas that a membership names, and configurations of them; a change of members has two.
pub const MEMBERS_MAX: u32 = 64;
pub const CONFIGURATIONS_MAX: u32 = 2;

/// So far above what it knew at its start a replica goes at once: 68 years of two elections a second, while it was away.
const TERMS_AWAY: u64 = 1 << 32;
/// And so many more for each second since: a million times what any group holds, and 2⁵⁶ take 136 years of it. So a stranger
/// who forges votes all day brings no group to an end, and whoever was away meanwhile is let in after the same time.
const TERMS_PER_SECOND: u64 = 1 << 24;
/// A replica that knows nothing yet must join a group that is anywhere. Half of all terms are left above.
const TERM_JOINED_MAX: u64 = TERM_MAX / 2;
/// What a repaired vote is put above everything known: no group had so many elections, and its other members, who may be
/// well, take it at once.
const TERMS_REPAIRED: u64 = TERMS_AWAY / 2;

/// What cannot be meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Beyond {
    #[error("term {0} is beyond any that elections can reach, {TERM_MAX}")]
    Term(u64),
    #[error("term {term} is too far above what is known here; {ceiling} is believed now")]
    TooFar { term: u64, ceiling: u64 },
    #[error("index {0} is beyond any that a log can reach, {INDEX_MAX}")]
    Index(u64),
    #[error("number {0} is beyond any that is given to a replica, {REPLICA_MAX}")]
    Replica(u64),
    #[error("number {0} is beyond any that is given to a process, {PROCESS_MAX}")]
    Process(u64),
    #[error("an entry of term {entry} under a vote of term {vote}")]
    LaterThanItsVote { entry: u64, vote: u64 },
    #[error("in the name of the replica that it is sent to")]
    InMyName,
    #[error("a leader's word with a vote that makes nobody leader, or a candidate's with one that does")]
    OtherRole,
}

/// Something whose numbers can be looked at before anything is done with them.
pub trait Bounded {
    fn bounded(&self) -> Result<(), Beyond>;
}

impl<T: Bounded> Bounded for Option<T> {
    fn bounded(&self) -> Result<(), Beyond> {
        self.as_ref().map_or(Ok(()), Bounded::bounded)
    }
}

pub fn term(term: u64) -> Result<(), Beyond> {
    if term <= TERM_MAX { Ok(()) } else { Err(Beyond::Term(term)) }
}

fn index(index: u64) -> Result<(), Beyond> {
    if index <= INDEX_MAX { Ok(()) } else { Err(Beyond::Index(index)) }
}

fn replica(replica: u64) -> Result<(), Beyond> {
    if replica <= REPLICA_MAX { Ok(()) } else { Err(Beyond::Replica(replica)) }
}

fn process(process: u64) -> Result<(), Beyond> {
    if process <= PROCESS_MAX { Ok(()) } else { Err(Beyond::Process(process)) }
}

impl Bounded for Position {
    fn bounded(&self) -> Result<(), Beyond> {
        term(self.term)?;
        index(self.index)
    }
}

impl Bounded for LogId {
    fn bounded(&self) -> Result<(), Beyond> {
        position(self).bounded()
    }
}

impl Bounded for Vote {
    fn bounded(&self) -> Result<(), Beyond> {
        term(self.leader_id.term)?;
        replica(self.leader_id.voted_for)
    }
}

impl Bounded for Membership {
    fn bounded(&self) -> Result<(), Beyond> {
        self.nodes().try_for_each(|(number, host)| {
            replica(*number)?;
            process(host.0)
        })
    }
}

/// What a leader says under its vote.
fn led(vote: &Vote, ids: [Option<&LogId>; 2]) -> Result<(), Beyond> {
    vote.bounded()?;
    if !vote.committed {
        return Err(Beyond::OtherRole);
    }
    ids.into_iter().flatten().try_for_each(|id| {
        id.bounded()?;
        let (entry, vote) = (position(id).term, vote.leader_id.term);
        if entry <= vote { Ok(()) } else { Err(Beyond::LaterThanItsVote { entry, vote }) }
    })
}

impl Bounded for AppendRequest {
    fn bounded(&self) -> Result<(), Beyond> {
        let last = self.entries.last().map(RaftEntry::log_id);
        led(&self.vote, [self.prev_log_id.as_ref(), self.leader_commit.as_ref()])?;
        // They follow each other, so the last will do.
        led(&self.vote, [last.as_ref(), None])?;
        self.entries.iter().try_for_each(|entry| match &entry.payload {
            Payload::Membership(membership) => membership.bounded(),
            Payload::Blank | Payload::Normal(_) => Ok(()),
        })
    }
}

impl Bounded for VoteRequest {
    fn bounded(&self) -> Result<(), Beyond> {
        self.vote.bounded()?;
        self.last_log_id.bounded()?;
        if self.vote.committed { Err(Beyond::OtherRole) } else { Ok(()) }
    }
}

impl Bounded for VoteResponse {
    fn bounded(&self) -> Result<(), Beyond> {
        self.vote.bounded()?;
        self.last_log_id.bounded()
    }
}

impl Bounded for AppendResult {
    fn bounded(&self) -> Result<(), Beyond> {
        match self {
            Ok(matched) => matched.bounded(),
            Err(StreamAppendError::Conflict(at)) => at.bounded(),
            Err(StreamAppendError::HigherVote(vote)) => vote.bounded(),
        }
    }
}

impl Bounded for TransferRequest {
    fn bounded(&self) -> Result<(), Beyond> {
        replica(*self.to_node_id())?;
        led(self.from_leader(), [self.last_log_id(), None])
    }
}

/// How high a term this replica believes.
#[derive(Debug)]
pub struct Ceiling {
    found: u64,
    since: Instant,
}

impl Ceiling {
    /// `found`: the term of what is remembered, 0 if that is nothing.
    pub fn above(found: u64) -> Self {
        Self { found, since: Instant::now() }
    }

    /// `known`: the highest term known by now.
    pub fn judge(&self, known: u64, term: u64) -> Result<(), Beyond> {
        // An answer for nearly every message, without a clock.
        if term <= known || term <= self.found.saturating_add(TERMS_AWAY) {
            return self::term(term);
        }
        let ceiling = self.at(known, self.since.elapsed().as_secs());
        if term <= ceiling { Ok(()) } else { Err(Beyond::TooFar { term, ceiling }) }
    }

    fn at(&self, known: u64, seconds: u64) -> u64 {
        if known == 0 {
            return TERM_JOINED_MAX;
        }
        let since = seconds.saturating_mul(TERMS_PER_SECOND);
        self.found.saturating_add(TERMS_AWAY).saturating_add(since).min(TERM_MAX)
    }
}

/// A term for a replica whose vote is beyond all bounds: above every one that this group has had a leader in, if `known`
/// is the highest that is found in any of its logs. Why: `docs/safety.md`.
pub fn repaired_term(known: u64) -> u64 {
    known.saturating_add(TERMS_REPAIRED).min(TERM_MAX)
}

#[cfg(test)]
mod tests {
    use super::{
        Beyond, Bounded, Ceiling, TERM_JOINED_MAX, TERM_MAX, TERMS_AWAY, TERMS_PER_SECOND, repaired_term,
        term,
    };
    use crate::Position;

    #[test]
    fn a_bound_is_the_last_that_passes() {
        for (value, good) in [(0, true), (1, true), (TERM_MAX, true), (TERM_MAX + 1, false)] {
            assert_eq!(term(value).is_ok(), good, "{value}");
            assert_eq!(Position { term: value, index: 0 }.bounded().is_ok(), good, "{value}");
            assert_eq!(Position { term: 0, index: value }.bounded().is_ok(), good, "{value}");
        }
        for value in [1 << 63, u64::MAX] {
            assert_eq!(term(value), Err(Beyond::Term(value)));
        }
    }

    #[test]
    fn a_replica_believes_what_elections_can_have_used() {
        let ceiling = Ceiling::above(7);
        assert_eq!(ceiling.judge(7, 7 + TERMS_AWAY), Ok(()));
        let far = ceiling.judge(7, 1 << 50);
        assert!(matches!(far, Err(Beyond::TooFar { term: 0x4_0000_0000_0000, .. })), "{far:?}");
        assert_eq!(ceiling.at(7, 10), 7 + TERMS_AWAY + 10 * TERMS_PER_SECOND);
        assert_eq!(ceiling.at(7, u64::MAX), TERM_MAX, "no clock makes it more");
        assert!(ceiling.judge(7, u64::MAX).is_err());
        // What it has already taken is not judged again.
        assert_eq!(ceiling.judge(1 << 50, 1 << 50), Ok(()));
    }

    #[test]
    fn one_that_knows_nothing_joins_a_group_that_is_anywhere() {
        let ceiling = Ceiling::above(0);
        assert_eq!(ceiling.judge(0, TERM_JOINED_MAX), Ok(()));
        assert!(ceiling.judge(0, TERM_JOINED_MAX + 1).is_err());
        assert!(ceiling.judge(1, TERM_JOINED_MAX).is_err(), "it has joined");
    }

    #[test]
    fn a_repaired_vote_is_believed_by_those_who_are_well() {
        for known in [0, 1, 1 << 40, TERM_MAX - 1] {
            let term = repaired_term(known);
            assert!(term > known && Ceiling::above(known).judge(known.max(1), term).is_ok(), "{known}");
        }
        assert_eq!(repaired_term(TERM_MAX), TERM_MAX, "there is nothing above");
    }
}
