//! Bytes written to the device for each byte of 4K random writes, per replica.
//!
//! In the number is everything a chunkserver has the kernel write until all of it is in chunk files and the disk is at
//! rest again: the log with its padding and its recycled files, the checkpoints that follow (a block written twice
//! between two of them goes down once), and RocksDB. Not in it: what the file system adds for itself (its journal), and
//! what other processes write. The whole disk's counter, which has those too, is told beside it.

use std::time::{Duration, Instant};

use super::{figure, stop};
use crate::runner::BenchError;
use crate::runner::lab::{Cluster, Lab};
use crate::runner::machine::Store;
use crate::runner::process::{disk_written_bytes, written_bytes};
use crate::runner::record::Record;
use crate::runner::results::Figure;
use crate::runner::system::{CHUNKSERVER, Wanted};
use crate::runner::works::{Pace, randwrite};

pub const WORK: &str = "write-amplification";
const DEPTH: usize = 32;
const BLOCK_BYTES: u64 = 4096;
/// In units of a load's time: several checkpoints and every log file of the ring.
const TIMES: u32 = 5;
/// A checkpoint is due after 30 s whatever is in the overlay; it begins within a second of that.
const REST_MIN: Duration = Duration::from_secs(32);
const REST_MAX: Duration = Duration::from_secs(120);

pub fn run(lab: &Lab<'_>, record: &mut Record) -> Result<(), BenchError> {
    let base = Store::Disk.base().map_err(BenchError::NoStore)?;
    let size = lab.volume_bytes(Store::Disk, &base).map_err(BenchError::NoStore)?;
    let cluster = lab.cluster(Store::Disk, &Wanted::volume(size))?;
    cluster.fill(lab)?;
    rest(&cluster, lab)?;
    let before = Written::now(&cluster)?;
    // No ramp: what is written in it would be in one counter and not in the other.
    let pace = Pace { seconds: lab.pace.seconds * TIMES, ramp: Duration::ZERO };
    let report = cluster.run(lab, randwrite(DEPTH), pace, &mut ())?;
    rest(&cluster, lab)?;
    let after = Written::now(&cluster)?;
    let asked = (report.write.ios * BLOCK_BYTES) as f64;
    let note = format!("{:.0} MiB written at depth {DEPTH}", asked / f64::from(1 << 20));
    let names = cluster.system.of_kind(CHUNKSERVER).map(|process| process.name.clone());
    let each =
        after.each.iter().zip(&before.each).map(|(after, before)| after.saturating_sub(*before) as f64);
    let figures: Vec<Figure> = names
        .zip(each)
        .map(|(name, bytes)| figure(&cluster, WORK, name, bytes / asked, "bytes/byte").noted(&note))
        .collect();
    let replicas = figures.len() as f64;
    for figure in figures {
        record.figure(figure)?;
    }
    if let (Some(before), Some(after)) = (before.disk, after.disk) {
        let all = after.saturating_sub(before) as f64 / replicas / asked;
        let name = "the whole disk by replicas";
        let figure = figure(&cluster, "write-amplification-disk", name, all, "bytes/byte");
        record.figure(figure.noted("everybody's, the file system's journal too"))?;
    }
    stop(cluster, WORK, record);
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
struct Written {
    each: Vec<u64>,
    disk: Option<u64>,
}

impl Written {
    fn now(cluster: &Cluster) -> Result<Self, BenchError> {
        let each = cluster.system.of_kind(CHUNKSERVER).map(|process| written_bytes(process.pid));
        let disk = disk_written_bytes(cluster.place.data.path());
        Ok(Self { each: each.collect::<Result<_, _>>()?, disk })
    }
}

/// Until the next checkpoint has surely been and nothing more is written by the chunkservers.
fn rest(cluster: &Cluster, lab: &Lab<'_>) -> Result<(), BenchError> {
    const LOOK: Duration = Duration::from_secs(1);
    const QUIET_LOOKS: u32 = 3;
    let since = Instant::now();
    let (mut last, mut quiet) = (Written::now(cluster)?.each, 0);
    while since.elapsed() < REST_MIN || quiet < QUIET_LOOKS {
        if since.elapsed() > REST_MAX {
            return Err(BenchError::NeverAtRest(REST_MAX));
        }
        lab.wait(LOOK)?;
        let now = Written::now(cluster)?.each;
        quiet = if now == last { quiet + 1 } else { 0 };
        last = now;
    }
    Ok(())
}
