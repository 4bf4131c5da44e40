//! Every way the state can change, as it stands in the log.
//!
//! A command carries everything that apply may not find out by itself: times, random tokens and what placement
//! chose. So applying it is the same on every replica and at every replay.
//!
//! Encoding: one version byte, then a protobuf message. Field and variant numbers are never used twice: a log
//! written by an older version must be replayed for ever.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

use super::replace::Reason;

/// The version byte. A new variant or a new field does not raise it; a changed meaning does.
const VERSION: u8 = 1;

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Command {
    #[prost(message, tag = "1")]
    InitCluster(InitCluster),
    #[prost(message, tag = "2")]
    RegisterChunkserver(RegisterChunkserver),
    #[prost(message, tag = "3")]
    UpdateChunkserver(UpdateChunkserver),
    #[prost(message, tag = "4")]
    CreateCopysets(CreateCopysets),
    #[prost(message, tag = "5")]
    ReplicasCreated(ReplicasCreated),
    #[prost(message, tag = "6")]
    CreateVolume(CreateVolume),
    #[prost(message, tag = "7")]
    DeleteVolume(DeleteVolume),
    #[prost(message, tag = "8")]
    VolumeDropped(VolumeDropped),
    #[prost(message, tag = "9")]
    Attach(Attach),
    #[prost(message, tag = "10")]
    Detach(Detach),
    #[prost(message, tag = "11")]
    AllocateSegment(AllocateSegment),
    #[prost(message, tag = "12")]
    RetireChunkserver(RetireChunkserver),
    #[prost(message, tag = "13")]
    BeginReplace(BeginReplace),
    #[prost(message, tag = "14")]
    ReplaceDone(ReplaceDone),
    #[prost(message, tag = "15")]
    CancelReplace(CancelReplace),
    #[prost(message, tag = "16")]
    ReplaceUndone(ReplaceUndone),
    #[prost(message, tag = "40")]
    BeginReign(BeginReign),
    #[prost(message, tag = "41")]
    Adopt(Adopt),
    #[prost(message, tag = "42")]
    Accept(Accept),
    #[prost(message, tag = "50")]
    ChunkserverStarted(ChunkserverStarted),
    #[prost(message, tag = "51")]
    DecideChunkserver(DecideChunkserver),
    #[prost(message, tag = "60")]
    BeginImport(BeginImport),
    #[prost(message, tag = "61")]
    FinishImport(FinishImport),
    #[prost(message, tag = "62")]
    AbandonImport(AbandonImport),
}

/// The cluster gets its name. The first one wins; the outcome says which that was.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InitCluster {
    #[prost(bytes = "bytes", tag = "1")]
    pub cluster: Bytes,
}

/// A chunkserver that has no id yet.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RegisterChunkserver {
    #[prost(bytes = "bytes", tag = "1")]
    pub token: Bytes,
    /// The process that asks. It may have missed our answer and ask again: it gets the same one.
    #[prost(bytes = "bytes", tag = "2")]
    pub instance: Bytes,
    #[prost(string, tag = "3")]
    pub address: String,
    #[prost(string, tag = "4")]
    pub zone: String,
    #[prost(string, tag = "5")]
    pub server: String,
    #[prost(string, tag = "6")]
    pub pool: String,
    #[prost(uint64, tag = "7")]
    pub capacity_bytes: u64,
    #[prost(string, tag = "8")]
    pub version: String,
    #[prost(uint64, tag = "9")]
    pub at_unix_ms: u64,
}

/// A known chunkserver started again, with what may have changed meanwhile.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateChunkserver {
    #[prost(uint32, tag = "1")]
    pub chunkserver: u32,
    #[prost(string, tag = "2")]
    pub address: String,
    #[prost(string, tag = "3")]
    pub server: String,
    #[prost(uint64, tag = "4")]
    pub capacity_bytes: u64,
    #[prost(string, tag = "5")]
    pub version: String,
    /// Only where no copyset was placed by it; empty: as it is.
    #[prost(string, tag = "60")]
    pub zone: String,
}

/// This start of a chunkserver is the newest there is: whatever lacks it later is an older copy.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ChunkserverStarted {
    #[prost(uint32, tag = "1")]
    pub chunkserver: u32,
    #[prost(message, optional, tag = "2")]
    pub start: Option<Started>,
    /// It counts again what an operator accepted.
    #[prost(bool, tag = "3")]
    pub accepted: bool,
}

/// One start of a chunkserver's process.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Started {
    #[prost(uint64, tag = "1")]
    pub number: u64,
    #[prost(bytes = "bytes", tag = "2")]
    pub instance: Bytes,
}

/// What an operator decided about a chunkserver.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct DecideChunkserver {
    #[prost(uint32, tag = "1")]
    pub chunkserver: u32,
    #[prost(enumeration = "Decided", tag = "2")]
    pub decided: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Decided {
    /// The directory it has now is what counts.
    Accepted = 1,
    /// It does not come back.
    Dead = 2,
    /// It is not of this cluster any more.
    Removed = 3,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateCopysets {
    #[prost(string, tag = "1")]
    pub pool: String,
    /// The last copyset number the planner saw: two decisions made from the same sight are not both carried out.
    #[prost(uint32, tag = "2")]
    pub seen: u32,
    #[prost(message, repeated, tag = "3")]
    pub copysets: Vec<NewCopyset>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct NewCopyset {
    #[prost(uint32, repeated, tag = "1")]
    pub chunkservers: Vec<u32>,
    /// One of them.
    #[prost(uint32, tag = "2")]
    pub first_leader: u32,
}

/// These replicas were reported by their chunkservers: from now on nobody may be told to create them again.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReplicasCreated {
    #[prost(message, repeated, tag = "1")]
    pub replicas: Vec<CreatedReplica>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct CreatedReplica {
    #[prost(uint32, tag = "1")]
    pub copyset: u32,
    #[prost(uint64, tag = "2")]
    pub replica: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateVolume {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(uint64, tag = "2")]
    pub size_bytes: u64,
    /// In the order in which chunks go round over them.
    #[prost(uint32, repeated, tag = "3")]
    pub copysets: Vec<u32>,
    #[prost(uint64, tag = "4")]
    pub at_unix_ms: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct DeleteVolume {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(bool, tag = "2")]
    pub force: bool,
}

/// The copyset committed the end of a deleted volume.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct VolumeDropped {
    #[prost(uint32, tag = "1")]
    pub copyset: u32,
    #[prost(uint64, tag = "2")]
    pub volume: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Attach {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub holder: String,
    #[prost(bool, tag = "3")]
    pub takeover: bool,
    #[prost(uint64, tag = "4")]
    pub at_unix_ms: u64,
    /// SHA-256 of the holder's secret; empty: it told none.
    #[prost(bytes = "vec", tag = "5")]
    pub secret_hash: Vec<u8>,
    /// Of one by which the same place may have attached before.
    #[prost(bytes = "vec", tag = "6")]
    pub former_secret_hash: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Detach {
    #[prost(uint64, tag = "1")]
    pub volume: u64,
    #[prost(uint32, tag = "2")]
    pub attachment: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct AllocateSegment {
    #[prost(uint64, tag = "1")]
    pub volume: u64,
    #[prost(uint32, tag = "2")]
    pub attachment: u32,
    #[prost(uint32, tag = "3")]
    pub segment: u32,
    /// 64: the copyset of each chunk.
    #[prost(uint32, repeated, tag = "4")]
    pub chunk_copysets: Vec<u32>,
}

/// A chunkserver is to become empty, or is not any more.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct RetireChunkserver {
    #[prost(uint32, tag = "1")]
    pub chunkserver: u32,
    #[prost(bool, tag = "2")]
    pub retiring: bool,
}

/// A fresh replica on this chunkserver is to take the place of `old_replica`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct BeginReplace {
    #[prost(uint32, tag = "1")]
    pub copyset: u32,
    #[prost(uint64, tag = "2")]
    pub old_replica: u64,
    #[prost(uint32, tag = "3")]
    pub chunkserver: u32,
    #[prost(enumeration = "Reason", tag = "4")]
    pub reason: i32,
}

/// The copyset's group committed it.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct ReplaceDone {
    #[prost(uint32, tag = "1")]
    pub copyset: u32,
    #[prost(uint64, tag = "2")]
    pub old_replica: u64,
    #[prost(uint64, tag = "3")]
    pub new_replica: u64,
    /// Where the new one is.
    #[prost(uint32, tag = "4")]
    pub chunkserver: u32,
}

/// The change to this new replica is not wanted any more.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct CancelReplace {
    #[prost(uint32, tag = "1")]
    pub copyset: u32,
    #[prost(uint64, tag = "2")]
    pub new_replica: u64,
}

/// Cancelled, and the copyset's group is without the new replica.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct ReplaceUndone {
    #[prost(uint32, tag = "1")]
    pub copyset: u32,
    #[prost(uint64, tag = "2")]
    pub new_replica: u64,
}

/// A process begins to lead.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BeginReign {
    #[prost(bytes = "bytes", tag = "1")]
    pub reign: Bytes,
    /// The last index of the log before it.
    #[prost(uint64, tag = "2")]
    pub after_index: u64,
}

/// A person has looked at what an older copy has learnt back.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Accept {}

/// What chunkservers remember and this state does not: it was put back from an older copy. A new reign begins with it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Adopt {
    #[prost(bytes = "bytes", tag = "1")]
    pub reign: Bytes,
    #[prost(uint64, tag = "2")]
    pub after_index: u64,
    /// The reigns that are forgotten, and how far chunkservers have seen them.
    #[prost(message, repeated, tag = "3")]
    pub seen: Vec<SeenReign>,
    /// No number up to these is given again.
    #[prost(uint32, tag = "4")]
    pub chunkserver: u32,
    #[prost(uint32, tag = "5")]
    pub copyset: u32,
    #[prost(uint64, tag = "6")]
    pub replica: u64,
    #[prost(uint64, tag = "7")]
    pub volume: u64,
    /// Of any volume.
    #[prost(uint32, tag = "8")]
    pub attachment: u32,
    #[prost(message, repeated, tag = "9")]
    pub chunkservers: Vec<AdoptedChunkserver>,
    #[prost(message, repeated, tag = "10")]
    pub copysets: Vec<AdoptedCopyset>,
    #[prost(message, repeated, tag = "11")]
    pub volumes: Vec<AdoptedVolume>,
    #[prost(message, repeated, tag = "12")]
    pub segments: Vec<AdoptedSegment>,
    /// Volumes of which a copyset knows that they were deleted.
    #[prost(uint64, repeated, tag = "13")]
    pub dropped: Vec<u64>,
    /// By a person. Otherwise nothing is created, moved or removed until one has looked.
    #[prost(bool, tag = "14")]
    pub accepted: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct SeenReign {
    #[prost(bytes = "bytes", tag = "1")]
    pub reign: Bytes,
    #[prost(uint64, tag = "2")]
    pub ordinal: u64,
    #[prost(uint64, tag = "3")]
    pub index: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct AdoptedChunkserver {
    #[prost(uint32, tag = "1")]
    pub chunkserver: u32,
    #[prost(message, optional, tag = "2")]
    pub as_registered: Option<RegisterChunkserver>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct AdoptedCopyset {
    #[prost(uint32, tag = "1")]
    pub copyset: u32,
    #[prost(string, tag = "2")]
    pub pool: String,
    #[prost(message, repeated, tag = "3")]
    pub replicas: Vec<AdoptedReplica>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct AdoptedReplica {
    #[prost(uint64, tag = "1")]
    pub replica: u64,
    #[prost(uint32, tag = "2")]
    pub chunkserver: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct AdoptedVolume {
    #[prost(uint64, tag = "1")]
    pub volume: u64,
    /// Name and size are of use only when the volume itself was forgotten.
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(uint64, tag = "3")]
    pub size_bytes: u64,
    #[prost(uint32, repeated, tag = "4")]
    pub copysets: Vec<u32>,
    #[prost(uint32, tag = "5")]
    pub attachment: u32,
    #[prost(uint64, tag = "6")]
    pub at_unix_ms: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct AdoptedSegment {
    #[prost(uint64, tag = "1")]
    pub volume: u64,
    #[prost(uint32, tag = "2")]
    pub segment: u32,
    #[prost(uint32, repeated, tag = "3")]
    pub chunk_copysets: Vec<u32>,
}

/// A volume is about to get an image: a new one, or one that is there and empty. The mark stays until the image is whole.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BeginImport {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(uint64, tag = "2")]
    pub size_bytes: u64,
    #[prost(uint32, repeated, tag = "3")]
    pub copysets: Vec<u32>,
    /// Size and copysets are those of the volume that is there.
    #[prost(bool, tag = "4")]
    pub existing: bool,
    #[prost(string, tag = "5")]
    pub by: String,
    #[prost(uint64, tag = "6")]
    pub at_unix_ms: u64,
}

/// The holder of this attachment has copied the whole image, and gives the volume back.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct FinishImport {
    #[prost(uint64, tag = "1")]
    pub volume: u64,
    #[prost(uint32, tag = "2")]
    pub attachment: u32,
}

/// This import ends without its image: what it filled goes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AbandonImport {
    #[prost(uint64, tag = "1")]
    pub volume: u64,
    #[prost(string, tag = "2")]
    pub by: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Entry {
    #[prost(
        oneof = "Command",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 40, 41, 42, 50, 51, 60, 61, 62"
    )]
    command: Option<Command>,
}

/// A log entry that this version cannot apply. A replica must stop here: to skip it would be to differ from the others.
#[derive(Debug, thiserror::Error)]
pub enum NotACommand {
    #[error("the entry is empty")]
    Empty,
    #[error("the entry has version {0}, this program knows version {VERSION}")]
    Version(u8),
    #[error("the entry is damaged")]
    Damaged(#[source] prost::DecodeError),
    #[error("the entry holds a command of a newer version of this program")]
    Unknown,
}

impl Command {
    pub fn to_bytes(&self) -> Bytes {
        let entry = Entry { command: Some(self.clone()) };
        let mut bytes = BytesMut::with_capacity(1 + entry.encoded_len());
        bytes.put_u8(VERSION);
        entry.encode(&mut bytes).expect("a BytesMut grows");
        bytes.freeze()
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NotACommand> {
        let (&version, rest) = bytes.split_first().ok_or(NotACommand::Empty)?;
        if version != VERSION {
            return Err(NotACommand::Version(version));
        }
        Entry::decode(rest).map_err(NotACommand::Damaged)?.command.ok_or(NotACommand::Unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::{Command, Detach, NotACommand};

    #[test]
    fn an_entry_this_version_cannot_apply_is_named() {
        let whole = Command::Detach(Detach { volume: 7, attachment: 3 }).to_bytes();
        assert!(matches!(Command::from_bytes(&whole), Ok(Command::Detach(_))));
        assert!(matches!(Command::from_bytes(&[]), Err(NotACommand::Empty)));
        assert!(matches!(Command::from_bytes(&[9, 1]), Err(NotACommand::Version(9))));
        assert!(matches!(Command::from_bytes(&whole[..whole.len() - 1]), Err(NotACommand::Damaged(_))));
        // Field 1000, an empty message: a command of the future.
        assert!(matches!(Command::from_bytes(&[1, 0xc2, 0x3e, 0]), Err(NotACommand::Unknown)));
    }
}
