//! How a session is ended from inside: by the I/O thread, for something that its front end did.
//!
//! The socket thread serves the messages of a front end and ends the session when the connection does. So whoever finds
//! that a session cannot go on notes why, and shuts the connection: the front end sees that it is alone, the socket
//! thread cleans up and says why, and the other disks of the process go on.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering, fence};

/// Why a session cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[repr(u8)]
pub enum Cause {
    #[error(
        "a call descriptor of its blocks: the counter is full and nobody reads it. Nothing was lost; requests that are \
         not answered are done again when it connects with its in-flight region"
    )]
    CallBlocks = 1,
    #[error(
        "memory of its guest is not there any more: its file was cut off, or the tmpfs or the huge pages that it is in are \
         used up. Nothing that was read from there was written or answered; requests that are not answered are done \
         again when it connects with its in-flight region. Give the guest memory that is reserved (prealloc)"
    )]
    MemoryGone = 2,
    #[error(
        "its in-flight region is not there any more: its file was cut off, or the tmpfs that it is in is full. What is \
         not answered is done again when it connects with a region that is whole"
    )]
    InflightGone = 3,
    #[error("its dirty log is not there any more: its file was cut off, or the tmpfs that it is in is full")]
    LogGone = 4,
}

impl Cause {
    const ALL: [Cause; 4] = [Cause::CallBlocks, Cause::MemoryGone, Cause::InflightGone, Cause::LogGone];
}

const ALIVE: u8 = 0;

/// See the module. One for each session.
#[derive(Debug, Default)]
pub struct Lifeline {
    cause: AtomicU8,
    /// None: a session without a connection, as tests have it.
    connection: Option<UnixStream>,
}

impl Lifeline {
    pub fn of(connection: UnixStream) -> Lifeline {
        Lifeline { cause: AtomicU8::new(ALIVE), connection: Some(connection) }
    }

    /// The first cause is the one that is told.
    pub fn end(&self, why: Cause) {
        self.end_by(why as u8);
    }

    /// For the handler of a signal: a cause by its number, and nothing that waits.
    pub fn end_by(&self, number: u8) {
        let _ = self.cause.compare_exchange(ALIVE, number, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Looked at after shared memory was used: what was read before is the guest's own if this is false.
    pub fn has_ended(&self) -> bool {
        // The mark is not looked at before the memory is. On x86 that costs nothing.
        fence(Ordering::Acquire);
        self.cause.load(Ordering::Relaxed) != ALIVE
    }

    pub fn cause(&self) -> Option<Cause> {
        Cause::ALL.into_iter().find(|cause| *cause as u8 == self.cause.load(Ordering::Relaxed))
    }

    /// From here on nothing reaches the front end, no acknowledgement either.
    pub fn hang_up(&self) {
        if let Some(connection) = &self.connection {
            // It may have left by itself.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}
