//! A file judged as if everything had been read from it just now: what a replica's own disk holds.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{PASS_SECTORS, Phase, Run};
use crate::content::{self, SECTOR_BYTES};
use crate::history::{Kind, NOTHING, Op, Status};

/// What a file was found to hold, sector by sector of the checked area.
#[derive(Debug, Clone, Default)]
pub struct Judged {
    pub sectors: u32,
    /// Sectors that no write of ours can have left there.
    pub damaged: Vec<u32>,
    /// Sectors that show another write than one of those that may have been the last; in order.
    pub stale: Vec<u32>,
    pub undecided: u64,
    /// The first wrong ones, in words.
    pub examples: Vec<String>,
}

const EXAMPLES_MAX: usize = 5;

impl Run {
    /// Judges a raw image of the volume; where it is too short it is zeroes. Only while the load stands still: everything
    /// was answered before this read begins.
    pub(super) fn judge_file(&mut self, path: &Path) -> io::Result<Judged> {
        if self.phase != Phase::Still {
            return Err(io::Error::other("the load does not stand still"));
        }
        let now = self.now();
        let mut judged = Judged { sectors: self.work.area_sectors(), ..Judged::default() };
        let values = self.values_of(&File::open(path)?, &mut judged)?;
        let mut round = self.round.clone();
        round.ops.push(Op {
            id: NOTHING,
            kind: Kind::Read,
            sectors: 0..judged.sectors,
            invoked: now,
            answered: now,
            status: Status::Done,
            seen: 0..0,
        });
        round.saw(round.ops.len() - 1, values.into_iter());
        let checked = round.check();
        judged.undecided = checked.undecided_sectors;
        judged.stale = checked.violated;
        for (sector, violation) in checked.examples {
            judged.example(format!("sector {sector}: {violation}"));
        }
        Ok(judged)
    }

    fn values_of(&mut self, file: &File, judged: &mut Judged) -> io::Result<Vec<content::OpId>> {
        let base = self.options.offset_mib << 11;
        let length = file.metadata()?.len();
        let mut values = Vec::with_capacity(judged.sectors as usize);
        for first in (0..judged.sectors).step_by(PASS_SECTORS as usize) {
            let count = PASS_SECTORS.min(judged.sectors - first);
            let at = (base + u64::from(first)) * SECTOR_BYTES as u64;
            let bytes = &mut self.scratch[..count as usize * SECTOR_BYTES];
            let there = usize::try_from(length.saturating_sub(at)).unwrap_or(usize::MAX).min(bytes.len());
            file.read_exact_at(&mut bytes[..there], at)?;
            bytes[there..].fill(0);
            for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
                values.push(match content::read(bytes, self.volume, base + u64::from(sector)) {
                    Ok(value) => value,
                    Err(damage) => {
                        judged.damaged.push(sector);
                        judged.example(format!("sector {sector}: {damage}"));
                        NOTHING
                    }
                });
            }
        }
        Ok(values)
    }
}

impl Judged {
    fn example(&mut self, words: String) {
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(words);
        }
    }
}
