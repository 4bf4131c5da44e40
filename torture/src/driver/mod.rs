//! A guest's driver without the guest, over the real vhost-user socket.
//!
//! It does what Linux's virtio-blk and QEMU do together: rings in shared memory (memfd), EVENT_IDX, indirect and
//! direct chains, any number of queues, answers in any order; and when the server goes away, the rings stay as they
//! are, the in-flight region is handed to the next server, and everything goes on ([`device`]).
//!
//! One thread drives all queues, so that the times it records need no agreement between threads.
//!
//! It does not know what is written or what should be read: that is [`crate::blkcheck`]. Start at [`Device`].

pub mod device;
mod memory;
mod ring;
mod session;

pub use device::{Answer, Device, DeviceOptions, Geometry, Outcome, Request};

use std::io;
use std::path::PathBuf;

/// Why there is no device to drive. A server that comes and goes is no such reason, once it was there.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error("cannot connect to {}: {source}", socket.display())]
    Connect { socket: PathBuf, source: io::Error },
    /// The connection broke, or broke off the handshake: wait and connect again.
    #[error("{doing}: {source}")]
    Gone { doing: &'static str, source: vhost::Error },
    /// The server lacks something without which nothing can be checked.
    #[error("the server offers no {0}")]
    Lacks(&'static str),
    /// It answered something no server may.
    #[error("the server broke the protocol: {0}")]
    Broken(String),
    #[error("cannot make shared memory: {0}")]
    Memory(#[source] io::Error),
}
