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
use std::rc::Rc;

use tokio::net::TcpStream;

use self::frame::Outbox;
use self::link::Link;
use crate::group::Group;
use crate::{GroupId, ProcessId};

pub(crate) use self::network::Network;
pub(crate) use self::snapshot::Rate;
pub(crate) use self::snapshot::receive::Receiving;

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
    accepted: RefCell<Vec<std::rc::Weak<Outbox>>>,
    sessions: Rc<Cell<u64>>,
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
            sessions: Rc::default(),
        }))
    }

    /// Who this process is to others.
    pub fn me(&self) -> ProcessId {
        self.0.me
    }

    /// Serves an incoming, handshaken connection of another process, for all groups of this thread.
    pub fn accept(&self, stream: TcpStream) {
        let outbox = Rc::new(Outbox::default());
        {
            let mut accepted = self.0.accepted.borrow_mut();
            accepted.retain(|outbox| outbox.strong_count() > 0);
            accepted.push(Rc::downgrade(&outbox));
        }
        tokio::task::spawn_local(serve::serve(self.clone(), stream, outbox));
    }

    pub(crate) fn serve(&self, group: Group) {
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
