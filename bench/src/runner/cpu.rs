//! CPU time of other processes, from /proc: what an I/O costs the machine, whoever does the work.

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
    machine_before: Duration,
    /// Per process, in the measured time.
    pub used: Vec<Duration>,
    /// Of the whole machine, everybody included.
    pub machine: Duration,
}

impl<'p> Watch<'p> {
    pub fn new(processes: &'p [Watched]) -> Self {
        Self {
            processes,
            before: Vec::new(),
            machine_before: Duration::ZERO,
            used: vec![Duration::ZERO; processes.len()],
            machine: Duration::ZERO,
        }
    }

    fn look(&self) -> Vec<Duration> {
        self.processes.iter().map(|process| of_process(process.pid)).collect()
    }
}

impl Observer for Watch<'_> {
    fn begins(&mut self) {
        self.machine_before = of_machine();
        self.before = self.look();
    }

    fn ends(&mut self) {
        let now = self.look();
        self.used = now.iter().zip(&self.before).map(|(now, before)| now.saturating_sub(*before)).collect();
        self.machine = of_machine().saturating_sub(self.machine_before);
    }
}

/// User and system time of all threads; zero for a process that is gone.
fn of_process(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    ticks_of_process(&stat).map_or(Duration::ZERO, from_ticks)
}

/// utime and stime are fields 14 and 15; the name before them, in parentheses, may hold anything.
fn ticks_of_process(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn of_machine() -> Duration {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    ticks_of_machine(&stat).map_or(Duration::ZERO, from_ticks)
}

/// `cpu user nice system idle iowait irq softirq steal …`: all but idle, iowait and steal, which nobody here used.
fn ticks_of_machine(stat: &str) -> Option<u64> {
    let fields: Vec<u64> =
        stat.lines().next()?.split_whitespace().skip(1).map_while(|field| field.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = fields[..] else { return None };
    Some(user + nice + system + irq + softirq)
}

fn from_ticks(ticks: u64) -> Duration {
    // SAFETY: sysconf reads a constant of the system.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Duration::from_millis(ticks.saturating_mul(1000) / u64::try_from(per_second).unwrap_or(100).max(1))
}

#[cfg(test)]
mod tests {
    use super::{of_process, ticks_of_machine, ticks_of_process};

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_move_the_fields() {
        let stat = "12 (a) b (c) R 1 12 12 0 -1 4194304 100 0 0 0 70 5 0 0 20 0 1 0 100 1 1";
        assert_eq!(ticks_of_process(stat), Some(75));
        assert_eq!(ticks_of_process(""), None);
        assert_eq!(ticks_of_machine("cpu  1 2 3 1000 50 4 5 9 0 0\ncpu0 1"), Some(15));
    }

    #[test]
    fn this_process_uses_time() {
        let mut x = 1_u64;
        while of_process(std::process::id()).is_zero() {
            for i in 0..1_000_000_u64 {
                x = x.wrapping_mul(i | 1);
            }
            std::hint::black_box(x);
        }
    }
}
