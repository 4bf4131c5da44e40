//! What can happen to a process of the cluster.
//!
//! A fault is a plain act on a [`Process`] by its pid: nothing inside the programs helps with it.

use crate::Process;
use anyhow::Result;
use rustix::process::Signal;

/// The process is gone this moment, with everything it had not written.
pub fn kill9(process: &mut Process) -> Result<()> {
    process.kill9()
}

/// The process is there and holds its connections, but does nothing: a hung disk, a paused machine.
/// It goes on when the answer is dropped.
pub fn freeze(process: &Process) -> Result<Frozen> {
    let pid = process.pid()?;
    process.signal(Signal::STOP)?;
    Ok(Frozen { pid })
}

/// A process that stands still.
#[must_use = "it goes on as soon as this is dropped"]
pub struct Frozen {
    pid: rustix::process::Pid,
}

impl Frozen {
    pub fn thaw(self) {}
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // It can only be gone if somebody killed it, and then there is nothing to thaw.
        let _ = rustix::process::kill_process(self.pid, Signal::CONT);
    }
}

/// kill -9 for all of them, the second before the first has been waited for: as close to one moment as
/// signals get.
pub fn kill9_together<'a>(processes: impl IntoIterator<Item = &'a mut Process>) -> Result<()> {
    let processes: Vec<&mut Process> = processes.into_iter().collect();
    for process in &processes {
        // Stopped first: none of them goes on while the others are being killed.
        process.signal(Signal::STOP)?;
    }
    for process in processes {
        process.kill9()?;
    }
    Ok(())
}
