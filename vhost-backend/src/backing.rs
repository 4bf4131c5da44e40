//! The border between the guest's side (`device`) and the cluster's side (`volume`) of a disk.
//!
//! `device` parses descriptor chains into [`Request`]s and hands each to a [`Backing`] under a [`Ticket`];
//! the backing hands every ticket back exactly once, with an [`Outcome`], in any order. Both live on the one
//! I/O thread, so nothing here is `Send` and nothing locks.
//!
//! What always holds:
//!
//! - A `Request` is checked: inside the volume, whole sectors, not longer than the limits we advertise. Nobody
//!   below checks again. FLUSH and GET_ID never get here: an acked write is durable already.
//! - `Outcome::Done` for a write means durable. The guest hears of it at once and forgets its copy.
//! - Requests in flight at the same time have no order among themselves, as on any disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use smallvec::SmallVec;

/// Names one submitted request; chosen by the device, handed back once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// How large the disk is: told once, perhaps later than its front end comes. Nothing is submitted before.
#[derive(Clone, Debug, Default)]
pub struct Capacity(Arc<AtomicU64>);

impl Capacity {
    /// Known from the beginning; a multiple of 512.
    pub fn of(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes)))
    }

    /// In bytes.
    pub fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Acquire)).filter(|bytes| *bytes != 0)
    }

    /// False: another one was told before, and a disk does not change under its guest.
    pub fn tell(&self, bytes: u64) -> bool {
        let told = self.0.compare_exchange(0, bytes, Ordering::AcqRel, Ordering::Acquire);
        told.is_ok() || told == Err(bytes)
    }
}

/// What a guest asked for, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// 1 to `REQUEST_BYTES_MAX` bytes.
    Read { offset: u64, len: u32 },
    /// 1 to `REQUEST_BYTES_MAX` bytes; `data` is our private copy, which the guest can no longer change.
    Write { offset: u64, data: Bytes },
    /// The range may read as zeroes from now on, and its space may be given back.
    Discard { offset: u64, len: u64 },
    /// The range reads as zeroes from now on; `unmap` allows giving the space back.
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

impl Request {
    /// Whether doing it again, late, could undo something newer.
    pub fn changes_data(&self) -> bool {
        !matches!(self, Request::Read { .. })
    }
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A write, discard or write-zeroes is durable.
    Done,
    /// What a read found: pieces in order, exactly as many bytes as were asked for.
    Data(SmallVec<[Bytes; 4]>),
    /// It can never succeed. An unreachable cluster is no failure: such a request simply waits.
    Failed(Failure),
}

/// Why a request can never succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No replica can vouch for the bytes, or somebody else owns the volume now.
    Io,
    /// The cluster or the volume's quota is full.
    NoSpace,
    /// The attachment does not allow writing.
    ReadOnly,
}

/// Who does the requests: a volume of the cluster, or a disk in memory in tests.
///
/// Driven by [`crate::io_thread`], in this order on every turn of its loop: `on_wake` if the waker fired, `submit` for
/// what the guest asked, `settle`, `take_completed`. What has come over the thread's connections is there by then.
pub trait Backing {
    /// Takes a request. Never waits; what cannot be sent now is kept.
    fn submit(&mut self, ticket: Ticket, request: Request);
    /// The waker fired: another thread has news.
    fn on_wake(&mut self);
    /// Once per turn of the loop, seldom more: take in what has come, send what was submitted, expire, retry.
    fn settle(&mut self, now: Instant);
    /// Moves everything that ended since the last call to `out`.
    fn take_completed(&mut self, out: &mut Vec<(Ticket, Outcome)>);
    /// When `settle` wants to run even if nothing happens.
    fn deadline(&self) -> Option<Instant>;
    /// False until attached and fenced, unless what waits is to fail after a while: the device holds its rings until then.
    fn ready(&self) -> bool;
}
