//! The trust border: what a guest and its VMM may do to us, and what we answer.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use crate::backing::Backing;
use crate::io_thread::WakerHandle;

/// What one disk looks like to its guest. None of it changes while the process lives.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Size of the disk; a multiple of 512.
    pub capacity_bytes: u64,
    /// What GET_ID answers; longer than 20 bytes is cut.
    pub serial: String,
    /// Offer VIRTIO_BLK_F_RO and refuse everything that changes data.
    pub read_only: bool,
    /// Queues offered, 1 to 256. QEMU asks for one per vCPU and does not start if that is more than we offer;
    /// a queue nobody uses costs nothing.
    pub queues: u16,
    /// Microseconds to look for new requests before sleeping. 0: sleep at once. Anything more buys latency
    /// with CPU and only pays while a core is idle.
    pub spin_us: u32,
    /// Accept only guest memory that its owner cannot shrink under us (`F_SEAL_SHRINK`). QEMU's
    /// `memory-backend-memfd` seals by default, files in `/dev/shm` cannot.
    pub require_sealed_memory: bool,
}

impl DeviceConfig {
    /// A disk of this size with default settings.
    pub fn new(capacity_bytes: u64) -> DeviceConfig {
        DeviceConfig {
            capacity_bytes,
            serial: String::new(),
            read_only: false,
            queues: 256,
            spin_us: 0,
            require_sealed_memory: false,
        }
    }
}

/// Where the front end (the VMM) comes from.
#[derive(Debug)]
pub enum Endpoint {
    /// We listen; front ends come and go, one at a time.
    Listening(Listening),
    /// One connection, made by whoever started us; when it ends, so does [`run`].
    Connected(UnixStream),
}

/// A bound socket, and where it is.
#[derive(Debug)]
pub struct Listening {
    listener: UnixListener,
    path: PathBuf,
}

impl Endpoint {
    /// Binds now, so that a front end can connect while the rest still starts.
    pub fn listen(path: &Path) -> Result<Endpoint, DeviceError> {
        let listener = UnixListener::bind(path)
            .map_err(|source| DeviceError::Listen { path: path.to_owned(), source })?;
        Ok(Endpoint::Listening(Listening { listener, path: path.to_owned() }))
    }

    /// Takes over a connected socket (`--fd`).
    pub fn connected(fd: OwnedFd) -> Endpoint {
        Endpoint::Connected(UnixStream::from(fd))
    }
}

/// Ends [`run`] from another thread.
#[derive(Clone, Debug)]
pub struct StopSignal {}

impl StopSignal {
    pub fn new() -> io::Result<StopSignal> {
        Ok(StopSignal {})
    }

    /// `run` finishes what is in flight, for a bounded time, and returns. What was not finished stays recorded
    /// in the in-flight region, and the next process does it again.
    pub fn stop(&self) {}
}

/// Why the device could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("cannot listen on {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot set up the I/O thread")]
    IoThread(#[source] io::Error),
    #[error("the connection to the front end is unusable")]
    Connection(#[source] io::Error),
}

/// Serves one disk until `stop`, or until a [`Endpoint::Connected`] front end leaves.
///
/// The calling thread becomes the socket thread; an I/O thread is started, and `make_backing` is called on it.
pub fn run(
    config: DeviceConfig,
    endpoint: Endpoint,
    make_backing: impl FnOnce(WakerHandle) -> Box<dyn Backing> + Send + 'static,
    stop: StopSignal,
) -> Result<(), DeviceError> {
    let _ = (config, endpoint, stop);
    thread::Builder::new()
        .name("io".into())
        .spawn(move || {
            let poll = mio::Poll::new()?;
            let _backing = make_backing(WakerHandle::new(poll.registry(), mio::Token(0))?);
            io::Result::Ok(())
        })
        .map_err(DeviceError::IoThread)?;
    Ok(())
}
