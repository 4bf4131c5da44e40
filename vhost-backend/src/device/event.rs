//! The eventfds by which guest and device wake each other, as a front end hands them over.
//!
//! What always holds:
//!
//! - Nothing but an eventfd is one: whatever else a descriptor is, writing to it might block, fill a disk, or end us.
//! - Writing to one holds its thread for no longer than two ticks of an [`Alarm`]. A full counter blocks its writer unless
//!   `O_NONBLOCK` says otherwise, and that flag is the front end's: some clear it to wait for answers by reading, and it
//!   can be cleared at any time. So it is neither relied on nor changed; who blocks is woken by a signal.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

/// What Linux calls an eventfd that is open. No path looks like it: those begin with a slash.
const NAME: &str = "anon_inode:[eventfd]";
/// How often a thread that works is interrupted, in case that it stands still.
const TICK: Duration = Duration::from_millis(50);

/// Why a descriptor is not taken. The message is refused.
#[derive(Debug, thiserror::Error)]
pub enum NotAnEvent {
    #[error("only an eventfd can be a kick, a call or an err descriptor; this one is {0}")]
    Other(String),
    #[error("an eventfd whose counter is full cannot be a call descriptor: it would block. Give a new one")]
    Full,
    #[error("nothing tells whether a descriptor is an eventfd: /proc has to be mounted")]
    Unknown(#[source] io::Error),
}

/// Nobody reads it, its counter is full, and it blocks whoever writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks;

/// An eventfd of the front end's.
#[derive(Debug)]
pub struct Event(File);

impl Event {
    /// One that we wait for, or do not use.
    pub fn new(file: File) -> Result<Event, NotAnEvent> {
        let name = rustix::fs::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new())
            .map_err(|errno| NotAnEvent::Unknown(errno.into()))?;
        match name.to_str() {
            Ok(NAME) => Ok(Event(file)),
            _ => Err(NotAnEvent::Other(name.to_string_lossy().into_owned())),
        }
    }

    /// One that we write to. That it has room is looked at where nobody else waits; later it may lose it.
    pub fn with_room(file: File) -> Result<Event, NotAnEvent> {
        let event = Event::new(file)?;
        let mut polled = [PollFd::new(&event.0, PollFlags::OUT)];
        match rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(1..) => Ok(event),
            _ => Err(NotAnEvent::Full),
        }
    }

    pub fn signal(&self) -> Result<(), Blocks> {
        match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
            // Only who had to wait is interrupted.
            Err(Errno::INTR) => Err(Blocks),
            // Full and not blocking: it has been signalled, and nobody has looked.
            Ok(_) | Err(_) => Ok(()),
        }
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Interrupts whatever its thread waits for, every [`TICK`] while the thread works. Nothing happens in that signal; a
/// system call that waits ends with `EINTR`.
pub struct Alarm {
    timer: libc::timer_t,
    armed: bool,
    worked: bool,
}

extern "C" fn ring(_signal: libc::c_int) {}

impl Alarm {
    /// Of the calling thread.
    pub fn new() -> io::Result<Alarm> {
        let mut timer = ptr::null_mut();
        // SAFETY: all-zero is a valid `sigaction`, `sigset_t` and `sigevent`. The handler does nothing, so it may run
        // anywhere; without SA_RESTART what it interrupts ends. Every pointer is to a local that outlives its call.
        let made = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ring as extern "C" fn(libc::c_int) as libc::sighandler_t;
            libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut());
            let mut signals: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&raw mut signals, libc::SIGALRM);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const signals, ptr::null_mut());
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = libc::SIGALRM;
            event.sigev_notify_thread_id = libc::gettid();
            libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer)
        };
        match made {
            0 => Ok(Alarm { timer, armed: false, worked: false }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The thread is about to work.
    pub fn works(&mut self) {
        self.worked = true;
        if !self.armed {
            self.set(TICK);
            self.armed = true;
        }
    }

    /// It was interrupted in its sleep. One that has slept since the last time is not interrupted again.
    pub fn rang(&mut self) {
        if !std::mem::take(&mut self.worked) {
            self.set(Duration::ZERO);
            self.armed = false;
        }
    }

    /// Zero: never.
    fn set(&self, every: Duration) {
        let every = libc::timespec { tv_sec: 0, tv_nsec: every.subsec_nanos().into() };
        let setting = libc::itimerspec { it_interval: every, it_value: every };
        // SAFETY: a timer of ours that lives as long as `self`, and a setting that outlives the call.
        let set = unsafe { libc::timer_settime(self.timer, 0, &raw const setting, ptr::null_mut()) };
        assert!(set == 0, "a timer is set: {}", io::Error::last_os_error());
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and nobody has it any more.
        unsafe { libc::timer_delete(self.timer) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsFd, OwnedFd};

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{OFlags, fcntl_setfl};

    use super::{Alarm, Blocks, Event, NotAnEvent};

    fn fresh(flags: EventfdFlags) -> File {
        File::from(eventfd(0, flags).expect("an eventfd"))
    }

    fn again(of: &File) -> File {
        of.try_clone().expect("a descriptor")
    }

    fn fill(event: &File) {
        rustix::io::write(event, &(u64::MAX - 1).to_ne_bytes()).expect("room for all of it");
    }

    /// All that blocks when it is full, ends the process with a signal, or grows a file.
    #[test]
    fn only_an_eventfd_is_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let (read, write) = rustix::pipe::pipe().expect("a pipe");
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("sockets");
        let timer = rustix::time::timerfd_create(
            rustix::time::TimerfdClockId::Monotonic,
            rustix::time::TimerfdFlags::empty(),
        );
        let others: Vec<OwnedFd> = vec![
            read,
            write,
            ours.into(),
            theirs.into(),
            File::create(dir.path().join(super::NAME)).expect("a file").into(),
            File::open("/dev/null").expect("a device").into(),
            rustix::event::epoll::create(rustix::event::epoll::CreateFlags::empty()).expect("an epoll"),
            timer.expect("a timer"),
            rustix::fs::memfd_create(super::NAME, rustix::fs::MemfdFlags::empty()).expect("memory"),
        ];
        for other in others {
            let refused = Event::new(File::from(other)).expect_err("not an eventfd");
            assert!(matches!(refused, NotAnEvent::Other(_)), "{refused}");
        }
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK, EventfdFlags::SEMAPHORE] {
            Event::new(fresh(flags)).expect("an eventfd");
            Event::with_room(fresh(flags)).expect("an empty eventfd");
        }
    }

    #[test]
    fn a_full_one_is_not_taken_and_one_that_does_not_block_stays_full_in_silence() {
        let full = fresh(EventfdFlags::empty());
        fill(&full);
        assert!(matches!(Event::with_room(full), Err(NotAnEvent::Full)));
        let later = fresh(EventfdFlags::NONBLOCK);
        let event = Event::with_room(again(&later)).expect("it is empty");
        fill(&later);
        assert_eq!(event.signal(), Ok(()));
    }

    /// The flag is the front end's: it may take `O_NONBLOCK` away when we have looked.
    #[test]
    fn who_writes_to_one_that_blocks_is_woken_again_and_again() {
        let mut alarm = Alarm::new().expect("a timer");
        let theirs = fresh(EventfdFlags::NONBLOCK);
        let event = Event::with_room(again(&theirs)).expect("it is empty");
        fill(&theirs);
        fcntl_setfl(theirs.as_fd(), OFlags::empty()).expect("their flag");
        alarm.works();
        for _ in 0..3 {
            assert_eq!(event.signal(), Err(Blocks));
        }
        let mut count = [0; 8];
        rustix::io::read(&theirs, &mut count).expect("they read");
        assert_eq!(event.signal(), Ok(()), "there is room again");
    }
}
