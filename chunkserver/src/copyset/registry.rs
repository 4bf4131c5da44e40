//! Copyset id → running replica: start, find, list, remove.
//!
//! A replica begins with its record and then its log, which the record says, before its first vote; it ends with its
//! record too, before its log is forgotten.
//! So whatever a crash leaves is told by the store when it is opened: records to be resumed, and notes of replicas
//! whose log is still to be forgotten.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use evolute_protocol::id::{CopysetId, ReplicaId};
use evolute_raft::{GroupId, LogError, Node, StartError};

use super::Copyset;
use super::apply::Replica;
use super::repair::Repairs;
use super::state::{Created, DamagedState, State, created_of, restore};
use crate::chunk_store::{ChunkStore, CopysetRecord, Standing, StoreError};
use crate::others::Others;

/// All replicas of this shard.
pub struct Registry {
    node: Node,
    store: Rc<RefCell<ChunkStore>>,
    repairs: Rc<Repairs>,
    others: Rc<Others>,
    copysets: RefCell<BTreeMap<CopysetId, Rc<Copyset>>>,
    /// Those that are here and cannot run, and why not.
    failed: RefCell<BTreeMap<CopysetId, Failed>>,
    /// Being started or removed.
    busy: RefCell<BTreeSet<CopysetId>>,
}

/// Why a replica did not start, or did not end. The others serve on.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    #[error(transparent)]
    Damaged(#[from] DamagedState),
    #[error("{copyset}: its record could not be stored")]
    Store { copyset: CopysetId, source: StoreError },
    #[error("{copyset}: its Raft group did not start")]
    Raft { copyset: CopysetId, source: StartError },
    #[error("{copyset}: its log could not be begun")]
    Begin { copyset: CopysetId, source: LogError },
    /// Its votes were in it.
    #[error("{copyset}: its log is gone, and with it what this replica voted for and acknowledged")]
    LogGone { copyset: CopysetId },
    /// Its votes since that copy was made are not known.
    #[error("{copyset}: {PUT_BACK}")]
    PutBack { copyset: CopysetId },
    #[error("{copyset}: its log could not be forgotten")]
    Forget { copyset: CopysetId, source: LogError },
    /// It is being started or removed already. Ask again.
    #[error("{0} is busy")]
    Busy(CopysetId),
}

/// A replica that is here and cannot run.
#[derive(Debug, Clone)]
pub struct Failed {
    pub replica: ReplicaId,
    pub why: String,
    /// Its directory was put back to an older copy.
    pub put_back: bool,
}

/// Why a replica of a directory that was put back does not run.
pub const PUT_BACK: &str =
    "it was put back to an older copy, which forgot what it voted for and acknowledged since";

impl Registry {
    pub fn new(node: Node, store: Rc<RefCell<ChunkStore>>, repairs: Rc<Repairs>, others: Rc<Others>) -> Self {
        Self {
            node,
            store,
            repairs,
            others,
            copysets: RefCell::default(),
            failed: RefCell::default(),
            busy: RefCell::default(),
        }
    }

    pub fn get(&self, id: CopysetId) -> Option<Rc<Copyset>> {
        self.copysets.borrow().get(&id).cloned()
    }

    pub fn all(&self) -> Vec<Rc<Copyset>> {
        self.copysets.borrow().values().cloned().collect()
    }

    /// Replicas that are here and cannot run, and why not.
    pub fn failed(&self) -> BTreeMap<CopysetId, Failed> {
        self.failed.borrow().clone()
    }

    /// Hosts a new replica: its record is durable before its group may vote. Again: changes nothing.
    pub async fn create(&self, id: CopysetId, created: Created) -> Result<Rc<Copyset>, ReplicaError> {
        let _busy = Busy::begin(&self.busy, id)?;
        if let Some(copyset) = self.get(id) {
            return Ok(copyset);
        }
        if self.failed.borrow().contains_key(&id) {
            return Err(ReplicaError::Busy(id));
        }
        let state = State::default();
        let record = state.record(id, &created);
        let stored = self.store.borrow().put_copyset(record);
        stored.map_err(|source| ReplicaError::Store { copyset: id, source })?;
        self.begin_log(id, created.replica).await?;
        self.start(id, created, state).await
    }

    /// The log is begun before the store says so, so that a crash in between makes no replica look lost.
    async fn begin_log(&self, id: CopysetId, replica: ReplicaId) -> Result<(), ReplicaError> {
        let begun = self.node.log().begin(group_id(id), evolute_raft::ReplicaId(replica.0)).await;
        begun.map_err(|source| ReplicaError::Begin { copyset: id, source })?;
        let standing = Standing { replica, log_begun: true, put_back: false };
        let noted = self.store.borrow().put_standings(&[(id, standing)]);
        noted.map_err(|source| ReplicaError::Store { copyset: id, source })
    }

    /// Starts a replica this disk already has.
    pub async fn resume(
        &self,
        record: &CopysetRecord,
        standing: Option<Standing>,
    ) -> Result<Rc<Copyset>, ReplicaError> {
        let started = match restore(record) {
            Ok((state, created)) => self.resume_as(record.copyset, created, state, standing).await,
            Err(error) => Err(error.into()),
        };
        if let (Err(error), Some(created)) = (&started, created_of(record)) {
            let failed = Failed {
                replica: created.replica,
                why: evolute_daemon::in_one_line(error),
                put_back: matches!(error, ReplicaError::PutBack { .. }),
            };
            self.failed.borrow_mut().insert(record.copyset, failed);
        }
        started
    }

    async fn resume_as(
        &self,
        copyset: CopysetId,
        created: Created,
        state: State,
        standing: Option<Standing>,
    ) -> Result<Rc<Copyset>, ReplicaError> {
        let standing = standing.filter(|standing| standing.replica == created.replica);
        if standing.is_some_and(|standing| standing.put_back) {
            return Err(ReplicaError::PutBack { copyset });
        }
        if !standing.is_some_and(|standing| standing.log_begun) {
            // A crash came between its record and its log. Or an older program began it: then what can be told is told
            // by what is applied.
            if self.node.log().replica(group_id(copyset)).is_some() || state.applied().is_none() {
                self.begin_log(copyset, created.replica).await?;
            }
        } else if self.node.log().replica(group_id(copyset)).is_none() {
            return Err(ReplicaError::LogGone { copyset });
        }
        self.start(copyset, created, state).await
    }

    /// This directory was put back to an older copy: no replica that is here now votes again, durably when this returns,
    /// and none runs. Those that fail otherwise are told apart no more.
    pub async fn mark_put_back(&self) -> Result<(), StoreError> {
        let running = self.all();
        let mut marked: Vec<_> =
            running.iter().map(|copyset| (copyset.id(), copyset.created().replica)).collect();
        marked.extend(self.failed.borrow().iter().map(|(id, failed)| (*id, failed.replica)));
        let standing = |(id, replica)| (id, Standing { replica, log_begun: true, put_back: true });
        let standings: Vec<_> = marked.iter().copied().map(standing).collect();
        self.store.borrow().put_standings(&standings)?;
        for copyset in running {
            self.copysets.borrow_mut().remove(&copyset.id());
            copyset.refuse_waiting();
            self.node.stop_group(group_id(copyset.id())).await;
        }
        let failed = |(id, replica)| (id, Failed { replica, why: PUT_BACK.to_owned(), put_back: true });
        let failed = marked.into_iter().map(failed);
        self.failed.borrow_mut().extend(failed);
        Ok(())
    }

    /// An operator says that what is here counts. Which replicas are to be resumed, and how they stand now.
    pub fn unmark_put_back(&self) -> Result<Vec<(CopysetRecord, Standing)>, StoreError> {
        let marked = self.store.borrow().standings()?.into_iter().filter(|(_, standing)| standing.put_back);
        let standings: Vec<_> =
            marked.map(|(id, standing)| (id, Standing { put_back: false, ..standing })).collect();
        self.store.borrow().put_standings(&standings)?;
        let mut resumed = Vec::new();
        for (id, standing) in standings {
            self.failed.borrow_mut().remove(&id);
            resumed.extend(self.store.borrow().copyset(id)?.map(|record| (record, standing)));
        }
        Ok(resumed)
    }

    /// See [`Node::stand_aside`].
    pub fn take_part(&self) {
        self.node.take_part();
    }

    async fn start(
        &self,
        id: CopysetId,
        created: Created,
        state: State,
    ) -> Result<Rc<Copyset>, ReplicaError> {
        let state = Rc::new(RefCell::new(state));
        let replica = Replica::new(id, created.clone(), Rc::clone(&state), Rc::clone(&self.store));
        let me = evolute_raft::ReplicaId(created.replica.0);
        let group = self
            .node
            .start_group(group_id(id), me, replica)
            .await
            .map_err(|source| ReplicaError::Raft { copyset: id, source })?;
        let (store, repairs) = (Rc::clone(&self.store), Rc::clone(&self.repairs));
        let others = Rc::clone(&self.others);
        let copyset = Rc::new(Copyset::new(id, created, group, state, store, repairs, others));
        self.copysets.borrow_mut().insert(id, Rc::clone(&copyset));
        Ok(copyset)
    }

    /// Ends this replica: its record and its chunks' records are in the trash, then its log is forgotten. Another
    /// replica of the same copyset is left alone. Again: changes nothing.
    pub async fn remove(&self, id: CopysetId, replica: ReplicaId) -> Result<(), ReplicaError> {
        let _busy = Busy::begin(&self.busy, id)?;
        let running = self.get(id).map(|copyset| copyset.created().replica);
        let failed = self.failed.borrow().get(&id).map(|failed| failed.replica);
        if running.or(failed) != Some(replica) {
            return Ok(());
        }
        if let Some(copyset) = self.copysets.borrow_mut().remove(&id) {
            copyset.refuse_waiting();
        }
        self.node.stop_group(group_id(id)).await;
        let trashing = self.store.borrow().trash_copyset(id, unix_ms());
        trashing.await.map_err(|source| ReplicaError::Store { copyset: id, source })?;
        self.forget(id).await?;
        self.failed.borrow_mut().remove(&id);
        tracing::info!(copyset = %id, %replica, "a replica is removed");
        Ok(())
    }

    /// Forgets the log of a replica whose record is gone. Called again at every start until it is done.
    pub async fn forget(&self, id: CopysetId) -> Result<(), ReplicaError> {
        let forgotten = self.node.remove_group(group_id(id)).await;
        forgotten.map_err(|source| ReplicaError::Forget { copyset: id, source })?;
        let noted = self.store.borrow().removed(id);
        noted.map_err(|source| ReplicaError::Store { copyset: id, source })
    }

    /// Frees log that became free since the last checkpoint, because a member caught up.
    pub async fn purge(&self) {
        self.node.purge().await;
    }

    pub async fn shutdown(&self) {
        self.copysets.borrow_mut().clear();
        self.node.shutdown().await;
    }
}

fn group_id(copyset: CopysetId) -> GroupId {
    GroupId(u64::from(copyset.0))
}

/// The wall clock, for the trash.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// One thing at a time happens to a replica.
struct Busy<'a> {
    all: &'a RefCell<BTreeSet<CopysetId>>,
    id: CopysetId,
}

impl<'a> Busy<'a> {
    fn begin(all: &'a RefCell<BTreeSet<CopysetId>>, id: CopysetId) -> Result<Self, ReplicaError> {
        if all.borrow_mut().insert(id) { Ok(Self { all, id }) } else { Err(ReplicaError::Busy(id)) }
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.all.borrow_mut().remove(&self.id);
    }
}
