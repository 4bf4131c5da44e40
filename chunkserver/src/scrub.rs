//! Reads everything that is here, slowly and without being asked, so that rot is found while other replicas can still
//! put it right. Where it is survives a restart.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use evolute_protocol::geometry::BLOCK_BYTES;
use evolute_protocol::id::{BlockIndex, ChunkKey, CopysetId};

use crate::chunk_store::{ChunkStore, Extent, ScrubPosition, StoreError};
use crate::copyset::registry::{Registry, unix_ms};

#[derive(Debug, Clone, Copy)]
pub struct ScrubOptions {
    /// Bytes read in a second, at most.
    pub bytes_per_second: u64,
    /// From the beginning of one round to the beginning of the next, in milliseconds, unless a round takes longer.
    pub period_ms: u64,
}

/// What there is to report.
#[derive(Debug, Default)]
pub struct Progress {
    /// Since this process started.
    pub bytes: Cell<u64>,
    /// When a round last came to its end; 0: never.
    pub last_full_unix_ms: Cell<u64>,
}

/// How much is read between two notes of the position: what a restart reads again.
const BYTES_PER_NOTE: u64 = 256 << 20;
/// Between two looks whether the next round is due.
const IDLE: Duration = Duration::from_secs(1);

pub struct Scrubber {
    pub registry: Rc<Registry>,
    pub store: Rc<RefCell<ChunkStore>>,
    pub options: ScrubOptions,
    pub progress: Rc<Progress>,
}

impl Scrubber {
    /// Until the store fails. Cancel-safe.
    pub async fn run(self) -> StoreError {
        loop {
            if let Err(error) = self.round().await {
                return error;
            }
        }
    }

    /// The rest of the round that was begun, or a whole one when it is time.
    async fn round(&self) -> Result<(), StoreError> {
        let mut position = self.store.borrow().scrub_position()?;
        self.progress.last_full_unix_ms.set(position.last_full_unix_ms);
        if position.next.is_none() {
            while unix_ms() < position.began_unix_ms.saturating_add(self.options.period_ms) {
                tokio::time::sleep(IDLE).await;
            }
            position.began_unix_ms = unix_ms();
        }
        let first = position.next.map_or(CopysetId(0), |(copyset, _)| copyset);
        let mut unnoted = 0;
        let all: Vec<_> = self.registry.all().iter().map(|copyset| copyset.id()).collect();
        for id in all.into_iter().filter(|id| *id >= first) {
            let from = position.next.filter(|(copyset, _)| *copyset == id).map(|(_, chunk)| chunk);
            let mut export = self.store.borrow().export(id);
            if let Some(from) = from {
                export.skip_to(from);
            }
            while let Some((chunk, extents)) = export.next().await {
                // It may have left meanwhile.
                if self.registry.get(id).is_none() {
                    break;
                }
                let bytes = self.look_at(id, chunk, &extents).await;
                unnoted += bytes;
                if unnoted >= BYTES_PER_NOTE {
                    unnoted = 0;
                    position.next = Some((id, chunk));
                    self.note(position).await?;
                }
                tokio::time::sleep(Duration::from_secs_f64(
                    bytes as f64 / self.options.bytes_per_second as f64,
                ))
                .await;
            }
        }
        position = ScrubPosition { next: None, last_full_unix_ms: unix_ms(), ..position };
        self.progress.last_full_unix_ms.set(position.last_full_unix_ms);
        self.note(position).await?;
        // Even an empty store is not looked at all the time.
        tokio::time::sleep(IDLE).await;
        Ok(())
    }

    fn note(&self, position: ScrubPosition) -> impl Future<Output = Result<(), StoreError>> + use<> {
        self.store.borrow().put_scrub_position(position)
    }

    /// Everything in `extents` was verified when it was read; what could not be is repaired.
    async fn look_at(&self, id: CopysetId, chunk: ChunkKey, extents: &[Extent]) -> u64 {
        let mut blocks = 0;
        for extent in extents {
            blocks += extent.count() as u64;
            let Extent::Damaged { first, count } = extent else { continue };
            for block in *first..first + count {
                if let Some(copyset) = self.registry.get(id) {
                    copyset.repair(chunk, BlockIndex(block)).await;
                }
            }
        }
        let bytes = blocks * BLOCK_BYTES;
        self.progress.bytes.set(self.progress.bytes.get() + bytes);
        bytes
    }
}
