//! Cuts a byte range of the volume at chunk borders: pure arithmetic, one piece at a time.
//!
//! A read or a write gives one or two pieces. A discard may span the whole volume, so pieces are made when they are
//! asked for, and a segment that holds nothing can be skipped as a whole.

use evolute_protocol::geometry::{CHUNK_BYTES, CHUNKS_PER_SEGMENT, REQUEST_BYTES_MAX, SEGMENT_BYTES};
use evolute_protocol::id::{ChunkIndex, SegmentIndex};
use evolute_protocol::wire::request::ChunkRange;

/// A part of a request that lies inside one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkIo {
    pub chunk: ChunkIndex,
    pub range: ChunkRange,
}

impl ChunkIo {
    pub fn segment(&self) -> SegmentIndex {
        segment_of(self.chunk)
    }
}

/// The GiB a chunk belongs to.
#[expect(clippy::cast_possible_truncation, reason = "64 chunks make a segment")]
pub const fn segment_of(chunk: ChunkIndex) -> SegmentIndex {
    SegmentIndex(chunk.0 / CHUNKS_PER_SEGMENT as u32)
}

/// What is left of a byte range. Copying it is remembering a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    at: u64,
    end: u64,
}

// So a read or a write has at most two pieces; the volume keeps their data in two places.
const _: () = assert!(REQUEST_BYTES_MAX <= CHUNK_BYTES);

impl Split {
    /// `offset` and `len` are whole sectors inside the volume: the device checked them.
    pub fn new(offset: u64, len: u64) -> Self {
        Self { at: offset, end: offset.saturating_add(len) }
    }

    pub fn is_empty(&self) -> bool {
        self.at >= self.end
    }

    pub fn bytes_left(&self) -> u64 {
        self.end.saturating_sub(self.at)
    }

    /// The next piece, without taking it.
    pub fn peek(&self) -> Option<ChunkIo> {
        if self.is_empty() {
            return None;
        }
        let chunk = u32::try_from(self.at / CHUNK_BYTES).ok()?;
        let within = u32::try_from(self.at % CHUNK_BYTES).ok()?;
        let length = u32::try_from((CHUNK_BYTES - u64::from(within)).min(self.bytes_left())).ok()?;
        Some(ChunkIo { chunk: ChunkIndex(chunk), range: ChunkRange::new(within, length)? })
    }

    /// Leaves out everything up to the end of the segment the next piece lies in; says how many bytes that was.
    pub fn skip_segment(&mut self) -> u64 {
        let next = ((self.at / SEGMENT_BYTES + 1) * SEGMENT_BYTES).min(self.end);
        let skipped = next.saturating_sub(self.at);
        self.at = next;
        skipped
    }
}

impl Iterator for Split {
    type Item = ChunkIo;

    fn next(&mut self) -> Option<ChunkIo> {
        let piece = self.peek();
        match piece {
            Some(piece) => self.at += u64::from(piece.range.length()),
            None => self.at = self.end,
        }
        piece
    }
}

#[cfg(test)]
mod tests {
    use evolute_protocol::geometry::{CHUNK_BYTES, GIB, KIB, MIB, TIB};

    use super::Split;

    fn pieces(offset: u64, len: u64) -> Vec<(u32, u32, u32)> {
        Split::new(offset, len).map(|io| (io.chunk.0, io.range.offset(), io.range.length())).collect()
    }

    #[test]
    fn a_range_is_cut_at_chunk_borders_and_nowhere_else() {
        let chunk = 16 << 20;
        type Piece = (u32, u32, u32);
        let table: [(u64, u64, &[Piece]); 9] = [
            (0, 512, &[(0, 0, 512)]),
            (0, 4 * KIB, &[(0, 0, 4096)]),
            (CHUNK_BYTES - 512, 512, &[(0, chunk - 512, 512)]),
            (CHUNK_BYTES - 512, 1024, &[(0, chunk - 512, 512), (1, 0, 512)]),
            (CHUNK_BYTES, MIB, &[(1, 0, 1 << 20)]),
            (3 * CHUNK_BYTES - MIB / 2, MIB, &[(2, chunk - (1 << 19), 1 << 19), (3, 0, 1 << 19)]),
            (GIB - 512, 1024, &[(63, chunk - 512, 512), (64, 0, 512)]),
            (512, 3 * CHUNK_BYTES, &[(0, 512, chunk - 512), (1, 0, chunk), (2, 0, chunk), (3, 0, 512)]),
            (64 * TIB - 512, 512, &[((64 << 16) - 1, chunk - 512, 512)]),
        ];
        for (offset, len, expected) in table {
            assert_eq!(pieces(offset, len), expected, "{offset}+{len}");
        }
        assert!(pieces(4096, 0).is_empty());
    }

    #[test]
    fn the_pieces_of_any_range_are_that_range() {
        for (offset, len) in [(0, 64 * GIB), (512, 3 * GIB), (GIB - 512, 512), (7 * MIB, 100 * MIB + 512)] {
            let mut at = offset;
            for io in Split::new(offset, len) {
                assert_eq!(u64::from(io.chunk.0) * CHUNK_BYTES + u64::from(io.range.offset()), at);
                assert_eq!(io.segment().0, io.chunk.0 / 64);
                at += u64::from(io.range.length());
            }
            assert_eq!(at, offset + len);
        }
    }

    #[test]
    fn a_segment_is_skipped_up_to_its_border_or_the_end() {
        let mut split = Split::new(GIB - 512, 2 * GIB);
        assert_eq!(split.skip_segment(), 512);
        assert_eq!(split.peek().map(|io| io.chunk.0), Some(64));
        assert_eq!(split.skip_segment(), GIB);
        assert_eq!(split.skip_segment(), GIB - 512);
        assert!(split.is_empty() && split.peek().is_none());
        assert_eq!(split.skip_segment(), 0);
    }
}
