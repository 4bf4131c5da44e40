//! What a run found out: counted per queue in a [`Tally`], summed and told in a [`Report`].

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::content::Mismatch;
use super::options::{Plan, Rw};
use super::worker::Op;

/// Three digits: an error of a thousandth. An hour is longer than any stall limit.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 3_600_000_000_000, 3).expect("bounds that fit each other")
}

/// The counts of one queue.
#[derive(Debug)]
pub struct Tally {
    read: Histogram<u64>,
    write: Histogram<u64>,
    flush: Histogram<u64>,
    timeline: Vec<u64>,
    gap_max: Duration,
    errors: u64,
    verified: u64,
    mismatches: u64,
    first_error: Option<String>,
    pub stalled: bool,
    pub kicks: u64,
    pub sleeps: u64,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            read: histogram(),
            write: histogram(),
            flush: histogram(),
            timeline: Vec::new(),
            gap_max: Duration::ZERO,
            errors: 0,
            verified: 0,
            mismatches: 0,
            first_error: None,
            stalled: false,
            kicks: 0,
            sleeps: 0,
        }
    }
}

impl Tally {
    pub fn count(&mut self, op: Op, took: Duration) {
        let histogram = match op {
            Op::Read => &mut self.read,
            Op::Write => &mut self.write,
            Op::Flush => &mut self.flush,
        };
        histogram.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    pub fn count_interval(&mut self, interval: Duration, since_start: Duration) {
        let Some(at) = since_start.as_nanos().checked_div(interval.as_nanos()) else { return };
        let at = usize::try_from(at).unwrap_or(usize::MAX - 1);
        if self.timeline.len() <= at {
            self.timeline.resize(at + 1, 0);
        }
        self.timeline[at] += 1;
    }

    pub fn gap_seen(&mut self, gap: Duration) {
        self.gap_max = self.gap_max.max(gap);
    }

    pub fn error(&mut self, what: String) {
        self.errors += 1;
        self.first_error.get_or_insert(what);
    }

    pub fn verified(&mut self, checked: Result<(), Mismatch>) {
        self.verified += 1;
        if let Err(mismatch) = checked {
            self.mismatches += 1;
            self.first_error.get_or_insert_with(|| mismatch.to_string());
        }
    }

    pub fn merge(&mut self, other: Self) {
        let grows = "histograms of the same bounds";
        self.read.add(other.read).expect(grows);
        self.write.add(other.write).expect(grows);
        self.flush.add(other.flush).expect(grows);
        if self.timeline.len() < other.timeline.len() {
            self.timeline.resize(other.timeline.len(), 0);
        }
        for (mine, theirs) in self.timeline.iter_mut().zip(other.timeline) {
            *mine += theirs;
        }
        self.gap_max = self.gap_max.max(other.gap_max);
        self.errors += other.errors;
        self.verified += other.verified;
        self.mismatches += other.mismatches;
        self.first_error = self.first_error.take().or(other.first_error);
        self.stalled |= other.stalled;
        self.kicks += other.kicks;
        self.sleeps += other.sleeps;
    }
}

/// The one JSON object of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub rw: Rw,
    pub bs: u64,
    pub qd: usize,
    pub queues: usize,
    pub poll: bool,
    pub size: u64,
    pub device_bytes: u64,
    pub features: String,
    pub runtime_s: f64,
    pub flush_every: u64,
    /// Reads and writes together.
    pub all: Latencies,
    pub read: Latencies,
    pub write: Latencies,
    pub flush: Latencies,
    /// This program's own, in the measured time.
    pub cpu_user_s: f64,
    pub cpu_sys_s: f64,
    pub kicks: u64,
    pub sleeps: u64,
    /// The longest time in which a queue completed nothing.
    pub max_gap_us: f64,
    pub errors: u64,
    pub verified: u64,
    pub verify_errors: u64,
    pub stalled: bool,
    pub first_error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeline_ms: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub timeline: Vec<u64>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Latencies {
    pub ios: u64,
    pub iops: f64,
    pub bw_mib_s: f64,
    pub mean_us: f64,
    pub p50_us: f64,
    pub p90_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    pub p9999_us: f64,
    pub max_us: f64,
}

impl Latencies {
    fn new(histogram: &Histogram<u64>, seconds: f64, bs: u64) -> Self {
        let us = |nanoseconds: u64| rounded(nanoseconds as f64 / 1e3, 2);
        let at = |quantile: f64| us(histogram.value_at_quantile(quantile));
        let iops = histogram.len() as f64 / seconds;
        Self {
            ios: histogram.len(),
            iops: rounded(iops, 1),
            bw_mib_s: rounded(iops * bs as f64 / (1 << 20) as f64, 2),
            mean_us: rounded(histogram.mean() / 1e3, 2),
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            p9999_us: at(0.9999),
            max_us: us(histogram.max()),
        }
    }
}

fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}

impl Report {
    pub fn new(plan: &Plan, device_bytes: u64, features: u64, tally: Tally, cpu: CpuUse) -> Self {
        let options = &plan.options;
        let seconds = options.runtime.as_secs_f64();
        let mut all = tally.read.clone();
        all.add(&tally.write).expect("histograms of the same bounds");
        let told = |histogram| Latencies::new(histogram, seconds, options.bs);
        Self {
            rw: options.rw,
            bs: options.bs,
            qd: plan.depth_per_queue * options.queues,
            queues: options.queues,
            poll: options.poll,
            size: plan.size,
            device_bytes,
            features: format!("{features:#x}"),
            runtime_s: seconds,
            flush_every: options.flush_every,
            all: told(&all),
            read: told(&tally.read),
            write: told(&tally.write),
            flush: told(&tally.flush),
            cpu_user_s: rounded(cpu.user.as_secs_f64(), 3),
            cpu_sys_s: rounded(cpu.system.as_secs_f64(), 3),
            kicks: tally.kicks,
            sleeps: tally.sleeps,
            max_gap_us: rounded(tally.gap_max.as_secs_f64() * 1e6, 1),
            errors: tally.errors,
            verified: tally.verified,
            verify_errors: tally.mismatches,
            stalled: tally.stalled,
            first_error: tally.first_error,
            timeline_ms: (options.timeline > 0).then_some(options.timeline),
            timeline: tally.timeline,
        }
    }

    /// What a script decides by.
    pub fn exit_status(&self) -> u8 {
        if self.stalled { 2 } else { u8::from(self.errors + self.verify_errors > 0) }
    }
}

/// CPU time of this process.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuUse {
    pub user: Duration,
    pub system: Duration,
}

impl CpuUse {
    pub fn now() -> Self {
        // SAFETY: an all-zero rusage is a valid one, and the call only fills it.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
            usage
        };
        let duration = |time: libc::timeval| {
            let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
            Duration::from_secs(seconds) + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or(0))
        };
        Self { user: duration(usage.ru_utime), system: duration(usage.ru_stime) }
    }

    pub fn since(self, earlier: Self) -> Self {
        Self {
            user: self.user.saturating_sub(earlier.user),
            system: self.system.saturating_sub(earlier.system),
        }
    }

    pub fn total(self) -> Duration {
        self.user + self.system
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Latencies, Tally};
    use crate::front_end::worker::Op;

    #[test]
    fn latencies_are_right_within_a_hundredth() {
        let mut tally = Tally::default();
        for us in 1..=100_000 {
            tally.count(Op::Write, Duration::from_micros(us));
        }
        let told = Latencies::new(&tally.write, 10.0, 4096);
        for (found, wanted) in [(told.p50_us, 50_000.0), (told.p99_us, 99_000.0), (told.max_us, 100_000.0)] {
            assert!((found - wanted).abs() / wanted < 0.01, "{found} for {wanted}");
        }
        assert_eq!((told.ios, told.iops), (100_000, 10_000.0));
    }

    #[test]
    fn the_timeline_of_two_queues_is_their_sum() {
        let (mut a, mut b) = (Tally::default(), Tally::default());
        let interval = Duration::from_millis(100);
        a.count_interval(interval, Duration::from_millis(99));
        b.count_interval(interval, Duration::from_millis(1));
        b.count_interval(interval, Duration::from_millis(250));
        b.count_interval(Duration::ZERO, Duration::from_millis(900));
        a.merge(b);
        assert_eq!(a.timeline, [2, 0, 1]);
    }
}
