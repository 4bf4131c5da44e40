//! Lines for the log that others can provoke: the first ones at once, then few, and how many were kept back.

use std::time::{Duration, Instant};

/// Lines that may come one after the other.
const AT_ONCE: u32 = 20;
/// Then one in so long: 2880 a day.
const EVERY: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug)]
pub struct Sparingly {
    left: u32,
    refilled: Instant,
    unsaid: u64,
}

impl Sparingly {
    pub fn new(now: Instant) -> Sparingly {
        Sparingly { left: AT_ONCE, refilled: now, unsaid: 0 }
    }

    /// Writes a line, or does not. The line is told how many before it were not written, if any.
    pub fn tell(&mut self, now: Instant, line: impl FnOnce(Option<u64>)) {
        let more = now.duration_since(self.refilled).as_secs() / EVERY.as_secs();
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        if more > 0 {
            self.left = self.left.saturating_add(more).min(AT_ONCE);
            self.refilled = now;
        }
        if self.left == 0 {
            self.unsaid += 1;
            return;
        }
        self.left -= 1;
        let unsaid = std::mem::take(&mut self.unsaid);
        line((unsaid > 0).then_some(unsaid));
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{AT_ONCE, EVERY, Sparingly};

    #[test]
    fn the_first_lines_are_written_and_then_few_with_the_number_of_those_that_were_not() {
        let now = Instant::now();
        let mut lines = Sparingly::new(now);
        let mut tell = |at| {
            let mut told = None;
            lines.tell(at, |unsaid| told = Some(unsaid));
            told
        };
        for _ in 0..AT_ONCE {
            assert_eq!(tell(now), Some(None));
        }
        for _ in 0..1000 {
            assert_eq!(tell(now), None);
        }
        assert_eq!(tell(now + EVERY), Some(Some(1000)));
        assert_eq!(tell(now + EVERY), None);
        let day = now + Duration::from_secs(86400);
        let told: Vec<_> = (0..1000).filter_map(|_| tell(day)).collect();
        assert_eq!((told.len(), told[0], told[1]), (AT_ONCE as usize, Some(1), None));
    }
}
