//! CPU time of other processes, from the kernel: what an I/O costs the machine, whoever does the work.

use std::fs;
use std::time::Duration;

use crate::front_end::Observer;

/// A process of the system under test.
#[derive(Debug, Clone)]
pub struct Watched {
    pub name: String,
    pub pid: u32,
}

/// Looks at the processes when the measured time begins and when it ends.
#[derive(Debug)]
pub struct Watch<'p> {
    processes: &'p [Watched],
    before: Vec<Duration>,
    machine_before: Ticks,
    /// Per process, in the measured time.
    pub used: Vec<Duration>,
    /// Of the whole machine, everybody and the host's other guests included.
    pub machine: Duration,
    /// The part of it that the host gave to its other guests.
    pub stolen: Duration,
}

impl<'p> Watch<'p> {
    pub fn new(processes: &'p [Watched]) -> Self {
        Self {
            processes,
            before: Vec::new(),
            machine_before: Ticks::default(),
            used: vec![Duration::ZERO; processes.len()],
            machine: Duration::ZERO,
            stolen: Duration::ZERO,
        }
    }

    fn look(&self) -> Vec<Duration> {
        self.processes.iter().map(|process| of_process(process.pid)).collect()
    }
}

impl Observer for Watch<'_> {
    fn begins(&mut self) {
        self.machine_before = Ticks::of_machine();
        self.before = self.look();
    }

    fn ends(&mut self) {
        let now = self.look();
        self.used = now.iter().zip(&self.before).map(|(now, before)| now.saturating_sub(*before)).collect();
        let machine = Ticks::of_machine();
        self.machine = from_ticks(machine.taken.saturating_sub(self.machine_before.taken));
        self.stolen = from_ticks(machine.stolen.saturating_sub(self.machine_before.stolen));
    }
}

/// User and system time of all threads, those that ended included, to the nanosecond: /proc has clock ticks only, which
/// say nothing about an idle process. Zero for a process that is gone.
pub fn of_process(pid: u32) -> Duration {
    let Ok(pid) = libc::pid_t::try_from(pid) else { return Duration::ZERO };
    let mut clock: libc::clockid_t = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both calls only fill the variables they are given.
    let failed = unsafe {
        libc::clock_getcpuclockid(pid, &raw mut clock) != 0 || libc::clock_gettime(clock, &raw mut time) != 0
    };
    if failed {
        return Duration::ZERO;
    }
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::from_secs(seconds) + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// Clock ticks of all CPUs since the machine came up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Ticks {
    /// By somebody here or by the host's other guests: gone is gone.
    taken: u64,
    /// By the host's other guests.
    stolen: u64,
}

impl Ticks {
    fn of_machine() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        Self::read(&stat).unwrap_or_default()
    }

    /// `cpu user nice system idle iowait irq softirq steal …`: all but idle and iowait, which nobody used, was taken.
    fn read(stat: &str) -> Option<Self> {
        let fields: Vec<u64> =
            stat.lines().next()?.split_whitespace().skip(1).map_while(|field| field.parse().ok()).collect();
        let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = fields[..] else { return None };
        Some(Self { taken: user + nice + system + irq + softirq + steal, stolen: steal })
    }
}

fn from_ticks(ticks: u64) -> Duration {
    // SAFETY: sysconf reads a constant of the system.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Duration::from_millis(ticks.saturating_mul(1000) / u64::try_from(per_second).unwrap_or(100).max(1))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Ticks, of_process};

    #[test]
    fn idle_time_of_the_machine_is_nobodys() {
        let ticks = Ticks::read("cpu  1 2 3 1000 50 4 5 9 0 0\ncpu0 1");
        assert_eq!(ticks, Some(Ticks { taken: 24, stolen: 9 }));
    }

    #[test]
    fn a_millisecond_of_work_is_seen_and_a_process_that_is_gone_used_none() {
        let before = of_process(std::process::id());
        let until = Instant::now() + Duration::from_secs(60);
        let used = || of_process(std::process::id()).saturating_sub(before);
        while used() <= Duration::from_micros(500) {
            assert!(Instant::now() < until, "{:?}", used());
        }
        assert_eq!(of_process(u32::MAX), Duration::ZERO);
    }
}
