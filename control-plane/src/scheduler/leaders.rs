//! Leaders spread evenly: after a chunkserver was away, the others lead its copysets; it gets its share back.
//!
//! A handover costs the copyset's writers a moment, so it happens only when it moves two leaders' difference, to a
//! replica that has caught up, on a chunkserver that has been back for a while; one per copyset at a time, few at once.

use std::collections::BTreeMap;
use std::time::Instant;

use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId};

use crate::heartbeat::group::CAUGHT_UP_WITHIN;
use crate::heartbeat::orders::Transfers;
use crate::heartbeat::reports::Reports;
use crate::state::State;

/// Handovers under way at once: each is a pause of some ms for one copyset of somebody's volume.
pub const HANDOVERS_MAX: usize = 2;
/// Report intervals for which a chunkserver must have been connected before it gets leaders: one that keeps
/// crashing should not take leaders down with it each time.
const SETTLED_INTERVALS: u32 = 2;
/// Report intervals for which a copyset is left alone after a handover, whether it worked or not.
pub const LEFT_ALONE_INTERVALS: u32 = 3;
/// A difference of one is as even as it gets.
const WORTH_IT: usize = 2;

/// A leadership to hand on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handover {
    pub copyset: CopysetId,
    pub from: ChunkserverId,
    pub to: ReplicaId,
    pub to_chunkserver: ChunkserverId,
}

pub fn plan(state: &State, reports: &Reports, transfers: &Transfers, now: Instant) -> Vec<Handover> {
    let settled = reports.interval() * SETTLED_INTERVALS;
    let able: Vec<ChunkserverId> = state
        .chunkservers()
        .iter()
        // A retiring one would only have to hand them on again.
        .filter(|(_, chunkserver)| !chunkserver.retiring)
        .map(|(&id, _)| id)
        .filter(|&id| {
            reports.online(id, now).is_some_and(|report| report.trouble.is_empty())
                && reports.connected_for(id, now).is_some_and(|connected| connected >= settled)
        })
        .collect();
    let mut leads: BTreeMap<ChunkserverId, usize> = BTreeMap::new();
    let mut led: Vec<(CopysetId, ChunkserverId)> = Vec::new();
    for (&id, copyset) in state.copysets() {
        let members = copyset.everyone().map(|replica| replica.chunkserver);
        // Only what a leader says of itself counts here.
        if let Some(leader) = reports.leader(id, members, now).filter(|leader| leader.itself) {
            *leads.entry(leader.chunkserver).or_default() += 1;
            led.push((id, leader.chunkserver));
        }
    }
    // What was ordered and is not seen yet counts as done.
    let mut under_way = 0;
    for (id, transfer) in transfers {
        if led.contains(&(*id, transfer.from)) && transfer.is_waiting(now) {
            under_way += 1;
            *leads.entry(transfer.from).or_default() -= 1;
            *leads.entry(transfer.to_chunkserver).or_default() += 1;
        }
    }
    let mut handovers = Vec::new();
    // Nor is a copyset disturbed whose members are changing.
    led.retain(|(id, _)| !transfers.contains_key(id) && state.copysets()[id].pending.is_none());
    while under_way + handovers.len() < HANDOVERS_MAX {
        let count = |id: ChunkserverId| leads.get(&id).copied().unwrap_or(0);
        let possible = led.iter().flat_map(|&(id, from)| {
            let copyset = &state.copysets()[&id];
            copyset.replicas.iter().filter_map(move |replica| {
                let to = replica.chunkserver;
                let gain = count(from).checked_sub(count(to)).filter(|&gain| gain >= WORTH_IT)?;
                let home = replica.id == copyset.first_leader;
                let handover = Handover { copyset: id, from, to: replica.id, to_chunkserver: to };
                Some(((gain, home, std::cmp::Reverse(id)), handover))
            })
        });
        let best = possible
            .filter(|(_, handover)| able.contains(&handover.to_chunkserver) && caught_up(reports, handover))
            .max_by_key(|(worth, _)| *worth);
        let Some((_, handover)) = best else { break };
        *leads.entry(handover.from).or_default() -= 1;
        *leads.entry(handover.to_chunkserver).or_default() += 1;
        led.retain(|(id, _)| *id != handover.copyset);
        handovers.push(handover);
    }
    handovers
}

/// By what the leader last said of its followers.
fn caught_up(reports: &Reports, handover: &Handover) -> bool {
    let leader = reports.last(handover.from).and_then(|report| report.replicas.get(&handover.copyset));
    leader.is_some_and(|leader| {
        let member = leader.members.iter().find(|member| member.replica == handover.to.0);
        member
            .is_some_and(|member| leader.last_index.saturating_sub(member.matched_index) <= CAUGHT_UP_WITHIN)
    })
}

#[cfg(test)]
mod tests {
    use super::{HANDOVERS_MAX, Handover, plan};
    use crate::heartbeat::group::CAUGHT_UP_WITHIN;
    use crate::heartbeat::orders::{Transfer, Transfers};
    use crate::scheduler::world::World;
    use evolute_protocol::id::ChunkserverId;
    use std::collections::BTreeMap;
    use std::time::Duration;

    /// Three chunkservers, six copysets; `leaders[i]` leads the copyset i + 1. All connected for an hour.
    fn led_by(leaders: [u32; 6]) -> World {
        let mut world = World::with_three_chunkservers();
        world.lead(&leaders);
        world.pass(Duration::from_secs(3600));
        world.lead(&leaders);
        world
    }

    fn counts(leaders: &[u32]) -> BTreeMap<u32, usize> {
        let mut counts = BTreeMap::new();
        leaders.iter().for_each(|leader| *counts.entry(*leader).or_default() += 1);
        counts
    }

    #[test]
    fn uneven_leaders_are_spread_and_then_left_alone() {
        for mut leaders in [[1; 6], [1, 1, 1, 1, 1, 2], [3, 3, 3, 1, 1, 1], [2, 2, 2, 2, 3, 3]] {
            let mut world = led_by(leaders);
            let mut steps = 0;
            loop {
                let handovers = plan(&world.state, &world.reports, &Transfers::new(), world.now);
                assert!(handovers.len() <= HANDOVERS_MAX);
                if handovers.is_empty() {
                    break;
                }
                for handover in handovers {
                    leaders[handover.copyset.0 as usize - 1] = handover.to_chunkserver.0;
                }
                world.lead(&leaders);
                steps += 1;
                assert!(steps < 6, "{leaders:?} goes round in circles");
            }
            assert_eq!(counts(&leaders).into_values().collect::<Vec<_>>(), [2, 2, 2], "{leaders:?}");
        }
    }

    /// Seven leaders on three chunkservers: 3, 2, 2 is as even as it gets, and moving one would only move the three.
    #[test]
    fn nothing_moves_for_a_difference_of_one() {
        let mut world = led_by([1, 1, 2, 2, 3, 3]);
        world.add_copyset([1, 2, 3]);
        for (leaders, moves) in
            [([1, 1, 2, 2, 3, 3, 1], 0), ([1, 1, 2, 2, 3, 3, 3], 0), ([1, 1, 1, 2, 2, 2, 2], 2)]
        {
            world.lead(&leaders);
            let planned = plan(&world.state, &world.reports, &Transfers::new(), world.now);
            assert_eq!(planned.len(), moves, "{leaders:?} {planned:?}");
        }
    }

    #[test]
    fn a_chunkserver_that_just_came_back_waits() {
        let mut world = led_by([1, 1, 1, 2, 2, 2]);
        world.reconnect(ChunkserverId(3));
        world.lead(&[1, 1, 1, 2, 2, 2]);
        assert_eq!(plan(&world.state, &world.reports, &Transfers::new(), world.now), []);
        world.pass(Duration::from_secs(20));
        world.lead(&[1, 1, 1, 2, 2, 2]);
        assert_eq!(plan(&world.state, &world.reports, &Transfers::new(), world.now).len(), 2);
    }

    #[test]
    fn who_lags_or_is_in_trouble_gets_nothing() {
        let mut world = led_by([1, 1, 1, 2, 2, 2]);
        world.behind.insert(ChunkserverId(3), CAUGHT_UP_WITHIN + 1);
        world.lead(&[1, 1, 1, 2, 2, 2]);
        assert_eq!(plan(&world.state, &world.reports, &Transfers::new(), world.now), []);
        world.behind.insert(ChunkserverId(3), CAUGHT_UP_WITHIN);
        world.trouble.insert(ChunkserverId(3), "its disk answers slowly".to_owned());
        world.lead(&[1, 1, 1, 2, 2, 2]);
        assert_eq!(plan(&world.state, &world.reports, &Transfers::new(), world.now), []);
        world.trouble.clear();
        world.lead(&[1, 1, 1, 2, 2, 2]);
        assert_eq!(plan(&world.state, &world.reports, &Transfers::new(), world.now).len(), 2);
    }

    #[test]
    fn one_handover_per_copyset_at_a_time() {
        let world = led_by([1, 1, 1, 1, 1, 1]);
        let mut transfers = Transfers::new();
        for Handover { copyset, from, to, to_chunkserver } in
            plan(&world.state, &world.reports, &transfers, world.now)
        {
            transfers.insert(copyset, Transfer { from, to, to_chunkserver, since: world.now });
        }
        assert_eq!(transfers.len(), 2);
        assert_eq!(plan(&world.state, &world.reports, &transfers, world.now), [], "two are under way");
        // They came to nothing: others are tried, the two are left alone.
        let later = world.now + Duration::from_secs(9);
        let next = plan(&world.state, &world.reports, &transfers, later);
        assert_eq!(next.len(), 2);
        assert!(next.iter().all(|handover| !transfers.contains_key(&handover.copyset)));
    }
}
