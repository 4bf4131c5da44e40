//! What `make bench` runs, on one machine in the same minutes.
//!
//! - `side_by_side`: Evolute with three replicas and qemu-storage-daemon with one local file, the same loads turn by
//!   turn, first on tmpfs (what the software costs) and then on disk.
//! - `special`: what needs a cluster of its own: idle cost, many volumes, many copysets, memory, device writes, restarts.
//! - [`goals`]: what issue 5 asks for, beside what was measured.
//!
//! Everything found goes to `record` as it comes. Nothing is left behind: processes die with this one, directories go
//! with their guards.

pub mod cpu;
pub mod goals;
pub mod lab;
pub mod machine;
pub mod markdown;
mod process;
mod record;
pub mod results;
mod side_by_side;
pub mod special;
pub mod system;
pub mod works;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use self::goals::{judge, summary, table_of_goals};
use self::lab::Lab;
use self::machine::{Store, run_figures};
use self::record::Record;
use self::results::{table_of_figures, table_of_rows};
use self::side_by_side::SystemName;
use self::special::Special;
use self::system::SystemError;
use self::works::{Pace, Work};
use crate::front_end::{self, FrontEndError};

/// Measures Evolute and qemu-storage-daemon side by side and prints tables
#[derive(Debug, clap::Args)]
pub struct Options {
    /// About four minutes in all instead of thirty; the tails are less certain, and what is slow is left out
    #[arg(long)]
    pub quick: bool,
    /// Also write a JSON line per result here
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Only these stores
    #[arg(long = "store", value_enum)]
    stores: Vec<Store>,
    /// Only these systems
    #[arg(long = "system", value_enum)]
    systems: Vec<SystemName>,
    /// Only these works, by name; a name that is none lists them
    #[arg(long = "work", value_name = "WORK")]
    pub works: Vec<String>,
    /// Seconds each run is measured
    #[arg(long, value_parser = front_end::options::seconds)]
    pub seconds: Option<Duration>,
    /// Bytes of the volume; default: 1 to 3 GiB, as memory and disk allow
    #[arg(long, value_parser = front_end::options::bytes)]
    pub size: Option<u64>,
    /// Bytes written before the work `restart` restarts a chunkserver
    #[arg(long, default_value = "4G", value_name = "BYTES", value_parser = front_end::options::bytes)]
    pub restart_bytes: u64,
    /// The commit that is measured, for the report
    #[arg(long, value_name = "ID")]
    commit: Option<String>,
    #[command(flatten)]
    programs: Programs,
}

#[derive(Debug, Clone, clap::Args)]
pub struct Programs {
    /// Where the programs are; default: next to this one
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("there is no work {0}; there are: {1}")]
    NoSuchWork(String, String),
    #[error("{0} is a work on {1} of evolute, which --store and --system leave out")]
    LeftOut(&'static str, &'static str),
    #[error("--{0} must not be zero")]
    Zero(&'static str),
    #[error("{doing}: {source}")]
    Io { doing: String, source: io::Error },
    #[error("{path} does not say what it should")]
    Unreadable { path: String },
    #[error(transparent)]
    System(#[from] SystemError),
    #[error("{system} on {store}: {source}")]
    FrontEnd { system: &'static str, store: &'static str, source: FrontEndError },
    #[error("{system} on {store} could not be filled: {why}")]
    Prefill { system: &'static str, store: &'static str, why: String },
    #[error("{system} on {store}, {work}: {why}")]
    Load { system: &'static str, store: &'static str, work: &'static str, why: String },
    #[error("{0}")]
    NoStore(String),
    #[error("the chunkservers are still busy after {0:?}")]
    NeverAtRest(Duration),
    #[error("the chunkserver does not come back: {what}{}", log.map(|name| format!(" (its log: {name}.log)")).unwrap_or_default())]
    NotBack { what: &'static str, log: Option<&'static str> },
    #[error("nothing could be measured")]
    NothingMeasured,
    #[error("interrupted")]
    Interrupted,
}

/// What a whole run came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Markdown, one table after the other.
    pub tables: Vec<String>,
    pub summary: String,
    /// Not measured, because nobody asked for it.
    pub left_out: Vec<String>,
    /// What was not measured, or not as it should be.
    pub failures: Vec<String>,
}

/// Why there are no rows of a store.
enum Skipped {
    Store(String),
    All(BenchError),
}

impl<E: Into<BenchError>> From<E> for Skipped {
    fn from(error: E) -> Self {
        Self::All(error.into())
    }
}

/// Runs everything that was asked for. `stop` ends it early and in order.
pub fn run(options: &Options, stop: &AtomicBool) -> Result<Outcome, BenchError> {
    let chosen = Chosen::of(options)?;
    if options.restart_bytes == 0 {
        return Err(BenchError::Zero("restart-bytes"));
    }
    let lab = Lab {
        bin_dir: options.programs.dir()?,
        stop,
        pace: pace(options),
        quick: options.quick,
        size: options.size,
        restart_bytes: options.restart_bytes,
    };
    let mut record = Record::new(options.out.as_deref())?;
    let began = Instant::now();
    for figure in run_figures(options.commit.as_deref()) {
        record.figure(figure)?;
    }
    let heads = record.results.figures.len();
    for &store in &chosen.stores {
        let works = chosen.loads_on(store);
        if works.is_empty() || chosen.systems.is_empty() {
            continue;
        }
        match side_by_side::run(&lab, store, &chosen.systems, &works, &mut record) {
            Ok(()) => {}
            Err(Skipped::Store(why)) => record.failed(format!("{} was not measured: {why}", store.name())),
            Err(Skipped::All(error)) => return Err(error),
        }
    }
    for special in &chosen.specials {
        special.run(&lab, &mut record)?;
    }
    if record.results.rows.is_empty() && record.results.figures.len() == heads {
        for failure in &record.failures {
            eprintln!("{failure}");
        }
        return Err(BenchError::NothingMeasured);
    }
    println!("\nmeasured in {} s", began.elapsed().as_secs());
    let mut judged = judge(&record.results);
    if chosen.by_name {
        // Whoever asks one question does not miss the others.
        judged.retain(|judged| judged.measured.is_some());
    }
    let (rows, figures) = (&record.results.rows, &record.results.figures[heads..]);
    let mut tables = Vec::new();
    if !rows.is_empty() {
        tables.push(table_of_rows(rows));
    }
    if !figures.is_empty() {
        tables.push(table_of_figures(figures));
    }
    tables.push(table_of_goals(&judged));
    Ok(Outcome { tables, summary: summary(&judged), left_out: chosen.left_out, failures: record.failures })
}

/// What of everything is run.
#[derive(Debug)]
struct Chosen {
    stores: Vec<Store>,
    systems: Vec<SystemName>,
    /// By name; empty: all.
    loads: Vec<Work>,
    by_name: bool,
    quick: bool,
    specials: Vec<Special>,
    left_out: Vec<String>,
}

impl Chosen {
    fn of(options: &Options) -> Result<Self, BenchError> {
        let by_name = !options.works.is_empty();
        let stores = or_all(&options.stores, [Store::Tmpfs, Store::Disk]);
        let systems = or_all(&options.systems, [SystemName::Evolute, SystemName::Qsd]);
        let possible =
            |special: &Special| stores.contains(&special.store) && systems.contains(&SystemName::Evolute);
        let (mut loads, mut specials, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
        for name in &options.works {
            let load = works::ALL.iter().chain(&works::CURVE).find(|work| work.name == name);
            let special = special::ALL.iter().find(|special| special.name == name);
            match (load, special) {
                (Some(load), _) => loads.push(*load),
                (None, Some(special)) if possible(special) => specials.push(*special),
                (None, Some(special)) => {
                    return Err(BenchError::LeftOut(special.name, special.store.name()));
                }
                (None, None) => return Err(BenchError::NoSuchWork(name.clone(), all_names().join(" "))),
            }
        }
        if !by_name {
            let here = || special::ALL.into_iter().filter(possible);
            specials = here().filter(|special| !(options.quick && special.slow)).collect();
            if options.quick {
                left_out.push("the curves over depth".to_owned());
                left_out.push(
                    "most points of those over volumes and copysets, with idle-copysets-100".to_owned(),
                );
                left_out.extend(here().filter(|special| special.slow).map(|special| special.name.to_owned()));
            }
        }
        Ok(Self { stores, systems, loads, by_name, quick: options.quick, specials, left_out })
    }

    fn loads_on(&self, store: Store) -> Vec<Work> {
        match (self.by_name, store, self.quick) {
            (true, _, _) => self.loads.clone(),
            // The curves are about software.
            (false, Store::Tmpfs, false) => works::ALL.into_iter().chain(works::CURVE).collect(),
            (false, _, _) => works::ALL.to_vec(),
        }
    }
}

fn or_all<T: Copy>(chosen: &[T], all: [T; 2]) -> Vec<T> {
    if chosen.is_empty() { all.to_vec() } else { chosen.to_vec() }
}

/// Every work there is, for whoever mistyped one.
pub fn all_names() -> Vec<&'static str> {
    let loads = works::ALL.iter().chain(&works::CURVE).map(|work| work.name);
    loads.chain(special::ALL.iter().map(|special| special.name)).collect()
}

impl Programs {
    pub fn dir(&self) -> Result<PathBuf, BenchError> {
        match &self.bin_dir {
            Some(dir) => Ok(dir.clone()),
            None => {
                let doing = "looking for this program's own file".to_owned();
                let me = std::env::current_exe().map_err(|source| BenchError::Io { doing, source })?;
                Ok(me.parent().map(std::path::Path::to_owned).unwrap_or_default())
            }
        }
    }
}

fn pace(options: &Options) -> Pace {
    let (seconds, ramp) = if options.quick { (1.5, 0.3) } else { (6.0, 1.0) };
    let seconds = options.seconds.unwrap_or(Duration::from_secs_f64(seconds));
    Pace { seconds, ramp: Duration::from_secs_f64(ramp) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{Chosen, Options, all_names};
    use crate::runner::machine::Store;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn chosen(words: &str) -> Result<Chosen, String> {
        let line = Line::try_parse_from(["evolute-bench"].into_iter().chain(words.split_whitespace()));
        Chosen::of(&line.map_err(|e| e.to_string())?.options).map_err(|e| e.to_string())
    }

    fn specials(chosen: &Chosen) -> Vec<&str> {
        chosen.specials.iter().map(|special| special.name).collect()
    }

    #[test]
    fn a_whole_run_has_every_work_and_a_quick_one_says_what_it_leaves_out() {
        let all = chosen("").expect("valid");
        assert_eq!(all.loads_on(Store::Tmpfs).len() + specials(&all).len(), all_names().len());
        assert_eq!(all.loads_on(Store::Disk).len(), 9);
        assert!(all.left_out.is_empty());
        let quick = chosen("--quick").expect("valid");
        assert_eq!(quick.loads_on(Store::Tmpfs).len(), 9);
        assert_eq!(specials(&quick), ["idle", "volumes", "copysets", "in-flight"]);
        assert!(quick.left_out.iter().any(|what| what == "restart"), "{:?}", quick.left_out);
    }

    #[test]
    fn what_is_named_is_all_that_is_run() {
        let one = chosen("--work restart").expect("valid");
        assert!(one.loads_on(Store::Tmpfs).is_empty() && specials(&one) == ["restart"]);
        let load = chosen("--quick --work randread-4k-qd256 --store disk").expect("valid");
        assert_eq!((load.loads_on(Store::Disk).len(), specials(&load).len()), (1, 0));
        for (words, why) in [
            ("--work restat", "restart"),
            ("--work restart --store tmpfs", "--store"),
            ("--work idle --system qsd", "--system"),
        ] {
            let refused = chosen(words).expect_err(words);
            assert!(refused.contains(why), "{words}: {refused}");
        }
    }
}
