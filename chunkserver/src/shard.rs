//! The shard: one thread that owns its copysets, their log, their overlay and their clients' connections.
//!
//! Everything a write needs is here, so it crosses no thread between socket and log. Other threads reach the shard
//! by [`ShardHandle`]: orders in, reports out.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use evolute_protocol::geometry::MIB;
use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId, VolumeId};
use evolute_protocol::rpc::VolumeUse;
use evolute_protocol::wire::hello::{HELLO_BYTES, Hello, HelloReply, Role, Version};
use evolute_raft::{Dial, DialFuture, Log, LogError, LogOptions, LogOwner, Node, Peers, ProcessId, Timing};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::spawn_local;

use crate::addresses::Addresses;
use crate::checkpoint;
use crate::chunk_store::{ChunkStore, Identity, StoreError, StoreOptions, StoreUsage};
use crate::copyset::registry::{Registry, ReplicaError};
use crate::copyset::state::Created;
use crate::copyset::{Copyset, apply};
use crate::server::Server;

/// Peers answer a Hello at once, or are taken for gone.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);

/// What the shard is made of.
pub struct ShardOptions {
    pub data_dir: PathBuf,
    pub identity: Identity,
    pub store: StoreOptions,
    pub log_file_mib: u64,
    pub listener: std::net::TcpListener,
    pub addresses: Addresses,
}

/// Why this process cannot serve (any longer). Each is the end of it: the cluster goes on with the other replicas.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    #[error("the log cannot be opened")]
    OpenLog(#[source] LogError),
    #[error("the chunk store cannot be opened")]
    OpenStore(#[source] StoreError),
    #[error("the log failed; its disk is not trusted any more")]
    Log(#[source] LogError),
    #[error("the chunk store failed; its disk is not trusted any more")]
    Store(#[source] StoreError),
    #[error("the listening socket cannot be used")]
    Listen(#[source] io::Error),
    #[error("the shard's thread could not start")]
    Thread(#[source] io::Error),
}

/// Orders in.
pub enum ToShard {
    Host {
        copyset: CopysetId,
        created: Created,
    },
    DropVolume {
        copyset: CopysetId,
        volume: VolumeId,
    },
    TransferLeader {
        copyset: CopysetId,
        to: ReplicaId,
    },
    Report(oneshot::Sender<ShardReport>),
    /// Close everything; the thread ends.
    Stop,
}

/// What the control plane wants to know.
pub struct ShardReport {
    pub usage: StoreUsage,
    pub replicas: Vec<ReplicaOfReport>,
    /// What each volume uses in copysets led here.
    pub volumes: Vec<VolumeUse>,
    /// Empty: healthy.
    pub trouble: String,
}

pub struct ReplicaOfReport {
    pub status: evolute_raft::GroupStatus,
    pub copyset: CopysetId,
    pub dropped: Vec<VolumeId>,
}

/// How other threads reach the shard.
#[derive(Clone)]
pub struct ShardHandle {
    orders: mpsc::UnboundedSender<ToShard>,
    changed: Arc<Notify>,
}

impl ShardHandle {
    pub fn send(&self, order: ToShard) {
        // A stopped shard needs no orders.
        let _ = self.orders.send(order);
    }

    /// What there is to report; `None` once the shard stopped.
    pub async fn report(&self) -> Option<ShardReport> {
        let (answer, report) = oneshot::channel();
        self.send(ToShard::Report(answer));
        report.await.ok()
    }

    /// Waits for something worth a report at once: a leader changed, a replica began. Cancel-safe.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// Starts the shard; returns once it serves. The thread's result says why it ended.
pub async fn start(
    options: ShardOptions,
) -> Result<(ShardHandle, JoinHandle<Result<(), ShardError>>), ShardError> {
    let (orders, inbox) = mpsc::unbounded_channel();
    let changed = Arc::new(Notify::new());
    let handle = ShardHandle { orders, changed: Arc::clone(&changed) };
    let (ready, started) = oneshot::channel();
    let thread = evolute_raft::spawn_thread("shard", move || run(options, inbox, changed, ready))
        .map_err(ShardError::Thread)?;
    if started.await.is_ok() {
        return Ok((handle, thread));
    }
    match thread.join() {
        Ok(Err(error)) => Err(error),
        Ok(Ok(())) => panic!("the shard ended without saying why"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

async fn run(
    options: ShardOptions,
    mut inbox: mpsc::UnboundedReceiver<ToShard>,
    changed: Arc<Notify>,
    ready: oneshot::Sender<()>,
) -> Result<(), ShardError> {
    let ShardOptions { data_dir, identity, store, log_file_mib, listener, addresses } = options;
    let me = ProcessId(u64::from(identity.chunkserver.0));
    let owner = LogOwner { cluster: identity.cluster.0, process: me };
    let log_options = LogOptions { file_bytes: log_file_mib * MIB, ..LogOptions::new(owner) };
    let log = Log::open(&data_dir.join("log"), log_options).await.map_err(ShardError::OpenLog)?;
    let (store, records) =
        ChunkStore::open(&data_dir.join("store"), store, &identity).map_err(ShardError::OpenStore)?;
    let store = Rc::new(RefCell::new(store));
    let peers = Peers::new(me, Rc::new(Dialer { identity: identity.clone(), addresses }));
    let node = Node::new(log.clone(), peers.clone(), Timing::default());
    let registry = Rc::new(Registry::new(node, Rc::clone(&store)));
    let shard = Rc::new(Shard {
        registry: Rc::clone(&registry),
        store: Rc::clone(&store),
        changed,
        trouble: RefCell::default(),
    });
    for record in &records {
        let started = registry.resume(record).await;
        shard.started(started);
    }
    let listener = tokio::net::TcpListener::from_std(listener).map_err(ShardError::Listen)?;
    let server = Server {
        cluster: identity.cluster,
        me: identity.chunkserver,
        registry,
        peers,
        connections: Cell::new(0),
    };
    spawn_local(Rc::new(server).run(listener));
    let checkpoints = checkpoint::run(Rc::clone(&shard.registry), store, log);
    // The starter may have gone; then the thread ends with the first order, `Stop`.
    let _ = ready.send(());
    let ended = tokio::select! {
        error = checkpoints => Err(error),
        () = async { while let Some(order) = inbox.recv().await { if shard.obey(order) { break } } } => Ok(()),
    };
    shard.registry.shutdown().await;
    ended
}

struct Shard {
    registry: Rc<Registry>,
    store: Rc<RefCell<ChunkStore>>,
    changed: Arc<Notify>,
    trouble: RefCell<Vec<String>>,
}

impl Shard {
    /// Carries out an order; true: it was the last.
    fn obey(self: &Rc<Self>, order: ToShard) -> bool {
        match order {
            ToShard::Host { copyset, created } => {
                let shard = Rc::clone(self);
                if shard.registry.get(copyset).is_none() {
                    spawn_local(async move {
                        let started = shard.registry.create(copyset, created).await;
                        shard.started(started);
                    });
                }
            }
            ToShard::DropVolume { copyset, volume } => {
                if let Some(copyset) = self.registry.get(copyset) {
                    copyset.drop_volume(volume);
                }
            }
            ToShard::TransferLeader { copyset, to } => {
                if let Some(copyset) = self.registry.get(copyset) {
                    spawn_local(async move {
                        if let Err(error) =
                            copyset.group().transfer_leader(evolute_raft::ReplicaId(to.0)).await
                        {
                            tracing::info!(copyset = %copyset.id(), %error, "the leader did not move");
                        }
                    });
                }
            }
            ToShard::Report(answer) => {
                // Whoever asked may have given up.
                let _ = answer.send(self.report());
            }
            ToShard::Stop => return true,
        }
        false
    }

    fn started(self: &Rc<Self>, started: Result<Rc<Copyset>, ReplicaError>) {
        match started {
            Ok(copyset) => {
                let changed = Arc::clone(&self.changed);
                // Weak: the copyset has the group, which has this.
                let watched = Rc::downgrade(&copyset);
                copyset.group().on_leader_change(move |change| {
                    if let (false, Some(copyset)) = (change.me, watched.upgrade()) {
                        copyset.refuse_waiting();
                    }
                    changed.notify_one();
                });
                spawn_local(initialize(copyset));
            }
            // That copyset has one replica less until it is repaired; the others are served.
            Err(error) => {
                let reason = evolute_daemon::in_one_line(&error);
                tracing::error!(reason, "a replica did not start");
                self.trouble.borrow_mut().push(reason);
            }
        }
        self.changed.notify_one();
    }

    fn report(&self) -> ShardReport {
        let replicas = self
            .registry
            .all()
            .into_iter()
            .map(|copyset| ReplicaOfReport {
                copyset: copyset.id(),
                status: copyset.group().status(),
                dropped: apply::dropped(&copyset.state().borrow()).collect(),
            })
            .collect();
        let usage = self.store.borrow().usage();
        let mut trouble = self.trouble.borrow().clone();
        if usage.damaged_chunks > 0 {
            trouble.push(format!("{} chunks are missing or damaged", usage.damaged_chunks));
        }
        if usage.full {
            trouble.push("the disk is full".into());
        } else if usage.near_full {
            trouble.push("the disk is nearly full".into());
        }
        ShardReport { usage, replicas, volumes: Vec::new(), trouble: trouble.join("; ") }
    }
}

/// A new copyset's group begins with all its members; one that has begun is left as it is.
async fn initialize(copyset: Rc<Copyset>) {
    let created = copyset.created();
    let first = evolute_raft::ReplicaId(created.first_leader.0);
    if let Err(error) = copyset.group().initialize(created.raft_members(), first).await {
        tracing::warn!(copyset = %copyset.id(), %error, "the group did not begin");
    }
}

/// Connects to other chunkservers for Raft.
struct Dialer {
    identity: Identity,
    addresses: Addresses,
}

impl Dial for Dialer {
    fn dial(&self, to: ProcessId) -> DialFuture {
        let to = ChunkserverId(u32::try_from(to.0).expect("made from a chunkserver id"));
        let address = self.addresses.get(to);
        let hello = Hello {
            version: Version::V1 as u16,
            role: Role::Peer { chunkserver: self.identity.chunkserver },
            cluster: self.identity.cluster,
            to,
        };
        Box::pin(async move {
            let address =
                address.ok_or_else(|| io::Error::other(format!("the address of {to} is not known yet")))?;
            tokio::time::timeout(DIAL_TIMEOUT, call(&address, hello)).await?
        })
    }
}

async fn call(address: &str, hello: Hello) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&hello.encode()).await?;
    let mut bytes = [0; HELLO_BYTES];
    stream.read_exact(&mut bytes).await?;
    let reply = HelloReply::decode(&bytes).map_err(io::Error::other)?;
    reply.welcome.map_err(io::Error::other)?;
    Ok(stream)
}
