//! A block that cannot be read here is fetched from another replica, put right, and served.
//!
//! What is fetched is exactly what this replica should hold: the other one has applied at least what is applied here
//! of that volume when it is asked; its answer counts only once everything it may hold is applied here too; and no
//! change of the block came in between (`chunk_store/repair.rs`), or it is asked again.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use evolute_protocol::geometry::BLOCK_BYTES;
use evolute_protocol::id::{BlockIndex, ChunkKey, ChunkserverId, CopysetId};
use evolute_protocol::wire::reply::{Freshness, Reply, data_is_intact};
use evolute_protocol::wire::request::{ChunkRange, Read, ReadAtLeast, Request};
use evolute_raft::LocalFuture;

use super::compare::Comparisons;
use super::{Copyset, chunkserver_of};
use crate::chunk_store::{ReadData, ReadError};

/// How other replicas are asked.
pub trait Neighbours {
    /// Asks what has no data of its own; `None`: that one cannot be asked, now or at all.
    fn ask(
        &self,
        of: ChunkserverId,
        copyset: CopysetId,
        request: Request,
    ) -> LocalFuture<'static, Option<Reply>>;
}

/// What became of bad blocks, since this process started, of all copysets.
pub struct Repairs {
    pub(super) neighbours: Rc<dyn Neighbours>,
    pub comparisons: Comparisons,
    bad: RefCell<HashSet<(ChunkKey, u16)>>,
    found: Cell<u64>,
    repaired: Cell<u64>,
}

/// A replica that is behind catches up within a heartbeat or two; one that is gone does not: then the reader is told.
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(100);
/// Somebody else repairs the block, or what the answer may hold is not applied here yet.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
const LOOKS: u32 = 200;

impl Repairs {
    pub fn new(neighbours: Rc<dyn Neighbours>) -> Self {
        Self {
            neighbours,
            comparisons: Comparisons::default(),
            bad: RefCell::default(),
            found: Cell::new(0),
            repaired: Cell::new(0),
        }
    }

    pub fn found(&self) -> u64 {
        self.found.get()
    }

    pub fn repaired(&self) -> u64 {
        self.repaired.get()
    }

    pub(super) fn note_found(&self, chunk: ChunkKey, block: BlockIndex) {
        if self.bad.borrow_mut().insert((chunk, block.0)) {
            self.found.set(self.found.get() + 1);
        }
    }

    pub(super) fn note_repaired(&self, chunk: ChunkKey, block: BlockIndex) {
        if self.bad.borrow_mut().remove(&(chunk, block.0)) {
            self.repaired.set(self.repaired.get() + 1);
        }
    }
}

impl Copyset {
    /// Reads, and repairs what is in the way. An error: no replica can tell what that block holds.
    pub(super) async fn read_repaired(
        &self,
        chunk: ChunkKey,
        range: ChunkRange,
    ) -> Result<ReadData, ReadError> {
        // Every block once, and some that were overtaken.
        let mut left = 2 * u64::from(range.length()) / BLOCK_BYTES + 16;
        loop {
            let reading = self.store.borrow().read(chunk, range.offset(), range.length());
            let error = match reading.await {
                Ok(read) => return Ok(read),
                Err(error) => error,
            };
            let ReadError::Unreadable { block } = error;
            left -= 1;
            if left == 0 || !self.repair(chunk, block).await {
                return Err(error);
            }
        }
    }

    /// Puts a block right that cannot be read; whether it is worth reading again. Cancel-safe.
    pub async fn repair(&self, chunk: ChunkKey, block: BlockIndex) -> bool {
        self.repairs.note_found(chunk, block);
        for _ in 0..ATTEMPTS {
            let repair = self.store.borrow().begin_repair(self.id, chunk, block);
            let Some(repair) = repair else {
                self.repair_of_another(chunk, block).await;
                return true;
            };
            if let Some((fresh, data)) = self.fetch(chunk, block).await
                && self.has_applied(chunk, fresh).await
            {
                if repair.finish(data) {
                    tracing::warn!(copyset = %self.id, %chunk, %block, "a bad block is repaired");
                    self.repairs.note_repaired(chunk, block);
                }
                // Else a change came in between: perhaps it is whole now.
                return true;
            }
            drop(repair);
            tokio::time::sleep(PAUSE).await;
        }
        tracing::error!(copyset = %self.id, %chunk, %block, "no replica can tell what a bad block holds");
        false
    }

    /// Waits until nobody repairs the block, which takes as long as a question to the other replicas.
    async fn repair_of_another(&self, chunk: ChunkKey, block: BlockIndex) {
        for _ in 0..LOOKS {
            tokio::time::sleep(LOOK_AGAIN).await;
            if self.store.borrow().begin_repair(self.id, chunk, block).is_some() {
                return;
            }
        }
    }

    /// A block as another replica has it.
    async fn fetch(&self, chunk: ChunkKey, block: BlockIndex) -> Option<(Freshness, Bytes)> {
        let range = block_range(block);
        let ask = Request::ReadAtLeast(self.question(chunk, range)?);
        let status = self.group.status();
        let mut others: Vec<_> =
            status.members.iter().filter(|m| m.voter && m.member.replica != status.me.replica).collect();
        others.sort_by_key(|m| std::cmp::Reverse(m.matched));
        for other in others {
            let reply = self.repairs.neighbours.ask(chunkserver_of(other.member), self.id, ask.clone()).await;
            let answer = reply.and_then(|reply| data_of(range, reply));
            if answer.is_some() {
                return answer;
            }
        }
        None
    }

    /// What another replica is asked: to have applied at least what is applied here of the volume. `None`: nobody ever
    /// wrote it here.
    pub(super) fn question(&self, chunk: ChunkKey, range: ChunkRange) -> Option<ReadAtLeast> {
        let state = self.state.borrow();
        let writers = state.writers().get(&chunk.volume)?;
        let read = Read { chunk, epoch: writers.epoch(), range };
        // Replicas are held against what others have applied and store, not against the log that all of them have.
        Some(ReadAtLeast { read, index: writers.last_index(), term: ReadAtLeast::APPLIED_ONLY })
    }

    /// Waits until everything that data so fresh may hold is applied here.
    pub(super) async fn has_applied(&self, chunk: ChunkKey, fresh: Freshness) -> bool {
        for _ in 0..LOOKS {
            let applied =
                self.state.borrow().writers().get(&chunk.volume).map(|writers| writers.last_index());
            if applied >= Some(fresh.index) {
                return true;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        false
    }
}

pub(super) fn block_range(block: BlockIndex) -> ChunkRange {
    let block_bytes = u32::try_from(BLOCK_BYTES).expect("4096");
    ChunkRange::new(u32::from(block.0) * block_bytes, block_bytes).expect("a block of a chunk")
}

/// What a reply says `range` holds, if it says so and can be believed.
pub(super) fn data_of(range: ChunkRange, reply: Reply) -> Option<(Freshness, Bytes)> {
    let Reply::Data { fresh, checksums, data, .. } = reply else { return None };
    let data = data.into_iter().next().unwrap_or_default();
    data_is_intact(range.offset(), range.length(), &data, &checksums).then_some((fresh, data))
}
