//! What copysets cost that a volume does not use: its speed, idle CPU and memory beside ever more of them.

use std::time::Duration;

use super::idle::{UNIT, WINDOW};
use super::{KIB, MEMORY, figure, stop};
use crate::runner::BenchError;
use crate::runner::lab::{Lab, Subject, by_turns};
use crate::runner::machine::Store;
use crate::runner::process::memory;
use crate::runner::record::Record;
use crate::runner::results::Row;
use crate::runner::system::{CHUNKSERVER, Wanted};
use crate::runner::works::randwrite;

const FEW: u32 = 12;
const MANY: u32 = 500;
/// The number whose idle cost is asked for.
const IDLE: u32 = 100;
const DEPTH: usize = 32;
/// Nothing was written: there is no more to wait for than the last of the elections.
const SETTLE: Duration = Duration::from_secs(3);

/// With three chunkservers in three zones every copyset has a replica on each: a pool of N copysets is N per
/// chunkserver. The volume spreads over six of them; the others have nothing to do. The
/// cluster with few stays, to be compared with.
pub fn run(lab: &Lab<'_>, record: &mut Record) -> Result<(), BenchError> {
    let counts: &[u32] = if lab.quick { &[MANY] } else { &[50, IDLE, MANY] };
    let (few, few_resident) = filled(lab, FEW, record)?;
    for &copysets in counts {
        let (cluster, resident) = filled(lab, copysets, record)?;
        let (label, work) = (name(copysets), randwrite(DEPTH));
        let row = if copysets == MANY {
            let [few, row] = by_turns(lab, [(&few, &name(FEW), work), (&cluster, &label, work)])?;
            record.row(Row { copysets: Some(FEW), ..few })?;
            let each = (resident as f64 - few_resident as f64) / f64::from(MANY - FEW) / KIB;
            let figure = figure(&cluster, MEMORY, "copyset: each of its chunkservers", each, "KiB");
            record.figure(figure.noted("idle, nothing written"))?;
            row
        } else {
            cluster.load(lab, &label, work, lab.pace)?
        };
        record.row(Row { copysets: Some(copysets), ..row })?;
        stop(cluster, "copysets", record);
    }
    stop(few, "copysets", record);
    Ok(())
}

fn name(copysets: u32) -> String {
    format!("copysets-{copysets}")
}

/// A filled cluster, and what its chunkservers used before it was filled. On the way the idle cost, where it is asked for.
fn filled(lab: &Lab<'_>, copysets: u32, record: &mut Record) -> Result<(Subject, u64), BenchError> {
    let wanted = Wanted { copysets, ..Wanted::volume(lab.small_bytes()) };
    let cluster = lab.cluster(Store::Tmpfs, &wanted)?;
    if copysets == IDLE {
        let work = format!("idle-copysets-{IDLE}");
        let idle = cluster.idle(lab, SETTLE, WINDOW)?;
        for (name, percent) in idle.into_iter().filter(|(name, _)| name.starts_with(CHUNKSERVER)) {
            record.figure(figure(&cluster, &work, name, percent, UNIT))?;
        }
    }
    let before = resident(&cluster)?;
    cluster.fill(lab)?;
    Ok((cluster, before))
}

/// Mean resident bytes of a chunkserver.
fn resident(cluster: &Subject) -> Result<u64, BenchError> {
    let each = cluster.system.of_kind(CHUNKSERVER).map(|process| Ok(memory(process.pid)?.now));
    let each = each.collect::<Result<Vec<u64>, BenchError>>()?;
    Ok(each.iter().sum::<u64>() / (each.len() as u64).max(1))
}
