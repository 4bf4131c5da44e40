//! What the log knows of one group: its vote, where each entry lies, and the recent entries themselves.
//!
//! Nothing here is durable by itself; it is what replaying the group's records gives, plus what is on its way down.

use std::collections::VecDeque;

use openraft::EntryPayload;
use openraft::entry::RaftEntry;

use super::format::{GroupRecord, Mark, VoteRecord};
use crate::types::{Entry, position};
use crate::{GroupId, Position};

/// Where an entry's record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub term: u64,
    /// Of the file.
    pub sequence: u64,
    /// Of the record's first byte in the file.
    pub offset: u32,
    /// Of the record, header included.
    pub length: u32,
}

/// One group's part of the log.
#[derive(Debug)]
pub struct Index {
    pub group: GroupId,
    pub replica: u64,
    pub vote: Option<VoteRecord>,
    pub purged: Option<Position>,
    /// The owner's state may have become that of a raft snapshot at this position, although the log does not reach it
    /// yet: a crash came between the two.
    pub installing: Option<Position>,
    /// Index of the first of `places`.
    first: u64,
    places: VecDeque<Place>,
    /// The last entries, by value: those from here on are all in `recent`.
    recent_first: u64,
    recent: VecDeque<Entry>,
}

/// Memory an entry holds beside its payload, roughly.
const ENTRY_OVERHEAD: usize = 256;

pub fn memory_bytes(entry: &Entry) -> usize {
    ENTRY_OVERHEAD
        + match &entry.payload {
            EntryPayload::Normal(command) => command.len(),
            EntryPayload::Blank | EntryPayload::Membership(_) => 0,
        }
}

impl Index {
    pub fn new(group: GroupId, replica: u64) -> Self {
        Self {
            group,
            replica,
            vote: None,
            purged: None,
            installing: None,
            first: 0,
            places: VecDeque::new(),
            recent_first: 0,
            recent: VecDeque::new(),
        }
    }

    /// As recovery found it: no entry in memory.
    pub fn restored(
        record: &GroupRecord,
        installing: Option<Position>,
        first: u64,
        places: VecDeque<Place>,
    ) -> Self {
        let recent_first = first + places.len() as u64;
        Self {
            vote: record.vote,
            purged: record.purged,
            installing,
            first,
            places,
            recent_first,
            ..Self::new(record.group, record.replica)
        }
    }

    /// For the state record of a new file.
    pub fn record(&self) -> GroupRecord {
        GroupRecord {
            group: self.group,
            replica: self.replica,
            vote: self.vote,
            purged: self.purged,
            last: self.last(),
        }
    }

    pub fn last(&self) -> Option<Position> {
        match self.places.back() {
            Some(place) => Some(Position { term: place.term, index: self.end() - 1 }),
            None => self.purged,
        }
    }

    /// Index after the last entry.
    pub fn end(&self) -> u64 {
        self.first + self.places.len() as u64
    }

    /// Index of the first entry that is here.
    pub fn first(&self) -> u64 {
        self.first
    }

    pub fn place(&self, index: u64) -> Option<Place> {
        self.places.get(usize::try_from(index.checked_sub(self.first)?).ok()?).copied()
    }

    pub fn places(&self) -> impl Iterator<Item = &Place> {
        self.places.iter()
    }

    /// Takes the next entry.
    pub fn append(&mut self, entry: Entry, place: Place) {
        let at = position(&entry.log_id());
        if self.places.is_empty() {
            self.first = at.index;
            self.recent.clear();
            self.recent_first = at.index;
        }
        assert_eq!(at.index, self.end(), "{}: an entry must follow the last, {:?}", self.group, self.last());
        assert!(Some(at) > self.purged, "{}: entry {at} was purged up to {:?}", self.group, self.purged);
        self.places.push_back(place);
        self.recent.push_back(entry);
    }

    /// Drops entries from `from` on; tells `dropped` each place, and gives the memory set free.
    pub fn truncate(&mut self, from: u64, mut dropped: impl FnMut(Place)) -> usize {
        let mut freed = 0;
        while self.end() > from.max(self.first) {
            dropped(self.places.pop_back().expect("the end is after the first"));
            if self.end() < self.recent_first {
                self.recent_first = self.end();
            } else {
                freed += self.recent.pop_back().as_ref().map_or(0, memory_bytes);
            }
        }
        freed
    }

    /// Drops entries up to `upto`, which may lie beyond the last; as [`Self::truncate`].
    pub fn purge(&mut self, upto: Position, mut dropped: impl FnMut(Place)) -> usize {
        let mut freed = 0;
        while self.first <= upto.index
            && let Some(place) = self.places.pop_front()
        {
            dropped(place);
            self.first += 1;
            freed += self.evict(self.first);
        }
        if self.places.is_empty() {
            self.first = upto.index + 1;
            self.recent_first = self.first;
        }
        self.purged = Some(upto);
        self.installing = self.installing.filter(|&at| at > upto);
        freed
    }

    /// Index of the last entry that lies in a file before `sequence`.
    pub fn last_before(&self, sequence: u64) -> Option<u64> {
        let count = self.places.partition_point(|place| place.sequence < sequence) as u64;
        (self.first + count).checked_sub(1).filter(|_| count > 0)
    }

    /// Index of the last entry that begins before `end`.
    pub fn last_until(&self, end: Mark) -> Option<u64> {
        let before = |place: &Place| (place.sequence, u64::from(place.offset)) < (end.sequence, end.offset);
        (self.first + self.places.partition_point(before) as u64).checked_sub(1)
    }

    /// Forgets the values of entries before `upto`; the memory set free.
    pub fn evict(&mut self, upto: u64) -> usize {
        let mut freed = 0;
        while self.recent_first < upto
            && let Some(entry) = self.recent.pop_front()
        {
            self.recent_first += 1;
            freed += memory_bytes(&entry);
        }
        self.recent_first = self.recent_first.max(upto.min(self.end()));
        freed
    }

    /// Entries from here on are in memory.
    pub fn recent_first(&self) -> u64 {
        self.recent_first
    }

    /// The entries of `[start, end)` that are in memory, which `start` must be.
    pub fn recent(&self, start: u64, end: u64) -> impl Iterator<Item = &Entry> {
        debug_assert!(start >= self.recent_first);
        let at = |index: u64| usize::try_from(index.saturating_sub(self.recent_first)).unwrap_or(usize::MAX);
        let end = at(end).min(self.recent.len());
        self.recent.range(at(start).min(end)..end)
    }
}
