//! How long answers were waited for.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::history::Kind;
use crate::register::Time;

/// Below this nobody would call it a stall.
const SLOW_NS: Time = 20_000_000;
/// Kept for attribution to faults, at most: 24 bytes each.
const SLOW_MAX: usize = 4_000_000;

/// An operation that took longer than `SLOW_NS`.
#[derive(Debug, Clone, Copy)]
pub struct Slow {
    pub invoked: Time,
    pub answered: Time,
    pub is_read: bool,
}

pub struct Stalls {
    reads: Histogram<u64>,
    changes: Histogram<u64>,
    gaps: Histogram<u64>,
    pub slow: Vec<Slow>,
}

/// Milliseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Spread {
    pub count: u64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

impl Default for Stalls {
    fn default() -> Self {
        // An hour in microseconds; what is longer counts as that.
        let histogram = || Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("good bounds");
        Self { reads: histogram(), changes: histogram(), gaps: histogram(), slow: Vec::new() }
    }
}

impl Stalls {
    pub fn answered(&mut self, kind: Kind, invoked: Time, answered: Time) {
        let took = answered.saturating_sub(invoked);
        let is_read = kind == Kind::Read;
        let histogram = if is_read { &mut self.reads } else { &mut self.changes };
        histogram.saturating_record(took / 1000);
        if took > SLOW_NS && self.slow.len() < SLOW_MAX {
            self.slow.push(Slow { invoked, answered, is_read });
        }
    }

    /// So long nothing was answered although something was under way.
    pub fn gap(&mut self, ns: Time) {
        self.gaps.saturating_record(ns / 1000);
    }

    pub fn reads(&self) -> Spread {
        spread(&self.reads)
    }

    pub fn changes(&self) -> Spread {
        spread(&self.changes)
    }

    pub fn gaps(&self) -> Spread {
        spread(&self.gaps)
    }
}

fn spread(histogram: &Histogram<u64>) -> Spread {
    #[allow(clippy::cast_precision_loss)]
    let ms = |us: u64| us as f64 / 1000.0;
    Spread {
        count: histogram.len(),
        p50_ms: ms(histogram.value_at_quantile(0.5)),
        p99_ms: ms(histogram.value_at_quantile(0.99)),
        max_ms: ms(histogram.max()),
    }
}
