//! The state, replicated: commands go in through raft, and the state is read where it is applied.
//!
//! ```text
//!  api ──propose──▶ Replicated ──▶ │ raft thread: group ─▶ log (synced) ─▶ Machine ─▶ State, Store
//!   ▲                              │                                          │
//!   └──────────── outcome ◀────────┘◀─────────────────────────────────────────┘
//! ```
//!
//! What always holds:
//!
//! - An outcome is given out after its entry is in the synced log of a majority and applied here.
//! - Only a leader that has applied an entry of its own term reads or proposes; anybody else answers `NotLeader`.
//! - A store that failed once is not used again: the process says so and ends, and starts from the log.
//!
//! The group has one member in this version. With more, they differ in the list given to `initialize`, in `Dial`,
//! and in a way to accept peers' connections; nothing above this module changes.

pub mod data_dir;
mod machine;
mod store;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use evolute_protocol::id::ClusterId;
use evolute_raft as raft;
use tokio::sync::{oneshot, watch};

use self::data_dir::{DataDir, DataDirError};
use self::machine::{Machine, NOT_APPLIED, Stored};
use self::store::{Store, StoreError};
use crate::state::command::{BeginReign, InitCluster};
use crate::state::{Command, Done, Outcome, State, outcome};

/// The only group of an MDS process.
const GROUP: raft::GroupId = raft::GroupId(1);
/// How often raft is told what its log need not keep. Short, as it is cheap; long against the log's file size.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(2);
/// A command has a few hundred bytes, and the log is recycled every two seconds: a file is plenty.
const LOG_FILE_BYTES: u64 = 8 << 20;
/// Entries are applied the moment they are committed; nobody reads them again soon.
const LOG_MEMORY_BYTES: usize = 4 << 20;
/// How long a caller waits for an entry to be committed and applied: longer than an election, shorter than the
/// patience of whoever called.
const PROPOSE_PATIENCE: Duration = Duration::from_secs(10);
/// A group of one elects itself at once; anything longer is a stuck disk.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// What the raft thread and everybody else share.
pub struct Shared {
    state: RwLock<State>,
    /// The index of the last entry that the state is made of; changed under the state's lock.
    applied: AtomicU64,
    version: watch::Sender<u64>,
    failure: watch::Sender<Option<String>>,
}

impl Shared {
    fn new(state: State, applied: u64) -> Self {
        let applied = AtomicU64::new(applied);
        Self {
            state: RwLock::new(state),
            applied,
            version: watch::Sender::new(0),
            failure: watch::Sender::new(None),
        }
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().expect("a panic ends the process")
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().expect("a panic ends the process")
    }

    fn changed(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    fn failure(&self) -> Option<String> {
        self.failure.borrow().clone()
    }

    fn fail(&self, why: String) {
        tracing::error!("{why}");
        self.failure.send_replace(Some(why));
    }
}

/// Why the replicated state cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("cannot open the stored state")]
    Store(#[from] StoreError),
    #[error("cannot open the raft log")]
    Log(#[from] raft::LogError),
    /// In words: raft's own error cannot leave its thread.
    #[error("the raft group does not start: {0}")]
    Group(String),
    #[error("cannot start the raft thread")]
    Thread(#[source] io::Error),
    #[error("no leader after {} s", START_PATIENCE.as_secs())]
    NoLeader,
    #[error(
        "the data directory is of cluster {directory}, the state in it of {state}: files of two were mixed"
    )]
    Mixed { directory: ClusterId, state: ClusterId },
    #[error("the raft thread ended: {0}")]
    Ended(String),
}

/// Why there is no outcome.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoOutcome {
    /// Ask another MDS.
    #[error("this MDS does not lead")]
    NotLeader,
    /// Come back a little later. The command may still be carried out.
    #[error("the command was not committed in time; it may still be")]
    Busy,
}

pub struct Replicated {
    handle: raft::Handle,
    shared: Arc<Shared>,
    cluster: ClusterId,
    /// Gone once the thread was told to stop, and seen to.
    thread: Mutex<Option<Thread>>,
}

struct Thread {
    stop: oneshot::Sender<()>,
    joined: JoinHandle<()>,
}

impl Thread {
    /// Returns when everything that lived on the thread is closed: RocksDB aborts a process that exits before.
    fn end(self) {
        drop(self.stop);
        // A panic there has ended the process.
        let _ = self.joined.join();
    }
}

impl Drop for Replicated {
    fn drop(&mut self) {
        if let Some(thread) = self.take_thread() {
            thread.end();
        }
    }
}

/// An MDS of one has nobody to call.
struct Nobody;

impl raft::Dial for Nobody {
    fn dial(&self, process: raft::ProcessId) -> raft::DialFuture {
        Box::pin(async move { Err(io::Error::other(format!("{process} is not a member"))) })
    }
}

impl Replicated {
    /// Opens what the data directory holds, starts the raft thread, and waits until this replica leads.
    pub async fn start(mut dir: DataDir) -> Result<Self, StartError> {
        let (store, state, restored) = Store::open(&dir)?;
        let shared = Arc::new(Shared::new(state, restored.applied.map_or(0, |at| at.index)));
        let cluster = dir.cluster();
        let (stop, stopped) = oneshot::channel();
        let (started, starting) = oneshot::channel();
        let on_thread = shared.clone();
        let joined = raft::spawn_thread("mds-raft", move || async move {
            match open(&mut dir, store, restored, on_thread).await {
                Ok(running) => {
                    if started.send(Ok(running.group.handle())).is_ok() {
                        running.run(stopped).await;
                    }
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })
        .map_err(StartError::Thread)?;
        let thread = Thread { stop, joined };
        let handle = match starting.await {
            Ok(Ok(handle)) => handle,
            other => {
                let _ = tokio::task::spawn_blocking(move || thread.end()).await;
                return Err(match other {
                    Ok(Err(error)) => error,
                    _ => StartError::Ended("at its start".to_owned()),
                });
            }
        };
        let this = Self { handle, shared, cluster, thread: Mutex::new(Some(thread)) };
        if let Err(error) = this.lead().await {
            this.stop().await;
            return Err(error);
        }
        Ok(this)
    }

    async fn lead(&self) -> Result<(), StartError> {
        let leading = async {
            while self.handle.leads_term().await.is_none() {
                if let Some(failure) = self.shared.failure() {
                    return Err(StartError::Ended(failure));
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok(())
        };
        tokio::time::timeout(START_PATIENCE, leading).await.map_err(|_| StartError::NoLeader)??;
        let init = InitCluster { cluster: Bytes::copy_from_slice(&self.cluster.0) };
        let state = match self.propose(Command::InitCluster(init)).await {
            Ok(Ok(Done::Cluster(cluster))) => cluster,
            other => return Err(StartError::Ended(format!("naming the cluster gave {other:?}"))),
        };
        if state != self.cluster {
            return Err(StartError::Mixed { directory: self.cluster, state });
        }
        let reign: [u8; 16] = rand::random();
        let begin = BeginReign { reign: Bytes::copy_from_slice(&reign), after_index: self.applied_index() };
        match self.propose(Command::BeginReign(begin)).await {
            Ok(Ok(Done::Plain)) => Ok(()),
            other => Err(StartError::Ended(format!("beginning to lead gave {other:?}"))),
        }
    }

    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Has the command committed and applied.
    pub async fn propose(&self, command: Command) -> Result<Outcome, NoOutcome> {
        let proposed = self.handle.propose(command.to_bytes());
        let applied = tokio::time::timeout(PROPOSE_PATIENCE, proposed).await.map_err(|_| NoOutcome::Busy)?;
        match applied {
            Ok(applied) if applied.result == NOT_APPLIED => Err(NoOutcome::NotLeader),
            Ok(applied) => Ok(outcome::decode(applied.result)),
            Err(raft::ProposeError::NotLeader { .. } | raft::ProposeError::Stopped) => {
                Err(NoOutcome::NotLeader)
            }
            Err(raft::ProposeError::Busy | raft::ProposeError::TooLarge) => Err(NoOutcome::Busy),
        }
    }

    /// Reads the state, if this MDS leads.
    pub async fn read<T>(&self, look: impl FnOnce(&State) -> T) -> Result<T, NoOutcome> {
        match self.leads().await {
            true => Ok(look(&self.shared.state())),
            false => Err(NoOutcome::NotLeader),
        }
    }

    /// Leads, and has applied an entry of its own term.
    pub async fn leads(&self) -> bool {
        self.shared.failure().is_none() && self.handle.leads_term().await.is_some()
    }

    /// The last entry that the state is made of. Asked inside [`Replicated::read`]: exactly that.
    pub fn applied_index(&self) -> u64 {
        self.shared.applied.load(Ordering::Acquire)
    }

    /// Where the group stands; none once it has stopped.
    pub async fn status(&self) -> Option<raft::GroupStatus> {
        self.handle.status().await
    }

    /// Changes whenever the state does.
    pub fn version(&self) -> watch::Receiver<u64> {
        self.shared.version.subscribe()
    }

    /// Waits until the replica cannot go on, and says why. Cancel-safe.
    pub async fn failed(&self) -> String {
        let mut failure = self.shared.failure.subscribe();
        match failure.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            // The sender is ours.
            Err(_) => std::future::pending().await,
        }
    }

    /// Ends the raft thread; what was applied is stored then, and the data directory free.
    pub async fn stop(&self) {
        if let Some(thread) = self.take_thread() {
            let _ = tokio::task::spawn_blocking(move || thread.end()).await;
        }
    }

    fn take_thread(&self) -> Option<Thread> {
        self.thread.lock().expect("a panic ends the process").take()
    }
}

/// The raft thread, once its group runs.
struct Running {
    node: raft::Node,
    group: raft::Group,
    stored: Rc<RefCell<Stored>>,
}

async fn open(
    dir: &mut DataDir,
    store: Store,
    restored: raft::Restored,
    shared: Arc<Shared>,
) -> Result<Running, StartError> {
    let me = raft::Member { replica: raft::ReplicaId(dir.member()), process: raft::ProcessId(dir.member()) };
    let log = raft::Log::open(&dir.raft(), log_options(dir, me.process)).await?;
    if dir.is_new() {
        dir.made()?;
    }
    let peers = raft::Peers::new(me.process, Rc::new(Nobody));
    let node = raft::Node::new(log, peers, raft::Timing::default());
    let stored = Rc::new(RefCell::new(Stored { at: restored.applied, membership: restored.membership }));
    let machine = Machine { store, shared, stored: stored.clone() };
    let in_words = |error: &dyn std::error::Error| StartError::Group(evolute_daemon::in_one_line(error));
    let group = node.start_group(GROUP, me.replica, machine).await.map_err(|error| in_words(&error))?;
    group.initialize(vec![me], me.replica).await.map_err(|error| in_words(&error))?;
    // Nobody else could be elected: no need to wait for a timeout.
    group.elect().await.map_err(|error| in_words(&error))?;
    Ok(Running { node, group, stored })
}

fn log_options(dir: &DataDir, process: raft::ProcessId) -> raft::LogOptions {
    let owner = raft::LogOwner { cluster: dir.cluster().0, process };
    raft::LogOptions {
        file_bytes: LOG_FILE_BYTES,
        memory_bytes_max: LOG_MEMORY_BYTES,
        ..raft::LogOptions::new(owner)
    }
}

impl Running {
    async fn run(self, mut stopped: oneshot::Receiver<()>) {
        let mut every = tokio::time::interval(CHECKPOINT_EVERY);
        loop {
            tokio::select! {
                _ = every.tick() => {
                    let stored = self.stored.borrow().clone();
                    if let Some(at) = stored.at
                        && Some(at) <= self.group.applied()
                    {
                        self.group.checkpointed(at, stored.membership);
                    }
                }
                // Asked to, or whoever held us is gone.
                _ = &mut stopped => break,
            }
        }
        self.node.shutdown().await;
    }
}
