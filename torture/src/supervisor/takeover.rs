//! A backend that hangs, and the one that takes its volume.
//!
//! ```text
//!  SIGSTOP the first ─▶ start a second, --takeover ─▶ attached: the load goes there ─▶ SIGCONT the first: a zombie,
//!                                                                                     with requests in its hands
//! ```
//!
//! What the first had under way counts as done or never to be from the moment the second had attached; so whatever it
//! still changes is a violation of the register. It must end by itself, with the status of one that lost its volume.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::process::{Process, State};

/// `evolute-vhost` whose volume was taken over.
const TAKEN_OVER: i32 = 3;
/// To hear that it lost its volume, with the control plane or chunkservers away meanwhile.
const ENDS_WITHIN: Duration = Duration::from_secs(60);
const TAKEOVER: &str = "--takeover";

/// All there is to know to start one more backend.
pub struct Backends {
    pub program: PathBuf,
    pub folder: PathBuf,
    pub volume: &'static str,
    pub mds: String,
    pub network: Arc<File>,
    made: u32,
    /// On its way, and where it will listen.
    successor: Option<(Process, PathBuf)>,
    /// Stopped and replaced.
    frozen: Option<Process>,
    zombies: Vec<(Process, Instant)>,
}

impl Backends {
    pub fn new(
        program: PathBuf,
        folder: PathBuf,
        volume: &'static str,
        mds: String,
        network: Arc<File>,
    ) -> Self {
        let (successor, frozen, zombies) = (None, None, Vec::new());
        Self { program, folder, volume, mds, network, made: 0, successor, frozen, zombies }
    }

    /// Another one, and its socket.
    pub fn make(&mut self, more: &[&str]) -> (Process, PathBuf) {
        self.made += 1;
        let name = if self.made == 1 { "backend".to_owned() } else { format!("backend{}", self.made) };
        let socket = self.folder.join(format!("{name}.sock"));
        let words = format!(
            "--socket-path {} --volume {} --mds {} --queues 4 --state-dir {}",
            socket.display(),
            self.volume,
            self.mds,
            self.folder.join(&name).display()
        );
        let words = words.split_whitespace().chain(more.iter().copied());
        let arguments: Vec<OsString> = words.map(OsString::from).collect();
        let network = Some(self.network.clone());
        (Process::new(&name, self.program.clone(), arguments, &self.folder, network), socket)
    }

    pub fn call_successor(&mut self) -> Result<()> {
        let (mut successor, socket) = self.make(&[TAKEOVER]);
        successor.start()?;
        self.successor = Some((successor, socket));
        Ok(())
    }

    /// It has the volume, and nobody else.
    pub fn has_succeeded(&self) -> Option<PathBuf> {
        self.successor.as_ref().filter(|(process, _)| process.is_ready()).map(|(_, socket)| socket.clone())
    }

    /// The successor is the backend from now on.
    pub fn replace(&mut self, backend: &mut Process) -> Result<()> {
        let (mut successor, _) = self.successor.take().context("nobody was called")?;
        // Started again it is to go on with its own attachment, not to take one.
        successor.forget(TAKEOVER);
        self.frozen = Some(std::mem::replace(backend, successor));
        Ok(())
    }

    pub fn wake(&mut self) -> Result<()> {
        let mut zombie = self.frozen.take().context("nobody was replaced")?;
        zombie.signal(Signal::CONT)?;
        self.zombies.push((zombie, Instant::now() + ENDS_WITHIN));
        Ok(())
    }

    pub fn give_up(&mut self) {
        self.successor = None;
    }

    pub fn has_zombies(&self) -> bool {
        !self.zombies.is_empty()
    }

    /// Failures of those that ended in another way than they must, or did not.
    pub fn bury(&mut self) -> Result<Vec<String>> {
        let mut failures = Vec::new();
        let mut left = Vec::new();
        for (mut zombie, until) in self.zombies.drain(..) {
            match zombie.ended()? {
                Some(status) if status.code() == Some(TAKEN_OVER) => {}
                Some(status) => {
                    failures.push(format!("{}, whose volume was taken, ended with {status}", zombie.name));
                }
                None if Instant::now() < until => left.push((zombie, until)),
                None => {
                    assert_eq!(zombie.state(), State::Running, "it was woken");
                    zombie.kill9()?;
                    failures.push(format!("{} did not notice that its volume was taken", zombie.name));
                }
            }
        }
        self.zombies = left;
        Ok(failures)
    }
}
