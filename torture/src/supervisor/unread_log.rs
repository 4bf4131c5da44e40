//! A program whose stderr is a full pipe that nobody reads.
//!
//! It is started so: it has to get ready, serve and, every other time, end while whoever reads its log stands still.
//! Of its threads the log's own one may wait for that, and no other.

use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::Signal;

use super::active::process;
use super::cluster::Cluster;
use super::course::{Course, Next, Scene};
use super::network::Place;

const STANDS_STILL_MS: u64 = 4000;
/// Others may be broken by which it has to wait.
const READY_WITHIN: Duration = Duration::from_secs(150);
const ENDS_WITHIN: Duration = Duration::from_secs(20);
/// Of the thread that writes what all others say.
const WRITER: &str = "log";

#[derive(Debug)]
pub struct UnreadLog {
    place: Place,
    step: Step,
    until: Instant,
    /// The log's thread was seen to wait.
    is_full: bool,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Stopping,
    StandsStill,
    Ending,
}

pub fn begin(cluster: &mut Cluster, place: Place) -> Result<Box<dyn Course>> {
    process(cluster, place).signal(Signal::TERM)?;
    Ok(Box::new(UnreadLog { place, step: Step::Stopping, until: Instant::now(), is_full: false }))
}

impl Course for UnreadLog {
    fn go_on(&mut self, scene: &mut Scene<'_>) -> Result<Next> {
        let (place, is_time) = (self.place, Instant::now() >= self.until);
        match self.step {
            Step::Stopping if scene.is_down(place) => {
                process(scene.cluster, place).start_unread()?;
                self.until = scene.in_about(STANDS_STILL_MS);
                self.step = Step::StandsStill;
            }
            Step::StandsStill if is_time => {
                if !scene.is_ready(place) && Instant::now() < self.until + READY_WITHIN {
                    return Ok(Next::GoesOn);
                }
                self.look(scene)?;
                if scene.random.chance(50) {
                    process(scene.cluster, place).read_on()?;
                }
                if !scene.is_down(place) {
                    scene.signal(place, Signal::TERM)?;
                }
                self.until = Instant::now() + ENDS_WITHIN;
                self.step = Step::Ending;
            }
            Step::Ending => {
                if !scene.is_down(place) && !is_time {
                    return Ok(Next::GoesOn);
                }
                if !scene.is_down(place) {
                    scene.fail(format!(
                        "{place:?}, whose log nobody reads, did not stop within {ENDS_WITHIN:?}"
                    ));
                    process(scene.cluster, place).kill9()?;
                }
                process(scene.cluster, place).read_on()?;
                scene.start(place)?;
                return Ok(if self.is_full { Next::Over } else { Next::Missed });
            }
            _ => {}
        }
        Ok(Next::GoesOn)
    }
}

impl UnreadLog {
    fn look(&mut self, scene: &mut Scene<'_>) -> Result<()> {
        let (mut waiting, is_ready) =
            (process(scene.cluster, self.place).waits_in("pipe_write")?, scene.is_ready(self.place));
        let all = waiting.len();
        waiting.retain(|thread| thread != WRITER);
        self.is_full = waiting.len() < all;
        if !waiting.is_empty() {
            self.is_full = true;
            scene.fail(format!("{:?}: threads {waiting:?} wait for whoever reads the log", self.place));
        }
        if !is_ready {
            self.is_full = true;
            scene.fail(format!("{:?} does not get ready while nobody reads its log", self.place));
        }
        Ok(())
    }
}
