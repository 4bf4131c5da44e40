//! A file system on an image whose every write is logged, so that power can be cut; and whose disk can turn bad.
//!
//! ```text
//!  chunkserver ▶ XFS ▶ loop ▶ FUSE export of qemu-storage-daemon: throttle ▶ (blkdebug) ▶ blklogwrites ▶ disk.img
//!                                                                                              └▶ log.img
//! ```
//!
//! One write at a time goes through the FUSE export, see [`one_write_at_a_time`]. Nothing of the kernel's device mapper is needed. `base.img` is the disk as it was when the log began; a cut replays
//! the log over it ([`super::replay`]).

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::process::{enter, tool};
use super::replay::{self, Cut};
use crate::random::Random;

const PATIENCE: Duration = Duration::from_secs(30);
/// What a sick disk still does.
const SLOW_IOPS: u64 = 20;

pub struct Image {
    folder: PathBuf,
    daemon: Option<Daemon>,
    loop_device: Option<String>,
    is_mounted: bool,
    random: Random,
}

struct Daemon {
    child: Child,
    qmp: BufReader<UnixStream>,
}

impl Image {
    pub fn new(folder: &Path, bytes: u64, seed: u64) -> Result<Self> {
        for name in ["base.img", "disk.img"] {
            File::create(folder.join(name))?.set_len(bytes)?;
        }
        std::fs::create_dir_all(folder.join("mount"))?;
        let random = Random::new(seed ^ 0x70_6f77_6572);
        let mut image =
            Self { folder: folder.to_owned(), daemon: None, loop_device: None, is_mounted: false, random };
        image.attach()?;
        let device = image.loop_device.clone().context("just attached")?;
        tool("mkfs.xfs", &["-q", "-K", &device])?;
        image.mount()?;
        Ok(image)
    }

    pub fn data_dir(&self) -> PathBuf {
        self.mount_point().join("data")
    }

    fn mount_point(&self) -> PathBuf {
        self.folder.join("mount")
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// Nothing is written, synced or answered until it goes on.
    pub fn freeze(&self, freeze: bool) -> Result<()> {
        let daemon = self.daemon.as_ref().context("attached")?;
        let signal = if freeze { Signal::STOP } else { Signal::CONT };
        Ok(kill_process(Pid::from_child(&daemon.child), signal)?)
    }

    /// Writes that no flush has followed yet.
    pub fn unflushed(&self) -> Result<u64> {
        replay::unflushed(&File::open(self.folder.join("log.img"))?)
    }

    /// How much has been written by now; power is cut there.
    pub fn mark(&self) -> Result<u64> {
        replay::entries(&File::open(self.folder.join("log.img"))?)
    }

    /// Takes the disk away as power does, at the mark. The chunkserver is dead already.
    pub fn cut(&mut self, mark: u64) -> Result<Cut> {
        self.detach()?;
        let open = |name: &str| File::options().read(true).write(true).open(self.folder.join(name));
        let (log, base, disk) = (open("log.img")?, open("base.img")?, open("disk.img")?);
        replay::cut(&log, mark, &base, &disk, &mut self.random)
    }

    /// Brings the disk back; the file system replays its journal.
    pub fn power_on(&mut self) -> Result<()> {
        self.attach()?;
        self.mount()?;
        // A disk that was emptied shortly before is full again where that did not reach it, and nobody would empty it.
        match self.empty() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            emptied => Ok(emptied?),
        }
    }

    pub fn slow(&mut self, slow: bool) -> Result<()> {
        let limits = if slow { json!({"iops-total": SLOW_IOPS}) } else { json!({"iops-total": 0}) };
        self.qmp(json!({"execute": "qom-set", "arguments":
            {"path": "/objects/tg", "property": "limits", "value": limits}}))
    }

    /// From now on flushes fail with EIO.
    pub fn fail_flushes(&mut self) -> Result<()> {
        self.qmp(json!({"execute": "blockdev-add", "arguments": {
            "driver": "blkdebug", "node-name": "bad", "image": "lw",
            "inject-error": [{"event": "none", "iotype": "flush", "errno": 5}]}}))?;
        self.stack_on("bad")
    }

    /// A disk that works again, with what was flushed on it and perhaps some of the rest: whoever heard of a failed
    /// flush can count on no more. The chunkserver is dead already.
    pub fn recover_flushes(&mut self) -> Result<Cut> {
        let mark = self.mark()?;
        let cut = self.cut(mark)?;
        self.power_on()?;
        Ok(cut)
    }

    fn stack_on(&mut self, node: &str) -> Result<()> {
        self.qmp(json!({"execute": "blockdev-reopen", "arguments": {"options": [
            {"driver": "throttle", "node-name": "t", "throttle-group": "tg", "file": node}]}}))
    }

    /// Takes all room the file system has.
    pub fn fill(&self) -> Result<()> {
        let path = self.mount_point().join("ballast");
        let ballast = File::create(path)?;
        // Large pieces first; what is left after the last ones is less than a log record.
        for piece in [256_u64 << 20, 16 << 20, 1 << 20, 64 << 10, 4 << 10] {
            let mut end = ballast.metadata()?.len();
            let flags = rustix::fs::FallocateFlags::empty();
            while rustix::fs::fallocate(&ballast, flags, end, piece).is_ok() {
                end += piece;
            }
        }
        Ok(())
    }

    pub fn empty(&self) -> std::io::Result<()> {
        std::fs::remove_file(self.mount_point().join("ballast"))
    }

    fn attach(&mut self) -> Result<()> {
        let export = self.path("export");
        File::create(&export)?;
        // A new log: what it begins with is base.img.
        File::create(self.folder.join("log.img"))?;
        self.daemon = Some(Daemon::start(&self.folder)?);
        one_write_at_a_time(&self.folder.join("export"))?;
        let device = tool("losetup", &["--direct-io=on", "-f", "--show", &export])?;
        self.loop_device = Some(device.trim().to_owned());
        Ok(())
    }

    fn mount(&mut self) -> Result<()> {
        let device = self.loop_device.as_deref().context("attached")?;
        tool("mount", &["-t", "xfs", "-o", "noatime,nodiscard", device, &self.path("mount")])?;
        self.is_mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<()> {
        if !self.is_mounted {
            return Ok(());
        }
        let deadline = Instant::now() + PATIENCE;
        // A process that was just killed may hold its files a moment longer.
        while let Err(error) = tool("umount", &[&self.path("mount")]) {
            if Instant::now() >= deadline {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.is_mounted = false;
        Ok(())
    }

    fn detach(&mut self) -> Result<()> {
        self.unmount()?;
        if let Some(device) = self.loop_device.take() {
            tool("losetup", &["-d", &device])?;
        }
        if let Some(mut daemon) = self.daemon.take() {
            daemon.quit()?;
        }
        Ok(())
    }

    fn qmp(&mut self, command: Value) -> Result<()> {
        self.daemon.as_mut().context("attached")?.ask(&command)
    }
}

/// QEMU 7.2's FUSE export reads the next request into the buffer of a write that is still under way, so that two writes at
/// a time corrupt each other (seen here: an XFS superblock overwritten by an inode; mended upstream in 2025 by copying
/// the buffer). Shorter requests, reads and flushes, do not reach the data. So the kernel is told to keep one at a time.
fn one_write_at_a_time(export: &Path) -> Result<()> {
    const CONNECTIONS: &str = "/sys/fs/fuse/connections";
    let device = rustix::fs::stat(export)?.st_dev;
    let connection = Path::new(CONNECTIONS).join(rustix::fs::minor(device).to_string());
    if !connection.exists() {
        tool("mount", &["-t", "fusectl", "fusectl", CONNECTIONS])?;
    }
    for limit in ["max_background", "congestion_threshold"] {
        let path = connection.join(limit);
        std::fs::write(&path, "1").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

impl Drop for Image {
    fn drop(&mut self) {
        // Whoever waits for a disk that stands still waits for ever.
        let _ = self.freeze(false);
        if self.detach().is_err() {
            // In the order of what hangs on what; each is better gone than not.
            let _ = tool("umount", &["-l", &self.path("mount")]);
            if let Some(device) = &self.loop_device {
                let _ = tool("losetup", &["-d", device]);
            }
        }
    }
}

impl Daemon {
    fn start(folder: &Path) -> Result<Self> {
        let path = |name: &str| folder.join(name).display().to_string();
        let qmp = path("qmp");
        let _ = std::fs::remove_file(&qmp);
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(["--object", "throttle-group,id=tg"])
            .args(["--chardev", &format!("socket,id=q,path={qmp},server=on,wait=off")])
            .args(["--monitor", "chardev=q"])
            .args([
                "--blockdev",
                &format!("driver=file,node-name=f,filename={},locking=off", path("disk.img")),
            ])
            .args([
                "--blockdev",
                &format!("driver=file,node-name=l,filename={},locking=off", path("log.img")),
            ])
            .args(["--blockdev", "driver=blklogwrites,node-name=lw,file=f,log=l,log-super-update-interval=1"])
            .args(["--blockdev", "driver=throttle,node-name=t,file=lw,throttle-group=tg"])
            .args([
                "--export",
                &format!("type=fuse,id=e,node-name=t,mountpoint={},writable=on", path("export")),
            ])
            .stdin(Stdio::null());
        let log = File::options().create(true).append(true).open(folder.join("daemon.log"))?;
        command.stdout(log.try_clone()?).stderr(log);
        enter(&mut command, None);
        let mut child = command.spawn().context("cannot run qemu-storage-daemon (qemu-system-common)")?;
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(&qmp) {
                Ok(stream) => break stream,
                Err(error) if child.try_wait()?.is_some() || Instant::now() >= deadline => {
                    return Err(error).context("qemu-storage-daemon does not serve; see daemon.log");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut daemon = Self { child, qmp: BufReader::new(stream) };
        daemon.ask(&json!({"execute": "qmp_capabilities"}))?;
        Ok(daemon)
    }

    fn ask(&mut self, command: &Value) -> Result<()> {
        // In one piece: one that came in many was answered with a parse error, once in thousands.
        self.qmp.get_mut().write_all(format!("{command}\n").as_bytes())?;
        let mut line = String::new();
        loop {
            line.clear();
            ensure!(self.qmp.read_line(&mut line)? > 0, "qemu-storage-daemon closed its monitor");
            let answer: Value = serde_json::from_str(&line)?;
            if answer.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = answer.get("error") {
                bail!("qemu-storage-daemon refused {command}: {error}");
            }
        }
    }

    fn quit(&mut self) -> Result<()> {
        self.ask(&json!({"execute": "quit"}))?;
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "qemu-storage-daemon does not quit");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
