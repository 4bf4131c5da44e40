//! Which entry of the log some bytes of a copyset depend on at most: what a replica must have applied to read them.
//!
//! The volume wrote them itself, so it knows: each acknowledged change came with an index at or above its own entry's.
//! The newest changes are kept one by one, so that bytes nobody touched lately can be read from a replica that does
//! not know the last few entries to be committed, as followers do not when their leader has just died. Of older
//! changes only the highest index is kept, and the fence is such a change: everything of former epochs is below it.
//!
//! What always holds: [`RecentChanges::needed`] is never below the entry of an acknowledged change to these bytes.
//! Changes in flight are the asker's care ([`super::followers`]), and so are those that were given up.

use std::collections::VecDeque;

use evolute_protocol::id::ChunkIndex;
use evolute_protocol::wire::request::ChunkRange;
use smallvec::SmallVec;

/// Changes kept one by one, for each copyset: a tenth of a second of the busiest. 1024 × 24 B.
const KEPT: usize = 1024;
/// Changes with an unknown end that are kept; more, and all bytes count as theirs.
const GIVEN_UP_MAX: usize = 64;

/// Some bytes of a volume.
type Bytes = (ChunkIndex, ChunkRange);

/// Whether two have bytes in common.
pub fn overlap(one: Bytes, other: Bytes) -> bool {
    one.0 == other.0 && one.1.overlaps(other.1)
}

/// The newest changes of one copyset.
#[derive(Debug, Default)]
pub struct RecentChanges {
    /// At or above every entry that is not kept by itself.
    base: u64,
    kept: VecDeque<(Bytes, u64)>,
    /// Sent, never acknowledged and not sent any more: applied at some time, or never.
    given_up: SmallVec<[Bytes; 1]>,
}

impl RecentChanges {
    /// A fence was acknowledged at `index`.
    pub fn fenced(&mut self, index: u64) {
        self.base = self.base.max(index);
    }

    /// A change was acknowledged at `index`.
    pub fn changed(&mut self, chunk: ChunkIndex, range: ChunkRange, index: u64) {
        if self.kept.len() >= KEPT
            && let Some((_, oldest)) = self.kept.pop_front()
        {
            self.base = self.base.max(oldest);
        }
        self.kept.push_back(((chunk, range), index));
    }

    /// A change that was sent was given up.
    pub fn gave_up(&mut self, chunk: ChunkIndex, range: ChunkRange) {
        if self.given_up.len() < GIVEN_UP_MAX {
            self.given_up.push((chunk, range));
        }
    }

    /// What a replica must have of this volume to read these bytes. `None`: everything that we were shown, because a
    /// change of them was given up, and may show or not.
    pub fn needed(&self, chunk: ChunkIndex, range: ChunkRange) -> Option<u64> {
        let bytes = (chunk, range);
        let unknown = self.given_up.iter().any(|&other| overlap(other, bytes));
        if unknown || self.given_up.len() >= GIVEN_UP_MAX {
            return None;
        }
        let overlapping = self.kept.iter().filter(|(other, _)| overlap(*other, bytes));
        Some(overlapping.map(|(_, index)| *index).fold(self.base, u64::max))
    }
}

#[cfg(test)]
mod tests {
    use evolute_protocol::id::ChunkIndex;
    use evolute_protocol::wire::request::ChunkRange;
    use proptest::prelude::{ProptestConfig, any, prop, prop_assert, proptest};

    use super::{GIVEN_UP_MAX, KEPT, RecentChanges};

    const C: ChunkIndex = ChunkIndex(3);

    fn sectors(first: u32, count: u32) -> ChunkRange {
        ChunkRange::new(first * 512, count * 512).expect("inside")
    }

    #[test]
    fn only_changes_of_the_same_bytes_count_and_the_fence_always() {
        let mut recent = RecentChanges::default();
        recent.fenced(10);
        recent.changed(C, sectors(8, 8), 20);
        recent.changed(ChunkIndex(4), sectors(0, 8), 30);
        for (first, count, needed) in
            [(0, 8, 10), (8, 8, 20), (15, 1, 20), (16, 8, 10), (7, 2, 20), (0, 100, 20)]
        {
            assert_eq!(recent.needed(C, sectors(first, count)), Some(needed), "{first}+{count}");
        }
    }

    #[test]
    fn for_a_change_whose_end_nobody_knows_no_entry_is_enough() {
        let mut recent = RecentChanges::default();
        recent.gave_up(C, sectors(8, 8));
        assert_eq!(recent.needed(C, sectors(9, 1)), None);
        assert_eq!(recent.needed(C, sectors(16, 1)), Some(0));
        (1..GIVEN_UP_MAX).for_each(|_| recent.gave_up(C, sectors(8, 8)));
        assert_eq!(recent.needed(C, sectors(16, 1)), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn nothing_acknowledged_is_ever_below(
            changes in prop::collection::vec((0u32..64, 1u32..8, any::<bool>()), 1..3 * KEPT),
        ) {
            let mut recent = RecentChanges::default();
            let mut newest = [0u64; 72];
            let mut index = 0;
            for (first, count, skip) in changes {
                index += 1 + u64::from(skip);
                recent.changed(C, sectors(first, count), index);
                newest[first as usize..(first + count) as usize].fill(index);
            }
            for (sector, index) in (0u32..).zip(newest) {
                prop_assert!(recent.needed(C, sectors(sector, 1)) >= Some(index), "sector {}", sector);
            }
        }
    }
}
