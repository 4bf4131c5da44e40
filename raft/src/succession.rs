//! A follower whose leader's process is gone does not wait out a silence: when the connection the leader called it on
//! is ended from the other side, and nobody answers where the leader was, it stands for election at once. (A kernel
//! ends the connections of a process that died, and refuses new ones.)
//!
//! ```text
//!  connection ends ──▶ dial: no answer ──▶ lost: its lease is void here ──▶ in my turn: pre-vote ──▶ election
//!                            │                   │
//!                            └── an answer:      └── it calls again: refuses candidates as before
//!                                nothing
//! ```
//!
//! What always holds:
//!
//! - Only the waiting is cut short. Who may lead is decided by openraft's terms, logs and pre-votes, as ever.
//! - A replica that hears its leader elects nobody else, whatever it lost before. So a link that comes and goes does
//!   not depose a leader that a majority hears.
//! - A replica stands for this reason once in the longest time an election takes. Whatever goes wrong more often is
//!   left to openraft's timer.
//!
//! A leader that is merely silent (frozen, cut off) is left to that timer, too: nobody can tell it from a slow one.

use std::cell::{Cell, OnceCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use openraft::async_runtime::watch::WatchReceiver;

use crate::peer::{Peers, WeakPeers};
use crate::state::State;
use crate::types::{LeaderId, TransferRequest, Vote};
use crate::{Group, ProcessId, ReplicaId};

/// Between two voters' turns. The first needs a round trip and a synced vote until the next hears of it; that they
/// meet all the same mostly costs no more than a round of pre-votes.
const TURN: Duration = Duration::from_millis(30);
/// When, from the beginning of a turn, pre-votes are asked for. The others may notice the loss a little later, and
/// whoever lacks entries is refused by those who have them: it goes on until openraft's timer would.
const TRIES_MS: [u64; 6] = [0, 10, 20, 60, 120, 240];
/// A leader keeps a group that long, at least, whoever wants it. Two followers that are asked by clients who each reach
/// one of them alone would take it from each other without end; this way both are served in turns.
const KEPT_MIN: Duration = Duration::from_secs(1);
/// Between two questions of a follower, however many clients ask it.
const ASKED_EVERY: Duration = Duration::from_millis(250);
/// How long a replica that leads for a client's sake is not to give that up for the sake of balance. Longer than most
/// cables are cut; whoever cannot wait asks again.
const STANDS_IN: Duration = Duration::from_secs(30);
/// Two whose pre-votes crossed have voted for themselves, and wait for each other; so does everybody whose candidate
/// died. After this long a candidate leads or will not: a few round trips and a synced vote.
const RETRY: Duration = Duration::from_millis(100);
const RETRIES: u32 = 8;

/// A leader, as its followers know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Leader {
    term: u64,
    replica: u64,
}

impl Leader {
    fn of(vote: &Vote) -> Option<Self> {
        vote.committed.then_some(Self { term: vote.leader_id.term, replica: vote.leader_id.voted_for })
    }

    fn vote(self) -> Vote {
        Vote { leader_id: LeaderId { term: self.term, voted_for: self.replica }, committed: true }
    }
}

/// What a replica knows of the connection to its leader.
#[derive(Default)]
pub(crate) struct Succession {
    peers: OnceCell<WeakPeers>,
    /// Whose appends came last, and over which connection.
    heard: Cell<Option<(Leader, u64)>>,
    lost: Cell<Option<Lost>>,
    stood: Cell<Option<Instant>>,
    /// The leader was last asked to hand over.
    asked: Cell<Option<Instant>>,
    /// This replica became the leader, or was last asked to hand over and did.
    settled: Cell<Option<Instant>>,
}

impl Succession {
    pub fn reached_by(&self, peers: WeakPeers) {
        // A group is served by one thread's peers as long as it runs.
        let _ = self.peers.set(peers);
    }

    pub fn peers(&self) -> Option<Peers> {
        self.peers.get()?.upgrade()
    }

    pub fn leads_now(&self) {
        self.settled.set(Some(Instant::now()));
    }
}

/// So that two do not keep meeting.
fn jitter(most: Duration) -> Duration {
    most.mul_f64(rand::random::<f64>())
}

fn within(time: Duration, since: Option<Instant>) -> bool {
    since.is_some_and(|since| since.elapsed() < time)
}

/// From here on openraft's own lease for this leader is void, until there is another leader.
#[derive(Debug, Clone, Copy)]
struct Lost {
    leader: Leader,
    /// It has called again, last at this time.
    heard: Option<Instant>,
}

impl State {
    /// An append came over the connection of this number.
    pub fn append_heard(&self, vote: &Vote, connection: u64) {
        let Some(leader) = Leader::of(vote).filter(|leader| leader.term >= self.term.get()) else { return };
        let succession = &self.succession;
        succession.heard.set(Some((leader, connection)));
        if let Some(lost) = succession.lost.get().filter(|lost| lost.leader == leader) {
            succession.lost.set(Some(Lost { heard: Some(Instant::now()), ..lost }));
        }
    }

    /// The leader, if this is the connection it was last heard over.
    fn led_over(&self, connection: u64) -> Option<Leader> {
        let (leader, last) = self.succession.heard.get()?;
        let leads = leader.term == self.term.get() && self.leading.get().is_none();
        (leads && last == connection).then_some(leader)
    }

    /// The vote of the leader, if this is the connection it was last heard over.
    pub fn leader_vote_over(&self, connection: u64) -> Option<Vote> {
        self.led_over(connection).map(Leader::vote)
    }

    /// Where the leader is that was last heard over this connection.
    pub fn leader_over(&self, connection: u64) -> Option<ProcessId> {
        let leader = self.led_over(connection)?;
        let metrics = self.running()?.metrics();
        let metrics = metrics.borrow_watched();
        let host = metrics.membership_config.nodes().find(|(replica, _)| **replica == leader.replica)?.1;
        Some(ProcessId(host.0))
    }

    /// This connection was ended by whoever called on it, and nobody is there any more.
    pub fn caller_is_gone(self: &Rc<Self>, connection: u64) {
        let Some(leader) = self.led_over(connection) else { return };
        tracing::info!(group = %self.id, term = leader.term, leader = leader.replica, "the leader is gone");
        self.succession.lost.set(Some(Lost { leader, heard: None }));
        tokio::task::spawn_local(self.clone().succeed(leader));
    }

    /// The leader's connection is gone, and it has not called again.
    pub fn leader_is_lost(&self) -> bool {
        self.lost().is_some_and(|lost| lost.heard.is_none())
    }

    /// The vote of a leader that was lost and is heard again, or sleeps: nobody else is voted for. Any other is openraft's
    /// care.
    pub fn stands_by(&self) -> Option<Vote> {
        let heard_again = || {
            let lost = self.lost()?;
            let lease = self.election_max / 2;
            (lost.heard?.elapsed() < lease).then(|| lost.leader.vote())
        };
        self.sleeps_under().or_else(heard_again)
    }

    fn lost(&self) -> Option<Lost> {
        self.succession.lost.get().filter(|lost| lost.leader.term == self.term.get())
    }

    async fn succeed(self: Rc<Self>, leader: Leader) {
        let Some(raft) = self.running() else { return };
        // What a leader that hands over tells everybody; it is as good as gone. Whom to does not matter: not to us, for
        // then we would stand without a pre-vote. An error is a stopped replica.
        let void = TransferRequest::new(leader.vote(), leader.replica, None);
        if raft.handle_transfer_leader(void).await.is_err() {
            return;
        }
        if !self.takes_part() || within(self.election_max, self.succession.stood.get()) {
            return;
        }
        let Some(turn) = self.turn(leader.replica) else { return };
        let now = Instant::now();
        self.succession.stood.set(Some(now));
        let begin = tokio::time::Instant::from_std(now) + TURN * turn;
        for after in TRIES_MS {
            tokio::time::sleep_until(begin + Duration::from_millis(after) + jitter(TURN / 6)).await;
            if self.term.get() != leader.term {
                // Somebody stands already, we perhaps.
                break;
            }
            if !self.leader_is_lost() || raft.trigger().elect(true).await.is_err() {
                return;
            }
        }
        for _ in 0..RETRIES {
            tokio::time::sleep(RETRY + TURN * turn + jitter(TURN)).await;
            if self.follows_after(leader) || raft.trigger().elect(true).await.is_err() {
                return;
            }
        }
    }

    /// The leader is back, or has a successor.
    fn follows_after(&self, leader: Leader) -> bool {
        let term = self.term.get();
        let heard = self.succession.heard.get().is_some_and(|(heard, _)| heard.term == term);
        let succeeded = term != leader.term && (heard || self.leading.get().is_some());
        succeeded || (term == leader.term && !self.leader_is_lost())
    }

    /// How many voters stand before this one, without the leader; `None`: no voter. Another order in every group, so
    /// that one process does not inherit all of a dead one's.
    pub fn turn(&self, leader: u64) -> Option<u32> {
        let metrics = self.running()?.metrics();
        let metrics = metrics.borrow_watched();
        let mut voters: Vec<u64> =
            metrics.membership_config.voter_ids().filter(|voter| *voter != leader).collect();
        voters.sort_unstable();
        let place = voters.iter().position(|voter| *voter == self.me.replica.0)? as u64;
        let count = voters.len() as u64;
        u32::try_from((place + self.id.0 % count) % count).ok()
    }
}

impl Group {
    /// Asks the leader to hand over to this replica: for an owner who knows of somebody that reaches this process and
    /// does not reach the leader's. The leader does so if it can, but not again and again; nobody is told.
    pub fn take_over(&self) {
        let succession = &self.0.succession;
        if !self.0.takes_part() || within(ASKED_EVERY, succession.asked.get()) {
            return;
        }
        let Some(leader) = self.status().leader.filter(|leader| *leader != self.me()) else { return };
        let Some(peers) = succession.peers() else { return };
        succession.asked.set(Some(Instant::now()));
        tracing::info!(group = %self.id(), %leader, "asking the leader to hand over");
        peers.out_of_reach(leader.process);
        peers.ask_to_hand_over(self.id(), leader, self.me().replica);
    }

    /// It leads, and was asked to lately ([`Self::take_over`]): whoever evens out leaders is to leave this one where it is.
    pub fn stands_in(&self) -> bool {
        self.0.leading.get().is_some() && within(STANDS_IN, self.0.succession.asked.get())
    }

    /// This process heard lately of a client that does not reach the member's ([`Self::take_over`], in any group): whoever
    /// evens out leaders is not to move this one there.
    pub fn is_out_of_reach(&self, member: ReplicaId) -> bool {
        let Some(peers) = self.0.succession.peers() else { return false };
        let status = self.status();
        let process = status.members.iter().map(|status| status.member).find(|m| m.replica == member);
        process.is_some_and(|member| within(STANDS_IN, peers.last_out_of_reach(member.process)))
    }

    /// A follower wants to lead in our place.
    pub(crate) fn hand_over(&self, to: ReplicaId) {
        let state = &self.0;
        if state.leading.get().is_none() || within(KEPT_MIN, state.succession.settled.get()) {
            return;
        }
        state.succession.settled.set(Some(Instant::now()));
        tracing::info!(group = %self.id(), %to, "handing over, as asked");
        let group = self.clone();
        // Whoever cannot take it does not, and this replica goes on.
        tokio::task::spawn_local(async move { group.transfer_leader(to).await });
    }
}
