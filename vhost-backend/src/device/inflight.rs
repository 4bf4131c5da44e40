//! What was taken from a ring and not yet answered, in memory that outlives this process.
//!
//! The front end keeps the region and hands it back after we died; the next process reads from it what to do
//! again. The layout is vhost-user's for split rings (`DescStateSplit`, `QueueRegionSplit`), little-endian, one
//! block per queue, each aligned to 64 bytes:
//!
//! ```text
//!  0        8         10         12                 14         16 + 16·i
//!  features | version | desc_num | last_batch_head | used_idx | desc[i]: inflight u8, pad 5, next u16, counter u64
//! ```
//!
//! What always holds, whatever instruction kill -9 comes after (the stores below are atomic and in program order,
//! and a dead process's stores are never undone):
//!
//! - Taken: `counter`, then `inflight = 1`. Before that, the entry is still in the avail ring and will be taken
//!   again; after that, it is found here.
//! - Answered: the batch is linked through `next` from `last_batch_head`, the used ring's index moves, and only
//!   then `inflight = 0` and `used_idx`. Before the index moves, every request of the batch is done again, which the
//!   guest cannot tell from a slow disk; after it, [`InflightQueue::recover`] unlinks exactly that batch.
//! - `used_idx` starts as the used ring's own index, not as zero (a ring may have lived before the region did).
//! - `counter` goes up over all queues of the region, not in each by itself: of two changes of the same bytes in
//!   different queues, the one taken later is done again later.
//!
//! The region comes back from the front end's hands, so every index in it is checked before use.

use std::fs::File;
use std::io;
use std::num::Wrapping;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::lifeline::{Cause, Lifeline};
use super::mapped::Watch;

const FEATURES_AT: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;
const HEADER_BYTES: usize = 16;

const STATE_INFLIGHT_AT: usize = 0;
const STATE_NEXT_AT: usize = 6;
const STATE_COUNTER_AT: usize = 8;
const STATE_BYTES: usize = 16;

const QUEUE_ALIGNMENT: usize = 64;
/// The layout above. Zero means nobody has written here yet.
const VERSION: u16 = 1;

const _: () = assert!(USED_IDX_AT + size_of::<u16>() == HEADER_BYTES);
const _: () = assert!(STATE_COUNTER_AT + size_of::<u64>() == STATE_BYTES);

/// Why a region is not used. The message is refused; the session goes on without it.
#[derive(Debug, thiserror::Error)]
pub enum InflightRefused {
    #[error("it is too small for {queues} queues of {queue_size}, or not aligned")]
    Shape { queues: u16, queue_size: u16 },
    #[error("cannot make or map it")]
    Map(#[source] io::Error),
}

/// The mapping, shared by the socket thread that got it and the I/O thread that uses it.
#[derive(Debug)]
pub struct InflightRegion {
    /// Before what it watches: see [`Watch`].
    _watch: Watch,
    map: MmapRegion<()>,
    queues: u16,
    queue_size: u16,
    /// The counter of what is taken next, from whichever queue.
    next_counter: AtomicU64,
}

/// A head that was taken and not answered, and its place in the order in which all queues' heads were taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unanswered {
    pub counter: u64,
    pub head: u16,
}

fn queue_bytes(queue_size: u16) -> usize {
    (HEADER_BYTES + STATE_BYTES * usize::from(queue_size)).next_multiple_of(QUEUE_ALIGNMENT)
}

fn region_bytes(queues: u16, queue_size: u16) -> usize {
    usize::from(queues) * queue_bytes(queue_size)
}

impl InflightRegion {
    /// A new region, all zeroes, in a file that nobody can resize under us. Returns its length too.
    pub fn create(queues: u16, queue_size: u16) -> Result<(File, u64), InflightRefused> {
        let make = || -> io::Result<(File, u64)> {
            let fd: OwnedFd = rustix::fs::memfd_create(
                "evolute-inflight",
                MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
            )?;
            let file = File::from(fd);
            let len = region_bytes(queues, queue_size) as u64;
            file.set_len(len)?;
            rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok((file, len))
        };
        make().map_err(InflightRefused::Map)
    }

    /// Maps what the front end handed back.
    pub fn map(
        file: File,
        offset: u64,
        len: u64,
        queues: u16,
        queue_size: u16,
        line: &Arc<Lifeline>,
    ) -> Result<InflightRegion, InflightRefused> {
        let needed = region_bytes(queues, queue_size);
        let shape = InflightRefused::Shape { queues, queue_size };
        let file_len = file.metadata().map_err(InflightRefused::Map)?.len();
        let fits = offset.checked_add(needed as u64).is_some_and(|end| end <= file_len);
        if !fits || len < needed as u64 || queues == 0 || queue_size == 0 {
            return Err(shape);
        }
        let map = MmapRegion::from_file(FileOffset::new(file, offset), needed)
            .map_err(|e| InflightRefused::Map(io::Error::other(e)))?;
        let watch = Watch::new(&map, line, Cause::InflightGone);
        Ok(InflightRegion { _watch: watch, map, queues, queue_size, next_counter: AtomicU64::new(0) })
    }

    /// One queue's block; none if the region was made for fewer queues or shorter rings.
    pub fn queue(self: &Arc<Self>, index: u16, ring_size: u16) -> Option<InflightQueue> {
        if index >= self.queues || ring_size > self.queue_size {
            return None;
        }
        let len = queue_bytes(self.queue_size);
        let slice = self.map.get_slice(usize::from(index) * len, len).expect("sized in `map`");
        let at = slice.ptr_guard_mut().as_ptr();
        // SAFETY: `slice` covers `len` bytes from `at`, mapped for as long as the region lives, and the queue
        // keeps it alive. Everybody accesses it atomically.
        let slice = unsafe { VolatileSlice::new(at, len) };
        Some(InflightQueue { slice, ring_size, region: self.clone() })
    }

    /// The device was reset: what was in flight is no more, and is not done again by whoever is given this region.
    pub fn forget(self: &Arc<Self>) {
        for index in 0..self.queues {
            self.queue(index, self.queue_size).expect("within bounds").store_u16(VERSION_AT, 0);
        }
    }

    /// Queues in which something may be unanswered, as far as can be told without their rings.
    pub fn queues_with_marks(self: &Arc<Self>) -> Vec<u16> {
        (0..self.queues)
            .filter(|index| {
                let queue = self.queue(*index, self.queue_size).expect("within bounds");
                queue.version() == VERSION && (0..self.queue_size).any(|head| queue.is_marked(head))
            })
            .collect()
    }
}

/// One queue's block of the region; lives on the I/O thread beside the ring it describes.
#[derive(Debug)]
pub struct InflightQueue {
    slice: VolatileSlice<'static>,
    ring_size: u16,
    region: Arc<InflightRegion>,
}

impl InflightQueue {
    fn load_u16(&self, at: usize) -> u16 {
        u16::from_le(self.slice.load(at, Ordering::Acquire).expect("inside the block"))
    }

    fn store_u16(&self, at: usize, value: u16) {
        self.slice.store(value.to_le(), at, Ordering::Release).expect("inside the block");
    }

    fn state_at(&self, head: u16) -> usize {
        assert!(head < self.ring_size, "head {head} of a ring of {}", self.ring_size);
        HEADER_BYTES + STATE_BYTES * usize::from(head)
    }

    fn version(&self) -> u16 {
        self.load_u16(VERSION_AT)
    }

    fn is_marked(&self, head: u16) -> bool {
        let at = self.state_at(head) + STATE_INFLIGHT_AT;
        self.slice.load::<u8>(at, Ordering::Acquire).expect("inside the block") == 1
    }

    fn set_mark(&self, head: u16, mark: u8) {
        let at = self.state_at(head) + STATE_INFLIGHT_AT;
        self.slice.store(mark, at, Ordering::Release).expect("inside the block");
    }

    fn counter(&self, head: u16) -> u64 {
        let at = self.state_at(head) + STATE_COUNTER_AT;
        u64::from_le(self.slice.load(at, Ordering::Acquire).expect("inside the block"))
    }

    /// Whether somebody recorded this ring before. If not, nobody was here, or it was a ring of another size, which only a
    /// reset in between can mean: the region knows nothing of what is unanswered.
    pub fn is_known(&self) -> bool {
        self.version() == VERSION && self.load_u16(DESC_NUM_AT) == self.ring_size
    }

    /// Begins to record a ring of which nothing is unrecorded. The version goes last: it vouches for the rest.
    pub fn begin(&mut self, ring_used_idx: u16) {
        self.store_u16(VERSION_AT, 0);
        for head in 0..self.ring_size {
            self.set_mark(head, 0);
        }
        self.slice.store(0u64, FEATURES_AT, Ordering::Release).expect("inside the block");
        self.store_u16(DESC_NUM_AT, self.ring_size);
        self.store_u16(LAST_BATCH_HEAD_AT, 0);
        self.store_u16(USED_IDX_AT, ring_used_idx);
        self.store_u16(VERSION_AT, VERSION);
    }

    /// Settles what the last owner left of a known ring, and returns the heads to be done again, oldest first.
    /// `ring_used_idx` is what the used ring itself says.
    pub fn recover(&mut self, ring_used_idx: u16) -> Vec<Unanswered> {
        // Published but not unlinked: the batch from `last_batch_head` has been answered. More entries than the
        // ring has were never one batch of ours (the region belongs to another life of the ring): then only
        // the index is put right, and every mark counts.
        let published = (Wrapping(ring_used_idx) - Wrapping(self.load_u16(USED_IDX_AT))).0;
        if published <= self.ring_size {
            let mut head = self.load_u16(LAST_BATCH_HEAD_AT);
            for _ in 0..published {
                if head >= self.ring_size {
                    break;
                }
                self.set_mark(head, 0);
                head = self.load_u16(self.state_at(head) + STATE_NEXT_AT);
            }
        }
        self.store_u16(USED_IDX_AT, ring_used_idx);

        let marked = (0..self.ring_size).filter(|head| self.is_marked(*head));
        let mut left: Vec<_> = marked.map(|head| Unanswered { counter: self.counter(head), head }).collect();
        left.sort_unstable();
        if let Some(newest) = left.last() {
            self.region.next_counter.fetch_max(newest.counter.wrapping_add(1), Ordering::Relaxed);
        }
        left
    }

    /// A head left the avail ring. Returns its place in the order in which all queues' heads were taken.
    pub fn taken(&mut self, head: u16) -> u64 {
        let at = self.state_at(head) + STATE_COUNTER_AT;
        let counter = self.region.next_counter.fetch_add(1, Ordering::Relaxed);
        self.slice.store(counter.to_le(), at, Ordering::Release).expect("inside the block");
        self.set_mark(head, 1);
        counter
    }

    /// Its answer joins the batch that the next move of the used ring's index publishes.
    pub fn join_batch(&self, head: u16) {
        let last = self.load_u16(LAST_BATCH_HEAD_AT);
        self.store_u16(self.state_at(head) + STATE_NEXT_AT, last);
        self.store_u16(LAST_BATCH_HEAD_AT, head);
    }

    /// The batch is published: this head is free again.
    pub fn unmark(&self, head: u16) {
        self.set_mark(head, 0);
    }

    /// All heads of the batch are free: nothing to settle up to here.
    pub fn settled(&self, ring_used_idx: u16) {
        self.store_u16(USED_IDX_AT, ring_used_idx);
    }
}
