//! What is written: bytes that say where and when they belong, so that reading them back proves it.

/// The unit that carries a header; virtio's sector.
pub const SECTOR_BYTES: usize = 512;
const OFFSET_AT: usize = 0;
const GENERATION_AT: usize = OFFSET_AT + size_of::<u64>();
const NOISE_AT: usize = GENERATION_AT + size_of::<u64>();

/// splitmix64: small, fast, and good enough for offsets and payloads. A seed repeats a run.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mixed(self.0)
    }

    /// Uniform in 0..n (Lemire's multiply-shift; the bias at these sizes is below 1e-9).
    pub fn below(&mut self, n: u64) -> u64 {
        let wide = u128::from(self.draw()) * u128::from(n);
        u64::try_from(wide >> 64).expect("a 128-bit number shifted by 64")
    }
}

fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Fills a block so that each sector is a function of (seed, its offset, generation) alone, whatever block size it
/// is written or read with, and no two look alike.
pub fn fill(block: &mut [u8], seed: u64, offset: u64, generation: u32) {
    for (at, sector) in (offset..).step_by(SECTOR_BYTES).zip(block.chunks_exact_mut(SECTOR_BYTES)) {
        let mut noise = Random::new(mixed(seed ^ mixed(at ^ (u64::from(generation) << 40) ^ 0xA5A5)));
        sector[OFFSET_AT..GENERATION_AT].copy_from_slice(&at.to_le_bytes());
        sector[GENERATION_AT..NOISE_AT].copy_from_slice(&u64::from(generation).to_le_bytes());
        for word in sector[NOISE_AT..].chunks_exact_mut(8) {
            word.copy_from_slice(&noise.draw().to_le_bytes());
        }
    }
}

/// A block is not what was written last. Says what it seems to be instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "block at {offset} differs from generation {expected} at byte {at}; the sector there says offset {found_offset}, \
     generation {found_generation}"
)]
pub struct Mismatch {
    pub offset: u64,
    pub expected: u32,
    pub at: usize,
    pub found_offset: u64,
    pub found_generation: u64,
}

/// `scratch` is as long as the block, kept by the caller so that nothing is allocated per check.
pub fn check(
    block: &[u8],
    scratch: &mut [u8],
    seed: u64,
    offset: u64,
    generation: u32,
) -> Result<(), Mismatch> {
    let expected = &mut scratch[..block.len()];
    fill(expected, seed, offset, generation);
    let Some(at) = block.iter().zip(&*expected).position(|(found, wanted)| found != wanted) else {
        return Ok(());
    };
    let sector = &block[at / SECTOR_BYTES * SECTOR_BYTES..];
    let word =
        |from: usize| u64::from_le_bytes(sector[from..from + 8].try_into().expect("eight bytes of a sector"));
    Err(Mismatch {
        offset,
        expected: generation,
        at,
        found_offset: word(OFFSET_AT),
        found_generation: word(GENERATION_AT),
    })
}

#[cfg(test)]
mod tests {
    use super::{Random, check, fill};

    #[test]
    fn a_block_of_another_place_time_or_run_is_noticed() {
        let (mut block, mut newer, mut scratch) = (vec![0; 4096], vec![0; 4096], vec![0; 4096]);
        fill(&mut block, 1, 8192, 3);
        assert_eq!(check(&block, &mut scratch, 1, 8192, 3), Ok(()));
        assert!(check(&block, &mut scratch, 1, 8192, 2).is_err());
        assert!(check(&block, &mut scratch, 1, 4096, 3).is_err());
        assert!(check(&block, &mut scratch, 2, 8192, 3).is_err());
        fill(&mut newer, 1, 8192, 4);
        block[1024..1536].copy_from_slice(&newer[1024..1536]);
        let torn = check(&block, &mut scratch, 1, 8192, 3).expect_err("one torn sector");
        assert_eq!((torn.found_generation, torn.found_offset), (4, 8192 + 1024));
        assert!((1024..1536).contains(&torn.at));
    }

    #[test]
    fn what_is_written_in_large_blocks_can_be_checked_in_small_ones() {
        let (mut large, mut scratch) = (vec![0; 65536], vec![0; 4096]);
        fill(&mut large, 7, 1 << 20, 1);
        assert_eq!(check(&large[8192..12288], &mut scratch, 7, (1 << 20) + 8192, 1), Ok(()));
    }

    #[test]
    fn random_numbers_stay_below_their_bound_and_reach_it() {
        let mut random = Random::new(1);
        let mut seen = [false; 7];
        for _ in 0..1000 {
            seen[usize::try_from(random.below(7)).expect("small")] = true;
        }
        assert_eq!(seen, [true; 7]);
    }
}
