//! A profile as tables and as JSON lines.

use std::collections::{BTreeMap, BTreeSet};

use super::IopsOf;
use crate::runner::markdown::{NONE, Set, table};
use crate::runner::results::{Figure, short};

/// Per process, in the order in which they are shown: numbers by name.
pub type ByProcess = Vec<(String, BTreeMap<String, f64>)>;

/// What one load came to, per I/O.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Profile {
    pub iops: IopsOf,
    /// CPU µs by category.
    pub times: ByProcess,
    /// CPU µs by innermost function.
    pub functions: ByProcess,
    /// How often by what.
    pub counts: ByProcess,
    /// µs by station, in columns [`P50`] and [`P99`]. Of a load at depth 1.
    pub stations: ByProcess,
}

pub const P50: &str = "p50";
pub const P99: &str = "p99";

pub fn table_of_times(profile: &Profile) -> String {
    let mut rows = rows_of(&profile.times, usize::MAX);
    rows.push(sums(&profile.times));
    table(&columns(&profile.times, "category"), &rows)
}

pub fn table_of_functions(profile: &Profile) -> String {
    const SHOWN: usize = 25;
    /// Of Rust's generic ones the rest is of little use.
    const NAME_CHARS_MAX: usize = 90;
    let mut rows = rows_of(&profile.functions, SHOWN);
    for name in rows.iter_mut().filter_map(|row| row.first_mut()) {
        *name = name.replace('|', "¦").chars().take(NAME_CHARS_MAX).collect();
    }
    table(&columns(&profile.functions, "function"), &rows)
}

pub fn table_of_counts(profile: &Profile) -> String {
    table(&columns(&profile.counts, "what"), &rows_of(&profile.counts, usize::MAX))
}

/// In the order of the road; the sum of medians is about the median of all.
pub fn table_of_stations(profile: &Profile) -> String {
    let mut columns = vec![("station", Set::Text)];
    columns.extend(profile.stations.iter().map(|(name, _)| (name.as_str(), Set::Number)));
    let names: BTreeSet<&String> = profile.stations.iter().flat_map(|(_, times)| times.keys()).collect();
    let row = |name: &&String| {
        let of = |(_, times): &(String, BTreeMap<String, f64>)| {
            times.get(*name).copied().map_or(NONE.to_owned(), short)
        };
        let mut cells = vec![(*name).clone()];
        cells.extend(profile.stations.iter().map(of));
        cells
    };
    let mut rows: Vec<Vec<String>> = names.iter().map(row).collect();
    let medians: f64 =
        profile.stations.iter().filter(|(name, _)| name == P50).flat_map(|(_, t)| t.values()).sum();
    rows.push(vec!["all of them".to_owned(), short(medians), NONE.to_owned()]);
    table(&columns, &rows)
}

fn columns<'c>(processes: &'c ByProcess, what: &'c str) -> Vec<(&'c str, Set)> {
    let mut columns = vec![(what, Set::Text)];
    columns.extend(processes.iter().map(|(name, _)| (name.as_str(), Set::Number)));
    columns.push(("all", Set::Number));
    columns
}

/// The largest first, a column per process, and all of them together.
fn rows_of(processes: &ByProcess, at_most: usize) -> Vec<Vec<String>> {
    let number = |process: &(String, BTreeMap<String, f64>), name: &String| process.1.get(name).copied();
    let all = |name: &String| processes.iter().filter_map(|process| number(process, name)).sum::<f64>();
    let names: BTreeSet<&String> = processes.iter().flat_map(|(_, numbers)| numbers.keys()).collect();
    let mut names: Vec<&String> = names.into_iter().collect();
    names.sort_by(|a, b| all(b).total_cmp(&all(a)));
    names.truncate(at_most);
    let row = |name: &String| {
        let mut cells = vec![name.clone()];
        cells.extend(processes.iter().map(|process| number(process, name).map_or(NONE.to_owned(), short)));
        cells.push(short(all(name)));
        cells
    };
    names.into_iter().map(row).collect()
}

fn sums(processes: &ByProcess) -> Vec<String> {
    let sums: Vec<f64> = processes.iter().map(|(_, numbers)| numbers.values().sum()).collect();
    let mut cells = vec!["all".to_owned()];
    cells.extend(sums.iter().copied().map(short));
    cells.push(short(sums.iter().sum()));
    cells
}

const WORK: &str = "profile-";
const TIME: &str = "CPU µs/IO";
const TIMES: &str = "per I/O";
const STATION: &str = "µs on the road";

/// Of the functions there is nothing: they are for people.
pub fn figures(profile: &Profile, work: &str, store: &str) -> Vec<Figure> {
    let work = format!("{WORK}{work}");
    let of = |processes: &ByProcess, unit: &str| {
        let one = |process: &String, name: &String, value: f64| {
            Figure::new((&work, store, "evolute"), format!("{process}: {name}"), value, unit)
        };
        let of_process = |(process, numbers): &(String, BTreeMap<String, f64>)| {
            numbers.iter().map(|(name, value)| one(process, name, *value)).collect::<Vec<_>>()
        };
        processes.iter().flat_map(of_process).collect::<Vec<_>>()
    };
    let mut figures = of(&profile.times, TIME);
    figures.extend(of(&profile.counts, TIMES));
    figures.extend(of(&profile.stations, STATION));
    figures
}

pub fn is_profile(work: &str) -> bool {
    work.starts_with(WORK)
}

/// What [`figures`] made of profiles, by load and store in the order in which they come.
pub fn profiles(all: &[Figure]) -> Vec<(String, Profile)> {
    let mut found: Vec<(String, Profile)> = Vec::new();
    for figure in all {
        let Some(work) = figure.work.strip_prefix(WORK) else { continue };
        let Some((process, name)) = figure.name.split_once(": ") else { continue };
        let title = format!("{work} on {}", figure.store);
        let profile = &mut entry(&mut found, &title).1;
        let numbers = match figure.unit.as_str() {
            TIME => &mut profile.times,
            STATION => &mut profile.stations,
            _ => &mut profile.counts,
        };
        entry(numbers, process).1.insert(name.to_owned(), figure.value);
    }
    found
}

/// The one of that name, made at the end if there is none.
fn entry<'e, T: Default>(all: &'e mut Vec<(String, T)>, name: &str) -> &'e mut (String, T) {
    let at = all.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
        all.push((name.to_owned(), T::default()));
        all.len() - 1
    });
    &mut all[at]
}

#[cfg(test)]
mod tests {
    use super::{
        Profile, figures, profiles, table_of_counts, table_of_functions, table_of_stations, table_of_times,
    };

    fn profile() -> Profile {
        let numbers =
            |pairs: &[(&str, f64)]| pairs.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
        Profile {
            times: vec![
                ("backend".to_owned(), numbers(&[("openraft", 1.0), ("allocator", 0.25)])),
                ("mds".to_owned(), numbers(&[("allocator", 2.0)])),
            ],
            functions: vec![("backend".to_owned(), numbers(&[("<a|b>::c", 1.0), ("d", 2.0)]))],
            counts: vec![("backend".to_owned(), numbers(&[("sendto", 1.5), ("context-switches", 2.0)]))],
            stations: vec![
                ("p50".to_owned(), numbers(&[("02 leader: received", 1.5), ("01 backend: woken", 20.5)])),
                ("p99".to_owned(), numbers(&[("02 leader: received", 9.5), ("01 backend: woken", 30.5)])),
            ],
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
        assert_eq!(last, "|all|1.25|2|3.25|");
        assert!(text.contains('–'), "{text}");
        assert_eq!(table_of_counts(&profile()).lines().count(), 4);
        let functions = table_of_functions(&profile());
        assert!(functions.contains("<a¦b>::c"), "a cell has no border inside: {functions}");
    }

    #[test]
    fn stations_are_in_the_order_of_the_road() {
        let lines: Vec<String> =
            table_of_stations(&profile()).lines().skip(2).map(|line| line.replace("  ", "")).collect();
        assert!(lines[0].contains("01 backend: woken") && lines[0].contains("30.5"), "{lines:?}");
        assert!(lines[1].contains("02 leader: received"), "{lines:?}");
        assert!(lines[2].contains("all of them") && lines[2].contains("22"), "{lines:?}");
    }

    #[test]
    fn every_number_is_a_line_for_programs() {
        let figures = figures(&profile(), "randwrite-4k-qd1", "tmpfs");
        assert_eq!(figures.len(), 9);
        assert_eq!((figures[0].work.as_str(), figures[0].value), ("profile-randwrite-4k-qd1", 0.25));
        assert_eq!(figures[0].name, "backend: allocator");
        assert!(figures.iter().all(|figure| !figure.name.contains("::")), "functions are for people");
        let back = profiles(&figures);
        let without_functions = Profile { functions: Vec::new(), ..profile() };
        assert_eq!(back, [("randwrite-4k-qd1 on tmpfs".to_owned(), without_functions)]);
    }
}
