//! What the files of one chunkserver hold, with no chunkserver running: every block of every replica, read through.
//!
//! ```text
//!  log ──recovered as at a start──▶ every entry after the checkpoint ──apply──▶ overlay ─┐
//!  chunk files, catalog ──opened as at a start, for reading alone──────────────────────┴─▶ each block ─▶ report, export
//! ```
//!
//! What always holds:
//!
//! - Not a byte of the directory changes, and no chunkserver can start on it meanwhile. What a start would put right is
//!   put right in memory.
//! - A block that cannot be read is named; in an export it is a text that says so, never zeroes.
//!
//! It does not know which of the last entries of a log are committed: that is what a majority of the replicas has, and
//! this is one of them. So all are applied, and the report says where the log ends ([`ReplicaSeen::last`]). Of three
//! directories the one whose log ends last, by term and then index, has everything that was acknowledged.
//!
//! Start at [`inspect`].

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use evolute_daemon::in_one_line;
use evolute_protocol::geometry::{BLOCK_BYTES, CHUNK_BYTES};
use evolute_protocol::id::{ChunkKey, VolumeId};
use evolute_raft::{GroupId, LogError, LogOwner, Member, OfflineLog, Position, ProcessId, voters_of};
use serde::Serialize;

use crate::chunk_store::{ChunkStore, CopysetRecord, Extent, StoreError};
use crate::copyset::apply::Replica;
use crate::copyset::chunkserver_of;
use crate::copyset::state::{Created, State, restore};
use crate::data_dir::{DataDir, DataDirError};
use crate::impossible::{FenceSeen, impossible_fences};

/// Why nothing can be said of a directory.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("the chunk store cannot be opened")]
    Store(#[from] StoreError),
    #[error("the log cannot be read")]
    Log(#[from] LogError),
    /// It would change what is looked at.
    #[error("{0} is inside the data directory; export to somewhere else")]
    ExportInside(PathBuf),
    #[error("cannot export to {path}")]
    Export { path: PathBuf, source: io::Error },
}

/// What a directory holds. Printed as JSON: `docs/cli.md`.
#[derive(Debug, Serialize)]
pub struct Inspection {
    pub cluster: String,
    pub chunkserver: u32,
    pub replicas: Vec<ReplicaSeen>,
    /// Copysets whose replica here was being removed.
    pub removed: Vec<u32>,
    /// Files that were written, by volume.
    pub exports: BTreeMap<u64, PathBuf>,
}

#[derive(Debug, Serialize)]
pub struct ReplicaSeen {
    pub copyset: u32,
    pub replica: u64,
    /// Why a chunkserver could not run it. Its chunks are then those of the last checkpoint.
    pub trouble: Option<String>,
    /// Of its vote.
    pub term: Option<u64>,
    /// Chunk files hold everything up to here, which was committed.
    pub checkpointed: Option<At>,
    /// The log begins after this.
    pub purged: Option<At>,
    /// The log ends here, and so do the chunks of this report.
    pub last: Option<At>,
    /// Fences that no writer can have come with: volumes that nobody is served of.
    pub impossible_fences: Vec<FenceSeen>,
    /// As of the last entry; of a membership that was changing, the old and the new ones.
    pub members: Vec<MemberSeen>,
    pub chunks: Vec<ChunkSeen>,
}

/// A place in a copyset's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct At {
    pub term: u64,
    pub index: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemberSeen {
    pub replica: u64,
    pub chunkserver: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChunkSeen {
    pub volume: u64,
    pub chunk: u32,
    /// That hold something else than zeroes.
    pub blocks: usize,
    /// Whose bytes are not what was written, or cannot be read.
    pub unreadable: Vec<u16>,
}

/// What stands in an export for a block that cannot be read.
const UNREADABLE: &[u8; 32] = b"evolute: block cannot be read.\n\0";
/// Blocks read at a time.
const BLOCKS_AT_ONCE: u16 = 256;
const BLOCKS: u16 = 4096;
const _: () = assert!(BLOCKS as u64 * BLOCK_BYTES == CHUNK_BYTES && BLOCKS.is_multiple_of(BLOCKS_AT_ONCE));

impl Inspection {
    /// All of it can be read, and a chunkserver could run every replica.
    pub fn is_sound(&self) -> bool {
        self.replicas.iter().all(|replica| {
            replica.trouble.is_none()
                && replica.impossible_fences.is_empty()
                && replica.chunks.iter().all(|chunk| chunk.unreadable.is_empty())
        })
    }

    pub fn words(&self) -> String {
        let mut out = format!("chunkserver {} of cluster {}\n", self.chunkserver, self.cluster);
        let at = |at: Option<At>| at.map_or("nothing".to_owned(), |at| format!("{}.{}", at.term, at.index));
        for seen in &self.replicas {
            let blocks: usize = seen.chunks.iter().map(|chunk| chunk.blocks).sum();
            let _ = writeln!(
                out,
                "copyset {}: replica {}, log up to {}, chunk files up to {}; {} chunks, {blocks} blocks",
                seen.copyset,
                seen.replica,
                at(seen.last),
                at(seen.checkpointed),
                seen.chunks.len(),
            );
            if let Some(trouble) = &seen.trouble {
                let _ = writeln!(out, "  CANNOT RUN: {trouble}");
            }
            for fence in &seen.impossible_fences {
                let _ = writeln!(
                    out,
                    "  IMPOSSIBLE FENCE: volume {} at {}.{}; if it was not deleted, run `evolute-chunkserver repair --unfence {}`",
                    fence.volume, fence.attachment, fence.incarnation, fence.volume
                );
            }
            for chunk in seen.chunks.iter().filter(|chunk| !chunk.unreadable.is_empty()) {
                let _ = writeln!(
                    out,
                    "  UNREADABLE: volume {}, chunk {}, blocks {:?}",
                    chunk.volume, chunk.chunk, chunk.unreadable
                );
            }
        }
        for copyset in &self.removed {
            let _ = writeln!(out, "copyset {copyset}: its replica was being removed");
        }
        for (volume, file) in &self.exports {
            let _ = writeln!(out, "volume {volume} is in {}", file.display());
        }
        out
    }
}

/// Reads everything in a chunkserver's data directory. `export`: a folder in which each volume becomes a raw image, as
/// far as it is here. Needs a tokio runtime; waits for the disk.
pub async fn inspect(dir: &Path, export: Option<&Path>) -> Result<Inspection, InspectError> {
    let data_dir = DataDir::look(dir)?;
    let mut export = export.map(|to| Exporting::begin(to, dir)).transpose()?;
    let (store, identity, opened) = ChunkStore::look(&data_dir.store())?;
    let process = ProcessId(u64::from(identity.chunkserver.0));
    let log = OfflineLog::open(&data_dir.log(), LogOwner { cluster: identity.cluster.0, process })?;
    let store = Rc::new(RefCell::new(store));
    let mut replicas = Vec::new();
    for record in &opened.copysets {
        let (mut seen, state) = replay(record, &log, &store);
        let chunks = store.borrow().chunks_from(record.copyset, None);
        for chunk in chunks {
            seen.chunks.push(read_through(&store, chunk, export.as_mut()).await?);
        }
        if let Some(state) = state {
            let has_data = |volume: VolumeId| {
                let mut of = seen.chunks.iter().filter(|chunk| chunk.volume == volume.0);
                of.any(|chunk| chunk.blocks > 0 || !chunk.unreadable.is_empty())
            };
            let fences = impossible_fences(record.copyset, &state.borrow(), has_data).collect();
            seen.impossible_fences = fences;
        }
        replicas.push(seen);
    }
    Ok(Inspection {
        cluster: identity.cluster.to_string(),
        chunkserver: identity.chunkserver.0,
        replicas,
        removed: opened.removed.iter().map(|copyset| copyset.0).collect(),
        exports: export.map_or_else(BTreeMap::new, Exporting::finish),
    })
}

/// Applies to the store what the log has beyond the checkpoint, and gives the state after that.
pub fn replay(
    record: &CopysetRecord,
    log: &OfflineLog,
    store: &Rc<RefCell<ChunkStore>>,
) -> (ReplicaSeen, Option<Rc<RefCell<State>>>) {
    let group = GroupId(u64::from(record.copyset.0));
    let in_log = log.group(group);
    let mut seen = ReplicaSeen {
        copyset: record.copyset.0,
        replica: in_log.map_or(0, |group| group.replica.0),
        trouble: None,
        term: in_log.and_then(|group| group.term),
        checkpointed: None,
        purged: in_log.and_then(|group| group.purged).map(at),
        last: in_log.and_then(|group| group.last).map(at),
        impossible_fences: Vec::new(),
        members: Vec::new(),
        chunks: Vec::new(),
    };
    let (state, created) = match restore(record) {
        Ok(restored) => restored,
        Err(error) => {
            seen.trouble = Some(in_one_line(&error));
            return (seen, None);
        }
    };
    seen.replica = created.replica.0;
    seen.checkpointed = state.applied().map(at);
    let state = Rc::new(RefCell::new(state));
    let mut machine = Replica::new(record.copyset, created.clone(), Rc::clone(&state), Rc::clone(store));
    let me = evolute_raft::ReplicaId(created.replica.0);
    seen.trouble = log.replay(group, me, &mut machine).err().map(|error| in_one_line(&error));
    seen.members = members(&state.borrow(), &created);
    drop(machine);
    (seen, Some(state))
}

fn at(position: Position) -> At {
    At { term: position.term, index: position.index }
}

fn members(state: &State, created: &Created) -> Vec<MemberSeen> {
    let members = state.membership().and_then(|membership| voters_of(membership));
    let members = members.unwrap_or_else(|| created.raft_members());
    let seen =
        |member: Member| MemberSeen { replica: member.replica.0, chunkserver: chunkserver_of(member).0 };
    members.into_iter().map(seen).collect()
}

async fn read_through(
    store: &RefCell<ChunkStore>,
    key: ChunkKey,
    mut export: Option<&mut Exporting>,
) -> Result<ChunkSeen, InspectError> {
    let (volume, chunk) = (key.volume.0, key.index.0);
    let mut seen = ChunkSeen { volume, chunk, blocks: 0, unreadable: Vec::new() };
    for first in (0..BLOCKS).step_by(usize::from(BLOCKS_AT_ONCE)) {
        let reading = store.borrow().extents(key, first, BLOCKS_AT_ONCE);
        for extent in reading.await {
            match &extent {
                Extent::Data { crcs, .. } => seen.blocks += crcs.len(),
                Extent::Damaged { first, count } => seen.unreadable.extend(*first..first + count),
            }
            if let Some(export) = &mut export {
                export.put(key, &extent)?;
            }
        }
    }
    if let Some(export) = export {
        export.reach(key)?;
    }
    Ok(seen)
}

/// A raw, sparse file for each volume.
struct Exporting {
    folder: PathBuf,
    files: BTreeMap<VolumeId, Exported>,
}

struct Exported {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Exporting {
    fn begin(folder: &Path, data_dir: &Path) -> Result<Self, InspectError> {
        let failed = |source| InspectError::Export { path: folder.to_owned(), source };
        // Where it will be, looked at before anything is made.
        let mut there = std::path::absolute(folder).map_err(failed)?;
        while !there.exists() && there.pop() {}
        let data_dir = data_dir.canonicalize().map_err(failed)?;
        if there.canonicalize().map_err(failed)?.starts_with(data_dir) {
            return Err(InspectError::ExportInside(folder.to_owned()));
        }
        std::fs::create_dir_all(folder).map_err(failed)?;
        Ok(Self { folder: folder.to_owned(), files: BTreeMap::new() })
    }

    /// The volume's file. One that is there already is somebody's: it is not written over.
    fn of(&mut self, volume: VolumeId) -> Result<&mut Exported, InspectError> {
        let path = self.folder.join(format!("{volume}.raw"));
        match self.files.entry(volume) {
            Entry::Occupied(there) => Ok(there.into_mut()),
            Entry::Vacant(new) => match File::create_new(&path) {
                Ok(file) => Ok(new.insert(Exported { path, file, bytes: 0 })),
                Err(source) => Err(InspectError::Export { path, source }),
            },
        }
    }

    fn put(&mut self, key: ChunkKey, extent: &Extent) -> Result<(), InspectError> {
        let to = self.of(key.volume)?;
        let at = u64::from(key.index.0) * CHUNK_BYTES + u64::from(extent.first()) * BLOCK_BYTES;
        let written = match extent {
            Extent::Data { data, .. } => to.file.write_all_at(data, at),
            Extent::Damaged { count, .. } => {
                let bytes = u64::from(*count) * BLOCK_BYTES / UNREADABLE.len() as u64;
                to.file.write_all_at(&UNREADABLE.repeat(usize::try_from(bytes).expect("of a chunk")), at)
            }
        };
        written.map_err(|source| InspectError::Export { path: to.path.clone(), source })
    }

    /// The file ends after this chunk, at least, whether or not the chunk ends with zeroes.
    fn reach(&mut self, key: ChunkKey) -> Result<(), InspectError> {
        let to = self.of(key.volume)?;
        to.bytes = to.bytes.max((u64::from(key.index.0) + 1) * CHUNK_BYTES);
        to.file.set_len(to.bytes).map_err(|source| InspectError::Export { path: to.path.clone(), source })
    }

    fn finish(self) -> BTreeMap<u64, PathBuf> {
        self.files.into_iter().map(|(volume, exported)| (volume.0, exported.path)).collect()
    }
}
