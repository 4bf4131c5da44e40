//! Sizes and how they relate. Code that divides one size by another starts here.

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

/// The unit in which virtio-blk counts.
pub const SECTOR_BYTES: u64 = 512;
/// The unit we checksum.
pub const BLOCK_BYTES: u64 = 4 * KIB;
/// The unit we place, replicate and repair. 16 MiB is 5.4 ms of a 25 Gb/s link, so a
/// repair never stands long in front of a guest's write.
pub const CHUNK_BYTES: u64 = 16 * MIB;
/// The unit the control plane hands out: one request per GiB first written.
pub const SEGMENT_BYTES: u64 = GIB;
/// The longest request a guest may send. We advertise it, refuse more, and frame no more.
pub const REQUEST_BYTES_MAX: u64 = MIB;
/// The smallest volume, and the unit of volume sizes: a MiB keeps every partition tool content.
pub const VOLUME_BYTES_MIN: u64 = MIB;
/// The largest volume. 64 TiB is 4 Mi chunks: the whole map of one volume stays under 32 MiB.
pub const VOLUME_BYTES_MAX: u64 = 64 * TIB;

pub const SECTORS_PER_BLOCK: u64 = BLOCK_BYTES / SECTOR_BYTES;
pub const BLOCKS_PER_CHUNK: u64 = CHUNK_BYTES / BLOCK_BYTES;
pub const CHUNKS_PER_SEGMENT: u64 = SEGMENT_BYTES / CHUNK_BYTES;

const _: () = {
    assert!(BLOCK_BYTES.is_multiple_of(SECTOR_BYTES));
    assert!(CHUNK_BYTES.is_multiple_of(BLOCK_BYTES));
    assert!(SEGMENT_BYTES.is_multiple_of(CHUNK_BYTES));
    assert!(VOLUME_BYTES_MIN.is_multiple_of(BLOCK_BYTES));
    // So a request touches at most two chunks; `split.rs` counts on it.
    assert!(REQUEST_BYTES_MAX <= CHUNK_BYTES);
    // Block and chunk numbers fit their types (`BlockIndex`, `ChunkIndex`).
    assert!(BLOCKS_PER_CHUNK <= u16::MAX as u64);
    assert!(VOLUME_BYTES_MAX / CHUNK_BYTES <= u32::MAX as u64);
};
