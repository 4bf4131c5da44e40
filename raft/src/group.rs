//! A handle to one group: propose commands, read its state, change its members.
//!
//! What it knows without asking openraft is learnt where the facts pass by ([`State`]): the vote when it is saved, the
//! position when an entry is applied. So [`Group::leadership`] is a comparison of two cells, and is gone the moment a
//! higher term arrives, before that term is even on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::Instant;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{
    ChangeMembershipError, ClientWriteError, ForwardReason, ForwardToLeader, InitializeError, RaftError,
};
use openraft::raft::responder::Responder;
use openraft::{ChangeMembers, OptionalSend, ServerState};

use crate::log::GroupLog;
use crate::machine::decode_membership;
use crate::state::State;
use crate::thread::Handle;
use crate::types::{ClientWriteResult, Host, Raft, StoredMembership, Types, log_id, member, position};
use crate::{Command, GroupId, Member, Position, ProcessId, ReplicaId};

/// Proposals of one group that may be unanswered. openraft's own queue is larger ([`crate::node`] asserts it), so a
/// proposal never waits for room in it. 16 Ki × a small write each is what 128 volumes with full queues send.
pub(crate) const PROPOSALS_MAX: usize = 16 << 10;
/// Bytes of one group's proposals that may be unanswered: they are in memory until they are applied.
pub(crate) const PROPOSED_BYTES_MAX: usize = 64 << 20;

/// A learner this far behind is not made a voter: while it caught up, the group would have a member less than it
/// seems to. About what a busy group appends in a few milliseconds.
pub const CAUGHT_UP: u64 = 256;

/// How soon to ask openraft again to take note of a checkpoint.
const SNAPSHOT_RETRY: Duration = Duration::from_millis(200);

/// Called with the outcome of a proposal.
pub(crate) type Done = Box<dyn FnOnce(Result<Applied, ProposeError>)>;

/// A group of this thread. Cheap to clone.
#[derive(Clone)]
pub struct Group(pub(crate) Rc<State>);

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
    /// A learner lacks too much to be given a vote. Come back later.
    #[error("{replica} is {entries} entries behind")]
    Behind { replica: ReplicaId, entries: u64 },
    /// It has not answered the leader lately; whatever it was asked to take over, nobody would have. Come back later.
    #[error("{0} did not answer lately")]
    Silent(ReplicaId),
    /// The group has the replica already, hosted by another process.
    #[error("{replica} is hosted by {at}")]
    Elsewhere { replica: ReplicaId, at: ProcessId },
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
    /// It answered the leader lately. Known on the leader alone, of the others.
    pub heard: bool,
}

/// Where a replica stands, as of openraft's last turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStatus {
    pub group: GroupId,
    pub me: Member,
    pub role: Role,
    pub term: u64,
    /// `None` also when its connection to us is gone.
    pub leader: Option<Member>,
    /// Index of the last entry in the log.
    pub last: Option<u64>,
    pub committed: Option<Position>,
    pub applied: Option<Position>,
    /// What the owner's storage holds durably.
    pub checkpointed: Option<Position>,
    /// The log up to here is gone.
    pub purged: Option<Position>,
    /// Nothing has happened for a while, and whatever happens wakes it up.
    pub asleep: bool,
    pub members: Vec<MemberStatus>,
}

impl GroupStatus {
    /// The other voter whose log is furthest, as far as this replica knows, of those that were heard lately if there are
    /// some: who should lead when it gives up leading.
    pub fn furthest_other(&self) -> Option<&MemberStatus> {
        self.other_voters().max_by_key(|member| (member.heard, member.matched))
    }

    pub fn other_voters(&self) -> impl Iterator<Item = &MemberStatus> {
        self.members.iter().filter(|member| member.voter && member.member.replica != self.me.replica)
    }
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
        if state.leading.get().is_some() && state.hibernation.holds() {
            return state.hold(command, Box::new(done));
        }
        let Some(raft) = state.running() else { return done(Err(ProposeError::Stopped)) };
        let Some(taken) = state.intake.propose(bytes as u64) else { return done(Err(ProposeError::Busy)) };
        state.count_proposal(bytes);
        let answering = state.clone();
        let answer = Answer::new(move |outcome: Option<ClientWriteResult>| {
            answering.forget_proposal(bytes);
            drop(taken);
            done(match outcome {
                Some(Ok(response)) => Ok(Applied { at: position(&response.log_id), result: response.data }),
                Some(Err(error)) => Err(match propose_error(error) {
                    ProposeError::NotLeader { .. } if answering.leader_is_lost() => {
                        ProposeError::NotLeader { leader: None }
                    }
                    error => error,
                }),
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
        self.0.serves().map(|term| Leadership { term })
    }

    /// While it says `Some`, this replica must not serve reads without leading: its storage may hold effects of entries
    /// beyond the last applied one, up to that index ([`u64::MAX`]: not known yet). So it is after a start, until a
    /// leader has said what is committed, and after a raft snapshot. Takes nanoseconds.
    pub fn consistent_from(&self) -> Option<u64> {
        self.0.consistent_from()
    }

    /// The last entry applied here.
    pub fn applied(&self) -> Option<Position> {
        self.0.applied.get()
    }

    /// A term whose leader has everything that is applied here in its log, as have the leaders of all later ones.
    ///
    /// Not the last applied entry's: that one may have been committed by a much later leader, and one in between may lack
    /// it. Whoever told this replica that it is committed led in no later term than the replica knew of by then.
    pub fn applied_in(&self) -> u64 {
        self.0.applied_in.get()
    }

    /// The last entry of the log here, committed or not. All before it are as the leader of its term had them.
    pub fn last_logged(&self) -> Option<Position> {
        self.0.log()?.bounds().1
    }

    /// The commands among the entries from `first` to `last`, applied or not. `None`: not all of them are in the log, or
    /// they are longer than about `bytes_max`.
    pub async fn commands(&self, first: u64, last: u64, bytes_max: u64) -> Option<Vec<(Position, Command)>> {
        match self.0.log()?.commands(first, last, bytes_max).await {
            Ok(commands) => commands,
            Err(error) => {
                tracing::warn!(group = %self.0.id, first, last, %error, "entries cannot be read back");
                None
            }
        }
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
            asleep: state.is_asleep(),
            members: Vec::new(),
        };
        let Some(raft) = state.running() else { return status };
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
                // As of the others: what it has told is on its disk.
                Some(_) if replica == state.me.replica.0 => state.log().and_then(GroupLog::durable),
                Some(replication) => {
                    replication.get(&replica).and_then(|matched| Some(matched.as_ref()?.index()))
                }
                None => None,
            };
            let answered = metrics.heartbeat.as_ref().and_then(|times| *times.get(&replica)?);
            let heard = answered.is_some_and(|at| Instant::elapsed(&*at) <= state.lately)
                || state.slept_beside(replica);
            let member = member(replica, host);
            if metrics.current_leader == Some(replica) && !state.leader_is_lost() {
                status.leader = Some(member);
            }
            status.members.push(MemberStatus { member, voter: voters.contains(&replica), matched, heard });
        }
        status
    }

    /// Index of the last entry in the log; `None` while a raft snapshot is to take its place.
    pub fn log_end(&self) -> Option<u64> {
        let log = self.0.log().filter(|log| log.installing().is_none())?;
        Some(log.bounds().1.map_or(0, |last| last.index))
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

    /// Starts replicating to a new replica without giving it a vote; returns when that is committed, long before it
    /// has caught up ([`MemberStatus::matched`] shows how far it is). Adding a member again changes nothing.
    pub async fn add_learner(&self, member: Member) -> Result<(), ChangeError> {
        let raft = self.raft()?;
        self.0.awake().await;
        if let Some(known) = self.leads()?.members.iter().find(|it| it.member.replica == member.replica) {
            return match known.member == member {
                true => Ok(()),
                false => Err(ChangeError::Elsewhere { replica: member.replica, at: known.member.process }),
            };
        }
        match raft.add_learner(member.replica.0, Host(member.process.0), false).await {
            Ok(_) => Ok(()),
            Err(error) => Err(change_error(error)),
        }
    }

    /// Makes these replicas, voters or learners until now, the voting members; all others leave the group. One step for
    /// whoever asks, two entries in the log: until the second is committed, both majorities must agree. Asked again after
    /// an error, or by the next leader, it goes on where it was. Not to be dropped before it is done.
    ///
    /// A learner that is not caught up is refused.
    pub async fn change_members(&self, voters: Vec<ReplicaId>) -> Result<(), ChangeError> {
        let raft = self.raft()?;
        self.0.awake().await;
        let status = self.leads()?;
        let wanted: BTreeSet<u64> = voters.into_iter().map(|replica| replica.0).collect();
        for &replica in &wanted {
            let replica = ReplicaId(replica);
            let Some(member) = status.members.iter().find(|it| it.member.replica == replica) else {
                return Err(ChangeError::NotAMember(replica));
            };
            let behind = status.last.unwrap_or(0).saturating_sub(member.matched.unwrap_or(0));
            if !member.voter && (member.matched.is_none() || behind > CAUGHT_UP) {
                return Err(ChangeError::Behind { replica, entries: behind });
            }
        }
        let leaving: BTreeSet<u64> = status
            .members
            .iter()
            .filter(|it| !it.voter && !wanted.contains(&it.member.replica.0))
            .map(|it| it.member.replica.0)
            .collect();
        let mut changes = vec![ChangeMembers::ReplaceAllVoters(wanted)];
        if !leaving.is_empty() {
            changes.push(ChangeMembers::RemoveNodes(leaving));
        }
        match raft.change_membership(ChangeMembers::Batch(changes), false).await {
            Ok(_) => Ok(()),
            Err(error) => Err(change_error(error)),
        }
    }

    /// Asks `to` to take over, if it has answered lately. Returns once another replica leads; `InProgress` if none does
    /// within an election.
    pub async fn transfer_leader(&self, to: ReplicaId) -> Result<(), ChangeError> {
        let raft = self.raft()?;
        self.0.awake().await;
        let status = self.leads()?;
        let member = status.members.iter().find(|member| member.voter && member.member.replica == to);
        let Some(member) = member else { return Err(ChangeError::NotAMember(to)) };
        if to == self.0.me.replica {
            return Ok(());
        }
        // A leader that asks stops leading before it knows whether it was heard.
        if !member.heard {
            return Err(ChangeError::Silent(to));
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
            let Some(raft) = state.running() else { return };
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
        if !self.0.takes_part() {
            return Ok(());
        }
        self.raft()?.trigger().elect(true).await.map_err(|_| ChangeError::Stopped)
    }

    fn raft(&self) -> Result<&Raft, ChangeError> {
        self.0.running().ok_or(ChangeError::Stopped)
    }

    /// The status of a replica that leads.
    fn leads(&self) -> Result<GroupStatus, ChangeError> {
        let status = self.status();
        match status.role {
            Role::Leader => Ok(status),
            Role::Stopped => Err(ChangeError::Stopped),
            Role::Follower | Role::Candidate | Role::Learner => {
                Err(ChangeError::NotLeader { leader: status.leader })
            }
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
