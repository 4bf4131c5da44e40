//! The verdict on a round, and on the run.

use super::{Run, STORY_LINES};
use crate::blkcheck::report::{Report, Verdict};
use crate::history::Round;
use crate::register::Violation;

impl Run {
    /// Here and now, with nothing under way: whoever asked for the round gets its verdict with it.
    pub(super) fn judge(&mut self, round: &Round) {
        let checked = round.check();
        let totals = &mut self.totals.checked;
        totals.sector_operations += checked.sector_operations;
        totals.violations += checked.violations;
        totals.undecided_sectors += checked.undecided_sectors;
        if let Some((sector, Violation::Stale { older, newer, .. })) = checked.examples.first() {
            let story = round.story(*sector, [*older, *newer]);
            let left_out = story.len().saturating_sub(2 * STORY_LINES);
            for (i, line) in story.into_iter().enumerate() {
                if i < STORY_LINES || i >= STORY_LINES + left_out {
                    self.totals.examples.push(format!("sector {sector}: {line}"));
                }
            }
        }
        for (sector, violation) in checked.examples {
            let touched = round.ops.iter().filter(|op| op.sectors.contains(&sector)).count();
            self.example(format!(
                "round {}, sector {sector}: {violation} ({touched} requests touched it in this round)",
                self.totals.rounds
            ));
        }
    }

    pub(super) fn report(mut self) -> Report {
        let complete = self.round.ops.is_empty() && self.totals.rounds > 0;
        let unanswered = self.device.under_way() as u64;
        // The last round may have been cut short: what was answered is checked all the same.
        let round = std::mem::take(&mut self.round);
        self.judge(&round);
        let count = |name: &str| self.totals.counts.get(name).copied().unwrap_or(0);
        let mut report = Report {
            verdict: Verdict::Unknown,
            seed: self.options.seed,
            seconds: self.began.elapsed().as_secs_f64(),
            rounds: self.totals.rounds,
            answered: self.totals.counts.values().sum(),
            reads: count("reads"),
            writes: count("writes"),
            zeroes: count("zeroes"),
            flushes: count("flushes"),
            acked_changes: self.totals.acked_changes,
            failed: self.totals.failed,
            unanswered,
            left_behind: self.totals.left_behind,
            sector_operations_checked: self.totals.checked.sector_operations,
            violations: self.totals.checked.violations + self.totals.refused,
            damaged_sectors: self.totals.damaged,
            examples: self.totals.examples,
            undecided_sectors: self.totals.checked.undecided_sectors,
            complete,
            connections: self.device.connections,
            has_inflight: self.device.has_inflight(),
            read_latency: self.stalls.reads(),
            change_latency: self.stalls.changes(),
            gap: self.stalls.gaps(),
            slow: self.stalls.slow,
        };
        report.settle_verdict();
        report
    }
}
