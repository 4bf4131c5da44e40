//! The control plane's services, generated from `proto/evolute.proto`, and the words of its refusals.
//!
//! A refusal is a gRPC status whose metadata carries a stable word under [`ERROR_KEY`], so that a program decides
//! by [`ErrorWord`] and a person reads the message.

use std::fmt;

use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

#[allow(clippy::all, clippy::cast_possible_truncation, clippy::wildcard_imports, missing_docs)]
mod generated {
    tonic::include_proto!("evolute.v1");
}
pub use generated::{
    AbandonImportRequest, AbandonImportResponse, AcceptMdsRequest, AcceptMdsResponse, AllocateSegmentRequest,
    AttachRequest, AttachResponse, Attachment, BeginImportRequest, ChangeMembers, ChunkserverAddress,
    ChunkserverStatus, ClusterStatus, CopysetInventory, CopysetRoute, CopysetStatus, CreateReplica,
    CreateVolumeRequest, DecideRequest, DecideResponse, Decision, DeleteVolumeRequest, DeleteVolumeResponse,
    DetachRequest, DetachResponse, DropVolume, FinishImportRequest, FinishImportResponse, Health, Inventory,
    ListVolumesRequest, ListVolumesResponse, LogEnd, MapRequest, MdsState, MdsStatus, MemberReport, Order,
    Orders, RecallResponse, RegisterRequest, RegisterResponse, RemoveReplica, RepairReason, RepairStage,
    RepairStatus, ReplicaReport, ReplicaRoute, ReplicaStatus, Report, RetireRequest, RetireResponse, Role,
    Segment, ShowVolumeRequest, Start, StartDecision, StatusRequest, TransferLeader, Volume, VolumeInventory,
    VolumeMap, VolumeUse, chunkservers_client, chunkservers_server, cluster_client, cluster_server, order,
    volumes_client, volumes_server,
};

/// The metadata key under which a refusal carries its [`ErrorWord`].
pub const ERROR_KEY: &str = "evolute-error";

/// The metadata key under which who asks about volumes names the cluster it belongs to, as 32 hexadecimal digits. None:
/// it belongs to none yet, or is an operator's tool.
pub const CLUSTER_KEY: &str = "evolute-cluster";

/// Why the control plane refused, one word per thing the caller can do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorWord {
    /// Ask another MDS: this one does not lead. Retry at once elsewhere.
    NotLeader,
    /// Come back a little later.
    Busy,
    /// No volume, copyset or chunkserver of that name.
    NotFound,
    /// A volume of that name exists.
    Exists,
    /// The request cannot be right: a bad size, name or index.
    Invalid,
    /// Somebody else holds the volume. Detach there, or take it over.
    AttachedElsewhere,
    /// A newer attachment exists. Stop; never retry.
    FencedOut,
    /// Not enough chunkservers in different zones, or no room on them.
    NoPlacement,
    /// Wrong token for that chunkserver id.
    WrongToken,
    /// Another running process uses that chunkserver id.
    DuplicateChunkserver,
    /// The caller belongs to another cluster.
    WrongCluster,
    /// This MDS was put back from a copy that is older than what its chunkservers have obeyed. Wait; a person may have to
    /// say that it is to go on.
    MdsPutBack,
}

impl ErrorWord {
    const ALL: [(Self, &'static str, Code); 12] = [
        (Self::NotLeader, "not-leader", Code::Unavailable),
        (Self::Busy, "busy", Code::Unavailable),
        (Self::NotFound, "not-found", Code::NotFound),
        (Self::Exists, "exists", Code::AlreadyExists),
        (Self::Invalid, "invalid", Code::InvalidArgument),
        (Self::AttachedElsewhere, "attached-elsewhere", Code::FailedPrecondition),
        (Self::FencedOut, "fenced-out", Code::FailedPrecondition),
        (Self::NoPlacement, "no-placement", Code::ResourceExhausted),
        (Self::WrongToken, "wrong-token", Code::PermissionDenied),
        (Self::DuplicateChunkserver, "duplicate-chunkserver", Code::AlreadyExists),
        (Self::WrongCluster, "wrong-cluster", Code::PermissionDenied),
        (Self::MdsPutBack, "mds-put-back", Code::Unavailable),
    ];

    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }

    /// A status that carries this word and a message for a person.
    pub fn status(self, message: impl Into<String>) -> Status {
        let code = Self::ALL.iter().find(|row| row.0 == self).map_or(Code::Internal, |row| row.2);
        let mut status = Status::new(code, message);
        status.metadata_mut().insert(ERROR_KEY, MetadataValue::from_static(self.as_str()));
        status
    }

    /// The word a status carries, if it is one of ours.
    pub fn of(status: &Status) -> Option<Self> {
        let word = status.metadata().get(ERROR_KEY)?.to_str().ok()?;
        Self::ALL.iter().find(|row| row.1 == word).map(|row| row.0)
    }
}

impl fmt::Display for ErrorWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::ErrorWord;

    #[test]
    fn a_refusal_keeps_its_word_through_a_status() {
        for (word, text, code) in ErrorWord::ALL {
            let status = word.status("why");
            assert_eq!((ErrorWord::of(&status), status.code(), word.as_str()), (Some(word), code, text));
        }
        assert_eq!(ErrorWord::of(&tonic::Status::internal("x")), None);
    }
}
