//! A split virtqueue as the device sees it: heads come from the avail ring, answers go to the used ring.
//!
//! ```text
//!  pop ──▶ head ──▶ (chain.rs, request.rs, the backing) ──▶ put_used … put_used ──▶ publish ──▶ needs_signal
//! ```
//!
//! What always holds:
//!
//! - The guest owns what it shares: every index it writes is checked each time it is read.
//! - `pop` is only false after notifications are on again and the avail ring was looked at once more
//!   ([`Ring::rearm`]), so no kick is missed.
//! - The used ring's index moves once per batch, after the elements and everything they speak of.
//! - A ring that was settled ([`Ring::settle`]) tells by itself what is unanswered, wherever its memory is taken.
//!
//! Our own rather than virtio-queue's `Queue`: that one moves the index per element (a batch is what the in-flight
//! region records), looks every address up again, ignores `NO_INTERRUPT`, and ends a broken chain silently.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::Bytes;

use super::config_space::QUEUE_SIZE_MAX;
use super::memory::{DirtyLog, Fault, Memory, Window};

const DESCRIPTOR_BYTES: usize = 16;
const AVAIL_FLAGS_AT: usize = 0;
const AVAIL_IDX_AT: usize = 2;
const AVAIL_ENTRIES_AT: usize = 4;
const AVAIL_ENTRY_BYTES: usize = 2;
const USED_FLAGS_AT: usize = 0;
const USED_IDX_AT: usize = 2;
const USED_ENTRIES_AT: usize = 4;
const USED_ENTRY_BYTES: usize = 8;

/// What a settled ring has where its next used element goes, above the used index that it was settled at. No used
/// element looks like that: its low half is a head, below 32768.
const SEAL: u64 = 0x4f4c_5554_4556_0000;
const _: () = assert!(SEAL & 0xffff_ffff >= QUEUE_SIZE_MAX as u64 && SEAL & 0xffff == 0);

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Where a ring is, guest-physical, and how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub size: u16,
    pub descriptors: u64,
    pub avail: u64,
    pub used: u64,
}

/// The driver broke the ring itself. It is not looked at again until it is set up anew: whatever it says now could be
/// anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("ring size {0} is not a power of two up to {QUEUE_SIZE_MAX}")]
    Size(u16),
    #[error("part of the ring is not in one piece of guest memory")]
    Outside(#[from] Fault),
    #[error("part of the ring at {0:#x} is not aligned")]
    Unaligned(u64),
    #[error("the avail index jumped by {0}")]
    AvailIndex(u16),
    #[error("head {0} is outside the descriptor table")]
    Head(u16),
    #[error("head {0} is offered again before it was answered")]
    HeadInFlight(u16),
}

/// One entry of a descriptor table, copied once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
    pub const BYTES: usize = DESCRIPTOR_BYTES;

    pub fn decode(bytes: &[u8; DESCRIPTOR_BYTES]) -> Descriptor {
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = *bytes;
        Descriptor {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// See the module.
#[derive(Debug)]
pub struct Ring {
    layout: Layout,
    event_idx: bool,
    memory: Arc<Memory>,
    descriptors: Window,
    avail: Window,
    used: Window,
    /// The next entry of the avail ring to take.
    next_avail: Wrapping<u16>,
    /// How far the driver had come when we last looked.
    seen_avail: Wrapping<u16>,
    /// Where the next used element goes.
    next_used: Wrapping<u16>,
    /// What the index in the used ring says.
    published: Wrapping<u16>,
    /// `published` when `needs_signal` was last asked.
    signalled: Wrapping<u16>,
    /// Whether the driver has been told not to kick.
    suppressed: bool,
}

impl Ring {
    /// Looks the ring up in guest memory. Its answers continue where the used ring's own index stands; `next_avail` is
    /// the caller's knowledge, see `queue.rs`.
    pub fn new(memory: &Arc<Memory>, layout: Layout, event_idx: bool) -> Result<Ring, Broken> {
        if !layout.size.is_power_of_two() || layout.size > QUEUE_SIZE_MAX {
            return Err(Broken::Size(layout.size));
        }
        for (addr, alignment) in [(layout.descriptors, 16), (layout.avail, 2), (layout.used, 4)] {
            if !addr.is_multiple_of(alignment) {
                return Err(Broken::Unaligned(addr));
            }
        }
        let event_bytes = if event_idx { size_of::<u16>() } else { 0 };
        let (descriptors, avail, used) = Ring::windows(memory, layout, event_bytes)?;
        let mut ring = Ring {
            layout,
            event_idx,
            memory: memory.clone(),
            descriptors,
            avail,
            used,
            next_avail: Wrapping(0),
            seen_avail: Wrapping(0),
            next_used: Wrapping(0),
            published: Wrapping(0),
            signalled: Wrapping(0),
            suppressed: false,
        };
        let used_idx = Wrapping(ring.load(&ring.used, USED_IDX_AT, Ordering::Acquire));
        ring.next_used = used_idx;
        ring.published = used_idx;
        ring.signalled = used_idx;
        Ok(ring)
    }

    fn windows(
        memory: &Arc<Memory>,
        layout: Layout,
        event_bytes: usize,
    ) -> Result<(Window, Window, Window), Fault> {
        let size = usize::from(layout.size);
        Ok((
            memory.window(layout.descriptors, DESCRIPTOR_BYTES * size)?,
            memory.window(layout.avail, AVAIL_ENTRIES_AT + AVAIL_ENTRY_BYTES * size + event_bytes)?,
            memory.window(layout.used, USED_ENTRIES_AT + USED_ENTRY_BYTES * size + event_bytes)?,
        ))
    }

    /// The memory table changed: the same ring, looked up again.
    pub fn remap(&mut self, memory: &Arc<Memory>) -> Result<(), Broken> {
        let event_bytes = if self.event_idx { size_of::<u16>() } else { 0 };
        let (descriptors, avail, used) = Ring::windows(memory, self.layout, event_bytes)?;
        self.memory = memory.clone();
        self.descriptors = descriptors;
        self.avail = avail;
        self.used = used;
        Ok(())
    }

    fn load(&self, window: &Window, at: usize, order: Ordering) -> u16 {
        u16::from_le(window.slice.load(at, order).expect("sized and aligned in `new`"))
    }

    fn store_used(&self, at: usize, value: u16, order: Ordering) {
        self.used.slice.store(value.to_le(), at, order).expect("sized and aligned in `new`");
    }

    pub fn size(&self) -> u16 {
        self.layout.size
    }

    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    pub fn next_avail(&self) -> u16 {
        self.next_avail.0
    }

    pub fn set_next_avail(&mut self, index: u16) {
        self.next_avail = Wrapping(index);
        self.seen_avail = self.next_avail;
    }

    /// The used ring's index, as published.
    pub fn used_idx(&self) -> u16 {
        self.published.0
    }

    fn entry(&self, index: Wrapping<u16>) -> usize {
        usize::from(index.0 & (self.layout.size - 1))
    }

    /// Whether the driver offers something we have not taken.
    pub fn has_available(&self) -> bool {
        self.load(&self.avail, AVAIL_IDX_AT, Ordering::Acquire) != self.next_avail.0
    }

    /// Takes the next head, if there is one.
    pub fn pop(&mut self) -> Result<Option<u16>, Broken> {
        if self.next_avail == self.seen_avail {
            self.seen_avail = Wrapping(self.load(&self.avail, AVAIL_IDX_AT, Ordering::Acquire));
            let ahead = (self.seen_avail - self.next_avail).0;
            if ahead > self.layout.size {
                self.seen_avail = self.next_avail;
                return Err(Broken::AvailIndex(ahead));
            }
            if ahead == 0 {
                return Ok(None);
            }
        }
        let at = AVAIL_ENTRIES_AT + AVAIL_ENTRY_BYTES * self.entry(self.next_avail);
        let head = self.load(&self.avail, at, Ordering::Relaxed);
        if head >= self.layout.size {
            return Err(Broken::Head(head));
        }
        self.next_avail += 1;
        Ok(Some(head))
    }

    /// Asks the driver not to kick while we look by ourselves.
    pub fn suppress_kicks(&mut self, log: Option<&DirtyLog>) {
        // With event indexes, silence is the default once the wanted entry has passed.
        if !self.event_idx && !self.suppressed {
            self.store_used(USED_FLAGS_AT, USED_F_NO_NOTIFY, Ordering::Relaxed);
            self.mark_used(log, USED_FLAGS_AT, size_of::<u16>());
        }
        self.suppressed = true;
    }

    /// Asks for a kick with the next entry. True: one came in between; look again before sleeping.
    pub fn rearm(&mut self, log: Option<&DirtyLog>) -> bool {
        if self.event_idx {
            let at = USED_ENTRIES_AT + USED_ENTRY_BYTES * usize::from(self.layout.size);
            self.store_used(at, self.next_avail.0, Ordering::Relaxed);
            self.mark_used(log, at, size_of::<u16>());
        } else {
            self.store_used(USED_FLAGS_AT, 0, Ordering::Relaxed);
            self.mark_used(log, USED_FLAGS_AT, size_of::<u16>());
        }
        self.suppressed = false;
        // The wish must be visible before we look; the driver does the same in the other order.
        fence(Ordering::SeqCst);
        self.has_available()
    }

    pub fn descriptor(&self, index: u16) -> Descriptor {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        self.descriptors
            .slice
            .read_slice(&mut bytes, DESCRIPTOR_BYTES * usize::from(index))
            .expect("callers check the index against the size");
        Descriptor::decode(&bytes)
    }

    /// Writes one used element. The driver does not see it before [`Ring::publish`].
    pub fn put_used(&mut self, head: u16, len: u32, log: Option<&DirtyLog>) {
        let at = USED_ENTRIES_AT + USED_ENTRY_BYTES * self.entry(self.next_used);
        let element = u64::from(head) | u64::from(len) << 32;
        self.used.slice.write_slice(&element.to_le_bytes(), at).expect("sized in `new`");
        self.mark_used(log, at, USED_ENTRY_BYTES);
        self.next_used += 1;
    }

    /// Shows the driver every element put so far.
    pub fn publish(&mut self, log: Option<&DirtyLog>) {
        self.store_used(USED_IDX_AT, self.next_used.0, Ordering::Release);
        self.mark_used(log, USED_IDX_AT, size_of::<u16>());
        self.published = self.next_used;
    }

    /// Puts what was taken and not answered back where the avail ring says so, oldest first: from the used ring's index
    /// on, there is then exactly what is unanswered. Answers leave out of order, so before this, these entries are just
    /// the ones taken last. A seal tells whoever starts on this memory that it was done; the next answer overwrites it,
    /// and up to that answer it stays true.
    ///
    /// The avail ring is the driver's to write. The entries written here are ones that it does not use again before we
    /// answer, and no driver reads them; see `docs/decisions/0009-paused-rings.md`.
    pub fn settle(&mut self, unanswered: impl ExactSizeIterator<Item = u16>, log: Option<&DirtyLog>) {
        assert!(self.next_used == self.published, "settled with elements that are not published");
        let taken = self.next_avail - self.published;
        assert!(usize::from(taken.0) == unanswered.len(), "{taken} taken, {} unanswered", unanswered.len());
        for (nth, head) in (0..).zip(unanswered) {
            let at = AVAIL_ENTRIES_AT + AVAIL_ENTRY_BYTES * self.entry(self.published + Wrapping(nth));
            self.avail.slice.store(head.to_le(), at, Ordering::Release).expect("sized in `new`");
            if let Some(log) = log {
                log.mark(self.layout.avail + at as u64, AVAIL_ENTRY_BYTES as u64);
            }
        }
        // With nothing unanswered there is nothing to tell; and the place may hold an answer not yet seen.
        if self.load(&self.avail, AVAIL_IDX_AT, Ordering::Acquire) != self.published.0 {
            let at = USED_ENTRIES_AT + USED_ENTRY_BYTES * self.entry(self.published);
            self.used.slice.write_slice(&self.seal().to_le_bytes(), at).expect("sized in `new`");
            self.mark_used(log, at, USED_ENTRY_BYTES);
        }
        fence(Ordering::SeqCst);
    }

    fn seal(&self) -> u64 {
        SEAL | u64::from(self.published.0)
    }

    /// Whether all from the used ring's index on is unanswered, by what the ring itself says.
    pub fn is_settled(&self) -> bool {
        let mut element = [0; USED_ENTRY_BYTES];
        let at = USED_ENTRIES_AT + USED_ENTRY_BYTES * self.entry(self.published);
        self.used.slice.read_slice(&mut element, at).expect("sized in `new`");
        u64::from_le_bytes(element) == self.seal()
    }

    /// Whether the driver wants an interrupt for what was published since the last call.
    pub fn needs_signal(&mut self) -> bool {
        let old = self.signalled;
        let new = self.published;
        if old == new {
            return false;
        }
        self.signalled = new;
        // What we published must be visible before we read the wish; the driver does the same in the other order.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = AVAIL_ENTRIES_AT + AVAIL_ENTRY_BYTES * usize::from(self.layout.size);
            let wanted = Wrapping(self.load(&self.avail, at, Ordering::Relaxed));
            // The wanted entry is among those published since: virtio's `vring_need_event`.
            new - wanted - Wrapping(1) < new - old
        } else {
            self.load(&self.avail, AVAIL_FLAGS_AT, Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    fn mark_used(&self, log: Option<&DirtyLog>, at: usize, len: usize) {
        if let Some(log) = log {
            log.mark(self.layout.used + at as u64, len as u64);
        }
    }
}
