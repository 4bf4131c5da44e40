//! A read: for every block the newest of active layer, draining layer and file; verified, cut to what was asked.
//!
//! What memory and holes answer is answered at once. The rest becomes a [`Plan`] that owns what it needs and can run
//! on any thread while the shard goes on. A checkpoint may write the file meanwhile: then a block does not match the
//! checksum the plan knows, and the read is planned anew (the block is now in memory, or its new checksum is read).

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use evolute_protocol::checksum::crc32c;
use evolute_protocol::id::ChunkKey;
use smallvec::SmallVec;

use crate::disk::Disk;

use super::block::{Block, BlockData, Partial, Resolved, ZEROES};
use super::chunk_file::{ChunkFile, Fault, Run, Wait};
use super::format::{BLOCK, ZERO_BLOCK_CRC, checksum_place};
use super::options::ReadData;
use super::overlay::{ChunkLayer, Layer, block_of};
use super::table::ChunkRecord;

/// What the store knows of a chunk, newest first.
pub struct View<'a> {
    pub key: ChunkKey,
    pub active: Option<&'a ChunkLayer>,
    pub draining: Option<&'a ChunkLayer>,
    /// For a plan that must look again, after the file, whether the drain has resolved a block.
    pub frozen: Option<&'a Arc<Layer>>,
    pub record: Option<&'a ChunkRecord>,
}

/// Where the newest bytes of one block are.
enum Source {
    Memory(BlockData),
    Zero,
    File,
    /// Sectors over the block in the file; outermost first.
    Merge {
        over: SmallVec<[Box<Partial>; 2]>,
        /// The draining layer's part is one of them: it may be resolved while the file is read.
        draining: bool,
    },
    Damaged,
}

impl View<'_> {
    fn source(&self, block: u16) -> Source {
        let mut over: SmallVec<[&Partial; 2]> = SmallVec::new();
        let mut draining_over = false;
        let mut base = self.base_in_file(block);
        for (layer, draining) in [(self.active, false), (self.draining, true)] {
            let Some(layer) = layer else { continue };
            base = match layer.block(block) {
                Some(Block::Full { data, .. }) => Source::Memory(data.clone()),
                Some(Block::Zero) => Source::Zero,
                Some(Block::Partial(partial)) => match partial.resolved() {
                    Some(Resolved::Whole(data)) => Source::Memory(data.clone()),
                    Some(Resolved::Damaged) => Source::Damaged,
                    None => {
                        over.push(partial);
                        draining_over |= draining;
                        continue;
                    }
                },
                None if layer.base_gone => Source::Zero,
                None => continue,
            };
            break;
        }
        if over.is_empty() {
            return base;
        }
        let mut merged = match base {
            Source::Memory(data) => data,
            Source::Zero => BlockData::zeroes(),
            Source::Damaged => return Source::Damaged,
            Source::File | Source::Merge { .. } => {
                let over = over.iter().map(|partial| partial.sectors()).collect();
                return Source::Merge { over, draining: draining_over };
            }
        };
        for partial in over.iter().rev() {
            merged = partial.over(&merged);
        }
        Source::Memory(merged)
    }

    fn base_in_file(&self, block: u16) -> Source {
        match self.record {
            None => Source::Zero,
            Some(record) if record.written[checksum_place(block).0] == 0 => Source::Zero,
            Some(record) if record.lost => Source::Damaged,
            Some(_) => Source::File,
        }
    }
}

/// A read whose memory part is settled.
pub struct Plan {
    key: ChunkKey,
    range: Range<usize>,
    steps: SmallVec<[(u16, Step); 1]>,
    frozen: Option<Arc<Layer>>,
}

enum Step {
    Memory { first: BlockData, crcs: SmallVec<[u32; 4]> },
    Zeroes { count: u16 },
    File { count: u16 },
    Merge { over: SmallVec<[Box<Partial>; 2]>, draining: bool },
}

impl Plan {
    /// `Err`: this block is known to be damaged.
    pub fn new(view: &View<'_>, offset: u32, len: u32) -> Result<Self, u16> {
        let range = offset as usize..offset as usize + len as usize;
        let mut steps: SmallVec<[(u16, Step); 1]> = SmallVec::new();
        for block in block_of(range.start)..=block_of(range.end - 1) {
            let source = view.source(block);
            match (steps.last_mut().map(|(_, step)| step), source) {
                (Some(Step::Memory { first, crcs }), Source::Memory(data))
                    if first.continues(crcs.len(), &data) =>
                {
                    crcs.push(data.crc);
                }
                (Some(Step::Zeroes { count }), Source::Zero) | (Some(Step::File { count }), Source::File) => {
                    *count += 1;
                }
                (_, Source::Memory(data)) => {
                    let crcs = SmallVec::from_slice(&[data.crc]);
                    steps.push((block, Step::Memory { first: data, crcs }));
                }
                (_, Source::Zero) => steps.push((block, Step::Zeroes { count: 1 })),
                (_, Source::File) => steps.push((block, Step::File { count: 1 })),
                (_, Source::Merge { over, draining }) => steps.push((block, Step::Merge { over, draining })),
                (_, Source::Damaged) => return Err(block),
            }
        }
        let merges = steps.iter().any(|(_, step)| matches!(step, Step::Merge { draining: true, .. }));
        let frozen = if merges { view.frozen.cloned() } else { None };
        Ok(Self { key: view.key, range, steps, frozen })
    }

    pub fn needs_file(&self) -> bool {
        self.steps.iter().any(|(_, step)| matches!(step, Step::File { .. } | Step::Merge { .. }))
    }

    /// `None`: would wait. `file` must be given if the plan needs one.
    pub fn run(
        &self,
        disk: &dyn Disk,
        file: Option<&ChunkFile>,
        wait: Wait,
    ) -> Result<Option<ReadData>, Fault> {
        let file = || file.expect("a plan with file steps comes with its file");
        let mut out = Output::new(self.range.clone());
        for (block, step) in &self.steps {
            match step {
                Step::Memory { first, crcs } => out.data(*block, first.run(crcs.len()), crcs, false),
                Step::Zeroes { count } => out.zeroes(*block, *count),
                Step::File { count } => {
                    let Some(runs) = file().read(disk, *block, *count, wait)? else { return Ok(None) };
                    let mut block = *block;
                    for run in runs {
                        let blocks = run.blocks();
                        match run {
                            Run::Data { data, crcs } => out.data(block, data, &crcs, true),
                            Run::Zeroes { count } => out.zeroes(block, count),
                        }
                        block += blocks;
                    }
                }
                Step::Merge { over, draining } => {
                    let Some(merged) = self.merge(disk, file(), *block, over, *draining, wait)? else {
                        return Ok(None);
                    };
                    out.data(*block, merged.run(1), &[merged.crc], false);
                }
            }
        }
        Ok(Some(out.read))
    }

    fn merge(
        &self,
        disk: &dyn Disk,
        file: &ChunkFile,
        block: u16,
        over: &[Box<Partial>],
        draining: bool,
        wait: Wait,
    ) -> Result<Option<BlockData>, Fault> {
        let Some(runs) = file.read(disk, block, 1, wait)? else { return Ok(None) };
        let mut merged = match runs.into_iter().next() {
            Some(Run::Data { data, crcs }) => BlockData::new(data, 0, crcs[0]),
            _ => BlockData::zeroes(),
        };
        let mut over = over;
        if draining && let Some(resolved) = self.resolved_meanwhile(block) {
            // The base we read may already be the drain's work: take its result, and lay only what is newer on it.
            merged = match resolved {
                Resolved::Whole(data) => data.clone(),
                Resolved::Damaged => return Err(Fault::Mismatch(block)),
            };
            over = &over[..over.len() - 1];
        }
        for partial in over.iter().rev() {
            merged = partial.over(&merged);
        }
        Ok(Some(merged))
    }

    fn resolved_meanwhile(&self, block: u16) -> Option<&Resolved> {
        match self.frozen.as_ref()?.chunk(self.key)?.block(block)? {
            Block::Partial(partial) => partial.resolved(),
            Block::Full { .. } | Block::Zero => None,
        }
    }
}

/// Whole blocks in, the bytes that were asked for out.
struct Output {
    range: Range<usize>,
    read: ReadData,
}

impl Output {
    fn new(range: Range<usize>) -> Self {
        Self { range, read: ReadData { data: SmallVec::new(), checksums: SmallVec::new() } }
    }

    /// The part of `blocks` blocks from `block` on that was asked for, relative to the first of them.
    fn wanted(&self, block: u16, blocks: usize) -> Range<usize> {
        let at = usize::from(block) * BLOCK;
        self.range.start.max(at) - at..self.range.end.min(at + blocks * BLOCK) - at
    }

    fn data(&mut self, block: u16, data: Bytes, crcs: &[u32], verified: bool) {
        let wanted = self.wanted(block, crcs.len());
        for (nth, crc) in crcs.iter().enumerate() {
            let whole = nth * BLOCK..(nth + 1) * BLOCK;
            let piece = wanted.start.max(whole.start)..wanted.end.min(whole.end);
            if piece == whole {
                self.read.checksums.push(*crc);
                continue;
            }
            // A new checksum, over less: it vouches only for what was vouched for.
            let intact = verified || crc32c(&data[whole]) == *crc;
            let crc = crc32c(&data[piece]);
            self.read.checksums.push(if intact { crc } else { !crc });
        }
        self.read.data.push(if wanted == (0..data.len()) { data } else { data.slice(wanted) });
    }

    fn zeroes(&mut self, block: u16, count: u16) {
        let wanted = self.wanted(block, usize::from(count));
        for nth in 0..usize::from(count) {
            let whole = nth * BLOCK..(nth + 1) * BLOCK;
            let piece = wanted.start.max(whole.start)..wanted.end.min(whole.end);
            let crc = if piece == whole { ZERO_BLOCK_CRC } else { crc32c(&ZEROES[..piece.len()]) };
            self.read.checksums.push(crc);
        }
        let mut left = wanted.len();
        while left > 0 {
            let part = left.min(ZEROES.len());
            self.read.data.push(Bytes::from_static(&ZEROES[..part]));
            left -= part;
        }
    }
}
