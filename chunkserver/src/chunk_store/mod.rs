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

mod error;
mod options;

use std::path::Path;

use bytes::Bytes;
use evolute_protocol::id::{ChunkKey, CopysetId, VolumeId};

pub use error::{ReadError, StoreError};
pub use options::{
    CheckpointDone, ChunkInfo, CopysetRecord, Identity, Pressure, ReadData, StoreOptions, StoreUsage,
};

/// The store of one disk, on the shard's thread. Not `Send`: reads off the thread and the checkpoint take what
/// they need with them.
pub struct ChunkStore {
    _shard: std::rc::Rc<()>,
}

impl ChunkStore {
    /// Who owns the store in `dir`; `None` if there is no store yet. Asked before registering.
    pub fn identity(dir: &Path) -> Result<Option<Identity>, StoreError> {
        let _ = dir;
        panic!("not built yet")
    }

    /// Opens the store in `dir`, or creates it there if `dir` is empty or missing. `dir` is the store's alone: the
    /// log lives beside it. Gives what the log must be replayed from.
    pub fn open(
        dir: &Path,
        options: StoreOptions,
        identity: &Identity,
    ) -> Result<(Self, Vec<CopysetRecord>), StoreError> {
        let _ = (dir, options, identity);
        panic!("not built yet")
    }

    /// A replica begins here: durable when this returns. Call it before the replica's first vote.
    pub fn put_copyset(&self, record: CopysetRecord) -> Result<(), StoreError> {
        let _ = record;
        panic!("not built yet")
    }

    /// A replica ends here: its record is gone when this returns, its chunks read as zeroes and their files go
    /// with the next checkpoint (or the next open).
    pub fn delete_copyset(&self, copyset: CopysetId) -> Result<(), StoreError> {
        let _ = copyset;
        panic!("not built yet")
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
        let _ = (copyset, chunk, offset, data, checksums);
        panic!("not built yet")
    }

    /// The range reads as zeroes from now on; its space is freed by the checkpoint.
    pub fn discard(&mut self, copyset: CopysetId, chunk: ChunkKey, offset: u32, len: u32) {
        let _ = (copyset, chunk, offset, len);
        panic!("not built yet")
    }

    /// The range reads as zeroes from now on. The same as [`Self::discard`]: volumes are thin, zeroes take no space.
    pub fn write_zeroes(&mut self, copyset: CopysetId, chunk: ChunkKey, offset: u32, len: u32) {
        self.discard(copyset, chunk, offset, len);
    }

    /// The volume was deleted: all its chunks in this copyset read as zeroes; their files go with the checkpoint.
    pub fn drop_volume(&mut self, copyset: CopysetId, volume: VolumeId) {
        let _ = (copyset, volume);
        panic!("not built yet")
    }

    /// What can be read without waiting for the disk; `None`: use [`Self::read`].
    pub fn try_read(&self, chunk: ChunkKey, offset: u32, len: u32) -> Result<Option<ReadData>, ReadError> {
        let _ = (chunk, offset, len);
        panic!("not built yet")
    }

    /// Reads, waiting for the disk on another thread. Sees what was applied before the first poll. Cancel-safe.
    pub fn read(
        &self,
        chunk: ChunkKey,
        offset: u32,
        len: u32,
    ) -> impl Future<Output = Result<ReadData, ReadError>> + use<> + 'static {
        let _ = (chunk, offset, len);
        async { panic!("not built yet") }
    }

    /// Whether it is time: the overlay is half full, or the last checkpoint was long ago and there is something to
    /// write. (How long the log has grown is the caller's reason.)
    pub fn checkpoint_due(&self) -> bool {
        panic!("not built yet")
    }

    /// Freezes the overlay now, together with `states`, which describe exactly what was applied until now, for
    /// every copyset of this store. The drain begins when the future is first polled: by then everything applied
    /// must be durable in the caller's log. One drain at a time: while one is under way (or has failed for lack of
    /// space), nothing is frozen and the future is about that one. Cancel-safe: the drain goes on by itself.
    pub fn begin_checkpoint(
        &mut self,
        states: Vec<CopysetRecord>,
    ) -> impl Future<Output = Result<CheckpointDone, StoreError>> + use<> + 'static {
        let _ = states;
        async { panic!("not built yet") }
    }

    pub fn chunk_info(&self, chunk: ChunkKey) -> ChunkInfo {
        let _ = chunk;
        panic!("not built yet")
    }

    /// Asks the file system (a system call): for heartbeats, not for every request.
    pub fn usage(&self) -> StoreUsage {
        panic!("not built yet")
    }

    /// What the caller must do before it admits another write. Nanoseconds.
    pub fn pressure(&self) -> Pressure {
        panic!("not built yet")
    }

    /// Whether a write of this range may be admitted when the pressure is [`Pressure::Full`]. Discards always may.
    pub fn has_room_for(&self, chunk: ChunkKey, offset: u32, len: u32) -> bool {
        let _ = (chunk, offset, len);
        panic!("not built yet")
    }

    /// Why the store is dead, once it is.
    pub fn failed(&self) -> Option<StoreError> {
        panic!("not built yet")
    }
}
