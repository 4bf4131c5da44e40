//! What a run found, for people and for programs.

use serde::{Deserialize, Serialize};

use super::stalls::{Slow, Spread};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Pass,
    Fail,
    /// Something was not checked; the report says what.
    Unknown,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub verdict: Verdict,
    pub seed: u64,
    pub seconds: f64,
    pub rounds: u64,
    pub answered: u64,
    pub reads: u64,
    pub writes: u64,
    pub zeroes: u64,
    pub flushes: u64,
    /// Writes, discards and write-zeroes answered with success.
    pub acked_changes: u64,
    /// Requests answered with an error.
    pub failed: u64,
    /// Requests never answered.
    pub unanswered: u64,
    /// Requests that a server had when the load went to its successor.
    #[serde(default)]
    pub left_behind: u64,
    /// One per sector and operation.
    pub sector_operations_checked: u64,
    /// Sectors whose history no register has, sectors that no write of ours can have left, and requests refused.
    pub violations: u64,
    pub damaged_sectors: u64,
    /// In words; the first ones.
    pub examples: Vec<String>,
    pub undecided_sectors: u64,
    /// The last complete check came after the last request.
    pub complete: bool,
    pub connections: u32,
    pub has_inflight: bool,
    pub read_latency: Spread,
    pub change_latency: Spread,
    /// Time without any answer while something was under way.
    pub gap: Spread,
    #[serde(skip)]
    pub slow: Vec<Slow>,
}

impl Report {
    pub fn settle_verdict(&mut self) {
        self.verdict = if self.violations > 0 {
            Verdict::Fail
        } else if self.undecided_sectors > 0 || self.unanswered > 0 || !self.complete || self.answered == 0 {
            Verdict::Unknown
        } else {
            Verdict::Pass
        };
    }

    pub fn words(&self) -> String {
        let mut lines = vec![
            format!(
                "{:?}: {} requests answered in {:.1} s ({} reads, {} writes, {} zeroes, {} flushes), {} rounds, {} connections",
                self.verdict,
                self.answered,
                self.seconds,
                self.reads,
                self.writes,
                self.zeroes,
                self.flushes,
                self.rounds,
                self.connections
            ),
            format!(
                "checked {} operations on sectors: {} violations, {} damaged sectors, {} undecided; {} failed, {} unanswered",
                self.sector_operations_checked,
                self.violations,
                self.damaged_sectors,
                self.undecided_sectors,
                self.failed,
                self.unanswered
            ),
        ];
        for (name, spread) in
            [("reads", self.read_latency), ("changes", self.change_latency), ("gaps", self.gap)]
        {
            lines.push(format!(
                "{name}: p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms",
                spread.p50_ms, spread.p99_ms, spread.max_ms
            ));
        }
        lines.extend(self.examples.iter().map(|example| format!("  {example}")));
        lines.join("\n")
    }
}
