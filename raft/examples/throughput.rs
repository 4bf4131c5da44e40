//! What does a replicated 4 KiB write cost, before there is anything around it?
//!
//! `cargo run --release -p evolute-raft --example throughput -- [DIR]`: three processes' worth of raft threads in one
//! process, real connections over loopback, logs under DIR (default /dev/shm), six groups whose leaders are spread.
//! Prints writes per second and the median latency at several depths; each write goes to the next group, as random
//! writes to a volume striped over all of them do. Compare with `reference/rust-stack.md` §0.3.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_raft::{
    Applying, Command, Dial, DialFuture, Group, GroupId, Log, LogOptions, LogOwner, Member, Node, Peers,
    Position, ProcessId, ReplicaId, Restored, StateMachine, Timing, spawn_thread,
};
use tokio::net::{TcpListener, TcpStream};

const NODES: u64 = 3;
const GROUPS: u64 = 6;
const DEPTHS: [usize; 4] = [1, 32, 128, 256];
const PER_DEPTH: Duration = Duration::from_secs(3);

#[derive(Clone, Default)]
struct Directory(Arc<Mutex<HashMap<ProcessId, SocketAddr>>>);

impl Dial for Directory {
    fn dial(&self, to: ProcessId) -> DialFuture {
        let address = self.0.lock().unwrap().get(&to).copied();
        Box::pin(async move { TcpStream::connect(address.ok_or(io::ErrorKind::NotFound)?).await })
    }
}

struct Counter(Rc<RefCell<Restored>>);

impl StateMachine for Counter {
    fn restored(&self) -> Restored {
        Restored::default()
    }

    fn apply(&mut self, at: Position, what: Applying) -> Bytes {
        let mut restored = self.0.borrow_mut();
        restored.applied = Some(at);
        if let Applying::Membership(membership) = what {
            restored.membership = Some(membership);
        }
        Bytes::new()
    }
}

/// Keeps `depth` writes of this node's groups unanswered until the time is up.
struct Load {
    groups: Vec<Group>,
    next: Cell<usize>,
    payload: Bytes,
    latencies: RefCell<Vec<u32>>,
    until: Instant,
    running: Cell<usize>,
}

impl Load {
    fn write(self: &Rc<Self>) {
        let began = Instant::now();
        if began >= self.until {
            self.running.set(self.running.get() - 1);
            return;
        }
        let group = &self.groups[self.next.get() % self.groups.len()];
        self.next.set(self.next.get() + 1);
        let load = self.clone();
        let header = Bytes::from_static(&[7; 48]);
        let command: Command = [header, self.payload.clone()].into_iter().collect();
        group.propose(command, move |outcome| {
            outcome.expect("nobody else leads");
            let micros = u32::try_from(began.elapsed().as_micros()).unwrap_or(u32::MAX);
            load.latencies.borrow_mut().push(micros);
            load.write();
        });
    }
}

fn main() {
    let base = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| "/dev/shm".to_owned()));
    let base = base.join(format!("evolute-raft-throughput-{}", std::process::id()));
    let directory = Directory::default();
    let together = Arc::new(Barrier::new(usize::try_from(NODES).unwrap()));
    let (tell, told) = mpsc::channel::<(usize, Vec<u32>)>();
    let threads: Vec<_> = (1..=NODES)
        .map(|node| {
            let (directory, together, tell, dir) =
                (directory.clone(), together.clone(), tell.clone(), base.join(node.to_string()));
            spawn_thread(&format!("node-{node}"), move || node_main(node, dir, directory, together, tell))
                .unwrap()
        })
        .collect();
    drop(tell);
    for depth in DEPTHS {
        let mut all: Vec<u32> = Vec::new();
        for _ in 0..NODES {
            all.extend(told.recv().unwrap().1);
        }
        all.sort_unstable();
        let quantile = |percent: usize| all[(all.len() - 1) * percent / 100];
        let rate = all.len() as f64 / PER_DEPTH.as_secs_f64();
        println!(
            "depth {depth:>3}: {rate:>8.0} writes/s, p50 {:>5} us, p99 {:>6} us",
            quantile(50),
            quantile(99)
        );
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    std::fs::remove_dir_all(&base).unwrap();
}

async fn node_main(
    node: u64,
    dir: PathBuf,
    directory: Directory,
    together: Arc<Barrier>,
    tell: mpsc::Sender<(usize, Vec<u32>)>,
) {
    let me = ProcessId(node);
    let log = Log::open(&dir, LogOptions::new(LogOwner { cluster: [1; 16], process: me })).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    directory.0.lock().unwrap().insert(me, listener.local_addr().unwrap());
    let peers = Peers::new(me, Rc::new(directory));
    let accepting = peers.clone();
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            accepting.accept(stream, None);
        }
    });
    let node_ = Node::new(log, peers, Timing::default());
    let mut groups = Vec::new();
    for id in 0..GROUPS {
        let restored = Rc::new(RefCell::new(Restored::default()));
        let replica = move |process: u64| ReplicaId(id * 10 + process);
        let machine = Counter(restored.clone());
        let group = node_.start_group(GroupId(id), replica(node), machine).await.unwrap();
        let members: Vec<Member> =
            (1..=NODES).map(|n| Member { replica: replica(n), process: ProcessId(n) }).collect();
        let initializing = group.clone();
        tokio::task::spawn_local(async move {
            initializing.initialize(members, replica(1 + id % NODES)).await.unwrap()
        });
        groups.push((group, restored));
    }
    // Checkpoints every now and then, as an owner does, so that files are used again.
    let checkpointed: Vec<_> = groups.clone();
    tokio::task::spawn_local(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            for (group, restored) in &checkpointed {
                let restored = restored.borrow().clone();
                if let Some(applied) = restored.applied {
                    group.checkpointed(applied, restored.membership);
                }
            }
        }
    });
    while !groups.iter().all(|(group, _)| group.status().leader.is_some()) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let leading: Vec<Group> =
        groups.iter().map(|(g, _)| g.clone()).filter(|g| g.leadership().is_some()).collect();
    for depth in DEPTHS {
        // The raft thread must go on while it waits for the other loads to be done.
        let waiting = together.clone();
        tokio::task::spawn_blocking(move || waiting.wait()).await.unwrap();
        let share = if depth == 1 { usize::from(node == 1) } else { depth / usize::try_from(NODES).unwrap() };
        let load = Rc::new(Load {
            groups: leading.clone(),
            next: Cell::new(0),
            payload: Bytes::from(vec![1; 4096]),
            latencies: RefCell::default(),
            until: Instant::now() + PER_DEPTH,
            running: Cell::new(share),
        });
        if !leading.is_empty() {
            (0..share).for_each(|_| load.write());
            while load.running.get() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        tell.send((depth, load.latencies.take())).unwrap();
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
}
