//! Begins and finishes checkpoints on the shard thread; the drain between runs on a thread of its own.
//!
//! ```text
//!  shard       freeze: active → draining ────────────────────▶ finish: table, caches; draining is dropped
//!                      │ first poll                              ▲               │
//!  checkpoint thread   └─▶ drain: files, sync, commit ───────────┘               └─▶ clean up: remove files
//! ```
//!
//! The same thread does everything else that changes files or records behind the shard's back (`swap.rs`, `trash.rs`),
//! one job after the other.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::drain::{Drained, Drainer, Frozen};
use super::error::StoreError;
use super::format::FileId;
use super::options::{CheckpointDone, CopysetRecord};
use super::overlay::Layer;
use super::pace::Filling;
use super::shard::Shard;
use super::stage::Staged;
use super::swap::{Swap, Swapped};

/// A frozen layer and how far its drain has come. While it is here, reads look into it.
pub struct Draining {
    pub frozen: Arc<Frozen>,
    pub outcome: watch::Receiver<Option<Outcome<Drained>>>,
    /// `Some`: not begun, or failed for lack of space and to be begun again.
    begin: Option<watch::Sender<Option<Outcome<Drained>>>>,
    tried: Instant,
}

/// After this a drain that failed for lack of space is worth another try.
const RETRY_AFTER: Duration = Duration::from_secs(1);

impl Draining {
    fn new(frozen: Arc<Frozen>) -> Self {
        let (begin, outcome) = watch::channel(None);
        Self { frozen, outcome, begin: Some(begin), tried: Instant::now() }
    }

    /// Nobody drains it, and it is time that somebody did.
    pub fn is_due(&self) -> bool {
        self.begin.is_some() && self.tried.elapsed() >= RETRY_AFTER
    }
}

/// What became of a job that somebody waits for.
pub type Outcome<T> = Result<Arc<T>, StoreError>;

/// The checkpoint thread. Ends, after what it is doing, when this is dropped.
pub struct CheckpointThread {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    filling: Arc<Filling>,
}

pub enum Job {
    Drain {
        frozen: Arc<Frozen>,
        outcome: watch::Sender<Option<Outcome<Drained>>>,
    },
    Swap {
        swap: Swap,
        outcome: watch::Sender<Option<Outcome<Swapped>>>,
    },
    /// The layer comes along to be dropped here: freeing tens of thousands of blocks takes milliseconds.
    CleanUp {
        frozen: Arc<Frozen>,
        removed: Vec<FileId>,
    },
    /// Files whose records are gone.
    Remove {
        files: Vec<FileId>,
    },
    /// Whatever of it was not installed.
    GiveUp(Arc<Mutex<Staged>>),
    /// Files of one replica in the trash; `last`: it has no others.
    EmptyTrash {
        admission: u64,
        files: Vec<FileId>,
        last: bool,
    },
}

impl CheckpointThread {
    pub fn start(mut drainer: Drainer) -> Result<Self, StoreError> {
        let (jobs, queue) = mpsc::channel();
        let filling = drainer.filling.clone();
        let run = move || {
            evolute_daemon::background();
            for job in queue {
                match job {
                    Job::Drain { frozen, outcome } => {
                        let drained = drainer.drain(&frozen).map(Arc::new);
                        drop(frozen);
                        outcome.send_replace(Some(drained));
                    }
                    Job::Swap { swap, outcome } => {
                        let swapped = drainer.swap(swap).map(Arc::new);
                        outcome.send_replace(Some(swapped));
                    }
                    Job::CleanUp { frozen, removed } => {
                        drop(frozen);
                        drainer.clean_up(&removed);
                    }
                    Job::Remove { files } => drainer.remove(&files),
                    Job::GiveUp(staged) => {
                        let files = staged.lock().unwrap_or_else(PoisonError::into_inner).give_up();
                        drainer.remove(&files);
                    }
                    Job::EmptyTrash { admission, files, last } => {
                        drainer.remove(&files);
                        let keys = files.iter().map(|id| id.key);
                        if let Err(error) = drainer.catalog.forget_trash(admission, keys, last) {
                            tracing::error!(%error, "the trash was emptied and is still on record");
                        }
                    }
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("checkpoint".into())
            .spawn(run)
            .map_err(|e| StoreError::io("starting the checkpoint thread", e))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), filling })
    }

    pub fn send(&self, job: Job) -> Result<(), StoreError> {
        let jobs = self.jobs.as_ref().ok_or(StoreError::Closed)?;
        jobs.send(job).map_err(|_| StoreError::Closed)
    }
}

impl Drop for CheckpointThread {
    fn drop(&mut self) {
        self.jobs = None;
        self.filling.hurry();
        if let Some(thread) = self.thread.take() {
            // It panicked: then so did this process (panics abort), or a test is about to say so.
            let _ = thread.join();
        }
    }
}

/// Freezes what was applied until now, unless an older layer is still to be drained or a replica is being swapped.
pub fn freeze(shard: &mut Shard, states: Vec<CopysetRecord>) {
    shard.settle();
    if shard.draining.is_some() || shard.swapping.is_some() {
        return;
    }
    let layer = Arc::new(std::mem::take(&mut shard.active));
    shard.filling.set(0);
    let states = shard.with_admission(states);
    let frozen = Arc::new(Frozen { layer, states, rescued: AtomicBool::new(false) });
    shard.draining = Some(Draining::new(frozen));
    shard.version += 1;
    shard.last_checkpoint = Instant::now();
}

/// Drains what is frozen. May be dropped and called again: the drain goes on by itself.
pub async fn run(shard: Rc<RefCell<Shard>>) -> Result<CheckpointDone, StoreError> {
    let (mut outcome, frozen) = {
        let mut shard = shard.borrow_mut();
        if let Some(failed) = shard.catalog.failed() {
            return Err(failed.clone());
        }
        let Some(draining) = &mut shard.draining else {
            // Another future of the same checkpoint has finished it, or it was not the time for one.
            return Ok(CheckpointDone::default());
        };
        let frozen = draining.frozen.clone();
        let outcome = draining.outcome.clone();
        if let Some(begin) = draining.begin.take() {
            shard.thread.send(Job::Drain { frozen: frozen.clone(), outcome: begin })?;
        }
        (outcome, frozen)
    };
    let drained = match outcome.wait_for(Option::is_some).await {
        Ok(drained) => drained.clone().expect("waited for"),
        Err(_) => Err(StoreError::Closed),
    };
    shard.borrow_mut().settle();
    let drained = drained?;
    Ok(CheckpointDone {
        applied: frozen.states.iter().map(|(record, _)| (record.copyset, record.applied)).collect(),
        blocks: drained.blocks,
        chunks: drained.chunks.len() as u64,
        bytes: drained.bytes,
    })
}

impl Shard {
    /// What the checkpoint thread has done since takes effect.
    pub fn settle(&mut self) {
        let done = self.draining.as_ref().and_then(|draining| draining.outcome.borrow().clone());
        match done {
            None => {}
            // To be begun again by the next checkpoint; after a failed sync that one only says so.
            Some(Err(_)) => {
                if let Some(draining) = &mut self.draining {
                    *draining = Draining::new(draining.frozen.clone());
                }
            }
            Some(Ok(drained)) => self.finish(&drained),
        }
        let done = self.swapping.as_ref().and_then(|swapping| swapping.borrow().clone());
        if let Some(done) = done {
            self.swapping = None;
            // After an error nothing has changed.
            if let Ok(swapped) = done {
                self.swapped(&swapped);
            }
        }
    }

    fn finish(&mut self, drained: &Drained) {
        let Some(draining) = self.draining.take() else { return };
        let mut removed = Vec::new();
        {
            let mut table = self.table.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            for chunk in &drained.chunks {
                if chunk.created || chunk.record.is_none() {
                    self.open_chunks.forget(chunk.key);
                } else {
                    self.open_chunks.touched(chunk.key, chunk.touched);
                }
                removed.extend(chunk.removed);
                table.put(chunk.key, chunk.record.clone());
            }
        }
        self.version += 1;
        self.refresh_space();
        // Without the thread the layer is simply dropped here, and the files go at the next open.
        let _ = self.thread.send(Job::CleanUp { frozen: draining.frozen, removed });
    }

    /// What frozen and active layer may hold together.
    pub fn overlay_bytes(&self) -> u64 {
        self.active.bytes() + self.draining.as_ref().map_or(0, |draining| draining.frozen.layer.bytes())
    }

    pub fn draining_layer(&self) -> Option<&Arc<Layer>> {
        self.draining.as_ref().map(|draining| &draining.frozen.layer)
    }
}
