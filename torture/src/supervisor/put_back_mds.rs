//! The control plane's directory that is put back to an older copy, and what an operator does then (docs/operations.md).
//!
//! ```text
//!  MDS       stopped, copied, started ──── stopped, put back, started ─▶ held ─▶ has learnt ─▶ accepted
//!  operator            a volume is filled, another made and deleted                    looks, accepts, makes a new one
//! ```
//!
//! The copy has forgotten both volumes. The filled one must be there again with what is in it, and a new one must have
//! neither's number and hold zeroes.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::active::process;
use super::cluster::{Cluster, VOLUME, VOLUME_NUMBER};
use super::course::{Course, Next, Scene};
use super::network::Place;
use super::operator::{self, Evolute};
use super::process::Process;
use crate::driver::{Device, DeviceOptions, Outcome, Request};
use crate::random::Random;

/// Other faults go on, and all of them are healed once in a round.
const PATIENCE: Duration = Duration::from_secs(240);
const AGAIN_AFTER: Duration = Duration::from_millis(300);
/// Of each volume of ours, from its beginning.
const LOOKED_AT: usize = 1 << 20;
const SECTORS_AT_ONCE: u32 = 256;

#[derive(Debug)]
pub struct PutBackMds {
    copied: PathBuf,
    operator: Operator,
    step: Step,
}

#[derive(Debug)]
enum Step {
    Stopping,
    Filling(JoinHandle<Result<Forgotten>>),
    StoppingAgain(Forgotten),
    Accepting(JoinHandle<Result<String>>),
    Over,
}

/// Volumes that the copy does not have.
#[derive(Debug, Clone, Copy)]
struct Forgotten {
    filled: u64,
    deleted: u64,
}

/// Works on a thread of its own: what it asks for waits for whatever else is broken.
#[derive(Debug, Clone)]
struct Operator {
    evolute: Evolute,
    backend: PathBuf,
    network: Arc<File>,
    folder: PathBuf,
    number: usize,
    content: Arc<[u8]>,
}

pub fn begin(cluster: &mut Cluster, number: usize, random: &mut Random) -> Result<Box<dyn Course>> {
    process(cluster, Place::Mds).signal(Signal::TERM)?;
    let content: Vec<u8> = (0..LOOKED_AT / 8).flat_map(|_| (random.draw() | 1).to_le_bytes()).collect();
    let operator = Operator {
        evolute: cluster.evolute.clone(),
        backend: cluster.backends.program.clone(),
        network: cluster.network.namespace(Place::Backend),
        folder: cluster.folder.clone(),
        number,
        content: content.into(),
    };
    let copied = cluster.folder.join("copy-of-mds");
    Ok(Box::new(PutBackMds { copied, operator, step: Step::Stopping }))
}

impl Course for PutBackMds {
    fn go_on(&mut self, scene: &mut Scene<'_>) -> Result<Next> {
        let (mds, dir) = (Place::Mds, scene.cluster.folder.join("mds"));
        self.step = match std::mem::replace(&mut self.step, Step::Over) {
            Step::Stopping if scene.is_down(mds) => {
                operator::copy(&dir, &self.copied)?;
                scene.start(mds)?;
                Step::Filling(self.operator.clone().on_a_thread(|operator| operator.fill())?)
            }
            Step::Filling(work) if work.is_finished() => {
                let forgotten = done(work).context("with an MDS that was only started again")?;
                if scene.random.chance(50) {
                    scene.signal(mds, Signal::TERM)?;
                } else {
                    process(scene.cluster, mds).kill9()?;
                }
                Step::StoppingAgain(forgotten)
            }
            Step::StoppingAgain(forgotten) if scene.is_down(mds) => {
                operator::put_back(&self.copied, &dir)?;
                scene.start(mds)?;
                Step::Accepting(
                    self.operator.clone().on_a_thread(move |operator| operator.accept(forgotten))?,
                )
            }
            Step::Accepting(work) if work.is_finished() => {
                match done(work) {
                    Ok(words) => *scene.detail += &format!(", {words}"),
                    Err(error) => scene.fail(format!("the control plane was put back: {error:#}")),
                }
                return Ok(Next::Over);
            }
            step => step,
        };
        Ok(Next::GoesOn)
    }
}

fn done<T>(work: JoinHandle<Result<T>>) -> Result<T> {
    work.join().unwrap_or_else(|_| bail!("the operator panicked"))
}

impl Operator {
    fn on_a_thread<T: Send + 'static>(
        self,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        Ok(std::thread::Builder::new().name("operator".into()).spawn(move || work(&self))?)
    }

    /// Again and again: what is away comes back.
    fn until<T>(&self, what: &str, attempt: impl Fn() -> Result<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match attempt() {
                Err(error) if Instant::now() >= deadline => {
                    return Err(error.context(format!("{what}, for {PATIENCE:?}")));
                }
                Err(_) => std::thread::sleep(AGAIN_AFTER),
                done => return done,
            }
        }
    }

    /// Whether it went well or nobody knows: it is there, or it is done again.
    fn delete(&self, name: &str) -> Result<()> {
        self.until("a volume cannot be deleted", || {
            if self.volumes()?.iter().any(|volume| volume["name"] == name) {
                self.evolute.carry_out(&["volume", "delete", name, "--force"])?;
            }
            Ok(())
        })
    }

    fn volumes(&self) -> Result<Vec<Value>> {
        let list = self.evolute.ask(&["volume", "list"])?;
        list["volumes"].as_array().cloned().context("no `volumes` in the list")
    }

    fn create(&self, name: &str) -> Result<u64> {
        self.until("a volume cannot be made", || {
            if let Some(made) = self.volumes()?.iter().find(|volume| volume["name"] == name) {
                return id(made);
            }
            id(&self.evolute.carry_out(&["volume", "create", name, "--size", "1G"])?)
        })
    }

    fn fill(&self) -> Result<Forgotten> {
        let image = self.folder.join("content");
        File::create(&image)?.write_all(&self.content)?;
        let (image, filled) = (image.display().to_string(), format!("filled-{}", self.number));
        self.until("a volume cannot be filled", || {
            self.delete(&filled)?;
            self.evolute.carry_out(&["volume", "import", &image, "--name", &filled, "--size", "1G"])
        })?;
        let filled = self.create(&filled)?;
        let name = format!("deleted-{}", self.number);
        let deleted = self.create(&name)?;
        self.delete(&name)?;
        Ok(Forgotten { filled, deleted })
    }

    fn accept(&self, forgotten: Forgotten) -> Result<String> {
        let began = Instant::now();
        self.until("it has not learnt what it forgot", || {
            let reasons = self.evolute.ask(&["cluster", "status"])?["reasons"].to_string();
            ensure!(reasons.contains("has learnt from its chunkservers"), "{reasons}");
            Ok(())
        })?;
        let learnt = began.elapsed();
        let found = self.until("volumes cannot be listed", || self.volumes())?;
        let named = |name: &str| found.iter().find(|volume| volume["name"] == name);
        ensure!(
            named(VOLUME).is_some_and(|disk| disk["id"] == VOLUME_NUMBER),
            "the disk is not there: {found:?}"
        );
        let recovered = format!("recovered-{}", forgotten.filled);
        ensure!(
            named(&recovered).is_some_and(|volume| volume["id"] == forgotten.filled),
            "{recovered} is not there: {found:?}"
        );
        self.until("it cannot be accepted", || {
            self.evolute.carry_out(&["cluster", "accept-mds", "--yes"])?;
            let again = self.evolute.ask(&["cluster", "accept-mds"])?;
            ensure!(again["is_needed"] == false, "{again}");
            Ok(())
        })?;
        let new = format!("new-{}", self.number);
        let number = self.create(&new)?;
        ensure!(
            number > forgotten.filled.max(forgotten.deleted),
            "a new volume has number {number}, and after the copy was made {forgotten:?} had been given"
        );
        ensure!(
            self.content_of(&recovered)? == *self.content,
            "{recovered} holds something else than was written"
        );
        ensure!(self.content_of(&new)?.iter().all(|&byte| byte == 0), "a new volume holds something");
        self.delete(&recovered)?;
        self.delete(&new)?;
        Ok(format!("had learnt after {:.1} s; {forgotten:?}, new {number}", learnt.as_secs_f64()))
    }

    /// Through a backend of its own.
    fn content_of(&self, volume: &str) -> Result<Vec<u8>> {
        let socket = self.folder.join(format!("{volume}.sock"));
        let words = format!(
            "--socket-path {} --volume {volume} --mds {} --state-dir {}",
            socket.display(),
            self.evolute.mds,
            self.folder.join(volume).display()
        );
        let arguments = words.split_whitespace().map(Into::into).collect();
        let network = Some(self.network.clone());
        let mut backend = Process::new(volume, self.backend.clone(), arguments, &self.folder, network);
        backend.start()?;
        backend.wait_ready(PATIENCE)?;
        let content = read(socket)?;
        let status = backend.stop(PATIENCE)?;
        ensure!(status.success(), "the backend of {volume} ended with {status}");
        Ok(content)
    }
}

fn id(volume: &Value) -> Result<u64> {
    volume["id"].as_u64().with_context(|| format!("a volume without number: {volume}"))
}

fn read(socket: PathBuf) -> Result<Vec<u8>> {
    let options = DeviceOptions { socket, queues: 1, depth: 1, reconnect_every: AGAIN_AFTER, seed: 1 };
    let mut device = Device::connect(options)?;
    let deadline = Instant::now() + PATIENCE;
    let (mut content, mut answers) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; SECTORS_AT_ONCE as usize * 512];
    while content.len() < LOOKED_AT {
        device.submit(0, 0, content.len() as u64 / 512, Request::Read { sectors: SECTORS_AT_ONCE });
        device.tell();
        while answers.is_empty() {
            ensure!(Instant::now() < deadline, "a read was not answered for {PATIENCE:?}");
            device.wait(AGAIN_AFTER, &mut answers)?;
        }
        for answer in answers.drain(..) {
            ensure!(answer.outcome == Outcome::Done, "a read failed: {:?}", answer.outcome);
            content.extend_from_slice(device.data(answer, &mut buffer));
            device.release(answer);
        }
    }
    Ok(content)
}
