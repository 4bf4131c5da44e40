//! Memory that a front end shares with us, and what happens when it is not there any more.
//!
//! Whoever shares a file can cut it off, and a tmpfs or a pool of huge pages can be used up before a page is touched for the
//! first time. Then the kernel sends SIGBUS to whoever touches it, which ends a process and with it all of its disks. Here
//! it ends a session: the place of the whole mapping is taken by zeroes of ours, the session's [`Lifeline`] is marked, and
//! the thread goes on.
//!
//! What always holds:
//!
//! - The mark is set before the first of those zeroes can be read. So whoever has used shared memory and *then* finds the
//!   session alive has used what the front end and its guest put there. Every use that goes further (a head that is marked as
//!   taken, a request that is submitted, a batch that is published, an acknowledgement) looks in between.
//! - A SIGBUS anywhere else does what it did before.

use std::ffi::{c_int, c_void};
use std::os::fd::AsFd;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use vm_memory::MmapRegion;

use super::lifeline::{Cause, Lifeline};

/// One mapping, as the handler sees it. Slots are used again and never freed, so the handler may walk them at any time.
#[derive(Debug)]
struct Slot {
    start: AtomicUsize,
    /// Zero: the slot is free.
    end: AtomicUsize,
    line: AtomicPtr<Lifeline>,
    cause: AtomicU8,
    next: Option<&'static Slot>,
}

/// The newest slot; each knows the one before it.
static NEWEST: AtomicPtr<Slot> = AtomicPtr::new(ptr::null_mut());
static FREE: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

fn free() -> MutexGuard<'static, Vec<&'static Slot>> {
    FREE.lock().expect("nothing panics with it")
}

/// A mapping that may go away. Dropped before it is unmapped: afterwards its addresses are somebody else's.
#[derive(Debug)]
pub struct Watch {
    slot: &'static Slot,
    _line: Arc<Lifeline>,
}

impl Watch {
    pub fn new(map: &MmapRegion<()>, line: &Arc<Lifeline>, cause: Cause) -> Watch {
        BEFORE.get_or_init(install);
        let mut free = free();
        let slot = free.pop().unwrap_or_else(|| {
            let slot = Box::leak(Box::new(Slot {
                start: AtomicUsize::new(0),
                end: AtomicUsize::new(0),
                line: AtomicPtr::new(ptr::null_mut()),
                cause: AtomicU8::new(0),
                // SAFETY: null, or a slot, which is never freed.
                next: unsafe { NEWEST.load(Ordering::Acquire).as_ref() },
            }));
            // The lock is held: nobody else puts one there.
            NEWEST.store(slot, Ordering::Release);
            slot
        });
        let start = map.as_ptr().expose_provenance();
        slot.line.store(Arc::as_ptr(line).cast_mut(), Ordering::SeqCst);
        slot.cause.store(cause as u8, Ordering::SeqCst);
        slot.start.store(start, Ordering::SeqCst);
        slot.end.store(start + map.size().next_multiple_of(page_bytes(map)), Ordering::SeqCst);
        Watch { slot, _line: line.clone() }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.slot.end.store(0, Ordering::SeqCst);
        free().push(self.slot);
    }
}

/// What the length of a mapping is a multiple of. The kernel rounds those of ordinary pages by itself.
fn page_bytes(map: &MmapRegion<()>) -> usize {
    let huge = map.file_offset().and_then(|of| rustix::fs::fstatfs(of.file().as_fd()).ok());
    let huge = huge.filter(|of| of.f_type as u64 & 0xffff_ffff == libc::HUGETLBFS_MAGIC as u64 & 0xffff_ffff);
    huge.and_then(|of| usize::try_from(of.f_bsize).ok()).unwrap_or(1)
}

fn install() -> libc::sigaction {
    // SAFETY: all-zero is a valid `sigaction`, and every pointer is to a local that outlives its call. The handler does only
    // what is allowed in one: atomics, mmap, sigaction, raise. It is installed after `BEFORE` can be told, except
    // that the first Watch is not made yet: a fault in between is nobody's mapping, and the handler waits for nothing.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before);
        let mut ours: libc::sigaction = std::mem::zeroed();
        ours.sa_sigaction = on_fault as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &raw const ours, ptr::null_mut());
        before
    }
}

extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo that lives as long as the handler runs; SIGBUS from the kernel has an address.
    // What is interrupted must find its errno again.
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        let from_kernel = (*info).si_code > 0;
        if !(from_kernel && is_substituted((*info).si_addr().addr())) {
            // As if we were not here: it faults again at once, or is raised again if nobody faulted.
            let default = std::mem::zeroed();
            libc::sigaction(signal, BEFORE.get().unwrap_or(&default), ptr::null_mut());
            if !from_kernel {
                libc::raise(signal);
            }
        }
        *errno = saved;
    }
}

/// Whether the address is in a shared mapping, and zeroes are there now.
fn is_substituted(addr: usize) -> bool {
    // SAFETY: null, or a slot, which is never freed.
    let mut next = unsafe { NEWEST.load(Ordering::SeqCst).as_ref() };
    while let Some(slot) = next {
        next = slot.next;
        let (end, start) = (slot.end.load(Ordering::SeqCst), slot.start.load(Ordering::SeqCst));
        // A slot that is given to another mapping just now has no end in between.
        if start <= addr && addr < end && slot.end.load(Ordering::SeqCst) == end {
            return slot.substitute(start, end);
        }
    }
    false
}

impl Slot {
    /// Whoever faulted uses the mapping, so it stays what it is meanwhile.
    fn substitute(&self, start: usize, end: usize) -> bool {
        // SAFETY: the `Watch` of this slot keeps the lifeline alive, and whoever faulted keeps the `Watch`.
        unsafe { &*self.line.load(Ordering::SeqCst) }.end_by(self.cause.load(Ordering::SeqCst));
        let (all, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
        );
        // SAFETY: exactly the range of a mapping of ours, which everybody uses through volatile or atomic access and
        // nobody expects to keep its contents. The kernel replaces it in one step.
        let put =
            unsafe { libc::mmap(ptr::with_exposed_provenance_mut(start), end - start, all, flags, -1, 0) };
        put != libc::MAP_FAILED
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::sync::Arc;

    use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

    use super::Watch;
    use crate::device::lifeline::{Cause, Lifeline};

    const BYTES: usize = 64 << 10;

    fn map(file: &File) -> MmapRegion<()> {
        let file = file.try_clone().expect("a descriptor");
        MmapRegion::from_file(FileOffset::new(file, 0), BYTES).expect("mapped")
    }

    fn memory() -> File {
        let file = rustix::fs::memfd_create("shared", rustix::fs::MemfdFlags::CLOEXEC).expect("memory");
        let file = File::from(file);
        file.set_len(BYTES as u64).expect("memory");
        file
    }

    fn byte(of: &MmapRegion<()>, at: usize) -> u8 {
        of.as_volatile_slice().read_obj(at).expect("inside")
    }

    /// Many at a time and one after the other, so that slots are used again: each fault is its own session's.
    #[test]
    fn what_was_cut_off_reads_as_zeroes_and_ends_its_own_session_alone() {
        let file = memory();
        for _ in 0..3 {
            file.set_len(BYTES as u64).expect("memory");
            let lines: Vec<_> = (0..4).map(|_| Arc::new(Lifeline::default())).collect();
            let maps: Vec<_> = lines.iter().map(|_| map(&file)).collect();
            let watches: Vec<_> = maps
                .iter()
                .zip(&lines)
                .map(|(map, line)| Watch::new(map, line, Cause::InflightGone))
                .collect();
            maps[0].as_volatile_slice().write_obj(7u8, BYTES - 1).expect("inside");
            assert_eq!((byte(&maps[2], BYTES - 1), lines[2].cause()), (7, None));
            file.set_len(4096).expect("its owner's doing");
            assert_eq!(byte(&maps[2], BYTES - 1), 0);
            let told: Vec<_> = lines.iter().map(|line| line.cause()).collect();
            assert_eq!(told, [None, None, Some(Cause::InflightGone), None]);
            maps[2].as_volatile_slice().write_obj(9u8, 0).expect("inside");
            assert_eq!((byte(&maps[2], 0), byte(&maps[1], 0)), (9, 0), "nothing goes to the file any more");
            drop(watches);
        }
    }

    /// Whoever runs this test anew with this set is to die.
    const DIES: &str = "EVOLUTE_TEST_DIES_OF_SIGBUS";

    #[test]
    fn a_fault_elsewhere_ends_the_process_as_before() {
        let file = memory();
        let (watched, other) = (map(&file), map(&file));
        let line = Arc::new(Lifeline::default());
        let _watch = Watch::new(&watched, &line, Cause::MemoryGone);
        match std::env::var(DIES).as_deref() {
            Ok("fault") => {
                file.set_len(0).expect("its owner's doing");
                byte(&other, 0);
                unreachable!("it has died");
            }
            Ok(_) => {
                // SAFETY: a signal to ourselves.
                unsafe { libc::raise(libc::SIGBUS) };
                // SAFETY: the runtime's own handler takes the first one for a fault, and lets that come again.
                unsafe { libc::raise(libc::SIGBUS) };
                unreachable!("it has died");
            }
            Err(_) => {}
        }
        for how in ["fault", "raise"] {
            let mut again = Command::new(std::env::current_exe().expect("this program"));
            again.args(["--exact", "device::mapped::tests::a_fault_elsewhere_ends_the_process_as_before"]);
            let ended = again.env(DIES, how).output().expect("started").status;
            assert_eq!(ended.signal(), Some(libc::SIGBUS), "{how}: {ended}");
        }
    }
}
