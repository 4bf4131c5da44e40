//! A replica on its way to another chunkserver: what Raft calls a snapshot, in frames of ours.
//!
//! ```text
//!  leader   Sending:  State (as of the last checkpoint) ─▶ Chunk … Chunk (read live) ─▶ End (how many)
//!  joiner   Arriving: kept                               ─▶ staged beside the old one   ─▶ synced; then install
//! ```
//!
//! The chunks may hold effects of entries after the state; applying those again changes nothing (`apply.rs`). Neither
//! side holds more than a frame and the state in memory. What does not verify is refused by name, and the transfer
//! with it: the replica that is here lives on.
//!
//! Drawn in `docs/chunk-format.md`, section "Frames".

use std::any::Any;
use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use evolute_protocol::checksum::crc32c;
use evolute_protocol::geometry::BLOCK_BYTES;
use evolute_protocol::id::{ChunkIndex, ChunkKey, CopysetId, VolumeId};
use evolute_raft::{LocalFuture, SNAPSHOT_FRAME_BYTES_MAX, SnapshotHead, SnapshotSink, SnapshotSource};

use super::state::{DamagedState, State};
use crate::chunk_store::{ChunkStore, CopysetRecord, EXPORT_BLOCKS_MAX, Export, Extent, StageError, Staging};

const VERSION: u8 = 1;

const STATE: u8 = 1;
const CHUNK: u8 = 2;
const END: u8 = 3;

/// Crc of all that follows but data, kind, version, spare, copyset, bytes of fields.
const PREAMBLE_BYTES: usize = 16;
const FIELDS_BYTES_AT: usize = 12;
const CRC_BYTES: usize = size_of::<u32>();
/// Bytes of the state in one frame.
const STATE_PART_BYTES: usize = 512 << 10;
/// All of it: 64 lanes with full windows for each of eight volumes, which no good client comes near.
const STATE_BYTES_MAX: usize = 256 << 20;
/// An extent's fields without checksums.
const EXTENT_BYTES: usize = 5;
const DATA: u8 = 0;
const DAMAGED: u8 = 1;
const BLOCK: usize = 4096;
const _: () = assert!(BLOCK as u64 == BLOCK_BYTES);
/// Volume, chunk, count of extents.
const CHUNK_FIELDS_BYTES: usize = 14;

const _: () = {
    // Every block an extent of its own.
    let most = PREAMBLE_BYTES + CHUNK_FIELDS_BYTES + EXPORT_BLOCKS_MAX * (EXTENT_BYTES + 4 + BLOCK);
    assert!(
        most <= SNAPSHOT_FRAME_BYTES_MAX && PREAMBLE_BYTES + 8 + STATE_PART_BYTES <= SNAPSHOT_FRAME_BYTES_MAX
    );
};

/// Why a transfer ends. Whoever receives asks for it again.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error("a frame of version {0}; this program knows version {VERSION}")]
    Version(u8),
    #[error("a frame of kind {0}, which does not exist")]
    Kind(u8),
    #[error("a frame does not match its checksum, or is cut short")]
    Damaged,
    #[error("a frame of {0}")]
    OtherCopyset(CopysetId),
    #[error("a frame that is out of order")]
    OutOfOrder,
    #[error("a state of {0} bytes")]
    TooLarge(usize),
    #[error("{blocks} blocks of {frames} frames came, {said} were sent")]
    Incomplete { frames: u64, blocks: u64, said: u64 },
    #[error("it is of another position or membership than was said")]
    OtherHead,
    #[error(transparent)]
    State(#[from] DamagedState),
    #[error(transparent)]
    Stage(#[from] StageError),
}

impl From<TransferError> for io::Error {
    fn from(error: TransferError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// The sending side.
pub struct Sending {
    copyset: CopysetId,
    head: SnapshotHead,
    state: Bytes,
    state_sent: usize,
    export: Export,
    blocks: u64,
    ended: bool,
}

impl Sending {
    /// `record` is what the last checkpoint holds. `None`: it holds nothing yet.
    pub fn begin(store: &ChunkStore, record: &CopysetRecord) -> Option<Self> {
        let state = State::parse(record).ok()?;
        let head = SnapshotHead { at: state.applied()?, membership: state.membership()?.clone() };
        let export = store.export(record.copyset);
        let state = record.state.clone();
        Some(Self { copyset: record.copyset, head, state, state_sent: 0, export, blocks: 0, ended: false })
    }

    fn state_frame(&mut self) -> Bytes {
        let part =
            self.state.slice(self.state_sent..self.state.len().min(self.state_sent + STATE_PART_BYTES));
        let mut frame = Frame::new(STATE, self.copyset);
        frame.0.put_u32_le(length(self.state.len()));
        frame.0.put_u32_le(length(self.state_sent));
        frame.0.put_slice(&part);
        self.state_sent += part.len();
        frame.finish(&[])
    }

    async fn next_frame(&mut self) -> Option<Bytes> {
        // Never empty: it has a version.
        if self.state_sent < self.state.len() {
            return Some(self.state_frame());
        }
        if let Some((chunk, extents)) = self.export.next().await {
            self.blocks += extents.iter().map(|extent| extent.count() as u64).sum::<u64>();
            return Some(chunk_frame(self.copyset, chunk, &extents));
        }
        if std::mem::replace(&mut self.ended, true) {
            return None;
        }
        let mut frame = Frame::new(END, self.copyset);
        frame.0.put_u64_le(self.blocks);
        Some(frame.finish(&[]))
    }
}

impl SnapshotSource for Sending {
    fn head(&self) -> SnapshotHead {
        self.head.clone()
    }

    fn next(&mut self) -> LocalFuture<'_, io::Result<Option<Bytes>>> {
        Box::pin(async move { Ok(self.next_frame().await) })
    }
}

fn chunk_frame(copyset: CopysetId, chunk: ChunkKey, extents: &[Extent]) -> Bytes {
    let mut frame = Frame::new(CHUNK, copyset);
    frame.0.put_u64_le(chunk.volume.0);
    frame.0.put_u32_le(chunk.index.0);
    frame.0.put_u16_le(u16::try_from(extents.len()).expect("at most one per block"));
    let mut data = Vec::new();
    for extent in extents {
        frame.0.put_u16_le(extent.first());
        frame.0.put_u16_le(u16::try_from(extent.count()).expect("at most 4096"));
        match extent {
            Extent::Data { data: bytes, crcs, .. } => {
                frame.0.put_u8(DATA);
                crcs.iter().for_each(|crc| frame.0.put_u32_le(*crc));
                data.push(bytes);
            }
            Extent::Damaged { .. } => frame.0.put_u8(DAMAGED),
        }
    }
    frame.finish(&data)
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("far below 4 GiB")
}

struct Frame(BytesMut);

impl Frame {
    fn new(kind: u8, copyset: CopysetId) -> Self {
        let mut bytes = BytesMut::new();
        bytes.put_u32_le(0);
        bytes.put_u8(kind);
        bytes.put_u8(VERSION);
        bytes.put_u16_le(0);
        bytes.put_u32_le(copyset.0);
        bytes.put_u32_le(0);
        Self(bytes)
    }

    fn finish(self, data: &[&Bytes]) -> Bytes {
        let mut bytes = self.0;
        let fields = length(bytes.len() - PREAMBLE_BYTES);
        bytes[FIELDS_BYTES_AT..PREAMBLE_BYTES].copy_from_slice(&fields.to_le_bytes());
        let crc = crc32c(&bytes[CRC_BYTES..]);
        bytes[..CRC_BYTES].copy_from_slice(&crc.to_le_bytes());
        bytes.reserve(data.iter().map(|data| data.len()).sum());
        data.iter().for_each(|data| bytes.put_slice(data));
        bytes.freeze()
    }
}

/// The fields of a frame whose checksum holds, its kind, and the data behind.
fn open(copyset: CopysetId, mut frame: Bytes) -> Result<(u8, Bytes, Bytes), TransferError> {
    if frame.len() < PREAMBLE_BYTES || frame.len() > SNAPSHOT_FRAME_BYTES_MAX {
        return Err(TransferError::Damaged);
    }
    let mut preamble = &frame[..PREAMBLE_BYTES];
    let crc = preamble.get_u32_le();
    let (kind, version, _) = (preamble.get_u8(), preamble.get_u8(), preamble.get_u16_le());
    let (of, fields) = (CopysetId(preamble.get_u32_le()), preamble.get_u32_le() as usize);
    if version != VERSION {
        return Err(TransferError::Version(version));
    }
    if frame.len() - PREAMBLE_BYTES < fields {
        return Err(TransferError::Damaged);
    }
    let data = frame.split_off(PREAMBLE_BYTES + fields);
    if crc32c(&frame[CRC_BYTES..]) != crc {
        return Err(TransferError::Damaged);
    }
    if of != copyset {
        return Err(TransferError::OtherCopyset(of));
    }
    frame.advance(PREAMBLE_BYTES);
    Ok((kind, frame, data))
}

/// The receiving side.
pub struct Arriving {
    copyset: CopysetId,
    head: SnapshotHead,
    state: BytesMut,
    state_bytes: Option<usize>,
    staging: Staging,
    frames: u64,
    blocks: u64,
    ended: bool,
}

impl Arriving {
    pub fn new(store: &ChunkStore, copyset: CopysetId, head: SnapshotHead) -> Self {
        Self {
            copyset,
            head,
            state: BytesMut::new(),
            state_bytes: None,
            staging: store.stage(copyset),
            frames: 0,
            blocks: 0,
            ended: false,
        }
    }

    async fn take(&mut self, frame: Bytes) -> Result<(), TransferError> {
        let (kind, fields, data) = open(self.copyset, frame)?;
        let state_is_here = self.state_bytes == Some(self.state.len());
        match kind {
            STATE if !state_is_here && data.is_empty() => self.take_state(fields),
            CHUNK if state_is_here && !self.ended => self.take_chunk(fields, data).await,
            END if state_is_here && !self.ended && data.is_empty() => self.take_end(fields).await,
            STATE | CHUNK | END => Err(TransferError::OutOfOrder),
            kind => Err(TransferError::Kind(kind)),
        }
    }

    fn take_state(&mut self, mut fields: Bytes) -> Result<(), TransferError> {
        let total = fields.try_get_u32_le().map_err(|_| TransferError::Damaged)? as usize;
        let at = fields.try_get_u32_le().map_err(|_| TransferError::Damaged)? as usize;
        if total > STATE_BYTES_MAX {
            return Err(TransferError::TooLarge(total));
        }
        let goes_on = at == self.state.len() && *self.state_bytes.get_or_insert(total) == total;
        if !goes_on || fields.is_empty() || at + fields.len() > total {
            return Err(TransferError::OutOfOrder);
        }
        self.state.put(fields);
        Ok(())
    }

    async fn take_chunk(&mut self, mut fields: Bytes, data: Bytes) -> Result<(), TransferError> {
        let (chunk, extents) = get_extents(&mut fields, data).ok_or(TransferError::Damaged)?;
        self.frames += 1;
        self.blocks += extents.iter().map(|extent| extent.count() as u64).sum::<u64>();
        Ok(self.staging.put(chunk, extents).await?)
    }

    async fn take_end(&mut self, mut fields: Bytes) -> Result<(), TransferError> {
        let said = fields.try_get_u64_le().map_err(|_| TransferError::Damaged)?;
        if said != self.blocks || !fields.is_empty() {
            return Err(TransferError::Incomplete { frames: self.frames, blocks: self.blocks, said });
        }
        self.staging.finish().await?;
        self.ended = true;
        Ok(())
    }

    /// Everything came: the state of the replica that is now staged.
    pub fn complete(self, head: &SnapshotHead) -> Result<(State, Staging), TransferError> {
        if !self.ended {
            return Err(TransferError::OutOfOrder);
        }
        let record = CopysetRecord {
            copyset: self.copyset,
            applied: head.at.index,
            state: self.state.freeze(),
            created: Bytes::new(),
        };
        let state = State::parse(&record)?;
        if self.head != *head
            || state.applied() != Some(head.at)
            || state.membership() != Some(&head.membership)
        {
            return Err(TransferError::OtherHead);
        }
        Ok((state, self.staging))
    }
}

fn get_extents(fields: &mut Bytes, mut data: Bytes) -> Option<(ChunkKey, Vec<Extent>)> {
    let volume = VolumeId(fields.try_get_u64_le().ok()?);
    let chunk = ChunkKey { volume, index: ChunkIndex(fields.try_get_u32_le().ok()?) };
    let mut extents = Vec::new();
    for _ in 0..fields.try_get_u16_le().ok()? {
        let (first, count) = (fields.try_get_u16_le().ok()?, fields.try_get_u16_le().ok()?);
        extents.push(match fields.try_get_u8().ok()? {
            DATA => {
                let (crcs, bytes) = (usize::from(count) * 4, usize::from(count) * BLOCK);
                if fields.len() < crcs || data.len() < bytes {
                    return None;
                }
                let raw = fields.split_to(crcs);
                let crcs =
                    raw.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                Extent::Data { first, data: data.split_to(bytes), crcs }
            }
            DAMAGED => Extent::Damaged { first, count },
            _ => return None,
        });
    }
    (fields.is_empty() && data.is_empty()).then_some((chunk, extents))
}

impl SnapshotSink for Arriving {
    fn put(&mut self, frame: Bytes) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move { Ok(self.take(frame).await?) })
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
