//! One synced log for all groups of a disk and shard.
//!
//! Entries, votes and marks of all groups are packed into batches, and a batch is one write that is on the disk when
//! it completes. Files are of one size, filled at creation and used over and over.
//!
//! ```text
//!  group's append, vote ──▶ append.rs ──batch──▶ device/ (io_uring) ──▶ files
//!            │                  └── durable, in order ──▶ whoever waits
//!            └──▶ index.rs: where each entry lies, and the recent ones themselves ──▶ followers, apply
//! ```
//!
//! What always holds:
//!
//! - Whoever waits is told in the order of the log, and only when its records and all earlier ones are durable.
//! - A write or sync that failed is not tried again: this log is dead, every later call says so, and so does
//!   [`Log::until_failed`]. (After a failed sync the kernel may call clean what it never wrote.)
//! - Nothing durable is cut off at start-up because it cannot be read: that is [`LogError::Damaged`], and this
//!   replica must leave its groups and join anew.
//! - A file is used again only after a durable record of a later one says that nothing in it is needed.
//!
//! What we assume of the disk, and every byte: `docs/log-format.md`. It does not know what a command means, nor when
//! it may be forgotten: openraft and the owner's checkpoints decide that ([`crate::Group::checkpointed`]).
//!
//! Start at [`Log::open`], then `append.rs`.

mod append;
mod buffer;
mod device;
mod file;
mod format;
mod index;
mod latency;
mod lower;
mod offline;
mod read;
mod recover;
mod storage;

use std::cell::{RefCell, RefMut};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

pub use latency::WriteLatency;
pub use lower::{ImpossibleVote, lower_votes};
pub use offline::{OfflineGroup, OfflineLog};
pub(crate) use storage::GroupLog;

use crate::runtime::oneshot;
use crate::thread::after_others;
use crate::types::Entry;
use crate::{GroupId, Position, ProcessId, ReplicaId};
use append::{Core, Full, Record, Waiting};
use device::Device;
use file::{Access, LogFile};
use format::Kind;
use index::{Index, Place, memory_bytes};
use recover::{Recovered, file_name, file_number, recover};

/// No record is longer, whatever the files' size.
const RECORD_BYTES_MAX: usize = 16 << 20;
/// No command is longer: a frame to a peer holds it, and memory is bounded by the number of them.
pub const COMMAND_BYTES_MAX: usize = 4 << 20;
/// A file holds a header, the state of a thousand groups and some records.
const FILE_BYTES_MIN: u64 = 64 << 10;
/// Places in a file are 32-bit.
const FILE_BYTES_MAX: u64 = 2 << 30;

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
    /// Size of each file: a multiple of 4 KiB between 64 KiB and 2 GiB. Files are written in full at creation, and
    /// recycled. Commands are limited to a quarter of it.
    pub file_bytes: u64,
    /// Recent entries kept in memory, at most, over all groups. What a follower lacks beyond them is read back.
    pub memory_bytes_max: usize,
    /// Submit with io_uring where the kernel allows it, and the files are not in memory.
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
    /// Another process, or another log of this one, has it open.
    #[error("{dir} is in use")]
    InUse { dir: PathBuf },
    /// The options cannot be right.
    #[error("{what}")]
    Options { what: &'static str },
    /// Bytes that were durable are not what was written. This replica must leave its groups and join anew.
    #[error("{file} is damaged at byte {offset}: {what}")]
    Damaged { file: PathBuf, offset: u64, what: &'static str },
    /// The group's log belongs to another replica.
    #[error("the log of {group} belongs to {found}")]
    OtherReplica { group: GroupId, found: ReplicaId },
    /// A write, a sync or a read failed; the log is dead.
    #[error("{doing} {file}: {source}")]
    Io { doing: &'static str, file: PathBuf, source: Arc<io::Error> },
    /// The log was closed.
    #[error("the log is closed")]
    Closed,
}

impl LogError {
    /// There was no space for it.
    fn is_full(&self) -> bool {
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        matches!(self, Self::Io { source, .. } if full.contains(&source.kind()))
    }
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

/// One synced log for all groups of one disk and shard. Cheap to clone; of one thread.
#[derive(Clone)]
pub struct Log(Rc<Inner>);

struct Inner {
    dir: PathBuf,
    core: RefCell<Core>,
    /// There is something to submit.
    submit: Rc<Notify>,
    /// There is a spare file, or the log died.
    room: Notify,
    failed: Notify,
    /// What submits and what reaps; they must not keep the log alive.
    tasks: RefCell<Vec<AbortHandle>>,
    /// Held as long as the log is open.
    _lock: std::fs::File,
}

/// What these take of a log file, at most.
pub(crate) fn log_bytes(entries: &[Entry]) -> u64 {
    let records: usize = entries.iter().map(memory_bytes).sum();
    format::blocks(format::BATCH_HEADER + records) as u64
}

type Told = Vec<(Waiting, Result<(), LogError>)>;

impl Log {
    /// Opens the log in `dir`, or makes one. Returns once it was written to.
    pub async fn open(dir: &Path, options: LogOptions) -> Result<Self, LogError> {
        Self::open_on(dir, options, |io_uring| device::open(io_uring, dir)).await
    }

    async fn open_on(
        dir: &Path,
        options: LogOptions,
        open_device: impl FnOnce(bool) -> io::Result<(Box<dyn Device>, OwnedFd)>,
    ) -> Result<Self, LogError> {
        let aligned = options.file_bytes.is_multiple_of(format::BLOCK as u64);
        if !aligned || !(FILE_BYTES_MIN..=FILE_BYTES_MAX).contains(&options.file_bytes) {
            return Err(LogError::Options {
                what: "a log file is a multiple of 4 KiB between 64 KiB and 2 GiB",
            });
        }
        std::fs::create_dir_all(dir).map_err(file::failed("create", dir))?;
        let lock = lock(dir)?;
        let (path, file_bytes, owner) = (dir.to_owned(), options.file_bytes, options.owner);
        let reading = tokio::task::spawn_blocking(move || -> Result<Recovered, LogError> {
            let mut recovered = recover(&path, owner, Access::Write)?;
            // Files of another size are of no use to the next life.
            recovered.spares.retain(|spare| {
                let fits = spare.len().is_ok_and(|len| len == file_bytes);
                if !fits && let Err(error) = spare.remove() {
                    tracing::warn!(%error, "a log file of another size stays");
                }
                fits
            });
            Ok(recovered)
        });
        let mut recovered = match reading.await {
            Ok(recovered) => recovered?,
            Err(stopped) => return Err(file::failed("recover", dir)(io::Error::other(stopped))),
        };
        if recovered.spares.is_empty() {
            recovered.spares.push(Arc::new(first_spare(dir, file_bytes).await?));
        }
        let (device, event) = open_device(options.io_uring).map_err(file::failed("open a ring for", dir))?;
        let groups =
            recovered.groups.into_iter().map(|(id, group)| (id, Rc::new(RefCell::new(group.into_index()))));
        let core = Core::new(
            options,
            device,
            groups.collect(),
            recovered.lives,
            recovered.spares,
            recovered.end,
            recovered.next_sequence,
        );
        let inner = Rc::new(Inner {
            dir: dir.to_owned(),
            core: RefCell::new(core),
            submit: Rc::new(Notify::new()),
            room: Notify::new(),
            failed: Notify::new(),
            tasks: RefCell::default(),
            _lock: lock,
        });
        // SAFETY: an `OwnedFd` stays open, and itself, until the `AsyncFd` that owns it is dropped.
        let event = unsafe { AsyncFd::register_with_interest(event, Interest::READABLE) }
            .map_err(|error| file::failed("watch", dir)(error.into()))?;
        let submitting =
            tokio::task::spawn_local(submit_when_asked(inner.submit.clone(), Rc::downgrade(&inner)));
        let reaping = tokio::task::spawn_local(reap_when_told(event, Rc::downgrade(&inner)));
        inner.tasks.borrow_mut().extend([submitting.abort_handle(), reaping.abort_handle()]);
        let log = Self(inner);
        // Begins the new file: the state of all groups, durable. Whatever is wrong with this disk shows now.
        log.core().push_mark();
        log.synced().await?;
        log.0.look_after_files();
        Ok(log)
    }

    /// Everything appended so far, by any group, is durable when this returns.
    pub async fn synced(&self) -> Result<(), LogError> {
        let (done, told) = oneshot::channel();
        self.tell_when_durable(Waiting::Call(done));
        told.await.unwrap_or(Err(LogError::Closed))
    }

    /// Everything before it is durable.
    fn durable(&self) -> format::Mark {
        self.core().durable()
    }

    pub fn usage(&self) -> LogUsage {
        self.core().usage()
    }

    /// How long writes took since the last call: for one who watches the disk.
    pub fn take_latency(&self) -> WriteLatency {
        // Also a log that nobody writes to gives files back.
        self.0.look_after_files();
        self.core().take_latency()
    }

    /// Every group that has a log here.
    pub fn groups(&self) -> Vec<GroupId> {
        self.core().groups.keys().copied().collect()
    }

    /// Whose log a group's is.
    pub fn replica(&self, group: GroupId) -> Option<ReplicaId> {
        Some(ReplicaId(self.core().groups.get(&group)?.borrow().replica))
    }

    /// Begins the log of a replica, durably, so that whoever owns it can tell one that is lost from one that never was.
    pub async fn begin(&self, group: GroupId, me: ReplicaId) -> Result<(), LogError> {
        self.group(group, me).await?;
        self.synced().await
    }

    /// Why this log is dead, if it is.
    pub fn failed(&self) -> Option<LogError> {
        self.core().dead.clone()
    }

    /// Returns when the log dies, or is closed.
    pub async fn until_failed(&self) -> LogError {
        loop {
            let failed = self.0.failed.notified();
            if let Some(error) = self.failed() {
                return error;
            }
            failed.await;
        }
    }

    /// No new file can be made and the last one is nearly full: no entries are taken until one is free or there is space.
    pub fn is_full(&self) -> bool {
        !self.has_room(0)
    }

    /// Whether this many bytes of entries find room. Nanoseconds.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        self.core().has_room(bytes)
    }

    /// The longest command a group may propose.
    pub(crate) fn command_bytes_max(&self) -> usize {
        (self.core().record_bytes_max() - format::RECORD_HEADER).min(COMMAND_BYTES_MAX)
    }

    /// The log of a group, which begins now if there was none.
    pub(crate) async fn group(&self, id: GroupId, me: ReplicaId) -> Result<GroupLog, LogError> {
        let known = self.core().groups.get(&id).cloned();
        let index = match known {
            Some(index) => {
                let found = ReplicaId(index.borrow().replica);
                if found != me {
                    return Err(LogError::OtherReplica { group: id, found });
                }
                index
            }
            None => {
                let replica = Bytes::copy_from_slice(&me.0.to_le_bytes());
                let at = Position::default();
                self.push(&Record { kind: Kind::Created, group: id, at, parts: &[replica] }).await?;
                let index = Rc::new(RefCell::new(Index::new(id, me.0)));
                self.core().groups.insert(id, index.clone());
                index
            }
        };
        Ok(GroupLog::new(self.clone(), id, index))
    }

    /// Forgets a group: its entries and its vote. Durable when this returns.
    pub(crate) async fn remove_group(&self, id: GroupId) -> Result<(), LogError> {
        if !self.core().groups.contains_key(&id) {
            return Ok(());
        }
        self.push(&Record { kind: Kind::Removed, group: id, at: Position::default(), parts: &[] }).await?;
        let Some(index) = self.core().groups.remove(&id) else { return Ok(()) };
        let mut places = Vec::new();
        let memory = index.borrow_mut().truncate(0, |place| places.push(place));
        self.core().entries_dropped(&places, memory);
        self.synced().await
    }

    /// Writes down what there is, and a mark that it is durable; every later call says `Closed`.
    pub(crate) async fn close(&self) {
        // A dead log has nothing to say any more.
        if self.synced().await.is_ok() {
            self.core().push_mark();
            let _ = self.synced().await;
        }
        self.0.die(LogError::Closed);
    }

    fn core(&self) -> RefMut<'_, Core> {
        self.0.core.borrow_mut()
    }

    /// Appends a record; waits when there is no file for it yet.
    async fn push(&self, record: &Record<'_>) -> Result<Place, LogError> {
        loop {
            let room = self.0.room.notified();
            let pushed = self.core().push(record);
            match pushed {
                Ok(place) => {
                    self.0.submit.notify_one();
                    return Ok(place);
                }
                Err(Full::Dead(error)) => return Err(error),
                Err(Full::TooLarge) => {
                    return Err(LogError::Options { what: "a record is too long for the log" });
                }
                Err(Full::NoFile) => {
                    // What is sealed already goes down; it may be what sets a file free.
                    self.0.submit.notify_one();
                    self.0.look_after_files();
                    room.await;
                }
            }
        }
    }

    fn tell_when_durable(&self, waiting: Waiting) {
        let at_once = self.core().on_durable(waiting);
        match at_once {
            Some(waiting) => waiting.tell(self.failed().map_or(Ok(()), Err)),
            None => self.0.submit.notify_one(),
        }
    }
}

impl Inner {
    /// Does something to the core that may tell others, and tells them once the core is free again.
    fn with_core(self: &Rc<Self>, act: impl FnOnce(&mut Core, &mut Told)) {
        let mut told = Told::new();
        let (dead, spare) = {
            let mut core = self.core.borrow_mut();
            let was_dead = core.dead.is_some();
            act(&mut core, &mut told);
            (core.dead.is_some() && !was_dead, core.has_spare())
        };
        if dead {
            self.failed.notify_waiters();
        }
        if dead || spare {
            self.room.notify_waiters();
        }
        for (waiting, outcome) in told {
            waiting.tell(outcome);
        }
    }

    fn die(self: &Rc<Self>, error: LogError) {
        self.with_core(|core, told| core.die(error, told));
    }

    /// Makes a spare file when there is none, and removes those that are too many; both elsewhere.
    fn look_after_files(self: &Rc<Self>) {
        let mut core = self.core.borrow_mut();
        if core.dead.is_some() {
            return;
        }
        for file in core.surplus(Instant::now()) {
            tokio::task::spawn_blocking(move || {
                if let Err(error) = file.remove() {
                    tracing::warn!(%error, "a log file too many stays");
                }
            });
        }
        if core.needs_spare() && !core.making_spare {
            core.making_spare = true;
            tokio::task::spawn_local(make_spare(Rc::downgrade(self), core.options.file_bytes));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for task in self.tasks.get_mut() {
            task.abort();
        }
    }
}

/// How long to wait before trying again to make a file: the disk is full.
const SPARE_RETRY: std::time::Duration = std::time::Duration::from_millis(500);

/// A log that is opened on a full disk waits like one that fills it: what was acknowledged is all there, and an operator
/// makes room.
async fn first_spare(dir: &Path, file_bytes: u64) -> Result<LogFile, LogError> {
    let mut said = false;
    loop {
        let path = dir.to_owned();
        let making = tokio::task::spawn_blocking(move || LogFile::create(free_name(&path)?, file_bytes));
        match making.await {
            Ok(Err(error)) if error.is_full() => {
                if !said {
                    tracing::warn!(%error, "the log is not opened before there is space");
                    said = true;
                }
                tokio::time::sleep(SPARE_RETRY).await;
            }
            Ok(made) => return made,
            Err(stopped) => return Err(file::failed("create a file in", dir)(io::Error::other(stopped))),
        }
    }
}

async fn make_spare(inner: Weak<Inner>, file_bytes: u64) {
    let mut said = false;
    while let Some(strong) = inner.upgrade() {
        let dir = strong.dir.clone();
        drop(strong);
        let made = tokio::task::spawn_blocking(move || LogFile::create(free_name(&dir)?, file_bytes)).await;
        let Some(inner) = inner.upgrade() else { return };
        match made {
            Ok(Ok(file)) => {
                inner.with_core(|core, _| {
                    core.making_spare = false;
                    core.spare_made(file);
                });
                return;
            }
            // Not the end: nothing was promised yet. Writes wait until there is room, or a file is free.
            Ok(Err(error)) => {
                if !said {
                    tracing::warn!(%error, "no new log file, until there is space or one is free");
                    said = true;
                }
                inner.core.borrow_mut().no_spare = true;
            }
            // The runtime is going away.
            Err(_) => return,
        }
        {
            let mut core = inner.core.borrow_mut();
            if !core.needs_spare() {
                (core.making_spare, core.no_spare) = (false, false);
                return;
            }
        }
        drop(inner);
        tokio::time::sleep(SPARE_RETRY).await;
    }
}

/// From an entry's append to the frames that carry it to the followers, and on to the socket, in tasks: these go first, so
/// that the followers' disks work while ours does.
const TASKS_FIRST: u32 = 6;

/// One write for everything that was appended during this turn of the thread.
async fn submit_when_asked(asked: Rc<Notify>, inner: Weak<Inner>) {
    loop {
        asked.notified().await;
        after_others(TASKS_FIRST).await;
        let Some(inner) = inner.upgrade() else { return };
        inner.with_core(Core::submit);
        inner.look_after_files();
    }
}

/// What is complete frees room for what is sealed and open.
async fn reap_when_told(event: AsyncFd<OwnedFd>, inner: Weak<Inner>) {
    while let Ok(mut ready) = event.readable().await {
        // Before looking: what completes while we look is told again.
        ready.clear_ready();
        let Some(inner) = inner.upgrade() else { return };
        inner.with_core(|core, told| {
            core.reap(told);
            core.submit(told);
        });
        inner.look_after_files();
    }
}

/// One log per directory at a time.
fn lock(dir: &Path) -> Result<std::fs::File, LogError> {
    let lock = std::fs::File::open(dir).map_err(file::failed("open", dir))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(LogError::InUse { dir: dir.to_owned() }),
        Err(error) => Err(file::failed("lock", dir)(error.into())),
    }
}

/// A name for a new file.
fn free_name(dir: &Path) -> Result<PathBuf, LogError> {
    let mut highest = 0;
    for entry in std::fs::read_dir(dir).map_err(file::failed("list", dir))? {
        let path = entry.map_err(file::failed("list", dir))?.path();
        highest = highest.max(file_number(&path).unwrap_or(0));
    }
    Ok(file_name(dir, highest + 1))
}

#[cfg(test)]
mod tests;
