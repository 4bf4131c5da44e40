//! A guest of a few kilobytes under QEMU, told over its serial port what to ask of its disk: see `tiny/guest.c`.
//!
//! It is in memory in no time, so it can be paused, written to a file and read back as often as a test likes; and it does what
//! no operating system lets one do: it leaves a request unanswered for as long as that takes, and uses the buffer of another
//! one again at once.

use crate::accelerator::{Accelerator, qemu_version};
use crate::guest::Call;
use crate::process::Process;
use crate::qmp::Qmp;
use crate::scene::Scene;
use crate::wait::until;
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MEMORY_MIB: u32 = 64;
/// An answer of the guest's. Its disk may be away meanwhile, and an emulated CPU shares two with a cluster.
const ANSWERED_WITHIN: Duration = Duration::from_secs(60);
const SAVED_WITHIN: Duration = Duration::from_secs(60);

pub struct TinyGuest {
    qemu: Process,
    qmp: Qmp,
    line: BufReader<UnixStream>,
}

impl TinyGuest {
    /// Builds and boots it with this disk, and starts its driver.
    pub fn boot(scene: &Scene, disk: &Path) -> Result<TinyGuest> {
        let mut guest = TinyGuest::start(scene, disk, None)?;
        guest.answer().context("the tiny guest does not come up")?;
        guest.expect("init", &["init 0"])?;
        Ok(guest)
    }

    /// Reads one back that [`TinyGuest::save`] wrote, and lets it go on.
    pub fn restore(scene: &Scene, disk: &Path, saved: &Path) -> Result<TinyGuest> {
        let mut guest = TinyGuest::start(scene, disk, Some(saved))?;
        until("the guest to be read back", SAVED_WITHIN, || {
            let status = guest.qmp.run("query-status", json!({}))?;
            Ok((status["status"] != "inmigrate").then_some(()))
        })?;
        guest.qmp.run("cont", json!({}))?;
        Ok(guest)
    }

    fn start(scene: &Scene, disk: &Path, saved: Option<&Path>) -> Result<TinyGuest> {
        let name = scene.next_guest();
        let accelerator = Accelerator::choose(scene)?;
        let program = built(scene)?;
        let control = Call::expect(scene.folder().join(format!("{name}.qmp")))?;
        let line = Call::expect(scene.folder().join(format!("{name}.line")))?;
        let reconnect = if qemu_version()? >= (9, 2) { "reconnect-ms=1000" } else { "reconnect=1" };
        let mut arguments: Vec<String> = format!(
            "-nodefaults -no-user-config -display none -M q35,memory-backend=mem -cpu max -accel {} -m {MEMORY_MIB} \
             -object memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on -kernel {} \
             -chardev socket,id=line,path={} -serial chardev:line \
             -chardev socket,id=qmp,path={} -mon chardev=qmp,mode=control \
             -chardev socket,id=disk,path={},{reconnect} -device vhost-user-blk-pci,chardev=disk,num-queues=1",
            accelerator.as_str(),
            program.display(),
            line.path().display(),
            control.path().display(),
            disk.display(),
        )
        .split(' ')
        .map(str::to_string)
        .collect();
        if let Some(saved) = saved {
            arguments.extend(["-incoming".to_string(), format!("exec:cat {}", saved.display())]);
        }
        let mut qemu = Process::new(scene, &name, "qemu-system-x86_64", arguments);
        qemu.start()?;
        let qmp = Qmp::new(control.answer(&mut qemu)?)?;
        let line = line.answer(&mut qemu)?;
        line.set_read_timeout(Some(ANSWERED_WITHIN))?;
        Ok(TinyGuest { qemu, qmp, line: BufReader::new(line) })
    }

    /// Gives it a command and does not wait.
    pub fn tell(&mut self, command: &str) -> Result<()> {
        Ok(writeln!(self.line.get_mut(), "{command}")?)
    }

    /// Everything up to its next "ok".
    pub fn answer(&mut self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            let got = self.line.read_line(&mut line);
            let got = got.with_context(|| format!("the guest said no more than {lines:?}"))?;
            let line = line.trim().to_string();
            match line.as_str() {
                "ok" => return Ok(lines),
                _ if got == 0 => bail!("QEMU closed the guest's line after {lines:?}"),
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
        self.qmp.run("stop", json!({})).map(|_| ())
    }

    pub fn go_on(&mut self) -> Result<()> {
        self.qmp.run("cont", json!({})).map(|_| ())
    }

    /// Writes the stopped guest to a file and ends it, as a host that is to be rebooted does.
    pub fn save(mut self, to: &Path) -> Result<()> {
        self.qmp.run("migrate", json!({ "uri": format!("exec:cat >{}", to.display()) }))?;
        until("the guest to be written to a file", SAVED_WITHIN, || {
            let status = self.qmp.run("query-migrate", json!({}))?;
            match status["status"].as_str() {
                Some("completed") => Ok(Some(())),
                Some("failed" | "cancelled") => bail!("it was not: {status}"),
                _ => Ok(None),
            }
        })?;
        self.qemu.kill9()
    }

    /// The plug is pulled.
    pub fn end(mut self) -> Result<()> {
        self.qemu.kill9()
    }
}

/// Made from its sources, by the C compiler that building our programs needs as well.
fn built(scene: &Scene) -> Result<PathBuf> {
    let program = scene.folder().join("tiny");
    if program.exists() {
        return Ok(program);
    }
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny");
    // Our linker script is for the linker that comes with the compiler, whichever links Rust's programs.
    let flags = "-m64 -O2 -ffreestanding -fno-pic -no-pie -mno-red-zone -mgeneral-regs-only -fno-stack-protector \
                 -fcf-protection=none -fno-strict-aliasing -nostdlib -static -fuse-ld=bfd -Wl,-T,guest.ld \
                 -Wl,--build-id=none entry.S guest.c -o";
    let answer = Command::new("cc")
        .args(flags.split_whitespace())
        .arg(&program)
        .current_dir(sources)
        .output()
        .context("no C compiler: sudo apt-get install --no-install-recommends build-essential")?;
    let errors = String::from_utf8_lossy(&answer.stderr);
    ensure!(answer.status.success(), "the tiny guest cannot be built: {errors}");
    Ok(program)
}
