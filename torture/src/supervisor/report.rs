//! What a run did and found.

use std::collections::BTreeMap;

use serde::Serialize;

use super::fault::Fault;
use crate::blkcheck::report::{Report as Load, Verdict};
use crate::blkcheck::stalls::Slow;

/// One fault, on the load's clock.
#[derive(Debug, Clone, Serialize)]
pub struct Happened {
    pub fault: Fault,
    pub began_ns: u64,
    pub healed_ns: u64,
    pub detail: String,
    pub happened: bool,
}

/// Over the faults of one kind that met no other: the longest request that was under way meanwhile, of each.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Stall {
    pub faults: usize,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct OfFault {
    pub happened: usize,
    pub missed: usize,
    pub changes_alone: Stall,
    pub reads_alone: Stall,
    /// Of all, those that met others included.
    pub max_ms: f64,
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub verdict: Verdict,
    pub seed: u64,
    pub seconds: f64,
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
    /// 2 cores shared with a compiler say nothing about stalls.
    pub load_average_at_end: f64,
    pub load: Option<Load>,
    pub history: Vec<Happened>,
    pub folder: Option<String>,
}

/// After a fault is healed, elections and reconnections may still be going on.
const AFTERMATH_NS: u64 = 3_000_000_000;

pub fn by_fault(listed: &[Fault], history: &[Happened], slow: &[Slow]) -> BTreeMap<Fault, OfFault> {
    let mut kinds: BTreeMap<Fault, OfFault> =
        listed.iter().map(|&fault| (fault, OfFault::default())).collect();
    let mut alone: BTreeMap<(Fault, bool), Vec<f64>> = BTreeMap::new();
    for (i, one) in history.iter().enumerate() {
        let of = kinds.entry(one.fault).or_default();
        if !one.happened {
            of.missed += 1;
            continue;
        }
        of.happened += 1;
        let until = one.healed_ns + AFTERMATH_NS;
        let met_another = history.iter().enumerate().any(|(j, other)| {
            i != j && other.began_ns < until && one.began_ns < other.healed_ns + AFTERMATH_NS
        });
        for is_read in [true, false] {
            let longest = slow
                .iter()
                .filter(|op| op.is_read == is_read && op.invoked < until && op.answered > one.began_ns)
                .map(|op| op.answered - op.invoked)
                .max()
                .unwrap_or(0);
            #[allow(clippy::cast_precision_loss)]
            let ms = longest as f64 / 1e6;
            of.max_ms = of.max_ms.max(ms);
            if !met_another {
                alone.entry((one.fault, is_read)).or_default().push(ms);
            }
        }
    }
    for ((fault, is_read), mut all) in alone {
        all.sort_by(f64::total_cmp);
        let rank = |percent: usize| all[(all.len() * percent).div_ceil(100).clamp(1, all.len()) - 1];
        let stall = Stall { faults: all.len(), p50_ms: rank(50), p99_ms: rank(99), max_ms: rank(100) };
        let of = kinds.entry(fault).or_default();
        *(if is_read { &mut of.reads_alone } else { &mut of.changes_alone }) = stall;
    }
    kinds
}

impl Report {
    pub fn settle_verdict(&mut self) {
        for (fault, of) in &self.faults {
            if of.happened == 0 {
                self.unknowns.push(format!("{fault} was listed and did not happen"));
            }
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
            "\n{:<20} {:>5} {:>28} {:>28} {:>9}",
            "fault", "times", "changes p50/p99/max ms", "reads p50/p99/max ms", "all max"
        )];
        for (fault, of) in &self.faults {
            let stall = |s: &Stall| {
                if s.faults == 0 {
                    "-".to_owned()
                } else {
                    format!("{:.0}/{:.0}/{:.0} ({})", s.p50_ms, s.p99_ms, s.max_ms, s.faults)
                }
            };
            lines.push(format!(
                "{:<20} {:>5} {:>28} {:>28} {:>9.0}",
                fault.name(),
                of.happened,
                stall(&of.changes_alone),
                stall(&of.reads_alone),
                of.max_ms
            ));
        }
        lines.push(
            "(stalls: the longest request of each fault that met no other; in brackets, how many)".to_owned(),
        );
        if let Some(load) = &self.load {
            lines.push(load.words());
        }
        lines.push(format!(
            "{} kill -9, {} one-node and {} all-node power cuts, {} leader changes seen; {} last checks with one away, read through {} leaders; load average {:.1}",
            self.kills,
            self.power_cuts_one,
            self.power_cuts_all,
            self.leader_changes,
            self.checks_without_one,
            self.leaders_read_through,
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
    use super::{Happened, by_fault};
    use crate::blkcheck::stalls::Slow;
    use crate::supervisor::fault::Fault;

    fn at(fault: Fault, began_s: u64, healed_s: u64) -> Happened {
        let ns = |s: u64| s * 1_000_000_000;
        Happened {
            fault,
            began_ns: ns(began_s),
            healed_ns: ns(healed_s),
            detail: String::new(),
            happened: true,
        }
    }

    #[test]
    fn a_stall_belongs_to_the_fault_that_met_no_other() {
        let history =
            [at(Fault::KillLeader, 10, 11), at(Fault::KillMds, 40, 41), at(Fault::KillLeader, 42, 43)];
        let ms = |ms: u64| ms * 1_000_000;
        let slow = [
            Slow { invoked: ms(9_900), answered: ms(10_700), is_read: false },
            Slow { invoked: ms(41_500), answered: ms(43_500), is_read: false },
            Slow { invoked: ms(70_000), answered: ms(79_000), is_read: false },
        ];
        let kinds = by_fault(&[Fault::KillLeader, Fault::SlowDisk], &history, &slow);
        let leader = &kinds[&Fault::KillLeader];
        assert_eq!((leader.happened, leader.changes_alone.faults), (2, 1));
        assert!((leader.changes_alone.max_ms - 800.0).abs() < 1.0);
        assert!((leader.max_ms - 2000.0).abs() < 1.0);
        assert_eq!(kinds[&Fault::SlowDisk].happened, 0);
    }
}
