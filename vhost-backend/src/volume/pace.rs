//! How long reads take, and when it pays to ask a second replica: values and plain functions, no clock, no socket.
//!
//! A read is asked of a second replica once it has waited much longer than the best of the copyset's replicas usually
//! takes. Compared with the best, because a leader with a slow disk makes its own past look slow.
//!
//! What always holds: such second questions are a twentieth of all reads, and a burst; a cluster that is slow as a
//! whole is not asked twice as much.

use std::time::Duration;

use crate::connections::PeerIndex;

/// A second question before this would chase what the network and the scheduler do anyway.
const DELAY_MIN: Duration = Duration::from_millis(5);
/// How much longer than the best replica's 99 of 100 reads.
const DELAY_FACTOR: u32 = 4;
/// Nothing is known yet: a disk that spins.
const DELAY_UNKNOWN: Duration = Duration::from_millis(20);
/// Reads that pay for one second question.
const READS_PER_SECOND_QUESTION: u32 = 20;
/// Second questions saved up: a queue's depth of a guest at once, when its leader hangs.
const BURST: u32 = 32;

/// Half octaves of microseconds: 1 µs to 16 s.
const BUCKETS: usize = 48;
/// How many reads make a new figure.
const SAMPLES: u32 = 64;
/// Older reads count for half after so many.
const HALVED_AT: u32 = 1024;

/// How long one chunkserver's reads took lately.
#[derive(Debug, Clone)]
struct Latency {
    counts: [u16; BUCKETS],
    total: u32,
    since: u32,
    /// 99 of 100 took no longer; known after [`SAMPLES`].
    p99: Option<Duration>,
}

impl Default for Latency {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], total: 0, since: 0, p99: None }
    }
}

fn bucket(took: Duration) -> usize {
    let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
    let octave = us.ilog2();
    let upper_half = octave > 0 && us >> (octave - 1) & 1 == 1;
    (octave as usize * 2 + usize::from(upper_half)).min(BUCKETS - 1)
}

/// The longest of a bucket.
fn limit(bucket: usize) -> Duration {
    let next = bucket + 1;
    let octave = 1u64 << (next / 2);
    Duration::from_micros(if next.is_multiple_of(2) { octave } else { octave + octave / 2 })
}

impl Latency {
    fn note(&mut self, took: Duration) {
        self.counts[bucket(took)] += 1;
        self.total += 1;
        self.since += 1;
        if self.since < SAMPLES {
            return;
        }
        self.since = 0;
        let mut slower = self.total / 100;
        let p99 = (0..BUCKETS).rev().find(|at| {
            let here = u32::from(self.counts[*at]);
            let found = here > slower;
            slower = slower.saturating_sub(here);
            found
        });
        self.p99 = p99.map(limit);
        if self.total >= HALVED_AT {
            self.counts.iter_mut().for_each(|count| *count /= 2);
            self.total = self.counts.iter().map(|count| u32::from(*count)).sum();
        }
    }
}

/// What is known of all chunkservers' reads, and what may be spent on asking twice.
#[derive(Debug)]
pub struct Pace {
    latencies: Vec<Latency>,
    /// In parts of a second question.
    saved: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { latencies: Vec::new(), saved: BURST * READS_PER_SECOND_QUESTION }
    }
}

impl Pace {
    /// A read was answered.
    pub fn note(&mut self, peer: PeerIndex, took: Duration) {
        let at = usize::from(peer.0);
        if self.latencies.len() <= at {
            self.latencies.resize_with(at + 1, Latency::default);
        }
        self.latencies[at].note(took);
    }

    /// A read was asked of its leader.
    pub fn earn(&mut self) {
        self.saved = (self.saved + 1).min(BURST * READS_PER_SECOND_QUESTION);
    }

    /// Whether one read may be asked of a second replica.
    pub fn can_spend(&self) -> bool {
        self.saved >= READS_PER_SECOND_QUESTION
    }

    /// It was asked.
    pub fn spend(&mut self) {
        self.saved = self.saved.saturating_sub(READS_PER_SECOND_QUESTION);
    }

    /// How long a read of a copyset with these replicas waits before a second one is asked.
    pub fn delay(&self, replicas: &[PeerIndex]) -> Duration {
        let p99 = |peer: &PeerIndex| self.latencies.get(usize::from(peer.0))?.p99;
        let best = replicas.iter().filter_map(p99).min();
        best.map_or(DELAY_UNKNOWN, |best| best * DELAY_FACTOR).max(DELAY_MIN)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{BUCKETS, BURST, DELAY_MIN, DELAY_UNKNOWN, Pace, READS_PER_SECOND_QUESTION, bucket, limit};
    use crate::connections::PeerIndex;

    const REPLICAS: [PeerIndex; 3] = [PeerIndex(0), PeerIndex(1), PeerIndex(2)];

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn every_time_has_a_bucket_whose_limit_it_does_not_pass() {
        for time in (0..100_000).chain((0..34).map(|power| 1 << power)) {
            let at = bucket(us(time));
            assert!(at == BUCKETS - 1 || us(time) <= limit(at), "{time} µs in {at}");
            assert!(at == 0 || us(time) >= limit(at - 1), "{time} µs in {at}");
        }
    }

    #[test]
    fn the_delay_follows_the_best_replica_and_not_a_slow_leader() {
        let mut pace = Pace::default();
        assert_eq!(pace.delay(&REPLICAS), DELAY_UNKNOWN);
        for n in 0..1000 {
            // One in fifty is slow: 99 of 100 are not all quick.
            pace.note(PeerIndex(0), us(if n % 50 == 0 { 9_000 } else { 100 }));
        }
        let alone = pace.delay(&REPLICAS);
        assert!(alone > us(4 * 9_000) && alone <= us(4 * 12_288), "{alone:?}");
        for _ in 0..64 {
            pace.note(PeerIndex(2), us(150));
        }
        assert_eq!(pace.delay(&REPLICAS), DELAY_MIN);
        assert!(pace.delay(&REPLICAS[..2]) > DELAY_MIN);
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        let mut pace = Pace::default();
        (0..1000).for_each(|_| pace.note(PeerIndex(0), us(50_000)));
        (0..20_000).for_each(|_| pace.note(PeerIndex(0), us(100)));
        assert_eq!(pace.delay(&REPLICAS), DELAY_MIN);
    }

    #[test]
    fn second_questions_are_a_twentieth_and_a_burst() {
        let mut pace = Pace::default();
        let spent = (0..10_000).filter(|_| {
            pace.earn();
            let may = pace.can_spend();
            if may {
                pace.spend();
            }
            may
        });
        let (spent, most) = (spent.count(), BURST + 10_000 / READS_PER_SECOND_QUESTION);
        assert!(spent <= most as usize && spent + 1 >= most as usize, "{spent} of {most}");
    }
}
