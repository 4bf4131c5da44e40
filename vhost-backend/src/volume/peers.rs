//! A volume's chunkservers, and its share of the connections to them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId};
use evolute_protocol::wire::RequestId;
use evolute_protocol::wire::request::Request;

use crate::connections::{Connection, Lost, Mail, PeerIndex, Readiness, Seat};

/// All chunkservers of a volume.
#[derive(Debug)]
pub struct Peers {
    seat: Seat,
    list: Vec<Peer>,
    by_id: HashMap<ChunkserverId, PeerIndex>,
}

/// One chunkserver and the connection to it, which other disks may use as well.
#[derive(Debug)]
pub struct Peer {
    pub id: ChunkserverId,
    connection: Rc<RefCell<Connection>>,
}

impl Peers {
    pub fn new(seat: Seat) -> Self {
        Self { seat, list: Vec::new(), by_id: HashMap::new() }
    }

    /// The one of that name, made if need be.
    pub fn learn(&mut self, cluster: ClusterId, id: ChunkserverId, address: Option<SocketAddr>) -> PeerIndex {
        let index = self.by_id.get(&id).copied().unwrap_or_else(|| {
            let index = PeerIndex(u16::try_from(self.list.len()).expect("a volume has few chunkservers"));
            self.list.push(Peer { id, connection: self.seat.link((cluster, id), index) });
            self.by_id.insert(id, index);
            index
        });
        self[index].connection.borrow_mut().set_address(address);
        index
    }

    pub fn find(&self, id: ChunkserverId) -> Option<PeerIndex> {
        self.by_id.get(&id).copied()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.list.iter()
    }

    /// Puts a request out; it leaves at the end of the turn.
    pub fn put(&self, to: PeerIndex, request: &Request, copyset: CopysetId, id: RequestId, now: Instant) {
        self[to].connection.borrow_mut().put(request, copyset, self.seat.mark(id), now);
    }

    /// Moves what has come to `out`.
    pub fn take_mail(&self, out: &mut Vec<Mail>) {
        self.seat.take_mail(out);
    }

    /// Forgets all of them. Connections nobody else has a share in end.
    pub fn leave(&mut self) {
        self.list.clear();
        self.by_id.clear();
        self.seat.leave();
    }
}

impl std::ops::Index<PeerIndex> for Peers {
    type Output = Peer;

    fn index(&self, index: PeerIndex) -> &Peer {
        &self.list[usize::from(index.0)]
    }
}

impl Peer {
    /// See [`Connection::want`].
    pub fn want(&self, now: Instant, jitter: u32) -> Readiness {
        self.connection.borrow_mut().want(now, jitter)
    }

    pub fn is_open(&self) -> bool {
        self.connection.borrow().is_open()
    }

    pub fn is_doubtful(&self, now: Instant) -> bool {
        self.connection.borrow().is_doubtful(now)
    }

    pub fn silent_for(&self, now: Instant) -> Duration {
        self.connection.borrow().silent_for(now)
    }

    pub fn is_mute(&self, now: Instant) -> bool {
        self.connection.borrow().is_mute(now)
    }

    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        self.connection.borrow().deadline(now)
    }

    /// What it said cannot be right: its connection ends with this turn.
    pub fn give_up(&self, why: Lost) {
        self.connection.borrow_mut().give_up(why);
    }

    #[cfg(test)]
    pub fn address(&self) -> Option<SocketAddr> {
        self.connection.borrow().address()
    }
}
