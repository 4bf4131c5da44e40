//! Everything that can go wrong in the tool: one variant per thing the person can do next, each with its exit
//! status. The message says what happened, [`Failure::next`] what to do about it.

use std::io;
use std::path::PathBuf;

use evolute_protocol::rpc::ErrorWord;

use crate::size::NotASize;

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{what}")]
    Usage { what: String, next: Option<String> },
    #[error(transparent)]
    Size(#[from] NotASize),
    /// The control plane said no.
    #[error("{message}")]
    Refused { word: ErrorWord, message: String },
    /// No address of the list answered as the leader in time.
    #[error("no control plane answered at {addresses}: {last}")]
    Unreachable { addresses: String, last: String },
    /// The connection ended between the request and its answer.
    #[error("the connection to {address} ended before the answer to \"{doing}\": {message}")]
    Uncertain { address: String, doing: &'static str, message: String },
    #[error("the control plane at {address} answered with an error of its own: {message}")]
    ControlPlane { address: String, message: String },
    #[error("there is no chunkserver-{id}")]
    NoChunkserver { id: u32 },
    /// Somebody decided otherwise while we waited.
    #[error("chunkserver-{id} does not retire any more")]
    NotRetiring { id: u32 },
    #[error("{doing}: {source}")]
    Io { doing: String, source: io::Error },
    /// The image is not one that import reads.
    #[error("{} is {what}", path.display())]
    NotRaw { path: PathBuf, what: &'static str, next: String },
    #[error("writing to volume {volume} failed: {message}")]
    Volume { volume: String, message: String },
    #[error("interrupted")]
    Interrupted { left: String },
    /// The image is not, or not wholly, in a volume.
    #[error("{what}")]
    Import { what: String, next: String },
    /// A cluster of `evolute dev` cannot start, or cannot go on.
    #[error("{what}")]
    Dev { what: String, next: String },
}

impl Failure {
    /// What a script decides by; the table is in docs/cli.md.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Usage { .. } | Self::Size(_) | Self::NotRaw { .. } => 2,
            Self::Refused { word, .. } => match word {
                ErrorWord::Invalid => 2,
                ErrorWord::NotFound => 3,
                ErrorWord::Exists => 4,
                ErrorWord::AttachedElsewhere | ErrorWord::FencedOut => 5,
                ErrorWord::NotLeader | ErrorWord::Busy | ErrorWord::MdsPutBack => 6,
                ErrorWord::NoPlacement => 7,
                ErrorWord::WrongToken | ErrorWord::DuplicateChunkserver | ErrorWord::WrongCluster => 1,
            },
            Self::NoChunkserver { .. } => 3,
            Self::Unreachable { .. } => 6,
            Self::Uncertain { .. } => 8,
            Self::Interrupted { .. } => 130,
            Self::ControlPlane { .. }
            | Self::NotRetiring { .. }
            | Self::Io { .. }
            | Self::Volume { .. }
            | Self::Import { .. }
            | Self::Dev { .. } => 1,
        }
    }

    /// A stable word for `--json`.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Usage { .. } | Self::Size(_) => "invalid",
            Self::Refused { word, .. } => word.as_str(),
            Self::NoChunkserver { .. } => "not-found",
            Self::NotRetiring { .. } => "not-retiring",
            Self::Unreachable { .. } => "unreachable",
            Self::Uncertain { .. } => "uncertain",
            Self::ControlPlane { .. } => "control-plane",
            Self::Io { .. } => "io",
            Self::NotRaw { .. } => "not-raw",
            Self::Volume { .. } => "volume",
            Self::Interrupted { .. } => "interrupted",
            Self::Import { .. } => "import",
            Self::Dev { .. } => "dev",
        }
    }

    /// What the person can do about it.
    pub fn next(&self) -> Option<String> {
        let next = match self {
            Self::Usage { next, .. } => return next.clone(),
            Self::Size(_) | Self::Io { .. } => return None,
            Self::Refused { word, .. } => match word {
                ErrorWord::NotFound => "`evolute volume list` shows what there is",
                ErrorWord::Exists => "choose another name, or `evolute volume show` the one that is there",
                ErrorWord::AttachedElsewhere => {
                    "stop the backend that holds it (`evolute volume show` names it), or use --force to fence it out"
                }
                ErrorWord::NoPlacement => {
                    "three chunkservers in different zones with free space are needed; \
                     `evolute cluster status` shows those that are there"
                }
                ErrorWord::FencedOut => {
                    "somebody attached the volume meanwhile; `evolute volume show` names them"
                }
                ErrorWord::NotLeader | ErrorWord::Busy => "try again in a few seconds",
                ErrorWord::MdsPutBack => {
                    "`evolute cluster status` says what is missing; `evolute cluster accept-mds` what going on would mean"
                }
                ErrorWord::Invalid => "see `evolute help volume`",
                ErrorWord::WrongCluster => "check --mds: this is another cluster",
                ErrorWord::WrongToken | ErrorWord::DuplicateChunkserver => return None,
            },
            Self::NoChunkserver { .. } => "`evolute chunkserver list` shows those that registered",
            Self::NotRetiring { id } => {
                return Some(format!(
                    "somebody ran `evolute chunkserver unretire {id}`; ask before you retire it again"
                ));
            }
            Self::Unreachable { .. } => {
                "is evolute-mds running there? Give its address by --mds or EVOLUTE_MDS; \
                 `evolute dev --dir DIR` starts a cluster on this machine"
            }
            Self::Uncertain { .. } => {
                "it may have happened or not: look (`evolute volume list`) before you repeat it"
            }
            Self::ControlPlane { .. } => "its traces say more",
            Self::NotRaw { next, .. } | Self::Import { next, .. } | Self::Dev { next, .. } => {
                return (!next.is_empty()).then(|| next.clone());
            }
            Self::Volume { .. } => "`evolute cluster status` shows whether the cluster is healthy",
            Self::Interrupted { left } => return Some(left.clone()),
        };
        Some(next.to_owned())
    }

    pub fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}
