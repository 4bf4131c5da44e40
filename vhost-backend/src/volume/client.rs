//! A volume for programs that have no guest: blocking calls from any thread, many writes in flight, bounded memory.
//!
//! The volume itself runs as it does under a guest, on an I/O thread of its own with a loop of its own.
//!
//! What always holds: `write` returns when the data is taken, not when it is durable; `flush` returns when everything
//! taken before it is. A write that failed is told by the next call, and by every one after it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use evolute_protocol::geometry::{REQUEST_BYTES_MAX, SECTOR_BYTES};
use mio::{Events, Poll};

use super::control::{self, AttachError, AttachedVolume, Control, ControlLink, ControlOptions};
use super::identity::Secret;
use super::{Volume, VolumeOptions};
use crate::backing::{Backing, Capacity, Failure, Outcome, Request, Ticket};
use crate::connections::Connections;
use crate::io_thread::{WAKER, WakerHandle};

/// Bytes and requests taken and not yet durable.
const BYTES_MAX: u64 = 32 << 20;
const REQUESTS_MAX: usize = 512;
/// How long giving the volume back may take.
const DETACH_MAX: Duration = Duration::from_secs(10);
/// How long the reason of a failure may be behind the failure.
const REASON_MAX: Duration = Duration::from_millis(200);

/// Why a call did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error("{offset}+{len} is not whole sectors inside the volume's {size_bytes} bytes")]
    OutOfBounds { offset: u64, len: u64, size_bytes: u64 },
    #[error("the cluster is full")]
    NoSpace,
    #[error("the volume is attached for reading only")]
    ReadOnly,
    #[error("the volume refused a request, or is not ours any more")]
    Io,
    #[error("the I/O thread cannot be started")]
    Thread(#[source] io::Error),
    /// Everything is durable, but the volume still counts as held by us.
    #[error("the control plane could not be told that the volume is free again")]
    NotDetached,
}

impl From<Failure> for ClientError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Io => Self::Io,
            Failure::NoSpace => Self::NoSpace,
            Failure::ReadOnly => Self::ReadOnly,
        }
    }
}

/// An attached volume.
#[derive(Debug)]
pub struct Client {
    attached: AttachedVolume,
    control: Option<Control>,
    commands: mpsc::Sender<Command>,
    waker: WakerHandle,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

const _: () = {
    const fn any_thread<T: Send + Sync>() {}
    any_thread::<Client>();
};

/// One request on its way to the I/O thread. A read has somebody waiting for its data.
#[derive(Debug)]
struct Command {
    request: Request,
    reply: Option<mpsc::SyncSender<Outcome>>,
}

#[derive(Debug, Default)]
struct Shared {
    window: Mutex<Window>,
    moved: Condvar,
    stop: AtomicBool,
}

/// What was taken and has not ended.
#[derive(Debug, Default)]
struct Window {
    bytes: u64,
    requests: usize,
    failure: Option<Failure>,
}

impl Shared {
    fn window(&self) -> MutexGuard<'_, Window> {
        // A panic aborts the process; a poisoned lock can only be seen in tests.
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for room, and takes it.
    fn take(&self, bytes: u64) -> Result<(), Failure> {
        let window = self.window();
        let full = |window: &mut Window| {
            let fits = window.bytes + bytes <= BYTES_MAX && window.requests < REQUESTS_MAX;
            window.failure.is_none() && window.requests > 0 && !fits
        };
        let mut window = self.moved.wait_while(window, full).unwrap_or_else(PoisonError::into_inner);
        match window.failure {
            Some(failure) => Err(failure),
            None => {
                window.bytes += bytes;
                window.requests += 1;
                Ok(())
            }
        }
    }

    fn give_back(&self, bytes: u64, failure: Option<Failure>) {
        let mut window = self.window();
        window.bytes -= bytes;
        window.requests -= 1;
        if window.failure.is_none() {
            window.failure = failure;
        }
        drop(window);
        self.moved.notify_all();
    }
}

impl Client {
    /// Attaches a volume; waits for the control plane as long as it takes.
    pub fn attach(name: &str, mds: &[String], holder: &str) -> Result<Self, ClientError> {
        let options = ControlOptions {
            volume: name.to_owned(),
            mds: mds.to_vec(),
            holder: holder.to_owned(),
            secret: Secret::random(),
            former_secret: None,
            takeover: false,
            state_dir: None,
            capacity: Capacity::default(),
        };
        Self::attach_with(options, VolumeOptions::default())
    }

    /// The same with every setting.
    pub fn attach_with(control: ControlOptions, volume: VolumeOptions) -> Result<Self, ClientError> {
        let (control, link) = control::start(control)?;
        let attached = loop {
            match control.wait_attached(Duration::from_secs(1)) {
                Ok(Some(attached)) => break attached,
                Ok(None) => {}
                Err(error) => {
                    control.stop();
                    return Err(error.into());
                }
            }
        };
        let poll = Poll::new().map_err(ClientError::Thread)?;
        let waker = WakerHandle::new(&poll).map_err(ClientError::Thread)?;
        let shared = Arc::new(Shared::default());
        let (commands, taken) = mpsc::channel();
        let runner = Runner { poll, taken, shared: Arc::clone(&shared), out: Vec::new(), free: Vec::new() };
        let to_wake = waker.clone();
        let thread = thread::Builder::new()
            .name("volume".into())
            .spawn(move || runner.run(volume, link, to_wake))
            .map_err(ClientError::Thread)?;
        Ok(Self { attached, control: Some(control), commands, waker, shared, thread: Some(thread) })
    }

    pub fn size_bytes(&self) -> u64 {
        self.attached.size_bytes
    }

    pub fn attached(&self) -> AttachedVolume {
        self.attached
    }

    /// Takes data to write. Waits while too much is in flight.
    pub fn write(&self, offset: u64, mut data: Bytes) -> Result<(), ClientError> {
        self.check(offset, data.len() as u64)?;
        let mut at = offset;
        while !data.is_empty() {
            let longest = usize::try_from(REQUEST_BYTES_MAX).unwrap_or(usize::MAX);
            let part = data.split_to(data.len().min(longest));
            let bytes = part.len() as u64;
            self.send(bytes, Request::Write { offset: at, data: part }, None)?;
            at += bytes;
        }
        Ok(())
    }

    /// These bytes are not needed any more.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), ClientError> {
        self.check(offset, len)?;
        self.send(0, Request::Discard { offset, len }, None)
    }

    /// These bytes are zeroes from now on.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), ClientError> {
        self.check(offset, len)?;
        self.send(0, Request::WriteZeroes { offset, len, unmap: true }, None)
    }

    /// Reads; waits for the data. A read has no order with writes in flight: `flush` between them.
    pub fn read(&self, offset: u64, len: usize) -> Result<Bytes, ClientError> {
        self.check(offset, len as u64)?;
        let mut data = BytesMut::with_capacity(len);
        while data.len() < len {
            let at = offset + data.len() as u64;
            let bytes = ((len - data.len()) as u64).min(REQUEST_BYTES_MAX);
            let (reply, told) = mpsc::sync_channel(1);
            let request = Request::Read { offset: at, len: u32::try_from(bytes).unwrap_or(u32::MAX) };
            self.send(bytes, request, Some(reply))?;
            match told.recv() {
                Ok(Outcome::Data(parts)) => parts.iter().for_each(|part| data.extend_from_slice(part)),
                Ok(Outcome::Failed(failure)) => return Err(failure.into()),
                Ok(Outcome::Done) | Err(mpsc::RecvError) => return Err(ClientError::Io),
            }
        }
        Ok(data.freeze())
    }

    /// Waits until everything taken is durable.
    pub fn flush(&self) -> Result<(), ClientError> {
        let busy = |window: &mut Window| window.failure.is_none() && window.requests > 0;
        let window =
            self.shared.moved.wait_while(self.shared.window(), busy).unwrap_or_else(PoisonError::into_inner);
        window.failure.map_or(Ok(()), |failure| Err(self.explain(failure)))
    }

    /// Waits until everything is durable, and gives the volume back.
    pub fn detach(mut self) -> Result<(), ClientError> {
        let flushed = self.flush();
        self.end_thread();
        let detached = self.control.take().is_none_or(|control| control.detach(DETACH_MAX));
        flushed?;
        if detached { Ok(()) } else { Err(ClientError::NotDetached) }
    }

    fn explain(&self, failure: Failure) -> ClientError {
        let lost = match (failure, &self.control) {
            (Failure::Io, Some(control)) => control.lost_within(REASON_MAX),
            _ => None,
        };
        lost.map_or(failure.into(), ClientError::from)
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), ClientError> {
        let size_bytes = self.attached.size_bytes;
        let whole = offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
        let inside = offset.checked_add(len).is_some_and(|end| end <= size_bytes);
        if whole && inside { Ok(()) } else { Err(ClientError::OutOfBounds { offset, len, size_bytes }) }
    }

    fn send(
        &self,
        bytes: u64,
        request: Request,
        reply: Option<mpsc::SyncSender<Outcome>>,
    ) -> Result<(), ClientError> {
        self.shared.take(bytes).map_err(|failure| self.explain(failure))?;
        let sent = self.commands.send(Command { request, reply });
        self.waker.wake();
        sent.map_err(|_| ClientError::Io)
    }

    fn end_thread(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.waker.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Client {
    /// Without `detach`: as if the process had crashed. The volume stays attached to this holder.
    fn drop(&mut self) {
        self.end_thread();
        if let Some(control) = self.control.take() {
            control.stop();
        }
    }
}

/// The client's I/O thread.
struct Runner {
    poll: Poll,
    taken: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
    /// By ticket: what each request in flight takes of the window, and who waits for it.
    out: Vec<(u64, Option<mpsc::SyncSender<Outcome>>)>,
    free: Vec<usize>,
}

impl Runner {
    fn run(mut self, options: VolumeOptions, link: ControlLink, waker: WakerHandle) {
        let Ok(connections) = Connections::new(self.poll.registry()) else { return self.shared.give_up() };
        let seat = connections.join().expect("the first");
        let mut volume = Volume::new(options, link, waker, seat);
        let mut events = Events::with_capacity(64);
        let mut completed = Vec::new();
        while !self.shared.stop.load(Ordering::Acquire) {
            let now = Instant::now();
            let unread = connections.has_unread().then_some(now);
            let due = [volume.deadline(), connections.deadline(now), unread].into_iter().flatten().min();
            let timeout = due.map(|at| at.saturating_duration_since(now));
            match self.poll.poll(&mut events, timeout) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return self.shared.give_up(),
            }
            for event in &events {
                if event.token() == WAKER { volume.on_wake() } else { connections.on_event(event) }
            }
            while let Ok(command) = self.taken.try_recv() {
                let ticket = self.ticket(&command.request, command.reply);
                volume.submit(ticket, command.request);
            }
            let now = Instant::now();
            connections.turn(now, |_| volume.settle(now));
            volume.take_completed(&mut completed);
            for (ticket, outcome) in completed.drain(..) {
                self.end(ticket, outcome);
            }
        }
    }

    fn ticket(&mut self, request: &Request, reply: Option<mpsc::SyncSender<Outcome>>) -> Ticket {
        let bytes = match request {
            Request::Read { len, .. } => u64::from(*len),
            Request::Write { data, .. } => data.len() as u64,
            Request::Discard { .. } | Request::WriteZeroes { .. } => 0,
        };
        let place = self.free.pop().unwrap_or_else(|| {
            self.out.push((0, None));
            self.out.len() - 1
        });
        self.out[place] = (bytes, reply);
        Ticket(place as u64)
    }

    fn end(&mut self, ticket: Ticket, outcome: Outcome) {
        let place = usize::try_from(ticket.0).expect("we chose it");
        let (bytes, reply) = std::mem::take(&mut self.out[place]);
        self.free.push(place);
        let failure = match (&reply, &outcome) {
            // A read is told itself.
            (Some(_), _) => None,
            (None, Outcome::Failed(failure)) => Some(*failure),
            (None, _) => None,
        };
        if let Some(reply) = reply {
            let _ = reply.send(outcome);
        }
        self.shared.give_back(bytes, failure);
    }
}

impl Shared {
    /// The loop itself is broken: nobody may wait for it.
    fn give_up(&self) {
        self.window().failure = Some(Failure::Io);
        self.moved.notify_all();
    }
}
