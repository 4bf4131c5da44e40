//! What a chunkserver promises on its data port, asked over a real socket of a real shard: real log, real store. The
//! copyset has one member here, and three where followers answer ([`followers`]) or disks are full ([`full`]); what members promise each other is
//! tested in `raft/` and by guests.

mod client;
mod crowd;
mod followers;
mod forged;
mod full;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use bytes::Bytes;
use client::{Client, block, hello};
use evolute_chunkserver::addresses::Addresses;
use evolute_chunkserver::chunk_store::{Identity, StoreOptions};
use evolute_chunkserver::copyset::state::Created;
use evolute_chunkserver::scrub::ScrubOptions;
use evolute_chunkserver::shard::{self, ShardHandle, ShardOptions, Thread, ToShard};
use evolute_protocol::epoch::Epoch;
use evolute_protocol::geometry::CHUNK_BYTES;
use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId, ReplicaId, VolumeId};
use evolute_protocol::wire::hello::{HELLO_BYTES, Hello, HelloReply, Role, Unwelcome};
use evolute_protocol::wire::reply::{Refusal, Reply};

const CLUSTER: ClusterId = ClusterId([7; 16]);
const ME: ChunkserverId = ChunkserverId(1);
const COPYSET: CopysetId = CopysetId(3);
const VOLUME: VolumeId = VolumeId(5);
const FIRST: Epoch = Epoch { attachment: 1, incarnation: 0 };
const SECOND: Epoch = Epoch { attachment: 1, incarnation: 1 };

/// A shard with one copyset of one member, in a directory that outlives it.
struct Running {
    handle: ShardHandle,
    thread: Option<Thread>,
    address: SocketAddr,
}

impl Running {
    fn start(dir: &std::path::Path) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        Self::start_as(ME, dir, listener, vec![(ReplicaId(11), ME)])
    }

    /// One of several members; the first of them leads first.
    fn start_as(
        me: ChunkserverId,
        dir: &std::path::Path,
        listener: std::net::TcpListener,
        members: Vec<(ReplicaId, ChunkserverId)>,
    ) -> Self {
        Self::start_on(me, dir, listener, members, StoreOptions::default())
    }

    /// The same on a disk of another size.
    fn start_on(
        me: ChunkserverId,
        dir: &std::path::Path,
        listener: std::net::TcpListener,
        members: Vec<(ReplicaId, ChunkserverId)>,
        store: StoreOptions,
    ) -> Self {
        listener.set_nonblocking(true).expect("a socket");
        let address = listener.local_addr().expect("bound");
        let identity = Identity { cluster: CLUSTER, chunkserver: me, token: Bytes::from_static(b"token") };
        let options = ShardOptions {
            start: None,
            data_dir: dir.to_owned(),
            identity,
            store,
            log_file_mib: 8,
            log_retain_mib: 64,
            scrub: ScrubOptions { bytes_per_second: 1 << 30, period_ms: 3_600_000 },
            trash_delay_ms: 0,
            listener,
            addresses: Addresses::open(dir),
            timing: client::TIMING,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let (handle, thread) = runtime.block_on(shard::start(options)).expect("the shard starts");
        let replica = members.iter().find(|(_, of)| *of == me).expect("a member").0;
        let created = Created { replica, first_leader: members[0].0, members, joining: false };
        handle.send(ToShard::Host { copyset: COPYSET, created });
        Self { handle, thread: Some(thread), address }
    }

    /// A client whose copyset leads already.
    fn client(&self) -> Client {
        Client::connect(self.address, CLUSTER, ME, COPYSET)
    }

    fn stop(mut self) {
        self.handle.send(ToShard::Stop);
        let thread = self.thread.take().expect("stopped once");
        thread.join().expect("no panic").expect("a clean end");
    }
}

fn refusal(reply: Reply) -> Refusal {
    match reply {
        Reply::Refused(refusal) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

/// Whatever was acknowledged is read back, by sectors and by blocks, before and after a restart; what was not written
/// is zeroes.
#[test]
fn what_was_acknowledged_is_read_back_also_after_a_restart() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, FIRST);
    client.write(0, block(1), 1);
    client.write(8192, block(2), 2);
    client.write(8192 + 512, Bytes::from(vec![9; 1024]), 3);
    client.write(1 << 20, Bytes::from(vec![4; 1 << 20]), 4);
    let check = |client: &mut Client| {
        assert_eq!(client.read(0, 4096), block(1));
        assert_eq!(client.read(4096, 4096), Bytes::from(vec![0; 4096]));
        assert_eq!(client.read(8192, 4096)[..], [vec![2; 512], vec![9; 1024], vec![2; 2560]].concat());
        assert_eq!(client.read(1 << 20, 1 << 20), Bytes::from(vec![4; 1 << 20]));
        assert_eq!(
            client.read(u32::try_from(CHUNK_BYTES).expect("16 MiB") - 512, 512),
            Bytes::from(vec![0; 512])
        );
    };
    check(&mut client);
    running.stop();

    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, SECOND);
    check(&mut client);
    running.stop();
}

/// It asks for 1.5 GiB, takes nothing for a while, and then all of it.
#[test]
fn a_client_that_takes_no_answers_does_not_fill_the_memory() {
    const READS: usize = 1500;
    let dir = tempfile::tempdir().expect("temp dir");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let store = StoreOptions { checkpoint_interval: Duration::from_millis(100), ..StoreOptions::default() };
    let running = Running::start_on(ME, dir.path(), listener, vec![(ReplicaId(11), ME)], store);
    let mut client = running.client();
    client.fence(VOLUME, FIRST);
    client.write(0, Bytes::from(vec![4; 1 << 20]), 1);
    // What is in memory is answered by reference: it must have gone to its file.
    client.until(|client| client.in_files() == 1 << 20);
    let before = resident_bytes();
    client.send_reads(READS, 0, 1 << 20);
    // More than a second after the first answer it has taken all that it will.
    let first = client.take();
    assert!(matches!(first, Reply::Data { .. }));
    std::thread::sleep(Duration::from_millis(1500));
    let held = resident_bytes().saturating_sub(before);
    assert!(held < 256 << 20, "{} MiB wait to be taken", held >> 20);
    for _ in 1..READS {
        let Reply::Data { data, .. } = client.take() else { panic!("no data") };
        assert!(data.iter().all(|part| part.iter().all(|byte| *byte == 4)));
    }
    running.stop();
}

/// Of this process.
fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: usize = statm.split(' ').nth(1).expect("a field").parse().expect("a number");
    pages * 4096
}

#[test]
fn an_answer_says_how_fresh_it_is() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    let fenced = client.fence(VOLUME, FIRST);
    let first = client.write(0, block(1), 1);
    let second = client.write(4096, block(2), 2);
    assert!(fenced < first && first < second, "{fenced:?} {first:?} {second:?}");
    assert_eq!(client.read_fresh(0, 4096), second);
    running.stop();
}

/// The backend timed out, sent a write again, was answered, wrote the block anew; then the first copy arrives.
#[test]
fn a_late_duplicate_changes_nothing_also_after_a_restart() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, FIRST);
    client.write(0, block(1), 1);
    client.write(0, block(2), 2);
    client.write(0, block(1), 1);
    assert_eq!(client.read(0, 4096), block(2));
    running.stop();

    let running = Running::start(dir.path());
    let mut client = running.client();
    client.epoch = FIRST;
    client.write(0, block(1), 1);
    assert_eq!(client.read(0, 4096), block(2));
    running.stop();
}

#[test]
fn only_the_newest_writer_is_served() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut old = running.client();
    old.epoch = FIRST;
    assert_eq!(refusal(old.try_write(0, block(1), 1)), Refusal::NotFenced);
    assert_eq!(refusal(old.try_read(0, 4096)), Refusal::NotFenced);
    old.fence(VOLUME, FIRST);
    old.write(0, block(1), 1);
    let mut new = running.client();
    new.fence(VOLUME, SECOND);
    assert_eq!(refusal(old.try_write(0, block(3), 2)), Refusal::Fenced { current: SECOND });
    assert_eq!(refusal(old.try_read(0, 4096)), Refusal::Fenced { current: SECOND });
    assert_eq!(refusal(old.try_fence(VOLUME, FIRST)), Refusal::Fenced { current: SECOND });
    assert_eq!(new.read(0, 4096), block(1));
    running.stop();
}

#[test]
fn discarded_and_zeroed_bytes_read_as_zeroes() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, FIRST);
    client.write(0, Bytes::from(vec![5; 32768]), 1);
    client.discard(4096, 8192, 2);
    client.write_zeroes(16384 + 512, 512, 3);
    let mut expected = vec![5; 32768];
    expected[4096..12288].fill(0);
    expected[16896..17408].fill(0);
    assert_eq!(client.read(0, 32768)[..], expected);
    // A late duplicate of the first write does not bring the bytes back.
    client.write(0, Bytes::from(vec![5; 32768]), 1);
    assert_eq!(client.read(0, 32768)[..], expected);
    running.stop();
}

#[test]
fn a_dropped_volume_refuses_every_writer_and_keeps_nothing() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, FIRST);
    client.write(0, block(1), 1);
    running.handle.send(ToShard::DropVolume { copyset: COPYSET, volume: VOLUME });
    let deleted = Refusal::Fenced { current: Epoch::DELETED };
    client.until(|client| matches!(client.try_read(0, 4096), Reply::Refused(refused) if refused == deleted));
    assert_eq!(refusal(client.try_fence(VOLUME, SECOND)), deleted);
    running.stop();
}

#[test]
fn data_damaged_on_the_way_is_refused_and_not_stored() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, FIRST);
    client.write(0, block(1), 1);
    assert_eq!(refusal(client.try_damaged_write(0, block(2), 2)), Refusal::Damaged);
    assert_eq!(client.read(0, 4096), block(1));
    // Sent again as it should be, under the same sequence, it counts.
    client.write(0, block(2), 2);
    assert_eq!(client.read(0, 4096), block(2));
    running.stop();
}

#[test]
fn a_copyset_that_is_not_here_is_named() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    client.copyset = CopysetId(99);
    assert_eq!(refusal(client.try_read(0, 4096)), Refusal::NoSuchCopyset);
    running.stop();
}

/// Somebody scans ports, or a client of another cluster has an old address. Nobody else notices.
#[test]
fn strangers_and_garbage_are_turned_away_and_nobody_else_notices() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, FIRST);

    let mut scanner = TcpStream::connect(running.address).expect("connected");
    scanner.write_all(&[b'G'; 100]).expect("sent");
    // An end or a reset, but never an answer.
    assert!(matches!(scanner.read(&mut [0; 64]), Ok(0) | Err(_)));

    let good = Hello { version: 1, role: Role::Client, cluster: CLUSTER, to: ME };
    for (stranger, why) in [
        (Hello { cluster: ClusterId([8; 16]), ..good }, Unwelcome::Cluster),
        (Hello { to: ChunkserverId(2), ..good }, Unwelcome::NotMe),
        (Hello { version: 2, ..good }, Unwelcome::Version),
    ] {
        let mut socket = TcpStream::connect(running.address).expect("connected");
        socket.write_all(&stranger.encode()).expect("sent");
        let mut answer = [0; HELLO_BYTES];
        socket.read_exact(&mut answer).expect("answered");
        assert_eq!(HelloReply::decode(&answer).expect("ours").welcome, Err(why));
        assert!(matches!(socket.read(&mut [0; 1]), Ok(0) | Err(_)), "closed");
    }

    let mut rude = hello(running.address, CLUSTER, ME);
    rude.write_all(b"this is no frame").expect("sent");
    assert!(matches!(rude.read(&mut [0; 1]), Ok(0) | Err(_)), "closed");
    client.write(0, block(1), 1);
    assert_eq!(client.read(0, 4096), block(1));
    running.stop();
}

/// Many requests in one go are answered each, whatever the order.
#[test]
fn a_deep_queue_is_answered_completely() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, FIRST);
    client.write_many(512);
    for n in 0..512u32 {
        assert_eq!(client.read(n * 4096, 4096), block(u8::try_from(n % 251).expect("small")));
    }
    running.stop();
}
