//! How records go down: into the one open batch, the batch to the disk, and the news of it back in order.
//!
//! ```text
//!  append, vote, purge ──▶ open batch ──seal──▶ sealed ──≤ 4──▶ in flight ──▶ durable, in order ──▶ told
//! ```
//!
//! Whatever was appended during one turn of the thread goes down in one write; while four are in flight, everything
//! that comes goes into one more. A batch's place in the file is fixed when it is opened, so that a record's place is
//! known when it is appended.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::buffer::Buffer;
use super::device::{Completion, Device, Write};
use super::file::LogFile;
use super::format::{
    self, BATCH_HEADER, BatchHeader, FILE_HEADER, FileHeader, Kind, Mark, RECORD_HEADER, RecordHeader, blocks,
};
use super::index::{Index, Place, memory_bytes};
use super::latency::{Counts, WriteLatency};
use super::{LogError, LogOptions, LogUsage};
use crate::runtime::oneshot;
use crate::types::{Entry, IoFlushed};
use crate::{GroupId, Position};

/// Writes in flight. A disk's latency is hidden by two; four also keep it busy while we fill the next.
const IN_FLIGHT_MAX: usize = 4;
/// A batch takes no more records from here on. 1 MiB costs the disk 0.5 ms, a small write 0.1 ms
/// (`reference/rust-stack.md` §3.1): larger ones only add latency.
const BATCH_BYTES: usize = 1 << 20;
/// What a batch's buffer begins with; it grows as needed and is used again.
const BUFFER_BYTES: usize = 64 << 10;
/// Buffers kept for the next batches.
const BUFFERS_KEPT: usize = IN_FLIGHT_MAX + 2;
/// This part of the last file there is room for is kept for votes and marks: a quarter. A write of one takes 4 KiB, so a
/// usual file of 64 MiB has room for 4096 elections.
const KEPT: u64 = 4;
/// Empty files kept ready. One is needed at the next change of files, one more while it is being written.
const SPARES_MIN: usize = 2;
/// Checkpoints free files by the dozen, and to make one is as much writing as to fill it: so those that were needed lately
/// are kept, up to these.
const SPARES_MAX: usize = 16;
/// Spares that nobody needed for this long go.
const SPARES_WATCHED: Duration = Duration::from_secs(30);

/// Who is told when a batch, and all before it, is durable.
pub enum Waiting {
    Entries(IoFlushed),
    Call(oneshot::Sender<Result<(), LogError>>),
}

impl Waiting {
    pub fn tell(self, outcome: Result<(), LogError>) {
        use openraft::async_runtime::OneshotSender;
        match self {
            Self::Entries(flushed) => flushed.io_completed(outcome.map_err(io::Error::other)),
            // Nobody waits any more: fine.
            Self::Call(call) => drop(call.send(outcome)),
        }
    }
}

struct Batch {
    token: u64,
    buffer: Buffer,
    /// Where the batch header is in `buffer`: after the file's header, in a file's first batch.
    base: usize,
    /// Bytes of `buffer` in use.
    used: usize,
    records: u32,
    file: Arc<LogFile>,
    /// Where the batch header goes.
    at: Mark,
    first_live: u64,
    waiting: Vec<Waiting>,
    submitted: Option<Instant>,
    done: bool,
}

impl Batch {
    /// Where the batch ends, in whole blocks.
    fn end(&self) -> Mark {
        Mark { sequence: self.at.sequence, offset: self.at.offset + blocks(self.used - self.base) as u64 }
    }
}

struct Life {
    file: Arc<LogFile>,
    sequence: u64,
    /// Entries in it that are neither truncated nor purged.
    entries: u64,
}

/// A record to append: its payload in parts.
pub struct Record<'a> {
    pub kind: Kind,
    pub group: GroupId,
    pub at: Position,
    pub parts: &'a [bytes::Bytes],
}

/// Why a record was not taken.
pub enum Full {
    /// There is no empty file yet. Wait for [`super::Log`]'s `room`, and try again.
    NoFile,
    Dead(LogError),
    /// It would not fit any file.
    TooLarge,
}

/// Everything about the log but its groups' indexes.
pub struct Core {
    pub options: LogOptions,
    device: Box<dyn Device>,
    pub dead: Option<LogError>,
    pub groups: BTreeMap<GroupId, Rc<RefCell<Index>>>,
    /// Live files, oldest first; the last is being written. Files go in this order alone, so that no truncation is
    /// forgotten before the entries it is about.
    lives: VecDeque<Life>,
    /// Not needed any more; may be overwritten once a durable batch says so.
    retired: Vec<Life>,
    spares: Vec<Arc<LogFile>>,
    /// The fewest there were since then.
    fewest_spares: (usize, Instant),
    /// Somebody found no spare, and waits for one.
    starved: bool,
    next_sequence: u64,
    /// Where the next batch goes.
    tail: Mark,
    /// The file being written has no batch yet: its header goes with the first.
    open: Option<Batch>,
    sealed: VecDeque<Batch>,
    in_flight: VecDeque<Batch>,
    next_token: u64,
    durable: Mark,
    durable_first_live: u64,
    buffers: Vec<Buffer>,
    /// Entries in memory in the order they came, to be evicted in it.
    memory: VecDeque<(GroupId, u64)>,
    memory_bytes: usize,
    appended_bytes: u64,
    latency: Counts,
    file_count: u64,
    completed: Vec<Completion>,
    /// A file is being made.
    pub making_spare: bool,
    /// The last try to make one failed.
    pub no_spare: bool,
}

impl Core {
    /// `lives` is what recovery kept, oldest first, with its entries; the log goes on after `end` in a new file.
    pub fn new(
        options: LogOptions,
        device: Box<dyn Device>,
        groups: BTreeMap<GroupId, Rc<RefCell<Index>>>,
        lives: Vec<(u64, Arc<LogFile>)>,
        spares: Vec<Arc<LogFile>>,
        end: Mark,
        next_sequence: u64,
    ) -> Self {
        let file_count = (lives.len() + spares.len()) as u64;
        let mut core = Self {
            options,
            device,
            dead: None,
            groups,
            lives: lives.into_iter().map(|(sequence, file)| Life { file, sequence, entries: 0 }).collect(),
            retired: Vec::new(),
            fewest_spares: (spares.len(), Instant::now()),
            spares,
            starved: false,
            next_sequence,
            tail: end,
            open: None,
            sealed: VecDeque::new(),
            in_flight: VecDeque::new(),
            next_token: 0,
            durable: end,
            durable_first_live: 0,
            buffers: Vec::new(),
            memory: VecDeque::new(),
            memory_bytes: 0,
            appended_bytes: 0,
            latency: Counts::default(),
            file_count,
            completed: Vec::new(),
            making_spare: false,
            no_spare: false,
        };
        let groups: Vec<_> = core.groups.values().cloned().collect();
        for group in groups {
            for place in group.borrow().places() {
                core.life(place.sequence).entries += 1;
            }
        }
        core
    }

    pub fn durable(&self) -> Mark {
        self.durable
    }

    /// Appends a record to the open batch.
    pub fn push(&mut self, record: &Record) -> Result<Place, Full> {
        if let Some(dead) = &self.dead {
            return Err(Full::Dead(dead.clone()));
        }
        let length: usize = record.parts.iter().map(bytes::Bytes::len).sum();
        let needed = RECORD_HEADER + length;
        if needed > self.record_bytes_max() {
            return Err(Full::TooLarge);
        }
        self.make_room(needed)?;
        Ok(self.put(record, length))
    }

    /// The longest record that any file takes, whatever is in its state record: a quarter of a file.
    pub fn record_bytes_max(&self) -> usize {
        usize::try_from(self.options.file_bytes / 4).unwrap_or(usize::MAX).min(super::RECORD_BYTES_MAX)
    }

    /// Makes sure that the open batch takes `needed` more bytes.
    fn make_room(&mut self, needed: usize) -> Result<(), Full> {
        let file_bytes = self.options.file_bytes;
        if let Some(open) = &self.open {
            let used = open.used - open.base;
            let fits = open.at.offset + blocks(used + needed) as u64 <= file_bytes;
            if fits && used + needed <= BATCH_BYTES.max(BATCH_HEADER + needed) {
                return Ok(());
            }
            self.seal();
        }
        let fits = !self.lives.is_empty()
            && self.tail.sequence == self.lives.back().expect("not empty").sequence
            && self.tail.offset + blocks(BATCH_HEADER + needed) as u64 <= file_bytes;
        if fits {
            let at = self.tail;
            let file = self.lives.back().expect("not empty").file.clone();
            self.open = Some(self.batch(file, at, 0));
            return Ok(());
        }
        self.next_file()
    }

    /// Whether this many bytes of entries find room. Yes, unless this is the last file and no other can be made: then what
    /// is left of it must hold them and what is kept.
    pub fn has_room(&self, bytes: u64) -> bool {
        if !self.no_spare || !self.spares.is_empty() {
            return true;
        }
        let end = self.open.as_ref().map_or(self.tail, Batch::end).offset;
        let left = self.options.file_bytes.saturating_sub(end);
        bytes + self.options.file_bytes / KEPT <= left
    }

    /// Goes on in a new file: its header and the state of all groups begin the open batch.
    fn next_file(&mut self) -> Result<(), Full> {
        let Some(file) = self.spares.pop() else {
            self.starved = true;
            return Err(Full::NoFile);
        };
        self.fewest_spares.0 = self.fewest_spares.0.min(self.spares.len());
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let header = FileHeader {
            sequence,
            previous: self.tail,
            owner: self.options.owner,
            file_bytes: self.options.file_bytes,
        };
        self.lives.push_back(Life { file: file.clone(), sequence, entries: 0 });
        let at = Mark { sequence, offset: FILE_HEADER as u64 };
        let mut batch = self.batch(file, at, FILE_HEADER);
        format::write_file_header(&mut batch.buffer, &header);
        self.tail = at;
        self.open = Some(batch);
        let records: Vec<_> = self.groups.values().map(|group| group.borrow().record()).collect();
        let payload = bytes::Bytes::from(format::state_payload(&records));
        let length = payload.len();
        let state =
            Record { kind: Kind::State, group: GroupId(0), at: Position::default(), parts: &[payload] };
        self.put(&state, length);
        // The state has no room for these, which are rare.
        let installing: Vec<_> = self
            .groups
            .iter()
            .filter_map(|(&group, index)| index.borrow().installing.map(|at| (group, at)))
            .collect();
        for (group, at) in installing {
            self.put(&Record { kind: Kind::Installing, group, at, parts: &[] }, 0);
        }
        self.retire();
        Ok(())
    }

    fn batch(&mut self, file: Arc<LogFile>, at: Mark, base: usize) -> Batch {
        let buffer = self.buffers.pop().unwrap_or_else(|| Buffer::new(BUFFER_BYTES));
        let token = self.next_token;
        self.next_token += 1;
        let used = base + BATCH_HEADER;
        Batch {
            token,
            buffer,
            base,
            used,
            records: 0,
            file,
            at,
            first_live: 0,
            waiting: Vec::new(),
            submitted: None,
            done: false,
        }
    }

    fn put(&mut self, record: &Record, length: usize) -> Place {
        let open = self.open.as_mut().expect("room was made");
        let needed = RECORD_HEADER + length;
        let (start, end) = (open.used, open.used + needed);
        if end > open.buffer.len() {
            open.buffer = open.buffer.grown(end);
        }
        let mut at = start + RECORD_HEADER;
        for part in record.parts {
            open.buffer[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        let length = u32::try_from(length).expect("less than a file");
        let header = RecordHeader { kind: record.kind, group: record.group, at: record.at, length };
        format::seal_record(&mut open.buffer[start..end], &header);
        open.used = end;
        open.records += 1;
        self.appended_bytes += needed as u64;
        Place {
            term: record.at.term,
            sequence: open.at.sequence,
            offset: u32::try_from(open.at.offset + (start - open.base) as u64)
                .expect("files are below 4 GiB"),
            length: u32::try_from(needed).expect("less than a file"),
        }
    }

    /// Closes the open batch: nothing is added to it any more.
    fn seal(&mut self) {
        let Some(mut batch) = self.open.take() else { return };
        // What this batch says is not needed must be said by records up to here, which are all in it or before it.
        batch.first_live = self.first_live();
        let header = BatchHeader {
            length: u32::try_from(batch.used - batch.base - BATCH_HEADER).expect("less than a file"),
            count: batch.records,
            at: batch.at,
            durable: self.durable,
            first_live: batch.first_live,
        };
        let base = batch.base;
        format::write_batch_header(&mut batch.buffer[base..], &header);
        let end = blocks(batch.used);
        let used = batch.used;
        batch.buffer[used..end].fill(0);
        self.tail = batch.end();
        self.sealed.push_back(batch);
    }

    fn first_live(&self) -> u64 {
        self.lives.front().map_or(0, |life| life.sequence)
    }

    /// `waiting` is told when everything appended so far is durable: at once when it is.
    pub fn on_durable(&mut self, waiting: Waiting) -> Option<Waiting> {
        let last = self.open.as_mut().or(self.sealed.back_mut()).or(self.in_flight.back_mut());
        match last {
            Some(batch) if self.dead.is_none() => {
                batch.waiting.push(waiting);
                None
            }
            _ => Some(waiting),
        }
    }

    /// Sends down what may go. Whoever is in `told` is to be told, by the caller, who holds no borrow then.
    pub fn submit(&mut self, told: &mut Vec<(Waiting, Result<(), LogError>)>) {
        while self.dead.is_none() && self.in_flight.len() < IN_FLIGHT_MAX {
            if self.sealed.is_empty() {
                self.seal();
            }
            let Some(mut batch) = self.sealed.pop_front() else { break };
            batch.submitted = Some(Instant::now());
            let write = Write {
                file: batch.file.write_fd(),
                start: batch.buffer.as_ptr(),
                length: blocks(batch.used),
                offset: batch.at.offset - batch.base as u64,
                token: batch.token,
            };
            // SAFETY: the batch stays in `in_flight`, its buffer untouched and its file open, until its token is
            // reaped; `Core::drop` waits for that, and an error leaks the batch.
            let submitted = unsafe { self.device.submit(write) };
            match submitted {
                Ok(()) => self.in_flight.push_back(batch),
                Err(error) => {
                    let path = batch.file.path.clone();
                    told.extend(leak(batch).into_iter().map(|waiting| (waiting, Err(LogError::Closed))));
                    self.die(super::file::failed("submit a write to", &path)(error), told);
                }
            }
            // A file system in memory is done already.
            self.reap(told);
        }
    }

    /// Takes completions, and tells whom they concern.
    pub fn reap(&mut self, told: &mut Vec<(Waiting, Result<(), LogError>)>) {
        let mut completed = std::mem::take(&mut self.completed);
        self.device.reap(&mut completed);
        for completion in completed.drain(..) {
            let batch = self.in_flight.iter_mut().find(|batch| batch.token == completion.token);
            let batch = batch.expect("the device reports what was submitted, once");
            batch.done = true;
            let wanted = blocks(batch.used);
            let error = match completion.outcome {
                Ok(written) if written == wanted => {
                    self.latency.add(batch.submitted.map_or(Duration::ZERO, |at| at.elapsed()));
                    continue;
                }
                Ok(_) => io::Error::from(io::ErrorKind::WriteZero),
                Err(error) => error,
            };
            // Nothing is tried again: after a failed sync the kernel may call clean what it never wrote.
            let error = super::file::failed("write", &batch.file.path)(error);
            self.die(error, told);
        }
        self.completed = completed;
        if self.dead.is_some() {
            self.in_flight.retain(|batch| !batch.done);
            return;
        }
        while self.in_flight.front().is_some_and(|batch| batch.done) {
            let batch = self.in_flight.pop_front().expect("just seen");
            self.durable = batch.end();
            self.durable_first_live = batch.first_live;
            told.extend(batch.waiting.into_iter().map(|waiting| (waiting, Ok(()))));
            if self.buffers.len() < BUFFERS_KEPT && batch.buffer.len() <= 2 * BATCH_BYTES {
                self.buffers.push(batch.buffer);
            }
        }
        self.recycle();
        self.evict();
    }

    /// The log is dead from here on.
    pub fn die(&mut self, error: LogError, told: &mut Vec<(Waiting, Result<(), LogError>)>) {
        if self.dead.is_some() {
            return;
        }
        if !matches!(error, LogError::Closed) {
            tracing::error!(%error, "the log is dead");
        }
        let batches = self.in_flight.iter_mut().chain(&mut self.sealed).chain(&mut self.open);
        for batch in batches {
            told.extend(batch.waiting.drain(..).map(|waiting| (waiting, Err(error.clone()))));
        }
        self.sealed.clear();
        self.open = None;
        self.dead = Some(error);
    }

    /// Notes an entry that was just appended at `place`.
    pub fn entry_appended(&mut self, group: GroupId, entry: &Entry, place: Place) {
        self.life(place.sequence).entries += 1;
        self.memory.push_back((group, entry.log_id.index()));
        self.memory_bytes += memory_bytes(entry);
    }

    /// Notes entries that are gone.
    pub fn entries_dropped(&mut self, places: &[Place], memory_bytes: usize) {
        for place in places {
            self.life(place.sequence).entries -= 1;
        }
        self.memory_bytes -= memory_bytes;
        self.retire();
    }

    /// Takes the oldest files that hold no entry any more out of the log. Their votes and marks are in the state
    /// records of the files after them.
    fn retire(&mut self) {
        while self.lives.len() > 1 && self.lives.front().is_some_and(|life| life.entries == 0) {
            self.retired.extend(self.lives.pop_front());
        }
    }

    fn life(&mut self, sequence: u64) -> &mut Life {
        let at = self.lives.binary_search_by_key(&sequence, |life| life.sequence);
        &mut self.lives[at.expect("an entry's file is live")]
    }

    /// Sequence of the first of the newest files that hold up to `bytes`; at least the one being written does.
    pub fn newest_from(&self, bytes: u64) -> u64 {
        let files = usize::try_from(bytes / self.options.file_bytes).unwrap_or(usize::MAX).max(1);
        self.lives.get(self.lives.len().saturating_sub(files)).map_or(0, |life| life.sequence)
    }

    /// The file of a live sequence.
    pub fn file(&self, sequence: u64) -> Option<Arc<LogFile>> {
        let at = self.lives.binary_search_by_key(&sequence, |life| life.sequence).ok()?;
        Some(self.lives[at].file.clone())
    }

    /// Retired files become spares once a durable batch says that they are not needed, and nobody reads them.
    fn recycle(&mut self) {
        let durable = self.durable_first_live;
        let (free, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.retired)
            .into_iter()
            .partition(|life| life.sequence < durable && Arc::strong_count(&life.file) == 1);
        self.retired = kept;
        self.spares.extend(free.into_iter().map(|life| life.file));
        self.starved &= self.spares.is_empty();
    }

    /// Whether another file must be made. A retired one becomes a spare by itself, with the next batch; but while
    /// somebody waits for room there may be no next batch.
    pub fn needs_spare(&self) -> bool {
        self.spares.is_empty() && (self.starved || self.retired.is_empty())
    }

    pub fn has_spare(&self) -> bool {
        !self.spares.is_empty()
    }

    pub fn spare_made(&mut self, file: LogFile) {
        self.file_count += 1;
        self.spares.push(Arc::new(file));
        self.starved = false;
        self.no_spare = false;
    }

    /// Spare files beyond those worth keeping, to be removed.
    pub fn surplus(&mut self, now: Instant) -> Vec<Arc<LogFile>> {
        let mut kept = self.spares.len().min(SPARES_MAX);
        let (fewest, since) = self.fewest_spares;
        if now.saturating_duration_since(since) >= SPARES_WATCHED {
            kept -= fewest.min(kept).saturating_sub(SPARES_MIN);
            self.fewest_spares = (kept, now);
        }
        let gone = self.spares.len() - kept;
        self.file_count -= gone as u64;
        self.spares.drain(..gone).collect()
    }

    /// Keeps the memory of recent entries within its bound. Entries that are not durable can only be read here.
    fn evict(&mut self) {
        while self.memory_bytes > self.options.memory_bytes_max
            && let Some(&(group, index)) = self.memory.front()
        {
            if let Some(group) = self.groups.get(&group) {
                let mut group = group.borrow_mut();
                // Truncated since: the entries that came after it have their own turn.
                if index >= group.recent_first()
                    && let Some(place) = group.place(index)
                {
                    let at = Mark { sequence: place.sequence, offset: u64::from(place.offset) };
                    if at >= self.durable {
                        return;
                    }
                    self.memory_bytes -= group.evict(index + 1);
                }
            }
            self.memory.pop_front();
        }
    }

    pub fn usage(&self) -> LogUsage {
        LogUsage {
            file_bytes: self.file_count * self.options.file_bytes,
            live_bytes: self.lives.len() as u64 * self.options.file_bytes,
            memory_bytes: self.memory_bytes,
            appended_bytes: self.appended_bytes,
        }
    }

    /// How long writes took since the last call.
    pub fn take_latency(&mut self) -> WriteLatency {
        let oldest =
            self.in_flight.iter().filter(|batch| !batch.done).filter_map(|batch| batch.submitted).min();
        self.latency.take(oldest.map_or(Duration::ZERO, |at| at.elapsed()))
    }

    /// Appends a batch without records, whose header says that everything before it is durable.
    pub fn push_mark(&mut self) {
        // Without room for it the next file will say so.
        if self.dead.is_none() && self.open.is_none() && !self.lives.is_empty() {
            let _ = self.make_room(0);
        }
    }
}

/// Who waits for a batch whose memory must stay, because the kernel may still read it.
fn leak(mut batch: Batch) -> Vec<Waiting> {
    let waiting = std::mem::take(&mut batch.waiting);
    std::mem::forget(batch);
    waiting
}

impl Drop for Core {
    /// The kernel may be reading the batches in flight.
    fn drop(&mut self) {
        let mut completed = Vec::new();
        while self.in_flight.iter().any(|batch| !batch.done) {
            if let Err(error) = self.device.wait() {
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                tracing::error!(%error, "cannot wait for the log's last writes: their memory stays");
                self.in_flight.drain(..).for_each(|batch| drop(leak(batch)));
                return;
            }
            self.device.reap(&mut completed);
            for completion in completed.drain(..) {
                if let Some(batch) = self.in_flight.iter_mut().find(|batch| batch.token == completion.token) {
                    batch.done = true;
                }
            }
        }
    }
}
