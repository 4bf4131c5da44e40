//! Which chunks have a file, and how much of each is written, as of the last checkpoint.
//!
//! Kept whole in memory (100 bytes a chunk: 26 MB for a 4 TiB disk), so that a read of space never written needs no
//! system call and a discard of a chunk that is not here costs nothing.

use std::collections::{BTreeSet, HashMap};

use evolute_protocol::geometry::{BLOCK_BYTES, KIB};
use evolute_protocol::id::{ChunkIndex, ChunkKey, VolumeId};

use super::format::CHECKSUM_SECTORS;
use super::overlay::{Keyed, Owner};

/// The generation of a chunk that no volume snapshot has frozen yet.
pub const FIRST_GENERATION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkRecord {
    pub owner: Owner,
    pub generation: u32,
    /// Blocks written, per checksum sector. A sector with none is never read: whatever is there does not count.
    pub written: [u8; CHECKSUM_SECTORS],
    /// Its file was missing when the store was opened. Not stored: found anew each time.
    pub lost: bool,
}

impl ChunkRecord {
    pub fn blocks(&self) -> u64 {
        self.written.iter().map(|count| u64::from(*count)).sum()
    }

    /// What its file takes: blocks, the header's page and the pages of checksum sectors in use.
    pub fn file_bytes(&self) -> u64 {
        let pages = self.written.chunks(8).filter(|page| page.iter().any(|count| *count > 0)).count() as u64;
        self.blocks() * BLOCK_BYTES + (1 + pages) * 4 * KIB
    }
}

#[derive(Debug, Default)]
pub struct Table {
    volumes: HashMap<VolumeId, HashMap<ChunkIndex, ChunkRecord, Keyed>, Keyed>,
    chunks: u64,
    bytes: u64,
    lost: u64,
}

impl Table {
    pub fn get(&self, key: ChunkKey) -> Option<&ChunkRecord> {
        self.volumes.get(&key.volume)?.get(&key.index)
    }

    /// Puts what a checkpoint made of a chunk; `None`: it is gone.
    pub fn put(&mut self, key: ChunkKey, record: Option<ChunkRecord>) {
        if let Some(record) = &record {
            self.count(record, true);
        }
        let volume = self.volumes.entry(key.volume).or_default();
        let before = match record {
            Some(record) => volume.insert(key.index, record),
            None => volume.remove(&key.index),
        };
        if volume.is_empty() {
            self.volumes.remove(&key.volume);
        }
        if let Some(before) = before {
            self.count(&before, false);
        }
    }

    fn count(&mut self, record: &ChunkRecord, add: bool) {
        let (bytes, lost) = (record.file_bytes(), u64::from(record.lost));
        if add {
            (self.chunks, self.bytes, self.lost) = (self.chunks + 1, self.bytes + bytes, self.lost + lost);
        } else {
            (self.chunks, self.bytes, self.lost) = (self.chunks - 1, self.bytes - bytes, self.lost - lost);
        }
    }

    pub fn of_volume(&self, volume: VolumeId) -> impl Iterator<Item = (ChunkKey, &ChunkRecord)> {
        self.volumes
            .get(&volume)
            .into_iter()
            .flatten()
            .map(move |(index, record)| (ChunkKey { volume, index: *index }, record))
    }

    pub fn iter(&self) -> impl Iterator<Item = (ChunkKey, &ChunkRecord)> {
        self.volumes.iter().flat_map(|(volume, chunks)| {
            chunks.iter().map(|(index, record)| (ChunkKey { volume: *volume, index: *index }, record))
        })
    }

    pub fn volumes(&self) -> BTreeSet<VolumeId> {
        self.volumes.keys().copied().collect()
    }

    pub fn chunk_count(&self) -> u64 {
        self.chunks
    }

    /// Bytes of all chunk files.
    pub fn file_bytes(&self) -> u64 {
        self.bytes
    }

    pub fn lost_count(&self) -> u64 {
        self.lost
    }
}
