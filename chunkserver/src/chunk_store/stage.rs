//! A replica that arrives, written beside the one that is here: whole chunks in files of a generation of their own,
//! which nothing reads until they are installed (`swap.rs`).
//!
//! The bytes are written and synced on other threads than the shard's, chunk by chunk, so that what waits in memory and
//! what the kernel has to write back are one chunk at most. Everything that comes is verified before it is written.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{self, IoSlice};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::Bytes;
use evolute_protocol::checksum::crc32c;
use evolute_protocol::id::{ChunkKey, CopysetId, VolumeId};

use crate::disk::{Disk, File};

use super::blocking;
use super::catalog::Catalog;
use super::checkpoint::Job;
use super::drain::{SLACK_BYTES, write_sectors};
use super::error::StoreError;
use super::format::{
    BLOCK, BLOCKS, BlockOnDisk, CHECKSUM_SECTORS, CHUNKS_DIR, ChecksumSector, ClusterIdBytes, FILE_BYTES,
    FileId, checksum_place, data_at, encode_header, volume_dir,
};
use super::shard::Shard;
use super::table::Table;

/// Blocks of a chunk that follow each other, on their way from one replica to another. What is in none is zeroes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extent {
    /// With the crc32c of each block.
    Data { first: u16, data: Bytes, crcs: Vec<u32> },
    /// Nobody can tell what these hold. They will read as errors, never as zeroes.
    Damaged { first: u16, count: u16 },
}

impl Extent {
    pub fn first(&self) -> u16 {
        match self {
            Self::Data { first, .. } | Self::Damaged { first, .. } => *first,
        }
    }

    pub fn count(&self) -> usize {
        match self {
            Self::Data { crcs, .. } => crcs.len(),
            Self::Damaged { count, .. } => usize::from(*count),
        }
    }
}

/// Why something could not be staged. What was staged so far is of no use any more.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StageError {
    /// It is not what it says it is. Ask for it again.
    #[error("block {block} of {chunk} does not match its checksum")]
    Mismatch { chunk: ChunkKey, block: u16 },
    /// The sender does not keep to the order of chunks and blocks.
    #[error("{chunk} comes out of order or beyond its end")]
    OutOfOrder { chunk: ChunkKey },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A replica that is being staged. Dropped, it leaves nothing.
pub struct Staging {
    shard: Rc<RefCell<Shard>>,
    copyset: CopysetId,
    staged: Arc<Mutex<Staged>>,
}

impl Staging {
    pub fn new(shard: Rc<RefCell<Shard>>, copyset: CopysetId) -> Self {
        let staged = {
            let shard = &mut *shard.borrow_mut();
            let bytes = Arc::new(AtomicU64::new(0));
            shard.arriving.retain(|(_, bytes)| bytes.strong_count() > 0);
            shard.arriving.push((copyset, Arc::downgrade(&bytes)));
            Staged {
                disk: shard.disk.clone(),
                catalog: shard.catalog.clone(),
                table: shard.table.clone(),
                cluster: shard.cluster.0,
                generation: shard.new_generation(),
                capacity: shard.capacity(),
                reserve: shard.reserve() / 2,
                open: None,
                chunks: Vec::new(),
                files: Vec::new(),
                bytes,
            }
        };
        Self { shard, copyset, staged: Arc::new(Mutex::new(staged)) }
    }

    pub fn copyset(&self) -> CopysetId {
        self.copyset
    }

    /// Writes some blocks of a chunk: chunk by chunk, in rising order, and so are blocks. Cancel-safe, but what was
    /// staged is of no use then.
    pub async fn put(&mut self, chunk: ChunkKey, extents: Vec<Extent>) -> Result<(), StageError> {
        let staged = self.staged.clone();
        blocking(move || lock(&staged).put(chunk, &extents)).await
    }

    /// The last chunk was put: everything but names is durable when this returns.
    pub async fn finish(&mut self) -> Result<(), StageError> {
        let staged = self.staged.clone();
        blocking(move || Ok(lock(&staged).close_chunk()?)).await
    }

    pub(super) fn staged(&self) -> Arc<Mutex<Staged>> {
        self.staged.clone()
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Without the thread the store is being closed; the next open removes files without records. Not borrowed
        // twice: nothing of the shard drops a `Staging`.
        let _ = self.shard.borrow().thread.send(Job::GiveUp(self.staged.clone()));
    }
}

fn lock(staged: &Mutex<Staged>) -> std::sync::MutexGuard<'_, Staged> {
    staged.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the threads that write share.
pub struct Staged {
    disk: Arc<dyn Disk>,
    catalog: Arc<Catalog>,
    table: Arc<RwLock<Table>>,
    cluster: ClusterIdBytes,
    /// No other file has or had it, so none is ever taken for one of these.
    generation: u32,
    capacity: u64,
    /// Left for the writes of those who live here.
    reserve: u64,
    open: Option<OpenChunk>,
    chunks: Vec<(ChunkKey, [u8; CHECKSUM_SECTORS])>,
    /// Created and not installed.
    files: Vec<FileId>,
    bytes: Arc<AtomicU64>,
}

struct OpenChunk {
    id: FileId,
    file: Arc<dyn File>,
    sectors: Vec<ChecksumSector>,
    /// Blocks below were put or are zeroes.
    next: usize,
}

impl Staged {
    pub fn generation(&self) -> u32 {
        self.generation
    }

    pub fn chunks(&self) -> &[(ChunkKey, [u8; CHECKSUM_SECTORS])] {
        &self.chunks
    }

    pub fn volumes(&self) -> BTreeSet<VolumeId> {
        self.files.iter().map(|id| id.key.volume).collect()
    }

    fn put(&mut self, key: ChunkKey, extents: &[Extent]) -> Result<(), StageError> {
        if self.open.as_ref().is_none_or(|open| open.id.key != key) {
            self.close_chunk()?;
            if self.chunks.last().is_some_and(|(last, _)| *last >= key) {
                return Err(StageError::OutOfOrder { chunk: key });
            }
            self.open_chunk(key)?;
        }
        let open = self.open.as_mut().expect("opened above");
        for extent in extents {
            let first = usize::from(extent.first());
            let fits = match extent {
                Extent::Data { data, crcs, .. } => data.len() == crcs.len() * BLOCK,
                Extent::Damaged { .. } => true,
            };
            if first < open.next || first + extent.count() > BLOCKS || !fits {
                return Err(StageError::OutOfOrder { chunk: key });
            }
            open.next = first + extent.count();
            if let Err(error) = open.put(extent)? {
                return Err(self.failed(&format!("staging {key}"), error).into());
            }
            self.bytes.fetch_add((extent.count() * BLOCK) as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    fn open_chunk(&mut self, key: ChunkKey) -> Result<(), StoreError> {
        self.check_room()?;
        let id = FileId { cluster: self.cluster, key, generation: self.generation };
        // Noted before: one that is half made goes with the others.
        self.files.push(id);
        let created = self.create(&id);
        let file = created.map_err(|e| self.failed(&format!("creating a file for {key}"), e))?;
        let sectors = vec![ChecksumSector::EMPTY; CHECKSUM_SECTORS];
        self.open = Some(OpenChunk { id, file, sectors, next: 0 });
        Ok(())
    }

    fn create(&self, id: &FileId) -> io::Result<Arc<dyn File>> {
        let dir = volume_dir(id.key.volume);
        self.disk.create_dir(&dir)?;
        let file = match self.disk.create(&id.path()) {
            // The volume's last chunk went just now, and the directory with it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.disk.create_dir(&dir)?;
                self.disk.create(&id.path())
            }
            created => created,
        }?;
        file.write(&mut [IoSlice::new(&encode_header(id))], 0)?;
        Ok(file)
    }

    /// Writes the chunk's checksums and syncs it.
    fn close_chunk(&mut self) -> Result<(), StoreError> {
        let Some(OpenChunk { id, file, sectors, .. }) = self.open.take() else { return Ok(()) };
        let mut written = [0; CHECKSUM_SECTORS];
        for (count, sector) in written.iter_mut().zip(&sectors) {
            *count = sector.written_count();
        }
        let in_use: Vec<_> =
            sectors.into_iter().enumerate().filter(|(_, sector)| sector.written_count() > 0).collect();
        let number = self.catalog.checkpoint();
        let wrote = write_sectors(&*file, &id, number, &in_use);
        wrote.map_err(|e| self.failed(&format!("staging {}", id.key), e))?;
        file.sync().map_err(|e| self.catalog.sync_failed("syncing a staged chunk file", e))?;
        // One without any block has no record, and its file goes with what is given up.
        if !in_use.is_empty() {
            self.chunks.push((id.key, written));
        }
        Ok(())
    }

    /// For one more chunk. What is staged is not in the table yet.
    fn check_room(&self) -> Result<(), StoreError> {
        let space = self.disk.space().map_err(|e| StoreError::io("asking for free space", e))?;
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let staged = self.bytes.load(Ordering::Relaxed);
        let allowed = self.capacity.saturating_sub(table.file_bytes() + table.trash_bytes() + staged);
        let available = space.available.min(allowed).saturating_sub(SLACK_BYTES.min(self.reserve));
        let needed = FILE_BYTES + self.reserve;
        if needed > available {
            return Err(StoreError::NoSpace { needed, available });
        }
        Ok(())
    }

    /// The names of all that was staged are durable then.
    pub fn sync_dirs(&mut self) -> Result<(), StoreError> {
        assert!(self.open.is_none(), "a staged chunk was not finished");
        let sync = || -> io::Result<()> {
            for volume in self.volumes() {
                self.disk.sync_dir(&volume_dir(volume))?;
            }
            self.disk.sync_dir(Path::new(CHUNKS_DIR))
        };
        sync().map_err(|e| self.catalog.sync_failed("syncing directories", e))
    }

    /// The store's records name these files, or are about to: they are not ours to remove any more.
    pub fn let_go(&mut self) {
        let kept: BTreeSet<_> = self.chunks.iter().map(|(key, _)| *key).collect();
        self.files.retain(|id| !kept.contains(&id.key));
    }

    /// The files nobody will ever ask for.
    pub fn give_up(&mut self) -> Vec<FileId> {
        self.open = None;
        std::mem::take(&mut self.files)
    }

    fn failed(&self, doing: &str, error: io::Error) -> StoreError {
        self.catalog.write_failed(&*self.disk, doing, error)
    }
}

impl OpenChunk {
    /// The outer error is the sender's, the inner the disk's.
    fn put(&mut self, extent: &Extent) -> Result<io::Result<()>, StageError> {
        let chunk = self.id.key;
        match extent {
            Extent::Data { first, data, crcs } => {
                for ((block, crc), bytes) in (*first..).zip(crcs).zip(data.chunks_exact(BLOCK)) {
                    if crc32c(bytes) != *crc {
                        return Err(StageError::Mismatch { chunk, block });
                    }
                    self.sectors[checksum_place(block).0].set(chunk, block, BlockOnDisk::Written(*crc));
                }
                if let Err(error) = self.file.write(&mut [IoSlice::new(data)], data_at(*first)) {
                    return Ok(Err(error));
                }
                self.file.start_writeback();
            }
            Extent::Damaged { first, count } => {
                for block in *first..first + count {
                    self.sectors[checksum_place(block).0].set(chunk, block, BlockOnDisk::Damaged);
                }
            }
        }
        Ok(Ok(()))
    }
}
