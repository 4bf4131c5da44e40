//! Lines for the log that others can provoke: the first ones at once, then few, and how many were kept back.

use std::time::{Duration, Instant};

/// Lines that may come one after the other.
const AT_ONCE: u32 = 20;
/// Then one in so long: 2880 a day.
const EVERY: Duration = Duration::from_secs(30);

/// For somebody new, whatever the one before has used up.
const FOR_A_NEW_ONE: u32 = 4;
/// Not for each of those who take turns.
const NEW_ONE_EVERY: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub struct Sparingly {
    left: u32,
    refilled: Instant,
    new_one: Option<Instant>,
    unsaid: u64,
}

impl Sparingly {
    pub fn new(now: Instant) -> Sparingly {
        Sparingly { left: AT_ONCE, refilled: now, new_one: None, unsaid: 0 }
    }

    /// The lines are about somebody else from now on.
    pub fn somebody_new(&mut self, now: Instant) {
        if self.new_one.is_none_or(|at| now.duration_since(at) >= NEW_ONE_EVERY) {
            self.new_one = Some(now);
            self.left = self.left.max(FOR_A_NEW_ONE);
        }
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

    use super::{AT_ONCE, EVERY, FOR_A_NEW_ONE, NEW_ONE_EVERY, Sparingly};

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
        // Somebody who used up all of it does not mute the next one.
        let mut of_the_next = |at| {
            lines.somebody_new(at);
            let mut told = 0;
            (0..1000).for_each(|_| lines.tell(at, |_| told += 1));
            told
        };
        assert_eq!((of_the_next(day), of_the_next(day)), (FOR_A_NEW_ONE, 0));
        assert_eq!(of_the_next(day + NEW_ONE_EVERY), FOR_A_NEW_ONE);
    }
}
