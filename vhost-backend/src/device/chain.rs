//! A descriptor chain becomes a list of buffers, checked for everything that does not need to know virtio-blk.
//!
//! Each descriptor is copied out of guest memory once and judged in that copy. A walk ends after at most as many
//! descriptors as the table it walks has, so a loop is only a chain that is too long.

use super::memory::Memory;
use super::ring::{Descriptor, Ring};

/// Entries of an indirect table. Drivers keep to `SEGMENTS_MAX + 2`; QEMU allows this many.
const INDIRECT_ENTRIES_MAX: usize = 1024;

/// A piece of guest memory a chain names. Every byte of it was there when the chain was walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    pub addr: u64,
    pub len: u32,
}

/// The driver's side of one request. Kept and cleared rather than made anew, so a long chain allocates once.
#[derive(Debug, Default)]
pub struct Chain {
    /// What we may read, in order.
    pub readable: Vec<Buffer>,
    /// What we may write, in order; all of it after all of `readable`.
    pub writable: Vec<Buffer>,
    /// The chain's last byte we may write, if the walk got to its end: where virtio-blk wants its status.
    pub status_at: Option<u64>,
    table: Vec<u8>,
}

/// The chain cannot be made sense of. The request is answered, the ring goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("descriptor {0} is outside its table")]
    Index(u16),
    #[error("more descriptors than the table has: a loop")]
    TooLong,
    #[error("an empty buffer")]
    Empty,
    #[error("a buffer outside guest memory")]
    Outside,
    #[error("a readable buffer after a writable one")]
    Order,
    #[error("an indirect table inside an indirect table, or one that is not last, or writable")]
    Indirect,
    #[error("an indirect table of {0} bytes")]
    TableLength(u32),
    #[error("its buffers add up to more than 4 GiB")]
    TooMuch,
}

impl Chain {
    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.status_at = None;
    }

    /// Walks the chain that starts at `head`, which is inside the ring's table.
    pub fn walk(&mut self, ring: &Ring, head: u16) -> Result<(), Malformed> {
        self.clear();
        let walked = self.walk_direct(ring, head);
        // A chain with a fault inside still has its status byte at its end, if the walk saw the end.
        match self.writable.last() {
            Some(last) if walked.as_ref().is_none_or(|fault| fault.reached_end) => {
                self.status_at = Some(last.addr + u64::from(last.len) - 1);
            }
            _ => {}
        }
        match walked {
            None => self.check_total(),
            Some(fault) => Err(fault.why),
        }
    }

    fn check_total(&self) -> Result<(), Malformed> {
        for side in [&self.readable, &self.writable] {
            let total: u64 = side.iter().map(|b| u64::from(b.len)).sum();
            if total > u64::from(u32::MAX) {
                return Err(Malformed::TooMuch);
            }
        }
        Ok(())
    }

    fn walk_direct(&mut self, ring: &Ring, head: u16) -> Option<Fault> {
        let mut first_fault = None;
        let mut index = head;
        for _ in 0..ring.size() {
            if index >= ring.size() {
                return Some(Fault { why: Malformed::Index(index), reached_end: false });
            }
            let descriptor = ring.descriptor(index);
            if descriptor.has(Descriptor::INDIRECT) {
                if descriptor.has(Descriptor::NEXT) || descriptor.has(Descriptor::WRITE) {
                    return Some(Fault { why: Malformed::Indirect, reached_end: false });
                }
                return merge(first_fault, self.walk_indirect(ring.memory(), descriptor));
            }
            first_fault = first_fault.or(self.push(ring.memory(), descriptor).err());
            if !descriptor.has(Descriptor::NEXT) {
                return first_fault.map(|why| Fault { why, reached_end: true });
            }
            index = descriptor.next;
        }
        Some(Fault { why: Malformed::TooLong, reached_end: false })
    }

    fn walk_indirect(&mut self, memory: &Memory, outer: Descriptor) -> Option<Fault> {
        let len = outer.len as usize;
        let entries = len / Descriptor::BYTES;
        if entries == 0 || !len.is_multiple_of(Descriptor::BYTES) || entries > INDIRECT_ENTRIES_MAX {
            return Some(Fault { why: Malformed::TableLength(outer.len), reached_end: false });
        }
        let mut table = std::mem::take(&mut self.table);
        table.clear();
        let copied = memory.append_to(outer.addr, outer.len, &mut table);
        let walked = match copied {
            Ok(()) => self.walk_table(memory, &table),
            Err(_) => Some(Fault { why: Malformed::Outside, reached_end: false }),
        };
        self.table = table;
        walked
    }

    fn walk_table(&mut self, memory: &Memory, table: &[u8]) -> Option<Fault> {
        let mut first_fault = None;
        let (entries, _) = table.as_chunks::<{ Descriptor::BYTES }>();
        let mut index = 0u16;
        for _ in 0..entries.len() {
            let Some(entry) = entries.get(usize::from(index)) else {
                return Some(Fault { why: Malformed::Index(index), reached_end: false });
            };
            let descriptor = Descriptor::decode(entry);
            if descriptor.has(Descriptor::INDIRECT) {
                return Some(Fault { why: Malformed::Indirect, reached_end: false });
            }
            first_fault = first_fault.or(self.push(memory, descriptor).err());
            if !descriptor.has(Descriptor::NEXT) {
                return first_fault.map(|why| Fault { why, reached_end: true });
            }
            index = descriptor.next;
        }
        Some(Fault { why: Malformed::TooLong, reached_end: false })
    }

    /// Adds one buffer. A faulty one is left out, so nobody can touch it.
    fn push(&mut self, memory: &Memory, descriptor: Descriptor) -> Result<(), Malformed> {
        let buffer = Buffer { addr: descriptor.addr, len: descriptor.len };
        let writable = descriptor.has(Descriptor::WRITE);
        let fault = match buffer.len {
            0 => Some(Malformed::Empty),
            len if !memory.contains(buffer.addr, len) => Some(Malformed::Outside),
            _ => None,
        };
        if let Some(fault) = fault {
            // It may have been meant to hold the status: then there is none.
            if writable {
                self.writable.clear();
            }
            return Err(fault);
        }
        match writable {
            true => self.writable.push(buffer),
            false if !self.writable.is_empty() => return Err(Malformed::Order),
            false => self.readable.push(buffer),
        }
        Ok(())
    }
}

struct Fault {
    why: Malformed,
    /// Whether the walk saw the end of the chain all the same.
    reached_end: bool,
}

fn merge(earlier: Option<Malformed>, later: Option<Fault>) -> Option<Fault> {
    match (earlier, later) {
        (None, later) => later,
        (Some(why), None) => Some(Fault { why, reached_end: true }),
        (Some(why), Some(later)) => Some(Fault { why, reached_end: later.reached_end }),
    }
}
