//! How the cluster is, and why: the state and the reports, in sentences.
//!
//! A pure function. Health is the worst of the parts; every part that is not well says why in one sentence that names
//! who and for how long, so that nobody has to look elsewhere first.

use std::collections::BTreeSet;
use std::time::Instant;

use evolute_protocol::geometry::GIB;
use evolute_protocol::id::{ChunkserverId, CopysetId};
use evolute_protocol::rpc::{ChunkserverStatus, CopysetStatus, Health, ReplicaStatus, Role};

use crate::heartbeat::reports::Reports;
use crate::placement::room::is_near_full;
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

pub fn judge(state: &State, reports: &Reports, now: Instant) -> Judged {
    let sight = Sight { state, reports, now };
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
            Some(reported) if reported.replica == replica.id.0 => None,
            Some(_) => Some((Health::Degraded, format!("{} has another replica of it", self.name(id)))),
            None if replica.created => {
                Some((Health::Degraded, format!("{} has lost its replica", self.name(id))))
            }
            None => Some((Health::Unknown, format!("{} is creating its replica", self.name(id)))),
        }
    }

    fn copyset(&self, id: CopysetId, copyset: &Copyset) -> CopysetStatus {
        let members = || copyset.replicas.iter().map(|replica| replica.chunkserver);
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
        let why = missing.iter().map(|(_, why)| why.as_str()).collect::<Vec<_>>().join("; ");
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
        }
    }

    /// What is wrong beyond single copysets.
    fn chunkserver_reasons(&self) -> Vec<(Health, String)> {
        let mut found = Vec::new();
        let mut zones = BTreeSet::new();
        for (&id, chunkserver) in self.state.chunkservers() {
            let Some(report) = self.reports.online(id, self.now) else { continue };
            zones.insert(chunkserver.zone.as_str());
            if !report.trouble.is_empty() {
                found
                    .push((Health::Degraded, format!("{} is in trouble: {}", self.name(id), report.trouble)));
            }
            if is_near_full(report.capacity_bytes, report.free_bytes) {
                let reason = format!(
                    "{} is near-full, nothing new is placed there: {} of {} free",
                    self.name(id),
                    gib(report.free_bytes),
                    gib(report.capacity_bytes)
                );
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
