//! The processes of a dev cluster and their order: the control plane, the chunkservers, the volumes, the backends;
//! and down the other way round, so that a backend never loses the replicas under it.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use evolute_protocol::rpc::{ClusterStatus, ErrorWord, Health, Volume};
use futures::future::try_join_all;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::args::DevVolume;
use crate::dev::Programs;
use crate::dev::layout::{Kept, Layout};
use crate::dev::lines::Lines;
use crate::dev::process::{Event, Process, Spec};
use crate::failure::Failure;
use crate::mds::Mds;
use crate::size::{both, shortest};

const CHUNKSERVERS: usize = 3;
const STATUS_POLL: Duration = Duration::from_millis(100);
/// A cluster that serves but has not quite settled (a replica still joins) is waited for this long.
const SETTLE_MAX: Duration = Duration::from_secs(10);
/// The name of the process that serves all volumes.
const ONE_BACKEND: &str = "backend";

/// What the person asked for.
#[derive(Debug)]
pub struct Wanted {
    pub programs: Programs,
    pub volumes: Vec<DevVolume>,
    /// One process for all volumes.
    pub one_backend: bool,
    pub socket_mode: Option<String>,
    pub socket_group: Option<String>,
    pub copysets_min: u32,
    pub start_timeout: Duration,
    pub restarts_max: Option<u32>,
}

#[derive(Debug)]
pub struct Cluster<P> {
    layout: Layout,
    kept: Kept,
    wanted: Wanted,
    events: mpsc::UnboundedSender<Event>,
    progress: P,
    /// In the order in which they were started.
    processes: Vec<Process>,
}

/// A running cluster, as `--json` and `--ready-file` show it. The shape is in docs/cli.md.
#[derive(Debug, Clone, Serialize)]
pub struct Running {
    pub pid: u32,
    pub dir: PathBuf,
    pub data: PathBuf,
    pub mds: RunningProcess,
    pub chunkservers: Vec<RunningChunkserver>,
    pub volumes: Vec<RunningVolume>,
}

#[derive(Debug, Clone, Serialize)]
pub struct RunningProcess {
    pub name: String,
    /// 0: it died too often and stays down.
    pub pid: u32,
    pub address: String,
    pub data: PathBuf,
    pub log: PathBuf,
}

#[derive(Debug, Clone, Serialize)]
pub struct RunningChunkserver {
    pub zone: String,
    #[serde(flatten)]
    pub process: RunningProcess,
}

#[derive(Debug, Clone, Serialize)]
pub struct RunningVolume {
    pub volume: String,
    pub size_bytes: u64,
    pub socket: PathBuf,
    pub name: String,
    /// 0: it died too often and stays down.
    pub pid: u32,
    pub log: PathBuf,
    #[serde(flatten)]
    pub lines: Lines,
}

impl<P: Fn(&str)> Cluster<P> {
    pub fn new(
        layout: Layout,
        kept: Kept,
        wanted: Wanted,
        events: mpsc::UnboundedSender<Event>,
        progress: P,
    ) -> Self {
        Self { layout, kept, wanted, events, progress, processes: Vec::new() }
    }

    /// Everything up and ready, or the first thing that failed. Not cancel-safe as a whole, but [`Cluster::stop`]
    /// stops whatever a cancelled start left running.
    pub async fn start(&mut self) -> Result<Running, Failure> {
        let deadline = Instant::now() + self.wanted.start_timeout;
        let mds = self.start_mds(deadline).await?;
        let chunkservers = self.start_chunkservers(deadline).await?;
        let mut client = Mds::new(&mds.address, Duration::from_secs(10))?;
        (self.progress)("waiting for the copysets");
        wait_until_settled(&mut client, deadline).await?;
        let volumes = self.volumes(&mut client, deadline).await?;
        let volumes = self.start_backends(volumes, deadline).await?;
        Ok(Running {
            pid: std::process::id(),
            dir: self.layout.dir.clone(),
            data: self.layout.data(&self.kept),
            mds,
            chunkservers,
            volumes,
        })
    }

    /// The backends first, the control plane last. Says what was not clean.
    pub async fn stop(&mut self) -> Vec<String> {
        let mut unclean = Vec::new();
        while let Some(process) = self.processes.pop() {
            // Those of one kind go together; the next kind only after them.
            let kind = kind(&process.name).to_owned();
            let mut group = vec![process];
            while let Some(other) = self.processes.pop_if(|p| crate::dev::cluster::kind(&p.name) == kind) {
                group.push(other);
            }
            let ends = futures::future::join_all(group.into_iter().map(Process::stop)).await;
            unclean.extend(ends.into_iter().flatten());
        }
        unclean
    }

    async fn start_mds(&mut self, deadline: Instant) -> Result<RunningProcess, Failure> {
        (self.progress)("starting the control plane");
        let address = loopback(self.kept.mds_port);
        let data = self.server_data("mds")?;
        let arguments = arguments(&[
            ("--data-dir", data.clone().into()),
            ("--listen", address.clone().into()),
            ("--copysets-min", self.wanted.copysets_min.to_string().into()),
        ]);
        let spec = self.spec("mds", self.wanted.programs.mds.clone(), arguments, deadline);
        self.run(spec, address, data).await
    }

    async fn start_chunkservers(&mut self, deadline: Instant) -> Result<Vec<RunningChunkserver>, Failure> {
        (self.progress)("starting three chunkservers");
        let mut running = Vec::new();
        let mut starts = Vec::new();
        for i in 0..CHUNKSERVERS {
            let (number, address) = (i + 1, loopback(self.kept.chunkserver_ports[i]));
            let name = format!("chunkserver-{number}");
            let zone = format!("z{number}");
            let data = self.server_data(&name)?;
            let is_new = !data.exists();
            let arguments = arguments(&[
                ("--data-dir", data.clone().into()),
                ("--mds", loopback(self.kept.mds_port).into()),
                ("--listen", address.clone().into()),
                ("--zone", zone.clone().into()),
                ("--server", format!("dev-{number}").into()),
            ]);
            let spec = self.spec(&name, self.wanted.programs.chunkserver.clone(), arguments, deadline);
            let log = spec.log.clone();
            let mut chunkserver =
                RunningChunkserver { zone, process: RunningProcess { name, pid: 0, address, data, log } };
            let start = Process::start(spec, self.events.clone());
            if is_new {
                // The control plane numbers them as they come: new ones one by one, so that names and numbers agree.
                let (process, pid) = start.await?;
                chunkserver.process.pid = pid;
                self.processes.push(process);
            } else {
                starts.push(async move { start.await.map(|(process, pid)| (i, process, pid)) });
            }
            running.push(chunkserver);
        }
        for (i, process, pid) in try_join_all(starts).await? {
            running[i].process.pid = pid;
            self.processes.push(process);
        }
        Ok(running)
    }

    async fn run(&mut self, spec: Spec, address: String, data: PathBuf) -> Result<RunningProcess, Failure> {
        let (name, log) = (spec.name.clone(), spec.log.clone());
        let (process, pid) = Process::start(spec, self.events.clone()).await?;
        self.processes.push(process);
        Ok(RunningProcess { name, pid, address, data, log })
    }

    /// Every kept volume as the control plane knows it; created where asked for and absent.
    async fn volumes(&mut self, client: &mut Mds, deadline: Instant) -> Result<Vec<Volume>, Failure> {
        let mut volumes = Vec::new();
        for name in self.kept.volumes.clone() {
            let asked = self.wanted.volumes.iter().find(|wanted| wanted.name == name);
            match client.show(&name).await {
                Ok(volume) => {
                    expect_size(&volume, asked)?;
                    volumes.push(volume);
                }
                Err(Failure::Refused { word: ErrorWord::NotFound, .. }) => match asked {
                    Some(DevVolume { size: Some(size), .. }) => {
                        (self.progress)(&format!("creating volume {name}, {}", both(size.0)));
                        volumes.push(create(client, &name, size.0, deadline).await?);
                    }
                    Some(DevVolume { size: None, .. }) => {
                        self.forget(&name)?;
                        return Err(Failure::Usage {
                            what: format!("there is no volume {name} yet"),
                            next: Some(format!("give its size to create it: --volume {name}:10G")),
                        });
                    }
                    None => {
                        (self.progress)(&format!(
                            "volume {name} was deleted meanwhile: it is not served any more"
                        ));
                        self.forget(&name)?;
                    }
                },
                Err(failure) => return Err(failure),
            }
        }
        Ok(volumes)
    }

    fn forget(&mut self, volume: &str) -> Result<(), Failure> {
        self.kept.volumes.retain(|kept| kept != volume);
        self.layout.keep(&self.kept)
    }

    async fn start_backends(
        &mut self,
        volumes: Vec<Volume>,
        deadline: Instant,
    ) -> Result<Vec<RunningVolume>, Failure> {
        let mut running = Vec::new();
        for volume in volumes {
            let name = match self.wanted.one_backend {
                true => ONE_BACKEND.to_owned(),
                false => format!("backend-{}", volume.name),
            };
            let socket = self.layout.socket(&volume.name)?;
            running.push(RunningVolume {
                lines: Lines::new(running.len(), &volume.name, &socket),
                volume: volume.name,
                size_bytes: volume.size_bytes,
                socket,
                log: self.layout.log(&name),
                name,
                pid: 0,
            });
        }
        let mut starts = Vec::new();
        for served in running.chunk_by(|one, next| one.name == next.name) {
            let spec = self.backend(served, deadline)?;
            starts.push(Process::start(spec, self.events.clone()));
        }
        if !starts.is_empty() {
            (self.progress)("starting the backends");
        }
        let processes = try_join_all(starts).await?;
        for (process, pid) in processes {
            for volume in running.iter_mut().filter(|volume| volume.name == process.name) {
                volume.pid = pid;
            }
            self.processes.push(process);
        }
        Ok(running)
    }

    /// The process that serves these.
    fn backend(&self, served: &[RunningVolume], deadline: Instant) -> Result<Spec, Failure> {
        let mds = ("--mds", loopback(self.kept.mds_port).into());
        let mut arguments = match served {
            [only] if !self.wanted.one_backend => arguments(&[
                ("--socket-path", only.socket.clone().into()),
                ("--volume", only.volume.clone().into()),
                mds,
                ("--state-dir", self.data(&format!("backends/{}", only.volume))?.into()),
            ]),
            several => {
                let mut pairs = vec![mds, ("--state-dir", self.data("backends")?.into())];
                for volume in several {
                    let mut disk = OsString::from(format!("{}=", volume.volume));
                    disk.push(&volume.socket);
                    pairs.push(("--disk", disk));
                }
                arguments(&pairs)
            }
        };
        let access =
            [("--socket-mode", &self.wanted.socket_mode), ("--socket-group", &self.wanted.socket_group)];
        for (flag, value) in access {
            arguments.extend(value.iter().flat_map(|value| [flag.into(), value.into()]));
        }
        Ok(self.spec(&served[0].name, self.wanted.programs.vhost.clone(), arguments, deadline))
    }

    /// A directory for somebody's data, made if absent.
    fn data(&self, of: &str) -> Result<PathBuf, Failure> {
        let path = self.layout.data(&self.kept).join(of);
        fs::create_dir_all(&path).map_err(Failure::io(format!("making {}", path.display())))?;
        Ok(path)
    }

    /// Where a server is to keep its data: it makes the directory itself, and refuses one that is there and empty,
    /// as what a start that was interrupted leaves may be.
    fn server_data(&self, of: &str) -> Result<PathBuf, Failure> {
        let path = self.data(of)?;
        match fs::remove_dir(&path) {
            Err(error) if error.kind() != ErrorKind::DirectoryNotEmpty => {
                Err(Failure::io(format!("looking into {}", path.display()))(error))
            }
            _ => Ok(path),
        }
    }

    fn spec(&self, name: &str, program: PathBuf, arguments: Vec<OsString>, deadline: Instant) -> Spec {
        Spec {
            name: name.to_owned(),
            program,
            arguments,
            log: self.layout.log(name),
            ready_file: self.layout.ready_file(name),
            ready_within: deadline.saturating_duration_since(Instant::now()),
            restarts_max: self.wanted.restarts_max,
        }
    }
}

impl Running {
    pub fn set_pid(&mut self, name: &str, pid: u32) {
        let chunkservers = self.chunkservers.iter_mut().map(|c| &mut c.process);
        if let Some(process) = chunkservers.chain([&mut self.mds]).find(|process| process.name == name) {
            process.pid = pid;
        }
        for volume in self.volumes.iter_mut().filter(|volume| volume.name == name) {
            volume.pid = pid;
        }
    }

    pub fn words(&self) -> String {
        let mds = &self.mds.address;
        let mut text =
            format!("\nThe cluster under {} is up. Its control plane is {mds}:\n", self.dir.display());
        text.push_str(&format!("  evolute --mds {mds} cluster status\n"));
        for volume in &self.volumes {
            text.push_str(&format!(
                "\nVolume {}, {}, at {}\n\n{}\n",
                volume.volume,
                both(volume.size_bytes),
                volume.socket.display(),
                volume.lines.words()
            ));
        }
        if self.volumes.is_empty() {
            text.push_str("\nNo volume is served; start it with --volume NAME:SIZE to have one.\n");
        }
        text.push_str("\nCtrl-C stops it; the same command finds its data again.");
        text
    }
}

/// `mds`, `chunkserver`, `backend`.
fn kind(name: &str) -> &str {
    name.split('-').next().unwrap_or(name)
}

fn loopback(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

fn arguments(pairs: &[(&str, OsString)]) -> Vec<OsString> {
    pairs.iter().flat_map(|(flag, value)| [OsString::from(flag), value.clone()]).collect()
}

fn expect_size(volume: &Volume, asked: Option<&DevVolume>) -> Result<(), Failure> {
    match asked.and_then(|wanted| wanted.size) {
        Some(size) if size.0 != volume.size_bytes => Err(Failure::Usage {
            what: format!(
                "volume {} exists with {}, not {}",
                volume.name,
                shortest(volume.size_bytes),
                shortest(size.0)
            ),
            next: Some(format!("leave the size out (--volume {}), or choose another name", volume.name)),
        }),
        _ => Ok(()),
    }
}

/// Copysets may still be on their way although the chunkservers are there.
async fn create(client: &mut Mds, name: &str, size: u64, deadline: Instant) -> Result<Volume, Failure> {
    loop {
        match client.create(name, size, 0).await {
            Err(Failure::Refused { word: ErrorWord::NoPlacement, .. }) if Instant::now() < deadline => {
                sleep(STATUS_POLL).await;
            }
            answer => return answer,
        }
    }
}

/// All chunkservers online and all copysets led; well, if that comes within [`SETTLE_MAX`].
async fn wait_until_settled(client: &mut Mds, deadline: Instant) -> Result<(), Failure> {
    let mut serving_since = None;
    loop {
        let status = client.status().await?;
        let online = status.chunkservers.iter().filter(|c| c.online).count();
        let serves = online >= CHUNKSERVERS
            && !status.copysets.is_empty()
            && status.copysets.iter().all(|c| matches!(c.health(), Health::Ok | Health::Degraded));
        if serves {
            let since = *serving_since.get_or_insert_with(Instant::now);
            if status.health() == Health::Ok || since.elapsed() >= SETTLE_MAX {
                return Ok(());
            }
        }
        if Instant::now() >= deadline {
            return Err(Failure::Dev {
                what: unsettled(&status, online),
                next: "the logs say more".to_owned(),
            });
        }
        sleep(STATUS_POLL).await;
    }
}

fn unsettled(status: &ClusterStatus, online: usize) -> String {
    let led = status.copysets.iter().filter(|c| c.leader_chunkserver != 0).count();
    let mut text = format!(
        "the cluster did not settle in time: {online} of {CHUNKSERVERS} chunkservers online, {led} of {} copysets led",
        status.copysets.len()
    );
    for reason in &status.reasons {
        text.push_str(&format!("\n    {reason}"));
    }
    text
}
