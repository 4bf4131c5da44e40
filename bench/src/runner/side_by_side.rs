//! The same loads on Evolute and on qemu-storage-daemon, turn by turn.
//!
//! Both are up while either is measured; an idle one uses no CPU worth mentioning, and its share would show under
//! "others".

use std::time::Instant;

use clap::ValueEnum;

use super::cpu::Watch;
use super::lab::{Lab, Place, failure, fill, rest};
use super::machine::Store;
use super::record::Record;
use super::results::Row;
use super::system::{System, Wanted};
use super::works::{CURVE, Pace, Work};
use super::{BenchError, Skipped};
use crate::front_end;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SystemName {
    Evolute,
    Qsd,
}

pub fn run(
    lab: &Lab<'_>,
    store: Store,
    systems: &[SystemName],
    works: &[Work],
    record: &mut Record,
) -> Result<(), Skipped> {
    let base = store.base().map_err(Skipped::Store)?;
    let size = lab.volume_bytes(store, &base).map_err(Skipped::Store)?;
    let place = Place::new(store, &base)?;
    let (dir, data) = (place.dir.path(), place.data.path());
    let seconds = lab.pace.seconds;
    println!("\n{} ({}), volume of {} MiB, {seconds:?} each", store.name(), base.display(), size >> 20);
    let mut running = Vec::new();
    for name in systems {
        let system = match name {
            SystemName::Evolute => {
                System::evolute(&lab.bin_dir, dir, &data.join("evolute"), &Wanted::volume(size), lab.stop)?
            }
            SystemName::Qsd => System::qsd(dir, data, size, lab.stop)?,
        };
        running.push(Side { lab, system, store, size });
    }
    for side in &running {
        if let Some(note) = &side.system.note {
            println!("note: {note}");
        }
        fill(&side.system, store, &[size], lab.stop)?;
    }
    let first = record.results.rows.len();
    for (i, work) in works.iter().enumerate() {
        // Turn by turn, and who begins changes: a slow minute of the machine hits both.
        for turn in 0..running.len() {
            let side = &running[(i + turn) % running.len()];
            match side.row(*work)? {
                Ok(row) => record.row(row)?,
                Err(why) => {
                    record.failed(format!("{} on {}, {}: {why}", side.system.name, store.name(), work.name));
                }
            }
        }
    }
    for side in running {
        let name = side.system.name;
        if !side.system.stop() {
            record.failed(format!("{name} on {} did not stop cleanly", store.name()));
        }
    }
    // In the order of the works, Evolute first, however the turns went.
    let place_of = |row: &Row| works.iter().position(|work| work.name == row.work);
    record.results.rows[first..].sort_by_key(|row| (place_of(row), row.system.clone()));
    Ok(())
}

/// One of the systems that are compared.
struct Side<'l> {
    lab: &'l Lab<'l>,
    system: System,
    store: Store,
    size: u64,
}

impl Side<'_> {
    /// From rest, and of several runs the one of which the host stole least: see [`least_stolen`]. The inner error is one of this
    /// load alone: the others go on.
    fn row(&self, work: Work) -> Result<Result<Row, String>, BenchError> {
        // A point of a curve is seen beside its neighbours: half the time and one run do.
        let (pace, runs_max) = match (CURVE.contains(&work), self.lab.quick) {
            (true, _) => (self.lab.pace.halved(), 1),
            (false, true) => (self.lab.pace, 1),
            (false, false) => (self.lab.pace, RUNS_MAX),
        };
        least_stolen(runs_max, || {
            rest(&self.system, self.lab, self.lab.after_write())?;
            self.measure(work, pace)
        })
    }

    fn measure(&self, work: Work, pace: Pace) -> Result<Result<Row, String>, BenchError> {
        let mut watch = Watch::new(&self.system.processes);
        let options = work.options(&self.system.sockets[0], self.size, pace);
        let report = match front_end::run(&options, &mut watch, self.lab.stop) {
            Ok(report) => report,
            Err(error) => return Ok(Err(error.to_string())),
        };
        if work.writes() {
            self.system.written.set(Some(Instant::now()));
        }
        self.lab.go_on()?;
        let names = (work.name, self.store.name(), self.system.name);
        Ok(match failure(&report) {
            Some(why) => Err(why),
            None => Ok(Row::new(names, &report, &self.system.processes, &watch)),
        })
    }
}

/// Per cent of the machine that its host may give to others before a load is measured again.
const STOLEN_MAX: f64 = 2.0;
const RUNS_MAX: usize = 3;

/// Runs `measure` until next to nothing was stolen from it, and takes the row of which least was: chosen by what the host did,
/// not by what came out.
fn least_stolen(
    runs_max: usize,
    mut measure: impl FnMut() -> Result<Result<Row, String>, BenchError>,
) -> Result<Result<Row, String>, BenchError> {
    let mut rows: Vec<Row> = Vec::new();
    while rows.len() < runs_max {
        match measure()? {
            Ok(row) => rows.push(row),
            Err(why) => return Ok(Err(why)),
        }
        if rows.last().is_some_and(|row| row.stolen_percent <= STOLEN_MAX) {
            break;
        }
    }
    let runs = rows.len();
    let least = rows.into_iter().min_by(|a, b| a.stolen_percent.total_cmp(&b.stolen_percent));
    Ok(least.map(|row| Row { runs, ..row }).ok_or_else(|| "it was never measured".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::least_stolen;
    use crate::runner::results::{Row, tests::row};

    fn measured(runs_max: usize, stolen: &[f64]) -> Result<Row, String> {
        let mut left = stolen.iter().zip(1..);
        let row = least_stolen(runs_max, || {
            let (&stolen_percent, iops) = left.next().expect("asked no oftener than this");
            Ok(Ok(Row { stolen_percent, iops: f64::from(iops), ..row("tmpfs", "randread-4k-qd1") }))
        });
        row.expect("nothing stops it")
    }

    #[test]
    fn the_run_of_which_least_was_stolen_counts_and_a_quiet_one_is_the_last() {
        for (stolen, number, runs) in
            [(&[0.5][..], 1, 1), (&[9.0, 2.0], 2, 2), (&[9.0, 4.0, 7.0], 2, 3), (&[5.0, 5.0, 5.0], 1, 3)]
        {
            let row = measured(3, stolen).expect("measured");
            assert_eq!((row.iops, row.runs), (f64::from(number), runs), "{stolen:?}");
        }
        assert_eq!(measured(1, &[9.0]).expect("measured").runs, 1);
    }

    #[test]
    fn a_load_that_fails_is_not_tried_again() {
        let mut asked = 0;
        let failed = least_stolen(3, || {
            asked += 1;
            Ok(Err("it stalled".to_owned()))
        });
        assert_eq!((failed.expect("nothing stops it"), asked), (Err("it stalled".to_owned()), 1));
    }
}
