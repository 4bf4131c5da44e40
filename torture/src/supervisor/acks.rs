//! How much had been acknowledged at which moment.

/// Nanoseconds of the load's clock between two looks: finer than any window that is asked for.
const EVERY_NS: u64 = 50_000_000;

/// One sample per `EVERY_NS`, 16 bytes each: a megabyte an hour.
#[derive(Debug, Default)]
pub struct Acks {
    samples: Vec<(u64, u64)>,
}

impl Acks {
    pub fn note(&mut self, now_ns: u64, acked: u64) {
        if self.samples.last().is_none_or(|(at, _)| now_ns >= at + EVERY_NS) {
            self.samples.push((now_ns, acked));
        }
    }

    /// Acknowledged in this time for sure: rather too few at its ends than one too many.
    pub fn between(&self, from_ns: u64, until_ns: u64) -> u64 {
        let first = self.samples.partition_point(|(at, _)| *at < from_ns);
        let after = self.samples.partition_point(|(at, _)| *at <= until_ns);
        if after <= first {
            return 0;
        }
        self.samples[after - 1].1 - self.samples[first].1
    }
}

#[cfg(test)]
mod tests {
    use super::{Acks, EVERY_NS};

    #[test]
    fn only_what_is_surely_inside_a_window_counts() {
        let mut acks = Acks::default();
        for i in 0..100 {
            acks.note(i * EVERY_NS, i * 10);
            acks.note(i * EVERY_NS + 1, 100_000);
        }
        assert_eq!(acks.between(10 * EVERY_NS, 20 * EVERY_NS), 100);
        assert_eq!(acks.between(10 * EVERY_NS + 1, 20 * EVERY_NS - 1), 80);
        assert_eq!(acks.between(10 * EVERY_NS + 1, 10 * EVERY_NS + 2), 0);
        assert_eq!(acks.between(99 * EVERY_NS, u64::MAX), 0);
    }
}
