//! Frames between two processes: what they look like, how many leave in one write, how they are read.
//!
//! ```text
//!  0 "EVR1" | 4 u8 kind | 5 zero | 8 u32 bytes of body | 12 zero | 16 u64 group | 24 u64 session | 32 u32 crc32c | 36 zero | 40 body
//! ```
//!
//! Little-endian. The checksum covers the header up to it and the body.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use crc_fast::{CrcAlgorithm, Digest};
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

fn crc(header: &[u8], body: &[u8]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    digest.update(header);
    digest.update(body);
    u32::try_from(digest.finalize() & u64::from(u32::MAX)).unwrap_or_default()
}

/// What waits to be sent to one process. Everybody on the thread adds to it; one task writes it out.
#[derive(Default)]
pub(super) struct Outbox {
    open: RefCell<BytesMut>,
    filled: Notify,
    drained: Notify,
    ended: Notify,
    closed: Cell<bool>,
}

impl Outbox {
    pub fn frame(&self, kind: Kind, group: GroupId, session: u64, body: impl FnOnce(&mut BytesMut)) {
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
        body(&mut out);
        let length = out.len() - at - HEADER;
        let length = u32::try_from(length).expect("far below 4 GiB");
        out[at + LENGTH_AT..at + LENGTH_AT + 4].copy_from_slice(&length.to_le_bytes());
        let crc = crc(&out[at..at + CRC_AT], &out[at + HEADER..]);
        out[at + CRC_AT..at + CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        self.filled.notify_one();
    }

    /// Waits until there is room for a large frame. Cancel-safe.
    pub async fn room(&self) {
        while !self.closed.get() && self.open.borrow().len() >= UNSENT_MAX {
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

/// Reads frames from a connection.
pub(super) struct Reader {
    socket: OwnedReadHalf,
    buffer: BytesMut,
}

impl Reader {
    pub fn new(socket: OwnedReadHalf) -> Self {
        Self { socket, buffer: BytesMut::new() }
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
            self.buffer.reserve(whole - self.buffer.len());
            return Ok(None);
        }
        if expected != crc(&self.buffer[..CRC_AT], &self.buffer[HEADER..whole]) {
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
                return Ok(frame);
            }
            if self.buffer.capacity() - self.buffer.len() < 16 << 10 {
                self.buffer.reserve(READ_BYTES);
            }
            if self.socket.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}
