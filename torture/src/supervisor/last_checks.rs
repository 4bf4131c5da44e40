//! When all faults are over: everything is read through each leader there can be, without each chunkserver, and from the
//! files of each.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::Signal;

use super::leaders::{self, Leader};
use super::offline::{self, DiskSeen};
use super::supervise::{Run, TICK};

/// So much is acknowledged, or so long passes, before the chunkservers end: then their logs hold what chunk files do not.
const ACKS_BEFORE: u64 = 300;
const WRITTEN_WITHIN: Duration = Duration::from_secs(5);
/// One complete check.
const JUDGED_WITHIN: Duration = Duration::from_secs(120);

impl Run<'_> {
    /// Every sector is read again through each replica of each copyset.
    pub(super) fn through_each_leader(&mut self) -> Result<()> {
        let copysets = self.cluster.view().copysets;
        self.replicas = leaders::all(&copysets).len();
        for muted in leaders::pairs(self.cluster.chunkservers.len()) {
            let wanted = leaders::wanted(&copysets, muted);
            for _ in 0..leaders::ATTEMPTS {
                if self.must_end() {
                    return Ok(());
                }
                if self.read_while_muted(muted, &wanted)? {
                    self.tell(&format!("every sector checked while {muted:?} could not lead"));
                    self.led.extend(&wanted);
                    break;
                }
                // What was held up goes on now, or never.
                if !self.check_all("after chunkservers could not lead", true) {
                    return Ok(());
                }
            }
        }
        let (whole, words) = self.wait_whole();
        if !whole {
            self.fail(format!("the cluster is not whole after each replica has led: {words}"));
        }
        Ok(())
    }

    /// False: everything was not read in time, or it is not known through whom.
    fn read_while_muted(&mut self, muted: [usize; 2], wanted: &BTreeSet<Leader>) -> Result<bool> {
        self.wait_whole();
        if !self.load.pause(leaders::DRAINED_WITHIN) {
            return Ok(false);
        }
        self.cluster.mds.signal(Signal::STOP)?;
        std::thread::sleep(leaders::EQUAL_AFTER);
        self.cluster.network.mute(&muted)?;
        std::thread::sleep(leaders::ELECTED_AFTER);
        let read = self.load.round(leaders::READ_WITHIN);
        self.cluster.mds.signal(Signal::CONT)?;
        let led = read && leaders::wait_led(&self.cluster, wanted);
        self.cluster.network.mute(&[])?;
        Ok(led)
    }

    /// Every sector is read again while each chunkserver in turn is dead: every majority must have everything.
    pub(super) fn without_each(&mut self) -> Result<()> {
        for index in 0..self.cluster.chunkservers.len() {
            if self.must_end() {
                return Ok(());
            }
            self.cluster.chunkservers[index].kill9()?;
            let checked = self.check_all(&format!("without chunkserver {index}"), false);
            self.cluster.chunkservers[index].start()?;
            if !checked {
                return Ok(());
            }
            self.checks_without_one += 1;
            let (whole, words) = self.wait_whole();
            if !whole {
                self.fail(format!("the cluster is not whole after chunkserver {index} came back: {words}"));
            }
        }
        Ok(())
    }

    /// Every sector is read from the files of each chunkserver, of which none runs: all are killed in the same moment, just
    /// after everything was answered.
    pub(super) fn through_each_disk(&mut self) -> Result<()> {
        if self.must_end() {
            return Ok(());
        }
        let enough = self.load.progress.acked_writes.load(Ordering::Relaxed) + ACKS_BEFORE;
        let deadline = Instant::now() + WRITTEN_WITHIN;
        while self.load.progress.acked_writes.load(Ordering::Relaxed) < enough && Instant::now() < deadline {
            std::thread::sleep(TICK);
        }
        if !self.load.pause(leaders::DRAINED_WITHIN) {
            self.unknowns.push("the load did not come to rest, so the files were not checked".to_owned());
            return Ok(());
        }
        std::thread::sleep(leaders::EQUAL_AFTER);
        let copysets = self.cluster.view().copysets;
        // Frozen first: nobody stands for election while others are gone already.
        for chunkserver in &mut self.cluster.chunkservers {
            chunkserver.signal(Signal::STOP)?;
        }
        for chunkserver in &mut self.cluster.chunkservers {
            chunkserver.kill9()?;
        }
        let seen = self.look_at_disks();
        for chunkserver in &mut self.cluster.chunkservers {
            chunkserver.start()?;
        }
        if let Some(disks) = seen {
            let outcome = offline::judge(&copysets, &disks);
            self.tell(&format!(
                "{} sectors of {} replicas checked in their files, {} of them behind",
                outcome.sectors, outcome.replicas, outcome.behind
            ));
            (self.replicas_in_files, self.sectors_in_files) = (outcome.replicas, outcome.sectors);
            outcome.failures.into_iter().for_each(|failure| self.fail(failure));
            self.unknowns.extend(outcome.unknowns);
        }
        let (whole, words) = self.wait_whole();
        if !whole {
            self.fail(format!("the cluster is not whole after its files were read: {words}"));
        }
        Ok(())
    }

    /// `None`: not all of them could be looked at, and it was said why.
    fn look_at_disks(&mut self) -> Option<Vec<DiskSeen>> {
        let mut disks = Vec::new();
        for index in 0..self.cluster.chunkservers.len() {
            let (disk, export) = (&self.cluster.disks[index], self.cluster.folder.join("export"));
            let inspection = match offline::inspect(&self.cluster.chunkserver, &disk.data_dir(), &export) {
                Ok(inspection) => inspection,
                Err(error) => {
                    self.fail(format!("the files of chunkserver {index} cannot be read: {error:#}"));
                    return None;
                }
            };
            // Who has nothing of the volume has zeroes.
            let image = inspection.exports.values().next().cloned().unwrap_or_else(|| "/dev/null".into());
            let judged = self.load.judge_file(image, JUDGED_WITHIN);
            let removed = std::fs::remove_dir_all(&export);
            match judged.and_then(|judged| removed.map(|()| judged)) {
                Ok(judged) => disks.push(DiskSeen { inspection, judged }),
                Err(error) => {
                    self.unknowns.push(format!("the files of chunkserver {index} were not judged: {error}"));
                    return None;
                }
            }
        }
        Some(disks)
    }
}
