//! The I/O thread: one loop that owns the rings, the backing and its connections, and everything in flight.
//!
//! ```text
//!           ┌──────────────────────────── one turn ─────────────────────────────┐
//!  kicks ──▶│ serve rings ─▶ backing.settle ─▶ completions ─▶ used rings, calls │──▶ arm, sleep in epoll
//!  sockets ▶│ backing.on_event                                                  │
//!  waker ──▶│ commands of the socket thread, backing.on_wake                    │
//!           └───────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Whatever has arrived when a turn begins is done in that turn: one send per peer, one interrupt per ring. Nothing in
//! a turn blocks. It does not know vhost-user messages (`device::session`) or the cluster (`volume`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token};

use crate::backing::{Backing, Outcome, Ticket};
use crate::device::command::Command;
use crate::device::config_space::QUEUES_MAX;
use crate::device::queues::{Queues, Setup, StartRefused};
use crate::spin::Spin;

const WAKER: Token = Token(0);
const FIRST_KICK: usize = 1;
/// Where the backing's tokens begin.
const FIRST_BACKING_TOKEN: usize = FIRST_KICK + QUEUES_MAX as usize;
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

/// Everything the loop owns.
pub(crate) struct IoThread {
    poll: Poll,
    queues: Queues,
    backing: Box<dyn Backing>,
    commands: Receiver<Command>,
    /// A ring's kick eventfd while it runs. Never read: registered edge-triggered, every write is a new edge.
    kicks: Vec<Option<File>>,
    spin: Spin,
    completed: Vec<(Ticket, Outcome)>,
    closing: Option<Closing>,
}

/// The process ends.
struct Closing {
    /// When to give up on what is still out.
    until: Instant,
    /// How many requests were out when `until` was last moved.
    out: usize,
    reply: SyncSender<()>,
}

impl IoThread {
    pub(crate) fn new(
        poll: Poll,
        queues: Queues,
        mut backing: Box<dyn Backing>,
        commands: Receiver<Command>,
        spin: Duration,
    ) -> io::Result<IoThread> {
        backing.register(poll.registry(), FIRST_BACKING_TOKEN)?;
        Ok(IoThread {
            poll,
            queues,
            backing,
            commands,
            kicks: (0..QUEUES_MAX).map(|_| None).collect(),
            spin: Spin::new(spin),
            completed: Vec::new(),
            closing: None,
        })
    }

    /// Until [`Command::Close`], or until epoll fails.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS_PER_TURN);
        loop {
            let timeout = self.timeout();
            match self.poll.poll(&mut events, timeout) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                polled => polled?,
            }
            let now = Instant::now();
            if self.turn(&events, now) {
                self.spin.worked(now);
            }
            if self.is_finished(now) {
                self.queues.abandon_all();
                if let Some(closing) = &self.closing {
                    let _ = closing.reply.send(());
                }
                return Ok(());
            }
        }
    }

    /// How long to sleep: not at all while there is work, or while it pays to look for more.
    fn timeout(&mut self) -> Option<Duration> {
        if self.queues.has_work(self.backing.as_ref()) {
            return Some(Duration::ZERO);
        }
        let now = Instant::now();
        if self.spin.goes_on(self.queues.out(), now) {
            // Somebody else's turn first: on a full machine the guest itself may be waiting for this core.
            rustix::thread::sched_yield();
            self.spin.let_others(now, Instant::now());
            self.queues.poll_rings();
            return Some(Duration::ZERO);
        }
        if self.queues.arm() {
            return Some(Duration::ZERO);
        }
        let due = [self.backing.deadline(), self.queues.deadline(), self.closing.as_ref().map(|c| c.until)];
        let due = due.into_iter().flatten().min()?;
        Some(due.saturating_duration_since(now))
    }

    /// True: something was done.
    fn turn(&mut self, events: &Events, now: Instant) -> bool {
        let mut woken = false;
        for event in events {
            match event.token().0 {
                0 => woken = true,
                kick if kick < FIRST_BACKING_TOKEN => {
                    self.queues.kicked(u16::try_from(kick - FIRST_KICK).expect("below QUEUES_MAX"));
                }
                _ => self.backing.on_event(event),
            }
        }
        if woken {
            while let Ok(command) = self.commands.try_recv() {
                self.obey(command, now);
            }
            self.backing.on_wake();
        }
        let offered = self.queues.has_work(self.backing.as_ref());
        self.queues.serve(self.backing.as_mut(), now);
        self.backing.settle(now);
        self.backing.take_completed(&mut self.completed);
        let worked = offered || !self.completed.is_empty() || !events.is_empty();
        for (ticket, outcome) in self.completed.drain(..) {
            self.queues.complete(ticket, outcome, now);
        }
        self.queues.publish();
        if self.queues.settle_stops(now) {
            self.drop_kicks();
        }
        worked
    }

    /// Lets go of the kicks of queues that no longer run.
    fn drop_kicks(&mut self) {
        for (index, kick) in (0..).zip(&mut self.kicks) {
            if kick.is_some() && !self.queues.is_running(index) {
                unregister(self.poll.registry(), kick);
            }
        }
    }

    fn obey(&mut self, command: Command, now: Instant) {
        // A reply nobody waits for any more is no matter: the session that asked has ended.
        match command {
            Command::Start { index, setup, kick, reply } => {
                let _ = reply.send(self.start(index, *setup, kick, now));
            }
            Command::Stop { index, reply } => self.queues.begin_stop(index, reply),
            Command::Kick { index, kick, reply } => {
                let _ = reply.send(self.set_kick(index, kick));
            }
            Command::Call { index, call } => self.queues.set_call(index, call),
            Command::Enable { index, enabled, reply } => {
                self.queues.enable(index, enabled);
                let _ = reply.send(());
            }
            Command::Memory { memory, reply } => {
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

    fn start(&mut self, index: u16, setup: Setup, kick: File, now: Instant) -> Result<(), StartRefused> {
        self.queues.start(index, setup, now)?;
        if let Err(refused) = self.set_kick(index, kick) {
            self.queues.cancel_start(index);
            return Err(refused);
        }
        Ok(())
    }

    fn set_kick(&mut self, index: u16, kick: File) -> Result<(), StartRefused> {
        let slot = &mut self.kicks[usize::from(index)];
        unregister(self.poll.registry(), slot);
        self.poll
            .registry()
            .register(
                &mut SourceFd(&kick.as_raw_fd()),
                Token(FIRST_KICK + usize::from(index)),
                Interest::READABLE,
            )
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
}

fn unregister(registry: &Registry, kick: &mut Option<File>) {
    if let Some(kick) = kick.take() {
        // It may never have been registered; the close that follows removes it in any case.
        let _ = registry.deregister(&mut SourceFd(&kick.as_raw_fd()));
    }
}
