//! Which request comes next: sizes, places and kinds, from the seed.

use std::ops::Range;

use super::options::{Discard, Options};
use crate::driver::Geometry;
use crate::random::Random;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    Read,
    Write,
    Discard,
    WriteZeroes { unmap: bool },
    Flush,
}

pub struct Work {
    random: Random,
    area_sectors: u32,
    sectors_max: u32,
    reads: u64,
    discard_max: u32,
    zeroes_max: u32,
    has_flush: bool,
}

/// Requests meet here on purpose: places so long, one at every border of this many sectors (16 MiB: a chunk).
const HOT_SECTORS: u32 = 256;
const BORDER_SECTORS: u32 = 32_768;

impl Work {
    pub fn new(options: &Options, geometry: &Geometry, random: Random) -> Self {
        let area = options.area_mib << 11;
        let discard = options.discard == Discard::Zeroes;
        Self {
            random,
            area_sectors: u32::try_from(area).expect("an area of fewer than 2^32 sectors"),
            sectors_max: options.size_max_kib * 2,
            reads: options.reads,
            discard_max: if discard { geometry.discard_sectors_max } else { 0 },
            zeroes_max: geometry.zeroes_sectors_max,
            has_flush: geometry.has_flush,
        }
    }

    pub fn area_sectors(&self) -> u32 {
        self.area_sectors
    }

    /// What, and which sectors of the area.
    pub fn next(&mut self) -> (Wish, Range<u32>) {
        if self.random.chance(self.reads) {
            return (Wish::Read, self.place(self.sectors_max));
        }
        match self.random.below(100) {
            0..4 if self.has_flush => (Wish::Flush, 0..0),
            4..7 if self.discard_max > 0 => {
                (Wish::Discard, self.place(self.discard_max.min(self.sectors_max)))
            }
            7..10 if self.zeroes_max > 0 => {
                let unmap = self.random.chance(50);
                (Wish::WriteZeroes { unmap }, self.place(self.zeroes_max.min(self.sectors_max)))
            }
            _ => (Wish::Write, self.place(self.sectors_max)),
        }
    }

    /// Half of all requests are single blocks of 4 KiB; the others have any length, short ones more often, begin
    /// anywhere, and often where others are.
    fn place(&mut self, sectors_max: u32) -> Range<u32> {
        let any = |random: &mut Random, n: u32| u32::try_from(random.below(n.into())).expect("below a u32");
        let sectors = match self.random.below(100) {
            0..50 => 8,
            50..75 => 1 + any(&mut self.random, 32),
            75..95 => 1 + any(&mut self.random, 256),
            _ => 1 + any(&mut self.random, 2048),
        }
        .clamp(1, sectors_max.min(self.area_sectors));
        let last = self.area_sectors - sectors;
        let first = if self.random.chance(50) {
            let borders = self.area_sectors.div_ceil(BORDER_SECTORS);
            let border = BORDER_SECTORS * any(&mut self.random, borders);
            (border + any(&mut self.random, HOT_SECTORS)).saturating_sub(HOT_SECTORS / 2)
        } else {
            any(&mut self.random, last + 1)
        };
        let aligned = if self.random.chance(70) { first / 8 * 8 } else { first };
        let first = aligned.min(last);
        first..first + sectors
    }
}
