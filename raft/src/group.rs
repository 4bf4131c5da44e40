//! A handle to one group: propose commands, read its state, change its members.
//!
//! What it knows without asking openraft, it learns where the facts pass by: the vote when it is saved
//! ([`State::vote_saved`]), the position when an entry is applied. So [`Group::leadership`] is a comparison of two
//! cells, and is gone the moment a higher term arrives, before that term is even on disk.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use openraft::OptionalSend;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{
    ChangeMembershipError, ClientWriteError, ForwardReason, ForwardToLeader, InitializeError, RaftError,
};
use openraft::raft::responder::Responder;

use crate::machine::decode_membership;
use crate::thread::Handle;
use crate::types::{
    ClientWriteResult, Host, Raft, SnapshotMeta, StoredMembership, Types, Vote, log_id, member, position,
};
use crate::{Command, GroupId, Member, Position, ReplicaId};

/// Proposals of one group that may be unanswered. openraft's own queue is larger ([`crate::node`] asserts it), so a
/// proposal never waits for room in it. 16 Ki × a small write each is what 128 volumes with full queues send.
pub(crate) const PROPOSALS_MAX: usize = 16 << 10;
/// Bytes of one group's proposals that may be unanswered: they are in memory until they are applied.
pub(crate) const PROPOSED_BYTES_MAX: usize = 64 << 20;

/// How long a leader that was removed goes on, so that its followers learn that the change is committed.
const REMOVED_LEADER_SERVES: Duration = Duration::from_millis(150);

/// How soon to ask openraft again to take note of a checkpoint.
const SNAPSHOT_RETRY: Duration = Duration::from_millis(200);

/// A group of this thread. Cheap to clone.
#[derive(Clone)]
pub struct Group(pub(crate) Rc<State>);

type Listener = Rc<dyn Fn(LeaderChange)>;

/// What a replica knows about itself beside openraft.
pub(crate) struct State {
    pub id: GroupId,
    pub me: Member,
    raft: OnceCell<Raft>,
    /// The term this replica leads, from the moment its quorum's vote is saved.
    leading: Cell<Option<u64>>,
    pub applied: Cell<Option<Position>>,
    /// What the owner's storage holds durably; openraft's snapshot.
    pub checkpointed: RefCell<SnapshotMeta>,
    /// Every entry up to here is on every member, as the leader last said. `None`: not heard yet, or somebody has
    /// nothing.
    pub retain_floor: Cell<Option<u64>>,
    proposals: Cell<usize>,
    proposed_bytes: Cell<usize>,
    /// Set while a refused proposal's answer is dropped, so that it says `Busy`.
    refusing: Cell<bool>,
    leader: Cell<Option<(u64, u64)>>,
    on_leader_change: RefCell<Vec<Listener>>,
    pub command_bytes_max: usize,
    pub election_max: Duration,
}

/// The right to serve reads of what is applied here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leadership {
    pub term: u64,
}

/// A proposal that made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    pub at: Position,
    /// What the state machine answered.
    pub result: Bytes,
}

/// Why there is no [`Applied`]. Only `Busy` and `TooLarge` say that the command will never be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Ask this one instead; without a leader, any other member.
    #[error("not the leader")]
    NotLeader { leader: Option<Member> },
    /// Too much is unanswered. Come back a little later.
    #[error("too many proposals unanswered")]
    Busy,
    /// No log file could hold it. Cut it into smaller ones.
    #[error("the command is too large for the log")]
    TooLarge,
    /// This replica does not run any more.
    #[error("the replica stopped")]
    Stopped,
}

/// Why members were not changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// Ask this one instead; without a leader, any other member.
    #[error("not the leader")]
    NotLeader { leader: Option<Member> },
    /// Another change is being carried out, or the leader is too new. Come back a little later.
    #[error("another change is in progress")]
    InProgress,
    /// Only a member, a learner at least, can do this.
    #[error("{0} is not a member of the group")]
    NotAMember(ReplicaId),
    /// The change cannot be right.
    #[error("the change is refused: {0}")]
    Refused(#[source] Box<dyn std::error::Error>),
    /// This replica does not run any more.
    #[error("the replica stopped")]
    Stopped,
}

/// What a replica is in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Leader,
    Follower,
    Candidate,
    /// Replicates and has no vote. Also a replica that was not initialized yet.
    Learner,
    Stopped,
}

/// One member as its group sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberStatus {
    pub member: Member,
    pub voter: bool,
    /// Its log agrees with the leader's up to here. Known on the leader alone.
    pub matched: Option<u64>,
}

/// Where a replica stands, as of openraft's last turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStatus {
    pub group: GroupId,
    pub me: Member,
    pub role: Role,
    pub term: u64,
    pub leader: Option<Member>,
    /// Index of the last entry in the log.
    pub last: Option<u64>,
    pub committed: Option<Position>,
    pub applied: Option<Position>,
    /// What the owner's storage holds durably.
    pub checkpointed: Option<Position>,
    /// The log up to here is gone.
    pub purged: Option<Position>,
    pub members: Vec<MemberStatus>,
}

/// The group has a leader of a new term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaderChange {
    pub term: u64,
    pub leader: ReplicaId,
    /// It is this replica (which may serve once [`Group::leadership`] says so).
    pub me: bool,
}

impl Group {
    pub fn id(&self) -> GroupId {
        self.0.id
    }

    /// This replica.
    pub fn me(&self) -> Member {
        self.0.me
    }

    /// Has `command` committed and applied, then calls `done`, once, on this thread; at once when it is refused.
    /// Never waits, and spawns nothing.
    pub fn propose(&self, command: Command, done: impl FnOnce(Result<Applied, ProposeError>) + 'static) {
        let state = &self.0;
        let bytes = command.len();
        if bytes > state.command_bytes_max {
            return done(Err(ProposeError::TooLarge));
        }
        if state.proposals.get() >= PROPOSALS_MAX || state.proposed_bytes.get() + bytes > PROPOSED_BYTES_MAX {
            return done(Err(ProposeError::Busy));
        }
        let Some(raft) = state.raft.get() else { return done(Err(ProposeError::Stopped)) };
        state.proposals.set(state.proposals.get() + 1);
        state.proposed_bytes.set(state.proposed_bytes.get() + bytes);
        let answering = state.clone();
        let answer = Answer::new(move |outcome: Option<ClientWriteResult>| {
            answering.proposals.set(answering.proposals.get() - 1);
            answering.proposed_bytes.set(answering.proposed_bytes.get() - bytes);
            done(match outcome {
                Some(Ok(response)) => Ok(Applied { at: position(&response.log_id), result: response.data }),
                Some(Err(error)) => Err(propose_error(error)),
                None if answering.refusing.get() => Err(ProposeError::Busy),
                None => Err(ProposeError::Stopped),
            });
        });
        let mut context = Context::from_waker(Waker::noop());
        let refused = {
            let sending = pin!(raft.client_write_ff(command, Some(answer)));
            match { sending }.as_mut().poll(&mut context) {
                // Stopped: the answer was dropped, and said so.
                Poll::Ready(_) => return,
                // openraft's queue is full, which our bounds should not let happen. Dropping the future takes the
                // proposal back out.
                Poll::Pending => {
                    state.refusing.set(true);
                    true
                }
            }
        };
        if refused {
            state.refusing.set(false);
        }
    }

    /// `Some` while this replica leads and has applied an entry of its own term: what is applied here then includes
    /// everything that was ever acknowledged in earlier terms. Takes nanoseconds.
    pub fn leadership(&self) -> Option<Leadership> {
        let term = self.0.leading.get()?;
        (self.0.applied.get()?.term == term).then_some(Leadership { term })
    }

    /// The last entry applied here.
    pub fn applied(&self) -> Option<Position> {
        self.0.applied.get()
    }

    /// Everything worth reporting. Takes microseconds.
    pub fn status(&self) -> GroupStatus {
        let state = &self.0;
        let mut status = GroupStatus {
            group: state.id,
            me: state.me,
            role: Role::Stopped,
            term: 0,
            leader: None,
            last: None,
            committed: None,
            applied: state.applied.get(),
            checkpointed: state.checkpointed.borrow().last_log_id.as_ref().map(position),
            purged: None,
            members: Vec::new(),
        };
        let Some(raft) = state.raft.get() else { return status };
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        status.role = match (&metrics.running_state, metrics.state) {
            (Err(_), _) | (_, ServerState::Shutdown) => Role::Stopped,
            (_, ServerState::Leader) => Role::Leader,
            (_, ServerState::Follower) => Role::Follower,
            (_, ServerState::Candidate) => Role::Candidate,
            (_, ServerState::Learner) => Role::Learner,
        };
        status.term = metrics.current_term;
        status.last = metrics.last_log_index;
        status.committed = metrics.local_committed.as_ref().map(position);
        status.purged = metrics.purged.as_ref().map(position);
        let membership = &metrics.membership_config;
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        for (&replica, &host) in membership.nodes() {
            let matched = match &metrics.replication {
                Some(_) if replica == state.me.replica.0 => metrics.last_log_index,
                Some(replication) => {
                    replication.get(&replica).and_then(|matched| Some(matched.as_ref()?.index()))
                }
                None => None,
            };
            let member = member(replica, host);
            if metrics.current_leader == Some(replica) {
                status.leader = Some(member);
            }
            status.members.push(MemberStatus { member, voter: voters.contains(&replica), matched });
        }
        status
    }

    /// Calls `f` on this thread each time the group gets a leader of a new term.
    pub fn on_leader_change(&self, f: impl Fn(LeaderChange) + 'static) {
        self.0.on_leader_change.borrow_mut().push(Rc::new(f));
    }

    /// Gives a new group its first members. All of them may call it, with the same list; nothing happens when the
    /// group already has some.
    ///
    /// Only `first` does so at once and becomes the leader; the others give it time, so that they do not all stand for
    /// election against each other. All must name the same one.
    pub async fn initialize(&self, mut members: Vec<Member>, first: ReplicaId) -> Result<(), ChangeError> {
        let raft = self.raft()?;
        members.sort_unstable();
        members.dedup();
        if !members.contains(&self.0.me) {
            return Err(ChangeError::NotAMember(self.0.me.replica));
        }
        if first != self.0.me.replica {
            let mut metrics = raft.metrics();
            let initialized = async {
                while metrics.borrow_and_update().last_log_index.is_none() {
                    if metrics.changed().await.is_err() {
                        break;
                    }
                }
            };
            let _ = tokio::time::timeout(self.0.election_max * 2, initialized).await;
        }
        let nodes: BTreeMap<u64, Host> =
            members.iter().map(|member| (member.replica.0, Host(member.process.0))).collect();
        match raft.initialize(nodes).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(RaftError::APIError(InitializeError::NotInMembers(_))) => {
                Err(ChangeError::NotAMember(self.0.me.replica))
            }
            Err(RaftError::Fatal(_)) => Err(ChangeError::Stopped),
        }
    }

    /// Starts replicating to a new replica without giving it a vote; returns when its log has caught up.
    pub async fn add_learner(&self, member: Member) -> Result<(), ChangeError> {
        let raft = self.raft()?;
        match raft.add_learner(member.replica.0, Host(member.process.0), true).await {
            Ok(_) => Ok(()),
            Err(error) => Err(change_error(error)),
        }
    }

    /// Makes these replicas, learners or members until now, the voting members. All others leave the group.
    pub async fn change_members(&self, voters: Vec<ReplicaId>) -> Result<(), ChangeError> {
        let raft = self.raft()?;
        let voters: BTreeSet<u64> = voters.into_iter().map(|replica| replica.0).collect();
        match raft.change_membership(voters, false).await {
            Ok(_) => Ok(()),
            Err(error) => Err(change_error(error)),
        }
    }

    /// Asks `to` to take over. Returns once another replica leads; `InProgress` if none does within an election.
    pub async fn transfer_leader(&self, to: ReplicaId) -> Result<(), ChangeError> {
        let raft = self.raft()?;
        let status = self.status();
        if status.role != Role::Leader {
            return Err(ChangeError::NotLeader { leader: status.leader });
        }
        if !status.members.iter().any(|member| member.voter && member.member.replica == to) {
            return Err(ChangeError::NotAMember(to));
        }
        if to == self.0.me.replica {
            return Ok(());
        }
        raft.trigger().transfer_leader(to.0).await.map_err(|_| ChangeError::Stopped)?;
        let mut metrics = raft.metrics();
        let moved = async {
            loop {
                {
                    let now = metrics.borrow_and_update();
                    if now.current_term > status.term && now.current_leader.is_some() {
                        return;
                    }
                }
                if metrics.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::time::timeout(self.0.election_max * 2, moved).await.map_err(|_| ChangeError::InProgress)
    }

    /// The owner's storage holds the effect of every entry up to `at` durably, and `membership` is the last it
    /// applied by then. The log before `at` may go once every member has it.
    pub fn checkpointed(&self, at: Position, membership: Option<Bytes>) {
        let state = &self.0;
        assert!(Some(at) <= state.applied.get(), "{}: checkpoint at {at} before it was applied", state.id);
        {
            let mut checkpointed = state.checkpointed.borrow_mut();
            if Some(log_id(at)) <= checkpointed.last_log_id {
                return;
            }
            checkpointed.last_log_id = Some(log_id(at));
            if let Some(membership) = membership.as_ref().and_then(|bytes| decode_membership(bytes)) {
                checkpointed.last_membership = membership;
            }
        }
        let state = state.clone();
        tokio::task::spawn_local(async move {
            let Some(raft) = state.raft.get() else { return };
            let mut metrics = raft.metrics();
            // openraft purges nothing beyond the snapshot it knows, and overlooks the wish for one while it takes
            // another. An error is a stopped replica, which has nothing to purge.
            while metrics.borrow_and_update().snapshot < Some(log_id(at)) {
                if raft.trigger().snapshot().await.is_err() {
                    return;
                }
                if let Ok(Err(_)) = tokio::time::timeout(SNAPSHOT_RETRY, metrics.changed()).await {
                    return;
                }
            }
            state.purge().await;
        });
    }

    /// The same group for other threads.
    pub fn handle(&self) -> Handle {
        Handle::to(self)
    }

    /// Stands for election at once. Tests, and groups whose owner knows that the leader is gone.
    pub async fn elect(&self) -> Result<(), ChangeError> {
        self.raft()?.trigger().elect(true).await.map_err(|_| ChangeError::Stopped)
    }

    fn raft(&self) -> Result<&Raft, ChangeError> {
        self.0.raft.get().ok_or(ChangeError::Stopped)
    }
}

impl State {
    pub fn new(
        id: GroupId,
        me: Member,
        applied: Option<Position>,
        checkpointed: SnapshotMeta,
        command_bytes_max: usize,
        election_max: Duration,
    ) -> Rc<Self> {
        Rc::new(Self {
            id,
            me,
            raft: OnceCell::new(),
            leading: Cell::new(None),
            applied: Cell::new(applied),
            checkpointed: RefCell::new(checkpointed),
            retain_floor: Cell::new(None),
            proposals: Cell::new(0),
            proposed_bytes: Cell::new(0),
            refusing: Cell::new(false),
            leader: Cell::new(None),
            on_leader_change: RefCell::default(),
            command_bytes_max,
            election_max,
        })
    }

    pub fn started(&self, raft: Raft) {
        assert!(self.raft.set(raft).is_ok(), "{} started twice", self.id);
    }

    pub fn running(&self) -> Option<&Raft> {
        self.raft.get()
    }

    /// openraft is about to save `vote`: whatever this replica led under another one is over.
    pub fn vote_saved(self: &Rc<Self>, vote: &Vote) {
        let (term, leader) = (vote.leader_id.term, vote.leader_id.voted_for);
        let mine = vote.committed && leader == self.me.replica.0;
        self.leading.set(mine.then_some(term));
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

    pub async fn stop(&self) {
        self.leading.set(None);
        if let Some(raft) = self.raft.get() {
            // The error is a panic of openraft's task, which the process's panic hook has already told.
            let _ = raft.shutdown().await;
        }
    }

    /// The lowest index that is on every member, learners included: what the leader tells the others. `None` when
    /// this replica does not lead, or somebody has nothing yet.
    pub fn lowest_matched(&self) -> Option<u64> {
        self.leading.get()?;
        let metrics = self.raft.get()?.metrics();
        let metrics = metrics.borrow_watched();
        let mut lowest = metrics.last_log_index;
        for (&replica, matched) in metrics.replication.as_ref()? {
            if replica != self.me.replica.0 {
                lowest = lowest.min(matched.as_ref().map(|id| id.index()));
            }
        }
        lowest
    }

    /// A leader of `term` says up to where every member has the log.
    pub fn floor_heard(&self, term: u64, floor: Option<u64>) {
        // One that was deposed knows of fewer members.
        if self.leader.get().is_none_or(|(known, _)| term >= known) {
            self.retain_floor.set(floor);
        }
    }

    /// Purges what the owner holds durably and no member lacks.
    pub async fn purge(&self) {
        let Some(raft) = self.raft.get() else { return };
        if self.leading.get().is_some() {
            self.retain_floor.set(self.lowest_matched());
        }
        let Some(floor) = self.retain_floor.get() else { return };
        let Some(checkpointed) = self.checkpointed.borrow().last_log_id.as_ref().map(|id| id.index()) else {
            return;
        };
        let upto = checkpointed.min(floor);
        let purged = raft.metrics().borrow_watched().purged.as_ref().map(|id| id.index());
        if Some(upto) > purged {
            let _ = raft.trigger().purge_log(upto).await;
        }
    }
}

fn propose_error(error: ClientWriteError<Types>) -> ProposeError {
    match error {
        ClientWriteError::ForwardToLeader(forward) | ClientWriteError::LogEntryDiscarded(forward) => {
            ProposeError::NotLeader { leader: forwarded(&forward) }
        }
        // Neither can answer a plain command.
        ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_) => {
            ProposeError::NotLeader { leader: None }
        }
    }
}

fn change_error(error: RaftError<Types, ClientWriteError<Types>>) -> ChangeError {
    match error {
        RaftError::Fatal(_) => ChangeError::Stopped,
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward))
        | RaftError::APIError(ClientWriteError::LogEntryDiscarded(forward)) => {
            ChangeError::NotLeader { leader: forwarded(&forward) }
        }
        RaftError::APIError(ClientWriteError::ChangeMembershipError(error)) => match error {
            ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_) => {
                ChangeError::InProgress
            }
            ChangeMembershipError::LearnerNotFound(missing) => {
                ChangeError::NotAMember(ReplicaId(missing.node_id))
            }
            other => ChangeError::Refused(Box::new(other)),
        },
        RaftError::APIError(error @ ClientWriteError::PreconditionFailed(_)) => {
            ChangeError::Refused(Box::new(error))
        }
    }
}

/// A leader without a quorum names nobody: whoever asks should try the others.
fn forwarded(forward: &ForwardToLeader<Types>) -> Option<Member> {
    match forward.reason {
        ForwardReason::LeaseExpired => None,
        ForwardReason::NotLeader | ForwardReason::LeadershipTransfer => {
            Some(member(forward.leader_id?, forward.leader_node?))
        }
    }
}

/// openraft's responder: calls a closure with the outcome, or with nothing when openraft drops it.
pub struct Answer<T>(Option<Box<dyn FnOnce(Option<T>)>>);

impl<T> Answer<T> {
    fn new(done: impl FnOnce(Option<T>) + 'static) -> Self {
        Self(Some(Box::new(done)))
    }
}

impl<T: OptionalSend + 'static> Responder<Types, T> for Answer<T> {
    fn on_complete(mut self, outcome: T) {
        if let Some(done) = self.0.take() {
            done(Some(outcome));
        }
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done(None);
        }
    }
}

/// A membership of nobody: what a group has before it is initialized.
pub(crate) fn no_membership() -> StoredMembership {
    StoredMembership::default()
}
