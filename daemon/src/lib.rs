//! How Evolute's programs start, tell that they are ready, and stop: the lines every `main.rs` would repeat; which of
//! their threads go first, how they print a date, and a command for a person to type ([`shell`]).
//!
//! A program's `main` does, in this order: parse its arguments (clap), [`start`], [`read_config`] when a file was
//! named, open what it owns, serve, [`write_ready_file`], wait for [`Stop::requested`], close, return 0, or say why not
//! by [`last_words`].
//!
//! It does not know what any of the programs is for.

mod calendar;
pub mod door;
pub mod notify;
pub mod outlet;
mod ready_file;
pub mod shell;
mod turns;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::env;
use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::PanicHookInfo;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::Context;
use serde::de::DeserializeOwned;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::level_filters::STATIC_MAX_LEVEL;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::Directive;

pub use calendar::utc;
pub use outlet::Outlet;
pub use ready_file::{check_ready_file, remove_ready_file, write_ready_file};
pub use turns::{background, short_turns};

/// The log of this process, and why it ends: stderr.
static LOG: OnceLock<Outlet> = OnceLock::new();
/// What was said last gets this long to be written. Whoever reads may stand still; an end does not wait for that.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);

/// Sets up what every program has: traces to stderr (`EVOLUTE_LOG` filters them, default `info`) for which nobody waits
/// ([`outlet`]), as many open files as the system allows, an allocator that keeps what was freed, and the end of the
/// process when any thread of it panics.
///
/// A panic is a broken invariant of ours: to go on with half a process would be worse than a restart.
#[must_use = "dropped at the end of main, it gives the last lines a moment to be written"]
pub fn start() -> Log {
    let (filter, objection) = filter();
    // A second subscriber (in tests that hold several programs) is not an error.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| LogLine)
        .with_ansi(false)
        .log_internal_errors(false)
        .try_init();
    if let Some(objection) = objection {
        tracing::warn!("{objection}");
    }
    std::panic::set_hook(Box::new(|panic| {
        last_words(&panic_words(panic));
        drop(Log(()));
        std::process::abort();
    }));
    raise_open_files();
    ignore_file_size_signal();
    keep_memory();
    Log(())
}

/// What `EVOLUTE_LOG` lets through, and what is to be said about it. Parsed piece by piece: the library's own parser of the
/// whole says what it has to say to stderr by itself, which waits for whoever reads there and ends the process where
/// nobody can write.
fn filter() -> (EnvFilter, Option<String>) {
    let unusable = |why: String| (EnvFilter::new("info,openraft=error"), Some(why));
    let text = match env::var("EVOLUTE_LOG") {
        Ok(text) => text,
        Err(env::VarError::NotPresent) => return (EnvFilter::new("info,openraft=error"), None),
        Err(error) => return unusable(format!("EVOLUTE_LOG is not used: {error}")),
    };
    let directives: Result<Vec<Directive>, _> =
        text.split(',').filter(|piece| !piece.is_empty()).map(str::parse).collect();
    let filter = match directives {
        Ok(none) if none.is_empty() => EnvFilter::new("error"),
        Ok(all) => all.into_iter().fold(EnvFilter::new("off"), EnvFilter::add_directive),
        Err(error) => return unusable(format!("EVOLUTE_LOG={text:?} is not used: {error}")),
    };
    let lacks = filter.max_level_hint().is_some_and(|level| level > STATIC_MAX_LEVEL);
    let objection =
        format!("EVOLUTE_LOG={text:?} asks for more than this program was built with: {STATIC_MAX_LEVEL}");
    (filter, lacks.then_some(objection))
}

/// While it lives, this process has a log.
#[derive(Debug)]
pub struct Log(());

impl Drop for Log {
    fn drop(&mut self) {
        if let Some(log) = LOG.get() {
            log.flush(LAST_WORDS_MAX);
        }
    }
}

fn log() -> &'static Outlet {
    LOG.get_or_init(|| {
        let made = rustix::io::fcntl_dupfd_cloexec(io::stderr().as_fd(), 3)
            .map_err(io::Error::from)
            .and_then(|stderr| Outlet::new(stderr, "log"));
        made.unwrap_or_else(|error| {
            // Without a thread or a descriptor nothing else could start either.
            let _ = writeln!(io::stderr(), "cannot start: no thread or descriptor for the log: {error}");
            std::process::exit(1)
        })
    })
}

/// One line of the log; the subscriber writes each as a whole.
struct LogLine;

impl Write for LogLine {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        log().say(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why this process ends, to stderr and behind everything logged before. Waits for nobody, fails for no reason: [`Log`]
/// gives it a moment.
pub fn last_words(text: &str) {
    log().say_last(format!("{text}\n").as_bytes());
}

fn panic_words(panic: &PanicHookInfo<'_>) -> String {
    let thread = std::thread::current();
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    let why = panic.payload_as_str().unwrap_or("no words");
    let mut words =
        format!("thread '{}' panicked at {place}:\n{why}", thread.name().unwrap_or("without a name"));
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        words.push_str(&format!("\n{backtrace}"));
    }
    words
}

/// To standard output. A reader that has had enough (`| head`) is no failure.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// A file that may not grow (`ulimit -f`) is an error of the write, and not the end of the process.
fn ignore_file_size_signal() {
    // SAFETY: it changes what one signal does, and no code of ours runs for it.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Freed memory that each heap of ours keeps, at most.
const KEPT_BYTES: i32 = 32 << 20;

/// glibc returns memory to the kernel as soon as 128 KiB at the end of a heap are free, and gets it back page by page for
/// the next request: a third of what the backend did for writes of 128 KiB.
fn keep_memory() {
    #[cfg(target_env = "gnu")]
    for option in [libc::M_TRIM_THRESHOLD, libc::M_MMAP_THRESHOLD] {
        // SAFETY: it only sets a number of the allocator's, under the allocator's own lock.
        unsafe { libc::mallopt(option, KEPT_BYTES) };
    }
}

/// Sockets, logs and chunk files of a busy process go past the usual soft limit of 1024.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    }
}

/// Reads a TOML configuration; unknown keys are errors, so a typing mistake is not silently a default.
///
/// The type should carry `#[serde(deny_unknown_fields)]`.
pub fn read_config<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("cannot read the configuration {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("the configuration {} is not valid", path.display()))
}

/// The wish to stop: SIGTERM, SIGINT, SIGQUIT (Ctrl-\\) or SIGHUP. There is nothing that could be read again while a
/// program runs, so a terminal that goes away ends it in good order; under `nohup` it goes on.
pub struct Stop {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
    hang_up: Option<Signal>,
}

impl Stop {
    /// From here on the signals are caught. Needs a tokio runtime.
    pub fn new() -> anyhow::Result<Self> {
        let hang_up = match is_ignored(libc::SIGHUP) {
            true => None,
            false => Some(signal(SignalKind::hangup()).context("cannot catch SIGHUP")?),
        };
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot catch SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot catch SIGINT")?,
            quit: signal(SignalKind::quit()).context("cannot catch SIGQUIT")?,
            hang_up,
        })
    }

    /// Waits for any of them. Cancel-safe.
    pub async fn requested(&mut self) {
        let hang_up = async {
            match &mut self.hang_up {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = self.quit.recv() => {}
            _ = hang_up => {}
        }
    }
}

/// Whoever started us wants this signal to do nothing.
fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: all of it are integers and a set of bits, for which zero is a value.
    let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is changed; the kernel writes to `now`, which lives and is ours.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut now) };
    asked == 0 && now.sa_sigaction == libc::SIG_IGN
}

/// Ends this process when the one that started it ends, however that one dies. For programs started by `evolute dev`
/// and by tests; call it in the child before `exec`.
///
/// Async-signal-safe, so it may run between `fork` and `exec`.
pub fn die_with_parent() -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    Ok(())
}

/// An error and its causes in one line.
pub fn in_one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::{read_config, write_ready_file};

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Settings {
        listen: String,
    }

    #[test]
    fn a_typing_mistake_in_a_configuration_is_named() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("x.toml");
        std::fs::write(&path, "lisen = '1'").expect("write");
        let error = format!("{:#}", read_config::<Settings>(&path).expect_err("unknown key"));
        assert!(error.contains("lisen") && error.contains("x.toml"), "{error}");
        std::fs::write(&path, "listen = 'a'").expect("write");
        assert_eq!(read_config::<Settings>(&path).expect("valid"), Settings { listen: "a".into() });
    }

    #[test]
    fn a_ready_file_is_whole() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("ready");
        write_ready_file(&path, &serde_json::json!({"pid": 1})).expect("written");
        assert_eq!(std::fs::read_to_string(&path).expect("there"), "{\"pid\":1}\n");
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1);
    }
}
