//! A Linux under QEMU, as a test sees it: boot, run a command, read what the kernel said, switch off.
//!
//! Two serial ports: the first is the kernel's console and goes to a file, the second belongs to the agent. QEMU
//! connects to sockets we listen on, so not a byte is lost however early the guest speaks.
//!
//! The disks are vhost-user sockets with `reconnect`: QEMU holds the guest's requests while a backend is away and
//! hands them, with the in-flight region, to the next one that listens there.

use crate::Scene;
use crate::accelerator::{Accelerator, qemu_version};
use crate::agent::{Agent, Output};
use crate::images::Images;
use crate::process::Process;
use crate::qmp::Qmp;
use crate::wait::until;
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Boots take 3 s (tools) and 7 s (Debian) under TCG on an idle machine; tests share two busy cores with a cluster.
const UP_WITHIN: Duration = Duration::from_secs(120);
const RUN_WITHIN: Duration = Duration::from_secs(60);
const OFF_WITHIN: Duration = Duration::from_secs(60);

/// What the kernel says when a disk has failed somebody. Lower case.
const DISK_TROUBLE: [&str; 10] = [
    "i/o error",
    "ext4-fs error",
    "jbd2: error",
    "remounting filesystem read-only",
    "corrupt",
    "lost async page write",
    "critical target error",
    "critical medium error",
    "critical space allocation error",
    "shutting down filesystem",
];

/// How to switch a guest on. The same `Boot` can be used again: the disks are what remains.
#[derive(Clone, Debug)]
pub struct Boot {
    root: Option<&'static str>,
    disks: Vec<PathBuf>,
    cpus: u16,
    queues: u16,
    memory_mib: u32,
    /// Its disk is not ours.
    on_qemus_disk: bool,
}

impl Boot {
    /// Into our own initramfs, with fio and the mkfs tools at hand.
    pub fn tools() -> Boot {
        Boot { root: None, disks: Vec::new(), cpus: 2, queues: 2, memory_mib: 768, on_qemus_disk: false }
    }

    /// Into the operating system on the first disk.
    pub fn first_disk() -> Boot {
        Boot { root: Some("/dev/vda"), ..Boot::tools() }
    }

    /// Adds a disk: the vhost-user socket of its backend. They become vda, vdb, … in this order.
    pub fn disk(mut self, socket: impl Into<PathBuf>) -> Boot {
        self.disks.push(socket.into());
        self
    }

    /// Adds a disk that QEMU serves itself. A guest that does not come up on it has found no fault of ours, and is switched on
    /// once more.
    pub fn qemus_disk(self, socket: impl Into<PathBuf>) -> Boot {
        Boot { on_qemus_disk: true, ..self.disk(socket) }
    }

    pub fn queues(mut self, queues: u16) -> Boot {
        self.queues = queues;
        self
    }
}

pub struct Guest {
    qemu: Process,
    qmp: Qmp,
    agent: Agent,
    files: GuestFiles,
    kernel: String,
    backgrounds: u32,
}

/// A guest stood still before its kernel had looked at any disk.
#[derive(Debug)]
struct BeforeTheDisk;

impl std::fmt::Display for BeforeTheDisk {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("the guest's kernel stood still before it had a driver for its disk")
    }
}

/// What is left of a guest that says nothing.
struct GuestFiles {
    /// SeaBIOS's own log.
    firmware: PathBuf,
    /// The kernel's, from its first line.
    console: PathBuf,
    /// Where the virtual CPUs stood when the guest was given up: see [`Guest::note_processors`].
    processors: PathBuf,
}

/// A command that goes on in the guest while the test does other things.
#[must_use = "nobody will know how it ended"]
pub struct Background(u32);

impl Background {
    /// Its output is `/run/bgNUMBER.out` in the guest.
    pub(crate) fn number(&self) -> u32 {
        self.0
    }
}

impl Guest {
    pub fn boot(scene: &Scene, boot: &Boot) -> Result<Guest> {
        let accelerator = Accelerator::choose(scene)?;
        let mut started = Instant::now();
        let mut guest = Guest::boot_under(scene, boot, accelerator, UP_WITHIN);
        if let Err(error) = &guest
            && (boot.on_qemus_disk || error.is::<BeforeTheDisk>())
        {
            // An emulated machine that stands still here has not met a disk of ours, so it is not what a test of one may fail
            // by. Twice would be strange: in CI one said nothing for two minutes, once.
            scene.tell(format_args!("once more: {error:#}"));
            started = Instant::now();
            guest = Guest::boot_under(scene, boot, accelerator, UP_WITHIN);
        }
        let guest = guest?;
        scene.tell(format_args!(
            "a guest is up: Linux {} under {}, {:.1} s",
            guest.kernel,
            accelerator.as_str(),
            started.elapsed().as_secs_f32()
        ));
        Ok(guest)
    }

    pub(crate) fn boot_under(
        scene: &Scene,
        boot: &Boot,
        accelerator: Accelerator,
        deadline: Duration,
    ) -> Result<Guest> {
        let name = scene.next_guest();
        let images = Images::find()?;
        let files = GuestFiles {
            firmware: scene.log(&format!("{name}.firmware")),
            console: scene.log(&format!("{name}.console")),
            processors: scene.log(&format!("{name}.processors")),
        };
        let control = Call::expect(scene.folder().join(format!("{name}.qmp")))?;
        let line = Call::expect(scene.folder().join(format!("{name}.agent")))?;
        let arguments = qemu_arguments(boot, accelerator, images, &files, &control.path, &line.path)?;
        let mut qemu = Process::new(scene, &name, "qemu-system-x86_64", arguments);
        qemu.start()?;
        let control = control.answer(&mut qemu)?;
        let line = line.answer(&mut qemu)?;
        let transcript = scene.log(&format!("{name}.commands"));
        let transcript = OpenOptions::new().create(true).append(true).open(transcript)?;
        let mut guest = Guest {
            qemu,
            qmp: Qmp::new(control)?,
            agent: Agent::new(line, transcript)?,
            files,
            kernel: String::new(),
            backgrounds: 0,
        };
        guest.wait_up(deadline)?;
        Ok(guest)
    }

    /// Waits for the agent after power-on or a reboot.
    fn wait_up(&mut self, deadline: Duration) -> Result<()> {
        let (qemu, console) = (&mut self.qemu, &self.files.console);
        match self.agent.wait_ready(deadline, || alive(qemu, console)) {
            Ok(kernel) => {
                self.kernel = kernel;
                Ok(())
            }
            Err(error) => {
                self.note_processors()?;
                let console = std::fs::read(&self.files.console)?;
                let before = stands_before_the_disk(&String::from_utf8_lossy(&console));
                let is_alive = self.qemu.ended()?.is_none();
                Err(if is_alive && before { error.context(BeforeTheDisk) } else { error })
            }
        }
    }

    /// Writes where each virtual CPU stands to a file, twice: whether they move is half of why a guest is silent.
    fn note_processors(&mut self) -> Result<()> {
        let mut file = File::create(&self.files.processors)?;
        for _ in 0..2 {
            let command = json!({ "command-line": "info registers -a" });
            match self.qmp.run("human-monitor-command", command) {
                Ok(registers) => writeln!(file, "{}", instructions(registers.as_str().unwrap_or_default()))?,
                Err(error) => writeln!(file, "cannot be told: {error:#}")?,
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(())
    }

    /// The release of its kernel.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Runs a shell script, whatever its status.
    pub fn run_within(&mut self, deadline: Duration, script: &str) -> Result<Output> {
        let (qemu, console) = (&mut self.qemu, &self.files.console);
        self.agent.run(script, deadline, || alive(qemu, console))
    }

    pub fn run(&mut self, script: &str) -> Result<Output> {
        self.run_within(RUN_WITHIN, script)
    }

    /// Runs a shell script that has to succeed, and gives its output.
    pub fn sh(&mut self, script: &str) -> Result<String> {
        let output = self.run(script)?;
        ensure!(
            output.status == 0,
            "in the guest: {}\nended with {}: {}",
            script.trim(),
            output.status,
            output.text.trim()
        );
        Ok(output.text.trim().to_string())
    }

    /// Starts a shell script and comes back at once.
    pub fn start(&mut self, script: &str) -> Result<Background> {
        self.backgrounds += 1;
        let number = self.backgrounds;
        // The status appears by a rename: whoever sees it sees all of the output too.
        self.sh(&format!(
            "cd / && {{ ( {script}\n) >/run/bg{number}.out 2>&1 </dev/null; echo $? >/run/bg{number}.tmp
            mv /run/bg{number}.tmp /run/bg{number}.status; }} >/dev/null 2>&1 &"
        ))?;
        Ok(Background(number))
    }

    pub fn has_ended(&mut self, Background(number): &Background) -> Result<bool> {
        Ok(self.run(&format!("test -e /run/bg{number}.status"))?.status == 0)
    }

    /// Waits for the end of a background script.
    pub fn wait(&mut self, Background(number): Background, deadline: Duration) -> Result<Output> {
        let ended = self.run_within(
            deadline,
            &format!(
                "until [ -e /run/bg{number}.status ]; do sleep 0.1; done
                cat /run/bg{number}.out; exit $(cat /run/bg{number}.status)"
            ),
        );
        // On time-out its output so far is what one wants to see, and it is in a file in the guest.
        ended.with_context(|| format!("the guest's background script {number} did not end"))
    }

    /// Everything the kernel said since it booted.
    pub fn kernel_log(&mut self) -> Result<String> {
        self.sh("dmesg")
    }

    /// The guest's kernel never heard of an I/O error.
    pub fn expect_no_disk_trouble(&mut self) -> Result<()> {
        let log = self.kernel_log()?;
        ensure!(log.contains("Linux version"), "the guest's kernel log has lost its beginning");
        let trouble = disk_trouble(&log);
        ensure!(trouble.is_empty(), "the guest's kernel saw its disk fail:\n{}", trouble.join("\n"));
        Ok(())
    }

    /// An orderly shutdown: everything written back, file systems unmounted.
    pub fn power_off(mut self) -> Result<()> {
        self.agent.send(
            "if [ -d /run/systemd/system ]; then systemctl --no-block poweroff
            else sync; umount -a -r 2>/dev/null; poweroff -f; fi",
        )?;
        let status = self.qemu.wait_ended(OFF_WITHIN).context("the guest was asked to power off")?;
        ensure!(status.success(), "QEMU ended with {status}");
        Ok(())
    }

    /// The plug is pulled: what the guest had not flushed is gone, the disk stays.
    pub fn pull_plug(mut self) -> Result<()> {
        self.qemu.kill9()
    }

    /// An orderly reboot on the same QEMU: the devices are reset, the kernel and everything after it start afresh.
    pub fn reboot(&mut self) -> Result<()> {
        // Otherwise a reboot ends QEMU, so that a panic is not mistaken for a slow boot.
        self.qmp.run("set-action", json!({ "reboot": "reset" }))?;
        self.agent.send(
            "if [ -d /run/systemd/system ]; then systemctl --no-block reboot
            else sync; umount -a -r 2>/dev/null; reboot -f; fi",
        )?;
        self.wait_up(UP_WITHIN).context("after a reboot")?;
        self.qmp.run("set-action", json!({ "reboot": "shutdown" }))?;
        Ok(())
    }

    pub fn qemu(&mut self) -> &mut Process {
        &mut self.qemu
    }

    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }
}

/// Lines of a kernel log that tell of a failed disk.
fn disk_trouble(log: &str) -> Vec<&str> {
    log.lines()
        .filter(|line| {
            let line = line.to_lowercase();
            DISK_TROUBLE.iter().any(|words| line.contains(words))
        })
        .collect()
}

/// By the kernel's console: it has begun, and not the first process, which loads the driver for virtio disks.
fn stands_before_the_disk(console: &str) -> bool {
    console.contains("Linux version") && !console.contains("Run /init as init process")
}

/// Of QEMU's `info registers -a`, one line: each CPU's number and the line with its instruction pointer.
fn instructions(registers: &str) -> String {
    let lines = registers.lines().map(str::trim);
    lines.filter(|line| line.starts_with("CPU#") || line.contains("IP=")).collect::<Vec<_>>().join(" ")
}

/// A guest that died says so at once, instead of at the end of a deadline.
fn alive(qemu: &mut Process, console: &Path) -> Result<()> {
    if let Some(status) = qemu.ended()? {
        let text = std::fs::read(console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        match text.lines().find(|line| line.contains("Kernel panic")) {
            Some(panic) => bail!("the guest's {panic}"),
            None => bail!("QEMU ended with {status}; the end of {} may say why", qemu.log_path().display()),
        }
    }
    Ok(())
}

fn qemu_arguments(
    boot: &Boot,
    accelerator: Accelerator,
    images: &Images,
    files: &GuestFiles,
    control: &Path,
    line: &Path,
) -> Result<Vec<String>> {
    let memory = boot.memory_mib;
    // Dead CPUs and panics end QEMU: `panic=-1` reboots at once, and a reboot is a shutdown to it.
    // All of the boot on the console, and addresses as in its System.map: a guest that never comes up has no other
    // way to say how far it came.
    let mut kernel = "earlyprintk=serial,ttyS0,115200 console=ttyS0 loglevel=7 nokaslr panic=-1".to_string();
    if let Some(root) = boot.root {
        kernel += &format!(" root={root} systemd.show_status=0");
    }
    let mut arguments: Vec<String> = [
        "-nodefaults -no-user-config -display none -M q35,memory-backend=mem -cpu max",
        &format!("-accel {} -smp {} -m {memory}", accelerator.as_str(), boot.cpus),
        // vhost-user: the backend maps the guest's memory, so it has to be shared.
        &format!("-object memory-backend-memfd,id=mem,size={memory}M,share=on"),
        "-action reboot=shutdown -rtc base=utc",
    ]
    .iter()
    .flat_map(|words| words.split(' '))
    .map(str::to_string)
    .collect();
    let mut add = |option: &str, value: String| arguments.extend([option.to_string(), value]);
    add("-kernel", images.kernel.display().to_string());
    add("-initrd", images.initramfs.display().to_string());
    add("-append", kernel);
    add("-chardev", format!("file,id=firmware,path={}", files.firmware.display()));
    add("-device", "isa-debugcon,iobase=0x402,chardev=firmware".to_string());
    add("-serial", format!("file:{}", files.console.display()));
    add("-chardev", format!("socket,id=agent,path={}", line.display()));
    add("-serial", "chardev:agent".to_string());
    add("-chardev", format!("socket,id=qmp,path={}", control.display()));
    add("-mon", "chardev=qmp,mode=control".to_string());
    let reconnect = if qemu_version()? >= (9, 2) { "reconnect-ms=1000" } else { "reconnect=1" };
    for (number, socket) in boot.disks.iter().enumerate() {
        add("-chardev", format!("socket,id=disk{number},path={},{reconnect}", socket.display()));
        let queues = boot.queues;
        add("-device", format!("vhost-user-blk-pci,chardev=disk{number},num-queues={queues},queue-size=128"));
    }
    Ok(arguments)
}

/// A socket that QEMU will connect to.
pub(crate) struct Call {
    path: PathBuf,
    listener: UnixListener,
}

impl Call {
    pub(crate) fn expect(path: PathBuf) -> Result<Call> {
        let listener =
            UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))?;
        listener.set_nonblocking(true)?;
        Ok(Call { path, listener })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn answer(self, qemu: &mut Process) -> Result<UnixStream> {
        until("QEMU to connect", Duration::from_secs(20), || match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if let Some(status) = qemu.ended()? {
                    bail!("QEMU ended with {status} before it began: see {}", qemu.log_path().display());
                }
                Ok(None)
            }
            Err(error) => Err(error.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_saw_its_disk_fail_is_believed() {
        for line in [
            "[  10.1] I/O error, dev vda, sector 2048 op 0x1:(WRITE) flags 0x8800 phys_seg 1 prio class 2",
            "[  10.1] Buffer I/O error on dev vda, logical block 3, lost async page write",
            "[  10.1] EXT4-fs error (device vda): ext4_find_entry:1662: inode #2: comm sh: reading directory lblock 0",
            "[  10.1] XFS (vda): Metadata I/O Error (0x1) detected at xfs_trans_read_buf_map",
            "[  10.1] XFS (vda): Metadata corruption detected at xfs_agf_read_verify",
            "[  10.1] critical space allocation error, dev vda, sector 0 op 0x1:(WRITE)",
        ] {
            assert_eq!(disk_trouble(line), [line]);
        }
    }

    #[test]
    fn of_all_registers_the_instruction_pointers_are_told() {
        let qemu = "\r\nCPU#0\r\nRAX=1 RBX=2\r\nRIP=ffffffff8104 RFL=00000246 CPL=0 II=0 A20=1 SMM=0 HLT=1\r\nES =0000\r\n\
                    \r\nCPU#1\r\nEAX=1\r\nEIP=0000fff0 EFL=00000002 CPL=0 II=0 A20=1 SMM=0 HLT=0\r\n";
        assert_eq!(
            instructions(qemu),
            "CPU#0 RIP=ffffffff8104 RFL=00000246 CPL=0 II=0 A20=1 SMM=0 HLT=1 \
             CPU#1 EIP=0000fff0 EFL=00000002 CPL=0 II=0 A20=1 SMM=0 HLT=0"
        );
    }

    #[test]
    fn a_guest_that_may_have_met_its_disk_is_not_excused() {
        let begun = "[    0.000000] Linux version 6.1.0-56-cloud-amd64\n[    1.986] Asymmetric key parser";
        assert!(stands_before_the_disk(begun));
        // The firmware reads the disk, and so does whoever runs after the kernel.
        assert!(!stands_before_the_disk(""));
        assert!(!stands_before_the_disk(&format!("{begun}\n[    4.180] Run /init as init process\n")));
    }

    #[test]
    fn an_ordinary_boot_is_no_trouble() {
        let log = "[    1.1] virtio_blk virtio0: [vda] 2097152 512-byte logical blocks (1.07 GB/1.00 GiB)\n\
                   [    1.3] EXT4-fs (vda): mounted filesystem with ordered data mode. Quota mode: none.\n\
                   [    1.4] EXT4-fs (vda): re-mounted. Quota mode: none.";
        assert!(disk_trouble(log).is_empty());
    }
}
