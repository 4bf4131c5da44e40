//! What was measured: a JSON line each, and tables that are Markdown too.
//!
//! Two kinds of line: a [`Row`] is one load on one system, a [`Figure`] is one number of anything else. Both are
//! written and read back here, so that the report is made from the lines alone.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::cpu::{Watch, Watched};
use super::markdown::{Set, table};
use crate::front_end::report::Report;

/// One run of one work on one system. Its first fields are a promise: the names of issue 3. New ones come after them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub work: String,
    pub store: String,
    pub system: String,
    pub iops: f64,
    pub mib_s: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    /// Of all processes of the system; the load generator, which stands for the guest, is not in it.
    pub cpu_us_per_io: f64,
    /// CPU µs per I/O of each process; backends of several volumes are one.
    #[serde(default)]
    pub by_process: BTreeMap<String, f64>,
    #[serde(default)]
    pub generator_us_per_io: f64,
    /// Per cent of the machine's CPU time taken by everybody else meanwhile.
    #[serde(default)]
    pub others_percent: f64,
    /// The part of it that the host gave to its other guests.
    #[serde(default)]
    pub stolen_percent: f64,
    /// How often it was measured; this is the run of which least was stolen or, of loads that are compared by turns, the one in
    /// the middle.
    #[serde(default = "once")]
    pub runs: usize,
    /// What was varied, where something else than the load was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copysets: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes: Option<u32>,
    /// The same, all served by one backend process and not by one each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes_of_one_backend: Option<u32>,
}

/// Of lines that do not say so.
fn once() -> usize {
    1
}

/// One number that is not of a load: `name` says of what within the work, `unit` what it counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    pub work: String,
    pub store: String,
    pub system: String,
    pub name: String,
    pub value: f64,
    pub unit: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Everything of one run of `make bench`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Results {
    pub rows: Vec<Row>,
    pub figures: Vec<Figure>,
}

/// A line that is no result.
#[derive(Debug, thiserror::Error)]
#[error("line {number}: {source}")]
pub struct NotAResult {
    pub number: usize,
    pub source: serde_json::Error,
}

impl Row {
    pub fn new(
        (work, store, system): (&str, &str, &str),
        report: &Report,
        processes: &[Watched],
        watch: &Watch<'_>,
    ) -> Self {
        let per_io = |time: Duration| rounded(time.as_secs_f64() * 1e6 / report.all.ios.max(1) as f64, 2);
        let total: Duration = watch.used.iter().sum();
        let generator = Duration::from_secs_f64(report.cpu_user_s + report.cpu_sys_s);
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get()) as f64;
        let others = watch.machine.saturating_sub(total + generator);
        let of_machine = |time: Duration| rounded(time.as_secs_f64() / (report.runtime_s * cores) * 100.0, 1);
        let mut used: BTreeMap<String, Duration> = BTreeMap::new();
        for (process, time) in processes.iter().zip(&watch.used) {
            *used.entry(process.name.clone()).or_default() += *time;
        }
        Self {
            work: work.to_owned(),
            store: store.to_owned(),
            system: system.to_owned(),
            iops: report.all.iops,
            mib_s: report.all.bw_mib_s,
            p50_us: report.all.p50_us,
            p99_us: report.all.p99_us,
            p999_us: report.all.p999_us,
            cpu_us_per_io: per_io(total),
            by_process: used.into_iter().map(|(name, time)| (name, per_io(time))).collect(),
            generator_us_per_io: per_io(generator),
            others_percent: of_machine(others),
            stolen_percent: of_machine(watch.stolen),
            runs: 1,
            copysets: None,
            volumes: None,
            volumes_of_one_backend: None,
        }
    }

    /// For the progress of the run.
    pub fn words(&self) -> String {
        format!(
            "{:>9.0} IOPS  {:>7.1} MiB/s  p50 {:>7.1} µs  p99 {:>8.1} µs  {:>6.1} CPU µs/IO",
            self.iops, self.mib_s, self.p50_us, self.p99_us, self.cpu_us_per_io
        )
    }
}

impl Figure {
    /// Rounded to what any of our units can mean.
    pub fn new(
        (work, store, system): (&str, &str, &str),
        name: impl Into<String>,
        value: f64,
        unit: &str,
    ) -> Self {
        let (work, store, system) = (work.to_owned(), store.to_owned(), system.to_owned());
        Self {
            work,
            store,
            system,
            name: name.into(),
            value: rounded(value, 4),
            unit: unit.to_owned(),
            note: None,
        }
    }

    pub fn noted(self, note: impl Into<String>) -> Self {
        Self { note: Some(note.into()), ..self }
    }

    pub fn words(&self) -> String {
        let note = self.note.as_ref().map(|note| format!("  ({note})")).unwrap_or_default();
        format!("{:<24} {} {}{note}", self.name, short(self.value), self.unit)
    }
}

impl Results {
    /// Reads what [`json_line`] wrote. Lines of the time before there were figures are read too.
    pub fn parse(text: &str) -> Result<Self, NotAResult> {
        let mut results = Self::default();
        results.add(text)?;
        Ok(results)
    }

    /// Lines of another run: what was measured again takes the place of what was there.
    pub fn add(&mut self, text: &str) -> Result<(), NotAResult> {
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let wrong = |source| NotAResult { number: i + 1, source };
            let value: serde_json::Value = serde_json::from_str(line).map_err(wrong)?;
            if value.get("iops").is_some() {
                let row: Row = serde_json::from_value(value).map_err(wrong)?;
                put(&mut self.rows, row, |row| [&row.work, &row.store, &row.system].map(String::clone));
            } else {
                let figure: Figure = serde_json::from_value(value).map_err(wrong)?;
                put(&mut self.figures, figure, |figure| {
                    [&figure.work, &figure.store, &figure.system, &figure.name].map(String::clone)
                });
            }
        }
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.figures.is_empty()
    }

    pub fn row(&self, store: &str, system: &str, work: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.store == store && row.system == system && row.work == work)
    }

    pub fn figures_of<'a>(&'a self, work: &'a str) -> impl Iterator<Item = &'a Figure> {
        self.figures.iter().filter(move |figure| figure.work == work)
    }
}

/// In the place of the one with the same key, or at the end.
fn put<T, K: PartialEq>(all: &mut Vec<T>, one: T, key: impl Fn(&T) -> K) {
    match all.iter_mut().find(|other| key(other) == key(&one)) {
        Some(other) => *other = one,
        None => all.push(one),
    }
}

pub fn json_line(result: &impl Serialize) -> String {
    serde_json::to_string(result).expect("names and finite numbers are JSON")
}

pub fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}

/// Three digits that matter; whole numbers whole.
pub fn short(value: f64) -> String {
    match value.abs() {
        v if v.fract() == 0.0 => format!("{value}"),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

pub fn table_of_rows<'r>(rows: impl IntoIterator<Item = &'r Row>) -> String {
    let columns = [
        ("store", Set::Text),
        ("work", Set::Text),
        ("system", Set::Text),
        ("IOPS", Set::Number),
        ("MiB/s", Set::Number),
        ("p50 µs", Set::Number),
        ("p99 µs", Set::Number),
        ("p99.9 µs", Set::Number),
        ("CPU µs/IO", Set::Number),
        ("by process", Set::Text),
        ("generator", Set::Number),
        ("others %", Set::Number),
        ("stolen %", Set::Number),
        ("runs", Set::Number),
    ];
    let cells: Vec<Vec<String>> = rows
        .into_iter()
        .map(|row| {
            let by_process: Vec<String> = row
                .by_process
                .iter()
                .map(|(name, us)| format!("{} {us:.1}", name.replace("chunkserver-", "cs")))
                .collect();
            vec![
                row.store.clone(),
                row.work.clone(),
                row.system.clone(),
                format!("{:.0}", row.iops),
                format!("{:.1}", row.mib_s),
                format!("{:.1}", row.p50_us),
                format!("{:.1}", row.p99_us),
                format!("{:.1}", row.p999_us),
                format!("{:.1}", row.cpu_us_per_io),
                by_process.join(", "),
                format!("{:.1}", row.generator_us_per_io),
                format!("{:.0}", row.others_percent),
                format!("{:.1}", row.stolen_percent),
                row.runs.to_string(),
            ]
        })
        .collect();
    table(&columns, &cells)
}

pub fn table_of_figures<'f>(figures: impl IntoIterator<Item = &'f Figure>) -> String {
    let columns = [
        ("store", Set::Text),
        ("work", Set::Text),
        ("of", Set::Text),
        ("value", Set::Number),
        ("unit", Set::Text),
        ("note", Set::Text),
    ];
    let cells: Vec<Vec<String>> = figures
        .into_iter()
        .map(|figure| {
            vec![
                figure.store.clone(),
                figure.work.clone(),
                figure.name.clone(),
                short(figure.value),
                figure.unit.clone(),
                figure.note.clone().unwrap_or_default(),
            ]
        })
        .collect();
    table(&columns, &cells)
}

#[cfg(test)]
pub mod tests {
    use super::{Figure, Results, Row, json_line, short, table_of_figures, table_of_rows};

    pub fn row(store: &str, work: &str) -> Row {
        Row {
            work: work.to_owned(),
            store: store.to_owned(),
            system: "evolute".to_owned(),
            iops: 25000.5,
            mib_s: 97.66,
            p50_us: 1200.0,
            p99_us: 2400.0,
            p999_us: 4800.0,
            cpu_us_per_io: 60.25,
            by_process: [("backend".to_owned(), 20.0), ("chunkserver-1".to_owned(), 40.25)].into(),
            generator_us_per_io: 3.0,
            others_percent: 1.0,
            stolen_percent: 0.0,
            runs: 1,
            copysets: None,
            volumes: None,
            volumes_of_one_backend: None,
        }
    }

    #[test]
    fn a_json_line_begins_with_the_fields_others_read() {
        let line = json_line(&row("tmpfs", "randwrite-4k-qd32"));
        let promised = r#"{"work":"randwrite-4k-qd32","store":"tmpfs","system":"evolute","iops":25000.5,"mib_s":97.66,"p50_us":1200.0,"p99_us":2400.0,"p999_us":4800.0,"cpu_us_per_io":60.25,"#;
        assert!(line.starts_with(promised), "{line}");
    }

    #[test]
    fn what_was_written_is_read_back_and_what_is_no_result_is_named_by_its_line() {
        let row = Row { volumes: Some(32), ..row("tmpfs", "volumes-32") };
        let figure = Figure::new(("idle", "tmpfs", "evolute"), "mds", 0.05, "% of a core").noted("12 s");
        let text = format!("{}\n\n{}\n", json_line(&row), json_line(&figure));
        let results = Results::parse(&text).expect("ours");
        assert_eq!(results, Results { rows: vec![row], figures: vec![figure] });
        let old = r#"{"work":"w","store":"s","system":"y","iops":1.0,"mib_s":1,"p50_us":1,"p99_us":1,"p999_us":1,"cpu_us_per_io":1}"#;
        let old_row = &Results::parse(old).expect("of issue 3").rows[0];
        assert_eq!((old_row.by_process.len(), old_row.runs), (0, 1));
        for bad in ["no JSON", r#"{"work":"w"}"#, r#"{"iops":"many"}"#] {
            let refused = Results::parse(&format!("{old}\n{bad}")).expect_err(bad).to_string();
            assert!(refused.starts_with("line 2: "), "{refused}");
        }
    }

    #[test]
    fn what_is_measured_again_takes_the_place_of_what_was_there() {
        let of = |row: &Row, value| {
            let figure = Figure::new(("idle", "tmpfs", "evolute"), "mds", value, "%");
            format!("{}\n{}", json_line(row), json_line(&figure))
        };
        let first = row("tmpfs", "randread-4k-qd1");
        let again = Row { iops: 1.0, ..first.clone() };
        let mut results = Results::parse(&of(&first, 1.0)).expect("ours");
        results.add(&of(&again, 2.0)).expect("ours");
        results.add(&json_line(&row("disk", "randread-4k-qd1"))).expect("ours");
        assert_eq!((results.rows.len(), results.rows[0].iops), (2, 1.0));
        assert_eq!((results.figures.len(), results.figures[0].value), (1, 2.0));
    }

    #[test]
    fn tables_are_markdown_with_every_cell() {
        let text = table_of_rows(&[row("tmpfs", "randwrite-4k-qd32")]);
        let columns: Vec<usize> = text.lines().map(|line| line.matches('|').count()).collect();
        assert_eq!(columns, [15, 15, 15]);
        assert!(text.contains("backend 20.0, cs1 40.2"), "{text}");
        let text = table_of_figures(&[Figure::new(("idle", "tmpfs", "evolute"), "mds", 0.05, "%")]);
        assert!(text.contains("| idle | mds | 0.050 | %"), "{text}");
    }

    #[test]
    fn a_number_is_shown_by_three_digits() {
        assert_eq!([12345.6, 25.04, 2.217, 0.0512, 0.0].map(short), ["12346", "25.0", "2.22", "0.051", "0"]);
    }
}
