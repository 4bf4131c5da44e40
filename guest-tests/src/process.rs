//! One process of a test: started with a log, known by its pid, ended whatever happens.
//!
//! It stays the same `Process` when it is started again, with the same flags: that is what an operator's systemd
//! does. It is ended when it is dropped, and by the kernel should the test itself be killed.

use crate::Scene;
use crate::wait::until;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// How long a program may take to say that it is ready. Recovery reads a log that tests keep small.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// How long a clean stop may take before it counts as a hang.
const STOP_WITHIN: Duration = Duration::from_secs(20);

pub struct Process {
    name: String,
    program: PathBuf,
    arguments: Vec<OsString>,
    log: PathBuf,
    ready_file: Option<PathBuf>,
    folder: Option<PathBuf>,
    variables: Vec<(&'static str, OsString)>,
    child: Option<Child>,
}

impl Process {
    /// Describes a process; [`Process::start`] starts it.
    pub fn new<A: Into<OsString>>(
        scene: &Scene,
        name: &str,
        program: impl Into<PathBuf>,
        arguments: impl IntoIterator<Item = A>,
    ) -> Process {
        Process {
            name: name.to_string(),
            program: program.into(),
            arguments: arguments.into_iter().map(Into::into).collect(),
            log: scene.log(&format!("{name}.log")),
            ready_file: None,
            folder: None,
            variables: Vec::new(),
            child: None,
        }
    }

    /// It says that it serves by writing a ready file, which `--ready-file` names.
    pub fn with_ready_file(mut self, scene: &Scene) -> Process {
        let path = scene.folder().join(format!("{}.ready", self.name));
        self.arguments.extend(["--ready-file".into(), path.clone().into()]);
        self.ready_file = Some(path);
        self
    }

    /// Where its relative paths are.
    pub fn in_folder(mut self, folder: &Path) -> Process {
        self.folder = Some(folder.to_owned());
        self
    }

    /// One more in its environment.
    pub fn with_variable(mut self, name: &'static str, value: impl Into<OsString>) -> Process {
        self.variables.push((name, value.into()));
        self
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts it, for the first time or again, and waits until it is ready if it can say so.
    pub fn start(&mut self) -> Result<()> {
        self.spawn()?;
        self.wait_ready()
    }

    /// Starts it without waiting: for programs that get ready only when others are there.
    pub fn spawn(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "{} is running already", self.name);
        if let Some(path) = &self.ready_file {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        let mut log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let words: Vec<_> = self.arguments.iter().map(|word| word.to_string_lossy()).collect();
        writeln!(log, "── {} {}", self.program.display(), words.join(" "))?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        die_with_the_test(&mut command);
        let child = command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    pub fn wait_ready(&mut self) -> Result<()> {
        let Some(path) = self.ready_file.clone() else { return Ok(()) };
        let what = format!("{} to get ready", self.name);
        until(&what, READY_WITHIN, || {
            if let Some(status) = self.ended()? {
                bail!("{} ended while it got ready: {status}", self.name);
            }
            Ok(path.exists().then_some(()))
        })
    }

    /// What it wrote into its ready file.
    pub fn ready(&self) -> Result<serde_json::Value> {
        let path = self.ready_file.as_deref().context("it was started without a ready file")?;
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))
    }

    pub fn pid(&self) -> Result<Pid> {
        let child = self.child.as_ref().with_context(|| format!("{} is not running", self.name))?;
        Ok(Pid::from_child(child))
    }

    /// Started, and neither stopped nor killed by the test since.
    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        rustix::process::kill_process(self.pid()?, signal)
            .with_context(|| format!("cannot signal {}", self.name))
    }

    /// Its exit status, once it has ended by itself.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        match &mut self.child {
            Some(child) => Ok(child.try_wait()?),
            None => bail!("{} is not running", self.name),
        }
    }

    /// Waits until it has ended by itself.
    pub fn wait_ended(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        let status = until(&what, deadline, || self.ended())?;
        self.child = None;
        Ok(status)
    }

    /// Asks it to stop, as systemd does, and holds it to a clean exit.
    pub fn stop(&mut self) -> Result<()> {
        self.signal(Signal::TERM)?;
        let status = self.wait_ended(STOP_WITHIN)?;
        ensure!(status.success(), "{} was asked to stop and ended with {status}", self.name);
        Ok(())
    }

    /// SIGKILL, and waits until the kernel has taken it away: its ports are free when this returns.
    pub fn kill9(&mut self) -> Result<()> {
        if let Some(status) = self.ended()? {
            bail!("{} was to be killed but had already ended: {status}", self.name);
        }
        let mut child = self.child.take().context("checked above")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    pub fn log_path(&self) -> &Path {
        &self.log
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended meanwhile, which is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The kernel ends the process when the thread that started it is gone, so that a killed test leaves nothing.
fn die_with_the_test(command: &mut Command) {
    // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?));
    }
}
