//! What a cluster with one attached volume costs while nobody asks anything.

use std::time::Duration;

use super::{figure, stop};
use crate::runner::BenchError;
use crate::runner::lab::Lab;
use crate::runner::machine::Store;
use crate::runner::record::Record;
use crate::runner::system::Wanted;

/// The CPU clocks are exact; this is so that timers of some seconds are seen as often as they come.
pub const WINDOW: Duration = Duration::from_secs(12);
/// A checkpoint of what was written before is due within 30 s; it begins within a second of that.
const SETTLE: Duration = Duration::from_secs(32);
pub const UNIT: &str = "% of a core";

/// The volume is filled before, so that the chunkservers have something to look after, and a driver is connected, as
/// a guest's would be.
pub fn run(lab: &Lab<'_>, record: &mut Record) -> Result<(), BenchError> {
    let cluster = lab.cluster(Store::Tmpfs, &Wanted::volume(lab.small_bytes()))?;
    cluster.fill(lab)?;
    for (name, percent) in cluster.idle(lab, SETTLE, WINDOW)? {
        record.figure(figure(&cluster, "idle", name, percent, UNIT))?;
    }
    stop(cluster, "idle", record);
    Ok(())
}
