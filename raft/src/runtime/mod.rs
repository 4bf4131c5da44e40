//! openraft's `AsyncRuntime` for one thread: tokio's tasks and timers, channels of `Rc` and `RefCell`.
//!
//! Half the cost of a Raft round with tokio's own channels is their atomics and locks
//! (`reference/rust-stack.md` §2.5); a group never leaves its thread, so it needs none. Valid only with openraft's
//! `single-threaded` feature: nothing here is `Send`.
//!
//! A guard of [`watch`]'s `borrow_watched` must not live over a send on the same channel: the `RefCell` panics.

mod mpsc;
pub mod oneshot;
mod watch;

use std::future::Future;
use std::time::Duration;

use openraft_rt::{AsyncRuntime, Instant as _, Mutex, OptionalSend};
use openraft_rt_tokio::{TokioInstant, TokioRuntime};

/// The runtime of a thread on which groups live.
pub struct LocalRt(tokio::runtime::LocalRuntime);

impl std::fmt::Debug for LocalRt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LocalRt")
    }
}

/// openraft holds its few mutexes for a moment each: the free case must be cheap, the other may be tokio's.
pub struct LocalMutex<T>(tokio::sync::Mutex<T>);

impl<T: OptionalSend + 'static> Mutex<T> for LocalMutex<T> {
    type Guard<'a> = tokio::sync::MutexGuard<'a, T>;

    fn new(value: T) -> Self {
        Self(tokio::sync::Mutex::new(value))
    }

    async fn lock(&self) -> Self::Guard<'_> {
        match self.0.try_lock() {
            Ok(guard) => guard,
            Err(_) => self.0.lock().await,
        }
    }
}

/// Each group has a tick in openraft, every 13/64 of a heartbeat, 30 ms with ours, that begins at a random time. A hundred
/// groups would wake their thread a thousand times a second, each time with cold caches, and send their heartbeats one by
/// one. So ticks of one thread come together, on a grid of this width; other threads, where the same groups have their other
/// members, have another one. Two looks at an election's clock may be nearly two ticks apart by this.
pub const GRID: Duration = Duration::from_millis(32);
/// What is nearer than this is no tick: openraft also sleeps, for the time of one turn, before it passes on that the log is
/// written, and the writes wait for that.
const AT_ONCE: Duration = Duration::from_millis(2);

thread_local! {
    static GRID_BEGIN: TokioInstant = TokioInstant::now();
}

/// The first line of the grid at or after `deadline`.
fn together(now: TokioInstant, deadline: TokioInstant) -> TokioInstant {
    let begin = GRID_BEGIN.with(|begin| *begin);
    if deadline < begin || deadline < now + AT_ONCE {
        return deadline;
    }
    let past = (deadline - begin).as_nanos() % GRID.as_nanos();
    let past = Duration::from_nanos(u64::try_from(past).expect("less than the grid is wide"));
    if past.is_zero() { deadline } else { deadline + (GRID - past) }
}

impl AsyncRuntime for LocalRt {
    type JoinError = tokio::task::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = tokio::task::JoinHandle<T>;
    type Sleep = tokio::time::Sleep;
    type Instant = TokioInstant;
    type TimeoutError = tokio::time::error::Elapsed;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = tokio::time::Timeout<T>;
    type ThreadLocalRng = rand::rngs::ThreadRng;
    type Mpsc = mpsc::LocalMpsc;
    type Watch = watch::LocalWatch;
    type Oneshot = oneshot::LocalOneshot;
    type Mutex<T: OptionalSend + 'static> = LocalMutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        tokio::task::spawn_local(future)
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        tokio::time::sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        TokioRuntime::sleep_until(together(TokioInstant::now(), deadline))
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(
        duration: Duration,
        future: F,
    ) -> Self::Timeout<R, F> {
        tokio::time::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(
        deadline: Self::Instant,
        future: F,
    ) -> Self::Timeout<R, F> {
        TokioRuntime::timeout_at(deadline, future)
    }

    fn is_panic(error: &Self::JoinError) -> bool {
        error.is_panic()
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        rand::rng()
    }

    fn new(_threads: usize) -> Self {
        Self(crate::thread::local_runtime().expect("the kernel gives a thread its epoll and eventfd"))
    }

    fn block_on<F: Future<Output = T>, T>(&mut self, future: F) -> T {
        self.0.block_on(future)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use openraft_rt::Instant as _;
    use openraft_rt_tokio::TokioInstant;

    use super::{GRID, together};

    /// As openraft does it: the next of its own times after the last tick, whenever that came.
    #[test]
    fn ticks_of_many_groups_come_together_and_often_enough() {
        let period = Duration::from_nanos(30_468_750);
        let (begin, mut wakes) = (TokioInstant::now() + GRID, BTreeSet::new());
        for group in 0..50_u32 {
            let first = begin + period * group / 50;
            let (mut now, mut next) = (begin, first);
            for late in (0..20).cycle().take(300) {
                let tick = together(now, next);
                assert!(tick >= next && tick < next + GRID);
                wakes.insert((tick - begin).as_nanos());
                now = tick + Duration::from_micros(50) * late;
                let periods = (now - first).as_nanos() / period.as_nanos() + 1;
                next = first + period * u32::try_from(periods).expect("few");
            }
        }
        // Some deadlines fall right behind a line of the grid, and are left alone.
        assert!(wakes.len() < 50 * 300 / 5, "{} wake-ups for 50 groups", wakes.len());
        let (now, soon) = (TokioInstant::now(), Duration::from_micros(1));
        assert_eq!(together(now, now + soon), now + soon);
    }

    #[test]
    fn openraft_accepts_it_as_a_runtime() {
        openraft_rt::testing::Suite::<super::LocalRt>::test_all();
    }
}
