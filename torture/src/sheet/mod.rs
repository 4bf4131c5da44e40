//! The report sheet: what one or several runs did and found together, for somebody who was not there.
//!
//! Runs go in as the JSON that `torture --json` wrote, of older versions too; Markdown comes out. Nothing is left out
//! because it looks bad: a failed run is in the totals and is named.

mod words;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::blkcheck::report::Verdict;
use crate::supervisor::coverage::Covered;
use crate::supervisor::fault::Fault;
use crate::supervisor::report::{Report, Stall};

/// A run and the name of the file it came from.
pub struct Named {
    pub name: String,
    pub report: Report,
}

#[derive(Debug, Default)]
pub struct OfFault {
    pub happened: usize,
    pub missed: usize,
    pub covered: Covered,
    pub changes: Stall,
    pub reads: Stall,
    pub max_ms: f64,
}

/// Sums over all runs.
#[derive(Debug, Default)]
pub struct Totals {
    pub hours: f64,
    pub kills: usize,
    pub power_cuts_one: usize,
    pub power_cuts_all: usize,
    pub leader_changes: u64,
    pub requests: u64,
    pub acked_changes: u64,
    pub sector_operations: u64,
    /// Sectors whose history no register has.
    pub violations: u64,
    pub damaged: u64,
    /// Requests answered with an error.
    pub failed: u64,
    pub undecided: u64,
    /// What else went wrong, of programs that died or clusters that did not heal.
    pub failures: usize,
    pub checks_without_one: usize,
    pub replicas_read_through: usize,
    pub replicas_in_files: usize,
    pub sectors_in_files: u64,
    pub passed: usize,
    pub failed_runs: usize,
    pub faults: BTreeMap<Fault, OfFault>,
    /// Runs that say of each of their faults what it stalled.
    pub with_stalls: usize,
}

impl Totals {
    pub fn of(runs: &[Named]) -> Self {
        let mut totals = Self::default();
        for run in runs {
            totals.add(&run.report);
        }
        for (fault, of) in &mut totals.faults {
            let alone = |ms: fn(&_) -> f64| {
                let histories = runs.iter().flat_map(|run| &run.report.history);
                let those = histories.filter(|one| one.fault == *fault && one.happened && one.alone);
                Stall::of(those.map(ms).collect())
            };
            of.changes = alone(|one| one.change_ms);
            of.reads = alone(|one| one.read_ms);
        }
        totals
    }

    fn add(&mut self, run: &Report) {
        self.hours += run.seconds / 3600.0;
        self.kills += run.kills;
        self.power_cuts_one += run.power_cuts_one;
        self.power_cuts_all += run.power_cuts_all;
        self.leader_changes += run.leader_changes;
        self.failures += run.failures.len();
        self.checks_without_one += run.checks_without_one;
        self.replicas_read_through += run.replicas_read_through;
        self.replicas_in_files += run.replicas_in_files;
        self.sectors_in_files += run.sectors_in_files;
        self.passed += usize::from(run.verdict == Verdict::Pass);
        self.failed_runs += usize::from(run.verdict == Verdict::Fail);
        self.with_stalls += usize::from(run.about.is_some());
        if let Some(load) = &run.load {
            self.requests += load.answered;
            self.acked_changes += load.acked_changes;
            self.sector_operations += load.sector_operations_checked;
            self.violations += load.violations.saturating_sub(load.failed + load.damaged_sectors);
            self.damaged += load.damaged_sectors;
            self.failed += load.failed;
            self.undecided += load.undecided_sectors;
        }
        for (fault, of) in &run.faults {
            let sum = self.faults.entry(*fault).or_default();
            sum.happened += of.happened;
            sum.missed += of.missed;
            sum.covered.faults += of.covered.faults;
            sum.covered.leaders += of.covered.leaders;
            sum.covered.followers += of.covered.followers;
            sum.covered.acks += of.covered.acks;
            sum.max_ms = sum.max_ms.max(of.max_ms);
        }
    }

    /// Nothing acknowledged was lost or garbled, as far as these runs can tell.
    pub fn nothing_lost(&self) -> bool {
        self.violations == 0 && self.damaged == 0 && self.undecided == 0
    }
}

/// Reads the runs, writes the sheet, and says in a line what it says.
pub fn write(files: &[PathBuf], out: &Path) -> Result<String> {
    let runs = files.iter().map(|file| read(file)).collect::<Result<Vec<Named>>>()?;
    ensure!(!runs.is_empty(), "no runs");
    let totals = Totals::of(&runs);
    std::fs::write(out, words::sheet(&runs, &totals))
        .with_context(|| format!("cannot write {}", out.display()))?;
    Ok(format!(
        "{}: {} runs, {} passed, {} failed, {:.1} h, {} kill -9, {} violations",
        out.display(),
        runs.len(),
        totals.passed,
        totals.failed_runs,
        totals.hours,
        totals.kills,
        totals.violations
    ))
}

fn read(file: &Path) -> Result<Named> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let report =
        serde_json::from_str(&text).with_context(|| format!("{} is no torture report", file.display()))?;
    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Named { name, report })
}

#[cfg(test)]
mod tests {
    use super::{Named, Totals, words};
    use crate::supervisor::fault::Fault;

    /// As the first version wrote it, which knew no windows and no machine.
    fn an_old_run(register: u64, failed: u64) -> Named {
        let spread = serde_json::json!({"count": 1, "p50_ms": 1.0, "p99_ms": 1.0, "max_ms": 1.0});
        let stall = serde_json::json!({"faults": 1, "p50_ms": 700.0, "p99_ms": 700.0, "max_ms": 700.0});
        let happened = |fault: &str| serde_json::json!({"fault": fault, "began_ns": 5, "healed_ns": 9, "detail": "", "happened": true});
        let report = serde_json::json!({
            "verdict": if register + failed > 0 { "fail" } else { "pass" },
            "seed": 7, "seconds": 1800.0, "kills": 20, "power_cuts_one": 4, "power_cuts_all": 2, "leader_changes": 30,
            "faults": {"kill-leader": {
                "happened": 20, "missed": 0, "changes_alone": stall, "reads_alone": stall, "max_ms": 900.0
            }},
            "violations": register + failed, "failures": [], "unknowns": [], "checks_without_one": 3,
            "leaders_read_through": 3, "load_average_at_end": 2.5,
            "history": [happened("kill-leader"), happened("kill-leader")],
            "folder": null,
            "load": {
                "verdict": "pass", "seed": 7, "seconds": 1800.0, "rounds": 3, "answered": 1000, "reads": 400, "writes": 500,
                "zeroes": 50, "flushes": 50, "acked_changes": 550, "failed": failed, "unanswered": 0,
                "sector_operations_checked": 9000, "violations": register + failed, "damaged_sectors": 0,
                "examples": ["sector 9: a story"], "undecided_sectors": 0, "complete": true, "connections": 1,
                "has_inflight": true, "read_latency": spread, "change_latency": spread, "gap": spread
            }
        });
        Named { name: "old".into(), report: serde_json::from_value(report).expect("still readable") }
    }

    #[test]
    fn runs_of_the_first_version_are_summed_up() {
        let runs = [an_old_run(0, 0), an_old_run(0, 0)];
        let totals = Totals::of(&runs);
        assert_eq!((totals.kills, totals.power_cuts_one, totals.acked_changes), (40, 8, 1100));
        assert!((totals.hours - 1.0).abs() < 0.001);
        assert_eq!(totals.faults[&Fault::KillLeader].happened, 40);
        let sheet = words::sheet(&runs, &totals);
        assert!(sheet.contains("None of them was lost"), "{sheet}");
        assert!(
            sheet.contains("a kill -9, of one or of several at one moment, in fewer than one of 13"),
            "{sheet}"
        );
    }

    /// A request that failed is no lost write, and a lost write is not hidden among many good runs.
    #[test]
    fn a_violation_is_told_apart_from_a_refusal_and_told() {
        let refused = [an_old_run(0, 3), an_old_run(0, 0)];
        let totals = Totals::of(&refused);
        assert_eq!((totals.violations, totals.failed), (0, 3));
        assert!(words::sheet(&refused, &totals).contains("3 requests were answered with an error"));
        let lost = [an_old_run(1, 0), an_old_run(0, 0)];
        let totals = Totals::of(&lost);
        let sheet = words::sheet(&lost, &totals);
        assert!(sheet.contains("This is not safe") && !sheet.contains("None of them was lost"), "{sheet}");
        assert!(sheet.contains("sector 9: a story"), "{sheet}");
    }
}
