//! What the owner of a store chooses, and what a store tells about itself.

use std::time::Duration;

use bytes::Bytes;
use evolute_protocol::checksum::Checksums;
use evolute_protocol::geometry::{GIB, MIB};
use evolute_protocol::id::{ChunkKey, ChunkserverId, ClusterId, CopysetId};
use smallvec::SmallVec;

#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Memory for writes that are not yet in chunk files. At the bound writes are paced; a checkpoint is due at
    /// half of it; at twice the bound (16 MiB more, if that is more) nothing is taken from other
    /// leaders. More means fewer device writes for blocks written again and again, and a longer restart.
    pub overlay_bytes_max: u64,
    /// A checkpoint is due this long after the last one, if there is anything to write. Shorter means a quicker
    /// restart, longer means fewer device writes.
    pub checkpoint_interval: Duration,
    /// Chunk files kept open, each with up to 17 KiB of verified checksums. `None`: 2048, or half of the
    /// process's limit of open files if that is less.
    pub open_chunks_max: Option<usize>,
    /// How much of the file system chunks may fill. `None`: all of it.
    pub capacity_bytes: Option<u64>,
    /// Free space below which no new chunk is begun: what is left is for overwrites of chunks we have.
    /// `None`: 5 % of the capacity, at most 4 GiB, at least what two overlays need.
    pub reserve_bytes: Option<u64>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            overlay_bytes_max: 256 * MIB,
            checkpoint_interval: Duration::from_secs(30),
            open_chunks_max: None,
            capacity_bytes: None,
            reserve_bytes: None,
        }
    }
}

/// The bound of [`StoreOptions::reserve_bytes`]'s default.
pub(crate) const RESERVE_BYTES_MAX: u64 = 4 * GIB;

/// Whose disk this is. Written once, when the store is created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub cluster: ClusterId,
    pub chunkserver: ChunkserverId,
    /// What the control plane gave us to prove that we are this chunkserver.
    pub token: Bytes,
}

/// What the store keeps for a copyset, durable together with the chunks it describes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopysetRecord {
    pub copyset: CopysetId,
    /// The last log index whose effects the chunk files hold: the log is read from the next one on.
    pub applied: u64,
    /// The owner's: dedupe, fence, membership, as of `applied`.
    pub state: Bytes,
    /// The owner's: what was true when the replica was created.
    pub created: Bytes,
}

/// What was read. `data` follow each other and are exactly as long as was asked for; they are in as few parts as
/// possible and not cut at block borders. `checksums` has one per piece, as cut by `checksum::pieces`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadData {
    pub data: SmallVec<[Bytes; 2]>,
    pub checksums: Checksums,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChunkInfo {
    /// Of its chunk file, as of the last checkpoint.
    pub allocated_bytes: u64,
    /// Rises when a volume snapshot freezes the chunk. 0: there is no such chunk here.
    pub generation: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreUsage {
    /// What the disk can hold, or what the owner allowed.
    pub capacity: u64,
    /// Bytes of chunk files.
    pub used: u64,
    /// Bytes that can still be written. Less than `capacity - used` when others fill the same file system.
    pub free: u64,
    /// Memory of writes that are not in chunk files yet.
    pub overlay_bytes: u64,
    pub chunks: u64,
    /// Of those, how many were found missing or damaged when the store was opened. Every read of them fails.
    pub damaged_chunks: u64,
    /// Bytes of files in the trash: neither used nor free yet.
    pub trash_bytes: u64,
    /// Little space is left: the control plane should place nothing new here.
    pub near_full: bool,
    pub full: bool,
}

/// How far a reader of everything has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScrubPosition {
    /// When this round began.
    pub began_unix_ms: u64,
    /// When a round last came to its end; 0: never.
    pub last_full_unix_ms: u64,
    /// `None`: the round is over.
    pub next: Option<(CopysetId, ChunkKey)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    Free,
    /// The overlay is at its bound: hold writes until the checkpoint under way is done. Comes before `Full`: while a
    /// full disk keeps the overlay from being drained, memory is what must not grow.
    Pace,
    /// The disk is at its reserve: [`super::ChunkStore::has_room_for`] no longer says yes to everything.
    Full,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckpointDone {
    /// What is durable now, per copyset. The log up to there may be recycled. It may be older than what the last
    /// `begin_checkpoint` was given: a drain that was under way, or had failed for lack of space, comes first.
    pub applied: Vec<(CopysetId, u64)>,
    /// Blocks written to chunk files.
    pub blocks: u64,
    pub chunks: u64,
    /// Bytes handed to the disk, checksums included.
    pub bytes: u64,
}
