//! A chunkserver's directory that is put back to an older copy.
//!
//! ```text
//!  hit      stopped, copied, started ─── acknowledges ─── stopped, put back, started ─ started again ───▶ made anew
//!  absent   ──────────────────── stands still ─────────────────────┘ goes on
//!  witness  ────────────────────── acknowledges ──── stands still ────────────────────── goes on
//!  MDS      (every other time)                       stands still ──────────── goes on
//! ```
//!
//! While the witness stands still it alone has what was acknowledged since the copy was made: whoever lets the copy vote
//! has a majority that lacks it. So nobody may serve then, and everything must be there when it goes on.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustix::process::Signal;

use super::active::process;
use super::cluster::Cluster;
use super::course::{Course, Next, Scene};
use super::network::Place;
use super::operator;
use crate::random::Random;

/// To be complete after a restart, with other faults going on.
const COMPLETE_WITHIN: Duration = Duration::from_secs(120);
/// For the replicas to be made anew, other faults that go on meanwhile included.
const ANEW_WITHIN: Duration = Duration::from_secs(240);
/// So much is acknowledged without the absent one, or so long passes.
const ACKS_WITHOUT: u64 = 150;
const WITHOUT_AT_MOST: Duration = Duration::from_secs(6);
/// Several times what an election takes, at least, and twice that at most.
const ELECTED_AFTER_MS: u64 = 2000;

#[derive(Debug)]
pub struct PutBack {
    hit: usize,
    witness: Place,
    absent: Place,
    mds_is_away: bool,
    copied: PathBuf,
    step: Step,
    until: Instant,
    /// Acknowledged, and looks at the control plane, when this step began.
    acked: u64,
    looks: u64,
    /// Of the one that is hit, by number, before it was put back.
    replicas: BTreeSet<u64>,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Stopping,
    Copied,
    WithoutTheAbsent,
    StoppingAgain,
    PutBack,
    StartedAgain,
    MdsIsBack,
    MadeAnew,
}

/// Who is hit, who is the witness, who is absent; and the MDS, every other time. None: somebody is hit already.
pub fn places(
    cluster: &Cluster,
    free: &[usize],
    mds_is_free: bool,
    random: &mut Random,
) -> Option<Vec<Place>> {
    if free.len() < cluster.chunkservers.len() {
        return None;
    }
    let (hit, turn) = (random.index(free.len()), 1 + random.index(2));
    let places = [0, turn, 3 - turn].map(|on| Place::Chunkserver(free[(hit + on) % free.len()]));
    let mds = (mds_is_free && random.chance(50)).then_some(Place::Mds);
    Some(places.into_iter().chain(mds).collect())
}

pub fn begin(cluster: &mut Cluster, places: &[Place]) -> Result<Box<dyn Course>> {
    let [place @ Place::Chunkserver(hit), witness, absent, ref more @ ..] = *places else {
        bail!("{places:?} are not those that are needed");
    };
    process(cluster, place).signal(Signal::TERM)?;
    Ok(Box::new(PutBack {
        hit,
        witness,
        absent,
        mds_is_away: !more.is_empty(),
        copied: cluster.folder.join(format!("copy-of-chunkserver{hit}")),
        step: Step::Stopping,
        until: Instant::now(),
        acked: 0,
        looks: 0,
        replicas: BTreeSet::new(),
    }))
}

impl Course for PutBack {
    fn go_on(&mut self, scene: &mut Scene<'_>) -> Result<Next> {
        let (hit, is_time) = (Place::Chunkserver(self.hit), Instant::now() >= self.until);
        match self.step {
            Step::Stopping if scene.is_down(hit) => {
                operator::copy(&scene.cluster.disks[self.hit].data_dir(), &self.copied)?;
                scene.start(hit)?;
                self.looks = scene.cluster.view().looks;
                self.until = Instant::now() + COMPLETE_WITHIN;
                self.step = Step::Copied;
            }
            Step::Copied => {
                let view = scene.cluster.view();
                // What the control plane has not seen start it cannot miss.
                if scene.is_ready(hit) && view.is_complete && view.looks > self.looks + 1 {
                    self.replicas = view.replicas_on(self.hit);
                    scene.signal(self.absent, Signal::STOP)?;
                    self.acked = scene.acked;
                    self.until = Instant::now() + WITHOUT_AT_MOST;
                    self.step = Step::WithoutTheAbsent;
                } else if is_time {
                    std::fs::remove_dir_all(&self.copied)?;
                    return Ok(Next::Missed);
                }
            }
            Step::WithoutTheAbsent if is_time || scene.acked >= self.acked + ACKS_WITHOUT => {
                *scene.detail += &format!(", {} acknowledged without the absent", scene.acked - self.acked);
                if scene.random.chance(50) {
                    scene.signal(hit, Signal::TERM)?;
                } else {
                    process(scene.cluster, hit).kill9()?;
                }
                self.step = Step::StoppingAgain;
            }
            Step::StoppingAgain if scene.is_down(hit) => {
                scene.signal(self.witness, Signal::STOP)?;
                if self.mds_is_away {
                    scene.signal(Place::Mds, Signal::STOP)?;
                }
                operator::put_back(&self.copied, &scene.cluster.disks[self.hit].data_dir())?;
                scene.start(hit)?;
                scene.signal(self.absent, Signal::CONT)?;
                self.wait(scene, Step::PutBack);
            }
            // Whatever it knows of itself it must know after one more start.
            Step::PutBack if is_time => {
                process(scene.cluster, hit).kill9()?;
                scene.start(hit)?;
                self.wait(scene, Step::StartedAgain);
            }
            Step::StartedAgain if is_time => {
                if self.mds_is_away {
                    scene.signal(Place::Mds, Signal::CONT)?;
                }
                self.wait(scene, Step::MdsIsBack);
            }
            Step::MdsIsBack if is_time => {
                scene.signal(self.witness, Signal::CONT)?;
                *scene.places = vec![hit];
                self.looks = scene.cluster.view().looks;
                self.until = Instant::now() + ANEW_WITHIN;
                self.step = Step::MadeAnew;
            }
            Step::MadeAnew => return Ok(self.is_made_anew(scene, is_time)),
            _ => {}
        }
        Ok(Next::GoesOn)
    }
}

impl PutBack {
    fn wait(&mut self, scene: &mut Scene<'_>, step: Step) {
        self.until = scene.in_about(ELECTED_AFTER_MS);
        self.step = step;
    }

    fn is_made_anew(&self, scene: &mut Scene<'_>, is_time: bool) -> Next {
        let view = scene.cluster.view();
        let replicas = view.replicas_on(self.hit);
        if view.looks > self.looks + 1 && !replicas.is_empty() && replicas.is_disjoint(&self.replicas) {
            return Next::Over;
        }
        if !is_time {
            return Next::GoesOn;
        }
        scene.fail(format!(
            "chunkserver{} was put back to an older copy, and its replicas {:?} were not made anew within {ANEW_WITHIN:?}: {}",
            self.hit,
            replicas.intersection(&self.replicas).collect::<Vec<_>>(),
            view.words
        ));
        Next::Over
    }
}
