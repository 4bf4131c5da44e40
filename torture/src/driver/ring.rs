//! One split virtqueue, the driver's side.
//!
//! The ring itself lives in guest memory and outlives connections. What we keep beside it is what a guest's kernel
//! keeps: free descriptors, which head belongs to what, how far we have looked.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use vmm_sys_util::eventfd::EventFd;

use super::memory::GuestMemory;
use super::{DriverError, session::eventfd};

const DESCRIPTOR_BYTES: u64 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Set by the device in the used ring's flags: do not kick.
const NO_NOTIFY: u16 = 1;

/// A piece of guest memory the device reads, or writes.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub at: u64,
    pub bytes: u32,
    pub device_writes: bool,
}

pub struct Ring {
    pub size: u16,
    base: u64,
    event_idx: bool,
    next_avail: Wrapping<u16>,
    seen_used: Wrapping<u16>,
    /// The avail index when the device was last told.
    told: Wrapping<u16>,
    free: Vec<u16>,
    /// By head: the slot it belongs to and the descriptors of its chain.
    under_way: Vec<Option<(usize, Vec<u16>)>>,
    pub kick: EventFd,
    pub call: EventFd,
}

impl Ring {
    pub const fn bytes(size: u16) -> u64 {
        let size = size as u64;
        // Descriptors, avail with used_event, used with avail_event; each part aligned generously.
        (DESCRIPTOR_BYTES * size + (6 + 2 * size) + (6 + 8 * size) + 64).next_multiple_of(4096)
    }

    pub fn new(base: u64, size: u16) -> Result<Self, DriverError> {
        Ok(Self {
            size,
            base,
            event_idx: false,
            next_avail: Wrapping(0),
            seen_used: Wrapping(0),
            told: Wrapping(0),
            free: (0..size).collect(),
            under_way: vec![None; usize::from(size)],
            kick: eventfd()?,
            call: eventfd()?,
        })
    }

    pub fn set_event_idx(&mut self, negotiated: bool) {
        self.event_idx = negotiated;
    }

    pub fn descriptors_at(&self) -> u64 {
        self.base
    }

    pub fn avail_at(&self) -> u64 {
        self.base + DESCRIPTOR_BYTES * u64::from(self.size)
    }

    pub fn used_at(&self) -> u64 {
        (self.avail_at() + 6 + 2 * u64::from(self.size)).next_multiple_of(8)
    }

    /// How far the device has answered, as the ring says: QEMU's SET_VRING_BASE after a server died.
    pub fn used_index(&self, memory: &GuestMemory) -> u16 {
        memory.u16(self.used_at() + 2)
    }

    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Offers a chain. With `table`, through an indirect table written there. The caller checked that there is room.
    pub fn offer(&mut self, memory: &GuestMemory, slot: usize, buffers: &[Buffer], table: Option<u64>) {
        let needed = if table.is_some() { 1 } else { buffers.len() };
        let chain = self.free.split_off(self.free.len() - needed);
        let head = chain[0];
        if let Some(table) = table {
            for (i, buffer) in (0_u16..).zip(buffers) {
                let next = (usize::from(i) + 1 < buffers.len()).then_some(i + 1);
                memory.write(table + DESCRIPTOR_BYTES * u64::from(i), &descriptor(*buffer, next));
            }
            let bytes = u32::try_from(buffers.len() * 16).expect("a short table");
            let mut whole = descriptor(Buffer { at: table, bytes, device_writes: false }, None);
            whole[12..14].copy_from_slice(&INDIRECT.to_le_bytes());
            memory.write(self.descriptor_at(head), &whole);
        } else {
            for (i, buffer) in buffers.iter().enumerate() {
                memory.write(self.descriptor_at(chain[i]), &descriptor(*buffer, chain.get(i + 1).copied()));
            }
        }
        self.under_way[usize::from(head)] = Some((slot, chain));
        let entry = u64::from(self.next_avail.0 % self.size);
        memory.set_u16(self.avail_at() + 4 + 2 * entry, head);
        self.next_avail += 1;
        memory.set_u16(self.avail_at() + 2, self.next_avail.0);
    }

    /// Kicks if the device asked for it.
    pub fn tell(&mut self, memory: &GuestMemory) {
        let (old, new) = (self.told, self.next_avail);
        if old == new {
            return;
        }
        self.told = new;
        // Our avail index before the device's wish: either it sees the one or we see the other.
        fence(Ordering::SeqCst);
        let needed = if self.event_idx {
            let event = Wrapping(memory.u16(self.used_at() + 4 + 8 * u64::from(self.size)));
            new - event - Wrapping(1) < new - old
        } else {
            memory.u16(self.used_at()) & NO_NOTIFY == 0
        };
        if needed {
            self.kick.write(1).expect("an eventfd of ours, far from full");
        }
    }

    /// The slots answered since the last look, with the lengths the device claims. Asks to be called for the next.
    pub fn take(
        &mut self,
        memory: &GuestMemory,
        answered: &mut Vec<(usize, u32)>,
    ) -> Result<(), DriverError> {
        loop {
            while self.used_index(memory) != self.seen_used.0 {
                let element = self.used_at() + 4 + 8 * u64::from(self.seen_used.0 % self.size);
                let (head, bytes) = (memory.u32(element), memory.u32(element + 4));
                self.seen_used += 1;
                let under_way = usize::try_from(head).ok().and_then(|head| self.under_way.get_mut(head));
                let Some((slot, chain)) = under_way.and_then(Option::take) else {
                    return Err(DriverError::Broken(format!(
                        "it answered head {head}, which is not under way"
                    )));
                };
                self.free.extend(chain);
                answered.push((slot, bytes));
            }
            if !self.event_idx {
                return Ok(());
            }
            memory.set_u16(self.avail_at() + 4 + 2 * u64::from(self.size), self.seen_used.0);
            // What came between our look and our wish is not called for.
            fence(Ordering::SeqCst);
            if self.used_index(memory) == self.seen_used.0 {
                return Ok(());
            }
        }
    }

    fn descriptor_at(&self, index: u16) -> u64 {
        self.descriptors_at() + DESCRIPTOR_BYTES * u64::from(index)
    }
}

fn descriptor(buffer: Buffer, next: Option<u16>) -> [u8; 16] {
    let mut flags = if buffer.device_writes { WRITE } else { 0 };
    if next.is_some() {
        flags |= NEXT;
    }
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&buffer.at.to_le_bytes());
    bytes[8..12].copy_from_slice(&buffer.bytes.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
    bytes
}
