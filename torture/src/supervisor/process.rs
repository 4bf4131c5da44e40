//! One process of the cluster: started with an operator's flags, in its own network, ended whatever happens.
//!
//! It is ended by the kernel when we are (the thread that starts processes is main, which lives as long as we do).

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};

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
    /// What it says and nobody reads, just now.
    unread: Option<OwnedFd>,
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
            unread: None,
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
        let log = self.log()?;
        self.start_saying(log.into(), &[])
    }

    /// What it says goes into a pipe that is full already, until [`Process::read_on`]; and it says all there is to say.
    pub fn start_unread(&mut self) -> Result<()> {
        let (reader, writer) = full_pipe()?;
        self.unread = Some(reader);
        self.start_saying(writer, &[("EVOLUTE_LOG", "trace")])
    }

    /// Whoever reads what it says goes on, into the log.
    pub fn read_on(&mut self) -> Result<()> {
        let Some(reader) = self.unread.take() else { return Ok(()) };
        let (mut reader, mut log) = (File::from(reader), self.log()?);
        std::thread::Builder::new()
            .name("log-reader".into())
            .spawn(move || io::copy(&mut reader, &mut log))?;
        Ok(())
    }

    fn log(&self) -> io::Result<File> {
        OpenOptions::new().create(true).append(true).open(&self.log)
    }

    fn start_saying(&mut self, stderr: OwnedFd, settings: &[(&str, &str)]) -> Result<()> {
        if self.child.is_some() {
            return Ok(());
        }
        let _ = std::fs::remove_file(&self.ready_file);
        let mut log = self.log()?;
        self.starts += 1;
        writeln!(log, "── start {} of {}", self.starts, self.name)?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).envs(settings.iter().copied());
        command.stdin(Stdio::null()).stdout(log).stderr(stderr);
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

    /// Of its threads those that wait in this function of the kernel, by name.
    pub fn waits_in(&self, function: &str) -> Result<Vec<String>> {
        let Some(child) = &self.child else { return Ok(Vec::new()) };
        let mut waiting = Vec::new();
        for thread in std::fs::read_dir(format!("/proc/{}/task", child.id()))?.flatten() {
            let read = |name: &str| std::fs::read_to_string(thread.path().join(name)).unwrap_or_default();
            if read("wchan").contains(function) {
                waiting.push(read("comm").trim().to_owned());
            }
        }
        Ok(waiting)
    }

    /// From now on it may open so many files and no more. Gives the lowest number that it cannot have.
    pub fn leave_descriptors(&mut self, left: u64) -> Result<u64> {
        let child = self.child.as_ref().with_context(|| format!("{} is not running", self.name))?;
        let mut open = BTreeSet::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fd", child.id()))?.flatten() {
            open.extend(entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        let first = (0..).filter(|number| !open.contains(number)).nth(usize::try_from(left)?);
        let first = first.context("there are more numbers than files")?;
        self.limit_descriptors(Some(first))?;
        Ok(first)
    }

    pub fn give_descriptors_back(&mut self) -> Result<()> {
        self.limit_descriptors(None)
    }

    /// The soft limit; none: as high as the hard one, which stays.
    fn limit_descriptors(&self, soft: Option<u64>) -> Result<()> {
        let Some(child) = &self.child else { return Ok(()) };
        let pid = Some(Pid::from_child(child));
        // Programs inherit ours, and raise the soft one to it by themselves.
        let maximum = getrlimit(Resource::Nofile).maximum;
        prlimit(pid, Resource::Nofile, Rlimit { current: soft.or(maximum), maximum })?;
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

/// A pipe as small as there are, with no room for one more byte, and its two ends: for reading, for writing.
fn full_pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::pipe::fcntl_setpipe_size(&writer, 4096)?;
    // Opened once more, so that only we do not wait: who inherits the other one must.
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let mut filler = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    loop {
        match filler.write(b"\n") {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok((reader, writer)),
            Err(error) => return Err(error.into()),
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::{Duration, Instant};

    use super::{Process, State};

    fn shell(folder: &std::path::Path, script: &str) -> Process {
        Process::new("shell", PathBuf::from("/bin/sh"), vec!["-c".into(), script.into()], folder, None)
    }

    fn until(what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !holds() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn who_waits_for_a_log_that_nobody_reads_is_seen_and_goes_on_when_it_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut process = shell(folder.path(), "echo said >&2; exec sleep 1000");
        process.start_unread().expect("started");
        until("it waits", || process.waits_in("pipe_write").expect("seen") == ["sh"]);
        process.read_on().expect("read");
        until("it goes on", || process.waits_in("pipe_write").expect("seen").is_empty());
        until("it is read", || {
            std::fs::read_to_string(folder.path().join("shell.log")).is_ok_and(|log| log.contains("said"))
        });
        process.kill9().expect("killed");
        assert_eq!(process.state(), State::Down);
    }

    #[test]
    fn descriptors_are_gone_and_come_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let (asks, opens) = (folder.path().join("asks"), folder.path().join("opens"));
        // In a shell that has no such file open a redirection needs one more number than there are.
        let script = format!(
            "while true; do if (exec 3<&0 4<&0 5<&0 6<&0 7<&0 8<&0) 2>/dev/null; then touch {0}; rm -f {1}; else touch {1}; rm -f {0}; fi; done",
            opens.display(),
            asks.display()
        );
        let mut process = shell(folder.path(), &script);
        process.start().expect("started");
        until("it opens files", || opens.exists());
        assert!(process.leave_descriptors(2).expect("limited") < 20);
        until("it cannot", || asks.exists() && !opens.exists());
        process.give_descriptors_back().expect("given back");
        until("it can again", || opens.exists() && !asks.exists());
        process.kill9().expect("killed");
    }
}
