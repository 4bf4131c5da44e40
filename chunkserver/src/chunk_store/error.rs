//! What can go wrong in the store, one variant per thing the owner can do next.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use evolute_protocol::id::{BlockIndex, ChunkserverId, ClusterId};

/// Cheap to clone: a dead store gives the same answer to everyone who asks.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Written by a newer Evolute. Run that one.
    #[error("{path} has format {found}; this program reads up to {supported}")]
    NewerVersion { path: PathBuf, found: u32, supported: u32 },
    /// Somebody else's data directory. Nothing was touched.
    #[error("{path} belongs to cluster {found}, not to {expected}")]
    WrongCluster { path: PathBuf, found: ClusterId, expected: ClusterId },
    /// Another chunkserver's disk (or an old token). Nothing was touched.
    #[error("{path} belongs to {found}, not to {expected}, or its token is another one")]
    WrongChunkserver { path: PathBuf, found: ChunkserverId, expected: ChunkserverId },
    /// The directory holds files that are not ours: it is not formatted over.
    #[error("{path} is not empty (it has {found:?}) and is not a chunk store")]
    NotEmpty { path: PathBuf, found: String },
    /// Something the store cannot do without is missing or unreadable. This disk must be refilled from peers.
    #[error("{path} is damaged: {what}")]
    Damaged { path: PathBuf, what: String },
    /// The disk is full. Nothing is lost; try the checkpoint again once there is space.
    #[error("no space: {needed} bytes needed, {available} available")]
    NoSpace { needed: u64, available: u64 },
    /// What the disk holds is unknown from here on: a sync or a write failed. The store is dead and says so to
    /// every later call; only a restart (and the log) tells what is there. Never retried: after a failed fsync the
    /// kernel calls the lost pages clean (ATC'20).
    #[error("{doing} failed; the store is dead")]
    SyncFailed {
        doing: String,
        #[source]
        source: Arc<io::Error>,
    },
    /// The directory could not be opened, created or listed.
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: Arc<io::Error>,
    },
    /// The checkpoint thread is gone: the store is being closed.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    pub(crate) fn io(doing: impl Into<String>, source: io::Error) -> Self {
        Self::Io { doing: doing.into(), source: Arc::new(source) }
    }

    pub(crate) fn sync_failed(doing: impl Into<String>, source: io::Error) -> Self {
        Self::SyncFailed { doing: doing.into(), source: Arc::new(source) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// What the disk holds for this block is not what was written, or cannot be read at all. Get it from a peer.
    #[error("{block} cannot be read")]
    Unreadable { block: BlockIndex },
}
