//! Buffers that the server sees too: one memfd, mapped here and there, cut into slots of one request each.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use virtio_driver::VirtioBlkTransport;

use super::FrontEndError;

const PAGE_BYTES: usize = 4096;

/// A mapping of our own; lives as long as any queue that uses it.
#[derive(Debug)]
pub struct SharedMemory {
    start: NonNull<u8>,
    bytes: usize,
    file: File,
}

// SAFETY: the mapping belongs to no thread; who may touch which part is settled by `Slots`.
unsafe impl Send for SharedMemory {}
// SAFETY: a shared reference gives nobody access to the bytes, only the address.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    pub fn new(bytes: usize) -> Result<Self, FrontEndError> {
        let bytes = bytes.next_multiple_of(PAGE_BYTES);
        let memory = |source| FrontEndError::Memory { source };
        let fd = memfd_create(c"vublk-bench", MemfdFlags::CLOEXEC).map_err(|e| memory(e.into()))?;
        let file = File::from(fd);
        file.set_len(bytes as u64).map_err(memory)?;
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice, of a file nobody else truncates.
        let start =
            unsafe { mmap(ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0) }
                .map_err(|e| memory(e.into()))?;
        let start = NonNull::new(start.cast()).expect("mmap never answers 0 for an address of its choice");
        Ok(Self { start, bytes, file })
    }

    /// Tells the server about it.
    pub fn share(&self, transport: &mut VirtioBlkTransport) -> Result<(), FrontEndError> {
        let address = self.start.as_ptr().addr();
        transport
            .map_mem_region(address, self.bytes, self.file.as_raw_fd(), 0)
            .map(drop)
            .map_err(|source| FrontEndError::Server { doing: "adding a memory region", source })
    }

    /// `count` slots of `bytes` from `first`. The caller gives every byte to one `Slots` only.
    pub fn slots(&self, first: usize, count: usize, bytes: usize) -> Slots {
        let end = (first + count).checked_mul(bytes).expect("slots of a mapping that exists");
        assert!(end <= self.bytes, "slots {first}+{count} of {bytes} end at {end}, behind {}", self.bytes);
        // SAFETY: within the mapping, as just asserted.
        let start = unsafe { self.start.add(first * bytes) };
        Slots { start, count, bytes }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and every queue that used it was dropped before (`front_end::run`).
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

/// The slots of one queue. A slot is ours until its request is made, and again once it is answered.
#[derive(Debug)]
pub struct Slots {
    start: NonNull<u8>,
    pub count: usize,
    pub bytes: usize,
}

// SAFETY: each `Slots` covers bytes of its own, and moves to the one thread that uses them.
unsafe impl Send for Slots {}

impl Slots {
    pub fn address(&self, slot: usize) -> *mut u8 {
        assert!(slot < self.count, "slot {slot} of {}", self.count);
        // SAFETY: within this queue's part of the mapping.
        unsafe { self.start.add(slot * self.bytes) }.as_ptr()
    }

    /// Only while no request for the slot is in flight: a server that writes later breaks the protocol, and would be
    /// found by --verify.
    pub fn content(&mut self, slot: usize, bytes: usize) -> &mut [u8] {
        assert!(bytes <= self.bytes, "{bytes} bytes of a slot of {}", self.bytes);
        // SAFETY: within the mapping, aligned (bytes), initialised (a memfd is zeroes), and borrowed through &mut self.
        unsafe { std::slice::from_raw_parts_mut(self.address(slot), bytes) }
    }
}
