//! A copyset's room, as its members report it.

use std::time::Instant;

use super::reports::Reports;
use crate::placement::room::{self, Fit, Member};
use crate::state::{Copyset, State};

/// How well something new would lie in a copyset, and the least free bytes of its members with room. Who has not reported since
/// this MDS leads is taken to be empty: it refuses by itself what it has no room for.
pub fn of(copyset: &Copyset, state: &State, reports: &Reports, now: Instant) -> Option<(Fit, u64)> {
    let member = |replica: &crate::state::Replica| {
        let id = replica.chunkserver;
        let (capacity_bytes, free_bytes) = match reports.last(id) {
            Some(report) => (report.capacity_bytes, report.free_bytes),
            None => {
                let capacity = state.chunkservers().get(&id).map_or(0, |c| c.capacity_bytes);
                (capacity, capacity)
            }
        };
        Member { capacity_bytes, free_bytes, online: reports.is_online(id, now) }
    };
    room::fit(&copyset.replicas.iter().map(member).collect::<Vec<_>>())
}
