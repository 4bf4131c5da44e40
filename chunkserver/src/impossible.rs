//! What no history of ours can have left in a data directory, and how it is put right: votes beyond every term, which keep
//! a replica from starting, and fences beyond every writer, which keep a volume from being served.
//!
//! Votes are lowered in the log, with the chunkserver stopped. A fence is part of what all replicas of a copyset agree on,
//! so it is not touched here: it is written down which are to go ([`Unfencing`]), and after the start the leader takes
//! each back with an entry of the log, in the same place for all of them. Why either is safe: `docs/safety.md`.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::{CopysetId, VolumeId};
use evolute_protocol::wire::request::Fence;
use evolute_raft::{LogError, LogOptions, LogOwner, OfflineLog, ProcessId};
use serde::{Deserialize, Serialize};

use crate::chunk_store::{ChunkStore, StoreError};
use crate::copyset::registry::Registry;
use crate::copyset::state::State;
use crate::data_dir::{DataDir, DataDirError};
use crate::inspect::replay;

const UNFENCING_FILE: &str = "unfence.json";
/// A leader is found, and an entry committed, well within it.
const AGAIN_EVERY: Duration = Duration::from_secs(1);

/// Why nothing was repaired.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("the chunk store cannot be opened")]
    Store(#[from] StoreError),
    #[error("the log cannot be read or written")]
    Log(#[from] LogError),
    #[error("cannot write {file}")]
    Write { file: PathBuf, source: io::Error },
    #[error("a thread for the log could not run")]
    Thread(#[source] io::Error),
}

/// What there is to repair, or was. Printed as JSON: `docs/cli.md`.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Repair {
    pub votes: Vec<VoteSeen>,
    pub fences: Vec<FenceSeen>,
    /// Whether it was done, or only looked at.
    pub repaired: bool,
}

/// A vote in a term that no leader can have been elected in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct VoteSeen {
    pub copyset: u64,
    pub replica: u64,
    pub term: u64,
    /// What it becomes; none when a leader was elected in such a term, after all.
    pub lowered_to: Option<u64>,
}

/// A fence that no writer can have come with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FenceSeen {
    pub copyset: u32,
    pub volume: u64,
    pub attachment: u32,
    pub incarnation: u32,
}

impl FenceSeen {
    fn of(copyset: CopysetId, volume: VolumeId, epoch: Epoch) -> Self {
        let Epoch { attachment, incarnation } = epoch;
        Self { copyset: copyset.0, volume: volume.0, attachment, incarnation }
    }

    fn fence(&self) -> Fence {
        let epoch = Epoch { attachment: self.attachment, incarnation: self.incarnation };
        Fence { volume: VolumeId(self.volume), epoch }
    }
}

impl Repair {
    pub fn is_empty(&self) -> bool {
        self.votes.is_empty() && self.fences.is_empty()
    }

    /// Nothing is left that this command could put right, or could not.
    pub fn is_done(&self) -> bool {
        self.is_empty() || (self.repaired && self.votes.iter().all(|vote| vote.lowered_to.is_some()))
    }

    pub fn words(&self) -> String {
        let mut out = String::new();
        for vote in &self.votes {
            let _ = match vote.lowered_to {
                Some(term) => writeln!(
                    out,
                    "copyset {}: replica {} voted in term {}, which no election reaches; lowered to {term}",
                    vote.copyset, vote.replica, vote.term
                ),
                None => writeln!(
                    out,
                    "copyset {}: replica {} has entries of impossible terms; its vote of term {} stays",
                    vote.copyset, vote.replica, vote.term
                ),
            };
        }
        for fence in &self.fences {
            let epoch = fence.fence().epoch;
            let _ = writeln!(
                out,
                "copyset {}: volume {} is fenced at {epoch}; its leader takes that back",
                fence.copyset, fence.volume
            );
        }
        out.push_str(match (self.is_empty(), self.repaired) {
            (true, _) => "nothing to repair\n",
            (false, true) => "done; start the chunkserver\n",
            (false, false) => "nothing was changed; say --yes to have it done\n",
        });
        out
    }
}

/// Fences of a replica that cannot be. `has_data`: whether anything of a volume can be read; of one that was deleted
/// nothing can.
pub fn impossible_fences<'a>(
    copyset: CopysetId,
    state: &'a State,
    has_data: impl Fn(VolumeId) -> bool + 'a,
) -> impl Iterator<Item = FenceSeen> + 'a {
    state.writers().iter().filter_map(move |(volume, writers)| {
        let epoch = writers.epoch();
        let possible = epoch.is_a_writers() || (epoch == Epoch::DELETED && !has_data(*volume));
        (!possible).then(|| FenceSeen::of(copyset, *volume, epoch))
    })
}

/// Whatever these volumes are fenced at.
fn named_fences<'a>(
    copyset: CopysetId,
    state: &'a State,
    volumes: &'a [u64],
) -> impl Iterator<Item = FenceSeen> + 'a {
    let named = state
        .writers()
        .iter()
        .filter(|(volume, writers)| volumes.contains(&volume.0) && writers.epoch() != Epoch::default());
    named.map(move |(volume, writers)| FenceSeen::of(copyset, *volume, writers.epoch()))
}

/// Looks through the directory of a chunkserver that does not run and, if told to, puts right what cannot be. `above`: no
/// vote is lowered below this term. `unfence`: volumes whose fences nobody came with, possible or not. Needs a tokio
/// runtime; waits for the disk.
pub fn repair(dir: &Path, above: u64, unfence: &[u64], yes: bool) -> Result<Repair, RepairError> {
    let data_dir = DataDir::look(dir)?;
    let (store, identity, opened) = ChunkStore::look(&data_dir.store())?;
    let process = ProcessId(u64::from(identity.chunkserver.0));
    let owner = LogOwner { cluster: identity.cluster.0, process };
    let log = OfflineLog::open(&data_dir.log(), owner)?;
    let votes = log.impossible_votes(above);
    let store = Rc::new(RefCell::new(store));
    let mut fences = Vec::new();
    for record in &opened.copysets {
        let (_, Some(state)) = replay(record, &log, &store) else { continue };
        let state = state.borrow();
        // Whether a volume that looks deleted was deleted, an operator knows.
        fences.extend(impossible_fences(record.copyset, &state, |_| false));
        fences.extend(named_fences(record.copyset, &state, unfence));
    }
    fences.sort_unstable();
    fences.dedup();
    let file_bytes = log.file_bytes();
    drop((log, store));
    let seen = votes.iter().map(|vote| VoteSeen {
        copyset: vote.group.0,
        replica: vote.replica.0,
        term: vote.term,
        lowered_to: vote.lowered,
    });
    let repair = Repair { votes: seen.collect(), fences, repaired: yes };
    if yes && !repair.votes.is_empty() {
        let (log_dir, mut options) = (data_dir.log(), LogOptions::new(owner));
        options.file_bytes = file_bytes.unwrap_or(options.file_bytes);
        let (tell, told) = std::sync::mpsc::channel();
        let lowering = evolute_raft::spawn_thread("repair", move || async move {
            let _ = tell.send(evolute_raft::lower_votes(&log_dir, options, &votes).await);
        });
        lowering.map_err(RepairError::Thread)?;
        told.recv().map_err(|gone| RepairError::Thread(io::Error::other(gone)))??;
    }
    if yes && !repair.fences.is_empty() {
        let file = dir.join(UNFENCING_FILE);
        write(&file, &repair.fences).map_err(|source| RepairError::Write { file, source })?;
    }
    Ok(repair)
}

fn write(file: &Path, fences: &[FenceSeen]) -> io::Result<()> {
    let unfinished = file.with_extension("json.new");
    let mut new = fs::File::create(&unfinished)?;
    new.write_all(&serde_json::to_vec(fences)?)?;
    new.sync_all()?;
    fs::rename(&unfinished, file)?;
    fs::File::open(file.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// The fences that an operator has taken back, until each is.
pub struct Unfencing {
    file: PathBuf,
    left: Vec<FenceSeen>,
}

impl Unfencing {
    /// What was written down, if anything was. A damaged file is told and left alone: the command writes another.
    pub fn begun(data_dir: &Path) -> Option<Self> {
        let file = data_dir.join(UNFENCING_FILE);
        let bytes = match fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::error!(file = %file.display(), %error, "fences to take back cannot be read");
                return None;
            }
        };
        match serde_json::from_slice(&bytes) {
            Ok(left) => Some(Self { file, left }),
            Err(error) => {
                tracing::error!(file = %file.display(), %error, "fences to take back do not make sense");
                None
            }
        }
    }

    /// Asks every leader that is here, again and again, until it shows in the replicas that are here.
    pub async fn run(mut self, registry: Rc<Registry>) {
        loop {
            self.left.retain(|fence| {
                let Some(copyset) = registry.get(CopysetId(fence.copyset)) else { return false };
                let left = copyset.unfence(fence.fence());
                if !left {
                    tracing::info!(copyset = %copyset.id(), volume = fence.volume, "a fence that nobody came with is taken back");
                }
                left
            });
            if self.left.is_empty() {
                break;
            }
            tokio::time::sleep(AGAIN_EVERY).await;
        }
        if let Err(error) = fs::remove_file(&self.file) {
            tracing::warn!(file = %self.file.display(), %error, "fences that were taken back are still written down");
        }
    }
}
