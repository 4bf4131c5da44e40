//! What is out and not yet answered: requests of the guest, the operations they were split into, and the sequences
//! that make a change harmless when it arrives twice.
//!
//! What always holds:
//!
//! - An operation is answered at most once: its id carries the generation of its place, so an answer that comes late
//!   finds nobody.
//! - No sequence at or above the floor was given up: the floor only passes what was answered.
//! - Operations, bytes and sequences out are bounded. At the bound a request waits here, unsent.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

use bytes::Bytes;
use evolute_protocol::id::ChunkIndex;
use evolute_protocol::wire::RequestId;
use evolute_protocol::wire::reply::Freshness;
use evolute_protocol::wire::request::{ChunkRange, Request as WireRequest, Sequence};
use smallvec::SmallVec;

use super::routing::RouteIndex;
use super::split::Split;
use crate::backing::{Failure, Ticket};
use crate::connections::PeerIndex;

/// Sequences between the floor and the newest. Replicas remember what was applied above the floor and refuse to
/// remember more than 64 Ki (`chunkserver/src/copyset/fence.rs`); one stuck write among many quick ones fills this.
pub const SEQUENCES_OUT_MAX: usize = 32 << 10;

/// Places of a [`Slab`]: 20 bits, because those above are not ours to choose (`connections`).
const PLACES: u32 = 1 << 20;
/// Generations of a place: 31 bits, because the last tells whom a request is for.
const GENERATIONS: u32 = u32::MAX >> 1;
const FOLLOWER: u64 = 1 << 63;

/// A place in a [`Slab`], and which of its tenants is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    index: u32,
    generation: u32,
}

impl Key {
    /// What the leader is asked under.
    pub fn to_request_id(self) -> RequestId {
        RequestId(u64::from(self.generation) << 32 | u64::from(self.index))
    }

    /// What a follower is asked under: the same replica may be asked both ways at a time.
    pub fn to_follower_request_id(self) -> RequestId {
        RequestId(self.to_request_id().0 | FOLLOWER)
    }

    /// Whose answer this is, and whether it was asked as a follower.
    #[expect(clippy::cast_possible_truncation, reason = "the two halves of a u64")]
    pub fn from_request_id(id: RequestId) -> (Self, bool) {
        let key = Self { index: id.0 as u32, generation: (id.0 >> 32) as u32 & GENERATIONS };
        (key, id.0 & FOLLOWER != 0)
    }

    /// For what needs no answer: no key that is given out.
    pub fn nobody_s_request_id() -> RequestId {
        Self { index: PLACES - 1, generation: 0 }.to_request_id()
    }

    /// A number to spread things with.
    pub fn place(self) -> usize {
        self.index as usize
    }
}

#[derive(Debug)]
struct Place<T> {
    generation: u32,
    tenant: Option<T>,
}

/// Values at places that are used again, so that nothing is allocated per request.
#[derive(Debug)]
pub struct Slab<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn insert(&mut self, value: T) -> Key {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index = u32::try_from(self.places.len()).ok().filter(|index| *index < PLACES - 1);
                let index = index.expect("operations in flight are bounded");
                self.places.push(Place { generation: 1, tenant: None });
                index
            }
        };
        let place = &mut self.places[index as usize];
        place.tenant = Some(value);
        Key { index, generation: place.generation }
    }

    pub fn get(&self, key: Key) -> Option<&T> {
        let place = self.places.get(key.index as usize)?;
        if place.generation == key.generation { place.tenant.as_ref() } else { None }
    }

    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let place = self.places.get_mut(key.index as usize)?;
        if place.generation == key.generation { place.tenant.as_mut() } else { None }
    }

    pub fn remove(&mut self, key: Key) -> Option<T> {
        let place = self.places.get_mut(key.index as usize)?;
        if place.generation != key.generation {
            return None;
        }
        let value = place.tenant.take()?;
        place.generation = (place.generation + 1) & GENERATIONS;
        self.free.push(key.index);
        Some(value)
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.places.iter().filter_map(|place| place.tenant.as_ref())
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Key, &mut T)> {
        (0u32..).zip(&mut self.places).filter_map(|(index, place)| {
            let key = Key { index, generation: place.generation };
            place.tenant.as_mut().map(|value| (key, value))
        })
    }

    pub fn keys(&self) -> impl Iterator<Item = Key> {
        (0u32..)
            .zip(&self.places)
            .filter(|(_, place)| place.tenant.is_some())
            .map(|(index, place)| Key { index, generation: place.generation })
    }
}

/// Whom an operation was sent to, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    pub peer: PeerIndex,
    pub at: Instant,
    pub how: AskedAs,
}

/// What a replica must be to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AskedAs {
    Leader,
    /// Any replica that has the volume's entry of this index.
    Follower {
        index: u64,
    },
}

/// What is sent to one copyset, until it is answered.
#[derive(Debug)]
pub struct Operation {
    /// With its data, checksums and sequence: the same at every sending. Only the floor in it is renewed.
    pub request: WireRequest,
    /// `None` while its segment is being allocated.
    pub route: Option<RouteIndex>,
    pub purpose: Purpose,
    /// The least an answer must know: what this volume had seen of the copyset when the read began. Later answers
    /// raise the route's, not this one: a read may be overtaken by a write it runs beside.
    pub floor: Freshness,
    /// Sent and not answered: the leader, and perhaps one we ask because the leader is silent.
    pub asked: SmallVec<[Asked; 2]>,
    /// Replicas that were asked as followers, by their place in the route: each once in a round.
    pub followers_tried: u8,
    /// Rounds of asking followers before this one, and when one was last asked.
    pub rounds: u32,
    pub follower_asked: Option<Instant>,
    /// Sent at least once.
    pub sent: bool,
    /// When it was made.
    pub since: Instant,
    /// How often its data was refused.
    pub failures: u32,
}

/// Why an operation exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Part of a guest's request; `second` says which half of a read's data it brings.
    Guest { request: Key, second: bool },
    /// The fence of a copyset.
    Fence,
}

impl Operation {
    /// When `peer` was asked as the leader.
    pub fn was_asked(&self, peer: PeerIndex) -> Option<Instant> {
        let asked = self.asked.iter().find(|asked| asked.peer == peer && asked.how == AskedAs::Leader);
        asked.map(|asked| asked.at)
    }

    /// `peer` answered as the leader, or will not.
    pub fn forget(&mut self, peer: PeerIndex) {
        self.asked.retain(|asked| asked.peer != peer || asked.how != AskedAs::Leader);
    }

    /// `peer` answered as a follower, or will not: when it was asked, and for what index.
    pub fn take_follower(&mut self, peer: PeerIndex) -> Option<(Instant, u64)> {
        let at = self.asked.iter().position(|asked| asked.peer == peer && asked.how != AskedAs::Leader)?;
        match self.asked.remove(at) {
            Asked { at, how: AskedAs::Follower { index }, .. } => Some((at, index)),
            Asked { how: AskedAs::Leader, .. } => None,
        }
    }

    /// Nobody was asked as a follower who may yet answer.
    pub fn waits_for_no_follower(&self) -> bool {
        self.asked.iter().all(|asked| asked.how == AskedAs::Leader)
    }

    /// The bytes it changes; `None`: it changes none.
    pub fn changes(&self) -> Option<(ChunkIndex, ChunkRange)> {
        match &self.request {
            WireRequest::Write(write) => Some((write.chunk.index, write.range)),
            WireRequest::Discard(discard) => Some((discard.chunk.index, discard.range)),
            WireRequest::WriteZeroes(zeroes) => Some((zeroes.chunk.index, zeroes.range)),
            WireRequest::Fence(_)
            | WireRequest::Read(_)
            | WireRequest::ReadAtLeast(_)
            | WireRequest::Digests(_)
            | WireRequest::Doubt(_)
            | WireRequest::ChunkInfo(_)
            | WireRequest::TakeOver(_) => None,
        }
    }

    pub fn sequence(&self) -> Option<Sequence> {
        match &self.request {
            WireRequest::Write(write) => Some(write.tag.sequence),
            WireRequest::Discard(discard) => Some(discard.tag.sequence),
            WireRequest::WriteZeroes(zeroes) => Some(zeroes.tag.sequence),
            WireRequest::Fence(_)
            | WireRequest::Read(_)
            | WireRequest::ReadAtLeast(_)
            | WireRequest::Digests(_)
            | WireRequest::Doubt(_)
            | WireRequest::ChunkInfo(_)
            | WireRequest::TakeOver(_) => None,
        }
    }

    pub fn set_floor(&mut self, floor: Sequence) {
        match &mut self.request {
            WireRequest::Write(write) => write.tag.floor = floor,
            WireRequest::Discard(discard) => discard.tag.floor = floor,
            WireRequest::WriteZeroes(zeroes) => zeroes.tag.floor = floor,
            WireRequest::Fence(_)
            | WireRequest::Read(_)
            | WireRequest::ReadAtLeast(_)
            | WireRequest::Digests(_)
            | WireRequest::Doubt(_)
            | WireRequest::ChunkInfo(_)
            | WireRequest::TakeOver(_) => {}
        }
    }
}

/// What becomes of the pieces of a request.
#[derive(Debug, Clone)]
pub enum Kind {
    Read,
    /// What is left of its data, from the front.
    Write {
        data: Bytes,
    },
    Discard,
    WriteZeroes {
        unmap: bool,
    },
}

/// A request of the guest, from admission to completion.
#[derive(Debug)]
pub struct Pending {
    pub ticket: Ticket,
    pub kind: Kind,
    /// The bytes it changes.
    pub changes: Option<Range<u64>>,
    /// Pieces not made yet: a discard may be as long as the volume.
    pub rest: Split,
    /// When the guest asked.
    pub since: Instant,
    /// Pieces out.
    pub out: u32,
    /// Pieces made so far; only counted as far as a read needs it.
    pub made: u8,
    /// Bytes it counts for against the bound.
    pub bytes: u64,
    /// A read's data: one place for each of its two possible pieces.
    pub data: [Bytes; 2],
    /// Bytes of each piece of a read that are zeroes because nothing was ever written there.
    pub zeroes: [u32; 2],
    pub failure: Option<Failure>,
}

/// Which changes were answered, from the oldest that was not.
#[derive(Debug)]
pub struct Sequences {
    floor: Sequence,
    /// From `floor` on; the first is always false.
    answered: VecDeque<bool>,
}

impl Default for Sequences {
    fn default() -> Self {
        Self { floor: Sequence(1), answered: VecDeque::new() }
    }
}

impl Sequences {
    /// The oldest sequence that is not answered yet, or the next one if all are.
    pub fn floor(&self) -> Sequence {
        self.floor
    }

    pub fn is_full(&self) -> bool {
        self.answered.len() >= SEQUENCES_OUT_MAX
    }

    pub fn take(&mut self) -> Sequence {
        let sequence = Sequence(self.floor.0 + self.answered.len() as u64);
        self.answered.push_back(false);
        sequence
    }

    pub fn answered(&mut self, sequence: Sequence) {
        let place = sequence.0.checked_sub(self.floor.0).and_then(|at| usize::try_from(at).ok());
        let answered = place.and_then(|at| self.answered.get_mut(at)).expect("a sequence is answered once");
        assert!(!*answered, "{sequence:?} was answered twice");
        *answered = true;
        while self.answered.front() == Some(&true) {
            self.answered.pop_front();
            self.floor.0 += 1;
        }
    }
}

/// How much may be out at a time.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub operations_max: usize,
    pub bytes_max: u64,
}

/// How much is out.
#[derive(Debug, Default, Clone, Copy)]
pub struct Admitted {
    pub bytes: u64,
}

impl Admitted {
    /// Whether a request of `bytes` may go out beside `operations` that are out. One alone always may.
    pub fn admits(&self, bounds: &Bounds, operations: usize, bytes: u64) -> bool {
        operations == 0 || (operations + 2 <= bounds.operations_max && self.bytes + bytes <= bounds.bytes_max)
    }
}

#[cfg(test)]
mod tests {
    use evolute_protocol::wire::request::Sequence;
    use proptest::prelude::{Just, ProptestConfig, Strategy, prop_assert, prop_assert_eq, proptest};

    use super::{Admitted, Bounds, Key, SEQUENCES_OUT_MAX, Sequences, Slab};

    #[test]
    fn the_floor_passes_only_what_was_answered() {
        let mut sequences = Sequences::default();
        assert_eq!(sequences.floor(), Sequence(1));
        let all: Vec<_> = (0..5).map(|_| sequences.take()).collect();
        assert_eq!(all.iter().map(|s| s.0).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        for (answered, floor) in [(2, 1), (5, 1), (1, 3), (3, 4), (4, 6)] {
            sequences.answered(Sequence(answered));
            assert_eq!(sequences.floor(), Sequence(floor), "after {answered}");
        }
        assert_eq!(sequences.take(), Sequence(6));
    }

    #[test]
    fn one_stuck_change_bounds_how_many_may_follow() {
        let mut sequences = Sequences::default();
        let stuck = sequences.take();
        for _ in 1..SEQUENCES_OUT_MAX {
            assert!(!sequences.is_full());
            let sequence = sequences.take();
            sequences.answered(sequence);
        }
        assert!(sequences.is_full());
        sequences.answered(stuck);
        assert!(!sequences.is_full());
    }

    #[test]
    fn a_late_answer_finds_nobody() {
        let mut slab = Slab::default();
        let first = slab.insert("first");
        assert_eq!(Key::from_request_id(first.to_request_id()), (first, false));
        assert_eq!(Key::from_request_id(first.to_follower_request_id()), (first, true));
        assert_eq!(slab.remove(first), Some("first"));
        let second = slab.insert("second");
        assert_eq!(slab.get(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!((slab.get(second), slab.len()), (Some(&"second"), 1));
    }

    #[test]
    fn memory_is_bounded_but_one_request_always_fits() {
        let bounds = Bounds { operations_max: 10, bytes_max: 100 };
        let table =
            [(0, 0, 1000, true), (50, 1, 50, true), (51, 1, 50, false), (0, 8, 1, true), (0, 9, 1, false)];
        for (bytes, operations, more, admitted) in table {
            let now = Admitted { bytes };
            assert_eq!(now.admits(&bounds, operations, more), admitted, "{bytes} {operations} {more}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn the_floor_is_the_oldest_unanswered_in_any_order(
            order in (1usize..60).prop_flat_map(|n| Just((1..=n as u64).collect::<Vec<_>>()).prop_shuffle())
        ) {
            let mut sequences = Sequences::default();
            for _ in &order {
                sequences.take();
            }
            let mut open: std::collections::BTreeSet<u64> = order.iter().copied().collect();
            for sequence in &order {
                sequences.answered(Sequence(*sequence));
                open.remove(sequence);
                let oldest = open.first().copied().unwrap_or(order.len() as u64 + 1);
                prop_assert_eq!(sequences.floor(), Sequence(oldest));
            }
            prop_assert!(!sequences.is_full());
        }
    }
}
