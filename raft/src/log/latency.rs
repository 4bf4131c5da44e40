//! How long the log's writes take: counted as they complete, taken by whoever watches the disk.
//!
//! Powers of two of a microsecond: a disk that became slow is slower by far more than that.

use std::time::Duration;

const BUCKETS: usize = 32;

/// Writes completed since the last look, and the one that waits longest now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteLatency {
    /// Writes completed.
    pub count: u64,
    /// Half of them took no longer; within a factor of two.
    pub p50: Duration,
    /// 99 of 100 took no longer; within a factor of two.
    pub p99: Duration,
    /// How long the oldest write that is not complete has been under way.
    pub waiting: Duration,
}

/// Counts of one window.
#[derive(Debug, Default)]
pub struct Counts {
    buckets: [u64; BUCKETS],
}

impl Counts {
    pub fn add(&mut self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)] += 1;
    }

    /// What was counted, and begins anew.
    pub fn take(&mut self, waiting: Duration) -> WriteLatency {
        let counts = std::mem::take(&mut self.buckets);
        let count = counts.iter().sum();
        WriteLatency {
            count,
            p50: below(&counts, count.div_ceil(2)),
            p99: below(&counts, count - count / 100),
            waiting,
        }
    }
}

/// What `wanted` of the counted took at the most: the upper end of a bucket.
fn below(counts: &[u64; BUCKETS], wanted: u64) -> Duration {
    let mut seen = 0;
    for (bucket, count) in counts.iter().enumerate() {
        seen += count;
        if seen >= wanted && seen > 0 {
            return Duration::from_micros(1 << bucket);
        }
    }
    Duration::ZERO
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Counts, WriteLatency};

    #[test]
    fn the_middle_and_the_end_are_found_within_a_factor_of_two() {
        let mut counts = Counts::default();
        assert_eq!(counts.take(Duration::ZERO), WriteLatency::default());
        (0..98).for_each(|_| counts.add(Duration::from_micros(300)));
        (0..2).for_each(|_| counts.add(Duration::from_millis(40)));
        counts.add(Duration::from_secs(1 << 40));
        let waiting = Duration::from_secs(2);
        let taken = counts.take(waiting);
        assert_eq!((taken.count, taken.waiting), (101, waiting));
        assert_eq!(taken.p50, Duration::from_micros(512));
        assert_eq!(taken.p99, Duration::from_micros(65_536));
        assert_eq!(counts.take(waiting).count, 0, "begun anew");
    }
}
