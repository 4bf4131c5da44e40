//! Bytes written to the device for each byte of 4K random writes, per replica.
//!
//! The number is the disk's own counter by the three replicas on it, over a load and the rest after it: the log with
//! its padding and its recycled files, the checkpoints that follow (a block written twice between two of them goes down
//! once), RocksDB, and the file system's journal. Whatever others write to the same disk meanwhile is in it, too, so
//! what the disk does in as much rest before is told beside it.
//!
//! What /proc/PID/io has is no answer: since Linux got large folios it counts the whole folio in which a page becomes
//! dirty (measured on 6.18: 128 MiB for 28 MiB of random 4K writes that reached the disk).

use std::time::{Duration, Instant};

use super::{figure, stop};
use crate::runner::BenchError;
use crate::runner::lab::{CHECKPOINTED_AFTER, Lab, Subject};
use crate::runner::machine::Store;
use crate::runner::process::disk_written_bytes;
use crate::runner::record::Record;
use crate::runner::system::{CHUNKSERVER, Wanted};
use crate::runner::works::{Pace, randwrite};

pub const WORK: &str = "write-amplification";
const DEPTH: usize = 32;
const BLOCK_BYTES: u64 = 4096;
/// In units of a load's time: several checkpoints and every log file of the ring.
const TIMES: u32 = 5;
/// What is looked at to know what others write.
const CALM: Duration = Duration::from_secs(5);

pub fn run(lab: &Lab<'_>, record: &mut Record) -> Result<(), BenchError> {
    let base = Store::Disk.base().map_err(BenchError::NoStore)?;
    let size = lab.volume_bytes(Store::Disk, &base).map_err(BenchError::NoStore)?;
    let cluster = lab.cluster(Store::Disk, &Wanted::volume(size))?;
    cluster.fill(lab)?;
    cluster.rest(lab, CHECKPOINTED_AFTER)?;
    let before_rest = on_disk(&cluster)?;
    lab.wait(CALM)?;
    let before = on_disk(&cluster)?;
    // No ramp: what is written in it would be in one counter and not in the other.
    let pace = Pace { seconds: lab.pace.seconds * TIMES, ramp: Duration::ZERO };
    let began = Instant::now();
    let report = cluster.run(lab, randwrite(DEPTH), pace, &mut ())?;
    cluster.rest(lab, CHECKPOINTED_AFTER)?;
    let after = on_disk(&cluster)?;
    let asked = (report.write.ios * BLOCK_BYTES) as f64;
    let replicas = cluster.system.of_kind(CHUNKSERVER).count() as f64;
    let by_asked = |bytes: u64| bytes as f64 / replicas / asked;
    let mib = asked / f64::from(1 << 20);
    let value = by_asked(after.saturating_sub(before));
    record.figure(
        figure(&cluster, WORK, "each replica", value, "bytes/byte")
            .noted(format!("{mib:.0} MiB written at depth {DEPTH}")),
    )?;
    let others = by_asked(before.saturating_sub(before_rest)) / CALM.as_secs_f64();
    let others = others * began.elapsed().as_secs_f64();
    record.figure(
        figure(&cluster, "write-amplification-rest", "at rest before, in as much time", others, "bytes/byte")
            .noted("in the number above, and not ours"),
    )?;
    stop(cluster, WORK, record);
    Ok(())
}

fn on_disk(cluster: &Subject) -> Result<u64, BenchError> {
    let data = cluster.place.data.path();
    disk_written_bytes(data).ok_or_else(|| BenchError::NoStore(format!("{} is on no disk", data.display())))
}
