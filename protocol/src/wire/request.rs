//! What a volume's client asks of a chunkserver: one struct each, nothing optional.

use bytes::{BufMut, Bytes, BytesMut};

use super::frame::{Fields, Frame, RequestId, WireError, put_frame};
use crate::bounds::{CHUNKS_MAX, INDEX_MAX, SEQUENCE_MAX, TERM_MAX, VOLUME_MAX};
use crate::checksum::{Checksums, first_mismatch, piece_count};
use crate::epoch::Epoch;
use crate::geometry::{BLOCK_BYTES, CHUNK_BYTES, REQUEST_BYTES_MAX, SECTOR_BYTES};
use crate::id::{ChunkIndex, ChunkKey, CopysetId, VolumeId};

const FENCE: u8 = 1;
const WRITE: u8 = 2;
const READ: u8 = 3;
const DISCARD: u8 = 4;
const WRITE_ZEROES: u8 = 5;
const CHUNK_INFO: u8 = 6;
const READ_AT_LEAST: u8 = 7;
const DIGESTS: u8 = 8;
const DOUBT: u8 = 9;
const TAKE_OVER: u8 = 10;

/// Which of a volume's I/O threads a change comes from; sequences are counted per lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lane(pub u16);

/// The number of a change within its lane, from 1. A retry keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Sequence(pub u64);

/// What makes a change harmless when it arrives late or twice: replicas refuse lower epochs, and do nothing for a
/// sequence that is applied already or lies below the floor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChangeTag {
    pub epoch: Epoch,
    pub lane: Lane,
    pub sequence: Sequence,
    /// The oldest sequence of this lane that was not answered yet when this was sent.
    pub floor: Sequence,
}

/// Bytes of one chunk: whole sectors, inside the chunk, not empty. Cannot be made otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRange {
    offset: u32,
    length: u32,
}

impl ChunkRange {
    pub const fn new(offset: u32, length: u32) -> Option<Self> {
        let (from, bytes) = (offset as u64, length as u64);
        if bytes == 0
            || !from.is_multiple_of(SECTOR_BYTES)
            || !bytes.is_multiple_of(SECTOR_BYTES)
            || from + bytes > CHUNK_BYTES
        {
            return None;
        }
        Some(Self { offset, length })
    }

    pub const fn offset(self) -> u32 {
        self.offset
    }

    pub const fn length(self) -> u32 {
        self.length
    }

    pub const fn is_whole_blocks(self) -> bool {
        (self.offset as u64).is_multiple_of(BLOCK_BYTES) && (self.length as u64).is_multiple_of(BLOCK_BYTES)
    }

    /// Whether both have bytes in common.
    pub const fn overlaps(self, other: Self) -> bool {
        self.offset < other.offset + other.length && other.offset < self.offset + self.length
    }

    /// Checksums that travel with data of this range.
    pub const fn piece_count(self) -> u64 {
        piece_count(self.offset as u64, self.length as u64)
    }
}

/// Nothing of a lower epoch may be applied to this volume in this copyset any more. Answered once committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    pub volume: VolumeId,
    pub epoch: Epoch,
}

/// Store these bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    pub chunk: ChunkKey,
    pub tag: ChangeTag,
    pub range: ChunkRange,
    pub checksums: Checksums,
    pub data: Bytes,
}

impl Write {
    /// The first piece whose bytes are not what the client's checksum says.
    pub fn damaged_piece(&self) -> Option<usize> {
        first_mismatch(u64::from(self.range.offset), &self.data, &self.checksums)
    }
}

/// Return these bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    pub chunk: ChunkKey,
    pub epoch: Epoch,
    pub range: ChunkRange,
}

/// Return these bytes, whether or not you lead, if you have applied this much of the volume, or have it in your log and
/// the log is good for it. Why that is enough: `docs/semantics.md`, "Reads".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadAtLeast {
    pub read: Read,
    /// The index of an entry of this volume: the newest that these bytes may depend on.
    pub index: u64,
    /// The leaders of this term and of all later ones have that entry, so a log that ends with an entry of one of them
    /// has it, too.
    pub term: u64,
}

impl ReadAtLeast {
    /// As a term: no log is good enough, the entry must be applied.
    pub const APPLIED_ONLY: u64 = u64::MAX;
}

/// Look at these blocks, as you would read them, and tell the checksum of each. For comparing replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AskDigests {
    /// Whole blocks.
    pub of: ReadAtLeast,
}

/// Others agree on some of these blocks, and not with you: compare them again yourself. Nobody is told what to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Doubt {
    /// Whole blocks.
    pub of: Read,
}

/// These bytes are not needed any more: they read as zeroes from now on, and their space may be freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Discard {
    pub chunk: ChunkKey,
    pub tag: ChangeTag,
    pub range: ChunkRange,
}

/// These bytes are zeroes from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteZeroes {
    pub chunk: ChunkKey,
    pub tag: ChangeTag,
    pub range: ChunkRange,
    /// The space may be freed.
    pub unmap: bool,
}

/// How much of a chunk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AskChunkInfo {
    pub chunk: ChunkKey,
    pub epoch: Epoch,
}

/// The volume reaches you and not the leader you name: lead in its place. Asked of a follower, answered at once by what
/// it knows now: `NotLeader`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeOver {
    pub volume: VolumeId,
    pub epoch: Epoch,
}

/// Everything a client can ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    Fence(Fence),
    Write(Write),
    Read(Read),
    Discard(Discard),
    WriteZeroes(WriteZeroes),
    ChunkInfo(AskChunkInfo),
    ReadAtLeast(ReadAtLeast),
    Digests(AskDigests),
    Doubt(Doubt),
    TakeOver(TakeOver),
}

impl Request {
    /// Appends the frame to `out`, all but its payload, which is returned and must follow on the wire.
    #[must_use = "the payload must follow the frame on the wire"]
    pub fn put(&self, copyset: CopysetId, id: RequestId, out: &mut BytesMut) -> Option<Bytes> {
        match self {
            Self::Fence(fence) => put_frame(out, FENCE, copyset, id, 0, |head| {
                head.put_u64_le(fence.volume.0);
                head.put_u64_le(fence.epoch.to_u64());
            }),
            Self::TakeOver(ask) => put_frame(out, TAKE_OVER, copyset, id, 0, |head| {
                head.put_u64_le(ask.volume.0);
                head.put_u64_le(ask.epoch.to_u64());
            }),
            Self::Write(write) => {
                put_frame(out, WRITE, copyset, id, write.data.len(), |head| {
                    put_change(head, write.chunk, &write.tag, write.range);
                    for checksum in &write.checksums {
                        head.put_u32_le(*checksum);
                    }
                });
                return Some(write.data.clone());
            }
            Self::Read(read) => put_frame(out, READ, copyset, id, 0, |head| {
                put_chunk(head, read.chunk, read.epoch);
                put_range(head, read.range);
            }),
            Self::ReadAtLeast(ask) => {
                put_frame(out, READ_AT_LEAST, copyset, id, 0, |head| put_read_at_least(head, ask));
            }
            Self::Digests(ask) => {
                put_frame(out, DIGESTS, copyset, id, 0, |head| put_read_at_least(head, &ask.of));
            }
            Self::Doubt(doubt) => put_frame(out, DOUBT, copyset, id, 0, |head| {
                put_chunk(head, doubt.of.chunk, doubt.of.epoch);
                put_range(head, doubt.of.range);
            }),
            Self::Discard(discard) => put_frame(out, DISCARD, copyset, id, 0, |head| {
                put_change(head, discard.chunk, &discard.tag, discard.range);
            }),
            Self::WriteZeroes(zeroes) => put_frame(out, WRITE_ZEROES, copyset, id, 0, |head| {
                put_change(head, zeroes.chunk, &zeroes.tag, zeroes.range);
                head.put_u8(u8::from(zeroes.unmap));
            }),
            Self::ChunkInfo(ask) => put_frame(out, CHUNK_INFO, copyset, id, 0, |head| {
                put_chunk(head, ask.chunk, ask.epoch);
            }),
        }
        None
    }

    pub fn decode(frame: &Frame) -> Result<Self, WireError> {
        let mut fields = Fields::new(frame);
        if frame.kind != WRITE && !frame.payload.is_empty() {
            return Err(fields.malformed("data where none belongs"));
        }
        let request = match frame.kind {
            FENCE => {
                let (volume, epoch) = get_writer(&mut fields)?;
                Self::Fence(Fence { volume, epoch })
            }
            TAKE_OVER => {
                let (volume, epoch) = get_writer(&mut fields)?;
                Self::TakeOver(TakeOver { volume, epoch })
            }
            WRITE => {
                let (chunk, tag, range) = get_change(&mut fields)?;
                if range.length as usize != frame.payload.len() || u64::from(range.length) > REQUEST_BYTES_MAX
                {
                    return Err(fields.malformed("the length is not that of the data"));
                }
                let checksums = fields.checksums(range.piece_count())?;
                return Ok(Self::Write(Write { chunk, tag, range, checksums, data: frame.payload.clone() }));
            }
            READ => Self::Read(get_read(&mut fields)?),
            READ_AT_LEAST => Self::ReadAtLeast(get_read_at_least(get_read(&mut fields)?, &mut fields)?),
            DIGESTS => {
                let of = get_read_at_least(get_blocks(&mut fields)?, &mut fields)?;
                Self::Digests(AskDigests { of })
            }
            DOUBT => Self::Doubt(Doubt { of: get_blocks(&mut fields)? }),
            DISCARD => {
                let (chunk, tag, range) = get_change(&mut fields)?;
                Self::Discard(Discard { chunk, tag, range })
            }
            WRITE_ZEROES => {
                let (chunk, tag, range) = get_change(&mut fields)?;
                let unmap = match fields.u8()? {
                    0 => false,
                    1 => true,
                    _ => return Err(fields.malformed("neither keep nor unmap")),
                };
                Self::WriteZeroes(WriteZeroes { chunk, tag, range, unmap })
            }
            CHUNK_INFO => {
                let (chunk, epoch) = get_chunk(&mut fields)?;
                Self::ChunkInfo(AskChunkInfo { chunk, epoch })
            }
            unknown => return Err(WireError::UnknownKind(unknown)),
        };
        fields.end()?;
        Ok(request)
    }
}

fn put_chunk(head: &mut BytesMut, chunk: ChunkKey, epoch: Epoch) {
    head.put_u64_le(chunk.volume.0);
    head.put_u64_le(epoch.to_u64());
    head.put_u32_le(chunk.index.0);
}

fn get_chunk(fields: &mut Fields) -> Result<(ChunkKey, Epoch), WireError> {
    let (volume, epoch) = get_writer(fields)?;
    let index = fields.u32()?;
    if index >= CHUNKS_MAX {
        return Err(fields.beyond("chunk", u64::from(index)));
    }
    Ok((ChunkKey { volume, index: ChunkIndex(index) }, epoch))
}

/// A volume and who writes it.
fn get_writer(fields: &mut Fields) -> Result<(VolumeId, Epoch), WireError> {
    let volume = VolumeId(fields.counted(VOLUME_MAX, "volume")?);
    let epoch = Epoch::from_u64(fields.u64()?);
    if !epoch.is_a_writers() {
        return Err(fields.beyond("epoch", epoch.to_u64()));
    }
    Ok((volume, epoch))
}

fn put_range(head: &mut BytesMut, range: ChunkRange) {
    head.put_u32_le(range.offset);
    head.put_u32_le(range.length);
}

fn get_range(fields: &mut Fields) -> Result<ChunkRange, WireError> {
    let (offset, length) = (fields.u32()?, fields.u32()?);
    ChunkRange::new(offset, length).ok_or_else(|| fields.malformed("not whole sectors inside a chunk"))
}

fn get_read(fields: &mut Fields) -> Result<Read, WireError> {
    let (chunk, epoch) = get_chunk(fields)?;
    let range = get_range(fields)?;
    if u64::from(range.length) > REQUEST_BYTES_MAX {
        return Err(fields.malformed("longer than the longest request"));
    }
    Ok(Read { chunk, epoch, range })
}

fn get_blocks(fields: &mut Fields) -> Result<Read, WireError> {
    let read = get_read(fields)?;
    if !read.range.is_whole_blocks() {
        return Err(fields.malformed("not whole blocks"));
    }
    Ok(read)
}

fn put_read_at_least(head: &mut BytesMut, ask: &ReadAtLeast) {
    put_chunk(head, ask.read.chunk, ask.read.epoch);
    put_range(head, ask.read.range);
    head.put_u64_le(ask.index);
    head.put_u64_le(ask.term);
}

fn get_read_at_least(read: Read, fields: &mut Fields) -> Result<ReadAtLeast, WireError> {
    let (index, term) = (fields.counted(INDEX_MAX, "index")?, fields.u64()?);
    if term > TERM_MAX && term != ReadAtLeast::APPLIED_ONLY {
        return Err(fields.beyond("term", term));
    }
    Ok(ReadAtLeast { read, index, term })
}

fn put_change(head: &mut BytesMut, chunk: ChunkKey, tag: &ChangeTag, range: ChunkRange) {
    put_chunk(head, chunk, tag.epoch);
    put_range(head, range);
    head.put_u64_le(tag.sequence.0);
    head.put_u64_le(tag.floor.0);
    head.put_u16_le(tag.lane.0);
}

fn get_change(fields: &mut Fields) -> Result<(ChunkKey, ChangeTag, ChunkRange), WireError> {
    let (chunk, epoch) = get_chunk(fields)?;
    let range = get_range(fields)?;
    let sequence = Sequence(fields.counted(SEQUENCE_MAX, "sequence")?);
    let floor = Sequence(fields.counted(SEQUENCE_MAX, "floor")?);
    let lane = Lane(fields.u16()?);
    if floor > sequence {
        return Err(fields.malformed("a floor above its own sequence"));
    }
    Ok((chunk, ChangeTag { epoch, lane, sequence, floor }, range))
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, Bytes, BytesMut};

    use super::{
        AskChunkInfo, AskDigests, ChangeTag, ChunkRange, Discard, Doubt, Fence, Lane, Read, ReadAtLeast,
        Request, Sequence, TakeOver, Write, WriteZeroes,
    };
    use crate::checksum::checksums;
    use crate::epoch::Epoch;
    use crate::id::{ChunkIndex, ChunkKey, CopysetId, VolumeId};
    use crate::wire::frame::{FrameReader, RequestId};

    fn examples() -> Vec<Request> {
        let chunk = ChunkKey { volume: VolumeId(5), index: ChunkIndex(6) };
        let epoch = Epoch { attachment: 3, incarnation: 1 };
        let tag = ChangeTag { epoch, lane: Lane(2), sequence: Sequence(10), floor: Sequence(7) };
        let range = ChunkRange::new(512, 8192).expect("valid");
        let blocks = ChunkRange::new(4096, 1 << 20).expect("valid");
        let data = Bytes::from(vec![0x5a; 8192]);
        let checksums = checksums(512, &data);
        vec![
            Request::Fence(Fence { volume: VolumeId(5), epoch }),
            Request::Write(Write { chunk, tag, range, checksums, data }),
            Request::Read(Read { chunk, epoch, range }),
            Request::Discard(Discard { chunk, tag, range }),
            Request::WriteZeroes(WriteZeroes { chunk, tag, range, unmap: true }),
            Request::ChunkInfo(AskChunkInfo { chunk, epoch }),
            Request::ReadAtLeast(ReadAtLeast { read: Read { chunk, epoch, range }, index: 77, term: 6 }),
            Request::Digests(AskDigests {
                of: ReadAtLeast {
                    read: Read { chunk, epoch, range: blocks },
                    index: 78,
                    term: ReadAtLeast::APPLIED_ONLY,
                },
            }),
            Request::Doubt(Doubt { of: Read { chunk, epoch, range: blocks } }),
            Request::TakeOver(TakeOver { volume: chunk.volume, epoch }),
        ]
    }

    fn bytes_of(request: &Request) -> BytesMut {
        let mut bytes = BytesMut::new();
        let payload = request.put(CopysetId(8), RequestId(9), &mut bytes);
        bytes.put(payload.unwrap_or_default());
        bytes
    }

    #[test]
    fn every_request_survives_its_bytes() {
        for request in examples() {
            let mut reader = FrameReader::default();
            reader.space().put(bytes_of(&request));
            let frame = reader.next().expect("intact").expect("whole");
            assert_eq!((frame.copyset, frame.request), (CopysetId(8), RequestId(9)));
            assert_eq!(Request::decode(&frame), Ok(request));
        }
    }

    #[test]
    fn fields_cut_short_or_too_long_are_refused_without_a_panic() {
        for request in examples() {
            let mut reader = FrameReader::default();
            reader.space().put(bytes_of(&request));
            let frame = reader.next().expect("intact").expect("whole");
            for length in (0..frame.head.len()).chain([frame.head.len() + 1]) {
                let mut other = frame.clone();
                let mut head = frame.head.to_vec();
                head.resize(length, 0);
                other.head = head.into();
                assert!(Request::decode(&other).is_err(), "{request:?} with {length} bytes of fields");
            }
        }
    }

    #[test]
    fn what_is_compared_is_whole_blocks_of_one_request() {
        let chunk = ChunkKey { volume: VolumeId(5), index: ChunkIndex(6) };
        for (offset, length, good) in
            [(0, 1 << 20, true), (4096, 4096, true), (512, 4096, false), (0, 512, false), (0, 2 << 20, false)]
        {
            let range = ChunkRange::new(offset, length).expect("in the chunk");
            let read = Read { chunk, epoch: Epoch::default(), range };
            let of = ReadAtLeast { read, index: 1, term: 1 };
            for request in [Request::Digests(AskDigests { of }), Request::Doubt(Doubt { of: read })] {
                let mut reader = FrameReader::default();
                reader.space().put(bytes_of(&request));
                let frame = reader.next().expect("intact").expect("whole");
                assert_eq!(Request::decode(&frame).is_ok(), good, "{request:?}");
            }
        }
    }

    #[test]
    fn a_range_is_whole_sectors_inside_a_chunk() {
        let chunk = 16 << 20;
        for (offset, length, good) in [
            (0, 512, true),
            (0, chunk, true),
            (chunk - 512, 512, true),
            (0, 0, false),
            (1, 512, false),
            (0, 513, false),
            (chunk, 512, false),
            (chunk - 512, 1024, false),
            (u32::MAX - 511, 512, false),
        ] {
            assert_eq!(ChunkRange::new(offset, length).is_some(), good, "{offset}+{length}");
        }
    }
}
