//! A program that may open no more files than it has open, or very few, for a while.

use std::time::Instant;

use anyhow::Result;

use super::active::process;
use super::cluster::Cluster;
use super::course::{Course, Next, Scene};
use super::network::Place;
use crate::random::Random;

/// Programs wait for a minute, at most.
const LASTS_MS: u64 = 5000;
const LEFT_MAX: u64 = 3;

#[derive(Debug)]
pub struct NoDescriptors {
    place: Place,
    /// It was started once more if it ended, which is a failure; then there is nothing to give back.
    starts: u32,
    limit: u64,
    until: Instant,
}

pub fn begin(cluster: &mut Cluster, place: Place, random: &mut Random) -> Result<Box<dyn Course>> {
    let left = random.below(LEFT_MAX);
    let until = Instant::now() + std::time::Duration::from_millis(LASTS_MS + random.below(LASTS_MS));
    let process = process(cluster, place);
    let limit = process.leave_descriptors(left)?;
    Ok(Box::new(NoDescriptors { place, starts: process.starts, limit, until }))
}

impl Course for NoDescriptors {
    fn go_on(&mut self, scene: &mut Scene<'_>) -> Result<Next> {
        if Instant::now() < self.until {
            return Ok(Next::GoesOn);
        }
        *scene.detail += &format!(", {} and higher were gone", self.limit);
        let process = process(scene.cluster, self.place);
        if process.starts == self.starts {
            process.give_descriptors_back()?;
        }
        Ok(Next::Over)
    }
}
