//! Requests that fail, for the operator: one line when it begins and one when it is over, however many they are.
//!
//! The guest has one code for every error, so why is only here.

use std::time::{Duration, Instant};

use crate::backing::Failure;

/// Without a failure for so long it is over. Longer than a guest takes to try again.
const OVER_AFTER: Duration = Duration::from_secs(30);

/// A time in which requests fail for the same reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Episode {
    failure: Failure,
    since: Instant,
    last: Instant,
    pub count: u64,
}

impl Episode {
    fn over_at(&self) -> Instant {
        self.last + OVER_AFTER
    }

    pub fn failure(&self) -> Failure {
        self.failure
    }

    pub fn lasted(&self) -> Duration {
        self.last.saturating_duration_since(self.since)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Failing(Vec<Episode>);

impl Failing {
    /// A request failed. True: the first one for this reason.
    pub fn note(&mut self, failure: Failure, now: Instant) -> bool {
        if let Some(episode) = self.0.iter_mut().find(|episode| episode.failure == failure) {
            episode.count += 1;
            episode.last = now;
            return false;
        }
        self.0.push(Episode { failure, since: now, last: now, count: 1 });
        true
    }

    /// One that is over, forgotten.
    pub fn take_over(&mut self, now: Instant) -> Option<Episode> {
        let at = self.0.iter().position(|episode| episode.over_at() <= now)?;
        Some(self.0.remove(at))
    }

    /// When one may be over.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.iter().map(Episode::over_at).min()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Failing, OVER_AFTER};
    use crate::backing::Failure;

    #[test]
    fn thousands_of_failures_are_one_beginning_and_one_end_with_their_number() {
        let begun = Instant::now();
        let mut failing = Failing::default();
        assert_eq!(failing.deadline(), None);
        let said = (0..17_972).filter(|_| failing.note(Failure::NoSpace, begun)).count();
        assert_eq!(said, 1);
        assert!(failing.note(Failure::Io, begun), "another reason is another matter");
        let last = begun + Duration::from_secs(29);
        assert!(!failing.note(Failure::NoSpace, last));
        assert_eq!(failing.deadline(), Some(begun + OVER_AFTER));
        let io = failing.take_over(begun + OVER_AFTER).expect("over");
        assert_eq!(io.failure(), Failure::Io);
        assert!(failing.take_over(begun + OVER_AFTER).is_none());
        let full = failing.take_over(last + OVER_AFTER).expect("over");
        assert_eq!(full.failure(), Failure::NoSpace);
        assert_eq!((full.count, full.lasted(), failing.deadline()), (17_973, Duration::from_secs(29), None));
        assert!(failing.note(Failure::NoSpace, last + OVER_AFTER), "it begins anew");
    }
}
