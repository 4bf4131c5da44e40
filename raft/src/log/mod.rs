//! The log (stand-in in memory; the real one follows in the next commit with the same interface).

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use openraft::OptionalSend;
use openraft::entry::RaftEntry;
use openraft::storage::{RaftLogReader, RaftLogStorage};

use crate::group::State;
use crate::types::{Entry, IoFlushed, LogId, LogState, Types, Vote, position};
use crate::{GroupId, Position, ProcessId, ReplicaId};

/// To whom a log belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogOwner {
    pub cluster: [u8; 16],
    pub process: ProcessId,
}

/// How a log is kept.
#[derive(Debug, Clone)]
pub struct LogOptions {
    pub owner: LogOwner,
    /// Size of each file. Files are written in full at creation, and recycled.
    pub file_bytes: u64,
    /// Recent entries kept in memory, at most, over all groups.
    pub memory_bytes_max: usize,
    /// Submit with io_uring where the kernel allows it.
    pub io_uring: bool,
}

impl LogOptions {
    pub fn new(owner: LogOwner) -> Self {
        Self { owner, file_bytes: 64 << 20, memory_bytes_max: 64 << 20, io_uring: true }
    }
}

/// Why there is no log, or none any more.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogError {
    /// The directory belongs to somebody else. Nothing was touched.
    #[error("{dir} belongs to another process or cluster: {found:?}")]
    WrongOwner { dir: PathBuf, found: LogOwner },
    /// A later release wrote it. Nothing was touched.
    #[error("{file} has format version {found}; this program reads up to {known}")]
    NewerVersion { file: PathBuf, found: u32, known: u32 },
    /// Bytes that were durable are not what was written. This replica must leave its groups and join anew.
    #[error("{file} is damaged at byte {offset}: {what}")]
    Damaged { file: PathBuf, offset: u64, what: &'static str },
    /// A write, a sync or a read failed; the log is dead.
    #[error("{doing} {file}: {source}")]
    Io { doing: &'static str, file: PathBuf, source: Rc<io::Error> },
    /// The log was closed.
    #[error("the log is closed")]
    Closed,
}

/// How full a log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogUsage {
    /// On disk, in files of any kind.
    pub file_bytes: u64,
    /// In files that cannot be recycled yet.
    pub live_bytes: u64,
    /// Of recent entries in memory.
    pub memory_bytes: usize,
    /// Ever appended, records and headers, since this log was opened.
    pub appended_bytes: u64,
}

/// One synced log for all groups of one disk and shard.
#[derive(Clone)]
pub struct Log(Rc<RefCell<BTreeMap<GroupId, Rc<RefCell<Memory>>>>>);

#[derive(Default)]
struct Memory {
    vote: Option<Vote>,
    first: u64,
    entries: VecDeque<Entry>,
    purged: Option<LogId>,
    state: Option<Rc<State>>,
}

impl Log {
    pub async fn open(_dir: &Path, _options: LogOptions) -> Result<Self, LogError> {
        Ok(Self(Rc::default()))
    }

    /// Everything appended so far, by any group, is durable when this returns.
    pub async fn synced(&self) -> Result<(), LogError> {
        Ok(())
    }

    pub fn usage(&self) -> LogUsage {
        LogUsage::default()
    }

    /// Every group that has a log here.
    pub fn groups(&self) -> Vec<GroupId> {
        self.0.borrow().keys().copied().collect()
    }

    /// Why this log is dead, if it is.
    pub fn failed(&self) -> Option<LogError> {
        None
    }

    /// Returns when the log dies.
    pub async fn until_failed(&self) -> LogError {
        std::future::pending().await
    }

    pub(crate) fn command_bytes_max(&self) -> usize {
        4 << 20
    }

    pub(crate) async fn group(&self, id: GroupId, _me: ReplicaId) -> Result<GroupLog, LogError> {
        Ok(GroupLog(self.0.borrow_mut().entry(id).or_default().clone()))
    }

    pub(crate) async fn remove_group(&self, id: GroupId) -> Result<(), LogError> {
        self.0.borrow_mut().remove(&id);
        Ok(())
    }

    pub(crate) async fn close(&self) {}
}

#[derive(Clone)]
pub(crate) struct GroupLog(Rc<RefCell<Memory>>);

impl GroupLog {
    pub fn bounds(&self) -> (Option<Position>, Option<Position>) {
        let memory = self.0.borrow();
        let last = memory.entries.back().map(|entry| entry.log_id()).or(memory.purged);
        (memory.purged.as_ref().map(position), last.as_ref().map(position))
    }

    pub fn tell(&self, state: Rc<State>) {
        self.0.borrow_mut().state = Some(state);
    }
}

impl RaftLogReader<Types> for GroupLog {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry>, io::Error> {
        let memory = self.0.borrow();
        let start = match range.start_bound() {
            Bound::Included(&at) => at,
            Bound::Excluded(&at) => at + 1,
            Bound::Unbounded => 0,
        }
        .max(memory.first);
        let end = match range.end_bound() {
            Bound::Included(&at) => at + 1,
            Bound::Excluded(&at) => at,
            Bound::Unbounded => u64::MAX,
        };
        let entries = memory.entries.iter().filter(|entry| (start..end).contains(&entry.log_id().index()));
        Ok(entries.cloned().collect())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.0.borrow().vote)
    }
}

impl RaftLogStorage<Types> for GroupLog {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState, io::Error> {
        let memory = self.0.borrow();
        let last = memory.entries.back().map(|entry| entry.log_id()).or(memory.purged);
        Ok(LogState { last_purged_log_id: memory.purged, last_log_id: last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let state = self.0.borrow().state.clone();
        if let Some(state) = state {
            state.vote_saved(vote);
        }
        self.0.borrow_mut().vote = Some(*vote);
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, flushed: IoFlushed) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        {
            let mut memory = self.0.borrow_mut();
            for entry in entries {
                if memory.entries.is_empty() {
                    memory.first = entry.log_id().index();
                }
                memory.entries.push_back(entry);
            }
        }
        flushed.io_completed(Ok(()));
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let keep = last.map_or(0, |id| id.index() + 1);
        self.0.borrow_mut().entries.retain(|entry| entry.log_id().index() < keep);
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let mut memory = self.0.borrow_mut();
        memory.entries.retain(|entry| entry.log_id().index() > upto.index());
        memory.first = upto.index() + 1;
        memory.purged = Some(upto);
        Ok(())
    }
}
