//! The place of one test: the machine to itself, a folder for everything, and the evidence if it fails.

use anyhow::{Context, Result};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How much of each log a failing test prints. Enough for the last error and what led to it.
const TAIL_LINES: usize = 25;
/// How often lines that differ in their numbers alone are printed. Whoever retries every 100 ms would fill a tail.
const ALIKE: usize = 2;

/// Runs one test. Everything the closure started is ended when it returns; if it returns an error or panics, the
/// logs stay and their ends are printed.
///
/// One test at a time has the machine, across test programs: two emulated guests on two cores would make
/// each other's time limits meaningless.
#[track_caller]
pub fn story(test: impl FnOnce(&Scene) -> Result<()>) {
    let caller = std::panic::Location::caller();
    let name = Path::new(caller.file()).file_stem().map_or("test".into(), |stem| stem.to_string_lossy());
    if let Err(error) = demonstrate(&name, test) {
        panic!("{}:{}: {error:#}", caller.file(), caller.line());
    }
}

/// The same for a program that shows something and goes on to sum it up: the logs are shown on an error, which is
/// the caller's.
pub fn demonstrate<T>(name: &str, show: impl FnOnce(&Scene) -> Result<T>) -> Result<T> {
    let scene = Scene::new(name)?;
    let shown = show(&scene);
    if let Err(error) = &shown {
        // First why, then the logs, which are shown when the scene is dropped: for errors and panics alike.
        eprintln!("\n── {name} failed: {error:#}");
        scene.failed.set(true);
    }
    shown
}

/// What a test and its processes share: a folder, and which files in it are worth reading after a failure.
pub struct Scene {
    folder: PathBuf,
    logs: RefCell<Vec<PathBuf>>,
    guests: Cell<u32>,
    failed: Cell<bool>,
    started: Instant,
    /// Held until the test is over.
    _machine: File,
}

impl Scene {
    fn new(name: &str) -> Result<Scene> {
        let folder = tempfile::Builder::new().prefix(&format!("evolute-{name}-")).tempdir()?.keep();
        let machine = cache_folder()?.join("guest-tests.lock");
        let machine = OpenOptions::new().create(true).append(true).open(machine)?;
        rustix::fs::flock(&machine, rustix::fs::FlockOperation::LockExclusive)?;
        Ok(Scene {
            folder,
            logs: RefCell::new(Vec::new()),
            guests: Cell::new(0),
            failed: Cell::new(false),
            started: Instant::now(),
            _machine: machine,
        })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A file that is shown when the test fails.
    pub fn log(&self, name: &str) -> PathBuf {
        let path = self.folder.join(name);
        let mut logs = self.logs.borrow_mut();
        if !logs.contains(&path) {
            logs.push(path.clone());
        }
        path
    }

    /// Says what the test is doing, with the time since it began: the story as it happens.
    pub fn tell(&self, what: impl std::fmt::Display) {
        // Not `eprintln!`: the test harness swallows it until the end, and a person waits here for minutes.
        let line = format!("  {:6.1} s  {what}\n", self.started.elapsed().as_secs_f32());
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    /// A name for the next guest of this test.
    pub(crate) fn next_guest(&self) -> String {
        self.guests.set(self.guests.get() + 1);
        format!("guest{}", self.guests.get())
    }

    fn show_logs(&self) {
        for log in self.logs.borrow().iter() {
            let Ok(bytes) = std::fs::read(log) else { continue };
            let text = String::from_utf8_lossy(&bytes);
            eprintln!("\n── the end of {} ({} lines)", log.display(), text.lines().count());
            let (tail, left_out) = tail(&text);
            for line in tail {
                eprintln!("   {line}");
            }
            if left_out > 0 {
                eprintln!("   ({left_out} lines like these left out)");
            }
        }
        eprintln!("\n── everything this test left is in {}\n", self.folder.display());
    }
}

/// The last lines worth reading, and how many were left out between them for being like others.
fn tail(text: &str) -> (Vec<&str>, usize) {
    let mut alike: HashMap<String, usize> = HashMap::new();
    let (mut lines, mut left_out) = (Vec::new(), 0);
    for line in text.lines().rev().map(str::trim_end) {
        let seen = alike.entry(line.replace(|digit: char| digit.is_ascii_hexdigit(), "")).or_default();
        *seen += 1;
        if *seen > ALIKE {
            left_out += 1;
            continue;
        }
        lines.push(line);
        if lines.len() == TAIL_LINES {
            break;
        }
    }
    lines.reverse();
    (lines, left_out)
}

impl Drop for Scene {
    fn drop(&mut self) {
        if self.failed.get() || std::thread::panicking() {
            self.show_logs();
        } else if std::env::var_os("EVOLUTE_KEEP").is_some() {
            eprintln!("kept: {}", self.folder.display());
        } else if let Err(error) = std::fs::remove_dir_all(&self.folder) {
            eprintln!("could not remove {}: {error}", self.folder.display());
        }
    }
}

/// Where results outlive a test: `$EVOLUTE_CACHE`, or `~/.cache/evolute`, as in `images/`.
pub(crate) fn cache_folder() -> Result<PathBuf> {
    let folder = match std::env::var_os("EVOLUTE_CACHE") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME").context("neither EVOLUTE_CACHE nor HOME is set")?)
            .join(".cache/evolute"),
    };
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_not_filled_by_one_retry() {
        let mut log = "INFO serving\nERROR the cause\n".to_string();
        for attempt in 0..1000 {
            log += &format!("16:27:{:02} WARN cannot reach 127.0.0.1:{attempt}\n", attempt % 60);
        }
        let (lines, left_out) = tail(&log);
        assert_eq!(lines[..2], ["INFO serving", "ERROR the cause"]);
        assert_eq!((lines.len(), left_out), (2 + ALIKE, 1000 - ALIKE));
    }
}
