//! The cluster: an MDS, chunkservers in zones of their own, a backend; and what the control plane says about them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::coverage::{Led, Program};
use super::disk::Disk;
use super::fault::Fault;
use super::network::{Network, Place};
use super::operator::Evolute;
use super::options::Options;
use super::process::{Process, tool};
use super::proxy::{self, Proxy};
use super::takeover::Backends;
use crate::random::Random;

const PORT: u16 = 7700;
/// Where chunkservers listen that have moved, until they move back.
const OTHER_PORT: u16 = 7701;
/// Of another cluster.
const WRONG_MDS: &str = "wrong-mds";
const READY_WITHIN: Duration = Duration::from_secs(60);
pub const VOLUME: &str = "disk";
/// The first one of a cluster.
pub const VOLUME_NUMBER: u64 = 1;
/// How often the control plane is asked.
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// An answer older than this says nothing about who leads now: an election may have been since.
const FRESH: Duration = Duration::from_secs(2);

/// What the control plane said last.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// Copysets led, by chunkserver as we count.
    pub led: Vec<u64>,
    pub copysets: Vec<CopysetSeen>,
    /// Each replica's number, and its chunkserver.
    pub numbers: BTreeMap<u64, usize>,
    pub is_whole: bool,
    /// Every replica is there and nothing is learnt or made anew. Disks may be slow.
    pub is_complete: bool,
    /// Nothing else is the matter: a machine that does other things, too, has slow disks.
    pub is_only_slow: bool,
    pub words: String,
    pub leader_changes: u64,
    pub looks: u64,
    /// When it was asked for what it answered.
    pub asked: Option<Instant>,
}

impl View {
    /// What this chunkserver led a moment ago; none: that is not known.
    pub fn led_by(&self, index: usize) -> Option<Led> {
        self.is_fresh().then(|| Led { copysets: self.led[index], of: self.led.iter().sum() })
    }

    pub fn is_complete_now(&self) -> bool {
        self.is_complete && self.is_fresh()
    }

    /// The numbers of what this chunkserver holds.
    pub fn replicas_on(&self, index: usize) -> BTreeSet<u64> {
        self.numbers.iter().filter(|(_, on)| **on == index).map(|(number, _)| *number).collect()
    }

    fn is_fresh(&self) -> bool {
        self.asked.is_some_and(|asked| asked.elapsed() < FRESH)
    }
}

/// Chunkservers as we count.
#[derive(Debug, Clone)]
pub struct CopysetSeen {
    pub id: u64,
    pub replicas: Vec<usize>,
    pub leader: Option<usize>,
}

pub struct Cluster {
    pub mds: Process,
    pub backend: Process,
    pub chunkservers: Vec<Process>,
    pub disks: Vec<Disk>,
    /// The program, for a look at the files of one that does not run.
    pub chunkserver: PathBuf,
    pub folder: PathBuf,
    /// Of the first backend.
    pub socket: PathBuf,
    pub backends: Backends,
    pub evolute: Evolute,
    /// How often each fault has begun that hits all programs in turn.
    pub turns: BTreeMap<Fault, usize>,
    wrong_mds: Process,
    pub proxy: Option<Proxy>,
    watcher: Option<Watcher>,
    pub network: Network,
    /// Of the chunkservers, now.
    port: u16,
}

impl Cluster {
    pub fn start(options: &Options, folder: &Path, with_images: bool, with_proxy: bool) -> Result<Self> {
        let programs = options.programs()?;
        let network = Network::new(options.chunkservers, &[PORT, OTHER_PORT])?;
        let mds_address = SocketAddr::from((network.address(Place::Mds), PORT)).to_string();
        let process = |name: &str, program: &str, place, words: &str| {
            let arguments: Vec<OsString> = words.split_whitespace().map(OsString::from).collect();
            Process::new(name, programs.join(program), arguments, folder, Some(network.namespace(place)))
        };
        let dir = |name: &str| folder.join(name).display().to_string();
        let mds = process(
            "mds",
            "evolute-mds",
            Place::Mds,
            &format!("--data-dir {} --listen {mds_address} --report-interval-s 0.5", dir("mds")),
        );
        let wrong_mds = process(
            WRONG_MDS,
            "evolute-mds",
            Place::Mds,
            &format!(
                "--data-dir {} --listen {mds_address} --report-interval-s 0.5 --existing",
                dir(WRONG_MDS)
            ),
        );
        let network_of_backends = network.namespace(Place::Backend);
        let program = programs.join("evolute-vhost");
        let mut backends =
            Backends::new(program, folder.to_owned(), VOLUME, mds_address.clone(), network_of_backends);
        let (backend, socket) = backends.make(&[]);
        let mut disks = Vec::new();
        let mut chunkservers = Vec::new();
        for index in 0..options.chunkservers {
            let name = format!("chunkserver{index}");
            let disk = if with_images {
                Disk::image(&folder.join(&name), options.image_mib << 20, options.seed + index as u64)?
            } else {
                Disk::plain(&folder.join(&name))
            };
            let words = format!(
                "--data-dir {} --mds {mds_address} --listen {}:{PORT} --zone z{index} --server s{index} \
                 --heartbeat-interval-s 1 --log-file-mib 16 --overlay-mib 32",
                disk.data_dir().display(),
                network.address(Place::Chunkserver(index))
            );
            disks.push(disk);
            chunkservers.push(process(&name, "evolute-chunkserver", Place::Chunkserver(index), &words));
        }
        let evolute = Evolute { program: programs.join("evolute"), mds: mds_address, hub: network.hub() };
        let mut cluster = Self {
            mds,
            backend,
            chunkservers,
            disks,
            chunkserver: programs.join("evolute-chunkserver"),
            folder: folder.to_owned(),
            socket,
            backends,
            evolute,
            turns: BTreeMap::new(),
            wrong_mds,
            proxy: None,
            watcher: None,
            network,
            port: PORT,
        };
        cluster.mds.start()?;
        cluster.mds.wait_ready(READY_WITHIN)?;
        for chunkserver in &mut cluster.chunkservers {
            chunkserver.start()?;
            // In order, so that the ids the control plane gives are our counting plus one.
            chunkserver.wait_ready(READY_WITHIN)?;
        }
        let size = format!("{}M", options.area_mib.next_multiple_of(1024).max(1024));
        let deadline = Instant::now() + READY_WITHIN;
        while let Err(error) = cluster.evolute.ask(&["volume", "create", VOLUME, "--size", &size]) {
            if Instant::now() >= deadline {
                return Err(error.context("cannot create the volume"));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        if with_proxy {
            cluster.start_proxy(options.seed)?;
        }
        cluster.backend.start()?;
        cluster.backend.wait_ready(READY_WITHIN)?;
        cluster.watcher = Some(Watcher::start(cluster.evolute.clone(), options.chunkservers)?);
        Ok(cluster)
    }

    /// Between every backend and the chunkservers, from its first connection on.
    fn start_proxy(&mut self, seed: u64) -> Result<()> {
        let places: Vec<Place> = (0..self.chunkservers.len()).map(Place::Chunkserver).collect();
        let addresses: Vec<_> = places.iter().map(|&place| self.network.address(place)).collect();
        self.proxy = Some(Proxy::start(self.network.namespace(Place::Backend), &addresses, PORT, seed)?);
        self.network.redirect(Place::Backend, &places, proxy::PORT, proxy::MARK)
    }

    /// From their next start on all chunkservers are elsewhere. Says where.
    pub fn move_chunkservers(&mut self) -> String {
        self.port = if self.port == PORT { OTHER_PORT } else { PORT };
        for (index, chunkserver) in self.chunkservers.iter_mut().enumerate() {
            let address = self.network.address(Place::Chunkserver(index));
            chunkserver.set("--listen", &format!("{address}:{}", self.port));
        }
        if let Some(proxy) = &self.proxy {
            proxy.move_to(self.port);
        }
        format!("to port {}", self.port)
    }

    /// As somebody made it who wanted another cluster.
    pub fn wrong_mds(&mut self) -> Result<&mut Process> {
        let dir = self.folder.join(WRONG_MDS);
        if !dir.exists() {
            let program = self.chunkserver.with_file_name("evolute-mds").display().to_string();
            tool(&program, &["init", "--data-dir", &dir.display().to_string()])?;
        }
        Ok(&mut self.wrong_mds)
    }

    /// Whose turn it is to be hit by this fault, of all programs.
    pub fn turn(&self, fault: Fault, random: &mut Random) -> Place {
        match self.turns.get(&fault).copied().unwrap_or(0) % Program::ALL.len() {
            0 => Place::Chunkserver(random.index(self.chunkservers.len())),
            1 => Place::Backend,
            _ => Place::Mds,
        }
    }

    pub fn view(&self) -> View {
        let watcher = self.watcher.as_ref().expect("started with the cluster");
        watcher.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the control plane, asked after now, says that everything is well. Gives what it said at last.
    pub fn wait_whole(&self, within: Duration) -> (bool, String) {
        let (deadline, from) = (Instant::now() + within, self.view().looks);
        loop {
            let view = self.view();
            if view.is_whole && view.looks > from + 1 {
                return (true, view.words);
            }
            if Instant::now() >= deadline {
                return (false, view.words);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn processes(&mut self) -> impl Iterator<Item = &mut Process> {
        [&mut self.mds, &mut self.wrong_mds, &mut self.backend]
            .into_iter()
            .chain(self.chunkservers.iter_mut())
    }

    /// In order, each held to a clean end. What was not clean.
    pub fn stop(mut self) -> Vec<String> {
        self.watcher = None;
        let mut unclean = Vec::new();
        let chunkservers = self.chunkservers.iter_mut();
        for process in [&mut self.backend].into_iter().chain(chunkservers).chain([&mut self.mds]) {
            match process.stop(Duration::from_secs(20)) {
                Ok(status) if status.success() => {}
                Ok(status) => unclean.push(format!("{} ended with {status}", process.name)),
                Err(error) => unclean.push(format!("{error:#}")),
            }
        }
        unclean
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Processes before the disks under them.
        self.watcher = None;
        for process in self.processes() {
            let _ = process.kill9();
        }
    }
}

/// Asks the control plane again and again, on a thread of its own: it may be stopped, and then answers late.
struct Watcher {
    view: Arc<Mutex<View>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    fn start(evolute: Evolute, chunkservers: usize) -> Result<Self> {
        let view = Arc::new(Mutex::new(View { led: vec![0; chunkservers], ..View::default() }));
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, stopped) = (view.clone(), stop.clone());
        let thread = std::thread::Builder::new().name("watcher".into()).spawn(move || {
            let mut leaders: BTreeMap<u64, (usize, u64)> = BTreeMap::new();
            while !stopped.load(Ordering::Relaxed) {
                let asked = Instant::now();
                let answer = evolute.ask(&["cluster", "status"]);
                let mut view = seen.lock().unwrap_or_else(PoisonError::into_inner);
                match answer.and_then(|status| look(&status, &mut leaders, &mut view)) {
                    Ok(()) => view.asked = Some(asked),
                    Err(error) => {
                        (view.is_whole, view.is_complete, view.is_only_slow) = (false, false, false);
                        view.words = format!("{error:#}");
                    }
                }
                view.looks += 1;
                drop(view);
                std::thread::sleep(LOOK_EVERY);
            }
        })?;
        Ok(Self { view, stop, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn look(status: &Value, leaders: &mut BTreeMap<u64, (usize, u64)>, view: &mut View) -> Result<()> {
    let copysets = status["copysets"].as_array().context("no `copysets` in cluster status")?;
    let servers = status["chunkservers"].as_array().context("no `chunkservers` in cluster status")?;
    let online = servers.iter().filter(|server| server["online"] == true).count();
    let mut led = vec![0; view.led.len()];
    let (mut seen, mut numbers) = (Vec::new(), BTreeMap::new());
    // The control plane counts from 1.
    let index = |id: &Value| {
        let index = usize::try_from(id.as_u64()?).ok()?.checked_sub(1)?;
        (index < view.led.len()).then_some(index)
    };
    for copyset in copysets {
        let (Some(id), Some(term)) = (copyset["id"].as_u64(), copyset["term"].as_u64()) else {
            bail!("a copyset without id or term");
        };
        let replicas = copyset["replicas"].as_array().context("a copyset without replicas")?;
        let on = |replica: &Value| Some((replica["replica"].as_u64()?, index(&replica["chunkserver"])?));
        let replicas: Vec<_> = replicas.iter().filter_map(on).collect();
        numbers.extend(replicas.iter().copied());
        let replicas = replicas.into_iter().map(|(_, on)| on).collect();
        let leader = index(&copyset["leader_chunkserver"]);
        seen.push(CopysetSeen { id, replicas, leader });
        let Some(leader) = leader else { continue };
        led[leader] += 1;
        let known = leaders.insert(id, (leader, term));
        if known.is_some_and(|known| known != (leader, term)) {
            view.leader_changes += 1;
        }
    }
    view.copysets = seen;
    view.numbers = numbers;
    view.led = led;
    let well = |of: &Value| of["health"] == "ok";
    let held = status["reasons"].to_string().contains("this MDS");
    view.is_complete = online == view.led.len()
        && !copysets.is_empty()
        && copysets.iter().all(well)
        && status["repairs"].as_array().is_some_and(Vec::is_empty)
        && !held;
    let reasons = status["reasons"].as_array().map_or(&[][..], Vec::as_slice);
    view.is_only_slow = view.is_complete
        && reasons
            .iter()
            .all(|reason| reason.as_str().is_some_and(|words| words.contains("the disk is slow")));
    view.is_whole = status["health"] == "ok" && online == view.led.len();
    view.words = format!("health {}, {online} online, {}", status["health"], status["reasons"]);
    Ok(())
}
