//! What was measured: a JSON line per run, and a table that is Markdown too.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::cpu::{Watch, Watched};
use crate::front_end::report::Report;

/// One run of one work on one system. Its JSON form is a promise: the fields and names of issue 3.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub work: &'static str,
    pub store: &'static str,
    pub system: &'static str,
    pub iops: f64,
    pub mib_s: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    /// Of all processes of the system; the load generator, which stands for the guest, is not in it.
    pub cpu_us_per_io: f64,
    #[serde(skip)]
    pub parts: Parts,
}

/// What the table says beyond the JSON line.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// CPU µs per I/O of each process.
    pub processes: Vec<(String, f64)>,
    pub generator: f64,
    /// Per cent of the machine's CPU time taken by everybody else meanwhile.
    pub others: f64,
}

impl Row {
    pub fn new(
        (work, store, system): (&'static str, &'static str, &'static str),
        report: &Report,
        processes: &[Watched],
        watch: &Watch<'_>,
    ) -> Self {
        let per_io = |time: Duration| rounded(time.as_secs_f64() * 1e6 / report.all.ios.max(1) as f64, 2);
        let total: Duration = watch.used.iter().sum();
        let generator = Duration::from_secs_f64(report.cpu_user_s + report.cpu_sys_s);
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get()) as f64;
        let others = watch.machine.saturating_sub(total + generator).as_secs_f64();
        Self {
            work,
            store,
            system,
            iops: report.all.iops,
            mib_s: report.all.bw_mib_s,
            p50_us: report.all.p50_us,
            p99_us: report.all.p99_us,
            p999_us: report.all.p999_us,
            cpu_us_per_io: per_io(total),
            parts: Parts {
                processes: processes
                    .iter()
                    .zip(&watch.used)
                    .map(|(p, used)| (p.name.clone(), per_io(*used)))
                    .collect(),
                generator: per_io(generator),
                others: rounded(others / (report.runtime_s * cores) * 100.0, 1),
            },
        }
    }

    pub fn json_line(&self) -> String {
        serde_json::to_string(self).expect("names and finite numbers are JSON")
    }

    /// For the progress of the run.
    pub fn words(&self) -> String {
        format!(
            "{:>9.0} IOPS  {:>7.1} MiB/s  p50 {:>7.1} µs  p99 {:>8.1} µs  {:>6.1} CPU µs/IO",
            self.iops, self.mib_s, self.p50_us, self.p99_us, self.cpu_us_per_io
        )
    }
}

fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}

/// Markdown whose columns are aligned, so that it is a table for a person at a terminal too.
pub fn table(rows: &[Row]) -> String {
    let headings = [
        "store",
        "work",
        "system",
        "IOPS",
        "MiB/s",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "CPU µs/IO",
        "by process",
        "generator",
        "others %",
    ];
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let by_process: Vec<String> = row
                .parts
                .processes
                .iter()
                .map(|(name, us)| format!("{} {us:.1}", name.replace("chunkserver-", "cs")))
                .collect();
            vec![
                row.store.to_owned(),
                row.work.to_owned(),
                row.system.to_owned(),
                format!("{:.0}", row.iops),
                format!("{:.1}", row.mib_s),
                format!("{:.1}", row.p50_us),
                format!("{:.1}", row.p99_us),
                format!("{:.1}", row.p999_us),
                format!("{:.1}", row.cpu_us_per_io),
                by_process.join(", "),
                format!("{:.1}", row.parts.generator),
                format!("{:.0}", row.parts.others),
            ]
        })
        .collect();
    let is_text = |column: usize| column < 3 || column == 9;
    let widths: Vec<usize> = (0..headings.len())
        .map(|column| {
            let lengths = cells.iter().map(|row| row[column].chars().count());
            lengths.chain([headings[column].chars().count(), 3]).max().unwrap_or(3)
        })
        .collect();
    let mut text = String::new();
    let mut line = |cells: &[String]| {
        for (column, cell) in cells.iter().enumerate() {
            let width = widths[column];
            let _ = if is_text(column) {
                write!(text, "| {cell:<width$} ")
            } else {
                write!(text, "| {cell:>width$} ")
            };
        }
        text.push_str("|\n");
    };
    line(&headings.map(str::to_owned));
    let rule: Vec<String> = widths
        .iter()
        .enumerate()
        .map(
            |(column, width)| {
                if is_text(column) { "-".repeat(*width) } else { format!("{}:", "-".repeat(width - 1)) }
            },
        )
        .collect();
    line(&rule);
    for row in &cells {
        line(row);
    }
    text
}

/// What issue 3 asks of three chunkservers on tmpfs on a two-core machine: (work, what, bound, whether met).
pub fn goals(rows: &[Row]) -> Vec<String> {
    let found = |work: &str| {
        rows.iter().find(|row| row.system == "evolute" && row.store == "tmpfs" && row.work == work)
    };
    let verdict = |met: bool| if met { "met" } else { "NOT met" };
    let mut goals = Vec::new();
    if let Some(row) = found("randwrite-4k-qd32") {
        let met = verdict(row.iops >= 20_000.0);
        goals.push(format!("4K random write at depth 32: {:.0} IOPS, wanted 20000 or more: {met}", row.iops));
    }
    if let Some(row) = found("randwrite-4k-qd1") {
        let met = verdict(row.p50_us <= 250.0);
        goals
            .push(format!("4K random write at depth 1: p50 {:.0} µs, wanted 250 or less: {met}", row.p50_us));
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::{Parts, Row, goals, table};

    fn row() -> Row {
        Row {
            work: "randwrite-4k-qd32",
            store: "tmpfs",
            system: "evolute",
            iops: 25000.5,
            mib_s: 97.66,
            p50_us: 1200.0,
            p99_us: 2400.0,
            p999_us: 4800.0,
            cpu_us_per_io: 60.25,
            parts: Parts {
                processes: vec![("backend".into(), 20.0), ("chunkserver-1".into(), 40.25)],
                generator: 3.0,
                others: 1.0,
            },
        }
    }

    #[test]
    fn a_json_line_has_the_fields_others_read() {
        assert_eq!(
            row().json_line(),
            r#"{"work":"randwrite-4k-qd32","store":"tmpfs","system":"evolute","iops":25000.5,"mib_s":97.66,"p50_us":1200.0,"p99_us":2400.0,"p999_us":4800.0,"cpu_us_per_io":60.25}"#
        );
    }

    #[test]
    fn a_table_is_markdown() {
        let text = table(&[row()]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        let columns: Vec<usize> = lines.iter().map(|line| line.matches('|').count()).collect();
        assert_eq!(columns, [13, 13, 13]);
        let lengths: Vec<usize> = lines.iter().map(|line| line.chars().count()).collect();
        assert!(lengths.iter().all(|length| *length == lengths[0]), "{lengths:?}");
        assert!(lines[2].contains("backend 20.0, cs1 40.2"), "{text}");
    }

    #[test]
    fn a_goal_that_was_missed_is_called_so() {
        assert!(goals(&[row()])[0].ends_with(": met"));
        assert!(goals(&[Row { iops: 19_999.0, ..row() }])[0].ends_with(": NOT met"));
        assert!(goals(&[]).is_empty());
    }
}
