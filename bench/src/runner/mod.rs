//! What `make bench` runs: Evolute with three replicas and qemu-storage-daemon with one local file, on the same
//! machine in the same minutes, turn by turn, first on tmpfs (what the software costs) and then on disk.
//!
//! Both are up while either is measured; an idle one uses no CPU worth mentioning, and its share would show under
//! "others". Nothing is left behind: processes die with this one, directories go with their guards.

mod cpu;
mod machine;
mod results;
mod system;
mod works;

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;

use self::cpu::Watch;
use self::machine::{Store, describe, volume_bytes};
use self::results::{Row, goals, table};
use self::system::{System, SystemError};
use self::works::{ALL, Pace, Work, prefill};
use crate::front_end::{self, FrontEndError};

/// Measures Evolute and qemu-storage-daemon side by side and prints a table
#[derive(Debug, Parser)]
#[command(name = "evolute-bench", version)]
#[command(after_help = "Examples:
  evolute-bench --quick
  evolute-bench --out results.jsonl
  evolute-bench --store tmpfs --system evolute --work randwrite-4k-qd32 --seconds 20")]
pub struct Options {
    /// About two minutes in all instead of six; the tails are less certain
    #[arg(long)]
    pub quick: bool,
    /// Also write a JSON line per run here
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Only these stores
    #[arg(long = "store", value_enum)]
    stores: Vec<Store>,
    /// Only these systems
    #[arg(long = "system", value_enum)]
    systems: Vec<SystemName>,
    /// Only these works, by name
    #[arg(long = "work", value_name = "WORK")]
    pub works: Vec<String>,
    /// Seconds each run is measured
    #[arg(long, value_parser = front_end::options::seconds)]
    pub seconds: Option<Duration>,
    /// Bytes of the volume; default: 1 to 3 GiB, as memory and disk allow
    #[arg(long, value_parser = front_end::options::bytes)]
    pub size: Option<u64>,
    /// Where the programs are; default: next to this one
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum SystemName {
    Evolute,
    Qsd,
}

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("there is no work {0}; there are: {1}")]
    NoSuchWork(String, String),
    #[error("{doing}: {source}")]
    Io { doing: String, source: io::Error },
    #[error(transparent)]
    System(#[from] SystemError),
    #[error("{system} on {store}: {source}")]
    FrontEnd { system: &'static str, store: &'static str, source: FrontEndError },
    #[error("{system} on {store} could not be filled: {why}")]
    Prefill { system: &'static str, store: &'static str, why: String },
    #[error("nothing could be measured")]
    NothingMeasured,
    #[error("interrupted")]
    Interrupted,
}

/// What a whole run came to.
#[derive(Debug, Default)]
pub struct Outcome {
    pub table: String,
    pub goals: Vec<String>,
    /// What was not measured, or not as it should be.
    pub failures: Vec<String>,
}

/// Runs everything that was asked for. `stop` ends it early and in order.
pub fn run(options: &Options, stop: &AtomicBool) -> Result<Outcome, BenchError> {
    let works = chosen(&options.works)?;
    let stores =
        if options.stores.is_empty() { vec![Store::Tmpfs, Store::Disk] } else { options.stores.clone() };
    let mut out = match &options.out {
        None => None,
        Some(path) => Some(File::create(path).map_err(io_error(format!("making {}", path.display())))?),
    };
    let bin_dir = match &options.bin_dir {
        Some(dir) => dir.clone(),
        None => {
            let me = std::env::current_exe().map_err(io_error("looking for this program's own file"))?;
            me.parent().map(Path::to_owned).unwrap_or_default()
        }
    };
    println!("{}", describe());
    let mut outcome = Outcome::default();
    let mut rows = Vec::new();
    for store in stores {
        match on_store(store, &works, options, &bin_dir, stop, &mut out, &mut outcome.failures) {
            Ok(measured) => rows.extend(measured),
            Err(Skipped::Store(why)) => {
                outcome.failures.push(format!("{} was not measured: {why}", store.name()))
            }
            Err(Skipped::All(error)) => return Err(error),
        }
    }
    if rows.is_empty() {
        for failure in &outcome.failures {
            eprintln!("{failure}");
        }
        return Err(BenchError::NothingMeasured);
    }
    outcome.table = table(&rows);
    outcome.goals = goals(&rows);
    Ok(outcome)
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

fn on_store(
    store: Store,
    works: &[Work],
    options: &Options,
    bin_dir: &Path,
    stop: &AtomicBool,
    out: &mut Option<File>,
    failures: &mut Vec<String>,
) -> Result<Vec<Row>, Skipped> {
    let base = store.base().map_err(Skipped::Store)?;
    let size = match options.size {
        Some(size) => size,
        None => volume_bytes(store, &base).map_err(Skipped::Store)?,
    };
    let pace = pace(options);
    // Sockets and logs under a short path; data where the store is. Both go with their guards.
    let guard = |builder: &mut tempfile::Builder<'_, '_>, base: &Path| {
        builder.tempdir_in(base).map_err(io_error(format!("making a directory under {}", base.display())))
    };
    let dir = guard(tempfile::Builder::new().prefix("evolute-bench-"), &std::env::temp_dir())?;
    let data = guard(tempfile::Builder::new().prefix("evolute-bench-"), &base)?;
    println!(
        "\n{} ({}), volume of {} MiB, {:?} each",
        store.name(),
        base.display(),
        size >> 20,
        pace.seconds
    );
    let wanted = |name| options.systems.is_empty() || options.systems.contains(&name);
    let mut systems = Vec::new();
    if wanted(SystemName::Evolute) {
        systems.push(System::evolute(bin_dir, dir.path(), &data.path().join("evolute"), size, stop)?);
    }
    if wanted(SystemName::Qsd) {
        systems.push(System::qsd(dir.path(), data.path(), size, stop)?);
    }
    for system in &systems {
        if let Some(note) = &system.note {
            println!("note: {note}");
        }
        fill(system, store, size, stop)?;
    }
    let mut rows = Vec::new();
    for (i, work) in works.iter().enumerate() {
        // Turn by turn, and who begins changes: a slow minute of the machine hits both.
        for turn in 0..systems.len() {
            let system = &systems[(i + turn) % systems.len()];
            let measured = measure(system, store, *work, size, pace, stop)?;
            match measured {
                Ok(row) => {
                    println!("  {:<19} {:<8} {}", work.name, system.name, row.words());
                    if let Some(file) = out {
                        writeln!(file, "{}", row.json_line()).map_err(io_error("writing the JSON lines"))?;
                    }
                    rows.push(row);
                }
                Err(why) => {
                    println!("  {:<19} {:<8} FAILED: {why}", work.name, system.name);
                    failures.push(format!("{} on {}, {}: {why}", system.name, store.name(), work.name));
                }
            }
        }
    }
    for system in systems {
        let name = system.name;
        if !system.stop() {
            failures.push(format!("{name} on {} did not stop cleanly", store.name()));
        }
    }
    // In the order of the works, Evolute first, however the turns went.
    rows.sort_by_key(|row| (works.iter().position(|work| work.name == row.work), row.system));
    Ok(rows)
}

fn fill(system: &System, store: Store, size: u64, stop: &AtomicBool) -> Result<(), BenchError> {
    let report = front_end::run(&prefill(&system.socket, size), &mut (), stop)
        .map_err(|source| BenchError::FrontEnd { system: system.name, store: store.name(), source })?;
    if stop.load(Ordering::Relaxed) {
        return Err(BenchError::Interrupted);
    }
    if report.exit_status() != 0 {
        let why = report.first_error.unwrap_or_else(|| "it stalled".to_owned());
        return Err(BenchError::Prefill { system: system.name, store: store.name(), why });
    }
    Ok(())
}

/// The inner error is one of this run alone: the others go on.
fn measure(
    system: &System,
    store: Store,
    work: Work,
    size: u64,
    pace: Pace,
    stop: &AtomicBool,
) -> Result<Result<Row, String>, BenchError> {
    let mut watch = Watch::new(&system.processes);
    let report = match front_end::run(&work.options(&system.socket, size, pace), &mut watch, stop) {
        Ok(report) => report,
        Err(error) => return Ok(Err(error.to_string())),
    };
    if stop.load(Ordering::Relaxed) {
        return Err(BenchError::Interrupted);
    }
    if report.exit_status() != 0 {
        return Ok(Err(report.first_error.unwrap_or_else(|| "it stalled".to_owned())));
    }
    let names = (work.name, store.name(), system.name);
    Ok(Ok(Row::new(names, &report, &system.processes, &watch)))
}

fn chosen(names: &[String]) -> Result<Vec<Work>, BenchError> {
    if names.is_empty() {
        return Ok(ALL.to_vec());
    }
    let find = |name: &String| {
        ALL.iter().find(|work| work.name == name).copied().ok_or_else(|| {
            let known: Vec<&str> = ALL.iter().map(|work| work.name).collect();
            BenchError::NoSuchWork(name.clone(), known.join(" "))
        })
    };
    names.iter().map(find).collect()
}

fn pace(options: &Options) -> Pace {
    let (seconds, ramp) = if options.quick { (1.5, 0.3) } else { (6.0, 1.0) };
    let seconds = options.seconds.unwrap_or(Duration::from_secs_f64(seconds));
    Pace { seconds, ramp: Duration::from_secs_f64(ramp) }
}

fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> BenchError {
    let doing = doing.into();
    move |source| BenchError::Io { doing, source }
}
