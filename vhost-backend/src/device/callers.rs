//! Who calls at the socket: processes with their names, messages that have arrived whole or not, and who waits for a
//! turn.
//!
//! What always holds: nothing here blocks, and nothing a caller does makes it hold more than [`WAITING_MAX`] of them.

use std::fmt;
use std::fs;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::RecvFlags;

/// For one message to arrive whole, and for a reply to be taken. A front end writes a message at once.
pub const MESSAGE_TIMEOUT: Duration = Duration::from_secs(1);
/// Callers beside the front end. They cost a descriptor each; those of use are one or two that change places.
pub const WAITING_MAX: usize = 8;

/// Message header: request, flags, size of the body; each 32 bits in the host's byte order.
const HEADER_BYTES: usize = 12;
/// The longest body that is taken for one; what claims more is refused by its header.
const BODY_BYTES_MAX: u32 = 4096;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// The process at the other end, as the kernel knows it from when it connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pid: i32,
    name: String,
}

impl Peer {
    fn of(stream: &UnixStream) -> Peer {
        let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).expect("twelve bytes");
        // SAFETY: the kernel writes at most `len` bytes into `credentials`, and both outlive the call. Not rustix's: its
        // process id cannot be 0, which is what a process of another namespace has.
        let failed = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut credentials).cast(),
                &raw mut len,
            )
        };
        let pid = if failed == 0 { credentials.pid } else { 0 };
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Peer { pid, name: name.trim_end().to_owned() }
    }

    /// None: it is in another container.
    pub fn pid(&self) -> Option<i32> {
        Some(self.pid).filter(|pid| *pid > 0)
    }
}

impl Peer {
    /// How long ago the process was started. None: it cannot be seen from here.
    pub fn age(&self) -> Option<Duration> {
        let started = started(&fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?)?;
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let now = Duration::new(u64::try_from(now.tv_sec).ok()?, u32::try_from(now.tv_nsec).ok()?);
        Some(now.saturating_sub(started))
    }
}

/// When a process started, since the machine did, from its `stat`. Its name may hold anything, parentheses too.
fn started(stat: &str) -> Option<Duration> {
    /// In what Linux gives times to user space, on every machine that we run on.
    const TICK: Duration = Duration::from_millis(10);
    /// The 22nd field; the third is the first one behind the name.
    const START_TIME: usize = 22 - 3;
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks: u32 = fields.split_whitespace().nth(START_TIME)?.parse().ok()?;
    Some(TICK * ticks)
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.pid, self.name.as_str()) {
            (0, _) => write!(f, "a process of another container"),
            (pid, "") => write!(f, "pid {pid}"),
            // It chose its name itself.
            (pid, name) => write!(f, "pid {pid} ({})", name.escape_debug()),
        }
    }
}

/// A message that can be read without waiting for any of it.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    pub request: u32,
    pub needs_reply: bool,
}

/// What a caller has said since it was last listened to.
#[derive(Clone, Copy, Debug)]
pub enum Said {
    Nothing,
    Half,
    Message(Header),
    /// It left, or does not finish what it began.
    Goodbye,
}

/// One connection.
#[derive(Debug)]
pub struct Caller {
    pub stream: UnixStream,
    pub peer: Peer,
    /// Since when there is half a message.
    half_since: Option<Instant>,
    has_spoken: bool,
}

impl Caller {
    pub fn new(stream: UnixStream) -> io::Result<Caller> {
        stream.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
        stream.set_write_timeout(Some(MESSAGE_TIMEOUT))?;
        let peer = Peer::of(&stream);
        Ok(Caller { stream, peer, half_since: None, has_spoken: false })
    }

    pub fn listen(&mut self, now: Instant) -> Said {
        let said = said(&self.stream);
        self.has_spoken = matches!(said, Said::Message(_));
        match said {
            Said::Half => {
                let since = *self.half_since.get_or_insert(now);
                if now.duration_since(since) < MESSAGE_TIMEOUT { Said::Half } else { Said::Goodbye }
            }
            said => {
                self.half_since = None;
                said
            }
        }
    }

    /// Half a message is there. For the kernel it is as good as a whole one: waiting for more of it would not be waiting.
    pub fn has_half(&self) -> bool {
        self.half_since.is_some()
    }

    /// It has hung up, whatever of it there is still to read.
    pub fn has_hung_up(&self) -> bool {
        let mut polled = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        matches!(rustix::event::poll(&mut polled, Some(&Timespec::default())), Ok(1))
    }
}

impl AsFd for Caller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn said(stream: &UnixStream) -> Said {
    let mut header = [0u8; HEADER_BYTES];
    match rustix::net::recv(stream, &mut header[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, 0)) => return Said::Goodbye,
        Ok((_, HEADER_BYTES)) => {}
        Ok(_) => return Said::Half,
        Err(Errno::AGAIN | Errno::INTR) => return Said::Nothing,
        Err(_) => return Said::Goodbye,
    }
    let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = header;
    let field = u32::from_ne_bytes;
    let (request, flags, body) = (field([r0, r1, r2, r3]), field([f0, f1, f2, f3]), field([s0, s1, s2, s3]));
    let there = rustix::io::ioctl_fionread(stream).unwrap_or(0);
    if body <= BODY_BYTES_MAX && there < HEADER_BYTES as u64 + u64::from(body) {
        return Said::Half;
    }
    Said::Message(Header { request, needs_reply: flags & FLAG_NEED_REPLY != 0 })
}

/// Those who have connected and had no turn yet, in the order in which they came.
#[derive(Debug, Default)]
pub struct Waiting(Vec<Caller>);

impl Waiting {
    /// Takes in who stands at the door, some at a time. Returned: who had to leave for it.
    pub fn admit(&mut self, listener: &UnixListener) -> io::Result<Option<Peer>> {
        let mut shown_out = None;
        for _ in 0..WAITING_MAX {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Gone again before we looked.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            if self.0.len() == WAITING_MAX {
                shown_out = Some(self.0.remove(self.victim()).peer);
            }
            // One that cannot be set up is gone.
            self.0.extend(Caller::new(stream));
        }
        Ok(shown_out)
    }

    /// The oldest of the process that has most of them here: nobody who calls once leaves for one who calls often.
    fn victim(&self) -> usize {
        let calls = |caller: &Caller| self.0.iter().filter(|other| other.peer.pid == caller.peer.pid).count();
        let oldest_first = self.0.iter().enumerate().rev();
        oldest_first.max_by_key(|(_, caller)| calls(caller)).map_or(0, |(at, _)| at)
    }

    /// Those who can be waited for: what the others have said is known, or cannot be waited for.
    pub fn silent(&self) -> impl Iterator<Item = &Caller> {
        self.0.iter().filter(|caller| !caller.has_spoken && !caller.has_half())
    }

    pub fn are_all_silent(&self) -> bool {
        self.silent().count() == self.0.len()
    }

    /// The first that has said something. Whoever left is forgotten.
    pub fn listen(&mut self, now: Instant) -> Option<usize> {
        self.0.retain_mut(|caller| !matches!(caller.listen(now), Said::Goodbye));
        self.0.iter().position(|caller| caller.has_spoken)
    }

    pub fn take(&mut self, at: usize) -> Caller {
        self.0.remove(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_any_name_has_its_age() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 1 2";
        assert_eq!(started(stat), Some(Duration::from_millis(123_450)));
        assert_eq!(started("7 (x) S 1"), None);
        assert_eq!(started(""), None);
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let age = Peer::of(&ours).age().expect("this process");
        assert!(age < Duration::from_hours(24), "{age:?}");
    }
}
