//! The generated parts of docs/performance.md, each a function of the results.

use super::document::Section;
use super::plots::{Plot, depth_of};
use crate::profile::tables::{is_profile, profiles, table_of_counts, table_of_stations, table_of_times};
use crate::runner::goals::{judge, summary, table_of_goals};
use crate::runner::machine::RUN;
use crate::runner::markdown::{NONE, Set, table};
use crate::runner::results::{Results, Row, short, table_of_figures, table_of_rows};
use crate::runner::special::MEMORY;

pub const NAMES: [&str; 9] =
    ["run", "goals", "tmpfs", "disk", "depth", "volumes", "memory", "figures", "profile"];
const NOTHING: &str = "This run did not measure it.";

/// `folder` is where the plots are, as the document names it.
pub fn sections(results: &Results, plots: &[Plot], folder: &str) -> Vec<Section> {
    let judged = judge(results);
    let of_store = |store: &str| {
        let rows = results.rows.iter().filter(|row| row.store == store && varied(row).is_none());
        or_nothing(rows.collect(), table_of_rows)
    };
    let about_growth = |row: &&Row| varied(row).is_some();
    let mut growth: Vec<&Row> = results.rows.iter().filter(about_growth).collect();
    // In the order of their numbers, whatever was measured beside what.
    growth.sort_by_key(|row| (row.copysets, row.volumes_of_one_backend, row.volumes));
    let of_work = |memory: bool| {
        let wanted = |work: &str| work != RUN && !is_profile(work) && (work == MEMORY) == memory;
        let figures = results.figures.iter().filter(|figure| wanted(&figure.work));
        or_nothing(figures.collect(), table_of_figures)
    };
    let with_plots = |text: String, files: &[&str]| {
        let shown = plots.iter().filter(|plot| files.contains(&plot.file));
        let images = shown.map(|plot| format!("![{}]({folder}/{})\n", plot.title, plot.file));
        [text].into_iter().chain(images).collect::<Vec<_>>().join("\n")
    };
    let contents = [
        run(results),
        format!("{}\n{}.", table_of_goals(&judged), summary(&judged)),
        of_store("tmpfs"),
        of_store("disk"),
        with_plots(depth(results), &["randwrite-latency.svg", "randread-latency.svg", "iops.svg", "cpu.svg"]),
        with_plots(or_nothing(growth, |rows| table_of_growth(&rows)), &["volumes.svg", "copysets.svg"]),
        of_work(true),
        of_work(false),
        profile(results),
    ];
    NAMES.into_iter().zip(contents).collect()
}

fn or_nothing<T>(found: Vec<T>, made: impl FnOnce(Vec<T>) -> String) -> String {
    if found.is_empty() { NOTHING.to_owned() } else { made(found) }
}

/// What `evolute-bench profile` measured, a pair of tables for each load.
fn profile(results: &Results) -> String {
    or_nothing(profiles(&results.figures), |found| {
        let tables = found.into_iter().map(|(work, profile)| {
            let (times, counts) = (table_of_times(&profile), table_of_counts(&profile));
            let mut text = format!("**{work}**, CPU µs per I/O:\n\n{times}\nTimes per I/O:\n\n{counts}");
            if !profile.stations.is_empty() {
                let stations = table_of_stations(&profile);
                text.push_str(&format!(
                    "\nHow long a request is where, µs, every system call noted:\n\n{stations}"
                ));
            }
            text
        });
        tables.collect::<Vec<_>>().join("\n")
    })
}

/// What besides the load varies in a row.
fn varied(row: &Row) -> Option<(&'static str, u32)> {
    let volumes = row.volumes.map(|n| ("volumes", n));
    let together = row.volumes_of_one_backend.map(|n| ("volumes of one backend", n));
    volumes.or(together).or(row.copysets.map(|n| ("copysets per chunkserver", n)))
}

/// One line of what the numbers depend on besides the code.
fn run(results: &Results) -> String {
    let facts = results.figures_of(RUN).map(|figure| {
        let note = figure.note.as_deref().unwrap_or_default();
        match figure.name.as_str() {
            "began" => format!("{}, {note}", day(figure.value)),
            name => format!("{name}: {} {} ({note})", short(figure.value), figure.unit),
        }
    });
    or_nothing(facts.collect(), |facts| format!("{}.", facts.join(", ")))
}

/// Year, month and day of a time in seconds since 1970.
fn day(seconds: f64) -> String {
    #[expect(clippy::cast_possible_truncation, reason = "a time is in the range of u64")]
    let seconds = seconds as u64;
    evolute_daemon::utc(seconds).split('T').next().unwrap_or_default().to_owned()
}

/// What a curve shows of a row.
const HEADINGS: [&str; 4] = ["IOPS", "p50 µs", "p99 µs", "CPU µs/IO"];

fn cells_of(row: &Row) -> [String; 4] {
    let short = |value: f64| format!("{value:.1}");
    [format!("{:.0}", row.iops), short(row.p50_us), short(row.p99_us), short(row.cpu_us_per_io)]
}

/// Reads and writes of one depth in one line.
fn depth(results: &Results) -> String {
    let find = |kind: &str, depth: u32| {
        let wanted = |row: &&Row| {
            row.store == "tmpfs" && row.system == "evolute" && depth_of(row) == Some((kind, depth))
        };
        results.rows.iter().find(wanted)
    };
    let mut depths: Vec<u32> = results.rows.iter().filter_map(depth_of).map(|(_, depth)| depth).collect();
    depths.sort_unstable();
    depths.dedup();
    let mut columns = vec![("depth", Set::Number)];
    columns.extend(HEADINGS.map(|heading| (heading, Set::Number)));
    columns.extend(HEADINGS.map(|heading| (heading, Set::Number)));
    columns[1].0 = "write IOPS";
    columns[5].0 = "read IOPS";
    let cells: Vec<Vec<String>> = depths
        .into_iter()
        .map(|depth| {
            let of = |row: Option<&Row>| row.map_or(HEADINGS.map(|_| NONE.to_owned()), cells_of);
            let mut cells = vec![depth.to_string()];
            cells.extend(of(find("randwrite", depth)));
            cells.extend(of(find("randread", depth)));
            cells
        })
        .collect();
    or_nothing(cells, |cells| table(&columns, &cells))
}

fn table_of_growth(rows: &[&Row]) -> String {
    let mut columns = vec![("varied", Set::Text), ("number", Set::Number)];
    columns.extend(HEADINGS.map(|heading| (heading, Set::Number)));
    let cells: Vec<Vec<String>> = rows
        .iter()
        .filter_map(|row| {
            let (what, number) = varied(row)?;
            let mut cells = vec![what.to_owned(), number.to_string()];
            cells.extend(cells_of(row));
            Some(cells)
        })
        .collect();
    table(&columns, &cells)
}

#[cfg(test)]
mod tests {
    use super::{NAMES, NOTHING, day, sections};
    use crate::report::plots::plots;
    use crate::runner::results::{Figure, Results, Row, tests::row};

    fn section(results: &Results, name: &str) -> String {
        let found = sections(results, &plots(results), "performance");
        found.into_iter().find(|(known, _)| *known == name).expect(name).1
    }

    #[test]
    fn what_was_varied_is_in_the_order_of_its_numbers() {
        let base = || row("tmpfs", "any");
        let results = Results {
            rows: vec![
                Row { copysets: Some(500), ..base() },
                Row { volumes: Some(32), ..base() },
                Row { volumes_of_one_backend: Some(2), ..base() },
                Row { copysets: Some(12), ..base() },
                Row { volumes: Some(1), ..base() },
            ],
            ..Results::default()
        };
        let text = section(&results, "volumes");
        let first_cells = |line: &str| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            Some(format!("{} {}", cells.get(1)?, cells.get(2)?))
        };
        let lines: Vec<String> = text.lines().skip(2).filter_map(first_cells).collect();
        let wanted = [
            "volumes 1",
            "volumes 32",
            "volumes of one backend 2",
            "copysets per chunkserver 12",
            "copysets per chunkserver 500",
        ];
        assert_eq!(lines[..5], wanted, "{text}");
    }

    #[test]
    fn every_result_is_in_the_section_it_belongs_to() {
        let results = Results {
            rows: vec![
                row("tmpfs", "randwrite-4k-qd1"),
                row("tmpfs", "randwrite-4k-qd2"),
                Row { iops: 4321.0, ..row("disk", "randwrite-4k-qd1") },
                Row { volumes: Some(1), iops: 1234.0, ..row("tmpfs", "volumes-1") },
                Row { volumes: Some(32), ..row("tmpfs", "volumes-32") },
            ],
            figures: vec![
                Figure::new(("run", "any", "machine"), "began", 1_795_000_000.0, "s").noted("commit abc"),
                Figure::new(("memory", "tmpfs", "evolute"), "volume: mds", 12.0, "KiB"),
                Figure::new(("idle", "tmpfs", "evolute"), "mds", 0.07, "% of a core"),
                Figure::new(
                    ("profile-randwrite-4k-qd1", "tmpfs", "evolute"),
                    "mds: openraft",
                    1.5,
                    "CPU µs/IO",
                ),
            ],
        };
        assert!(section(&results, "run").contains("2026-11-18, commit abc"), "{}", section(&results, "run"));
        assert!(section(&results, "disk").contains("4321") && !section(&results, "tmpfs").contains("4321"));
        let volumes = section(&results, "volumes");
        assert!(volumes.contains("1234") && volumes.contains("](performance/volumes.svg)"), "{volumes}");
        assert!(!section(&results, "tmpfs").contains("volumes-1"));
        let depth = section(&results, "depth");
        assert!(depth.contains("randwrite-latency.svg") && depth.contains("–"), "{depth}");
        assert!(section(&results, "memory").contains("volume: mds"));
        let figures = section(&results, "figures");
        assert!(figures.contains("0.070") && !figures.contains("volume: mds"), "{figures}");
        assert!(section(&results, "goals").contains("not measured"));
        let profile = section(&results, "profile");
        assert!(
            profile.contains("**randwrite-4k-qd1 on tmpfs**") && profile.contains("| openraft"),
            "{profile}"
        );
        assert!(!figures.contains("openraft"));
    }

    #[test]
    fn a_section_without_results_says_so() {
        let results = Results::default();
        for name in NAMES.into_iter().filter(|name| *name != "goals") {
            assert_eq!(section(&results, name), NOTHING, "{name}");
        }
        assert_eq!(
            [0.0, 951_782_400.0, 1_709_251_199.0].map(day),
            ["1970-01-01", "2000-02-29", "2024-02-29"]
        );
    }
}
