//! What docs/operations.md tells an operator to type is typed here, word for word, to a cluster of real programs.
//!
//! Each block of commands of the page names its scene: ```` ```sh scene ````. A scene below runs its blocks in their order and
//! looks at what came of them; a block without a scene, or a scene without a block, fails. Of the words only the directories
//! and the one program that is not ours are others: `systemctl` starts and stops the programs as its units would.

mod programs;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use evolute_vhost_backend::volume::client::Client;
use serde_json::Value;

use programs::{EVOLUTE, are_built, until};

const SCENES: [&str; 4] = ["mds-backup", "mds-back", "chunkserver-lost", "votes"];

/// The commands of each scene of the page, one string per block.
fn blocks(scene: &str) -> Vec<String> {
    let page = fs::read_to_string("../docs/operations.md").expect("the page");
    let mut found = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        let Some(of) = line.trim().strip_prefix("```sh") else { continue };
        assert!(SCENES.contains(&of.trim()), "nobody types the block {line:?}");
        let block: Vec<_> = lines.by_ref().take_while(|line| line.trim() != "```").map(str::trim).collect();
        if of.trim() == scene {
            found.push(block.join("\n"));
        }
    }
    assert!(!found.is_empty(), "the page has no block of {scene}");
    found
}

/// One host that has all of it, under a directory of its own.
struct Host {
    dir: tempfile::TempDir,
    mds: String,
}

/// Of an MDS and four chunkservers. All are held until the last is found, so that they are different ones.
fn free_ports() -> Vec<u16> {
    let held: Vec<_> = (0..5).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port")).collect();
    held.iter().map(|port| port.local_addr().expect("bound").port()).collect()
}

const SYSTEMCTL: &str = r#"#!/bin/sh
# Of systemd what the page needs: a unit's program is in the background, and is gone when `stop` returns.
unit=$2
case $1 in
start)
    rm -f "$HOST/$unit.ready"
    setsid sh "$HOST/$unit.sh" > "$HOST/$unit.log" 2>&1 < /dev/null &
    for i in $(seq 600); do [ -e "$HOST/$unit.ready" ] && exit 0; sleep 0.1; done
    exit 1 ;;
stop)
    pid=$(cat "$HOST/$unit.pid")
    kill "$pid" && while kill -0 "$pid" 2> /dev/null; do sleep 0.05; done ;;
*) exit 2 ;;
esac
"#;

impl Host {
    /// An MDS and four chunkservers in zones of their own, as docs/operations.md names them; `None`: they are not built.
    fn begin() -> Option<Self> {
        if !are_built(&["evolute-mds", "evolute-chunkserver"]) {
            return None;
        }
        let ports = free_ports();
        let host =
            Self { dir: tempfile::tempdir().expect("a directory"), mds: format!("127.0.0.1:{}", ports[0]) };
        let bin = host.path("bin");
        fs::create_dir(&bin).expect("made");
        fs::write(bin.join("systemctl"), SYSTEMCTL).expect("written");
        fs::set_permissions(bin.join("systemctl"), fs::Permissions::from_mode(0o755)).expect("ours");
        let unit = |name: &str, program: &str| {
            let start =
                format!("echo $$ > $HOST/{name}.pid\nexec {program} --ready-file $HOST/{name}.ready\n");
            fs::write(host.path(&format!("{name}.sh")), start).expect("written");
        };
        let mds = &host.mds;
        unit(
            "evolute-mds",
            &format!(
                "evolute-mds --listen {mds} --data-dir $HOST/var/lib/evolute/mds --report-interval-s 0.5"
            ),
        );
        for (number, port) in ports.iter().enumerate().skip(1) {
            let program = format!(
                "evolute-chunkserver --mds {mds} --listen 127.0.0.1:{} --zone z{number} --data-dir $HOST/srv/evolute/disk{number}",
                port
            );
            unit(&format!("evolute-chunkserver@disk{number}"), &program);
        }
        host.sh("mkdir -p $HOST/var/lib/evolute $HOST/srv/evolute && systemctl start evolute-mds");
        (1..=4).for_each(|n| drop(host.sh(&format!("systemctl start evolute-chunkserver@disk{n}"))));
        host.ok();
        Some(host)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn try_sh(&self, commands: &str) -> Output {
        let beside = Path::new(EVOLUTE).parent().expect("a directory");
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{}:{path}", self.path("bin").display(), beside.display());
        let mut shell = Command::new("sh");
        shell.args(["-ec", commands]).env("PATH", path).env("HOST", self.dir.path());
        shell.env("EVOLUTE_MDS", &self.mds).current_dir(self.dir.path()).output().expect("sh")
    }

    fn sh(&self, commands: &str) -> String {
        let output = self.try_sh(commands);
        assert!(output.status.success(), "{commands}\n{output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// The block of the page, in this host's directories.
    fn type_block(&self, block: &str) -> String {
        let here = self.dir.path().to_str().expect("UTF-8");
        let mut commands = block.to_owned();
        for directory in ["/var/lib/evolute", "/srv/evolute", "/backup"] {
            commands = commands.replace(directory, &format!("{here}{directory}"));
        }
        self.sh(&commands)
    }

    fn json(&self, words: &str) -> Value {
        serde_json::from_str(&self.sh(&format!("evolute --json {words}"))).expect("JSON")
    }

    fn ok(&self) {
        until("a healthy cluster", || {
            let said = self.try_sh("evolute --json cluster status");
            let status: Value = serde_json::from_slice(&said.stdout).ok()?;
            let copysets = status["copysets"].as_array().is_some_and(|copysets| !copysets.is_empty());
            (status["health"] == "ok" && copysets).then_some(())
        });
    }

    fn volumes(&self) -> Vec<String> {
        let list = self.json("volume list");
        let names = list["volumes"].as_array().expect("a list").iter();
        names.map(|volume| volume["name"].as_str().expect("a name").to_owned()).collect()
    }

    fn client(&self, volume: &str) -> Client {
        Client::attach(volume, std::slice::from_ref(&self.mds), "a guest").expect("attached")
    }

    fn write(&self, volume: &str) {
        let client = self.client(volume);
        client.write(0, vec![7; 1 << 20].into()).expect("written");
        client.flush().expect("durable");
        client.detach().expect("given back");
    }

    fn expect_data(&self, volume: &str) {
        let client = self.client(volume);
        assert!(client.read(0, 1 << 20).expect("read").iter().all(|byte| *byte == 7), "{volume}");
        client.detach().expect("given back");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|ending| ending == "pid")
                && let Ok(pid) = fs::read_to_string(entry.path())
            {
                let _ = Command::new("kill").args(["-9", pid.trim()]).output();
            }
        }
    }
}

#[test]
fn an_mds_is_backed_up_and_put_back_as_the_page_says() {
    let Some(host) = Host::begin() else { return };
    host.sh("evolute volume create early --size 1G");
    host.write("early");
    for block in blocks("mds-backup") {
        host.type_block(&block);
    }
    host.ok();
    assert!(host.path("backup").join("mds").exists());
    // After the copy: it is learnt back, without its name.
    host.sh("evolute volume create late --size 1G");
    host.write("late");
    let [back, look, accept] = &blocks("mds-back")[..] else { panic!("three blocks") };
    host.type_block(back);
    until("it found out", || {
        let said = host.try_sh("evolute cluster status");
        // "… a copy that is older", and soon "… an older copy and has learnt".
        String::from_utf8_lossy(&said.stdout).contains("this MDS was put back from a").then_some(())
    });
    until("what was forgotten is known again", || {
        host.volumes().contains(&"recovered-2".to_owned()).then_some(())
    });
    assert!(host.type_block(look).contains("recovered-2"));
    host.type_block(accept);
    host.ok();
    host.expect_data("early");
    assert_eq!(host.volumes(), ["early", "recovered-2"]);
}

#[test]
fn a_lost_chunkserver_is_declared_dead_removed_and_replaced_as_the_page_says() {
    let Some(host) = Host::begin() else { return };
    host.sh("evolute volume create disk --size 1G");
    host.write("disk");
    // Its disk is gone. The page speaks of number 4: make that the one.
    let list = host.json("chunkserver list");
    let four = list["chunkservers"].as_array().expect("a list").iter().find(|c| c["id"] == 4).expect("four");
    let disk = four["zone"].as_str().expect("a zone").replace('z', "disk");
    host.sh(&format!("systemctl stop evolute-chunkserver@{disk}; rm -r srv/evolute/{disk}"));
    let [dead, remove, new] = &blocks("chunkserver-lost")[..] else { panic!("three blocks") };
    until("its silence to be noticed", || (host.json("chunkserver show 4")["online"] == false).then_some(()));
    host.type_block(dead);
    until("it holds nothing any more", || {
        let shown = host.json("chunkserver show 4");
        (shown["replicas"] == 0).then_some(())
    });
    host.type_block(remove);
    let list = host.json("chunkserver list");
    assert!(list["chunkservers"].as_array().expect("a list").iter().all(|c| c["id"] != 4), "{list}");
    host.type_block(&new.replace("disk4", &disk));
    host.ok();
    host.expect_data("disk");
}

#[test]
fn a_directory_is_looked_at_and_repaired_as_the_page_says() {
    let Some(host) = Host::begin() else { return };
    host.sh("evolute volume create disk --size 1G");
    host.write("disk");
    // Nothing is wrong with it, so there is nothing to repair, and it serves again.
    for block in blocks("votes") {
        host.type_block(&block);
    }
    host.ok();
    host.expect_data("disk");
}
