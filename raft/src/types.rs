//! Every openraft type this crate names, once. openraft's generics stop here.

use bytes::Bytes;
use openraft::OptionalSend;
use openraft::alias::{
    DefaultEntryOf, EntryOf, EntryPayloadOf, LogIdOf, SnapshotMetaOf, SnapshotOf, StoredMembershipOf, VoteOf,
};
use openraft::impls::leader_id_std;

use crate::group::Answer;
use crate::machine::{Machine, SnapshotData};
use crate::runtime::LocalRt;
use crate::{Command, Member, Position, ProcessId, ReplicaId};

/// openraft's type parameter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Types;

/// What a membership knows of a replica besides its id: the process that hosts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Host(pub u64);

/// Standard Raft: at most one leader per term, so a log id is term and index.
pub type LeaderId = leader_id_std::LeaderId<u64, u64>;

impl openraft::RaftTypeConfig for Types {
    type D = Command;
    type R = Bytes;
    type NodeId = u64;
    type Node = Host;
    type Term = u64;
    type LeaderId = LeaderId;
    type Vote = openraft::impls::Vote<LeaderId>;
    type Payload = openraft::EntryPayload<Command, u64, Host>;
    type Entry = DefaultEntryOf<Self>;
    type Responder<T>
        = Answer<T>
    where
        T: OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: OptionalSend + 'static;
    type AsyncRuntime = LocalRt;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

pub type Raft = openraft::Raft<Types, Machine>;
pub type LogId = LogIdOf<Types>;
pub type Vote = VoteOf<Types>;
pub type Entry = EntryOf<Types>;
pub type Payload = EntryPayloadOf<Types>;
pub type Membership = openraft::Membership<u64, Host>;
pub type StoredMembership = StoredMembershipOf<Types>;
pub type SnapshotMeta = SnapshotMetaOf<Types>;
pub type Snapshot = SnapshotOf<Types, SnapshotData>;
pub type IoFlushed = openraft::storage::IOFlushed<Types>;
pub type LogState = openraft::storage::LogState<Types>;
pub type AppendRequest = openraft::raft::AppendEntriesRequest<Types>;
pub type AppendResult = openraft::raft::StreamAppendResult<Types>;
pub type VoteRequest = openraft::raft::VoteRequest<Types>;
pub type VoteResponse = openraft::raft::VoteResponse<Types>;
pub type TransferRequest = openraft::raft::TransferLeaderRequest<Types>;
pub type TransferResponse = openraft::raft::TransferLeaderResponse<Types>;
pub type SnapshotResponse = openraft::raft::SnapshotResponse<Types>;
pub type StreamingError = openraft::errors::StreamingError<Types>;
pub type RpcError = openraft::errors::RPCError<Types>;
pub type ClientWriteResult = openraft::raft::ClientWriteResult<Types>;

pub fn log_id(at: Position) -> LogId {
    LogId::new(at.term.into(), at.index)
}

pub fn position(id: &LogId) -> Position {
    Position { term: **id.committed_leader_id(), index: id.index() }
}

pub fn member(replica: u64, host: Host) -> Member {
    Member { replica: ReplicaId(replica), process: ProcessId(host.0) }
}
