//! Chunk → copyset → the chunkserver we believe leads it; learned from the control plane's map and from every answer.
//!
//! A route is one copyset of the volume. It is either *confirmed* (its target answered us and nothing said otherwise
//! since), and then everything for it goes to the target at once; or it is *searching*, and then one operation goes
//! ahead as a probe while the others are parked, so that an election costs a few small requests and not a storm.
//!
//! What always holds: what a route has seen (`fresh`) never falls; nothing but a fence is sent on a route that is not
//! fenced; whatever is known of a chunk's place stays known until a newer map says otherwise.
//!
//! It does not know sockets or clocks.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use evolute_protocol::geometry::CHUNKS_PER_SEGMENT;
use evolute_protocol::id::{ChunkIndex, ChunkserverId, ClusterId, CopysetId, SegmentIndex};
use evolute_protocol::wire::reply::{Freshness, Refusal};
use smallvec::SmallVec;

use super::inflight::Key;
use super::peers::Peers;
use super::recent::RecentChanges;
use super::split::segment_of;
use crate::connections::PeerIndex;

#[expect(clippy::cast_possible_truncation, reason = "64")]
pub const CHUNKS: usize = CHUNKS_PER_SEGMENT as usize;

/// Which of a volume's copysets: its place in the table of routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RouteIndex(pub u16);

/// The copyset of each chunk of a segment.
pub type SegmentCopysets = [CopysetId; CHUNKS];

/// Where a volume's data is, as the control plane tells it. Every copyset a segment names is among `copysets`, and
/// every replica's chunkserver among `chunkservers`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Map {
    pub cluster: ClusterId,
    pub segments: Vec<(SegmentIndex, SegmentCopysets)>,
    pub copysets: Vec<CopysetMembers>,
    pub chunkservers: Vec<ChunkserverPlace>,
}

/// Who holds a copyset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopysetMembers {
    pub copyset: CopysetId,
    pub replicas: Vec<ChunkserverId>,
    /// As last reported.
    pub leader: Option<ChunkserverId>,
}

/// Where a chunkserver listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkserverPlace {
    pub chunkserver: ChunkserverId,
    /// host:port, as registered.
    pub address: String,
    /// What that means here and now; `None` if the name cannot be resolved.
    pub resolved: Option<SocketAddr>,
}

/// Whether our epoch holds in a copyset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fencing {
    Needed,
    Asked(Key),
    Done,
}

/// One copyset of the volume.
#[derive(Debug)]
pub struct Route {
    pub copyset: CopysetId,
    pub replicas: SmallVec<[PeerIndex; 3]>,
    /// Whom we believe to lead.
    pub target: PeerIndex,
    /// The target answered, and nothing said otherwise since.
    pub confirmed: bool,
    /// Since when we have not known who leads.
    pub searching_since: Option<Instant>,
    /// The target was named by somebody who should know, and has not been given up since.
    pub hinted: bool,
    /// Hints followed since the last pause.
    pub redirects: u32,
    /// Refusals in a row that asked for patience.
    pub setbacks: u32,
    pub paused_until: Option<Instant>,
    /// The highest term and the highest index seen in any answer of this copyset.
    pub fresh: Freshness,
    /// What followers are asked for at most. Nothing we were shown or told is part of an entry beyond this index, and the
    /// leaders of this term and of all later ones have that entry.
    pub shown: Freshness,
    pub fencing: Fencing,
    /// What was changed lately.
    pub recent: RecentChanges,
    /// Waiting for a leader, in the order they came.
    pub parked: VecDeque<Key>,
    /// The one that goes ahead while we search.
    pub probe: Option<Key>,
    /// A follower was last asked to lead in the place of one that we do not reach.
    pub take_over_asked: Option<Instant>,
    /// What each last refused with, since something was answered here.
    pub refusals: SmallVec<[(PeerIndex, Refusal); 3]>,
    /// The operator was told that I/O is held here, since then.
    pub held_since: Option<Instant>,
}

impl Route {
    fn new(copyset: CopysetId, replicas: SmallVec<[PeerIndex; 3]>, target: PeerIndex) -> Self {
        Self {
            copyset,
            replicas,
            target,
            confirmed: false,
            searching_since: None,
            hinted: false,
            redirects: 0,
            setbacks: 0,
            paused_until: None,
            fresh: Freshness::default(),
            shown: Freshness::default(),
            fencing: Fencing::Needed,
            recent: RecentChanges::default(),
            parked: VecDeque::new(),
            probe: None,
            take_over_asked: None,
            refusals: SmallVec::new(),
            held_since: None,
        }
    }

    /// Everything may be sent to the target, now.
    pub fn is_clear(&self) -> bool {
        self.confirmed
            && self.fencing == Fencing::Done
            && self.paused_until.is_none()
            && self.parked.is_empty()
    }

    pub fn searching(&self, now: Instant) -> Duration {
        self.searching_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// The replica after the target, in a circle.
    pub fn next_replica(&self) -> PeerIndex {
        let at = self.replicas.iter().position(|peer| *peer == self.target).map_or(0, |at| at + 1);
        self.replicas.get(at % self.replicas.len().max(1)).copied().unwrap_or(self.target)
    }

    /// Somebody who should know says that `leader` leads.
    pub fn follow(&mut self, leader: PeerIndex, now: Instant) {
        self.target = leader;
        self.hinted = true;
        self.redirects += 1;
        self.lose(now);
    }

    /// The target does not lead, or does not answer: the next replica, after a while.
    pub fn search(&mut self, now: Instant, after: Duration) {
        self.target = self.next_replica();
        self.hinted = false;
        self.lose(now);
        self.pause(now, after);
    }

    fn lose(&mut self, now: Instant) {
        self.confirmed = false;
        self.searching_since.get_or_insert(now);
    }

    pub fn retarget(&mut self, peer: PeerIndex, now: Instant) {
        self.target = peer;
        self.lose(now);
    }

    pub fn pause(&mut self, now: Instant, after: Duration) {
        if !after.is_zero() {
            self.redirects = 0;
            self.paused_until = Some(now + after);
        }
    }

    /// Whether an answer with this freshness may be given to a reader that had seen `floor` when it asked.
    pub fn is_fresh(answer: Freshness, floor: Freshness) -> bool {
        answer.term >= floor.term && answer.index >= floor.index
    }

    /// A replica that need not lead has shown this much.
    pub fn seen(&mut self, at: Freshness) {
        self.fresh.index = self.fresh.index.max(at.index);
        self.show(at);
    }

    /// Something was shown that can be part of the entry `at`. Of two terms for one entry the lower one: more logs come
    /// up to it.
    pub fn show(&mut self, at: Freshness) {
        if (at.index, self.shown.term) > (self.shown.index, at.term) {
            self.shown = at;
        }
    }

    /// `peer` answered as only a leader can. Says whether it is another than we followed, or we were searching.
    pub fn answered(&mut self, peer: PeerIndex, fresh: Freshness) -> bool {
        // One that was deposed may still answer for what it did before.
        let leads = fresh.term >= self.fresh.term;
        self.fresh.term = self.fresh.term.max(fresh.term);
        self.fresh.index = self.fresh.index.max(fresh.index);
        self.show(fresh);
        if !leads || (self.confirmed && self.target == peer) {
            return false;
        }
        self.target = peer;
        self.confirmed = true;
        self.searching_since = None;
        self.redirects = 0;
        self.paused_until = None;
        true
    }
}

/// Everything known about where the volume's data is.
#[derive(Debug, Default)]
pub struct Routing {
    segments: Vec<Option<Box<[RouteIndex; CHUNKS]>>>,
    routes: Vec<Route>,
    by_copyset: HashMap<CopysetId, RouteIndex>,
}

/// A segment names a copyset that no map told us of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is in no map")]
pub struct UnknownCopyset(pub CopysetId);

impl Routing {
    /// Takes over what a map says. Chunkservers are entered into `peers`; nothing known is forgotten.
    pub fn learn(&mut self, map: &Map, peers: &mut Peers, now: Instant) {
        for place in &map.chunkservers {
            peers.learn(map.cluster, place.chunkserver, place.resolved);
        }
        for members in &map.copysets {
            let replicas: SmallVec<[PeerIndex; 3]> =
                members.replicas.iter().filter_map(|id| peers.find(*id)).collect();
            let leader = members.leader.and_then(|id| peers.find(id)).filter(|peer| replicas.contains(peer));
            let Some(target) = leader.or_else(|| replicas.first().copied()) else { continue };
            match self.by_copyset.get(&members.copyset) {
                Some(index) => {
                    let route = &mut self.routes[usize::from(index.0)];
                    let stays = replicas.contains(&route.target);
                    route.replicas = replicas;
                    if !stays {
                        route.retarget(target, now);
                    }
                }
                None => {
                    let index = RouteIndex(u16::try_from(self.routes.len()).expect("few copysets a volume"));
                    self.routes.push(Route::new(members.copyset, replicas, target));
                    self.by_copyset.insert(members.copyset, index);
                }
            }
        }
        for (segment, copysets) in &map.segments {
            // A map is checked where it is received; a copyset without replicas leaves its segments unknown to us,
            // and their chunks wait for a better map.
            let _ = self.learn_segment(*segment, copysets);
        }
    }

    pub fn learn_segment(
        &mut self,
        segment: SegmentIndex,
        copysets: &SegmentCopysets,
    ) -> Result<(), UnknownCopyset> {
        let mut routes = [RouteIndex(0); CHUNKS];
        for (route, copyset) in routes.iter_mut().zip(copysets) {
            *route = *self.by_copyset.get(copyset).ok_or(UnknownCopyset(*copyset))?;
        }
        let at = segment.0 as usize;
        if self.segments.len() <= at {
            self.segments.resize(at + 1, None);
        }
        self.segments[at] = Some(Box::new(routes));
        Ok(())
    }

    /// `None`: the segment was never written.
    pub fn route_of(&self, chunk: ChunkIndex) -> Option<RouteIndex> {
        let segment = self.segments.get(segment_of(chunk).0 as usize)?.as_ref()?;
        Some(segment[chunk.0 as usize % CHUNKS])
    }

    pub fn find(&self, copyset: CopysetId) -> Option<RouteIndex> {
        self.by_copyset.get(&copyset).copied()
    }

    pub fn get_mut(&mut self, index: RouteIndex) -> Option<&mut Route> {
        self.routes.get_mut(usize::from(index.0))
    }

    pub fn indices(&self) -> impl Iterator<Item = RouteIndex> + use<> {
        (0..self.routes.len()).filter_map(|at| u16::try_from(at).ok()).map(RouteIndex)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Route> {
        self.routes.iter()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Route> {
        self.routes.iter_mut()
    }
}

impl std::ops::Index<RouteIndex> for Routing {
    type Output = Route;

    fn index(&self, index: RouteIndex) -> &Route {
        &self.routes[usize::from(index.0)]
    }
}

impl std::ops::IndexMut<RouteIndex> for Routing {
    fn index_mut(&mut self, index: RouteIndex) -> &mut Route {
        &mut self.routes[usize::from(index.0)]
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use evolute_protocol::id::{ChunkIndex, ChunkserverId, ClusterId, CopysetId, SegmentIndex};
    use evolute_protocol::wire::reply::Freshness;

    use super::{CHUNKS, ChunkserverPlace, CopysetMembers, Map, Route, Routing, UnknownCopyset};
    use crate::connections::{Connections, PeerIndex};
    use crate::volume::peers::Peers;

    fn map() -> Map {
        let place = |id: u32| ChunkserverPlace {
            chunkserver: ChunkserverId(id),
            address: format!("127.0.0.1:{id}"),
            resolved: format!("127.0.0.1:{id}").parse().ok(),
        };
        let members = |copyset: u32, leader: Option<u32>| CopysetMembers {
            copyset: CopysetId(copyset),
            replicas: vec![ChunkserverId(11), ChunkserverId(12), ChunkserverId(13)],
            leader: leader.map(ChunkserverId),
        };
        let mut copysets = [CopysetId(1); CHUNKS];
        copysets[5] = CopysetId(2);
        Map {
            cluster: ClusterId([1; 16]),
            segments: vec![(SegmentIndex(3), copysets)],
            copysets: vec![members(1, Some(12)), members(2, None)],
            chunkservers: vec![place(11), place(12), place(13)],
        }
    }

    fn learned() -> (Routing, Peers) {
        let poll = mio::Poll::new().expect("epoll");
        let connections = Connections::new(poll.registry()).expect("epoll");
        let (mut routing, mut peers) = (Routing::default(), Peers::new(connections.join().expect("room")));
        routing.learn(&map(), &mut peers, Instant::now());
        (routing, peers)
    }

    #[test]
    fn a_chunk_is_found_and_an_unwritten_segment_is_not() {
        let (routing, peers) = learned();
        let of = |chunk: u32| routing.route_of(ChunkIndex(chunk)).map(|index| routing[index].copyset);
        let chunks = u32::try_from(CHUNKS).expect("64");
        assert_eq!(of(3 * chunks), Some(CopysetId(1)));
        assert_eq!(of(3 * chunks + 5), Some(CopysetId(2)));
        assert_eq!((of(2 * chunks), of(4 * chunks), of(u32::MAX)), (None, None, None));
        let target = |at: usize| routing.iter().nth(at).map(|route| peers[route.target].id);
        assert_eq!((target(0), target(1)), (Some(ChunkserverId(12)), Some(ChunkserverId(11))));
    }

    #[test]
    fn a_segment_of_an_unknown_copyset_is_refused() {
        let (mut routing, _) = learned();
        let refused = routing.learn_segment(SegmentIndex(9), &[CopysetId(7); CHUNKS]);
        assert_eq!(refused, Err(UnknownCopyset(CopysetId(7))));
        assert_eq!(routing.route_of(ChunkIndex(9 * 64)), None);
    }

    #[test]
    fn an_answer_must_know_all_that_was_seen_when_the_read_began() {
        let floor = Freshness { term: 5, index: 100 };
        for (term, index, fresh) in
            [(5, 100, true), (6, 100, true), (5, 101, true), (4, 200, false), (5, 99, false), (6, 99, false)]
        {
            assert_eq!(Route::is_fresh(Freshness { term, index }, floor), fresh, "{term}.{index}");
        }
    }

    #[test]
    fn a_deposed_leader_that_answers_late_does_not_lead_again() {
        let (mut routing, _) = learned();
        let route = routing.iter_mut().next().expect("two routes");
        let (old, new) = (PeerIndex(1), PeerIndex(2));
        assert!(route.answered(old, Freshness { term: 3, index: 10 }));
        assert!(!route.answered(old, Freshness { term: 3, index: 11 }), "nothing new");
        assert!(route.answered(new, Freshness { term: 4, index: 12 }));
        assert!(!route.answered(old, Freshness { term: 3, index: 13 }));
        assert_eq!((route.target, route.confirmed), (new, true));
        assert_eq!(route.fresh, Freshness { term: 4, index: 13 });
    }

    #[test]
    fn a_search_goes_round_all_replicas_and_remembers_since_when() {
        let (mut routing, _) = learned();
        let route = routing.iter_mut().next().expect("two routes");
        let start = Instant::now();
        let mut seen = vec![route.target];
        for step in 1..4u32 {
            let now = start + Duration::from_secs(u64::from(step));
            route.search(now, Duration::from_millis(5));
            seen.push(route.target);
        }
        assert_eq!(seen[0], seen[3]);
        assert_eq!(seen.iter().collect::<std::collections::HashSet<_>>().len(), 3);
        assert_eq!(route.searching(start + Duration::from_secs(3)), Duration::from_secs(2));
        assert!(!route.is_clear());
    }

    #[test]
    fn of_what_was_shown_the_most_counts_and_the_term_that_most_logs_come_up_to() {
        let (mut routing, _) = learned();
        let route = routing.iter_mut().next().expect("two routes");
        let at = |term, index| Freshness { term, index };
        for (shown, most) in [
            (at(3, 10), at(3, 10)),
            (at(4, 9), at(3, 10)),
            (at(5, 10), at(3, 10)),
            (at(2, 10), at(2, 10)),
            (at(6, 11), at(6, 11)),
            // Of one that was deposed, and had applied it.
            (at(5, 12), at(5, 12)),
        ] {
            route.show(shown);
            assert_eq!(route.shown, most, "after {shown:?}");
        }
    }

    #[test]
    fn a_new_map_moves_addresses_and_members_but_forgets_nothing() {
        let (mut routing, mut peers) = learned();
        let mut newer = map();
        newer.segments.clear();
        newer.copysets.remove(1);
        newer.copysets[0].replicas = vec![ChunkserverId(11), ChunkserverId(13), ChunkserverId(14)];
        newer.copysets[0].leader = Some(ChunkserverId(14));
        newer.chunkservers.push(ChunkserverPlace {
            chunkserver: ChunkserverId(14),
            address: "127.0.0.1:14".into(),
            resolved: "127.0.0.1:14".parse().ok(),
        });
        newer.chunkservers[0].resolved = "127.0.0.1:99".parse().ok();
        routing.learn(&newer, &mut peers, Instant::now());
        assert!(routing.route_of(ChunkIndex(3 * 64 + 5)).is_some());
        let first = routing.iter().next().expect("two routes");
        assert_eq!(peers[first.target].id, ChunkserverId(14));
        let eleven = peers.find(ChunkserverId(11)).expect("known");
        assert_eq!(peers[eleven].address(), "127.0.0.1:99".parse().ok());
    }
}
