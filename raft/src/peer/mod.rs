//! Connections to other processes: one per direction and pair, shared by all groups.
//!
//! Whoever leads calls: it sends appends on its own connection and gets their answers there; votes and transfers go
//! the same way. So a pair of processes that lead something each has two connections. Raft snapshots have one more
//! (`snapshot`).
//!
//! ```text
//!  openraft ──stream_append──▶ network.rs ──frames──▶ Outbox ──one write──▶ … ──▶ serve.rs ──▶ openraft
//!      ▲                            ▲                                               │
//!      └──── answers in order ──────┴──────────── link.rs (reads) ◀──── frames ─────┘
//! ```
//!
//! What always holds:
//!
//! - A session number is used once in the life of this process, so an answer that comes late, or over a connection
//!   that replaced another one, can never be taken for the answer to something else.
//! - Losing a connection fails everything that waited on it, at once. A peer that is silent fails what waits on it
//!   after a time; nobody waits for it who need not.
//! - Memory for a peer that does not read is bounded; damaged or senseless bytes end the connection they came on, and
//!   nothing else.
//! - A message to a replica that is not hosted here (any more) is answered so, never by another member.
//!
//! It does not know where processes are, nor how they greet each other ([`Dial`]).

mod frame;
mod link;
mod message;
mod network;
mod serve;
mod snapshot;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use evolute_daemon::door::Seat;
use tokio::net::TcpStream;
use tokio::time::timeout;

use self::frame::{Kind, Outbox};
use self::link::Link;
use self::message::put_take_over;
use crate::group::Group;
use crate::{GroupId, Member, ProcessId, ReplicaId};

pub use self::frame::write_all;
pub(crate) use self::link::Connection;
pub(crate) use self::network::Network;
pub(crate) use self::snapshot::Rate;
pub(crate) use self::snapshot::receive::Receiving;

/// A process that has just ended a connection and takes no new one for this long is taken for gone: a host that lost
/// its power refuses nothing. Some ten handshakes on a busy machine, a fraction of an election.
const ANSWER_MAX: Duration = Duration::from_millis(100);

/// How often it is asked; then the election timer is as quick.
const QUESTIONS: u32 = 4;

/// What [`Dial::dial`] returns.
pub type DialFuture = Pin<Box<dyn Future<Output = io::Result<TcpStream>>>>;

/// How the owner reaches another process: connects, and shakes hands as the two need it.
pub trait Dial {
    /// A connection to `to` on which the other side has called [`Peers::accept`] or is about to. Bounded by us: a dial
    /// that takes too long is dropped.
    fn dial(&self, to: ProcessId) -> DialFuture;
}

/// The connections of one thread to other processes.
#[derive(Clone)]
pub struct Peers(Rc<Inner>);

struct Inner {
    me: ProcessId,
    dial: Rc<dyn Dial>,
    groups: RefCell<HashMap<GroupId, Group>>,
    links: RefCell<HashMap<ProcessId, Rc<Link>>>,
    /// The connections that raft snapshots are sent on.
    bulk: RefCell<HashMap<ProcessId, Rc<Link>>>,
    accepted: RefCell<Vec<Weak<Outbox>>>,
    accepted_ever: Cell<u64>,
    /// Processes that some client did not reach, and when that was last heard of.
    out_of_reach: RefCell<HashMap<ProcessId, Instant>>,
    sessions: Rc<Cell<u64>>,
}

/// Who calls us over one connection.
pub(crate) struct Caller {
    /// No other connection's in the life of this process.
    pub number: u64,
    /// It last showed itself.
    heard: Cell<Instant>,
}

impl Caller {
    /// For how long it has not shown itself: also after its connection has ended.
    pub fn silence(&self) -> Duration {
        self.heard.get().elapsed()
    }
}

/// [`Peers`] for what they themselves hold.
#[derive(Clone)]
pub(crate) struct WeakPeers(Weak<Inner>);

impl WeakPeers {
    pub fn upgrade(&self) -> Option<Peers> {
        self.0.upgrade().map(Peers)
    }
}

impl Peers {
    pub fn new(me: ProcessId, dial: Rc<dyn Dial>) -> Self {
        Self(Rc::new(Inner {
            me,
            dial,
            groups: RefCell::default(),
            links: RefCell::default(),
            bulk: RefCell::default(),
            accepted: RefCell::default(),
            accepted_ever: Cell::default(),
            out_of_reach: RefCell::default(),
            sessions: Rc::default(),
        }))
    }

    /// Who this process is to others.
    pub fn me(&self) -> ProcessId {
        self.0.me
    }

    /// Serves an incoming, handshaken connection of another process, for all groups of this thread, as long as it may
    /// keep its seat.
    pub fn accept(&self, stream: TcpStream, seat: Option<Seat>) {
        let outbox = Rc::new(Outbox::default());
        {
            let mut accepted = self.0.accepted.borrow_mut();
            accepted.retain(|outbox| outbox.strong_count() > 0);
            accepted.push(Rc::downgrade(&outbox));
        }
        self.0.accepted_ever.set(self.0.accepted_ever.get() + 1);
        let caller = Rc::new(Caller { number: self.0.accepted_ever.get(), heard: Cell::new(Instant::now()) });
        tokio::task::spawn_local(serve::serve(self.clone(), stream, outbox, caller, seat));
    }

    /// An accepted connection was ended, and not by us. Whoever called on it may be gone: then the groups it led are to
    /// hear of it.
    fn lost(&self, connection: u64) {
        let groups = self.0.groups.borrow();
        let led: Vec<Group> =
            groups.values().filter(|group| group.0.leader_over(connection).is_some()).cloned().collect();
        let Some(caller) = led.iter().find_map(|group| group.0.leader_over(connection)) else { return };
        let peers = self.clone();
        tokio::task::spawn_local(async move {
            for _ in 0..QUESTIONS {
                if !peers.answers(caller).await {
                    tracing::info!(%caller, groups = led.len(), "a peer that led is gone");
                    led.iter().for_each(|group| group.0.caller_is_gone(connection));
                    return;
                }
                // One that lives calls again soon. One that was dying had not come to its listening socket yet.
                tokio::time::sleep(ANSWER_MAX).await;
                if led.iter().all(|group| group.0.leader_over(connection).is_none()) {
                    return;
                }
            }
        });
    }

    /// Whether anybody takes a connection there.
    async fn answers(&self, process: ProcessId) -> bool {
        matches!(timeout(ANSWER_MAX, self.0.dial.dial(process)).await, Ok(Ok(_)))
    }

    pub(crate) fn serve(&self, group: Group) {
        group.0.succession.reached_by(WeakPeers(Rc::downgrade(&self.0)));
        self.0.groups.borrow_mut().insert(group.id(), group);
    }

    pub(crate) fn stop_serving(&self, group: GroupId) {
        self.0.groups.borrow_mut().remove(&group);
    }

    /// Ends every connection, in both directions.
    pub(crate) fn close(&self) {
        for links in [&self.0.links, &self.0.bulk] {
            links.borrow_mut().drain().for_each(|(_, link)| link.close());
        }
        self.0
            .accepted
            .borrow_mut()
            .drain(..)
            .filter_map(|outbox| outbox.upgrade())
            .for_each(|it| it.close());
    }

    /// Asks `leader` to hand the group over to `me`. Told once, to whoever is there.
    pub(crate) fn ask_to_hand_over(&self, group: GroupId, leader: Member, me: ReplicaId) {
        let link = self.link(leader.process);
        tokio::task::spawn_local(async move {
            if let Ok(connection) = link.up().await {
                let body = |out: &mut bytes::BytesMut| put_take_over(out, leader.replica.0, me.0);
                connection.outbox.frame(Kind::TakeOver, group, 0, body);
            }
        });
    }

    /// Tells every process called from here that this one lives.
    pub(crate) fn show_life(&self) {
        let links: Vec<_> = self.0.links.borrow().values().cloned().collect();
        links.iter().filter_map(|link| link.connected()).for_each(|connection| connection.show_life());
    }

    /// The connection to `process`, if there is one now.
    pub(crate) fn connected(&self, process: ProcessId) -> Option<Rc<Connection>> {
        self.0.links.borrow().get(&process)?.connected()
    }

    /// A client does not reach this process.
    pub(crate) fn out_of_reach(&self, process: ProcessId) {
        self.0.out_of_reach.borrow_mut().insert(process, Instant::now());
    }

    pub(crate) fn last_out_of_reach(&self, process: ProcessId) -> Option<Instant> {
        self.0.out_of_reach.borrow().get(&process).copied()
    }

    fn group(&self, group: GroupId) -> Option<Group> {
        self.0.groups.borrow().get(&group).cloned()
    }

    fn link(&self, to: ProcessId) -> Rc<Link> {
        self.link_of(&self.0.links, to)
    }

    /// For what must not stand in the way of anything.
    fn bulk_link(&self, to: ProcessId) -> Rc<Link> {
        self.link_of(&self.0.bulk, to)
    }

    fn link_of(&self, links: &RefCell<HashMap<ProcessId, Rc<Link>>>, to: ProcessId) -> Rc<Link> {
        let mut links = links.borrow_mut();
        let link = links
            .entry(to)
            .or_insert_with(|| Rc::new(Link::new(to, self.0.dial.clone(), self.0.sessions.clone())));
        link.clone()
    }
}
