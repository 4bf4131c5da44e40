//! A disk in memory that tells what it was asked, and answers only when it may.

use std::collections::VecDeque;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_vhost_backend::backing::{Backing, Failure, Outcome, Request, Ticket};
use evolute_vhost_backend::connections::Seat;
use evolute_vhost_backend::device::{
    DeviceConfig, DeviceError, Endpoint, SocketAccess, StopSignal, run, serve,
};
use evolute_vhost_backend::io_thread::IoLoop;
use evolute_vhost_backend::io_thread::WakerHandle;

/// Long enough that only a hang gets there.
pub const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Everything ever submitted, in order.
    seen: Vec<Request>,
    waiting: VecDeque<(Ticket, Request)>,
    /// How many of `waiting` may be answered; none: all.
    allowed: Option<usize>,
    /// All is answered after so many more turns of the loop.
    turns: Option<u32>,
    fail: Option<Failure>,
    ready: bool,
    waker: Option<WakerHandle>,
}

/// The test's handle on the disk.
#[derive(Clone, Default)]
pub struct Disk(Arc<(Mutex<State>, Condvar)>);

impl Disk {
    pub fn new(len: usize) -> Disk {
        let disk = Disk::default();
        disk.with(|state| {
            state.bytes = vec![0; len];
            state.ready = true;
        });
        disk
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let (state, changed) = &*self.0;
        let mut state = state.lock().expect("no test panics inside");
        let result = f(&mut state);
        if let Some(waker) = &state.waker {
            waker.wake();
        }
        changed.notify_all();
        result
    }

    fn wait_until(&self, what: &str, mut condition: impl FnMut(&State) -> bool) {
        let (state, changed) = &*self.0;
        let guard = state.lock().expect("no test panics inside");
        let (_guard, timeout) = changed
            .wait_timeout_while(guard, PATIENCE, |state| !condition(state))
            .expect("no test panics inside");
        assert!(!timeout.timed_out(), "waited in vain until {what}");
    }

    pub fn set_ready(&self, ready: bool) {
        self.with(|state| state.ready = ready);
    }

    /// From now on nothing is answered.
    pub fn hold(&self) {
        self.with(|state| state.allowed = Some(0));
    }

    /// Answers `count` more requests, oldest first.
    pub fn release(&self, count: usize) {
        self.with(|state| *state.allowed.get_or_insert(0) += count);
    }

    /// Answers the newest request, and leaves the older ones.
    pub fn release_newest(&self) {
        self.with(|state| {
            if let Some(newest) = state.waiting.pop_back() {
                state.waiting.push_front(newest);
                *state.allowed.get_or_insert(0) += 1;
            }
        });
    }

    pub fn release_all(&self) {
        self.with(|state| state.allowed = None);
    }

    /// From now on nothing is answered, until the loop has turned so often. The first turn is somebody else's doing.
    pub fn release_after_turns(&self, turns: u32) {
        let mut state = self.0.0.lock().expect("no test panics inside");
        (state.allowed, state.turns) = (Some(0), Some(turns));
    }

    pub fn fail_with(&self, failure: Option<Failure>) {
        self.with(|state| state.fail = failure);
    }

    /// Waits until the device has submitted this many requests in all, and returns them.
    pub fn wait_seen(&self, count: usize) -> Vec<Request> {
        self.wait_until(&format!("{count} requests were submitted"), |state| state.seen.len() >= count);
        self.seen()
    }

    pub fn seen(&self) -> Vec<Request> {
        self.with(|state| state.seen.clone())
    }

    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        self.with(|state| state.bytes[offset..offset + len].to_vec())
    }

    pub fn fill(&self, offset: usize, bytes: &[u8]) {
        self.with(|state| state.bytes[offset..offset + bytes.len()].copy_from_slice(bytes));
    }
}

struct RecordingBacking(Disk);

impl Backing for RecordingBacking {
    fn submit(&mut self, ticket: Ticket, request: Request) {
        let (state, changed) = &*self.0.0;
        let mut state = state.lock().expect("no test panics inside");
        state.seen.push(request.clone());
        state.waiting.push_back((ticket, request));
        changed.notify_all();
    }

    fn on_wake(&mut self) {}

    fn settle(&mut self, _now: Instant) {}

    fn take_completed(&mut self, out: &mut Vec<(Ticket, Outcome)>) {
        let mut state = self.0.0.0.lock().expect("no test panics inside");
        match state.turns {
            Some(0) => (state.turns, state.allowed) = (None, None),
            Some(turns) => {
                state.turns = Some(turns - 1);
                if let Some(waker) = &state.waker {
                    waker.wake();
                }
            }
            None => {}
        }
        let count = state.allowed.unwrap_or(usize::MAX).min(state.waiting.len());
        if let Some(allowed) = &mut state.allowed {
            *allowed -= count;
        }
        for _ in 0..count {
            let (ticket, request) = state.waiting.pop_front().expect("counted");
            out.push((ticket, state.perform(request)));
        }
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn ready(&self) -> bool {
        self.0.0.0.lock().expect("no test panics inside").ready
    }
}

impl State {
    fn perform(&mut self, request: Request) -> Outcome {
        if let Some(failure) = self.fail {
            return Outcome::Failed(failure);
        }
        let at = |offset: u64| usize::try_from(offset).expect("64 bits");
        match request {
            Request::Read { offset, len } => {
                // In pieces of uneven length, as a volume hands them up.
                let data = &self.bytes[at(offset)..at(offset) + len as usize];
                let (a, b) = data.split_at(data.len() / 3);
                Outcome::Data([a, b].into_iter().map(Bytes::copy_from_slice).collect())
            }
            Request::Write { offset, data } => {
                self.bytes[at(offset)..at(offset) + data.len()].copy_from_slice(&data);
                Outcome::Done
            }
            Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => {
                self.bytes[at(offset)..at(offset + len)].fill(0);
                Outcome::Done
            }
        }
    }
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let from = Instant::now();
    while !condition() {
        assert!(from.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::yield_now();
    }
}

type MakeBacking = Box<dyn FnOnce(WakerHandle, Seat) -> Box<dyn Backing> + Send>;

/// What a device writes into its log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no test panics inside").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A device that serves a socket on its own thread; stopped when dropped.
pub struct Served {
    pub path: PathBuf,
    log: Log,
    stop: StopSignal,
    thread: Option<JoinHandle<Result<(), DeviceError>>>,
    _dir: Option<tempfile::TempDir>,
}

impl Served {
    pub fn start(config: DeviceConfig, disk: &Disk) -> Served {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut served = Served::start_at(&dir.path().join("disk.sock"), config, disk);
        served._dir = Some(dir);
        served
    }

    pub fn start_at(path: &Path, config: DeviceConfig, disk: &Disk) -> Served {
        Served::start_with(path, disk, move |endpoint, make, stop| run(config, endpoint, make, stop))
    }

    /// On an I/O thread that others use, too.
    pub fn start_on(io: &Arc<IoLoop>, config: DeviceConfig, disk: &Disk) -> Served {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let io = Arc::clone(io);
        let mut served =
            Served::start_with(&dir.path().join("disk.sock"), disk, move |endpoint, make, stop| {
                serve(&io, config, endpoint, make, stop)
            });
        served._dir = Some(dir);
        served
    }

    fn start_with(
        path: &Path,
        disk: &Disk,
        serve: impl FnOnce(Endpoint, MakeBacking, StopSignal) -> Result<(), DeviceError> + Send + 'static,
    ) -> Served {
        let endpoint = Endpoint::listen(path, SocketAccess::default()).expect("a socket");
        let stop = StopSignal::new().expect("an eventfd");
        let (disk, signal) = (disk.clone(), stop.clone());
        let make_backing = move |waker, _seat| -> Box<dyn Backing> {
            disk.with(|state| {
                state.waker = Some(waker);
                state.waiting.clear();
            });
            Box::new(RecordingBacking(disk))
        };
        let log = Log::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let served = move || serve(endpoint, Box::new(make_backing), signal);
        let thread = std::thread::spawn(move || tracing::subscriber::with_default(subscriber, served));
        Served { path: path.to_owned(), log, stop, thread: Some(thread), _dir: None }
    }

    /// Lines that the socket's thread has logged.
    pub fn said(&self) -> Vec<String> {
        let log = self.log.0.lock().expect("no test panics inside");
        String::from_utf8_lossy(&log).lines().map(str::to_owned).collect()
    }

    pub fn stop(&mut self) -> Result<(), DeviceError> {
        self.stop.stop();
        self.thread.take().expect("stopped once").join().expect("the device does not panic")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if self.thread.is_some() && !std::thread::panicking() {
            self.stop().expect("a clean end");
        }
    }
}

/// The disk as a backing, for tests that call `run` themselves.
pub fn backing(disk: Disk) -> Box<dyn Backing> {
    Box::new(RecordingBacking(disk))
}
