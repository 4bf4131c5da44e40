//! The same loads on Evolute and on qemu-storage-daemon, turn by turn.
//!
//! Both are up while either is measured; an idle one uses no CPU worth mentioning, and its share would show under
//! "others".

use std::rc::Rc;

use clap::ValueEnum;

use super::lab::{Lab, Place, Subject};
use super::machine::Store;
use super::record::Record;
use super::results::Row;
use super::system::{System, Wanted};
use super::works::{CURVE, Work};
use super::{BenchError, Skipped};

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
    let place = Rc::new(Place::new(store, &base)?);
    let seconds = lab.pace.seconds;
    println!("\n{} ({}), volume of {} MiB, {seconds:?} each", store.name(), base.display(), size >> 20);
    let mut running = Vec::new();
    for name in systems {
        running.push(match name {
            SystemName::Evolute => lab.cluster_in(Rc::clone(&place), &Wanted::volume(size))?,
            SystemName::Qsd => {
                let system = System::qsd(place.dir.path(), place.data.path(), size, lab.stop)?;
                Subject::new(system, Rc::clone(&place), vec![size])
            }
        });
    }
    for side in &running {
        if let Some(note) = &side.system.note {
            println!("note: {note}");
        }
        side.fill(lab)?;
    }
    let first = record.results.rows.len();
    for (i, work) in works.iter().enumerate() {
        // Turn by turn, and who begins changes: a slow minute of the machine hits both.
        for turn in 0..running.len() {
            let side = &running[(i + turn) % running.len()];
            match row(lab, side, *work) {
                Ok(row) => record.row(row)?,
                // One load's alone: the others go on.
                Err(error @ BenchError::Load { .. }) => record.failed(error.to_string()),
                Err(error) => return Err(error.into()),
            }
        }
    }
    for side in running {
        let name = side.system.name;
        if !side.stop() {
            record.failed(format!("{name} on {} did not stop cleanly", store.name()));
        }
    }
    // In the order of the works, Evolute first, however the turns went.
    let place_of = |row: &Row| works.iter().position(|work| work.name == row.work);
    record.results.rows[first..].sort_by_key(|row| (place_of(row), row.system.clone()));
    Ok(())
}

/// From rest, and of several runs the one of which the host stole least: see [`least_stolen`].
fn row(lab: &Lab<'_>, side: &Subject, work: Work) -> Result<Row, BenchError> {
    // A point of a curve is seen beside its neighbours: half the time and one run do.
    let (pace, runs_max) = match (CURVE.contains(&work), lab.quick) {
        (true, _) => (lab.pace.halved(), 1),
        (false, true) => (lab.pace, 1),
        (false, false) => (lab.pace, RUNS_MAX),
    };
    least_stolen(runs_max, || side.load(lab, work.name, work, pace))
}

/// Per cent of the machine that its host may give to others before a load is measured again.
const STOLEN_MAX: f64 = 2.0;
const RUNS_MAX: usize = 3;

/// Runs `measure` until next to nothing was stolen from it, and takes the row of which least was: chosen by what the host did,
/// not by what came out.
fn least_stolen(
    runs_max: usize,
    mut measure: impl FnMut() -> Result<Row, BenchError>,
) -> Result<Row, BenchError> {
    let (mut least, mut runs) = (measure()?, 1);
    while least.stolen_percent > STOLEN_MAX && runs < runs_max {
        let row = measure()?;
        runs += 1;
        if row.stolen_percent < least.stolen_percent {
            least = row;
        }
    }
    Ok(Row { runs, ..least })
}

#[cfg(test)]
mod tests {
    use super::least_stolen;
    use crate::runner::BenchError;
    use crate::runner::results::{Row, tests::row};

    fn measured(runs_max: usize, stolen: &[f64]) -> Row {
        let mut left = stolen.iter().zip(1..);
        let row = least_stolen(runs_max, || {
            let (&stolen_percent, iops) = left.next().expect("asked no oftener than this");
            Ok(Row { stolen_percent, iops: f64::from(iops), ..row("tmpfs", "randread-4k-qd1") })
        });
        row.expect("measured")
    }

    #[test]
    fn the_run_of_which_least_was_stolen_counts_and_a_quiet_one_is_the_last() {
        for (stolen, number, runs) in
            [(&[0.5][..], 1, 1), (&[9.0, 2.0], 2, 2), (&[9.0, 4.0, 7.0], 2, 3), (&[5.0, 5.0, 5.0], 1, 3)]
        {
            let row = measured(3, stolen);
            assert_eq!((row.iops, row.runs), (f64::from(number), runs), "{stolen:?}");
        }
        assert_eq!(measured(1, &[9.0]).runs, 1);
    }

    #[test]
    fn a_load_that_fails_is_not_tried_again() {
        let mut asked = 0;
        let failed = least_stolen(3, || {
            asked += 1;
            let (system, store, work) = ("evolute", "tmpfs", "randread-4k-qd1");
            Err(BenchError::Load { system, store, work, why: "it stalled".to_owned() })
        });
        let why = failed.expect_err("it failed").to_string();
        assert_eq!((why.as_str(), asked), ("evolute on tmpfs, randread-4k-qd1: it stalled", 1));
    }
}
