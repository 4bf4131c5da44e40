//! When the overlay goes to the chunk files, and what follows: the log may be recycled.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use evolute_raft::Log;

use crate::chunk_store::{ChunkStore, StoreError};
use crate::copyset::registry::{Registry, unix_ms};
use crate::shard::ShardError;

/// How often it is asked whether a checkpoint is due. At 1 GiB/s, which no disk here reaches, 100 ms are 100 MiB:
/// less than the half of the overlay that is left when a checkpoint becomes due.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A member that caught up frees log, and time empties the trash, without hurry: about once a second.
const LOOKS_PER_PURGE: u32 = 10;
/// Log bytes that make a checkpoint due by themselves: what a restart reads, and what the disk must hold beside
/// the chunks.
const LOG_BYTES_DUE: u64 = 512 << 20;
/// What found no space is tried again after this.
pub const NO_SPACE_PAUSE: Duration = Duration::from_secs(1);

/// Checkpoints until the log or the store fails; that failure is the result.
pub async fn run(
    registry: Rc<Registry>,
    store: Rc<RefCell<ChunkStore>>,
    log: Log,
    trash_delay_ms: u64,
) -> ShardError {
    let mut looks: u32 = 0;
    let mut log_at_last = log.usage().appended_bytes;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if let Some(error) = log.failed() {
            return ShardError::Log(error);
        }
        if let Some(error) = store.borrow().failed() {
            return ShardError::Store(error);
        }
        looks += 1;
        if looks.is_multiple_of(LOOKS_PER_PURGE) {
            registry.purge().await;
            store.borrow_mut().empty_trash(unix_ms(), trash_delay_ms);
        }
        let grown = log.usage().appended_bytes.saturating_sub(log_at_last) >= LOG_BYTES_DUE;
        if !(grown || store.borrow().checkpoint_due()) {
            continue;
        }
        log_at_last = log.usage().appended_bytes;
        let records = registry.all().iter().map(|copyset| copyset.freeze()).collect();
        let draining = store.borrow_mut().begin_checkpoint(records);
        // What is applied is committed, but perhaps by the two others: only what our own log holds may be drained.
        if let Err(error) = log.synced().await {
            return ShardError::Log(error);
        }
        match draining.await {
            Ok(done) => {
                for (copyset, applied) in &done.applied {
                    if let Some(copyset) = registry.get(*copyset) {
                        copyset.checkpointed(*applied);
                    }
                }
                tracing::debug!(blocks = done.blocks, chunks = done.chunks, bytes = done.bytes, "checkpoint");
            }
            Err(error @ StoreError::NoSpace { .. }) => {
                tracing::warn!(%error, "the checkpoint waits for space");
                tokio::time::sleep(NO_SPACE_PAUSE).await;
            }
            Err(error) => return ShardError::Store(error),
        }
        // Writes that waited for room in the overlay.
        registry.all().iter().for_each(|copyset| copyset.flush());
    }
}
