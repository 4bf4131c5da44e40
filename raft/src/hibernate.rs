//! Groups that have nothing to do sleep: no ticks, no heartbeats, no timers. What an idle group costs is its memory.
//!
//! ```text
//!            nothing new for a while, every member has and applied everything, and answers
//!  awake ───────────────────────────────────────────────────────────────────────────────────▶ leader: Sleep to each
//!    ▲                                                                                      member ──▶ "I do" from all
//!    │  leader: a proposal, a change, a vote asked for, a member's process gone or silent          │
//!    │  follower: entries, another vote, Wake; its leader's process gone or silent                 ▼
//!    └───────────────────────────────────────────────────────────────────────────────────────── asleep
//! ```
//!
//! Processes go on showing each other that they live (`Kind::Alive`), each thread for all of its groups. Whoever sleeps
//! relies on that, and on the leader's word that it will say if it stops leading.
//!
//! What always holds:
//!
//! - Nobody's safety depends on who is awake: terms, logs and votes are openraft's as ever, and nothing here is read
//!   off a clock but when to *ask* for votes.
//! - A sleeping replica refuses candidates as one that hears its leader does: a member that starts again does not unseat
//!   a leader that sleeps. That leader wakes up and shows itself.
//! - A leader that was asleep takes proposals once a majority has answered it: openraft's lease ran out meanwhile. Until
//!   then they wait here, in order and bounded as ever.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use openraft::async_runtime::Instant as _;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::{ServerState, TokioInstant};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::group::{Done, Group};
use crate::node::Inner;
use crate::peer::{Caller, Connection};
use crate::state::State;
use crate::types::{AppendRequest, LeaderId, Vote};
use crate::{Command, Position, ProcessId, ProposeError, ReplicaId};

/// Every process shows itself to those it calls after this many heartbeats, and then looks after its groups.
const HEARTBEATS_PER_LOOK: u32 = 2;
/// A group in which nothing was new for so many looks, 3 s with the usual timing, goes to sleep. To wake up takes a
/// round trip: few who pause that long notice.
const STILL_LOOKS: u32 = 10;
/// A member that has not said by then that it sleeps does not.
const ANSWER_MAX: Duration = Duration::from_secs(1);

/// What a replica knows about its sleep.
#[derive(Default)]
pub(crate) struct Hibernation {
    mode: Cell<Mode>,
    /// Up to where everything was applied at the last look, and how many looks that has been so.
    still: Cell<(Option<Position>, u32)>,
    /// Reasons to be awake so far: one that came while members were asked to sleep counts.
    stirs: Cell<u64>,
    /// Whose appends came when this follower fell asleep: while that one shows itself, the leader lives.
    caller: RefCell<Option<Rc<Caller>>>,
    /// The members that fell asleep at this leader's word, and the connections to them.
    members: RefCell<Vec<(ReplicaId, Rc<Connection>)>>,
    /// This leader last woke up.
    woke: Cell<Option<Instant>>,
    /// Proposals that wait until it is awake.
    held: RefCell<Vec<(Command, Done)>>,
    awake: Notify,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Mode {
    #[default]
    Awake,
    /// A leader that waits for a majority to answer.
    Waking,
    Asleep,
}

impl Hibernation {
    /// Whether proposals have to wait, for they would be refused.
    pub fn holds(&self) -> bool {
        self.mode.get() != Mode::Awake
    }
}

impl State {
    pub fn is_asleep(&self) -> bool {
        self.hibernation.mode.get() == Mode::Asleep
    }

    /// A proposal for which [`Hibernation::holds`] is to wait.
    pub fn hold(self: &Rc<Self>, command: Command, done: Done) {
        self.count_proposal(command.len());
        self.hibernation.held.borrow_mut().push((command, done));
        self.stir();
    }

    /// There is a reason to be awake.
    pub fn stir(self: &Rc<Self>) {
        let hibernation = &self.hibernation;
        hibernation.stirs.set(hibernation.stirs.get() + 1);
        if !self.is_asleep() {
            return;
        }
        let Some(raft) = self.running() else { return };
        hibernation.caller.take();
        hibernation.still.set((None, 0));
        raft.runtime_config().tick(true);
        if self.leading.get().is_none() {
            hibernation.mode.set(Mode::Awake);
            self.release();
            return;
        }
        hibernation.mode.set(Mode::Waking);
        hibernation.woke.set(Some(Instant::now()));
        tokio::task::spawn_local(self.clone().renew());
    }

    /// Wakes up, and returns when whatever needs a leader's lease can be asked for.
    pub async fn awake(self: &Rc<Self>) {
        self.stir();
        let awake = self.hibernation.awake.notified();
        if self.hibernation.mode.get() == Mode::Waking {
            awake.await;
        }
    }

    async fn renew(self: Rc<Self>) {
        self.until_renewed().await;
        // It may have lost its leadership meanwhile, and follow one that sleeps.
        if self.hibernation.mode.get() == Mode::Waking {
            self.hibernation.mode.set(Mode::Awake);
        }
        self.release();
    }

    /// Until a majority has answered a heartbeat sent from now on, or will not.
    async fn until_renewed(&self) {
        let Some(raft) = self.running() else { return };
        let now = TokioInstant::now();
        let mut metrics = raft.metrics();
        let renewed = async {
            if raft.trigger().heartbeat().await.is_err() {
                return;
            }
            loop {
                {
                    let metrics = metrics.borrow_and_update();
                    let alone = metrics.membership_config.voter_ids().count() == 1;
                    let acked = metrics.last_quorum_acked.is_some_and(|at| *at >= now);
                    if alone || acked || metrics.state != ServerState::Leader {
                        return;
                    }
                }
                if metrics.changed().await.is_err() {
                    return;
                }
            }
        };
        // Then openraft answers whatever is asked of it that there is no lease.
        let _ = timeout(self.election_max / 2, renewed).await;
    }

    /// Nothing waits for its waking up any more.
    fn release(self: &Rc<Self>) {
        self.hibernation.awake.notify_waiters();
        let group = Group(self.clone());
        for (command, done) in self.hibernation.held.take() {
            self.forget_proposal(command.len());
            group.propose(command, done);
        }
    }

    /// It will not be awake again.
    pub fn refuse_held(&self) {
        self.hibernation.mode.set(Mode::Awake);
        for (command, done) in self.hibernation.held.take() {
            self.forget_proposal(command.len());
            done(Err(ProposeError::Stopped));
        }
    }

    /// A leader says, over the connection of `caller`, that nothing comes after `last` for a while. False: this replica is
    /// not where the leader thinks it is, and goes on ticking.
    pub fn sleep(&self, vote: &Vote, last: Position, caller: &Rc<Caller>) -> bool {
        let Some(raft) = self.running() else { return false };
        let logged = self.log().and_then(|log| log.bounds().1);
        if self.leader_vote_over(caller.number) != Some(*vote)
            || logged != Some(last)
            || self.applied.get() != Some(last)
        {
            return false;
        }
        *self.hibernation.caller.borrow_mut() = Some(caller.clone());
        self.hibernation.mode.set(Mode::Asleep);
        raft.runtime_config().tick(false);
        true
    }

    /// An append came. A sleeping follower wakes up for entries and for whoever it does not know; a heartbeat of its
    /// leader tells it nothing.
    pub fn append_stirs(self: &Rc<Self>, append: &AppendRequest, connection: u64) {
        if self.is_asleep() {
            let known = self.hibernation.caller.borrow().as_ref().is_some_and(|it| it.number == connection);
            if !append.entries.is_empty() || !known || self.leader_vote_over(connection) != Some(append.vote)
            {
                self.stir();
            }
        }
    }

    /// Somebody asks for votes: a leader shows itself. A follower lets it, and refuses ([`Self::sleeps_under`]).
    pub fn vote_stirs(self: &Rc<Self>) {
        if self.leading.get().is_some() {
            self.stir();
        }
    }

    /// Who candidates are refused for by a replica that does not tick, or by a leader that has just begun to again.
    pub fn sleeps_under(&self) -> Option<Vote> {
        if let Some(term) = self.leading.get() {
            let stands = self.is_asleep()
                || self.hibernation.woke.get().is_some_and(|woke| woke.elapsed() < self.election_max / 2);
            let leader_id = LeaderId { term, voted_for: self.me.replica.0 };
            return stands.then_some(Vote { leader_id, committed: true });
        }
        let caller = self.hibernation.caller.borrow();
        let caller = caller.as_ref().filter(|caller| caller.silence() < self.silence_max())?;
        self.leader_vote_over(caller.number)
    }

    /// A leader's process that does not show itself for this long is taken for gone. The election timer takes as long.
    fn silence_max(&self) -> Duration {
        self.election_max * 3 / 4
    }

    /// Whether the member fell asleep at this leader's word and has been there since: nobody asks it any more.
    pub fn slept_beside(&self, replica: u64) -> bool {
        let hibernation = &self.hibernation;
        let lately = hibernation.woke.get().is_some_and(|woke| woke.elapsed() < self.lately);
        (hibernation.holds() || lately)
            && hibernation
                .members
                .borrow()
                .iter()
                .any(|(member, connection)| member.0 == replica && connection.is_heard(self.lately))
    }

    /// What is due for this replica. `stood_still`: this thread did not run for a while, and has not heard everything that was
    /// said meanwhile.
    fn look(self: &Rc<Self>, stood_still: bool) {
        let Some(raft) = self.running() else { return };
        let hibernation = &self.hibernation;
        if self.leading.get().is_some() {
            if raft.metrics().borrow_watched().running_state.is_err() {
                // Its log failed, perhaps. Nobody is to wait for it.
                self.wake_members();
                return;
            }
            match hibernation.mode.get() {
                Mode::Asleep if !stood_still && !self.everybody_is_there() => self.stir(),
                Mode::Asleep | Mode::Waking => {}
                Mode::Awake if self.is_still() => {
                    hibernation.still.set((None, 0));
                    tokio::task::spawn_local(self.clone().fall_asleep());
                }
                Mode::Awake => {}
            }
        } else if self.is_asleep() && !stood_still {
            let silence =
                hibernation.caller.borrow().as_ref().map_or(Duration::MAX, |caller| caller.silence());
            if silence > self.silence_max() && silence > self.silence_max() + self.patience() {
                tracing::info!(group = %self.id, "the leader's process is silent");
                self.stir();
            }
        }
    }

    /// Those who wake up together stand for election against each other.
    fn patience(&self) -> Duration {
        let leader = self.running().and_then(|raft| raft.metrics().borrow_watched().current_leader);
        leader
            .and_then(|leader| self.turn(leader))
            .map_or(Duration::ZERO, |turn| self.election_max / 4 * turn)
    }

    fn everybody_is_there(&self) -> bool {
        self.hibernation.members.borrow().iter().all(|(_, connection)| connection.is_heard(self.lately))
    }

    /// Whether this leader has had nothing to do for a while. Called once a look.
    fn is_still(&self) -> bool {
        let applied = self.applied.get();
        let quiet = self.serves().is_some() && self.proposals.get() == 0;
        let (last, looks) = self.hibernation.still.get();
        let looks = if quiet && applied == last { looks + 1 } else { 0 };
        self.hibernation.still.set((applied, looks));
        looks >= STILL_LOOKS
    }

    async fn fall_asleep(self: Rc<Self>) {
        let Some(peers) = self.succession.peers() else { return };
        let (stirs, Some(last)) = (self.hibernation.stirs.get(), self.applied.get()) else { return };
        let Some(term) = self.serves() else { return };
        let status = Group(self.clone()).status();
        let others: Vec<_> =
            status.members.iter().filter(|member| member.member.replica != self.me.replica).collect();
        let caught_up = others.iter().all(|it| it.heard && it.matched == Some(last.index));
        if !caught_up || status.last != Some(last.index) {
            return;
        }
        let vote = Vote { leader_id: LeaderId { term, voted_for: self.me.replica.0 }, committed: true };
        let asking = others.iter().map(|other| async {
            let connection = peers.connected(other.member.process)?;
            let slept = connection.sleep(self.id, other.member.replica, &vote, last);
            let slept = timeout(ANSWER_MAX, slept).await.unwrap_or(false);
            slept.then_some((other.member.replica, connection))
        });
        let members: Option<Vec<_>> = futures::future::join_all(asking).await.into_iter().collect();
        let Some(members) = members else { return };
        let Some(raft) = self.running() else { return };
        // Those who sleep wake up with whatever came in between.
        let still = self.hibernation.stirs.get() == stirs && self.proposals.get() == 0;
        if still && self.serves() == Some(term) && self.applied.get() == Some(last) {
            *self.hibernation.members.borrow_mut() = members;
            self.hibernation.mode.set(Mode::Asleep);
            raft.runtime_config().tick(false);
        }
    }

    /// This replica does not lead any more, and will not say so with entries.
    pub fn wake_members(&self) {
        let (Some(raft), Some(peers)) = (self.running(), self.succession.peers()) else { return };
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        for (&replica, host) in metrics.membership_config.nodes() {
            if let Some(connection) = peers.connected(ProcessId(host.0)) {
                connection.wake(self.id, ReplicaId(replica));
            }
        }
    }

    /// The leader said, over this connection, that it does not lead any more.
    pub fn woken(self: &Rc<Self>, connection: u64) {
        if self.is_asleep() && self.leader_vote_over(connection).is_some() {
            let (state, patience, stirs) = (self.clone(), self.patience() / 4, self.hibernation.stirs.get());
            tokio::task::spawn_local(async move {
                tokio::time::sleep(patience).await;
                if state.hibernation.stirs.get() == stirs {
                    state.stir();
                }
            });
        }
    }
}

/// Shows this process to the others and looks after the groups of `node` until it is gone.
pub(crate) async fn watch(node: Weak<Inner>, heartbeat: Duration) {
    let every = heartbeat * HEARTBEATS_PER_LOOK;
    let mut last = Instant::now();
    loop {
        tokio::time::sleep(every).await;
        let Some(node) = node.upgrade() else { return };
        let stood_still = last.elapsed() > every * 2;
        last = Instant::now();
        node.peers.show_life();
        for group in node.groups.borrow().values() {
            group.0.look(stood_still);
        }
    }
}
