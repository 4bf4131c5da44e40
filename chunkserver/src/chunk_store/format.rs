//! The bytes of a chunk file, in the order of `docs/chunk-format.md`.

use std::path::PathBuf;

use evolute_protocol::checksum::crc32c;
use evolute_protocol::geometry::{BLOCK_BYTES, BLOCKS_PER_CHUNK, CHUNK_BYTES, KIB, SECTOR_BYTES};
use evolute_protocol::id::{BlockIndex, ChunkIndex, ChunkKey, ClusterId, VolumeId};

/// Raised by any change after which an older program would misread the file.
pub const VERSION: u32 = 1;

pub const BLOCK: usize = 4096;
pub const SECTOR: usize = 512;
pub const BLOCKS: usize = 4096;

/// The file: header, checksum sectors, padding, data.
pub const HEADER_BYTES: usize = 4096;
pub const CHECKSUMS_AT: u64 = 4 * KIB;
pub const DATA_AT: u64 = 64 * KIB;
pub const FILE_BYTES: u64 = DATA_AT + CHUNK_BYTES;

pub const BLOCKS_PER_CHECKSUM_SECTOR: usize = 64;
pub const CHECKSUM_SECTORS: usize = 64;

const _: () = {
    assert!(
        BLOCK as u64 == BLOCK_BYTES && SECTOR as u64 == SECTOR_BYTES && BLOCKS as u64 == BLOCKS_PER_CHUNK
    );
    assert!(CHECKSUM_SECTORS * BLOCKS_PER_CHECKSUM_SECTOR == BLOCKS);
    assert!(CHECKSUMS_AT + (CHECKSUM_SECTORS * SECTOR) as u64 <= DATA_AT);
    assert!(CHECKSUMS_AT >= HEADER_BYTES as u64 && DATA_AT.is_multiple_of(BLOCK_BYTES));
    // One bit per block in the bitmaps of a checksum sector.
    assert!(BLOCKS_PER_CHECKSUM_SECTOR == u64::BITS as usize);
    // Partial blocks keep one bit per sector in a byte.
    assert!(BLOCK / SECTOR == u8::BITS as usize);
};

/// Where a block's data are in the file.
pub const fn data_at(block: u16) -> u64 {
    DATA_AT + block as u64 * BLOCK_BYTES
}

/// Where a checksum sector is in the file.
pub const fn checksum_sector_at(sector: usize) -> u64 {
    CHECKSUMS_AT + (sector * SECTOR) as u64
}

/// Which checksum sector a block's checksum is in, and where in there.
pub const fn checksum_place(block: u16) -> (usize, usize) {
    (block as usize / BLOCKS_PER_CHECKSUM_SECTOR, block as usize % BLOCKS_PER_CHECKSUM_SECTOR)
}

/// The file of one generation of one chunk: what every part of it names, so that a misplaced one is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    pub cluster: ClusterIdBytes,
    pub key: ChunkKey,
    pub generation: u32,
}

/// [`ClusterId`]'s bytes, with an order.
pub type ClusterIdBytes = [u8; 16];

impl FileId {
    pub fn new(cluster: ClusterId, key: ChunkKey, generation: u32) -> Self {
        Self { cluster: cluster.0, key, generation }
    }

    /// `chunks/<volume>/<chunk>.<generation>`, relative to the store's directory.
    pub fn path(&self) -> PathBuf {
        volume_dir(self.key.volume).join(format!("{}.{}", self.key.index.0, self.generation))
    }
}

pub const CHUNKS_DIR: &str = "chunks";

pub fn volume_dir(volume: VolumeId) -> PathBuf {
    PathBuf::from(CHUNKS_DIR).join(volume.0.to_string())
}

/// The volume a directory under `chunks/` is named for; `None`: not a name of ours.
pub fn parse_volume_dir(name: &str) -> Option<VolumeId> {
    parse_number(name).map(VolumeId)
}

/// The chunk and generation a file in a volume's directory is named for; `None`: not a name of ours.
pub fn parse_file_name(name: &str) -> Option<(ChunkIndex, u32)> {
    let (index, generation) = name.split_once('.')?;
    let index = u32::try_from(parse_number(index)?).ok()?;
    let generation = u32::try_from(parse_number(generation)?).ok()?;
    Some((ChunkIndex(index), generation))
}

/// Only as we write it: no sign, no leading zero.
fn parse_number(text: &str) -> Option<u64> {
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// What is wrong with bytes from the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error("the checksum does not match")]
    Checksum,
    #[error("it is not what its place says")]
    NotOurs,
    #[error("it names another chunk: misplaced")]
    Misplaced,
    #[error("it has format {0}")]
    Version(u32),
}

const MAGIC: [u8; 8] = *b"EVOCHUNK";
const BLOCK_BYTES_FIELD: u32 = 4096;
const _: () = assert!(BLOCK_BYTES_FIELD as usize == BLOCK);

const MAGIC_AT: usize = 0;
const VERSION_AT: usize = MAGIC_AT + size_of::<u64>();
const BLOCK_BYTES_AT: usize = VERSION_AT + size_of::<u32>();
const CLUSTER_AT: usize = BLOCK_BYTES_AT + size_of::<u32>();
const VOLUME_AT: usize = CLUSTER_AT + size_of::<ClusterIdBytes>();
const CHUNK_AT: usize = VOLUME_AT + size_of::<u64>();
const GENERATION_AT: usize = CHUNK_AT + size_of::<u32>();
const CHUNK_BYTES_AT: usize = GENERATION_AT + size_of::<u32>();
const DATA_AT_AT: usize = CHUNK_BYTES_AT + size_of::<u64>();
const HEADER_CRC_AT: usize = HEADER_BYTES - size_of::<u32>();
const _: () = assert!(DATA_AT_AT + size_of::<u64>() <= HEADER_CRC_AT);

pub fn encode_header(id: &FileId) -> [u8; HEADER_BYTES] {
    let mut raw = [0; HEADER_BYTES];
    put(&mut raw, MAGIC_AT, &MAGIC);
    put(&mut raw, VERSION_AT, &VERSION.to_le_bytes());
    put(&mut raw, BLOCK_BYTES_AT, &BLOCK_BYTES_FIELD.to_le_bytes());
    put(&mut raw, CLUSTER_AT, &id.cluster);
    put(&mut raw, VOLUME_AT, &id.key.volume.0.to_le_bytes());
    put(&mut raw, CHUNK_AT, &id.key.index.0.to_le_bytes());
    put(&mut raw, GENERATION_AT, &id.generation.to_le_bytes());
    put(&mut raw, CHUNK_BYTES_AT, &CHUNK_BYTES.to_le_bytes());
    put(&mut raw, DATA_AT_AT, &DATA_AT.to_le_bytes());
    let crc = crc32c(&raw[..HEADER_CRC_AT]);
    put(&mut raw, HEADER_CRC_AT, &crc.to_le_bytes());
    raw
}

/// Bytes read from where a header should be.
pub struct UnverifiedHeader(pub [u8; HEADER_BYTES]);

impl UnverifiedHeader {
    /// Whether this is the file it should be. One that is intact but names another chunk was written to the wrong
    /// place, which a checksum alone would not notice.
    pub fn verify(&self, expected: &FileId) -> Result<(), Damage> {
        let raw = &self.0;
        if raw[..VERSION_AT] != MAGIC {
            return Err(Damage::NotOurs);
        }
        if crc32c(&raw[..HEADER_CRC_AT]) != get_u32(raw, HEADER_CRC_AT) {
            return Err(Damage::Checksum);
        }
        let version = get_u32(raw, VERSION_AT);
        if version != VERSION {
            return Err(Damage::Version(version));
        }
        if *raw != encode_header(expected) {
            return Err(Damage::Misplaced);
        }
        Ok(())
    }
}

const CRCS_AT: usize = 0;
const WRITTEN_AT: usize = CRCS_AT + BLOCKS_PER_CHECKSUM_SECTOR * size_of::<u32>();
const DAMAGED_AT: usize = WRITTEN_AT + size_of::<u64>();
const SECTOR_VOLUME_AT: usize = DAMAGED_AT + size_of::<u64>();
const SECTOR_CHUNK_AT: usize = SECTOR_VOLUME_AT + size_of::<u64>();
const SECTOR_GENERATION_AT: usize = SECTOR_CHUNK_AT + size_of::<u32>();
const CHECKPOINT_AT: usize = SECTOR_GENERATION_AT + size_of::<u32>();
const NUMBER_AT: usize = CHECKPOINT_AT + size_of::<u64>();
const SECTOR_CRC_AT: usize = SECTOR - size_of::<u32>();
const _: () = assert!(NUMBER_AT + size_of::<u32>() <= SECTOR_CRC_AT);

/// What 64 blocks must be. One disk sector, so a crash leaves the old one or the new one, and the checksum of a
/// block that was not being written never suffers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChecksumSector {
    /// As stored: mixed with the block's place. 0 where nothing is written.
    stored: [u32; BLOCKS_PER_CHECKSUM_SECTOR],
    /// Which blocks hold data. The others read as zeroes, whatever the data area holds.
    written: u64,
    /// Which blocks are known to be lost here until they are written again or repaired from a peer.
    damaged: u64,
}

/// What the checksum sector says of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockOnDisk {
    Zero,
    /// crc32c of the data.
    Written(u32),
    Damaged,
}

impl ChecksumSector {
    pub const EMPTY: Self = Self { stored: [0; BLOCKS_PER_CHECKSUM_SECTOR], written: 0, damaged: 0 };

    /// Stands for a checksum sector that is lost: which of its blocks held data nobody knows, so none may be
    /// passed off as zeroes.
    pub const LOST: Self =
        Self { stored: [0; BLOCKS_PER_CHECKSUM_SECTOR], written: u64::MAX, damaged: u64::MAX };

    pub fn block(&self, key: ChunkKey, block: u16) -> BlockOnDisk {
        let (_, place) = checksum_place(block);
        let bit = 1 << place;
        if self.written & bit == 0 {
            BlockOnDisk::Zero
        } else if self.damaged & bit != 0 {
            BlockOnDisk::Damaged
        } else {
            BlockOnDisk::Written(self.stored[place] ^ place_mix(key, block))
        }
    }

    pub fn set(&mut self, key: ChunkKey, block: u16, to: BlockOnDisk) {
        let (_, place) = checksum_place(block);
        let bit = 1 << place;
        let (stored, written, damaged) = match to {
            BlockOnDisk::Zero => (0, 0, 0),
            BlockOnDisk::Written(crc) => (crc ^ place_mix(key, block), bit, 0),
            BlockOnDisk::Damaged => (0, bit, bit),
        };
        self.stored[place] = stored;
        self.written = self.written & !bit | written;
        self.damaged = self.damaged & !bit | damaged;
    }

    /// Blocks that hold data or should, a bit for each.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Blocks that hold data, 0 to 64.
    pub fn written_count(&self) -> u8 {
        self.written.count_ones().to_le_bytes()[0]
    }

    pub fn encode(&self, id: &FileId, number: usize, checkpoint: u64) -> [u8; SECTOR] {
        let mut raw = [0; SECTOR];
        for (place, stored) in self.stored.iter().enumerate() {
            put(&mut raw, CRCS_AT + place * size_of::<u32>(), &stored.to_le_bytes());
        }
        put(&mut raw, WRITTEN_AT, &self.written.to_le_bytes());
        put(&mut raw, DAMAGED_AT, &self.damaged.to_le_bytes());
        put(&mut raw, SECTOR_VOLUME_AT, &id.key.volume.0.to_le_bytes());
        put(&mut raw, SECTOR_CHUNK_AT, &id.key.index.0.to_le_bytes());
        put(&mut raw, SECTOR_GENERATION_AT, &id.generation.to_le_bytes());
        put(&mut raw, CHECKPOINT_AT, &checkpoint.to_le_bytes());
        put(&mut raw, NUMBER_AT, &(u32::try_from(number).expect("64 sectors")).to_le_bytes());
        let crc = crc32c(&raw[..SECTOR_CRC_AT]);
        put(&mut raw, SECTOR_CRC_AT, &crc.to_le_bytes());
        raw
    }
}

/// Bytes read from where a checksum sector should be.
pub struct UnverifiedChecksumSector(pub [u8; SECTOR]);

impl UnverifiedChecksumSector {
    pub fn verify(&self, id: &FileId, number: usize) -> Result<ChecksumSector, Damage> {
        let raw = &self.0;
        if crc32c(&raw[..SECTOR_CRC_AT]) != get_u32(raw, SECTOR_CRC_AT) {
            return Err(Damage::Checksum);
        }
        if get_u64(raw, SECTOR_VOLUME_AT) != id.key.volume.0
            || get_u32(raw, SECTOR_CHUNK_AT) != id.key.index.0
            || get_u32(raw, SECTOR_GENERATION_AT) != id.generation
            || get_u32(raw, NUMBER_AT) as usize != number
        {
            return Err(Damage::Misplaced);
        }
        let mut stored = [0; BLOCKS_PER_CHECKSUM_SECTOR];
        for (place, stored) in stored.iter_mut().enumerate() {
            *stored = get_u32(raw, CRCS_AT + place * size_of::<u32>());
        }
        Ok(ChecksumSector { stored, written: get_u64(raw, WRITTEN_AT), damaged: get_u64(raw, DAMAGED_AT) })
    }
}

/// Mixed into a block's stored checksum, so that another block's bytes with their own checksum do not pass.
/// By exclusive or, so that the crc of the data alone can be had back and sent with it.
fn place_mix(key: ChunkKey, block: u16) -> u32 {
    let mut place = [0; 16];
    put(&mut place, 0, &key.volume.0.to_le_bytes());
    put(&mut place, 8, &key.index.0.to_le_bytes());
    put(&mut place, 12, &u32::from(block).to_le_bytes());
    crc32c(&place)
}

/// crc32c of a block of zeroes.
pub const ZERO_BLOCK_CRC: u32 = 0x98f9_4189;

pub fn block_index(block: u16) -> BlockIndex {
    BlockIndex(block)
}

pub fn put(raw: &mut [u8], at: usize, bytes: &[u8]) {
    raw[at..at + bytes.len()].copy_from_slice(bytes);
}

pub fn get_u32(raw: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(raw[at..at + 4].try_into().expect("4 bytes"))
}

pub fn get_u64(raw: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(raw[at..at + 8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use evolute_protocol::checksum::crc32c;
    use evolute_protocol::id::{ChunkIndex, ChunkKey, ClusterId, VolumeId};

    use super::{
        BlockOnDisk, ChecksumSector, Damage, FileId, UnverifiedChecksumSector, UnverifiedHeader,
        ZERO_BLOCK_CRC, encode_header, parse_file_name, parse_volume_dir,
    };

    fn id() -> FileId {
        let key = ChunkKey { volume: VolumeId(0x0102_0304_0506_0708), index: ChunkIndex(0x1112_1314) };
        FileId::new(ClusterId(*b"cluster-id-16-by"), key, 1)
    }

    fn sector() -> ChecksumSector {
        let mut sector = ChecksumSector::EMPTY;
        for block in [128, 129, 191] {
            sector.set(id().key, block, BlockOnDisk::Written(u32::from(block) * 0x0101_0101));
        }
        sector.set(id().key, 130, BlockOnDisk::Damaged);
        sector.set(id().key, 129, BlockOnDisk::Zero);
        sector
    }

    #[test]
    fn the_header_is_the_one_of_the_first_release() {
        assert_eq!(encode_header(&id())[..], include_bytes!("../../tests/golden/chunk-header-v1.bin")[..]);
    }

    #[test]
    fn a_checksum_sector_is_the_one_of_the_first_release() {
        let raw = sector().encode(&id(), 2, 0x2122_2324_2526_2728);
        assert_eq!(raw[..], include_bytes!("../../tests/golden/checksum-sector-v1.bin")[..]);
    }

    #[test]
    fn a_checksum_sector_says_after_the_disk_what_it_said_before() {
        let read = UnverifiedChecksumSector(sector().encode(&id(), 2, 7)).verify(&id(), 2).expect("intact");
        assert_eq!(read, sector());
        assert_eq!(read.block(id().key, 128), BlockOnDisk::Written(128 * 0x0101_0101));
        assert_eq!(read.block(id().key, 129), BlockOnDisk::Zero);
        assert_eq!(read.block(id().key, 130), BlockOnDisk::Damaged);
        assert_eq!(read.written_count(), 3);
    }

    /// Every flipped bit is noticed, wherever it is, and so is a place that is not ours.
    #[test]
    fn damage_and_misplacement_are_noticed() {
        let header = encode_header(&id());
        assert_eq!(UnverifiedHeader(header).verify(&id()), Ok(()));
        for at in 0..header.len() {
            let mut bad = header;
            bad[at] ^= 1 << (at % 8);
            assert!(UnverifiedHeader(bad).verify(&id()).is_err(), "byte {at}");
        }
        let raw = sector().encode(&id(), 2, 7);
        for at in 0..raw.len() {
            let mut bad = raw;
            bad[at] ^= 1 << (at % 8);
            assert_eq!(UnverifiedChecksumSector(bad).verify(&id(), 2), Err(Damage::Checksum), "byte {at}");
        }
        let elsewhere = FileId { key: ChunkKey { index: ChunkIndex(9), ..id().key }, ..id() };
        let later = FileId { generation: 2, ..id() };
        for other in [elsewhere, later] {
            assert_eq!(UnverifiedHeader(header).verify(&other), Err(Damage::Misplaced));
            assert_eq!(UnverifiedChecksumSector(raw).verify(&other, 2), Err(Damage::Misplaced));
        }
        assert_eq!(UnverifiedChecksumSector(raw).verify(&id(), 3), Err(Damage::Misplaced));
        assert!(UnverifiedChecksumSector([0; 512]).verify(&id(), 0).is_err(), "zeroes are no sector");
    }

    #[test]
    fn another_blocks_checksum_does_not_pass() {
        let mut there = ChecksumSector::EMPTY;
        there.set(id().key, 5, BlockOnDisk::Written(42));
        let other = ChunkKey { volume: VolumeId(9), ..id().key };
        assert_ne!(there.block(other, 5), BlockOnDisk::Written(42));
    }

    #[test]
    fn names_are_read_only_as_we_write_them() {
        assert_eq!(parse_volume_dir("17"), Some(VolumeId(17)));
        assert_eq!(parse_file_name("3.1"), Some((ChunkIndex(3), 1)));
        for name in ["", "03.1", "+3.1", "3", "3.", "3.1.bak", "4294967296.1", "x.1"] {
            assert_eq!(parse_file_name(name), None, "{name}");
        }
        assert_eq!(crc32c(&[0; 4096]), ZERO_BLOCK_CRC);
    }
}
