//! What every measurement needs: a place, a system in it that serves a filled volume, and a load on it.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::BenchError;
use super::cpu::{Watch, of_process};
use super::machine::{Store, volume_bytes};
use super::results::Row;
use super::system::{CHUNKSERVER, System, Wanted};
use super::works::{Pace, Work, next_to_nothing, prefill};
use crate::front_end::report::Report;
use crate::front_end::{self, Observer, options};

/// A checkpoint is due 30 s after the one before, whatever is in the overlay; it begins within a second of that.
pub const CHECKPOINTED_AFTER: Duration = Duration::from_secs(32);

/// What holds for all measurements of a run.
#[derive(Debug)]
pub struct Lab<'r> {
    pub bin_dir: PathBuf,
    pub stop: &'r AtomicBool,
    pub pace: Pace,
    pub quick: bool,
    /// Bytes of the volume, where the caller wants others than we would take.
    pub size: Option<u64>,
    /// What a chunkserver holds when it is restarted.
    pub restart_bytes: u64,
}

/// Directories of one cluster or of a pair of systems: sockets and logs under a short path, data where the store is.
/// Both go with it.
#[derive(Debug)]
pub struct Place {
    pub store: Store,
    pub dir: TempDir,
    pub data: TempDir,
}

/// A system that is measured, alone in its place or beside another. The system ends before its directories go.
#[derive(Debug)]
pub struct Subject {
    pub system: System,
    pub place: Rc<Place>,
    /// Bytes of each volume.
    pub sizes: Vec<u64>,
    /// When a load that wrote ended, unless it was waited since until nothing was left of it: see [`Self::rest`].
    written: Cell<Option<Instant>>,
}

impl Place {
    pub fn new(store: Store, base: &Path) -> Result<Self, BenchError> {
        let made = |base: &Path| {
            let guard = tempfile::Builder::new().prefix("evolute-bench-").tempdir_in(base);
            guard.map_err(|source| BenchError::Io {
                doing: format!("making a directory under {}", base.display()),
                source,
            })
        };
        Ok(Self { store, dir: made(&std::env::temp_dir())?, data: made(base)? })
    }
}

impl Lab<'_> {
    /// Bytes of a volume that stands for a large one.
    pub fn volume_bytes(&self, store: Store, base: &Path) -> Result<u64, String> {
        match self.size {
            Some(size) => Ok(size),
            None => volume_bytes(store, base),
        }
    }

    /// Bytes of all volumes together where only their number or their copysets matter.
    pub fn small_bytes(&self) -> u64 {
        const SMALL: u64 = 1 << 30;
        const QUICK: u64 = 256 << 20;
        self.size.unwrap_or(if self.quick { QUICK } else { SMALL })
    }

    pub fn cluster(&self, store: Store, wanted: &Wanted) -> Result<Subject, BenchError> {
        let base = store.base().map_err(BenchError::NoStore)?;
        let place = Rc::new(Place::new(store, &base)?);
        self.cluster_in(place, wanted)
    }

    /// A cluster in a place that others share.
    pub fn cluster_in(&self, place: Rc<Place>, wanted: &Wanted) -> Result<Subject, BenchError> {
        let data = place.data.path().join("evolute");
        let system = System::evolute(&self.bin_dir, place.dir.path(), &data, wanted, self.stop)?;
        Ok(Subject::new(system, place, wanted.volumes.clone()))
    }

    /// How long after a write a load begins, at least. In a quick run, only whoever is busy with it now is waited for.
    pub fn after_write(&self) -> Duration {
        if self.quick { Duration::ZERO } else { CHECKPOINTED_AFTER }
    }

    /// Sleeps, unless the run is stopped.
    pub fn wait(&self, time: Duration) -> Result<(), BenchError> {
        const NAP: Duration = Duration::from_millis(50);
        let until = Instant::now() + time;
        loop {
            self.go_on()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            sleep(left.min(NAP));
        }
    }

    pub fn go_on(&self) -> Result<(), BenchError> {
        if self.stop.load(Ordering::Relaxed) { Err(BenchError::Interrupted) } else { Ok(()) }
    }
}

impl Subject {
    pub fn new(system: System, place: Rc<Place>, sizes: Vec<u64>) -> Self {
        Self { system, place, sizes, written: Cell::new(None) }
    }

    /// Every volume written once, and flushed.
    pub fn fill(&self, lab: &Lab<'_>) -> Result<(), BenchError> {
        let report = front_end::run_together(&self.devices(prefill), &mut (), lab.stop)
            .map_err(front_end_error(&self.system, self.place.store))?;
        self.written.set(Some(Instant::now()));
        lab.go_on()?;
        let (system, store) = (self.system.name, self.place.store.name());
        match failure(&report) {
            None => Ok(()),
            Some(why) => Err(BenchError::Prefill { system, store, why }),
        }
    }

    /// If anything was written: until the chunkservers, if there are any, have nothing to do, `after_write` at least. A
    /// checkpoint of it would have its share of what comes after.
    pub fn rest(&self, lab: &Lab<'_>, after_write: Duration) -> Result<(), BenchError> {
        const LOOK: Duration = Duration::from_secs(1);
        /// Of a core; 500 copysets that are awake use more, and a checkpoint that takes its time, too.
        const QUIET: f64 = 0.02;
        const QUIET_LOOKS: u32 = 2;
        const MAX: Duration = Duration::from_secs(120);
        let servers = self.system.of_kind(CHUNKSERVER).count();
        let Some(written) = self.written.get().filter(|_| servers > 0) else { return Ok(()) };
        let since = Instant::now();
        let used =
            || self.system.of_kind(CHUNKSERVER).map(|process| of_process(process.pid)).sum::<Duration>();
        let (mut last, mut quiet) = (used(), 0);
        while written.elapsed() < after_write || quiet < QUIET_LOOKS {
            if since.elapsed() > MAX {
                return Err(BenchError::NeverAtRest(MAX));
            }
            lab.wait(LOOK)?;
            let now = used();
            let busy = now.saturating_sub(last).as_secs_f64() / LOOK.as_secs_f64() / servers as f64;
            quiet = if busy < QUIET { quiet + 1 } else { 0 };
            last = now;
        }
        self.written.set(None);
        Ok(())
    }

    /// The same load on every volume, from rest; the row is of all together.
    pub fn load(&self, lab: &Lab<'_>, name: &str, work: Work, pace: Pace) -> Result<Row, BenchError> {
        self.rest(lab, lab.after_write())?;
        let mut watch = Watch::new(&self.system.processes);
        let report = self.run(lab, work, pace, &mut watch)?;
        let names = (name, self.place.store.name(), self.system.name);
        Ok(Row::new(names, &report, &self.system.processes, &watch))
    }

    /// A load that somebody else watches.
    pub fn run(
        &self,
        lab: &Lab<'_>,
        work: Work,
        pace: Pace,
        observer: &mut impl Observer,
    ) -> Result<Report, BenchError> {
        let devices = self.devices(|socket, size| work.options(socket, size, pace));
        let (system, store) = (self.system.name, self.place.store.name());
        let failed = |why| BenchError::Load { system, store, work: work.name, why };
        let report = front_end::run_together(&devices, observer, lab.stop)
            .map_err(|error| failed(error.to_string()))?;
        if work.writes() {
            self.written.set(Some(Instant::now()));
        }
        lab.go_on()?;
        match failure(&report) {
            None => Ok(report),
            Some(why) => Err(failed(why)),
        }
    }

    /// Per cent of a core that each process uses in `window` while a driver is there that asks nothing, `settle` after
    /// it came.
    pub fn idle(
        &self,
        lab: &Lab<'_>,
        settle: Duration,
        window: Duration,
    ) -> Result<Vec<(String, f64)>, BenchError> {
        let mut rest = Rest { cluster: self, lab, settle, window, used: None };
        let devices = self.devices(next_to_nothing);
        front_end::run_together(&devices, &mut rest, lab.stop)
            .map_err(front_end_error(&self.system, self.place.store))?;
        let used = rest.used.unwrap_or(Err(BenchError::Interrupted))?;
        let share = |time: Duration| time.as_secs_f64() / window.as_secs_f64() * 100.0;
        let names = self.system.processes.iter().map(|process| process.name.clone());
        Ok(names.zip(used.into_iter().map(share)).collect())
    }

    /// Ends it as its operator would. False: it did not end cleanly.
    pub fn stop(self) -> bool {
        self.system.stop()
    }

    fn devices(&self, options: impl Fn(&Path, u64) -> options::Options) -> Vec<options::Options> {
        self.system.sockets.iter().zip(&self.sizes).map(|(socket, size)| options(socket, *size)).collect()
    }

    fn used(&self) -> Vec<Duration> {
        self.system.processes.iter().map(|process| of_process(process.pid)).collect()
    }
}

/// Loads on two clusters turn by turn, and of each the run in the middle: what is told of them is how they compare, and a slow
/// minute of the machine is to hit both or neither.
pub fn by_turns(lab: &Lab<'_>, loads: [(&Subject, &str, Work); 2]) -> Result<[Row; 2], BenchError> {
    const TURNS: usize = 3;
    let [mut first, mut second] = [Vec::new(), Vec::new()];
    for _ in 0..TURNS {
        for ((cluster, name, work), rows) in loads.into_iter().zip([&mut first, &mut second]) {
            rows.push(cluster.load(lab, name, work, lab.pace)?);
        }
    }
    Ok([first, second].map(|mut rows| {
        rows.sort_by(|a, b| a.iops.total_cmp(&b.iops));
        Row { runs: TURNS, ..rows.swap_remove(TURNS / 2) }
    }))
}

/// Watches a device that is connected and has nothing to do.
struct Rest<'l> {
    cluster: &'l Subject,
    lab: &'l Lab<'l>,
    settle: Duration,
    window: Duration,
    used: Option<Result<Vec<Duration>, BenchError>>,
}

impl Rest<'_> {
    fn look(&self) -> Result<Vec<Duration>, BenchError> {
        self.lab.wait(self.settle)?;
        let before = self.cluster.used();
        self.lab.wait(self.window)?;
        Ok(self.cluster.used().iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect())
    }
}

impl Observer for Rest<'_> {
    fn connected(&mut self) {
        self.used = Some(self.look());
    }
}

/// Why a run that came to its end is worth nothing.
fn failure(report: &Report) -> Option<String> {
    let failed = report.exit_status() != 0;
    failed.then(|| report.first_error.clone().unwrap_or_else(|| "it stalled".to_owned()))
}

fn front_end_error(
    system: &System,
    store: Store,
) -> impl FnOnce(front_end::FrontEndError) -> BenchError + use<> {
    let (system, store) = (system.name, store.name());
    move |source| BenchError::FrontEnd { system, store, source }
}
