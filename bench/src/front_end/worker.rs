//! One virtqueue and the thread that keeps it full.
//!
//! A run has three phases, each joined before the next begins: [`Worker::prefill`], [`Worker::load`] (the one that
//! is measured) and [`Worker::read_back`]. A slot is either free or belongs to exactly one request in flight.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::{EventFd, QueueNotifier, VirtioBlkQueue};

use super::FrontEndError;
use super::content::{Random, check, fill};
use super::memory::Slots;
use super::options::Plan;
use super::report::Tally;

/// How long one sleep on the call eventfd may last: what bounds the noticing of a stall or a cancelled run.
const NAP: Timespec = Timespec { tv_sec: 0, tv_nsec: 250_000_000 };
/// Tries to find a block that no request in flight touches.
const PICKS_MAX: u32 = 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Read,
    Write,
    Flush,
}

/// Goes with a request and comes back with its answer.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    slot: usize,
    op: Op,
    offset: u64,
    bytes: usize,
    /// What the block holds (read) or will hold (write); 0: not known.
    generation: u32,
    made: Instant,
}

/// When the measured phase begins, counts, and ends; the same for all queues.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    pub count_from: Instant,
    pub end: Instant,
}

/// What every block of the queue's part should hold. Kept with --verify only.
#[derive(Debug, Default)]
struct Ledger {
    generations: HashMap<u64, u32>,
    /// Blocks with a request in flight: a second one would make the expected content undefined.
    busy: HashSet<u64>,
    scratch: Vec<u8>,
}

pub struct Worker<'p> {
    plan: &'p Plan,
    cancelled: &'p AtomicBool,
    queue: VirtioBlkQueue<'static, Request>,
    notifier: Box<dyn QueueNotifier>,
    called: Arc<EventFd>,
    slots: Slots,
    free: Vec<usize>,
    answered: Vec<(Request, i32)>,
    base: u64,
    blocks: u64,
    ledger: Option<Ledger>,
    random: Random,
    sequence: u64,
    stamp: u64,
    pub tally: Tally,
}

impl<'p> Worker<'p> {
    pub fn new(
        plan: &'p Plan,
        cancelled: &'p AtomicBool,
        index: usize,
        queue: VirtioBlkQueue<'static, Request>,
        (notifier, called): (Box<dyn QueueNotifier>, Arc<EventFd>),
        mut slots: Slots,
    ) -> Self {
        let mut random = Random::new(plan.options.seed ^ ((index as u64 + 1) << 40));
        // Different contents everywhere, so that nothing below can profit from equal data.
        for slot in 0..slots.count {
            let bytes = slots.bytes;
            for word in slots.content(slot, bytes).chunks_exact_mut(8) {
                word.copy_from_slice(&random.draw().to_le_bytes());
            }
        }
        let (base, blocks) = plan.range(index);
        let scratch = vec![0; slots.bytes];
        Self {
            ledger: plan.options.verify.then(|| Ledger { scratch, ..Ledger::default() }),
            free: (0..slots.count).collect(),
            answered: Vec::with_capacity(slots.count),
            stamp: random.draw(),
            sequence: 0,
            tally: Tally::default(),
            plan,
            cancelled,
            queue,
            notifier,
            called,
            slots,
            base,
            blocks,
            random,
        }
    }

    /// Writes this queue's part once, in order, and flushes it.
    pub fn prefill(&mut self) -> Result<(), FrontEndError> {
        let bs = self.plan.options.bs;
        let end = self.base + self.blocks * bs;
        if let Some(ledger) = &mut self.ledger {
            ledger.generations = (0..self.blocks).map(|block| (self.base + block * bs, 1)).collect();
        }
        let step = self.plan.fill_block;
        let parts = (self.base..end).step_by(step).map(|offset| {
            let left = usize::try_from(end - offset).unwrap_or(usize::MAX);
            (offset, left.min(step), 1)
        });
        self.pass(parts, Op::Write)?;
        if !self.tally.stalled {
            self.pass([(0, 0, 0)].into_iter(), Op::Flush)?;
        }
        Ok(())
    }

    /// Reads back and checks every block whose content is known.
    pub fn read_back(&mut self) -> Result<(), FrontEndError> {
        let Some(ledger) = &self.ledger else { return Ok(()) };
        if self.tally.stalled {
            return Ok(());
        }
        let mut known: Vec<(u64, usize, u32)> = ledger
            .generations
            .iter()
            .map(|(offset, generation)| (*offset, self.plan.block, *generation))
            .collect();
        known.sort_unstable();
        self.pass(known.into_iter(), Op::Read)
    }

    /// Keeps the queue full until the end, then waits for what is in flight.
    pub fn load(&mut self, clock: Clock) -> Result<(), FrontEndError> {
        let options = &self.plan.options;
        let (flush_every, reads) = (options.flush_every, options.rw.reads(options.rwmixread));
        let interval = std::time::Duration::from_millis(options.timeline);
        let mut writes_unflushed = 0;
        let mut last = Instant::now();
        self.queue.set_used_notif_enabled(!options.poll);
        loop {
            if Instant::now() < clock.end && !self.is_cancelled() {
                while let Some(slot) = self.free.pop() {
                    if flush_every > 0 && writes_unflushed >= flush_every {
                        writes_unflushed = 0;
                        self.submit(Op::Flush, slot, 0, 0, 0)?;
                    } else {
                        self.submit_next(slot, reads)?;
                    }
                }
                self.kick()?;
            } else if self.free.len() == self.slots.count {
                return Ok(());
            }
            if !self.wait(last)? {
                self.tally.stalled = true;
                return Ok(());
            }
            let now = self.take_answers();
            let counts = now >= clock.count_from && now < clock.end;
            if now >= clock.count_from && last < clock.end {
                // Only what lies in the measured time: not the ramp before it, not the wait for the last ones after it.
                self.tally.gap_seen(now.min(clock.end).saturating_duration_since(last.max(clock.count_from)));
            }
            last = now;
            let mut answered = std::mem::take(&mut self.answered);
            for (request, status) in answered.drain(..) {
                if request.op == Op::Write {
                    writes_unflushed += 1;
                }
                if counts && status == 0 {
                    self.tally.count(request.op, now.saturating_duration_since(request.made));
                    self.tally.count_interval(interval, now.saturating_duration_since(clock.count_from));
                }
                self.settle(&request, status);
            }
            self.answered = answered;
        }
    }

    /// All of these in the given order, as many in flight as there are slots.
    fn pass(
        &mut self,
        mut parts: impl Iterator<Item = (u64, usize, u32)>,
        op: Op,
    ) -> Result<(), FrontEndError> {
        let mut last = Instant::now();
        loop {
            while let Some(slot) = self.free.pop() {
                let Some((offset, bytes, generation)) = parts.next().filter(|_| !self.is_cancelled()) else {
                    self.free.push(slot);
                    break;
                };
                if op == Op::Write {
                    fill(self.slots.content(slot, bytes), self.plan.options.seed, offset, generation);
                }
                self.submit(op, slot, offset, bytes, generation)?;
            }
            self.kick()?;
            if self.free.len() == self.slots.count {
                return Ok(());
            }
            if !self.wait(last)? {
                self.tally.stalled = true;
                return Ok(());
            }
            last = self.take_answers();
            let mut answered = std::mem::take(&mut self.answered);
            for (request, status) in answered.drain(..) {
                self.settle(&request, status);
            }
            self.answered = answered;
        }
    }

    fn submit_next(&mut self, slot: usize, reads: u64) -> Result<(), FrontEndError> {
        let is_read = reads == 100 || (reads > 0 && self.random.below(100) < reads);
        let offset = self.pick()?;
        let known =
            self.ledger.as_ref().and_then(|ledger| ledger.generations.get(&offset)).copied().unwrap_or(0);
        if is_read {
            return self.submit(Op::Read, slot, offset, self.plan.block, known);
        }
        let block = self.slots.content(slot, self.plan.block);
        if self.ledger.is_some() {
            fill(block, self.plan.options.seed, offset, known + 1);
        } else {
            // No write repeats an earlier one's bytes; more than a header would measure the generator.
            for part in block.chunks_mut(4096) {
                self.stamp = self.stamp.wrapping_add(0x9E37_79B9_7F4A_7C15);
                part[..8].copy_from_slice(&self.stamp.to_le_bytes());
                part[8..16].copy_from_slice(&offset.to_le_bytes());
            }
        }
        self.submit(Op::Write, slot, offset, self.plan.block, known + 1)
    }

    /// The next offset. With --verify, of a block that nothing in flight touches.
    fn pick(&mut self) -> Result<u64, FrontEndError> {
        for _ in 0..PICKS_MAX {
            let block = if self.plan.options.rw.is_random() {
                self.random.below(self.blocks)
            } else {
                self.sequence += 1;
                (self.sequence - 1) % self.blocks
            };
            let offset = self.base + block * self.plan.options.bs;
            if self.ledger.as_mut().is_none_or(|ledger| ledger.busy.insert(offset)) {
                return Ok(offset);
            }
        }
        Err(FrontEndError::Usage { why: "--verify: too few blocks for this queue depth".to_owned() })
    }

    fn submit(
        &mut self,
        op: Op,
        slot: usize,
        offset: u64,
        bytes: usize,
        generation: u32,
    ) -> Result<(), FrontEndError> {
        let request = Request { slot, op, offset, bytes, generation, made: Instant::now() };
        let address = self.slots.address(slot);
        // SAFETY: `bytes` of the slot are in the shared mapping, which outlives the queue, and the slot is out of `free`
        // until this request is answered, so nothing of ours touches it meanwhile.
        let made = unsafe {
            match op {
                Op::Read => self.queue.read_raw(offset, address, bytes, request),
                Op::Write => self.queue.write_raw(offset, address, bytes, request),
                Op::Flush => self.queue.flush(request),
            }
        };
        made.map_err(|source| FrontEndError::Server { doing: "queueing a request", source })
    }

    fn kick(&mut self) -> Result<(), FrontEndError> {
        if !self.queue.avail_notif_needed() {
            return Ok(());
        }
        self.tally.kicks += 1;
        self.notifier.notify().map_err(|source| FrontEndError::Server { doing: "kicking the queue", source })
    }

    /// Until the used ring has something; false when nothing came for the stall limit since `last`.
    fn wait(&mut self, last: Instant) -> Result<bool, FrontEndError> {
        let stall = self.plan.options.stall;
        if self.plan.options.poll {
            let mut spins = 0_u32;
            while !self.queue.completions().has_next() {
                std::hint::spin_loop();
                spins = spins.wrapping_add(1);
                if spins.is_multiple_of(65_536) && last.elapsed() > stall {
                    return Ok(false);
                }
            }
            return Ok(true);
        }
        loop {
            // Ask to be called, then look once more: what came between is not called for.
            self.queue.set_used_notif_enabled(true);
            if self.queue.completions().has_next() {
                return Ok(true);
            }
            self.tally.sleeps += 1;
            let called = {
                let fd = self.called.as_fd();
                let mut waiting = [PollFd::new(&fd, PollFlags::IN)];
                match poll(&mut waiting, Some(&NAP)) {
                    Ok(ready) => ready > 0,
                    Err(rustix::io::Errno::INTR) => false,
                    Err(error) => {
                        return Err(FrontEndError::Server {
                            doing: "waiting for the server's call",
                            source: error.into(),
                        });
                    }
                }
            };
            if called {
                self.called
                    .read()
                    .map_err(|source| FrontEndError::Server { doing: "taking the server's call", source })?;
            }
            if self.queue.completions().has_next() {
                return Ok(true);
            }
            if last.elapsed() > stall {
                return Ok(false);
            }
        }
    }

    /// Moves what is in the used ring to `answered` and frees the slots. Gives the time they were seen.
    fn take_answers(&mut self) -> Instant {
        self.answered.extend(self.queue.completions().map(|done| (done.context, done.ret)));
        Instant::now()
    }

    /// What an answer means for the ledger and for the slot.
    fn settle(&mut self, request: &Request, status: i32) {
        self.free.push(request.slot);
        if status != 0 {
            self.tally.error(format!("{:?} at {}: errno {}", request.op, request.offset, -status));
        }
        let Some(ledger) = &mut self.ledger else { return };
        if request.op == Op::Flush {
            return;
        }
        ledger.busy.remove(&request.offset);
        match (request.op, status) {
            (Op::Write, 0) if request.bytes == self.plan.block => {
                ledger.generations.insert(request.offset, request.generation);
            }
            (Op::Write, 0) => {}
            // The outcome is unknown: nothing to compare with any more.
            (Op::Write, _) => {
                let end = request.offset + request.bytes as u64;
                for block in (request.offset..end).step_by(self.plan.block) {
                    ledger.generations.remove(&block);
                }
            }
            (Op::Read, 0) if request.generation > 0 => {
                let block = self.slots.content(request.slot, request.bytes);
                let seed = self.plan.options.seed;
                let checked = check(block, &mut ledger.scratch, seed, request.offset, request.generation);
                self.tally.verified(checked);
            }
            _ => {}
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}
