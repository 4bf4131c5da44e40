//! What the overlay knows of one block, and how a piece of a block is laid over what was there.

use std::sync::OnceLock;

use bytes::Bytes;
use evolute_protocol::checksum::crc32c;

use super::format::{BLOCK, SECTOR, ZERO_BLOCK_CRC};

/// The bytes of one whole block.
#[derive(Debug, Clone)]
pub struct BlockData {
    /// The write they came with, or a buffer of their own. Blocks of one write share it, so that a read of several
    /// gets one part back.
    buffer: Bytes,
    at: u32,
    pub crc: u32,
}

impl BlockData {
    /// The block at `at` of `buffer`.
    pub fn new(buffer: Bytes, at: usize, crc: u32) -> Self {
        assert!(at + BLOCK <= buffer.len(), "a block at {at} of {}", buffer.len());
        Self { buffer, at: u32::try_from(at).expect("a request is far smaller"), crc }
    }

    pub fn zeroes() -> Self {
        Self { buffer: Bytes::from_static(&ZEROES[..BLOCK]), at: 0, crc: ZERO_BLOCK_CRC }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.at as usize..self.at as usize + BLOCK]
    }

    /// `blocks` blocks of the buffer from this one on.
    pub fn run(&self, blocks: usize) -> Bytes {
        self.buffer.slice(self.at as usize..self.at as usize + blocks * BLOCK)
    }

    pub fn run_bytes(&self, blocks: usize) -> &[u8] {
        &self.buffer[self.at as usize..self.at as usize + blocks * BLOCK]
    }

    /// Whether `next` lies right behind the last of `blocks` blocks from this one on, in the same buffer.
    pub fn continues(&self, blocks: usize, next: &Self) -> bool {
        self.buffer.as_ptr() == next.buffer.as_ptr()
            && self.buffer.len() == next.buffer.len()
            && self.at as usize + blocks * BLOCK == next.at as usize
    }

    pub fn is_intact(&self) -> bool {
        crc32c(self.bytes()) == self.crc
    }
}

/// As much as a request may ask for; lives in no file and no memory but the kernel's zero page.
pub static ZEROES: [u8; 1 << 20] = [0; 1 << 20];

#[derive(Debug)]
pub enum Block {
    Full {
        data: BlockData,
        /// Put together from parts, or on a base that is only in the file: the log has no entry with all of it, so
        /// a crash that tears it in the file could not be healed from the log alone. Its drain goes through the
        /// rescue file.
        assembled: bool,
    },
    /// Some of its sectors; the others are in the layer below or in the file.
    Partial(Box<Partial>),
    Zero,
}

/// Sectors written on a block whose base is not in this layer. Merged when it is read and when it is drained.
#[derive(Debug)]
pub struct Partial {
    /// Bit per sector that is ours.
    mask: u8,
    /// A piece did not match its checksum: nobody can vouch for the block.
    tainted: bool,
    data: [u8; BLOCK],
    /// The whole block, once the drain has read its base. From before the file is touched, so that a reader who
    /// finds it empty after having read the base has read an untouched base.
    resolved: OnceLock<Resolved>,
}

#[derive(Debug, Clone)]
pub enum Resolved {
    Whole(BlockData),
    /// The base cannot be read: neither can this block be, until it is written whole or repaired.
    Damaged,
}

/// Sectors of a block, with a checksum over exactly them.
pub struct Piece<'a> {
    pub at: usize,
    pub data: &'a [u8],
    pub crc: u32,
}

impl Piece<'_> {
    fn mask(&self) -> u8 {
        let (first, count) = (self.at / SECTOR, self.data.len() / SECTOR);
        let ones = (1_u16 << count) - 1;
        (ones << first).to_le_bytes()[0]
    }
}

impl Partial {
    pub fn new(piece: &Piece<'_>) -> Box<Self> {
        let mut partial =
            Box::new(Self { mask: 0, tainted: false, data: [0; BLOCK], resolved: OnceLock::new() });
        partial.add(piece);
        partial
    }

    pub fn add(&mut self, piece: &Piece<'_>) {
        self.tainted |= crc32c(piece.data) != piece.crc;
        self.mask |= piece.mask();
        self.data[piece.at..piece.at + piece.data.len()].copy_from_slice(piece.data);
    }

    /// All sectors are ours: no base is needed.
    pub fn is_whole(&self) -> bool {
        self.mask == u8::MAX
    }

    /// These sectors over `base`.
    pub fn over(&self, base: &BlockData) -> BlockData {
        let mut merged = base.bytes().to_vec();
        for sector in (0..BLOCK / SECTOR).filter(|sector| self.mask >> sector & 1 == 1) {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            merged[range.clone()].copy_from_slice(&self.data[range]);
        }
        own(merged, self.tainted || !base.is_intact())
    }

    /// The whole block, when all sectors are here.
    pub fn into_whole(self) -> BlockData {
        assert!(self.is_whole(), "sectors {:08b} only", self.mask);
        own(self.data.to_vec(), self.tainted)
    }

    pub fn is_tainted(&self) -> bool {
        self.tainted
    }

    pub fn resolved(&self) -> Option<&Resolved> {
        self.resolved.get()
    }

    /// The first resolution stays: after a failed drain the file may hold a part of it already.
    pub fn resolve(&self, to: Resolved) {
        let _ = self.resolved.set(to);
    }

    /// For a reader on another thread.
    pub fn sectors(&self) -> Box<Self> {
        Box::new(Self { mask: self.mask, tainted: self.tainted, data: self.data, resolved: OnceLock::new() })
    }
}

/// `piece` over a whole block.
pub fn merge(base: &BlockData, piece: &Piece<'_>) -> BlockData {
    let tainted = !base.is_intact() || crc32c(piece.data) != piece.crc;
    let mut merged = base.bytes().to_vec();
    merged[piece.at..piece.at + piece.data.len()].copy_from_slice(piece.data);
    own(merged, tainted)
}

/// Merging makes a new checksum. If a part did not match its own, the new one must not match either, or damage
/// would be passed off as data.
fn own(merged: Vec<u8>, tainted: bool) -> BlockData {
    let crc = crc32c(&merged);
    BlockData::new(Bytes::from(merged), 0, if tainted { !crc } else { crc })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use evolute_protocol::checksum::crc32c;

    use super::{BlockData, Partial, Piece, merge};

    fn piece(at: usize, data: &[u8]) -> Piece<'_> {
        Piece { at, data, crc: crc32c(data) }
    }

    #[test]
    fn sectors_lie_over_their_base_and_nowhere_else() {
        let base = Bytes::from(vec![1; 4096]);
        let base = BlockData::new(base.clone(), 0, crc32c(&base));
        let mut partial = Partial::new(&piece(512, &[2; 1024]));
        partial.add(&piece(3584, &[3; 512]));
        let merged = partial.over(&base);
        let expected = [vec![1; 512], vec![2; 1024], vec![1; 2048], vec![3; 512]].concat();
        assert_eq!(merged.bytes(), expected);
        assert!(merged.is_intact() && !partial.is_whole());
        assert_eq!(merge(&base, &piece(0, &[9; 512])).bytes()[..1024], [[9; 512], [1; 512]].concat());
    }

    #[test]
    fn damage_is_never_given_a_good_checksum() {
        let base = Bytes::from(vec![1; 4096]);
        let rotten = BlockData::new(base.clone(), 0, 0);
        let good = BlockData::new(base.clone(), 0, crc32c(&base));
        let wrong = Piece { at: 0, data: &[2; 512], crc: 1 };
        assert!(!merge(&rotten, &piece(0, &[2; 512])).is_intact());
        assert!(!merge(&good, &wrong).is_intact());
        assert!(!Partial::new(&piece(0, &[2; 512])).over(&rotten).is_intact());
        assert!(!Partial::new(&wrong).over(&good).is_intact());
        let mut whole = Partial::new(&wrong);
        whole.add(&piece(512, &[1; 3584]));
        assert!(whole.is_whole() && !whole.into_whole().is_intact());
    }
}
