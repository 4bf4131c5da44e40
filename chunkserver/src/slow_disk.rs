//! Notices a disk that became slow or full, and gets its leaders out of the way of those who write.
//!
//! A slow disk does not fail: it answers everything, later. As a follower it harms nobody, because two others make a
//! majority; as a leader it holds up its copysets (`reference/reliability.md`, P15). So a chunkserver compares its
//! log's writes with what is usual for it, says so in its report (the control plane gives leaders to the healthy
//! only), and hands its leaders over. A full disk is no different: as a leader it refuses what the others have room for.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use evolute_protocol::id::CopysetId;
use evolute_raft::{Log, Role, WriteLatency};

use crate::chunk_store::ChunkStore;
use crate::copyset::registry::Registry;

/// How often it looks.
pub const WINDOW: Duration = Duration::from_secs(1);
/// Slower than usual by this, at least. A disk that is merely busy is not that much slower.
const SLOWER: u32 = 16;
/// No disk is slow below this: a write takes 0.1 ms on flash, 10 ms on a disk with a head.
const SLOW_MIN: Duration = Duration::from_millis(25);
/// Slow windows in a row before it counts: one can be a checkpoint, or a machine that was asleep.
const WINDOWS_TO_SLOW: u32 = 3;
/// Good windows in a row before it is trusted again.
const WINDOWS_TO_GOOD: u32 = 15;
/// A copyset is left alone for this long after a handover. Where all disks are slow, leaders do not chase each other.
const LEFT_ALONE: Duration = Duration::from_secs(10);
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
    /// Takes in one window; returns how long a write takes now, if that is slow.
    pub fn observe(&mut self, window: &WriteLatency) -> Option<Duration> {
        // A write that is not complete took at least as long as it has been waiting.
        let took = window.p50.max(window.waiting);
        if took.is_zero() {
            return self.slow;
        }
        let bound = self.usual.map_or(SLOW_MIN, |usual| (usual * SLOWER).max(SLOW_MIN));
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

/// Watches the log's disk for ever. `found` hears of every window: how long a write takes, if that is slow.
pub async fn watch(
    registry: Rc<Registry>,
    store: Rc<RefCell<ChunkStore>>,
    log: Log,
    found: impl Fn(&WriteLatency, Option<Duration>),
) {
    let mut detector = Detector::default();
    let mut handed_over: BTreeMap<CopysetId, Instant> = BTreeMap::new();
    let mut was_slow = false;
    loop {
        tokio::time::sleep(WINDOW).await;
        let window = log.take_latency();
        let slow = detector.observe(&window);
        found(&window, slow);
        if slow.is_some() != was_slow {
            was_slow = slow.is_some();
            match slow {
                Some(took) => tracing::warn!(?took, "the disk is slow: handing leaders over"),
                None => tracing::info!("the disk is as quick as usual again"),
            }
        }
        if slow.is_some() || store.borrow().usage().full {
            handed_over.retain(|_, at| at.elapsed() < LEFT_ALONE);
            hand_over(&registry, &mut handed_over);
        }
    }
}

/// Asks, for every copyset led here, the replica that is furthest to take over.
fn hand_over(registry: &Registry, handed_over: &mut BTreeMap<CopysetId, Instant>) {
    for copyset in registry.all() {
        let status = copyset.group().status();
        if status.role != Role::Leader || handed_over.contains_key(&copyset.id()) {
            continue;
        }
        let Some(to) = status.furthest_other().filter(|member| member.matched.is_some()) else { continue };
        handed_over.insert(copyset.id(), Instant::now());
        let to = to.member.replica;
        tokio::task::spawn_local(async move {
            if let Err(error) = copyset.group().transfer_leader(to).await {
                tracing::info!(copyset = %copyset.id(), %error, "the leader stays on a slow or full disk for now");
            }
        });
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
        (0..100).for_each(|_| assert_eq!(detector.observe(&window(p50_us, 0)), None));
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
            let found = (0..WINDOWS_TO_SLOW).map(|_| detector.observe(&window(now, 0))).last().flatten();
            assert_eq!(found.is_some(), slow, "usually {usual} µs, now {now} µs");
        }
    }

    #[test]
    fn one_long_write_is_not_a_slow_disk_and_a_write_that_never_ends_is() {
        let mut detector = used_to(300);
        for _ in 0..10 {
            assert_eq!(detector.observe(&window(400_000, 0)), None, "now and then");
            assert_eq!(detector.observe(&window(300, 0)), None);
        }
        let stuck =
            |seconds: u64| WriteLatency { waiting: Duration::from_secs(seconds), ..WriteLatency::default() };
        let found: Vec<_> = (1..=4).map(|seconds| detector.observe(&stuck(seconds)).is_some()).collect();
        assert_eq!(found, [false, false, true, true]);
    }

    #[test]
    fn a_slow_disk_is_trusted_again_only_after_a_while_and_idleness_proves_nothing() {
        let mut detector = used_to(300);
        (0..60).map(|_| detector.observe(&window(100_000, 0))).last().flatten().expect("slow");
        (0..60).for_each(|_| assert!(detector.observe(&WriteLatency::default()).is_some(), "idle"));
        for nth in 1..=WINDOWS_TO_GOOD {
            assert_eq!(detector.observe(&window(300, 0)).is_none(), nth == WINDOWS_TO_GOOD, "window {nth}");
        }
        let again = (0..WINDOWS_TO_SLOW).map(|_| detector.observe(&window(100_000, 0))).last().flatten();
        assert!(again.is_some(), "what was slow did not become usual");
    }
}
