//! kill -9 between any two stores: whatever was taken is answered exactly once over both lives of the process.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use proptest::prelude::{any, proptest};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, VolatileMemory};

use super::completion::Used;
use super::inflight::InflightRegion;
use super::memory::Memory;
use super::queue::{Queue, Replay, Step};
use super::ring::{Layout, Ring};

const SIZE: u16 = 8;
const LAYOUT: Layout = Layout { size: SIZE, descriptors: 0, avail: 0x1000, used: 0x2000 };

/// Guest memory and region: what a crash leaves behind.
struct World {
    map: GuestMemoryMmap<()>,
    memory: Arc<Memory>,
    region: Arc<InflightRegion>,
}

impl World {
    /// `idx`: where both rings' indexes stand when the device first sees them.
    fn new(idx: u16) -> World {
        let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let (file, len) = InflightRegion::create(1, SIZE).unwrap();
        let region = Arc::new(InflightRegion::map(file, 0, len, 1, SIZE, &Arc::default()).unwrap());
        let world = World { memory: Arc::new(Memory::new(map.clone())), map, region };
        world.store(LAYOUT.avail + 2, idx);
        world.store(LAYOUT.used + 2, idx);
        world
    }

    fn store(&self, at: u64, value: u16) {
        self.map.store(value.to_le(), GuestAddress(at), Ordering::SeqCst).unwrap();
    }

    fn load(&self, at: u64) -> u16 {
        u16::from_le(self.map.load(GuestAddress(at), Ordering::SeqCst).unwrap())
    }

    fn offer(&self, head: u16) {
        let idx = self.load(LAYOUT.avail + 2);
        self.store(LAYOUT.avail + 4 + 2 * u64::from(idx % SIZE), head);
        self.store(LAYOUT.avail + 2, idx.wrapping_add(1));
    }

    /// A process starts on the ring, with no knowledge but what is in memory. The base is QEMU's guess after a crash.
    fn start(&self) -> Queue {
        let ring = Ring::new(&self.memory, LAYOUT, true).unwrap();
        let base = self.load(LAYOUT.used + 2);
        Queue::start(ring, self.region.queue(0, SIZE), base, Arc::default(), Instant::now()).unwrap()
    }

    /// What the guest sees in the used ring since `from`.
    fn used_since(&self, from: u16) -> Vec<u16> {
        let count = self.load(LAYOUT.used + 2).wrapping_sub(from);
        (0..count).map(|i| self.load(LAYOUT.used + 4 + 8 * u64::from(from.wrapping_add(i) % SIZE))).collect()
    }
}

fn pop_all(queue: &mut Queue) -> Vec<u16> {
    std::iter::from_fn(|| queue.pop(Instant::now())).collect()
}

fn replayed(queue: &mut Queue) -> Vec<u16> {
    match std::mem::replace(&mut queue.replay, Replay::Done) {
        Replay::All(left) => left.iter().map(|unanswered| unanswered.head).collect(),
        Replay::Reads(_) | Replay::Done => Vec::new(),
    }
}

const NOTHING: [u16; 0] = [];

fn answer(queue: &mut Queue, heads: &[u16]) {
    for head in heads {
        queue.answered(Used { head: *head, len: 1 }, Instant::now());
    }
    queue.flush(None);
}

#[test]
fn every_request_is_answered_once_whatever_store_a_crash_comes_after() {
    let heads = [3u16, 0, 7, 1, 5];
    // Indexes that do not start at zero, and that wrap: a ring may have lived before the region did.
    for first in [0u16, 5, 65533] {
        for batch_len in 0..=heads.len() {
            let batch: Vec<Used> =
                heads[..batch_len].iter().rev().map(|head| Used { head: *head, len: 1 }).collect();
            let steps: Vec<Step> = Queue::steps(&batch).collect();
            for crash_after in 0..=steps.len() {
                let world = World::new(first);
                // One earlier batch, so that the links point somewhere.
                let mut queue = world.start();
                for head in [2, 4] {
                    world.offer(head);
                }
                assert_eq!(pop_all(&mut queue), [2, 4]);
                answer(&mut queue, &[4, 2]);

                for head in heads {
                    world.offer(head);
                }
                assert_eq!(pop_all(&mut queue), heads);
                for step in &steps[..crash_after] {
                    queue.perform(*step, None);
                }
                drop(queue); // kill -9: nothing runs

                let case = format!("first {first}, batch {batch_len}, {crash_after} of {steps:?}");
                let mut queue = world.start();
                let again = replayed(&mut queue);
                let published = world.used_since(first.wrapping_add(2));
                let mut all: Vec<u16> = published.iter().chain(&again).copied().collect();
                all.sort_unstable();
                assert_eq!(all, [0, 1, 3, 5, 7], "{case}: published {published:?}, again {again:?}");
                let order: Vec<u16> = heads.iter().filter(|head| again.contains(head)).copied().collect();
                assert_eq!(again, order, "{case}: oldest first");
                // What comes next in the avail ring is what nobody has taken, not one more and not one less.
                world.offer(6);
                assert_eq!(pop_all(&mut queue), [6], "{case}");
                answer(&mut queue, &again);
                answer(&mut queue, &[6]);
                let mut answered = world.used_since(first.wrapping_add(2));
                answered.sort_unstable();
                assert_eq!(answered, [0, 1, 3, 5, 6, 7], "{case}: in the end");
                assert_eq!(replayed(&mut world.start()), NOTHING, "{case}: nothing is left");
            }
        }
    }
}

#[test]
fn a_crash_during_recovery_changes_nothing() {
    let world = World::new(0);
    let mut queue = world.start();
    for head in [1, 2, 3] {
        world.offer(head);
    }
    pop_all(&mut queue);
    let batch = [Used { head: 2, len: 1 }, Used { head: 1, len: 1 }];
    for step in Queue::steps(&batch).take(5) {
        queue.perform(step, None); // published, nothing unmarked
    }
    drop(queue);
    for _ in 0..3 {
        assert_eq!(replayed(&mut world.start()), [3]);
    }
}

#[test]
fn a_head_taken_but_not_yet_marked_is_taken_again() {
    let world = World::new(0);
    world.start();
    world.offer(4);
    // Popped: a crash before the mark leaves the avail ring as it was.
    let mut ring = Ring::new(&world.memory, LAYOUT, true).unwrap();
    assert_eq!(ring.pop(), Ok(Some(4)));
    drop(ring);
    let mut queue = world.start();
    assert_eq!(replayed(&mut queue), NOTHING);
    assert_eq!(pop_all(&mut queue), [4]);
}

#[test]
fn a_region_of_a_longer_ring_is_a_region_of_another_life() {
    let world = World::new(0);
    let mut queue = world.start();
    world.offer(1);
    pop_all(&mut queue);
    drop(queue);
    // The driver was reset and chose a ring of four.
    let layout = Layout { size: 4, ..LAYOUT };
    world.store(LAYOUT.avail + 2, 0);
    let ring = Ring::new(&world.memory, layout, true).unwrap();
    let mut queue = Queue::start(ring, world.region.queue(0, 4), 0, Arc::default(), Instant::now()).unwrap();
    assert_eq!(replayed(&mut queue), NOTHING);
}

proptest! {
    /// The region comes from the front end's hands: with any content, each head is done again at most once, only heads of
    /// the ring are, and what is offered afterwards is taken or the ring is declared broken.
    #[test]
    fn any_bytes_in_the_region_are_survived(
        bytes in proptest::collection::vec(any::<u8>(), 16 + 16 * SIZE as usize),
        version in 0..3u16,
        used_idx in any::<u16>(),
    ) {
        let (file, len) = InflightRegion::create(1, SIZE).unwrap();
        let map: vm_memory::MmapRegion<()> = vm_memory::MmapRegion::from_file(
            vm_memory::FileOffset::new(file.try_clone().unwrap(), 0), usize::try_from(len).unwrap()).unwrap();
        let slice = map.as_volatile_slice();
        slice.write_slice(&bytes, 0).unwrap();
        slice.write_slice(&version.to_le_bytes(), 8).unwrap();
        slice.write_slice(&SIZE.to_le_bytes(), 10).unwrap();
        let mut world = World::new(used_idx);
        world.region = Arc::new(InflightRegion::map(file, 0, len, 1, SIZE, &Arc::default()).unwrap());
        let mut queue = world.start();
        let mut again = replayed(&mut queue);
        let count = again.len();
        again.sort_unstable();
        again.dedup();
        assert_eq!(again.len(), count, "a head twice");
        assert!(again.iter().all(|head| *head < SIZE));
        answer(&mut queue, &again);
        assert_eq!(world.used_since(used_idx).len(), count);
        assert_eq!(replayed(&mut world.start()), NOTHING);
    }
}
