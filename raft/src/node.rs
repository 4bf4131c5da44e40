//! Everything of one thread: its log, its connections to other processes, and the groups that share them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use openraft::{Config, SnapshotPolicy, StepDownPolicy};

use crate::bounds::{self, Beyond, Bounded};
use crate::group::{Group, PROPOSALS_MAX};
use crate::hibernate;
use crate::intake::Intake;
use crate::log::{Log, LogError};
use crate::machine::{Machine, StateMachine, decode_membership};
use crate::peer::{Network, Peers, Rate};
use crate::runtime::GRID;
use crate::state::{Bounds, State};
use crate::types::{Raft, SnapshotMeta, log_id};
use crate::{GroupId, Member, Position, ReplicaId};

/// How long groups of this thread wait for each other.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// A leader without writes shows its followers that often that it lives.
    pub heartbeat_ms: u64,
    /// A follower that heard nothing for a random time between these two stands for election. Both must be more than
    /// a few heartbeats.
    pub election_ms_min: u64,
    pub election_ms_max: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self { heartbeat_ms: 150, election_ms_min: 500, election_ms_max: 1000 }
    }
}

/// What groups of this thread may use up.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of the newest log files in which entries are kept for members that lack them. Older ones are kept for
    /// nobody: a member that was away for longer gets a raft snapshot. Never less than one file.
    pub log_retain_bytes: u64,
    /// What all raft snapshots together may send in a second. A third of what a 2.5 Gb/s link carries: repair stays in the
    /// background of everything else.
    pub snapshot_bytes_per_second: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { log_retain_bytes: 4 << 30, snapshot_bytes_per_second: 100 << 20 }
    }
}

/// openraft's queue of requests to one group: every proposal we allow, and as many again for everything else.
const API_QUEUE: u64 = 2 * PROPOSALS_MAX as u64;
/// A member that answered none of so many heartbeats is not there, or too slow to be of use.
const HEARTBEATS_LATELY: u32 = 5;
/// Entries in one append to a follower. The bytes are bounded by the log reader.
const ENTRIES_PER_APPEND: u64 = 1024;

impl Timing {
    /// openraft's follower waits for the leader's lease, `election_timeout_max`, and then a random time between its
    /// own two bounds; ours bound the sum.
    fn config(self) -> Result<Config, StartError> {
        let lease = self.election_ms_max / 2;
        // The inequality that `heartbeat_min_interval` asks for; ticks are late by what they wait for each other.
        let late = u64::try_from(GRID.as_millis()).unwrap_or(u64::MAX);
        let two_heartbeats = 2 * self.heartbeat_ms + self.heartbeat_ms / 4 + late;
        let config = Config {
            cluster_name: "evolute".to_owned(),
            heartbeat_interval: self.heartbeat_ms,
            heartbeat_min_interval: Some(self.heartbeat_ms),
            election_timeout_min: self.election_ms_min.saturating_sub(lease).max(two_heartbeats + 1),
            election_timeout_max: lease,
            enable_pre_vote: Some(true),
            // A restarted leader would serve before it has applied again what it had acknowledged.
            enable_leader_restore: Some(false),
            // Snapshots and purges are ours (`Group::checkpointed`).
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: u64::MAX,
            replication_lag_threshold: u64::MAX,
            removed_leader_step_down: StepDownPolicy::Never,
            max_payload_entries: ENTRIES_PER_APPEND,
            api_channel_size: Some(API_QUEUE),
            ..Config::default()
        };
        config.validate().map_err(|source| StartError::Timing { source: Box::new(source) })
    }
}

/// Why a group does not run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Heartbeats and elections do not go together.
    #[error("the timing cannot work")]
    Timing { source: Box<dyn std::error::Error> },
    /// It runs already.
    #[error("{0} runs already")]
    Running(GroupId),
    /// The log belongs to another replica of the group: this one has been here under another id.
    #[error("{group} has the log of {found}, not of {asked}")]
    OtherReplica { group: GroupId, found: ReplicaId, asked: ReplicaId },
    /// The owner's storage holds what the log does not know: the log was lost, and with it this replica's votes. It
    /// must leave the group and join again under a new id.
    #[error("{group} is applied up to {applied} and its log ends at {last:?}")]
    LogBehind { group: GroupId, applied: Position, last: Option<Position> },
    /// The log begins after what the owner's storage holds: the storage was lost or set back.
    #[error("{group} is applied up to {applied:?} and its log begins after {purged}")]
    LogAhead { group: GroupId, applied: Option<Position>, purged: Position },
    /// Its vote is of a term that no election reaches: openraft would count beyond the end of numbers. No leader can have
    /// been elected in it, so it may be lowered ([`crate::lower_votes`]).
    #[error(
        "{replica} has a vote that cannot be: {what}; stop, and run `evolute-chunkserver repair --data-dir DIR`"
    )]
    Vote { replica: ReplicaId, what: Beyond },
    /// What the log or the owner's storage holds is of a term or an index that nothing reaches.
    #[error("what it stores cannot be: {what}. Only another replica can replace it")]
    Impossible { what: Beyond },
    /// The owner handed back a membership that is not one of ours.
    #[error("{0}: the stored membership is not a membership")]
    Membership(GroupId),
    /// The log is dead, or cannot be read.
    #[error("the log failed")]
    Log(#[from] LogError),
    /// openraft refused.
    #[error("the group cannot start")]
    Raft { source: Box<dyn std::error::Error> },
}

/// The groups of one thread, their log and their connections.
#[derive(Clone)]
pub struct Node(Rc<Inner>);

pub(crate) struct Inner {
    log: Log,
    pub(crate) peers: Peers,
    timing: Timing,
    limits: Limits,
    rate: Rc<Rate>,
    intake: Rc<Intake>,
    pub(crate) groups: RefCell<BTreeMap<GroupId, Group>>,
    /// See [`Node::stand_aside`].
    takes_part: Rc<Cell<bool>>,
}

impl Node {
    /// Call it on the thread the groups are to live on.
    pub fn new(log: Log, peers: Peers, timing: Timing) -> Self {
        Self::with_limits(log, peers, timing, Limits::default())
    }

    /// The same with other limits than usual.
    pub fn with_limits(log: Log, peers: Peers, timing: Timing, limits: Limits) -> Self {
        let rate = Rc::new(Rate::new(limits.snapshot_bytes_per_second));
        let intake = Intake::new(log.clone());
        let takes_part = Rc::new(Cell::new(true));
        let groups = RefCell::default();
        let inner = Rc::new(Inner { log, peers, timing, limits, rate, intake, groups, takes_part });
        let heartbeat = Duration::from_millis(timing.heartbeat_ms);
        tokio::task::spawn_local(hibernate::watch(Rc::downgrade(&inner), heartbeat));
        Self(inner)
    }

    pub fn log(&self) -> &Log {
        &self.0.log
    }

    pub fn peers(&self) -> &Peers {
        &self.0.peers
    }

    /// Until [`Self::take_part`] the replicas of this thread are to the others as if they were not here: none votes, stands
    /// for election, or acknowledges anything. For an owner who does not know yet whether its storage is the newest there
    /// was, and of whose start nobody may know: one that was put back to an older copy has forgotten votes, and entries
    /// that a candidate must have; what it acknowledged before anybody knew of it could be put back unnoticed. Call it
    /// before any group is started.
    pub fn stand_aside(&self) {
        self.0.takes_part.set(false);
    }

    /// The storage is the newest, and that it was started is known.
    pub fn take_part(&self) {
        if !self.0.takes_part.replace(true) {
            for raft in self.0.groups.borrow().values().filter_map(|group| group.0.running()) {
                raft.runtime_config().elect(true);
            }
        }
    }

    /// From now on entries that other leaders send are taken only while the owner has room for them. `admits` is asked for
    /// each append, with the bytes of all that are let in and not answered yet, and must be quick. What it keeps out is
    /// tried again.
    pub fn admit(&self, admits: impl Fn(u64) -> bool + 'static) {
        self.0.intake.ask(admits);
    }

    /// Starts this process's replica of a group: with an empty log when the log has never heard of it, where it left
    /// off otherwise. It applies nothing before it has heard from a leader (or is one). One that is to join a group is
    /// started like any other, and never [initialized](Group::initialize): it waits to be added.
    pub async fn start_group<S: StateMachine>(
        &self,
        id: GroupId,
        me: ReplicaId,
        machine: S,
    ) -> Result<Group, StartError> {
        let inner = &self.0;
        if inner.groups.borrow().contains_key(&id) {
            return Err(StartError::Running(id));
        }
        let config = Arc::new(inner.timing.config()?);
        let restored = machine.restored();
        let membership = match &restored.membership {
            Some(bytes) => decode_membership(bytes).ok_or(StartError::Membership(id))?,
            None => crate::group::no_membership(),
        };
        let mut log = inner.log.group(id, me).await?;
        check(id, restored.applied, log.bounds(), log.installing())?;
        check_vote(me, log.term())?;
        let state = State::new(
            id,
            Member { replica: me, process: inner.peers.me() },
            restored.applied,
            SnapshotMeta { last_log_id: restored.applied.map(log_id), last_membership: membership.clone() },
            Bounds {
                command_bytes_max: inner.log.command_bytes_max(),
                election_max: Duration::from_millis(inner.timing.election_ms_max),
                lately: Duration::from_millis(inner.timing.heartbeat_ms) * HEARTBEATS_LATELY,
                retain_bytes: inner.limits.log_retain_bytes,
            },
            inner.intake.clone(),
            inner.takes_part.clone(),
        );
        state.found(log.clone());
        log.tell(state.clone());
        let network = Network::new(state.clone(), inner.peers.clone(), inner.rate.clone());
        let machine = Machine::new(Box::new(machine), state.clone(), membership);
        let raft = Raft::new(me.0, config, network, log, machine)
            .await
            .map_err(|source| StartError::Raft { source: Box::new(source) })?;
        raft.runtime_config().elect(inner.takes_part.get());
        state.started(raft);
        let group = Group(state);
        inner.groups.borrow_mut().insert(id, group.clone());
        inner.peers.serve(group.clone());
        Ok(group)
    }

    pub fn group(&self, id: GroupId) -> Option<Group> {
        self.0.groups.borrow().get(&id).cloned()
    }

    pub fn groups(&self) -> Vec<Group> {
        self.0.groups.borrow().values().cloned().collect()
    }

    /// Stops this process's replica; its log stays.
    pub async fn stop_group(&self, id: GroupId) {
        let group = self.0.groups.borrow_mut().remove(&id);
        self.0.peers.stop_serving(id);
        if let Some(group) = group {
            group.0.stop().await;
        }
    }

    /// Stops this process's replica and forgets its log and its votes. It must never come back under the same id.
    pub async fn remove_group(&self, id: GroupId) -> Result<(), LogError> {
        self.stop_group(id).await;
        self.0.log.remove_group(id).await
    }

    /// Purges what became free since the last checkpoint, for example because a member caught up. Cheap; call it
    /// every second or so.
    pub async fn purge(&self) {
        for group in self.groups() {
            group.0.purge().await;
        }
    }

    /// Stops all groups, closes all connections and the log, whose writes are on disk then.
    pub async fn shutdown(&self) {
        let groups = std::mem::take(&mut *self.0.groups.borrow_mut());
        for (id, group) in groups {
            self.0.peers.stop_serving(id);
            group.0.stop().await;
        }
        self.0.peers.close();
        self.0.log.close().await;
    }
}

/// A vote is for a term that openraft can count on from.
pub(crate) fn check_vote(replica: ReplicaId, term: Option<u64>) -> Result<(), StartError> {
    bounds::term(term.unwrap_or(0)).map_err(|what| StartError::Vote { replica, what })
}

/// The log and the owner's storage must overlap or touch. The log is purged up to and ends at `purged` and `last`.
pub(crate) fn check(
    group: GroupId,
    applied: Option<Position>,
    (purged, last): (Option<Position>, Option<Position>),
    installing: Option<Position>,
) -> Result<(), StartError> {
    for at in [applied, purged, last, installing] {
        at.bounded().map_err(|what| StartError::Impossible { what })?;
    }
    if let Some(purged) = purged
        && applied.is_none_or(|applied| applied.index < purged.index)
    {
        return Err(StartError::LogAhead { group, applied, purged });
    }
    // A raft snapshot was installed, and then came a crash: openraft purges what is left of the old log.
    let installed = applied.is_some() && installing == applied;
    if let Some(applied) = applied
        && last.is_none_or(|last| last.index < applied.index)
        && !installed
    {
        return Err(StartError::LogBehind { group, applied, last });
    }
    Ok(())
}
