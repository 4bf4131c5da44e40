//! A VMM that pauses, resumes, takes snapshots, migrates, disconnects and dies at random, against a reference model: which
//! requests were answered, and what the disk must hold. No answered write is done again, none that waits is lost, and
//! what is acknowledged as quiet is quiet.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::config_space::SERIAL_BYTES;
use super::inflight::InflightRegion;
use super::memory::Memory;
use super::queues::{Queues, Setup, StartRefused};
use super::request::Geometry;
use super::ring::Layout;
use crate::backing::{Backing, Capacity, Outcome, Request, Ticket};

const RINGS: u16 = 2;
/// Three descriptors a request, and wrapping soon.
const SIZE: u16 = 32;
const SLOTS: u16 = 10;
const MEMORY: usize = 0x20000;
const SECTOR: u64 = 512;

fn layout(ring: u16) -> Layout {
    let base = 0x4000 * u64::from(ring);
    Layout { size: SIZE, descriptors: base, avail: base + 0x1000, used: base + 0x2000 }
}

fn slot_at(ring: u16, slot: u16) -> u64 {
    0x10000 + 0x8000 * u64::from(ring) + 0x800 * u64::from(slot)
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn at(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap()
    }
}

/// Every request writes its own number to its own sector.
#[derive(Default)]
struct Fate {
    on_disk: bool,
    answered: bool,
}

/// The disk, which judges what it is asked: it knows what the guest was told.
struct Judge {
    fates: Vec<Fate>,
    waiting: Vec<(Ticket, usize)>,
    /// Nothing is answered: there is no quorum.
    holds: bool,
    random: Random,
}

fn payload(id: usize) -> Vec<u8> {
    (id as u64).to_le_bytes().repeat(64)
}

impl Backing for Judge {
    fn submit(&mut self, ticket: Ticket, request: Request) {
        let Request::Write { offset, data } = request else { panic!("never asked for: {request:?}") };
        let id = usize::try_from(offset / SECTOR).unwrap();
        assert!(!self.fates[id].answered, "write {id} was answered, and is done again");
        assert!(data == payload(id), "write {id} is done with what is in somebody else's buffer");
        self.waiting.push((ticket, id));
    }

    fn on_wake(&mut self) {}

    fn settle(&mut self, _now: Instant) {}

    fn take_completed(&mut self, out: &mut Vec<(Ticket, Outcome)>) {
        while !self.holds && !self.waiting.is_empty() && !self.random.once_in(3) {
            let at = self.random.at(self.waiting.len());
            let (ticket, id) = self.waiting.swap_remove(at);
            self.fates[id].on_disk = true;
            out.push((ticket, Outcome::Done));
        }
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn ready(&self) -> bool {
        true
    }
}

/// The guest, its VMM, and the device between them and the disk.
struct World {
    map: GuestMemoryMmap<()>,
    memory: Arc<Memory>,
    region: Arc<InflightRegion>,
    queues: Queues,
    disk: Judge,
    now: Instant,
    random: Random,
    /// What the guest waits for, by ring and slot.
    live: [[Option<usize>; SLOTS as usize]; RINGS as usize],
    seen_used: [u16; RINGS as usize],
}

fn new_region() -> Arc<InflightRegion> {
    let (file, len) = InflightRegion::create(RINGS, SIZE).unwrap();
    Arc::new(InflightRegion::map(file, 0, len, RINGS, SIZE, &Arc::default()).unwrap())
}

fn new_queues() -> Queues {
    let disk = Geometry { capacity: Capacity::of(1 << 40), read_only: false, serial: [1; SERIAL_BYTES] };
    Queues::new(disk, RINGS)
}

impl World {
    fn new(seed: u64) -> World {
        let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let mut random = Random(seed);
        let from = u16::try_from(random.below(1 << 16)).unwrap();
        let disk = Judge { fates: Vec::new(), waiting: Vec::new(), holds: false, random: Random(!seed) };
        let mut world = World {
            memory: Arc::new(Memory::new(map.clone())),
            map,
            region: new_region(),
            queues: new_queues(),
            disk,
            now: Instant::now(),
            random,
            live: Default::default(),
            seen_used: [from; RINGS as usize],
        };
        for ring in 0..RINGS {
            world.store(layout(ring).avail + 2, from);
            world.store(layout(ring).used + 2, from);
            world.start(ring, from).unwrap();
        }
        world
    }

    fn store(&self, at: u64, value: u16) {
        self.map.store(value.to_le(), GuestAddress(at), Ordering::SeqCst).unwrap();
    }

    fn load(&self, at: u64) -> u16 {
        u16::from_le(self.map.load(GuestAddress(at), Ordering::SeqCst).unwrap())
    }

    fn avail(&self, ring: u16) -> u16 {
        self.load(layout(ring).avail + 2)
    }

    fn used(&self, ring: u16) -> u16 {
        self.load(layout(ring).used + 2)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY];
        self.map.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    fn start(&mut self, ring: u16, base: u16) -> Result<(), StartRefused> {
        let setup = Setup {
            layout: layout(ring),
            base,
            event_idx: ring == 0,
            enabled: true,
            call: None,
            memory: self.memory.clone(),
            inflight: Some(self.region.clone()),
            line: Arc::default(),
        };
        self.queues.start(ring, setup, self.now)
    }

    /// The guest asks for one more write, if it has room.
    fn offer(&mut self) {
        let ring = u16::from(self.random.once_in(2));
        let Some(slot) = self.live[usize::from(ring)].iter().position(Option::is_none) else { return };
        let id = self.disk.fates.len();
        self.disk.fates.push(Fate::default());
        self.live[usize::from(ring)][slot] = Some(id);
        let slot = u16::try_from(slot).unwrap();
        let (at, head) = (slot_at(ring, slot), 3 * slot);
        self.map.write_slice(&[1u32.to_le_bytes(), [0; 4]].concat(), GuestAddress(at)).unwrap();
        self.map.write_slice(&(id as u64).to_le_bytes(), GuestAddress(at + 8)).unwrap();
        self.map.write_slice(&[0xff], GuestAddress(at + 16)).unwrap();
        self.map.write_slice(&payload(id), GuestAddress(at + 512)).unwrap();
        for (nth, addr, len, flags) in [(0, at, 16u32, 1u16), (1, at + 512, 512, 1), (2, at + 16, 1, 2)] {
            let entry = layout(ring).descriptors + 16 * u64::from(head + nth);
            self.map.write_slice(&addr.to_le_bytes(), GuestAddress(entry)).unwrap();
            self.map.write_slice(&len.to_le_bytes(), GuestAddress(entry + 8)).unwrap();
            self.store(entry + 12, flags);
            self.store(entry + 14, head + nth + 1);
        }
        let avail = self.avail(ring);
        self.store(layout(ring).avail + 4 + 2 * u64::from(avail % SIZE), head);
        self.store(layout(ring).avail + 2, avail.wrapping_add(1));
        if !self.random.once_in(4) {
            self.queues.kicked(ring);
        }
    }

    /// The guest takes its answers, and fills the buffers with something else.
    fn take_answers(&mut self) {
        for ring in 0..RINGS {
            while self.seen_used[usize::from(ring)] != self.used(ring) {
                let seen = &mut self.seen_used[usize::from(ring)];
                let head = u16::from_le(
                    self.map
                        .load(
                            GuestAddress(layout(ring).used + 4 + 8 * u64::from(*seen % SIZE)),
                            Ordering::SeqCst,
                        )
                        .unwrap(),
                );
                *seen = seen.wrapping_add(1);
                let slot = head / 3;
                let id = self.live[usize::from(ring)][usize::from(slot)].take();
                let id = id.unwrap_or_else(|| panic!("head {head} was answered, and nobody waits for it"));
                let fate = &mut self.disk.fates[id];
                assert!(fate.on_disk, "write {id} was answered and is not on the disk");
                fate.answered = true;
                let at = slot_at(ring, slot);
                assert_eq!(self.map.load::<u8>(GuestAddress(at + 16), Ordering::SeqCst).unwrap(), 0);
                self.map.write_slice(&[0xee; 512], GuestAddress(at + 512)).unwrap();
            }
        }
    }

    fn device_turns(&mut self) {
        self.now += Duration::from_millis(self.random.below(120));
        self.queues.serve(&mut self.disk, self.now);
        let mut completed = Vec::new();
        self.disk.take_completed(&mut completed);
        for (ticket, outcome) in completed {
            self.queues.complete(ticket, outcome, self.now);
        }
        self.queues.publish();
        self.queues.settle(self.now);
        self.queues.arm();
    }

    fn turn(&mut self) {
        self.device_turns();
        self.take_answers();
    }

    fn until<T>(&mut self, reply: &Receiver<T>) -> T {
        for _ in 0..1000 {
            if let Ok(value) = reply.try_recv() {
                return value;
            }
            self.turn();
        }
        panic!("never acknowledged");
    }

    /// What cloud-hypervisor takes for a pause. The guest has stopped.
    fn pause(&mut self) {
        for ring in 0..RINGS {
            let (sender, reply) = sync_channel(1);
            self.queues.begin_pause(ring, sender, self.now);
            self.until(&reply);
        }
        self.is_quiet();
    }

    /// What QEMU takes for one.
    fn stop(&mut self) -> [u16; RINGS as usize] {
        let mut bases = [0; RINGS as usize];
        for ring in 0..RINGS {
            let (sender, reply) = sync_channel(1);
            self.queues.begin_stop(ring, sender, self.now);
            bases[usize::from(ring)] = self.until(&reply);
        }
        self.is_quiet();
        bases
    }

    /// Nothing is out, nothing of ours touches memory any more, and the rings tell what is unanswered.
    fn is_quiet(&mut self) {
        assert_eq!(self.queues.out(), 0, "requests are out");
        for ring in 0..RINGS {
            let mut told: Vec<u16> = Vec::new();
            let mut index = self.used(ring);
            while index != self.avail(ring) {
                told.push(self.load(layout(ring).avail + 4 + 2 * u64::from(index % SIZE)) / 3);
                index = index.wrapping_add(1);
            }
            told.sort_unstable();
            let waits: Vec<u16> = (0..SLOTS)
                .filter(|slot| self.live[usize::from(ring)][usize::from(*slot)].is_some())
                .collect();
            assert_eq!(told, waits, "what the ring says is unanswered, and what is");
        }
        let before = self.bytes();
        for _ in 0..self.random.below(8) {
            self.queues.kicked(0);
            self.device_turns();
        }
        assert!(self.bytes() == before, "memory was touched after it was let go of");
    }

    /// The front end is gone, and with it everything that it did not hear of.
    fn disconnect(&mut self) {
        self.queues.abandon_all();
    }

    /// kill -9. What was under way reaches the disk, or not.
    fn die(&mut self) {
        self.queues.abandon_all();
        self.queues = new_queues();
        for (_, id) in std::mem::take(&mut self.disk.waiting) {
            self.disk.fates[id].on_disk |= self.random.once_in(2);
        }
    }

    /// The guest goes on in a copy of its memory, as of now.
    fn restore_elsewhere(&mut self) {
        let bytes = self.bytes();
        self.map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        self.map.write_slice(&bytes, GuestAddress(0)).unwrap();
        self.memory = Arc::new(Memory::new(self.map.clone()));
    }

    fn goes_on(&mut self, base: impl Fn(&World, u16) -> u16) {
        self.queues.await_replay(&self.region.clone());
        for ring in 0..RINGS {
            self.start(ring, base(self, ring)).unwrap_or_else(|error| panic!("ring {ring}: {error}"));
        }
    }

    fn something_happens(&mut self) {
        match self.random.below(9) {
            // Pause and resume.
            0 => {
                self.pause();
                for ring in 0..RINGS {
                    self.queues.enable(ring, self.now);
                }
            }
            // Pause, snapshot, restore (or a local migration): a new region, and all that was offered is believed taken.
            1 | 2 => {
                self.pause();
                self.disconnect();
                if self.random.once_in(3) {
                    self.die();
                }
                if !self.random.once_in(3) {
                    self.restore_elsewhere();
                }
                self.region = new_region();
                self.goes_on(World::avail);
            }
            // Stop and go on, here or elsewhere.
            3 | 4 => {
                let bases = self.stop();
                if self.random.once_in(2) {
                    self.disconnect();
                    self.restore_elsewhere();
                    self.region = new_region();
                }
                self.goes_on(|_, ring| bases[usize::from(ring)]);
            }
            5 => {
                self.disconnect();
                self.goes_on(World::used);
            }
            6 => {
                self.die();
                self.goes_on(World::used);
            }
            // A new region without a pause before: refused, unless nothing can be wrong; and with the old one it goes on.
            7 => {
                self.disconnect();
                let known = std::mem::replace(&mut self.region, new_region());
                let mut started = Vec::new();
                for ring in 0..RINGS {
                    let base = self.avail(ring);
                    match self.start(ring, base) {
                        Ok(()) => started.push(ring),
                        Err(StartRefused::Unknown(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                if usize::from(RINGS) > started.len() {
                    self.disconnect();
                    self.region = known;
                    self.goes_on(World::used);
                }
            }
            // Memory moves under the rings.
            _ => {
                let memory = Arc::new(Memory::new(self.map.clone()));
                let before = Arc::downgrade(&std::mem::replace(&mut self.memory, memory.clone()));
                let (sender, reply) = sync_channel(1);
                self.queues.begin_change_of_memory(memory, sender, self.now);
                self.until(&reply);
                assert!(before.upgrade().is_none(), "the memory of before is still in use");
            }
        }
    }
}

#[test]
fn whatever_a_vmm_does_no_answered_write_is_done_again_and_none_is_lost() {
    for seed in 0..300 {
        let mut world = World::new(seed);
        for _ in 0..60 {
            world.disk.holds = world.random.once_in(3);
            for _ in 0..world.random.below(12) {
                world.offer();
                if world.random.once_in(2) {
                    world.turn();
                }
            }
            world.something_happens();
        }
        world.disk.holds = false;
        for _ in 0..200 {
            for ring in 0..RINGS {
                world.queues.kicked(ring);
            }
            world.turn();
        }
        let lost: Vec<usize> = world.live.iter().flatten().flatten().copied().collect();
        assert!(lost.is_empty(), "seed {seed}: {lost:?} were never answered");
        assert!(world.disk.fates.iter().all(|fate| fate.answered && fate.on_disk));
    }
}
