//! Why the replicas of a chunkserver are not being replaced, though they should be: what an operator can change.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use evolute_protocol::id::{ChunkserverId, CopysetId};

use super::repair::{self, Hindrance};
use crate::config::Limits;
use crate::heartbeat::reports::Reports;
use crate::state::State;

/// Copysets named in one sentence.
const NAMED_MAX: usize = 3;

/// One sentence for each thing that stands in the way, with the copysets that it concerns. Empty: nothing does.
pub fn of(id: ChunkserverId, state: &State, reports: &Reports, limits: &Limits, now: Instant) -> Vec<String> {
    let mut found: BTreeMap<Hindrance, BTreeSet<CopysetId>> = BTreeMap::new();
    let mine = state.copysets().iter().filter_map(|(&copyset, record)| {
        let replica = record.replica_on(id)?;
        let moving = record.pending.is_some_and(|pending| !pending.over && pending.old == replica.id);
        (!moving).then_some((copyset, record, replica))
    });
    for (copyset, record, replica) in mine {
        if let Some(hindrance) = repair::hindrance(copyset, record, replica, state, reports, limits, now) {
            found.entry(hindrance).or_default().insert(copyset);
        }
    }
    found.iter().map(|(hindrance, copysets)| sentence(id, hindrance, copysets)).collect()
}

fn sentence(id: ChunkserverId, hindrance: &Hindrance, copysets: &BTreeSet<CopysetId>) -> String {
    let named: Vec<_> = copysets.iter().take(NAMED_MAX).map(ToString::to_string).collect();
    let mut copysets_named = named.join(", ");
    if copysets.len() > NAMED_MAX {
        copysets_named = format!("{copysets_named} and {} more", copysets.len() - NAMED_MAX);
    }
    let cannot = format!("the replicas of {copysets_named} on {id} cannot be made anew elsewhere");
    match hindrance {
        Hindrance::SwitchedOff => format!("{cannot}: repair is switched off (--repairs-max 0)"),
        Hindrance::NoMajority => {
            format!("{cannot} until two others of each report and one of them leads")
        }
        Hindrance::Unsettled { fits, after_s } => {
            format!("{cannot} yet: {fits} fits once it has been connected for {after_s} s")
        }
        Hindrance::NoPlace { zones } => {
            format!(
                "{cannot}: a chunkserver outside of {} is needed that reports, has room and is not in trouble",
                zones.iter().map(|zone| format!("zone {zone}")).collect::<Vec<_>>().join(" and ")
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::of;
    use crate::scheduler::groups::Groups;
    use evolute_protocol::id::ChunkserverId;

    fn obstacles(groups: &Groups, id: u32) -> Vec<String> {
        let w = &groups.world;
        of(ChunkserverId(id), &w.state, &w.reports, &groups.limits, w.now)
    }

    #[test]
    fn what_stands_in_the_way_is_named() {
        let mut groups = Groups::new(&["z1", "z2", "z3"], 3);
        groups.settle();
        assert_eq!(
            obstacles(&groups, 3),
            [
                "the replicas of copyset-1, copyset-2, copyset-3 and 13 more on chunkserver-3 cannot be made anew \
              elsewhere: a chunkserver outside of zone z1 and zone z2 is needed that reports, has room and is not in trouble"
            ]
        );
        groups.join("z3");
        assert_eq!(
            obstacles(&groups, 3),
            [
                "the replicas of copyset-1, copyset-2, copyset-3 and 13 more on chunkserver-3 cannot be made anew \
              elsewhere yet: chunkserver-4 fits once it has been connected for 20 s"
            ]
        );
        groups.steps(3);
        assert_eq!(obstacles(&groups, 3), [""; 0]);
        groups.limits.repairs_max = 0;
        assert!(obstacles(&groups, 3)[0].ends_with("repair is switched off (--repairs-max 0)"));
        groups.limits.repairs_max = 16;
        groups.kill(1);
        groups.kill(2);
        groups.steps(1);
        assert!(obstacles(&groups, 3)[0].ends_with("until two others of each report and one of them leads"));
    }
}
