//! Reads everything that is here, slowly and without being asked, and has it compared with the other replicas
//! (`copyset/compare.rs`), so that what is wrong is found while they can still put it right. Where it is survives a
//! restart.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use evolute_protocol::geometry::{CHUNK_BYTES, REQUEST_BYTES_MAX};
use evolute_protocol::id::{ChunkKey, CopysetId};
use evolute_protocol::wire::request::ChunkRange;

use crate::chunk_store::{ChunkStore, ScrubPosition, StoreError};
use crate::copyset::registry::{Registry, unix_ms};
use crate::copyset::repair::Repairs;

#[derive(Debug, Clone, Copy)]
pub struct ScrubOptions {
    /// Bytes read in a second, at most: half of it for other chunkservers that compare.
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

impl Progress {
    /// As it was noted last.
    pub fn restored(store: &ChunkStore) -> Result<Self, StoreError> {
        let last_full_unix_ms = Cell::new(store.scrub_position()?.last_full_unix_ms);
        Ok(Self { last_full_unix_ms, ..Self::default() })
    }
}

/// How much is read between two notes of the position: what a restart reads again.
const BYTES_PER_NOTE: u64 = 256 << 20;
/// What a question costs beside what is read for it: space never written is compared, too.
const QUESTION_BYTES: u64 = 16 << 10;
/// Between two looks whether the next round is due.
const IDLE: Duration = Duration::from_secs(1);

pub struct Scrubber {
    pub registry: Rc<Registry>,
    pub store: Rc<RefCell<ChunkStore>>,
    pub repairs: Rc<Repairs>,
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
        if position.next.is_none() {
            while unix_ms() < position.began_unix_ms.saturating_add(self.options.period_ms) {
                tokio::time::sleep(IDLE).await;
                self.settle_again().await;
            }
            position.began_unix_ms = unix_ms();
        }
        self.repairs.comparisons.keep(|id| self.registry.get(id).is_some());
        let first = position.next.map_or(CopysetId(0), |(copyset, _)| copyset);
        let mut unnoted = 0;
        let all: Vec<_> = self.registry.all().iter().map(|copyset| copyset.id()).collect();
        for id in all.into_iter().filter(|id| *id >= first) {
            let from = position.next.filter(|(copyset, _)| *copyset == id).map(|(_, chunk)| chunk);
            let chunks = self.store.borrow().chunks_from(id, from);
            for chunk in chunks {
                unnoted += self.look_at(id, chunk).await;
                if unnoted >= BYTES_PER_NOTE {
                    unnoted = 0;
                    position.next = Some((id, chunk));
                    self.note(position).await?;
                }
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

    /// What no majority could decide keeps an operator awake: it is not left until the next round.
    async fn settle_again(&self) {
        for (id, chunk, block) in self.repairs.comparisons.undecided_places() {
            if let Some(copyset) = self.registry.get(id) {
                copyset.settle_again(chunk, block).await;
            }
            tokio::time::sleep(IDLE).await;
        }
    }

    /// Reads a chunk, range by range, and compares it. How many bytes there were.
    async fn look_at(&self, id: CopysetId, chunk: ChunkKey) -> u64 {
        let mut total = 0;
        for range in ranges() {
            // It may leave meanwhile.
            let Some(copyset) = self.registry.get(id) else { break };
            let bytes = copyset.scrub(chunk, range).await;
            drop(copyset);
            total += bytes;
            self.progress.bytes.set(self.progress.bytes.get() + bytes);
            // As much as is read here is read by whoever compares; and it asks as much of this disk for its own.
            let cost = 2 * bytes + QUESTION_BYTES;
            tokio::time::sleep(Duration::from_secs_f64(cost as f64 / self.options.bytes_per_second as f64))
                .await;
        }
        total
    }
}

/// A chunk in parts that are read and compared at a time.
fn ranges() -> impl Iterator<Item = ChunkRange> {
    let bytes = u32::try_from(REQUEST_BYTES_MAX).expect("a MiB");
    let count = u32::try_from(CHUNK_BYTES / REQUEST_BYTES_MAX).expect("16");
    (0..count).map(move |n| ChunkRange::new(n * bytes, bytes).expect("inside a chunk"))
}
