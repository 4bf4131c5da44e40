//! The same load on one volume or spread over many: total depth and total bytes stay the same.

use super::{KIB, MEMORY, figure, stop};
use crate::runner::BenchError;
use crate::runner::lab::{Lab, Subject, by_turns};
use crate::runner::machine::Store;
use crate::runner::process::memory;
use crate::runner::record::Record;
use crate::runner::results::Row;
use crate::runner::system::{BACKEND, CHUNKSERVER, MDS, Wanted};
use crate::runner::works::randwrite;

const DEPTH: usize = 128;
const MANY: u32 = 32;
const MIB: u64 = 1 << 20;

/// Each number of volumes on a cluster of its own: volumes that are there and idle would have their share. The cluster with
/// one volume stays, to be compared with.
pub fn run(lab: &Lab<'_>, record: &mut Record) -> Result<(), BenchError> {
    let (each, together): (&[u32], &[u32]) =
        if lab.quick { (&[MANY], &[MANY]) } else { (&[2, 4, 8, 16, MANY], &[2, 8, MANY]) };
    let (one, one_used) = filled(lab, 1, false)?;
    for &count in each {
        let (cluster, before) = filled(lab, count, false)?;
        let row = cluster.load(lab, &format!("volumes-{count}"), randwrite(depth(count)), lab.pace)?;
        record.row(Row { volumes: Some(count), ..row })?;
        if count == MANY {
            tell(&cluster, one_used, before, record)?;
        }
        stop(cluster, "volumes", record);
    }
    for &count in together {
        let (cluster, before) = filled(lab, count, true)?;
        let (name, work) = (format!("one-backend-{count}"), randwrite(depth(count)));
        let row = if count == MANY {
            let loads = [(&one, "volumes-1", randwrite(DEPTH)), (&cluster, name.as_str(), work)];
            let [single, row] = by_turns(lab, loads)?;
            record.row(Row { volumes: Some(1), ..single })?;
            let kib = before.backends as f64 / f64::from(MANY) / KIB;
            let figure = figure(&cluster, MEMORY, "volume: its share of one backend for 32", kib, "KiB");
            record.figure(figure.noted("attached, nothing written"))?;
            row
        } else {
            cluster.load(lab, &name, work, lab.pace)?
        };
        record.row(Row { volumes_of_one_backend: Some(count), ..row })?;
        stop(cluster, "one-backend", record);
    }
    stop(one, "volumes", record);
    Ok(())
}

/// Of each of so many volumes.
fn depth(count: u32) -> usize {
    DEPTH / count as usize
}

/// A filled cluster, and what it used before it was filled.
fn filled(lab: &Lab<'_>, count: u32, one_backend: bool) -> Result<(Subject, Used), BenchError> {
    let bytes = (lab.small_bytes() / u64::from(count) / MIB).max(1) * MIB;
    let wanted = Wanted { volumes: vec![bytes; count as usize], one_backend, ..Wanted::volume(0) };
    let cluster = lab.cluster(Store::Tmpfs, &wanted)?;
    let before = Used::of(&cluster)?;
    cluster.fill(lab)?;
    Ok((cluster, before))
}

/// Resident bytes of each kind of process together, before anything is written.
#[derive(Debug, Clone, Copy)]
struct Used {
    backends: u64,
    chunkservers: u64,
    mds: u64,
}

impl Used {
    fn of(cluster: &Subject) -> Result<Self, BenchError> {
        let sum = |kind| -> Result<u64, BenchError> {
            cluster.system.of_kind(kind).map(|process| Ok(memory(process.pid)?.now)).sum()
        };
        Ok(Self { backends: sum(BACKEND)?, chunkservers: sum(CHUNKSERVER)?, mds: sum(MDS)? })
    }
}

fn tell(cluster: &Subject, one: Used, many: Used, record: &mut Record) -> Result<(), BenchError> {
    let grown = |of: fn(Used) -> u64| (of(many) as f64 - of(one) as f64) / f64::from(MANY - 1) / KIB;
    for (name, kib) in [
        ("volume: its backend, a process", many.backends as f64 / f64::from(MANY) / KIB),
        ("volume: three chunkservers", grown(|used| used.chunkservers)),
        ("volume: mds", grown(|used| used.mds)),
    ] {
        record.figure(figure(cluster, MEMORY, name, kib, "KiB").noted("attached, nothing written"))?;
    }
    let busiest = cluster.system.of_kind(BACKEND).map(|process| Ok(memory(process.pid)?.now));
    let busiest = busiest.collect::<Result<Vec<u64>, BenchError>>()?.into_iter().max().unwrap_or(0);
    let after = figure(cluster, MEMORY, "volume: its backend after the load", busiest as f64 / KIB, "KiB");
    record.figure(after.noted("the largest of 32, each at depth 4"))
}
