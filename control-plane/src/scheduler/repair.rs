//! Replicas that are missing, or should be elsewhere, are replaced: the most endangered copysets first, a few at a time.
//!
//! ```text
//!  a chunkserver silent for `repair_after` ─┐
//!  a replica its chunkserver lost ──────────┼─▶ BeginReplace ─▶ orders ─▶ learner ─▶ voter ─▶ ReplaceDone (confirm)
//!  a chunkserver that is to be empty ───────┤        │
//!  one that has much more than another ─────┘        └─▶ CancelReplace, when the way back is shorter
//! ```
//!
//! What always holds:
//!
//! - Nothing is planned for a copyset without a leader and a majority that is well: it could not be carried out, and the
//!   replicas that are away may be the ones that know.
//! - The old replica is a member until the new one has caught up and votes.
//! - At most [`Limits::repairs_max`] at once, at most [`PER_CHUNKSERVER_MAX`] that a chunkserver fills or is filled by,
//!   at most [`BALANCE_MAX`] that only even things out, and those only while nothing else is to do.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId};

use crate::config::Limits;
use crate::heartbeat::group::Group;
use crate::heartbeat::reports::{Received, Reports};
use crate::placement::room::near_full_below;
use crate::state::command::{BeginReplace, CancelReplace};
use crate::state::copyset::REPLICAS;
use crate::state::{Command, Copyset, Pending, Reason, Replica, State};

/// Replacements that a chunkserver takes part in at once, as the one that is filled or the leader that fills it: both
/// have guests to serve. (Curve: one per target; Ceph: one each way.)
pub const PER_CHUNKSERVER_MAX: usize = 2;
/// Moves that only even things out.
pub const BALANCE_MAX: usize = 1;
/// Report intervals for which a chunkserver must have been connected before it is given replicas, or is believed that it
/// lost one: one that keeps crashing should not be filled again and again.
const SETTLED_INTERVALS: u32 = 2;
/// Report intervals of silence after which another chunkserver is looked for in the place of one that was being filled:
/// longer than a restart takes, shorter than `repair_after`, for the copyset has one replica too few already.
const FILLED_SILENT_INTERVALS: u32 = 6;
/// Free space is compared in sixteenths of the disk: within one, the number of replicas decides.
const FREE_STEPS: u128 = 16;

/// How one member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// Reported, as it should be.
    Well,
    /// Being created for the first time.
    Young,
    /// Its chunkserver does not report, or only just does. It may be back in a moment.
    Away,
    /// Its chunkserver has not reported for longer than is waited for.
    Silent(Duration),
    /// Its chunkserver is there without it, or says that it can never vote again.
    Lost,
}

pub fn plan(state: &State, reports: &Reports, limits: &Limits, now: Instant) -> Vec<Command> {
    let sight = Sight { state, reports, limits, now };
    let mut commands = sight.cancellations();
    // What is being cancelled counts until it is gone.
    let mut work = Work::under_way(&sight);
    let wanted = sight.wanted();
    for want in &wanted {
        if work.all >= limits.repairs_max {
            break;
        }
        if let Some(to) = sight.target(want, &work) {
            commands.push(want.begin(to));
            work.add(want.leader, to, want.bytes);
        }
    }
    if wanted.is_empty() && work.all < limits.repairs_max.min(BALANCE_MAX) && sight.all_well() {
        commands.extend(sight.even_out(&work));
    }
    commands
}

/// How this member is, as far as the reports tell.
pub fn condition(
    id: CopysetId,
    copyset: &Copyset,
    replica: &Replica,
    state: &State,
    reports: &Reports,
    limits: &Limits,
    now: Instant,
) -> Condition {
    let on = replica.chunkserver;
    let Some(report) = reports.online(on, now) else {
        let silent = reports.silent_for(on, now).unwrap_or_else(|| reports.listening_for(now));
        let dead = state.chunkservers().get(&on).is_none_or(|chunkserver| chunkserver.dead);
        return if dead || silent >= limits.repair_after {
            Condition::Silent(silent)
        } else {
            Condition::Away
        };
    };
    let here = report.replicas.get(&id).filter(|here| here.replica == replica.id.0);
    let settled = reports.connected_for(on, now).is_some_and(|c| c >= settled_after(reports));
    match here {
        Some(here) if !here.failed.is_empty() => Condition::Lost,
        Some(_) => {
            let voters = Group::of(id, copyset, reports, now).map(|group| group.voters()).unwrap_or_default();
            let left_out = !voters.is_empty()
                && !voters.contains(&replica.id)
                && voters.iter().all(|voter| copyset.replica(*voter).is_some());
            if left_out { Condition::Lost } else { Condition::Well }
        }
        None if !replica.created => Condition::Young,
        None if settled => Condition::Lost,
        None => Condition::Away,
    }
}

/// Why a replica could not be replaced now, whatever else is under way.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hindrance {
    SwitchedOff,
    NoMajority,
    /// One that could take it has not been there for long enough.
    Unsettled {
        fits: ChunkserverId,
        after_s: u64,
    },
    /// All that could take it are in the zones of the other two.
    NoPlace {
        zones: BTreeSet<String>,
    },
}

pub fn hindrance(
    id: CopysetId,
    copyset: &Copyset,
    old: &Replica,
    state: &State,
    reports: &Reports,
    limits: &Limits,
    now: Instant,
) -> Option<Hindrance> {
    let sight = Sight { state, reports, limits, now };
    if limits.repairs_max == 0 {
        return Some(Hindrance::SwitchedOff);
    }
    let others = copyset.replicas.iter().filter(|replica| replica.id != old.id);
    let well = others.filter(|replica| sight.condition(id, copyset, replica) == Condition::Well).count();
    let Some(group) = sight.group(id, copyset).filter(|_| well > REPLICAS / 2) else {
        return Some(Hindrance::NoMajority);
    };
    let (nothing, taken) = (Work::default(), sight.zones_beside(copyset, old.id));
    let bytes = group.says.data_bytes;
    if sight.able(&copyset.pool, &taken, bytes, &nothing).any(|(other, _)| other != old.chunkserver) {
        return None;
    }
    let fits = |id: &ChunkserverId| {
        let report = sight.reports.online(*id, now).filter(|_| *id != old.chunkserver);
        report.is_some_and(|report| sight.takes(*id, report, &copyset.pool, &taken, bytes, &nothing))
    };
    Some(match state.chunkservers().keys().copied().find(fits) {
        Some(fits) => Hindrance::Unsettled { fits, after_s: settled_after(reports).as_secs().max(1) },
        None => Hindrance::NoPlace { zones: taken.iter().map(|&zone| zone.to_owned()).collect() },
    })
}

/// How long a chunkserver must have been connected before it is given replicas.
fn settled_after(reports: &Reports) -> Duration {
    reports.interval() * SETTLED_INTERVALS
}

/// One replica that should be replaced, and can be.
struct Want<'a> {
    id: CopysetId,
    copyset: &'a Copyset,
    old: Replica,
    reason: Reason,
    leader: ChunkserverId,
    /// Chunk data that has to be copied.
    bytes: u64,
}

impl Want<'_> {
    fn begin(&self, to: ChunkserverId) -> Command {
        Command::BeginReplace(BeginReplace {
            copyset: self.id.0,
            old_replica: self.old.id.0,
            chunkserver: to.0,
            reason: self.reason.into(),
        })
    }
}

/// Replacements that have begun, or are about to.
#[derive(Default)]
struct Work {
    all: usize,
    of: BTreeMap<ChunkserverId, usize>,
    /// Bytes that are still to arrive.
    coming: BTreeMap<ChunkserverId, u64>,
    /// Replicas once everything under way is done.
    replicas: BTreeMap<ChunkserverId, u64>,
}

impl Work {
    fn under_way(sight: &Sight) -> Self {
        let mut work = Self::default();
        for (&id, copyset) in sight.state.copysets() {
            let going = copyset.pending.filter(|pending| !pending.over).map(|pending| pending.old);
            for replica in copyset.replicas.iter().filter(|replica| Some(replica.id) != going) {
                *work.replicas.entry(replica.chunkserver).or_default() += 1;
            }
            let Some(pending) = copyset.pending else { continue };
            let group = Group::of(id, copyset, sight.reports, sight.now);
            let leader = group.map_or(ChunkserverId(0), |group| group.leader);
            let bytes = group.map_or(0, |group| group.says.data_bytes);
            work.add(leader, pending.new.chunkserver, bytes);
        }
        work
    }

    fn add(&mut self, leader: ChunkserverId, to: ChunkserverId, bytes: u64) {
        self.all += 1;
        *self.of.entry(leader).or_default() += 1;
        if to != leader {
            *self.of.entry(to).or_default() += 1;
        }
        *self.coming.entry(to).or_default() += bytes;
        *self.replicas.entry(to).or_default() += 1;
    }

    fn has_time(&self, id: ChunkserverId) -> bool {
        self.of(id) < PER_CHUNKSERVER_MAX
    }

    fn of(&self, id: ChunkserverId) -> usize {
        self.of.get(&id).copied().unwrap_or(0)
    }

    fn replicas(&self, id: ChunkserverId) -> u64 {
        self.replicas.get(&id).copied().unwrap_or(0)
    }
}

struct Sight<'a> {
    state: &'a State,
    reports: &'a Reports,
    limits: &'a Limits,
    now: Instant,
}

impl<'a> Sight<'a> {
    fn condition(&self, id: CopysetId, copyset: &Copyset, replica: &Replica) -> Condition {
        condition(id, copyset, replica, self.state, self.reports, self.limits, self.now)
    }

    fn group(&self, id: CopysetId, copyset: &Copyset) -> Option<Group<'a>> {
        Group::of(id, copyset, self.reports, self.now)
    }

    fn is_retiring(&self, id: ChunkserverId) -> bool {
        self.state.chunkservers().get(&id).is_some_and(|chunkserver| chunkserver.retiring)
    }

    /// There for long enough to be given something.
    fn settled(&self, id: ChunkserverId) -> Option<&'a Received> {
        let connected = self.reports.connected_for(id, self.now)?;
        let settled = connected >= settled_after(self.reports);
        self.reports.online(id, self.now).filter(|_| settled)
    }

    // ---- the way back

    fn cancellations(&self) -> Vec<Command> {
        let pending = self.state.copysets().iter().filter_map(|(&id, c)| Some((id, c, c.pending?)));
        pending
            .filter(|(id, copyset, pending)| self.should_cancel(*id, copyset, pending))
            .map(|(id, _, pending)| {
                Command::CancelReplace(CancelReplace { copyset: id.0, new_replica: pending.new.id.0 })
            })
            .collect()
    }

    fn should_cancel(&self, id: CopysetId, copyset: &Copyset, pending: &Pending) -> bool {
        let group = self.group(id, copyset);
        if pending.over || group.is_some_and(|group| group.is_voter(pending.new.id)) {
            return false;
        }
        let on = pending.new.chunkserver;
        let Some(report) = self.reports.online(on, self.now) else {
            let silent =
                self.reports.silent_for(on, self.now).unwrap_or_else(|| self.reports.listening_for(self.now));
            return silent >= self.reports.interval() * FILLED_SILENT_INTERVALS;
        };
        let here = report.replicas.get(&id).filter(|here| here.replica == pending.new.id.0);
        let failed = here.is_some_and(|here| !here.failed.is_empty());
        let lost = here.is_none() && pending.new.created && self.settled(on).is_some();
        if failed || lost || self.is_retiring(on) {
            return true;
        }
        if group.is_some_and(|group| group.has_caught_up(pending.new.id)) {
            return false;
        }
        let Some(old) = copyset.replica(pending.old) else { return false };
        match pending.reason {
            // It came back, and knows everything again before the new one does.
            Reason::Silent | Reason::Lost => {
                self.condition(id, copyset, old) == Condition::Well
                    && group.is_some_and(|group| group.has_caught_up(old.id))
                    && !self.is_retiring(old.chunkserver)
            }
            Reason::Retiring if !self.is_retiring(old.chunkserver) => true,
            // Another member needs the place more.
            Reason::Retiring | Reason::Balance => {
                copyset.replicas.iter().filter(|replica| replica.id != old.id).any(|replica| {
                    matches!(self.condition(id, copyset, replica), Condition::Silent(_) | Condition::Lost)
                })
            }
        }
    }

    // ---- what should be replaced

    /// The most endangered first.
    fn wanted(&self) -> Vec<Want<'a>> {
        let chunks = self.chunks();
        let mut wanted: Vec<_> = self
            .state
            .copysets()
            .iter()
            .filter_map(|(&id, copyset)| {
                let (want, silent) = self.want(id, copyset)?;
                let staying = copyset.replicas.iter().filter(|replica| replica.id != want.old.id);
                let troubled = staying
                    .filter(|replica| {
                        let report = self.reports.online(replica.chunkserver, self.now);
                        report.is_none_or(|report| !report.trouble.is_empty())
                    })
                    .count();
                let data = want.bytes.max(chunks.get(&id).copied().unwrap_or(0));
                let moves_only = want.reason == Reason::Retiring;
                let rank = (moves_only, Reverse(troubled), Reverse(data.min(1)), Reverse(silent), id);
                Some((rank, want))
            })
            .collect();
        wanted.sort_by_key(|(rank, _)| *rank);
        wanted.into_iter().map(|(_, want)| want).collect()
    }

    /// And for how long its chunkserver has been silent.
    fn want(&self, id: CopysetId, copyset: &'a Copyset) -> Option<(Want<'a>, Duration)> {
        if copyset.pending.is_some() {
            return None;
        }
        let group = self.group(id, copyset)?;
        let conditions: Vec<_> =
            copyset.replicas.iter().map(|replica| (replica, self.condition(id, copyset, replica))).collect();
        let well = conditions.iter().filter(|(_, condition)| *condition == Condition::Well).count();
        if well <= REPLICAS / 2 {
            return None;
        }
        let gone = conditions.iter().find_map(|&(replica, condition)| match condition {
            Condition::Silent(silent) => Some((*replica, Reason::Silent, silent)),
            Condition::Lost => Some((*replica, Reason::Lost, Duration::ZERO)),
            Condition::Well | Condition::Young | Condition::Away => None,
        });
        // To move one away while another one is not there would wait for it in the worst moment.
        let leaving = || {
            let retiring = conditions.iter().find(|(replica, _)| self.is_retiring(replica.chunkserver));
            let (replica, _) = retiring.filter(|_| well == REPLICAS)?;
            Some((**replica, Reason::Retiring, Duration::ZERO))
        };
        let (old, reason, silent) = gone.or_else(leaving)?;
        let bytes = group.says.data_bytes;
        Some((Want { id, copyset, old, reason, leader: group.leader, bytes }, silent))
    }

    /// Chunks that are placed in each copyset.
    fn chunks(&self) -> BTreeMap<CopysetId, u64> {
        let mut chunks = BTreeMap::new();
        for copyset in self.state.volumes().values().flat_map(|v| v.segments.values()).flat_map(|s| s.iter())
        {
            *chunks.entry(*copyset).or_default() += 1;
        }
        chunks
    }

    // ---- where to

    fn target(&self, want: &Want, work: &Work) -> Option<ChunkserverId> {
        if !work.has_time(want.leader) {
            return None;
        }
        let own = want.old.chunkserver;
        let in_place = want.reason == Reason::Lost && !self.is_retiring(own) && work.has_time(own);
        if in_place && self.reports.online(own, self.now).is_some() {
            return Some(own);
        }
        let taken = self.zones_beside(want.copyset, want.old.id);
        self.able(&want.copyset.pool, &taken, want.bytes, work)
            .filter(|(id, _)| *id != own && work.has_time(*id))
            .min_by_key(|(id, report)| {
                let coming = work.coming.get(id).copied().unwrap_or(0);
                let free = u128::from(report.free_bytes.saturating_sub(coming)) * FREE_STEPS
                    / u128::from(report.capacity_bytes.max(1));
                (work.of(*id), Reverse(free), work.replicas(*id), *id)
            })
            .map(|(id, _)| id)
    }

    /// The zones that a new member in the place of `old` may not be in.
    fn zones_beside(&self, copyset: &Copyset, old: ReplicaId) -> BTreeSet<&'a str> {
        let staying = copyset.replicas.iter().filter(|replica| replica.id != old);
        staying
            .filter_map(|replica| Some(self.state.chunkservers().get(&replica.chunkserver)?.zone.as_str()))
            .collect()
    }

    /// Chunkservers that can take a replica of so many bytes.
    fn able(
        &self,
        pool: &str,
        taken: &BTreeSet<&str>,
        bytes: u64,
        work: &Work,
    ) -> impl Iterator<Item = (ChunkserverId, &'a Received)> {
        self.state.chunkservers().keys().filter_map(move |&id| {
            let report = self.settled(id)?;
            self.takes(id, report, pool, taken, bytes, work).then_some((id, report))
        })
    }

    /// Whether this one could, however long it has been there.
    fn takes(
        &self,
        id: ChunkserverId,
        report: &Received,
        pool: &str,
        taken: &BTreeSet<&str>,
        bytes: u64,
        work: &Work,
    ) -> bool {
        let Some(chunkserver) = self.state.chunkservers().get(&id) else { return false };
        let coming = work.coming.get(&id).copied().unwrap_or(0);
        let left = report.free_bytes.saturating_sub(coming).checked_sub(bytes);
        left.is_some_and(|left| left >= near_full_below(report.capacity_bytes))
            && report.trouble.is_empty()
            && !chunkserver.retiring
            && chunkserver.pool == pool
            && !taken.contains(chunkserver.zone.as_str())
    }

    // ---- when nothing else is to do

    fn all_well(&self) -> bool {
        self.state.copysets().iter().all(|(&id, copyset)| {
            copyset.replicas.iter().all(|replica| self.condition(id, copyset, replica) == Condition::Well)
        })
    }

    /// The one move that evens out most: replicas by capacity, as placement gives them.
    fn even_out(&self, work: &Work) -> Option<Command> {
        let capacity = |id: ChunkserverId| {
            let known = self.reports.online(id, self.now).map(|report| report.capacity_bytes);
            u128::from(known.unwrap_or(0).max(1))
        };
        let moves = self.state.copysets().iter().flat_map(|(&id, copyset)| {
            copyset.replicas.iter().filter_map(move |old| Some((id, copyset, old, self.group(id, copyset)?)))
        });
        let better = moves.filter_map(|(id, copyset, old, group)| {
            let taken = self.zones_beside(copyset, old.id);
            let bytes = group.says.data_bytes;
            let from = old.chunkserver;
            let (to, _) = self
                .able(&copyset.pool, &taken, bytes, work)
                .filter(|(to, _)| *to != from)
                .min_by_key(|(to, _)| (per(work.replicas(*to), capacity(*to)), *to))?;
            let now = per(work.replicas(from), capacity(from));
            let then = per(work.replicas(to) + 1, capacity(to));
            // Half a replica's worth: disks of nearly the same size do not send replicas round in circles.
            let gain = now.checked_sub(then).filter(|gain| *gain * 2 >= per(1, capacity(to)))?;
            let want = Want { id, copyset, old: *old, reason: Reason::Balance, leader: group.leader, bytes };
            // Better one that does not lead, and has little to copy.
            Some(((Reverse(gain), group.leader == from, bytes, id), want.begin(to)))
        });
        better.min_by_key(|(worth, _)| *worth).map(|(_, command)| command)
    }
}

/// Replicas by capacity, so that they can be compared.
fn per(replicas: u64, capacity: u128) -> u128 {
    (u128::from(replicas) << 64) / capacity
}

#[cfg(test)]
mod tests;
