//! A volume is the guest's disk as the cluster sees it: one owner on the I/O thread, no lock.
//!
//! ```text
//!  device ──Request──▶ admit ──split──▶ Operation ──route──▶ send ──writev──▶ chunkserver
//!                        ▲                  │ parked while nobody leads           │
//!  device ◀──Outcome── complete ◀── combine ◀── match by RequestId ◀── answers ◀──┘
//!                                           └── retry: what next?
//!  control thread ◀──Ask (attach, segment, map)── · ──News + wake──▶
//! ```
//!
//! Everything happens in [`Volume::settle`], once per turn of the loop, and again where sending showed that a connection is
//! lost; before it, what has come only waits. So a turn reads the clock once and each chunkserver is written to once.
//!
//! What always holds:
//!
//! - Every ticket is completed exactly once.
//! - A change keeps its sequence, data and checksums however often it is sent, and to whomever. Its lane's floor never
//!   passes a sequence that may still be sent again.
//! - A read is answered by a leader that knows all this volume had seen when the read began, or by any replica that
//!   has every change these bytes depend on (`followers`); and only with bytes that match their checksums.
//!   (The leader's bar is what was seen when the read *began*, not when it is answered: a read from a slow disk among
//!   quick writes would never get over a bar that rises while it waits.)
//! - Before the cluster agreed that this epoch writes, in every copyset, nothing is sent but fences.
//! - Nobody in reach: requests wait, without limit unless `fail_after` is set, and go on by themselves.
//! - Whatever waits has a clock (`Volume::wind_clock`): a new map is asked for, the operator is told, `fail_after` holds.
//!
//! It does not know descriptors, rings or guests.
//!
//! Start at [`Volume::settle`].

pub mod attach;
mod changing;
pub mod client;
pub mod control;
pub mod identity;
pub mod inflight;
pub mod retry;
pub mod routing;
pub mod split;

mod admit;
mod answers;
mod failing;
mod followers;
mod held;
mod mds;
mod pace;
mod peers;
mod recent;
mod sending;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::SegmentIndex;
use evolute_protocol::wire::request::Lane;
use tracing::{error, info, warn};

use self::attach::Attachment;
use self::changing::Changing;
use self::control::{Ask, ControlLink, News, SegmentRefused};
use self::failing::Failing;
use self::inflight::{Admitted, Bounds, Key, Operation, Pending, Sequences, Slab};
use self::pace::Pace;
use self::peers::Peers;
use self::routing::{Fencing, RouteIndex, Routing, SegmentCopysets};
use crate::backing::{Backing, Failure, Outcome, Request, Ticket};
use crate::connections::{Mail, Seat};
use crate::io_thread::WakerHandle;
use crate::wait::Jitter;

/// The lane of the one I/O thread a volume has.
const LANE: Lane = Lane(0);

/// Settings of a volume.
#[derive(Debug, Clone)]
pub struct VolumeOptions {
    /// Refuse everything that changes data.
    pub read_only: bool,
    /// Operations out at a time; more wait. Memory per operation is some 300 bytes beside its data.
    pub operations_max: usize,
    /// Bytes of reads and writes out at a time; more wait. The price of a long outage, in memory.
    pub bytes_max: u64,
    /// How long an answer may take before another replica is asked as well. Lower finds a hung leader sooner, and
    /// asks in vain more often when disks are slow.
    pub silence: Duration,
    /// Fail requests that could not be done for this long; `None`: hold them for ever. A write that failed so may
    /// still take effect, until the next write to its copyset is done.
    pub fail_after: Option<Duration>,
}

impl Default for VolumeOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            operations_max: 1024,
            bytes_max: 64 << 20,
            // Longer than anything but an election takes; with a leader that hangs, the others are asked from then on.
            silence: Duration::from_millis(500),
            fail_after: None,
        }
    }
}

/// What happened since the start; plain numbers, read by whoever has the volume.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    pub requests: u64,
    pub completed: u64,
    pub failed: u64,
    /// Frames sent, fences and retries included.
    pub sent: u64,
    pub redirects: u64,
    pub searches: u64,
    /// Another replica was asked because one was silent.
    pub asked_another: u64,
    pub stale_reads: u64,
    pub damaged: u64,
    pub connections_lost: u64,
    pub fences: u64,
    /// Reads asked of a replica that need not lead.
    pub followers_asked: u64,
    /// Those of them that were answered so, and first.
    pub followers_answered: u64,
    /// Those asked beside a leader that was only slow.
    pub second_questions: u64,
    /// A follower was asked to lead in the place of a leader that was not reached.
    pub take_overs_asked: u64,
    /// Operations that somebody else than the first one asked had to answer, or the same one later.
    pub retries: u64,
}

/// How far the volume is on its way to serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Attaching,
    /// Attached; the copysets that have not agreed yet are being fenced.
    Fencing,
    Serving,
    /// Somebody else owns the volume: every request fails.
    Stopped,
}

/// The guest's disk. See the [module](self).
#[derive(Debug)]
pub struct Volume {
    options: VolumeOptions,
    bounds: Bounds,
    control: ControlLink,
    stage: Stage,
    attachment: Option<Attachment>,
    peers: Peers,
    /// Empty between turns.
    mail: Vec<Mail>,
    routing: Routing,
    /// Submitted in this turn; the clock is read afterwards.
    submitted: Vec<(Ticket, Request)>,
    /// Not admitted yet, and since when.
    waiting: VecDeque<(Ticket, Request, Instant)>,
    requests: Slab<Pending>,
    operations: Slab<Operation>,
    sequences: Sequences,
    admitted: Admitted,
    changing: Changing,
    /// Requests with pieces left to make.
    long: VecDeque<Key>,
    /// Writes to space that is not allocated yet.
    unallocated: HashMap<SegmentIndex, Vec<Key>>,
    /// Operations that are sent again at their time, for reasons of their own.
    delayed: Vec<(Instant, Key)>,
    completed: Vec<(Ticket, Outcome)>,
    woken: bool,
    /// The turn's time.
    now: Instant,
    /// When operations out are next looked over.
    next_sweep: Option<Instant>,
    next_map: Option<Instant>,
    /// When reads out are next looked over.
    next_look: Option<Instant>,
    next_company: Option<Instant>,
    pace: Pace,
    segments_held_since: Option<Instant>,
    /// The operator was told that requests wait to be attached.
    attaching_held: bool,
    failing: Failing,
    deadline: Option<Instant>,
    jitter: Jitter,
    counters: Counters,
}

impl Volume {
    /// A volume that gets its attachment through `control`; call on the I/O thread.
    pub fn new(options: VolumeOptions, control: ControlLink, waker: WakerHandle, seat: Seat) -> Self {
        control.set_waker(waker);
        Self::without_waker(options, control, seat)
    }

    /// For a loop that asks for news by itself.
    fn without_waker(options: VolumeOptions, control: ControlLink, seat: Seat) -> Self {
        Self {
            bounds: Bounds { operations_max: options.operations_max, bytes_max: options.bytes_max },
            options,
            control,
            stage: Stage::Attaching,
            attachment: None,
            peers: Peers::new(seat),
            mail: Vec::new(),
            routing: Routing::default(),
            submitted: Vec::new(),
            waiting: VecDeque::new(),
            requests: Slab::default(),
            operations: Slab::default(),
            sequences: Sequences::default(),
            admitted: Admitted::default(),
            changing: Changing::default(),
            long: VecDeque::new(),
            unallocated: HashMap::new(),
            delayed: Vec::new(),
            completed: Vec::new(),
            woken: true,
            now: Instant::now(),
            next_sweep: None,
            next_map: None,
            next_look: None,
            next_company: None,
            pace: Pace::default(),
            segments_held_since: None,
            attaching_held: false,
            failing: Failing::default(),
            deadline: None,
            jitter: Jitter::default(),
            counters: Counters::default(),
        }
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Known once attached.
    pub fn attachment(&self) -> Option<&Attachment> {
        self.attachment.as_ref()
    }

    fn take_news(&mut self) {
        while let Some(news) = self.control.next() {
            match news {
                News::Attached(attachment) => self.attached(*attachment),
                News::Map(map) => {
                    self.routing.learn(&map, &mut self.peers, self.now);
                    self.fence_where_needed();
                }
                News::Segment { segment, result } => self.segment_allocated(segment, result),
                News::Lost => self.stop("the control plane says that the volume is not ours any more"),
            }
        }
    }

    fn attached(&mut self, attachment: Attachment) {
        if self.stage == Stage::Stopped {
            return;
        }
        if std::mem::take(&mut self.attaching_held) {
            info!("attached, I/O goes on");
        }
        self.routing.learn(&attachment.map, &mut self.peers, self.now);
        self.attachment = Some(attachment);
        self.stage = Stage::Fencing;
        for route in self.routing.iter_mut() {
            route.fencing = Fencing::Needed;
        }
        self.fence_where_needed();
    }

    /// Asks every copyset that has not agreed to our epoch yet, all at the same time.
    fn fence_where_needed(&mut self) {
        for index in self.routing.indices() {
            if self.routing[index].fencing == Fencing::Needed {
                self.fence(index);
            }
        }
        self.serve_if_fenced();
    }

    fn serve_if_fenced(&mut self) {
        if self.stage == Stage::Fencing && self.routing.iter().all(|route| route.fencing == Fencing::Done) {
            self.stage = Stage::Serving;
            if let Some(attachment) = &self.attachment {
                info!("{} is ours under epoch {}", attachment.volume, attachment.epoch);
            }
            self.keep_company();
        }
    }

    fn segment_allocated(
        &mut self,
        segment: SegmentIndex,
        result: Result<Box<SegmentCopysets>, SegmentRefused>,
    ) {
        let learned = result.map(|copysets| self.routing.learn_segment(segment, &copysets));
        let Some(waiting) = self.unallocated.remove(&segment) else { return };
        if self.unallocated.is_empty()
            && let Some(since) = self.segments_held_since.take()
        {
            let seconds = self.now.saturating_duration_since(since).as_secs_f64();
            info!("{segment} is allocated, I/O goes on after {seconds:.1} s");
        }
        match learned {
            Ok(Ok(())) => waiting.into_iter().for_each(|key| self.route(key)),
            Ok(Err(unknown)) => {
                // The map with that copyset was sent before this; if it was not understood, ask again.
                warn!("{segment}: {unknown}");
                self.unallocated.insert(segment, waiting);
                self.control.ask(Ask::Segment(segment));
            }
            Err(refused) => {
                let failure = match refused {
                    SegmentRefused::NoSpace => Failure::NoSpace,
                    SegmentRefused::Invalid => Failure::Io,
                };
                waiting.into_iter().for_each(|key| self.fail_and_tell(key, failure));
            }
        }
    }

    /// Fenced while serving: for ever. Fenced with an attachment from the state directory: it was an old one, and the
    /// control plane knows whether we may have a new one.
    fn fenced_out(&mut self, by: Epoch) {
        let remembered = self.attachment.as_ref().is_some_and(|attachment| attachment.remembered);
        if self.stage == Stage::Fencing && remembered {
            info!("the attachment of before was replaced by epoch {by}; attaching anew");
            self.stage = Stage::Attaching;
            self.attachment = None;
            for key in self.operations.keys().collect::<Vec<_>>() {
                self.operations.remove(key);
            }
            for route in self.routing.iter_mut() {
                route.fencing = Fencing::Needed;
                route.parked.clear();
                route.probe = None;
            }
            self.control.ask(Ask::AttachAnew);
            return;
        }
        self.control.ask(Ask::FencedOut(by));
        let why = if by == Epoch::DELETED {
            "the volume was deleted".to_owned()
        } else {
            format!("fenced out by epoch {by}")
        };
        self.stop(&why);
    }

    /// The end of this volume for this process: nothing more is put out, everything fails.
    fn stop(&mut self, why: &str) {
        if self.stage == Stage::Stopped {
            return;
        }
        error!("{why}: every request fails from now on");
        self.stage = Stage::Stopped;
        for key in self.operations.keys().collect::<Vec<_>>() {
            self.operations.remove(key);
        }
        for key in self.requests.keys().collect::<Vec<_>>() {
            if let Some(request) = self.requests.remove(key) {
                self.complete(request.ticket, Outcome::Failed(Failure::Io));
            }
        }
        self.changing.clear();
        self.long.clear();
        self.unallocated.clear();
        self.delayed.clear();
    }

    fn complete(&mut self, ticket: Ticket, outcome: Outcome) {
        self.counters.completed += 1;
        self.counters.failed += u64::from(matches!(outcome, Outcome::Failed(_)));
        self.completed.push((ticket, outcome));
    }

    /// The guest hears of an I/O error, whatever it was; the operator hears why.
    fn fail_and_tell(&mut self, key: Key, failure: Failure) {
        self.note_failure(failure);
        self.fail_operation(key, failure);
    }

    fn note_failure(&mut self, failure: Failure) {
        let Some(volume) = self.attachment.as_ref().map(|attachment| attachment.volume) else { return };
        if !self.failing.note(failure, self.now) {
            return;
        }
        match failure {
            Failure::NoSpace => warn!(
                "{volume}: writes that need new space fail from now on (I/O errors for the guest): the cluster is full. Delete \
                 volumes, discard (fstrim) or add chunkservers; `evolute cluster status` says how much is free"
            ),
            Failure::Io => warn!(
                "{volume}: requests fail from now on (I/O errors for the guest): no replica can vouch for these bytes. \
                 The chunkservers' logs name the damaged blocks, and `evolute chunkserver list` counts them"
            ),
            Failure::ReadOnly => warn!("{volume}: writes fail from now on: it is read-only"),
        }
    }

    fn tell_failures_over(&mut self) {
        while let Some(over) = self.failing.take_over(self.now) {
            let what = if over.failure() == Failure::NoSpace { "for want of space" } else { "any more" };
            info!("no request fails {what}; {} did, within {:.1} s", over.count, over.lasted().as_secs_f64());
        }
    }

    /// When [`Volume::settle`] has something to do although nothing happens.
    fn next_deadline(&mut self) -> Option<Instant> {
        if self.stage == Stage::Stopped {
            return None;
        }
        let mut next = self.next_sweep;
        let mut consider = |at: Option<Instant>| {
            if let Some(at) = at {
                next = Some(next.map_or(at, |next: Instant| next.min(at)));
            }
        };
        consider(self.next_look);
        consider(self.failing.deadline());
        for peer in self.peers.iter() {
            consider(peer.deadline(self.now));
        }
        for route in self.routing.iter() {
            let waits = !route.parked.is_empty() || route.probe.is_some();
            consider(route.paused_until.filter(|_| waits || route.fencing != Fencing::Done));
        }
        self.delayed.iter().for_each(|(at, _)| consider(Some(*at)));
        next
    }
}

impl Backing for Volume {
    fn submit(&mut self, ticket: Ticket, request: Request) {
        self.submitted.push((ticket, request));
    }

    fn on_wake(&mut self) {
        self.woken = true;
    }

    fn settle(&mut self, now: Instant) {
        self.now = now;
        if std::mem::take(&mut self.woken) {
            self.take_news();
        }
        self.receive();
        self.expire();
        self.admit();
        self.pump();
        if self.stage == Stage::Stopped {
            // Only here, where nobody is going through them.
            self.peers.leave();
        }
        self.wind_clock();
        self.tell_failures_over();
        self.deadline = self.next_deadline();
    }

    fn take_completed(&mut self, out: &mut Vec<(Ticket, Outcome)>) {
        out.append(&mut self.completed);
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn ready(&self) -> bool {
        // What fails after a while must be known to wait: it cannot stay in the rings until then.
        matches!(self.stage, Stage::Serving | Stage::Stopped) || self.options.fail_after.is_some()
    }
}

/// Which copyset an index means, for traces.
impl Volume {
    fn name(&self, route: RouteIndex) -> evolute_protocol::id::CopysetId {
        self.routing[route].copyset
    }
}
