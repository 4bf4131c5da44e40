//! How long to wait before something is tried again.

use std::time::Duration;

/// The shortest wait. An election takes hundreds of milliseconds, a leader's first entry a few: short enough not to
/// add to either.
pub const WAIT_MIN: Duration = Duration::from_millis(5);
/// The longest wait, so that a cluster that comes back is noticed within a fifth of a second.
pub const WAIT_MAX: Duration = Duration::from_millis(200);

/// [`WAIT_MIN`], doubled so many times, as far as [`WAIT_MAX`].
pub fn doubled(times: u32) -> Duration {
    WAIT_MIN.saturating_mul(1 << times.min(10)).min(WAIT_MAX)
}

/// Between three quarters of `wait` and all of it.
pub fn jittered(wait: Duration, jitter: u32) -> Duration {
    wait - wait / 4 * (jitter % 1024) / 1024
}

/// A number to spread waits with: clients that fail together should not come back together.
#[derive(Debug)]
pub struct Jitter(u32);

impl Default for Jitter {
    fn default() -> Self {
        Self(0x9e37_79b9 ^ std::process::id())
    }
}

impl Jitter {
    /// The next one (xorshift).
    pub fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }
}
