//! Who else calls at a disk's socket: strangers who say nothing, halves or garbage, a second front end. None of them keeps
//! the disk from its guest, and none disturbs a guest that has it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use evolute_vhost_backend::device::DeviceConfig;
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::disk::{Disk, PATIENCE, Served, wait_until};
use crate::front_end::{Driver, F_EVENT_IDX, F_PROTOCOL, F_VERSION_1, FrontEnd, GuestMemory, IN, place};

const CAPACITY: u64 = 1 << 20;
/// GET_FEATURES, whole.
const QUESTION: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
/// SET_OWNER, whole.
const OWNER: [u8; 12] = [3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
/// GET_VRING_BASE of ring 0.
const STOP: [u8; 20] = [11, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// SET_VRING_ENABLE 0 of ring 0.
const PAUSE: [u8; 20] = [18, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn serve() -> (Disk, Served) {
    let disk = Disk::new(CAPACITY as usize);
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    (disk, served)
}

fn stranger(served: &Served, says: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(&served.path).expect("somebody listens");
    stream.write_all(says).expect("room");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// A guest with its disk.
struct Guest {
    front_end: FrontEnd,
    memory: GuestMemory,
    driver: Driver,
}

impl Guest {
    fn start(served: &Served) -> Guest {
        let front_end = FrontEnd::connect(&served.path);
        let (memory, driver) = (GuestMemory::new(), Driver::new(0, 64));
        let mut guest = Guest { front_end, memory, driver };
        guest.front_end.set_memory(&guest.memory);
        guest.front_end.start(&guest.memory, &mut guest.driver, 0);
        guest
    }

    fn reads(&mut self) {
        let head = place(&self.memory, &self.driver, 0, IN, 0, Err(512));
        self.driver.offer(&self.memory, head);
        self.driver.kick();
        assert_eq!(self.driver.wait_used(&self.memory, 1), [(head, 513)]);
    }
}

fn is_hung_up_on(stream: &mut UnixStream) -> bool {
    loop {
        match stream.read(&mut [0; 64]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

/// A health check, netcat, a VMM that stands still before its first word.
#[test]
fn whoever_says_nothing_keeps_the_disk_from_nobody() {
    let (_disk, served) = serve();
    let _silent: Vec<_> = (0..5).map(|_| stranger(&served, &[])).collect();
    let mut guest = Guest::start(&served);
    let _more: Vec<_> = (0..5).map(|_| stranger(&served, &[])).collect();
    guest.reads();
}

#[test]
fn half_a_message_is_hung_up_on_and_keeps_the_disk_from_nobody() {
    let (_disk, served) = serve();
    let halves = [&QUESTION[..3], &QUESTION[..11], &STOP[..13]];
    let mut before: Vec<_> = halves.iter().map(|half| stranger(&served, half)).collect();
    let mut guest = Guest::start(&served);
    guest.reads();
    let mut after: Vec<_> = halves.iter().map(|half| stranger(&served, half)).collect();
    assert!(before.iter_mut().chain(&mut after).all(is_hung_up_on));
    guest.reads();
}

/// A message may come in pieces; it is no less a message.
#[test]
fn a_message_in_two_halves_is_a_message() {
    let (_disk, served) = serve();
    let mut stream = stranger(&served, &STOP[..13]);
    stream.write_all(&STOP[13..]).expect("room");
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).expect("an answer");
    assert_eq!(reply[..4], STOP[..4]);
}

#[test]
fn whoever_only_asks_gives_its_place_to_a_front_end() {
    let (_disk, served) = serve();
    let mut asks = stranger(&served, &QUESTION);
    asks.read_exact(&mut [0; 20]).expect("an answer");
    let mut guest = Guest::start(&served);
    guest.reads();
    assert!(is_hung_up_on(&mut asks));
}

/// Two virtual machines with one socket by mistake. The first has it, also while its guest is still in its firmware; the
/// second hears it at once, and whoever reads the log learns who both are.
#[test]
fn a_second_front_end_is_hung_up_on_at_once_and_both_are_named() {
    let (_disk, served) = serve();
    let mut owner = stranger(&served, &[&OWNER[..], &QUESTION[..]].concat());
    owner.read_exact(&mut [0; 20]).expect("an answer");
    assert!(is_hung_up_on(&mut stranger(&served, &OWNER)));
    owner.write_all(&QUESTION).expect("still there");
    owner.read_exact(&mut [0; 20]).expect("still an answer");
    drop(owner);

    let mut guest = Guest::start(&served);
    for says in [&QUESTION[..], &OWNER[..], &STOP[..], &[0xff; 64]] {
        guest.reads();
        assert!(is_hung_up_on(&mut stranger(&served, says)));
    }
    guest.reads();
    let said = served.said();
    let refusal = said.iter().find(|line| line.contains("a second front end")).expect("a line");
    let me = format!("pid {} (", std::process::id());
    assert_eq!(refusal.matches(&me).count(), 2, "{refusal}");
}

/// QEMU with `-m 512` alone has no memory that it could share. It gives none, and starts its rings all the same; the guest
/// hangs in its firmware.
#[test]
fn a_front_end_without_memory_is_told_what_to_type_and_keeps_the_disk_from_nobody() {
    let (_disk, served) = serve();
    let (memory, mut driver) = (GuestMemory::new(), Driver::new(0, 64));
    let mut front_end = FrontEnd::connect(&served.path);
    let is_told = |line: &String| line.contains("not shared") && line.contains("share=on");
    front_end.start(&memory, &mut driver, 0);
    wait_until("it is told", || served.said().iter().any(is_told));
    Guest::start(&served).reads();
    assert!(front_end.vhost.get_features().is_err(), "hung up on");
    // Memory in time is all that was missing.
    let mut late = FrontEnd::connect(&served.path);
    let mut driver = Driver::new(0, 64);
    late.start(&memory, &mut driver, 0);
    late.set_memory(&memory);
    late.vhost.set_vring_enable(0, true).expect("SET_VRING_ENABLE");
    let mut guest = Guest { front_end: late, memory, driver };
    guest.reads();
    assert!(is_hung_up_on(&mut stranger(&served, &OWNER)));
    guest.reads();
}

/// Whoever moves a guest to another VMM, or starts it anew, speaks as soon as the one before has hung up; what that one had
/// to say last is heard first.
#[test]
fn whoever_comes_as_the_one_before_leaves_is_served() {
    let (disk, served) = serve();
    for _ in 0..5 {
        disk.hold();
        let before = disk.seen().len();
        let (ours, memory, mut driver) = (stranger(&served, &[]), GuestMemory::new(), Driver::new(0, 64));
        let mut raw = ours.try_clone().expect("a duplicate");
        let mut vhost = Frontend::from_stream(ours, 1);
        vhost.set_owner().expect("SET_OWNER");
        vhost.get_features().expect("GET_FEATURES");
        let protocol = vhost.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
        vhost.set_protocol_features(protocol).expect("SET_PROTOCOL_FEATURES");
        let features = F_VERSION_1 | F_EVENT_IDX | F_PROTOCOL;
        vhost.set_features(features).expect("SET_FEATURES");
        let mut leaving = FrontEnd { vhost, features };
        leaving.set_memory(&memory);
        leaving.start(&memory, &mut driver, 0);
        leaving.vhost.get_features().expect("all of it was heard");
        let head = place(&memory, &driver, 0, IN, 0, Err(512));
        driver.offer(&memory, head);
        driver.kick();
        disk.wait_seen(before + 1);
        let next = stranger(&served, &[]);
        // That takes a moment, in which the next one begins to speak.
        raw.write_all(&PAUSE).expect("room");
        drop((raw, leaving));
        let next = Frontend::from_stream(next, 1);
        next.set_owner().expect("SET_OWNER");
        next.get_features().expect("it is served");
        disk.release_all();
    }
}

/// Connections without number, silent and with garbage: the guest that has its disk does not notice, one that comes gets
/// its own, and few are held and few are logged.
#[test]
fn a_flood_of_callers_is_bounded() {
    let (_disk, served) = serve();
    let mut guest = Guest::start(&served);
    let flood = |says: &[u8]| -> Vec<_> { (0..300).map(|_| stranger(&served, says)).collect() };
    let silent = flood(&[]);
    let garbage = flood(&[0xff; 64]);
    guest.reads();
    drop(guest);
    let more = flood(&[]);
    Guest::start(&served).reads();
    wait_until("most are hung up on", || {
        let is_there = |stream: &&UnixStream| {
            stream.set_nonblocking(true).expect("set");
            let mut stream: &UnixStream = stream;
            matches!(stream.read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
        };
        silent.iter().chain(&garbage).chain(&more).filter(is_there).count() <= 8
    });
    let said = served.said();
    assert!(said.len() < 60, "{} lines, the last: {:?}", said.len(), said.last());
}
