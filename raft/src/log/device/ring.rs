//! io_uring, without a thread: submitting is one system call, and the kernel tells when it is done.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use io_uring::{IoUring, opcode, types};

use super::{Completion, Device, Write};

/// More than the log ever has in flight.
const ENTRIES: u32 = 16;

pub struct Ring(IoUring);

impl Ring {
    /// With it, the ring's own descriptor to watch: readable while there is something to reap.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let ring = IoUring::new(ENTRIES)?;
        // SAFETY: the ring is open, and outlives the borrow.
        let event = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) }.as_fd().try_clone_to_owned()?;
        Ok((Self(ring), event))
    }
}

impl Device for Ring {
    unsafe fn submit(&mut self, write: Write) -> io::Result<()> {
        let length = u32::try_from(write.length).map_err(|_| io::ErrorKind::InvalidInput)?;
        let entry = opcode::Write::new(types::Fd(write.file), write.start, length)
            .offset(write.offset)
            .build()
            .user_data(write.token);
        // SAFETY: the caller keeps the bytes and the file alive until the completion.
        unsafe { self.0.submission().push(&entry) }.map_err(|_| io::ErrorKind::ResourceBusy)?;
        loop {
            match self.0.submit() {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The entry stays in the ring and could still be taken by a later call; the log counts it as in
                // flight and waits for it.
                Err(error) => return Err(error),
            }
        }
    }

    fn reap(&mut self, completed: &mut Vec<Completion>) {
        for entry in self.0.completion() {
            let outcome = match usize::try_from(entry.result()) {
                Ok(written) => Ok(written),
                Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
            };
            completed.push(Completion { token: entry.user_data(), outcome });
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        self.0.submit_and_wait(1).map(drop)
    }
}
