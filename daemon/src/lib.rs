//! How Evolute's programs start, tell that they are ready, and stop: the lines every `main.rs` would repeat; which of
//! their threads go first, and how they print a date.
//!
//! A program's `main` does, in this order: parse its arguments (clap), [`start`], [`read_config`] when a file was
//! named, open what it owns, serve, [`write_ready_file`], wait for [`Stop::requested`], close, return 0.
//!
//! It does not know what any of the programs is for.

mod calendar;
mod turns;

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

pub use calendar::utc;
pub use turns::{background, short_turns};

/// Sets up what every program has: traces to stderr (`EVOLUTE_LOG` filters them, default `info`), as many open files
/// as the system allows, an allocator that keeps what was freed, and the end of the process when any thread of it panics.
///
/// A panic is a broken invariant of ours: to go on with half a process would be worse than a restart.
pub fn start() {
    let filter =
        EnvFilter::try_from_env("EVOLUTE_LOG").unwrap_or_else(|_| EnvFilter::new("info,openraft=error"));
    // A second subscriber (in tests that hold several programs) is not an error.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init();
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
    raise_open_files();
    keep_memory();
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

/// Says to whoever started this program that it serves now: a JSON file that appears whole or not at all.
pub fn write_ready_file<T: Serialize>(path: &Path, content: &T) -> anyhow::Result<()> {
    let write = || -> std::io::Result<()> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}", std::process::id()));
        let unfinished = path.with_file_name(name);
        let mut file = fs::File::create(&unfinished)?;
        serde_json::to_writer(&mut file, content)?;
        file.write_all(b"\n")?;
        drop(file);
        fs::rename(&unfinished, path)
    };
    write().with_context(|| format!("cannot write the ready file {}", path.display()))
}

/// The wish to stop: SIGTERM or SIGINT.
pub struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    /// From here on the signals are caught. Needs a tokio runtime.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot catch SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot catch SIGINT")?,
        })
    }

    /// Waits for either signal. Cancel-safe.
    pub async fn requested(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
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
