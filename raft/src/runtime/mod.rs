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

use openraft_rt::{AsyncRuntime, Mutex, OptionalSend};
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
        TokioRuntime::sleep_until(deadline)
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
    #[test]
    fn openraft_accepts_it_as_a_runtime() {
        openraft_rt::testing::Suite::<super::LocalRt>::test_all();
    }
}
