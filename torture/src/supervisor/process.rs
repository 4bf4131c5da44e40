//! One process of the cluster: started with an operator's flags, in its own network, ended whatever happens.
//!
//! It is ended by the kernel when we are (the thread that starts processes is main, which lives as long as we do).

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Down,
    Running,
    /// SIGSTOP.
    Frozen,
    /// SIGTERM was sent.
    Stopping,
}

pub struct Process {
    pub name: String,
    program: PathBuf,
    arguments: Vec<OsString>,
    log: PathBuf,
    ready_file: PathBuf,
    network: Option<Arc<File>>,
    child: Option<Child>,
    state: State,
    pub starts: u32,
}

impl Process {
    /// Describes it. Logs and the ready file go to `folder`.
    pub fn new(
        name: &str,
        program: PathBuf,
        arguments: Vec<OsString>,
        folder: &std::path::Path,
        network: Option<Arc<File>>,
    ) -> Self {
        let ready_file = folder.join(format!("{name}.ready"));
        let mut all = arguments;
        all.extend(["--ready-file".into(), ready_file.clone().into()]);
        Self {
            name: name.to_owned(),
            program,
            arguments: all,
            log: folder.join(format!("{name}.log")),
            ready_file,
            network,
            child: None,
            state: State::Down,
            starts: 0,
        }
    }

    /// From the next start on it is started without this flag.
    pub fn forget(&mut self, argument: &str) {
        self.arguments.retain(|one| one != argument);
    }

    /// From the next start on this flag has another value.
    pub fn set(&mut self, flag: &str, value: &str) {
        if let Some(at) = self.arguments.iter().position(|one| one == flag) {
            self.arguments[at + 1] = value.into();
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// Starts it and does not wait: programs get ready when others are there.
    pub fn start(&mut self) -> Result<()> {
        if self.child.is_some() {
            return Ok(());
        }
        let _ = std::fs::remove_file(&self.ready_file);
        let mut log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        self.starts += 1;
        writeln!(log, "── start {} of {}", self.starts, self.name)?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        enter(&mut command, self.network.clone());
        let child = command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        self.child = Some(child);
        self.state = State::Running;
        Ok(())
    }

    pub fn is_ready(&self) -> bool {
        self.ready_file.exists()
    }

    pub fn wait_ready(&mut self, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        while !self.is_ready() {
            if let Some(status) = self.ended()? {
                bail!("{} ended while it got ready ({status}); see {}", self.name, self.log.display());
            }
            if Instant::now() >= deadline {
                bail!("{} is not ready after {within:?}; see {}", self.name, self.log.display());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().with_context(|| format!("{} is not running", self.name))?;
        kill_process(Pid::from_child(child), signal)
            .with_context(|| format!("cannot signal {}", self.name))?;
        match signal {
            Signal::STOP => self.state = State::Frozen,
            Signal::CONT => self.state = State::Running,
            Signal::TERM => self.state = State::Stopping,
            _ => {}
        }
        Ok(())
    }

    /// Its exit status, if it has ended since it was last asked.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else { return Ok(None) };
        let status = child.try_wait()?;
        if status.is_some() {
            self.child = None;
            self.state = State::Down;
        }
        Ok(status)
    }

    /// SIGKILL; it is gone when this returns.
    pub fn kill9(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        self.state = State::Down;
        Ok(())
    }

    /// SIGTERM and what it takes.
    pub fn stop(&mut self, within: Duration) -> Result<ExitStatus> {
        if self.state == State::Frozen {
            self.signal(Signal::CONT)?;
        }
        self.signal(Signal::TERM)?;
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} did not stop within {within:?}", self.name);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill9();
    }
}

/// Has the command run in this network namespace, and end when we do.
pub fn enter(command: &mut Command, network: Option<Arc<File>>) {
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if let Some(network) = &network {
            // SAFETY: a system call on an open descriptor; it changes this new process only.
            if unsafe { libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// Runs a tool to its end. Its words are in the error.
pub fn tool(program: &str, arguments: &[&str]) -> Result<String> {
    run(Command::new(program).args(arguments))
}

pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!(
            "{} {}: {}",
            command.get_program().display(),
            command.get_args().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
