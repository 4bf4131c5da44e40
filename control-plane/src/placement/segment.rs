//! Which copyset each chunk of a segment goes to.

use evolute_protocol::geometry::CHUNKS_PER_SEGMENT;
use evolute_protocol::id::{CopysetId, SegmentIndex};

/// Deals the segment's chunks out over `ring`, one after the other, and goes on where the segment before it ended:
/// neighbours in the volume lie in different copysets, and all copysets get the same share.
///
/// # Panics
/// If the ring is empty.
pub fn deal(ring: &[CopysetId], segment: SegmentIndex) -> Vec<CopysetId> {
    assert!(!ring.is_empty(), "a segment needs at least one copyset");
    let first = u64::from(segment.0) * CHUNKS_PER_SEGMENT;
    let len = ring.len() as u64;
    #[expect(clippy::cast_possible_truncation, reason = "below ring.len()")]
    let at = |chunk: u64| ring[(chunk % len) as usize];
    (first..first + CHUNKS_PER_SEGMENT).map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::deal;
    use evolute_protocol::id::{CopysetId, SegmentIndex};
    use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn chunks_go_round_and_round(width in 1_u32..64, segment in any::<u32>()) {
            let ring: Vec<_> = (1..=width).map(CopysetId).collect();
            let mut chunks = deal(&ring, SegmentIndex(segment));
            prop_assert_eq!(chunks.len(), 64);
            if segment < u32::MAX {
                chunks.extend(deal(&ring, SegmentIndex(segment + 1)));
            }
            for pair in chunks.windows(2) {
                prop_assert_eq!(pair[1].0, pair[0].0 % width + 1);
            }
            let count = |id: &CopysetId| chunks.iter().filter(|c| *c == id).count();
            let counts: Vec<_> = ring.iter().map(count).collect();
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
        }
    }
}
