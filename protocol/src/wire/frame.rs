//! One frame: a fixed header, the fields of one message, and its data.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use crc_fast::{CrcAlgorithm, Digest};

use crate::geometry::{BLOCK_BYTES, REQUEST_BYTES_MAX};
use crate::id::CopysetId;

/// "EVF1": a frame of version 1 of the wire.
const MAGIC: u32 = u32::from_le_bytes(*b"EVF1");
/// Bytes of the header; its fields are in the order of `docs/wire.md`.
pub const HEADER_BYTES: usize = 32;
const CRC_AT: usize = HEADER_BYTES - 4;
/// The longest fields: the fixed part of a write, and one checksum for each piece of the longest request (one more
/// than its blocks, since it need not begin at a block border).
pub const HEAD_BYTES_MAX: usize = 64 + 4 * (PAYLOAD_BYTES_MAX / BLOCK + 1);
/// The longest data of a frame.
#[expect(clippy::cast_possible_truncation, reason = "a MiB")]
pub const PAYLOAD_BYTES_MAX: usize = REQUEST_BYTES_MAX as usize;
#[expect(clippy::cast_possible_truncation, reason = "4 KiB")]
const BLOCK: usize = BLOCK_BYTES as usize;
const _: () = assert!(HEAD_BYTES_MAX <= u16::MAX as usize);

/// Ties a reply to its request; chosen by the client, unique among its requests in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RequestId(pub u64);

/// Why bytes are not a frame of ours. The stream can not be trusted after any of these: close the connection.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    #[error("not an Evolute frame (it begins with {0:#010x})")]
    NotAFrame(u32),
    #[error("a frame of {head} + {payload} bytes, more than the longest allowed")]
    TooLong { head: usize, payload: usize },
    #[error("a frame's header or fields were damaged on the way")]
    Damaged,
    #[error("a message of unknown kind {0}")]
    UnknownKind(u8),
    #[error("a message of kind {kind} with a {what} that nobody can have reached: {number}")]
    Beyond { kind: u8, what: &'static str, number: u64 },
    #[error("a message of kind {kind} whose fields do not make sense: {what}")]
    Malformed { kind: u8, what: &'static str },
}

/// A frame whose header and fields are intact; its kind decides what the fields mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub copyset: CopysetId,
    pub request: RequestId,
    pub head: Bytes,
    pub payload: Bytes,
}

/// Appends header and fields of a frame to `out`; its payload must follow them on the wire as it is.
///
/// The payload is not copied here: whoever sends keeps it by reference.
pub fn put_frame(
    out: &mut BytesMut,
    kind: u8,
    copyset: CopysetId,
    request: RequestId,
    payload_bytes: usize,
    head: impl FnOnce(&mut BytesMut),
) {
    let at = out.len();
    out.put_bytes(0, HEADER_BYTES);
    head(out);
    let head_bytes = out.len() - at - HEADER_BYTES;
    assert!(
        head_bytes <= HEAD_BYTES_MAX && payload_bytes <= PAYLOAD_BYTES_MAX,
        "{head_bytes} + {payload_bytes}"
    );
    {
        let mut header = &mut out[at..at + CRC_AT];
        header.put_u32_le(MAGIC);
        header.put_u8(kind);
        header.put_u8(0);
        header.put_u16_le(u16::try_from(head_bytes).unwrap_or(u16::MAX));
        header.put_u32_le(u32::try_from(payload_bytes).unwrap_or(u32::MAX));
        header.put_u32_le(copyset.0);
        header.put_u64_le(request.0);
        header.put_u32_le(0);
    }
    let crc = header_crc(&out[at..at + CRC_AT], &out[at + HEADER_BYTES..]);
    out[at + CRC_AT..at + HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}

#[expect(clippy::cast_possible_truncation, reason = "a 32-bit crc in a u64")]
fn header_crc(header: &[u8], head: &[u8]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    digest.update(header);
    digest.update(head);
    digest.finalize() as u32
}

/// Cuts frames out of a stream of bytes without copying them.
///
/// Whoever owns the socket reads into [`FrameReader::space`]; frames come out of [`FrameReader::next`].
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: BytesMut,
}

/// How much is asked of the socket at once: some sixty 4 KiB writes, so that a busy connection costs one system call
/// for many frames, and a frame pins at most this much beside itself.
const READ_BYTES: usize = 256 << 10;
/// The same while long frames come: the part of one that does not fit any more is copied, and this many hold eight.
const READ_BYTES_LONG: usize = 1 << 20;
const LONG: usize = 64 << 10;

impl FrameReader {
    /// Where the next bytes of the socket go.
    pub fn space(&mut self) -> &mut BytesMut {
        let missing = self.missing().unwrap_or(0);
        if self.buffer.capacity() - self.buffer.len() < (16 << 10).max(missing) {
            let long = self.buffer.len() + missing >= LONG;
            self.buffer.reserve(if long { READ_BYTES_LONG } else { READ_BYTES }.max(missing));
        }
        &mut self.buffer
    }

    /// Bytes that have arrived of a long frame that is not whole. Short ones are not worth counting.
    pub fn unfinished(&self) -> usize {
        if self.buffer.len() >= LONG { self.buffer.len() } else { 0 }
    }

    /// Bytes the frame at the front still lacks, once its header is there.
    fn missing(&self) -> Option<usize> {
        let header = self.buffer.get(..HEADER_BYTES)?;
        let head = usize::from(u16::from_le_bytes([header[6], header[7]]));
        let payload = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
        (HEADER_BYTES + head.min(HEAD_BYTES_MAX) + payload.min(PAYLOAD_BYTES_MAX))
            .checked_sub(self.buffer.len())
    }

    /// The next whole frame, or `None` when more bytes are needed.
    #[expect(clippy::should_implement_trait, reason = "an iterator could not also be filled")]
    pub fn next(&mut self) -> Result<Option<Frame>, WireError> {
        if self.buffer.len() >= 4 {
            let magic = u32::from_le_bytes([self.buffer[0], self.buffer[1], self.buffer[2], self.buffer[3]]);
            if magic != MAGIC {
                return Err(WireError::NotAFrame(magic));
            }
        }
        let Some(mut header) = self.buffer.get(4..HEADER_BYTES) else { return Ok(None) };
        let kind = header.get_u8();
        header.advance(1);
        let head_bytes = usize::from(header.get_u16_le());
        let payload_bytes = header.get_u32_le() as usize;
        let copyset = CopysetId(header.get_u32_le());
        let request = RequestId(header.get_u64_le());
        header.advance(4);
        let crc = header.get_u32_le();
        if head_bytes > HEAD_BYTES_MAX || payload_bytes > PAYLOAD_BYTES_MAX {
            return Err(WireError::TooLong { head: head_bytes, payload: payload_bytes });
        }
        let payload_at = HEADER_BYTES + head_bytes;
        if self.buffer.len() < payload_at + payload_bytes {
            return Ok(None);
        }
        if crc != header_crc(&self.buffer[..CRC_AT], &self.buffer[HEADER_BYTES..payload_at]) {
            return Err(WireError::Damaged);
        }
        let mut whole = self.buffer.split_to(payload_at + payload_bytes).freeze();
        whole.advance(HEADER_BYTES);
        let head = whole.split_to(head_bytes);
        Ok(Some(Frame { kind, copyset, request, head, payload: whole }))
    }
}

/// Reads fields one after the other; running out of bytes is an error, not a panic.
pub(super) struct Fields {
    kind: u8,
    rest: Bytes,
}

impl Fields {
    pub(super) fn new(frame: &Frame) -> Self {
        Self { kind: frame.kind, rest: frame.head.clone() }
    }

    pub(super) fn malformed(&self, what: &'static str) -> WireError {
        WireError::Malformed { kind: self.kind, what }
    }

    fn need(&self, bytes: usize) -> Result<(), WireError> {
        if self.rest.len() < bytes { Err(self.malformed("too short")) } else { Ok(()) }
    }

    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        self.need(1)?;
        Ok(self.rest.get_u8())
    }

    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        self.need(2)?;
        Ok(self.rest.get_u16_le())
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        self.need(4)?;
        Ok(self.rest.get_u32_le())
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        self.need(8)?;
        Ok(self.rest.get_u64_le())
    }

    /// A number that is counted up from 0 or 1, and nowhere near its end.
    pub(super) fn counted(&mut self, max: u64, what: &'static str) -> Result<u64, WireError> {
        let number = self.u64()?;
        if number <= max { Ok(number) } else { Err(WireError::Beyond { kind: self.kind, what, number }) }
    }

    pub(super) fn beyond(&self, what: &'static str, number: u64) -> WireError {
        WireError::Beyond { kind: self.kind, what, number }
    }

    /// Everything that is left, as checksums.
    pub(super) fn checksums(&mut self, count: u64) -> Result<crate::checksum::Checksums, WireError> {
        if self.rest.len() as u64 != count * 4 {
            return Err(self.malformed("not one checksum per piece of data"));
        }
        Ok(self.rest.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    pub(super) fn end(self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.malformed("too long")) }
    }
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, BytesMut};

    use super::{FrameReader, HEADER_BYTES, RequestId, WireError, put_frame};
    use crate::id::CopysetId;

    fn one() -> BytesMut {
        let mut bytes = BytesMut::new();
        put_frame(&mut bytes, 9, CopysetId(3), RequestId(77), 5, |head| head.put_u64_le(1234));
        bytes.put_slice(b"hello");
        bytes
    }

    #[test]
    fn a_frame_arrives_in_any_number_of_parts() {
        let bytes = one();
        for cut in 0..bytes.len() {
            let mut reader = FrameReader::default();
            reader.space().put_slice(&bytes[..cut]);
            assert_eq!(reader.next(), Ok(None));
            reader.space().put_slice(&bytes[cut..]);
            let frame = reader.next().expect("intact").expect("whole");
            assert_eq!((frame.kind, frame.copyset, frame.request), (9, CopysetId(3), RequestId(77)));
            assert_eq!((&frame.head[..], &frame.payload[..]), (&1234u64.to_le_bytes()[..], &b"hello"[..]));
            assert_eq!(reader.next(), Ok(None));
        }
    }

    #[test]
    fn a_flipped_bit_in_header_or_fields_is_noticed() {
        let bytes = one();
        for bit in 0..(HEADER_BYTES + 8) * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let mut reader = FrameReader::default();
            reader.space().put_slice(&damaged);
            // A longer length leaves the reader waiting for more; what it must never do is hand out a frame.
            assert!(!matches!(reader.next(), Ok(Some(_))), "bit {bit}");
        }
    }

    #[test]
    fn garbage_is_refused_at_its_first_bytes() {
        let mut reader = FrameReader::default();
        reader.space().put_slice(b"GET / HTTP/1.1\r\n");
        assert!(matches!(reader.next(), Err(WireError::NotAFrame(_))));
    }
}
