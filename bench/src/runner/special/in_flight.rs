//! Memory of a request in flight: how much higher the peak is with many at once than with one.
//!
//! Of the chunkservers only reads tell something: writes stay in the overlay until the checkpoint, whatever the depth.
//! Allocators keep what they once had, so a number near zero says that it was there already.

use super::{KIB, MEMORY, figure, stop};
use crate::runner::BenchError;
use crate::runner::lab::{Lab, Subject};
use crate::runner::machine::Store;
use crate::runner::process::{forget_peak, memory};
use crate::runner::record::Record;
use crate::runner::system::{BACKEND, CHUNKSERVER, Wanted};
use crate::runner::works::{Work, randread, randwrite};

const MANY: usize = 256;

/// What is in flight, and whose memory it is in.
struct Load {
    name: &'static str,
    work: fn(usize) -> Work,
    kinds: &'static [&'static str],
}

const LOADS: [Load; 2] = [
    Load { name: "write", work: randwrite, kinds: &[BACKEND] },
    Load { name: "read", work: randread, kinds: &[BACKEND, CHUNKSERVER] },
];

pub fn run(lab: &Lab<'_>, record: &mut Record) -> Result<(), BenchError> {
    let cluster = lab.cluster(Store::Tmpfs, &Wanted::volume(lab.small_bytes().min(256 << 20)))?;
    // Not filled: the buffers of 128 KiB that takes would hide those of 4 KiB. Written at depth 1 first, so that
    // everything that is made once is there.
    for load in &LOADS {
        let Load { name, work, kinds } = load;
        let one = peaks(&cluster, lab, work(1), kinds)?;
        let many = peaks(&cluster, lab, work(MANY), kinds)?;
        for ((kind, one), many) in kinds.iter().zip(one).zip(many) {
            let each = (many as f64 - one as f64) / (MANY - 1) as f64 / KIB;
            let figure = figure(&cluster, MEMORY, format!("4K {name} in flight: {kind}"), each, "KiB");
            record.figure(figure.noted("peak at depth 256 less peak at depth 1"))?;
        }
    }
    stop(cluster, "in-flight", record);
    Ok(())
}

/// The highest resident bytes in a load, of all processes of each kind together.
fn peaks(cluster: &Subject, lab: &Lab<'_>, work: Work, kinds: &[&str]) -> Result<Vec<u64>, BenchError> {
    let of_kind = |kind: &&str| cluster.system.of_kind(kind).map(|process| process.pid).collect::<Vec<_>>();
    let pids: Vec<Vec<u32>> = kinds.iter().map(of_kind).collect();
    for pid in pids.iter().flatten() {
        forget_peak(*pid)?;
    }
    cluster.run(lab, work, lab.pace.halved(), &mut ())?;
    pids.iter().map(|pids| pids.iter().map(|pid| Ok(memory(*pid)?.peak)).sum()).collect()
}
