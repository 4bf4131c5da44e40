//! When a chunkserver is too full to be given anything new, and which copysets get it then.
//!
//! One full disk of three is like one of three that is away: it harms nobody. The two others take what is written, and it
//! takes what it has room for and the rest later. So copysets with such a member are chosen too, when there are no better ones.

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

/// A member of a copyset, as far as it was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    pub capacity_bytes: u64,
    pub free_bytes: u64,
    pub online: bool,
}

/// How well something new would lie in a copyset; the best is the greatest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fit {
    /// A majority has room, and is not all there: writes would wait for who is not.
    PartlyWaiting,
    /// All have room, and a majority is not there.
    Waiting,
    /// A majority has room and is there; others are near-full.
    Partly,
    /// All have room, and a majority is there.
    Whole,
}

/// How well something new would lie with these members, and the least free bytes of those with room. `None`: not at all, a
/// majority is near-full.
pub fn fit(members: &[Member]) -> Option<(Fit, u64)> {
    let majority = members.len() / 2 + 1;
    let with_room =
        || members.iter().filter(|member| !is_near_full(member.capacity_bytes, member.free_bytes));
    let least =
        with_room().map(|member| member.free_bytes).min().filter(|_| with_room().count() >= majority)?;
    let all = with_room().count() == members.len();
    let fit = match (with_room().filter(|member| member.online).count() >= majority, all) {
        (true, true) => Fit::Whole,
        (true, false) => Fit::Partly,
        (false, true) => Fit::Waiting,
        (false, false) => Fit::PartlyWaiting,
    };
    Some((fit, least))
}

/// Those that fit best, in their order.
pub fn best<T>(candidates: impl IntoIterator<Item = (Fit, T)>) -> Vec<T> {
    let mut found: Vec<(Fit, T)> = candidates.into_iter().collect();
    let best = found.iter().map(|(fit, _)| *fit).max();
    found.retain(|(fit, _)| Some(*fit) == best);
    found.into_iter().map(|(_, candidate)| candidate).collect()
}

#[cfg(test)]
mod tests {
    use super::{Fit, Member, best, fit, is_near_full};
    use evolute_protocol::geometry::{GIB, TIB};
    use proptest::prelude::{ProptestConfig, Strategy, any, prop_assert, prop_assert_eq, proptest};

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

    fn member(free_gib: u64, online: bool) -> Member {
        Member { capacity_bytes: TIB, free_bytes: free_gib * GIB, online }
    }

    #[test]
    fn one_member_that_is_near_full_or_away_does_not_count() {
        for (members, expected) in [
            ([(90, true), (80, true), (70, true)], Some((Fit::Whole, 70))),
            ([(90, true), (80, true), (70, false)], Some((Fit::Whole, 70))),
            ([(90, true), (80, true), (1, true)], Some((Fit::Partly, 80))),
            ([(90, true), (80, true), (1, false)], Some((Fit::Partly, 80))),
            ([(90, true), (80, false), (70, false)], Some((Fit::Waiting, 70))),
            ([(90, true), (80, false), (1, true)], Some((Fit::PartlyWaiting, 80))),
            ([(90, true), (1, true), (1, true)], None),
            ([(1, true), (1, true), (1, true)], None),
        ] {
            let found = fit(&members.map(|(free, online)| member(free, online)));
            assert_eq!(found, expected.map(|(fit, free)| (fit, free * GIB)), "{members:?}");
        }
    }

    fn members() -> impl Strategy<Value = Vec<Member>> {
        let member = (0_u64..40, any::<bool>()).prop_map(|(free, online)| member(free, online));
        proptest::collection::vec(member, 3)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Nothing is refused while a majority has room, and more room or one more that is there is never worse.
        #[test]
        fn more_room_is_never_worse(mut members in members(), which in 0_usize..3) {
            let roomy = members.iter().filter(|m| m.free_bytes >= 16 * GIB).count();
            let before = fit(&members);
            prop_assert_eq!(before.is_some(), roomy >= 2);
            let there = members.iter().filter(|m| m.free_bytes >= 16 * GIB && m.online).count();
            prop_assert_eq!(before.is_some_and(|(fit, _)| fit >= Fit::Partly), there >= 2);
            (members[which].free_bytes, members[which].online) = (TIB, true);
            prop_assert!(fit(&members).map(|(fit, _)| fit) >= before.map(|(fit, _)| fit));
        }

        /// Something is chosen if anything fits, and never beside something better.
        #[test]
        fn the_best_are_chosen_and_all_of_them(copysets in proptest::collection::vec(members(), 0..12)) {
            let fits: Vec<_> = copysets.iter().map(|members| fit(members).map(|(fit, _)| fit)).collect();
            let candidates = fits.iter().enumerate().filter_map(|(n, fit)| Some(((*fit)?, n)));
            let chosen = best(candidates);
            let most = fits.iter().flatten().max();
            let expected: Vec<_> =
                (0..fits.len()).filter(|n| fits[*n].is_some() && fits[*n].as_ref() == most).collect();
            prop_assert_eq!(chosen, expected);
        }
    }
}
