//! One queue while it runs: its ring, its part of the in-flight region, and the way its answers take.
//!
//! What always holds:
//!
//! - A head is taken once and answered once. A driver that offers a head again before its answer has broken the
//!   ring ([`Broken::HeadInFlight`]); so no more is in flight than the ring has entries.
//! - Answers leave in batches: [`Queue::steps`] is the order in which a batch becomes visible, one step per
//!   store that a crash may come after, and [`Queue::flush`] performs exactly these steps.

use std::fs::File;
use std::time::Instant;

use super::completion::Used;
use super::inflight::{InflightQueue, Unanswered};
use super::memory::DirtyLog;
use super::ring::{Broken, Ring};

/// See the module.
#[derive(Debug)]
pub struct Queue {
    pub ring: Ring,
    inflight: Option<InflightQueue>,
    call: Option<File>,
    /// Heads taken and not yet answered.
    taken: Vec<bool>,
    in_flight: u16,
    /// Answered, not yet published.
    batch: Vec<Used>,
    pub enabled: bool,
    pub replay: Replay,
    /// When this queue last had nothing to wait for, or got an answer. A stop is as patient as this is recent.
    pub progress_at: Instant,
    /// The driver broke the ring: answers still go out, nothing new is taken.
    pub broken: Option<Broken>,
}

/// What an earlier life of the queue left to be done again.
#[derive(Debug, PartialEq, Eq)]
pub enum Replay {
    /// Everything found, oldest first; nothing submitted yet.
    All(Vec<Unanswered>),
    /// What changes data has been submitted; these reads wait until all of that is answered, on every queue.
    Reads(Vec<u16>),
    /// Nothing left: new heads may be taken.
    Done,
}

/// One store on the way of a batch to the guest. See `inflight.rs` for what a crash after each means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    JoinBatch(u16),
    PutUsed(Used),
    Publish,
    Unmark(u16),
    Settled,
}

impl Queue {
    /// Starts on a ring that may have lived before. With an in-flight region, what was taken is known from there (the
    /// front end may only guess after a crash); without, `base` is where the front end says to go on.
    pub fn start(mut ring: Ring, mut inflight: Option<InflightQueue>, base: u16, now: Instant) -> Queue {
        let mut taken = vec![false; usize::from(ring.size())];
        let mut replay = Replay::Done;
        let mut in_flight = 0u16;
        match &mut inflight {
            Some(region) => {
                let left = region.recover(ring.used_idx());
                for unanswered in &left {
                    taken[usize::from(unanswered.head)] = true;
                }
                in_flight = u16::try_from(left.len()).expect("at most one per entry");
                ring.set_next_avail(ring.used_idx().wrapping_add(in_flight));
                if !left.is_empty() {
                    replay = Replay::All(left);
                }
            }
            None => ring.set_next_avail(base),
        }
        Queue {
            ring,
            inflight,
            call: None,
            taken,
            in_flight,
            batch: Vec::new(),
            enabled: false,
            replay,
            progress_at: now,
            broken: None,
        }
    }

    /// Whether what is unanswered at a stop can be left to the next start.
    pub fn is_recorded(&self) -> bool {
        self.inflight.is_some()
    }

    /// Taken and not yet answered, without what is only waiting to be done again: what a stop waits for.
    pub fn out(&self) -> u16 {
        let waiting = match &self.replay {
            Replay::All(left) => left.len(),
            Replay::Reads(heads) => heads.len(),
            Replay::Done => 0,
        };
        self.in_flight - u16::try_from(waiting).expect("at most one per entry")
    }

    /// Takes the next head from the ring.
    pub fn pop(&mut self, now: Instant) -> Option<u16> {
        let head = match self.ring.pop() {
            Ok(head) => head?,
            Err(why) => {
                self.broke(why);
                return None;
            }
        };
        let taken = &mut self.taken[usize::from(head)];
        if *taken {
            self.broke(Broken::HeadInFlight(head));
            return None;
        }
        *taken = true;
        if self.in_flight == 0 {
            self.progress_at = now;
        }
        self.in_flight += 1;
        if let Some(region) = &mut self.inflight {
            region.taken(head);
        }
        Some(head)
    }

    pub fn broke(&mut self, why: Broken) {
        tracing::warn!(%why, "the guest's driver broke a ring; it stays stopped until it is set up again");
        self.broken = Some(why);
    }

    /// An answer is ready. It reaches the guest with the next [`Queue::flush`].
    pub fn answered(&mut self, used: Used, now: Instant) {
        assert!(self.taken[usize::from(used.head)], "head {} was not taken", used.head);
        self.batch.push(used);
        self.progress_at = now;
    }

    /// How a batch becomes visible, store by store.
    pub fn steps(batch: &[Used]) -> impl Iterator<Item = Step> + '_ {
        let join = batch.iter().flat_map(|used| [Step::JoinBatch(used.head), Step::PutUsed(*used)]);
        let unmark = batch.iter().map(|used| Step::Unmark(used.head));
        join.chain([Step::Publish]).chain(unmark).chain([Step::Settled])
    }

    /// One of [`Queue::steps`].
    pub fn perform(&mut self, step: Step, log: Option<&DirtyLog>) {
        match (step, &self.inflight) {
            (Step::PutUsed(used), _) => self.ring.put_used(used.head, used.len, log),
            (Step::Publish, _) => self.ring.publish(log),
            (Step::JoinBatch(head), Some(region)) => region.join_batch(head),
            (Step::Unmark(head), Some(region)) => region.unmark(head),
            (Step::Settled, Some(region)) => region.settled(self.ring.used_idx()),
            (Step::JoinBatch(_) | Step::Unmark(_) | Step::Settled, None) => {}
        }
    }

    /// Publishes all answers, and interrupts the guest once if it wants that.
    pub fn flush(&mut self, log: Option<&DirtyLog>) {
        if self.batch.is_empty() {
            return;
        }
        let mut batch = std::mem::take(&mut self.batch);
        for step in Queue::steps(&batch) {
            self.perform(step, log);
        }
        for used in batch.drain(..) {
            self.taken[usize::from(used.head)] = false;
            self.in_flight -= 1;
        }
        self.batch = batch;
        if self.ring.needs_signal() {
            self.signal();
        }
    }

    /// A new eventfd for interrupts. It is signalled at once: an answer may have been published while there was none,
    /// or by a process that died before it could signal.
    pub fn set_call(&mut self, call: Option<File>) {
        self.call = call;
        self.signal();
    }

    fn signal(&self) {
        if let Some(call) = &self.call {
            // The front end's eventfd. If it is not one, its guest gets no interrupts, which is the front end's wish.
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
    }
}
