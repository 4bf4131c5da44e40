//! Memory that O_DIRECT accepts: aligned to a block, whole blocks long.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use super::format::{BLOCK, blocks};

/// A zero-filled, block-aligned piece of memory.
#[derive(Debug)]
pub struct Buffer {
    start: NonNull<u8>,
    capacity: usize,
}

impl Buffer {
    pub fn new(capacity: usize) -> Self {
        let capacity = blocks(capacity.max(1));
        let layout = Self::layout(capacity);
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        Self { start: NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)), capacity }
    }

    /// A larger one with the same first bytes.
    pub fn grown(&self, capacity: usize) -> Self {
        let mut larger = Self::new(capacity.max(self.capacity * 2));
        larger[..self.capacity].copy_from_slice(self);
        larger
    }

    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, BLOCK).expect("a batch is far smaller than the address space")
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` points to `capacity` initialized bytes that this buffer owns.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.capacity) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.capacity) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.capacity)) }
    }
}
