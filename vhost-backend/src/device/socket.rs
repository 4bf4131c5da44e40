//! The vhost-user socket: listen, accept one front end at a time, read its messages one by one.
//!
//! A front end may come, go and come back; each gets a fresh [`Session`]. It may also send garbage, half a message or
//! nothing: a message that does not arrive whole within [`MESSAGE_TIMEOUT`] ends its session, and a stop never waits for
//! the front end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use evolute_daemon::door::Shortage;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::net::RecvFlags;
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::command::{Command, Commands};
use super::listening::{Listening, SocketAccess};
use super::session::Session;
use super::{DeviceConfig, DeviceError};

/// For one message to arrive whole, and for a reply to be taken. A front end writes a message at once.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(1);

/// Message header: request, flags, size of the body; each 32 bits in the host's byte order.
const HEADER_BYTES: usize = 12;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Where the front end (the VMM) comes from.
#[derive(Debug)]
pub enum Endpoint {
    /// We listen; front ends come and go, one at a time.
    Listening(Listening),
    /// One connection, made by whoever started us; when it ends, so does [`super::run`].
    Connected(UnixStream),
}

impl Endpoint {
    /// Binds now, so that a front end can connect while the rest still starts. A socket left by a dead predecessor is
    /// replaced; one that somebody serves is not, nor anything that is no socket.
    pub fn listen(path: &Path, access: SocketAccess) -> Result<Endpoint, DeviceError> {
        let failed = |source| DeviceError::Listen { path: path.to_owned(), source };
        Ok(Endpoint::Listening(Listening::at(path, access).map_err(failed)?))
    }

    /// Takes over a connected socket (`--fd`).
    pub fn connected(fd: OwnedFd) -> Endpoint {
        Endpoint::Connected(UnixStream::from(fd))
    }
}

/// Ends [`super::run`] from another thread.
#[derive(Clone, Debug)]
pub struct StopSignal(Arc<OwnedFd>);

impl StopSignal {
    pub fn new() -> io::Result<StopSignal> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(StopSignal(Arc::new(event)))
    }

    /// `run` finishes what is in flight, for a bounded time, and returns. What was not finished stays recorded
    /// in the in-flight region, and the next process does it again.
    pub fn stop(&self) {
        // It can only fail when the counter is full, and then it has been signalled.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// What a wait ended with.
enum Woken {
    Stop,
    Ready,
}

fn wait(fd: BorrowedFd<'_>, stop: &StopSignal) -> io::Result<Woken> {
    loop {
        let mut polled = [
            PollFd::from_borrowed_fd(stop.0.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
        ];
        match rustix::event::poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        if !polled[0].revents().is_empty() {
            return Ok(Woken::Stop);
        }
        if !polled[1].revents().is_empty() {
            return Ok(Woken::Ready);
        }
    }
}

/// A pause that a stop ends; true: it did.
fn stops_within(pause: Duration, stop: &StopSignal) -> io::Result<bool> {
    let pause = Timespec::try_from(pause).map_err(io::Error::other)?;
    let mut polled = [PollFd::from_borrowed_fd(stop.0.as_fd(), PollFlags::IN)];
    match rustix::event::poll(&mut polled, Some(&pause)) {
        Err(rustix::io::Errno::INTR) => Ok(false),
        woken => Ok(woken? > 0),
    }
}

/// How a session ended.
enum Ended {
    Stop,
    FrontEndLeft,
}

/// Serves front ends until the stop, or until the only one leaves.
pub(super) fn serve(
    endpoint: &Endpoint,
    config: &DeviceConfig,
    commands: &Commands,
    stop: &StopSignal,
) -> Result<(), DeviceError> {
    match endpoint {
        Endpoint::Connected(stream) => {
            let stream = stream.try_clone().map_err(DeviceError::Connection)?;
            serve_one(stream, config, commands, stop).map(|_| ())
        }
        Endpoint::Listening(Listening { listener, .. }) => {
            let mut shortage = Shortage::default();
            loop {
                match wait(listener.as_fd(), stop).map_err(DeviceError::Connection)? {
                    Woken::Stop => return Ok(()),
                    Woken::Ready => {}
                }
                let stream = match listener.accept() {
                    Ok((stream, _)) => stream,
                    // Gone again before we looked, or no descriptors left just now: then it goes on waiting.
                    Err(error) => {
                        if stops_within(shortage.failed(&error), stop).map_err(DeviceError::Connection)? {
                            return Ok(());
                        }
                        continue;
                    }
                };
                shortage.over();
                if let Ended::Stop = serve_one(stream, config, commands, stop)? {
                    return Ok(());
                }
            }
        }
    }
}

fn serve_one(
    stream: UnixStream,
    config: &DeviceConfig,
    commands: &Commands,
    stop: &StopSignal,
) -> Result<Ended, DeviceError> {
    let prepare = || -> io::Result<UnixStream> {
        stream.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
        stream.set_write_timeout(Some(MESSAGE_TIMEOUT))?;
        stream.try_clone()
    };
    let ours = match prepare() {
        Ok(ours) => ours,
        Err(error) => {
            tracing::warn!(%error, "a front end's connection could not be set up");
            return Ok(Ended::FrontEndLeft);
        }
    };
    tracing::info!("front end connected");
    let session = Arc::new(Mutex::new(Session::new(config, commands.clone())));
    let mut handler = BackendReqHandler::from_stream(stream, session.clone());
    let ended = loop {
        match wait(ours.as_fd(), stop).map_err(DeviceError::Connection)? {
            // The connection stays open until the I/O thread has finished what is out, so that the front end does
            // not look elsewhere in the middle of it.
            Woken::Stop => {
                close(commands)?;
                return Ok(Ended::Stop);
            }
            Woken::Ready => {}
        }
        if !serve_message(&mut handler, &ours, &session)? {
            break Ended::FrontEndLeft;
        }
    };
    lock(&session).end().map_err(|_| DeviceError::IoThreadEnded)?;
    Ok(ended)
}

/// Ends the I/O thread in good order.
pub(super) fn close(commands: &Commands) -> Result<(), DeviceError> {
    commands.ask(|reply| Command::Close { reply }).map_err(|_| DeviceError::IoThreadEnded)
}

fn lock(session: &Mutex<Session>) -> std::sync::MutexGuard<'_, Session> {
    session.lock().expect("one thread, and it does not panic")
}

/// True: the session goes on.
fn serve_message(
    handler: &mut BackendReqHandler<Mutex<Session>>,
    stream: &UnixStream,
    session: &Mutex<Session>,
) -> Result<bool, DeviceError> {
    let Some((request, need_reply)) = peek_header(stream) else {
        tracing::info!("front end disconnected");
        return Ok(false);
    };
    let acknowledged = need_reply && lock(session).acknowledges() && is_acknowledged(request);
    match handler.handle_request() {
        Ok(()) => Ok(true),
        Err(Error::ReqHandlerError(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            Err(DeviceError::IoThreadEnded)
        }
        Err(Error::ReqHandlerError(error)) if acknowledged => {
            tracing::warn!(%error, request, "a vhost-user message was refused");
            Ok(true)
        }
        // Nobody told the front end, so it would go on believing that it was done.
        Err(error) => {
            tracing::warn!(%error, request, "hanging up on a front end");
            Ok(false)
        }
    }
}

/// Request and whether a reply is wanted; none if the front end left or does not finish its header.
fn peek_header(stream: &UnixStream) -> Option<(u32, bool)> {
    let mut header = [0u8; HEADER_BYTES];
    let flags = RecvFlags::PEEK | RecvFlags::WAITALL;
    let (_, len) = rustix::net::recv(stream, &mut header[..], flags).ok()?;
    if len < HEADER_BYTES {
        return None;
    }
    let [r0, r1, r2, r3, f0, f1, f2, f3, ..] = header;
    let (request, flags) = (u32::from_ne_bytes([r0, r1, r2, r3]), u32::from_ne_bytes([f0, f1, f2, f3]));
    Some((request, flags & FLAG_NEED_REPLY != 0))
}

/// Whether the crate answers a refusal of this message with an acknowledgement that says so. Messages with a reply
/// of their own get none when they are refused.
fn is_acknowledged(request: u32) -> bool {
    let own_reply = [
        FrontendReq::GET_FEATURES,
        FrontendReq::GET_PROTOCOL_FEATURES,
        FrontendReq::GET_QUEUE_NUM,
        FrontendReq::GET_VRING_BASE,
        FrontendReq::GET_CONFIG,
        FrontendReq::GET_INFLIGHT_FD,
        FrontendReq::GET_MAX_MEM_SLOTS,
        FrontendReq::SET_LOG_BASE,
        FrontendReq::GET_SHMEM_CONFIG,
    ];
    !own_reply.iter().any(|own| *own as u32 == request)
}
