//! How far the replacements of replicas are, and how long they will take at their pace so far.
//!
//! In memory, on the leader: a new leader measures the pace anew.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use evolute_protocol::id::{CopysetId, ReplicaId};
use evolute_protocol::rpc::{RepairReason, RepairStage, RepairStatus};

use super::group::{CAUGHT_UP_WITHIN, Group};
use super::reports::Reports;
use crate::state::{Copyset, Pending, Reason, State};

/// What was seen of each new replica first.
#[derive(Debug, Default)]
pub struct Progress {
    of: BTreeMap<ReplicaId, Begun>,
}

#[derive(Debug, Clone, Copy)]
struct Begun {
    at: Instant,
    /// When it began to fill, and what was missing then.
    filling: Option<(Instant, Left)>,
}

/// What the new replica lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Left {
    entries: u64,
    bytes: u64,
    bytes_total: u64,
}

impl Progress {
    /// Looks at what is under way. To be called whenever reports or the state changed.
    pub fn look(&mut self, state: &State, reports: &Reports, now: Instant) {
        self.of.retain(|id, _| pendings(state).any(|(_, _, pending)| pending.new.id == *id));
        for (id, copyset, pending) in pendings(state) {
            let begun = self.of.entry(pending.new.id).or_insert(Begun { at: now, filling: None });
            let (stage, left) = stage(id, copyset, &pending, reports, now);
            if begun.filling.is_none() && stage == RepairStage::CatchingUp {
                begun.filling = Some((now, left));
            }
        }
    }

    pub fn status(&self, state: &State, reports: &Reports, now: Instant) -> Vec<RepairStatus> {
        pendings(state)
            .map(|(id, copyset, pending)| {
                let (stage, left) = stage(id, copyset, &pending, reports, now);
                let begun = self.of.get(&pending.new.id);
                let since = |at: Instant| now.saturating_duration_since(at);
                let eta =
                    begun.and_then(|begun| begun.filling).and_then(|(at, first)| eta(first, left, since(at)));
                let on = |replica| copyset.replica(replica).map_or(0, |replica| replica.chunkserver.0);
                RepairStatus {
                    copyset: id.0,
                    old_replica: pending.old.0,
                    old_chunkserver: on(pending.old),
                    new_replica: pending.new.id.0,
                    new_chunkserver: pending.new.chunkserver.0,
                    reason: reason(pending.reason).into(),
                    stage: stage.into(),
                    entries_left: left.entries,
                    bytes_total: left.bytes_total,
                    bytes_left: left.bytes,
                    running_ms: begun.map_or(0, |begun| milliseconds(since(begun.at))),
                    eta_ms: eta.filter(|_| stage == RepairStage::CatchingUp).map_or(0, milliseconds),
                }
            })
            .collect()
    }
}

fn pendings(state: &State) -> impl Iterator<Item = (CopysetId, &Copyset, Pending)> {
    let all = state.copysets().iter().filter_map(|(&id, copyset)| Some((id, copyset, copyset.pending?)));
    all.filter(|(_, _, pending)| !pending.over)
}

fn stage(
    id: CopysetId,
    copyset: &Copyset,
    pending: &Pending,
    reports: &Reports,
    now: Instant,
) -> (RepairStage, Left) {
    let new = pending.new;
    let group = Group::of(id, copyset, reports, now);
    let here = reports.last(new.chunkserver).and_then(|report| report.replicas.get(&id));
    let here = here.filter(|here| here.replica == new.id.0);
    let bytes_total = group.map_or(0, |group| group.says.data_bytes);
    let last = group.map_or(0, |group| group.says.last_index);
    let left = Left {
        entries: group.map_or(0, |group| group.behind(new.id).unwrap_or(last)),
        bytes: bytes_total.saturating_sub(here.map_or(0, |here| here.data_bytes)),
        bytes_total,
    };
    let stage = match (group, here) {
        (_, None) => RepairStage::Creating,
        (Some(group), _) if group.is_voter(new.id) || group.has_caught_up(new.id) => RepairStage::Joining,
        _ => RepairStage::CatchingUp,
    };
    (stage, left)
}

/// By bytes while there are bytes to copy, by entries after that.
fn eta(first: Left, left: Left, elapsed: Duration) -> Option<Duration> {
    let by = |first: u64, left: u64| {
        let done = first.checked_sub(left).filter(|done| *done > 0)?;
        let seconds = elapsed.as_secs_f64() * as_f64(left) / as_f64(done);
        Duration::try_from_secs_f64(seconds).ok()
    };
    if left.bytes > 0 {
        by(first.bytes, left.bytes)
    } else if left.entries > CAUGHT_UP_WITHIN {
        by(first.entries, left.entries)
    } else {
        None
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn as_f64(n: u64) -> f64 {
    n as f64
}

fn reason(reason: Reason) -> RepairReason {
    match reason {
        Reason::Silent => RepairReason::Silent,
        Reason::Lost => RepairReason::Lost,
        Reason::Retiring => RepairReason::Retiring,
        Reason::Balance => RepairReason::Balance,
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{Left, Progress, eta};
    use crate::scheduler::groups::Groups;
    use evolute_protocol::rpc::{RepairReason, RepairStage, RepairStatus};
    use std::time::Duration;

    #[test]
    fn the_time_left_is_what_is_missing_at_the_pace_so_far() {
        let left = |bytes, entries| Left { entries, bytes, bytes_total: 1000 };
        let (minute, seconds) = (Duration::from_secs(60), |n| Some(Duration::from_secs(n)));
        for (now, expected) in [
            (left(750, 9000), seconds(180)),
            (left(1000, 9000), None), // nothing has come
            (left(2000, 9000), None), // more has been written than has come
            (left(0, 4500), seconds(60)),
            (left(0, 256), None), // it is there
        ] {
            assert_eq!(eta(left(1000, 9000), now, minute), expected, "{now:?}");
        }
    }

    #[test]
    fn a_replacement_shows_where_it_stands() {
        let mut groups = Groups::new(&["z1", "z2", "z3", "z3"], 3);
        groups.settle();
        groups.limits.repairs_max = 1;
        groups.retire(3, true);
        let mut progress = Progress::default();
        let mut stages: Vec<(RepairStage, RepairStatus)> = Vec::new();
        for _ in 0..12 {
            groups.step();
            let w = &groups.world;
            progress.look(&w.state, &w.reports, w.now);
            let shown = progress.status(&w.state, &w.reports, w.now);
            let first = stages.first().map(|(_, first)| first).or(shown.first()).map_or(0, |s| s.new_replica);
            stages.extend(shown.into_iter().filter(|s| s.new_replica == first).map(|s| (s.stage(), s)));
        }
        let order: Vec<_> = stages.iter().map(|(stage, _)| *stage).collect();
        assert!(order.is_sorted() && order.contains(&RepairStage::Creating), "{order:?}");
        assert!(order.contains(&RepairStage::Joining), "{order:?}");
        let (_, first) = &stages[0];
        assert_eq!(
            (first.reason(), first.old_chunkserver, first.new_chunkserver),
            (RepairReason::Retiring, 3, 4)
        );
        let filling: Vec<_> = stages.iter().filter(|(s, _)| *s == RepairStage::CatchingUp).collect();
        let left: Vec<_> = filling.iter().map(|(_, s)| s.bytes_left).collect();
        assert!(left.len() > 2 && left.is_sorted_by(|a, b| a > b), "{left:?}");
        let (_, last) = filling.last().expect("several");
        assert!(last.eta_ms > 0 && last.bytes_total > last.bytes_left && last.running_ms > 0, "{last:?}");
    }
}
