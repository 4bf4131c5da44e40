//! A relay between the backend and the chunkservers, which can be late and can say things twice.
//!
//! ```text
//!  backend ──(packet filter: redirect)──▶ relay ──marked, so not redirected──▶ chunkserver
//!                                           │ recorder ──later, on a connection of its own──▶ whoever leads now
//! ```
//!
//! It lives in the backend's network, so that cuts between the backend and a chunkserver cut it too. Connections are
//! taken and closed as their other end is; what was taken from a backend is delivered even if that hung up since, as a
//! network would. Of the wire (`docs/wire.md`) it knows lengths, kinds and where the range of a change is; checksums are none of
//! its business. Nobody waits for its threads: they end with the process.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::recorder::{Change, Kept, Recorder};
use crate::random::Random;

/// Of connections that are not redirected.
pub const MARK: u32 = 69;
/// Where the relay listens for the first chunkserver, the next one for the second, and so on.
pub const PORT: u16 = 7900;
const HELLO_BYTES: usize = 64;
const HEADER_BYTES: usize = 32;
/// Longest fields and data; longer is no frame, and the connection ends.
const FIELDS_BYTES_MAX: usize = 2048;
const DATA_BYTES_MAX: usize = 1 << 20;
const DONE: u8 = 129;
const REFUSED: u8 = 132;
const NOT_LEADER: u8 = 1;
/// As a client's: a chunkserver that is cut off or stopped does not hold us for ever.
const PATIENCE: Duration = Duration::from_secs(3);
/// Of a thousand requests, how many are held. With more of them every slot of a guest soon waits behind one that is, and
/// nothing newer is written meanwhile.
const HELD_PER_MILLE: u64 = 4;
const HELD_MS_MIN: u64 = 100;
/// Half of them at most so long, half at most the longer.
const HELD_MS_MAX: [u64; 2] = [1000, 5000];
/// After the newer change was acknowledged.
const REPLAYED_AFTER_MS: (u64, u64) = (10, 3000);
const NAP: Duration = Duration::from_millis(10);

struct Shared {
    servers: Vec<Ipv4Addr>,
    /// Where all of them listen.
    port: AtomicU16,
    /// What a backend says first to each, once it has.
    hellos: Mutex<Vec<Option<[u8; HELLO_BYTES]>>>,
    connections: AtomicU64,
    holding: AtomicBool,
    held: AtomicU64,
    recorder: Mutex<Option<Recorder>>,
    random: Mutex<Random>,
    repeated: AtomicU64,
    refused: AtomicU64,
}

impl Shared {
    fn address(&self, server: usize) -> SocketAddrV4 {
        SocketAddrV4::new(self.servers[server], self.port.load(Ordering::SeqCst))
    }
}

pub struct Proxy {
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens in that network. Nothing comes here until it is redirected.
    pub fn start(network: Arc<File>, servers: &[Ipv4Addr], port: u16, seed: u64) -> Result<Self> {
        let shared = Arc::new(Shared {
            servers: servers.to_vec(),
            port: AtomicU16::new(port),
            hellos: Mutex::new(vec![None; servers.len()]),
            connections: AtomicU64::new(0),
            holding: AtomicBool::new(false),
            held: AtomicU64::new(0),
            recorder: Mutex::new(None),
            random: Mutex::new(Random::new(seed ^ 0x0070_726f_7879)),
            repeated: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let (ready, listening) = mpsc::channel();
        let proxy = Self { shared: shared.clone() };
        // A thread, and every thread it starts, has a network of its own choice; the rest of the process keeps its.
        std::thread::Builder::new().name("proxy".into()).spawn(move || {
            let _ = ready.send(enter(&network).and_then(|()| listen(&shared)));
            replay_for_ever(&shared);
        })?;
        listening.recv().context("the proxy's thread")?.context("the proxy cannot listen")?;
        Ok(proxy)
    }

    /// The chunkservers listen at another port from now on.
    pub fn move_to(&self, port: u16) {
        self.shared.port.store(port, Ordering::SeqCst);
    }

    pub fn hold(&self, on: bool) -> u64 {
        self.shared.holding.store(on, Ordering::SeqCst);
        self.shared.held.swap(0, Ordering::SeqCst)
    }

    /// Begins or ends to say changes twice. Gives how many were said since and answered as done, and refused.
    pub fn repeat(&self, on: bool) -> (u64, u64) {
        *lock(&self.shared.recorder) = on.then(Recorder::default);
        (self.shared.repeated.swap(0, Ordering::SeqCst), self.shared.refused.swap(0, Ordering::SeqCst))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn enter(network: &File) -> io::Result<()> {
    // SAFETY: a system call on an open descriptor; it changes this thread only.
    let done = unsafe { libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn listen(shared: &Arc<Shared>) -> io::Result<()> {
    for (server, port) in (PORT..).take(shared.servers.len()).enumerate() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
        let shared = shared.clone();
        spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = shared.clone();
                // Refused, cut off or stopped: whoever called sees its connection end, and tries again.
                let _ = spawn(move || drop(relay(&shared, server, &client)));
            }
        })?;
    }
    Ok(())
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().stack_size(256 << 10).spawn(work).map(drop)
}

/// A connection that is not redirected to us.
fn connect(to: SocketAddrV4) -> io::Result<TcpStream> {
    let checked = |done: libc::c_int| if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) };
    // SAFETY: makes a descriptor and touches no memory of ours.
    let fd = checked(unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new and nobody else's.
    let stream = TcpStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let length = |bytes: usize| libc::socklen_t::try_from(bytes).expect("a few bytes");
    let mark = MARK;
    // SAFETY: the value is a u32 that outlives the call, and its size is given.
    checked(unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MARK,
            (&raw const mark).cast(),
            length(size_of::<u32>()),
        )
    })?;
    // Holds for the connecting too.
    stream.set_write_timeout(Some(PATIENCE))?;
    let address = libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET).expect("a small number"),
        sin_port: to.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*to.ip()).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: the address is a whole sockaddr_in that outlives the call, and its size is given.
    checked(unsafe {
        libc::connect(stream.as_raw_fd(), (&raw const address).cast(), length(size_of::<libc::sockaddr_in>()))
    })?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn relay(shared: &Arc<Shared>, server: usize, client: &TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let upstream = connect(shared.address(server))?;
    upstream.set_write_timeout(None)?;
    let connection = shared.connections.fetch_add(1, Ordering::Relaxed);
    let (from, to, shared_down) = (upstream.try_clone()?, client.try_clone()?, shared.clone());
    spawn(move || {
        let _ = down(&shared_down, connection, &from, &to);
        // To its end, or a chunkserver's last answers would break the connection before our last requests.
        let _ = io::copy(&mut &from, &mut io::sink());
        let _ = to.shutdown(Shutdown::Both);
    })?;
    let ended = up(shared, server, connection, client, &upstream);
    let _ = upstream.shutdown(Shutdown::Write);
    ended
}

fn up(
    shared: &Shared,
    server: usize,
    connection: u64,
    client: &TcpStream,
    mut upstream: &TcpStream,
) -> io::Result<()> {
    let mut client = BufReader::with_capacity(256 << 10, client);
    let mut hello = [0; HELLO_BYTES];
    client.read_exact(&mut hello)?;
    lock(&shared.hellos)[server] = Some(hello);
    upstream.write_all(&hello)?;
    let mut frame = Vec::new();
    loop {
        read_frame(&mut client, &mut frame)?;
        hold(shared);
        if let Some(recorder) = &mut *lock(&shared.recorder) {
            let keep = lock(&shared.random).chance(10);
            recorder.sent(connection, server, &frame, keep);
        }
        upstream.write_all(&frame)?;
    }
}

fn down(shared: &Shared, connection: u64, from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    let mut from = BufReader::with_capacity(256 << 10, from);
    let mut hello = [0; HELLO_BYTES];
    from.read_exact(&mut hello)?;
    to.write_all(&hello)?;
    let mut frame = Vec::new();
    loop {
        read_frame(&mut from, &mut frame)?;
        if frame[4] == DONE
            && let Some(recorder) = &mut *lock(&shared.recorder)
        {
            recorder.done(connection, Change::request_of(&frame));
        }
        to.write_all(&frame)?;
    }
}

fn read_frame(from: &mut impl Read, frame: &mut Vec<u8>) -> io::Result<()> {
    frame.resize(HEADER_BYTES, 0);
    from.read_exact(frame)?;
    let fields = usize::from(u16::from_le_bytes([frame[6], frame[7]]));
    let data = u32::from_le_bytes([frame[8], frame[9], frame[10], frame[11]]) as usize;
    if fields > FIELDS_BYTES_MAX || data > DATA_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    frame.resize(HEADER_BYTES + fields + data, 0);
    from.read_exact(&mut frame[HEADER_BYTES..])
}

/// Whatever comes behind it on this connection waits too; other connections overtake.
fn hold(shared: &Shared) {
    if !shared.holding.load(Ordering::Relaxed) {
        return;
    }
    let ms = {
        let mut random = lock(&shared.random);
        (random.below(1000) < HELD_PER_MILLE).then(|| {
            let longest = HELD_MS_MAX[random.index(2)];
            HELD_MS_MIN + random.below(longest - HELD_MS_MIN)
        })
    };
    let Some(ms) = ms else { return };
    shared.held.fetch_add(1, Ordering::SeqCst);
    let until = Instant::now() + Duration::from_millis(ms);
    while Instant::now() < until && shared.holding.load(Ordering::Relaxed) {
        std::thread::sleep(NAP);
    }
}

fn replay_for_ever(shared: &Shared) {
    loop {
        std::thread::sleep(NAP);
        let due = {
            let mut recorder = lock(&shared.recorder);
            let Some(recorder) = &mut *recorder else { continue };
            let mut random = lock(&shared.random);
            let ms = REPLAYED_AFTER_MS.0 + random.below(REPLAYED_AFTER_MS.1 - REPLAYED_AFTER_MS.0);
            recorder.take_overtaken(Duration::from_millis(ms))
        };
        let Some(kept) = due else { continue };
        // To whoever leads by now.
        let count = shared.servers.len();
        for server in (0..count).map(|i| (kept.server + i) % count) {
            let hello = lock(&shared.hellos)[server];
            let Some(hello) = hello else { continue };
            match say_again(shared.address(server), &hello, &kept) {
                Ok((DONE, _)) => {
                    shared.repeated.fetch_add(1, Ordering::SeqCst);
                    break;
                }
                Ok((REFUSED, NOT_LEADER)) | Err(_) => {}
                Ok(_) => {
                    shared.refused.fetch_add(1, Ordering::SeqCst);
                    break;
                }
            }
        }
    }
}

/// The kind of the answer, and a refusal's code.
fn say_again(to: SocketAddrV4, hello: &[u8], kept: &Kept) -> io::Result<(u8, u8)> {
    let mut stream = connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(hello)?;
    let mut welcome = [0; HELLO_BYTES];
    stream.read_exact(&mut welcome)?;
    stream.write_all(&kept.frame)?;
    let mut frame = Vec::new();
    read_frame(&mut stream, &mut frame)?;
    Ok((frame[4], frame.get(HEADER_BYTES).copied().unwrap_or(0)))
}
