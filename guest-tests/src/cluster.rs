//! A whole cluster of real processes on loopback, in the folder of the test.
//!
//! One MDS, three chunkservers in three zones, and a backend for each volume a test serves. They are started with
//! the flags an operator uses, know nothing of the test, and are asked with the `evolute` tool. Ports stay
//! the same when a process is started again, as they do where there is a unit file.

use crate::process::Process;
use crate::scene::Scene;
use crate::wait::until;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// As many as a copyset has replicas: each loss is felt.
const CHUNKSERVERS: usize = 3;
/// An operator waits ten minutes before data is copied; tests do not.
const REPAIR_AFTER_S: u32 = 5;
/// All replicas of a small volume, sent over loopback on a busy machine.
const REPAIRED_WITHIN: Duration = Duration::from_secs(180);
/// Registration, elections, and one report at the interval below.
const WHOLE_WITHIN: Duration = Duration::from_secs(60);
/// The default of 10 s is an operator's; a test waits for reports.
const HEARTBEAT_INTERVAL_S: u32 = 1;

pub struct Cluster<'a> {
    scene: &'a Scene,
    programs: PathBuf,
    ports: Ports,
    mds_address: SocketAddr,
    mds: Process,
    chunkservers: Vec<Chunkserver>,
    backends: BTreeMap<String, Process>,
}

struct Chunkserver {
    address: SocketAddr,
    process: Process,
}

impl<'a> Cluster<'a> {
    /// Starts one and waits until it is whole. Nothing in it is ever repaired: what a test takes away stays away.
    pub fn start(scene: &'a Scene) -> Result<Cluster<'a>> {
        Self::start_with(scene, 24 * 3600)
    }

    /// One that replaces what is silent for a few seconds.
    pub fn start_repairing(scene: &'a Scene) -> Result<Cluster<'a>> {
        Self::start_with(scene, REPAIR_AFTER_S)
    }

    fn start_with(scene: &'a Scene, repair_after_s: u32) -> Result<Cluster<'a>> {
        let programs = programs()?;
        let mut ports = Ports::new();
        let mds_address = ports.free()?;
        let mds = Process::new(
            scene,
            "mds",
            programs.join("evolute-mds"),
            words(&format!(
                "--data-dir {} --listen {mds_address} --repair-after-s {repair_after_s}",
                scene.folder().join("mds").display()
            )),
        );
        let mut cluster = Cluster {
            scene,
            programs,
            ports,
            mds_address,
            mds: mds.with_ready_file(scene),
            chunkservers: Vec::new(),
            backends: BTreeMap::new(),
        };
        for _ in 0..CHUNKSERVERS {
            cluster.describe_chunkserver()?;
        }
        cluster.start_servers()?;
        cluster.wait_whole()?;
        scene.tell("a cluster is up: an MDS and three chunkservers");
        Ok(cluster)
    }

    /// One more, in a zone of its own.
    pub fn add_chunkserver(&mut self) -> Result<()> {
        self.describe_chunkserver()?;
        self.chunkservers.last_mut().expect("just added").process.start()
    }

    fn describe_chunkserver(&mut self) -> Result<()> {
        let number = self.chunkservers.len() + 1;
        let (name, address) = (format!("chunkserver{number}"), self.ports.free()?);
        let arguments = format!(
            "--data-dir {} --mds {} --listen {address} --zone zone{number} --server server{number} \
             --heartbeat-interval-s {HEARTBEAT_INTERVAL_S}",
            self.scene.folder().join(&name).display(),
            self.mds_address
        );
        let program = self.programs.join("evolute-chunkserver");
        let process = Process::new(self.scene, &name, program, words(&arguments)).with_ready_file(self.scene);
        self.chunkservers.push(Chunkserver { address, process });
        Ok(())
    }

    /// Starts the MDS and the chunkservers, those that are not running.
    pub fn start_servers(&mut self) -> Result<()> {
        let servers =
            std::iter::once(&mut self.mds).chain(self.chunkservers.iter_mut().map(|it| &mut it.process));
        for process in servers {
            if !process.is_running() {
                process.start()?;
            }
        }
        Ok(())
    }

    /// Waits until every chunkserver that runs reports, and every copyset has all its replicas, caught up.
    pub fn wait_whole(&self) -> Result<()> {
        self.wait_whole_within(WHOLE_WITHIN)
    }

    /// The same, where replicas have to be made anew first.
    pub fn wait_repaired(&self) -> Result<()> {
        self.wait_whole_within(REPAIRED_WITHIN)
    }

    fn wait_whole_within(&self, patience: Duration) -> Result<()> {
        let running = |it: &Chunkserver| (it.address.to_string(), it.process.is_running());
        let running: BTreeMap<String, bool> = self.chunkservers.iter().map(running).collect();
        let mut seen = String::new();
        let whole = until("the cluster to be whole", patience, || {
            let status = match self.status() {
                Ok(status) => status,
                Err(error) => {
                    seen = format!("{error:#}");
                    return Ok(None);
                }
            };
            let reported = array(&status, "chunkservers").iter();
            // Also those that do not run must be known to be away: until then their copysets count as healthy.
            let online: BTreeMap<String, bool> = reported
                .filter_map(|it| Some((it["address"].as_str()?.to_owned(), it["online"].as_bool()?)))
                .collect();
            seen = format!("health {}, online {online:?}, {}", status["health"], status["reasons"]);
            Ok((status["health"] == "ok" && online == running).then_some(()))
        });
        whole.with_context(|| format!("at last: {seen}"))
    }

    pub fn create_volume(&self, name: &str, size: &str) -> Result<Value> {
        self.evolute(&["volume", "create", name, "--size", size])
    }

    pub fn import_volume(&self, name: &str, image: &Path) -> Result<Value> {
        let image = image.to_str().context("a path that is text")?;
        self.evolute(&["volume", "import", image, "--name", name])
    }

    pub fn status(&self) -> Result<Value> {
        self.evolute(&["cluster", "status"])
    }

    /// The data in a volume, as its owner is told, once that is known.
    pub fn used_bytes(&self, volume: &str) -> Result<Option<u64>> {
        let shown = self.evolute(&["volume", "show", volume])?;
        let used = shown.get("used_bytes").context("no `used_bytes` in volume show")?;
        Ok(used.as_u64())
    }

    /// What `du` says of each chunkserver's chunk files.
    pub fn chunk_file_bytes(&self) -> Result<Vec<u64>> {
        let folder = |number| self.scene.folder().join(format!("chunkserver{number}/store/chunks"));
        (1..=self.chunkservers.len()).map(|number| disk_bytes(&folder(number))).collect()
    }

    /// Runs the `evolute` tool and gives what it answers.
    pub fn evolute(&self, arguments: &[&str]) -> Result<Value> {
        let answer = Command::new(self.programs.join("evolute"))
            .args(["--mds", &self.mds_address.to_string(), "--json"])
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("cannot run evolute")?;
        let errors = String::from_utf8_lossy(&answer.stderr);
        ensure!(answer.status.success(), "evolute {}: {}", arguments.join(" "), errors.trim());
        // A command that shows progress prints one JSON value per event; the last one is the answer.
        let answers = serde_json::Deserializer::from_slice(&answer.stdout).into_iter::<Value>();
        let last = answers.last().transpose();
        let last = last.with_context(|| format!("evolute {} --json printed no JSON", arguments.join(" ")))?;
        last.with_context(|| format!("evolute {} --json printed nothing", arguments.join(" ")))
    }

    /// Starts a backend for the volume and gives its socket, which stays the same when it is started again.
    pub fn serve(&mut self, volume: &str) -> Result<PathBuf> {
        self.start_backend(volume, volume, "")
    }

    /// Starts another backend for a volume that is served already, as an operator does who believes the first one
    /// dead. [`Cluster::backend`] knows it as `VOLUME-successor`.
    pub fn take_over(&mut self, volume: &str) -> Result<PathBuf> {
        self.start_backend(&format!("{volume}-successor"), volume, "--takeover")
    }

    /// A backend for a volume that another one still has, as on the host that a guest is about to be moved to: it is started
    /// again and again by its unit until it gets the volume. Not started yet; and where its socket will be.
    pub fn waiting_backend(&self, volume: &str) -> Result<(Process, PathBuf)> {
        let name = format!("{volume}-next");
        let socket = self.socket(&name);
        let flags = format!("--socket-path {} --volume {volume}", socket.display());
        Ok((self.describe_backend(&name, &flags)?, socket))
    }

    /// Starts one backend for all of these, the disks of one guest, and gives their sockets. [`Cluster::backend`] knows it as
    /// `A+B`.
    pub fn serve_together(&mut self, volumes: &[&str]) -> Result<Vec<PathBuf>> {
        let sockets: Vec<PathBuf> = volumes.iter().map(|volume| self.socket(volume)).collect();
        let disks: Vec<String> = volumes
            .iter()
            .zip(&sockets)
            .map(|(volume, socket)| format!("--disk {volume}={}", socket.display()))
            .collect();
        self.run_backend(&volumes.join("+"), &disks.join(" "))?;
        Ok(sockets)
    }

    fn start_backend(&mut self, name: &str, volume: &str, more_flags: &str) -> Result<PathBuf> {
        let socket = self.socket(name);
        let flags = format!("--socket-path {} --volume {volume} {more_flags}", socket.display());
        self.run_backend(name, &flags)?;
        Ok(socket)
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.scene.folder().join(format!("{name}.sock"))
    }

    fn run_backend(&mut self, name: &str, flags: &str) -> Result<()> {
        let mut process = self.describe_backend(name, flags)?;
        process.start()?;
        self.backends.insert(name.to_string(), process);
        Ok(())
    }

    fn describe_backend(&self, name: &str, flags: &str) -> Result<Process> {
        let process_name = format!("backend-{name}");
        let arguments = format!(
            "--mds {} --queues 4 --state-dir {} {flags}",
            self.mds_address,
            folder(self.scene, &process_name)?
        );
        let program = self.programs.join("evolute-vhost");
        Ok(Process::new(self.scene, &process_name, program, words(&arguments)).with_ready_file(self.scene))
    }

    /// Stops the backend of a volume for good, cleanly.
    pub fn stop_serving(&mut self, volume: &str) -> Result<()> {
        self.backends.remove(volume).with_context(|| format!("{volume} is not served"))?.stop()
    }

    pub fn mds(&mut self) -> &mut Process {
        &mut self.mds
    }

    pub fn chunkservers(&mut self) -> impl ExactSizeIterator<Item = &mut Process> {
        self.chunkservers.iter_mut().map(|it| &mut it.process)
    }

    /// Counted from 0.
    pub fn chunkserver(&mut self, index: usize) -> &mut Process {
        &mut self.chunkservers[index].process
    }

    pub fn backend(&mut self, volume: &str) -> Result<&mut Process> {
        self.backends.get_mut(volume).with_context(|| format!("{volume} is not served"))
    }

    pub fn every_process(&mut self) -> impl Iterator<Item = &mut Process> {
        let chunkservers = self.chunkservers.iter_mut().map(|it| &mut it.process);
        std::iter::once(&mut self.mds).chain(chunkservers).chain(self.backends.values_mut())
    }

    /// How many copysets each chunkserver leads, as the control plane last heard.
    pub fn copysets_led(&self) -> Result<Vec<u64>> {
        let status = self.status()?;
        let reported = array(&status, "chunkservers");
        let led = |server: &Chunkserver| {
            let address = server.address.to_string();
            let report = reported.iter().find(|it| it["address"] == address.as_str());
            let report = report.with_context(|| format!("the control plane does not know {address}"))?;
            report["leaders"].as_u64().context("no `leaders` in cluster status")
        };
        self.chunkservers.iter().map(led).collect()
    }

    /// Stops everything in order, and holds every process to a clean exit.
    pub fn stop(mut self) -> Result<()> {
        for backend in self.backends.values_mut() {
            backend.stop()?;
        }
        for server in &mut self.chunkservers {
            server.process.stop()?;
        }
        self.mds.stop()
    }
}

fn array<'v>(value: &'v Value, key: &str) -> &'v [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// Flags as one would type them. Our folders hold no spaces; a TMPDIR that does is refused by the programs.
fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_string).collect()
}

fn folder(scene: &Scene, name: &str) -> Result<String> {
    let folder = scene.folder().join(name);
    std::fs::create_dir_all(&folder)?;
    Ok(folder.display().to_string())
}

/// Bytes that the files below a folder take up on their disk.
fn disk_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        // A file may go while we look: then it takes up nothing.
        bytes += match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => disk_bytes(&entry.path())?,
            Ok(metadata) => metadata.blocks() * 512,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error.into()),
        };
    }
    Ok(bytes)
}

/// Where the programs are: `EVOLUTE_PROGRAMS`, or beside this test program, or cargo's release folder.
fn programs() -> Result<PathBuf> {
    let mut places: Vec<PathBuf> = Vec::new();
    places.extend(std::env::var_os("EVOLUTE_PROGRAMS").map(PathBuf::from));
    if let Ok(test) = std::env::current_exe() {
        // target/release/deps/boots-1234 → target/release
        places.extend(test.ancestors().skip(1).take(2).map(Path::to_path_buf));
    }
    places.extend(std::env::var_os("CARGO_TARGET_DIR").map(|target| PathBuf::from(target).join("release")));
    let needed = ["evolute-mds", "evolute-chunkserver", "evolute-vhost", "evolute"];
    match places.iter().find(|place| needed.iter().all(|program| place.join(program).is_file())) {
        Some(place) => Ok(place.clone()),
        None => bail!("no place has all of {needed:?}, of {places:?}: cargo build --release --workspace"),
    }
}

/// Ports below the range from which the kernel takes those of outgoing connections. In that range a client that keeps
/// calling a server that is away may be given the server's own port, connect to itself, and keep the server out.
struct Ports {
    next: u16,
}

impl Ports {
    fn new() -> Ports {
        // Scattered by pid, so that a port of the test before, still in TIME_WAIT, is seldom met.
        let scatter = std::process::id() % 1000 * 10;
        Ports { next: 20_000 + u16::try_from(scatter).unwrap_or(0) }
    }

    fn free(&mut self) -> Result<SocketAddr> {
        while self.next < 32_000 {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.next));
            self.next += 1;
            if TcpListener::bind(address).is_ok() {
                return Ok(address);
            }
        }
        bail!("no free port between 20000 and 32000")
    }
}
