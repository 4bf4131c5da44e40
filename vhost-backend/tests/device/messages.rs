//! What a front end may say, in which order, and what it gets for saying something else.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use evolute_vhost_backend::device::{DeviceConfig, DeviceError, Endpoint, SocketAccess, StopSignal, run};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::disk::{Disk, PATIENCE, Served};
use crate::front_end::{
    Driver, F_EVENT_IDX, F_INDIRECT, F_VERSION_1, FrontEnd, GuestMemory, IN, REGION_LEN, memfd, place,
};

const CAPACITY: u64 = 1 << 30;

/// Tests that count descriptors of this process take turns with those that make many.
static DESCRIPTORS: Mutex<()> = Mutex::new(());

fn serve(config: DeviceConfig) -> (Disk, Served) {
    let disk = Disk::new(1 << 20);
    let served = Served::start(config, &disk);
    (disk, served)
}

fn read_once(memory: &GuestMemory, driver: &mut Driver) {
    let head = place(memory, driver, 0, IN, 0, Err(512));
    driver.offer(memory, head);
    driver.kick();
    assert_eq!(driver.wait_used(memory, 1), [(head, 513)]);
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn what_is_offered_is_what_the_design_says() {
    let (_disk, served) = serve(DeviceConfig::new(CAPACITY));
    let mut front_end = FrontEnd::connect(&served.path);
    let features = front_end.vhost.get_features().unwrap();
    for (bit, name) in [
        (1, "SIZE_MAX"),
        (2, "SEG_MAX"),
        (6, "BLK_SIZE"),
        (9, "FLUSH"),
        (10, "TOPOLOGY"),
        (11, "CONFIG_WCE"),
        (12, "MQ"),
        (13, "DISCARD"),
        (14, "WRITE_ZEROES"),
        (26, "LOG_ALL"),
        (28, "INDIRECT_DESC"),
        (29, "EVENT_IDX"),
        (30, "PROTOCOL_FEATURES"),
        (32, "VERSION_1"),
    ] {
        assert_ne!(features & 1 << bit, 0, "{name}");
    }
    assert_eq!(features & (1 << 5 | 1 << 7 | 1 << 34), 0, "RO, SCSI, packed rings");
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    assert_eq!(front_end.protocol_features(), wanted);
    assert_eq!(front_end.vhost.get_queue_num().unwrap(), 256);
    assert_eq!(front_end.vhost.get_max_mem_slots().unwrap(), 509);
}

#[test]
fn the_config_space_is_answered_at_any_offset_and_length() {
    let mut config = DeviceConfig::new(CAPACITY);
    config.queues = 12;
    let (_disk, served) = serve(config);
    let mut front_end = FrontEnd::connect(&served.path);
    let mut get = |offset: u32, len: usize| {
        let flags = VhostUserConfigFlags::empty();
        front_end.vhost.get_config(offset, len as u32, flags, &vec![0; len]).unwrap().1
    };
    let space = get(0, 60);
    assert_eq!(space[..8], (CAPACITY / 512).to_le_bytes());
    assert_eq!((u32_at(&space, 8), u32_at(&space, 12)), (8192, 126), "size_max, seg_max");
    assert_eq!(u32_at(&space, 20), 512, "blk_size");
    assert_eq!((space[24], space[25]), (3, 0), "4 KiB physical blocks, aligned");
    assert_eq!(space[26..28], 8u16.to_le_bytes(), "min_io_size");
    assert_eq!(space[32], 1, "writeback");
    assert_eq!(space[34..36], 12u16.to_le_bytes(), "num_queues");
    assert_eq!((u32_at(&space, 36), u32_at(&space, 40), u32_at(&space, 44)), (524_288, 16, 8), "discard");
    assert_eq!((u32_at(&space, 48), u32_at(&space, 52), space[56]), (131_072, 16, 1), "write zeroes");
    // cloud-hypervisor before v51 asks at 0x100; newer front ends ask for longer structures.
    assert_eq!(get(0x100, 60), space);
    assert_eq!(get(0, 256)[..60], space);
    assert_eq!(get(0, 256)[60..], [0; 196]);
    assert_eq!(get(34, 2), 12u16.to_le_bytes());
}

#[test]
fn only_the_write_cache_byte_can_be_written() {
    let (_disk, served) = serve(DeviceConfig::new(CAPACITY));
    let mut front_end = FrontEnd::connect(&served.path);
    let flags = VhostUserConfigFlags::WRITABLE;
    front_end.vhost.set_config(32, flags, &[0]).expect("the byte");
    assert_eq!(front_end.vhost.get_config(32, 1, flags, &[0]).unwrap().1, [0]);
    for (offset, value) in [(32, vec![2]), (32, vec![1, 1]), (0, vec![0; 8]), (31, vec![1]), (200, vec![1])] {
        front_end.vhost.set_config(offset, flags, &value).expect_err("refused");
    }
    // The session goes on.
    front_end.vhost.set_config(0x120, flags, &[1]).expect("with the legacy offset");
    assert_eq!(front_end.vhost.get_config(32, 1, flags, &[0]).unwrap().1, [1]);
}

#[test]
fn a_running_ring_cannot_be_moved() {
    let (_disk, served) = serve(DeviceConfig::new(CAPACITY));
    let memory = GuestMemory::new();
    let mut front_end = FrontEnd::connect(&served.path);
    front_end.set_memory(&memory);
    let mut driver = Driver::new(0, 64);
    front_end.start(&memory, &mut driver, 0);
    read_once(&memory, &mut driver);
    front_end.vhost.set_vring_num(0, 128).expect_err("a new size");
    front_end.vhost.set_vring_base(0, 9).expect_err("a new base");
    let elsewhere = front_end.ring_config(&memory, &Driver::new(3, 64));
    front_end.vhost.set_vring_addr(0, &elsewhere).expect_err("a new place");
    front_end.vhost.set_features(F_VERSION_1).expect_err("other features");
    // The crate's two ends believe a SET_FEATURES although it was refused: say the true ones again.
    front_end.vhost.set_features(front_end.features).expect("the same features");
    let inflight = front_end.inflight(1, 64);
    front_end.vhost.set_inflight_fd(&inflight.0, inflight.1.as_raw_fd()).expect_err("another region");
    // Saying the same again is fine: QEMU does, to switch logging on.
    let same = front_end.ring_config(&memory, &driver);
    front_end.vhost.set_vring_addr(0, &same).expect("the same place");
    read_once(&memory, &mut driver);
    // So are new descriptors for kicks and interrupts.
    driver.call = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    driver.kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    front_end.vhost.set_vring_call(0, &driver.call).expect("a new call");
    front_end.vhost.set_vring_kick(0, &driver.kick).expect("a new kick");
    read_once(&memory, &mut driver);
    // Stopped, it may go elsewhere.
    assert_eq!(front_end.vhost_stop(0), 3);
    let mut driver = Driver::new(0, 128);
    for at in [driver.avail() + 2, driver.used() + 2] {
        memory.set_u16(at, 0);
    }
    front_end.start(&memory, &mut driver, 0);
    read_once(&memory, &mut driver);
}

#[test]
fn rings_that_make_no_sense_do_not_start() {
    let (_disk, served) = serve(DeviceConfig::new(CAPACITY));
    let memory = GuestMemory::new();
    let mut front_end = FrontEnd::connect_with(&served.path, F_EVENT_IDX | F_INDIRECT);
    front_end.set_memory(&memory);
    for size in [0u16, 3, 100, 32769, 65535] {
        // The crate's front end checks some of these itself; an error is an error.
        assert!(front_end.vhost.set_vring_num(0, size).is_err(), "size {size}");
    }
    let driver = Driver::new(0, 64);
    let good = front_end.ring_config(&memory, &driver);
    let outside = [0u64, 16, !15, good.desc_table_addr + REGION_LEN - 16];
    for at in outside {
        front_end.vhost.set_vring_num(0, 64).unwrap();
        let mut bad = good;
        bad.desc_table_addr = at;
        front_end.vhost.set_vring_addr(0, &bad).expect("not looked at yet");
        front_end.vhost.set_vring_kick(0, &driver.kick).expect_err("does not start");
    }
    // A kick that is no eventfd cannot be waited for.
    front_end.vhost.set_vring_addr(0, &good).unwrap();
    let file = memfd(8);
    // SAFETY: the descriptor is a duplicate that the EventFd owns from here on.
    let not_an_eventfd: EventFd =
        unsafe { std::os::fd::FromRawFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(file)) };
    front_end.vhost.set_vring_kick(0, &not_an_eventfd).expect_err("does not start");
    // A queue beyond what the in-flight region has room for would run unrecorded.
    let inflight = front_end.inflight(1, 32);
    front_end.set_inflight(&inflight);
    front_end.vhost.set_vring_kick(0, &driver.kick).expect_err("a ring longer than its record");
    let inflight = front_end.inflight(1, 64);
    front_end.set_inflight(&inflight);
    let mut driver = driver;
    front_end.start(&memory, &mut driver, 0);
    read_once(&memory, &mut driver);
}

#[test]
fn memory_that_is_not_what_it_claims_is_not_mapped() {
    let (_disk, served) = serve(DeviceConfig::new(CAPACITY));
    let file = memfd(1 << 20);
    let (pipe, _writer) = std::io::pipe().unwrap();
    let null = File::open("/dev/zero").unwrap();
    let good = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 1 << 20,
        userspace_addr: 0x10_0000,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    let cases = [
        ("longer than its file", VhostUserMemoryRegionInfo { memory_size: 2 << 20, ..good }),
        ("offset past its file", VhostUserMemoryRegionInfo { mmap_offset: 1 << 20, ..good }),
        ("offset that overflows", VhostUserMemoryRegionInfo { mmap_offset: u64::MAX - 4095, ..good }),
        ("offset inside a page", VhostUserMemoryRegionInfo { mmap_offset: 5, memory_size: 4096, ..good }),
        (
            "guest address that overflows",
            VhostUserMemoryRegionInfo { guest_phys_addr: u64::MAX - 4095, ..good },
        ),
        (
            "user address that overflows",
            VhostUserMemoryRegionInfo { userspace_addr: u64::MAX - 4095, ..good },
        ),
        ("a pipe", VhostUserMemoryRegionInfo { mmap_handle: pipe.as_raw_fd(), ..good }),
        ("a device", VhostUserMemoryRegionInfo { mmap_handle: null.as_raw_fd(), ..good }),
    ];
    for (name, region) in cases {
        let mut front_end = FrontEnd::connect(&served.path);
        front_end.vhost.add_mem_region(&region).expect_err(name);
        // The crate ends the session over some of these by itself; what matters is that the device lives.
    }
    let mut front_end = FrontEnd::connect(&served.path);
    front_end.vhost.add_mem_region(&good).expect("good memory");
    front_end.vhost.add_mem_region(&good).expect_err("the same twice");
    let over = VhostUserMemoryRegionInfo { guest_phys_addr: 4096, ..good };
    front_end.vhost.add_mem_region(&over).expect_err("overlapping");
    front_end.vhost.remove_mem_region(&over).expect_err("never added");
    front_end.vhost.remove_mem_region(&good).expect("added");
    front_end.vhost.add_mem_region(&good).expect("again");
}

#[test]
fn unsealed_memory_is_refused_where_that_is_asked_for() {
    let mut config = DeviceConfig::new(CAPACITY);
    config.require_sealed_memory = true;
    let (_disk, served) = serve(config);
    let mut front_end = FrontEnd::connect(&served.path);
    let file =
        File::from(rustix::fs::memfd_create("sealable", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap());
    file.set_len(1 << 20).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 1 << 20,
        userspace_addr: 0x10_0000,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    front_end.vhost.add_mem_region(&region).expect_err("it can be shrunk");
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::SHRINK).unwrap();
    front_end.vhost.add_mem_region(&region).expect("it cannot");
}

/// QEMU without `share=on`: the descriptor is a file of memory like any other, and the guest's writes are not in it. Rings
/// would never move, and a second node's buffers would be written to the disk as zeroes.
#[test]
fn memory_that_the_front_end_does_not_share_is_refused_with_what_to_type() {
    let (_disk, served) = serve(DeviceConfig::new(CAPACITY));
    let len = 1 << 20;
    let region = |flags, file: &File| {
        let range = MmapRegion::<()>::build(
            Some(FileOffset::new(file.try_clone().unwrap(), 0)),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            flags | libc::MAP_NORESERVE,
        );
        range.expect("mapped")
    };
    let (file, other) = (memfd(len as u64), memfd(len as u64));
    let private = region(libc::MAP_PRIVATE, &file);
    let shared = region(libc::MAP_SHARED, &file);
    let info = |mapping: &MmapRegion<()>, file: &File| VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: len as u64,
        userspace_addr: mapping.as_ptr() as u64,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    let mut front_end = FrontEnd::connect(&served.path);
    front_end.vhost.set_mem_table(&[info(&private, &file)]).expect_err("it is not shared");
    front_end.vhost.add_mem_region(&info(&private, &file)).expect_err("it is not shared");
    // It is logged a moment after the answer.
    let from = Instant::now();
    let is_refusal = |line: &&String| line.contains("share=on") && line.contains("shared=on");
    while served.said().iter().filter(is_refusal).count() < 2 {
        assert!(from.elapsed() < PATIENCE, "{:?}", served.said());
        std::thread::yield_now();
    }
    // Whoever else's address that is: nothing is known of this file's.
    front_end.vhost.add_mem_region(&info(&private, &other)).expect("taken at its word");
    front_end.vhost.remove_mem_region(&info(&private, &other)).expect("added");
    front_end.vhost.set_mem_table(&[info(&shared, &file)]).expect("shared");
}

#[test]
fn in_flight_regions_of_wrong_shape_are_refused() {
    let (_disk, served) = serve(DeviceConfig::new(CAPACITY));
    let mut front_end = FrontEnd::connect(&served.path);
    let file = memfd(8192);
    let given =
        |mmap_size, mmap_offset, queues, size| VhostUserInflight::new(mmap_size, mmap_offset, queues, size);
    for (name, inflight) in [
        ("too short", given(8192, 0, 64, 128)),
        ("a length that lies", given(1 << 30, 0, 64, 128)),
        ("an offset past its end", given(4096, 8192, 1, 64)),
        ("an offset that overflows", given(4096, u64::MAX, 1, 64)),
        ("an offset inside a page", given(4096, 100, 1, 64)),
        ("more queues than there are", given(u64::MAX, 0, 257, 64)),
        ("rings longer than there are", given(u64::MAX, 0, 1, 65535)),
    ] {
        front_end.vhost.set_inflight_fd(&inflight, file.as_raw_fd()).expect_err(name);
    }
    front_end.vhost.set_inflight_fd(&given(4096, 4096, 1, 64), file.as_raw_fd()).expect("a good one");
}

#[test]
fn all_256_queues_can_run() {
    let _turn = DESCRIPTORS.lock();
    let (_disk, served) = serve(DeviceConfig::new(CAPACITY));
    let memory = GuestMemory::new();
    let mut front_end = FrontEnd::connect(&served.path);
    front_end.set_memory(&memory);
    // Four rings in memory, taken in turns: 256 of them would not fit below `FREE`.
    for index in 0..256usize {
        let mut driver = Driver::new(index % 4, 64);
        memory.set_u16(driver.avail() + 2, 0);
        memory.set_u16(driver.used() + 2, 0);
        driver.event_idx = true;
        let config = front_end.ring_config(&memory, &driver);
        let vhost: &mut Frontend = &mut front_end.vhost;
        vhost.set_vring_num(index, 64).unwrap();
        vhost.set_vring_base(index, 0).unwrap();
        vhost.set_vring_addr(index, &config).unwrap();
        vhost.set_vring_call(index, &driver.call).unwrap();
        vhost.set_vring_kick(index, &driver.kick).unwrap();
        vhost.set_vring_enable(index, true).unwrap();
        read_once(&memory, &mut driver);
    }
    assert!(front_end.vhost.set_vring_num(256, 64).is_err());
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Sessions end in every way there is; the device keeps nothing of them and serves the next.
#[test]
fn sessions_that_end_badly_leave_nothing_behind() {
    let _turn = DESCRIPTORS.lock();
    let (_disk, served) = serve(DeviceConfig::new(CAPACITY));
    let memory = GuestMemory::new();
    let good = || {
        let mut front_end = FrontEnd::connect(&served.path);
        let inflight = front_end.inflight(1, 64);
        front_end.set_inflight(&inflight);
        front_end.set_memory(&memory);
        let mut driver = Driver::new(0, 64);
        memory.set_u16(driver.avail() + 2, 0);
        memory.set_u16(driver.used() + 2, 0);
        front_end.start(&memory, &mut driver, 0);
        read_once(&memory, &mut driver);
    };
    let bad: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\nHost: disk\r\n\r\n",
        &[0; 12],
        // GET_FEATURES of version 2; GET_FEATURES with a body; a body of 4 GiB; SET_MEM_TABLE without descriptors.
        &[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 1, 2, 3, 4],
        &[1, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255],
        &[5, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    ];
    good();
    let before = open_descriptors();
    for _ in 0..20 {
        for bytes in bad {
            let mut stream = UnixStream::connect(&served.path).unwrap();
            stream.write_all(bytes).unwrap();
            // It hangs up, one way or the other; a reset is a hang-up, too.
            let _ = stream.read(&mut [0; 64]);
        }
        good();
    }
    // The last session ends on the other side a moment after we hang up: a new one only begins after that.
    drop(FrontEnd::connect(&served.path));
    drop(FrontEnd::connect(&served.path));
    // What other tests of this process have open goes again; what sessions left would not.
    let deadline = Instant::now() + PATIENCE;
    while open_descriptors() > before + 3 {
        assert!(Instant::now() < deadline, "{before} descriptors before, {} after", open_descriptors());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn half_a_message_does_not_hold_the_door() {
    let (_disk, served) = serve(DeviceConfig::new(CAPACITY));
    for half in [&[1u8, 0, 0][..], &[9, 0, 0, 0, 1, 0, 0, 0, 40, 0, 0, 0, 1, 2]] {
        let mut slow = UnixStream::connect(&served.path).unwrap();
        slow.write_all(half).unwrap();
        let front_end = FrontEnd::connect(&served.path);
        assert_ne!(front_end.vhost.get_features().unwrap(), 0);
        drop(slow);
    }
}

#[test]
fn without_protocol_features_a_ring_starts_enabled() {
    let (_disk, served) = serve(DeviceConfig::new(CAPACITY));
    let memory = GuestMemory::new();
    let vhost = Frontend::connect(&served.path, 1).unwrap();
    vhost.set_owner().unwrap();
    vhost.get_features().unwrap();
    vhost.set_features(F_VERSION_1 | F_EVENT_IDX).unwrap();
    let mut front_end = FrontEnd { vhost, features: F_VERSION_1 | F_EVENT_IDX };
    front_end.set_memory(&memory);
    let mut driver = Driver::new(0, 64);
    front_end.start_disabled(&memory, &mut driver, 0);
    read_once(&memory, &mut driver);
}

#[test]
fn a_connected_socket_is_served_until_the_front_end_leaves() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let stop = StopSignal::new().unwrap();
    let disk = Disk::new(1 << 20);
    let device = std::thread::spawn(move || {
        run(
            DeviceConfig::new(CAPACITY),
            Endpoint::connected(theirs.into()),
            move |_waker, _seat| crate::disk::backing(disk),
            stop,
        )
    });
    let vhost = Frontend::from_stream(ours, 1);
    assert_ne!(vhost.get_features().unwrap(), 0);
    drop(vhost);
    device.join().unwrap().expect("a clean end");
}

#[test]
fn a_socket_in_use_is_not_taken_and_a_dead_one_is() {
    let (_disk, served) = serve(DeviceConfig::new(CAPACITY));
    assert!(matches!(
        Endpoint::listen(&served.path, SocketAccess::default()),
        Err(DeviceError::Listen { .. })
    ));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let first = Endpoint::listen(&path, SocketAccess::default()).expect("a dead one is replaced");
    // A successor's socket survives the end of its predecessor.
    std::fs::remove_file(&path).unwrap();
    let _second = std::os::unix::net::UnixListener::bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
}
