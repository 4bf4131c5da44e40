//! An evil guest: random descriptors, tables, headers and heads, and a second thread that rewrites guest memory while we
//! read it. Whatever comes: no panic, no more answers than heads, nothing submitted that is not inside the disk.

use std::iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_protocol::geometry::REQUEST_BYTES_MAX;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::config_space::{DISCARD_BYTES_MAX, SERIAL_BYTES};
use super::memory::Memory;
use super::queues::{Queues, STOP_PATIENCE_IN_ALL, Setup};
use super::request::Geometry;
use super::ring::Layout;
use crate::backing::{Backing, Capacity, Outcome, Request, Ticket};

const CAPACITY: u64 = 1 << 20;
const SIZE: u16 = 16;
const LAYOUT: Layout = Layout { size: SIZE, descriptors: 0, avail: 0x1000, used: 0x2000 };
/// Two regions that touch, then nothing.
const MEMORY: u64 = 0x20000;

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        let at = self.below(from.len() as u64);
        from[usize::try_from(at).unwrap()]
    }

    fn descriptor(&mut self) -> [u8; 16] {
        let near = self.below(MEMORY);
        let addr =
            self.pick(&[near, near, near & !0xf, 0x4000, 0x4000, 0x5000, MEMORY - 8, u64::MAX - 4, 0xffff]);
        let len = self.pick(&[16u32, 1, 512, 512, 4096, 48, 32, 0, 513, 1 << 20, u32::MAX, 64 << 10]);
        let flags = self.pick(&[0u16, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7]);
        let next = self.pick(&[0u16, 1, 2, 3, 4, 5, 15, 16, 0xffff]);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }

    fn header(&mut self) -> [u8; 16] {
        let kind = self.pick(&[0u32, 0, 1, 1, 4, 8, 11, 13, 2, 99]);
        let sector = self.pick(&[0, 1, 2047, 2048, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1]);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    }
}

/// Checks what it is asked and answers in random order, some of it late.
struct Judge {
    waiting: Vec<(Ticket, Request)>,
    random: Random,
}

impl Backing for Judge {
    fn submit(&mut self, ticket: Ticket, request: Request) {
        let (offset, len, max) = match &request {
            Request::Read { offset, len } => (*offset, u64::from(*len), REQUEST_BYTES_MAX),
            Request::Write { offset, data } => (*offset, data.len() as u64, REQUEST_BYTES_MAX),
            Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => {
                (*offset, *len, DISCARD_BYTES_MAX)
            }
        };
        assert!(len > 0 && len <= max && len % 512 == 0 && offset % 512 == 0, "{request:?}");
        assert!(offset.checked_add(len).is_some_and(|end| end <= CAPACITY), "{request:?}");
        self.waiting.push((ticket, request));
    }

    fn on_wake(&mut self) {}

    fn settle(&mut self, _now: Instant) {}

    fn take_completed(&mut self, out: &mut Vec<(Ticket, Outcome)>) {
        while !self.waiting.is_empty() && self.random.below(4) > 0 {
            let at = usize::try_from(self.random.below(self.waiting.len() as u64)).unwrap();
            let (ticket, request) = self.waiting.swap_remove(at);
            let outcome = match request {
                Request::Read { len, .. } => {
                    Outcome::Data(iter::once(Bytes::from(vec![7; len as usize])).collect())
                }
                _ => Outcome::Done,
            };
            out.push((ticket, outcome));
        }
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn ready(&self) -> bool {
        true
    }
}

fn attack(seed: u64, until: Instant) -> u64 {
    let map = GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), 0x10000),
        (GuestAddress(0x10000), usize::try_from(MEMORY - 0x10000).unwrap()),
    ])
    .unwrap();
    let memory = Arc::new(Memory::new(map.clone()));
    let mut random = Random(seed);
    let disk = Geometry {
        capacity: Capacity::of(CAPACITY),
        read_only: seed.is_multiple_of(8),
        serial: [1; SERIAL_BYTES],
    };
    let mut backing = Judge { waiting: Vec::new(), random: Random(seed ^ 1) };
    let mut queues = Queues::new(disk, 1);
    let mut completed = Vec::new();
    let mut heads = 0;
    let store = |at: u64, value: u16| map.store(value.to_le(), GuestAddress(at), Ordering::SeqCst).unwrap();
    while Instant::now() < until {
        // Whatever became of the last one, it can be paused and stopped, and soon.
        let (paused, _hears) = sync_channel(1);
        let (stopped, base) = sync_channel(1);
        queues.begin_pause(0, paused, Instant::now());
        queues.begin_stop(0, stopped, Instant::now());
        queues.settle(Instant::now() + STOP_PATIENCE_IN_ALL);
        assert!(base.try_recv().is_ok(), "not stopped");
        // A ring from scratch; the last one may be broken, or full of requests.
        queues.abandon_all();
        store(LAYOUT.avail + 2, 0);
        store(LAYOUT.used + 2, 0);
        let setup = Setup {
            layout: LAYOUT,
            base: 0,
            event_idx: random.below(2) == 0,
            enabled: true,
            call: None,
            memory: memory.clone(),
            inflight: None,
            line: Arc::default(),
        };
        queues.start(0, setup, Instant::now()).unwrap();
        let mut offered = 0u16;
        for _ in 0..64 {
            for at in 0..64 {
                map.write_slice(&random.descriptor(), GuestAddress(at * 16)).unwrap();
                map.write_slice(&random.descriptor(), GuestAddress(0x4000 + at * 16)).unwrap();
            }
            for at in [0x4000, 0x5000, random.below(MEMORY - 16)] {
                map.write_slice(&random.header(), GuestAddress(at)).unwrap();
            }
            for _ in 0..random.below(4) {
                // Mostly a head that may be free, sometimes any.
                let head = match random.below(50) {
                    0 => random.pick(&[SIZE, 0xffff, 0]),
                    _ => offered % SIZE,
                };
                store(LAYOUT.avail + 4 + 2 * u64::from(offered % SIZE), head);
                offered = offered.wrapping_add(1);
                heads += 1;
            }
            store(LAYOUT.avail + 2, offered);
            queues.kicked(0);
            queues.serve(&mut backing, Instant::now());
            backing.take_completed(&mut completed);
            for (ticket, outcome) in completed.drain(..) {
                queues.complete(ticket, outcome, Instant::now());
            }
            queues.publish();
            queues.arm();
        }
    }
    queues.abandon_all();
    heads
}

#[test]
fn an_evil_guest_gets_nowhere() {
    let until = Instant::now() + Duration::from_secs(3);
    let heads: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|seed| scope.spawn(move || attack(seed, until))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(heads > 1000, "only {heads} heads tried");
}

/// Ends the other thread, also when this one panics: the scope waits for both.
struct EndsWithMe<'a>(&'a AtomicBool);

impl Drop for EndsWithMe<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A driver with two minds: one thread offers requests, another rewrites descriptors and headers under our eyes.
#[test]
fn memory_that_changes_while_it_is_read_is_judged_in_one_copy() {
    let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(MEMORY).unwrap())]).unwrap();
    let memory: Arc<Memory> = Arc::new(Memory::new(map.clone()));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random(42);
            while !done.load(Ordering::Relaxed) {
                let at = random.below(u64::from(SIZE));
                map.write_slice(&random.descriptor(), GuestAddress(at * 16)).unwrap();
                map.write_slice(&random.descriptor(), GuestAddress(0x4000 + at * 16)).unwrap();
                map.write_slice(&random.header(), GuestAddress(0x5000)).unwrap();
            }
        });
        let _ends = EndsWithMe(&done);
        let disk = Geometry { capacity: Capacity::of(CAPACITY), read_only: false, serial: [1; SERIAL_BYTES] };
        let mut backing = Judge { waiting: Vec::new(), random: Random(1) };
        let mut queues = Queues::new(disk, 1);
        let mut completed = Vec::new();
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until {
            queues.abandon_all();
            for at in [LAYOUT.avail + 2, LAYOUT.used + 2] {
                map.store(0u16, GuestAddress(at), Ordering::SeqCst).unwrap();
            }
            let setup = Setup {
                layout: LAYOUT,
                base: 0,
                event_idx: true,
                enabled: true,
                call: None,
                memory: memory.clone(),
                inflight: None,
                line: Arc::default(),
            };
            queues.start(0, setup, Instant::now()).unwrap();
            for idx in 0..SIZE {
                map.store(idx, GuestAddress(LAYOUT.avail + 4 + 2 * u64::from(idx)), Ordering::SeqCst)
                    .unwrap();
            }
            map.store(SIZE, GuestAddress(LAYOUT.avail + 2), Ordering::SeqCst).unwrap();
            queues.kicked(0);
            queues.serve(&mut backing, Instant::now());
            backing.take_completed(&mut completed);
            for (ticket, outcome) in completed.drain(..) {
                queues.complete(ticket, outcome, Instant::now());
            }
            queues.publish();
        }
        queues.abandon_all();
    });
}
