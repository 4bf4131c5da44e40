//! QEMU with the tiny guest.

use super::{ANSWERED_WITHIN, Begin, MEMORY_MIB, MOVED_WITHIN, Memory, Vmm, built};
use crate::accelerator::{Accelerator, qemu_version};
use crate::guest::Call;
use crate::process::Process;
use crate::qmp::Qmp;
use crate::scene::Scene;
use crate::wait::until;
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The machine "pc": disks are added to its PCI bus while it runs, and a guest can give them back with one write to a port.
const MACHINE: &str = "pc,memory-backend=mem";

pub struct Qemu {
    process: Process,
    qmp: Qmp,
    line: Option<UnixStream>,
}

impl Qemu {
    pub fn start(scene: &Scene, begin: Begin<'_>) -> Result<Qemu> {
        let name = scene.next_guest();
        let accelerator = Accelerator::choose(scene)?;
        let program = built(scene)?;
        let control = Call::expect(scene.folder().join(format!("{name}.qmp")))?;
        let line = Call::expect(scene.folder().join(format!("{name}.line")))?;
        let (disk, incoming) = match begin {
            Begin::Boot(disk) => (disk, None),
            Begin::Restore { disk, saved } => (disk, Some(format!("exec:cat {}", saved.display()))),
            Begin::Receive { disk, at } => (disk, Some(format!("unix:{}", at.display()))),
        };
        let reconnect = if qemu_version()? >= (9, 2) { "reconnect-ms=1000" } else { "reconnect=1" };
        let mut arguments: Vec<String> = format!(
            "-nodefaults -no-user-config -display none -M {MACHINE} -cpu max -accel {} -m {MEMORY_MIB} \
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
        let restores = matches!(begin, Begin::Restore { .. });
        arguments.extend(incoming.into_iter().flat_map(|from| ["-incoming".to_string(), from]));
        let mut process = Process::new(scene, &name, "qemu-system-x86_64", arguments);
        process.start()?;
        let qmp = Qmp::new(control.answer(&mut process)?)?;
        let line = line.answer(&mut process)?;
        let mut qemu = Qemu { process, qmp, line: Some(line) };
        if restores {
            until("the guest to be read back", MOVED_WITHIN, || Ok(qemu.has_received()?.then_some(())))?;
            qemu.go_on()?;
        }
        Ok(qemu)
    }
}

impl Vmm for Qemu {
    fn line(&mut self) -> Result<Option<UnixStream>> {
        Ok(self.line.take())
    }

    fn stop(&mut self) -> Result<()> {
        self.qmp.run("stop", json!({})).map(|_| ())
    }

    fn go_on(&mut self) -> Result<()> {
        self.qmp.run("cont", json!({})).map(|_| ())
    }

    fn reboot(&mut self) -> Result<()> {
        self.qmp.run("system_reset", json!({})).map(|_| ())
    }

    fn plug(&mut self, disk: &Path) -> Result<()> {
        let path = disk.to_str().context("a path that is text")?;
        let address = json!({ "type": "unix", "data": { "path": path } });
        let socket = json!({ "addr": address, "server": false, "reconnect": 1 });
        let backend = json!({ "type": "socket", "data": socket });
        self.qmp.run("chardev-add", json!({ "id": "plugged", "backend": backend }))?;
        let device =
            json!({ "driver": "vhost-user-blk-pci", "id": "plugged", "chardev": "plugged", "num-queues": 1 });
        self.qmp.run("device_add", device).map(|_| ())
    }

    fn unplug(&mut self) -> Result<()> {
        self.qmp.run("device_del", json!({ "id": "plugged" })).map(|_| ())
    }

    fn has_plugged(&mut self) -> Result<bool> {
        let devices = self.qmp.run("qom-list", json!({ "path": "/machine/peripheral" }))?;
        let devices = devices.as_array().context("a list of devices")?;
        if devices.iter().any(|it| it["name"] == "plugged") {
            return Ok(true);
        }
        // The device lets go of it a moment later.
        let removed = || Ok(self.qmp.run("chardev-remove", json!({ "id": "plugged" })).ok());
        until("the disk's connection to be closed", ANSWERED_WITHIN, removed)?;
        Ok(false)
    }

    fn save(&mut self, to: &Path) -> Result<()> {
        self.qmp.run("migrate", json!({ "uri": format!("exec:cat >{}", to.display()) }))?;
        until("the guest to be written to a file", MOVED_WITHIN, || Ok(self.has_sent()?.then_some(())))
    }

    fn send(&mut self, to: &Path, memory: Memory) -> Result<()> {
        ensure!(memory == Memory::Copied, "QEMU copies its guest's memory");
        self.qmp.run("migrate", json!({ "uri": format!("unix:{}", to.display()) })).map(|_| ())
    }

    fn has_sent(&mut self) -> Result<bool> {
        let status = self.qmp.run("query-migrate", json!({}))?;
        match status["status"].as_str() {
            Some("completed") => Ok(true),
            Some("failed" | "cancelled") => bail!("QEMU could not send its guest: {status}"),
            _ => Ok(false),
        }
    }

    fn has_received(&mut self) -> Result<bool> {
        Ok(self.qmp.run("query-status", json!({}))?["status"] != "inmigrate")
    }

    fn end(&mut self) -> Result<()> {
        self.process.kill9()
    }
}
