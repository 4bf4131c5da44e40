//! An open chunk file and its verified checksum sectors; and the bounded set of them that is kept.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use evolute_protocol::checksum::crc32c;
use evolute_protocol::id::ChunkKey;
use smallvec::SmallVec;

use crate::disk::{Disk, File};

use super::format::{
    BLOCK, BlockOnDisk, CHECKSUM_SECTORS, ChecksumSector, Damage, FileId, HEADER_BYTES, SECTOR,
    UnverifiedChecksumSector, UnverifiedHeader, checksum_place, checksum_sector_at, data_at,
};
use super::overlay::Keyed;

/// Why bytes of a chunk file could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("the disk")]
    Io(#[from] io::Error),
    #[error("damaged")]
    Damage(#[from] Damage),
    #[error("block {0} is not what was written")]
    Mismatch(u16),
}

/// Whether a read may wait for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    Never,
    Device,
}

/// A chunk file as readers use it: opened at the first use, its checksum sectors read and verified once. A
/// checkpoint that touched sectors replaces the whole value by one without them, so nothing in here ever changes
/// and readers on any thread share it.
pub struct ChunkFile {
    pub id: FileId,
    file: OnceLock<Arc<dyn File>>,
    sectors: [OnceLock<Arc<ChecksumSector>>; CHECKSUM_SECTORS],
}

impl ChunkFile {
    pub fn new(id: FileId) -> Self {
        Self { id, file: OnceLock::new(), sectors: [const { OnceLock::new() }; CHECKSUM_SECTORS] }
    }

    /// The same file, without what was known of the checksum sectors in `touched` (a bit for each).
    pub fn without(&self, touched: u64) -> Self {
        let fresh = Self::new(self.id);
        if let Some(file) = self.file.get() {
            let _ = fresh.file.set(file.clone());
        }
        for (number, known) in self.sectors.iter().enumerate().filter(|(n, _)| touched >> n & 1 == 0) {
            if let Some(sector) = known.get() {
                let _ = fresh.sectors[number].set(sector.clone());
            }
        }
        fresh
    }

    /// `None`: not open yet, and opening waits for the device.
    fn file(&self, disk: &dyn Disk, wait: Wait) -> Result<Option<&Arc<dyn File>>, Fault> {
        if self.file.get().is_none() {
            if wait == Wait::Never {
                return Ok(None);
            }
            let opened = open_verified(disk, &self.id)?;
            let _ = self.file.set(opened);
        }
        Ok(self.file.get())
    }

    fn sector(
        &self,
        file: &dyn File,
        number: usize,
        wait: Wait,
    ) -> Result<Option<&Arc<ChecksumSector>>, Fault> {
        let known = &self.sectors[number];
        if known.get().is_none() {
            let mut raw = [0; SECTOR];
            if !read_into(file, &mut raw, checksum_sector_at(number), wait)? {
                return Ok(None);
            }
            let sector = UnverifiedChecksumSector(raw).verify(&self.id, number)?;
            let _ = known.set(Arc::new(sector));
        }
        Ok(known.get())
    }

    /// The next read of these blocks asks the device, as far as the kernel can be told.
    pub fn forget_cached(&self, disk: &dyn Disk, first: u16, count: u16) {
        // Whoever reads will find out why it cannot be opened.
        if let Ok(Some(file)) = self.file(disk, Wait::Device) {
            file.forget_cached(data_at(first), u64::from(count) * BLOCK as u64);
            file.forget_cached(0, data_at(0));
        }
    }

    /// Whole blocks from `first` on, each verified, as runs of data and of zeroes. `None`: would wait.
    pub fn read(
        &self,
        disk: &dyn Disk,
        first: u16,
        count: u16,
        wait: Wait,
    ) -> Result<Option<SmallVec<[Run; 1]>>, Fault> {
        let Some(file) = self.file(disk, wait)? else { return Ok(None) };
        let mut runs: SmallVec<[Run; 1]> = SmallVec::new();
        for block in first..first + count {
            let Some(sector) = self.sector(&**file, checksum_place(block).0, wait)? else { return Ok(None) };
            let state = match sector.block(self.id.key, block) {
                BlockOnDisk::Zero => None,
                BlockOnDisk::Written(crc) => Some(crc),
                BlockOnDisk::Damaged => return Err(Fault::Mismatch(block)),
            };
            match (runs.last_mut(), state) {
                (Some(Run::Data { crcs, .. }), Some(crc)) => crcs.push(crc),
                (_, Some(crc)) => {
                    runs.push(Run::Data { data: Bytes::new(), crcs: SmallVec::from_slice(&[crc]) });
                }
                (Some(Run::Zeroes { count }), None) => *count += 1,
                (_, None) => runs.push(Run::Zeroes { count: 1 }),
            }
        }
        let mut block = first;
        for run in &mut runs {
            if let Run::Data { data, crcs } = run {
                let mut read = BytesMut::zeroed(crcs.len() * BLOCK);
                if !read_into(&**file, &mut read, data_at(block), wait)? {
                    return Ok(None);
                }
                for (nth, (crc, bytes)) in crcs.iter().zip(read.chunks_exact(BLOCK)).enumerate() {
                    if crc32c(bytes) != *crc {
                        return Err(Fault::Mismatch(block + u16::try_from(nth).expect("below 4096")));
                    }
                }
                *data = read.freeze();
            }
            block += run.blocks();
        }
        Ok(Some(runs))
    }
}

/// Blocks read from a file that follow each other.
pub enum Run {
    Data { data: Bytes, crcs: SmallVec<[u32; 4]> },
    Zeroes { count: u16 },
}

impl Run {
    pub fn blocks(&self) -> u16 {
        match self {
            Self::Data { crcs, .. } => u16::try_from(crcs.len()).expect("at most 4096"),
            Self::Zeroes { count } => *count,
        }
    }
}

fn read_into(file: &dyn File, into: &mut [u8], offset: u64, wait: Wait) -> io::Result<bool> {
    match wait {
        Wait::Never => file.read_cached(into, offset),
        Wait::Device => file.read(into, offset).map(|()| true),
    }
}

/// Opens the file and makes sure it is the one its name says.
pub fn open_verified(disk: &dyn Disk, id: &FileId) -> Result<Arc<dyn File>, Fault> {
    let file = disk.open(&id.path())?;
    let mut raw = [0; HEADER_BYTES];
    file.read(&mut raw, 0)?;
    UnverifiedHeader(raw).verify(id)?;
    Ok(file)
}

/// The chunk files kept open, at most `max`; which one goes is chosen by the clock algorithm (one that was used
/// since the hand last passed is passed over once).
pub struct OpenChunks {
    max: usize,
    places: HashMap<ChunkKey, usize, Keyed>,
    clock: Vec<Place>,
    hand: usize,
}

struct Place {
    key: ChunkKey,
    file: Arc<ChunkFile>,
    /// Checksum sectors written since, a bit for each: to be read anew when the file is next asked for.
    stale: u64,
    used: bool,
}

impl OpenChunks {
    pub fn new(max: usize) -> Self {
        Self { max: max.max(1), places: HashMap::default(), clock: Vec::new(), hand: 0 }
    }

    /// The chunk's file, not opened yet if it was not here.
    pub fn get(&mut self, id: FileId) -> Arc<ChunkFile> {
        if let Some(place) = self.places.get(&id.key) {
            let place = &mut self.clock[*place];
            place.used = true;
            if place.stale != 0 {
                place.file = Arc::new(place.file.without(std::mem::take(&mut place.stale)));
            }
            return place.file.clone();
        }
        let file = Arc::new(ChunkFile::new(id));
        let fresh = Place { key: id.key, file: file.clone(), stale: 0, used: false };
        if self.clock.len() < self.max {
            self.places.insert(id.key, self.clock.len());
            self.clock.push(fresh);
            return file;
        }
        while std::mem::take(&mut self.clock[self.hand].used) {
            self.hand = (self.hand + 1) % self.clock.len();
        }
        self.places.remove(&self.clock[self.hand].key);
        self.places.insert(id.key, self.hand);
        self.clock[self.hand] = fresh;
        self.hand = (self.hand + 1) % self.clock.len();
        file
    }

    /// A checkpoint wrote these checksum sectors (a bit for each).
    pub fn touched(&mut self, key: ChunkKey, sectors: u64) {
        if let Some(place) = self.places.get(&key) {
            self.clock[*place].stale |= sectors;
        }
    }

    /// The file is gone or another one.
    pub fn forget(&mut self, key: ChunkKey) {
        if let Some(place) = self.places.remove(&key) {
            self.clock.swap_remove(place);
            if let Some(moved) = self.clock.get(place) {
                self.places.insert(moved.key, place);
            }
            if self.hand >= self.clock.len() {
                self.hand = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use evolute_protocol::id::{ChunkIndex, ChunkKey, ClusterId, VolumeId};

    use super::{FileId, OpenChunks};

    fn id(index: u32) -> FileId {
        let key = ChunkKey { volume: VolumeId(1), index: ChunkIndex(index) };
        FileId::new(ClusterId::default(), key, 1)
    }

    #[test]
    fn the_set_of_open_chunks_is_bounded_and_keeps_what_is_used() {
        let mut open = OpenChunks::new(4);
        let hot = open.get(id(0));
        for index in 1..100 {
            assert!(std::sync::Arc::ptr_eq(&hot, &open.get(id(0))), "chunk 0 was evicted at {index}");
            open.get(id(index));
            assert!(open.clock.len() <= 4 && open.places.len() == open.clock.len());
        }
        open.forget(id(0).key);
        open.forget(id(99).key);
        for index in 90..120 {
            open.get(id(index));
            assert!(open.places.iter().all(|(key, place)| open.clock[*place].key == *key));
        }
    }
}
