//! Frames between two processes: what they look like, how many leave in one write, how they are read.
//!
//! ```text
//!  0 "EVR1" | 4 u8 kind | 5 zero | 8 u32 bytes of body | 12 zero | 16 u64 group | 24 u64 session | 32 u32 crc32c | 36 zero | 40 body
//! ```
//!
//! Little-endian. The checksum covers the header up to it and the body.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::rc::Rc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use crc_fast::{CrcAlgorithm, Digest};
use evolute_daemon::door::Seat;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;

use crate::GroupId;
use crate::thread::after_others;

const MAGIC: u32 = u32::from_le_bytes(*b"EVR1");
const HEADER: usize = 40;
const LENGTH_AT: usize = 8;
const CRC_AT: usize = 32;
/// The longest body. An append carries what the log reader gives at once, a few MiB, and one command more.
const BODY_MAX: usize = 32 << 20;
/// Asked of the socket at once.
const READ_BYTES: usize = 256 << 10;
/// The same when a long frame did not fit any more: what had come of it is copied, and this many hold eight.
const READ_BYTES_LONG: usize = 1 << 20;
const LONG: usize = 64 << 10;
/// Data at least this long goes out from where it is; shorter data is copied, which costs less than a part of its own.
const BY_REFERENCE_BYTES_MIN: usize = 16 << 10;
/// Parts of one `writev`.
const PARTS_MAX: usize = 64;
/// What may wait to be sent to one process before those who can wait do.
const UNSENT_MAX: usize = 16 << 20;

/// What a frame is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Leader → follower: entries, commit index, retain floor. The first of a session opens it.
    Append = 1,
    /// Follower → leader: how far, or why not.
    Appended = 2,
    /// Leader → follower: the session is over.
    Close = 3,
    Vote = 4,
    PreVote = 5,
    /// The answer to either.
    Voted = 6,
    Transfer = 7,
    Transferred = 8,
    /// The group (or that replica of it) is not here: the answer to anything. To an append also: there is no room for its
    /// entries now.
    NotHere = 9,
    /// Leader → follower: a raft snapshot begins, or goes on over this connection.
    Snapshot = 10,
    /// Leader → follower: the next part of it.
    SnapshotFrame = 11,
    /// Leader → follower: there is no more.
    SnapshotEnd = 12,
    /// Follower → leader: how far it is.
    SnapshotAnswer = 13,
    /// Follower → leader: hand over to me. Never answered.
    TakeOver = 14,
    /// Leader → follower: nothing comes for a while.
    Sleep = 15,
    /// Follower → leader: whether it sleeps now.
    Slept = 16,
    /// Leader → follower: this replica does not lead any more. Never answered.
    Wake = 17,
    /// Of no group: whoever sends it lives. Whoever is called answers with the same.
    Alive = 18,
}

impl Kind {
    fn from_u8(raw: u8) -> Option<Self> {
        [
            Self::Append,
            Self::Appended,
            Self::Close,
            Self::Vote,
            Self::PreVote,
            Self::Voted,
            Self::Transfer,
            Self::Transferred,
            Self::NotHere,
            Self::Snapshot,
            Self::SnapshotFrame,
            Self::SnapshotEnd,
            Self::SnapshotAnswer,
            Self::TakeOver,
            Self::Sleep,
            Self::Slept,
            Self::Wake,
            Self::Alive,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == raw)
    }
}

/// One intact frame.
#[derive(Debug)]
pub(super) struct Frame {
    pub kind: Kind,
    pub group: GroupId,
    pub session: u64,
    pub body: Bytes,
}

/// The checksum of a frame: its header up to it, then its body.
struct Crc(Digest);

impl Crc {
    fn new(header: &[u8]) -> Self {
        let mut crc = Self(Digest::new(CrcAlgorithm::Crc32Iscsi));
        crc.add(header);
        crc
    }

    fn add(&mut self, body: &[u8]) {
        self.0.update(body);
    }

    fn value(self) -> u32 {
        u32::try_from(self.0.finalize() & u64::from(u32::MAX)).unwrap_or_default()
    }
}

/// The body of a frame that is being made.
pub(super) struct Body<'a> {
    pub bytes: &'a mut BytesMut,
    /// Data that goes between them: before the byte of this number.
    long: Vec<(usize, Bytes)>,
}

impl<'a> Body<'a> {
    pub fn of(bytes: &'a mut BytesMut) -> Self {
        Self { bytes, long: Vec::new() }
    }

    /// Copies the data or, if it is long, keeps it where it is.
    pub fn put(&mut self, data: &Bytes) {
        if data.len() < BY_REFERENCE_BYTES_MIN {
            self.bytes.put_slice(data);
        } else {
            self.long.push((self.bytes.len(), data.clone()));
        }
    }
}

/// What waits to be sent to one process. Everybody on the thread adds to it; one task writes it out.
#[derive(Default)]
pub(super) struct Outbox {
    open: RefCell<BytesMut>,
    /// What goes out before `open`.
    queue: RefCell<VecDeque<Bytes>>,
    queued_bytes: Cell<usize>,
    filled: Notify,
    drained: Notify,
    ended: Notify,
    closed: Cell<bool>,
}

impl Outbox {
    pub fn frame(&self, kind: Kind, group: GroupId, session: u64, body: impl FnOnce(&mut BytesMut)) {
        self.frame_with(kind, group, session, |out| body(out.bytes));
    }

    /// The same with data that need not be copied.
    pub fn frame_with(&self, kind: Kind, group: GroupId, session: u64, body: impl FnOnce(&mut Body<'_>)) {
        if self.closed.get() {
            return;
        }
        let mut out = self.open.borrow_mut();
        let at = out.len();
        out.put_u32_le(MAGIC);
        out.put_u8(kind as u8);
        out.put_bytes(0, 11);
        out.put_u64_le(group.0);
        out.put_u64_le(session);
        out.put_bytes(0, HEADER - CRC_AT);
        let mut made = Body::of(&mut out);
        body(&mut made);
        let long = made.long;
        let long_bytes: usize = long.iter().map(|(_, data)| data.len()).sum();
        let length = out.len() - at - HEADER + long_bytes;
        let length = u32::try_from(length).expect("far below 4 GiB");
        out[at + LENGTH_AT..at + LENGTH_AT + 4].copy_from_slice(&length.to_le_bytes());
        let mut crc = Crc::new(&out[at..at + CRC_AT]);
        let mut from = at + HEADER;
        for (before, data) in &long {
            crc.add(&out[from..*before]);
            crc.add(data);
            from = *before;
        }
        crc.add(&out[from..]);
        out[at + CRC_AT..at + CRC_AT + 4].copy_from_slice(&crc.value().to_le_bytes());
        let mut queue = self.queue.borrow_mut();
        let mut gone = 0;
        for (before, data) in long {
            queue.push_back(out.split_to(before - gone).freeze());
            queue.push_back(data);
            self.queued_bytes
                .set(self.queued_bytes.get() + before - gone + queue.back().map_or(0, Bytes::len));
            gone = before;
        }
        self.filled.notify_one();
    }

    fn unsent_bytes(&self) -> usize {
        self.queued_bytes.get() + self.open.borrow().len()
    }

    /// Everything there is, and an empty outbox.
    fn take(&self) -> VecDeque<Bytes> {
        self.queued_bytes.set(0);
        let mut parts = self.queue.take();
        let last = self.open.borrow_mut().split().freeze();
        if !last.is_empty() {
            parts.push_back(last);
        }
        parts
    }

    /// Waits until there is room for a large frame. Cancel-safe.
    pub async fn room(&self) {
        while !self.closed.get() && self.unsent_bytes() >= UNSENT_MAX {
            self.drained.notified().await;
        }
    }

    pub fn close(&self) {
        self.closed.set(true);
        self.filled.notify_one();
        self.drained.notify_waiters();
        self.ended.notify_waiters();
    }

    /// Waits until nothing is sent any more. Cancel-safe.
    pub async fn until_closed(&self) {
        let ended = self.ended.notified();
        if !self.closed.get() {
            ended.await;
        }
    }

    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }
}

/// Writes the outbox out, all there is in one system call, until it is closed or the socket fails.
pub(super) async fn send(outbox: Rc<Outbox>, mut socket: OwnedWriteHalf) {
    loop {
        outbox.filled.notified().await;
        // Whoever is ready now adds its frames to this write.
        after_others(2).await;
        if outbox.closed.get() {
            return;
        }
        if !outbox.queue.borrow().is_empty() {
            let parts = outbox.take();
            if write_all(&mut socket, parts).await.is_err() {
                return outbox.close();
            }
            outbox.drained.notify_waiters();
            continue;
        }
        let full = outbox.open.borrow_mut().split();
        if socket.write_all(&full).await.is_err() {
            return outbox.close();
        }
        outbox.drained.notify_waiters();
        // The buffer is used again unless it grew out of proportion, or somebody filled a new one meanwhile.
        let mut open = outbox.open.borrow_mut();
        if open.is_empty() && full.capacity() <= 4 * READ_BYTES {
            *open = full;
            open.clear();
        }
    }
}

/// Writes all of `parts`, as many as it can in one system call.
pub async fn write_all(socket: &mut OwnedWriteHalf, mut parts: VecDeque<Bytes>) -> io::Result<()> {
    while !parts.is_empty() {
        let mut sent = if parts.len() == 1 {
            socket.write(&parts[0]).await?
        } else {
            let mut slices = [IoSlice::new(&[]); PARTS_MAX];
            let count = parts.len().min(PARTS_MAX);
            for (slice, part) in slices.iter_mut().zip(&parts) {
                *slice = IoSlice::new(part);
            }
            socket.write_vectored(&slices[..count]).await?
        };
        if sent == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while let Some(part) = parts.front_mut() {
            if sent < part.len() {
                part.advance(sent);
                break;
            }
            sent -= part.len();
            parts.pop_front();
        }
    }
    Ok(())
}

/// Reads frames from a connection.
pub(super) struct Reader {
    socket: OwnedReadHalf,
    buffer: BytesMut,
    /// Of a caller: halves of long frames are counted there.
    seat: Option<Seat>,
}

impl Reader {
    pub fn new(socket: OwnedReadHalf) -> Self {
        Self::seated(socket, None)
    }

    pub fn seated(socket: OwnedReadHalf, seat: Option<Seat>) -> Self {
        Self { socket, buffer: BytesMut::new(), seat }
    }

    fn count_unfinished(&self) {
        if let Some(seat) = &self.seat {
            let bytes = if self.buffer.len() >= LONG { self.buffer.len() as u64 } else { 0 };
            seat.unfinished(bytes);
        }
    }

    /// The next frame that has arrived already.
    pub fn ready(&mut self) -> io::Result<Option<Frame>> {
        let Some(mut header) = self.buffer.get(..HEADER) else { return Ok(None) };
        let magic = header.get_u32_le();
        let kind = header.get_u8();
        header.advance(3);
        let length = header.get_u32_le() as usize;
        header.advance(4);
        let (group, session) = (GroupId(header.get_u64_le()), header.get_u64_le());
        let expected = header.get_u32_le();
        if magic != MAGIC || length > BODY_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a frame between peers"));
        }
        let whole = HEADER + length;
        if self.buffer.len() < whole {
            let missing = whole - self.buffer.len();
            if missing > self.buffer.capacity() - self.buffer.len() {
                self.buffer.reserve(if whole >= LONG { READ_BYTES_LONG.max(missing) } else { missing });
            }
            return Ok(None);
        }
        let mut crc = Crc::new(&self.buffer[..CRC_AT]);
        crc.add(&self.buffer[HEADER..whole]);
        if expected != crc.value() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame was damaged on the way"));
        }
        let kind = Kind::from_u8(kind)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a frame of unknown kind"))?;
        let mut body = self.buffer.split_to(whole).freeze();
        body.advance(HEADER);
        Ok(Some(Frame { kind, group, session, body }))
    }

    /// Waits for the next frame; an error ends the connection. Cancel-safe.
    pub async fn next(&mut self) -> io::Result<Frame> {
        loop {
            if let Some(frame) = self.ready()? {
                if let (Some(seat), Kind::Alive | Kind::Append) = (&self.seat, frame.kind) {
                    seat.of_use();
                }
                return Ok(frame);
            }
            self.count_unfinished();
            if self.buffer.capacity() - self.buffer.len() < 16 << 10 {
                self.buffer.reserve(READ_BYTES);
            }
            if self.socket.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, Bytes, BytesMut};

    use super::{BY_REFERENCE_BYTES_MIN, Kind, Outbox};
    use crate::GroupId;

    /// Whoever reads cannot tell, and what is long was not copied.
    #[test]
    fn a_frame_with_long_data_is_the_same_bytes() {
        let sizes = [0, 1, BY_REFERENCE_BYTES_MIN - 1, BY_REFERENCE_BYTES_MIN, 3 * BY_REFERENCE_BYTES_MIN, 7];
        let data: Vec<Bytes> = sizes.iter().map(|size| (0..251).cycle().take(*size).collect()).collect();
        let (copied, referred) = (Outbox::default(), Outbox::default());
        for session in 0..3 {
            copied.frame(Kind::Append, GroupId(1), session, |out| {
                data.iter().for_each(|data| {
                    out.put_u8(9);
                    out.put_slice(data);
                });
            });
            referred.frame_with(Kind::Append, GroupId(1), session, |out| {
                data.iter().for_each(|data| {
                    out.bytes.put_u8(9);
                    out.put(data);
                });
            });
            copied.frame(Kind::Close, GroupId(1), session, |_| {});
            referred.frame(Kind::Close, GroupId(1), session, |_| {});
        }
        assert_eq!(copied.unsent_bytes(), referred.unsent_bytes());
        let parts = referred.take();
        assert!(parts.iter().filter(|part| part.as_ptr() == data[4].as_ptr()).count() == 3);
        let whole: BytesMut = parts.iter().flat_map(|part| part.iter().copied()).collect();
        assert_eq!(copied.take(), [whole.freeze()]);
        assert_eq!(referred.unsent_bytes(), 0);
    }
}
