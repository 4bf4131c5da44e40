//! Which faults count by now: their windows, and what was acknowledged in them.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::coverage::{AFTERMATH_NS, Covered, window};
use super::fault::Fault;
use super::supervise::{Run, TICK};

impl Run<'_> {
    pub(super) fn on_the_loads_clock(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.load.began).as_nanos()).expect("584 years")
    }

    /// Kinds of faults that do not count so far.
    pub(super) fn lacking(&self) -> Vec<Fault> {
        let least = self.options.window_acks;
        let lacks = |fault: Fault| {
            let all = self.history.iter().filter(|one| one.fault == fault);
            Covered::of(all, least).lacks(fault, least).is_some()
        };
        self.listed.iter().copied().filter(|&fault| lacks(fault)).collect()
    }

    /// It is going on, or its window is.
    pub(super) fn is_pending(&self, fault: Fault) -> bool {
        self.active.iter().any(|active| active.fault == fault)
            || self.history.iter().any(|one| one.fault == fault && one.happened && one.acks.is_none())
    }

    /// Counts what was acknowledged in windows that are over. A kind of fault that is not covered by now is tried again
    /// as soon as it can be.
    pub(super) fn close_windows(&mut self) {
        let now = self.on_the_loads_clock(Instant::now());
        self.acks.note(now, self.load.progress.acked_writes.load(Ordering::Relaxed));
        let mut closed = Vec::new();
        for one in self.history.iter_mut().filter(|one| one.happened && one.acks.is_none()) {
            let (from, until) = window(one);
            if now >= until {
                one.acks = Some(self.acks.between(from, until));
                closed.push(one.fault);
            }
        }
        if !closed.is_empty() {
            let lacking = self.lacking();
            closed.retain(|fault| lacking.contains(fault) && !self.deck.contains(fault));
            self.deck.extend(closed);
        }
    }

    /// The load goes on until the windows of all faults are over, or nothing can be acknowledged any more.
    pub(super) fn wait_for_windows(&mut self) {
        let deadline = Instant::now() + Duration::from_nanos(AFTERMATH_NS) + TICK;
        while Instant::now() < deadline
            && !self.must_end()
            && self.history.iter().any(|one| one.happened && one.acks.is_none())
        {
            std::thread::sleep(TICK);
            self.close_windows();
        }
        self.close_windows();
    }
}
