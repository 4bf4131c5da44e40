//! A log that nobody runs: what its files hold, read without changing a byte of them.
//!
//! Recovered as [`super::Log::open`] does it, and refused for the same reasons. How far a group is *committed* no single
//! log knows (it is what a majority of the logs agrees on), so [`OfflineLog::replay`] applies everything up to the end,
//! and whoever has the other replicas' logs, too, compares where they end.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use openraft::entry::RaftEntry;

use super::file::{Access, LogFile};
use super::index::Index;
use super::read;
use super::recover::{Recovered, recover};
use super::storage::READ_BYTES;
use super::{LogError, LogOwner, lock};
use crate::machine::{StateMachine, applying};
use crate::node::{StartError, check, check_vote};
use crate::types::position;
use crate::{GroupId, Position, ReplicaId};

/// One directory's log. No process can open it for writing meanwhile.
pub struct OfflineLog {
    groups: BTreeMap<GroupId, Index>,
    files: BTreeMap<u64, Arc<LogFile>>,
    _lock: std::fs::File,
}

/// What the log knows of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OfflineGroup {
    pub replica: ReplicaId,
    /// Of its vote.
    pub term: Option<u64>,
    /// Entries up to here are not in the log any more.
    pub purged: Option<Position>,
    pub last: Option<Position>,
}

impl OfflineLog {
    pub fn open(dir: &Path, owner: LogOwner) -> Result<Self, LogError> {
        let lock = lock(dir)?;
        let Recovered { lives, groups, .. } = recover(dir, owner, Access::Read)?;
        let groups = groups.into_iter().map(|(id, group)| (id, group.into_index())).collect();
        Ok(Self { groups, files: lives.into_iter().collect(), _lock: lock })
    }

    /// Every group that has a log here.
    pub fn groups(&self) -> impl Iterator<Item = (GroupId, OfflineGroup)> + '_ {
        self.groups.keys().filter_map(|id| Some((*id, self.group(*id)?)))
    }

    /// How long the files are that it was written to.
    pub fn file_bytes(&self) -> Option<u64> {
        self.files.values().next_back().and_then(|file| file.len().ok())
    }

    pub fn group(&self, id: GroupId) -> Option<OfflineGroup> {
        let index = self.groups.get(&id)?;
        Some(OfflineGroup {
            replica: ReplicaId(index.replica),
            term: index.vote.map(|vote| vote.term),
            purged: index.purged,
            last: index.last(),
        })
    }

    /// Applies every entry the owner's storage does not hold yet, committed or not, as a start of the group would those
    /// that are. Waits for the disk.
    pub fn replay(
        &self,
        id: GroupId,
        me: ReplicaId,
        machine: &mut dyn StateMachine,
    ) -> Result<(), StartError> {
        let applied = machine.restored().applied;
        let Some(index) = self.groups.get(&id) else {
            return check(id, applied, (None, None), None);
        };
        let found = ReplicaId(index.replica);
        if found != me {
            return Err(StartError::OtherReplica { group: id, found, asked: me });
        }
        check(id, applied, (index.purged, index.last()), index.installing)?;
        let vote = check_vote(me, index.vote.map(|vote| vote.term));
        let mut next = applied.map_or(0, |applied| applied.index + 1).max(index.first());
        while next < index.end() {
            let file = |sequence| self.files.get(&sequence).cloned();
            let spans = read::plan(file, index, next, index.end(), READ_BYTES);
            for entry in read::read_waiting(id, spans)? {
                let at = entry.log_id();
                next = at.index() + 1;
                machine.apply(position(&at), applying(at, entry.payload));
            }
        }
        // Last: what the log holds is worth seeing all the same.
        vote
    }
}
