//! Turns on a core, for threads that share too few of them.

use std::time::Duration;

use rustix::process::{getpriority_process, setpriority_process};

/// Long enough for what a busy turn of a loop takes.
const SHORT: Duration = Duration::from_micros(500);
/// A third of what others get, when all want.
const BACKGROUND_NICER: i32 = 5;

/// This thread answers somebody: it wants its turn soon, not for long. From Linux 6.12 on one that wants less than whoever
/// runs is let in at once; before, this does nothing.
pub fn short_turns() {
    let size = u32::try_from(size_of::<libc::sched_attr>()).expect("some fifty bytes");
    // SAFETY: all of it are integers, for which zero is a value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes no more than `size` bytes to `attributes`, which lives and is ours.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if got == 0 {
        attributes.sched_runtime = u64::try_from(SHORT.as_nanos()).unwrap_or(0);
        // Threads that this one starts do not answer anybody.
        attributes.sched_flags |= u64::from(libc::SCHED_FLAG_RESET_ON_FORK.unsigned_abs());
        // SAFETY: the kernel reads what it has just written, and one field of ours. A refusal changes nothing, and costs
        // nothing but speed.
        let _ = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    }
}

/// What this thread does can wait, as long as it gets on: whoever answers somebody goes first.
pub fn background() {
    // To be nicer is refused to nobody.
    let _ = setpriority_process(None, getpriority_process(None).unwrap_or(0) + BACKGROUND_NICER);
}

#[cfg(test)]
mod tests {
    use rustix::process::getpriority_process;

    use super::{BACKGROUND_NICER, SHORT, background, short_turns};

    /// As the kernel tells it; those before 6.12 do not.
    fn slice() -> Option<u128> {
        let sched = std::fs::read_to_string("/proc/thread-self/sched").ok()?;
        let line = sched.lines().find(|line| line.starts_with("se.slice"))?;
        line.rsplit(':').next()?.trim().parse().ok()
    }

    #[test]
    fn a_thread_gets_what_it_asks_for_and_others_do_not() {
        let (nice, usual) = (getpriority_process(None).expect("ours"), slice());
        std::thread::spawn(move || {
            short_turns();
            assert_eq!(slice(), usual.map(|_| SHORT.as_nanos()));
            let child = std::thread::spawn(move || assert_eq!(slice(), usual));
            child.join().expect("as asserted");
            background();
            assert_eq!(getpriority_process(None), Ok((nice + BACKGROUND_NICER).min(19)));
        })
        .join()
        .expect("as asserted");
        assert_eq!((getpriority_process(None), slice()), (Ok(nice), usual));
    }
}
