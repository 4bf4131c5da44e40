//! Whether to look once more before sleeping: only while it pays.
//!
//! To wake a core that sleeps costs 5 to 40 µs on a virtual machine, as much as the work it is for. Looking costs nothing
//! while nobody else wants the core, and every look begins by letting others run (`sched_yield`). When they then run for
//! long, the machine is full, and there is nothing to gain: whoever has let others run waits for its turn like everybody,
//! where one who is woken goes first.

use std::time::{Duration, Instant};

/// With more requests out than these, something is to be done nearly always, and who looks only takes the core from
/// those it waits for.
const OUT_MAX: usize = 2;
/// Others that run for longer than this are busy: the thread of a chunkserver that has one request needs less.
const CROWDED: Duration = Duration::from_micros(150);
/// For how long nobody looks after that: twice as long each time, half as long for each look that found something.
const REST_MIN: Duration = Duration::from_millis(4);
const REST_MAX: Duration = Duration::from_secs(1);

/// Learns from how long the last wait took, and from how long others took when they were let.
#[derive(Debug)]
pub(crate) struct Spin {
    /// What a wait may cost; zero: never look.
    max: Duration,
    /// The last wait ended within `max`: the next one may, too.
    pays: bool,
    /// Since when there is nothing to do.
    idle_since: Option<Instant>,
    rest: Duration,
    rest_until: Option<Instant>,
}

impl Spin {
    pub fn new(max: Duration) -> Self {
        Self { max, pays: false, idle_since: None, rest: REST_MIN, rest_until: None }
    }

    /// There is nothing to do, and `out` requests are on their way: look again, rather than sleep?
    pub fn goes_on(&mut self, out: usize, now: Instant) -> bool {
        if self.max.is_zero() {
            return false;
        }
        let since = *self.idle_since.get_or_insert(now);
        self.rest_until = self.rest_until.filter(|until| now < *until);
        self.pays
            && out <= OUT_MAX
            && self.rest_until.is_none()
            && now.saturating_duration_since(since) < self.max
    }

    /// Others were let run between these two.
    pub fn let_others(&mut self, from: Instant, to: Instant) {
        if to.saturating_duration_since(from) > CROWDED {
            self.rest_until = Some(to + self.rest);
            self.rest = (self.rest * 2).min(REST_MAX);
        }
    }

    /// There was something to do.
    pub fn worked(&mut self, now: Instant) {
        if let Some(since) = self.idle_since.take() {
            self.pays = now.saturating_duration_since(since) < self.max;
            if self.pays && self.rest_until.is_none() {
                self.rest = (self.rest / 2).max(REST_MIN);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{CROWDED, OUT_MAX, REST_MAX, REST_MIN, Spin};

    const MAX: Duration = Duration::from_micros(50);

    /// One that has just waited that long, and when.
    fn waited(wait: Duration, max: Duration) -> (Spin, Instant) {
        let begin = Instant::now();
        let mut spin = Spin::new(max);
        assert!(!spin.goes_on(0, begin), "nothing was learned yet");
        spin.worked(begin + wait);
        (spin, begin + wait)
    }

    #[test]
    fn short_waits_are_looked_through_and_long_ones_slept_through() {
        let looks = |wait, max, out| {
            let (mut spin, now) = waited(wait, max);
            spin.goes_on(out, now)
        };
        assert!(looks(MAX / 2, MAX, 1));
        assert!(!looks(MAX * 2, MAX, 1));
        assert!(!looks(MAX / 2, MAX, OUT_MAX + 1), "busy anyway");
        assert!(!looks(Duration::ZERO, Duration::ZERO, 1), "switched off");
    }

    #[test]
    fn a_look_ends_when_its_time_is_over_and_sleeping_through_it_is_learned() {
        let (mut spin, begin) = waited(Duration::ZERO, MAX);
        assert!(spin.goes_on(1, begin));
        assert!(spin.goes_on(1, begin + MAX / 2));
        assert!(!spin.goes_on(1, begin + MAX), "it sleeps now");
        spin.worked(begin + MAX * 3);
        assert!(!spin.goes_on(1, begin + MAX * 3), "the last one was not short");
        spin.worked(begin + MAX * 3 + MAX / 2);
        assert!(spin.goes_on(1, begin + MAX * 4), "it is worth it again");
    }

    #[test]
    fn who_is_kept_waiting_by_others_rests_longer_each_time_and_less_when_looking_finds_something() {
        let (mut spin, mut now) = waited(Duration::ZERO, MAX);
        spin.let_others(now, now + CROWDED);
        assert!(spin.goes_on(1, now), "that is no crowd");
        for rest in [REST_MIN, REST_MIN * 2, REST_MIN * 4] {
            spin.let_others(now, now + CROWDED * 2);
            now += CROWDED * 2;
            spin.worked(now);
            assert!(!spin.goes_on(1, now + rest - MAX));
            spin.worked(now + rest - MAX);
            assert!(spin.goes_on(1, now + rest));
            now += rest;
        }
        (0..20).for_each(|_| spin.let_others(now, now + CROWDED * 2));
        assert_eq!(spin.rest, REST_MAX);
        now += REST_MAX * 2;
        for _ in 0..20 {
            spin.goes_on(1, now);
            spin.worked(now);
        }
        assert_eq!(spin.rest, REST_MIN);
    }
}
