//! What the socket thread asks of the I/O thread.
//!
//! The socket thread decides nothing about a running ring; it sends one of these and, where the front end must not
//! go on before it has happened, waits for the reply.

use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};

use super::event::Event;
use super::inflight::InflightRegion;
use super::memory::{DirtyLog, Memory};
use super::queues::{Setup, StartRefused};
use crate::io_thread::WakerHandle;

/// See the module.
pub enum Command {
    /// Start a ring that is completely set up.
    Start { index: u16, setup: Box<Setup>, kick: Event, reply: SyncSender<Result<(), StartRefused>> },
    /// Stop it; the reply is where its avail ring goes on, sent once nothing of it is out and the ring says itself what is
    /// unanswered.
    Stop { index: u16, reply: SyncSender<u16> },
    /// A running ring's kicks come from here now.
    Kick { index: u16, kick: Event, reply: SyncSender<Result<(), StartRefused>> },
    /// A running ring's interrupts go here now.
    Call { index: u16, call: Option<Event> },
    /// Take what a running ring offers.
    Enable { index: u16, reply: SyncSender<()> },
    /// Take nothing from a running ring; the reply as for a stop.
    Pause { index: u16, reply: SyncSender<()> },
    /// The memory table changed; after the reply nothing new is done under the old one. If something of that went away,
    /// nothing that was begun under it is out any more, either.
    Memory { memory: Arc<Memory>, takes_away: bool, reply: SyncSender<()> },
    /// Mark our writes here from now on, or nowhere.
    Log { log: Option<Arc<DirtyLog>>, reply: SyncSender<()> },
    /// A region handed back by the front end: what it says is in flight comes before anything new.
    Inflight(Arc<InflightRegion>),
    /// The front end left or reset the device: all rings end now. After the reply its memory is let go of.
    Abandon { reply: SyncSender<()> },
    /// The process ends: finish what is out, for a bounded time, reply, and return.
    Close { reply: SyncSender<()> },
}

/// The I/O thread has ended, so the device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the I/O thread has ended")]
pub struct IoThreadGone;

/// The socket thread's end.
#[derive(Clone)]
pub struct Commands {
    sender: Sender<Command>,
    waker: WakerHandle,
}

impl Commands {
    pub fn new(sender: Sender<Command>, waker: WakerHandle) -> Commands {
        Commands { sender, waker }
    }

    pub fn tell(&self, command: Command) -> Result<(), IoThreadGone> {
        self.sender.send(command).map_err(|_| IoThreadGone)?;
        self.waker.wake();
        Ok(())
    }

    /// Waits for the reply. Everything asked is answered within [`super::queues::STOP_PATIENCE_IN_ALL`].
    pub fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, IoThreadGone> {
        let (reply, answer) = sync_channel(1);
        self.tell(command(reply))?;
        answer.recv().map_err(|_| IoThreadGone)
    }
}
