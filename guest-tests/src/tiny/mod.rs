//! A guest of a few kilobytes under QEMU or cloud-hypervisor, told over its serial port what to ask of its disks: see
//! `tiny/guest.c`.
//!
//! It is in memory in no time, so it can be paused, written to a file, moved and read back as often as a test likes; and it does
//! what no operating system lets one do: it leaves a request unanswered for as long as that takes, and uses the buffer of
//! another one again at once.

mod cloud_hypervisor;
mod http;
mod qemu;

use crate::scene::Scene;
use crate::wait::until;
use anyhow::{Context, Result, bail, ensure};
use cloud_hypervisor::CloudHypervisor;
use qemu::Qemu;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MEMORY_MIB: u32 = 64;
/// An answer of the guest's. Its disk may be away meanwhile, and an emulated CPU shares two with a cluster.
const ANSWERED_WITHIN: Duration = Duration::from_secs(60);
/// To be written to a file, read back or moved.
const MOVED_WITHIN: Duration = Duration::from_secs(60);

/// What a guest runs under.
#[derive(Clone, Debug)]
pub enum Under {
    Qemu,
    /// The program, which is nowhere to be had as a package.
    CloudHypervisor(PathBuf),
}

impl Under {
    /// `CLOUD_HYPERVISOR` says where it is.
    pub fn cloud_hypervisor() -> Option<Under> {
        std::env::var_os("CLOUD_HYPERVISOR").map(|program| Under::CloudHypervisor(program.into()))
    }

    fn start(&self, scene: &Scene, begin: Begin<'_>) -> Result<TinyGuest> {
        let vmm: Box<dyn Vmm> = match self {
            Under::Qemu => Box::new(Qemu::start(scene, begin)?),
            Under::CloudHypervisor(program) => Box::new(CloudHypervisor::start(scene, program, begin)?),
        };
        let mut guest = TinyGuest { under: self.clone(), vmm, line: None };
        guest.connect()?;
        Ok(guest)
    }
}

/// How a VMM begins with its guest.
#[derive(Clone, Copy)]
enum Begin<'a> {
    /// With this disk.
    Boot(&'a Path),
    /// From what [`Vmm::save`] wrote.
    Restore { disk: &'a Path, saved: &'a Path },
    /// From what another one sends to this socket.
    Receive { disk: &'a Path, at: &'a Path },
}

/// How a guest's memory gets to another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// As it would to another host: while the guest runs, then what has changed since, also by the disk's backend.
    Copied,
    /// The same memory, given as a descriptor. Only cloud-hypervisor can.
    Given,
}

/// What both can do.
trait Vmm {
    /// The guest's first serial port, of which there is a new one after each start of the guest if it says so.
    fn line(&mut self) -> Result<Option<UnixStream>>;
    fn stop(&mut self) -> Result<()>;
    fn go_on(&mut self) -> Result<()>;
    fn reboot(&mut self) -> Result<()>;
    fn plug(&mut self, disk: &Path) -> Result<()>;
    /// Asks the guest for it. Only [`Vmm::has_plugged`] tells whether it gave it.
    fn unplug(&mut self) -> Result<()>;
    fn has_plugged(&mut self) -> Result<bool>;
    fn save(&mut self, to: &Path) -> Result<()>;
    /// Gives the guest, which runs, to another one. Returns before that is done.
    fn send(&mut self, to: &Path, memory: Memory) -> Result<()>;
    /// It has given, or cannot: an error says why.
    fn has_sent(&mut self) -> Result<bool>;
    /// It has what it receives, and runs it.
    fn has_received(&mut self) -> Result<bool>;
    /// The plug is pulled.
    fn end(&mut self) -> Result<()>;
}

pub struct TinyGuest {
    under: Under,
    vmm: Box<dyn Vmm>,
    line: Option<BufReader<UnixStream>>,
}

impl TinyGuest {
    /// Builds and boots it with this disk, and starts its driver.
    pub fn boot(scene: &Scene, under: &Under, disk: &Path) -> Result<TinyGuest> {
        let mut guest = under.start(scene, Begin::Boot(disk))?;
        guest.is_up()?;
        Ok(guest)
    }

    /// Reads one back that [`TinyGuest::save`] wrote, and lets it go on.
    pub fn restore(scene: &Scene, under: &Under, disk: &Path, saved: &Path) -> Result<TinyGuest> {
        under.start(scene, Begin::Restore { disk, saved })
    }

    fn is_up(&mut self) -> Result<()> {
        self.answer().context("the tiny guest does not come up")?;
        self.expect("init 0", &["init 0"])
    }

    fn connect(&mut self) -> Result<()> {
        if let Some(line) = self.vmm.line()? {
            line.set_read_timeout(Some(ANSWERED_WITHIN))?;
            self.line = Some(BufReader::new(line));
        }
        Ok(())
    }

    fn line(&mut self) -> Result<&mut BufReader<UnixStream>> {
        self.line.as_mut().context("the guest has no serial port")
    }

    /// Gives it a command and does not wait.
    pub fn tell(&mut self, command: &str) -> Result<()> {
        // In one piece: cloud-hypervisor makes a line end that comes alone another character.
        Ok(self.line()?.get_mut().write_all(format!("{command}\n").as_bytes())?)
    }

    /// Everything up to its next "ok".
    pub fn answer(&mut self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            let got = self.line()?.read_line(&mut line);
            let got = got.with_context(|| format!("the guest said no more than {lines:?}"))?;
            let line = line.trim().to_string();
            match line.as_str() {
                "ok" => return Ok(lines),
                _ if got == 0 => bail!("the guest's line ends after {lines:?}"),
                _ => lines.push(line),
            }
        }
    }

    /// Waits for an answer, which is this.
    pub fn expect_answer(&mut self, expected: &[&str]) -> Result<()> {
        let answer = self.answer()?;
        ensure!(answer == expected, "the guest says {answer:?} instead of {expected:?}");
        Ok(())
    }

    pub fn expect(&mut self, command: &str, expected: &[&str]) -> Result<()> {
        self.tell(command)?;
        self.expect_answer(expected).with_context(|| format!("told to {command:?}"))
    }

    pub fn stop(&mut self) -> Result<()> {
        self.vmm.stop()
    }

    pub fn go_on(&mut self) -> Result<()> {
        self.vmm.go_on()
    }

    /// The VMM resets it, whatever it does, and it boots anew.
    pub fn reboot(&mut self) -> Result<()> {
        self.vmm.reboot()?;
        self.connect()?;
        self.is_up()
    }

    /// Adds a second disk while it runs.
    pub fn plug(&mut self, disk: &Path) -> Result<()> {
        self.vmm.plug(disk)
    }

    /// Takes the second disk out: the VMM asks, and the guest gives it.
    pub fn unplug(&mut self) -> Result<()> {
        self.vmm.unplug()?;
        self.expect("disk 1", &[])?;
        self.expect("eject", &[])?;
        self.expect("disk 0", &[])?;
        until("the disk to be taken out", ANSWERED_WITHIN, || Ok((!self.vmm.has_plugged()?).then_some(())))
    }

    /// Writes the stopped guest to a file or a folder and ends it, as a host that is to be rebooted does.
    pub fn save(mut self, to: &Path) -> Result<()> {
        self.vmm.save(to)?;
        self.vmm.end()
    }

    /// Moves it to another VMM of this host. `disk` is where that one finds its disk.
    pub fn migrate(mut self, scene: &Scene, disk: &Path, memory: Memory) -> Result<TinyGuest> {
        let at = scene.folder().join("migration.sock");
        if at.exists() {
            std::fs::remove_file(&at)?;
        }
        let mut there = self.under.start(scene, Begin::Receive { disk, at: &at })?;
        self.vmm.send(&at, memory)?;
        until("the guest to be sent", MOVED_WITHIN, || Ok(self.vmm.has_sent()?.then_some(())))?;
        until("the guest to arrive", MOVED_WITHIN, || Ok(there.vmm.has_received()?.then_some(())))?;
        there.connect()?;
        self.vmm.end()?;
        Ok(there)
    }

    /// The plug is pulled.
    pub fn end(mut self) -> Result<()> {
        self.vmm.end()
    }
}

/// Made from its sources, by the C compiler that building our programs needs as well.
fn built(scene: &Scene) -> Result<PathBuf> {
    // Our linker script is for the linker that comes with the compiler, whichever links Rust's programs.
    let flags = "-m64 -O2 -ffreestanding -fno-pic -no-pie -mno-red-zone -mgeneral-regs-only -fno-stack-protector \
                 -fcf-protection=none -fno-strict-aliasing -nostdlib -static -fuse-ld=bfd -Wl,-T,guest.ld \
                 -Wl,--build-id=none entry.S guest.c";
    compile(scene, "tiny", flags)
}

fn compile(scene: &Scene, name: &str, flags: &str) -> Result<PathBuf> {
    let program = scene.folder().join(name);
    if program.exists() {
        return Ok(program);
    }
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny");
    let answer = Command::new("cc")
        .args(flags.split_whitespace())
        .arg("-o")
        .arg(&program)
        .current_dir(sources)
        .output()
        .context("no C compiler: sudo apt-get install --no-install-recommends build-essential")?;
    let errors = String::from_utf8_lossy(&answer.stderr);
    ensure!(answer.status.success(), "{name} cannot be built: {errors}");
    Ok(program)
}
