//! What became of a command: done, or refused by name.

use bytes::Bytes;
use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId, VolumeId};
use prost::Message;

/// What a command that was carried out gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    Plain,
    Cluster(ClusterId),
    Registered { chunkserver: ChunkserverId, token: Bytes },
    Created { volume: VolumeId },
    Attached { volume: VolumeId, attachment: u32 },
    Segment { chunk_copysets: Vec<CopysetId> },
}

/// Why a command changed nothing; one variant per thing the caller can do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Why {
    /// There is no such thing.
    NotFound = 1,
    /// The name is taken.
    Exists = 2,
    /// The request cannot be right.
    Invalid = 3,
    /// Somebody else holds the volume: detach there, or take it over.
    AttachedElsewhere = 4,
    /// A newer attachment exists: stop for ever.
    FencedOut = 5,
    /// The state moved on since the decision was made: look again, decide again.
    Stale = 6,
}

/// A command that changed nothing, and why, for a program and for a person.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    pub why: Why,
    pub message: String,
}

pub type Outcome = Result<Done, Refused>;

pub(super) fn refuse(why: Why, message: impl Into<String>) -> Outcome {
    Err(Refused { why, message: message.into() })
}

/// The outcome as it goes from the raft thread to whoever proposed. Never stored.
#[derive(Clone, PartialEq, prost::Message)]
struct Wire {
    #[prost(oneof = "What", tags = "1, 2, 3, 4, 5, 6")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(message, tag = "1")]
    Refused(WireRefused),
    #[prost(bytes = "bytes", tag = "2")]
    Cluster(Bytes),
    #[prost(message, tag = "3")]
    Registered(WireRegistered),
    #[prost(uint64, tag = "4")]
    Created(u64),
    #[prost(message, tag = "5")]
    Attached(WireAttached),
    #[prost(message, tag = "6")]
    Segment(WireSegment),
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireRefused {
    #[prost(enumeration = "Why", tag = "1")]
    why: i32,
    #[prost(string, tag = "2")]
    message: String,
}
#[derive(Clone, PartialEq, prost::Message)]
struct WireRegistered {
    #[prost(uint32, tag = "1")]
    chunkserver: u32,
    #[prost(bytes = "bytes", tag = "2")]
    token: Bytes,
}
#[derive(Clone, Copy, PartialEq, prost::Message)]
struct WireAttached {
    #[prost(uint64, tag = "1")]
    volume: u64,
    #[prost(uint32, tag = "2")]
    attachment: u32,
}
#[derive(Clone, PartialEq, prost::Message)]
struct WireSegment {
    #[prost(uint32, repeated, tag = "1")]
    chunk_copysets: Vec<u32>,
}

/// `Done::Plain` is the empty string: most commands give nothing back.
pub fn encode(outcome: &Outcome) -> Bytes {
    let what = match outcome {
        Ok(Done::Plain) => return Bytes::new(),
        Ok(Done::Cluster(cluster)) => What::Cluster(Bytes::copy_from_slice(&cluster.0)),
        Ok(Done::Registered { chunkserver, token }) => {
            What::Registered(WireRegistered { chunkserver: chunkserver.0, token: token.clone() })
        }
        Ok(Done::Created { volume }) => What::Created(volume.0),
        Ok(Done::Attached { volume, attachment }) => {
            What::Attached(WireAttached { volume: volume.0, attachment: *attachment })
        }
        Ok(Done::Segment { chunk_copysets }) => {
            What::Segment(WireSegment { chunk_copysets: chunk_copysets.iter().map(|id| id.0).collect() })
        }
        Err(refused) => {
            What::Refused(WireRefused { why: refused.why.into(), message: refused.message.clone() })
        }
    };
    Wire { what: Some(what) }.encode_to_vec().into()
}

/// The inverse of [`encode`]. What comes in was made by this very process.
///
/// # Panics
/// If it was not.
pub fn decode(bytes: Bytes) -> Outcome {
    if bytes.is_empty() {
        return Ok(Done::Plain);
    }
    let wire = Wire::decode(bytes).expect("an outcome made by this process");
    Ok(match wire.what.expect("an outcome made by this process") {
        What::Refused(refused) => {
            return Err(Refused {
                why: Why::try_from(refused.why).expect("an outcome made by this process"),
                message: refused.message,
            });
        }
        What::Cluster(id) => Done::Cluster(ClusterId(id[..].try_into().expect("16 bytes"))),
        What::Registered(w) => Done::Registered { chunkserver: ChunkserverId(w.chunkserver), token: w.token },
        What::Created(volume) => Done::Created { volume: VolumeId(volume) },
        What::Attached(w) => Done::Attached { volume: VolumeId(w.volume), attachment: w.attachment },
        What::Segment(w) => {
            Done::Segment { chunk_copysets: w.chunk_copysets.into_iter().map(CopysetId).collect() }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::{Done, Refused, Why, decode, encode};
    use bytes::Bytes;
    use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId, VolumeId};

    #[test]
    fn an_outcome_survives_the_way_to_its_proposer() {
        let refused = |why| Err(Refused { why, message: "because".into() });
        for outcome in [
            Ok(Done::Plain),
            Ok(Done::Cluster(ClusterId([7; 16]))),
            Ok(Done::Registered { chunkserver: ChunkserverId(1), token: Bytes::from_static(&[9; 32]) }),
            Ok(Done::Created { volume: VolumeId(u64::MAX) }),
            Ok(Done::Attached { volume: VolumeId(3), attachment: 4 }),
            Ok(Done::Segment { chunk_copysets: vec![CopysetId(1), CopysetId(2)] }),
            refused(Why::NotFound),
            refused(Why::Exists),
            refused(Why::Invalid),
            refused(Why::AttachedElsewhere),
            refused(Why::FencedOut),
            refused(Why::Stale),
        ] {
            assert_eq!(decode(encode(&outcome)), outcome);
        }
    }
}
