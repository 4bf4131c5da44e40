//! The shard: one thread that owns its copysets, their log, their overlay and their clients' connections.
//!
//! Everything a write needs is here, so it crosses no thread between socket and log. Other threads reach the shard
//! by [`ShardHandle`]: orders in, reports out.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use evolute_daemon::in_one_line;
use evolute_protocol::geometry::MIB;
use evolute_protocol::id::{CopysetId, ReplicaId, VolumeId};
use evolute_protocol::rpc::{CopysetInventory, LogEnd, VolumeUse};
use evolute_raft::{
    Limits, Log, LogError, LogOptions, LogOwner, Node, Peers, ProcessId, Timing, WriteLatency,
};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::{JoinHandle as Task, spawn_local};

use crate::addresses::Addresses;
use crate::checkpoint;
use crate::chunk_store::{ChunkStore, Identity, Opened, Starts, StoreError, StoreOptions, StoreUsage};
use crate::copyset::members::{self, MemberChange};
use crate::copyset::registry::{Failed, PUT_BACK, Registry, ReplicaError};
use crate::copyset::repair::Repairs;
use crate::copyset::state::Created;
use crate::copyset::{Copyset, apply};
use crate::impossible::Unfencing;
use crate::neighbours::Caller;
use crate::others::{Others, Told};
use crate::recall;
use crate::scrub::{Progress, ScrubOptions, Scrubber};
use crate::server::{self, Server};
use crate::slow_disk;

/// What a leader sends at once, about: without room for it, this replica is falling behind.
const APPEND_BYTES: u64 = 4 * MIB;

/// What the shard is made of.
pub struct ShardOptions {
    pub data_dir: PathBuf,
    pub identity: Identity,
    pub store: StoreOptions,
    pub log_file_mib: u64,
    /// Log kept for members that lag, in MiB; those that lack more get a raft snapshot.
    pub log_retain_mib: u64,
    pub scrub: ScrubOptions,
    /// How long a removed replica's data are kept, in milliseconds.
    pub trash_delay_ms: u64,
    pub listener: std::net::TcpListener,
    pub addresses: Addresses,
    /// How long its groups wait for each other.
    pub timing: Timing,
    /// The random name of this start, when a control plane has to confirm that the directory is not an older copy before
    /// its replicas vote. `None`: whoever starts it knows.
    pub start: Option<Bytes>,
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
    ChangeMembers {
        copyset: CopysetId,
        change: MemberChange,
    },
    Remove {
        copyset: CopysetId,
        replica: ReplicaId,
    },
    /// What the control plane says of the others' disks.
    Hear(Told),
    Report(oneshot::Sender<ShardReport>),
    /// Everything that is here, for a control plane that forgot some of it.
    Recall(oneshot::Sender<Vec<CopysetInventory>>),
    Past(oneshot::Sender<Past>),
    /// What the control plane said to this start.
    Judged(Judgement, oneshot::Sender<()>),
    /// Close everything; the thread ends.
    Stop,
}

/// What a directory knows of its past, for a control plane that may know more.
#[derive(Debug, Clone, Default)]
pub struct Past {
    pub starts: Starts,
    /// Where the logs of its replicas end.
    pub ends: Vec<LogEnd>,
}

/// What the control plane said of the directory, by its past. Durable when it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// It is the newest: its replicas may vote.
    Newest,
    /// It was put back to an older copy: what it holds never votes again.
    PutBack,
    /// It was, and an operator takes it as it is.
    Accepted,
    /// Another process is this chunkserver now.
    Beside,
}

/// What the control plane wants to know.
pub struct ShardReport {
    pub usage: StoreUsage,
    pub replicas: Vec<ReplicaOfReport>,
    /// Replicas that are here and cannot run, and why not.
    pub failed: BTreeMap<CopysetId, Failed>,
    /// What each volume uses in copysets led here.
    pub volumes: Vec<VolumeUse>,
    /// How long the log's writes took, over the last second in which there were any.
    pub latency: WriteLatency,
    /// Read without being asked, since this process started.
    pub scrubbed_bytes: u64,
    /// When all that is here had last been read once; 0: never.
    pub last_full_scrub_unix_ms: u64,
    /// Blocks that could not be read, since this process started, and how many of them were put right.
    pub bad_blocks_found: u64,
    pub bad_blocks_repaired: u64,
    /// Its disk takes far longer than usual.
    pub slow: bool,
    /// What came of comparing replicas, since this process started; the last is what is so now.
    pub blocks_compared: u64,
    pub blocks_differing: u64,
    pub blocks_not_compared: u64,
    pub blocks_undecided: u64,
    /// Empty: healthy.
    pub trouble: String,
}

pub struct ReplicaOfReport {
    pub status: evolute_raft::GroupStatus,
    pub copyset: CopysetId,
    pub dropped: Vec<VolumeId>,
    /// Bytes of its chunks, with those of one that is arriving to take its place.
    pub data_bytes: u64,
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

    /// Everything that is here; `None` once the shard stopped.
    pub async fn recall(&self) -> Option<Vec<CopysetInventory>> {
        let (answer, everything) = oneshot::channel();
        self.send(ToShard::Recall(answer));
        everything.await.ok()
    }

    /// What this directory knows of its past; `None` once the shard stopped.
    pub async fn past(&self) -> Option<Past> {
        let (answer, past) = oneshot::channel();
        self.send(ToShard::Past(answer));
        past.await.ok()
    }

    /// Has the judgement taken note of; false: the shard stopped, or cannot.
    pub async fn judged(&self, judgement: Judgement) -> bool {
        let (answer, done) = oneshot::channel();
        self.send(ToShard::Judged(judgement, answer));
        done.await.is_ok()
    }

    /// Waits for something worth a report at once: a leader changed, a replica began. Cancel-safe.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// The shard's thread: why it ended, or what starts its directory has then.
pub type Thread = JoinHandle<Result<Starts, ShardError>>;

/// Starts the shard; returns once it serves.
pub async fn start(options: ShardOptions) -> Result<(ShardHandle, Thread), ShardError> {
    let mut starting = begin(options)?;
    let serves = starting.serves().await;
    starting.outcome(serves)
}

/// A shard on its way to serve.
pub struct Starting {
    handle: ShardHandle,
    thread: Thread,
    started: oneshot::Receiver<()>,
}

pub fn begin(options: ShardOptions) -> Result<Starting, ShardError> {
    let (orders, inbox) = mpsc::unbounded_channel();
    let changed = Arc::new(Notify::new());
    let handle = ShardHandle { orders, changed: Arc::clone(&changed) };
    let (ready, started) = oneshot::channel();
    let thread = evolute_raft::spawn_thread("shard", move || run(options, inbox, changed, ready))
        .map_err(ShardError::Thread)?;
    Ok(Starting { handle, thread, started })
}

impl Starting {
    /// Waits until it does; false: it never will. Cancel-safe.
    pub async fn serves(&mut self) -> bool {
        (&mut self.started).await.is_ok()
    }

    /// Nobody wants it any more. Returns when everything that lived on its thread is closed: RocksDB aborts a process
    /// that exits before.
    pub async fn give_up(self) {
        let Self { thread, started, .. } = self;
        drop(started);
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }

    /// What became of it, once that is known.
    pub fn outcome(self, serves: bool) -> Result<(ShardHandle, Thread), ShardError> {
        if serves {
            return Ok((self.handle, self.thread));
        }
        match self.thread.join() {
            Ok(Err(error)) => Err(error),
            Ok(Ok(_)) => panic!("the shard ended without saying why"),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// A disk that is full at the start is waited for like one that fills up later: nothing is lost, and an operator makes
/// room.
async fn open_store(
    dir: &Path,
    options: StoreOptions,
    identity: &Identity,
    ready: &mut oneshot::Sender<()>,
) -> Result<(ChunkStore, Opened), ShardError> {
    let mut said = false;
    loop {
        match ChunkStore::open(dir, options.clone(), identity) {
            Err(error @ StoreError::NoSpace { .. }) => {
                if !said {
                    tracing::warn!(%error, "the chunk store is not opened before there is space");
                    said = true;
                }
                tokio::select! {
                    () = tokio::time::sleep(checkpoint::NO_SPACE_PAUSE) => {}
                    () = ready.closed() => return Err(ShardError::OpenStore(error)),
                }
            }
            opened => return opened.map_err(ShardError::OpenStore),
        }
    }
}

async fn run(
    options: ShardOptions,
    mut inbox: mpsc::UnboundedReceiver<ToShard>,
    changed: Arc<Notify>,
    mut ready: oneshot::Sender<()>,
) -> Result<Starts, ShardError> {
    evolute_daemon::short_turns();
    let ShardOptions {
        data_dir,
        identity,
        store,
        log_file_mib,
        log_retain_mib,
        scrub,
        trash_delay_ms,
        listener,
        addresses,
        timing,
        start,
    } = options;
    let me = ProcessId(u64::from(identity.chunkserver.0));
    let owner = LogOwner { cluster: identity.cluster.0, process: me };
    let log_options = LogOptions { file_bytes: log_file_mib * MIB, ..LogOptions::new(owner) };
    let log = Log::open(&data_dir.join("log"), log_options).await.map_err(ShardError::OpenLog)?;
    let (store, opened) = open_store(&data_dir.join("store"), store, &identity, &mut ready).await?;
    let store = Rc::new(RefCell::new(store));
    let neighbours = Rc::new(Caller::new(identity.clone(), addresses));
    let repairs = Rc::new(Repairs::new(Rc::<Caller>::clone(&neighbours)));
    let peers = Peers::new(me, neighbours);
    let limits = Limits { log_retain_bytes: log_retain_mib * MIB, ..Limits::default() };
    let node = Node::with_limits(log.clone(), peers.clone(), timing, limits);
    let starts = begin_start(&store.borrow(), start).map_err(ShardError::OpenStore)?;
    let standings = store.borrow().standings().map_err(ShardError::OpenStore)?;
    let confirmed = starts.all.is_empty();
    if !confirmed {
        node.stand_aside();
    }
    let admitting = Rc::clone(&store);
    node.admit(move |bytes| admitting.borrow().admits(bytes));
    let (others, led) = (Rc::<Others>::default(), Rc::<Notify>::default());
    let registry = Rc::new(Registry::new(node, Rc::clone(&store), Rc::clone(&repairs), Rc::clone(&others)));
    // Before anybody can ask for it.
    let scrubbed = Progress::restored(&store.borrow()).map_err(ShardError::OpenStore)?;
    let scrubbed = Rc::new(scrubbed);
    let shard = Rc::new(Shard {
        registry: Rc::clone(&registry),
        store: Rc::clone(&store),
        changed,
        trouble: RefCell::default(),
        latency: Cell::default(),
        slow: Cell::new(None),
        full: Cell::new(false),
        others: Rc::clone(&others),
        led: Rc::clone(&led),
        changing: RefCell::default(),
        repairs,
        scrubbed: Rc::clone(&scrubbed),
        starts: RefCell::new(starts),
        confirmed: Cell::new(confirmed),
    });
    for removed in opened.removed {
        if let Err(error) = registry.forget(removed).await {
            shard.failed_to_start(removed, &error);
        }
    }
    for record in &opened.copysets {
        let started = registry.resume(record, standings.get(&record.copyset).copied()).await;
        shard.started(record.copyset, started);
    }
    let listener = tokio::net::TcpListener::from_std(listener).map_err(ShardError::Listen)?;
    let server =
        Server { cluster: identity.cluster, me: identity.chunkserver, registry, peers, door: server::door() };
    spawn_local(Rc::new(server).run(listener));
    let watched = Rc::clone(&shard);
    let found = move |found: &slow_disk::Found| watched.disk_found(found);
    let watched = (Rc::clone(&shard.registry), Rc::clone(&store), log.clone());
    spawn_local(slow_disk::watch(watched.0, watched.1, watched.2, others, led, found));
    if let Some(unfencing) = Unfencing::begun(&data_dir) {
        spawn_local(unfencing.run(Rc::clone(&shard.registry)));
    }
    let registry = Rc::clone(&shard.registry);
    let repairs = Rc::clone(&shard.repairs);
    let scrubber =
        Scrubber { registry, store: Rc::clone(&store), repairs, options: scrub, progress: scrubbed };
    let checkpoints = checkpoint::run(Rc::clone(&shard.registry), store, log, trash_delay_ms);
    let ended = match ready.send(()) {
        // Whoever started it has given it up.
        Err(()) => Ok(()),
        Ok(()) => tokio::select! {
            error = checkpoints => Err(error),
            error = scrubber.run() => Err(ShardError::Store(error)),
            () = async { while let Some(order) = inbox.recv().await { if shard.obey(order) { break } } } => Ok(()),
        },
    };
    shard.registry.shutdown().await;
    ended?;
    shard.end().map_err(ShardError::OpenStore)
}

struct Shard {
    registry: Rc<Registry>,
    store: Rc<RefCell<ChunkStore>>,
    changed: Arc<Notify>,
    trouble: RefCell<BTreeMap<CopysetId, String>>,
    /// Changes of members that are being carried out.
    changing: RefCell<BTreeMap<CopysetId, (MemberChange, Task<()>)>>,
    /// How long the log's writes took lately.
    latency: Cell<WriteLatency>,
    /// How long one takes, when that is slow.
    slow: Cell<Option<Duration>>,
    full: Cell<bool>,
    others: Rc<Others>,
    /// A copyset is led here from now on.
    led: Rc<Notify>,
    repairs: Rc<Repairs>,
    scrubbed: Rc<Progress>,
    starts: RefCell<Starts>,
    /// The directory is the newest there is, and the control plane knows of this start.
    confirmed: Cell<bool>,
}

/// This start is durable before anybody hears of it.
fn begin_start(store: &ChunkStore, start: Option<Bytes>) -> Result<Starts, StoreError> {
    let Some(start) = start else { return Ok(Starts::default()) };
    let mut starts = store.starts()?;
    starts.begin(start);
    store.put_starts(&starts)?;
    Ok(starts)
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
                        shard.started(copyset, started);
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
                    let to = evolute_raft::ReplicaId(to.0);
                    if copyset.group().stands_in() || copyset.group().is_out_of_reach(to) {
                        tracing::info!(copyset = %copyset.id(), %to, "the leader stays: a client does not reach the other");
                        return false;
                    }
                    spawn_local(async move {
                        if let Err(error) = copyset.group().transfer_leader(to).await {
                            tracing::info!(copyset = %copyset.id(), %error, "the leader did not move");
                        }
                    });
                }
            }
            ToShard::ChangeMembers { copyset, change } => self.change_members(copyset, change),
            ToShard::Remove { copyset, replica } => {
                let shard = Rc::clone(self);
                spawn_local(async move { shard.remove(copyset, replica).await });
            }
            ToShard::Hear(told) => self.others.hear(told),
            ToShard::Report(answer) => {
                // Whoever asked may have given up.
                let _ = answer.send(self.report());
            }
            ToShard::Recall(answer) => {
                let _ = answer.send(self.recall());
            }
            ToShard::Past(answer) => drop(answer.send(self.past())),
            ToShard::Judged(judgement, answer) => {
                let shard = Rc::clone(self);
                spawn_local(async move {
                    match shard.take_note(judgement).await {
                        Ok(()) => drop(answer.send(())),
                        Err(error) => {
                            tracing::error!(%error, "cannot take note of what the control plane said")
                        }
                    }
                    shard.changed.notify_one();
                });
            }
            ToShard::Stop => return true,
        }
        false
    }

    fn started(self: &Rc<Self>, id: CopysetId, started: Result<Rc<Copyset>, ReplicaError>) {
        match started {
            Ok(copyset) => {
                let (changed, led) = (Arc::clone(&self.changed), Rc::clone(&self.led));
                // Weak: the copyset has the group, which has this.
                let watched = Rc::downgrade(&copyset);
                copyset.group().on_leader_change(move |change| {
                    if let (false, Some(copyset)) = (change.me, watched.upgrade()) {
                        copyset.refuse_waiting();
                    }
                    if change.me {
                        led.notify_one();
                    }
                    changed.notify_one();
                });
                if !copyset.created().joining && self.confirmed.get() {
                    spawn_local(initialize(copyset));
                }
            }
            Err(error) => self.failed_to_start(id, &error),
        }
        self.changed.notify_one();
    }

    async fn take_note(self: &Rc<Self>, judgement: Judgement) -> Result<(), StoreError> {
        match judgement {
            Judgement::Newest => self.confirm()?,
            Judgement::PutBack => self.registry.mark_put_back().await?,
            Judgement::Accepted => {
                for (record, standing) in self.registry.unmark_put_back()? {
                    let started = self.registry.resume(&record, Some(standing)).await;
                    self.trouble.borrow_mut().remove(&record.copyset);
                    self.started(record.copyset, started);
                }
            }
            Judgement::Beside => {
                let mut starts = self.starts.borrow_mut();
                starts.beside = true;
                self.store.borrow().put_starts(&starts)?;
            }
        }
        Ok(())
    }

    /// Nothing is acknowledged any more. The end is counted like a start: a copy that was made while this ran lacks it.
    fn end(&self) -> Result<Starts, StoreError> {
        let mut starts = self.starts.borrow_mut();
        let this = starts.all.last().map(|start| start.instance.clone());
        if let Some(this) = this.filter(|_| self.confirmed.get() && !starts.beside) {
            starts.begin(this);
            self.store.borrow().put_starts(&starts)?;
        }
        Ok(starts.clone())
    }

    fn confirm(&self) -> Result<(), StoreError> {
        let mut starts = self.starts.borrow_mut();
        if starts.all.len() > 1 || starts.beside {
            starts.confirm();
            self.store.borrow().put_starts(&starts)?;
        }
        if !self.confirmed.replace(true) {
            self.registry.take_part();
            let all = self.registry.all().into_iter();
            all.filter(|copyset| !copyset.created().joining).for_each(|it| drop(spawn_local(initialize(it))));
        }
        Ok(())
    }

    /// That copyset has one replica less until it is repaired; the others are served.
    fn failed_to_start(&self, copyset: CopysetId, error: &ReplicaError) {
        if let ReplicaError::PutBack { copyset } = error {
            tracing::warn!(%copyset, "a replica does not run: {PUT_BACK}");
        } else if !matches!(error, ReplicaError::Busy(_)) {
            let reason = in_one_line(error);
            tracing::error!(reason, "a replica did not start");
            self.trouble.borrow_mut().insert(copyset, reason);
        }
    }

    /// An order that is being carried out already goes on; a different one takes its place.
    fn change_members(self: &Rc<Self>, id: CopysetId, change: MemberChange) {
        let Some(copyset) = self.registry.get(id) else { return };
        let mut changing = self.changing.borrow_mut();
        if let Some((current, task)) = changing.get(&id) {
            if *current == change && !task.is_finished() {
                return;
            }
            task.abort();
        }
        let changed = Arc::clone(&self.changed);
        let task = spawn_local(async move {
            members::carry_out(copyset, change).await;
            changed.notify_one();
        });
        changing.insert(id, (change, task));
    }

    async fn remove(&self, copyset: CopysetId, replica: ReplicaId) {
        match self.registry.remove(copyset, replica).await {
            Ok(()) => {
                if let Some((_, task)) = self.changing.borrow_mut().remove(&copyset) {
                    task.abort();
                }
                self.trouble.borrow_mut().remove(&copyset);
            }
            Err(ReplicaError::Busy(_)) => {}
            Err(error) => {
                let reason = in_one_line(&error);
                tracing::error!(reason, "a replica was not removed");
                self.trouble.borrow_mut().insert(copyset, reason);
            }
        }
        self.changed.notify_one();
    }

    fn disk_found(&self, found: &slow_disk::Found) {
        if found.window.count > 0 {
            self.latency.set(found.window);
        }
        let was = (self.slow.replace(found.slow).is_some(), self.full.replace(found.full));
        if was != (found.slow.is_some(), found.full) {
            self.changed.notify_one();
        }
    }

    fn past(&self) -> Past {
        let end = |copyset: Rc<Copyset>| {
            let (id, replica) = (copyset.id().0, copyset.created().replica.0);
            Some(LogEnd { copyset: id, replica, last_index: copyset.group().log_end()? })
        };
        let ends = self.registry.all().into_iter().filter_map(end).collect();
        Past { starts: self.starts.borrow().clone(), ends }
    }

    fn recall(&self) -> Vec<CopysetInventory> {
        self.registry.all().iter().map(|copyset| recall::copyset(copyset, &self.store.borrow())).collect()
    }

    fn report(&self) -> ShardReport {
        let (mut replicas, mut volumes) = (Vec::new(), Vec::new());
        let uses = self.store.borrow().volume_uses();
        for copyset in self.registry.all() {
            let id = copyset.id();
            let ours = uses.range((id, VolumeId(0))..=(id, VolumeId(u64::MAX)));
            let data_bytes =
                ours.map(|(_, bytes)| bytes).sum::<u64>() + self.store.borrow().arriving_bytes(id);
            let state = copyset.state().borrow();
            if copyset.group().leadership().is_some() {
                // Also those that use nothing: the control plane may remember more.
                volumes.extend(state.writers().keys().map(|volume| VolumeUse {
                    volume: volume.0,
                    copyset: id.0,
                    used_bytes: uses.get(&(id, *volume)).copied().unwrap_or(0),
                }));
            }
            let dropped = apply::dropped(&state).collect();
            replicas.push(ReplicaOfReport {
                copyset: id,
                status: copyset.group().status(),
                dropped,
                data_bytes,
            });
        }
        let mut usage = self.store.borrow().usage();
        // Also when it is the log that found no room.
        usage.full |= self.full.get();
        let mut trouble: Vec<_> = self.trouble.borrow().values().cloned().collect();
        if let Some(took) = self.slow.get() {
            trouble.push(format!("the disk is slow: a write of the log takes {} ms", took.as_millis()));
        }
        let comparisons = &self.repairs.comparisons;
        let (undecided, example) = comparisons.undecided();
        if let Some(example) = example {
            trouble.push(format!(
                "{undecided} blocks differ between replicas of which no majority agrees: {example}"
            ));
        }
        if usage.damaged_chunks > 0 {
            trouble.push(format!("{} chunks are missing or damaged", usage.damaged_chunks));
        }
        if !self.store.borrow().admits(APPEND_BYTES) {
            trouble.push(
                "what waits for the disk fills the memory for it: nothing more is taken from leaders".into(),
            );
        }
        if usage.full {
            trouble.push("the disk is full".into());
        } else if usage.near_full {
            trouble.push("the disk is nearly full".into());
        }
        ShardReport {
            usage,
            replicas,
            failed: self.registry.failed(),
            volumes,
            latency: self.latency.get(),
            scrubbed_bytes: self.scrubbed.bytes.get(),
            last_full_scrub_unix_ms: self.scrubbed.last_full_unix_ms.get(),
            bad_blocks_found: self.repairs.found(),
            bad_blocks_repaired: self.repairs.repaired(),
            slow: self.slow.get().is_some(),
            blocks_compared: comparisons.compared(),
            blocks_differing: comparisons.differing(),
            blocks_not_compared: comparisons.skipped(),
            blocks_undecided: undecided as u64,
            trouble: trouble.join("; "),
        }
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
