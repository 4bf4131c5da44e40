//! The I/O thread: one loop that owns, of every disk of this process, the rings, the backing and everything in flight, and
//! the connections they share.
//!
//! ```text
//!              ┌────────────────────── one turn of one disk ───────────────────────┐
//!  kicks ─────▶│ serve rings ─▶ backing.settle ─▶ completions ─▶ used rings, calls │──▶ arm, sleep in epoll
//!  waker ─────▶│ commands of the socket thread, backing.on_wake                    │
//!              └──────────▲────────────────────────────────┬───────────────────────┘
//!  connections: receive ──┘ (before all disks)             └──▶ flush (after all disks)
//! ```
//!
//! Whatever has arrived when a turn begins is done in that turn: one send per peer, one interrupt per ring. Nothing in
//! a turn blocks. Disks that have something to do have their turns one after the other, and the thread sleeps when none has:
//! many disks with little to do cost one waking and one send together. It does not know vhost-user messages
//! (`device::session`), frames (`connections`) or the cluster (`volume`).

use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token};

use crate::backing::{Backing, Outcome, Ticket};
use crate::connections::{Connections, DISKS_MAX, FIRST_TOKEN, Seat};
use crate::device::command::Command;
use crate::device::config_space::QUEUES_MAX;
use crate::device::event::{Alarm, Event};
use crate::device::queues::{Queues, Setup, StartRefused};
use crate::device::request::Geometry;
use crate::spin::Spin;

/// Of every loop with a [`WakerHandle`].
pub(crate) const WAKER: Token = Token(usize::MAX);
/// Tokens of kicks: of which disk, above these bits, and of which of its queues.
const DISK_SHIFT: u32 = QUEUES_MAX.next_power_of_two().ilog2();
/// Events of one turn. More stay in the kernel for the next.
const EVENTS_PER_TURN: usize = 256;
/// How long the end of the process waits without an answer arriving. What is still out then is done again by the
/// next process.
const CLOSE_PATIENCE: Duration = Duration::from_millis(500);

/// Wakes the I/O thread from any thread: the backing's [`on_wake`](crate::backing::Backing::on_wake) runs soon after.
#[derive(Clone, Debug)]
pub struct WakerHandle(Arc<mio::Waker>);

impl WakerHandle {
    pub(crate) fn new(poll: &Poll) -> io::Result<WakerHandle> {
        Ok(WakerHandle(Arc::new(mio::Waker::new(poll.registry(), WAKER)?)))
    }

    /// Cheap, callable from any thread; several calls before the loop turns count as one.
    pub fn wake(&self) {
        // An eventfd can only fail to be written when its counter is full, and then the loop wakes anyway.
        let _ = self.0.wake();
    }
}

/// Builds a disk's backing, on the I/O thread.
pub(crate) type MakeBacking = Box<dyn FnOnce(WakerHandle, Seat) -> Box<dyn Backing> + Send>;

/// A disk that is to be served from now on, until [`Command::Close`].
pub(crate) struct NewDisk {
    pub geometry: Geometry,
    /// How many are offered.
    pub queues: u16,
    pub make_backing: MakeBacking,
    pub commands: Receiver<Command>,
}

/// The I/O thread, as others see it.
pub struct IoLoop {
    disks: Sender<NewDisk>,
    waker: WakerHandle,
    thread: JoinHandle<io::Result<()>>,
}

impl IoLoop {
    /// `spin`: how long to look for more work before sleeping.
    pub fn start(spin: Duration) -> io::Result<IoLoop> {
        let poll = Poll::new()?;
        let waker = WakerHandle::new(&poll)?;
        let (disks, joining) = channel();
        let (own, spin) = (waker.clone(), Spin::new(spin));
        let thread = thread::Builder::new().name("io".into()).spawn(move || {
            evolute_daemon::short_turns();
            let registry = Rc::new(poll.registry().try_clone()?);
            let connections = Connections::new(&registry)?;
            let (disks, alarm) = (Vec::new(), Alarm::new()?);
            let joined_all = false;
            IoThread { poll, registry, waker: own, joining, joined_all, connections, disks, spin, alarm }
                .run()
        })?;
        Ok(IoLoop { disks, waker, thread })
    }

    /// A disk whose commands nobody takes (their sender says so) found the thread ended.
    pub(crate) fn add(&self, disk: NewDisk) {
        let _ = self.disks.send(disk);
        self.waker.wake();
    }

    pub(crate) fn waker(&self) -> WakerHandle {
        self.waker.clone()
    }

    /// Waits until the last disk is closed.
    pub fn end(self) -> io::Result<()> {
        drop(self.disks);
        self.waker.wake();
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Everything the loop owns.
struct IoThread {
    poll: Poll,
    registry: Rc<Registry>,
    waker: WakerHandle,
    joining: Receiver<NewDisk>,
    /// Nobody can add another one.
    joined_all: bool,
    connections: Connections,
    /// By their number.
    disks: Vec<Option<Disk>>,
    spin: Spin,
    alarm: Alarm,
}

struct Disk {
    first_token: usize,
    registry: Rc<Registry>,
    queues: Queues,
    backing: Box<dyn Backing>,
    commands: Receiver<Command>,
    /// A ring's kick eventfd while it runs. Never read: registered edge-triggered, every write is a new edge.
    kicks: Vec<Option<Event>>,
    /// Something came in for it in this turn.
    called: bool,
    completed: Vec<(Ticket, Outcome)>,
    closing: Option<Closing>,
}

/// A disk ends.
struct Closing {
    /// When to give up on what is still out.
    until: Instant,
    /// How many requests were out when `until` was last moved.
    out: usize,
    reply: SyncSender<()>,
}

impl IoThread {
    /// Until there is no disk any more and there will be none, or until epoll fails.
    fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS_PER_TURN);
        while !(self.joined_all && self.disks.iter().all(Option::is_none)) {
            let timeout = self.timeout();
            match self.poll.poll(&mut events, timeout) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                    self.alarm.rang();
                    continue;
                }
                polled => polled?,
            }
            self.alarm.works();
            let now = Instant::now();
            if self.turn(&events, now) {
                self.spin.worked(now);
            }
            for place in &mut self.disks {
                if place.as_mut().is_some_and(|disk| disk.is_finished(now)) {
                    place.take().into_iter().for_each(Disk::end);
                }
            }
        }
        Ok(())
    }

    /// How long to sleep: not at all while there is work, or while it pays to look for more.
    fn timeout(&mut self) -> Option<Duration> {
        if self.disks.iter().flatten().any(Disk::has_work) || self.connections.has_unread() {
            return Some(Duration::ZERO);
        }
        let now = Instant::now();
        let out = self.disks.iter().flatten().map(|disk| disk.queues.out()).sum();
        if self.spin.goes_on(out, now) {
            // Somebody else's turn first: on a full machine the guest itself may be waiting for this core.
            rustix::thread::sched_yield();
            self.spin.let_others(now, Instant::now());
            self.disks.iter_mut().flatten().for_each(|disk| _ = disk.queues.poll_rings());
            return Some(Duration::ZERO);
        }
        if self.disks.iter_mut().flatten().any(|disk| disk.queues.arm()) {
            return Some(Duration::ZERO);
        }
        let due = self.disks.iter().flatten().filter_map(Disk::deadline).min();
        let due = due.into_iter().chain(self.connections.deadline(now)).min()?;
        Some(due.saturating_duration_since(now))
    }

    /// True: something was done.
    fn turn(&mut self, events: &Events, now: Instant) -> bool {
        let mut woken = false;
        for event in events {
            match event.token() {
                WAKER => woken = true,
                Token(connection) if connection >= FIRST_TOKEN => self.connections.on_event(event),
                Token(kick) => {
                    if let Some(Some(disk)) = self.disks.get_mut(kick >> DISK_SHIFT) {
                        disk.kicked(kick);
                    }
                }
            }
        }
        if woken {
            self.admit();
            self.disks.iter_mut().flatten().for_each(|disk| disk.on_wake(now));
        }
        let (disks, mut worked) = (&mut self.disks, false);
        self.connections.turn(now, |called| {
            for number in called {
                if let Some(disk) = &mut disks[number.place()] {
                    disk.called = true;
                }
            }
            for disk in disks.iter_mut().flatten() {
                worked |= disk.is_due(now) && disk.turn(now);
            }
        });
        worked
    }

    fn admit(&mut self) {
        loop {
            let new = match self.joining.try_recv() {
                Ok(new) => new,
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.joined_all = true;
                    return;
                }
            };
            let Some(seat) = self.connections.join() else {
                tracing::error!("a disk is not served: one process serves {DISKS_MAX} in its life");
                continue;
            };
            let first_token = self.disks.len() << DISK_SHIFT;
            self.disks.push(Some(Disk::new(
                new,
                first_token,
                Rc::clone(&self.registry),
                self.waker.clone(),
                seat,
            )));
        }
    }
}

impl Disk {
    fn new(new: NewDisk, first_token: usize, registry: Rc<Registry>, waker: WakerHandle, seat: Seat) -> Disk {
        let NewDisk { geometry, queues, make_backing, commands } = new;
        Disk {
            first_token,
            registry,
            queues: Queues::new(geometry, queues),
            backing: make_backing(waker, seat),
            commands,
            kicks: (0..QUEUES_MAX).map(|_| None).collect(),
            called: true,
            completed: Vec::new(),
            closing: None,
        }
    }

    fn has_work(&self) -> bool {
        self.queues.has_work(self.backing.as_ref())
    }

    fn deadline(&self) -> Option<Instant> {
        let closing = self.closing.as_ref().map(|closing| closing.until);
        [self.backing.deadline(), self.queues.deadline(), closing].into_iter().flatten().min()
    }

    fn is_due(&self, now: Instant) -> bool {
        self.called || self.has_work() || self.deadline().is_some_and(|due| due <= now)
    }

    fn kicked(&mut self, token: usize) {
        self.called = true;
        self.queues.kicked(u16::try_from(token - self.first_token).expect("below QUEUES_MAX"));
    }

    /// Perhaps for this disk.
    fn on_wake(&mut self, now: Instant) {
        self.called = true;
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command, now);
        }
        self.backing.on_wake();
    }

    /// True: something was done.
    fn turn(&mut self, now: Instant) -> bool {
        let worked = std::mem::take(&mut self.called) || self.has_work();
        self.queues.serve(self.backing.as_mut(), now);
        self.backing.settle(now);
        self.backing.take_completed(&mut self.completed);
        let worked = worked || !self.completed.is_empty();
        for (ticket, outcome) in self.completed.drain(..) {
            self.queues.complete(ticket, outcome, now);
        }
        self.queues.publish();
        if self.queues.settle(now) {
            self.drop_kicks();
        }
        if self.queues.hang_up_if_ended() {
            self.drop_kicks();
        }
        worked
    }

    /// Lets go of the kicks of queues that no longer run.
    fn drop_kicks(&mut self) {
        for (index, kick) in (0..).zip(&mut self.kicks) {
            if kick.is_some() && !self.queues.is_running(index) {
                unregister(&self.registry, kick);
            }
        }
    }

    fn obey(&mut self, command: Command, now: Instant) {
        // A reply nobody waits for any more is no matter: the session that asked has ended.
        match command {
            Command::Start { index, setup, kick, reply } => {
                let _ = reply.send(self.start(index, *setup, kick, now));
            }
            Command::Stop { index, reply } => self.queues.begin_stop(index, reply, now),
            Command::Kick { index, kick, reply } => {
                let _ = reply.send(self.set_kick(index, kick));
            }
            Command::Call { index, call } => self.queues.set_call(index, call),
            Command::Enable { index, reply } => {
                self.queues.enable(index, now);
                let _ = reply.send(());
            }
            Command::Pause { index, reply } => self.queues.begin_pause(index, reply, now),
            Command::Memory { memory, takes_away: true, reply } => {
                self.queues.begin_change_of_memory(memory, reply, now);
            }
            Command::Memory { memory, takes_away: false, reply } => {
                self.queues.set_memory(&memory);
                let _ = reply.send(());
            }
            Command::Log { log, reply } => {
                self.queues.set_log(log);
                let _ = reply.send(());
            }
            Command::Inflight(region) => self.queues.await_replay(&region),
            Command::Abandon { reply } => {
                self.queues.abandon_all();
                self.drop_kicks();
                let _ = reply.send(());
            }
            Command::Close { reply } => {
                self.queues.close();
                self.closing = Some(Closing { until: now + CLOSE_PATIENCE, out: self.queues.out(), reply });
            }
        }
    }

    fn start(&mut self, index: u16, setup: Setup, kick: Event, now: Instant) -> Result<(), StartRefused> {
        self.queues.start(index, setup, now)?;
        if let Err(refused) = self.set_kick(index, kick) {
            self.queues.cancel_start(index);
            return Err(refused);
        }
        Ok(())
    }

    fn set_kick(&mut self, index: u16, kick: Event) -> Result<(), StartRefused> {
        let slot = &mut self.kicks[usize::from(index)];
        unregister(&self.registry, slot);
        let token = Token(self.first_token + usize::from(index));
        self.registry
            .register(&mut SourceFd(&kick.as_raw_fd()), token, Interest::READABLE)
            .map_err(|_| StartRefused::Kick)?;
        *slot = Some(kick);
        Ok(())
    }

    fn is_finished(&mut self, now: Instant) -> bool {
        let Some(closing) = &mut self.closing else { return false };
        let out = self.queues.out();
        if out < closing.out {
            closing.out = out;
            closing.until = now + CLOSE_PATIENCE;
        }
        out == 0 || now >= closing.until
    }

    fn end(mut self) {
        self.queues.abandon_all();
        // The front end holds them, too: closing ours takes none out of the poll.
        self.drop_kicks();
        if let Some(closing) = self.closing.take() {
            let _ = closing.reply.send(());
        }
    }
}

fn unregister(registry: &Registry, kick: &mut Option<Event>) {
    if let Some(kick) = kick.take() {
        // It may never have been registered; the close that follows removes it in any case.
        let _ = registry.deregister(&mut SourceFd(&kick.as_raw_fd()));
    }
}
