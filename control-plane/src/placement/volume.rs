//! Which copysets a volume spreads over.

use std::collections::BTreeMap;

use evolute_protocol::id::{ChunkserverId, CopysetId};

/// A copyset that may be chosen.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub id: CopysetId,
    /// Who leads it when all is well.
    pub leader: ChunkserverId,
    /// The least any of its members has: what the copyset can still take.
    pub free_bytes: u64,
    /// Segments' chunks and volumes that were placed here already, by whatever measure is the same for all.
    pub load: u64,
}

/// Up to `width` of the candidates, in the order in which chunks go round over them.
///
/// Leaders come first: a volume whose copysets are led from few chunkservers has only their speed. Among equals the
/// one with the most room for what lies on it already, then the lowest id. `turn` (the number of volumes so far, say)
/// turns the ring: else the first chunks of all small volumes would meet in one copyset.
pub fn choose(candidates: &[Candidate], width: usize, turn: u64) -> Vec<CopysetId> {
    let mut left: Vec<&Candidate> = candidates.iter().collect();
    let mut leads: BTreeMap<ChunkserverId, u32> = BTreeMap::new();
    let mut chosen = Vec::with_capacity(width.min(left.len()));
    while chosen.len() < width && !left.is_empty() {
        let worth = |candidate: &Candidate| {
            let led = leads.get(&candidate.leader).copied().unwrap_or(0);
            // Free bytes per placed piece, the higher the better; equal disks order by load alone.
            let room = u128::from(candidate.free_bytes) * 1024 / u128::from(candidate.load + 1);
            (led, u128::MAX - room, candidate.id)
        };
        let best = (0..left.len()).min_by_key(|&i| worth(left[i])).expect("something is left");
        let candidate = left.swap_remove(best);
        *leads.entry(candidate.leader).or_default() += 1;
        chosen.push(candidate.id);
    }
    if !chosen.is_empty() {
        #[expect(clippy::cast_possible_truncation, reason = "below chosen.len()")]
        let by = (turn % chosen.len() as u64) as usize;
        chosen.rotate_left(by);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::{Candidate, choose};
    use evolute_protocol::geometry::GIB;
    use evolute_protocol::id::{ChunkserverId, CopysetId};
    use proptest::prelude::{ProptestConfig, prop_assert, prop_assert_eq, proptest};
    use std::collections::{BTreeMap, BTreeSet};

    fn candidate(id: u32, leader: u32, free_gib: u64, load: u64) -> Candidate {
        Candidate { id: CopysetId(id), leader: ChunkserverId(leader), free_bytes: free_gib * GIB, load }
    }

    #[test]
    fn the_emptier_copysets_are_chosen() {
        let pool =
            [candidate(1, 1, 10, 0), candidate(2, 1, 90, 0), candidate(3, 2, 50, 9), candidate(4, 2, 50, 1)];
        assert_eq!(choose(&pool, 2, 0), [CopysetId(2), CopysetId(4)]);
        assert_eq!(choose(&pool, 2, 1), [CopysetId(4), CopysetId(2)], "the next volume begins elsewhere");
        assert!(choose(&[], 6, 3).is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn a_volume_is_led_from_as_many_chunkservers_as_there_are(
            leaders in proptest::collection::vec((1_u32..9, 1_u64..100, 0_u64..50), 1..60),
            width in 1_usize..12,
            turn in 0_u64..20,
        ) {
            let pool: Vec<_> = (1_u32..).zip(&leaders).map(|(id, l)| candidate(id, l.0, l.1, l.2)).collect();
            let chosen = choose(&pool, width, turn);
            prop_assert_eq!(chosen.len(), width.min(pool.len()));
            prop_assert_eq!(chosen.iter().collect::<BTreeSet<_>>().len(), chosen.len());
            let leader = |id: &CopysetId| pool.iter().find(|c| c.id == *id).unwrap().leader;
            let mut led: BTreeMap<_, usize> = BTreeMap::new();
            for id in &chosen {
                *led.entry(leader(id)).or_default() += 1;
            }
            // Nobody leads two more than another who could have led one more.
            for (l, n) in &led {
                for other in pool.iter().filter(|c| !chosen.contains(&c.id)) {
                    prop_assert!(led.get(&other.leader).copied().unwrap_or(0) + 1 >= *n, "{l} leads {n}");
                }
            }
            let mut turned = choose(&pool, width, 0);
            turned.rotate_left(usize::try_from(turn).expect("small") % chosen.len());
            prop_assert_eq!(turned, chosen);
        }
    }
}
