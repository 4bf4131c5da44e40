//! Lines on their way to a descriptor that may stand still, be full, or be closed: a log's, above all.
//!
//! ```text
//!  any thread ──say──▶ queue (bounded in bytes and lines) ──▶ a thread of its own ──write──▶ stderr
//!                └─ full: the line is dropped and counted
//! ```
//!
//! What always holds: whoever says something waits for nobody who reads it, and never hears of a failure; memory is
//! bounded ([`BYTES_MAX`], twice); what was dropped is told as soon as lines flow again; nothing spins.
//!
//! The descriptor may be shared with others (a terminal, a pipe of several programs), so its flags are left alone: the
//! thread blocks in `write`, which is what it is for.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::PIPE_BUF;

/// What waits to be written, and again what is being written.
pub const BYTES_MAX: usize = 1 << 20;
/// Lines that wait.
pub const LINES_MAX: usize = 8 << 10;
/// Longer ones are cut: one line must not push out all others.
pub const LINE_BYTES_MAX: usize = 64 << 10;
/// Between attempts at a descriptor that takes nothing: first, and at most.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Where lines are said. Dropping it ends its thread once what waits is written or cannot be.
#[derive(Debug)]
pub struct Outlet {
    queue: Arc<Queue>,
}

#[derive(Debug)]
struct Queue {
    state: Mutex<State>,
    /// There is something to write, or the end is wanted.
    filled: Condvar,
    /// Everything was written.
    emptied: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Box<[u8]>>,
    bytes: usize,
    dropped: u64,
    writing: bool,
    ended: bool,
}

impl Outlet {
    /// Writes to `fd` from now on. `name` is the thread's.
    pub fn new(fd: OwnedFd, name: &str) -> io::Result<Self> {
        let queue =
            Arc::new(Queue { state: Mutex::default(), filled: Condvar::new(), emptied: Condvar::new() });
        let theirs = Arc::clone(&queue);
        std::thread::Builder::new().name(name.to_owned()).spawn(move || Writer::new(theirs, fd).run())?;
        Ok(Self { queue })
    }

    /// Takes one line, its end included. Never waits for the descriptor, never fails.
    pub fn say(&self, line: &[u8]) {
        self.put(line, false);
    }

    /// The same for what must not be dropped: why this process ends. Said a few times in its life.
    pub fn say_last(&self, line: &[u8]) {
        self.put(line, true);
    }

    fn put(&self, line: &[u8], always: bool) {
        let line = cut(line);
        let mut state = self.queue.lock();
        let full = state.lines.len() >= LINES_MAX || state.bytes + line.len() > BYTES_MAX;
        if full && !always {
            state.dropped += 1;
            return;
        }
        state.bytes += line.len();
        state.lines.push_back(line);
        drop(state);
        self.queue.filled.notify_one();
    }

    /// Waits until everything was written, `within` at most. False: whoever reads stands still.
    pub fn flush(&self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        let mut state = self.queue.lock();
        while state.writing || !state.lines.is_empty() || state.dropped > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.queue.emptied.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.queue.lock().ended = true;
        self.queue.filled.notify_one();
    }
}

impl Queue {
    /// A thread that panicked with the lock held lines, which are as whole as before.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn cut(line: &[u8]) -> Box<[u8]> {
    if line.len() <= LINE_BYTES_MAX {
        return line.into();
    }
    let mut short = line[..LINE_BYTES_MAX].to_vec();
    short.extend_from_slice("… (cut)\n".as_bytes());
    short.into()
}

/// The other end of the queue.
struct Writer {
    queue: Arc<Queue>,
    fd: OwnedFd,
    /// Since the last attempt that succeeded.
    failures: u64,
}

impl Writer {
    fn new(queue: Arc<Queue>, fd: OwnedFd) -> Self {
        Self { queue, fd, failures: 0 }
    }

    fn run(mut self) {
        while let Some((lines, dropped)) = self.next() {
            let mut written = self.write_lines(lines);
            if written && dropped > 0 {
                let dropped = told(dropped, "lines were dropped here: nobody took them in time");
                written = self.write(dropped.as_bytes());
            }
            if written && self.failures > 0 {
                let failures = std::mem::take(&mut self.failures);
                let _ = self.write(told(failures, "attempts to write here had failed").as_bytes());
            }
            let mut state = self.queue.lock();
            state.writing = false;
            if !written {
                // Only at the end: nobody is left who could try again.
                return self.queue.emptied.notify_all();
            }
            if state.lines.is_empty() {
                self.queue.emptied.notify_all();
            }
        }
    }

    /// What waits now. None: the end.
    fn next(&self) -> Option<(VecDeque<Box<[u8]>>, u64)> {
        let mut state = self.queue.lock();
        loop {
            if !state.lines.is_empty() || state.dropped > 0 {
                state.writing = true;
                state.bytes = 0;
                return Some((std::mem::take(&mut state.lines), std::mem::take(&mut state.dropped)));
            }
            if state.ended {
                return None;
            }
            state = self.queue.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// As many whole lines in one write as nobody else's can come between.
    fn write_lines(&mut self, lines: VecDeque<Box<[u8]>>) -> bool {
        let mut together = Vec::with_capacity(PIPE_BUF);
        for line in lines {
            if !together.is_empty() && together.len() + line.len() > PIPE_BUF {
                if !self.write(&together) {
                    return false;
                }
                together.clear();
            }
            together.extend_from_slice(&line);
        }
        self.write(&together)
    }

    /// All of it, however long that takes. False: it cannot be written, and the end is wanted.
    fn write(&mut self, mut bytes: &[u8]) -> bool {
        let mut pause = PAUSE_MIN;
        while !bytes.is_empty() {
            match rustix::io::write(&self.fd, bytes) {
                Ok(written) if written > 0 => {
                    bytes = &bytes[written..];
                    pause = PAUSE_MIN;
                    continue;
                }
                Err(Errno::INTR) => continue,
                // Somebody who shares it has set it so.
                Err(Errno::AGAIN) => self.until_writable(),
                // Closed, full, gone: it may be mended.
                Ok(_) | Err(_) => {
                    self.failures += 1;
                    if self.sleep(pause) {
                        return false;
                    }
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
        true
    }

    fn until_writable(&self) {
        let mut polled = [PollFd::from_borrowed_fd(self.fd.as_fd(), PollFlags::OUT)];
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        let _ = rustix::event::poll(&mut polled, Some(&second));
    }

    /// True: the end is wanted.
    fn sleep(&self, pause: Duration) -> bool {
        let deadline = Instant::now() + pause;
        let mut state = self.queue.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return state.ended;
            }
            state = self.queue.filled.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn told(count: u64, what: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    format!("{}  WARN evolute_daemon::outlet: {count} {what}\n", crate::utc(now))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use rustix::fs::{CWD, Mode, OFlags};

    use super::{BYTES_MAX, LINES_MAX, Outlet};

    /// Far beyond what any machine needs for it.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn dropped_lines(text: &str) -> u64 {
        let told = text.lines().filter(|line| line.contains("were dropped here"));
        told.filter_map(|line| line.split("outlet: ").nth(1)?.split(' ').next()?.parse::<u64>().ok()).sum()
    }

    /// In a thread, so that a wait that never ends is a failure and not a test that hangs.
    fn says(outlet: Outlet, lines: u64) -> Outlet {
        let (done, said) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            (0..lines).for_each(|n| outlet.say(format!("line {n} {}\n", "x".repeat(100)).as_bytes()));
            let _ = done.send(outlet);
        });
        said.recv_timeout(PATIENCE).expect("whoever says something waited for whoever reads it")
    }

    #[test]
    fn nobody_waits_for_a_reader_that_stands_still_and_what_was_dropped_is_told() {
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        const LINES: u64 = 100_000;
        let outlet = says(Outlet::new(writer, "log").expect("a thread"), LINES);
        {
            let state = outlet.queue.lock();
            assert!(state.bytes <= BYTES_MAX && state.lines.len() <= LINES_MAX && state.dropped > 0);
        }
        // An end does not wait for it either.
        assert!(!outlet.flush(Duration::from_millis(10)));
        outlet.say_last(b"the end\n");
        drop(outlet);
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).expect("all of it");
        let whole = text.lines().filter(|line| line.starts_with("line ")).count() as u64;
        assert_eq!(whole + dropped_lines(&text), LINES);
        assert!(
            text.starts_with("line 0 ") && text.contains("the end\n"),
            "the first and the last are there"
        );
    }

    #[test]
    fn what_cannot_be_written_is_tried_again_and_that_is_told() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .expect("a fifo");
        let open = |flags| rustix::fs::open(&path, flags | OFlags::CLOEXEC, Mode::empty()).expect("opened");
        let reader: OwnedFd = open(OFlags::RDONLY | OFlags::NONBLOCK);
        let outlet = Outlet::new(open(OFlags::WRONLY), "log").expect("a thread");
        drop(reader);
        outlet.say(b"to nobody yet\n");
        assert!(!outlet.flush(Duration::from_millis(50)), "it is kept");
        let reader = open(OFlags::RDONLY | OFlags::NONBLOCK);
        assert!(outlet.flush(PATIENCE));
        let mut bytes = [0; 4096];
        let got = rustix::io::read(&reader, &mut bytes[..]).expect("something");
        let text = String::from_utf8_lossy(&bytes[..got]);
        assert!(
            text.contains("to nobody yet\n") && text.contains("attempts to write here had failed"),
            "{text}"
        );
    }

    #[test]
    fn an_end_that_cannot_be_written_is_an_end() {
        let full = File::options().write(true).open("/dev/full").expect("there");
        let outlet = Outlet::new(full.into(), "log").expect("a thread");
        outlet.say(b"lost\n");
        assert!(!outlet.flush(Duration::from_millis(50)));
        let queue = std::sync::Arc::downgrade(&outlet.queue);
        drop(outlet);
        // Its thread lets go of the queue.
        while queue.strong_count() > 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
