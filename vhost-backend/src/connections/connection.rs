//! One connection to one chunkserver: requests out in order, replies in any order, never waiting.
//!
//! ```text
//! Idle ──wanted──▶ Connecting ──▶ Greeting ──welcome──▶ Open
//!   Down ◀── refused, cut, silent, not ours ──────────────┘
//!    └── wanted again, after a wait that grows ──▶ Connecting
//! ```
//!
//! What always holds: everything that was put out in one turn of the loop leaves in one `writev`, a write's data by
//! reference; a connection that went wrong in any way is closed, and all that was sent on it counts as unanswered.
//! That what waits to be sent is bounded is the volumes' care: they send only what they admitted.
//!
//! It does not know what the frames mean.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, BytesMut};
use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId};
use evolute_protocol::wire::frame::Frame;
use evolute_protocol::wire::hello::{HELLO_BYTES, Hello, HelloReply, NotOurs, Role, Unwelcome, Version};
use evolute_protocol::wire::request::Request;
use evolute_protocol::wire::{FrameReader, RequestId, WireError};
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::outbox::Outbox;
use crate::wait::{doubled, jittered};

/// How long making a connection and greeting may take. A handshake is two round trips.
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// How long others are not asked meanwhile. A host that is gone does not refuse, it says nothing.
const CONNECT_QUICK: Duration = Duration::from_millis(100);
/// How long sent bytes may stay unacknowledged by the other kernel (a hung process's acknowledges until its buffers are
/// full) before the connection is given up: a new one is there a second after a cut cable is whole again, while an
/// old one waits out TCP's ever longer pauses.
const UNACKNOWLEDGED_MS_MAX: u32 = 2_000;
/// Reads of one turn, so that one busy chunkserver does not keep the loop from the others: 8 × 256 KiB.
const READS_MAX: usize = 8;
/// How long a chunkserver that does not want us is left alone: its address or its cluster is wrong, and the next map
/// must say so.
const UNWELCOME_WAIT: Duration = Duration::from_secs(1);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    #[error("its address is not known")]
    NoAddress,
    #[error("it cannot be reached")]
    Unreachable(#[source] io::Error),
    #[error("it does not answer")]
    TimedOut,
    #[error("the connection was cut")]
    Cut(#[source] io::Error),
    #[error("it closed the connection")]
    Closed,
    #[error(transparent)]
    NotOurs(#[from] NotOurs),
    #[error("it refused us: {0}")]
    Unwelcome(#[from] Unwelcome),
    #[error("it sent nonsense")]
    Wire(#[from] WireError),
    /// A well-formed reply that cannot be one to what was asked.
    #[error("it answered something else than it was asked")]
    WrongAnswer,
}

/// Whether requests can be put out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    Open,
    /// Being connected: the loop will hear of it.
    Soon,
    /// Not before this time.
    Down(Instant),
}

/// What became of a connection in this turn.
#[derive(Debug)]
pub enum Progress {
    Nothing,
    Opened,
    Lost(Lost),
}

#[derive(Debug)]
enum State {
    Idle,
    Connecting { stream: TcpStream, since: Instant },
    Greeting { stream: TcpStream, since: Instant },
    Open { stream: TcpStream },
    Down { until: Instant },
}

/// A connection to one chunkserver, made when it is wanted and again when it was lost.
#[derive(Debug)]
pub struct Connection {
    pub id: ChunkserverId,
    cluster: ClusterId,
    address: Option<SocketAddr>,
    registry: Rc<Registry>,
    token: Token,
    state: State,
    /// It is to be closed at the end of this turn, so that all who share it hear of it alike.
    given_up: Option<Lost>,
    reader: FrameReader,
    outbox: Outbox,
    readable: bool,
    /// The other side will send no more: what is unread is the end.
    ending: bool,
    writable: bool,
    /// Attempts in a row that ended before the welcome.
    failures: u32,
    /// The end of the last one was told to the operator; not again before the next success.
    pub reported: bool,
}

impl Connection {
    pub fn new(cluster: ClusterId, id: ChunkserverId, token: Token, registry: Rc<Registry>) -> Self {
        Self {
            id,
            cluster,
            address: None,
            registry,
            token,
            state: State::Idle,
            given_up: None,
            reader: FrameReader::default(),
            outbox: Outbox::default(),
            readable: false,
            ending: false,
            writable: false,
            failures: 0,
            reported: false,
        }
    }

    /// A newer map may know it elsewhere. The old connection stays as long as it works.
    pub fn set_address(&mut self, address: Option<SocketAddr>) {
        if address.is_some() && address != self.address {
            self.address = address;
            if let State::Down { .. } = self.state {
                self.state = State::Idle;
            }
        }
    }

    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Connects if that is due; says whether requests can be put out.
    pub fn want(&mut self, now: Instant, jitter: u32) -> Readiness {
        match &self.state {
            State::Open { .. } if self.given_up.is_some() => Readiness::Soon,
            State::Open { .. } => Readiness::Open,
            State::Connecting { .. } | State::Greeting { .. } => Readiness::Soon,
            State::Down { until } if *until > now => Readiness::Down(*until),
            State::Idle | State::Down { .. } => match self.connect(now) {
                Ok(()) => Readiness::Soon,
                Err(_) => Readiness::Down(self.put_down(now, jitter)),
            },
        }
    }

    fn connect(&mut self, now: Instant) -> io::Result<()> {
        let address = self.address.ok_or(io::ErrorKind::AddrNotAvailable)?;
        let mut stream = TcpStream::connect(address)?;
        self.registry.register(&mut stream, self.token, Interest::READABLE | Interest::WRITABLE)?;
        self.state = State::Connecting { stream, since: now };
        Ok(())
    }

    fn put_down(&mut self, now: Instant, jitter: u32) -> Instant {
        self.failures = self.failures.saturating_add(1);
        let until = now + jittered(doubled(self.failures - 1), jitter);
        self.state = State::Down { until };
        until
    }

    /// Closes the connection. What was sent and not answered will not be answered on it.
    pub fn close(&mut self, why: &Lost, now: Instant, jitter: u32) {
        self.reader = FrameReader::default();
        self.outbox = Outbox::default();
        (self.readable, self.ending, self.writable) = (false, false, false);
        self.given_up = None;
        // Dropping the stream takes it out of the poll, too.
        self.put_down(now, jitter);
        if matches!(why, Lost::Unwelcome(_) | Lost::NotOurs(_)) {
            self.state = State::Down { until: now + UNWELCOME_WAIT };
        }
    }

    pub fn on_event(&mut self, event: &mio::event::Event) {
        self.ending |= event.is_read_closed() || event.is_error();
        self.readable |= event.is_readable() || self.ending;
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
    }

    /// What came on it cannot be right.
    pub fn give_up(&mut self, why: Lost) {
        self.given_up.get_or_insert(why);
    }

    pub fn is_open(&self) -> bool {
        matches!(self.state, State::Open { .. }) && self.given_up.is_none()
    }

    /// It could not be reached a moment ago and is left alone for now, or takes long to be reached.
    pub fn is_doubtful(&self, now: Instant) -> bool {
        match &self.state {
            State::Connecting { since, .. } | State::Greeting { since, .. } => now >= *since + CONNECT_QUICK,
            State::Down { until } => *until > now,
            State::Idle | State::Open { .. } => false,
        }
    }

    /// When this needs attention although nothing happened.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        match &self.state {
            State::Connecting { since, .. } | State::Greeting { since, .. } => {
                Some(if self.is_doubtful(now) { *since + CONNECT_MAX } else { *since + CONNECT_QUICK })
            }
            _ => None,
        }
    }

    /// Whether bytes were left unread at the end of the turn: the poll will not tell again.
    pub fn has_unread(&self) -> bool {
        self.readable
    }

    /// Takes connecting and greeting further.
    pub fn advance(&mut self, now: Instant) -> Progress {
        match self.try_advance(now) {
            Ok(true) => Progress::Opened,
            Ok(false) => Progress::Nothing,
            Err(why) => Progress::Lost(why),
        }
    }

    fn try_advance(&mut self, now: Instant) -> Result<bool, Lost> {
        if let State::Connecting { since, .. } | State::Greeting { since, .. } = &self.state
            && *since + CONNECT_MAX <= now
        {
            return Err(Lost::TimedOut);
        }
        if let State::Connecting { stream, .. } = &self.state {
            if !self.writable {
                return Ok(false);
            }
            if let Some(error) = stream.take_error().map_err(Lost::Unreachable)? {
                return Err(Lost::Unreachable(error));
            }
            match stream.peer_addr() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return Ok(false),
                Err(error) => return Err(Lost::Unreachable(error)),
            }
            tune(stream).map_err(Lost::Unreachable)?;
            let hello =
                Hello { version: Version::V1 as u16, role: Role::Client, cluster: self.cluster, to: self.id };
            self.outbox.put_bytes(&hello.encode());
            let State::Connecting { stream, since } = std::mem::replace(&mut self.state, State::Idle) else {
                return Ok(false);
            };
            self.state = State::Greeting { stream, since };
            self.flush()?;
        }
        if let State::Greeting { .. } = &self.state
            && self.readable
        {
            let end = self.fill();
            let buffer = self.reader.space();
            if buffer.len() < HELLO_BYTES {
                return end.map(|()| false);
            }
            let mut bytes = [0; HELLO_BYTES];
            buffer.copy_to_slice(&mut bytes);
            HelloReply::decode(&bytes)?.welcome?;
            if let State::Greeting { stream, .. } = std::mem::replace(&mut self.state, State::Idle) {
                self.state = State::Open { stream };
            }
            (self.failures, self.reported) = (0, false);
            return Ok(true);
        }
        Ok(false)
    }

    /// Reads what has come; frames are then taken with [`Connection::next_frame`]. Those that came before an error are
    /// good: take them first.
    pub fn receive(&mut self) -> Result<(), Lost> {
        if self.is_open() && self.readable { self.fill() } else { Ok(()) }
    }

    pub fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        self.reader.next()
    }

    fn fill(&mut self) -> Result<(), Lost> {
        let (State::Greeting { stream, .. } | State::Open { stream }) = &self.state else { return Ok(()) };
        for _ in 0..READS_MAX {
            let buffer = self.reader.space();
            let (asked, got) = match read_into(stream, buffer) {
                Ok(counts) => counts,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(());
                }
                Err(error) => return Err(Lost::Cut(error)),
            };
            if got == 0 {
                return Err(Lost::Closed);
            }
            if got < asked {
                // The socket was empty then, and whatever comes later is a new event (epoll(7)). An end that was
                // told already is not told again.
                self.readable = self.ending;
                return Ok(());
            }
        }
        Ok(())
    }

    /// Puts a request out; it leaves with [`Connection::flush`].
    pub fn put(&mut self, request: &Request, copyset: CopysetId, id: RequestId) {
        self.outbox.put(request, copyset, id);
    }

    /// Sends what was put out, as far as the socket takes it.
    pub fn flush(&mut self) -> Result<(), Lost> {
        if let Some(why) = self.given_up.take() {
            return Err(why);
        }
        let (State::Greeting { stream, .. } | State::Open { stream }) = &mut self.state else {
            return Ok(());
        };
        while self.writable && !self.outbox.is_empty() {
            match self.outbox.write_to(stream) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) => return Err(Lost::Cut(error)),
            }
        }
        Ok(())
    }
}

/// What every connection of ours is set to: no delay, and an end when the other machine is gone.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_MS_MAX)?;
    rustix::net::sockopt::set_socket_keepalive(stream, true)?;
    rustix::net::sockopt::set_tcp_keepidle(stream, Duration::from_secs(5))?;
    rustix::net::sockopt::set_tcp_keepintvl(stream, Duration::from_secs(2))?;
    rustix::net::sockopt::set_tcp_keepcnt(stream, 3)?;
    Ok(())
}

/// One read into the spare room of `buffer`: how much was asked for, and how much came.
fn read_into(stream: &TcpStream, buffer: &mut BytesMut) -> io::Result<(usize, usize)> {
    let spare = buffer.spare_capacity_mut();
    let asked = spare.len();
    let (filled, _) = rustix::io::read(stream.as_fd(), spare)?;
    let got = filled.len();
    // SAFETY: the kernel has just written the first `got` bytes of the spare capacity.
    unsafe { buffer.advance_mut(got) };
    Ok((asked, got))
}
