//! A device died with requests in flight; the front end hands their record to the next one.

use std::num::Wrapping;

use evolute_vhost_backend::backing::Request;
use evolute_vhost_backend::device::DeviceConfig;

use crate::disk::{Disk, Served};
use crate::front_end::{Driver, FrontEnd, GuestMemory, IN, OUT, data_of, place, status_of};

const CAPACITY: u64 = 1 << 20;

fn write(sector: u64, fill: u8) -> Request {
    Request::Write { offset: sector * 512, data: vec![fill; 512].into() }
}

fn read(sector: u64) -> Request {
    Request::Read { offset: sector * 512, len: 512 }
}

/// Several messages that the I/O thread answers: what it could do without being allowed more, it has done.
fn let_it_turn(front_end: &FrontEnd, memory: &GuestMemory) {
    for _ in 0..3 {
        front_end.set_memory(memory);
    }
}

/// Two rings with requests in flight, oldest first: W0 and R1 in ring 0, R3 and W4 in ring 1, W2 in ring 0. The disk holds
/// them all; the device and the connection are gone.
struct Crashed {
    memory: GuestMemory,
    drivers: [Driver; 2],
    inflight: (vhost::vhost_user::message::VhostUserInflight, std::fs::File),
}

fn crash() -> Crashed {
    let disk = Disk::new(CAPACITY as usize);
    disk.hold();
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    let memory = GuestMemory::new();
    let mut drivers = [Driver::new(0, 64), Driver::new(1, 64)];
    let mut front_end = FrontEnd::connect(&served.path);
    let inflight = front_end.inflight(2, 64);
    front_end.set_inflight(&inflight);
    front_end.set_memory(&memory);
    for driver in &mut drivers {
        front_end.start(&memory, driver, 0);
    }
    let requests = [(0, OUT, 0), (0, IN, 1), (1, IN, 3), (1, OUT, 4), (0, OUT, 2u16)];
    for (nth, (ring, kind, slot)) in requests.into_iter().enumerate() {
        let bytes = [10 + slot as u8; 512];
        let payload = if kind == OUT { Ok(&bytes[..]) } else { Err(512) };
        let head = place(&memory, &drivers[ring], slot, kind, slot.into(), payload);
        drivers[ring].offer(&memory, head);
        drivers[ring].kick();
        disk.wait_seen(nth + 1);
    }
    drop(front_end);
    drop(served);
    for driver in &drivers {
        assert_eq!(driver.used_idx(&memory), 0);
    }
    Crashed { memory, drivers, inflight }
}

fn reconnect(served: &Served, crashed: &mut Crashed, rings: &[usize]) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&served.path);
    front_end.set_inflight(&crashed.inflight);
    front_end.set_memory(&crashed.memory);
    for ring in rings {
        start(&mut front_end, crashed, *ring);
    }
    front_end
}

/// QEMU after a crash knows no better base than the used ring's index.
fn start(front_end: &mut FrontEnd, crashed: &mut Crashed, ring: usize) {
    let driver = &mut crashed.drivers[ring];
    let base = driver.used_idx(&crashed.memory);
    front_end.start(&crashed.memory, driver, base);
}

#[test]
fn writes_are_done_again_first_and_answered_before_any_read_or_anything_new() {
    let mut crashed = crash();
    let disk = Disk::new(CAPACITY as usize);
    disk.hold();
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    // Something new, offered while nobody was there.
    let head = place(&crashed.memory, &crashed.drivers[0], 9, IN, 9, Err(512));
    crashed.drivers[0].offer(&crashed.memory, head);
    let front_end = reconnect(&served, &mut crashed, &[0, 1]);
    crashed.drivers[0].kick();

    disk.wait_seen(3);
    disk.release(2);
    assert_eq!(crashed.drivers[0].wait_used(&crashed.memory, 1).len(), 1);
    assert_eq!(crashed.drivers[1].wait_used(&crashed.memory, 1).len(), 1);
    let_it_turn(&front_end, &crashed.memory);
    let expected = [write(0, 10), write(4, 14), write(2, 12)];
    assert_eq!(disk.seen(), expected, "writes only, in the order of both rings together");

    disk.release_all();
    assert_eq!(crashed.drivers[0].wait_used(&crashed.memory, 3).len(), 3);
    assert_eq!(crashed.drivers[1].wait_used(&crashed.memory, 1).len(), 1);
    let mut later = disk.seen().split_off(3);
    assert_eq!(later.pop(), Some(read(9)), "the new one last");
    assert_eq!(later, [read(1), read(3)]);
    for slot in [0, 1, 2, 3, 4, 9] {
        assert_eq!(status_of(&crashed.memory, slot), 0, "slot {slot}");
    }
    assert_eq!(crashed.drivers[0].take_used(&crashed.memory), []);
    assert_eq!(crashed.drivers[1].take_used(&crashed.memory), []);
    drop(front_end);
}

#[test]
fn the_writes_of_a_ring_that_starts_late_keep_their_place() {
    let mut crashed = crash();
    let disk = Disk::new(CAPACITY as usize);
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    let mut front_end = reconnect(&served, &mut crashed, &[0]);
    let_it_turn(&front_end, &crashed.memory);
    start(&mut front_end, &mut crashed, 1);
    crashed.drivers[0].wait_used(&crashed.memory, 3);
    crashed.drivers[1].wait_used(&crashed.memory, 2);
    assert_eq!(disk.seen()[..3], [write(0, 10), write(4, 14), write(2, 12)]);
}

#[test]
fn a_ring_that_never_starts_again_does_not_hold_the_others_for_ever() {
    let mut crashed = crash();
    let disk = Disk::new(CAPACITY as usize);
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    let _front_end = reconnect(&served, &mut crashed, &[0]);
    assert_eq!(crashed.drivers[0].wait_used(&crashed.memory, 3).len(), 3);
}

/// The backing is not attached yet: the handshake works, nothing is lost, everything runs once it is.
#[test]
fn the_handshake_does_not_wait_for_the_backing() {
    let mut crashed = crash();
    let disk = Disk::new(CAPACITY as usize);
    disk.set_ready(false);
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    let front_end = reconnect(&served, &mut crashed, &[0, 1]);
    let_it_turn(&front_end, &crashed.memory);
    assert_eq!(disk.seen(), []);
    // Stopping a held ring needs no patience: nothing of it is out.
    assert_eq!(front_end.vhost_stop(0), 0);
    drop(front_end);
    let _front_end = reconnect(&served, &mut crashed, &[0, 1]);
    disk.set_ready(true);
    assert_eq!(crashed.drivers[0].wait_used(&crashed.memory, 3).len(), 3);
    assert_eq!(crashed.drivers[1].wait_used(&crashed.memory, 2).len(), 2);
    assert_eq!(data_of(&crashed.memory, 1, 512), disk.bytes(512, 512));
}

/// The front end left and came back while the backing still works on a write of before. Done again at once, that write could
/// land after a newer one; so everything waits until the backing has let go of it.
#[test]
fn an_abandoned_write_cannot_overtake_a_later_one() {
    let disk = Disk::new(CAPACITY as usize);
    disk.hold();
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    let memory = GuestMemory::new();
    let mut driver = Driver::new(0, 64);
    let mut front_end = FrontEnd::connect(&served.path);
    let inflight = front_end.inflight(1, 64);
    front_end.set_inflight(&inflight);
    front_end.set_memory(&memory);
    front_end.start(&memory, &mut driver, 0);
    let head = place(&memory, &driver, 0, OUT, 0, Ok(&[1; 512]));
    driver.offer(&memory, head);
    driver.kick();
    disk.wait_seen(1);
    drop(front_end);

    let mut front_end = FrontEnd::connect(&served.path);
    front_end.set_inflight(&inflight);
    front_end.set_memory(&memory);
    front_end.start(&memory, &mut driver, 0);
    let_it_turn(&front_end, &memory);
    assert_eq!(disk.seen().len(), 1, "not again while it is still out");
    disk.release(1);
    disk.wait_seen(2);
    assert_eq!(driver.used_idx(&memory), 0, "the abandoned answer reached nobody");
    disk.release(1);
    assert_eq!(driver.wait_used(&memory, 1), [(head, 1)]);
}

/// A ring that lived before its region did: its used index is not zero (SPDK issue 3766).
#[test]
fn a_ring_with_a_past_loses_nothing_to_a_new_region() {
    let disk = Disk::new(CAPACITY as usize);
    disk.hold();
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    let memory = GuestMemory::new();
    let mut driver = Driver::new(0, 64);
    driver.next_avail = Wrapping(7);
    driver.seen_used = Wrapping(7);
    memory.set_u16(driver.avail() + 2, 7);
    memory.set_u16(driver.used() + 2, 7);
    let mut front_end = FrontEnd::connect(&served.path);
    let inflight = front_end.inflight(1, 64);
    front_end.set_inflight(&inflight);
    front_end.set_memory(&memory);
    front_end.start(&memory, &mut driver, 7);
    let head = place(&memory, &driver, 0, OUT, 3, Ok(&[3; 512]));
    assert_eq!(head, 0, "the head that a wrong used index would clear");
    driver.offer(&memory, head);
    driver.kick();
    disk.wait_seen(1);
    drop(front_end);
    drop(served);

    let disk = Disk::new(CAPACITY as usize);
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    let mut front_end = FrontEnd::connect(&served.path);
    front_end.set_inflight(&inflight);
    front_end.set_memory(&memory);
    front_end.start(&memory, &mut driver, 7);
    assert_eq!(driver.wait_used(&memory, 1), [(0, 1)]);
    assert_eq!(disk.seen(), [write(3, 3)]);
}
