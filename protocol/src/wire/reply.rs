//! What a chunkserver answers.

use bytes::{BufMut, Bytes, BytesMut};

use super::frame::{Fields, Frame, RequestId, WireError, put_frame};
use crate::bounds::{INDEX_MAX, TERM_MAX};
use crate::checksum::{Checksums, first_mismatch};
use crate::epoch::Epoch;
use crate::id::{BlockIndex, ChunkserverId, CopysetId};

const DONE: u8 = 129;
const DATA: u8 = 130;
const INFO: u8 = 131;
const REFUSED: u8 = 132;
const DIGESTS: u8 = 133;

/// How much of the log the answering replica had applied: the index of the last entry of *this volume*, and the
/// term it answers in. A client discards answers older than the newest it has seen (design.md §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Freshness {
    pub term: u64,
    pub index: u64,
}

/// How much of a chunk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkInfo {
    pub allocated_bytes: u64,
    pub generation: u64,
}

/// Why a chunkserver did not do what it was asked. The client's next move follows from the variant alone, so there
/// is one per move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Ask this one instead, at once; `None`: ask the others, or wait for an election.
    #[error("not the leader")]
    NotLeader { leader: Option<ChunkserverId> },
    /// Somebody else owns the volume now. Stop; never retry.
    #[error("fenced out by epoch {current}")]
    Fenced { current: Epoch },
    /// No fence of this volume was ever committed here: fence first.
    #[error("the volume was not fenced in this copyset")]
    NotFenced,
    /// Come back a little later.
    #[error("busy")]
    Busy,
    /// No room for new data here; overwrites may still succeed.
    #[error("no space")]
    NoSpace,
    /// This chunkserver has no replica of that copyset: fetch a new map.
    #[error("no replica of that copyset")]
    NoSuchCopyset,
    /// No replica can vouch for these bytes. This one request fails; the volume goes on.
    #[error("{block} cannot be read")]
    Unreadable { block: BlockIndex },
    /// The request's data does not match its checksums: it was damaged on the way. Send it again.
    #[error("damaged on the way")]
    Damaged,
    /// A read was asked of whoever has applied enough; this replica has applied the volume's entries up to here only.
    /// Another may have more.
    #[error("applied up to entry {applied} of the volume only")]
    Behind { applied: u64 },
}

/// Everything a chunkserver can answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The change is durable on a majority and applied here.
    Done(Freshness),
    /// The bytes that were asked for.
    Data {
        fresh: Freshness,
        /// The data holds nothing beyond the volume's entry of this index, which the leaders of `fresh.term` and of all
        /// later terms have. (`fresh.index` says what it does hold.)
        shown: u64,
        checksums: Checksums,
        data: ReplyData,
    },
    Info {
        fresh: Freshness,
        info: ChunkInfo,
    },
    /// The crc32c of each block that was asked for, as it was read.
    Digests {
        fresh: Freshness,
        digests: Checksums,
    },
    Refused(Refusal),
}

/// Data of a reply: parts that follow each other on the wire. A decoded reply has one part.
pub type ReplyData = smallvec::SmallVec<[Bytes; 2]>;

impl Reply {
    /// Appends the frame to `out`, all but its data, which must follow on the wire.
    pub fn put(&self, copyset: CopysetId, id: RequestId, out: &mut BytesMut) {
        match self {
            Self::Done(fresh) => put_frame(out, DONE, copyset, id, 0, |head| put_fresh(head, fresh)),
            Self::Data { fresh, shown, checksums, data } => {
                let bytes = data.iter().map(Bytes::len).sum();
                put_frame(out, DATA, copyset, id, bytes, |head| {
                    put_fresh(head, fresh);
                    head.put_u64_le(*shown);
                    for checksum in checksums {
                        head.put_u32_le(*checksum);
                    }
                });
            }
            Self::Info { fresh, info } => put_frame(out, INFO, copyset, id, 0, |head| {
                put_fresh(head, fresh);
                head.put_u64_le(info.allocated_bytes);
                head.put_u64_le(info.generation);
            }),
            Self::Digests { fresh, digests } => put_frame(out, DIGESTS, copyset, id, 0, |head| {
                put_fresh(head, fresh);
                digests.iter().for_each(|digest| head.put_u32_le(*digest));
            }),
            Self::Refused(refusal) => {
                put_frame(out, REFUSED, copyset, id, 0, |head| put_refusal(head, refusal))
            }
        }
    }

    pub fn decode(frame: &Frame) -> Result<Self, WireError> {
        let mut fields = Fields::new(frame);
        if frame.kind != DATA && !frame.payload.is_empty() {
            return Err(fields.malformed("data where none belongs"));
        }
        let reply = match frame.kind {
            DONE => Self::Done(get_fresh(&mut fields)?),
            DATA => {
                let (fresh, shown) = (get_fresh(&mut fields)?, fields.counted(INDEX_MAX, "index")?);
                let checksums = get_checksums(&mut fields, frame, 24)?;
                Self::Data { fresh, shown, checksums, data: ReplyData::from_iter([frame.payload.clone()]) }
            }
            INFO => {
                let fresh = get_fresh(&mut fields)?;
                let info = ChunkInfo { allocated_bytes: fields.u64()?, generation: fields.u64()? };
                Self::Info { fresh, info }
            }
            DIGESTS => {
                let fresh = get_fresh(&mut fields)?;
                Self::Digests { fresh, digests: get_checksums(&mut fields, frame, 16)? }
            }
            REFUSED => Self::Refused(get_refusal(&mut fields)?),
            unknown => return Err(WireError::UnknownKind(unknown)),
        };
        // Checksums are all that is left.
        if !matches!(frame.kind, DATA | DIGESTS) {
            fields.end()?;
        }
        Ok(reply)
    }
}

/// Whether `data`, asked for at `offset` of a chunk, is whole and matches its checksums.
pub fn data_is_intact(offset: u32, length: u32, data: &Bytes, checksums: &[u32]) -> bool {
    data.len() == length as usize && first_mismatch(u64::from(offset), data, checksums).is_none()
}

fn put_fresh(head: &mut BytesMut, fresh: &Freshness) {
    head.put_u64_le(fresh.term);
    head.put_u64_le(fresh.index);
}

fn get_fresh(fields: &mut Fields) -> Result<Freshness, WireError> {
    let term = fields.counted(TERM_MAX, "term")?;
    Ok(Freshness { term, index: fields.counted(INDEX_MAX, "index")? })
}

/// All that is left behind so many bytes.
fn get_checksums(fields: &mut Fields, frame: &Frame, before: u64) -> Result<Checksums, WireError> {
    fields.checksums((frame.head.len() as u64).saturating_sub(before) / 4)
}

fn put_refusal(head: &mut BytesMut, refusal: &Refusal) {
    let (code, detail) = match *refusal {
        Refusal::NotLeader { leader } => (1, leader.map_or(0, |id| u64::from(id.0))),
        Refusal::Fenced { current } => (2, current.to_u64()),
        Refusal::NotFenced => (3, 0),
        Refusal::Busy => (4, 0),
        Refusal::NoSpace => (5, 0),
        Refusal::NoSuchCopyset => (6, 0),
        Refusal::Unreadable { block } => (7, u64::from(block.0)),
        Refusal::Damaged => (8, 0),
        Refusal::Behind { applied } => (9, applied),
    };
    head.put_u8(code);
    head.put_u64_le(detail);
}

fn get_refusal(fields: &mut Fields) -> Result<Refusal, WireError> {
    let (code, detail) = (fields.u8()?, fields.u64()?);
    Ok(match code {
        1 => {
            let id = u32::try_from(detail).map_err(|_| fields.malformed("no chunkserver id"))?;
            Refusal::NotLeader { leader: (id != 0).then_some(ChunkserverId(id)) }
        }
        2 => Refusal::Fenced { current: Epoch::from_u64(detail) },
        3 => Refusal::NotFenced,
        4 => Refusal::Busy,
        5 => Refusal::NoSpace,
        6 => Refusal::NoSuchCopyset,
        7 => {
            let block = u16::try_from(detail).map_err(|_| fields.malformed("no block"))?;
            Refusal::Unreadable { block: BlockIndex(block) }
        }
        8 => Refusal::Damaged,
        9 => Refusal::Behind { applied: detail },
        _ => return Err(fields.malformed("unknown refusal")),
    })
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, Bytes, BytesMut};

    use super::{ChunkInfo, Freshness, Refusal, Reply, ReplyData, data_is_intact};
    use crate::checksum::checksums;
    use crate::epoch::Epoch;
    use crate::id::{BlockIndex, ChunkserverId, CopysetId};
    use crate::wire::frame::{FrameReader, RequestId};

    #[test]
    fn every_reply_survives_its_bytes() {
        let fresh = Freshness { term: 4, index: 99 };
        let data = Bytes::from(vec![3; 4096]);
        let sums = checksums(0, &data);
        let mut replies = vec![
            Reply::Done(fresh),
            Reply::Data {
                fresh,
                shown: 101,
                checksums: sums.clone(),
                data: ReplyData::from_iter([data.clone()]),
            },
            Reply::Info { fresh, info: ChunkInfo { allocated_bytes: 8192, generation: 2 } },
            Reply::Digests { fresh, digests: (0..256).collect() },
        ];
        replies.extend(
            [
                Refusal::NotLeader { leader: None },
                Refusal::NotLeader { leader: Some(ChunkserverId(3)) },
                Refusal::Fenced { current: Epoch { attachment: 2, incarnation: 7 } },
                Refusal::NotFenced,
                Refusal::Busy,
                Refusal::NoSpace,
                Refusal::NoSuchCopyset,
                Refusal::Unreadable { block: BlockIndex(4095) },
                Refusal::Damaged,
                Refusal::Behind { applied: 12 },
            ]
            .map(Reply::Refused),
        );
        for reply in replies {
            let mut bytes = BytesMut::new();
            reply.put(CopysetId(1), RequestId(2), &mut bytes);
            if let Reply::Data { data, .. } = &reply {
                data.iter().for_each(|part| bytes.put_slice(part));
            }
            let mut reader = FrameReader::default();
            reader.space().put(bytes);
            let frame = reader.next().expect("intact").expect("whole");
            assert_eq!(Reply::decode(&frame), Ok(reply));
        }
        assert!(data_is_intact(0, 4096, &data, &sums));
        assert!(!data_is_intact(0, 8192, &data, &sums));
    }
}
