//! Faults that go by steps: what people do to a cluster, and what befalls one program for a while.
//!
//! Each is asked again and again, between everything else that goes on, to do what can be done by now. It waits for
//! nothing: what takes long is done by processes, or by a thread of its own.
//!
//! What always holds: when it is over, whatever it took away is there again; other faults go on meanwhile, except in the
//! places that it holds.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::Signal;

use super::active::process;
use super::cluster::Cluster;
use super::network::Place;
use super::process::State;
use crate::random::Random;

/// What a course sees, and what it may touch.
pub struct Scene<'a> {
    pub cluster: &'a mut Cluster,
    /// Those that no other fault hits meanwhile.
    pub places: &'a mut Vec<Place>,
    pub detail: &'a mut String,
    pub random: &'a mut Random,
    /// Changes acknowledged by now.
    pub acked: u64,
    /// Of the programs.
    pub failures: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    GoesOn,
    Over,
    /// Over, and nobody ran into it.
    Missed,
}

pub trait Course: fmt::Debug {
    fn go_on(&mut self, scene: &mut Scene<'_>) -> Result<Next>;
}

impl Scene<'_> {
    pub fn signal(&mut self, place: Place, signal: Signal) -> Result<()> {
        process(self.cluster, place).signal(signal)
    }

    pub fn start(&mut self, place: Place) -> Result<()> {
        process(self.cluster, place).start()
    }

    pub fn is_down(&mut self, place: Place) -> bool {
        process(self.cluster, place).state() == State::Down
    }

    pub fn is_ready(&mut self, place: Place) -> bool {
        process(self.cluster, place).is_ready()
    }

    /// In so many milliseconds at least, and twice as many at most.
    pub fn in_about(&mut self, ms: u64) -> Instant {
        Instant::now() + Duration::from_millis(ms + self.random.below(ms))
    }

    pub fn fail(&mut self, failure: String) {
        self.failures.push(failure);
    }
}
