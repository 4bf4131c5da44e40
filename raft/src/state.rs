//! What a replica knows about itself beside openraft: learnt where the facts pass by, read without asking anybody.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use crate::bounds::{Beyond, Ceiling};
use crate::group::LeaderChange;
use crate::hibernate::Hibernation;
use crate::intake::Intake;
use crate::log::GroupLog;
use crate::peer::Receiving;
use crate::retain::Pins;
use crate::succession::Succession;
use crate::types::{LogId, Raft, SnapshotMeta, StoredMembership, Vote, position};
use crate::{GroupId, Member, Position, ReplicaId};

/// How long a leader that was removed goes on, so that its followers learn that the change is committed.
const REMOVED_LEADER_SERVES: Duration = Duration::from_millis(150);

pub(crate) type Listener = Rc<dyn Fn(LeaderChange)>;

/// One replica, as everything of its thread knows it.
pub(crate) struct State {
    pub id: GroupId,
    pub me: Member,
    raft: OnceCell<Raft>,
    /// This group's part of the log, to look at; set when the replica starts.
    log: OnceCell<GroupLog>,
    /// The term this replica leads, from the moment its quorum's vote is saved.
    pub leading: Cell<Option<u64>>,
    /// The highest term this replica knows of.
    pub term: Cell<u64>,
    /// How high a term it believes.
    ceiling: OnceCell<Ceiling>,
    pub applied: Cell<Option<Position>>,
    /// The highest term this replica knew of when it applied that.
    pub applied_in: Cell<u64>,
    /// What the owner's storage holds durably; openraft's snapshot.
    pub checkpointed: RefCell<SnapshotMeta>,
    consistent: Cell<Consistent>,
    /// Every entry up to here is on every member, as the leader last said. `None`: not heard yet, or somebody has
    /// nothing.
    pub retain_floor: Cell<Option<u64>>,
    /// Bytes of the newest log files that are kept for members who lag.
    pub retain_bytes: u64,
    /// openraft was last asked to purge the log up to here.
    pub purging: Cell<Option<u64>>,
    pub pins: RefCell<Pins>,
    pub succession: Succession,
    pub hibernation: Hibernation,
    /// The raft snapshot that arrives here, or arrived last.
    pub receiving: RefCell<Option<Rc<Receiving>>>,
    pub intake: Rc<Intake>,
    pub proposals: Cell<usize>,
    pub proposed_bytes: Cell<usize>,
    /// Set while a refused proposal's answer is dropped, so that it says `Busy`.
    pub refusing: Cell<bool>,
    leader: Cell<Option<(u64, u64)>>,
    pub on_leader_change: RefCell<Vec<Listener>>,
    pub command_bytes_max: usize,
    pub election_max: Duration,
    /// A member that answered within it is there.
    pub lately: Duration,
    /// See [`crate::Node::stand_aside`]. Of all groups of the thread.
    takes_part: Rc<Cell<bool>>,
}

/// From where on what is applied here is a state the group has had.
///
/// The owner's storage may hold effects of entries beyond the position it is at: of a former life of this process,
/// which drained blocks it did not come to checkpoint, or of the sender of a raft snapshot, who went on while it was
/// read. All of those entries are committed, and lie at or before what the leader knows to be committed now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Consistent {
    /// No leader has said yet what is committed.
    Unheard,
    /// The owner is changing its state for another.
    Installing,
    From(u64),
}

/// What [`State`] is told about its surroundings.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub command_bytes_max: usize,
    pub election_max: Duration,
    pub lately: Duration,
    pub retain_bytes: u64,
}

impl State {
    pub fn new(
        id: GroupId,
        me: Member,
        applied: Option<Position>,
        checkpointed: SnapshotMeta,
        bounds: Bounds,
        intake: Rc<Intake>,
        takes_part: Rc<Cell<bool>>,
    ) -> Rc<Self> {
        Rc::new(Self {
            id,
            me,
            raft: OnceCell::new(),
            log: OnceCell::new(),
            leading: Cell::new(None),
            term: Cell::new(0),
            ceiling: OnceCell::new(),
            applied: Cell::new(applied),
            applied_in: Cell::new(0),
            checkpointed: RefCell::new(checkpointed),
            consistent: Cell::new(Consistent::Unheard),
            retain_floor: Cell::new(None),
            retain_bytes: bounds.retain_bytes,
            purging: Cell::new(None),
            pins: RefCell::default(),
            succession: Succession::default(),
            hibernation: Hibernation::default(),
            receiving: RefCell::default(),
            intake,
            proposals: Cell::new(0),
            proposed_bytes: Cell::new(0),
            refusing: Cell::new(false),
            leader: Cell::new(None),
            on_leader_change: RefCell::default(),
            command_bytes_max: bounds.command_bytes_max,
            election_max: bounds.election_max,
            lately: bounds.lately,
            takes_part,
        })
    }

    /// Before [`Self::started`]: what this replica remembers.
    pub fn found(&self, log: GroupLog) {
        self.term.set(log.term().unwrap_or(0));
        self.applied_in.set(self.term.get());
        let _ = self.ceiling.set(Ceiling::above(self.term.get()));
        assert!(self.log.set(log).is_ok(), "{} started twice", self.id);
    }

    pub fn started(&self, raft: Raft) {
        assert!(self.raft.set(raft).is_ok(), "{} started twice", self.id);
    }

    /// Whether a term that another replica names can be. Asked before anything is done with it: what is taken once is on
    /// the disk.
    pub fn believes(&self, term: u64) -> Result<(), Beyond> {
        self.ceiling.get().map_or(Ok(()), |ceiling| ceiling.judge(self.term.get(), term))
    }

    /// Whether this replica is there for the others: votes, stands for election, follows.
    pub fn takes_part(&self) -> bool {
        self.takes_part.get()
    }

    pub fn running(&self) -> Option<&Raft> {
        self.raft.get()
    }

    pub fn log(&self) -> Option<&GroupLog> {
        self.log.get()
    }

    /// A proposal of so many bytes waits for its answer.
    pub fn count_proposal(&self, bytes: usize) {
        self.proposals.set(self.proposals.get() + 1);
        self.proposed_bytes.set(self.proposed_bytes.get() + bytes);
    }

    /// It does not any more.
    pub fn forget_proposal(&self, bytes: usize) {
        self.proposals.set(self.proposals.get() - 1);
        self.proposed_bytes.set(self.proposed_bytes.get() - bytes);
    }

    /// See [`crate::Group::leadership`].
    pub fn serves(&self) -> Option<u64> {
        let term = self.leading.get()?;
        (self.applied.get()?.term == term).then_some(term)
    }

    /// See [`crate::Group::consistent_from`].
    pub fn consistent_from(&self) -> Option<u64> {
        if self.serves().is_some() {
            return None;
        }
        let from = match self.consistent.get() {
            Consistent::Unheard | Consistent::Installing => return Some(u64::MAX),
            Consistent::From(from) => from,
        };
        let applied = self.applied.get().map(|at| at.index);
        (applied < Some(from)).then_some(from)
    }

    pub fn set_applied(&self, at: Position) {
        self.applied.set(Some(at));
        self.applied_in.set(self.term.get());
    }

    pub fn set_consistent(&self, consistent: Consistent) {
        self.consistent.set(consistent);
    }

    /// A leader says what is committed. Once it has committed an entry of its own term it knows of everything that
    /// was committed before, whatever a former life of this process has seen of it.
    pub fn commit_heard(&self, vote: &Vote, committed: Option<&LogId>) {
        let term = vote.leader_id.term;
        if self.consistent.get() != Consistent::Unheard || !vote.committed || term < self.term.get() {
            return;
        }
        if let Some(at) = committed.map(position)
            && at.term == term
        {
            self.consistent.set(Consistent::From(at.index));
        }
    }

    /// openraft is about to save `vote`: whatever this replica led under another one is over.
    pub fn vote_saved(self: &Rc<Self>, vote: &Vote) {
        let (term, leader) = (vote.leader_id.term, vote.leader_id.voted_for);
        self.term.set(term);
        let mine = vote.committed && leader == self.me.replica.0;
        if mine && self.leading.get().is_none() {
            self.succession.leads_now();
        }
        self.leading.set(mine.then_some(term));
        self.stir();
        if !vote.committed || self.leader.replace(Some((term, leader))) == Some((term, leader)) {
            return;
        }
        let change = LeaderChange { term, leader: ReplicaId(leader), me: mine };
        tracing::info!(group = %self.id, term, leader = %change.leader, me = mine, "new leader");
        for f in self.on_leader_change.borrow().iter().cloned() {
            // Later, on its own: whoever listens may call back into the group, and openraft is in the middle of
            // something here.
            tokio::task::spawn_local(async move { f(change) });
        }
    }

    /// A leader that is not a voter any more serves for a moment, so that the others hear of the change, and then
    /// steps down. (openraft would keep one more task per replica for this.)
    pub fn membership_applied(self: &Rc<Self>, membership: &StoredMembership) {
        let me = self.me.replica.0;
        if self.leading.get().is_none() || membership.voter_ids().any(|voter| voter == me) {
            return;
        }
        let (state, at) = (self.clone(), *membership.log_id());
        tokio::task::spawn_local(async move {
            tokio::time::sleep(REMOVED_LEADER_SERVES).await;
            if let Some(raft) = state.raft.get() {
                tracing::info!(group = %state.id, "stepping down: not a member any more");
                state.leading.set(None);
                let _ = raft.trigger().refresh_server_state(None, at).await;
            }
        });
    }

    /// A leader of `term` says up to where every member has the log.
    pub fn floor_heard(&self, term: u64, floor: Option<u64>) {
        // One that was deposed knows of fewer members.
        if self.leader.get().is_none_or(|(known, _)| term >= known) {
            self.retain_floor.set(floor);
        }
    }

    pub async fn stop(&self) {
        if self.leading.take().is_some() {
            self.wake_members();
        }
        self.refuse_held();
        self.receiving.take();
        if let Some(raft) = self.raft.get() {
            // The error is a panic of openraft's task, which the process's panic hook has already told.
            let _ = raft.shutdown().await;
        }
    }
}
