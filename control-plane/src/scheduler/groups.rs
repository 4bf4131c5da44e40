//! A cluster whose chunkservers carry out orders, for the tests of repair: Raft groups as far as their members matter,
//! replicas that are hosted, fall behind and catch up, and chunkservers that come and go. What must never happen is
//! asserted where it would.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId};
use evolute_protocol::rpc::{ChangeMembers, CreateReplica, MemberReport, ReplicaReport, Role, order};

use super::repair::{BALANCE_MAX, PER_CHUNKSERVER_MAX};
use super::world::World;
use super::{Decision, plan};
use crate::config::Limits;
use crate::heartbeat::group::CAUGHT_UP_WITHIN;
use crate::heartbeat::orders::{Transfers, orders};
use crate::state::command::RetireChunkserver;
use crate::state::{Command, Reason, Why};

/// One step is one report interval of the world.
pub const STEP: Duration = Duration::from_secs(10);
pub const REPAIR_AFTER: Duration = Duration::from_secs(100);
/// Entries that a replica catches up with in a step.
const PACE: u64 = 400;
const WRITES_PER_STEP: u64 = 10;
const BEGINS_WITH: u64 = 1000;

pub struct Groups {
    pub world: World,
    pub limits: Limits,
    groups: BTreeMap<CopysetId, Group>,
    hosted: BTreeMap<(ChunkserverId, CopysetId), Hosted>,
    pub down: BTreeSet<ChunkserverId>,
    /// Replicas that were removed, and must never be seen again.
    destroyed: BTreeSet<ReplicaId>,
    /// Every so many orders is lost; 0: none.
    pub lose_every: usize,
    orders_given: usize,
    /// Replicas say that they hold nothing.
    pub no_data: bool,
}

#[derive(Debug)]
struct Group {
    voters: BTreeMap<ReplicaId, ChunkserverId>,
    learners: BTreeMap<ReplicaId, ChunkserverId>,
    /// Half way from the first to the second.
    joint: Option<(ReplicaId, ReplicaId)>,
    leader: Option<ReplicaId>,
    term: u64,
    last: u64,
}

#[derive(Debug)]
struct Hosted {
    replica: ReplicaId,
    has: u64,
    failed: bool,
    /// The members as it last knew them.
    members: Vec<MemberReport>,
}

impl Groups {
    /// Chunkservers 1, 2, 3, … in these zones; copysets on the first `with_copysets` of them.
    pub fn new(zones: &[&str], with_copysets: usize) -> Self {
        // Enough copysets from the beginning, so that there are never more with more chunkservers.
        let limits = Limits { repair_after: REPAIR_AFTER, volume_width: 16, ..Limits::default() };
        let mut groups = Self {
            world: World::new(),
            limits,
            groups: BTreeMap::new(),
            hosted: BTreeMap::new(),
            down: BTreeSet::new(),
            destroyed: BTreeSet::new(),
            lose_every: 0,
            orders_given: 0,
            no_data: false,
        };
        zones[..with_copysets].iter().for_each(|zone| groups.join(zone));
        groups.steps(6);
        zones[with_copysets..].iter().for_each(|zone| groups.join(zone));
        groups
    }

    /// A new chunkserver.
    pub fn join(&mut self, zone: &str) {
        let id = self.world.register(zone);
        self.world.report(id);
    }

    pub fn kill(&mut self, id: u32) {
        if self.down.insert(ChunkserverId(id)) {
            self.world.disconnect(ChunkserverId(id));
        }
    }

    pub fn start(&mut self, id: u32) {
        if self.down.remove(&ChunkserverId(id)) {
            self.world.reconnect(ChunkserverId(id));
        }
    }

    pub fn retire(&mut self, id: u32, retiring: bool) {
        let command = Command::RetireChunkserver(RetireChunkserver { chunkserver: id, retiring });
        self.world.apply(&command).expect("known");
    }

    /// The chunkserver loses its replica, or keeps one that can never vote again; unless that would be one too many.
    pub fn lose(&mut self, copyset: u32, on: u32, leaves_it: bool) -> bool {
        let (id, on) = (CopysetId(copyset), ChunkserverId(on));
        let Some(group) = self.groups.get(&id) else { return false };
        let whole = group.joint.is_none()
            && group.voters.iter().all(|(replica, cs)| self.has(id, *replica, *cs).is_some());
        if !whole || !group.voters.values().any(|cs| *cs == on) {
            return false;
        }
        if leaves_it {
            self.hosted.get_mut(&(on, id)).expect("whole").failed = true;
        } else {
            self.hosted.remove(&(on, id));
        }
        true
    }

    pub fn steps(&mut self, count: usize) {
        (0..count).for_each(|_| self.step());
    }

    /// Time passes: groups go on, everybody reports, orders are carried out, decisions are taken.
    pub fn step(&mut self) {
        self.world.pass(STEP);
        self.groups_go_on();
        let ids: Vec<_> =
            self.world.state.chunkservers().keys().copied().filter(|id| !self.down.contains(id)).collect();
        for &id in &ids {
            let report = self.report(id);
            self.world.take(id, report);
        }
        for command in self.decisions() {
            self.check_decision(&command);
            if let Err(refused) = self.world.apply(&command) {
                assert_eq!(refused.why, Why::Stale, "{command:?}: {refused}");
            }
        }
        for &id in &ids {
            let w = &self.world;
            for order in orders(id, &w.state, &w.reports, &Transfers::new(), w.now) {
                self.orders_given += 1;
                if self.lose_every == 0 || !self.orders_given.is_multiple_of(self.lose_every) {
                    self.obey(id, order.what.expect("an order says what"));
                }
            }
        }
        self.check();
    }

    /// Leaders stay where they are here.
    fn decisions(&self) -> Vec<Command> {
        let w = &self.world;
        let decisions = plan(&w.state, &w.reports, &Transfers::new(), &self.limits, w.now);
        let commands = decisions.into_iter().filter_map(|decision| match decision {
            Decision::Propose(command) => Some(command),
            Decision::Transfer(_) => None,
        });
        commands.collect()
    }

    /// Steps until nothing is planned, ordered or under way; says how many.
    pub fn settle(&mut self) -> usize {
        // Whoever has just come is not believed yet.
        self.steps(3);
        for step in 0..2000 {
            let quiet = self.decisions().is_empty()
                && self.world.state.copysets().values().all(|copyset| {
                    copyset.pending.is_none() && copyset.replicas.iter().all(|replica| replica.created)
                })
                && self.groups.values().all(|group| group.learners.is_empty() && group.joint.is_none());
            self.step();
            if quiet && self.strays().is_empty() && self.decisions().is_empty() {
                return step;
            }
        }
        panic!("it goes on for ever: {:?} {:?} {:?}", self.decisions(), self.pending(), self.strays());
    }

    /// Replicas that some running chunkserver hosts and that belong nowhere.
    pub fn strays(&self) -> Vec<ReplicaId> {
        let running = self.hosted.iter().filter(|((on, _), _)| !self.down.contains(on));
        let member = |id: &CopysetId, hosted: &Hosted| {
            let copyset = &self.world.state.copysets()[id];
            copyset.everyone().any(|replica| replica.id == hosted.replica)
        };
        running.filter(|((_, id), hosted)| !member(id, hosted)).map(|(_, hosted)| hosted.replica).collect()
    }

    /// Replicas per chunkserver, by the state.
    pub fn spread(&self) -> BTreeMap<u32, usize> {
        let mut spread: BTreeMap<u32, usize> =
            self.world.state.chunkservers().keys().map(|id| (id.0, 0)).collect();
        for replica in self.world.state.copysets().values().flat_map(|copyset| &copyset.replicas) {
            *spread.entry(replica.chunkserver.0).or_default() += 1;
        }
        spread
    }

    /// Some group is half way between two memberships.
    pub fn is_half_way(&self) -> bool {
        self.groups.values().any(|group| group.joint.is_some())
    }

    pub fn pending(&self) -> Vec<(CopysetId, crate::state::Pending)> {
        self.world.state.copysets().iter().filter_map(|(&id, copyset)| Some((id, copyset.pending?))).collect()
    }

    /// Every copyset has three members that are well, and state and group agree on who they are.
    pub fn assert_whole(&self) {
        for (id, copyset) in self.world.state.copysets() {
            let group = &self.groups[id];
            let known: BTreeMap<_, _> = copyset.replicas.iter().map(|r| (r.id, r.chunkserver)).collect();
            assert_eq!(known, group.voters, "{id}");
            assert!(
                group.voters.iter().all(|(replica, on)| self.is_up(*id, *replica, *on)),
                "{id}: {group:?}"
            );
        }
    }

    // ---- what the groups do

    fn has(&self, id: CopysetId, replica: ReplicaId, on: ChunkserverId) -> Option<&Hosted> {
        self.hosted.get(&(on, id)).filter(|hosted| hosted.replica == replica && !hosted.failed)
    }

    fn is_up(&self, id: CopysetId, replica: ReplicaId, on: ChunkserverId) -> bool {
        !self.down.contains(&on) && self.has(id, replica, on).is_some()
    }

    fn has_majority(&self, id: CopysetId, group: &Group) -> bool {
        let majority = |without: Option<ReplicaId>| {
            let voters: Vec<_> = group.voters.iter().filter(|(r, _)| Some(**r) != without).collect();
            voters.iter().filter(|(r, on)| self.is_up(id, **r, **on)).count() > voters.len() / 2
        };
        match group.joint {
            None => majority(None),
            Some((old, new)) => majority(Some(old)) && majority(Some(new)),
        }
    }

    fn groups_go_on(&mut self) {
        let ids: Vec<_> = self.groups.keys().copied().collect();
        for id in ids {
            let mut group = self.groups.remove(&id).expect("listed");
            let up = |this: &Self, r: &ReplicaId, on: &ChunkserverId| this.is_up(id, *r, *on);
            let can = self.has_majority(id, &group);
            let leads = |l: &ReplicaId| group.voters.get(l).is_some_and(|on| up(self, l, on));
            group.leader = group.leader.filter(|leader| can && leads(leader));
            if can && group.leader.is_none() {
                let able = group.voters.iter().filter(|(r, on)| up(self, r, on));
                // Whoever has most; the group never loses what a majority has.
                group.leader = able.max_by_key(|(_, on)| self.hosted[&(**on, id)].has).map(|(r, _)| *r);
                group.term += 1;
            }
            if group.leader.is_some() {
                group.last += WRITES_PER_STEP;
                if let Some((old, new)) = group.joint.take() {
                    group.voters.remove(&old);
                    if group.leader == Some(old) {
                        group.leader = Some(new);
                        group.term += 1;
                    }
                }
            }
            let everyone: Vec<_> =
                group.voters.iter().chain(&group.learners).map(|(r, on)| (*r, *on)).collect();
            for (replica, on) in everyone {
                if group.leader.is_some() && up(self, &replica, &on) {
                    let hosted = self.hosted.get_mut(&(on, id)).expect("up");
                    hosted.has = group.last.min(hosted.has + PACE);
                }
            }
            self.groups.insert(id, group);
        }
    }

    fn report(&mut self, id: ChunkserverId) -> Vec<ReplicaReport> {
        let mut reports = Vec::new();
        let mine: Vec<_> = self.hosted.keys().filter(|(on, _)| *on == id).map(|(_, c)| *c).collect();
        for copyset in mine {
            let group = &self.groups[&copyset];
            let me = self.hosted[&(id, copyset)].replica;
            let voter = group.voters.contains_key(&me);
            let knows = voter || group.learners.contains_key(&me);
            let members =
                group.voters.iter().map(|m| (m, true)).chain(group.learners.iter().map(|m| (m, false)));
            let members: Vec<_> = members
                .map(|((replica, on), voter)| MemberReport {
                    replica: replica.0,
                    chunkserver: on.0,
                    matched_index: self.has(copyset, *replica, *on).map_or(0, |hosted| hosted.has),
                    voter,
                })
                .collect();
            let leads = group.leader == Some(me);
            let leader = group.leader.and_then(|leader| group.voters.get(&leader)).filter(|_| knows);
            let (term, last, leader) = (group.term, group.last, leader.map_or(0, |on| on.0));
            let hosted = self.hosted.get_mut(&(id, copyset)).expect("mine");
            if knows {
                hosted.members = members;
            }
            reports.push(ReplicaReport {
                copyset: copyset.0,
                replica: me.0,
                role: i32::from(match (leads, voter) {
                    (true, _) => Role::Leader,
                    (false, true) => Role::Follower,
                    (false, false) => Role::Learner,
                }),
                term: if knows { term } else { 0 },
                leader_chunkserver: leader,
                last_index: if leads { last } else { hosted.has },
                committed_index: hosted.has,
                applied_index: hosted.has,
                members: hosted.members.clone(),
                data_bytes: if self.no_data { 0 } else { hosted.has << 20 },
                failed: if hosted.failed { "its log is damaged".to_owned() } else { String::new() },
                ..ReplicaReport::default()
            });
        }
        reports
    }

    fn obey(&mut self, id: ChunkserverId, what: order::What) {
        match what {
            order::What::CreateReplica(create) => self.create(id, &create),
            order::What::ChangeMembers(change) => self.change(id, &change),
            order::What::RemoveReplica(remove) => {
                let (copyset, replica) = (CopysetId(remove.copyset), ReplicaId(remove.replica));
                let hosted = self.hosted.get(&(id, copyset)).expect("it reported one");
                assert_eq!(hosted.replica, replica);
                let group = &self.groups[&copyset];
                let member = group.voters.contains_key(&replica) || group.learners.contains_key(&replica);
                assert!(!member || hosted.failed, "{replica} of {copyset} was thrown away: {group:?}");
                self.hosted.remove(&(id, copyset));
                self.destroyed.insert(replica);
            }
            order::What::DropVolume(_) | order::What::TransferLeader(_) => {}
        }
    }

    fn create(&mut self, id: ChunkserverId, create: &CreateReplica) {
        let (copyset, replica) = (CopysetId(create.copyset), ReplicaId(create.replica));
        assert!(!self.destroyed.contains(&replica), "{replica} was there before");
        if self.hosted.contains_key(&(id, copyset)) {
            return;
        }
        let voters = create.members.iter().map(|m| (ReplicaId(m.replica), ChunkserverId(m.chunkserver)));
        if !create.joining {
            let (learners, joint, leader) = (BTreeMap::new(), None, None);
            let group =
                Group { voters: voters.collect(), learners, joint, leader, term: 1, last: BEGINS_WITH };
            self.groups.entry(copyset).or_insert(group);
        }
        let has = if create.joining { 0 } else { BEGINS_WITH };
        self.hosted.insert((id, copyset), Hosted { replica, has, failed: false, members: Vec::new() });
    }

    fn change(&mut self, id: ChunkserverId, change: &ChangeMembers) {
        let copyset = CopysetId(change.copyset);
        let mut group = self.groups.remove(&copyset).expect("a group");
        let leads = group.leader.is_some_and(|leader| group.voters.get(&leader) == Some(&id));
        if leads && self.has_majority(copyset, &group) && group.joint.is_none() {
            let remove = ReplicaId(change.remove_replica);
            match change.add {
                None => {
                    assert!(!group.voters.contains_key(&remove), "a voter was taken out");
                    group.learners.remove(&remove);
                }
                Some(add) => {
                    let (new, on) = (ReplicaId(add.replica), ChunkserverId(add.chunkserver));
                    let has = self.has(copyset, new, on).map_or(0, |hosted| hosted.has);
                    let joins = !group.learners.contains_key(&new);
                    if joins {
                        group.learners.insert(new, on);
                    } else if group.last - has <= CAUGHT_UP_WITHIN {
                        group.learners.remove(&new);
                        group.voters.insert(new, on);
                        group.joint = group.voters.contains_key(&remove).then_some((remove, new));
                    }
                }
            }
        }
        self.groups.insert(copyset, group);
    }

    // ---- what must always hold

    fn check_decision(&self, command: &Command) {
        let Command::BeginReplace(begin) = command else { return };
        let (id, old) = (CopysetId(begin.copyset), ReplicaId(begin.old_replica));
        let staying = self.groups[&id].voters.iter().filter(|(replica, _)| **replica != old);
        let well = staying.filter(|(replica, on)| self.is_up(id, **replica, **on)).count();
        assert!(well >= 2, "{command:?} with {well} others");
        assert!(!self.down.contains(&ChunkserverId(begin.chunkserver)), "{command:?}: it is down");
    }

    fn check(&self) {
        let zone = |on: &ChunkserverId| self.world.state.chunkservers()[on].zone.as_str();
        for (id, group) in &self.groups {
            self.world.state.check_copyset(*id).expect("what always holds");
            assert_eq!(group.voters.len(), if group.joint.is_some() { 4 } else { 3 }, "{id}: {group:?}");
            let then = group.voters.iter().filter(|(r, _)| group.joint.is_none_or(|(old, _)| **r != old));
            assert_eq!(then.map(|(_, on)| zone(on)).collect::<BTreeSet<_>>().len(), 3, "{id}: {group:?}");
        }
        let pending = self.pending();
        assert!(pending.len() <= self.limits.repairs_max);
        let balance = pending.iter().filter(|(_, p)| p.reason == Reason::Balance);
        assert!(balance.count() <= BALANCE_MAX);
        for id in self.world.state.chunkservers().keys() {
            let filled = pending.iter().filter(|(_, p)| p.new.chunkserver == *id).count();
            assert!(filled <= PER_CHUNKSERVER_MAX, "{id} is filled {filled} times at once");
        }
    }
}
