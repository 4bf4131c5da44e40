//! What a run did and found.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::about::About;
use super::coverage::{AFTERMATH_NS, Covered, Led, Program};
use super::fault::Fault;
use crate::blkcheck::report::{Report as Load, Verdict};
use crate::blkcheck::stalls::Slow;

/// One fault, on the load's clock.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Happened {
    pub fault: Fault,
    pub began_ns: u64,
    pub healed_ns: u64,
    pub detail: String,
    pub happened: bool,
    /// Of the chunkserver that was hit; none: several were or none was, or the control plane had not said it lately.
    #[serde(default)]
    pub led: Option<Led>,
    /// Of a fault that hits all programs in turn.
    #[serde(default)]
    pub program: Option<Program>,
    /// Requests when it began.
    #[serde(default)]
    pub under_way: u64,
    /// Changes acknowledged in its window; none: not counted.
    #[serde(default)]
    pub acks: Option<u64>,
    /// No other fault's window meets its own, so that what stalled stalled because of it.
    #[serde(default)]
    pub alone: bool,
    /// The longest change and the longest read that were under way in its window.
    #[serde(default)]
    pub change_ms: f64,
    #[serde(default)]
    pub read_ms: f64,
}

impl Happened {
    pub fn new(fault: Fault, began_ns: u64, healed_ns: u64) -> Self {
        Self {
            fault,
            began_ns,
            healed_ns,
            detail: String::new(),
            happened: true,
            led: None,
            program: None,
            under_way: 0,
            acks: None,
            alone: false,
            change_ms: 0.0,
            read_ms: 0.0,
        }
    }
}

/// Over the faults of one kind that met no other: the longest request that was under way meanwhile, of each.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Stall {
    pub faults: usize,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct OfFault {
    pub happened: usize,
    pub missed: usize,
    #[serde(default)]
    pub covered: Covered,
    pub changes_alone: Stall,
    pub reads_alone: Stall,
    /// Of all, those that met others included.
    pub max_ms: f64,
}

/// Read again by `torture report`: a new field has a default, so that reports of older runs stay readable.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub verdict: Verdict,
    pub seed: u64,
    pub seconds: f64,
    #[serde(default)]
    pub about: Option<About>,
    /// A fault with fewer acknowledged changes in its window does not count; 0: not looked at.
    #[serde(default)]
    pub window_acks: u64,
    pub faults: BTreeMap<Fault, OfFault>,
    pub kills: usize,
    pub power_cuts_one: usize,
    pub power_cuts_all: usize,
    pub leader_changes: u64,
    /// Violations of the register, in sectors.
    pub violations: u64,
    /// What else went wrong: programs that died or did not stop, clusters that did not heal.
    pub failures: Vec<String>,
    /// Why it is not known to be good.
    pub unknowns: Vec<String>,
    /// Final checks that were made with each chunkserver away in turn.
    pub checks_without_one: usize,
    /// Chunkservers that led at least one copyset in a final check.
    pub leaders_read_through: usize,
    /// Replicas, of all copysets together, that led while everything was read; and how many there are.
    #[serde(default)]
    pub replicas_read_through: usize,
    #[serde(default)]
    pub replicas: usize,
    /// Replicas whose files were read with no chunkserver running, and the sectors of them that were judged.
    #[serde(default)]
    pub replicas_in_files: usize,
    #[serde(default)]
    pub sectors_in_files: u64,
    /// 2 cores shared with a compiler say nothing about stalls.
    pub load_average_at_end: f64,
    pub load: Option<Load>,
    pub history: Vec<Happened>,
    pub folder: Option<String>,
}

/// Fills in what is known of each fault only when all of them and all that was slow is.
pub fn attribute(history: &mut [Happened], slow: &[Slow]) {
    let spans: Vec<(u64, u64)> =
        history.iter().map(|one| (one.began_ns, one.healed_ns + AFTERMATH_NS)).collect();
    for (i, one) in history.iter_mut().enumerate() {
        let (from, until) = spans[i];
        one.alone = spans.iter().enumerate().all(|(j, other)| i == j || other.0 >= until || from >= other.1);
        let longest = |is_read: bool| {
            let met =
                slow.iter().filter(|op| op.is_read == is_read && op.invoked < until && op.answered > from);
            #[allow(clippy::cast_precision_loss)]
            let ms = met.map(|op| op.answered - op.invoked).max().unwrap_or(0) as f64 / 1e6;
            ms
        };
        (one.change_ms, one.read_ms) = (longest(false), longest(true));
    }
}

pub fn by_fault(listed: &[Fault], history: &[Happened], least_acks: u64) -> BTreeMap<Fault, OfFault> {
    let kinds: BTreeSet<Fault> = listed.iter().copied().chain(history.iter().map(|one| one.fault)).collect();
    let of = |fault: Fault| {
        let all = || history.iter().filter(move |one| one.fault == fault && one.happened);
        let alone = |ms: fn(&Happened) -> f64| Stall::of(all().filter(|one| one.alone).map(ms).collect());
        OfFault {
            happened: all().count(),
            missed: history.iter().filter(|one| one.fault == fault && !one.happened).count(),
            covered: Covered::of(all(), least_acks),
            changes_alone: alone(|one| one.change_ms),
            reads_alone: alone(|one| one.read_ms),
            max_ms: all().map(|one| one.change_ms.max(one.read_ms)).fold(0.0, f64::max),
        }
    };
    kinds.into_iter().map(|fault| (fault, of(fault))).collect()
}

impl Stall {
    pub fn of(mut all: Vec<f64>) -> Self {
        if all.is_empty() {
            return Self::default();
        }
        all.sort_by(f64::total_cmp);
        let rank = |percent: usize| all[(all.len() * percent).div_ceil(100).clamp(1, all.len()) - 1];
        Self { faults: all.len(), p50_ms: rank(50), p99_ms: rank(99), max_ms: rank(100) }
    }

    pub fn words(&self) -> String {
        if self.faults == 0 {
            return "-".to_owned();
        }
        format!("{:.0}/{:.0}/{:.0} ({})", self.p50_ms, self.p99_ms, self.max_ms, self.faults)
    }
}

impl Report {
    pub fn settle_verdict(&mut self) {
        for (fault, of) in &self.faults {
            if of.happened == 0 {
                self.unknowns.push(format!("{fault} was listed and did not happen"));
            } else if let Some(lacks) = of.covered.lacks(*fault, self.window_acks) {
                self.unknowns.push(lacks);
            }
        }
        if self.replicas_read_through < self.replicas || self.replicas == 0 {
            self.unknowns.push(format!(
                "only {} of {} replicas led while everything was read",
                self.replicas_read_through, self.replicas
            ));
        }
        if self.replicas_in_files < self.replicas {
            self.unknowns.push(format!(
                "the files of only {} of {} replicas were checked",
                self.replicas_in_files, self.replicas
            ));
        }
        match &self.load {
            None => self.unknowns.push("there is no report of the load".to_owned()),
            Some(load) => {
                self.violations = load.violations;
                if load.verdict == Verdict::Unknown {
                    self.unknowns.push("the load was not checked to its end".to_owned());
                }
            }
        }
        self.verdict = if self.violations > 0 || !self.failures.is_empty() {
            Verdict::Fail
        } else if self.unknowns.is_empty() {
            Verdict::Pass
        } else {
            Verdict::Unknown
        };
    }

    pub fn words(&self) -> String {
        let mut lines = vec![format!(
            "\n{:<21} {:>5} {:>7} {:>28} {:>28} {:>9}",
            "fault", "times", "covered", "changes p50/p99/max ms", "reads p50/p99/max ms", "all max"
        )];
        for (fault, of) in &self.faults {
            lines.push(format!(
                "{:<21} {:>5} {:>7} {:>28} {:>28} {:>9.0}",
                fault.name(),
                of.happened,
                of.covered.faults,
                of.changes_alone.words(),
                of.reads_alone.words(),
                of.max_ms
            ));
        }
        lines.push(
            format!(
                "(covered: with at least {} acknowledged changes in its window; stalls: the longest request of each fault \
                 that met no other; in brackets, how many)",
                self.window_acks
            ),
        );
        if let Some(load) = &self.load {
            lines.push(load.words());
        }
        lines.push(format!(
            "{} kill -9, {} one-node and {} all-node power cuts, {} leader changes seen; {} last checks with one away, read through {} of {} replicas as leaders; {} sectors of {} replicas checked in their files; load average {:.1}",
            self.kills,
            self.power_cuts_one,
            self.power_cuts_all,
            self.leader_changes,
            self.checks_without_one,
            self.replicas_read_through,
            self.replicas,
            self.sectors_in_files,
            self.replicas_in_files,
            self.load_average_at_end
        ));
        lines.extend(self.failures.iter().map(|failure| format!("FAILURE: {failure}")));
        lines.extend(self.unknowns.iter().map(|unknown| format!("UNKNOWN: {unknown}")));
        lines.extend(self.folder.iter().map(|folder| format!("logs and data are kept in {folder}")));
        lines.push(format!("seed {}: {:?} after {:.0} s", self.seed, self.verdict, self.seconds));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::{Happened, attribute, by_fault};
    use crate::blkcheck::stalls::Slow;
    use crate::supervisor::fault::Fault;

    fn at(fault: Fault, began_s: u64, healed_s: u64) -> Happened {
        let ns = |s: u64| s * 1_000_000_000;
        Happened::new(fault, ns(began_s), ns(healed_s))
    }

    #[test]
    fn a_stall_belongs_to_the_fault_that_met_no_other() {
        let mut history =
            [at(Fault::KillLeader, 10, 11), at(Fault::KillMds, 40, 41), at(Fault::KillLeader, 42, 43)];
        let ms = |ms: u64| ms * 1_000_000;
        let slow = [
            Slow { invoked: ms(9_900), answered: ms(10_700), is_read: false },
            Slow { invoked: ms(41_500), answered: ms(43_500), is_read: false },
            Slow { invoked: ms(70_000), answered: ms(79_000), is_read: false },
        ];
        attribute(&mut history, &slow);
        let kinds = by_fault(&[Fault::KillLeader, Fault::SlowDisk], &history, 0);
        let leader = &kinds[&Fault::KillLeader];
        assert_eq!((leader.happened, leader.changes_alone.faults), (2, 1));
        assert!((leader.changes_alone.max_ms - 800.0).abs() < 1.0);
        assert!((leader.max_ms - 2000.0).abs() < 1.0);
        assert_eq!(kinds[&Fault::SlowDisk].happened, 0);
    }
}
