//! Spreads a drain over the time in which the next layer fills: done as fast as can be, it would take a core, and the disk,
//! from the writes that arrive meanwhile, once a second.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use evolute_protocol::geometry::MIB;

/// A drain is to be done when the next layer has filled so much of its room (percent): writes must not be held up by a drain
/// that was spread.
const DONE_AT_PERCENT: u64 = 60;
/// However little arrives, a drain goes on by so much a second. A full layer takes two.
const BYTES_PER_SECOND_MIN: u64 = 64 * MIB;
/// What is not worth spreading.
const AT_ONCE: u64 = 4 * MIB;
/// Between two looks at how far the next layer is: what takes about as long as a short turn on a core.
const LOOK_BYTES: u64 = 512 << 10;
const PAUSE: Duration = Duration::from_millis(2);

/// What the shard's thread tells the checkpoint's.
#[derive(Debug, Default)]
pub struct Filling {
    /// Bytes in the layer that fills.
    bytes: AtomicU64,
    /// The store is being closed.
    hurry: AtomicBool,
}

impl Filling {
    pub fn set(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    pub fn hurry(&self) {
        self.hurry.store(true, Ordering::Relaxed);
    }
}

/// One drain's progress.
pub struct Pace {
    filling: Arc<Filling>,
    /// What the layer that fills may hold before it is due itself, or writes are held.
    room: u64,
    /// Bytes that this drain writes.
    all: u64,
    done: u64,
    next_look: u64,
    begun: Instant,
}

impl Pace {
    pub fn new(filling: Arc<Filling>, room: u64, all: u64) -> Self {
        Self { filling, room, all, done: 0, next_look: AT_ONCE, begun: Instant::now() }
    }

    /// So much more was written; waits while that is ahead of what is asked for.
    pub fn wrote(&mut self, bytes: u64) {
        self.done += bytes;
        if self.done < self.next_look {
            return;
        }
        self.next_look = self.done + LOOK_BYTES;
        while !self.filling.hurry.load(Ordering::Relaxed) && self.done > self.wanted(self.begun.elapsed()) {
            std::thread::sleep(PAUSE);
        }
    }

    fn wanted(&self, elapsed: Duration) -> u64 {
        if self.room == 0 {
            return u64::MAX;
        }
        let filled = u128::from(self.filling.bytes.load(Ordering::Relaxed)) * 100;
        let by_filling = u128::from(self.all) * filled / u128::from(self.room * DONE_AT_PERCENT);
        let by_time = u128::from(BYTES_PER_SECOND_MIN) * elapsed.as_millis() / 1000 + u128::from(AT_ONCE);
        u64::try_from(by_filling.max(by_time)).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use evolute_protocol::geometry::MIB;

    use super::{AT_ONCE, BYTES_PER_SECOND_MIN, Filling, Pace};

    #[test]
    fn a_drain_is_done_before_the_next_layer_is_and_takes_bounded_time_if_nothing_comes() {
        let filling = Arc::new(Filling::default());
        let pace = Pace::new(filling.clone(), 100 * MIB, 100 * MIB);
        assert_eq!(pace.wanted(Duration::ZERO), AT_ONCE);
        assert_eq!(pace.wanted(Duration::from_secs(1)), AT_ONCE + BYTES_PER_SECOND_MIN);
        assert!(pace.wanted(Duration::from_secs(2)) >= 100 * MIB);
        filling.set(30 * MIB);
        assert_eq!(pace.wanted(Duration::ZERO), 50 * MIB);
        filling.set(60 * MIB);
        assert_eq!(pace.wanted(Duration::ZERO), 100 * MIB);
        filling.set(0);
        assert!(
            Pace::new(filling, 0, 100 * MIB).wanted(Duration::ZERO) >= 100 * MIB,
            "writes are held already"
        );
    }

    /// It would never end if it waited: nothing fills.
    #[test]
    fn a_small_drain_and_one_that_is_hurried_wait_for_nothing() {
        let filling = Arc::new(Filling::default());
        let mut small = Pace::new(filling.clone(), 128 * MIB, AT_ONCE);
        (0..3).for_each(|_| small.wrote(MIB));
        filling.hurry();
        let mut long = Pace::new(filling, 128 * MIB, 1 << 50);
        (0..1000).for_each(|_| long.wrote(1 << 40));
    }
}
