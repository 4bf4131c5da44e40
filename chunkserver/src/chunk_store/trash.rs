//! What removed replicas left: kept for a while in case the removal was a mistake, never read, and gone for good
//! when its time is up or its space is needed.
//!
//! The files stay where they are, under names that nothing else uses meanwhile; what makes them trash is that their
//! records have left the table (`swap.rs`). So throwing away costs one batch and no more, however much it is.

use evolute_protocol::id::{ChunkKey, CopysetId};

use super::checkpoint::Job;
use super::format::FileId;
use super::shard::Shard;
use super::table::ChunkRecord;

/// A replica in the trash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trash {
    pub copyset: CopysetId,
    pub since_unix_ms: u64,
    pub chunks: Vec<(ChunkKey, ChunkRecord)>,
}

/// Files removed in one job of the checkpoint thread: an unlink of 16 MiB takes about a millisecond, and a checkpoint
/// may be waiting behind.
const FILES_AT_ONCE: usize = 128;

impl Shard {
    /// Removes some files of the trash that have been there for `delay_ms`, or of any when space is short.
    pub fn empty_trash(&mut self, now_unix_ms: u64, delay_ms: u64) {
        let hurry = self.is_near_full();
        let mut table = self.table.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let due = |trash: &Trash| hurry || now_unix_ms.saturating_sub(trash.since_unix_ms) >= delay_ms;
        let found = table.trash().iter().find(|(_, trash)| due(trash)).map(|(admission, _)| *admission);
        let Some(admission) = found else { return };
        let (chunks, last) = table.take_trash(admission, FILES_AT_ONCE);
        drop(table);
        let files = chunks
            .into_iter()
            .map(|(key, record)| FileId::new(self.cluster, key, record.generation))
            .collect();
        // Without the thread the store is being closed; the next open finds the same trash.
        let _ = self.thread.send(Job::EmptyTrash { admission, files, last });
    }
}
