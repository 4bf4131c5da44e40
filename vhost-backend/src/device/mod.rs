//! The trust border: what a guest and its VMM may do to us, and what we answer.
//!
//! ```text
//!  VMM ──vhost-user──▶ socket ─▶ session ──command──┐                 (socket thread)
//!                                                   ▼
//!  guest ──rings──▶ queues ─▶ ring ─▶ chain ─▶ request ─▶ backing     (I/O thread, io_thread.rs)
//!        ◀─used ring─ queue ◀──────── completion ◀────────┘
//! ```
//!
//! What always holds:
//!
//! - The guest may write any shared byte at any time, the VMM may send any message. Neither can make us touch memory
//!   outside the regions we were given, wait without bound, or panic. The worst it gets is its own disk stopped.
//! - Every request is answered exactly once: by this process, or, if it dies, by the next one from the in-flight
//!   region.
//! - FLUSH is answered at once, because an answered write is durable already.
//!
//! It does not know chunks, chunkservers or the control plane: all of that is behind [`crate::backing::Backing`].
//! Start at [`serve`] for the life of the device, at `queues.rs` for the life of a request.

mod callers;
mod chain;
pub(crate) mod command;
mod completion;
pub(crate) mod config_space;
#[cfg(test)]
mod crash_tests;
pub(crate) mod event;
mod front_end;
#[cfg(test)]
mod fuzz_tests;
mod inflight;
mod lifeline;
mod listening;
mod mapped;
mod memory;
#[cfg(test)]
mod pause_tests;
mod queue;
pub(crate) mod queues;
pub(crate) mod request;
mod ring;
mod session;
mod sharing;
mod sizing;
mod socket;
mod sparingly;
mod tickets;

use std::io;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use crate::backing::{Backing, Capacity};
use crate::connections::Seat;
use crate::io_thread::{IoLoop, NewDisk, WakerHandle};

use command::Commands;
use config_space::SERIAL_BYTES;
use request::Geometry;

pub use listening::{ListenError, Listening, SocketAccess, group_of};
pub use socket::{Endpoint, StopSignal};

/// What one disk looks like to its guest. None of it changes while the process lives; its size may become known later.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// A front end that asks before it is known: `sizing.rs`.
    pub capacity: Capacity,
    /// What GET_ID answers; longer than 20 bytes is cut.
    pub serial: String,
    /// Offer VIRTIO_BLK_F_RO and refuse everything that changes data.
    pub read_only: bool,
    /// Queues offered, 1 to 256. QEMU asks for one per vCPU and does not start if that is more than we offer;
    /// a queue nobody uses costs nothing.
    pub queues: u16,
    /// Microseconds to look for new requests before sleeping, of the I/O thread that [`run`] starts. 0: sleep at once.
    /// Anything more buys latency with CPU and only pays while a core is idle.
    pub spin_us: u32,
    /// Accept only guest memory that its owner cannot shrink under us (`F_SEAL_SHRINK`). QEMU's
    /// `memory-backend-memfd` seals by default, files in `/dev/shm` cannot.
    pub require_sealed_memory: bool,
    /// A front end whose process is no older has no guest yet that could stand still: it waits for the size.
    pub starting_max: Duration,
}

impl Default for DeviceConfig {
    /// Of a size that is not known yet.
    fn default() -> DeviceConfig {
        DeviceConfig {
            capacity: Capacity::default(),
            serial: String::new(),
            read_only: false,
            queues: config_space::QUEUES_MAX,
            spin_us: 0,
            require_sealed_memory: false,
            starting_max: Duration::from_secs(3),
        }
    }
}

impl DeviceConfig {
    /// A disk of this size with default settings.
    pub fn new(capacity_bytes: u64) -> DeviceConfig {
        DeviceConfig { capacity: Capacity::of(capacity_bytes), ..DeviceConfig::default() }
    }

    fn geometry(&self) -> Geometry {
        let mut serial = [0; SERIAL_BYTES];
        let len = self.serial.len().min(SERIAL_BYTES);
        serial[..len].copy_from_slice(&self.serial.as_bytes()[..len]);
        Geometry { capacity: self.capacity.clone(), read_only: self.read_only, serial }
    }
}

/// Why the device could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("cannot listen on {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: ListenError,
    },
    #[error("{0} queues; 1 to {max} can be offered", max = config_space::QUEUES_MAX)]
    Queues(u16),
    #[error("cannot set up the I/O thread, or it failed")]
    IoThread(#[source] io::Error),
    #[error("the I/O thread ended by itself")]
    IoThreadEnded,
    #[error("the connection to the front end is unusable")]
    Connection(#[source] io::Error),
}

/// Serves one disk, on an I/O thread of its own; see [`serve`].
pub fn run(
    config: DeviceConfig,
    endpoint: Endpoint,
    make_backing: impl FnOnce(WakerHandle, Seat) -> Box<dyn Backing> + Send + 'static,
    stop: StopSignal,
) -> Result<(), DeviceError> {
    let io = IoLoop::start(Duration::from_micros(config.spin_us.into())).map_err(DeviceError::IoThread)?;
    let served = serve(&io, config, endpoint, make_backing, stop);
    io.end().map_err(DeviceError::IoThread)?;
    served
}

/// Serves one disk of `io` until `stop`, or until an [`Endpoint::Connected`] front end leaves.
///
/// The calling thread becomes the socket thread; `make_backing` is called on the I/O thread. The handshake is answered
/// from `config` alone, rings wait until the backing is ready and the size is known.
pub fn serve(
    io: &IoLoop,
    config: DeviceConfig,
    endpoint: Endpoint,
    make_backing: impl FnOnce(WakerHandle, Seat) -> Box<dyn Backing> + Send + 'static,
    stop: StopSignal,
) -> Result<(), DeviceError> {
    if config.queues == 0 || config.queues > config_space::QUEUES_MAX {
        return Err(DeviceError::Queues(config.queues));
    }
    let (sender, receiver) = mpsc::channel();
    let commands = Commands::new(sender, io.waker());
    io.add(NewDisk {
        geometry: config.geometry(),
        queues: config.queues,
        make_backing: Box::new(make_backing),
        commands: receiver,
    });
    let served = socket::serve(&endpoint, &config, &commands, &stop);
    // It may have ended already, in good order or by itself; the end of the loop says which.
    let _ = socket::close(&commands);
    served
}
