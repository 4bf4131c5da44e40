//! Makes one frozen layer durable in chunk files. Runs on the checkpoint thread, decides nothing about memory.
//!
//! In this order, because a crash may come between any two steps:
//!
//! 1. Partial blocks are merged with their base. What the log could not heal goes to the rescue file, synced.
//! 2. Blocks are written in the order of the file, zeroed ranges punched, touched checksum sectors written.
//! 3. Every touched file is synced, then every directory in which a file was created.
//! 4. One synced batch: chunk records, copyset records. **This is the commit.** A crash before it leaves the old
//!    records, and the log from their `applied` on heals whatever steps 2 and 3 left.
//! 5. Files with nothing left are removed, by the caller, once no reader can ask for them. A crash before leaves
//!    files without records, which the next open removes.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use evolute_protocol::geometry::{BLOCK_BYTES, MIB};
use evolute_protocol::id::{ChunkKey, ClusterId, VolumeId};

use crate::disk::{Disk, File};

use super::block::{Block, BlockData, Resolved};
use super::catalog::{Catalog, CheckpointBatch};
use super::chunk_file::{ChunkFile, Fault, Run, Wait, open_verified};
use super::error::StoreError;
use super::format::{
    BLOCK, BLOCKS_PER_CHECKSUM_SECTOR, BlockOnDisk, CHECKSUM_SECTORS, CHECKSUMS_AT, CHUNKS_DIR,
    ChecksumSector, FILE_BYTES, FileId, SECTOR, UnverifiedChecksumSector, checksum_place, checksum_sector_at,
    data_at, encode_header, volume_dir,
};
use super::options::CopysetRecord;
use super::overlay::{ChunkLayer, Layer};
use super::pace::{Filling, Pace};
use super::rescue::{self, Rescued};
use super::table::{ChunkRecord, FIRST_GENERATION, Table};

/// Left alone by checkpoints, so that RocksDB always finds room for its batch.
pub const SLACK_BYTES: u64 = 32 * MIB;
/// Others may fill the same file system. With less than this no checkpoint is begun, whatever it needs: a batch that finds no
/// room is the end of the store. Twice what RocksDB writes at once.
const BATCH_BYTES: u64 = 8 * MIB;
/// Files written before the first of them is synced: the disk works on all of them at once.
const FILES_AT_ONCE: usize = 128;

/// A layer that is being made durable, with what was true when it was frozen.
pub struct Frozen {
    pub layer: Arc<Layer>,
    /// With the admission of each copyset.
    pub states: Vec<(CopysetRecord, u64)>,
    /// The rescue file holds its blocks, synced. Not written again if the drain must be repeated: the chunk files
    /// may be half merged by then.
    pub rescued: AtomicBool,
}

/// What became of each chunk, for the shard thread's table and caches.
#[derive(Debug, Default)]
pub struct Drained {
    pub chunks: Vec<DrainedChunk>,
    pub blocks: u64,
    pub bytes: u64,
}

#[derive(Debug)]
pub struct DrainedChunk {
    pub key: ChunkKey,
    /// `None`: nothing is left of it; its file, if there was one, may be removed.
    pub record: Option<ChunkRecord>,
    pub removed: Option<FileId>,
    /// Checksum sectors written, a bit for each.
    pub touched: u64,
    /// The file is a new one.
    pub created: bool,
}

pub struct Drainer {
    pub disk: Arc<dyn Disk>,
    pub catalog: Arc<Catalog>,
    pub table: Arc<RwLock<Table>>,
    pub cluster: ClusterId,
    pub rescue: Arc<dyn File>,
    /// Volumes whose directory is durable.
    pub volumes: HashSet<VolumeId>,
    /// What chunk files may take together.
    pub capacity: u64,
    /// The next generation that no file has or had.
    pub generations: Arc<AtomicU32>,
    /// The layer that fills meanwhile.
    pub filling: Arc<Filling>,
    /// What both may hold together.
    pub overlay_bytes_max: u64,
}

/// Chunk files written and not yet synced.
#[derive(Default)]
struct Unsynced {
    files: Vec<Arc<dyn File>>,
    /// Directories in which names were created.
    dirs: BTreeSet<VolumeId>,
}

impl Drainer {
    pub fn drain(&mut self, frozen: &Frozen) -> Result<Drained, StoreError> {
        let number = self.catalog.checkpoint() + 1;
        let layer = &*frozen.layer;
        self.check_space(layer)?;
        self.rescue(frozen, number)?;
        let mut drained = Drained::default();
        let mut unsynced = Unsynced::default();
        let mut keys: Vec<_> = layer.chunks().map(|(key, _)| key).collect();
        keys.sort_unstable();
        let blocks: usize = layer.chunks().map(|(_, chunk)| chunk.block_count()).sum();
        let room = (self.overlay_bytes_max / 2).min(self.overlay_bytes_max.saturating_sub(layer.bytes()));
        let mut pace = Pace::new(self.filling.clone(), room, (blocks * BLOCK) as u64);
        for key in keys {
            let chunk = layer.chunk(key).expect("a key of this layer");
            let written = self.drain_chunk(key, chunk, number, &mut pace, &mut drained, &mut unsynced);
            written.map_err(|e| self.failed(&format!("writing {key}"), e))?;
            if unsynced.files.len() >= FILES_AT_ONCE {
                sync_files(&mut unsynced.files)
                    .map_err(|e| self.catalog.sync_failed("syncing chunk files", e))?;
            }
        }
        sync_files(&mut unsynced.files).map_err(|e| self.catalog.sync_failed("syncing chunk files", e))?;
        self.sync_dirs(&unsynced.dirs).map_err(|e| self.catalog.sync_failed("syncing directories", e))?;
        let chunks = drained.chunks.iter().map(|chunk| (chunk.key, chunk.record.as_ref())).collect();
        self.catalog.commit_checkpoint(CheckpointBatch { number, states: &frozen.states, chunks })?;
        Ok(drained)
    }

    /// Frees the space of what is no longer needed. Whatever fails here is found again at the next open.
    pub fn clean_up(&mut self, removed: &[FileId]) {
        let _ = self.rescue.punch(0, rescue::file_bytes(1).max(64 * MIB));
        self.remove(removed);
    }

    /// Removes files that no record names any more, and directories with nothing left.
    pub fn remove(&mut self, files: &[FileId]) {
        let mut dirs = BTreeSet::new();
        for id in files {
            if self.is_unused(id)
                && let Err(error) = self.disk.remove(&id.path())
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(chunk = %id.key, %error, "an unused chunk file stays until the next start");
            }
            dirs.insert(id.key.volume);
        }
        for volume in dirs {
            let empty = self.read_table().of_volume(volume).next().is_none();
            if empty && self.disk.remove_dir(&volume_dir(volume)).is_ok() {
                self.volumes.remove(&volume);
            }
        }
    }

    /// The chunk may have been written anew since its file was given up.
    fn is_unused(&self, id: &FileId) -> bool {
        self.read_table().get(id.key).is_none_or(|record| record.generation != id.generation)
    }

    /// A full disk is found out before anything is written: the blocks that need new space must fit. The records tell how
    /// many those are at most. Only if that is too much the files are asked: what is overwritten has its space.
    fn check_space(&self, layer: &Layer) -> Result<(), StoreError> {
        let space = self.disk.space().map_err(|e| StoreError::io("asking for free space", e))?;
        let taken = {
            let table = self.read_table();
            table.file_bytes() + table.trash_bytes()
        };
        let allowed = self.capacity.saturating_sub(taken);
        let available = space.available.saturating_sub(SLACK_BYTES).min(allowed);
        let needed = |asking: bool| -> u64 {
            layer.chunks().map(|(key, chunk)| self.new_bytes(key, chunk, asking)).sum()
        };
        let mut most = needed(false);
        if most > available {
            most = needed(true);
        }
        if most > available {
            return Err(StoreError::NoSpace { needed: most, available });
        }
        if space.available < BATCH_BYTES {
            return Err(StoreError::NoSpace { needed: BATCH_BYTES, available: space.available });
        }
        Ok(())
    }

    /// New space that a chunk's blocks need at most, as far as its record tells, or `asking` its file.
    fn new_bytes(&self, key: ChunkKey, chunk: &ChunkLayer, asking: bool) -> u64 {
        let record = self.read_table().get(key).cloned().filter(|_| !chunk.base_gone);
        let mut wanted = [0_u64; CHECKSUM_SECTORS];
        for (block, state) in chunk.blocks() {
            let (sector, place) = checksum_place(block);
            wanted[sector] |= u64::from(!matches!(state, Block::Zero)) << place;
        }
        let Some(record) = record else {
            let blocks: u32 = wanted.iter().map(|wanted| wanted.count_ones()).sum();
            let file = if chunk.block_count() > 0 { 2 } else { 0 };
            return (u64::from(blocks) + file) * BLOCK_BYTES;
        };
        let id = FileId::new(self.cluster, key, record.generation);
        let file = (asking && !record.lost).then(|| open_verified(&*self.disk, &id).ok()).flatten();
        let mut blocks = 0;
        for (sector, wanted) in wanted.into_iter().enumerate().filter(|(_, wanted)| *wanted > 0) {
            let has = u64::from(record.written[sector]);
            blocks += match file.as_deref().and_then(|file| read_sector(file, &id, sector).ok()) {
                Some(old) if has > 0 => u64::from((wanted & !old.written()).count_ones()),
                _ => u64::from(wanted.count_ones()).min(BLOCKS_PER_CHECKSUM_SECTOR as u64 - has),
            };
        }
        blocks * BLOCK_BYTES
    }

    /// Step 1.
    fn rescue(&self, frozen: &Frozen, number: u64) -> Result<(), StoreError> {
        let mut blocks = Vec::new();
        for (key, chunk) in frozen.layer.chunks() {
            self.rescue_chunk(key, chunk, &mut blocks);
        }
        if blocks.is_empty() || frozen.rescued.load(Ordering::Relaxed) {
            return Ok(());
        }
        blocks.sort_unstable_by_key(|rescued| (rescued.key, rescued.block));
        rescue::write(&*self.rescue, self.cluster.0, number, &blocks)
            .map_err(|e| self.failed("writing the rescue file", e))?;
        self.rescue.sync().map_err(|e| self.catalog.sync_failed("syncing the rescue file", e))?;
        frozen.rescued.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn rescue_chunk(&self, key: ChunkKey, chunk: &ChunkLayer, blocks: &mut Vec<Rescued>) {
        let Some(owner) = chunk.owner else { return };
        let record = self.read_table().get(key).cloned();
        let base = record.as_ref().filter(|_| !chunk.base_gone);
        let generation = record.as_ref().map_or(FIRST_GENERATION, |record| record.generation);
        let owner = base.map_or(owner, |record| record.owner);
        let mut file = None;
        for (block, state) in chunk.blocks() {
            let data = match state {
                Block::Full { data, assembled: true } => data.clone(),
                Block::Full { .. } | Block::Zero => continue,
                Block::Partial(partial) => {
                    if partial.resolved().is_none() {
                        let id = FileId::new(self.cluster, key, generation);
                        let file = file.get_or_insert_with(|| ChunkFile::new(id));
                        partial.resolve(match self.read_base(base, file, block) {
                            Some(base) if !partial.is_tainted() => Resolved::Whole(partial.over(&base)),
                            _ => Resolved::Damaged,
                        });
                    }
                    match partial.resolved() {
                        Some(Resolved::Whole(data)) => data.clone(),
                        _ => continue,
                    }
                }
            };
            blocks.push(Rescued { key, generation, owner, block, data });
        }
    }

    /// `None`: nobody can tell what it holds.
    fn read_base(&self, record: Option<&ChunkRecord>, file: &ChunkFile, block: u16) -> Option<BlockData> {
        let Some(record) = record else { return Some(BlockData::zeroes()) };
        if record.written[checksum_place(block).0] == 0 {
            return Some(BlockData::zeroes());
        }
        if record.lost {
            return None;
        }
        match file.read(&*self.disk, block, 1, Wait::Device) {
            Ok(runs) => match runs?.into_iter().next()? {
                Run::Data { data, crcs } => Some(BlockData::new(data, 0, crcs[0])),
                Run::Zeroes { .. } => Some(BlockData::zeroes()),
            },
            Err(error) => {
                tracing::error!(chunk = %file.id.key, block, %error, "a block cannot be merged: its base is damaged");
                None
            }
        }
    }

    /// Step 2, for one chunk.
    fn drain_chunk(
        &mut self,
        key: ChunkKey,
        chunk: &ChunkLayer,
        number: u64,
        pace: &mut Pace,
        drained: &mut Drained,
        unsynced: &mut Unsynced,
    ) -> io::Result<()> {
        let before = self.read_table().get(key).cloned();
        let generation = self.generation_of(key, before.as_ref());
        let id = FileId::new(self.cluster, key, generation);
        let gone = DrainedChunk {
            key,
            record: None,
            removed: before.as_ref().map(|_| id),
            touched: u64::MAX,
            created: false,
        };
        if chunk.block_count() == 0 && !chunk.base_gone {
            return Ok(());
        }
        let base = before.as_ref().filter(|_| !chunk.base_gone);
        let (Some(owner), true) = (chunk.owner, chunk.block_count() > 0) else {
            drained.chunks.push(gone);
            return Ok(());
        };
        let blocks = chunk.sorted();
        let mut target = Target::find(&*self.disk, id, before.as_ref(), base)?;
        let mut record = ChunkRecord {
            owner: base.map_or(owner, |record| record.owner),
            generation,
            written: target.written,
            lost: false,
        };
        let sectors = target.new_sectors(&blocks);
        for (sector, content) in &sectors {
            record.written[*sector] = content.written_count();
        }
        if record.blocks() == 0 {
            drained.chunks.push(gone);
            return Ok(());
        }
        let created = target.file.is_none();
        let file = match target.file.take() {
            Some(file) => file,
            None => self.create(&id, unsynced)?,
        };
        if !created && base.is_none() {
            // The chunk was discarded and begun again: nothing in its file counts.
            file.punch(CHECKSUMS_AT, FILE_BYTES - CHECKSUMS_AT)?;
        }
        drained.bytes += write_data(&*file, &blocks, &target.written, pace)?;
        drained.bytes += write_sectors(&*file, &id, number, &sectors)?;
        drained.blocks += blocks.len() as u64;
        file.start_writeback();
        unsynced.files.push(file);
        let touched = sectors.iter().map(|(sector, _)| 1 << sector).sum();
        drained.chunks.push(DrainedChunk {
            key,
            record: Some(record),
            removed: None,
            touched: if chunk.base_gone { u64::MAX } else { touched },
            created,
        });
        Ok(())
    }

    /// The one of the chunk's file. A new file does not take the name of one in the trash.
    fn generation_of(&self, key: ChunkKey, record: Option<&ChunkRecord>) -> u32 {
        match record {
            Some(record) => record.generation,
            None if self.read_table().is_trashed(key) => self.generations.fetch_add(1, Ordering::Relaxed),
            None => FIRST_GENERATION,
        }
    }

    fn create(&mut self, id: &FileId, unsynced: &mut Unsynced) -> io::Result<Arc<dyn File>> {
        let volume = id.key.volume;
        if !self.volumes.contains(&volume) {
            self.disk.create_dir(&volume_dir(volume))?;
        }
        unsynced.dirs.insert(volume);
        let file = match self.disk.create(&id.path()) {
            // Left by a drain that ran out of space, or damaged: no record says that anything in it counts.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let file = self.disk.open(&id.path())?;
                file.punch(0, FILE_BYTES)?;
                file
            }
            other => other?,
        };
        let header = encode_header(id);
        file.write(&mut [IoSlice::new(&header)], 0)?;
        Ok(file)
    }

    fn sync_dirs(&mut self, dirs: &BTreeSet<VolumeId>) -> io::Result<()> {
        for volume in dirs {
            self.disk.sync_dir(&volume_dir(*volume))?;
        }
        if dirs.iter().any(|volume| !self.volumes.contains(volume)) {
            self.disk.sync_dir(Path::new(CHUNKS_DIR))?;
            self.volumes.extend(dirs);
        }
        Ok(())
    }

    fn read_table(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, doing: &str, error: io::Error) -> StoreError {
        self.catalog.write_failed(&*self.disk, doing, error)
    }
}

/// The file a chunk is drained into.
struct Target {
    id: FileId,
    /// `None`: to be created, because there is none or the one there was is lost.
    file: Option<Arc<dyn File>>,
    /// Blocks per checksum sector that count.
    written: [u8; CHECKSUM_SECTORS],
}

impl Target {
    fn find(
        disk: &dyn Disk,
        id: FileId,
        before: Option<&ChunkRecord>,
        base: Option<&ChunkRecord>,
    ) -> io::Result<Self> {
        let written = base.map_or([0; CHECKSUM_SECTORS], |record| record.written);
        let file = match before {
            Some(record) if !record.lost => match open_verified(disk, &id) {
                Ok(file) => Some(file),
                Err(Fault::Io(e)) if !is_lost(&e) => return Err(e),
                Err(error) => {
                    tracing::error!(chunk = %id.key, %error, "a chunk file is lost; repair the chunk from a peer");
                    None
                }
            },
            _ => None,
        };
        Ok(Self { id, file, written })
    }

    /// The checksum sectors that must be written, as they will be. Should the file be lost, these are all that
    /// held something: nothing in them may be passed off as zeroes.
    fn new_sectors(&self, blocks: &[(u16, &Block)]) -> Vec<(usize, ChecksumSector)> {
        let mut sectors = BTreeMap::new();
        if self.file.is_none() {
            let held = (0..CHECKSUM_SECTORS).filter(|number| self.written[*number] > 0);
            sectors.extend(held.map(|number| (number, ChecksumSector::LOST)));
        }
        for (block, state) in blocks {
            let (number, _) = checksum_place(*block);
            let to = match content(state) {
                Content::Data(data) => BlockOnDisk::Written(data.crc),
                Content::Zero => BlockOnDisk::Zero,
                Content::Damaged => BlockOnDisk::Damaged,
            };
            let sector = sectors.entry(number).or_insert_with(|| self.old_sector(number));
            sector.set(self.id.key, *block, to);
        }
        sectors.into_iter().collect()
    }

    fn old_sector(&self, number: usize) -> ChecksumSector {
        let Some(file) = self.file.as_ref().filter(|_| self.written[number] > 0) else {
            return ChecksumSector::EMPTY;
        };
        let verified = read_sector(&**file, &self.id, number);
        verified.unwrap_or_else(|error| {
            tracing::error!(chunk = %self.id.key, number, %error, "a checksum sector is lost; its blocks must be repaired");
            ChecksumSector::LOST
        })
    }
}

fn read_sector(file: &dyn File, id: &FileId, number: usize) -> Result<ChecksumSector, Fault> {
    let mut raw = [0; SECTOR];
    file.read(&mut raw, checksum_sector_at(number))?;
    Ok(UnverifiedChecksumSector(raw).verify(id, number)?)
}

/// The file or its first block is not there any more. Other errors (no memory, no descriptors) say nothing of it.
fn is_lost(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::EIO)
}

enum Content<'a> {
    Data(&'a BlockData),
    Zero,
    Damaged,
}

fn content(state: &Block) -> Content<'_> {
    match state {
        Block::Full { data, .. } => Content::Data(data),
        Block::Zero => Content::Zero,
        Block::Partial(partial) => match partial.resolved() {
            Some(Resolved::Whole(data)) => Content::Data(data),
            Some(Resolved::Damaged) => Content::Damaged,
            None => unreachable!("step 1 resolves every partial block of a layer"),
        },
    }
}

/// Writes data in as few calls as possible and punches zeroed ranges that hold something.
fn write_data(
    file: &dyn File,
    blocks: &[(u16, &Block)],
    written: &[u8; CHECKSUM_SECTORS],
    pace: &mut Pace,
) -> io::Result<u64> {
    let mut bytes = 0;
    let mut rest = blocks;
    while let Some(((first, state), _)) = rest.split_first() {
        let data = matches!(content(state), Content::Data(_));
        let zero = matches!(content(state), Content::Zero);
        let run = rest
            .iter()
            .enumerate()
            .take_while(|(nth, (block, state))| {
                usize::from(*block) == usize::from(*first) + nth
                    && matches!(content(state), Content::Data(_)) == data
                    && matches!(content(state), Content::Zero) == zero
            })
            .count();
        let (now, later) = rest.split_at(run);
        if data {
            let parts = now.iter().filter_map(|(_, state)| match content(state) {
                Content::Data(data) => Some(data),
                Content::Zero | Content::Damaged => None,
            });
            let mut parts = gather(parts);
            file.write(&mut parts, data_at(*first))?;
            bytes += (run * BLOCK) as u64;
            pace.wrote((run * BLOCK) as u64);
        } else if zero && now.iter().any(|(block, _)| written[checksum_place(*block).0] > 0) {
            file.punch(data_at(*first), (run * BLOCK) as u64)?;
        }
        rest = later;
    }
    Ok(bytes)
}

/// Neighbours in one buffer become one part.
fn gather<'a>(blocks: impl Iterator<Item = &'a BlockData>) -> Vec<IoSlice<'a>> {
    let mut parts: Vec<(&BlockData, usize)> = Vec::new();
    for data in blocks {
        match parts.last_mut() {
            Some((first, count)) if first.continues(*count, data) => *count += 1,
            _ => parts.push((data, 1)),
        }
    }
    parts.into_iter().map(|(first, count)| IoSlice::new(first.run_bytes(count))).collect()
}

pub fn write_sectors(
    file: &dyn File,
    id: &FileId,
    number: u64,
    sectors: &[(usize, ChecksumSector)],
) -> io::Result<u64> {
    for neighbours in sectors.chunk_by(|(before, _), (after, _)| before + 1 == *after) {
        let raw: Vec<_> = neighbours.iter().map(|(n, sector)| sector.encode(id, *n, number)).collect();
        let mut parts: Vec<_> = raw.iter().map(|raw| IoSlice::new(raw)).collect();
        file.write(&mut parts, checksum_sector_at(neighbours[0].0))?;
    }
    Ok((sectors.len() * SECTOR) as u64)
}

fn sync_files(files: &mut Vec<Arc<dyn File>>) -> io::Result<()> {
    for file in files.drain(..) {
        file.sync()?;
    }
    Ok(())
}

/// Blocks put back from the rescue file, as the layer of a checkpoint of its own.
pub fn layer_of(rescued: Vec<Rescued>) -> Layer {
    let mut layer = Layer::default();
    for Rescued { key, owner, block, data, .. } in rescued {
        let offset = u32::from(block) * u32::try_from(BLOCK).expect("4096");
        layer.write(key, || owner, offset, data.run(1), &[data.crc]);
    }
    layer
}
