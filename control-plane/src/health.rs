//! How the cluster is, and why: the state and the reports, in sentences.
//!
//! A pure function. Health is the worst of the parts; every part that is not well says why in one sentence that names
//! who and for how long, so that nobody has to look elsewhere first.

use std::collections::BTreeSet;
use std::time::Instant;

use evolute_protocol::geometry::GIB;
use evolute_protocol::id::{ChunkserverId, CopysetId};
use evolute_protocol::rpc::{ChunkserverStatus, CopysetStatus, Health, ReplicaStatus, Role};

use crate::config::Limits;
use crate::heartbeat::reports::Reports;
use crate::heartbeat::room;
use crate::placement::room::{Fit, is_near_full};
use crate::scheduler::obstacles;
use crate::state::copyset::REPLICAS;
use crate::state::{Copyset, Replica, State};

/// A page of a terminal; more of the same tells nothing new.
const REASONS_MAX: usize = 50;
/// Entries behind which a replica counts as catching up, not as in step: what a busy copyset has in flight is less.
const BEHIND_MAX: u64 = 4096;

pub struct Judged {
    pub health: Health,
    pub reasons: Vec<String>,
    pub chunkservers: Vec<ChunkserverStatus>,
    pub copysets: Vec<CopysetStatus>,
}

pub fn judge(state: &State, reports: &Reports, limits: &Limits, now: Instant) -> Judged {
    let sight = Sight { state, reports, limits, now };
    let copysets: Vec<_> = state.copysets().iter().map(|(&id, copyset)| sight.copyset(id, copyset)).collect();
    let chunkservers: Vec<_> =
        state.chunkservers().keys().map(|&id| sight.chunkserver(id, &copysets)).collect();
    let mut found = sight.chunkserver_reasons();
    found
        .extend(copysets.iter().filter(|c| c.health() != Health::Ok).map(|c| (c.health(), c.reason.clone())));
    found.sort_by_key(|(health, _)| std::cmp::Reverse(weight(*health)));
    let health = found.first().map_or(Health::Ok, |(health, _)| *health);
    let mut reasons: Vec<_> = found.into_iter().map(|(_, reason)| reason).collect();
    if reasons.len() > REASONS_MAX {
        let left_out = reasons.len() - REASONS_MAX + 1;
        reasons.truncate(REASONS_MAX - 1);
        reasons.push(format!("and {left_out} more"));
    }
    Judged { health, reasons, chunkservers, copysets }
}

/// From well to bad.
fn weight(health: Health) -> u8 {
    match health {
        Health::Ok => 0,
        Health::Unknown => 1,
        Health::Degraded => 2,
        Health::Stalled => 3,
    }
}

struct Sight<'a> {
    state: &'a State,
    reports: &'a Reports,
    limits: &'a Limits,
    now: Instant,
}

impl Sight<'_> {
    /// `chunkserver-2 (127.0.0.1:7802)`
    fn name(&self, id: ChunkserverId) -> String {
        match self.state.chunkservers().get(&id) {
            Some(chunkserver) => format!("{id} ({})", chunkserver.address),
            None => id.to_string(),
        }
    }

    fn online(&self, id: ChunkserverId) -> bool {
        self.reports.is_online(id, self.now)
    }

    /// Why it is not online, as the end of a sentence.
    fn silence(&self, id: ChunkserverId) -> String {
        match self.reports.silent_for(id, self.now) {
            Some(silent) => format!("{} has not reported for {} s", self.name(id), silent.as_secs()),
            None => {
                let listening = self.reports.listening_for(self.now).as_secs();
                format!("{} has not reported since this MDS started {listening} s ago", self.name(id))
            }
        }
    }

    /// It may only not have found this MDS yet.
    fn not_heard_yet(&self, id: ChunkserverId) -> bool {
        self.reports.silent_for(id, self.now).is_none() && !self.reports.all_heard(self.now)
    }

    /// What keeps this replica from doing its part, if anything.
    fn missing(&self, copyset: CopysetId, replica: &Replica) -> Option<(Health, String)> {
        let id = replica.chunkserver;
        if !self.online(id) {
            let health = if self.not_heard_yet(id) { Health::Unknown } else { Health::Degraded };
            return Some((health, self.silence(id)));
        }
        let reported = self.reports.last(id).and_then(|report| report.replicas.get(&copyset));
        match reported {
            Some(reported) if reported.replica == replica.id.0 && reported.failed.is_empty() => None,
            Some(reported) if reported.replica == replica.id.0 => {
                let why = format!("the replica on {} cannot go on: {}", self.name(id), reported.failed);
                Some((Health::Degraded, why))
            }
            Some(_) => Some((Health::Degraded, format!("{} has another replica of it", self.name(id)))),
            None if replica.created => {
                Some((Health::Degraded, format!("{} has lost its replica", self.name(id))))
            }
            None => Some((Health::Unknown, format!("{} is creating its replica", self.name(id)))),
        }
    }

    fn copyset(&self, id: CopysetId, copyset: &Copyset) -> CopysetStatus {
        let members = || copyset.everyone().map(|replica| replica.chunkserver);
        let leader = self.reports.leader(id, members(), self.now);
        let last_index = leader
            .and_then(|leader| self.reports.online(leader.chunkserver, self.now)?.replicas.get(&id))
            .map_or(0, |replica| replica.last_index);
        let replica = |replica: &Replica| {
            let reported = self.reports.last(replica.chunkserver).and_then(|report| report.replicas.get(&id));
            let online = self.online(replica.chunkserver);
            let applied_index = reported.map_or(0, |reported| reported.applied_index);
            ReplicaStatus {
                replica: replica.id.0,
                chunkserver: replica.chunkserver.0,
                online,
                role: i32::from(if online {
                    reported.map_or(Role::Unknown, |r| r.role())
                } else {
                    Role::Unknown
                }),
                applied_index,
                behind: if last_index == 0 { 0 } else { last_index.saturating_sub(applied_index) },
            }
        };
        let replicas: Vec<ReplicaStatus> = copyset.replicas.iter().map(replica).collect();
        let (health, reason) = self.copyset_health(id, copyset, leader.is_some(), &replicas);
        CopysetStatus {
            id: id.0,
            health: i32::from(health),
            reason,
            leader_chunkserver: leader.map_or(0, |leader| leader.chunkserver.0),
            term: leader.map_or(0, |leader| leader.term),
            replicas,
            pool: copyset.pool.clone(),
        }
    }

    fn copyset_health(
        &self,
        id: CopysetId,
        copyset: &Copyset,
        led: bool,
        replicas: &[ReplicaStatus],
    ) -> (Health, String) {
        let total = copyset.replicas.len();
        let missing: Vec<_> =
            copyset.replicas.iter().filter_map(|replica| self.missing(id, replica)).collect();
        let present = total - missing.len();
        let mut why = missing.iter().map(|(_, why)| why.as_str()).collect::<Vec<_>>().join("; ");
        if let Some(pending) = copyset.pending.filter(|pending| !pending.over) {
            let (new, on) = (pending.new.id, self.name(pending.new.chunkserver));
            why = format!("{why}; {new} on {on} is taking the place of {}", pending.old);
        }
        let sentence = format!("{id} has {present} of {total} replicas: {why}");
        let known = !missing.iter().any(|(health, _)| *health == Health::Unknown);
        if present <= total / 2 {
            return (if known { Health::Stalled } else { Health::Unknown }, sentence);
        }
        if !led {
            return (
                Health::Stalled,
                format!("{id} has no leader, with {present} of {total} replicas there"),
            );
        }
        if !missing.is_empty() {
            return (if known { Health::Degraded } else { Health::Unknown }, sentence);
        }
        match replicas.iter().max_by_key(|replica| replica.behind) {
            Some(last) if last.behind > BEHIND_MAX => {
                let name = self.name(ChunkserverId(last.chunkserver));
                let reason =
                    format!("{id}: the replica on {name} is {} entries behind, catching up", last.behind);
                (Health::Degraded, reason)
            }
            _ => (Health::Ok, String::new()),
        }
    }

    fn chunkserver(&self, id: ChunkserverId, copysets: &[CopysetStatus]) -> ChunkserverStatus {
        let chunkserver = &self.state.chunkservers()[&id];
        let last = self.reports.last(id);
        let integrity = last.map(|report| report.integrity).unwrap_or_default();
        let latency = last.map(|report| report.write_latency).unwrap_or_default();
        let count = |of: &dyn Fn(&CopysetStatus) -> bool| {
            u32::try_from(copysets.iter().filter(|copyset| of(copyset)).count()).unwrap_or(u32::MAX)
        };
        ChunkserverStatus {
            id: id.0,
            address: chunkserver.address.clone(),
            zone: chunkserver.zone.clone(),
            server: chunkserver.server.clone(),
            online: self.online(id),
            last_report_ms_ago: self
                .reports
                .silent_for(id, self.now)
                .map_or(u64::MAX, |silent| u64::try_from(silent.as_millis()).unwrap_or(u64::MAX)),
            capacity_bytes: last.map_or(chunkserver.capacity_bytes, |report| report.capacity_bytes),
            used_bytes: last.map_or(0, |report| report.used_bytes),
            free_bytes: last.map_or(0, |report| report.free_bytes),
            replicas: count(&|copyset| copyset.replicas.iter().any(|replica| replica.chunkserver == id.0)),
            leaders: count(&|copyset| copyset.leader_chunkserver == id.0),
            trouble: last.map(|report| report.trouble.clone()).unwrap_or_default(),
            version: chunkserver.version.clone(),
            pool: chunkserver.pool.clone(),
            retiring: chunkserver.retiring,
            dead: chunkserver.dead,
            put_back_replicas: last.map_or(0, |report| report.put_back()),
            scrubbed_bytes: integrity.scrubbed_bytes,
            last_full_scrub_unix_ms: integrity.last_full_scrub_unix_ms,
            bad_blocks_found: integrity.bad_blocks_found,
            bad_blocks_repaired: integrity.bad_blocks_repaired,
            blocks_compared: integrity.blocks_compared,
            blocks_differing: integrity.blocks_differing,
            blocks_not_compared: integrity.blocks_not_compared,
            blocks_undecided: integrity.blocks_undecided,
            write_latency_us_p50: latency.us_p50,
            write_latency_us_p99: latency.us_p99,
        }
    }

    /// Why its replicas stay where they are, though they should not.
    fn not_replaced(&self, id: ChunkserverId, retiring: bool) -> impl Iterator<Item = String> {
        let silent = self.reports.silent_for(id, self.now).unwrap_or(self.reports.listening_for(self.now));
        let dead = self.state.chunkservers().get(&id).is_some_and(|chunkserver| chunkserver.dead);
        let due = retiring || (!self.online(id) && (dead || silent >= self.limits.repair_after));
        let obstacles = due.then(|| obstacles::of(id, self.state, self.reports, self.limits, self.now));
        obstacles.into_iter().flatten()
    }

    /// What is wrong beyond single copysets.
    fn chunkserver_reasons(&self) -> Vec<(Health, String)> {
        let mut found = Vec::new();
        let mut zones = BTreeSet::new();
        let rooms = self.state.copysets().values();
        let rooms =
            rooms.map(|copyset| room::of(copyset, self.state, self.reports, self.now).map(|(fit, _)| fit));
        // The best there is: what new volumes and segments get.
        let allocated = rooms.max().flatten();
        match allocated {
            Some(Fit::Whole | Fit::Waiting) => {}
            Some(Fit::Partly | Fit::PartlyWaiting) => found.push((
                Health::Degraded,
                "new space is allocated in copysets with a near-full member: no copyset has room on all three"
                    .to_owned(),
            )),
            None if self.state.copysets().is_empty() => {}
            None => found.push((
                Health::Degraded,
                "new space is refused: every copyset has two near-full members".to_owned(),
            )),
        }
        for (&id, chunkserver) in self.state.chunkservers() {
            found.extend(self.not_replaced(id, chunkserver.retiring).map(|why| (Health::Degraded, why)));
            let Some(report) = self.reports.online(id, self.now) else { continue };
            zones.insert(chunkserver.zone.as_str());
            if report.put_back() > 0 {
                found.push((
                    Health::Degraded,
                    format!(
                        "{} was put back to an older copy of its directory: the {} replicas it held have forgotten \
                         what they voted for and acknowledged, do not vote, and are made anew as soon as two others \
                         of their copyset are there; if nothing newer is left anywhere, \
                         `evolute chunkserver accept {}` makes this copy count",
                        self.name(id),
                        report.put_back(),
                        id.0
                    ),
                ));
            }
            if !report.trouble.is_empty() {
                found
                    .push((Health::Degraded, format!("{} is in trouble: {}", self.name(id), report.trouble)));
            }
            if is_near_full(report.capacity_bytes, report.free_bytes) {
                let placed = match allocated {
                    Some(Fit::Partly | Fit::PartlyWaiting) => "what is new is placed there all the same",
                    Some(Fit::Whole | Fit::Waiting) | None => "nothing new is placed there",
                };
                let reason = format!(
                    "{} is near-full, {placed}: {} of {} free",
                    self.name(id),
                    gib(report.free_bytes),
                    gib(report.capacity_bytes)
                );
                found.push((Health::Degraded, reason));
            }
            let bad = report.integrity;
            if let Some(left) = bad.bad_blocks_found.checked_sub(bad.bad_blocks_repaired).filter(|n| *n > 0) {
                let found_all = bad.bad_blocks_found;
                let reason =
                    format!("{} found {found_all} bad blocks and has yet to repair {left}", self.name(id));
                found.push((Health::Degraded, reason));
            }
            for copyset in
                report.replicas.keys().filter(|copyset| !self.state.copysets().contains_key(copyset))
            {
                let reason =
                    format!("{} has a replica of {copyset}, which this cluster does not know", self.name(id));
                found.push((Health::Degraded, reason));
            }
        }
        if self.state.copysets().is_empty() {
            let reason = match zones.len() {
                zones @ 0..REPLICAS => {
                    format!("volumes need chunkservers in {REPLICAS} zones, of {zones} some report")
                }
                _ => "the first copysets are being created".to_owned(),
            };
            found.push((Health::Degraded, reason));
        }
        found
    }
}

#[expect(clippy::cast_precision_loss, reason = "one decimal")]
fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / GIB as f64)
}

#[cfg(test)]
mod tests {
    use super::{Judged, judge};
    use crate::config::Limits;
    use crate::heartbeat::reports::Reports;
    use crate::scheduler::world::World;
    use evolute_protocol::id::{ChunkserverId, CopysetId};
    use evolute_protocol::rpc::Health;
    use std::time::Duration;

    const LEADERS: [u32; 6] = [1, 2, 3, 1, 2, 3];

    fn judged(world: &World) -> Judged {
        judge(&world.state, &world.reports, &Limits::default(), world.now)
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn all_well_needs_no_reason() {
        let judged = judged(&World::with_three_chunkservers());
        assert_eq!((judged.health, judged.reasons.len()), (Health::Ok, 0), "{:?}", judged.reasons);
        assert!(judged.chunkservers.iter().all(|c| c.online && c.replicas == 6 && c.leaders == 2));
        assert!(judged.copysets.iter().all(|c| c.term == 2 && c.replicas.len() == 3 && c.reason.is_empty()));
    }

    #[test]
    fn one_of_three_away_is_degraded_and_says_who_and_how_long() {
        let mut world = World::with_three_chunkservers();
        world.disconnect(ChunkserverId(2));
        assert_eq!(judged(&world).health, Health::Ok, "it may be reconnecting");
        world.pass(seconds(12));
        // The others have elected new leaders.
        world.lead_without(ChunkserverId(2), &[1, 3, 3, 1, 1, 3]);
        let judged = judged(&world);
        assert_eq!((judged.health, judged.reasons.len()), (Health::Degraded, 6));
        assert_eq!(
            judged.reasons[2],
            "copyset-3 has 2 of 3 replicas: chunkserver-2 (127.0.0.1:7802) has not reported for 12 s"
        );
        let away = &judged.chunkservers[1];
        assert_eq!((away.online, away.last_report_ms_ago, away.leaders), (false, 12_000, 0));
        assert!(judged.copysets.iter().all(|c| c.replicas.iter().all(|r| r.online == (r.chunkserver != 2))));
    }

    #[test]
    fn without_a_majority_or_a_leader_writes_wait() {
        let mut world = World::with_three_chunkservers();
        world.lead(&[0, 2, 3, 1, 2, 3]);
        let no_leader = judged(&world);
        assert_eq!((no_leader.health, no_leader.reasons.len()), (Health::Stalled, 1));
        assert_eq!(no_leader.reasons[0], "copyset-1 has no leader, with 3 of 3 replicas there");

        world.disconnect(ChunkserverId(1));
        world.disconnect(ChunkserverId(2));
        world.pass(seconds(3));
        let judged = judged(&world);
        assert_eq!((judged.health, judged.reasons.len()), (Health::Stalled, 6));
        assert!(judged.reasons[0].contains("1 of 3 replicas") && judged.reasons[0].contains("; "));
    }

    #[test]
    fn a_young_mds_does_not_cry_wolf() {
        let mut world = World::with_three_chunkservers();
        world.reports = Reports::new(seconds(10), world.now);
        world.pass(seconds(4));
        let young = judged(&world);
        assert_eq!(young.health, Health::Unknown);
        assert!(
            young.reasons[0].contains("has not reported since this MDS started 4 s ago"),
            "{:?}",
            young.reasons
        );
        world.pass(seconds(27));
        assert_eq!(judged(&world).health, Health::Stalled, "nobody came");
    }

    #[test]
    fn everything_odd_has_its_sentence() {
        let mut world = World::with_three_chunkservers();
        world.trouble.insert(ChunkserverId(1), "its disk answers slowly\u{7}".to_owned());
        world.behind.insert(ChunkserverId(3), 999);
        world.lead(&LEADERS);
        world.say_free(ChunkserverId(2), 1 << 30);
        let replica =
            world.state.copysets()[&CopysetId(1)].replica_on(ChunkserverId(3)).expect("a member").id.0;
        world.report_only(ChunkserverId(3), CopysetId(1), replica);
        let before = judged(&world);
        for expected in [
            "chunkserver-1 (127.0.0.1:7801) is in trouble: its disk answers slowly",
            "chunkserver-2 (127.0.0.1:7802) is near-full, what is new is placed there all the same: 1.0 GiB of 1024.0 GiB free",
            "copyset-2 has 2 of 3 replicas: chunkserver-3 (127.0.0.1:7803) has lost its replica",
        ] {
            assert!(
                before.reasons.iter().any(|reason| reason == expected),
                "{expected}: {:#?}",
                before.reasons
            );
        }
        world.report_only(ChunkserverId(3), CopysetId(99), 1);
        let reason =
            "chunkserver-3 (127.0.0.1:7803) has a replica of copyset-99, which this cluster does not know";
        assert!(judged(&world).reasons.iter().any(|r| r == reason));
        world.add_copyset([1, 2, 3]);
        let creating = "chunkserver-1 (127.0.0.1:7801) is creating its replica";
        assert!(judged(&world).copysets[6].reason.contains(creating));
        for _ in 0..60 {
            world.add_copyset([1, 2, 3]);
        }
        let many = judged(&world).reasons;
        assert!(many.len() == 50 && many[49].starts_with("and "), "{:?}", many.last());
    }

    #[test]
    fn space_that_is_allocated_beside_a_full_disk_is_named_and_so_is_space_that_is_not() {
        let mut world = World::with_three_chunkservers();
        world.say_free(ChunkserverId(2), 1 << 30);
        let near_full = |n: u32, placed: &str| {
            format!("chunkserver-{n} (127.0.0.1:780{n}) is near-full, {placed}: 1.0 GiB of 1024.0 GiB free")
        };
        let all_the_same = "what is new is placed there all the same";
        let allocated =
            "new space is allocated in copysets with a near-full member: no copyset has room on all three";
        assert_eq!(judged(&world).reasons, [allocated.to_owned(), near_full(2, all_the_same)]);
        world.say_free(ChunkserverId(3), 1 << 30);
        let nothing = "nothing new is placed there";
        let refused = "new space is refused: every copyset has two near-full members";
        assert_eq!(
            judged(&world).reasons,
            [refused.to_owned(), near_full(2, nothing), near_full(3, nothing)]
        );
    }

    #[test]
    fn an_empty_cluster_says_what_it_waits_for() {
        let mut world = World::new();
        assert_eq!(judged(&world).reasons, ["volumes need chunkservers in 3 zones, of 0 some report"]);
        let id = world.register("z1");
        world.report(id);
        assert_eq!(judged(&world).reasons, ["volumes need chunkservers in 3 zones, of 1 some report"]);
    }
}
