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
//! - Nothing is taken from a ring while the disk's size is not known or the backing is not ready, while something
//!   abandoned may still change data (it must not overtake what comes next), or while replayed writes are unanswered
//!   (design §5). Held rings lose nothing: their kicks are remembered.
//! - When a stop, a pause or a change of memory is acknowledged, nothing of those queues is out, and their memory is not
//!   touched again. Each waits for answers as long as some come; then the rest is taken back from the backing, to be done
//!   again, and the ring says so itself ([`Queue::settle`]): it may go on here, elsewhere, or from a snapshot.
//! - What is in flight is bounded by the rings' sizes and by [`BYTES_IN_FLIGHT_MAX`].
//!
//! It does not know sockets, threads or the cluster; `io_thread.rs` drives it, tests call it directly.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use evolute_protocol::geometry::{MIB, REQUEST_BYTES_MAX};
use smallvec::SmallVec;

use super::chain::Chain;
use super::completion::{Completion, asked};
use super::event::Event;
use super::inflight::{InflightRegion, Unanswered};
use super::lifeline::Lifeline;
use super::memory::{DirtyLog, Memory};
use super::queue::{Queue, Replay, UnknownBetween};
use super::request::{Geometry, Parsed, STATUS_OK, parse};
use super::ring::{Broken, Layout, Ring};
use super::tickets::{Answered, Pending, Tickets};
use crate::backing::{Backing, Outcome, Request, Ticket};

/// Payload held for one disk at a time: at the bound, rings wait. 64 requests of the largest size, or 16 Ki of 4 KiB.
pub const BYTES_IN_FLIGHT_MAX: u64 = 64 * MIB;
const _: () = assert!(REQUEST_BYTES_MAX <= BYTES_IN_FLIGHT_MAX);

/// How long a stop waits without an answer arriving. What is left is done again, so it is only work that is lost; the VMM
/// stands still meanwhile, guest and monitor alike.
pub const STOP_PATIENCE: Duration = Duration::from_millis(300);
/// How long it waits in all, while answers do arrive.
pub const STOP_PATIENCE_IN_ALL: Duration = Duration::from_secs(5);
const _: () = assert!(STOP_PATIENCE.as_millis() < STOP_PATIENCE_IN_ALL.as_millis());
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
    pub call: Option<Event>,
    pub memory: Arc<Memory>,
    pub inflight: Option<Arc<InflightRegion>>,
    pub line: Arc<Lifeline>,
}

/// Why a queue does not start. The message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartRefused {
    #[error("the ring cannot be used")]
    Ring(#[from] Broken),
    #[error("the in-flight region has no room for this queue")]
    Untracked,
    #[error(transparent)]
    Unknown(#[from] UnknownBetween),
    #[error("it runs already")]
    Running,
    #[error("its kick descriptor cannot be waited for")]
    Kick,
    #[error("its session has ended")]
    Ended,
}

/// Something that may happen only when nothing of its queues is out.
struct Quiet {
    since: Instant,
    then: Then,
}

enum Then {
    /// The queue ends; its reply is where its avail ring goes on.
    Stop(u16, SyncSender<u16>),
    /// The queue takes nothing until it is enabled again.
    Disabled(u16, SyncSender<()>),
    /// Every queue goes on, in other memory.
    Memory(Arc<Memory>, SyncSender<()>),
}

impl Then {
    fn is_of(&self, queue: u16) -> bool {
        match self {
            Then::Stop(index, _) | Then::Disabled(index, _) => *index == queue,
            Then::Memory(..) => true,
        }
    }
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
    /// Of the session to which the running queues belong.
    line: Option<Arc<Lifeline>>,
    /// Queues that must do something again before anything new is taken anywhere, and until when they may take.
    awaited: Vec<u16>,
    awaited_until: Option<Instant>,
    /// Queues whose replay is not all submitted.
    replaying: usize,
    replayed_changes_out: usize,
    /// Nothing is taken from their queues meanwhile.
    quiets: Vec<Quiet>,
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
    /// Nobody knows what it asks for: its session has ended.
    Lost,
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
            line: None,
            awaited: Vec::new(),
            awaited_until: None,
            replaying: 0,
            replayed_changes_out: 0,
            quiets: Vec::new(),
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
        // By the used ring's index the in-flight region is put right: not by one that is not there.
        if setup.line.has_ended() {
            return Err(StartRefused::Ended);
        }
        let inflight = match &setup.inflight {
            Some(region) => Some(region.queue(index, setup.layout.size).ok_or(StartRefused::Untracked)?),
            None => None,
        };
        let mut queue = Queue::start(ring, inflight, setup.base, setup.line.clone(), now)?;
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
        self.line = Some(setup.line);
        self.awaited_until.get_or_insert(now + AWAITED_QUEUES);
        self.queues[usize::from(index)] = Some(Box::new(queue));
        self.kicked(index);
        Ok(())
    }

    /// From now on its requests are taken, those first that a pause took back.
    pub fn enable(&mut self, index: u16, now: Instant) {
        let Some(queue) = self.queue(index) else { return };
        queue.enabled = true;
        if matches!(queue.replay, Replay::All(_)) {
            self.await_taken_back(now);
        }
        self.kicked(index);
    }

    /// What was taken back from any queue comes before anything new, as if the process had died meanwhile.
    fn await_taken_back(&mut self, now: Instant) {
        for (index, queue) in (0..).zip(&self.queues) {
            let waits = queue.as_deref().is_some_and(|queue| matches!(queue.replay, Replay::All(_)));
            if waits && !self.awaited.contains(&index) {
                self.awaited.push(index);
            }
        }
        self.awaited_until = Some(now + AWAITED_QUEUES);
    }

    pub fn set_call(&mut self, index: u16, call: Option<Event>) {
        if let Some(queue) = self.queue(index) {
            queue.set_call(call);
        }
    }

    pub fn set_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.log = log;
    }

    /// The memory table changed. Requests in flight keep the memory they were taken under; where some of that goes away,
    /// see [`Queues::begin_change_of_memory`].
    pub fn set_memory(&mut self, memory: &Arc<Memory>) {
        for index in 0..self.queues.len() {
            let Some(queue) = self.queues[index].as_deref_mut() else { continue };
            if let Err(why) = queue.ring.remap(memory) {
                queue.broke(why);
            }
            self.kicked(u16::try_from(index).expect("at most QUEUES_MAX"));
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
            if self.is_quieting(index) {
                continue;
            }
            let Some(queue) = self.queue(index) else { continue };
            // Whoever may not take has nothing to ask for, and the memory may be somebody else's by now.
            if !queue.enabled || queue.broken.is_some() {
                continue;
            }
            if queue.ring.rearm(log.as_deref()) {
                self.kicked(index);
                more = true;
            }
        }
        more || self.has_ended()
    }

    /// Whether there is work that `serve` left for its next turn.
    pub fn has_work(&self, backing: &dyn Backing) -> bool {
        self.has_ended() || !self.runnable.is_empty() && self.may_take(backing)
    }

    /// Whether anything goes to the backing, also what is done again.
    fn may_submit(&self, backing: &dyn Backing) -> bool {
        self.disk.capacity.get().is_some()
            && backing.ready()
            && !self.closing
            && self.tickets.orphans_changing_data() == 0
    }

    fn may_take(&self, backing: &dyn Backing) -> bool {
        self.may_submit(backing)
            && self.bytes_in_flight < BYTES_IN_FLIGHT_MAX
            && self.replayed_changes_out == 0
            && self.awaited.is_empty()
    }

    /// Takes what the rings offer and hands it to the backing.
    pub fn serve(&mut self, backing: &mut dyn Backing, now: Instant) {
        if !self.may_submit(backing) || !self.replay(backing, now) {
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
        if !queue.enabled || queue.broken.is_some() || self.is_quieting(index) {
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

    fn is_quieting(&self, index: u16) -> bool {
        self.quiets.iter().any(|quiet| quiet.then.is_of(index))
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
            .filter(|(index, queue)| queue.as_deref().is_some_and(ready) && !self.is_quieting(*index))
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
        // The one look before anything is sent: what was copied may be zeroes of ours, not what the guest wrote there.
        if queue.has_ended() {
            return Taken::Lost;
        }
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
    /// [`Queues::settle`].
    pub fn begin_stop(&mut self, index: u16, reply: SyncSender<u16>, now: Instant) {
        self.quiets.push(Quiet { since: now, then: Then::Stop(index, reply) });
    }

    /// Nothing is taken from the queue any more; `reply` hears when nothing of it is out.
    pub fn begin_pause(&mut self, index: u16, reply: SyncSender<()>, now: Instant) {
        if let Some(queue) = self.queue(index) {
            queue.enabled = false;
        }
        self.quiets.push(Quiet { since: now, then: Then::Disabled(index, reply) });
    }

    /// Memory goes away. The queues go on without it when nothing is out; `reply` hears of that.
    pub fn begin_change_of_memory(&mut self, memory: Arc<Memory>, reply: SyncSender<()>, now: Instant) {
        self.quiets.push(Quiet { since: now, then: Then::Memory(memory, reply) });
    }

    /// Until when to wait for what is out; none: nothing is.
    fn patience(&self, quiet: &Quiet) -> Option<Instant> {
        let queues = (0..).zip(&self.queues).filter(|(index, _)| quiet.then.is_of(*index));
        let out = queues.filter_map(|(_, queue)| queue.as_deref()).filter(|queue| queue.out() > 0);
        let progress = out.map(|queue| queue.progress_at).max()?;
        Some((progress + STOP_PATIENCE).min(quiet.since + STOP_PATIENCE_IN_ALL))
    }

    /// Does what waits for its queues to be quiet, if they are, or if the patience for that is at an end. True: at least
    /// one queue stopped.
    pub fn settle(&mut self, now: Instant) -> bool {
        let mut stopped = false;
        for quiet in std::mem::take(&mut self.quiets) {
            if self.patience(&quiet).is_some_and(|until| now < until) {
                self.quiets.push(quiet);
                continue;
            }
            // A session that ended meanwhile does not listen any more.
            match quiet.then {
                Then::Stop(index, reply) => {
                    let base = self.stop_now(index);
                    stopped |= base.is_some();
                    self.hang_up();
                    // If nothing ran, there is nothing to say but the start of the ring.
                    let _ = reply.send(base.unwrap_or(0));
                }
                Then::Disabled(index, reply) => {
                    self.settle_one(index);
                    self.hang_up();
                    let _ = reply.send(());
                }
                Then::Memory(memory, reply) => {
                    for index in 0..self.queues.len() {
                        self.take_back(u16::try_from(index).expect("at most QUEUES_MAX"));
                    }
                    self.set_memory(&memory);
                    self.await_taken_back(now);
                    self.hang_up();
                    let _ = reply.send(());
                }
            }
        }
        stopped
    }

    /// Nobody works on this queue's requests any more, and what is answered is published.
    fn take_back(&mut self, index: u16) {
        let log = self.log.clone();
        let taken = self.tickets.orphan(|of| of == index);
        if !taken.is_empty() {
            let requests = taken.len();
            tracing::warn!(
                queue = index,
                requests,
                "no answers yet: these will be done again when the ring goes on"
            );
        }
        for pending in taken {
            self.forget(&pending);
            pending.completion.abandon();
        }
        let Some(queue) = self.queue(index) else { return };
        queue.flush(log.as_deref());
        let before = usize::from(queue.replay != Replay::Done);
        queue.take_back();
        let after = usize::from(queue.replay != Replay::Done);
        self.replaying = self.replaying + after - before;
    }

    fn settle_one(&mut self, index: u16) {
        let log = self.log.clone();
        self.take_back(index);
        if let Some(queue) = self.queue(index) {
            queue.settle(log.as_deref());
        }
    }

    fn stop_now(&mut self, index: u16) -> Option<u16> {
        self.settle_one(index);
        let queue = self.queues.get_mut(usize::from(index))?.take()?;
        self.gone(index, &queue);
        Some(queue.ring.used_idx())
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
        self.line = None;
        // Those who asked have ended, too.
        self.quiets.clear();
    }

    fn has_ended(&self) -> bool {
        self.line.as_ref().is_some_and(|line| line.has_ended())
    }

    /// Before anything is acknowledged: if the session cannot go on, no acknowledgement leaves the process.
    fn hang_up(&self) {
        if let Some(line) = self.line.as_ref().filter(|line| line.has_ended()) {
            line.hang_up();
        }
    }

    /// A session that cannot go on is over here and now. True: it was so.
    pub fn hang_up_if_ended(&mut self) -> bool {
        if !self.has_ended() {
            return false;
        }
        self.hang_up();
        for quiet in std::mem::take(&mut self.quiets) {
            // The socket thread waits; what it hears does not leave the process any more.
            match quiet.then {
                Then::Stop(_, reply) => _ = reply.send(0),
                Then::Disabled(_, reply) | Then::Memory(_, reply) => _ = reply.send(()),
            }
        }
        self.abandon_all();
        true
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
        let quiets = self.quiets.iter().filter_map(|quiet| self.patience(quiet));
        let awaited = self.awaited_until.filter(|_| !self.awaited.is_empty());
        quiets.chain(awaited).min()
    }

    /// Whether any running ring offers something: a look without taking.
    pub fn poll_rings(&mut self) -> bool {
        let mut found = false;
        for index in 0..self.queues.len() {
            let Some(queue) = self.queues[index].as_deref() else { continue };
            let offers = queue.enabled && queue.broken.is_none() && queue.ring.has_available();
            let index = u16::try_from(index).expect("at most QUEUES_MAX");
            if offers && !self.is_quieting(index) {
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
