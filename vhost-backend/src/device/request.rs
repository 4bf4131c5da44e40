//! A descriptor chain becomes requests for the backing, an answer on the spot, or a refusal.
//!
//! This is the one place where what a guest says about its disk is checked. A chain may be cut into buffers in any
//! way (virtio 1.0 forbids relying on the cut): readable bytes are the header and then the payload, writable bytes
//! are the data and then one byte of status.
//!
//! What always holds for what leaves here: offsets and lengths are whole sectors inside the disk; reads and writes are
//! 1 to `REQUEST_BYTES_MAX` bytes; the payload is our own copy; nothing that changes data passes on a read-only disk.

use bytes::Bytes;
use evolute_protocol::geometry::{REQUEST_BYTES_MAX, SECTOR_BYTES};
use smallvec::SmallVec;

use super::chain::{Buffer, Chain, Malformed};
use super::config_space::{DISCARD_BYTES_MAX, RANGES_MAX, SERIAL_BYTES, WRITE_ZEROES_BYTES_MAX};
use super::memory::Memory;
use crate::backing::{Capacity, Request};

/// Status byte of a request: it worked.
pub const STATUS_OK: u8 = 0;
/// It did not.
pub const STATUS_IOERR: u8 = 1;
/// We do not know such a request.
pub const STATUS_UNSUPP: u8 = 2;

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

const FLAG_UNMAP: u32 = 1;

/// What the parser must know of the disk.
#[derive(Clone, Debug)]
pub struct Geometry {
    pub capacity: Capacity,
    pub read_only: bool,
    /// As GET_ID answers it: padded with zeroes.
    pub serial: [u8; SERIAL_BYTES],
}

/// A chain, understood.
#[derive(Debug)]
pub enum Parsed {
    /// For the backing. One request, except for the ranges of a discard or write-zeroes, which are answered together.
    Submit(SmallVec<[Request; 1]>),
    /// Nothing to do: a flush (every ack is durable already), or ranges without a sector.
    Done,
    /// GET_ID.
    Serial,
}

/// Why a chain is not a request. The guest gets [`Refused::status`] and no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("malformed chain: {0}")]
    Malformed(#[from] Malformed),
    #[error("no header of 16 bytes")]
    NoHeader,
    #[error("no byte for the status")]
    NoStatus,
    #[error("request type {0} is not one we offer")]
    UnknownType(u32),
    #[error("flags {0:#x} are not ones we offer")]
    UnknownFlags(u32),
    #[error("{0} bytes are not whole sectors, or none, or more than we advertise")]
    Length(u64),
    #[error("{0} bytes of ranges")]
    Ranges(u64),
    #[error("buffers for the wrong direction")]
    Direction,
    #[error("beyond the end of the disk")]
    BeyondEnd,
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("a buffer left guest memory while we read it")]
    Gone,
}

impl Refused {
    pub fn status(&self) -> u8 {
        match self {
            Refused::UnknownType(_) | Refused::UnknownFlags(_) => STATUS_UNSUPP,
            _ => STATUS_IOERR,
        }
    }
}

fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|b| u64::from(b.len)).sum()
}

/// Understands a walked chain. On success `chain.writable` holds only the data part: the status byte is cut off.
pub fn parse(chain: &mut Chain, memory: &Memory, disk: &Geometry) -> Result<Parsed, Refused> {
    if chain.status_at.is_none() {
        return Err(Refused::NoStatus);
    }
    cut_status(&mut chain.writable);
    let (kind, sector, payload) = read_header(&chain.readable, memory)?;
    let payload_len = total(&chain.readable) - HEADER_BYTES as u64;
    let data_len = total(&chain.writable);
    match kind {
        TYPE_IN => {
            if payload_len != 0 {
                return Err(Refused::Direction);
            }
            let (offset, len) = span(disk, sector, data_len)?;
            Ok(submit(Request::Read { offset, len }))
        }
        TYPE_OUT => {
            if data_len != 0 {
                return Err(Refused::Direction);
            }
            if disk.read_only {
                return Err(Refused::ReadOnly);
            }
            let (offset, len) = span(disk, sector, payload_len)?;
            let data = copy_payload(&payload, memory, len as usize)?;
            Ok(submit(Request::Write { offset, data: Bytes::from(data) }))
        }
        TYPE_FLUSH => Ok(Parsed::Done),
        TYPE_GET_ID => match data_len {
            0 => Err(Refused::Length(0)),
            _ => Ok(Parsed::Serial),
        },
        TYPE_DISCARD | TYPE_WRITE_ZEROES => {
            if disk.read_only {
                return Err(Refused::ReadOnly);
            }
            if data_len != 0 {
                return Err(Refused::Direction);
            }
            let len = usize::try_from(payload_len).unwrap_or(usize::MAX);
            if len == 0 || !len.is_multiple_of(RANGE_BYTES) || len / RANGE_BYTES > RANGES_MAX as usize {
                return Err(Refused::Ranges(payload_len));
            }
            ranges(&copy_payload(&payload, memory, len)?, kind, disk)
        }
        other => Err(Refused::UnknownType(other)),
    }
}

fn submit(request: Request) -> Parsed {
    Parsed::Submit(SmallVec::from_buf([request]))
}

/// The last writable byte is the status; what is before it is data.
fn cut_status(writable: &mut Vec<Buffer>) {
    if let Some(last) = writable.last_mut() {
        last.len -= 1;
        if last.len == 0 {
            writable.pop();
        }
    }
}

/// Type and sector, copied once, and what is readable after them.
fn read_header(readable: &[Buffer], memory: &Memory) -> Result<(u32, u64, SmallVec<[Buffer; 4]>), Refused> {
    let mut header = [0u8; HEADER_BYTES];
    let mut have = 0;
    let mut rest: SmallVec<[Buffer; 4]> = SmallVec::new();
    for buffer in readable {
        let take = (HEADER_BYTES - have).min(buffer.len as usize);
        memory.read(buffer.addr, &mut header[have..have + take]).map_err(|_| Refused::Gone)?;
        have += take;
        let taken = u32::try_from(take).expect("at most 16");
        if buffer.len > taken {
            rest.push(Buffer { addr: buffer.addr + u64::from(taken), len: buffer.len - taken });
        }
    }
    if have < HEADER_BYTES {
        return Err(Refused::NoHeader);
    }
    let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    Ok((kind, sector, rest))
}

/// Byte offset and length of a read or write, if it is one.
fn span(disk: &Geometry, sector: u64, len: u64) -> Result<(u64, u32), Refused> {
    if len == 0 || len > REQUEST_BYTES_MAX || !len.is_multiple_of(SECTOR_BYTES) {
        return Err(Refused::Length(len));
    }
    let offset = inside(disk, sector, len)?;
    Ok((offset, u32::try_from(len).expect("at most REQUEST_BYTES_MAX")))
}

fn inside(disk: &Geometry, sector: u64, len: u64) -> Result<u64, Refused> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Refused::BeyondEnd)?;
    let end = offset.checked_add(len).ok_or(Refused::BeyondEnd)?;
    if disk.capacity.get().is_none_or(|capacity| end > capacity) {
        return Err(Refused::BeyondEnd);
    }
    Ok(offset)
}

fn copy_payload(payload: &[Buffer], memory: &Memory, len: usize) -> Result<Vec<u8>, Refused> {
    let mut data = Vec::with_capacity(len);
    for buffer in payload {
        memory.append_to(buffer.addr, buffer.len, &mut data).map_err(|_| Refused::Gone)?;
    }
    Ok(data)
}

/// The ranges of a discard or write-zeroes.
fn ranges(list: &[u8], kind: u32, disk: &Geometry) -> Result<Parsed, Refused> {
    let (flags_known, bytes_max) = match kind {
        TYPE_DISCARD => (0, DISCARD_BYTES_MAX),
        _ => (FLAG_UNMAP, WRITE_ZEROES_BYTES_MAX),
    };
    let mut requests = SmallVec::new();
    for range in list.as_chunks::<RANGE_BYTES>().0 {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = *range;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !flags_known != 0 {
            return Err(Refused::UnknownFlags(flags));
        }
        let len = u64::from(sectors) * SECTOR_BYTES;
        if len > bytes_max {
            return Err(Refused::Length(len));
        }
        let offset = inside(disk, sector, len)?;
        if len == 0 {
            continue;
        }
        requests.push(match kind {
            TYPE_DISCARD => Request::Discard { offset, len },
            _ => Request::WriteZeroes { offset, len, unmap: flags & FLAG_UNMAP != 0 },
        });
    }
    match requests.is_empty() {
        true => Ok(Parsed::Done),
        false => Ok(Parsed::Submit(requests)),
    }
}
