//! Keeps the bytes of chunks on one disk and vouches for them with checksums.
//!
//! ```text
//!  apply ──write, discard──▶ overlay: active ─freeze─▶ draining ──checkpoint thread──▶ chunk files, RocksDB
//!                               │                        │                                 │
//!  read  ◀──────────────────────┴───── looked up in this order ──────────────────────────┘
//! ```
//!
//! What always holds:
//!
//! - What is read is what was written last, or zeroes, or an error; never a mix, never another chunk's bytes.
//! - A change costs one insert into memory: no system call, no error. It becomes durable by the caller's log at
//!   once and by the checkpoint later.
//! - What a [`CopysetRecord`] says is applied is in the chunk files. After a crash, opening the store and applying
//!   the log from there gives exactly the state before; applying any part of it twice changes nothing.
//! - Space that was never written, or was discarded, reads as zeroes for ever.
//!
//! It does not know Raft (it keeps one number of the log), the network, nor why a chunk is here.
//!
//! Start at [`ChunkStore`]. The bytes are drawn in `docs/chunk-format.md`.

mod block;
mod catalog;
mod checkpoint;
mod chunk_file;
mod drain;
mod error;
mod export;
mod format;
mod offline;
mod options;
mod overlay;
mod pace;
mod past;
mod read;
mod recover;
mod repair;
mod rescue;
mod rocks;
mod shard;
mod stage;
mod swap;
mod table;
mod trash;
mod watch;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use evolute_protocol::id::{BlockIndex, ChunkKey, CopysetId, VolumeId};

use crate::disk::direct::Direct;

use self::chunk_file::{ChunkFile, Fault, Wait};
use self::format::{FileId, checksum_place};
use self::read::Plan;
use self::recover::Parts;
use self::shard::Shard;

pub use error::{ReadError, StoreError};
pub use export::{EXPORT_BLOCKS_MAX, Export};
pub use options::{
    CheckpointDone, ChunkInfo, CopysetRecord, Identity, Pressure, ReadData, ScrubPosition, StoreOptions,
    StoreUsage,
};
pub use past::{Standing, Start, Starts};
pub use recover::Opened;
pub use repair::Repair;
pub use stage::{Extent, StageError, Staging};
pub use watch::Watch;

/// What crash tests need to build a store on other disks than the real one.
pub mod seams {
    pub use super::catalog::{Catalog, KeyChange, KeyValue};
    pub use super::recover::Parts;
}

/// The store of one disk, on the shard's thread. Not `Send`: reads off the thread and the checkpoint take what
/// they need with them.
pub struct ChunkStore {
    shard: Rc<RefCell<Shard>>,
}

/// A read that meets a checkpoint is planned anew. Each time the checkpoint must have overtaken it again, so this
/// is far more than ever happens; damage is told apart after at most this many.
const READ_ATTEMPTS: usize = 4;

impl ChunkStore {
    /// Who owns the store in `dir`; `None` if there is no store yet. Asked before registering.
    pub fn identity(dir: &Path) -> Result<Option<Identity>, StoreError> {
        recover::identity(dir)
    }

    /// Opens the store in `dir`, or creates it there if `dir` is empty or missing. `dir` is the store's alone: the
    /// log lives beside it.
    pub fn open(
        dir: &Path,
        options: StoreOptions,
        identity: &Identity,
    ) -> Result<(Self, Opened), StoreError> {
        let disk = Arc::new(Direct::new(dir));
        let catalog = Box::new(recover::open_catalog(dir, &*disk, identity)?);
        Self::open_parts(Parts { path: dir.to_path_buf(), disk, catalog }, options, identity)
    }

    /// [`Self::open`] for a store that exists, on any disk.
    pub fn open_parts(
        parts: Parts,
        options: StoreOptions,
        identity: &Identity,
    ) -> Result<(Self, Opened), StoreError> {
        let (shard, opened) = parts.open(options, identity)?;
        Ok((Self { shard: Rc::new(RefCell::new(shard)) }, opened))
    }

    /// A replica begins here: durable when this returns. Call it before the replica's first vote.
    pub fn put_copyset(&self, record: CopysetRecord) -> Result<(), StoreError> {
        let mut shard = self.shard.borrow_mut();
        let owner = shard.catalog.put_copyset(&record)?;
        shard.admissions.insert(owner.copyset, owner.admission);
        Ok(())
    }

    /// The starts of this directory until now.
    pub fn starts(&self) -> Result<Starts, StoreError> {
        self.shard.borrow().catalog.starts()
    }

    /// Durable when this returns. For rare events.
    pub fn put_starts(&self, starts: &Starts) -> Result<(), StoreError> {
        self.shard.borrow().catalog.put_starts(starts)
    }

    /// What is known of each replica's past. A read of the key-value store: for rare events.
    pub fn standings(&self) -> Result<BTreeMap<CopysetId, Standing>, StoreError> {
        self.shard.borrow().catalog.standings()
    }

    /// Durable when this returns, all of it or nothing.
    pub fn put_standings(&self, standings: &[(CopysetId, Standing)]) -> Result<(), StoreError> {
        self.shard.borrow().catalog.put_standings(standings)
    }

    /// A replica ends here: its record is gone when this returns, its chunks read as zeroes and their files go
    /// with the next checkpoint (or the next open).
    pub fn delete_copyset(&self, copyset: CopysetId) -> Result<(), StoreError> {
        self.shard.borrow_mut().delete_copyset(copyset)
    }

    /// What the last checkpoint kept of a replica. A read of the key-value store: for rare events.
    pub fn copyset(&self, copyset: CopysetId) -> Result<Option<CopysetRecord>, StoreError> {
        self.shard.borrow().catalog.copyset(copyset)
    }

    /// The chunks of a replica from `from` on, in order.
    pub fn chunks_from(&self, copyset: CopysetId, from: Option<ChunkKey>) -> Vec<ChunkKey> {
        self.shard.borrow().chunks_of(|key, of| of.copyset == copyset && Some(key) >= from)
    }

    /// All chunks of a replica, to be given to another one while this one goes on.
    pub fn export(&self, copyset: CopysetId) -> Export {
        let chunks = self.chunks_from(copyset, None);
        Export::new(Self { shard: self.shard.clone() }, chunks)
    }

    /// Begins to write a replica that comes from elsewhere beside the one that is here.
    pub fn stage(&self, copyset: CopysetId) -> Staging {
        Staging::new(self.shard.clone(), copyset)
    }

    /// What was staged (and finished) takes the place of the copyset's replica here, with `record` as its record:
    /// durably when this returns, and all of it or nothing whatever happens. Until the owner knows, it must not
    /// change chunks of that copyset. Cancel-safe: once begun it goes on by itself.
    pub fn install(
        &self,
        staging: Staging,
        record: CopysetRecord,
    ) -> impl Future<Output = Result<(), StoreError>> + use<> + 'static {
        assert_eq!(staging.copyset(), record.copyset, "staged for another copyset");
        let shard = self.shard.clone();
        async move {
            let staged = staging.staged();
            swap::run(shard, |shard| shard.install(record, staged)).await
        }
    }

    /// A replica ends here: its record is gone and its chunks are in the trash when this returns, durably, and read
    /// as zeroes. A note stays until [`Self::removed`]. Nothing may be written for that copyset any more.
    pub fn trash_copyset(
        &self,
        copyset: CopysetId,
        now_unix_ms: u64,
    ) -> impl Future<Output = Result<(), StoreError>> + use<> + 'static {
        swap::run(self.shard.clone(), move |shard| shard.trash(copyset, now_unix_ms))
    }

    /// Everything else of a removed replica is gone, too: the note of it may go.
    pub fn removed(&self, copyset: CopysetId) -> Result<(), StoreError> {
        self.shard.borrow().catalog.forget_removed(copyset)
    }

    /// Frees some of what has been in the trash for `delay_ms`, or of all of it when space is short. Call it every
    /// second or so.
    pub fn empty_trash(&mut self, now_unix_ms: u64, delay_ms: u64) {
        self.shard.borrow_mut().empty_trash(now_unix_ms, delay_ms);
    }

    /// What each volume has in each replica here, in bytes. Counted, not scanned: of a chunk that is in a file and was
    /// changed since the last checkpoint, nobody knows how many blocks are in both; then it is the more of the two.
    pub fn volume_uses(&self) -> BTreeMap<(CopysetId, VolumeId), u64> {
        self.shard.borrow().volume_uses()
    }

    /// Bytes staged of a replica that is arriving.
    pub fn arriving_bytes(&self, copyset: CopysetId) -> u64 {
        self.shard.borrow().arriving_bytes(copyset)
    }

    /// `data` at `offset`, one checksum per piece. The range is checked: whole sectors inside the chunk.
    /// `data` is kept by reference: it should not pin a buffer much larger than what was written into the store
    /// from that buffer.
    pub fn write(
        &mut self,
        copyset: CopysetId,
        chunk: ChunkKey,
        offset: u32,
        data: Bytes,
        checksums: &[u32],
    ) {
        let shard = &mut *self.shard.borrow_mut();
        shard.changed(chunk, offset, u32::try_from(data.len()).expect("inside a chunk"));
        let Shard { active, admissions, filling, .. } = shard;
        active.write(chunk, || Shard::owner_in(admissions, copyset), offset, data, checksums);
        filling.set(active.bytes());
    }

    /// Tells which blocks of a range, which is not empty, are changed from now on.
    pub fn watch(&self, chunk: ChunkKey, offset: u32, len: u32) -> Watch {
        self.shard.borrow_mut().watch(chunk, offset, len)
    }

    /// Watches a block that is not what it should be, before other replicas are asked for it. `None`: somebody is at it already.
    pub fn begin_repair(&self, copyset: CopysetId, chunk: ChunkKey, block: BlockIndex) -> Option<Repair> {
        Repair::begin(self.shard.clone(), copyset, chunk, block)
    }

    /// Where a scrub of this store was when it was last noted.
    pub fn scrub_position(&self) -> Result<ScrubPosition, StoreError> {
        self.shard.borrow().catalog.scrub_position()
    }

    /// Durable when this returns.
    pub fn put_scrub_position(
        &self,
        position: ScrubPosition,
    ) -> impl Future<Output = Result<(), StoreError>> + use<> + 'static {
        let catalog = self.shard.borrow().catalog.clone();
        blocking(move || catalog.put_scrub_position(position))
    }

    /// The range reads as zeroes from now on; its space is freed by the checkpoint.
    pub fn discard(&mut self, copyset: CopysetId, chunk: ChunkKey, offset: u32, len: u32) {
        self.shard.borrow_mut().discard(copyset, chunk, offset, len);
    }

    /// The range reads as zeroes from now on. The same as [`Self::discard`]: volumes are thin, zeroes take no space.
    pub fn write_zeroes(&mut self, copyset: CopysetId, chunk: ChunkKey, offset: u32, len: u32) {
        self.discard(copyset, chunk, offset, len);
    }

    /// The volume was deleted: all its chunks in this copyset read as zeroes; their files go with the checkpoint.
    pub fn drop_volume(&mut self, copyset: CopysetId, volume: VolumeId) {
        self.shard.borrow_mut().drop_volume(copyset, volume);
    }

    /// The next read of these blocks, and of their checksums, asks the disk.
    fn forget_cached(
        &self,
        chunk: ChunkKey,
        first: u16,
        count: u16,
    ) -> impl Future<Output = ()> + use<> + 'static {
        let mut shard = self.shard.borrow_mut();
        let generation = shard.read_table().get(chunk).map(|record| record.generation);
        let (id, disk) =
            (generation.map(|generation| FileId::new(shard.cluster, chunk, generation)), shard.disk.clone());
        let file = id.map(|id| {
            let sectors = checksum_place(first).0..=checksum_place(first + count - 1).0;
            shard.open_chunks.touched(chunk, sectors.fold(0, |all, sector| all | 1 << sector));
            shard.open_chunks.get(id)
        });
        async move {
            if let Some(file) = file {
                blocking(move || file.forget_cached(&*disk, first, count)).await;
            }
        }
    }

    /// What can be read without waiting for the disk; `None`: use [`Self::read`].
    pub fn try_read(&self, chunk: ChunkKey, offset: u32, len: u32) -> Result<Option<ReadData>, ReadError> {
        let mut shard = self.shard.borrow_mut();
        let (plan, file) = plan(&mut shard, chunk, offset, len)?;
        // A fault may be a checkpoint writing at this moment: the other way finds out.
        Ok(plan.run(&*shard.disk, file.as_deref(), Wait::Never).unwrap_or(None))
    }

    /// Reads, waiting for the disk on another thread. Sees at least what was applied before the first poll.
    /// Cancel-safe. Needs a tokio runtime.
    pub fn read(
        &self,
        chunk: ChunkKey,
        offset: u32,
        len: u32,
    ) -> impl Future<Output = Result<ReadData, ReadError>> + use<> + 'static {
        let shard = self.shard.clone();
        async move {
            let mut attempts = 1;
            loop {
                let (plan, file, disk, version) = {
                    let mut shard = shard.borrow_mut();
                    let (plan, file) = plan(&mut shard, chunk, offset, len)?;
                    (plan, file, shard.disk.clone(), shard.version)
                };
                let run = move || plan.run(&*disk, file.as_deref(), Wait::Device);
                let fault = match blocking(run).await {
                    Ok(read) => return Ok(read.expect("it may wait")),
                    Err(fault) => fault,
                };
                let shard = shard.borrow();
                let met_checkpoint = shard.version != version || shard.draining.is_some();
                if !met_checkpoint || attempts == READ_ATTEMPTS {
                    tracing::error!(%chunk, offset, len, %fault, attempts, "a read found damage");
                    return Err(unreadable(&fault, offset));
                }
                attempts += 1;
            }
        }
    }

    /// Whether it is time: the overlay is half full, or the last checkpoint was long ago and there is something to
    /// write. (How long the log has grown is the caller's reason.)
    pub fn checkpoint_due(&self) -> bool {
        self.shard.borrow().checkpoint_due()
    }

    /// Freezes the overlay now, together with `states`, which describe exactly what was applied until now, for
    /// every copyset of this store. The drain begins when the future is first polled: by then everything applied
    /// must be durable in the caller's log. One drain at a time: while one is under way (or has failed for lack of
    /// space), nothing is frozen and the future is about that one. Cancel-safe: the drain goes on by itself.
    pub fn begin_checkpoint(
        &mut self,
        states: Vec<CopysetRecord>,
    ) -> impl Future<Output = Result<CheckpointDone, StoreError>> + use<> + 'static {
        checkpoint::freeze(&mut self.shard.borrow_mut(), states);
        checkpoint::run(self.shard.clone())
    }

    pub fn chunk_info(&self, chunk: ChunkKey) -> ChunkInfo {
        let shard = self.shard.borrow();
        let table = shard.read_table();
        table.get(chunk).map_or_else(ChunkInfo::default, |record| ChunkInfo {
            allocated_bytes: record.blocks() * evolute_protocol::geometry::BLOCK_BYTES,
            generation: u64::from(record.generation),
        })
    }

    /// Asks the file system (a system call): for heartbeats, not for every request.
    pub fn usage(&self) -> StoreUsage {
        self.shard.borrow_mut().usage()
    }

    /// What the caller must do before it admits another write. Nanoseconds.
    pub fn pressure(&self) -> Pressure {
        self.shard.borrow().pressure()
    }

    /// Whether there is memory for `bytes` of changes that were ordered elsewhere. Not when nothing is drained: on a full
    /// disk, or one that is far too slow. Nanoseconds.
    pub fn admits(&self, bytes: u64) -> bool {
        self.shard.borrow().admits(bytes)
    }

    /// Whether the disk has room for a write of this range: ask before admitting it. On a full disk: yes to what is
    /// there already. Discards are always admitted. Nanoseconds.
    pub fn has_room_for(&self, chunk: ChunkKey, offset: u32, len: u32) -> bool {
        self.shard.borrow().has_room_for(chunk, offset, len)
    }

    /// Why the store is dead, once it is.
    pub fn failed(&self) -> Option<StoreError> {
        self.shard.borrow().catalog.failed().cloned()
    }
}

/// What a read needs, and the chunk's file if it needs one.
fn plan(
    shard: &mut Shard,
    key: ChunkKey,
    offset: u32,
    len: u32,
) -> Result<(Plan, Option<Arc<ChunkFile>>), ReadError> {
    let (plan, generation) = {
        let (table, layers) = shard.view(key);
        let view = layers.view(&table);
        let plan = Plan::new(&view, offset, len)
            .map_err(|block| ReadError::Unreadable { block: format::block_index(block) })?;
        (plan, view.record.map(|record| record.generation))
    };
    let file = match generation {
        Some(generation) if plan.needs_file() => {
            Some(shard.open_chunks.get(FileId::new(shard.cluster, key, generation)))
        }
        _ => None,
    };
    Ok((plan, file))
}

/// Does on another thread what waits for the disk. Cancel-safe: what was begun is done. Needs a tokio runtime.
async fn blocking<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(run).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going down: nobody waits for this any more.
            Err(_) => std::future::pending().await,
        },
    }
}

fn unreadable(fault: &Fault, offset: u32) -> ReadError {
    let block = match fault {
        Fault::Mismatch(block) => *block,
        Fault::Io(_) | Fault::Damage(_) => overlay::block_of(offset as usize),
    };
    ReadError::Unreadable { block: format::block_index(block) }
}

/// How large the disk of `dir` is: asked for when a chunkserver registers, before it has a store.
pub fn disk_space(dir: &Path) -> std::io::Result<crate::disk::Space> {
    crate::disk::direct::space(dir)
}
