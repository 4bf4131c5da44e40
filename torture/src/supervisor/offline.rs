//! What each replica's files hold when no chunkserver runs, and whether that is enough.
//!
//! ```text
//!  load stands still ─▶ kill -9 of all chunkservers ─▶ `evolute-chunkserver inspect --export`, one data directory at a time
//!                                                          └─▶ raw image ─▶ judged as a read that begins now ─▶ [`judge`]
//! ```
//!
//! Every entry of a log is applied, committed or not; with the load drained there is nothing in doubt. Then, for each
//! copyset:
//!
//! - A replica whose log ends where the last of them ends holds, in every sector, a value that may be the last one.
//! - One whose log ends earlier may hold older values, and nothing that was never written. It counts as wrong there, and
//!   a majority of the replicas must be right in every sector.
//!
//! It knows of `inspect` only what is printed. Start at [`judge`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::cluster::{CopysetSeen, VOLUME_NUMBER};
use super::process::enter;
use crate::blkcheck::Judged;

/// Sectors of a chunk.
const CHUNK_SECTORS: u32 = 32 << 10;
/// Of `inspect`: it read everything, and not all of it is sound. The report says what.
const UNSOUND: i32 = 3;

/// What `inspect` prints, as far as we look at it.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Inspection {
    pub replicas: Vec<ReplicaSeen>,
    pub exports: BTreeMap<u64, PathBuf>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct ReplicaSeen {
    pub copyset: u64,
    pub trouble: Option<String>,
    pub last: Option<At>,
    pub chunks: Vec<ChunkSeen>,
}

/// Ordered as Raft orders logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct At {
    pub term: u64,
    pub index: u64,
}

#[derive(Debug, Clone, Deserialize)]
pub struct ChunkSeen {
    pub volume: u64,
    pub chunk: u32,
    pub unreadable: Vec<u16>,
}

/// One chunkserver's directory.
#[derive(Debug, Clone, Default)]
pub struct DiskSeen {
    pub inspection: Inspection,
    pub judged: Judged,
}

/// What came of all of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub replicas: usize,
    /// Of which the log ends before another one's.
    pub behind: usize,
    /// One per sector and replica.
    pub sectors: u64,
    pub failures: Vec<String>,
    pub unknowns: Vec<String>,
}

/// Has the program read a data directory. An error is one of the program or of the files, not of ours.
pub fn inspect(program: &Path, data_dir: &Path, export: &Path) -> Result<Inspection> {
    let mut command = Command::new(program);
    command.args(["inspect", "--json", "--data-dir"]).arg(data_dir).arg("--export").arg(export);
    enter(&mut command, None);
    let output = command.stdin(Stdio::null()).output().context("cannot run inspect")?;
    if !output.status.success() && output.status.code() != Some(UNSOUND) {
        bail!("inspect ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    let mut seen: Inspection = serde_json::from_slice(&output.stdout).context("inspect printed no report")?;
    // Others are made and deleted meanwhile, and a deleted one may not be gone everywhere.
    seen.exports.retain(|volume, _| *volume == VOLUME_NUMBER);
    for replica in &mut seen.replicas {
        replica.chunks.retain(|chunk| chunk.volume == VOLUME_NUMBER);
    }
    Ok(seen)
}

/// `disks` by chunkserver, as we count.
pub fn judge(copysets: &[CopysetSeen], disks: &[DiskSeen]) -> Outcome {
    let mut outcome = Outcome::default();
    for (on, disk) in disks.iter().enumerate() {
        sound(on, &disk.inspection, &mut outcome);
        if disk.judged.undecided > 0 {
            let count = disk.judged.undecided;
            outcome
                .unknowns
                .push(format!("{count} sectors of chunkserver {on}'s files could not be decided"));
        }
    }
    let mut homes: BTreeMap<u32, u64> = BTreeMap::new();
    let replicas = disks.iter().flat_map(|disk| &disk.inspection.replicas);
    for (copyset, chunk) in replicas.flat_map(|of| of.chunks.iter().map(|chunk| (of.copyset, chunk.chunk))) {
        if *homes.entry(chunk).or_insert(copyset) != copyset {
            outcome.failures.push(format!("chunk {chunk} is in copyset {copyset} and in another one"));
        }
    }
    if homes.is_empty() {
        outcome.unknowns.push("no replica's files hold any chunk".to_owned());
    }
    for copyset in copysets {
        let chunks: Vec<u32> =
            homes.iter().filter(|(_, of)| **of == copyset.id).map(|(chunk, _)| *chunk).collect();
        judge_copyset(copyset, &chunks, disks, &mut outcome);
    }
    // What nobody has is zeroes; anybody's export says so.
    let area = disks.first().map_or(0, |disk| disk.judged.sectors);
    for chunk in (0..area.div_ceil(CHUNK_SECTORS)).filter(|chunk| !homes.contains_key(chunk)) {
        let wrong = disks.first().map_or(0, |disk| wrong_in(&disk.judged, chunk).len());
        outcome.sectors += u64::from(sectors_of(chunk, area));
        if wrong > 0 {
            outcome
                .failures
                .push(format!("no replica has chunk {chunk}, and {wrong} of its sectors are not zeroes"));
        }
    }
    outcome
}

fn sound(on: usize, inspection: &Inspection, outcome: &mut Outcome) {
    for replica in &inspection.replicas {
        let copyset = replica.copyset;
        if let Some(trouble) = &replica.trouble {
            outcome
                .failures
                .push(format!("chunkserver {on}'s replica of copyset {copyset} cannot run: {trouble}"));
        }
        for chunk in replica.chunks.iter().filter(|chunk| !chunk.unreadable.is_empty()) {
            outcome.failures.push(format!(
                "chunkserver {on} cannot read blocks {:?} of chunk {} of copyset {copyset}",
                chunk.unreadable, chunk.chunk
            ));
        }
    }
}

fn judge_copyset(copyset: &CopysetSeen, chunks: &[u32], disks: &[DiskSeen], outcome: &mut Outcome) {
    let id = copyset.id;
    let seen = |on: usize| disks.get(on)?.inspection.replicas.iter().find(|replica| replica.copyset == id);
    let end = |on: usize| seen(on).and_then(|replica| replica.last);
    let newest = copyset.replicas.iter().filter_map(|&on| end(on)).max();
    let mut wrong_on: BTreeMap<u32, usize> = BTreeMap::new();
    for &on in &copyset.replicas {
        if seen(on).is_none() {
            outcome.failures.push(format!("chunkserver {on}'s files have no replica of copyset {id}"));
            continue;
        }
        let judged = &disks[on].judged;
        let is_behind = end(on) < newest;
        outcome.replicas += 1;
        outcome.behind += usize::from(is_behind);
        let mut wrong = BTreeSet::new();
        for &chunk in chunks {
            outcome.sectors += u64::from(sectors_of(chunk, judged.sectors));
            wrong.extend(wrong_in(judged, chunk));
        }
        let damaged = wrong.iter().filter(|sector| judged.damaged.binary_search(sector).is_ok()).count();
        let failed = if is_behind { damaged } else { wrong.len() };
        if failed > 0 {
            outcome.failures.push(format!(
                "{failed} sectors of copyset {id} in chunkserver {on}'s files are not what was acknowledged: {}",
                judged.examples.join("; ")
            ));
        }
        wrong.into_iter().for_each(|sector| *wrong_on.entry(sector).or_default() += 1);
    }
    let may_be_wrong = copyset.replicas.len().saturating_sub(1) / 2;
    let lost: Vec<u32> =
        wrong_on.into_iter().filter(|(_, on)| *on > may_be_wrong).map(|(at, _)| at).collect();
    if let Some(first) = lost.first() {
        outcome.failures.push(format!(
            "{} sectors of copyset {id}, from sector {first} on, are not what was acknowledged in a majority's files",
            lost.len()
        ));
    }
}

fn sectors_of(chunk: u32, area: u32) -> u32 {
    CHUNK_SECTORS.min(area.saturating_sub(chunk.saturating_mul(CHUNK_SECTORS)))
}

/// The wrong sectors of a chunk.
fn wrong_in(judged: &Judged, chunk: u32) -> BTreeSet<u32> {
    let (from, until) = (chunk.saturating_mul(CHUNK_SECTORS), (chunk + 1).saturating_mul(CHUNK_SECTORS));
    let all = judged.damaged.iter().chain(&judged.stale);
    all.copied().filter(|sector| (from..until).contains(sector)).collect()
}

#[cfg(test)]
mod tests {
    use super::{At, CHUNK_SECTORS, ChunkSeen, DiskSeen, Inspection, Outcome, ReplicaSeen, judge};
    use crate::blkcheck::Judged;
    use crate::supervisor::cluster::{CopysetSeen, VOLUME_NUMBER};

    const END: At = At { term: 3, index: 50 };
    const AREA: u32 = CHUNK_SECTORS * 2;

    /// Three replicas of copyset 7, which has chunk 0; nobody has chunk 1.
    fn disks() -> Vec<DiskSeen> {
        let chunks = vec![ChunkSeen { volume: VOLUME_NUMBER, chunk: 0, unreadable: Vec::new() }];
        let replica = ReplicaSeen { copyset: 7, trouble: None, last: Some(END), chunks };
        let inspection = Inspection { replicas: vec![replica], ..Inspection::default() };
        vec![DiskSeen { inspection, judged: Judged { sectors: AREA, ..Judged::default() } }; 3]
    }

    fn judged(disks: &[DiskSeen]) -> Outcome {
        judge(&[CopysetSeen { id: 7, replicas: vec![2, 0, 1], leader: None }], disks)
    }

    fn lag(disk: &mut DiskSeen) {
        disk.inspection.replicas[0].last = Some(At { term: 3, index: 49 });
    }

    #[test]
    fn three_right_replicas_are_enough_and_counted() {
        let outcome = judged(&disks());
        let sectors = u64::from(CHUNK_SECTORS) * 4;
        assert_eq!(outcome, Outcome { replicas: 3, sectors, ..Outcome::default() });
    }

    /// The log of one replica ends before the others': it may hold what was there before, and it alone.
    #[test]
    fn only_a_replica_whose_log_is_shorter_may_hold_older_values() {
        let mut disks = disks();
        disks[1].judged.stale = vec![5, 9];
        let failures = judged(&disks).failures;
        assert!(
            failures.len() == 1 && failures[0].starts_with("2 sectors of copyset 7 in chunkserver 1"),
            "{failures:?}"
        );
        lag(&mut disks[1]);
        let outcome = judged(&disks);
        assert_eq!((outcome.failures.len(), outcome.behind), (0, 1));
        disks[2].judged.stale = vec![9];
        lag(&mut disks[2]);
        let failures = judged(&disks).failures;
        assert!(failures.len() == 1 && failures[0].contains("from sector 9 on"), "{failures:?}");
        // A longer log of an older term is no newer one.
        disks[2].judged.stale.clear();
        disks[0].inspection.replicas[0].last = Some(At { term: 2, index: 900 });
        disks[0].judged.stale = vec![7];
        disks[2].inspection.replicas[0].last = Some(END);
        assert_eq!(judged(&disks).failures, [""; 0]);
    }

    #[test]
    fn what_nobody_wrote_and_what_cannot_be_read_is_never_excused() {
        let mut lagging = disks();
        lagging[1].judged.damaged = vec![5];
        lag(&mut lagging[1]);
        assert_eq!(judged(&lagging).failures.len(), 1);
        let mut unreadable = disks();
        unreadable[2].inspection.replicas[0].chunks[0].unreadable = vec![17];
        assert!(judged(&unreadable).failures[0].contains("blocks [17] of chunk 0"));
        let mut broken = disks();
        broken[0].inspection.replicas[0].trouble = Some("its log is behind".into());
        assert!(judged(&broken).failures[0].contains("cannot run: its log is behind"));
    }

    #[test]
    fn a_missing_replica_or_chunk_is_told() {
        let mut gone = disks();
        gone[0].inspection.replicas.clear();
        let outcome = judged(&gone);
        assert_eq!((outcome.replicas, outcome.failures.len()), (2, 1));
        // Its chunk reads as zeroes there, and those are stale.
        let mut lost = disks();
        lost[0].inspection.replicas[0].chunks.clear();
        lost[0].judged.stale = (0..8).collect();
        assert!(judged(&lost).failures[0].starts_with("8 sectors"));
        let mut nowhere = disks();
        nowhere.iter_mut().for_each(|disk| disk.judged.stale = vec![CHUNK_SECTORS + 3]);
        assert!(judged(&nowhere).failures[0].starts_with("no replica has chunk 1"));
        let empty = vec![DiskSeen::default(); 3];
        assert!(!judged(&empty).unknowns.is_empty());
    }

    #[test]
    fn what_was_not_decided_is_not_known() {
        let mut disks = disks();
        disks[1].judged.undecided = 4;
        let outcome = judged(&disks);
        assert_eq!((outcome.failures.len(), outcome.unknowns.len()), (0, 1));
    }
}
