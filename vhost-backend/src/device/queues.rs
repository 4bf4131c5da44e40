//! All queues of the disk and everything in flight: the device without its threads.
//!
//! ```text
//!  kick ──▶ serve: pop ─▶ parse ─▶ tickets ─▶ backing.submit
//!                   └─ refused, flush, serial ─┐
//!  backing.take_completed ──▶ complete ────────┴─▶ queue's batch ──▶ publish: used ring, one interrupt
//! ```
//!
//! What always holds:
//!
//! - Nothing is taken from a ring while the backing is not ready, while something abandoned may still change data
//!   (it must not overtake what comes next), or while replayed writes are unanswered (design §5). Held rings lose
//!   nothing: their kicks are remembered.
//! - A stopped queue's memory is not touched again. A stop waits for answers as long as there are some; then it
//!   leaves the rest in the in-flight region, or, where nobody would ever do them again, fails them.
//! - What is in flight is bounded by the rings' sizes and by [`BYTES_IN_FLIGHT_MAX`].
//!
//! It does not know sockets, threads or the cluster; `io_thread.rs` drives it, tests call it directly.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use evolute_protocol::geometry::{MIB, REQUEST_BYTES_MAX};
use smallvec::SmallVec;

use super::chain::Chain;
use super::completion::{Completion, asked};
use super::inflight::{InflightRegion, Unanswered};
use super::memory::{DirtyLog, Memory};
use super::queue::{Queue, Replay};
use super::request::{Geometry, Parsed, STATUS_IOERR, STATUS_OK, parse};
use super::ring::{Broken, Layout, Ring};
use super::tickets::{Answered, Pending, Tickets};
use crate::backing::{Backing, Outcome, Request, Ticket};

/// Payload held for one disk at a time: at the bound, rings wait. 64 requests of the largest size, or 16 Ki of 4 KiB.
pub const BYTES_IN_FLIGHT_MAX: u64 = 64 * MIB;
const _: () = assert!(REQUEST_BYTES_MAX <= BYTES_IN_FLIGHT_MAX);

/// How long a stop waits without an answer arriving, when what is left is recorded and will be done again. The VMM
/// stands still meanwhile, guest and monitor alike.
pub const STOP_PATIENCE: Duration = Duration::from_millis(300);
/// The same when nobody records it: then the alternative is to fail requests that may yet succeed.
pub const UNRECORDED_STOP_PATIENCE: Duration = Duration::from_secs(5);
/// How long queues with requests to be done again are waited for, counted from the first queue that starts. A front
/// end starts them all within milliseconds; one that never starts some must not hold the others for ever.
const AWAITED_QUEUES: Duration = Duration::from_secs(1);

/// All that a queue needs to start.
#[derive(Debug)]
pub struct Setup {
    pub layout: Layout,
    /// Where the front end says the avail ring goes on.
    pub base: u16,
    pub event_idx: bool,
    pub enabled: bool,
    pub call: Option<File>,
    pub memory: Arc<Memory>,
    pub inflight: Option<Arc<InflightRegion>>,
}

/// Why a queue does not start. The message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartRefused {
    #[error("the ring cannot be used")]
    Ring(#[from] Broken),
    #[error("the in-flight region has no room for this queue")]
    Untracked,
    #[error("it runs already")]
    Running,
    #[error("its kick descriptor cannot be waited for")]
    Kick,
}

/// See the module.
pub struct Queues {
    disk: Geometry,
    queues: Vec<Option<Box<Queue>>>,
    /// Queues whose ring may hold something new, each once.
    runnable: VecDeque<u16>,
    is_runnable: Vec<bool>,
    /// Queues whose driver was asked not to kick while we look by ourselves.
    unarmed: Vec<u16>,
    /// Queues with answers to publish.
    answered: Vec<u16>,
    tickets: Tickets,
    bytes_in_flight: u64,
    log: Option<Arc<DirtyLog>>,
    /// Queues that must do something again before anything new is taken anywhere, and until when they may take.
    awaited: Vec<u16>,
    awaited_until: Option<Instant>,
    /// Queues whose replay is not all submitted.
    replaying: usize,
    replayed_changes_out: usize,
    stops: Vec<(u16, SyncSender<u16>)>,
    closing: bool,
    /// Reused for every chain.
    chain: Chain,
}

/// What became of a head.
enum Taken {
    Submitted,
    Answered,
    /// A replayed read, before its time.
    Later,
}

impl Queues {
    pub fn new(disk: Geometry, count: u16) -> Queues {
        Queues {
            disk,
            queues: (0..count).map(|_| None).collect(),
            runnable: VecDeque::new(),
            is_runnable: vec![false; usize::from(count)],
            unarmed: Vec::new(),
            answered: Vec::new(),
            tickets: Tickets::default(),
            bytes_in_flight: 0,
            log: None,
            awaited: Vec::new(),
            awaited_until: None,
            replaying: 0,
            replayed_changes_out: 0,
            stops: Vec::new(),
            closing: false,
            chain: Chain::default(),
        }
    }

    fn queue(&mut self, index: u16) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(index))?.as_deref_mut()
    }

    pub fn is_running(&self, index: u16) -> bool {
        self.queues.get(usize::from(index)).is_some_and(Option::is_some)
    }

    /// A region handed back by the front end: what is marked in it comes before anything new.
    pub fn await_replay(&mut self, region: &Arc<InflightRegion>) {
        self.awaited = region.queues_with_marks();
        self.awaited_until = None;
    }

    pub fn start(&mut self, index: u16, setup: Setup, now: Instant) -> Result<(), StartRefused> {
        if self.is_running(index) {
            return Err(StartRefused::Running);
        }
        let ring = Ring::new(&setup.memory, setup.layout, setup.event_idx)?;
        let inflight = match &setup.inflight {
            Some(region) => Some(region.queue(index, setup.layout.size).ok_or(StartRefused::Untracked)?),
            None => None,
        };
        let mut queue = Queue::start(ring, inflight, setup.base, now);
        queue.enabled = setup.enabled;
        queue.set_call(setup.call);
        match queue.replay {
            Replay::All(_) => {
                self.replaying += 1;
                if !self.awaited.contains(&index) {
                    self.awaited.push(index);
                }
            }
            Replay::Reads(_) | Replay::Done => self.awaited.retain(|awaited| *awaited != index),
        }
        self.awaited_until.get_or_insert(now + AWAITED_QUEUES);
        self.queues[usize::from(index)] = Some(Box::new(queue));
        self.kicked(index);
        Ok(())
    }

    pub fn enable(&mut self, index: u16, enabled: bool) {
        if let Some(queue) = self.queue(index) {
            queue.enabled = enabled;
            self.kicked(index);
        }
    }

    pub fn set_call(&mut self, index: u16, call: Option<File>) {
        if let Some(queue) = self.queue(index) {
            queue.set_call(call);
        }
    }

    pub fn set_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.log = log;
    }

    /// The memory table changed. Requests in flight keep the memory they were taken under.
    pub fn set_memory(&mut self, memory: &Arc<Memory>) {
        for queue in self.queues.iter_mut().flatten() {
            if let Err(why) = queue.ring.remap(memory) {
                queue.broke(why);
            }
        }
    }

    /// The ring may hold something new.
    pub fn kicked(&mut self, index: u16) {
        if self.is_running(index) && !std::mem::replace(&mut self.is_runnable[usize::from(index)], true) {
            self.runnable.push_back(index);
        }
    }

    /// Before sleeping: asks drivers for kicks again. True: something came in between, serve again first.
    pub fn arm(&mut self) -> bool {
        let log = self.log.clone();
        let mut more = false;
        while let Some(index) = self.unarmed.pop() {
            let Some(queue) = self.queue(index) else { continue };
            if queue.ring.rearm(log.as_deref()) {
                self.kicked(index);
                more = true;
            }
        }
        more
    }

    /// Whether there is work that `serve` left for its next turn.
    pub fn has_work(&self, backing: &dyn Backing) -> bool {
        !self.runnable.is_empty() && self.may_take(backing)
    }

    fn may_take(&self, backing: &dyn Backing) -> bool {
        backing.ready()
            && !self.closing
            && self.tickets.orphans_changing_data() == 0
            && self.bytes_in_flight < BYTES_IN_FLIGHT_MAX
            && self.replayed_changes_out == 0
            && self.awaited.is_empty()
    }

    /// Takes what the rings offer and hands it to the backing.
    pub fn serve(&mut self, backing: &mut dyn Backing, now: Instant) {
        if !backing.ready() || self.closing || self.tickets.orphans_changing_data() > 0 {
            return;
        }
        if !self.replay(backing, now) {
            return;
        }
        for _ in 0..self.runnable.len() {
            if self.bytes_in_flight >= BYTES_IN_FLIGHT_MAX {
                return;
            }
            let Some(index) = self.runnable.pop_front() else { return };
            self.is_runnable[usize::from(index)] = false;
            if self.serve_one(index, backing, now) {
                self.kicked(index);
            }
        }
    }

    /// True: more may be left in this ring.
    fn serve_one(&mut self, index: u16, backing: &mut dyn Backing, now: Instant) -> bool {
        let log = self.log.clone();
        let Some(queue) = self.queue(index) else { return false };
        if !queue.enabled || queue.broken.is_some() || self.is_stopping(index) {
            return false;
        }
        let Some(queue) = self.queue(index) else { return false };
        queue.ring.suppress_kicks(log.as_deref());
        // No more than one ring's worth per turn: a driver that refills as fast as we take must not keep the
        // others waiting.
        for _ in 0..queue.ring.size() {
            if self.bytes_in_flight >= BYTES_IN_FLIGHT_MAX {
                return true;
            }
            let Some(queue) = self.queue(index) else { return false };
            match queue.pop(now) {
                Some(head) => {
                    self.take_up(index, head, false, backing, now);
                }
                None if queue.broken.is_some() => return false,
                None => {
                    self.unarmed.push(index);
                    return false;
                }
            }
        }
        true
    }

    fn is_stopping(&self, index: u16) -> bool {
        self.stops.iter().any(|(stopping, _)| *stopping == index)
    }

    /// Does again what an earlier life left, data-changing requests first. True: new heads may be taken.
    fn replay(&mut self, backing: &mut dyn Backing, now: Instant) -> bool {
        if self.replaying == 0 && self.awaited.is_empty() && self.replayed_changes_out == 0 {
            return true;
        }
        let ready = self.replaying_queues();
        let late = self.awaited_until.is_some_and(|until| now >= until);
        if late || self.awaited.iter().all(|awaited| ready.contains(awaited)) {
            self.replay_changes(&ready, backing, now);
        }
        if late {
            self.awaited.clear();
        }
        if self.replayed_changes_out > 0 || !self.awaited.is_empty() {
            return false;
        }
        for index in self.replaying_queues() {
            let Some(queue) = self.queue(index) else { continue };
            let Replay::Reads(heads) = &mut queue.replay else { continue };
            let heads = std::mem::take(heads);
            queue.replay = Replay::Done;
            self.replaying -= 1;
            for head in heads {
                self.take_up(index, head, false, backing, now);
            }
        }
        true
    }

    /// Submits what changes data, of all these queues in the order in which it was taken: of two changes of the same bytes
    /// in different queues, the older one may have been applied and seen before the younger one was asked for.
    fn replay_changes(&mut self, queues: &[u16], backing: &mut dyn Backing, now: Instant) {
        let mut left = Vec::new();
        for index in queues {
            let Some(queue) = self.queue(*index) else { continue };
            let Replay::All(all) = &mut queue.replay else { continue };
            left.extend(std::mem::take(all).into_iter().map(|unanswered| (unanswered, *index)));
            queue.replay = Replay::Reads(Vec::new());
            queue.progress_at = now;
            self.awaited.retain(|awaited| awaited != index);
        }
        left.sort_unstable();
        for (Unanswered { head, .. }, index) in left {
            if let Taken::Later = self.take_up(index, head, true, backing, now)
                && let Some(Queue { replay: Replay::Reads(reads), .. }) = self.queue(index)
            {
                reads.push(head);
            }
        }
    }

    /// Queues that may do something again now.
    fn replaying_queues(&self) -> SmallVec<[u16; 8]> {
        if self.replaying == 0 {
            return SmallVec::new();
        }
        let ready = |queue: &Queue| queue.enabled && queue.replay != Replay::Done;
        (0..)
            .zip(&self.queues)
            .filter(|(index, queue)| queue.as_deref().is_some_and(ready) && !self.is_stopping(*index))
            .map(|(index, _)| index)
            .collect()
    }

    /// A head that was taken: understood, and submitted or answered. With `changes_only`, a read is left for later.
    fn take_up(
        &mut self,
        index: u16,
        head: u16,
        changes_only: bool,
        backing: &mut dyn Backing,
        now: Instant,
    ) -> Taken {
        let queue = self.queues[usize::from(index)].as_deref_mut().expect("the caller took its head");
        let memory = queue.ring.memory();
        let walked = self.chain.walk(&queue.ring, head);
        let parsed = walked.map_err(Into::into).and_then(|()| parse(&mut self.chain, memory, &self.disk));
        if let Ok(Parsed::Submit(requests)) = &parsed
            && changes_only
            && !requests.iter().any(Request::changes_data)
        {
            return Taken::Later;
        }
        let completion = Completion::new(index, head, &self.chain, memory);
        let log = self.log.as_deref();
        let used = match parsed {
            Ok(Parsed::Submit(requests)) => {
                self.submit(completion, requests, changes_only, backing);
                return Taken::Submitted;
            }
            Ok(Parsed::Done) => completion.answer(STATUS_OK, log),
            Ok(Parsed::Serial) => completion.answer_with_bytes(&self.disk.serial, log),
            Err(refused) => completion.answer(refused.status(), log),
        };
        queue.answered(used, now);
        self.answered.push(index);
        Taken::Answered
    }

    fn submit(
        &mut self,
        completion: Completion,
        requests: SmallVec<[Request; 1]>,
        replayed: bool,
        backing: &mut dyn Backing,
    ) {
        let bytes = requests.iter().map(payload_bytes).sum();
        let changes_data = requests.iter().any(Request::changes_data);
        let pending = Pending {
            completion,
            asked: requests.first().map_or(0, asked),
            bytes,
            changes_data,
            replayed: replayed && changes_data,
        };
        self.bytes_in_flight += bytes;
        self.replayed_changes_out += usize::from(pending.replayed);
        let parts = u32::try_from(requests.len()).expect("at most RANGES_MAX");
        for (ticket, request) in self.tickets.enter(pending, parts).zip(requests) {
            backing.submit(ticket, request);
        }
    }

    /// The backing answered.
    pub fn complete(&mut self, ticket: Ticket, outcome: Outcome, now: Instant) {
        let (pending, outcome) = match self.tickets.answer(ticket, outcome) {
            Answered::Whole(pending, outcome) => (pending, outcome),
            Answered::NotYet | Answered::Orphan => return,
        };
        self.forget(&pending);
        let index = pending.completion.queue();
        let used = pending.completion.finish(outcome, pending.asked, self.log.as_deref());
        self.queue(index).expect("a queue keeps running until its requests are gone").answered(used, now);
        self.answered.push(index);
    }

    fn forget(&mut self, pending: &Pending) {
        self.bytes_in_flight -= pending.bytes;
        self.replayed_changes_out -= usize::from(pending.replayed);
    }

    /// Shows the guests' drivers every answer since the last call.
    pub fn publish(&mut self) {
        let log = self.log.clone();
        let mut answered = std::mem::take(&mut self.answered);
        for index in answered.drain(..) {
            if let Some(queue) = self.queue(index) {
                queue.flush(log.as_deref());
            }
        }
        self.answered = answered;
    }

    /// Stops a queue as soon as nothing of it is out; `reply` hears where its avail ring would go on. See
    /// [`Queues::settle_stops`].
    pub fn begin_stop(&mut self, index: u16, reply: SyncSender<u16>) {
        self.stops.push((index, reply));
    }

    fn stop_deadline(&self, queue: &Queue) -> Instant {
        // A migration takes the guest to where the region is not.
        let recorded = queue.is_recorded() && self.log.is_none();
        queue.progress_at + if recorded { STOP_PATIENCE } else { UNRECORDED_STOP_PATIENCE }
    }

    /// Finishes stops whose queue is drained, or whose patience is at an end. True: at least one queue stopped.
    pub fn settle_stops(&mut self, now: Instant) -> bool {
        let mut stopped = false;
        for (index, reply) in std::mem::take(&mut self.stops) {
            let Some(queue) = self.queues.get(usize::from(index)).and_then(Option::as_deref) else {
                // Nothing ran: there is nothing to say but the start of the ring.
                let _ = reply.send(0);
                continue;
            };
            if queue.out() > 0 && now < self.stop_deadline(queue) {
                self.stops.push((index, reply));
                continue;
            }
            let base = self.stop_now(index);
            stopped = true;
            // A session that ended meanwhile does not listen any more.
            let _ = reply.send(base);
        }
        stopped
    }

    fn stop_now(&mut self, index: u16) -> u16 {
        let log = self.log.clone();
        let mut queue = self.queues[usize::from(index)].take().expect("the caller looked");
        let fail = !queue.is_recorded() || log.is_some();
        for pending in self.tickets.orphan(|of| of == index) {
            self.forget(&pending);
            if fail {
                let used = pending.completion.answer(STATUS_IOERR, log.as_deref());
                queue.answered(used, queue.progress_at);
            } else {
                pending.completion.abandon();
            }
        }
        queue.flush(log.as_deref());
        self.gone(index, &queue);
        queue.ring.next_avail()
    }

    /// A queue that just started and cannot be served after all.
    pub fn cancel_start(&mut self, index: u16) {
        if let Some(queue) = self.queues[usize::from(index)].take() {
            self.gone(index, &queue);
        }
    }

    fn gone(&mut self, index: u16, queue: &Queue) {
        self.replaying -= usize::from(queue.replay != Replay::Done);
        self.awaited.retain(|awaited| *awaited != index);
        if std::mem::replace(&mut self.is_runnable[usize::from(index)], false) {
            self.runnable.retain(|runnable| *runnable != index);
        }
    }

    /// The front end is gone, or reset the device: every queue ends here and now, and guest memory is let go of.
    pub fn abandon_all(&mut self) {
        for pending in self.tickets.orphan(|_| true) {
            self.forget(&pending);
            pending.completion.abandon();
        }
        for index in 0..self.queues.len() {
            let Some(queue) = self.queues[index].take() else { continue };
            self.gone(u16::try_from(index).expect("at most QUEUES_MAX"), &queue);
        }
        self.answered.clear();
        self.unarmed.clear();
        self.awaited.clear();
        self.awaited_until = None;
        self.log = None;
        for (_, reply) in self.stops.drain(..) {
            let _ = reply.send(0);
        }
    }

    /// The process ends: nothing new is taken.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// Guests' requests that the backing has not answered.
    pub fn out(&self) -> usize {
        self.tickets.live()
    }

    /// When something here is due even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        let stops = self.stops.iter().filter_map(|(index, _)| {
            let queue = self.queues.get(usize::from(*index))?.as_deref()?;
            Some(self.stop_deadline(queue))
        });
        let awaited = self.awaited_until.filter(|_| !self.awaited.is_empty());
        stops.chain(awaited).min()
    }

    /// Whether any running ring offers something: a look without taking.
    pub fn poll_rings(&mut self) -> bool {
        let mut found = false;
        for index in 0..self.queues.len() {
            let Some(queue) = self.queues[index].as_deref() else { continue };
            let offers = queue.enabled && queue.broken.is_none() && queue.ring.has_available();
            let index = u16::try_from(index).expect("at most QUEUES_MAX");
            // Nothing is taken from one that is to stop.
            if offers && !self.is_stopping(index) {
                self.kicked(index);
                found = true;
            }
        }
        found
    }
}

fn payload_bytes(request: &Request) -> u64 {
    match request {
        Request::Read { len, .. } => u64::from(*len),
        Request::Write { data, .. } => data.len() as u64,
        Request::Discard { .. } | Request::WriteZeroes { .. } => 0,
    }
}
