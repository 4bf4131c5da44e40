//! Requests in, replies out: sockets on one side, copysets on the other.
//!
//! ```text
//!  accept ─▶ Hello ─▶ client: frames ─▶ Request ─▶ copyset.submit … at the end of what arrived: copyset.flush
//!                │                                          └──▶ Outbox ─▶ one write for all replies of a turn
//!                └─▶ peer: handed to raft
//! ```
//!
//! What always holds: garbage closes its own connection and nothing else; a client that does not read its replies is
//! not read from either ([`UNANSWERED_MAX`], [`UNREAD_BYTES_MAX`], [`UNSENT_BYTES_MAX`]); nothing here looks into a chunk.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use evolute_daemon::door::{self, Door, Kind, Places, Seat, Shortage};
use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId};
use evolute_protocol::wire::hello::{HELLO_BYTES, Hello, HelloReply, Role};
use evolute_protocol::wire::reply::{Refusal, Reply};
use evolute_protocol::wire::request::{ReadAtLeast, Request};
use evolute_protocol::wire::{FrameReader, RequestId, WireError};
use evolute_raft::{Peers, after_others};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, spawn_local};

use crate::copyset::registry::Registry;
use crate::copyset::{Answer, Caller, Copyset};

/// Requests of one connection that were read and not answered: far more than the disks that share one may have out
/// (`DISKS_PER_CONNECTION`, `vhost-backend/src/connections/mod.rs`), so that changes to a copyset that answers nothing
/// hold up no other. Their data is bounded by what may wait on a copyset and by [`UNREAD_BYTES_MAX`].
const UNANSWERED_MAX: usize = 256 << 10;
/// Bytes that reads of one connection asked for and have not been answered: far more than keeps a disk busy.
const UNREAD_BYTES_MAX: usize = 128 << 20;
/// Replies of one connection that its socket has not taken yet: 16 of the longest.
const UNSENT_BYTES_MAX: usize = 16 << 20;
/// Connections at a time, at most: a few hundred backends, the other chunkservers, and those that have not said yet who
/// they are.
const CONNECTIONS_MAX: usize = 4608;
/// Bytes of long frames that are not whole, of all connections together. One takes milliseconds to arrive.
const UNFINISHED_BYTES_MAX: u64 = 128 << 20;
/// What a connection may have asked for and not taken until it has shown that it takes answers: memory of ours for which
/// it has given nothing yet.
const UNTRIED_BYTES_MAX: usize = 1 << 20;
/// Answers that it has to take for that: more than its socket's buffers hold by themselves.
const TRIED_BYTES: usize = 8 << 20;
/// A caller says who it is at once, or leaves.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Data up to this length is copied behind its frame: a copy of 4 KiB costs less than one more part of a `writev`.
const COPIED_BYTES_MAX: usize = 8 << 10;

/// Who this server is, and where requests go.
pub struct Server {
    pub cluster: ClusterId,
    pub me: ChunkserverId,
    pub registry: Rc<Registry>,
    pub peers: Peers,
    pub door: Door,
}

/// For the connections of one chunkserver.
pub fn door() -> Door {
    Door::new(Places::of(door::descriptors(), CONNECTIONS_MAX), UNFINISHED_BYTES_MAX)
}

impl Server {
    /// Accepts until dropped.
    pub async fn run(self: Rc<Self>, listener: TcpListener) {
        let mut shortage = Shortage::default();
        loop {
            let (stream, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tokio::time::sleep(shortage.failed(&error)).await;
                    continue;
                }
            };
            shortage.over();
            let seat = self.door.enter(Some(from.ip()));
            let server = Rc::clone(&self);
            spawn_local(async move {
                if let Err(error) = server.serve(stream, seat).await {
                    tracing::debug!(%from, %error, "connection closed");
                }
            });
        }
    }

    async fn serve(&self, mut stream: TcpStream, seat: Seat) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut bytes = [0; HELLO_BYTES];
        tokio::select! {
            read = stream.read_exact(&mut bytes) => { read?; }
            () = seat.has_to_leave(HELLO_TIMEOUT) => return Err(io::ErrorKind::TimedOut.into()),
        }
        let hello = Hello::decode(&bytes).map_err(io::Error::other)?;
        let welcome = hello.judge(self.cluster, self.me);
        // A new socket has room for it; who does not take it is not waited for.
        let reply = HelloReply::new(welcome).encode();
        tokio::select! {
            written = stream.write_all(&reply) => written?,
            () = seat.has_to_leave(HELLO_TIMEOUT) => return Err(io::ErrorKind::TimedOut.into()),
        }
        if let Err(unwelcome) = welcome {
            let from = stream.peer_addr()?;
            tracing::info!(%from, %unwelcome, "refused a connection");
            return Ok(());
        }
        match hello.role {
            Role::Peer { .. } => {
                seat.is_a(Kind::Peer);
                self.peers.accept(stream, Some(seat));
            }
            Role::Client => {
                seat.is_a(Kind::Caller);
                tokio::select! {
                    served = self.serve_client(stream, &seat) => served?,
                    () = seat.has_to_leave(HELLO_TIMEOUT) => {}
                }
            }
        }
        Ok(())
    }

    async fn serve_client(&self, stream: TcpStream, seat: &Seat) -> io::Result<()> {
        let (read, write) = stream.into_split();
        let outbox = Rc::new(Outbox::default());
        let writer = spawn_local(send_replies(Rc::clone(&outbox), write));
        // Also when this is dropped, because somebody else needs the place.
        let _closed = Closing { outbox: &outbox, writer };
        self.read_requests(read, &outbox, seat).await
    }

    async fn read_requests(
        &self,
        mut socket: OwnedReadHalf,
        outbox: &Rc<Outbox>,
        seat: &Seat,
    ) -> io::Result<()> {
        let mut reader = FrameReader::default();
        let mut touched: Vec<Rc<Copyset>> = Vec::new();
        loop {
            seat.unfinished(reader.unfinished() as u64);
            if outbox.closed.get() || socket.read_buf(reader.space()).await? == 0 {
                return Ok(());
            }
            if outbox.was_of_use.replace(false) {
                seat.of_use();
            }
            let refused = loop {
                if !outbox.has_room() {
                    touched.drain(..).for_each(|copyset| copyset.flush());
                    outbox.room().await;
                    if outbox.closed.get() {
                        return Ok(());
                    }
                }
                match reader.next() {
                    Ok(Some(frame)) => match Request::decode(&frame) {
                        Ok(request) => {
                            self.dispatch(frame.copyset, frame.request, request, outbox, &mut touched)
                        }
                        Err(error) => break Some(error),
                    },
                    Ok(None) => break None,
                    Err(error) => break Some(error),
                }
            };
            touched.drain(..).for_each(|copyset| copyset.flush());
            if let Some(error) = refused {
                return Err(refuse_connection(error));
            }
        }
    }

    fn dispatch(
        &self,
        copyset: CopysetId,
        id: RequestId,
        request: Request,
        outbox: &Rc<Outbox>,
        touched: &mut Vec<Rc<Copyset>>,
    ) {
        let read_bytes = match &request {
            Request::Read(read) | Request::ReadAtLeast(ReadAtLeast { read, .. }) => {
                read.range.length() as usize
            }
            _ => 0,
        };
        outbox.unanswered.set(outbox.unanswered.get() + 1);
        outbox.unread_bytes.set(outbox.unread_bytes.get() + read_bytes);
        let caller = Caller { to: Rc::<Outbox>::clone(outbox), request: id, read_bytes };
        let Some(copyset) =
            touched.iter().find(|c| c.id() == copyset).cloned().or_else(|| self.registry.get(copyset))
        else {
            return outbox.answer(copyset, &caller, &Reply::Refused(Refusal::NoSuchCopyset));
        };
        copyset.submit(request, caller);
        if !touched.iter().any(|c| Rc::ptr_eq(c, &copyset)) {
            touched.push(copyset);
        }
    }
}

/// Ends a client's connection, however its task ends.
struct Closing<'a> {
    outbox: &'a Outbox,
    writer: JoinHandle<()>,
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.outbox.close();
        self.writer.abort();
    }
}

fn refuse_connection(error: WireError) -> io::Error {
    tracing::warn!(%error, "closing a connection");
    io::Error::other(error)
}

/// Replies of one connection on their way out.
#[derive(Default)]
struct Outbox {
    /// Frames, and short data behind theirs, in one buffer.
    open: RefCell<BytesMut>,
    /// What goes out before `open`: full buffers, and long data by reference.
    queue: RefCell<VecDeque<Bytes>>,
    unsent_bytes: Cell<usize>,
    unanswered: Cell<usize>,
    unread_bytes: Cell<usize>,
    /// Up to [`TRIED_BYTES`].
    taken_bytes: Cell<usize>,
    /// Something was done for it.
    was_of_use: Cell<bool>,
    closed: Cell<bool>,
    /// There is something to send.
    filled: Notify,
    /// There is room again for requests.
    drained: Notify,
}

impl Answer for Outbox {
    fn answer(&self, copyset: CopysetId, to: &Caller, reply: &Reply) {
        self.unanswered.set(self.unanswered.get() - 1);
        self.unread_bytes.set(self.unread_bytes.get() - to.read_bytes);
        if self.closed.get() {
            return;
        }
        if !matches!(reply, Reply::Refused(_)) {
            self.was_of_use.set(true);
        }
        let mut open = self.open.borrow_mut();
        let before = open.len();
        reply.put(copyset, to.request, &mut open);
        let mut bytes = open.len() - before;
        if let Reply::Data { data, .. } = reply {
            for part in data {
                bytes += part.len();
                if part.len() <= COPIED_BYTES_MAX {
                    open.extend_from_slice(part);
                } else {
                    let mut queue = self.queue.borrow_mut();
                    queue.push_back(open.split().freeze());
                    queue.push_back(part.clone());
                }
            }
        }
        self.unsent_bytes.set(self.unsent_bytes.get() + bytes);
        self.filled.notify_one();
    }
}

impl Outbox {
    fn has_room(&self) -> bool {
        let untried = self.taken_bytes.get() < TRIED_BYTES;
        self.unanswered.get() < UNANSWERED_MAX
            && !(untried && self.unread_bytes.get() + self.unsent_bytes.get() >= UNTRIED_BYTES_MAX)
            && self.unread_bytes.get() < UNREAD_BYTES_MAX
            && self.unsent_bytes.get() < UNSENT_BYTES_MAX
    }

    /// Waits until more requests may be taken. Cancel-safe.
    async fn room(&self) {
        while !self.closed.get() && !self.has_room() {
            self.drained.notified().await;
        }
    }

    fn close(&self) {
        self.closed.set(true);
        self.drained.notify_one();
    }

    /// They count as unsent until [`Outbox::sent`].
    fn take(&self) -> VecDeque<Bytes> {
        let mut parts = std::mem::take(&mut *self.queue.borrow_mut());
        let mut open = self.open.borrow_mut();
        if !open.is_empty() {
            parts.push_back(open.split().freeze());
        }
        parts
    }

    fn sent(&self, bytes: usize) {
        self.unsent_bytes.set(self.unsent_bytes.get() - bytes);
        self.taken_bytes.set((self.taken_bytes.get() + bytes).min(TRIED_BYTES));
        self.drained.notify_one();
    }
}

/// Sends what is in the outbox, as much as there is in one system call. Ends with the socket.
async fn send_replies(outbox: Rc<Outbox>, mut socket: OwnedWriteHalf) {
    loop {
        outbox.filled.notified().await;
        // Whoever is ready now adds its replies to this write.
        after_others(2).await;
        let parts = outbox.take();
        let bytes = parts.iter().map(Bytes::len).sum();
        if evolute_raft::write_all(&mut socket, parts).await.is_err() {
            return outbox.close();
        }
        outbox.sent(bytes);
    }
}
