//! The guest's memory: two memfds with a hole between them, one for rings and headers, one for data.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use super::DriverError;

/// Where the data region begins, far behind the rings: a server that adds offsets instead of translating fails.
pub const DATA_AT: u64 = 4 << 30;

/// Outlives every connection.
pub struct GuestMemory {
    map: GuestMemoryMmap<()>,
}

impl GuestMemory {
    pub fn new(control_bytes: u64, data_bytes: u64) -> Result<Self, DriverError> {
        let regions = vec![region(0, control_bytes)?, region(DATA_AT, data_bytes)?];
        let map = GuestMemoryMmap::from_regions(regions)
            .map_err(|e| DriverError::Memory(io::Error::other(e.to_string())))?;
        Ok(Self { map })
    }

    /// Inside, by the driver's own layout: panics otherwise.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.map.write_slice(bytes, GuestAddress(at)).expect("inside our own layout");
    }

    pub fn read(&self, at: u64, bytes: &mut [u8]) {
        self.map.read_slice(bytes, GuestAddress(at)).expect("inside our own layout");
    }

    pub fn u16(&self, at: u64) -> u16 {
        let value: u16 =
            self.map.load(GuestAddress(at), Ordering::Acquire).expect("aligned, inside our own layout");
        u16::from_le(value)
    }

    pub fn set_u16(&self, at: u64, value: u16) {
        self.map
            .store(value.to_le(), GuestAddress(at), Ordering::Release)
            .expect("aligned, inside our own layout");
    }

    pub fn u32(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// As SET_MEM_TABLE wants it.
    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.map
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
                mmap_offset: 0,
                mmap_handle: region.file_offset().expect("made of files").file().as_raw_fd(),
            })
            .collect()
    }

    /// Where the front end's process has this byte; ring addresses are given so.
    pub fn front_end_address(&self, at: u64) -> u64 {
        self.map.get_host_address(GuestAddress(at)).expect("inside our own layout").addr() as u64
    }
}

fn region(at: u64, bytes: u64) -> Result<GuestRegionMmap, DriverError> {
    let fd = memfd_create(c"blkcheck", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(|e| DriverError::Memory(e.into()))?;
    let file = File::from(fd);
    let bytes = bytes.next_multiple_of(1 << 20);
    file.set_len(bytes).map_err(DriverError::Memory)?;
    fcntl_add_seals(&file, SealFlags::SHRINK).map_err(|e| DriverError::Memory(e.into()))?;
    let len = usize::try_from(bytes).map_err(|e| DriverError::Memory(io::Error::other(e)))?;
    GuestRegionMmap::from_range(GuestAddress(at), len, Some(FileOffset::new(file, 0)))
        .map_err(|e| DriverError::Memory(io::Error::other(e.to_string())))
}
