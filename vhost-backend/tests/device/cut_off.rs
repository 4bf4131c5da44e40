//! What a front end does to the descriptors and the memory that it shares ends its own session, and no other disk of the
//! process notices.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_setfl};
use vhost::vhost_user::message::VhostUserInflight;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::disk::PATIENCE;
use crate::front_end::{
    D, FAR, FrontEnd, IN, NEXT, OUT, REGION_LEN, WRITE, header, memfd, slot_at, status_of,
};
use crate::sharing::{Guest, end, io};

/// Of the one request whose data are in memory that goes away.
const SLOT: u16 = 20;
const SECTOR: u64 = 64;
const DATA_BYTES: usize = 4096;

impl Guest {
    /// Asks for something with its data at the start of the far region.
    fn offer_far(&mut self, kind: u32) {
        let (at, head) = (slot_at(SLOT), 3 * SLOT);
        self.memory.write(at, &header(kind, SECTOR));
        self.memory.write(at + 16, &[0xff]);
        let data = D(FAR, DATA_BYTES as u32, if kind == IN { NEXT | WRITE } else { NEXT }, head + 2);
        self.driver.table(&self.memory, head, &[D(at, 16, NEXT, head + 1), data, D(at + 16, 1, WRITE, 0)]);
        self.driver.offer(&self.memory, head);
        self.driver.kick();
    }

    /// Of a region of its memory so much is left.
    fn resize(&self, region: u64, bytes: u64) {
        let region = self.memory.map.find_region(GuestAddress(region)).expect("there is one");
        region.file_offset().expect("a file").file().set_len(bytes).expect("its own file");
    }

    /// The VMM connects anew, with the in-flight region that it has kept, and the ring goes on.
    fn reconnect(&mut self, region: &(VhostUserInflight, File)) {
        drop(self.front_end.take());
        let mut front_end = FrontEnd::connect(&self.served.path);
        front_end.set_inflight(region);
        front_end.set_memory(&self.memory);
        let base = self.driver.used_idx(&self.memory);
        front_end.start(&self.memory, &mut self.driver, base);
        self.front_end = Some(front_end);
    }

    /// What it was asked to change.
    fn changes(&self) -> usize {
        self.disk.seen().iter().filter(|request| request.changes_data()).count()
    }

    /// Asks for an interrupt with the next answer, as a driver does that goes to sleep.
    fn wants_an_interrupt(&self) {
        let wanted = self.driver.avail() + 4 + 2 * u64::from(self.driver.size);
        self.memory.set_u16(wanted, self.driver.seen_used.0);
    }

    /// Waits until its connection was closed from the other end.
    fn is_cut_off(&mut self) {
        let front_end = self.front_end.take().expect("it is there");
        let until = Instant::now() + PATIENCE;
        while front_end.vhost.get_features().is_ok() {
            assert!(Instant::now() < until, "its session goes on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// As a front end hands it over, whatever it is.
fn as_event(descriptor: impl Into<OwnedFd>) -> EventFd {
    // SAFETY: the descriptor is owned, and given away.
    unsafe { EventFd::from_raw_fd(descriptor.into().into_raw_fd()) }
}

#[test]
fn whatever_is_no_eventfd_is_refused_as_kick_call_and_err() {
    let io = io();
    let mut guest = Guest::on(&io, 1);
    guest.reads_its_own();
    let (_theirs, pipe) = rustix::pipe::pipe().expect("a pipe");
    let pipe = as_event(pipe);
    let front_end = &guest.front_end.as_ref().expect("it is there").vhost;
    // Of a ring that runs, and of one that is being set up.
    for ring in [0, 1] {
        front_end.set_vring_call(ring, &pipe).expect_err("a pipe is no call");
        front_end.set_vring_kick(ring, &pipe).expect_err("a pipe is no kick");
        front_end.set_vring_err(ring, &pipe).expect_err("a pipe is no err");
    }
    // What was refused has changed nothing.
    guest.reads_its_own();
    guest.served.stop().expect("a clean end");
    drop(guest);
    end(io);
}

/// `O_NONBLOCK` is the front end's to take away when we have looked.
#[test]
fn a_call_descriptor_that_blocks_ends_its_session_and_holds_no_other_disk() {
    let io = io();
    let (mut well, mut bad) = (Guest::on(&io, 1), Guest::on(&io, 2));
    well.reads_its_own();
    bad.reads_its_own();
    let _ = bad.driver.call.read();
    bad.driver.call.write(u64::MAX - 1).expect("room for all of it");
    // SAFETY: the descriptor outlives the call.
    let call = unsafe { std::os::fd::BorrowedFd::borrow_raw(bad.driver.call.as_raw_fd()) };
    fcntl_setfl(call.as_fd(), OFlags::empty()).expect("its own flag");
    bad.wants_an_interrupt();
    bad.offer(IN);
    well.reads_its_own();
    bad.is_cut_off();
    well.reads_its_own();
    // Full when it is handed over, it is not taken.
    bad.boot();
    let full = EventFd::new(0).expect("an eventfd");
    full.write(u64::MAX - 1).expect("room for all of it");
    let front_end = &bad.front_end.as_ref().expect("it is back").vhost;
    front_end.set_vring_call(0, &full).expect_err("it would block");
    bad.reads_its_own();
    for guest in [&mut well, &mut bad] {
        guest.served.stop().expect("a clean end");
    }
    drop((well, bad));
    end(io);
}

fn inflight() -> (VhostUserInflight, File) {
    const BYTES: u64 = 4096;
    (VhostUserInflight::new(BYTES, 0, 1, 64), memfd(BYTES))
}

/// Two disks of one process; `act` takes something away from the second one.
fn of_two(act: impl FnOnce(&mut Guest, &mut Guest)) {
    let io = io();
    let (mut well, mut bad) = (Guest::on(&io, 1), Guest::on(&io, 2));
    well.reads_its_own();
    bad.reads_its_own();
    act(&mut well, &mut bad);
    well.reads_its_own();
    for guest in [&mut well, &mut bad] {
        guest.served.stop().expect("a clean end");
    }
    drop((well, bad));
    end(io);
}

/// Zeroes of ours are in the place of what the guest wrote: they must never reach the volume.
#[test]
fn a_write_whose_memory_went_away_is_neither_sent_nor_answered_and_done_when_it_is_back() {
    of_two(|well, bad| {
        let region = inflight();
        bad.reconnect(&region);
        bad.reads_its_own();
        let answered = bad.driver.used_idx(&bad.memory);
        bad.resize(FAR, 0);
        bad.offer_far(OUT);
        well.reads_its_own();
        bad.is_cut_off();
        assert_eq!(bad.changes(), 0, "{:?}", bad.disk.seen());
        assert_eq!((bad.driver.used_idx(&bad.memory), status_of(&bad.memory, SLOT)), (answered, 0xff));
        bad.resize(FAR, REGION_LEN);
        bad.memory.write(FAR, &[7; DATA_BYTES]);
        bad.reconnect(&region);
        bad.driver.wait_used(&bad.memory, 1);
        assert_eq!(status_of(&bad.memory, SLOT), 0);
        assert_eq!(bad.disk.bytes(SECTOR as usize * 512, DATA_BYTES), [7; DATA_BYTES]);
        bad.reads_its_own();
    });
}

/// The ring is whole, and only the place of the data is not: an answer would say that they are there.
#[test]
fn a_read_whose_place_went_away_is_not_answered_and_done_when_it_is_back() {
    of_two(|well, bad| {
        let region = inflight();
        bad.reconnect(&region);
        bad.reads_its_own();
        let answered = bad.driver.used_idx(&bad.memory);
        bad.disk.hold();
        bad.offer_far(IN);
        bad.disk.wait_seen(3);
        bad.resize(FAR, 0);
        bad.disk.release_all();
        bad.is_cut_off();
        well.reads_its_own();
        assert_eq!(bad.driver.used_idx(&bad.memory), answered);
        bad.resize(FAR, REGION_LEN);
        bad.reconnect(&region);
        bad.driver.wait_used(&bad.memory, 1);
        assert_eq!(
            (status_of(&bad.memory, SLOT), bad.memory.read(FAR, DATA_BYTES)),
            (0, vec![2; DATA_BYTES])
        );
    });
}

#[test]
fn a_ring_that_went_away_ends_its_session_alone() {
    of_two(|well, bad| {
        bad.resize(0, 0);
        bad.driver.kick();
        bad.is_cut_off();
        well.reads_its_own();
        bad.boot();
        bad.reads_its_own();
    });
}

/// Where the ring goes on would be told, and somebody else would go on with it.
#[test]
fn a_stop_of_a_ring_that_went_away_is_not_acknowledged() {
    of_two(|_, bad| {
        bad.resize(0, 0);
        let front_end = bad.front_end.take().expect("it is there");
        front_end.vhost.get_vring_base(0).expect_err("nothing is acknowledged");
        drop(front_end);
        bad.boot();
        bad.reads_its_own();
    });
}

/// An index of zero from nowhere must not be what the in-flight region is put right by.
#[test]
fn a_ring_that_is_not_there_when_it_starts_leaves_the_region_as_it_is() {
    of_two(|_, bad| {
        let region = inflight();
        bad.reconnect(&region);
        bad.reads_its_own();
        bad.disk.hold();
        bad.offer_far(OUT);
        bad.disk.wait_seen(3);
        drop(bad.front_end.take());
        let record = || {
            let mut bytes = vec![0; 2048];
            std::os::unix::fs::FileExt::read_exact_at(&region.1, &mut bytes, 0).expect("it is there");
            bytes
        };
        let (before, rings) = (record(), bad.memory.read(0, 1 << 20));
        let mut front_end = FrontEnd::connect(&bad.served.path);
        front_end.set_inflight(&region);
        front_end.set_memory(&bad.memory);
        let config = front_end.ring_config(&bad.memory, &bad.driver);
        front_end.vhost.set_vring_num(0, bad.driver.size).expect("SET_VRING_NUM");
        front_end.vhost.set_vring_addr(0, &config).expect("SET_VRING_ADDR");
        bad.resize(0, 0);
        front_end.vhost.set_vring_kick(0, &bad.driver.kick).expect_err("it cannot start");
        drop(front_end);
        assert!(record() == before, "the region was written");
        bad.resize(0, REGION_LEN);
        bad.memory.write(0, &rings);
        bad.memory.write(slot_at(SLOT), &header(OUT, SECTOR));
        bad.disk.release_all();
        bad.reconnect(&region);
        bad.driver.wait_used(&bad.memory, 1);
        assert_eq!(bad.changes(), 2, "the write was done again");
    });
}

#[test]
fn an_in_flight_region_or_a_dirty_log_that_went_away_ends_its_session_alone() {
    const LOG_ALL: u64 = 1 << 26;
    const LOG_BYTES: u64 = 4096;
    of_two(|well, bad| {
        let region = inflight();
        bad.reconnect(&region);
        bad.reads_its_own();
        region.1.set_len(0).expect("its own file");
        let (seen, answered) = (bad.disk.seen().len(), bad.driver.used_idx(&bad.memory));
        bad.offer(OUT);
        bad.is_cut_off();
        well.reads_its_own();
        // Nobody would know of it after a crash.
        assert_eq!((bad.disk.seen().len(), bad.driver.used_idx(&bad.memory)), (seen, answered));

        bad.boot();
        let log = memfd(LOG_BYTES);
        let to =
            VhostUserDirtyLogRegion { mmap_size: LOG_BYTES, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
        let front_end = bad.front_end.as_ref().expect("it is back");
        front_end.vhost.set_log_base(0, Some(to)).expect("SET_LOG_BASE");
        front_end.vhost.set_features(front_end.features | LOG_ALL).expect("SET_FEATURES");
        bad.reads_its_own();
        let answered = bad.driver.used_idx(&bad.memory);
        log.set_len(0).expect("its own file");
        bad.offer(IN);
        bad.is_cut_off();
        well.reads_its_own();
        // The page of the answer would not travel with the guest.
        assert_eq!(bad.driver.used_idx(&bad.memory), answered);
        bad.boot();
        bad.reads_its_own();
    });
}
