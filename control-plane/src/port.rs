//! The port of an MDS: connections find their places here, and lose them.
//!
//! A connection is unknown until its first request has begun; then it is a chunkserver's or somebody else's, by the
//! service that was asked for. What it sends of a report that is not whole is counted, for all together.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use evolute_daemon::door::{self, Door, Kind, Places, Seat, Shortage};
use evolute_protocol::id::ClusterId;
use evolute_protocol::rpc::{CLUSTER_KEY, ErrorWord};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::Stream;
use tonic::transport::server::Connected;
use tonic::{Request, Status};

/// Connections at a time, at most.
const CONNECTIONS_MAX: usize = 4096;
/// Bytes of reports that are not whole, of all chunkservers together.
const UNFINISHED_BYTES_MAX: u64 = 128 << 20;
/// A caller asks for something within that time, or leaves.
const UNKNOWN_MAX: Duration = Duration::from_secs(10);

/// The connections of a listener as they come. Never ends, and waits while there is no descriptor for one.
pub fn callers(listener: TcpListener) -> impl Stream<Item = io::Result<Connection>> {
    let door = Door::new(Places::of(door::descriptors(), CONNECTIONS_MAX), UNFINISHED_BYTES_MAX);
    let listening = (listener, door, Shortage::default());
    futures::stream::unfold(listening, |(listener, door, mut shortage)| async move {
        loop {
            match listener.accept().await {
                Ok((stream, from)) => {
                    shortage.over();
                    let _ = stream.set_nodelay(true);
                    let connection = Connection::new(stream, door.enter(Some(from.ip())));
                    return Some((Ok(connection), (listener, door, shortage)));
                }
                Err(error) => tokio::time::sleep(shortage.failed(&error)).await,
            }
        }
    })
}

/// A request has begun: now it is known what this connection is.
pub fn asks(request: Request<()>, kind: Kind) -> Result<Request<()>, Status> {
    if let Some(Caller(seat)) = request.extensions().get() {
        // A chunkserver that also asks for something else stays one.
        if !(kind == Kind::Caller && seat.kind() == Kind::Peer) {
            seat.is_a(kind);
        }
    }
    Ok(request)
}

/// Who says that it belongs to another cluster has come to the wrong address, and would believe what it is told here.
pub fn belongs(request: Request<()>, cluster: ClusterId) -> Result<Request<()>, Status> {
    match request.metadata().get(CLUSTER_KEY) {
        Some(theirs) if theirs.as_bytes() != cluster.to_string().as_bytes() => Err(ErrorWord::WrongCluster
            .status(format!(
                "this is the MDS of cluster {cluster}, and not of {}",
                theirs.to_str().unwrap_or("one that can be")
            ))),
        _ => Ok(request),
    }
}

/// Who asks, among a request's extensions.
#[derive(Debug, Clone)]
pub struct Caller(Seat);

impl Caller {
    /// It has said something whole that made sense.
    pub fn was_of_use(&self) {
        self.0.unfinished(0);
        self.0.of_use();
    }
}

/// A connection with its place.
pub struct Connection {
    stream: TcpStream,
    seat: Seat,
    has_to_leave: Pin<Box<dyn Future<Output = ()> + Send>>,
    left: bool,
}

impl Connection {
    fn new(stream: TcpStream, seat: Seat) -> Self {
        let has_to_leave = Box::pin(seat.has_to_leave(UNKNOWN_MAX));
        Self { stream, seat, has_to_leave, left: false }
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        Caller(self.seat.clone())
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.left || self.has_to_leave.as_mut().poll(context).is_ready() {
            self.left = true;
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = into.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, into))?;
        if self.seat.kind() == Kind::Peer {
            self.seat.more_unfinished((into.filled().len() - before) as u64);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
