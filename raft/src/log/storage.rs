//! One group's part of the log, as openraft wants it.

use std::cell::RefCell;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::rc::Rc;

use bytes::Bytes;
use futures::Stream;
use openraft::OptionalSend;
use openraft::entry::RaftEntry;
use openraft::storage::{RaftLogReader, RaftLogStorage};

use super::append::{Record, Waiting};
use super::format::{self, Kind, VoteRecord};
use super::index::{Index, memory_bytes};
use super::{Log, LogError, read};
use crate::state::State;
use crate::types::{Entry, IoFlushed, LogId, LogState, Payload, Types, Vote, log_id, position};
use crate::{Command, GroupId, Position};

/// Entries read in one go for a follower or for apply: a frame of this size is a few hundred microseconds of a
/// 25 Gb/s link, and as much memory as we want to hold per follower and group.
pub(super) const READ_BYTES: u64 = 1 << 20;

/// openraft's log of one group. A handle: clones share the log.
#[derive(Clone)]
pub(crate) struct GroupLog {
    log: Log,
    group: GroupId,
    index: Rc<RefCell<Index>>,
    /// Hears of votes before they are saved.
    state: Option<Rc<State>>,
}

impl GroupLog {
    pub fn new(log: Log, group: GroupId, index: Rc<RefCell<Index>>) -> Self {
        Self { log, group, index, state: None }
    }

    /// The last purged and the last position.
    pub fn bounds(&self) -> (Option<Position>, Option<Position>) {
        let index = self.index.borrow();
        (index.purged, index.last())
    }

    /// Index of the last entry that no crash of ours, or of the machine, can lose.
    pub fn durable(&self) -> Option<u64> {
        self.index.borrow().last_until(self.log.durable())
    }

    /// The vote's term.
    pub fn term(&self) -> Option<u64> {
        self.index.borrow().vote.map(|vote| vote.term)
    }

    pub fn vote(&self) -> Option<Vote> {
        self.index.borrow().vote.map(|vote| match vote.committed {
            true => Vote::new_committed(vote.term, vote.voted_for),
            false => Vote::new(vote.term, vote.voted_for),
        })
    }

    /// A raft snapshot at this position was being installed when the process ended.
    pub fn installing(&self) -> Option<Position> {
        self.index.borrow().installing
    }

    /// From here on, durably: the owner's state may be that of a raft snapshot at `at`, which this log does not reach.
    pub async fn set_installing(&self, at: Position) -> Result<(), LogError> {
        self.log.push(&Record { kind: Kind::Installing, group: self.group, at, parts: &[] }).await?;
        self.index.borrow_mut().installing = Some(at);
        self.log.synced().await
    }

    /// Index of the last entry that lies outside the newest `bytes` of the log's files.
    pub fn last_beyond(&self, bytes: u64) -> Option<u64> {
        let newest = self.log.core().newest_from(bytes);
        self.index.borrow().last_before(newest)
    }

    pub fn tell(&mut self, state: Rc<State>) {
        self.state = Some(state);
    }

    async fn push(&self, kind: Kind, at: Position, parts: &[Bytes]) -> io::Result<()> {
        self.log
            .push(&Record { kind, group: self.group, at, parts })
            .await
            .map(drop)
            .map_err(io::Error::other)
    }

    /// The entries of `[start, end)` that are in the log; about `bytes_max` of them at most, one at least.
    async fn entries(&self, start: u64, end: u64, bytes_max: u64) -> Result<Vec<Entry>, LogError> {
        let (start, end, spans, from_disk) = {
            let index = self.index.borrow();
            let (start, end) = (start.max(index.first()), end.min(index.end()));
            if start >= end {
                return Ok(Vec::new());
            }
            let from_disk = index.recent_first().clamp(start, end);
            let spans = match from_disk > start {
                true => {
                    let core = self.log.core();
                    read::plan(|sequence| core.file(sequence), &index, start, from_disk, bytes_max)
                }
                false => Vec::new(),
            };
            (start, end, spans, from_disk)
        };
        if spans.is_empty() {
            return Ok(self.recent(start, end, bytes_max));
        }
        let mut entries = read::read(self.group, spans).await?;
        let read = entries.last().map_or(start, |entry| entry.log_id().index() + 1);
        let bytes: u64 = entries.iter().map(|entry| memory_bytes(entry) as u64).sum();
        // What was in memory may have left it meanwhile: then there is less, and never a hole.
        if read == from_disk && bytes < bytes_max && self.index.borrow().recent_first() <= read {
            entries.extend(self.recent(read, end, bytes_max - bytes));
        }
        Ok(entries)
    }

    /// See [`crate::Group::commands`].
    pub async fn commands(
        &self,
        first: u64,
        last: u64,
        bytes_max: u64,
    ) -> Result<Option<Vec<(Position, Command)>>, LogError> {
        let entries = self.entries(first, last.saturating_add(1), bytes_max).await?;
        // Without a hole, so both ends will do.
        let ends = entries.first().zip(entries.last()).map(|(a, b)| (a.log_id().index(), b.log_id().index()));
        if ends != Some((first, last)) {
            return Ok(None);
        }
        let command = |entry: Entry| match entry.payload {
            Payload::Normal(command) => Some((position(&entry.log_id), command)),
            Payload::Blank | Payload::Membership(_) => None,
        };
        Ok(Some(entries.into_iter().filter_map(command).collect()))
    }

    fn recent(&self, start: u64, end: u64, bytes_max: u64) -> Vec<Entry> {
        let mut bytes = 0;
        let mut entries = Vec::new();
        for entry in self.index.borrow().recent(start, end) {
            if bytes >= bytes_max {
                break;
            }
            bytes += memory_bytes(entry) as u64;
            entries.push(entry.clone());
        }
        entries
    }

    fn dropped(&self, drop_entries: impl FnOnce(&mut Index, &mut Vec<super::index::Place>) -> usize) {
        let mut places = Vec::new();
        let memory = drop_entries(&mut self.index.borrow_mut(), &mut places);
        self.log.core().entries_dropped(&places, memory);
    }
}

fn bounds<R: RangeBounds<u64>>(range: &R) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(&at) => at,
        Bound::Excluded(&at) => at + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(&at) => at + 1,
        Bound::Excluded(&at) => at,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogReader<Types> for GroupLog {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry>, io::Error> {
        let (mut start, end) = bounds(&range);
        let mut all = Vec::new();
        loop {
            let more = self.entries(start, end, u64::MAX).await.map_err(io::Error::other)?;
            let Some(last) = more.last() else { return Ok(all) };
            start = last.log_id().index() + 1;
            if all.is_empty() {
                all = more;
            } else {
                all.extend(more);
            }
            if start >= end {
                return Ok(all);
            }
        }
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.entries(start, end, READ_BYTES).await.map_err(io::Error::other)
    }

    /// In pieces: after a restart the range may be everything since the last checkpoint.
    async fn entries_stream<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend {
        let (start, end) = bounds(&range);
        let first = (self.clone(), Vec::new().into_iter(), start);
        futures::stream::try_unfold(first, move |(log, mut ready, next)| async move {
            if let Some(entry) = ready.next() {
                return Ok(Some((entry, (log, ready, next))));
            }
            if next >= end {
                return Ok(None);
            }
            let mut ready = log.entries(next, end, READ_BYTES).await.map_err(io::Error::other)?.into_iter();
            let Some(entry) = ready.next() else { return Ok(None) };
            let next = ready.as_slice().last().unwrap_or(&entry).log_id().index() + 1;
            Ok(Some((entry, (log, ready, next))))
        })
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.vote())
    }
}

impl RaftLogStorage<Types> for GroupLog {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState, io::Error> {
        let (purged, last) = self.bounds();
        Ok(LogState { last_purged_log_id: purged.map(log_id), last_log_id: last.map(log_id) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        if let Some(state) = &self.state {
            state.vote_saved(vote);
        }
        let record = VoteRecord {
            term: vote.leader_id.term,
            voted_for: vote.leader_id.voted_for,
            committed: vote.committed,
        };
        let payload = Bytes::copy_from_slice(&format::vote_payload(&record));
        self.push(Kind::Vote, Position { term: record.term, index: 0 }, &[payload]).await?;
        self.index.borrow_mut().vote = Some(record);
        self.log.synced().await.map_err(io::Error::other)
    }

    async fn append<I>(&mut self, entries: I, flushed: IoFlushed) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        for entry in entries {
            let at = position(&entry.log_id());
            let (kind, membership) = read::encode(&entry);
            let parts: &[Bytes] = match &entry.payload {
                Payload::Normal(command) => &command.0,
                _ => membership.as_slice(),
            };
            let record = Record { kind, group: self.group, at, parts };
            let place = self.log.push(&record).await.map_err(io::Error::other)?;
            self.log.core().entry_appended(self.group, &entry, place);
            self.index.borrow_mut().append(entry, place);
        }
        self.log.tell_when_durable(Waiting::Entries(flushed));
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let from = last.map_or(0, |id| id.index() + 1);
        self.push(Kind::Truncate, Position { term: 0, index: from }, &[]).await?;
        self.dropped(|index, places| index.truncate(from, |place| places.push(place)));
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let upto = position(&upto);
        self.push(Kind::Purge, upto, &[]).await?;
        self.dropped(|index, places| index.purge(upto, |place| places.push(place)));
        Ok(())
    }
}
