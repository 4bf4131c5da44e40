//! From the files of a directory to what the log was when it was last written.
//!
//! Batches are durable in order. So the log ends at the first place where no whole batch is, and whatever lies
//! beyond was never acknowledged: a crash tore it, and it is cut. Unless a batch from beyond claims that the place
//! was durable already: then acknowledged bytes have been lost or changed, and cutting there could undo, on this
//! replica, what a majority relies on. That log is [`LogError::Damaged`], and stays as it is.
//!
//! The log never goes on in a file that was cut; the next file's header says where it was ([`FileHeader::previous`]).
//! So within one life of a file all batches come from one process, and old ones cannot line up with new ones.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::file::{Access, LogFile, failed};
use super::format::{
    self, BATCH_HEADER, BLOCK, BatchHeader, FILE_HEADER, FileHeader, FirstBlock, GroupRecord, Kind, Mark,
    RECORD_HEADER, RecordHeader, VERSION, blocks,
};
use super::index::{Index, Place};
use super::{LogError, LogOwner};
use crate::bounds::{Bounded, FILE_SEQUENCE_MAX, INDEX_MAX};
use crate::{GroupId, Position};

/// What recovery found.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Files the log still needs, oldest first.
    pub lives: Vec<(u64, Arc<LogFile>)>,
    /// Files it does not.
    pub spares: Vec<Arc<LogFile>>,
    pub groups: BTreeMap<GroupId, RecoveredGroup>,
    /// The log ends here.
    pub end: Mark,
    /// Above every sequence that was ever used.
    pub next_sequence: u64,
}

#[derive(Debug)]
pub struct RecoveredGroup {
    pub record: GroupRecord,
    pub first: u64,
    pub places: VecDeque<Place>,
    pub installing: Option<Position>,
    /// Entries up to here are in files that are not needed any more, so they must turn out to be gone.
    missing: Option<u64>,
}

struct Found {
    file: Arc<LogFile>,
    /// `None`: the first block is not a header.
    header: Option<FileHeader>,
}

/// Not `.log`: those are what people delete when a disk is full.
const SUFFIX: &str = ".raftlog";
/// Until 0.1.0. Renamed when the log is opened.
const FORMER_SUFFIX: &str = ".log";

pub fn file_name(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:04}{SUFFIX}"))
}

/// The number in a file's name; `None` when it is not one of ours.
pub fn file_number(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(SUFFIX).or_else(|| name.strip_suffix(FORMER_SUFFIX))?.parse().ok()
}

/// Gives a file of a former release the name it has now, unless there is such a file: then it is read as it is.
fn renamed(dir: &Path, path: PathBuf) -> Result<PathBuf, LogError> {
    let now = file_number(&path).map(|number| file_name(dir, number)).filter(|now| *now != path);
    let Some(now) = now.filter(|now| !now.exists()) else { return Ok(path) };
    std::fs::rename(&path, &now).map_err(failed("rename", &path))?;
    std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("sync", dir))?;
    Ok(now)
}

pub fn recover(dir: &Path, owner: LogOwner, access: Access) -> Result<Recovered, LogError> {
    let files = find(dir, owner, access)?;
    let highest =
        files.iter().filter_map(|found| found.header).map(|header| header.sequence).max().unwrap_or(0);
    let mut recovering =
        Recovering { files, highest, groups: BTreeMap::new(), end: Mark::default(), first_live: 0 };
    let mut newest = u64::MAX;
    loop {
        let chain = recovering.chain(newest)?;
        match recovering.replay(&chain)? {
            None => return recovering.finish(&chain),
            // What came after the cut never counted, nor did what it said about which files are needed.
            Some(cut) => newest = cut,
        }
    }
}

/// Opens every log file and looks at its first block.
fn find(dir: &Path, owner: LogOwner, access: Access) -> Result<Vec<Found>, LogError> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed("list", dir))? {
        let path = entry.map_err(failed("list", dir))?.path();
        if file_number(&path).is_some() {
            paths.push(if access == Access::Write { renamed(dir, path)? } else { path });
        } else if access == Access::Write && path.extension().is_some_and(|extension| extension == "new") {
            // Its making was interrupted.
            std::fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
    }
    paths.sort();
    let mut files = Vec::new();
    for path in paths {
        let file = LogFile::open(path, access)?;
        let mut first = vec![0; FILE_HEADER];
        file.read_at(&mut first, 0)?;
        let header = match format::read_file_header(&first) {
            FirstBlock::Newer(found) => {
                return Err(LogError::NewerVersion { file: file.path, found, known: VERSION });
            }
            FirstBlock::Header(header) if header.owner != owner => {
                return Err(LogError::WrongOwner { dir: dir.to_owned(), found: header.owner });
            }
            FirstBlock::Header(header) if header.sequence > FILE_SEQUENCE_MAX => {
                let what = "no file has such a sequence";
                return Err(LogError::Damaged { file: file.path, offset: 0, what });
            }
            FirstBlock::Header(header) => Some(header),
            FirstBlock::Nothing => None,
        };
        files.push(Found { file: Arc::new(file), header });
    }
    Ok(files)
}

/// A batch that is whole.
struct Batch<'a> {
    header: BatchHeader,
    records: Vec<(RecordHeader, &'a [u8], u32)>,
    end: u64,
}

/// The batch at `offset`, if it is whole and was written there in the file's life `sequence`.
fn batch_at(bytes: &[u8], sequence: u64, offset: u64) -> Option<Batch<'_>> {
    let start = usize::try_from(offset).ok()?;
    let header = format::read_batch_header(bytes.get(start..)?)?;
    if header.at != (Mark { sequence, offset }) {
        return None;
    }
    let length = usize::try_from(header.length).ok()?;
    let body = bytes.get(start + BATCH_HEADER..)?.get(..length)?;
    let mut records = Vec::new();
    let mut at = 0;
    while at < body.len() {
        let (record, payload) = format::read_record(&body[at..])?;
        records.push((record, payload, u32::try_from(start + BATCH_HEADER + at).ok()?));
        at += RECORD_HEADER + payload.len();
    }
    let whole = records.len() == usize::try_from(header.count).ok()?;
    whole.then(|| Batch { header, records, end: offset + blocks(BATCH_HEADER + length) as u64 })
}

struct Recovering {
    files: Vec<Found>,
    /// The highest sequence of any file.
    highest: u64,
    groups: BTreeMap<GroupId, RecoveredGroup>,
    end: Mark,
    first_live: u64,
}

/// A file the log goes through, and where it ends if a later one says so.
struct Link {
    /// In `Recovering::files`.
    at: usize,
    sequence: u64,
    end: Option<u64>,
}

impl Recovering {
    fn read(&self, at: usize) -> Result<Vec<u8>, LogError> {
        let file = &self.files[at].file;
        let length = usize::try_from(file.len()?).expect("files are below 4 GiB");
        let mut bytes = vec![0; length];
        file.read_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    fn damaged(&self, at: usize, offset: u64, what: &'static str) -> LogError {
        LogError::Damaged { file: self.files[at].file.path.clone(), offset, what }
    }

    fn by_sequence(&self, sequence: u64) -> Option<usize> {
        self.files.iter().position(|found| found.header.is_some_and(|header| header.sequence == sequence))
    }

    /// The files the log goes through, oldest first. The newest is the last up to `newest` that was begun, which its
    /// first batch proves: header and first batch go down in one write.
    fn chain(&mut self, newest: u64) -> Result<Vec<Link>, LogError> {
        let mut begun: Vec<(u64, usize)> = self
            .files
            .iter()
            .enumerate()
            .filter_map(|(at, found)| Some((found.header?.sequence, at)))
            .filter(|begun| begun.0 <= newest)
            .collect();
        begun.sort_unstable();
        let newest = loop {
            let Some((sequence, at)) = begun.pop() else { return Ok(Vec::new()) };
            let bytes = self.read(at)?;
            if begins(&bytes, sequence) {
                self.first_live = last_first_live(&bytes, sequence);
                if self.first_live > sequence {
                    return Err(self.damaged(at, 0, "it says that itself is not needed"));
                }
                break (sequence, at);
            }
        };
        let mut chain = vec![Link { at: newest.1, sequence: newest.0, end: None }];
        loop {
            let oldest = chain.last().expect("not empty");
            let header = self.files[oldest.at].header.expect("only files with a header are in the chain");
            let previous = header.previous;
            if previous.sequence < self.first_live.max(1) {
                break;
            }
            let Some(at) = self.by_sequence(previous.sequence) else {
                return Err(self.damaged(oldest.at, 0, "the file before this one is missing"));
            };
            chain.push(Link { at, sequence: previous.sequence, end: Some(previous.offset) });
        }
        chain.reverse();
        Ok(chain)
    }

    /// Reads all batches of the chain. `Some`: it was cut in this file, before the newest.
    fn replay(&mut self, chain: &[Link]) -> Result<Option<u64>, LogError> {
        self.groups.clear();
        self.end = Mark::default();
        for (number, link) in chain.iter().enumerate() {
            let bytes = self.read(link.at)?;
            let mut offset = FILE_HEADER as u64;
            self.end = Mark { sequence: link.sequence, offset };
            while Some(offset) != link.end {
                let Some(batch) = batch_at(&bytes, link.sequence, offset) else {
                    self.refuse_if_claimed(link.at)?;
                    return Ok(link.end.is_some().then_some(link.sequence));
                };
                for (record, payload, at) in &batch.records {
                    let first = number == 0 && offset == FILE_HEADER as u64;
                    self.apply(record, payload, link.sequence, *at, first).ok_or_else(|| {
                        self.damaged(link.at, u64::from(*at), "a record that cannot follow the last")
                    })?;
                }
                offset = batch.end;
                self.end.offset = offset;
                if link.end.is_some_and(|end| offset > end) {
                    return Err(self.damaged(link.at, offset, "a batch across the end of the file"));
                }
            }
        }
        // The newest file has no known end, so only an empty chain comes here.
        if !self.files.is_empty() {
            self.refuse_if_claimed(0)?;
        }
        Ok(None)
    }

    /// The log ends at `self.end`, in the file `at`. Is there a batch that knows better?
    fn refuse_if_claimed(&mut self, at: usize) -> Result<(), LogError> {
        let end = self.end;
        for other in 0..self.files.len() {
            let from = match self.files[other].header {
                // A spare; its batches are of that sequence or an earlier one.
                Some(header) if header.sequence < end.sequence => continue,
                Some(header) if header.sequence == end.sequence => end.offset,
                // Begun later, or its header is gone.
                _ => FILE_HEADER as u64,
            };
            for header in claims(&self.read(other)?, from) {
                if header.at.sequence > FILE_SEQUENCE_MAX {
                    return Err(self.damaged(other, header.at.offset, "no file has such a sequence"));
                }
                self.highest = self.highest.max(header.at.sequence);
                if header.at >= end && header.durable > end {
                    return Err(self.damaged(at, end.offset, "what is here is not what was durable"));
                }
            }
        }
        Ok(())
    }

    /// What a record does to what is known so far; `None` when it cannot be.
    fn apply(
        &mut self,
        record: &RecordHeader,
        payload: &[u8],
        sequence: u64,
        offset: u32,
        first: bool,
    ) -> Option<()> {
        if record.kind == Kind::State {
            return self.apply_state(payload, first);
        }
        if record.kind == Kind::Created {
            let replica = u64::from_le_bytes(payload.try_into().ok()?);
            let empty = GroupRecord { group: record.group, replica, vote: None, purged: None, last: None };
            self.groups.insert(record.group, RecoveredGroup::new(empty));
            return Some(());
        }
        if record.kind == Kind::Removed {
            return self.groups.remove(&record.group).map(drop);
        }
        let group = self.groups.get_mut(&record.group)?;
        // A vote may be beyond all bounds: it was given in good faith, and is judged when its replica starts.
        if record.kind != Kind::Vote && !is_possible(record) {
            return None;
        }
        match record.kind {
            Kind::Vote => group.record.vote = Some(format::read_vote(record.at.term, payload)?),
            Kind::Truncate => group.truncate(record.at.index),
            Kind::Purge => group.purge(record.at),
            Kind::Installing => group.installing = Some(record.at),
            Kind::Blank | Kind::Command | Kind::Membership => {
                let length = u32::try_from(RECORD_HEADER + payload.len()).ok()?;
                group.append(record.at, Place { term: record.at.term, sequence, offset, length })?;
            }
            Kind::Created | Kind::Removed | Kind::State => unreachable!("handled above"),
        }
        Some(())
    }

    /// A file's state record says what the files before it said. The first file's is all that is left of those.
    fn apply_state(&mut self, payload: &[u8], first: bool) -> Option<()> {
        let groups = format::read_state(payload)?;
        if groups.iter().any(|group| group.purged.bounded().and(group.last.bounded()).is_err()) {
            return None;
        }
        if first {
            self.groups =
                groups.into_iter().map(|record| (record.group, RecoveredGroup::new(record))).collect();
            return Some(());
        }
        let same = groups.len() == self.groups.len()
            && groups.iter().all(|record| {
                self.groups.get(&record.group).is_some_and(|group| {
                    group.record.vote == record.vote
                        && group.record.purged == record.purged
                        && group.record.replica == record.replica
                        && group.last().is_none_or(|last| Some(last) == record.last)
                })
            });
        same.then_some(())
    }

    fn finish(mut self, chain: &[Link]) -> Result<Recovered, LogError> {
        for group in self.groups.values_mut() {
            if !group.is_whole() {
                tracing::error!(group = %group.record.group, first = group.first, purged = ?group.record.purged, "a hole");
                let at = chain.first().map_or(0, |link| link.at);
                let path = self.files[at].file.path.clone();
                return Err(LogError::Damaged {
                    file: path,
                    offset: 0,
                    what: "entries are missing before the first",
                });
            }
        }
        let used = |found: &Found| {
            chain.iter().find(|link| {
                link.sequence <= self.end.sequence
                    && found.header.is_some_and(|header| header.sequence == link.sequence)
            })
        };
        let mut recovered =
            Recovered { end: self.end, next_sequence: self.highest + 1, ..Recovered::default() };
        for found in &self.files {
            match used(found) {
                Some(link) => recovered.lives.push((link.sequence, found.file.clone())),
                None => recovered.spares.push(found.file.clone()),
            }
        }
        recovered.lives.sort_by_key(|life| life.0);
        recovered.groups = self.groups;
        Ok(recovered)
    }
}

/// Whatever is added to these stays a number. A truncation names the entry after the last that stays.
fn is_possible(record: &RecordHeader) -> bool {
    record.at.bounded().is_ok() || (record.at.term == 0 && record.at.index == INDEX_MAX + 1)
}

/// The batch headers that are where they say they are, whole batches or not.
fn claims(bytes: &[u8], from: u64) -> impl Iterator<Item = BatchHeader> {
    let from = usize::try_from(from).unwrap_or(usize::MAX).min(bytes.len());
    bytes[from..].chunks_exact(BLOCK).enumerate().filter_map(move |(number, block)| {
        let header = format::read_batch_header(block)?;
        (header.at.offset == (from + number * BLOCK) as u64).then_some(header)
    })
}

/// Whether a file of this sequence was begun: its first batch starts with the state of all groups.
fn begins(bytes: &[u8], sequence: u64) -> bool {
    batch_at(bytes, sequence, FILE_HEADER as u64)
        .is_some_and(|batch| batch.records.first().is_some_and(|record| record.0.kind == Kind::State))
}

/// What the last whole batch of a file says is still needed.
fn last_first_live(bytes: &[u8], sequence: u64) -> u64 {
    let (mut offset, mut first_live) = (FILE_HEADER as u64, 0);
    while let Some(batch) = batch_at(bytes, sequence, offset) {
        first_live = batch.header.first_live;
        offset = batch.end;
    }
    first_live
}

impl RecoveredGroup {
    fn new(record: GroupRecord) -> Self {
        let missing = record.last.map(|last| last.index);
        Self { record, first: 0, places: VecDeque::new(), installing: None, missing }
    }

    /// With no entry in memory.
    pub fn into_index(self) -> Index {
        Index::restored(&self.record, self.installing, self.first, self.places)
    }

    fn end(&self) -> u64 {
        self.first + self.places.len() as u64
    }

    /// `None`: not known, because it is in a file that is not needed any more.
    fn last(&self) -> Option<Position> {
        let place = self.places.back()?;
        Some(Position { term: place.term, index: self.end() - 1 })
    }

    fn append(&mut self, at: Position, place: Place) -> Option<()> {
        if self.places.is_empty() {
            self.first = at.index;
        }
        if at.index != self.end() || self.places.back().is_some_and(|last| last.term > at.term) {
            return None;
        }
        self.places.push_back(place);
        Some(())
    }

    fn truncate(&mut self, from: u64) {
        while !self.places.is_empty() && self.end() > from {
            self.places.pop_back();
        }
        self.missing = self.missing.filter(|_| from > 0).map(|missing| missing.min(from - 1));
    }

    fn purge(&mut self, upto: Position) {
        while self.first <= upto.index && self.places.pop_front().is_some() {
            self.first += 1;
        }
        if self.places.is_empty() {
            self.first = upto.index + 1;
        }
        self.record.purged = Some(upto);
        self.installing = self.installing.filter(|&at| at > upto);
    }

    /// Nothing between what was purged and the first entry. A group that was never purged begins anywhere.
    fn is_whole(&self) -> bool {
        match self.record.purged {
            Some(purged) => {
                self.missing.is_none_or(|missing| missing <= purged.index)
                    && (self.places.is_empty() || self.first <= purged.index + 1)
            }
            None => self.missing.is_none(),
        }
    }
}
