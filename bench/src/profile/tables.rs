//! A profile as tables and as JSON lines.

use std::collections::{BTreeMap, BTreeSet};

use super::IopsOf;
use crate::runner::markdown::{Set, table};
use crate::runner::results::{Figure, short};

/// Per process, in the order in which they are shown: numbers by name.
type ByProcess = Vec<(String, BTreeMap<String, f64>)>;

/// What one load came to, per I/O.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Profile {
    pub iops: IopsOf,
    /// CPU µs by category.
    pub times: ByProcess,
    /// How often by what.
    pub counts: ByProcess,
}

pub fn table_of_times(profile: &Profile) -> String {
    table_of(&profile.times, "category", true)
}

pub fn table_of_counts(profile: &Profile) -> String {
    table_of(&profile.counts, "what", false)
}

/// The largest first, a column per process, and all of them together. Times have a sum at the end; of counts there is
/// none, for one of them is a sum already.
fn table_of(processes: &ByProcess, what: &str, summed: bool) -> String {
    let mut columns = vec![(what, Set::Text)];
    columns.extend(processes.iter().map(|(name, _)| (name.as_str(), Set::Number)));
    columns.push(("all", Set::Number));
    let names: BTreeSet<&String> = processes.iter().flat_map(|(_, numbers)| numbers.keys()).collect();
    let number = |process: &(String, BTreeMap<String, f64>), name: &String| process.1.get(name).copied();
    let all = |name: &String| processes.iter().filter_map(|process| number(process, name)).sum::<f64>();
    let mut names: Vec<&String> = names.into_iter().collect();
    names.sort_by(|a, b| all(b).total_cmp(&all(a)));
    let mut rows: Vec<Vec<String>> = names
        .into_iter()
        .map(|name| {
            let mut cells = vec![name.clone()];
            cells.extend(processes.iter().map(|process| number(process, name).map_or("–".to_owned(), short)));
            cells.push(short(all(name)));
            cells
        })
        .collect();
    if summed {
        let sums = || processes.iter().map(|(_, numbers)| numbers.values().sum::<f64>());
        let mut cells = vec!["all".to_owned()];
        cells.extend(sums().map(short));
        cells.push(short(sums().sum()));
        rows.push(cells);
    }
    table(&columns, &rows)
}

pub fn figures(profile: &Profile, work: &str, store: &str) -> Vec<Figure> {
    let work = format!("profile-{work}");
    let of = |processes: &ByProcess, unit: &str| {
        let one = |process: &String, name: &String, value: f64| {
            Figure::new((&work, store, "evolute"), format!("{process}: {name}"), value, unit)
        };
        let of_process = |(process, numbers): &(String, BTreeMap<String, f64>)| {
            numbers.iter().map(|(name, value)| one(process, name, *value)).collect::<Vec<_>>()
        };
        processes.iter().flat_map(of_process).collect::<Vec<_>>()
    };
    let mut figures = of(&profile.times, "CPU µs/IO");
    figures.extend(of(&profile.counts, "per I/O"));
    figures
}

#[cfg(test)]
mod tests {
    use super::{Profile, figures, table_of_counts, table_of_times};

    fn profile() -> Profile {
        let numbers =
            |pairs: &[(&str, f64)]| pairs.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
        Profile {
            times: vec![
                ("backend".to_owned(), numbers(&[("openraft", 1.0), ("allocator", 0.25)])),
                ("mds".to_owned(), numbers(&[("allocator", 2.0)])),
            ],
            counts: vec![("backend".to_owned(), numbers(&[("sendto", 1.5), ("context-switches", 2.0)]))],
            ..Profile::default()
        }
    }

    #[test]
    fn the_costliest_is_first_and_times_are_summed() {
        let text = table_of_times(&profile());
        let firsts: Vec<&str> = text
            .lines()
            .map(|line| line.trim_start_matches("| ").split(' ').next().expect("a word"))
            .collect();
        assert_eq!(firsts[2..], ["allocator", "openraft", "all"]);
        let last = text.lines().last().expect("a line").replace(' ', "");
        assert_eq!(last, "|all|1.25|2.00|3.25|");
        assert!(text.contains('–'), "{text}");
        assert_eq!(table_of_counts(&profile()).lines().count(), 4);
    }

    #[test]
    fn every_number_is_a_line_for_programs() {
        let figures = figures(&profile(), "randwrite-4k-qd1", "tmpfs");
        assert_eq!(figures.len(), 5);
        assert_eq!((figures[0].work.as_str(), figures[0].value), ("profile-randwrite-4k-qd1", 0.25));
        assert_eq!(figures[0].name, "backend: allocator");
    }
}
