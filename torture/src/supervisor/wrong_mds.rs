//! Another cluster's control plane, for a while, at the address of the right one.

use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::Signal;

use super::active::process;
use super::cluster::Cluster;
use super::course::{Course, Next, Scene};
use super::network::Place;
use super::process::State;

/// Programs ask every second or so.
const THERE_MS: u64 = 3000;
const ENDS_WITHIN: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub struct WrongMds {
    step: Step,
    until: Instant,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    RightOneStops,
    WrongOneServes,
    WrongOneStops,
}

pub fn begin(cluster: &mut Cluster) -> Result<Box<dyn Course>> {
    process(cluster, Place::Mds).signal(Signal::TERM)?;
    Ok(Box::new(WrongMds { step: Step::RightOneStops, until: Instant::now() }))
}

impl Course for WrongMds {
    fn go_on(&mut self, scene: &mut Scene<'_>) -> Result<Next> {
        let is_time = Instant::now() >= self.until;
        match self.step {
            Step::RightOneStops if scene.is_down(Place::Mds) => {
                scene.cluster.wrong_mds()?.start()?;
                self.until = scene.in_about(THERE_MS);
                self.step = Step::WrongOneServes;
            }
            Step::WrongOneServes => {
                let wrong = scene.cluster.wrong_mds()?;
                if let Some(status) = wrong.ended()? {
                    scene.fail(format!("the MDS of another cluster ended by itself ({status})"));
                    scene.start(Place::Mds)?;
                    return Ok(Next::Over);
                }
                if is_time && wrong.is_ready() {
                    wrong.signal(Signal::TERM)?;
                    self.until = Instant::now() + ENDS_WITHIN;
                    self.step = Step::WrongOneStops;
                }
            }
            Step::WrongOneStops => {
                let wrong = scene.cluster.wrong_mds()?;
                match wrong.ended()? {
                    Some(status) if !status.success() => {
                        scene.fail(format!("the MDS of another cluster ended with {status}"));
                    }
                    None if wrong.state() != State::Down && !is_time => return Ok(Next::GoesOn),
                    None if wrong.state() != State::Down => {
                        wrong.kill9()?;
                        scene.fail(format!("the MDS of another cluster did not stop within {ENDS_WITHIN:?}"));
                    }
                    _ => {}
                }
                scene.start(Place::Mds)?;
                return Ok(Next::Over);
            }
            Step::RightOneStops => {}
        }
        Ok(Next::GoesOn)
    }
}
