//! Copyset id → running replica: start, find, list.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use evolute_protocol::id::CopysetId;
use evolute_raft::{GroupId, Node, StartError};

use super::Copyset;
use super::apply::Replica;
use super::state::{Created, DamagedState, State, restore};
use crate::chunk_store::{ChunkStore, CopysetRecord, StoreError};

/// All replicas of this shard.
pub struct Registry {
    node: Node,
    store: Rc<RefCell<ChunkStore>>,
    copysets: RefCell<BTreeMap<CopysetId, Rc<Copyset>>>,
}

/// Why a replica did not start. The others serve on.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    #[error(transparent)]
    Damaged(#[from] DamagedState),
    #[error("{copyset}: its record could not be stored")]
    Store { copyset: CopysetId, source: StoreError },
    #[error("{copyset}: its Raft group did not start")]
    Raft { copyset: CopysetId, source: StartError },
}

impl Registry {
    pub fn new(node: Node, store: Rc<RefCell<ChunkStore>>) -> Self {
        Self { node, store, copysets: RefCell::default() }
    }

    pub fn get(&self, id: CopysetId) -> Option<Rc<Copyset>> {
        self.copysets.borrow().get(&id).cloned()
    }

    pub fn all(&self) -> Vec<Rc<Copyset>> {
        self.copysets.borrow().values().cloned().collect()
    }

    /// Hosts a new replica: its record is durable before its group may vote. Again: changes nothing.
    pub async fn create(&self, id: CopysetId, created: Created) -> Result<Rc<Copyset>, ReplicaError> {
        if let Some(copyset) = self.get(id) {
            return Ok(copyset);
        }
        let state = State::default();
        let record = state.record(id, &created);
        let stored = self.store.borrow().put_copyset(record);
        stored.map_err(|source| ReplicaError::Store { copyset: id, source })?;
        self.start(id, created, state).await
    }

    /// Starts a replica this disk already has.
    pub async fn resume(&self, record: &CopysetRecord) -> Result<Rc<Copyset>, ReplicaError> {
        let (state, created) = restore(record)?;
        self.start(record.copyset, created, state).await
    }

    async fn start(
        &self,
        id: CopysetId,
        created: Created,
        state: State,
    ) -> Result<Rc<Copyset>, ReplicaError> {
        let state = Rc::new(RefCell::new(state));
        let replica = Replica::new(id, Rc::clone(&state), Rc::clone(&self.store));
        let me = evolute_raft::ReplicaId(created.replica.0);
        let group = self
            .node
            .start_group(GroupId(u64::from(id.0)), me, replica)
            .await
            .map_err(|source| ReplicaError::Raft { copyset: id, source })?;
        let copyset = Rc::new(Copyset::new(id, created, group, state, Rc::clone(&self.store)));
        self.copysets.borrow_mut().insert(id, Rc::clone(&copyset));
        Ok(copyset)
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
