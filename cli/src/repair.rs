//! Replicas that take another one's place, as `cluster status` and `chunkserver show` tell of them.

use evolute_protocol::rpc::{RepairReason, RepairStage, RepairStatus};
use serde::Serialize;

use crate::output::{span, table};
use crate::size::human;

/// A replacement as `--json` shows it. The shape is in docs/cli.md.
#[derive(Debug, Clone, Serialize)]
pub struct RepairView {
    pub copyset: u32,
    old_replica: u64,
    pub old_chunkserver: u32,
    new_replica: u64,
    pub new_chunkserver: u32,
    reason: &'static str,
    stage: &'static str,
    entries_left: u64,
    bytes_total: u64,
    bytes_left: u64,
    running_ms: u64,
    eta_ms: Option<u64>,
}

impl From<RepairStatus> for RepairView {
    fn from(repair: RepairStatus) -> Self {
        Self {
            copyset: repair.copyset,
            old_replica: repair.old_replica,
            old_chunkserver: repair.old_chunkserver,
            new_replica: repair.new_replica,
            new_chunkserver: repair.new_chunkserver,
            reason: match repair.reason() {
                RepairReason::Unknown => "unknown",
                RepairReason::Silent => "silent",
                RepairReason::Lost => "lost",
                RepairReason::Retiring => "retiring",
                RepairReason::Balance => "balance",
            },
            stage: match repair.stage() {
                RepairStage::Unknown => "unknown",
                RepairStage::Creating => "creating",
                RepairStage::CatchingUp => "catching-up",
                RepairStage::Joining => "joining",
            },
            entries_left: repair.entries_left,
            bytes_total: repair.bytes_total,
            bytes_left: repair.bytes_left,
            running_ms: repair.running_ms,
            eta_ms: (repair.eta_ms != 0).then_some(repair.eta_ms),
        }
    }
}

impl RepairView {
    pub fn eta_ms(&self) -> Option<u64> {
        self.eta_ms
    }

    fn row(&self) -> Vec<String> {
        let left = match (self.bytes_left, self.entries_left) {
            (0, 0) => "-".to_owned(),
            (0, entries) => format!("{entries} entries"),
            (bytes, _) => format!("{} of {}", human(bytes), human(self.bytes_total)),
        };
        vec![
            self.copyset.to_string(),
            self.old_chunkserver.to_string(),
            self.new_chunkserver.to_string(),
            self.reason.to_owned(),
            self.stage.to_owned(),
            left,
            span(self.running_ms),
            self.eta_ms.map_or("-".to_owned(), span),
        ]
    }
}

pub fn repair_table(repairs: &[RepairView]) -> String {
    let rows: Vec<_> = repairs.iter().map(RepairView::row).collect();
    table(&[">COPYSET", ">FROM", ">TO", "WHY", "STAGE", "LEFT", "RUNNING", "ETA"], &rows)
}

#[cfg(test)]
mod tests {
    use super::{RepairView, repair_table};
    use evolute_protocol::rpc::{RepairReason, RepairStage, RepairStatus};

    #[test]
    fn what_is_left_is_bytes_and_then_entries() {
        let repair = RepairStatus {
            copyset: 5,
            old_chunkserver: 3,
            new_chunkserver: 4,
            reason: RepairReason::Silent.into(),
            stage: RepairStage::CatchingUp.into(),
            entries_left: 900,
            bytes_total: 4 << 30,
            bytes_left: 1 << 30,
            running_ms: 61_000,
            eta_ms: 20_000,
            ..RepairStatus::default()
        };
        let later = RepairStatus { bytes_left: 0, eta_ms: 0, ..repair };
        let shown = repair_table(&[RepairView::from(repair), RepairView::from(later)]);
        let rows: Vec<_> =
            shown.lines().map(|row| row.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(rows[1], "5 3 4 silent catching-up 1 GiB of 4 GiB 61 s 20 s");
        assert_eq!(rows[2], "5 3 4 silent catching-up 900 entries 61 s -");
    }
}
