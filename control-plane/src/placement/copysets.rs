//! Chunkservers → copysets: three members in three zones.
//!
//! One copyset after the other, each out of the least loaded chunkservers. Load is replicas by capacity: a disk of
//! twice the size gets twice the replicas, so that it fills at the same pace. Among equally loaded ones those are
//! taken that have met the members chosen so far least often: whoever loses a disk then has many partners to repair from.

use std::collections::{BTreeMap, VecDeque};

use evolute_protocol::id::ChunkserverId;

use crate::config::Limits;
use crate::state::copyset::REPLICAS;

/// A chunkserver that can get replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub id: ChunkserverId,
    pub zone: String,
    pub capacity_bytes: u64,
}

/// Who is in a copyset, and who leads it first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Membership {
    pub members: [ChunkserverId; REPLICAS],
    pub first_leader: ChunkserverId,
}

/// How many copysets a pool should have: twice as many as chunkservers, so that each leads about two and repair has
/// several partners; at least as many as a volume is wide; within what the operator allows.
pub fn wanted(chunkservers: usize, limits: &Limits) -> usize {
    limits.volume_width.max(2 * chunkservers).max(limits.copysets_min).min(limits.copysets_max)
}

/// Makes `count` more copysets of `hosts`, beside those that exist. None when there are fewer than three zones.
pub fn make(hosts: &[Host], existing: &[Membership], count: usize) -> Vec<Membership> {
    let mut tally = Tally::default();
    for membership in existing {
        tally.add(membership);
    }
    let mut made = Vec::with_capacity(count);
    while made.len() < count {
        let Some(membership) = tally.next(hosts) else { break };
        tally.add(&membership);
        made.push(membership);
    }
    while tally.pass_a_lead_on(hosts, &mut made) {}
    made
}

#[derive(Default)]
struct Tally {
    replicas: BTreeMap<ChunkserverId, u64>,
    leads: BTreeMap<ChunkserverId, u64>,
    /// How often two are members of the same copyset; the lower id first.
    met: BTreeMap<(ChunkserverId, ChunkserverId), u64>,
}

impl Tally {
    fn add(&mut self, membership: &Membership) {
        for (i, &one) in membership.members.iter().enumerate() {
            *self.replicas.entry(one).or_default() += 1;
            for &other in &membership.members[i + 1..] {
                *self.met.entry((one.min(other), one.max(other))).or_default() += 1;
            }
        }
        *self.leads.entry(membership.first_leader).or_default() += 1;
    }

    fn next(&self, hosts: &[Host]) -> Option<Membership> {
        let mut chosen: Vec<&Host> = Vec::with_capacity(REPLICAS);
        while chosen.len() < REPLICAS {
            let free_zone = |host: &&Host| chosen.iter().all(|other| other.zone != host.zone);
            let worth = |host: &&Host| {
                let met: u64 = chosen.iter().map(|other| self.times_met(host.id, other.id)).sum();
                (self.load(host), self.zone_load(&host.zone, hosts), met, host.id)
            };
            chosen.push(hosts.iter().filter(free_zone).min_by_key(worth)?);
        }
        let members = [chosen[0].id, chosen[1].id, chosen[2].id];
        // Who leads least for what it is; among equals the one that has fewest other chances.
        let lead = |host: &&&Host| {
            let leads = self.leads.get(&host.id).copied().unwrap_or(0);
            let replicas = self.replicas.get(&host.id).copied().unwrap_or(0);
            (per_capacity(leads, host.capacity_bytes), leads, replicas, host.id)
        };
        let first_leader = chosen.iter().min_by_key(lead)?.id;
        Some(Membership { members, first_leader })
    }

    /// Chosen one by one, first leaders end up uneven by two now and then. Finds a chunkserver that leads too much and
    /// one that leads too little, connected by copysets of `made` whose lead can be handed on, and hands it on.
    fn pass_a_lead_on(&mut self, hosts: &[Host], made: &mut [Membership]) -> bool {
        let capacity: BTreeMap<_, _> = hosts.iter().map(|host| (host.id, host.capacity_bytes)).collect();
        for from in hosts.iter().map(|host| host.id) {
            let Some(less) = self.leads.get(&from).copied().and_then(|leads| leads.checked_sub(1)) else {
                continue;
            };
            let now = per_capacity(less, capacity[&from]);
            // Breadth first: by which copyset each one was reached.
            let mut reached_by: BTreeMap<ChunkserverId, usize> = BTreeMap::new();
            let mut queue = VecDeque::from([from]);
            while let Some(at) = queue.pop_front() {
                let leads = self.leads.get(&at).copied().unwrap_or(0);
                if at != from && per_capacity(leads, capacity[&at]) < now {
                    self.hand_back(from, at, &reached_by, made);
                    return true;
                }
                for (i, membership) in made.iter().enumerate().filter(|(_, m)| m.first_leader == at) {
                    for &next in membership.members.iter().filter(|&&next| next != from) {
                        reached_by.entry(next).or_insert_with(|| {
                            queue.push_back(next);
                            i
                        });
                    }
                }
            }
        }
        false
    }

    fn hand_back(
        &mut self,
        from: ChunkserverId,
        to: ChunkserverId,
        reached_by: &BTreeMap<ChunkserverId, usize>,
        made: &mut [Membership],
    ) {
        *self.leads.entry(from).or_default() -= 1;
        *self.leads.entry(to).or_default() += 1;
        let mut at = to;
        while at != from {
            at = std::mem::replace(&mut made[reached_by[&at]].first_leader, at);
        }
    }

    fn load(&self, host: &Host) -> u128 {
        per_capacity(self.replicas.get(&host.id).copied().unwrap_or(0), host.capacity_bytes)
    }

    /// Breaks ties, so that the last places of a round are not all left over in one zone, where one copyset can take
    /// only one of them.
    fn zone_load(&self, zone: &str, hosts: &[Host]) -> u128 {
        let inside = || hosts.iter().filter(|host| host.zone == zone);
        let replicas = inside().map(|host| self.replicas.get(&host.id).copied().unwrap_or(0)).sum();
        per_capacity(replicas, inside().map(|host| host.capacity_bytes).fold(0, u64::saturating_add))
    }

    fn times_met(&self, one: ChunkserverId, other: ChunkserverId) -> u64 {
        self.met.get(&(one.min(other), one.max(other))).copied().unwrap_or(0)
    }
}

/// What one more would make of it, by capacity. A chunkserver that names no capacity counts as a small one.
fn per_capacity(count: u64, capacity_bytes: u64) -> u128 {
    (u128::from(count + 1) << 64) / u128::from(capacity_bytes.max(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::{Host, Membership, make, wanted};
    use crate::config::Limits;
    use evolute_protocol::geometry::TIB;
    use evolute_protocol::id::ChunkserverId;
    use proptest::prelude::{ProptestConfig, Strategy, prop_assert, prop_assert_eq, proptest};
    use std::collections::{BTreeMap, BTreeSet};

    fn hosts(zones: &[usize], capacity: impl Fn(u32) -> u64) -> Vec<Host> {
        let mut id = 0;
        let mut hosts = Vec::new();
        for (zone, &count) in zones.iter().enumerate() {
            for _ in 0..count {
                id += 1;
                let capacity_bytes = capacity(id);
                hosts.push(Host { id: ChunkserverId(id), zone: format!("z{zone}"), capacity_bytes });
            }
        }
        hosts
    }

    fn count(
        made: &[Membership],
        of: impl Fn(&Membership, ChunkserverId) -> bool,
        hosts: &[Host],
    ) -> Vec<usize> {
        hosts.iter().map(|host| made.iter().filter(|m| of(m, host.id)).count()).collect()
    }
    fn member(membership: &Membership, id: ChunkserverId) -> bool {
        membership.members.contains(&id)
    }
    fn leader(membership: &Membership, id: ChunkserverId) -> bool {
        membership.first_leader == id
    }
    fn range(counts: &[usize]) -> usize {
        counts.iter().max().unwrap() - counts.iter().min().unwrap()
    }

    #[test]
    fn three_chunkservers_share_six_copysets_evenly() {
        let hosts = hosts(&[1, 1, 1], |_| TIB);
        let made = make(&hosts, &[], wanted(3, &Limits::default()));
        assert_eq!(made.len(), 6);
        assert_eq!(count(&made, member, &hosts), [6, 6, 6]);
        assert_eq!(count(&made, leader, &hosts), [2, 2, 2]);
    }

    #[test]
    fn two_zones_are_not_enough() {
        assert_eq!(make(&hosts(&[5, 5], |_| TIB), &[], 6), []);
        assert_eq!(make(&[], &[], 6), []);
    }

    #[test]
    fn the_pool_grows_with_its_chunkservers_between_its_bounds() {
        let limits = Limits { copysets_max: 128, ..Limits::default() };
        assert_eq!([3, 4, 100].map(|n| wanted(n, &limits)), [6, 8, 128]);
        let limits = Limits { copysets_min: 20, ..limits };
        assert_eq!([3, 4, 100].map(|n| wanted(n, &limits)), [20, 20, 128]);
    }

    #[test]
    fn a_new_chunkserver_is_used_by_the_next_copysets() {
        let old = hosts(&[1, 1, 1], |_| TIB);
        let before = make(&old, &[], 6);
        let grown = hosts(&[1, 1, 1, 1], |_| TIB);
        let added = make(&grown, &before, wanted(4, &Limits::default()) - 6);
        assert_eq!(added.len(), 2);
        assert!(added.iter().all(|m| member(m, ChunkserverId(4)) && leader(m, ChunkserverId(4))));
    }

    #[test]
    fn twice_the_capacity_gets_twice_the_replicas() {
        // In each zone a small and a large one, so that zones do not stand in the way.
        let hosts = hosts(&[2, 2, 2], |id| if id % 2 == 0 { 2 * TIB } else { TIB });
        let replicas = count(&make(&hosts, &[], 30), member, &hosts);
        assert_eq!(replicas, [10, 20, 10, 20, 10, 20]);
    }

    fn any_hosts() -> impl Strategy<Value = Vec<Host>> {
        let zones = proptest::collection::vec(1_usize..6, 1..7);
        let sizes = proptest::collection::vec(0_u64..8, 40);
        (zones, sizes).prop_map(|(zones, sizes)| hosts(&zones, |id| sizes[id as usize % 40] * TIB / 2))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Whatever fails at once in one zone leaves two of three replicas.
        #[test]
        fn no_two_members_are_in_one_zone(hosts in any_hosts(), first in 0_usize..20, then in 0_usize..20) {
            let zone: BTreeMap<_, _> = hosts.iter().map(|h| (h.id, h.zone.clone())).collect();
            let zones = zone.values().collect::<BTreeSet<_>>().len();
            let before = make(&hosts, &[], first);
            let added = make(&hosts, &before, then);
            prop_assert_eq!(before.len() + added.len(), if zones < 3 { 0 } else { first + then });
            for m in before.iter().chain(&added) {
                prop_assert_eq!(m.members.iter().map(|id| &zone[id]).collect::<BTreeSet<_>>().len(), 3);
                prop_assert!(m.members.contains(&m.first_leader));
            }
        }

        /// Equal disks in equal zones: nobody has more to do than anybody else.
        #[test]
        fn equal_chunkservers_get_equal_shares(zones in 3_usize..7, per_zone in 1_usize..6, rounds in 1_usize..5) {
            let hosts = hosts(&vec![per_zone; zones], |_| TIB);
            let made = make(&hosts, &[], rounds * hosts.len());
            let (replicas, leads) = (count(&made, member, &hosts), count(&made, leader, &hosts));
            prop_assert!(range(&replicas) <= 1, "replicas {replicas:?}");
            prop_assert!(range(&leads) <= 1, "leaders {leads:?}");
        }
    }
}
