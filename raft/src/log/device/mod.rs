//! Where batches go down to the disk: submitted from the raft thread, completed through an eventfd.
//!
//! What durable means here, once: a write that a device reports as complete, with its full length, survives a power
//! loss. The files are opened with O_DSYNC for this. Writes may complete in any order; putting them in order is not
//! the device's business.

mod ring;
mod writer;

use std::io;
use std::os::fd::{OwnedFd, RawFd};

pub use ring::Ring;
pub use writer::Writer;

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

/// io_uring where the kernel allows it, a thread where it does not (containers often forbid it). With it comes the
/// eventfd that is readable when there may be something to reap.
pub fn open(io_uring: bool) -> io::Result<(Box<dyn Device>, OwnedFd)> {
    let event = rustix::event::eventfd(
        0,
        rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC,
    )?;
    if io_uring {
        match Ring::new(&event) {
            Ok(ring) => return Ok((Box::new(ring), event)),
            Err(error) => {
                tracing::warn!(%error, "no io_uring here: the log writes through a thread of its own")
            }
        }
    }
    let writer = Writer::new(event.try_clone()?)?;
    Ok((Box::new(writer), event))
}
