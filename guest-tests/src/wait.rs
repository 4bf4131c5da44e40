//! Waiting for a condition, never for a time.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// How often a condition is looked at. A tenth of what a person would notice, and no load on two cores.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `look` gives something. `what` completes the sentence "waited 10 s for …".
pub fn until<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if started.elapsed() > deadline {
            bail!("waited {} s for {what}, in vain", deadline.as_secs());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
