//! More callers than places, and more halves of requests than memory: whoever is of use is served on.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use evolute_protocol::wire::reply::Reply;

use crate::client::{block, hello};
use crate::{CLUSTER, FIRST, ME, Running, VOLUME};

/// The other side has ended it.
fn is_ended(socket: &mut TcpStream) -> bool {
    socket.set_nonblocking(true).expect("a socket");
    match socket.read(&mut [0; 1]) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    }
}

fn until_some_end(sockets: &mut [TcpStream]) -> usize {
    loop {
        let ended = sockets.iter_mut().filter_map(|socket| is_ended(socket).then_some(())).count();
        if ended > 0 {
            return ended;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn silent(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    (0..count).map(|_| TcpStream::connect(address).expect("connected")).collect()
}

/// More than those that have not said who they are may be (256), and fewer than descriptors.
const STRANGERS: usize = 350;

#[test]
fn strangers_that_say_nothing_lock_nobody_out() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, FIRST);
    let mut strangers = silent(running.address, STRANGERS);
    // Who comes now is let in, and who was there is still.
    let mut late = running.client();
    late.epoch = FIRST;
    assert!(matches!(client.try_read(0, 4096), Reply::Data { .. }));
    assert!(matches!(late.try_read(0, 4096), Reply::Data { .. }));
    until_some_end(&mut strangers[..100]);
    drop((client, late));
    running.stop();
}

/// All of them together hold more than may be held of what is not whole (128 MiB).
const HALVES: usize = 160;

#[test]
fn halves_of_requests_are_bounded_for_all_callers_together() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, FIRST);
    // A header that promises a megabyte; its last byte never comes.
    let mut half = vec![0; 32 + (1 << 20) - 1];
    half[..5].copy_from_slice(b"EVF1\x02");
    half[8..12].copy_from_slice(&(1u32 << 20).to_le_bytes());
    let mut halves: Vec<_> = (0..HALVES)
        .map(|_| {
            let mut socket = hello(running.address, CLUSTER, ME);
            socket.write_all(&half).expect("sent");
            socket
        })
        .collect();
    until_some_end(&mut halves[..HALVES - 128]);
    client.write(0, block(7), 1);
    assert!(matches!(client.try_read(0, 4096), Reply::Data { .. }), "who sends whole requests is served on");
    drop(client);
    running.stop();
}
