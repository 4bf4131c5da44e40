//! The same loads on Evolute and on qemu-storage-daemon, turn by turn.
//!
//! Both are up while either is measured; an idle one uses no CPU worth mentioning, and its share would show under
//! "others".

use clap::ValueEnum;

use super::cpu::Watch;
use super::lab::{Lab, Place, failure, fill};
use super::machine::Store;
use super::record::Record;
use super::results::Row;
use super::system::{System, Wanted};
use super::works::{CURVE, Work};
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
        running.push(match name {
            SystemName::Evolute => {
                System::evolute(&lab.bin_dir, dir, &data.join("evolute"), &Wanted::volume(size), lab.stop)?
            }
            SystemName::Qsd => System::qsd(dir, data, size, lab.stop)?,
        });
    }
    for system in &running {
        if let Some(note) = &system.note {
            println!("note: {note}");
        }
        fill(system, store, &[size], lab.stop)?;
    }
    let first = record.results.rows.len();
    for (i, work) in works.iter().enumerate() {
        // Turn by turn, and who begins changes: a slow minute of the machine hits both.
        for turn in 0..running.len() {
            let system = &running[(i + turn) % running.len()];
            match measure(lab, system, store, *work, size)? {
                Ok(row) => record.row(row)?,
                Err(why) => {
                    record.failed(format!("{} on {}, {}: {why}", system.name, store.name(), work.name));
                }
            }
        }
    }
    for system in running {
        let name = system.name;
        if !system.stop() {
            record.failed(format!("{name} on {} did not stop cleanly", store.name()));
        }
    }
    // In the order of the works, Evolute first, however the turns went.
    let place_of = |row: &Row| works.iter().position(|work| work.name == row.work);
    record.results.rows[first..].sort_by_key(|row| (place_of(row), row.system.clone()));
    Ok(())
}

/// The inner error is one of this run alone: the others go on.
fn measure(
    lab: &Lab<'_>,
    system: &System,
    store: Store,
    work: Work,
    size: u64,
) -> Result<Result<Row, String>, BenchError> {
    let mut watch = Watch::new(&system.processes);
    // A point of a curve is seen beside its neighbours: half the time does.
    let pace = if CURVE.contains(&work) { lab.pace.halved() } else { lab.pace };
    let options = work.options(&system.sockets[0], size, pace);
    let report = match front_end::run(&options, &mut watch, lab.stop) {
        Ok(report) => report,
        Err(error) => return Ok(Err(error.to_string())),
    };
    lab.go_on()?;
    Ok(match failure(&report) {
        Some(why) => Err(why),
        None => Ok(Row::new((work.name, store.name(), system.name), &report, &system.processes, &watch)),
    })
}
