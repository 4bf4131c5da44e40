//! Copysets where there are too few.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::config::Limits;
use crate::heartbeat::reports::Reports;
use crate::placement::copysets::{Host, Membership, make, wanted};
use crate::state::command::{CreateCopysets, NewCopyset};
use crate::state::copyset::REPLICAS;
use crate::state::topology::DEFAULT_POOL;
use crate::state::{Command, State};

/// More copysets for the pool, as soon as three zones have a chunkserver that reports. Of registered ones that never
/// came back (a process that died before it wrote down its id) nothing is expected.
pub fn plan(state: &State, reports: &Reports, limits: &Limits, now: Instant) -> Option<Command> {
    let pool = DEFAULT_POOL;
    let hosts: Vec<Host> = state
        .chunkservers()
        .iter()
        .filter(|(id, chunkserver)| {
            // Not on one whose stream just ended: it may be reconnecting, or dead.
            let there = reports.is_online(**id, now) && reports.connected_for(**id, now).is_some();
            chunkserver.pool == pool && !chunkserver.retiring && there
        })
        .map(|(&id, chunkserver)| Host {
            id,
            zone: chunkserver.zone.clone(),
            capacity_bytes: chunkserver.capacity_bytes,
        })
        .collect();
    let in_pool = || state.copysets().values().filter(|copyset| copyset.pool == pool);
    let used = in_pool().flat_map(|copyset| copyset.replicas.iter().map(|replica| replica.chunkserver));
    let chunkservers: BTreeSet<_> = used.chain(hosts.iter().map(|host| host.id)).collect();
    let missing = wanted(chunkservers.len(), limits).checked_sub(in_pool().count())?;
    let existing: Vec<Membership> = in_pool()
        .filter(|copyset| copyset.replicas.len() == REPLICAS)
        .filter_map(|copyset| {
            let members = [0, 1, 2].map(|i| copyset.replicas[i].chunkserver);
            Some(Membership { members, first_leader: copyset.first_leader_chunkserver()? })
        })
        .collect();
    let copysets: Vec<NewCopyset> = make(&hosts, &existing, missing)
        .into_iter()
        .map(|membership| NewCopyset {
            chunkservers: membership.members.map(|id| id.0).to_vec(),
            first_leader: membership.first_leader.0,
        })
        .collect();
    let command = CreateCopysets { pool: pool.to_owned(), seen: state.copysets_given(), copysets };
    (!command.copysets.is_empty()).then_some(Command::CreateCopysets(command))
}

#[cfg(test)]
mod tests {
    use super::plan;
    use crate::config::Limits;
    use crate::scheduler::world::World;
    use crate::state::Command;

    #[test]
    fn copysets_come_with_the_third_zone() {
        let limits = Limits::default();
        let mut world = World::new();
        for (zone, wanted) in [("z1", 0), ("z2", 0), ("z2", 0), ("z3", 8)] {
            let id = world.register(zone);
            assert_eq!(
                plan(&world.state, &world.reports, &limits, world.now),
                None,
                "registered is not there"
            );
            world.report(id);
            let planned = plan(&world.state, &world.reports, &limits, world.now);
            let count = match &planned {
                Some(Command::CreateCopysets(command)) => command.copysets.len(),
                _ => 0,
            };
            assert_eq!(count, wanted, "after {zone}");
            if let Some(command) = planned {
                world.apply(&command).expect("what placement decided is allowed");
                world.apply(&command).expect_err("and carried out once");
            }
        }
        assert_eq!(plan(&world.state, &world.reports, &limits, world.now), None, "enough now");
        let id = world.register("z4");
        world.report(id);
        let Some(Command::CreateCopysets(more)) = plan(&world.state, &world.reports, &limits, world.now)
        else {
            panic!("two more for the fifth");
        };
        assert!(more.copysets.len() == 2 && more.copysets.iter().all(|c| c.chunkservers.contains(&id.0)));
    }

    #[test]
    fn the_pool_is_bounded() {
        let limits = Limits { copysets_max: 7, ..Limits::default() };
        let mut world = World::new();
        for zone in ["a", "b", "c", "a", "b", "c"] {
            let id = world.register(zone);
            world.report(id);
        }
        let Some(Command::CreateCopysets(command)) = plan(&world.state, &world.reports, &limits, world.now)
        else {
            panic!("copysets");
        };
        assert_eq!(command.copysets.len(), 7);
    }
}
