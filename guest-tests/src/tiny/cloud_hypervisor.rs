//! cloud-hypervisor with the tiny guest, told over its HTTP API what to do.

use super::http::{Asked, ask};
use super::{ANSWERED_WITHIN, Begin, MEMORY_MIB, MOVED_WITHIN, Memory, Vmm, built, compile};
use crate::process::Process;
use crate::scene::Scene;
use crate::wait::until;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

pub struct CloudHypervisor {
    process: Process,
    /// Its own: the guest's serial port is a socket in it, named by a path that is the same wherever the guest goes.
    folder: PathBuf,
    /// The request to receive a guest, which is answered when it is there.
    receiving: Option<Asked>,
    /// The guest, and with it its serial port, is not there yet.
    is_to_come: bool,
}

impl CloudHypervisor {
    pub fn start(scene: &Scene, program: &Path, begin: Begin<'_>) -> Result<CloudHypervisor> {
        let name = scene.next_guest();
        let folder = scene.folder().join(&name);
        std::fs::create_dir(&folder)?;
        let mut arguments = "--api-socket api --seccomp log".to_string();
        if let Begin::Boot(disk) = begin {
            arguments += &format!(
                " --kernel {} --cpus boot=1 --memory size={MEMORY_MIB}M,shared=on --serial socket=line --console off \
                 --disk vhost_user=true,socket={},num_queues=1,queue_size=128,id=disk",
                built(scene)?.display(),
                disk.display()
            );
        }
        let shim = compile(scene, "nested_state.so", "-shared -fPIC -O2 nested_state.c")?;
        let process = Process::new(scene, &name, program, arguments.split(' '));
        let mut process = process.in_folder(&folder).with_variable("LD_PRELOAD", shim);
        process.start()?;
        let is_to_come = matches!(begin, Begin::Receive { .. });
        let mut vmm = CloudHypervisor { process, folder, receiving: None, is_to_come };
        until("cloud-hypervisor's API", ANSWERED_WITHIN, || {
            vmm.expect_running()?;
            Ok(ask(&vmm.api(), "GET", "vmm.ping", &Value::Null).ok())
        })?
        .answer()?;
        match begin {
            Begin::Boot(_) => {}
            Begin::Restore { saved, .. } => {
                vmm.put("vm.restore", &json!({ "source_url": format!("file://{}", saved.display()) }))?;
                vmm.go_on()?;
            }
            Begin::Receive { at, .. } => {
                let from = json!({ "receiver_url": format!("unix:{}", at.display()) });
                vmm.receiving = Some(ask(&vmm.api(), "PUT", "vm.receive-migration", &from)?);
                until("cloud-hypervisor to listen for a guest", ANSWERED_WITHIN, || {
                    vmm.expect_running()?;
                    Ok(at.exists().then_some(()))
                })?;
            }
        }
        Ok(vmm)
    }

    fn api(&self) -> PathBuf {
        self.folder.join("api")
    }

    fn put(&self, what: &str, body: &Value) -> Result<Value> {
        ask(&self.api(), "PUT", what, body)?.answer()
    }

    fn info(&self) -> Result<Value> {
        ask(&self.api(), "GET", "vm.info", &Value::Null)?.answer()
    }

    fn expect_running(&mut self) -> Result<()> {
        match self.process.ended()? {
            None => Ok(()),
            Some(status) => {
                bail!("cloud-hypervisor ended with {status}: see {}", self.process.log_path().display())
            }
        }
    }
}

impl Vmm for CloudHypervisor {
    fn line(&mut self) -> Result<Option<UnixStream>> {
        if self.is_to_come {
            return Ok(None);
        }
        let path = self.folder.join("line");
        until("the guest's serial port", ANSWERED_WITHIN, || {
            self.expect_running()?;
            Ok(UnixStream::connect(&path).ok().map(Some))
        })
    }

    fn stop(&mut self) -> Result<()> {
        self.put("vm.pause", &Value::Null).map(|_| ())
    }

    fn go_on(&mut self) -> Result<()> {
        self.put("vm.resume", &Value::Null).map(|_| ())
    }

    fn reboot(&mut self) -> Result<()> {
        self.put("vm.reboot", &Value::Null).map(|_| ())
    }

    fn plug(&mut self, disk: &Path) -> Result<()> {
        let socket = disk.to_str().context("a path that is text")?;
        let config = json!({ "id": "plugged", "vhost_user": true, "vhost_socket": socket, "num_queues": 1, "queue_size": 128 });
        self.put("vm.add-disk", &config).map(|_| ())
    }

    fn unplug(&mut self) -> Result<()> {
        self.put("vm.remove-device", &json!({ "id": "plugged" })).map(|_| ())
    }

    fn has_plugged(&mut self) -> Result<bool> {
        let devices = &self.info()?["device_tree"];
        Ok(devices.as_object().context("no `device_tree` in vm.info")?.contains_key("plugged"))
    }

    fn save(&mut self, to: &Path) -> Result<()> {
        if to.exists() {
            std::fs::remove_dir_all(to)?;
        }
        std::fs::create_dir(to)?;
        self.put("vm.snapshot", &json!({ "destination_url": format!("file://{}", to.display()) })).map(|_| ())
    }

    fn send(&mut self, to: &Path, memory: Memory) -> Result<()> {
        let to =
            json!({ "destination_url": format!("unix:{}", to.display()), "local": memory == Memory::Given });
        self.put("vm.send-migration", &to).map(|_| ())
    }

    /// Whoever receives it says more.
    fn has_sent(&mut self) -> Result<bool> {
        Ok(true)
    }

    fn has_received(&mut self) -> Result<bool> {
        if let Some(receiving) = self.receiving.take() {
            receiving.answer()?;
            self.is_to_come = false;
        }
        self.expect_running()?;
        Ok(self.info()?["state"] == "Running")
    }

    fn end(&mut self) -> Result<()> {
        // One that has sent its guest ends by itself.
        match self.process.ended()? {
            Some(_) => self.process.wait_ended(MOVED_WITHIN).map(|_| ()),
            None => self.process.kill9(),
        }
    }
}
