//! What `make bench-profile` runs: where each µs of a load goes, per process, on the cluster that `make bench` measures.
//!
//! Each load runs twice: once sampled, to know where the time goes, and once with its system calls and context switches
//! counted. Times are shares of samples of the CPU time each process used in the sampled run. Both slow the system a
//! little: the IOPS told beside them are of these runs. A load at depth 1 runs a third time, with every system call
//! noted, to know how long a request is where.

mod categories;
mod perf;
mod samples;
mod stations;
pub mod tables;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Child;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use self::categories::category;
use self::perf::Count;
use self::samples::Sample;
use self::stations::{Station, Who, road, stations};
use self::tables::{
    ByProcess, P50, P99, Profile, figures, table_of_counts, table_of_functions, table_of_stations,
    table_of_times,
};
use crate::front_end::Observer;
use crate::front_end::options;
use crate::runner::cpu::{Watch, Watched};
use crate::runner::lab::{Lab, Subject};
use crate::runner::machine::Store;
use crate::runner::results::json_line;
use crate::runner::system::{BACKEND, CHUNKSERVER, Wanted};
use crate::runner::works::{ALL, CURVE, Pace, Work};
use crate::runner::{BenchError, Programs};

/// Shows where the CPU time of a load goes, per process, and what system calls it makes (Linux perf, as root)
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  evolute-bench profile
  evolute-bench profile --work randread-4k-qd32 --seconds 10 --out profile.jsonl")]
pub struct Options {
    /// Loads, by the names evolute-bench has for them [default: randwrite-4k-qd1 and randwrite-4k-qd32]
    #[arg(long = "work", value_name = "WORK")]
    works: Vec<String>,
    /// Where the data are
    #[arg(long, value_enum, default_value = "tmpfs")]
    store: Store,
    /// Seconds each load is watched, twice
    #[arg(long, default_value = "5", value_parser = options::seconds)]
    seconds: Duration,
    /// Bytes of the volume
    #[arg(long, default_value = "1G", value_parser = options::bytes)]
    size: u64,
    /// Also write a JSON line per number here
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    programs: Programs,
}

#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    #[error("perf is not installed: apt-get install linux-perf (Debian's package)")]
    NoPerf,
    #[error("perf cannot count system calls here (root, and a kernel with tracepoints): {said}")]
    NoTracepoints { said: String },
    #[error("perf failed: {said}")]
    Perf { said: String },
    #[error("there is no load {0}; there are: {1}")]
    NoSuchWork(String, String),
    #[error("--seconds must not be zero")]
    NoTime,
    #[error("{doing}: {source}")]
    Io { doing: String, source: io::Error },
    #[error(transparent)]
    Bench(#[from] BenchError),
}

const GENERATOR: &str = "generator";
/// perf takes a moment until it watches: the load lasts longer by this, so that its end is not watched. In this time
/// the load is a little quicker, so counts per I/O are a few per cent too low.
const PERF_STARTS: Duration = Duration::from_millis(300);

pub fn run(options: &Options, stop: &AtomicBool) -> Result<(), ProfileError> {
    let works = chosen(&options.works)?;
    if options.seconds.is_zero() {
        return Err(ProfileError::NoTime);
    }
    perf::check()?;
    let pace = Pace { seconds: options.seconds + PERF_STARTS, ramp: Duration::from_secs(1) };
    let lab = Lab {
        bin_dir: options.programs.dir()?,
        stop,
        pace,
        quick: false,
        size: Some(options.size),
        restart_bytes: 0,
    };
    let cluster = lab.cluster(options.store, &Wanted::volume(options.size))?;
    cluster.fill(&lab)?;
    let mut lines = String::new();
    for work in works {
        cluster.rest(&lab, lab.after_write())?;
        let profile = profile(&lab, &cluster, work, options.seconds)?;
        let IopsOf { sampled, counted } = profile.iops;
        println!(
            "\n{} on {}: {sampled:.0} IOPS sampled, {counted:.0} IOPS counted; CPU µs per I/O\n\n{}\nthe functions that take most of it\n\n{}\ntimes per I/O\n\n{}",
            work.name,
            options.store.name(),
            table_of_times(&profile),
            table_of_functions(&profile),
            table_of_counts(&profile),
        );
        if !profile.stations.is_empty() {
            println!("how long a request is where, µs\n\n{}", table_of_stations(&profile));
        }
        for figure in figures(&profile, work.name, options.store.name()) {
            lines.push_str(&json_line(&figure));
            lines.push('\n');
        }
    }
    if let Some(path) = &options.out {
        let doing = || format!("writing {}", path.display());
        fs::write(path, lines).map_err(|source| ProfileError::Io { doing: doing(), source })?;
    }
    cluster.stop();
    Ok(())
}

/// Of the two runs of a load.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct IopsOf {
    sampled: f64,
    counted: f64,
}

fn profile(lab: &Lab<'_>, cluster: &Subject, work: Work, watched: Duration) -> Result<Profile, ProfileError> {
    let mut processes = cluster.system.processes.clone();
    processes.push(Watched { name: GENERATOR.to_owned(), pid: std::process::id() });
    let dir = cluster.place.dir.path();
    let recorded = perf::file(dir, work.name);

    let mut sampling =
        Perf::new(&cluster.system.processes, || Ok(vec![perf::record(&processes, watched, &recorded)?]));
    let report = cluster.run(lab, work, lab.pace, &mut sampling)?;
    let per_io = |time: Duration| time.as_secs_f64() * 1e6 / report.all.ios.max(1) as f64;
    let mut used: Vec<f64> = sampling.watch.used.iter().map(|time| per_io(*time)).collect();
    used.push(per_io(Duration::from_secs_f64(report.cpu_user_s + report.cpu_sys_s)));
    sampling.finished()?;
    let samples = perf::samples(&recorded)?;
    let times = |named: fn(&Sample) -> String| -> ByProcess {
        let shares = shares(&samples, named);
        let of_process = |(process, used): (&Watched, &f64)| {
            let shares = shares.get(&process.pid).cloned().unwrap_or_default();
            let times = shares.into_iter().map(|(name, share)| (name, share * used));
            (process.name.clone(), times.collect())
        };
        processes.iter().zip(&used).map(of_process).collect()
    };

    let counted = |process: &Watched| perf::file(dir, &format!("{}-{}", work.name, process.name));
    let mut counting = Perf::new(&cluster.system.processes, || {
        processes.iter().map(|process| perf::count(process, watched, &counted(process))).collect()
    });
    let again = cluster.run(lab, work, lab.pace, &mut counting)?;
    counting.finished()?;
    let mut counts = Vec::new();
    for process in &processes {
        let ios = again.all.iops * watched.as_secs_f64();
        let each = |Count { name, times }: Count| (name, times as f64 / ios);
        counts.push((process.name.clone(), perf::counts(&counted(process))?.into_iter().map(each).collect()));
    }
    let iops = IopsOf { sampled: report.all.iops, counted: again.all.iops };
    let stations = times_on_the_road(lab, cluster, work, watched, &processes)?;
    Ok(Profile { iops, times: times(category), functions: times(function), counts, stations })
}

/// How long a request is at each station, if the load is one of which that can be told: the median, and what one in a hundred
/// takes.
fn times_on_the_road(
    lab: &Lab<'_>,
    cluster: &Subject,
    work: Work,
    watched: Duration,
    processes: &[Watched],
) -> Result<ByProcess, ProfileError> {
    let Some(road) = road(work.name) else { return Ok(Vec::new()) };
    let chunkservers: Vec<u32> = cluster.system.of_kind(CHUNKSERVER).map(|process| process.pid).collect();
    let backends: Vec<u32> = cluster.system.of_kind(BACKEND).map(|process| process.pid).collect();
    let who = |pid| match chunkservers.iter().position(|chunkserver| *chunkserver == pid) {
        Some(at) => Who::Chunkserver(at),
        None if backends.contains(&pid) => Who::Backend,
        None if pid == std::process::id() => Who::Generator,
        None => Who::Other,
    };
    let noted = perf::file(cluster.place.dir.path(), &format!("{}-stations", work.name));
    let mut noting =
        Perf::new(&cluster.system.processes, || Ok(vec![perf::note(processes, watched, &noted)?]));
    cluster.run(lab, work, lab.pace, &mut noting)?;
    noting.finished()?;
    let mut found = stations(road, &perf::events(&noted)?, who);
    found.retain(|(_, times)| !times.is_empty());
    found.iter_mut().for_each(|(_, times)| times.sort_by(f64::total_cmp));
    let column = |name: &str, per_mille: usize| {
        let one = |(station, times): &Station| (station.clone(), times[(times.len() - 1) * per_mille / 1000]);
        (name.to_owned(), found.iter().map(one).collect())
    };
    Ok(vec![column(P50, 500), column(P99, 990)])
}

/// The innermost function.
fn function(sample: &Sample) -> String {
    sample.frames.first().map_or_else(String::new, |leaf| leaf.symbol.clone())
}

/// Of each process, the share of its samples with each name.
fn shares(samples: &[Sample], named: fn(&Sample) -> String) -> BTreeMap<u32, BTreeMap<String, f64>> {
    let mut counted: BTreeMap<u32, BTreeMap<String, f64>> = BTreeMap::new();
    for sample in samples {
        *counted.entry(sample.pid).or_default().entry(named(sample)).or_default() += 1.0;
    }
    for of_process in counted.values_mut() {
        let all: f64 = of_process.values().sum();
        of_process.values_mut().for_each(|count| *count /= all);
    }
    counted
}

/// Starts perf when the measured time begins, and watches the processes meanwhile.
struct Perf<'p, S> {
    start: S,
    watch: Watch<'p>,
    started: Result<Vec<Child>, ProfileError>,
}

impl<'p, S: FnMut() -> Result<Vec<Child>, ProfileError>> Perf<'p, S> {
    fn new(processes: &'p [Watched], start: S) -> Self {
        Self { start, watch: Watch::new(processes), started: Ok(Vec::new()) }
    }

    fn finished(self) -> Result<(), ProfileError> {
        self.started?.into_iter().try_for_each(perf::finish)
    }
}

impl<S: FnMut() -> Result<Vec<Child>, ProfileError>> Observer for Perf<'_, S> {
    fn begins(&mut self) {
        self.started = (self.start)();
        self.watch.begins();
    }

    fn ends(&mut self) {
        self.watch.ends();
    }
}

fn chosen(names: &[String]) -> Result<Vec<Work>, ProfileError> {
    let defaults = ["randwrite-4k-qd1", "randwrite-4k-qd32"].map(str::to_owned);
    let names = if names.is_empty() { &defaults[..] } else { names };
    let all = || ALL.iter().chain(&CURVE);
    let find = |name: &String| {
        all().find(|work| work.name == name).copied().ok_or_else(|| {
            let known: Vec<&str> = all().map(|work| work.name).collect();
            ProfileError::NoSuchWork(name.clone(), known.join(" "))
        })
    };
    names.iter().map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::categories::category;
    use super::samples::{Frame, Sample};
    use super::{chosen, shares};

    #[test]
    fn the_shares_of_a_process_sum_to_one() {
        let sample = |pid, symbol: &str| Sample {
            pid,
            frames: vec![Frame { symbol: symbol.to_owned(), file: "/bin/evolute-mds".to_owned() }],
        };
        let samples = [
            sample(1, "tokio::a"),
            sample(1, "tokio::b"),
            sample(1, "openraft::c"),
            sample(2, "openraft::d"),
        ];
        let shares = shares(&samples, category);
        assert_eq!(shares[&1]["openraft"], 1.0 / 3.0);
        assert_eq!(shares[&2]["openraft"], 1.0);
        assert!((shares[&1].values().sum::<f64>() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_load_is_chosen_by_its_name() {
        assert_eq!(chosen(&[]).expect("the defaults are loads").len(), 2);
        assert_eq!(chosen(&["randread-4k-qd64".to_owned()]).expect("a load")[0].name, "randread-4k-qd64");
        let refused = chosen(&["restart".to_owned()]).expect_err("no load").to_string();
        assert!(refused.contains("randread-4k-qd1"), "{refused}");
    }
}
