//! When all faults are over: everything is read through each leader there can be, and without each chunkserver.

use std::collections::BTreeSet;

use anyhow::Result;
use rustix::process::Signal;

use super::leaders::{self, Leader};
use super::supervise::Run;

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
}
