//! What a log entry says: the changes that waited on a copyset together, encoded by hand, versioned.
//!
//! Drawn in `docs/wire.md`, section "Commands". The fields of all changes come first, then the data of all writes in
//! the same order: so on the leader the data stays in the buffers it arrived in, and is only referred to.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use evolute_protocol::checksum::Checksums;
use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::{ChunkIndex, ChunkKey, VolumeId};
use evolute_protocol::wire::request::{
    ChangeTag, ChunkRange, Discard, Fence, Lane, Sequence, Write, WriteZeroes,
};
use evolute_raft::Command;
use smallvec::SmallVec;

/// The encoding's versions, newest first.
const VERSION: u8 = 1;
/// Version, a spare byte, count of changes, bytes of fields.
const PREAMBLE_BYTES: usize = 8;

const WRITE: u8 = 1;
const DISCARD: u8 = 2;
const WRITE_ZEROES: u8 = 3;
const FENCE: u8 = 4;
const DROP_VOLUME: u8 = 5;
const UNFENCE: u8 = 6;

/// One change of a copyset's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Write(Write),
    Discard(Discard),
    WriteZeroes(WriteZeroes),
    Fence(Fence),
    /// The volume was deleted: forget its chunks, refuse all its writers for ever.
    DropVolume(VolumeId),
    /// Nobody came with this fence: if it is the one that holds, it is as if the volume had never been fenced here.
    Unfence(Fence),
}

impl Change {
    pub fn volume(&self) -> VolumeId {
        match self {
            Self::Write(write) => write.chunk.volume,
            Self::Discard(discard) => discard.chunk.volume,
            Self::WriteZeroes(zeroes) => zeroes.chunk.volume,
            Self::Fence(fence) => fence.volume,
            Self::Unfence(fence) => fence.volume,
            Self::DropVolume(volume) => *volume,
        }
    }
}

/// An entry's bytes cannot be a command of a version we know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    #[error("the entry is of version {0}; this program knows version {VERSION}")]
    Version(u8),
    #[error("the entry's fields do not make sense")]
    Malformed,
}

/// Gathers changes into one entry.
#[derive(Debug)]
pub struct CommandBuilder {
    fields: BytesMut,
    data: SmallVec<[Bytes; 4]>,
    data_bytes: usize,
    count: u16,
}

impl Default for CommandBuilder {
    fn default() -> Self {
        let mut fields = BytesMut::with_capacity(256);
        fields.put_bytes(0, PREAMBLE_BYTES);
        Self { fields, data: SmallVec::new(), data_bytes: 0, count: 0 }
    }
}

impl CommandBuilder {
    /// Bytes of data gathered so far.
    pub fn data_bytes(&self) -> usize {
        self.data_bytes
    }

    pub fn push(&mut self, change: Change) {
        self.count += 1;
        let fields = &mut self.fields;
        match change {
            Change::Write(write) => {
                put_change(fields, WRITE, write.chunk, &write.tag, write.range);
                for checksum in &write.checksums {
                    fields.put_u32_le(*checksum);
                }
                self.data_bytes += write.data.len();
                self.data.push(write.data);
            }
            Change::Discard(discard) => {
                put_change(fields, DISCARD, discard.chunk, &discard.tag, discard.range)
            }
            Change::WriteZeroes(zeroes) => {
                put_change(fields, WRITE_ZEROES, zeroes.chunk, &zeroes.tag, zeroes.range);
                fields.put_u8(u8::from(zeroes.unmap));
            }
            Change::Fence(fence) => {
                fields.put_u8(FENCE);
                fields.put_u64_le(fence.volume.0);
                fields.put_u64_le(fence.epoch.to_u64());
            }
            Change::DropVolume(volume) => {
                fields.put_u8(DROP_VOLUME);
                fields.put_u64_le(volume.0);
            }
            Change::Unfence(fence) => {
                fields.put_u8(UNFENCE);
                fields.put_u64_le(fence.volume.0);
                fields.put_u64_le(fence.epoch.to_u64());
            }
        }
    }

    pub fn finish(mut self) -> Command {
        let bytes = self.fields.len() - PREAMBLE_BYTES;
        let mut preamble = &mut self.fields[..PREAMBLE_BYTES];
        preamble.put_u8(VERSION);
        preamble.put_u8(0);
        preamble.put_u16_le(self.count);
        preamble
            .put_u32_le(u32::try_from(bytes).expect("an entry's fields are bounded by its bound on changes"));
        std::iter::once(self.fields.freeze()).chain(self.data).collect()
    }
}

/// The changes of an entry, in order.
pub fn decode(command: Command) -> Result<SmallVec<[Change; 4]>, CommandError> {
    let mut cursor = command.into_cursor();
    let mut preamble = cursor.take(PREAMBLE_BYTES).ok_or(CommandError::Malformed)?;
    let version = preamble.get_u8();
    if version != VERSION {
        return Err(CommandError::Version(version));
    }
    preamble.advance(1);
    let count = preamble.get_u16_le();
    let mut fields = cursor.take(preamble.get_u32_le() as usize).ok_or(CommandError::Malformed)?;
    let mut changes = SmallVec::new();
    for _ in 0..count {
        let kind = fields.try_get_u8().map_err(|_| CommandError::Malformed)?;
        changes.push(match kind {
            WRITE => {
                let (chunk, tag, range) = get_change(&mut fields)?;
                let bytes = usize::try_from(range.piece_count() * 4).map_err(|_| CommandError::Malformed)?;
                if fields.len() < bytes {
                    return Err(CommandError::Malformed);
                }
                let raw = fields.split_to(bytes);
                let checksums: Checksums =
                    raw.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                let data = cursor.take(range.length() as usize).ok_or(CommandError::Malformed)?;
                Change::Write(Write { chunk, tag, range, checksums, data })
            }
            DISCARD => {
                let (chunk, tag, range) = get_change(&mut fields)?;
                Change::Discard(Discard { chunk, tag, range })
            }
            WRITE_ZEROES => {
                let (chunk, tag, range) = get_change(&mut fields)?;
                let unmap = fields.try_get_u8().map_err(|_| CommandError::Malformed)? != 0;
                Change::WriteZeroes(WriteZeroes { chunk, tag, range, unmap })
            }
            FENCE => {
                let (volume, epoch) =
                    (VolumeId(get_u64(&mut fields)?), Epoch::from_u64(get_u64(&mut fields)?));
                Change::Fence(Fence { volume, epoch })
            }
            DROP_VOLUME => Change::DropVolume(VolumeId(get_u64(&mut fields)?)),
            UNFENCE => {
                let (volume, epoch) =
                    (VolumeId(get_u64(&mut fields)?), Epoch::from_u64(get_u64(&mut fields)?));
                Change::Unfence(Fence { volume, epoch })
            }
            _ => return Err(CommandError::Malformed),
        });
    }
    if fields.is_empty() && cursor.remaining() == 0 { Ok(changes) } else { Err(CommandError::Malformed) }
}

fn put_change(fields: &mut BytesMut, kind: u8, chunk: ChunkKey, tag: &ChangeTag, range: ChunkRange) {
    fields.put_u8(kind);
    fields.put_u64_le(chunk.volume.0);
    fields.put_u32_le(chunk.index.0);
    fields.put_u64_le(tag.epoch.to_u64());
    fields.put_u16_le(tag.lane.0);
    fields.put_u64_le(tag.sequence.0);
    fields.put_u64_le(tag.floor.0);
    fields.put_u32_le(range.offset());
    fields.put_u32_le(range.length());
}

fn get_change(fields: &mut Bytes) -> Result<(ChunkKey, ChangeTag, ChunkRange), CommandError> {
    let volume = VolumeId(get_u64(fields)?);
    let chunk = ChunkKey { volume, index: ChunkIndex(get_u32(fields)?) };
    let epoch = Epoch::from_u64(get_u64(fields)?);
    let lane = Lane(fields.try_get_u16_le().map_err(|_| CommandError::Malformed)?);
    let (sequence, floor) = (Sequence(get_u64(fields)?), Sequence(get_u64(fields)?));
    let range = ChunkRange::new(get_u32(fields)?, get_u32(fields)?).ok_or(CommandError::Malformed)?;
    Ok((chunk, ChangeTag { epoch, lane, sequence, floor }, range))
}

fn get_u32(fields: &mut Bytes) -> Result<u32, CommandError> {
    fields.try_get_u32_le().map_err(|_| CommandError::Malformed)
}

fn get_u64(fields: &mut Bytes) -> Result<u64, CommandError> {
    fields.try_get_u64_le().map_err(|_| CommandError::Malformed)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use evolute_protocol::checksum::checksums;
    use evolute_protocol::epoch::Epoch;
    use evolute_protocol::id::{ChunkIndex, ChunkKey, VolumeId};
    use evolute_protocol::wire::request::{
        ChangeTag, ChunkRange, Discard, Fence, Lane, Sequence, Write, WriteZeroes,
    };
    use evolute_raft::Command;

    use super::{Change, CommandBuilder, CommandError, decode};

    fn examples() -> Vec<Change> {
        let chunk = ChunkKey { volume: VolumeId(5), index: ChunkIndex(6) };
        let epoch = Epoch { attachment: 3, incarnation: 1 };
        let tag = ChangeTag { epoch, lane: Lane(2), sequence: Sequence(10), floor: Sequence(7) };
        let range = ChunkRange::new(512, 4096).expect("valid");
        let data = Bytes::from(vec![0x5a; 4096]);
        let write = Write { chunk, tag, range, checksums: checksums(512, &data), data };
        vec![
            Change::Fence(Fence { volume: VolumeId(5), epoch }),
            Change::Write(write.clone()),
            Change::Discard(Discard { chunk, tag, range }),
            Change::WriteZeroes(WriteZeroes { chunk, tag, range, unmap: true }),
            Change::Write(write),
            Change::DropVolume(VolumeId(5)),
            Change::Unfence(Fence { volume: VolumeId(5), epoch }),
        ]
    }

    fn flat(command: &Command) -> Vec<u8> {
        command.0.iter().flat_map(|part| part.to_vec()).collect()
    }

    #[test]
    fn a_command_is_the_same_for_the_leader_and_from_the_log() {
        let mut builder = CommandBuilder::default();
        examples().into_iter().for_each(|change| builder.push(change));
        assert_eq!(builder.data_bytes(), 8192);
        let command = builder.finish();
        let from_log = Command::from(flat(&command));
        assert_eq!(decode(command).expect("ours").to_vec(), examples());
        assert_eq!(decode(from_log).expect("ours").to_vec(), examples());
    }

    #[test]
    fn a_command_cut_short_or_of_another_version_is_refused() {
        let mut builder = CommandBuilder::default();
        examples().into_iter().for_each(|change| builder.push(change));
        let bytes = flat(&builder.finish());
        for length in 0..bytes.len() {
            assert_eq!(
                decode(Command::from(bytes[..length].to_vec())),
                Err(CommandError::Malformed),
                "{length}"
            );
        }
        let mut newer = bytes;
        newer[0] = 9;
        assert_eq!(decode(Command::from(newer)), Err(CommandError::Version(9)));
    }
}
