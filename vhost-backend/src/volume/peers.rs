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

/// A chunkserver that was asked and said nothing at all for this long is mute: its reads are asked elsewhere meanwhile.
/// Twenty times what a read takes on a busy machine, half of what a reader may be kept waiting.
const MUTE_AFTER: Duration = Duration::from_millis(50);

/// All chunkservers of a volume.
#[derive(Debug)]
pub struct Peers {
    seat: Seat,
    list: Vec<Peer>,
    by_id: HashMap<ChunkserverId, PeerIndex>,
}

/// One chunkserver and the connection to it, which other disks may use as well. What they wait for there says nothing of
/// what we would: each counts its own.
#[derive(Debug)]
pub struct Peer {
    pub id: ChunkserverId,
    connection: Rc<RefCell<Connection>>,
    /// Requests put out that have no reply yet, theirs or a refusal.
    unanswered: u32,
    /// While there are any: since when nothing was heard.
    waiting_since: Option<Instant>,
}

impl Peers {
    pub fn new(seat: Seat) -> Self {
        Self { seat, list: Vec::new(), by_id: HashMap::new() }
    }

    /// The one of that name, made if need be.
    pub fn learn(&mut self, cluster: ClusterId, id: ChunkserverId, address: Option<SocketAddr>) -> PeerIndex {
        let index = self.by_id.get(&id).copied().unwrap_or_else(|| {
            let index = PeerIndex(u16::try_from(self.list.len()).expect("a volume has few chunkservers"));
            let connection = self.seat.link((cluster, id), index);
            self.list.push(Peer { id, connection, unanswered: 0, waiting_since: None });
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
    pub fn put(&mut self, to: PeerIndex, request: &Request, copyset: CopysetId, id: RequestId, now: Instant) {
        let id = self.seat.mark(id);
        let peer = &mut self[to];
        peer.connection.borrow_mut().put(request, copyset, id);
        peer.unanswered += 1;
        peer.waiting_since.get_or_insert(now);
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

impl std::ops::IndexMut<PeerIndex> for Peers {
    fn index_mut(&mut self, index: PeerIndex) -> &mut Peer {
        &mut self.list[usize::from(index.0)]
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

    /// A reply came from it.
    pub fn heard(&mut self, now: Instant) {
        self.unanswered = self.unanswered.saturating_sub(1);
        self.waiting_since = (self.unanswered > 0).then_some(now);
    }

    /// Its connection is gone: nothing that was asked on it will be answered.
    pub fn lost(&mut self) {
        (self.unanswered, self.waiting_since) = (0, None);
    }

    /// How long we have asked it things and it has said nothing.
    pub fn silent_for(&self, now: Instant) -> Duration {
        self.waiting_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    pub fn is_mute(&self, now: Instant) -> bool {
        self.silent_for(now) >= MUTE_AFTER
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
