//! The store's state on the shard thread: what is in memory, what is in files, what is open.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::Instant;

use evolute_protocol::geometry::{BLOCK_BYTES, CHUNK_BYTES, MIB};
use evolute_protocol::id::{ChunkKey, ClusterId, CopysetId, VolumeId};

use crate::disk::{Disk, Space};

use super::catalog::Catalog;
use super::checkpoint::{CheckpointThread, Draining};
use super::chunk_file::OpenChunks;
use super::drain::SLACK_BYTES;
use super::error::StoreError;
use super::format::{BLOCKS_PER_CHECKSUM_SECTOR, checksum_place};
use super::options::{CopysetRecord, Pressure, RESERVE_BYTES_MAX, StoreOptions, StoreUsage};
use super::overlay::{Layer, Owner, block_of};
use super::pace::Filling;
use super::read::View;
use super::swap::Swapping;
use super::table::Table;
use super::watch::Watched;

pub struct Shard {
    pub active: Layer,
    pub draining: Option<Draining>,
    /// A replica is being replaced or thrown away: nothing is frozen until that is done.
    pub swapping: Option<Swapping>,
    /// Changed only here, when a checkpoint finishes; the checkpoint thread reads it.
    pub table: Arc<RwLock<Table>>,
    pub open_chunks: OpenChunks,
    pub disk: Arc<dyn Disk>,
    pub catalog: Arc<Catalog>,
    /// The catalog's, so that no write waits for its lock.
    pub admissions: HashMap<CopysetId, u64>,
    /// What was applied of each replica that was installed here, then.
    pub installed: HashMap<CopysetId, u64>,
    /// Blocks that are being repaired.
    pub repairs: HashSet<(ChunkKey, u16)>,
    pub watches: Vec<rc::Weak<Watched>>,
    /// How much is staged of replicas that are arriving.
    pub arriving: Vec<(CopysetId, Weak<AtomicU64>)>,
    /// The next generation that no file has or had.
    pub generations: Arc<AtomicU32>,
    pub thread: CheckpointThread,
    /// Tells it how far the active layer is.
    pub filling: Arc<Filling>,
    pub options: StoreOptions,
    pub cluster: ClusterId,
    /// Rises whenever what a planned read knows may have changed: at a freeze and at a finish.
    pub version: u64,
    pub last_checkpoint: Instant,
    /// As last asked for.
    pub space: Space,
}

/// What this store follows may fill the overlay twice, so that a disk that is merely a little slower than its leaders' is not
/// noticed; however small the overlay is, a few of the longest appends find room.
const FOLLOWED_BYTES_MIN: u64 = 16 * MIB;

impl Shard {
    pub fn view(&self, key: ChunkKey) -> (RwLockReadGuard<'_, Table>, Layers<'_>) {
        let layers = Layers { active: &self.active, frozen: self.draining_layer(), key };
        (self.read_table(), layers)
    }

    pub fn read_table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn volume_uses(&self) -> BTreeMap<(CopysetId, VolumeId), u64> {
        let table = self.read_table();
        let mut uses = table.uses().clone();
        let draining = self.draining_layer().into_iter().flat_map(|layer| layer.chunks());
        let changed: HashSet<_> = draining.chain(self.active.chunks()).map(|(key, _)| key).collect();
        for key in changed {
            let record = table.get(key);
            let in_file = record.map_or(0, |record| record.blocks() * BLOCK_BYTES);
            let (mut owner, mut now) = (record.map(|record| record.owner), in_file);
            for layer in
                [self.draining_layer().map(|layer| &**layer), Some(&self.active)].into_iter().flatten()
            {
                let Some(chunk) = layer.chunk(key) else { continue };
                owner = chunk.owner.or(owner);
                now = if chunk.base_gone { chunk.bytes() } else { now.max(chunk.bytes()) };
            }
            let Some(owner) = owner else { continue };
            let used = uses.entry((owner.copyset, key.volume)).or_default();
            *used = (*used + now).saturating_sub(in_file);
        }
        uses.retain(|_, used| *used > 0);
        uses
    }

    pub fn owner(&self, copyset: CopysetId) -> Owner {
        Self::owner_in(&self.admissions, copyset)
    }

    pub fn owner_in(admissions: &HashMap<CopysetId, u64>, copyset: CopysetId) -> Owner {
        let Some(admission) = admissions.get(&copyset) else {
            panic!("{copyset} changes chunks but was never put into the store")
        };
        Owner { copyset, admission: *admission }
    }

    /// Records made before a replica was installed do not count any more: its owner has not heard of it yet.
    pub fn with_admission(&self, states: Vec<CopysetRecord>) -> Vec<(CopysetRecord, u64)> {
        let is_new = |record: &CopysetRecord| {
            self.installed.get(&record.copyset).is_none_or(|installed| record.applied >= *installed)
        };
        states
            .into_iter()
            .filter(is_new)
            .map(|record| {
                let admission = self.owner(record.copyset).admission;
                (record, admission)
            })
            .collect()
    }

    pub fn arriving_bytes(&self, copyset: CopysetId) -> u64 {
        let ours = self.arriving.iter().filter(|(of, _)| *of == copyset);
        ours.filter_map(|(_, bytes)| Some(bytes.upgrade()?.load(Ordering::Relaxed))).sum()
    }

    pub fn new_generation(&self) -> u32 {
        self.generations.fetch_add(1, Ordering::Relaxed)
    }

    pub fn discard(&mut self, copyset: CopysetId, key: ChunkKey, offset: u32, len: u32) {
        self.changed(key, offset, len);
        let below = self.is_below(key);
        if offset == 0 && u64::from(len) == CHUNK_BYTES {
            let owner = self.owner(copyset);
            self.active.drop_chunk(key, Some(owner), below);
        } else if below || self.active.chunk(key).is_some() {
            let owner = self.owner(copyset);
            let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
            let written = table.get(key).map(|record| record.written);
            let in_file = |block| written.is_some_and(|written| written[checksum_place(block).0] > 0);
            let frozen = self.draining.as_ref().and_then(|draining| draining.frozen.layer.chunk(key));
            let is_below = |block| match frozen {
                Some(chunk) => chunk.block(block).is_some() || !chunk.base_gone && in_file(block),
                None => in_file(block),
            };
            self.active.zero(key, || owner, offset, len, is_below);
        }
        // Else nobody ever wrote there: the discard of a fresh disk costs nothing.
    }

    pub fn drop_volume(&mut self, copyset: CopysetId, volume: VolumeId) {
        self.changed_volume(volume);
        let owner = self.owner(copyset);
        for key in self.chunks_of(|key, of| key.volume == volume && of.copyset == copyset) {
            let below = self.is_below(key);
            self.active.drop_chunk(key, Some(owner), below);
        }
    }

    pub fn delete_copyset(&mut self, copyset: CopysetId) -> Result<(), StoreError> {
        self.changed_all();
        let chunks = self.chunks_of(|_, of| of.copyset == copyset);
        self.catalog.delete_copyset(copyset, &chunks)?;
        self.admissions.remove(&copyset);
        self.installed.remove(&copyset);
        for key in chunks {
            let below = self.is_below(key);
            self.active.drop_chunk(key, None, below);
        }
        Ok(())
    }

    /// Chunks in memory or in files of which `these` says so.
    pub fn chunks_of(&self, these: impl Fn(ChunkKey, Owner) -> bool) -> Vec<ChunkKey> {
        let table = self.read_table();
        let mut keys: Vec<_> =
            table.iter().filter(|(key, record)| these(*key, record.owner)).map(|(key, _)| key).collect();
        for layer in [Some(&self.active), self.draining_layer().map(|layer| &**layer)].into_iter().flatten() {
            keys.extend(
                layer
                    .chunks()
                    .filter(|(key, chunk)| chunk.owner.is_some_and(|of| these(*key, of)))
                    .map(|(key, _)| key),
            );
        }
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Whether anything below the active layer knows the chunk.
    fn is_below(&self, key: ChunkKey) -> bool {
        self.draining_layer().is_some_and(|layer| layer.chunk(key).is_some())
            || self.read_table().get(key).is_some()
    }

    pub fn checkpoint_due(&self) -> bool {
        if let Some(draining) = &self.draining {
            return draining.is_due();
        }
        self.active.bytes() >= self.options.overlay_bytes_max / 2
            || !self.active.is_empty() && self.last_checkpoint.elapsed() >= self.options.checkpoint_interval
    }

    pub fn refresh_space(&mut self) {
        if let Ok(space) = self.disk.space() {
            self.space = space;
        }
    }

    pub fn capacity(&self) -> u64 {
        self.options.capacity_bytes.unwrap_or(self.space.total)
    }

    fn free(&self) -> u64 {
        let table = self.read_table();
        let taken = table.file_bytes() + table.trash_bytes();
        self.capacity().saturating_sub(taken).min(self.space.available)
    }

    pub fn reserve(&self) -> u64 {
        let overlays = 2 * self.options.overlay_bytes_max + SLACK_BYTES;
        let usual = (self.capacity() / 20).min(RESERVE_BYTES_MAX);
        self.options.reserve_bytes.unwrap_or_else(|| usual.max(overlays.min(self.capacity() / 4)))
    }

    fn is_full(&self) -> bool {
        self.free() <= self.reserve()
    }

    pub fn is_near_full(&self) -> bool {
        self.free() <= self.reserve() * 2
    }

    pub fn pressure(&self) -> Pressure {
        if self.overlay_bytes() >= self.options.overlay_bytes_max {
            Pressure::Pace
        } else if self.is_full() {
            Pressure::Full
        } else {
            Pressure::Free
        }
    }

    /// What a leader's pace does not bound is what others send: they do not know this disk.
    pub fn admits(&self, bytes: u64) -> bool {
        let max = self.options.overlay_bytes_max;
        self.overlay_bytes() + bytes <= max + max.max(FOLLOWED_BYTES_MIN)
    }

    /// Above half of the reserve any chunk we have may still grow; below only what is certain to need no new space
    /// is let in.
    pub fn has_room_for(&self, key: ChunkKey, offset: u32, len: u32) -> bool {
        if !self.is_full() {
            return true;
        }
        let table = self.read_table();
        let Some(record) = table.get(key) else { return false };
        if self.free() > self.reserve() / 2 {
            return true;
        }
        let (first, last) = (offset as usize, (offset + len - 1) as usize);
        let sectors = checksum_place(block_of(first)).0..=checksum_place(block_of(last)).0;
        record.written[sectors].iter().all(|count| usize::from(*count) == BLOCKS_PER_CHECKSUM_SECTOR)
    }

    pub fn usage(&mut self) -> StoreUsage {
        self.refresh_space();
        let (capacity, free) = (self.capacity(), self.free());
        let table = self.read_table();
        StoreUsage {
            capacity,
            used: table.file_bytes(),
            free,
            overlay_bytes: self.overlay_bytes(),
            chunks: table.chunk_count(),
            damaged_chunks: table.lost_count(),
            trash_bytes: table.trash_bytes(),
            near_full: self.is_near_full(),
            full: self.is_full(),
        }
    }
}

/// The layers of one store, looked up for one chunk.
pub struct Layers<'a> {
    active: &'a Layer,
    frozen: Option<&'a Arc<Layer>>,
    key: ChunkKey,
}

impl<'a> Layers<'a> {
    pub fn view(&self, table: &'a Table) -> View<'a> {
        View {
            key: self.key,
            active: self.active.chunk(self.key),
            draining: self.frozen.and_then(|layer| layer.chunk(self.key)),
            frozen: self.frozen,
            record: table.get(self.key),
        }
    }
}

/// A quarter of the limit of open files, which the log and connections share with us.
pub fn default_open_chunks() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let quarter = limit.map_or(usize::MAX, |limit| usize::try_from(limit / 4).unwrap_or(usize::MAX));
    quarter.min(2048)
}
