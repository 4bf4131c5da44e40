//! Notices a disk that became slow or full, and gets its leaders out of the way of those who write.
//!
//! A slow disk does not fail: it answers everything, later. As a follower it harms nobody, because two others make a
//! majority; as a leader it holds up its copysets (`reference/reliability.md`, P15). So a chunkserver compares its
//! log's writes with what is usual for it, and with what is usual for the others, as the control plane says: one that was
//! slow from its first minute knows nothing better. It says so in its report (the control plane gives leaders to the
//! healthy only), and hands its leaders over (`handover.rs`). A full disk is no different.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use evolute_raft::{Log, WriteLatency};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::chunk_store::ChunkStore;
use crate::copyset::registry::Registry;
use crate::handover::Handovers;
use crate::others::{Others, Trouble};

/// How often it looks.
pub const WINDOW: Duration = Duration::from_secs(1);
/// How soon it looks again when a copyset that should go cannot go yet: its new leader has heard nobody.
const SOON: Duration = Duration::from_millis(100);
/// Slower than usual by this, at least. A disk that is merely busy is not that much slower.
const SLOWER: u32 = 16;
/// The same of what is usual for the others now: they are as busy.
const SLOWER_THAN_OTHERS: u32 = 8;
/// No disk is slow below this: a write takes 0.1 ms on flash, 10 ms on a disk with a head.
const SLOW_MIN: Duration = Duration::from_millis(25);
/// Slow windows in a row before it counts: one can be a checkpoint, or a machine that was asleep.
const WINDOWS_TO_SLOW: u32 = 3;
/// Good windows in a row before it is trusted again.
const WINDOWS_TO_GOOD: u32 = 15;
/// Each window moves what is usual by one part in this many.
const USUAL_WEIGHT: u32 = 32;

/// What is usual for this disk, and whether it is slow now.
#[derive(Debug, Default)]
pub struct Detector {
    usual: Option<Duration>,
    slow_windows: u32,
    good_windows: u32,
    slow: Option<Duration>,
}

impl Detector {
    /// Takes in one window, and what a write usually takes the others; returns how long one takes now, if that is slow.
    pub fn observe(&mut self, window: &WriteLatency, others: Option<Duration>) -> Option<Duration> {
        // A write that is not complete took at least as long as it has been waiting.
        let took = window.p50.max(window.waiting);
        if took.is_zero() {
            return self.slow;
        }
        let bounds = [self.usual.map(|usual| usual * SLOWER), others.map(|usual| usual * SLOWER_THAN_OTHERS)];
        // With nothing to compare it with, the least that could be slow is.
        let bound = bounds.into_iter().flatten().min().unwrap_or(SLOW_MIN).max(SLOW_MIN);
        if took > bound {
            self.good_windows = 0;
            self.slow_windows += 1;
            if self.slow_windows >= WINDOWS_TO_SLOW {
                self.slow = Some(took);
            }
        } else {
            self.slow_windows = 0;
            self.good_windows += 1;
            if self.good_windows >= WINDOWS_TO_GOOD {
                self.slow = None;
            }
            // Only good windows say what is usual: a disk must not become slow by and by and call that usual.
            let usual = self.usual.unwrap_or(took);
            self.usual = Some(usual - usual / USUAL_WEIGHT + took / USUAL_WEIGHT);
        }
        self.slow
    }
}

/// What a look found.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    pub window: WriteLatency,
    /// How long a write takes, if that is slow.
    pub slow: Option<Duration>,
    pub full: bool,
}

/// Watches the disk for ever. `found` hears of every window; `led` tells of a copyset that is led here from now on.
pub async fn watch(
    registry: Rc<Registry>,
    store: Rc<RefCell<ChunkStore>>,
    log: Log,
    others: Rc<Others>,
    led: Rc<Notify>,
    found: impl Fn(&Found),
) {
    let mut detector = Detector::default();
    let mut handovers = Handovers::default();
    let mut trouble = Trouble::default();
    let mut window_ends = Instant::now() + WINDOW;
    let mut look_at = window_ends;
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(look_at) => {}
            () = led.notified() => {}
        }
        if Instant::now() >= window_ends {
            window_ends = Instant::now() + WINDOW;
            let window = log.take_latency();
            let slow = detector.observe(&window, others.usual_write());
            let full = store.borrow().usage().full || log.is_full();
            found(&Found { window, slow, full });
            if slow.is_some() != trouble.slow {
                match slow {
                    Some(took) => tracing::warn!(?took, "the disk is slow: handing leaders over"),
                    None => tracing::info!("the disk is as quick as usual again"),
                }
            }
            if full != trouble.full {
                match full {
                    true => tracing::warn!("the disk is full: handing leaders over"),
                    false => tracing::info!("the disk has room again"),
                }
            }
            trouble = Trouble { full, slow: slow.is_some() };
        }
        let can_lead = trouble == Trouble::default();
        let soon = !can_lead && handovers.offer(&registry, &others, trouble);
        look_at = if soon { window_ends.min(Instant::now() + SOON) } else { window_ends };
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use evolute_raft::WriteLatency;

    use super::{Detector, WINDOWS_TO_GOOD, WINDOWS_TO_SLOW};

    fn window(p50_us: u64, waiting_us: u64) -> WriteLatency {
        WriteLatency {
            count: 100,
            p50: Duration::from_micros(p50_us),
            p99: Duration::from_micros(p50_us * 4),
            waiting: Duration::from_micros(waiting_us),
        }
    }

    fn used_to(p50_us: u64) -> Detector {
        let mut detector = Detector::default();
        (0..100).for_each(|_| assert_eq!(detector.observe(&window(p50_us, 0), None), None));
        detector
    }

    #[test]
    fn a_disk_is_slow_by_its_own_measure_and_not_below_what_any_disk_may_take() {
        for (usual, now, slow) in [
            (200, 30_000, true),
            (200, 20_000, false),
            (8_000, 100_000, false),
            (8_000, 200_000, true),
            (100, 50_000, true),
        ] {
            let mut detector = used_to(usual);
            let found =
                (0..WINDOWS_TO_SLOW).map(|_| detector.observe(&window(now, 0), None)).last().flatten();
            assert_eq!(found.is_some(), slow, "usually {usual} µs, now {now} µs");
        }
    }

    #[test]
    fn one_long_write_is_not_a_slow_disk_and_a_write_that_never_ends_is() {
        let mut detector = used_to(300);
        for _ in 0..10 {
            assert_eq!(detector.observe(&window(400_000, 0), None), None, "now and then");
            assert_eq!(detector.observe(&window(300, 0), None), None);
        }
        let stuck =
            |seconds: u64| WriteLatency { waiting: Duration::from_secs(seconds), ..WriteLatency::default() };
        let found: Vec<_> =
            (1..=4).map(|seconds| detector.observe(&stuck(seconds), None).is_some()).collect();
        assert_eq!(found, [false, false, true, true]);
    }

    #[test]
    fn a_slow_disk_is_trusted_again_only_after_a_while_and_idleness_proves_nothing() {
        let mut detector = used_to(300);
        (0..60).map(|_| detector.observe(&window(100_000, 0), None)).last().flatten().expect("slow");
        (0..60).for_each(|_| assert!(detector.observe(&WriteLatency::default(), None).is_some(), "idle"));
        for nth in 1..=WINDOWS_TO_GOOD {
            assert_eq!(
                detector.observe(&window(300, 0), None).is_none(),
                nth == WINDOWS_TO_GOOD,
                "window {nth}"
            );
        }
        let again =
            (0..WINDOWS_TO_SLOW).map(|_| detector.observe(&window(100_000, 0), None)).last().flatten();
        assert!(again.is_some(), "what was slow did not become usual");
    }

    /// It has no better past, so only the others can tell.
    #[test]
    fn a_disk_that_was_never_quick_is_slow_beside_others_that_are() {
        let as_quick_as = |others_ms: u64| Some(Duration::from_millis(others_ms));
        for (now_ms, others, slow) in [
            (100, as_quick_as(1), true),
            (100, as_quick_as(12), true),
            (100, as_quick_as(13), false),
            (20, as_quick_as(1), false),
        ] {
            let mut detector = used_to(20_000);
            // Its first windows, before anything was heard, were not much better.
            (0..100).for_each(|_| assert_eq!(detector.observe(&window(100_000, 0), None), None));
            let now = window(now_ms * 1000, 0);
            let found = (0..WINDOWS_TO_SLOW).map(|_| detector.observe(&now, others)).last().flatten();
            assert_eq!(found.is_some(), slow, "{now_ms} ms, the others {others:?}");
        }
        let mut fresh = Detector::default();
        let found: Vec<_> =
            (0..3).map(|_| fresh.observe(&window(100_000, 0), as_quick_as(1)).is_some()).collect();
        assert_eq!(found, [false, false, true], "right after its start");
        let mut busy = Detector::default();
        (0..60).for_each(|_| assert_eq!(busy.observe(&window(100_000, 0), as_quick_as(60)), None, "all are"));
    }
}
