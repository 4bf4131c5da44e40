//! Which chunks have a file, and how much of each is written, as of the last checkpoint.
//!
//! Kept whole in memory (100 bytes a chunk: 26 MB for a 4 TiB disk), so that a read of space never written needs no
//! system call and a discard of a chunk that is not here costs nothing. What is in the trash is listed here too, but
//! no read and no write ever looks there.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use evolute_protocol::geometry::{BLOCK_BYTES, KIB};
use evolute_protocol::id::{ChunkIndex, ChunkKey, CopysetId, VolumeId};

use super::format::CHECKSUM_SECTORS;
use super::overlay::{Keyed, Owner};
use super::trash::Trash;

/// The generation of a chunk's first file, unless the trash has one of that name.
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
    /// Bytes of blocks per replica and volume.
    uses: BTreeMap<(CopysetId, VolumeId), u64>,
    /// By admission.
    trash: BTreeMap<u64, Trash>,
    /// How many files each chunk has in the trash.
    trashed: HashMap<ChunkKey, u32, Keyed>,
    trash_bytes: u64,
}

impl Table {
    pub fn get(&self, key: ChunkKey) -> Option<&ChunkRecord> {
        self.volumes.get(&key.volume)?.get(&key.index)
    }

    /// Puts what a checkpoint made of a chunk; `None`: it is gone.
    pub fn put(&mut self, key: ChunkKey, record: Option<ChunkRecord>) {
        if let Some(record) = &record {
            self.count(key, record, true);
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
            self.count(key, &before, false);
        }
    }

    fn count(&mut self, key: ChunkKey, record: &ChunkRecord, add: bool) {
        let (bytes, lost) = (record.file_bytes(), u64::from(record.lost));
        let blocks = record.blocks() * BLOCK_BYTES;
        let place = (record.owner.copyset, key.volume);
        let used = self.uses.entry(place).or_default();
        if add {
            *used += blocks;
            (self.chunks, self.bytes, self.lost) = (self.chunks + 1, self.bytes + bytes, self.lost + lost);
        } else {
            *used -= blocks;
            if *used == 0 {
                self.uses.remove(&place);
            }
            (self.chunks, self.bytes, self.lost) = (self.chunks - 1, self.bytes - bytes, self.lost - lost);
        }
    }

    /// Bytes of blocks each volume has in a replica here.
    pub fn uses(&self) -> &BTreeMap<(CopysetId, VolumeId), u64> {
        &self.uses
    }

    /// The chunks that are here for a replica.
    pub fn of_copyset(&self, copyset: CopysetId) -> Vec<(ChunkKey, ChunkRecord)> {
        let ours = self.iter().filter(|(_, record)| record.owner.copyset == copyset);
        ours.map(|(key, record)| (key, record.clone())).collect()
    }

    pub fn trash(&self) -> &BTreeMap<u64, Trash> {
        &self.trash
    }

    pub fn put_trash(&mut self, admission: u64, trash: Trash) {
        for (key, record) in &trash.chunks {
            *self.trashed.entry(*key).or_default() += 1;
            self.trash_bytes += record.file_bytes();
        }
        self.trash.insert(admission, trash);
    }

    /// Takes up to `count` chunks out of the trash of one replica; whether they were the last.
    pub fn take_trash(&mut self, admission: u64, count: usize) -> (Vec<(ChunkKey, ChunkRecord)>, bool) {
        let Some(trash) = self.trash.get_mut(&admission) else { return (Vec::new(), true) };
        let taken = trash.chunks.split_off(trash.chunks.len().saturating_sub(count));
        let last = trash.chunks.is_empty();
        if last {
            self.trash.remove(&admission);
        }
        for (key, record) in &taken {
            self.trash_bytes -= record.file_bytes();
            if let Some(files) = self.trashed.get_mut(key) {
                *files -= 1;
                if *files == 0 {
                    self.trashed.remove(key);
                }
            }
        }
        (taken, last)
    }

    /// Whether the trash has a file of this chunk, whose name must not be used.
    pub fn is_trashed(&self, key: ChunkKey) -> bool {
        self.trashed.contains_key(&key)
    }

    pub fn trash_bytes(&self) -> u64 {
        self.trash_bytes
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
