//! The load on one device, in rounds, and what came of it.
//!
//! ```text
//!  load (mixed, overlapping, up to 1 MiB) ─▶ drain ─▶ read every sector ─▶ the round goes to the checker's thread
//!      ▲                                                        │
//!      └───────────────── next round ◀──────────────────────────┘
//! ```
//!
//! [`start`] runs it on a thread of its own and gives a [`Handle`]: whoever breaks things meanwhile asks for rounds and
//! watches progress. `None` of that is needed by the program `blkcheck`, which just lets it run.

pub mod options;
pub mod report;
mod run;
pub mod stalls;
mod work;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::driver::{Device, DriverError};
use options::Options;
use report::Report;
pub use run::files::Judged;

/// What anybody may look at while it runs.
#[derive(Debug, Default)]
pub struct Progress {
    pub answered: AtomicU64,
    pub acked_writes: AtomicU64,
    pub violations: AtomicU64,
    pub rounds: AtomicU64,
    pub under_way: AtomicU64,
    pub connections: AtomicU64,
    /// Times the load went to another server.
    pub moves: AtomicU64,
    pub pauses: AtomicU64,
    /// Since the run began; when the last answer was seen.
    pub last_answer_ns: AtomicU64,
    /// No answer for the stall limit: given up.
    pub hung: AtomicBool,
}

#[derive(Debug)]
enum Command {
    /// End the round now: drain, read everything, check.
    Round,
    /// The same, and then the end.
    Finish,
    /// End at once, whatever is under way.
    Stop,
    /// Drain, and wait for the next round to be asked for.
    Pause,
    /// Go to another server, see [`Handle::move_to`].
    Move(PathBuf),
    /// See [`Handle::judge_file`].
    JudgeFile(PathBuf, mpsc::Sender<io::Result<Judged>>),
}

pub struct Handle {
    pub progress: Arc<Progress>,
    pub began: Instant,
    commands: mpsc::Sender<Command>,
    thread: JoinHandle<Result<Report, DriverError>>,
}

/// Connects and starts the load.
pub fn start(options: Options) -> Result<Handle, DriverError> {
    let progress = Arc::new(Progress::default());
    let (commands, received) = mpsc::channel();
    let began = Instant::now();
    let device = Device::connect(options.device())?;
    let seen = progress.clone();
    let thread = std::thread::Builder::new()
        .name("blkcheck".into())
        .spawn(move || run::Run::new(options, device, seen, began).run(&received))
        .map_err(DriverError::Memory)?;
    Ok(Handle { progress, began, commands, thread })
}

impl Handle {
    /// Asks for the end of this round and waits for it: every sector was read after this was called. False: it did not
    /// come within `patience`, or the run has ended.
    pub fn round(&self, patience: Duration) -> bool {
        let before = self.progress.rounds.load(Ordering::SeqCst);
        if self.commands.send(Command::Round).is_err() {
            return false;
        }
        self.wait_beyond(&self.progress.rounds, before, patience)
    }

    /// Nothing is under way and nothing new is asked from when this returns until the next [`Handle::round`].
    pub fn pause(&self, patience: Duration) -> bool {
        let before = self.progress.pauses.load(Ordering::SeqCst);
        if self.commands.send(Command::Pause).is_err() {
            return false;
        }
        self.wait_beyond(&self.progress.pauses, before, patience)
    }

    /// Leaves this server for another one that has the volume now, and waits until that is done: as a guest that is started
    /// again elsewhere, while the machine it was on does not answer. What was under way has happened by now or never
    /// will; that is checked.
    pub fn move_to(&self, socket: PathBuf, patience: Duration) -> bool {
        let before = self.progress.moves.load(Ordering::SeqCst);
        if self.commands.send(Command::Move(socket)).is_err() {
            return false;
        }
        self.wait_beyond(&self.progress.moves, before, patience)
    }

    /// After [`Handle::pause`]: judges a raw image of the volume as if everything had been read from it now.
    pub fn judge_file(&self, image: PathBuf, patience: Duration) -> io::Result<Judged> {
        let (answer, judged) = mpsc::channel();
        let ended = |_| io::Error::other("the load has ended, or the judgement takes too long");
        self.commands
            .send(Command::JudgeFile(image, answer))
            .map_err(|_| io::Error::other("the load has ended"))?;
        judged.recv_timeout(patience).map_err(ended)?
    }

    fn wait_beyond(&self, counter: &AtomicU64, before: u64, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while counter.load(Ordering::SeqCst) == before {
            if Instant::now() >= deadline || self.thread.is_finished() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends it with a last complete check and gives everything it found.
    pub fn finish(self) -> Result<Report, DriverError> {
        // A run that has ended already hears nothing and has its report.
        let _ = self.commands.send(Command::Finish);
        self.join()
    }

    /// Ends it at once. What was answered until then is checked; the report is never a pass.
    pub fn abort(self) -> Result<Report, DriverError> {
        let _ = self.commands.send(Command::Stop);
        self.join()
    }

    /// Waits until it ends by itself, as its options say.
    pub fn join(self) -> Result<Report, DriverError> {
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
