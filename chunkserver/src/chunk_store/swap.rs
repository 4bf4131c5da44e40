//! Changes of a whole replica in one step: what was staged takes the place of what is here, or what is here goes to the
//! trash.
//!
//! ```text
//!  shard              wait until nothing drains ─▶ (nothing is frozen meanwhile) ─▶ finish: table, layer, open files
//!                                │                                                      ▲
//!  checkpoint thread             └─▶ sync directories, one synced batch ────────────────┘
//! ```
//!
//! The batch is the moment. A crash before it leaves the replica as it was, and what was staged is removed when the
//! store is opened, as is any file without a record; a crash behind it leaves the new one, and the same happens to
//! the old one's files.

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use evolute_protocol::id::{ChunkKey, CopysetId};
use tokio::sync::watch;

use super::checkpoint::{Job, Outcome};
use super::drain::Drainer;
use super::error::StoreError;
use super::format::FileId;
use super::options::CopysetRecord;
use super::overlay::Owner;
use super::shard::Shard;
use super::stage::Staged;
use super::table::ChunkRecord;
use super::trash::Trash;

/// What is to be done; everything the checkpoint thread needs for it.
pub enum Swap {
    Install { record: CopysetRecord, gone: Vec<ChunkKey>, staged: Arc<Mutex<Staged>> },
    Trash(Trash),
}

/// What was done.
pub enum Swapped {
    Installed {
        owner: Owner,
        applied: u64,
        chunks: Vec<(ChunkKey, ChunkRecord)>,
    },
    /// With the admission it had.
    Trashed(u64, Trash),
    /// There was no such replica.
    Nothing,
}

pub type Swapping = watch::Receiver<Option<Outcome<Swapped>>>;

impl Drainer {
    /// On the checkpoint thread.
    pub fn swap(&mut self, swap: Swap) -> Result<Swapped, StoreError> {
        match swap {
            Swap::Install { record, gone, staged } => {
                let mut staged = staged.lock().unwrap_or_else(PoisonError::into_inner);
                staged.sync_dirs()?;
                self.volumes.extend(staged.volumes());
                // Before: a batch that failed may be there nevertheless, and then it needs the files.
                staged.let_go();
                let (owner, chunks) =
                    self.catalog.install(&record, &gone, staged.chunks(), staged.generation())?;
                Ok(Swapped::Installed { owner, applied: record.applied, chunks })
            }
            Swap::Trash(trash) => Ok(match self.catalog.trash(&trash)? {
                Some(admission) => Swapped::Trashed(admission, trash),
                None => Swapped::Nothing,
            }),
        }
    }
}

/// Waits until nothing is frozen or being swapped, then does what `make` says. Cancel-safe: once begun it goes on by
/// itself.
pub async fn run(shard: Rc<RefCell<Shard>>, make: impl FnOnce(&Shard) -> Swap) -> Result<(), StoreError> {
    let mut outcome = loop {
        let (draining, swapping) = {
            let mut shard = shard.borrow_mut();
            shard.settle();
            if let Some(failed) = shard.catalog.failed() {
                return Err(failed.clone());
            }
            let busy = (shard.draining.as_ref().map(|d| d.outcome.clone()), shard.swapping.clone());
            if let (None, None) = busy {
                let swap = make(&shard);
                let (sender, outcome) = watch::channel(None);
                shard.thread.send(Job::Swap { swap, outcome: sender })?;
                shard.swapping = Some(outcome.clone());
                break outcome;
            }
            busy
        };
        // A drain that found no space says so here, and is tried again by whoever makes checkpoints.
        if let Some(mut draining) = draining {
            let _ = draining.wait_for(Option::is_some).await;
        } else if let Some(mut swapping) = swapping {
            let _ = swapping.wait_for(Option::is_some).await;
        }
    };
    let swapped = match outcome.wait_for(Option::is_some).await {
        Ok(swapped) => swapped.clone().expect("waited for").map(drop),
        Err(_) => Err(StoreError::Closed),
    };
    shard.borrow_mut().settle();
    swapped
}

impl Shard {
    /// What there is to give up, and what to put in its place.
    pub fn install(&self, record: CopysetRecord, staged: Arc<Mutex<Staged>>) -> Swap {
        let gone = self.read_table().of_copyset(record.copyset).into_iter().map(|(key, _)| key).collect();
        Swap::Install { record, gone, staged }
    }

    pub fn trash(&self, copyset: CopysetId, since_unix_ms: u64) -> Swap {
        Swap::Trash(Trash { copyset, since_unix_ms, chunks: self.read_table().of_copyset(copyset) })
    }

    /// The batch is durable: memory follows.
    pub(super) fn swapped(&mut self, swapped: &Swapped) {
        match swapped {
            Swapped::Installed { owner, applied, chunks } => {
                let removed = self.forget(owner.copyset, chunks.iter().map(|(key, _)| *key));
                let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
                for (key, record) in chunks {
                    table.put(*key, Some(record.clone()));
                }
                drop(table);
                self.admissions.insert(owner.copyset, owner.admission);
                self.installed.insert(owner.copyset, *applied);
                let _ = self.thread.send(Job::Remove { files: removed });
            }
            Swapped::Trashed(admission, trash) => {
                self.forget(trash.copyset, std::iter::empty());
                let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
                table.put_trash(*admission, trash.clone());
                drop(table);
                self.admissions.remove(&trash.copyset);
                self.installed.remove(&trash.copyset);
            }
            Swapped::Nothing => {}
        }
        self.changed_all();
        self.version += 1;
        self.refresh_space();
    }

    /// All that memory has of a replica, and of chunks that are about to become its own. Gives the files it had.
    fn forget(&mut self, copyset: CopysetId, also: impl Iterator<Item = ChunkKey>) -> Vec<FileId> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let old = table.of_copyset(copyset);
        let keys: HashSet<ChunkKey> = old.iter().map(|(key, _)| *key).chain(also).collect();
        for (key, _) in &old {
            table.put(*key, None);
        }
        drop(table);
        for key in &keys {
            self.open_chunks.forget(*key);
        }
        self.active
            .forget(|key, owner| keys.contains(&key) || owner.is_some_and(|owner| owner.copyset == copyset));
        old.into_iter().map(|(key, record)| FileId::new(self.cluster, key, record.generation)).collect()
    }
}
