//! A VMM and its guest's driver, as far as a disk can tell: shared memory, rings written by hand, and vhost-user messages.

use std::fs::File;
use std::num::Wrapping;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};
use vmm_sys_util::eventfd::EventFd;

use crate::disk::PATIENCE;

pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_VERSION_1: u64 = 1 << 32;
pub const F_PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Two regions side by side, so that a buffer can cross from one to the other, then a hole, then a third.
pub const REGION_LEN: u64 = 2 << 20;
pub const BORDER: u64 = REGION_LEN;
pub const HOLE: u64 = 2 * REGION_LEN;
pub const FAR: u64 = 16 << 20;
/// Guest memory a test may use freely: below it are the rings.
pub const FREE: u64 = 1 << 20;

const RING_BYTES: u64 = 64 << 10;

/// One descriptor: address, length, flags, next.
#[derive(Clone, Copy, Debug)]
pub struct D(pub u64, pub u32, pub u16, pub u16);

impl D {
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.1.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.2.to_le_bytes());
        bytes[14..].copy_from_slice(&self.3.to_le_bytes());
        bytes
    }
}

/// Shared memory that outlives front ends and devices alike.
pub struct GuestMemory {
    pub map: GuestMemoryMmap<()>,
}

pub fn memfd(len: u64) -> File {
    let file = File::from(
        rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("memory for a test"),
    );
    file.set_len(len).expect("memory for a test");
    file
}

impl GuestMemory {
    pub fn new() -> GuestMemory {
        let region = |at| {
            GuestRegionMmap::from_range(
                GuestAddress(at),
                REGION_LEN as usize,
                Some(FileOffset::new(memfd(REGION_LEN), 0)),
            )
            .expect("memory for a test")
        };
        let map =
            GuestMemoryMmap::from_regions(vec![region(0), region(BORDER), region(FAR)]).expect("sorted");
        GuestMemory { map }
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.map.write_slice(bytes, GuestAddress(at)).expect("inside");
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.map.read_slice(&mut bytes, GuestAddress(at)).expect("inside");
        bytes
    }

    pub fn u16(&self, at: u64) -> u16 {
        self.map.load(GuestAddress(at), Ordering::Acquire).map(u16::from_le).expect("inside")
    }

    pub fn set_u16(&self, at: u64, value: u16) {
        self.map.store(value.to_le(), GuestAddress(at), Ordering::Release).expect("inside");
    }

    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.map
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                mmap_offset: 0,
                mmap_handle: region.file_offset().expect("a file").file().as_raw_fd(),
            })
            .collect()
    }

    /// What a VMM restores from a snapshot, or receives in a migration: the same bytes in other memory.
    pub fn copy(&self) -> GuestMemory {
        let copy = GuestMemory::new();
        for at in [0, BORDER, FAR] {
            copy.write(at, &self.read(at, REGION_LEN as usize));
        }
        copy
    }

    /// As the front end says it in messages.
    fn user(&self, at: u64) -> u64 {
        self.map.get_host_address(GuestAddress(at)).expect("inside") as u64
    }
}

/// What the driver knows of one ring.
pub struct Driver {
    pub index: usize,
    pub size: u16,
    pub event_idx: bool,
    pub next_avail: Wrapping<u16>,
    pub seen_used: Wrapping<u16>,
    pub kick: EventFd,
    pub call: EventFd,
}

impl Driver {
    pub fn new(index: usize, size: u16) -> Driver {
        Driver {
            index,
            size,
            event_idx: true,
            next_avail: Wrapping(0),
            seen_used: Wrapping(0),
            kick: EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd"),
            call: EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd"),
        }
    }

    fn base(&self) -> u64 {
        self.index as u64 * RING_BYTES
    }

    pub fn descriptors(&self) -> u64 {
        self.base()
    }

    pub fn avail(&self) -> u64 {
        self.base() + 16 * u64::from(self.size)
    }

    pub fn used(&self) -> u64 {
        (self.avail() + 6 + 2 * u64::from(self.size)).next_multiple_of(8)
    }

    /// Writes descriptors into the ring's table, from entry `at`.
    pub fn table(&self, memory: &GuestMemory, at: u16, chain: &[D]) {
        for (i, d) in chain.iter().enumerate() {
            memory.write(self.descriptors() + 16 * (u64::from(at) + i as u64), &d.bytes());
        }
    }

    /// Puts a head on the avail ring without telling.
    pub fn offer(&mut self, memory: &GuestMemory, head: u16) {
        let at = self.avail() + 4 + 2 * u64::from(self.next_avail.0 % self.size);
        memory.set_u16(at, head);
        self.next_avail += 1;
        memory.set_u16(self.avail() + 2, self.next_avail.0);
    }

    pub fn kick(&self) {
        self.kick.write(1).expect("an eventfd");
    }

    /// The used ring's index.
    pub fn used_idx(&self, memory: &GuestMemory) -> u16 {
        memory.u16(self.used() + 2)
    }

    /// Everything answered since the last look.
    pub fn take_used(&mut self, memory: &GuestMemory) -> Vec<(u16, u32)> {
        let mut taken = Vec::new();
        while self.used_idx(memory) != self.seen_used.0 {
            let at = self.used() + 4 + 8 * u64::from(self.seen_used.0 % self.size);
            let element = memory.read(at, 8);
            let head = u32::from_le_bytes([element[0], element[1], element[2], element[3]]);
            let len = u32::from_le_bytes([element[4], element[5], element[6], element[7]]);
            taken.push((u16::try_from(head).expect("a head"), len));
            self.seen_used += 1;
        }
        taken
    }

    /// Waits for `count` answers, sleeping on the interrupt like a driver does.
    pub fn wait_used(&mut self, memory: &GuestMemory, count: usize) -> Vec<(u16, u32)> {
        let deadline = Instant::now() + PATIENCE;
        let mut taken = Vec::new();
        loop {
            taken.extend(self.take_used(memory));
            if taken.len() >= count {
                return taken;
            }
            if self.event_idx {
                memory.set_u16(self.avail() + 4 + 2 * u64::from(self.size), self.seen_used.0);
                fence(Ordering::SeqCst);
                if self.used_idx(memory) != self.seen_used.0 {
                    continue;
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} of {count} answers, and no interrupt", taken.len());
            wait_readable(&self.call, left);
            let _ = self.call.read();
        }
    }
}

fn wait_readable(event: &EventFd, timeout: Duration) {
    // SAFETY: the eventfd outlives the call.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let timeout = rustix::event::Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)).expect("poll");
}

/// A connected front end with the usual handshake done.
pub struct FrontEnd {
    pub vhost: Frontend,
    pub features: u64,
}

impl FrontEnd {
    pub fn connect(path: &Path) -> FrontEnd {
        FrontEnd::connect_with(path, F_EVENT_IDX | F_INDIRECT)
    }

    pub fn connect_with(path: &Path, features: u64) -> FrontEnd {
        let mut vhost = Frontend::connect(path, 256).expect("somebody listens");
        vhost.set_owner().expect("SET_OWNER");
        let offered = vhost.get_features().expect("GET_FEATURES");
        let features = features | F_VERSION_1 | F_PROTOCOL;
        assert_eq!(features & !offered, 0, "offered {offered:#x}");
        let protocol = vhost.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
        vhost.set_protocol_features(protocol).expect("SET_PROTOCOL_FEATURES");
        vhost.set_features(features).expect("SET_FEATURES");
        vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        FrontEnd { vhost, features }
    }

    pub fn set_memory(&self, memory: &GuestMemory) {
        self.vhost.set_mem_table(&memory.regions()).expect("SET_MEM_TABLE");
    }

    pub fn inflight(&mut self, queues: u16, queue_size: u16) -> (VhostUserInflight, File) {
        self.vhost
            .get_inflight_fd(&VhostUserInflight::new(0, 0, queues, queue_size))
            .expect("GET_INFLIGHT_FD")
    }

    pub fn set_inflight(&mut self, inflight: &(VhostUserInflight, File)) {
        self.vhost.set_inflight_fd(&inflight.0, inflight.1.as_raw_fd()).expect("SET_INFLIGHT_FD");
    }

    pub fn ring_config(&self, memory: &GuestMemory, driver: &Driver) -> VringConfigData {
        VringConfigData {
            queue_max_size: 32768,
            queue_size: driver.size,
            flags: 0,
            desc_table_addr: memory.user(driver.descriptors()),
            used_ring_addr: memory.user(driver.used()),
            avail_ring_addr: memory.user(driver.avail()),
            log_addr: None,
        }
    }

    /// Sets a ring up and enables it, in QEMU's order.
    pub fn start(&mut self, memory: &GuestMemory, driver: &mut Driver, base: u16) {
        self.start_disabled(memory, driver, base);
        self.vhost.set_vring_enable(driver.index, true).expect("SET_VRING_ENABLE");
    }

    pub fn start_disabled(&mut self, memory: &GuestMemory, driver: &mut Driver, base: u16) {
        driver.event_idx = self.features & F_EVENT_IDX != 0;
        let index = driver.index;
        self.vhost.set_vring_num(index, driver.size).expect("SET_VRING_NUM");
        self.vhost.set_vring_base(index, base).expect("SET_VRING_BASE");
        let config = self.ring_config(memory, driver);
        self.vhost.set_vring_addr(index, &config).expect("SET_VRING_ADDR");
        self.vhost.set_vring_call(index, &driver.call).expect("SET_VRING_CALL");
        self.vhost.set_vring_kick(index, &driver.kick).expect("SET_VRING_KICK");
    }

    pub fn protocol_features(&mut self) -> VhostUserProtocolFeatures {
        self.vhost.get_protocol_features().expect("GET_PROTOCOL_FEATURES")
    }
}

/// The 16 bytes every request begins with.
pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

/// Places one ordinary request at `slot` of guest memory and its chain at descriptor `3 * slot`; returns the head.
pub fn place(
    memory: &GuestMemory,
    driver: &Driver,
    slot: u16,
    kind: u32,
    sector: u64,
    payload: Result<&[u8], u32>,
) -> u16 {
    let at = slot_at(slot);
    let head = 3 * slot;
    memory.write(at, &header(kind, sector));
    memory.write(at + 16, &[0xff]);
    let data = match payload {
        Ok(bytes) => {
            memory.write(at + 32, bytes);
            D(at + 32, bytes.len() as u32, NEXT, head + 2)
        }
        Err(len) => D(at + 32, len, NEXT | WRITE, head + 2),
    };
    driver.table(memory, head, &[D(at, 16, NEXT, head + 1), data, D(at + 16, 1, WRITE, 0)]);
    head
}

pub fn slot_at(slot: u16) -> u64 {
    FREE + u64::from(slot) * 8192
}

pub fn status_of(memory: &GuestMemory, slot: u16) -> u8 {
    memory.read(slot_at(slot) + 16, 1)[0]
}

pub fn data_of(memory: &GuestMemory, slot: u16, len: usize) -> Vec<u8> {
    memory.read(slot_at(slot) + 32, len)
}

impl FrontEnd {
    /// GET_VRING_BASE: stops the ring and says where it would go on.
    pub fn vhost_stop(&self, index: usize) -> u16 {
        u16::try_from(self.vhost.get_vring_base(index).expect("GET_VRING_BASE")).expect("an index")
    }
}
