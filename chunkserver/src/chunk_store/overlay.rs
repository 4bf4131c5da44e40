//! The newest bytes of every block written since the last checkpoint, in memory.
//!
//! Two layers: changes go into the active one; a checkpoint freezes it and drains it into chunk files while the
//! next one fills. A read looks into active, draining, file, in this order.
//!
//! An insert is two hash lookups and no more: data stay where they are, in the buffers they came with.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use bytes::Bytes;
use evolute_protocol::checksum::{crc32c, pieces};
use evolute_protocol::id::{ChunkKey, CopysetId};

use super::block::{Block, BlockData, Partial, Piece, ZEROES, merge};
use super::format::{BLOCK, BLOCKS};

/// Which replica a chunk belongs to. The admission is a number of ours, new each time a copyset comes here, so that
/// what an earlier replica left is never taken for the new one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner {
    pub copyset: CopysetId,
    pub admission: u64,
}

/// Changes of some chunks: what one checkpoint makes durable.
#[derive(Debug, Default)]
pub struct Layer {
    chunks: HashMap<ChunkKey, ChunkLayer, Keyed>,
    bytes: u64,
}

/// Changes of one chunk.
#[derive(Debug)]
pub struct ChunkLayer {
    /// `None`: its replica was deleted and nothing was written since.
    pub owner: Option<Owner>,
    /// The whole chunk was discarded before `blocks` were written: nothing below this layer counts.
    pub base_gone: bool,
    blocks: HashMap<u16, Block, Keyed>,
}

/// What an entry costs beside its data: its place in the map with some spare, and the `Bytes`' own bookkeeping.
const BLOCK_OVERHEAD: u64 = 128;
const CHUNK_OVERHEAD: u64 = 512;

impl Layer {
    pub fn chunk(&self, key: ChunkKey) -> Option<&ChunkLayer> {
        self.chunks.get(&key)
    }

    pub fn chunks(&self) -> impl Iterator<Item = (ChunkKey, &ChunkLayer)> {
        self.chunks.iter().map(|(key, chunk)| (*key, chunk))
    }

    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Memory this layer may hold: what was inserted since it began, not what is left of it. A block that is
    /// overwritten may leave its buffer alive, because a neighbour in the same buffer is still the newest; so the
    /// sum of what came in is the honest bound.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// `owner` is asked for only if this layer does not know the chunk yet.
    pub fn write(
        &mut self,
        key: ChunkKey,
        owner: impl FnOnce() -> Owner,
        offset: u32,
        data: Bytes,
        checksums: &[u32],
    ) {
        let chunk = chunk_mut(&mut self.chunks, &mut self.bytes, key, owner);
        if data.len() == BLOCK && (offset as usize).is_multiple_of(BLOCK) {
            self.bytes += BLOCK as u64 + BLOCK_OVERHEAD;
            let data = BlockData::new(data, 0, checksums[0]);
            chunk.blocks.insert(block_of(offset as usize), Block::Full { data, assembled: false });
            return;
        }
        for (piece, crc) in pieces(u64::from(offset), data.len()).zip(checksums) {
            let at = offset as usize + piece.start;
            let block = block_of(at);
            if piece.len() == BLOCK {
                self.bytes += BLOCK as u64 + BLOCK_OVERHEAD;
                let data = BlockData::new(data.clone(), piece.start, *crc);
                chunk.blocks.insert(block, Block::Full { data, assembled: false });
            } else {
                // Copied, so a few sectors never keep a large buffer alive.
                self.bytes += BLOCK as u64 + BLOCK_OVERHEAD;
                chunk.write_piece(block, &Piece { at: at % BLOCK, data: &data[piece], crc: *crc });
            }
        }
    }

    /// Makes a range read as zeroes. The caller has ruled out the whole chunk. `is_below` says whether a block may
    /// hold anything below this layer; where nothing is, nothing needs to be remembered, so that trimming a sparse
    /// chunk costs next to nothing.
    pub fn zero(
        &mut self,
        key: ChunkKey,
        owner: impl FnOnce() -> Owner,
        offset: u32,
        len: u32,
        is_below: impl Fn(u16) -> bool,
    ) {
        let chunk = chunk_mut(&mut self.chunks, &mut self.bytes, key, owner);
        for piece in pieces(u64::from(offset), len as usize) {
            let at = offset as usize + piece.start;
            let block = block_of(at);
            if !chunk.base_gone && is_below(block) {
                self.bytes += BLOCK_OVERHEAD;
                if piece.len() == BLOCK {
                    chunk.blocks.insert(block, Block::Zero);
                    continue;
                }
            } else if piece.len() == BLOCK || !chunk.blocks.contains_key(&block) {
                chunk.blocks.remove(&block);
                continue;
            }
            self.bytes += BLOCK as u64;
            let zeroes = &ZEROES[..piece.len()];
            chunk.write_piece(block, &Piece { at: at % BLOCK, data: zeroes, crc: crc32c(zeroes) });
        }
    }

    /// A whole block takes the place of whatever is known of it.
    pub fn put_block(&mut self, key: ChunkKey, owner: impl FnOnce() -> Owner, block: u16, state: Block) {
        let chunk = chunk_mut(&mut self.chunks, &mut self.bytes, key, owner);
        chunk.blocks.insert(block, state);
        self.bytes += BLOCK as u64 + BLOCK_OVERHEAD;
    }

    /// Forgets what it knows of these chunks, as if nothing had been changed.
    pub fn forget(&mut self, these: impl Fn(ChunkKey, Option<Owner>) -> bool) {
        self.chunks.retain(|key, chunk| !these(*key, chunk.owner));
    }

    /// The whole chunk reads as zeroes. `base`: something below this layer knows the chunk and must be hidden.
    pub fn drop_chunk(&mut self, key: ChunkKey, owner: Option<Owner>, base: bool) {
        if !base {
            self.chunks.remove(&key);
            return;
        }
        self.bytes += CHUNK_OVERHEAD;
        self.chunks.insert(key, ChunkLayer { owner, base_gone: true, blocks: HashMap::default() });
    }
}

fn chunk_mut<'a>(
    chunks: &'a mut HashMap<ChunkKey, ChunkLayer, Keyed>,
    bytes: &mut u64,
    key: ChunkKey,
    owner: impl FnOnce() -> Owner,
) -> &'a mut ChunkLayer {
    use std::collections::hash_map::Entry;
    match chunks.entry(key) {
        Entry::Occupied(entry) => {
            let chunk = entry.into_mut();
            if chunk.owner.is_none() {
                chunk.owner = Some(owner());
            }
            chunk
        }
        Entry::Vacant(entry) => {
            *bytes += CHUNK_OVERHEAD;
            entry.insert(ChunkLayer { owner: Some(owner()), base_gone: false, blocks: HashMap::default() })
        }
    }
}

impl ChunkLayer {
    /// Of the blocks it knows. Those that became zeroes are among them only where something is below.
    pub fn bytes(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK as u64
    }

    pub fn block(&self, block: u16) -> Option<&Block> {
        self.blocks.get(&block)
    }

    pub fn block_count(&self) -> usize {
        self.blocks.len()
    }

    pub fn blocks(&self) -> impl Iterator<Item = (u16, &Block)> {
        self.blocks.iter().map(|(block, state)| (*block, state))
    }

    /// In the order of the file.
    pub fn sorted(&self) -> Vec<(u16, &Block)> {
        let mut sorted: Vec<_> = self.blocks().collect();
        sorted.sort_unstable_by_key(|(block, _)| *block);
        sorted
    }

    fn write_piece(&mut self, block: u16, piece: &Piece<'_>) {
        use std::collections::hash_map::Entry;
        match self.blocks.entry(block) {
            Entry::Vacant(entry) => {
                entry.insert(if self.base_gone {
                    Block::Full { data: merge(&BlockData::zeroes(), piece), assembled: false }
                } else {
                    Block::Partial(Partial::new(piece))
                });
            }
            Entry::Occupied(mut entry) => match entry.get_mut() {
                Block::Full { data, .. } => *data = merge(data, piece),
                Block::Zero => {
                    entry.insert(Block::Full { data: merge(&BlockData::zeroes(), piece), assembled: false });
                }
                Block::Partial(partial) => {
                    partial.add(piece);
                    if partial.is_whole()
                        && let Block::Partial(partial) = entry.insert(Block::Zero)
                    {
                        entry.insert(Block::Full { data: partial.into_whole(), assembled: true });
                    }
                }
            },
        }
    }
}

/// Which block of its chunk a byte is in.
pub fn block_of(at: usize) -> u16 {
    let block = at / BLOCK;
    assert!(block < BLOCKS, "byte {at} of a chunk");
    u16::try_from(block).expect("below 4096")
}

/// Hashes our small keys in a nanosecond. Not meant to withstand chosen keys: the worst a guest can choose is
/// which chunks of its own volume fall together.
#[derive(Debug, Clone, Copy, Default)]
pub struct KeyHasher(u64);

pub type Keyed = BuildHasherDefault<KeyHasher>;

impl KeyHasher {
    fn mix(&mut self, value: u64) {
        // An odd constant with well spread bits (2^64 / golden ratio); both halves of the product matter.
        let product = u128::from(self.0 ^ value ^ 0x5851_f42d_4c95_7f2d) * 0x9e37_79b9_7f4a_7c15;
        #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
        {
            self.0 = product as u64 ^ (product >> 64) as u64;
        }
    }
}

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.mix(u64::from(*byte));
        }
    }

    fn write_u16(&mut self, value: u16) {
        self.mix(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.mix(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.mix(value);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
