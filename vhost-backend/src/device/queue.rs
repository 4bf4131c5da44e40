//! One queue while it runs: its ring, its part of the in-flight region, and the way its answers take.
//!
//! What always holds:
//!
//! - A head is taken once and answered once. A driver that offers a head again before its answer has broken the
//!   ring ([`Broken::HeadInFlight`]); so no more is in flight than the ring has entries.
//! - What is taken and not answered is as much as the avail ring is ahead of the used ring; so a ring can be settled
//!   ([`Queue::settle`]): made to say by itself what is unanswered.
//! - Answers leave in batches: [`Queue::steps`] is the order in which a batch becomes visible, one step per
//!   store that a crash may come after, and [`Queue::flush`] performs exactly these steps.

use std::sync::Arc;
use std::time::Instant;

use super::completion::Used;
use super::event::{Blocks, Event};
use super::inflight::{InflightQueue, Unanswered};
use super::lifeline::{Cause, Lifeline};
use super::memory::DirtyLog;
use super::ring::{Broken, Ring};

/// See the module.
#[derive(Debug)]
pub struct Queue {
    pub ring: Ring,
    inflight: Option<InflightQueue>,
    call: Option<Event>,
    /// Of the session that it belongs to.
    line: Arc<Lifeline>,
    /// Heads taken and not yet answered: each one's place in the order in which they were taken.
    taken: Vec<Option<u64>>,
    /// The next such place, where no region counts.
    next_counter: u64,
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

/// The front end goes on elsewhere than the answers do, and nothing says which of the requests between were answered. To
/// do all of them would do answered ones again, with whatever is in their buffers by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the front end goes on at {base} of the avail ring, the answers at {used} of the used ring, and nothing tells which \
     requests between were answered: neither the in-flight region nor the ring"
)]
pub struct UnknownBetween {
    pub base: u16,
    pub used: u16,
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
    /// Starts on a ring that may have lived before. With an in-flight region that knows it, what was taken is known from
    /// there (the front end may only guess after a crash). With a new one, or none, all that is not answered is taken
    /// from the ring again, if it is certain that this is what lies behind the used ring's index: because the front end
    /// goes on there, too, or because the ring was settled.
    pub fn start(
        mut ring: Ring,
        mut inflight: Option<InflightQueue>,
        base: u16,
        line: Arc<Lifeline>,
        now: Instant,
    ) -> Result<Queue, UnknownBetween> {
        let mut taken = vec![None; usize::from(ring.size())];
        let mut replay = Replay::Done;
        let mut in_flight = 0u16;
        let used = ring.used_idx();
        match &mut inflight {
            Some(region) if region.is_known() => {
                let left = region.recover(used);
                for unanswered in &left {
                    taken[usize::from(unanswered.head)] = Some(unanswered.counter);
                }
                in_flight = u16::try_from(left.len()).expect("at most one per entry");
                ring.set_next_avail(used.wrapping_add(in_flight));
                if !left.is_empty() {
                    replay = Replay::All(left);
                }
            }
            fresh => {
                if base != used && !ring.is_settled() {
                    return Err(UnknownBetween { base, used });
                }
                ring.set_next_avail(used);
                if let Some(region) = fresh {
                    region.begin(used);
                }
            }
        }
        Ok(Queue {
            ring,
            inflight,
            call: None,
            line,
            taken,
            next_counter: 0,
            in_flight,
            batch: Vec::new(),
            enabled: false,
            replay,
            progress_at: now,
            broken: None,
        })
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
        let popped = self.ring.pop();
        // What was read may be zeroes of ours: not a head, and not to be recorded as one.
        if self.line.has_ended() {
            return None;
        }
        let head = match popped {
            Ok(head) => head?,
            Err(why) => {
                self.broke(why);
                return None;
            }
        };
        if self.taken[usize::from(head)].is_some() {
            // Not taken, then: what the avail ring is ahead stays what is in flight.
            self.ring.set_next_avail(self.ring.next_avail().wrapping_sub(1));
            self.broke(Broken::HeadInFlight(head));
            return None;
        }
        if self.in_flight == 0 {
            self.progress_at = now;
        }
        self.in_flight += 1;
        let counter = match &mut self.inflight {
            Some(region) => region.taken(head),
            None => self.next_counter,
        };
        self.next_counter = counter.wrapping_add(1);
        self.taken[usize::from(head)] = Some(counter);
        Some(head)
    }

    /// Everything taken and not answered, oldest first.
    fn unanswered(&self) -> Vec<Unanswered> {
        assert!(self.batch.is_empty(), "answers that are not published");
        let heads = (0..).zip(&self.taken);
        let mut left: Vec<_> =
            heads.filter_map(|(head, taken)| Some(Unanswered { counter: (*taken)?, head })).collect();
        left.sort_unstable();
        left
    }

    /// Nobody works on what is unanswered any more: all of it is to be done again.
    pub fn take_back(&mut self) {
        let left = self.unanswered();
        self.replay = if left.is_empty() { Replay::Done } else { Replay::All(left) };
    }

    /// The last that is written to this ring's memory before somebody else may look at it, or take it elsewhere.
    pub fn settle(&mut self, log: Option<&DirtyLog>) {
        // Of a ring whose memory was taken away or has gone, nothing is ours to write.
        if !matches!(self.broken, Some(Broken::Outside(_))) && !self.has_ended() {
            let left = self.unanswered();
            self.ring.settle(left.iter().map(|unanswered| unanswered.head), log);
        }
    }

    pub fn broke(&mut self, why: Broken) {
        tracing::warn!(%why, "the guest's driver broke a ring; it stays stopped until it is set up again");
        self.broken = Some(why);
    }

    /// An answer is ready. It reaches the guest with the next [`Queue::flush`].
    pub fn answered(&mut self, used: Used, now: Instant) {
        assert!(self.taken[usize::from(used.head)].is_some(), "head {} was not taken", used.head);
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

    /// The session that it belongs to cannot go on; see `lifeline.rs`.
    pub fn has_ended(&self) -> bool {
        self.line.has_ended()
    }

    /// Publishes all answers, and interrupts the guest once if it wants that.
    pub fn flush(&mut self, log: Option<&DirtyLog>) {
        if self.batch.is_empty() {
            return;
        }
        let mut batch = std::mem::take(&mut self.batch);
        for step in Queue::steps(&batch) {
            // Data, elements or records went nowhere: the guest is not to find an answer. As after a kill -9 here, all of
            // the batch is done again.
            if step == Step::Publish && self.line.has_ended() {
                return;
            }
            self.perform(step, log);
        }
        for used in batch.drain(..) {
            self.taken[usize::from(used.head)] = None;
            self.in_flight -= 1;
        }
        self.batch = batch;
        if self.ring.needs_signal() {
            self.signal();
        }
    }

    /// A new eventfd for interrupts. It is signalled at once: an answer may have been published while there was none,
    /// or by a process that died before it could signal.
    pub fn set_call(&mut self, call: Option<Event>) {
        self.call = call;
        self.signal();
    }

    fn signal(&mut self) {
        if let Some(call) = &self.call
            && let Err(Blocks) = call.signal()
        {
            self.call = None;
            self.line.end(Cause::CallBlocks);
        }
    }
}
