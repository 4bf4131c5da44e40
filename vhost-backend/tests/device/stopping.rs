//! Rings stop, memory goes, front ends and devices leave while requests are in flight.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use evolute_vhost_backend::backing::{Failure, Request};
use evolute_vhost_backend::device::DeviceConfig;
use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::disk::{Disk, Served, wait_until};
use crate::front_end::{
    D, Driver, FAR, FREE, FrontEnd, GuestMemory, IN, NEXT, OUT, REGION_LEN, WRITE, data_of, header, memfd,
    place, slot_at, status_of,
};

const CAPACITY: u64 = 1 << 20;
const MARK: u8 = 0xab;

struct Scene {
    disk: Disk,
    served: Served,
    memory: GuestMemory,
    driver: Driver,
    front_end: FrontEnd,
    inflight: Option<(VhostUserInflight, File)>,
}

impl Scene {
    fn new(tracked: bool) -> Scene {
        let disk = Disk::new(CAPACITY as usize);
        disk.fill(0, &[7; 64 << 10]);
        let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
        let memory = GuestMemory::new();
        let mut driver = Driver::new(0, 64);
        let mut front_end = FrontEnd::connect(&served.path);
        let inflight = tracked.then(|| front_end.inflight(1, 64));
        if let Some(inflight) = &inflight {
            front_end.set_inflight(inflight);
        }
        front_end.set_memory(&memory);
        front_end.start(&memory, &mut driver, 0);
        Scene { disk, served, memory, driver, front_end, inflight }
    }

    /// Offers one request at `slot` and waits until the backing has it.
    fn submit(&mut self, slot: u16, kind: u32) {
        let before = self.disk.seen().len();
        let payload = [slot as u8; 512];
        let payload = if kind == OUT { Ok(&payload[..]) } else { Err(512) };
        let head = place(&self.memory, &self.driver, slot, kind, slot.into(), payload);
        if kind == IN {
            self.memory.write(slot_at(slot) + 32, &[MARK; 512]);
        }
        self.driver.offer(&self.memory, head);
        self.driver.kick();
        self.disk.wait_seen(before + 1);
    }

    /// Messages that the I/O thread answers: what it had to do, it has done.
    fn let_it_turn(&self) {
        for _ in 0..3 {
            self.front_end.set_memory(&self.memory);
        }
    }
}

#[test]
fn a_stop_is_answered_only_after_everything_of_the_ring_was() {
    let mut scene = Scene::new(true);
    scene.disk.hold();
    for slot in 0..3 {
        scene.submit(slot, OUT);
    }
    // The answers come some turns after the one in which the stop begins.
    scene.let_it_turn();
    scene.disk.release_after_turns(5);
    assert_eq!(scene.front_end.vhost_stop(0), 3);
    assert_eq!(scene.driver.used_idx(&scene.memory), 3);
    // And nothing is taken after it.
    let head = place(&scene.memory, &scene.driver, 9, IN, 0, Err(512));
    scene.driver.offer(&scene.memory, head);
    scene.driver.kick();
    scene.let_it_turn();
    assert_eq!(scene.disk.seen().len(), 3);
}

/// The cluster is unreachable and the guest is reset. The VMM must not stand still; what was out stays recorded, answers
/// that come later reach nobody, and the next start does it again.
#[test]
fn a_stop_without_progress_leaves_the_rest_recorded_and_memory_alone() {
    let mut scene = Scene::new(true);
    scene.disk.hold();
    scene.submit(0, IN);
    scene.submit(1, OUT);
    assert_eq!(scene.front_end.vhost_stop(0), 0, "none was answered");
    assert_eq!(scene.driver.used_idx(&scene.memory), 0);
    let before = scene.memory.read(FREE, 1 << 20);
    scene.disk.release(2);
    scene.let_it_turn();
    assert!(scene.memory.read(FREE, 1 << 20) == before, "a late answer touched guest memory");
    assert_eq!(scene.driver.used_idx(&scene.memory), 0);

    scene.disk.release_all();
    scene.front_end.start(&scene.memory, &mut scene.driver, 0);
    assert_eq!(scene.driver.wait_used(&scene.memory, 2).len(), 2);
    assert_eq!(data_of(&scene.memory, 0, 512), [7; 512]);
    assert!(matches!(scene.disk.seen()[2], Request::Write { .. }), "the write first");
    assert_eq!(scene.disk.seen().len(), 4);
}

/// Nobody records it but the ring itself: it goes on there, and nothing is lost.
#[test]
fn a_stop_without_progress_and_without_a_record_leaves_the_rest_in_the_ring() {
    let mut scene = Scene::new(false);
    scene.disk.hold();
    scene.submit(0, IN);
    scene.submit(1, OUT);
    assert_eq!(scene.front_end.vhost_stop(0), 0);
    scene.disk.release(2);
    scene.let_it_turn();
    assert_eq!(data_of(&scene.memory, 0, 512), [MARK; 512], "a late answer touched guest memory");
    scene.disk.release_all();
    scene.front_end.start(&scene.memory, &mut scene.driver, 0);
    assert_eq!(scene.driver.wait_used(&scene.memory, 2).len(), 2);
    assert_eq!((status_of(&scene.memory, 0), status_of(&scene.memory, 1)), (0, 0));
    assert_eq!(data_of(&scene.memory, 0, 512), [7; 512]);
}

#[test]
fn many_stuck_rings_stop_in_the_time_of_one() {
    let disk = Disk::new(CAPACITY as usize);
    disk.hold();
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    let memory = GuestMemory::new();
    let mut front_end = FrontEnd::connect(&served.path);
    let inflight = front_end.inflight(16, 64);
    front_end.set_inflight(&inflight);
    front_end.set_memory(&memory);
    for ring in 0..16u16 {
        let mut driver = Driver::new(ring.into(), 64);
        front_end.start(&memory, &mut driver, 0);
        let head = place(&memory, &driver, ring, OUT, ring.into(), Ok(&[1; 512]));
        driver.offer(&memory, head);
        driver.kick();
        disk.wait_seen(usize::from(ring) + 1);
    }
    let from = Instant::now();
    for ring in 0..16 {
        assert_eq!(front_end.vhost_stop(ring), 0);
    }
    // 16 patiences of 300 ms would be 4.8 s at least: below that, so that a slow machine does not matter.
    assert!(from.elapsed() < Duration::from_millis(4700), "{:?}", from.elapsed());
}

#[test]
fn a_front_end_that_leaves_takes_its_memory_with_it() {
    let mut scene = Scene::new(true);
    scene.disk.hold();
    scene.submit(0, IN);
    let mut others = scene.driver;
    // The driver object holds descriptors of its own: count with it alive.
    let before = mapped(&scene.memory);
    assert!(before > scene.memory.regions().len(), "we and the device have it mapped: {before}");
    drop(scene.front_end);
    wait_until("its memory is unmapped", || mapped(&scene.memory) == scene.memory.regions().len());
    scene.disk.release_all();

    let mut front_end = FrontEnd::connect(&scene.served.path);
    front_end.set_inflight(scene.inflight.as_ref().unwrap());
    front_end.set_memory(&scene.memory);
    front_end.start(&scene.memory, &mut others, 0);
    assert_eq!(others.wait_used(&scene.memory, 1).len(), 1);
}

/// How often this process, the device in it included, has the guest's files mapped.
fn mapped(memory: &GuestMemory) -> usize {
    use std::os::unix::fs::MetadataExt;
    use vm_memory::GuestMemoryBackend;
    let inodes: Vec<String> = memory
        .map
        .iter()
        .map(|region| region.file_offset().unwrap().file().metadata().unwrap().ino().to_string())
        .collect();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|line| line.split_whitespace().nth(4).is_some_and(|ino| inodes.iter().any(|i| i == ino)))
        .count()
}

#[test]
fn memory_removed_under_a_request_is_let_go_of_before_that_is_acknowledged() {
    let mut scene = Scene::new(true);
    scene.disk.hold();
    let driver = &mut scene.driver;
    scene.memory.write(FREE, &header(IN, 0));
    driver.table(
        &scene.memory,
        0,
        &[D(FREE, 16, NEXT, 1), D(FAR, 512, NEXT | WRITE, 2), D(FREE + 64, 1, WRITE, 0)],
    );
    driver.offer(&scene.memory, 0);
    driver.kick();
    scene.disk.wait_seen(1);
    let regions = scene.memory.regions();
    // Answered in time: it lands there, before the acknowledgement.
    scene.disk.release_after_turns(5);
    scene.front_end.vhost.remove_mem_region(&regions[2]).expect("REM_MEM_REG");
    assert_eq!(scene.driver.take_used(&scene.memory), [(0, 513)]);
    assert_eq!(scene.memory.read(FREE + 64, 1), [0]);
    assert_eq!(scene.memory.read(FAR, 512), [7; 512]);
    // The same again finds no memory there.
    scene.driver.offer(&scene.memory, 0);
    scene.driver.kick();
    assert_eq!(scene.driver.wait_used(&scene.memory, 1), [(0, 1)]);
    assert_eq!(scene.memory.read(FREE + 64, 1), [1]);
    // Until it is back.
    scene.front_end.vhost.add_mem_region(&regions[2]).expect("ADD_MEM_REG");
    scene.memory.write(FAR, &[MARK; 512]);
    scene.disk.hold();
    scene.driver.offer(&scene.memory, 0);
    scene.driver.kick();
    scene.disk.wait_seen(2);
    // Not answered in time: it is taken back, and an answer that comes late lands nowhere.
    scene.front_end.vhost.remove_mem_region(&regions[2]).expect("REM_MEM_REG");
    scene.disk.release_all();
    assert_eq!(scene.driver.wait_used(&scene.memory, 1), [(0, 1)]);
    assert_eq!(scene.memory.read(FREE + 64, 1), [1]);
    assert_eq!(scene.memory.read(FAR, 512), [MARK; 512], "memory that is not ours any more was touched");
}

#[test]
fn a_ring_whose_memory_is_removed_stops_and_can_be_set_up_again() {
    let mut scene = Scene::new(true);
    let regions = scene.memory.regions();
    scene.front_end.vhost.remove_mem_region(&regions[0]).expect("REM_MEM_REG");
    let head = place(&scene.memory, &scene.driver, 0, IN, 0, Err(512));
    scene.driver.offer(&scene.memory, head);
    scene.driver.kick();
    scene.front_end.vhost.add_mem_region(&regions[0]).expect("ADD_MEM_REG");
    let base = scene.front_end.vhost_stop(0);
    scene.front_end.start(&scene.memory, &mut scene.driver, base);
    assert_eq!(scene.driver.wait_used(&scene.memory, 1).len(), 1);
}

#[test]
fn a_disabled_ring_takes_nothing_and_answers_nothing() {
    let mut scene = Scene::new(true);
    scene.disk.hold();
    scene.submit(0, OUT);
    scene.front_end.vhost.set_vring_enable(0, false).expect("SET_VRING_ENABLE");
    let head = place(&scene.memory, &scene.driver, 1, IN, 0, Err(512));
    scene.driver.offer(&scene.memory, head);
    scene.driver.kick();
    scene.disk.release_all();
    scene.let_it_turn();
    assert_eq!(scene.disk.seen().len(), 1);
    assert_eq!(scene.driver.used_idx(&scene.memory), 0);
    scene.front_end.vhost.set_vring_enable(0, true).expect("SET_VRING_ENABLE");
    assert_eq!(scene.driver.wait_used(&scene.memory, 2), [(0, 1), (head, 513)]);
}

#[test]
fn a_device_reset_forgets_everything_in_flight() {
    let mut scene = Scene::new(true);
    scene.disk.hold();
    scene.submit(0, IN);
    scene.front_end.vhost.reset_device().expect("RESET_DEVICE");
    scene.disk.release_all();
    assert_eq!(scene.driver.used_idx(&scene.memory), 0);
    // A new life of the ring, from zero.
    let mut driver = Driver::new(0, 64);
    scene.memory.set_u16(driver.avail() + 2, 0);
    scene.front_end.start(&scene.memory, &mut driver, 0);
    let head = place(&scene.memory, &driver, 1, IN, 0, Err(512));
    driver.offer(&scene.memory, head);
    driver.kick();
    assert_eq!(driver.wait_used(&scene.memory, 1), [(head, 513)]);
}

#[test]
fn the_end_of_the_process_waits_for_what_is_out() {
    let mut scene = Scene::new(true);
    scene.disk.hold();
    for slot in 0..3 {
        scene.submit(slot, OUT);
    }
    let disk = scene.disk.clone();
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| scene.served.stop());
        for _ in 0..3 {
            disk.release(1);
        }
        stopping.join().unwrap().expect("a clean end");
    });
    assert_eq!(scene.driver.take_used(&scene.memory).len(), 3);
    assert!(!scene.served.path.exists(), "the socket is gone");
}

#[test]
fn the_end_of_the_process_does_not_wait_for_ever_and_the_next_one_goes_on() {
    let mut scene = Scene::new(true);
    scene.disk.hold();
    scene.submit(0, OUT);
    scene.served.stop().expect("a clean end");
    assert_eq!(scene.driver.used_idx(&scene.memory), 0);

    let disk = Disk::new(CAPACITY as usize);
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    let mut front_end = FrontEnd::connect(&served.path);
    front_end.set_inflight(scene.inflight.as_ref().unwrap());
    front_end.set_memory(&scene.memory);
    front_end.start(&scene.memory, &mut scene.driver, 0);
    assert_eq!(scene.driver.wait_used(&scene.memory, 1), [(0, 1)]);
}

#[test]
fn a_failure_of_the_backing_is_an_error_of_that_request() {
    let mut scene = Scene::new(true);
    for failure in [Failure::Io, Failure::NoSpace, Failure::ReadOnly] {
        scene.disk.fail_with(Some(failure));
        for kind in [IN, OUT] {
            scene.submit(0, kind);
            assert_eq!(scene.driver.wait_used(&scene.memory, 1), [(0, 1)]);
            assert_eq!(status_of(&scene.memory, 0), 1, "{failure:?}");
        }
    }
    scene.disk.fail_with(None);
    scene.submit(0, IN);
    assert_eq!(scene.driver.wait_used(&scene.memory, 1), [(0, 513)]);
}

/// A live migration must hear of every page we write: data, status, used ring.
#[test]
fn every_page_written_is_marked_in_the_log() {
    const LOG_ALL: u64 = 1 << 26;
    let mut scene = Scene::new(true);
    let log_len = 4096u64;
    let log = memfd(log_len);
    let region = VhostUserDirtyLogRegion { mmap_size: log_len, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
    let vhost: &Frontend = &scene.front_end.vhost;
    vhost.set_log_base(0, Some(region)).expect("SET_LOG_BASE");
    vhost.set_features(scene.front_end.features | LOG_ALL).expect("SET_FEATURES");
    let bits: MmapRegion<()> = MmapRegion::from_file(FileOffset::new(log, 0), log_len as usize).unwrap();
    let marked = |at: u64| {
        let mut bytes = vec![0u8; log_len as usize];
        bits.as_volatile_slice().copy_to(&mut bytes);
        bytes[(at / 4096 / 8) as usize] & 1 << (at / 4096 % 8) != 0
    };
    let (data, status) = (FAR + 4096, FAR + REGION_LEN - 1);
    scene.memory.write(FREE, &header(IN, 0));
    scene.driver.table(
        &scene.memory,
        0,
        &[D(FREE, 16, NEXT, 1), D(data + 4000, 4608, NEXT | WRITE, 2), D(status, 1, WRITE, 0)],
    );
    scene.driver.offer(&scene.memory, 0);
    scene.driver.kick();
    scene.driver.wait_used(&scene.memory, 1);
    for at in [data, data + 4096, data + 8192, status, scene.driver.used()] {
        assert!(marked(at), "{at:#x}");
    }
    for at in [data - 4096, data + 12288, FREE] {
        assert!(!marked(at), "{at:#x}");
    }
    // And switched off again.
    let vhost: &Frontend = &scene.front_end.vhost;
    vhost.set_features(scene.front_end.features).expect("SET_FEATURES");
    bits.as_volatile_slice().copy_from(&[0u8; 4096]);
    scene.driver.offer(&scene.memory, 0);
    scene.driver.kick();
    scene.driver.wait_used(&scene.memory, 1);
    assert!(!marked(data) && !marked(status));
}
