//! The systems that are measured: each is started, serves one vhost-user-blk socket, and is stopped.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use evolute_daemon::die_with_parent;
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;

use super::cpu::Watched;

const START_MAX: Duration = Duration::from_secs(90);
const STOP_MAX: Duration = Duration::from_secs(40);
const POLL: Duration = Duration::from_millis(20);
pub const BACKEND: &str = "backend";
pub const CHUNKSERVER: &str = "chunkserver";
pub const MDS: &str = "mds";

#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    #[error("{program} is not installed: {why}")]
    Missing { program: String, why: &'static str },
    #[error("{name} did not start: {what}; its last words:\n{log}")]
    Start { name: &'static str, what: String, log: String },
    #[error("{doing}: {source}")]
    Io { doing: String, source: io::Error },
    #[error("interrupted")]
    Interrupted,
}

fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> SystemError {
    let doing = doing.into();
    move |source| SystemError::Io { doing, source }
}

/// What a cluster of ours is started with.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Bytes of each volume.
    pub volumes: Vec<u64>,
    /// Copysets at least; 0: as few as there are chunkservers for.
    pub copysets: u32,
    /// One backend process serves all volumes, and not one each.
    pub one_backend: bool,
    /// How often a process that dies is started again.
    pub restarts: u32,
}

impl Wanted {
    pub fn volume(bytes: u64) -> Self {
        Self { volumes: vec![bytes], copysets: 0, one_backend: false, restarts: 0 }
    }
}

/// A running system. Dropped, it is killed; [`System::stop`] stops it as its operator would.
#[derive(Debug)]
pub struct System {
    /// As in the JSON lines: `evolute`, `qsd`.
    pub name: &'static str,
    /// One for each volume.
    pub sockets: Vec<PathBuf>,
    /// Of Evolute: `backend` for each volume or for all, `chunkserver-1` to `-3`, `mds`.
    pub processes: Vec<Watched>,
    /// Where Evolute's control plane answers.
    pub mds: String,
    /// Where the ready files of Evolute's processes are.
    pub run_dir: PathBuf,
    /// What a reader of its numbers must know.
    pub note: Option<String>,
    child: Child,
}

impl System {
    /// A cluster of three chunkservers by `evolute dev`; sockets and logs under `dir`, data under `data`.
    pub fn evolute(
        bin_dir: &Path,
        dir: &Path,
        data: &Path,
        wanted: &Wanted,
        stop: &AtomicBool,
    ) -> Result<Self, SystemError> {
        let (ready_file, log) = (dir.join("ready.json"), dir.join("evolute.log"));
        let mut command = Command::new(bin_dir.join("evolute"));
        command.arg("dev").arg("--dir").arg(dir.join("cluster")).arg("--data-on").arg(data);
        command.args(["--mds-port", "0", "--restarts", &wanted.restarts.to_string(), "--json"]);
        if wanted.copysets > 0 {
            command.args(["--copysets", &wanted.copysets.to_string()]);
        }
        if wanted.one_backend {
            command.arg("--one-backend");
        }
        for (i, bytes) in wanted.volumes.iter().enumerate() {
            command.args(["--volume", &format!("bench-{i}:{bytes}")]);
        }
        command.arg("--ready-file").arg(&ready_file);
        let child = spawn(command, &log, "build the programs first: make build")?;
        let mut system = Self::starting("evolute", child);
        system.wait_until(stop, &log, || ready_file.exists())?;
        let text = fs::read(&ready_file).map_err(io_error("reading evolute's ready file"))?;
        let running: Running = serde_json::from_slice(&text).map_err(|e| SystemError::Start {
            name: "evolute",
            what: e.to_string(),
            log: last_lines(&log),
        })?;
        let watched = |p: Process| Watched { name: p.name, pid: p.pid };
        for volume in running.volumes {
            system.sockets.push(volume.socket);
            if system.processes.last().is_none_or(|process| process.pid != volume.pid) {
                system.processes.push(Watched { name: BACKEND.to_owned(), pid: volume.pid });
            }
        }
        system.processes.extend(running.chunkservers.into_iter().map(watched));
        system.run_dir = dir.join("cluster/run");
        system.mds = running.mds.address.clone().unwrap_or_default();
        system.processes.push(watched(running.mds));
        Ok(system)
    }

    /// One local raw file, one copy, by qemu-storage-daemon. Its writes are durable only after a FLUSH.
    pub fn qsd(dir: &Path, data: &Path, size: u64, stop: &AtomicBool) -> Result<Self, SystemError> {
        let (image, log, socket) = (data.join("qsd.raw"), dir.join("qsd.log"), dir.join("qsd.sock"));
        File::create(&image)
            .and_then(|file| file.set_len(size))
            .map_err(io_error(format!("making {}", image.display())))?;
        // The best this machine can do; tmpfs takes O_DIRECT from Linux 6.6 on, and io_uring may be switched off.
        let modes = [("on", "io_uring"), ("on", "threads"), ("off", "threads")];
        let mut failure = None;
        for (direct, aio) in modes {
            let mut command = Command::new("qemu-storage-daemon");
            command.args(["--object", "iothread,id=io0,poll-max-ns=32768", "--blockdev"]);
            command.arg(format!(
                "driver=file,node-name=f,filename={},cache.direct={direct},aio={aio}",
                image.display()
            ));
            command.arg("--export").arg(format!(
                "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on,num-queues=1,iothread=io0",
                socket.display()
            ));
            let child = spawn(command, &log, "make deps installs it (qemu-system-x86)")?;
            let pid = child.id();
            let mut system = Self::starting("qsd", child);
            system.sockets.push(socket.clone());
            system.processes.push(Watched { name: "qsd".to_owned(), pid });
            if (direct, aio) != modes[0] {
                system.note = Some(format!("qsd runs with cache.direct={direct},aio={aio}"));
            }
            match system.wait_until(stop, &log, || socket.exists()) {
                Ok(()) => return Ok(system),
                Err(SystemError::Interrupted) => return Err(SystemError::Interrupted),
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or(SystemError::Interrupted))
    }

    fn starting(name: &'static str, child: Child) -> Self {
        Self {
            name,
            sockets: Vec::new(),
            processes: Vec::new(),
            mds: String::new(),
            run_dir: PathBuf::new(),
            note: None,
            child,
        }
    }

    /// The processes of one kind: `backend`, `chunkserver`, `mds`.
    pub fn of_kind<'s>(&'s self, kind: &'s str) -> impl Iterator<Item = &'s Watched> {
        self.processes.iter().filter(move |process| process.name.starts_with(kind))
    }

    fn wait_until(
        &mut self,
        stop: &AtomicBool,
        log: &Path,
        mut is_ready: impl FnMut() -> bool,
    ) -> Result<(), SystemError> {
        let deadline = Instant::now() + START_MAX;
        loop {
            if is_ready() {
                return Ok(());
            }
            let failed = |what: String| SystemError::Start { name: self.name, what, log: last_lines(log) };
            if let Some(status) = self.child.try_wait().map_err(io_error("watching it"))? {
                return Err(failed(status.to_string()));
            }
            if Instant::now() >= deadline {
                return Err(failed(format!("not ready within {} s", START_MAX.as_secs())));
            }
            if stop.load(Ordering::Relaxed) {
                return Err(SystemError::Interrupted);
            }
            sleep(POLL);
        }
    }

    /// SIGTERM, and SIGKILL when that does not help. True if it ended cleanly by itself.
    pub fn stop(mut self) -> bool {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // The child was not waited for yet, so the id is still its own.
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + STOP_MAX;
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(Some(status)) => return status.success(),
                Ok(None) => sleep(POLL),
                Err(_) => return false,
            }
        }
        false
    }
}

impl Drop for System {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(mut command: Command, log: &Path, why: &'static str) -> Result<Child, SystemError> {
    let out = File::create(log).map_err(io_error(format!("making {}", log.display())))?;
    let err = out.try_clone().map_err(io_error(format!("opening {}", log.display())))?;
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
    // SAFETY: one system call between fork and exec, and no allocation.
    unsafe { command.pre_exec(die_with_parent) };
    command.spawn().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => SystemError::Missing { program, why },
        _ => SystemError::Io { doing: format!("starting {program}"), source },
    })
}

fn last_lines(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].iter().map(|line| format!("    {line}\n")).collect()
}

/// The parts of `evolute dev`'s ready file that matter here; its shape is in docs/cli.md.
#[derive(Debug, Deserialize)]
struct Running {
    mds: Process,
    chunkservers: Vec<Process>,
    volumes: Vec<Volume>,
}

#[derive(Debug, Deserialize)]
struct Process {
    name: String,
    pid: u32,
    #[serde(default)]
    address: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Volume {
    socket: PathBuf,
    pid: u32,
}
