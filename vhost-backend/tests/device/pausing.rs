//! A VMM pauses its guest, takes a snapshot of it, restores it or moves it: no answered request is done again, with what is
//! in its buffer by then, and none that waits is lost.

use evolute_vhost_backend::backing::Request;
use evolute_vhost_backend::device::DeviceConfig;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use crate::disk::{Disk, Served};
use crate::front_end::{Driver, FREE, FrontEnd, GuestMemory, IN, OUT, place, slot_at, status_of};

const CAPACITY: u64 = 1 << 20;

struct Scene {
    disk: Disk,
    served: Served,
    memory: GuestMemory,
    driver: Driver,
    front_end: Option<FrontEnd>,
    inflight: (vhost::vhost_user::message::VhostUserInflight, std::fs::File),
}

fn write(sector: u64, fill: u8) -> Request {
    Request::Write { offset: sector * 512, data: vec![fill; 512].into() }
}

impl Scene {
    fn new() -> Scene {
        let disk = Disk::new(CAPACITY as usize);
        let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
        let memory = GuestMemory::new();
        let mut driver = Driver::new(0, 64);
        let mut front_end = FrontEnd::connect(&served.path);
        let inflight = front_end.inflight(1, 64);
        front_end.set_inflight(&inflight);
        front_end.set_memory(&memory);
        front_end.start(&memory, &mut driver, 0);
        Scene { disk, served, memory, driver, front_end: Some(front_end), inflight }
    }

    fn front_end(&self) -> &FrontEnd {
        self.front_end.as_ref().expect("connected")
    }

    /// Offers a write of `slot` to the sector of that number, and waits until the disk has it.
    fn submit(&mut self, slot: u16) {
        let before = self.disk.seen().len();
        let head = place(&self.memory, &self.driver, slot, OUT, slot.into(), Ok(&[slot as u8; 512]));
        self.driver.offer(&self.memory, head);
        self.driver.kick();
        self.disk.wait_seen(before + 1);
    }

    /// Writes 1 and 2; 2 is answered, and its buffer used for something else; 1 is not.
    fn one_waits_and_a_later_one_is_answered(&mut self) {
        self.disk.hold();
        self.submit(1);
        self.submit(2);
        self.disk.release_newest();
        assert_eq!(self.driver.wait_used(&self.memory, 1), [(6, 1)]);
        self.memory.write(slot_at(2) + 32, &[0xee; 512]);
    }

    fn enable(&mut self, enabled: bool) {
        let vhost = &mut self.front_end.as_mut().expect("connected").vhost;
        vhost.set_vring_enable(0, enabled).expect("SET_VRING_ENABLE");
    }

    fn pause(&mut self) {
        self.enable(false);
    }

    fn resume(&mut self) {
        self.enable(true);
    }

    fn let_it_turn(&self) {
        for _ in 0..3 {
            self.front_end().set_memory(&self.memory);
        }
    }

    /// The VMM ends. Another one starts from what is in memory now, with a new region, in what order cloud-hypervisor does it.
    fn restore(&mut self, base: u16) -> Result<(), vhost::Error> {
        self.front_end = None;
        self.memory = self.memory.copy();
        let mut front_end = FrontEnd::connect(&self.served.path);
        front_end.set_memory(&self.memory);
        front_end.vhost.set_vring_num(0, 64).expect("SET_VRING_NUM");
        let inflight = front_end.inflight(1, 64);
        front_end.set_inflight(&inflight);
        let config = front_end.ring_config(&self.memory, &self.driver);
        front_end.vhost.set_vring_addr(0, &config).expect("SET_VRING_ADDR");
        front_end.vhost.set_vring_base(0, base).expect("SET_VRING_BASE");
        front_end.vhost.set_vring_call(0, &self.driver.call).expect("SET_VRING_CALL");
        let started = front_end.vhost.set_vring_kick(0, &self.driver.kick);
        if started.is_ok() {
            front_end.vhost.set_vring_enable(0, true).expect("SET_VRING_ENABLE");
        }
        self.front_end = Some(front_end);
        started
    }

    /// Write 1 is answered, once, and both are on the disk as they were asked for.
    fn all_is_well_in_the_end(&mut self) {
        self.disk.release_all();
        assert_eq!(self.driver.wait_used(&self.memory, 1), [(3, 1)]);
        assert_eq!(status_of(&self.memory, 1), 0);
        self.submit(3);
        assert_eq!(self.driver.wait_used(&self.memory, 1), [(9, 1)]);
        assert!(self.disk.seen()[2..].iter().all(|seen| *seen == write(1, 1) || *seen == write(3, 3)));
        for sector in 1..=3u8 {
            assert_eq!(self.disk.bytes(usize::from(sector) * 512, 512), [sector; 512]);
        }
    }
}

#[test]
fn a_pause_is_acknowledged_after_everything_of_the_ring_was_answered() {
    let mut scene = Scene::new();
    scene.disk.hold();
    for slot in 1..4 {
        scene.submit(slot);
    }
    // Not with the turn in which the pause begins.
    scene.disk.release_after_turns(5);
    scene.pause();
    assert_eq!(scene.driver.used_idx(&scene.memory), 3);
    scene.resume();
    scene.submit(4);
    assert_eq!(scene.driver.wait_used(&scene.memory, 4).len(), 4);
    assert_eq!(scene.disk.seen().len(), 4, "nothing was done again");
}

#[test]
fn after_a_pause_memory_is_let_alone_and_what_waited_goes_on_with_the_ring() {
    let mut scene = Scene::new();
    scene.one_waits_and_a_later_one_is_answered();
    // Offered and not taken: it waits, too.
    scene.pause();
    let head = place(&scene.memory, &scene.driver, 5, IN, 0, Err(512));
    scene.driver.offer(&scene.memory, head);
    scene.driver.kick();
    let before = scene.memory.read(0, 2 * FREE as usize);
    scene.disk.release(1);
    scene.let_it_turn();
    assert!(scene.memory.read(0, 2 * FREE as usize) == before, "memory was touched during a pause");
    scene.resume();
    scene.disk.release_all();
    assert_eq!(scene.driver.wait_used(&scene.memory, 2), [(3, 1), (head, 513)]);
    assert_eq!(scene.disk.seen()[2..], [write(1, 1), Request::Read { offset: 0, len: 512 }]);
}

/// cloud-hypervisor's: the acknowledged pause is all it asks for, and the restored VMM takes everything offered for taken.
#[test]
fn a_guest_restored_from_a_pause_goes_on_with_exactly_what_was_unanswered() {
    let mut scene = Scene::new();
    scene.one_waits_and_a_later_one_is_answered();
    scene.pause();
    scene.restore(2).expect("SET_VRING_KICK");
    scene.all_is_well_in_the_end();
}

#[test]
fn what_was_offered_and_not_taken_before_a_pause_is_not_lost_by_a_restore() {
    let mut scene = Scene::new();
    scene.pause();
    for slot in [1u16, 2] {
        let head = place(&scene.memory, &scene.driver, slot, OUT, slot.into(), Ok(&[slot as u8; 512]));
        scene.driver.offer(&scene.memory, head);
    }
    // The guest ran on while the ring was paused; it stops, and the ring is told again.
    scene.pause();
    scene.restore(2).expect("SET_VRING_KICK");
    assert_eq!(scene.driver.wait_used(&scene.memory, 2).len(), 2);
    assert_eq!(scene.disk.seen().len(), 2);
}

/// QEMU's: a stop says where the ring goes on, and a snapshot or migration takes it there.
#[test]
fn a_guest_restored_from_a_stop_goes_on_with_exactly_what_was_unanswered() {
    let mut scene = Scene::new();
    scene.one_waits_and_a_later_one_is_answered();
    let base = scene.front_end().vhost_stop(0);
    assert_eq!(base, scene.driver.used_idx(&scene.memory), "what is not answered was not taken");
    scene.restore(base).expect("SET_VRING_KICK");
    scene.all_is_well_in_the_end();
}

/// The backend dies with the paused guest, and the next one knows nothing but the guest's memory.
#[test]
fn a_guest_restored_to_another_backend_goes_on_as_well() {
    let mut scene = Scene::new();
    scene.one_waits_and_a_later_one_is_answered();
    scene.pause();
    scene.front_end = None;
    scene.served = Served::start(DeviceConfig::new(CAPACITY), &scene.disk);
    scene.restore(2).expect("SET_VRING_KICK");
    scene.all_is_well_in_the_end();
}

/// Nobody paused anything, the region is new: which of the two was answered, nobody can know. None is done again.
#[test]
fn without_a_pause_and_without_a_record_a_ring_is_refused_and_not_guessed_at() {
    let mut scene = Scene::new();
    scene.one_waits_and_a_later_one_is_answered();
    scene.restore(2).expect_err("which of the two was answered?");
    scene.restore(2).expect_err("asked twice, it is no clearer");
    scene.disk.release_all();
    scene.let_it_turn();
    assert_eq!(scene.disk.seen().len(), 2, "something was done again");
    // With the record, it is known.
    scene.front_end = None;
    let mut front_end = FrontEnd::connect(&scene.served.path);
    front_end.set_inflight(&scene.inflight);
    front_end.set_memory(&scene.memory);
    front_end.start(&scene.memory, &mut scene.driver, 2);
    scene.front_end = Some(front_end);
    scene.all_is_well_in_the_end();
}

/// A reset ends a life of the device. What its region says is not done in the next.
#[test]
fn what_was_in_flight_at_a_reset_is_not_done_again_by_the_same_region() {
    let mut scene = Scene::new();
    scene.one_waits_and_a_later_one_is_answered();
    scene.front_end.as_mut().expect("connected").vhost.reset_device().expect("RESET_DEVICE");
    scene.disk.release_all();
    scene.driver = Driver::new(0, 64);
    for at in [scene.driver.avail() + 2, scene.driver.used() + 2] {
        scene.memory.set_u16(at, 0);
    }
    scene.memory.write(slot_at(1) + 32, &[0xee; 512]);
    let Scene { front_end: Some(front_end), inflight, memory, driver, .. } = &mut scene else {
        unreachable!()
    };
    front_end.set_inflight(inflight);
    front_end.start(memory, driver, 0);
    scene.submit(3);
    assert_eq!(scene.driver.wait_used(&scene.memory, 1), [(9, 1)]);
    assert_eq!(scene.disk.seen()[2..], [write(3, 3)]);
}

/// Memory that stays is not waited for; the guest's requests go on under it.
#[test]
fn a_memory_table_that_takes_nothing_away_waits_for_nothing() {
    let mut scene = Scene::new();
    scene.one_waits_and_a_later_one_is_answered();
    scene.let_it_turn();
    scene.disk.release_all();
    assert_eq!(scene.driver.wait_used(&scene.memory, 1), [(3, 1)]);
    assert_eq!(scene.disk.seen().len(), 2, "nothing was done again");
}

/// The whole table is exchanged for a copy while requests are out: what is acknowledged is so, and none is lost.
#[test]
fn memory_exchanged_under_load_takes_what_is_out_with_it() {
    let mut scene = Scene::new();
    scene.one_waits_and_a_later_one_is_answered();
    let other = scene.memory.copy();
    scene.front_end().set_memory(&other);
    let before = scene.memory.read(0, 2 * FREE as usize);
    scene.disk.release(1);
    for _ in 0..3 {
        scene.front_end().set_memory(&other);
    }
    assert!(scene.memory.read(0, 2 * FREE as usize) == before, "memory was touched after it was taken away");
    scene.memory = other;
    scene.all_is_well_in_the_end();
}
