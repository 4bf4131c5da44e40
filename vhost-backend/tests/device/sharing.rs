//! Several disks on one I/O thread: nothing of one shows in another.

use std::sync::Arc;
use std::time::Duration;

use evolute_vhost_backend::device::DeviceConfig;
use evolute_vhost_backend::io_thread::IoLoop;

use crate::disk::{Disk, Served};
use crate::front_end::{Driver, FrontEnd, GuestMemory, IN, OUT, data_of, place, status_of};

const CAPACITY: u64 = 1 << 20;

/// A disk that holds one byte, over and over, and a guest on it.
pub struct Guest {
    pub disk: Disk,
    pub served: Served,
    pub memory: GuestMemory,
    pub driver: Driver,
    /// `None`: it has left.
    pub front_end: Option<FrontEnd>,
    byte: u8,
    slot: u16,
}

impl Guest {
    pub fn on(io: &Arc<IoLoop>, byte: u8) -> Guest {
        let disk = Disk::new(CAPACITY as usize);
        disk.fill(0, &[byte; 64 << 10]);
        let served = Served::start_on(io, DeviceConfig::new(CAPACITY), &disk);
        let (memory, driver) = (GuestMemory::new(), Driver::new(0, 64));
        let mut guest = Guest { disk, served, memory, driver, front_end: None, byte, slot: 0 };
        guest.boot();
        guest
    }

    /// With new memory, and a driver that begins anew.
    pub fn boot(&mut self) {
        (self.memory, self.driver, self.slot) = (GuestMemory::new(), Driver::new(0, 64), 0);
        let mut front_end = FrontEnd::connect(&self.served.path);
        front_end.set_memory(&self.memory);
        front_end.start(&self.memory, &mut self.driver, 0);
        self.front_end = Some(front_end);
    }

    pub fn offer(&mut self, kind: u32) -> u16 {
        let (slot, data) = (self.slot, [self.byte; 512]);
        self.slot += 1;
        let payload = if kind == OUT { Ok(&data[..]) } else { Err(512) };
        let head = place(&self.memory, &self.driver, slot, kind, slot.into(), payload);
        self.driver.offer(&self.memory, head);
        self.driver.kick();
        slot
    }

    pub fn reads_its_own(&mut self) {
        let slot = self.offer(IN);
        self.driver.wait_used(&self.memory, 1);
        assert_eq!(
            (status_of(&self.memory, slot), data_of(&self.memory, slot, 512)),
            (0, vec![self.byte; 512])
        );
    }
}

pub fn io() -> Arc<IoLoop> {
    Arc::new(IoLoop::start(Duration::from_micros(100)).expect("a thread"))
}

pub fn end(io: Arc<IoLoop>) {
    Arc::into_inner(io).expect("every device has let go").end().expect("a clean end");
}

#[test]
fn each_disk_answers_from_its_own() {
    let io = io();
    let mut guests: Vec<Guest> = (1..=8).map(|byte| Guest::on(&io, byte)).collect();
    for _ in 0..5 {
        guests.iter_mut().for_each(Guest::reads_its_own);
    }
    for guest in &mut guests {
        guest.offer(OUT);
        guest.driver.wait_used(&guest.memory, 1);
    }
    for guest in &guests {
        let (seen, byte) = (guest.disk.seen(), guest.byte);
        assert_eq!(seen.len(), 6, "{byte}: {seen:?}");
        assert_eq!(guest.disk.bytes(5 * 512, 512), [byte; 512]);
    }
    guests.iter_mut().for_each(|guest| guest.served.stop().expect("a clean end"));
    drop(guests);
    end(io);
}

/// One that hangs, one that leaves with requests out, and one that comes later in its place.
#[test]
fn what_happens_to_one_disk_does_not_happen_to_the_others() {
    let io = io();
    let (mut well, mut hung, mut leaving) = (Guest::on(&io, 1), Guest::on(&io, 2), Guest::on(&io, 3));
    for guest in [&mut hung, &mut leaving] {
        guest.disk.hold();
        guest.offer(IN);
        guest.disk.wait_seen(1);
    }
    well.reads_its_own();
    leaving.served.stop().expect("a bounded end, whatever is out");
    well.reads_its_own();
    // A kick of one that is gone is nobody's, also when another has its place.
    leaving.driver.kick();
    let mut next = Guest::on(&io, 4);
    leaving.driver.kick();
    next.reads_its_own();
    assert_eq!(next.disk.seen().len(), 1);
    well.reads_its_own();
    assert_eq!(hung.driver.used_idx(&hung.memory), 0);
    hung.disk.release_all();
    hung.driver.wait_used(&hung.memory, 1);
    // A front end that leaves and comes back is that disk's business alone.
    drop(hung.front_end.take());
    well.reads_its_own();
    hung.boot();
    hung.reads_its_own();
    for guest in [&mut well, &mut hung, &mut next] {
        guest.served.stop().expect("a clean end");
    }
    end(io);
}
