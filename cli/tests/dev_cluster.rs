//! `evolute dev` with the real programs: a cluster comes up, takes an image, survives its processes, comes back with its
//! data, and leaves nothing running.

mod programs;

use std::fs::{self, File};
use std::io::BufRead;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use evolute_vhost_backend::backing::Capacity;
use evolute_vhost_backend::volume::VolumeOptions;
use evolute_vhost_backend::volume::client::Client;
use evolute_vhost_backend::volume::control::ControlOptions;
use evolute_vhost_backend::volume::identity::Secret;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use programs::{EVOLUTE, are_built, until};

fn programs_are_built() -> bool {
    are_built(&["evolute-mds", "evolute-chunkserver", "evolute-vhost", "vublk-bench"])
}

/// `evolute`, also where whoever runs this test ignores hangups (nohup): what is ignored at the start stays ignored.
fn hears_hangups() -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal=HUP,QUIT", EVOLUTE]);
    command
}

struct Dev {
    child: Child,
    ready_file: PathBuf,
}

impl Dev {
    fn start(dir: &Path, more: &[&str]) -> Self {
        let ready_file = dir.with_extension("ready");
        // That of one that was killed would say that this one is up.
        let _ = fs::remove_file(&ready_file);
        let out = File::create(dir.with_extension("out")).expect("create");
        let err = out.try_clone().expect("clone");
        let child = hears_hangups()
            .args(["dev", "--start-timeout", "100", "--dir"])
            .arg(dir)
            .arg("--ready-file")
            .arg(&ready_file)
            .args(more)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .expect("starts");
        let mut dev = Self { child, ready_file };
        until("the cluster", || {
            let ended = dev.child.try_wait().expect("ours");
            let said = fs::read_to_string(dir.with_extension("out")).unwrap_or_default();
            assert!(ended.is_none(), "evolute dev ended: {said}");
            dev.ready_file.exists().then_some(())
        });
        dev
    }

    fn running(&self) -> Value {
        serde_json::from_slice(&fs::read(&self.ready_file).expect("ready")).expect("JSON")
    }

    fn mds(&self) -> String {
        self.running()["mds"]["address"].as_str().expect("an address").to_owned()
    }

    /// The processes of the cluster.
    fn pids(&self) -> Vec<u64> {
        let running = self.running();
        let lists = ["chunkservers", "volumes"].map(|list| running[list].as_array().expect("a list").clone());
        let processes = lists.into_iter().flatten().chain([running["mds"].clone()]);
        processes.map(|process| process["pid"].as_u64().expect("a pid")).collect()
    }

    fn evolute(&self, words: &[&str]) -> Output {
        let mds = self.mds();
        Command::new(EVOLUTE).args(["--mds", &mds, "--json"]).args(words).output().expect("runs")
    }

    fn ask(&self, words: &[&str]) -> Value {
        let output = self.evolute(words);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn signal(&self, signal: Signal) {
        kill(u64::from(self.child.id()), signal);
    }

    fn stop(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        until("the end", || self.child.try_wait().expect("ours"))
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        // Its processes die with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn kill(pid: u64, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    kill_process(pid, signal).expect("ours");
}

fn is_alive(pid: u64) -> bool {
    // A zombie has no command line any more.
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|command| !command.is_empty())
}

/// An image with data at both ends, a hole, and zeroes that nobody punched.
fn image(path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; (5 << 20) + 1000];
    for (i, byte) in bytes[..2 << 20].iter_mut().enumerate() {
        *byte = u8::try_from(i % 251).expect("small");
    }
    bytes[(1 << 20)..(1 << 20) + 65536].fill(0);
    let end = bytes.len();
    bytes[end - 10..].fill(7);
    let file = File::create(path).expect("create");
    file.set_len(end as u64).expect("size");
    file.write_all_at(&bytes[..2 << 20], 0).expect("write");
    file.write_all_at(&bytes[end - 10..], (end - 10) as u64).expect("write");
    bytes
}

fn read_back(mds: &str, volume: &str, bytes: usize) -> Vec<u8> {
    let client = Client::attach(volume, &[mds.to_owned()], "a test").expect("attached");
    let data = client.read(0, bytes.next_multiple_of(4096)).expect("read");
    client.detach().expect("detached");
    data[..bytes].to_vec()
}

#[test]
fn a_cluster_survives_its_processes_and_comes_back_with_its_data() {
    if !programs_are_built() {
        return;
    }
    let temporary = tempfile::tempdir().expect("tempdir");
    let dir = temporary.path().join("c");
    let dev = Dev::start(&dir, &["--volume", "disk:64M", "--mds-port", "0"]);
    let first = dev.running();
    assert_eq!(first["volumes"][0]["volume"], "disk");
    let socket = PathBuf::from(first["volumes"][0]["socket"].as_str().expect("a path"));
    assert!(socket.exists());
    assert!(first["volumes"][0]["qemu"].as_str().is_some_and(|line| line.contains("share=on")));
    let volume = dev.ask(&["volume", "show", "disk"]);
    assert_eq!((&volume["size_bytes"], volume["attached"].is_object()), (&Value::from(64 << 20), true));
    let known = dev.ask(&["cluster", "status"])["chunkservers"].clone();
    assert_eq!(known.as_array().map(Vec::len), Some(3));
    for at in 0..3 {
        assert_eq!(known[at]["id"], at + 1);
        assert_eq!(known[at]["address"], first["chunkservers"][at]["address"], "chunkserver-{}", at + 1);
    }

    // The same directory is served once.
    let second = Command::new(EVOLUTE).arg("dev").arg("--dir").arg(&dir).output().expect("runs");
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && said.contains(&dev.child.id().to_string()), "{said}");

    // An image arrives whole.
    let file = temporary.path().join("image.raw");
    let bytes = image(&file);
    let imported = dev.evolute(&["volume", "import", file.to_str().expect("UTF-8"), "--name", "debian"]);
    assert!(imported.status.success(), "{}", String::from_utf8_lossy(&imported.stderr));
    let events = String::from_utf8(imported.stdout).expect("UTF-8");
    let last: Value = serde_json::from_str(events.lines().last().expect("events")).expect("JSON");
    assert_eq!(
        (last["event"].as_str(), last["image_bytes"].as_u64()),
        (Some("done"), Some(bytes.len() as u64))
    );
    assert!(
        last["written_bytes"].as_u64().is_some_and(|written| written < 2 << 20),
        "holes are not written: {last}"
    );
    let debian = dev.ask(&["volume", "show", "debian"]);
    assert_eq!((&debian["size_bytes"], &debian["importing"]), (&Value::from(6 << 20), &Value::Null));
    assert_eq!(debian["used_bytes"], last["written_bytes"], "no report has come since");
    assert!(read_back(&dev.mds(), "debian", bytes.len()) == bytes);
    let written = debian["used_bytes"].clone();
    let again = dev.evolute(&["volume", "import", file.to_str().expect("UTF-8"), "--into", "debian"]);
    assert_eq!(again.status.code(), Some(2), "it is not empty any more");

    // A process that dies is started again.
    let victim = first["chunkservers"][1]["pid"].as_u64().expect("a pid");
    kill(victim, Signal::KILL);
    until("a new chunkserver", || {
        dev.running()["chunkservers"][1]["pid"].as_u64().filter(|pid| *pid != victim && *pid != 0)
    });

    // Stopped and started: the same ports, the same volume, the same data.
    let before = dev.pids();
    assert!(dev.stop().success());
    assert!(!dir.with_extension("ready").exists(), "nothing is ready any more");
    assert_eq!(before.iter().filter(|pid| is_alive(**pid)).count(), 0);
    let dev = Dev::start(&dir, &[]);
    assert_eq!(dev.mds(), first["mds"]["address"].as_str().expect("an address"));
    assert_eq!(dev.running()["volumes"][0]["volume"], "disk");
    // No checkpoint has seen it, and before they have reported it is not known: neither is 0.
    let used = until("what the volume uses", || {
        let used = dev.ask(&["volume", "show", "debian"])["used_bytes"].clone();
        (!used.is_null()).then_some(used)
    });
    assert_eq!(used, written);
    assert!(read_back(&dev.mds(), "debian", bytes.len()) == bytes);

    // Even killed it leaves nothing running; the next one waits for what is ending just now.
    let pids = dev.pids();
    assert_eq!(pids.iter().filter(|pid| is_alive(**pid)).count(), 5);
    dev.signal(Signal::KILL);
    drop(dev);
    let dev = Dev::start(&dir, &["--socket-mode", "0666"]);
    until("the children's end", || pids.iter().all(|pid| !is_alive(*pid)).then_some(()));
    let mode = fs::metadata(&socket).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
    drop(dev);
}

struct Import {
    child: Child,
    created: std::io::BufReader<std::process::ChildStdout>,
}

impl Import {
    /// Runs until its volume is made.
    fn begin(dev: &Dev, file: &Path, name: &str) -> Self {
        let mut child = hears_hangups()
            .args(["--mds", &dev.mds(), "--json", "volume", "import"])
            .arg(file)
            .args(["--name", name])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut created = std::io::BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        created.read_line(&mut line).expect("a line");
        assert!(line.contains("created"), "{line}");
        Self { child, created }
    }

    fn end_by(mut self, signal: Signal) -> ExitStatus {
        kill(u64::from(self.child.id()), signal);
        let _ = std::io::copy(&mut self.created, &mut std::io::sink());
        self.child.wait().expect("ours")
    }
}

/// A terminal goes away, a process is killed. What is left under the name must not be taken for the image, and the same
/// command has to work again, or to say what to do.
#[test]
fn half_an_image_is_never_left_under_the_name_as_if_it_were_whole() {
    if !programs_are_built() {
        return;
    }
    let temporary = tempfile::tempdir().expect("tempdir");
    let dir = temporary.path().join("c");
    let dev = Dev::start(&dir, &["--mds-port", "0"]);
    let file = temporary.path().join("image.raw");
    let bytes = image(&file);
    // No copy ends while two of three chunkservers stand still.
    let still: Vec<u64> =
        (0..2).map(|at| dev.running()["chunkservers"][at]["pid"].as_u64().expect("a pid")).collect();
    still.iter().for_each(|pid| kill(*pid, Signal::STOP));
    for signal in [Signal::HUP, Signal::QUIT] {
        let ended = Import::begin(&dev, &file, "half").end_by(signal);
        assert_eq!(ended.code(), Some(130), "{signal:?}");
        assert_eq!(dev.evolute(&["volume", "show", "half"]).status.code(), Some(3), "{signal:?}");
    }
    Import::begin(&dev, &file, "half").end_by(Signal::KILL);
    still.iter().for_each(|pid| kill(*pid, Signal::CONT));

    assert!(dev.ask(&["volume", "show", "half"])["importing"].is_object());
    let again = dev.evolute(&["volume", "import", file.to_str().expect("UTF-8"), "--name", "half"]);
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert_eq!(again.status.code(), Some(4), "{said}");
    assert!(said.contains("unfinished import") && said.contains("volume delete half --force"), "{said}");
    let refused = Client::attach("half", &[dev.mds()], "a guest").expect_err("half an image").to_string();
    assert!(refused.contains("unfinished import"), "{refused}");

    assert_eq!(dev.ask(&["volume", "delete", "half", "--force"])["deleted"], "half");
    let again = dev.evolute(&["volume", "import", file.to_str().expect("UTF-8"), "--name", "half"]);
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    assert!(read_back(&dev.mds(), "half", bytes.len()) == bytes);

    // The terminal of the cluster itself goes away.
    let mut dev = dev;
    let pids = dev.pids();
    dev.signal(Signal::HUP);
    assert!(until("the end", || dev.child.try_wait().expect("ours")).success());
    assert_eq!(pids.iter().filter(|pid| is_alive(**pid)).count(), 0);
    assert!(fs::read_to_string(dir.with_extension("out")).expect("said").ends_with("stopped\n"), "in order");
}

/// One process for all volumes: it dies and comes back with both, and the loss of one is not that of the other.
#[test]
fn one_backend_serves_several_volumes() {
    if !programs_are_built() {
        return;
    }
    let temporary = tempfile::tempdir().expect("tempdir");
    let dir = temporary.path().join("c");
    let dev =
        Dev::start(&dir, &["--one-backend", "--volume", "a:64M", "--volume", "b:64M", "--mds-port", "0"]);
    let pid = |at: usize| dev.running()["volumes"][at]["pid"].as_u64().expect("a pid");
    let socket = |at: usize| dev.running()["volumes"][at]["socket"].as_str().expect("a path").to_owned();
    let works = |at: usize| {
        let load = [
            "--rw",
            "randwrite",
            "--qd",
            "4",
            "--runtime",
            "0.1",
            "--size",
            "16M",
            "--stall",
            "10",
            "--socket",
        ];
        let bench = Path::new(EVOLUTE).with_file_name("vublk-bench");
        let ran = Command::new(bench).args(load).arg(socket(at)).stdout(Stdio::null()).status();
        ran.expect("runs").success()
    };
    let first = pid(0);
    assert_eq!(pid(1), first);
    assert!(works(0) && works(1));

    kill(first, Signal::KILL);
    let second = until("a new backend", || Some(pid(0)).filter(|pid| *pid != first && *pid != 0));
    assert_eq!(pid(1), second);
    assert!(works(0) && works(1));

    // Somebody else takes one of them.
    let taken = Client::attach_with(
        ControlOptions {
            volume: "a".to_owned(),
            mds: vec![dev.mds()],
            holder: "a test".to_owned(),
            secret: Secret::random(),
            former_secret: None,
            takeover: true,
            state_dir: None,
            capacity: Capacity::default(),
        },
        VolumeOptions::default(),
    );
    let taken = taken.expect("taken over");
    // Answered only once every copyset has agreed: from here on the other one is fenced out.
    taken.read(0, 4096).expect("read");
    assert!(!works(0), "it has to learn of it, and then it ends");
    until("its socket's end", || (!Path::new(&socket(0)).exists()).then_some(()));
    assert!(works(1) && is_alive(second));
    assert!(dev.ask(&["volume", "show", "b"])["attached"].is_object());
    taken.detach().expect("detached");
    assert!(dev.stop().success(), "the other one was served to the end");
}

#[test]
fn a_kept_port_that_somebody_else_took_names_them() {
    if !programs_are_built() {
        return;
    }
    let temporary = tempfile::tempdir().expect("tempdir");
    let dir = temporary.path().join("c");
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = taken.local_addr().expect("address").port().to_string();
    fs::create_dir(&dir).expect("mkdir");
    let kept = format!("format = 1\nmds_port = {port}\nchunkserver_ports = [20001, 20002, 20003]\n");
    fs::write(dir.join("dev.toml"), kept).expect("write");
    let refused = Command::new(EVOLUTE).arg("dev").arg("--dir").arg(&dir).output().expect("runs");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success(), "{said}");
    for word in [port.as_str(), &std::process::id().to_string(), "--new-ports"] {
        assert!(said.contains(word), "{word}: {said}");
    }
}

/// The copy knows of every start there was: that the chunkserver went on after it was made, only its end tells.
#[test]
fn a_copy_of_a_running_chunkserver_that_is_put_back_does_not_count() {
    if !programs_are_built() {
        return;
    }
    let temporary = tempfile::tempdir().expect("tempdir");
    let dir = temporary.path().join("c");
    let healthy = |dev: &Dev| {
        until("health", || (dev.ask(&["cluster", "status"])["health"] == "ok").then_some(()));
    };
    let dev = Dev::start(&dir, &["--mds-port", "0"]);
    healthy(&dev);
    let (data, copy) = (dir.join("data/chunkserver-1"), temporary.path().join("copy"));
    let copied = Command::new("cp").args(["-a", "--sparse=always"]).arg(&data).arg(&copy).status();
    assert!(copied.expect("cp runs").success());
    assert!(dev.stop().success());
    let log = dir.join("logs/mds.log");
    let said = |what: &str| fs::read_to_string(&log).expect("a log").contains(what);
    assert!(said("has ended in order") && !said("was put back"));

    fs::remove_dir_all(&data).expect("removed");
    fs::rename(&copy, &data).expect("put back");
    let dev = Dev::start(&dir, &[]);
    until("somebody to notice", || said("was put back to an older copy of its directory").then_some(()));
    assert!(dev.stop().success());
}
