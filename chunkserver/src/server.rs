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
use tokio::task::spawn_local;

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
/// Connections at a time; a few hundred backends and the other chunkservers.
const CONNECTIONS_MAX: usize = 4096;
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
    pub connections: Cell<usize>,
}

impl Server {
    /// Accepts until dropped.
    pub async fn run(self: Rc<Self>, listener: TcpListener) {
        loop {
            let (stream, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: those who are connected are served on.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            if self.connections.get() >= CONNECTIONS_MAX {
                tracing::warn!(%from, "refused: {CONNECTIONS_MAX} connections already");
                continue;
            }
            self.connections.set(self.connections.get() + 1);
            let server = Rc::clone(&self);
            spawn_local(async move {
                if let Err(error) = server.serve(stream).await {
                    tracing::debug!(%from, %error, "connection closed");
                }
                server.connections.set(server.connections.get() - 1);
            });
        }
    }

    async fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut bytes = [0; HELLO_BYTES];
        tokio::time::timeout(HELLO_TIMEOUT, stream.read_exact(&mut bytes)).await??;
        let hello = Hello::decode(&bytes).map_err(io::Error::other)?;
        let welcome = hello.judge(self.cluster, self.me);
        stream.write_all(&HelloReply::new(welcome).encode()).await?;
        if let Err(unwelcome) = welcome {
            let from = stream.peer_addr()?;
            tracing::info!(%from, %unwelcome, "refused a connection");
            return Ok(());
        }
        match hello.role {
            Role::Peer { .. } => self.peers.accept(stream),
            Role::Client => self.serve_client(stream).await?,
        }
        Ok(())
    }

    async fn serve_client(&self, stream: TcpStream) -> io::Result<()> {
        let (read, write) = stream.into_split();
        let outbox = Rc::new(Outbox::default());
        let writer = spawn_local(send_replies(Rc::clone(&outbox), write));
        let result = self.read_requests(read, &outbox).await;
        outbox.close();
        writer.abort();
        result
    }

    async fn read_requests(&self, mut socket: OwnedReadHalf, outbox: &Rc<Outbox>) -> io::Result<()> {
        let mut reader = FrameReader::default();
        let mut touched: Vec<Rc<Copyset>> = Vec::new();
        loop {
            if outbox.closed.get() || socket.read_buf(reader.space()).await? == 0 {
                return Ok(());
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
        self.unanswered.get() < UNANSWERED_MAX
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
