//! Votes beyond all bounds, lowered in the log of a process that does not run.
//!
//! No program of ours gives such a vote any more (`bounds.rs`); one of before may have, to whoever forged a candidate.
//! Why a replica may take it back, and from which term on it may go, is argued in `docs/safety.md`.

use std::path::Path;

use bytes::Bytes;

use super::append::Record;
use super::format::{self, Kind, VoteRecord};
use super::offline::OfflineLog;
use super::{Log, LogError, LogOptions};
use crate::bounds::{TERM_MAX, repaired_term};
use crate::{GroupId, Position, ReplicaId};

/// A vote that no leader can have been elected with, as far as this log knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImpossibleVote {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub term: u64,
    /// What it becomes. `None`: entries of such terms are in the log, so somebody did lead in one, and it cannot be lowered.
    pub lowered: Option<u64>,
}

impl OfflineLog {
    /// Replicas that do not start for the sake of their vote. `above`: the highest possible term that any other log of
    /// their groups knows.
    pub fn impossible_votes(&self, above: u64) -> Vec<ImpossibleVote> {
        let votes = self.groups().filter_map(|(group, found)| {
            let term = found.term.filter(|term| *term > TERM_MAX)?;
            let known = [found.last, found.purged].into_iter().flatten().map(|at| at.term).max().unwrap_or(0);
            let lowered = (known < TERM_MAX).then(|| repaired_term(known.max(above)));
            Some(ImpossibleVote { group, replica: found.replica, term, lowered })
        });
        votes.collect()
    }
}

/// Lowers them, durably. On a thread of [`crate::spawn_thread`]; `options` as the log's owner has them.
pub async fn lower_votes(dir: &Path, options: LogOptions, votes: &[ImpossibleVote]) -> Result<(), LogError> {
    let log = Log::open(dir, options).await?;
    for vote in votes {
        let Some(term) = vote.lowered else { continue };
        // It votes for nobody else in that term.
        let record = VoteRecord { term, voted_for: vote.replica.0, committed: false };
        let payload = Bytes::copy_from_slice(&format::vote_payload(&record));
        let at = Position { term, index: 0 };
        log.push(&Record { kind: Kind::Vote, group: vote.group, at, parts: &[payload] }).await?;
        if let Some(index) = log.core().groups.get(&vote.group) {
            index.borrow_mut().vote = Some(record);
        }
    }
    log.synced().await?;
    log.close().await;
    Ok(())
}
