//! Chunkservers in one process, each with its own thread, directory and port, and nobody to give orders but the test.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_chunkserver::addresses::Addresses;
use evolute_chunkserver::chunk_store::{Identity, StoreOptions};
use evolute_chunkserver::copyset::members::MemberChange;
use evolute_chunkserver::copyset::state::Created;
use evolute_chunkserver::data_dir::{Absent, DataDir};
use evolute_chunkserver::scrub::ScrubOptions;
use evolute_chunkserver::shard::{
    self, Judgement, ReplicaOfReport, ShardHandle, ShardOptions, ShardReport, Thread, ToShard,
};
use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId, ReplicaId};
use evolute_raft::Role;

use crate::client::Client;

pub const CLUSTER: ClusterId = ClusterId([7; 16]);
pub const COPYSET: CopysetId = CopysetId(3);
const HOUR_MS: u64 = 3_600_000;

/// Chunkservers 1, 2, …; replicas 11, 12, … of the copyset live on the first three.
pub struct Cluster {
    servers: Vec<Server>,
    scrub_period_ms: u64,
    /// What a chunkserver that starts finds.
    pub disk: fn(u32) -> StoreOptions,
    runtime: tokio::runtime::Runtime,
}

/// A disk with room, and checkpoints one after the other.
pub fn roomy(_: u32) -> StoreOptions {
    StoreOptions { checkpoint_interval: Duration::from_millis(100), ..StoreOptions::default() }
}

struct Server {
    dir: tempfile::TempDir,
    address: SocketAddr,
    running: Option<Running>,
}

struct Running {
    handle: ShardHandle,
    thread: Thread,
    _data_dir: DataDir,
}

impl Cluster {
    pub fn start(count: usize) -> Self {
        Self::scrubbed(count, HOUR_MS)
    }

    /// With scrubbers that begin a new round that often.
    pub fn scrubbed(count: usize, scrub_period_ms: u64) -> Self {
        Self::start_with_all(count, scrub_period_ms, roomy)
    }

    /// What is written stays in the log.
    pub fn without_checkpoints(count: usize) -> Self {
        Self::start_with_all(count, HOUR_MS, |_| StoreOptions {
            checkpoint_interval: Duration::from_millis(HOUR_MS),
            ..StoreOptions::default()
        })
    }

    /// Each on a disk of its own.
    pub fn on_disks(count: usize, disk: fn(u32) -> StoreOptions) -> Self {
        Self::start_with_all(count, HOUR_MS, disk)
    }

    fn start_with_all(count: usize, scrub_period_ms: u64, disk: fn(u32) -> StoreOptions) -> Self {
        let listeners: Vec<_> =
            (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
        let servers = listeners
            .iter()
            .map(|listener| Server {
                dir: tempfile::tempdir().expect("temp dir"),
                address: listener.local_addr().expect("bound"),
                running: None,
            })
            .collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let mut cluster = Self { servers, scrub_period_ms, disk, runtime };
        for (n, listener) in (1..).zip(listeners) {
            cluster.start_with(n, listener, None);
        }
        for n in 1..=3 {
            cluster.host(n, 10 + u64::from(n), false);
        }
        cluster
    }

    fn server(&self, n: u32) -> &Server {
        &self.servers[n as usize - 1]
    }

    fn start_with(&mut self, n: u32, listener: TcpListener, start: Option<Bytes>) {
        listener.set_nonblocking(true).expect("a socket");
        let server = self.server(n);
        DataDir::init(server.dir.path()).expect("an empty directory, or its own");
        let data_dir = DataDir::take(server.dir.path(), Absent::Refused).expect("a directory of its own");
        let addresses = Addresses::open(server.dir.path());
        let all = (1..).zip(&self.servers).map(|(n, server)| (n, server.address.to_string())).collect();
        addresses.learn(all);
        let options = ShardOptions {
            start,
            data_dir: server.dir.path().to_owned(),
            identity: Identity {
                cluster: CLUSTER,
                chunkserver: ChunkserverId(n),
                token: Bytes::from_static(b"token"),
            },
            store: (self.disk)(n),
            log_file_mib: 8,
            log_retain_mib: 64,
            scrub: ScrubOptions { bytes_per_second: 1 << 30, period_ms: self.scrub_period_ms },
            trash_delay_ms: 0,
            listener,
            addresses,
            timing: crate::client::TIMING,
        };
        let (handle, thread) = self.runtime.block_on(shard::start(options)).expect("the shard starts");
        self.servers[n as usize - 1].running = Some(Running { handle, thread, _data_dir: data_dir });
    }

    pub fn is_running(&self, n: u32) -> bool {
        self.server(n).running.is_some()
    }

    pub fn start_again(&mut self, n: u32) {
        let listener = TcpListener::bind(self.server(n).address).expect("the port is free again");
        self.start_with(n, listener, None);
    }

    /// Its replicas do not vote until the directory is judged.
    pub fn start_unjudged(&mut self, n: u32, name: &'static str) {
        let listener = TcpListener::bind(self.server(n).address).expect("the port is free again");
        self.start_with(n, listener, Some(Bytes::from_static(name.as_bytes())));
    }

    /// What a control plane says of its directory.
    pub fn judge(&self, n: u32, judgement: Judgement) {
        let handle = self.server(n).running.as_ref().expect("running").handle.clone();
        assert!(self.runtime.block_on(handle.judged(judgement)), "it is taken note of");
    }

    pub fn stop(&mut self, n: u32) {
        if let Some(running) = self.servers[n as usize - 1].running.take() {
            running.handle.send(ToShard::Stop);
            running.thread.join().expect("no panic").expect("a clean end");
        }
    }

    pub fn send(&self, n: u32, order: ToShard) {
        self.server(n).running.as_ref().expect("running").handle.send(order);
    }

    pub fn host(&self, n: u32, replica: u64, joining: bool) {
        let members = (1..=3).map(|n| (ReplicaId(10 + u64::from(n)), ChunkserverId(n))).collect();
        let created = Created { replica: ReplicaId(replica), first_leader: ReplicaId(11), members, joining };
        self.send(n, ToShard::Host { copyset: COPYSET, created });
    }

    pub fn change(&self, n: u32, add: (u64, u32), remove: u64) {
        let change = MemberChange {
            add: Some((ReplicaId(add.0), ChunkserverId(add.1))),
            remove: Some(ReplicaId(remove)),
        };
        self.send(n, ToShard::ChangeMembers { copyset: COPYSET, change });
    }

    pub fn report(&self, n: u32) -> ShardReport {
        let handle = self.server(n).running.as_ref().expect("running").handle.clone();
        self.runtime.block_on(handle.report()).expect("it runs")
    }

    /// What a chunkserver says of its replica.
    pub fn replica(&self, n: u32) -> Option<ReplicaOfReport> {
        self.report(n).replicas.into_iter().next()
    }

    pub fn until(&self, what: &str, mut there: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !there() {
            assert!(Instant::now() < deadline, "waited a minute until {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The numbers of the voters, as a chunkserver's replica knows them; `None` while a change is under way.
    pub fn voters(&self, n: u32) -> Option<Vec<u64>> {
        let members = self.replica(n)?.status.members;
        members.iter().all(|m| m.voter).then(|| members.iter().map(|m| m.member.replica.0).collect())
    }

    /// Has a replica lead, whoever does now.
    pub fn lead(&self, to: u32, replica: u64) {
        self.until("the leader moved", || {
            for n in (1..).zip(&self.servers).filter(|(_, server)| server.running.is_some()).map(|(n, _)| n) {
                self.send(n, ToShard::TransferLeader { copyset: COPYSET, to: ReplicaId(replica) });
            }
            self.leads(to)
        });
    }

    pub fn leads(&self, n: u32) -> bool {
        self.replica(n).is_some_and(|replica| replica.status.role == Role::Leader)
    }

    /// A client of the one who leads.
    pub fn client(&self, n: u32) -> Client {
        Client::connect(self.server(n).address, CLUSTER, ChunkserverId(n), COPYSET)
    }

    pub fn dir(&self, n: u32) -> &Path {
        self.server(n).dir.path()
    }

    /// The files of a chunkserver's log.
    pub fn log_files(&self, n: u32) -> usize {
        std::fs::read_dir(self.server(n).dir.path().join("log")).expect("listed").count()
    }

    /// The chunk files of a chunkserver.
    pub fn files(&self, n: u32) -> Vec<PathBuf> {
        let chunks = self.server(n).dir.path().join("store/chunks");
        let volumes = std::fs::read_dir(chunks).expect("listed").map(|entry| entry.expect("listed").path());
        let files = volumes.flat_map(|volume| std::fs::read_dir(volume).expect("listed"));
        files.map(|entry| entry.expect("listed").path()).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for server in &mut self.servers {
            if let Some(running) = server.running.take() {
                running.handle.send(ToShard::Stop);
                let _ = running.thread.join();
            }
        }
    }
}
