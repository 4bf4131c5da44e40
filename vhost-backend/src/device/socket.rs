//! The vhost-user socket: everybody may call, and one of them is the front end.
//!
//! ```text
//!  connects ─▶ waits, silent ──says something──▶ is listened to ──SET_OWNER──▶ the front end
//! ```
//!
//! What always holds:
//!
//! - Whoever says nothing has nothing: it waits beside the others, and leaves when there are too many.
//! - Who only asks (features, the configuration) has the disk for [`ASKING_PATIENCE`] and then gives its place to whoever
//!   has something to say. A real front end is the owner within milliseconds: QEMU says SET_OWNER before its guest is
//!   started, cloud-hypervisor before anything else.
//! - The owner's place is nobody's but its own until it leaves, also while its guest does not use the disk yet: a VMM that
//!   lost its connection then would have lost its disk. A second front end is hung up on at once, and the log names both.
//! - Half messages, garbage, callers without number: all bounded, and so is what is logged of them.
//! - A stop never waits for the front end.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use evolute_daemon::door::Shortage;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::callers::{Caller, Peer, Waiting};
use super::command::{Command, Commands};
use super::front_end::{FrontEnd, Lines};
use super::listening::{Listening, SocketAccess};
use super::sizing::SAY_EVERY;
use super::sparingly::Sparingly;
use super::{DeviceConfig, DeviceError};

/// For somebody who only asks, while others wait. A front end's handshake takes some milliseconds.
const ASKING_PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at what cannot be waited for: half a message, or somebody who waits for another to leave.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// After a session that had to be ended from inside. Finding that out may have cost other disks of the process a moment,
/// which a front end must not be able to repeat at will.
const PAUSE: Duration = Duration::from_secs(1);

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

/// Serves front ends until the stop, or until the only one leaves.
pub(super) fn serve(
    endpoint: &Endpoint,
    config: &DeviceConfig,
    commands: &Commands,
    stop: &StopSignal,
) -> Result<(), DeviceError> {
    let mut server = Server::new(config, commands);
    let listener = match endpoint {
        Endpoint::Connected(stream) => {
            let caller = stream.try_clone().and_then(Caller::new).map_err(DeviceError::Connection)?;
            server.give_place(caller, Instant::now());
            None
        }
        Endpoint::Listening(Listening { listener, .. }) => Some(listener),
    };
    loop {
        let awake = server.wait(listener, stop).map_err(DeviceError::Connection)?;
        if awake.stop {
            // The connection stays open until the I/O thread has finished what is out, so that the front end does not
            // look elsewhere in the middle of it.
            return close(commands);
        }
        if let Some(listener) = listener.filter(|_| awake.callers) {
            server.admit(listener);
        }
        server.listen_to_front_end()?;
        server.listen_to_others()?;
        if listener.is_none() && server.front_end.is_none() {
            return Ok(());
        }
    }
}

/// Ends the I/O thread in good order.
pub(super) fn close(commands: &Commands) -> Result<(), DeviceError> {
    commands.ask(|reply| Command::Close { reply }).map_err(|_| DeviceError::IoThreadEnded)
}

/// What a wait ended with.
struct Awake {
    stop: bool,
    callers: bool,
}

/// What becomes of somebody who has said something.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    Now,
    Later,
    Never,
}

struct Server<'a> {
    config: &'a DeviceConfig,
    commands: &'a Commands,
    front_end: Option<FrontEnd>,
    waiting: Waiting,
    shortage: Shortage,
    /// Nothing to accept with until then.
    accept_after: Option<Instant>,
    /// Nobody has a turn until then.
    pause_until: Option<Instant>,
    lines: Lines,
}

impl<'a> Server<'a> {
    fn new(config: &'a DeviceConfig, commands: &'a Commands) -> Server<'a> {
        let now = Instant::now();
        Server {
            config,
            commands,
            front_end: None,
            waiting: Waiting::default(),
            shortage: Shortage::default(),
            accept_after: None,
            pause_until: None,
            lines: Lines { owner: Sparingly::new(now), owner_pid: None, others: Sparingly::new(now) },
        }
    }

    fn wait(&mut self, listener: Option<&UnixListener>, stop: &StopSignal) -> io::Result<Awake> {
        self.accept_after = self.accept_after.filter(|after| Instant::now() < *after);
        let accepts = listener.filter(|_| self.accept_after.is_none());
        let speaks =
            |front_end: &&FrontEnd| !front_end.caller.has_half() && !front_end.sizing.keeps_waiting();
        let front_end = self.front_end.as_ref().filter(speaks);
        let looks = self.accept_after.is_some()
            || !self.waiting.are_all_silent()
            || front_end.is_some() != self.front_end.is_some();
        let says = self.front_end.as_ref().is_some_and(|front_end| front_end.sizing.owes());
        let mut polled = vec![PollFd::new(&stop.0, PollFlags::IN)];
        polled.extend(accepts.map(|listener| PollFd::new(listener, PollFlags::IN)));
        let callers = self.waiting.silent().chain(front_end.map(|front_end| &front_end.caller));
        polled.extend(callers.map(|caller| PollFd::new(caller, PollFlags::IN)));
        let timeout = looks.then_some(LOOK_EVERY).or(says.then_some(SAY_EVERY));
        let timeout = timeout.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(Awake { stop: false, callers: false }),
            other => other?,
        };
        let is_ready = |at: usize| !polled[at].revents().is_empty();
        Ok(Awake { stop: is_ready(0), callers: accepts.is_some() && is_ready(1) })
    }

    fn admit(&mut self, listener: &UnixListener) {
        match self.waiting.admit(listener) {
            Ok(None) => self.shortage.over(),
            Ok(Some(peer)) => {
                self.shortage.over();
                self.lines.others.tell(Instant::now(), |unsaid| {
                    tracing::warn!(unsaid, "too many connect and say nothing: hanging up on {peer}");
                });
            }
            Err(error) => self.accept_after = Some(Instant::now() + self.shortage.failed(&error)),
        }
    }

    fn listen_to_front_end(&mut self) -> Result<(), DeviceError> {
        if let Some(front_end) = &mut self.front_end
            && !front_end.listen(Instant::now(), &mut self.lines)?
        {
            self.pause_until = front_end.is_cut_off().then(|| Instant::now() + PAUSE);
            self.front_end.take().map_or(Ok(()), FrontEnd::end)?;
        }
        if let Some(front_end) = &mut self.front_end {
            front_end.sizing.tell(Instant::now());
        }
        Ok(())
    }

    fn listen_to_others(&mut self) -> Result<(), DeviceError> {
        let now = Instant::now();
        while let Some(at) = self.waiting.listen(now) {
            match self.turn(now) {
                Turn::Now => {
                    let caller = self.waiting.take(at);
                    if let Some(before) = self.front_end.take() {
                        let (asked, comes) = (&before.caller.peer, &caller.peer);
                        self.lines.others.tell(now, |unsaid| {
                            tracing::info!(unsaid, "{asked} only asked: {comes} takes its place");
                        });
                        before.end()?;
                    }
                    self.give_place(caller, now);
                }
                Turn::Later => break,
                Turn::Never => {
                    let caller = self.waiting.take(at);
                    self.refuse(&caller.peer, now);
                }
            }
        }
        Ok(())
    }

    /// Of whoever has something to say now.
    fn turn(&self, now: Instant) -> Turn {
        match &self.front_end {
            None if self.pause_until.is_some_and(|until| now < until) => Turn::Later,
            None => Turn::Now,
            // What it said before it left comes first.
            Some(front_end) if front_end.caller.has_hung_up() => Turn::Later,
            Some(front_end) if front_end.is_owner() => Turn::Never,
            Some(front_end) if now.duration_since(front_end.since) < ASKING_PATIENCE => Turn::Later,
            Some(_) => Turn::Now,
        }
    }

    fn give_place(&mut self, caller: Caller, now: Instant) {
        match FrontEnd::new(caller, self.config, self.commands.clone(), now) {
            Ok(front_end) => self.front_end = Some(front_end),
            Err(error) => {
                let line =
                    |unsaid| tracing::warn!(%error, unsaid, "a front end's connection could not be set up");
                self.lines.others.tell(now, line);
            }
        }
    }

    fn refuse(&mut self, second: &Peer, now: Instant) {
        let Some(first) = self.front_end.as_ref().map(|front_end| &front_end.caller.peer) else { return };
        self.lines.others.tell(now, |unsaid| {
            tracing::warn!(unsaid, "a second front end, {second}, is refused: {first} has this disk");
        });
    }
}
