//! When a chunkserver is too full to be given anything new.

use evolute_protocol::geometry::GIB;

/// Below a tenth free, chunks that exist still grow, so nothing new is placed: the last tenth is theirs.
const NEAR_FULL_DIVISOR: u64 = 10;
/// On a large disk a tenth is a lot to leave unused. 16 GiB is 16 segments' worth of writes, minutes of warning at full
/// speed.
const NEAR_FULL_FREE_BYTES_MAX: u64 = 16 * GIB;

/// No new segment goes to a chunkserver with less free than [`near_full_below`].
pub fn is_near_full(capacity_bytes: u64, free_bytes: u64) -> bool {
    free_bytes < near_full_below(capacity_bytes)
}

/// The free bytes under which a chunkserver of this capacity counts as near-full.
pub fn near_full_below(capacity_bytes: u64) -> u64 {
    (capacity_bytes / NEAR_FULL_DIVISOR).min(NEAR_FULL_FREE_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::is_near_full;
    use evolute_protocol::geometry::{GIB, TIB};

    #[test]
    fn the_last_tenth_belongs_to_what_is_there() {
        for (capacity, free, near_full) in [
            (10 * GIB, GIB, false),
            (10 * GIB, GIB - 1, true),
            (4 * TIB, 16 * GIB, false),
            (4 * TIB, 16 * GIB - 1, true),
            (0, 0, false), // says nothing about its disk
        ] {
            assert_eq!(is_near_full(capacity, free), near_full, "{free} of {capacity}");
        }
    }
}
