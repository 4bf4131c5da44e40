//! A front end that comes before the volume is known: whoever has a guest is not kept waiting, whoever starts one waits.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use evolute_vhost_backend::backing::Capacity;
use evolute_vhost_backend::device::DeviceConfig;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::disk::{Disk, PATIENCE, Served};
use crate::front_end::{Driver, FrontEnd, GuestMemory, IN, place};

const SECTORS: u64 = 2048;

fn sectors(vhost: &mut Frontend) -> vhost::Result<u64> {
    let (_, space) = vhost.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60])?;
    Ok(u64::from_le_bytes(space[..8].try_into().expect("eight bytes")))
}

/// Every front end is one that has a guest, or none is.
fn serve(with_a_guest: bool) -> (Capacity, Disk, Served) {
    let capacity = Capacity::default();
    let starting_max = if with_a_guest { Duration::ZERO } else { Duration::from_hours(24) };
    let config = DeviceConfig { capacity: capacity.clone(), starting_max, ..DeviceConfig::default() };
    let disk = Disk::new(1 << 20);
    let served = Served::start(config, &disk);
    (capacity, disk, served)
}

#[test]
fn a_vmm_with_a_guest_is_answered_at_once_and_its_disk_grows() {
    let (capacity, disk, served) = serve(true);
    let mut front_end = FrontEnd::connect(&served.path);
    let (mut ear, mouth) = UnixStream::pair().expect("a pair");
    ear.set_read_timeout(Some(PATIENCE)).expect("a socket");
    front_end.vhost.set_backend_request_fd(&mouth).expect("SET_BACKEND_REQ_FD");
    drop(mouth);
    assert_eq!(sectors(&mut front_end.vhost).expect("answered"), 0);
    // The driver does not wait for that: what it asks for is done later.
    let (memory, mut driver) = (GuestMemory::new(), Driver::new(0, 64));
    front_end.set_memory(&memory);
    front_end.start(&memory, &mut driver, 0);
    let head = place(&memory, &driver, 0, IN, 0, Err(512));
    driver.offer(&memory, head);
    driver.kick();
    assert_eq!(sectors(&mut front_end.vhost).expect("answered"), 0);
    assert!(disk.seen().is_empty() && driver.take_used(&memory).is_empty());
    assert!(capacity.tell(SECTORS * 512));
    let mut said = [0; 12];
    ear.read_exact(&mut said).expect("it is told");
    let word = |at: usize| u32::from_ne_bytes(said[at..at + 4].try_into().expect("four bytes"));
    assert_eq!(
        [word(0), word(4), word(8)],
        [2, 1, 0],
        "the configuration changed, in version 1, without a body"
    );
    assert_eq!(sectors(&mut front_end.vhost).expect("answered"), SECTORS);
    driver.kick();
    assert_eq!(driver.wait_used(&memory, 1), [(head, 513)]);
    assert!(!capacity.tell(SECTORS * 1024), "it does not change under its guest");
    assert_eq!(sectors(&mut front_end.vhost).expect("answered"), SECTORS);
}

#[test]
fn a_vmm_that_has_no_guest_yet_waits_for_the_size() {
    let (capacity, _disk, served) = serve(false);
    let mut front_end = FrontEnd::connect(&served.path);
    let asking = std::thread::spawn(move || sectors(&mut front_end.vhost));
    std::thread::sleep(Duration::from_secs(1));
    assert!(!asking.is_finished());
    capacity.tell(SECTORS * 512);
    assert_eq!(asking.join().expect("no panic").expect("answered"), SECTORS);
}

#[test]
fn one_that_waits_holds_the_disk_no_longer_than_it_is_there() {
    let (capacity, _disk, mut served) = serve(false);
    let asks = |path: &Path| {
        let stream = UnixStream::connect(path).expect("somebody listens");
        let ours = stream.try_clone().expect("a descriptor");
        let mut vhost = Frontend::from_stream(stream, 1);
        vhost.set_owner().expect("SET_OWNER");
        vhost.get_features().expect("GET_FEATURES");
        let protocol = vhost.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
        vhost.set_protocol_features(protocol).expect("SET_PROTOCOL_FEATURES");
        (ours, std::thread::spawn(move || sectors(&mut vhost)))
    };
    let (first, asking) = asks(&served.path);
    first.shutdown(Shutdown::Both).expect("a socket");
    asking.join().expect("no panic").expect_err("it left");
    let (_second, asking) = asks(&served.path);
    served.stop().expect("a clean end, whoever waits");
    asking.join().expect("no panic").expect_err("nobody knew");
    drop(capacity);
}

#[test]
fn a_front_end_that_can_be_told_nothing_later_is_hung_up_on() {
    let (capacity, _disk, served) = serve(true);
    sectors(&mut FrontEnd::connect(&served.path).vhost).expect_err("a size of nothing would be for ever");
    capacity.tell(SECTORS * 512);
    let again = sectors(&mut FrontEnd::connect(&served.path).vhost);
    assert_eq!(again.expect("it may come again"), SECTORS);
}
