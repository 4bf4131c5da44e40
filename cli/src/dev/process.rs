//! One process of a dev cluster: started, watched, started again when it dies, stopped.
//!
//! A task owns the child. What happens to it goes out as an [`Event`]; the wish to stop comes in by [`Process::stop`].
//! The child is in a process group of its own, so that Ctrl-C reaches only us and the order of stopping is ours; and
//! it is killed by the kernel should we die without stopping it.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use evolute_daemon::die_with_parent;
use rustix::process::{Pid, Signal, getppid, kill_process};
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::failure::Failure;

/// A daemon that has not ended by then after SIGTERM never will.
const STOP_MAX: Duration = Duration::from_secs(15);
const RESTARTS_WITHIN: Duration = Duration::from_secs(60);
/// Before a process is started again: the first time, and at most. One that keeps dying is given twice the time.
const RESTART_PAUSE_MIN: Duration = Duration::from_millis(100);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Whatever lives for so long has not died for the reason it died for before.
const LIVES: Duration = Duration::from_secs(30);
const READY_POLL: Duration = Duration::from_millis(20);
/// Enough of the log to see the error, not the whole start-up.
const LOG_LINES_SHOWN: usize = 6;

/// What to run.
#[derive(Debug, Clone)]
pub struct Spec {
    /// `mds`, `chunkserver-1`, `backend-disk`.
    pub name: String,
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    pub log: PathBuf,
    pub ready_file: PathBuf,
    pub ready_within: Duration,
    /// Within a minute (`RESTARTS_WITHIN`). None: as often as it dies.
    pub restarts_max: Option<u32>,
}

/// News of a process, for whoever supervises all of them.
#[derive(Debug)]
pub enum Event {
    Died {
        name: String,
        status: String,
    },
    Restarted {
        name: String,
        pid: u32,
    },
    /// It could not be started; that is tried again.
    NotStarted {
        name: String,
        why: String,
        again_in: Duration,
    },
    /// It died more often than it may.
    GivenUp {
        name: String,
        why: String,
    },
}

#[derive(Debug)]
pub struct Process {
    pub name: String,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Option<String>>,
}

impl Process {
    /// Starts it and waits until it is ready. Gives its process id with it.
    pub async fn start(spec: Spec, events: mpsc::UnboundedSender<Event>) -> Result<(Self, u32), Failure> {
        let mut child = spawn(&spec)?;
        let pid = ready(&spec, &mut child).await?;
        let name = spec.name.clone();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(keep_running(spec, child, events, stopped));
        Ok((Self { name, stop: Some(stop), task }, pid))
    }

    /// SIGTERM, and SIGKILL when that does not help. Says what was not clean about its end.
    pub async fn stop(mut self) -> Option<String> {
        if let Some(stop) = self.stop.take() {
            // Nobody listens: the process was given up, which was reported then.
            let _ = stop.send(());
        }
        (&mut self.task).await.unwrap_or_else(|error| Some(format!("{}: {error}", self.name)))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Dropped without stop(): the child goes with its task (kill_on_drop).
        self.task.abort();
    }
}

fn spawn(spec: &Spec) -> Result<Child, Failure> {
    let log = open_log(&spec.log)?;
    let log_too = log.try_clone().map_err(Failure::io(format!("opening {}", spec.log.display())))?;
    // What a former run left must not be taken for news.
    match fs::remove_file(&spec.ready_file) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(Failure::Io { doing: format!("removing {}", spec.ready_file.display()), source: e });
        }
        _ => {}
    }
    let parent = rustix::process::getpid();
    let mut command = Command::new(&spec.program);
    command
        .args(&spec.arguments)
        .arg("--ready-file")
        .arg(&spec.ready_file)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log_too)
        .process_group(0)
        .kill_on_drop(true);
    let prepare = move || {
        die_with_parent()?;
        // The parent may have died between fork and the line above; then no signal comes.
        if getppid() != Some(parent) {
            return Err(io::Error::from(io::ErrorKind::BrokenPipe));
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls (prctl, getppid) and allocates nothing.
    unsafe { command.pre_exec(prepare) };
    command.spawn().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Failure::Dev {
            what: format!("{} is not there", spec.program.display()),
            next: "build the programs (`make build`), or say where they are by --bin-dir".to_owned(),
        },
        _ => Failure::Io { doing: format!("starting {}", spec.program.display()), source },
    })
}

/// Every start appends; a log that has grown large is put aside once, so that a directory used for weeks stays small.
fn open_log(path: &Path) -> Result<File, Failure> {
    const LOG_BYTES_MAX: u64 = 16 << 20;
    if fs::metadata(path).is_ok_and(|m| m.len() > LOG_BYTES_MAX) {
        let _ = fs::rename(path, path.with_extension("log.old"));
    }
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .map_err(Failure::io(format!("opening {}", path.display())))
}

/// Waits for the ready file of exactly this child.
async fn ready(spec: &Spec, child: &mut Child) -> Result<u32, Failure> {
    let deadline = Instant::now() + spec.ready_within;
    let pid = child.id().unwrap_or(0);
    let failed = |what: String| Failure::Dev {
        what: format!("{what}\n{}", last_lines(&spec.log)),
        next: format!("its log is {}", spec.log.display()),
    };
    loop {
        if ready_pid(&spec.ready_file) == Some(u64::from(pid)) {
            return Ok(pid);
        }
        let ended = child.try_wait().map_err(Failure::io(format!("watching {}", spec.name)))?;
        if let Some(status) = ended {
            return Err(failed(format!("{} ended while it started ({})", spec.name, words(status))));
        }
        if Instant::now() >= deadline {
            let seconds = spec.ready_within.as_secs();
            return Err(failed(format!("{} was not ready within {seconds} s", spec.name)));
        }
        sleep(READY_POLL).await;
    }
}

fn ready_pid(path: &Path) -> Option<u64> {
    let content: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    content.get("pid")?.as_u64()
}

/// Ends when asked to stop, or when the process died more often than it may. Says what was not clean about the last end.
async fn keep_running(
    spec: Spec,
    child: Child,
    events: mpsc::UnboundedSender<Event>,
    mut stop: oneshot::Receiver<()>,
) -> Option<String> {
    let mut deaths: VecDeque<Instant> = VecDeque::new();
    let mut pause = RESTART_PAUSE_MIN;
    let mut since = Instant::now();
    let mut running = Some(child);
    // A supervisor that is gone needs no news.
    let tell = |event| drop(events.send(event));
    loop {
        if let Some(mut child) = running.take() {
            // Both branches are cancel-safe.
            let ended = tokio::select! {
                _ = &mut stop => return end(&spec, child).await,
                ended = child.wait() => ended,
            };
            let status = ended.map_or_else(|error| error.to_string(), words);
            tell(Event::Died { name: spec.name.clone(), status });
            let now = Instant::now();
            if now - since >= LIVES {
                pause = RESTART_PAUSE_MIN;
            }
            deaths.retain(|death| now - *death < RESTARTS_WITHIN);
            deaths.push_back(now);
            if spec.restarts_max.is_some_and(|most| deaths.len() > most as usize) {
                let times = deaths.len();
                let last = last_lines(&spec.log);
                let why = format!("it died {times} times within a minute; last words:\n{last}");
                tell(Event::GivenUp { name: spec.name.clone(), why });
                return None;
            }
        }
        tokio::select! {
            _ = &mut stop => return None,
            () = sleep(pause) => {}
        }
        pause = (pause * 2).min(RESTART_PAUSE_MAX);
        since = Instant::now();
        let not_started = |why: String| Event::NotStarted { name: spec.name.clone(), why, again_in: pause };
        let mut child = match spawn(&spec) {
            Ok(child) => child,
            Err(failure) => {
                tell(not_started(failure.to_string()));
                continue;
            }
        };
        let started = tokio::select! {
            _ = &mut stop => None,
            started = ready(&spec, &mut child) => Some(started),
        };
        match started {
            None => return end(&spec, child).await,
            Some(Ok(pid)) => tell(Event::Restarted { name: spec.name.clone(), pid }),
            Some(Err(failure)) => {
                // Dead, or alive and of no use: then it dies here and the next turn counts it.
                tell(not_started(failure.to_string()));
                let _ = child.start_kill();
            }
        }
        running = Some(child);
    }
}

async fn end(spec: &Spec, mut child: Child) -> Option<String> {
    terminate(&child);
    match timeout(STOP_MAX, child.wait()).await {
        Ok(Ok(status)) if status.success() => None,
        Ok(Ok(status)) => Some(format!(
            "{} did not stop cleanly ({}); its log is {}",
            spec.name,
            words(status),
            spec.log.display()
        )),
        Ok(Err(error)) => Some(format!("{}: {error}", spec.name)),
        Err(_) => {
            let _ = child.kill().await;
            let seconds = STOP_MAX.as_secs();
            Some(format!(
                "{} did not stop within {seconds} s and was killed; its log is {}",
                spec.name,
                spec.log.display()
            ))
        }
    }
}

fn terminate(child: &Child) {
    // The id is there as long as the child was not waited for, so it cannot be somebody else's.
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        let _ = kill_process(pid, Signal::TERM);
    }
}

fn words(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

fn last_lines(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..];
    shown.iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}
