//! Where batches go down to the disk: submitted from the raft thread, completions told by a descriptor.
//!
//! What durable means here, once: a write that a device reports as complete, with its full length, survives a power
//! loss. The files are opened with O_DSYNC for this. Writes may complete in any order; putting them in order is not
//! the device's business.

mod memory;
mod ring;
mod writer;

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use memory::Memory;
use ring::Ring;
use writer::Writer;

/// One write. The bytes stay where they are, unchanged, until the device has reported `token`.
#[derive(Debug, Clone, Copy)]
pub struct Write {
    pub file: RawFd,
    pub start: *const u8,
    pub length: usize,
    pub offset: u64,
    pub token: u64,
}

/// What became of a write: the bytes written, or the kernel's error.
#[derive(Debug)]
pub struct Completion {
    pub token: u64,
    pub outcome: io::Result<usize>,
}

/// Takes writes, reports completions.
pub trait Device {
    /// Starts a write. An error means it was not started.
    ///
    /// # Safety
    /// The bytes and the file stay alive and unchanged until `reap` has reported the token.
    unsafe fn submit(&mut self, write: Write) -> io::Result<()>;

    /// Takes what is complete. Never waits.
    fn reap(&mut self, completed: &mut Vec<Completion>);

    /// Waits until there is something to reap. Only for the end: it blocks the thread.
    fn wait(&mut self) -> io::Result<()>;
}

/// For the files of a directory: io_uring where the kernel allows it, a thread where it does not (containers often forbid
/// it), neither for a file system in memory. With it comes the descriptor that becomes readable, again for each completion,
/// when there is something to reap that `submit` did not finish. It is to be watched for edges and never read: a completion
/// that was reaped as soon as it was submitted then costs nobody a turn.
pub fn open(io_uring: bool, dir: &Path) -> io::Result<(Box<dyn Device>, OwnedFd)> {
    let event = rustix::event::eventfd(
        0,
        rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC,
    )?;
    // A sandbox may not tell.
    if memory::is_in_memory(dir).unwrap_or(false) {
        return Ok((Box::new(Memory::default()), event));
    }
    if io_uring {
        match Ring::new() {
            Ok((ring, event)) => return Ok((Box::new(ring), event)),
            Err(error) => {
                tracing::warn!(%error, "no io_uring here: the log writes through a thread of its own")
            }
        }
    }
    let writer = Writer::new(event.try_clone()?)?;
    Ok((Box::new(writer), event))
}
