//! Guest memory: what the front end gave us to map, and every way we touch it.
//!
//! The socket thread keeps a [`MemoryTable`], because messages speak of the front end's own addresses. The I/O
//! thread sees immutable [`Memory`] snapshots, guest-physical, behind an `Arc`: a request in flight keeps the
//! snapshot it was parsed under, so an answer never goes to memory that was unmapped meanwhile.
//!
//! What always holds:
//!
//! - Only ranges the front end named are mapped, and only if the file behind them is that long.
//! - The guest may write any of it at any time. Nothing here hands out a Rust reference to it.
//! - Memory that goes away under us reads as zeroes and ends the session; see `mapped.rs`.
//! - Every write we do can be marked in the [`DirtyLog`], so a live migration misses none.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::{FileType, SealFlags, Stat};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
    VolatileSlice,
};

use super::callers::Peer;
use super::lifeline::{Cause, Lifeline};
use super::mapped::Watch;
use super::sharing::{HOW_TO_SHARE, is_private};

/// Regions a front end may add: what QEMU's own limit for memory slots asks for.
pub const MEMORY_SLOTS_MAX: usize = 509;
/// Guest memory we are willing to map: a 47-bit address space holds eight of these.
const MAPPED_BYTES_MAX: u64 = 16 << 40;

/// The guest named an address that no region holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no guest memory at {addr:#x}, {len} bytes")]
pub struct Fault {
    pub addr: u64,
    pub len: u64,
}

/// One snapshot of guest-physical memory.
#[derive(Debug)]
pub struct Memory {
    /// Before what they watch: see [`Watch`].
    _watches: Vec<Arc<Watch>>,
    map: GuestMemoryMmap<()>,
}

impl Memory {
    pub fn new(map: GuestMemoryMmap<()>) -> Memory {
        Memory { _watches: Vec::new(), map }
    }

    /// Whether every byte of the range is there. It may span regions.
    pub fn contains(&self, addr: u64, len: u32) -> bool {
        self.map.check_range(GuestAddress(addr), len as usize)
    }

    pub fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        self.map.read_slice(into, GuestAddress(addr)).map_err(|_| Fault { addr, len: into.len() as u64 })
    }

    /// Appends the range to `into`: the one copy of a write's payload.
    pub fn append_to(&self, addr: u64, len: u32, into: &mut Vec<u8>) -> Result<(), Fault> {
        self.map
            .write_all_volatile_to(GuestAddress(addr), into, len as usize)
            .map_err(|_| Fault { addr, len: len.into() })
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.map.write_slice(bytes, GuestAddress(addr)).map_err(|_| Fault { addr, len: bytes.len() as u64 })
    }

    /// A range inside one region that is looked up once and used for long: a part of a ring.
    pub fn window(self: &Arc<Memory>, addr: u64, len: usize) -> Result<Window, Fault> {
        let slice =
            self.map.get_slice(GuestAddress(addr), len).map_err(|_| Fault { addr, len: len as u64 })?;
        let at = slice.ptr_guard_mut().as_ptr();
        // SAFETY: `slice` covers `len` bytes from `at`, mapped for as long as this `Memory` lives, and the
        // window keeps it alive. All users of a `Window` go through volatile or atomic access.
        let slice = unsafe { VolatileSlice::new(at, len) };
        Ok(Window { slice, _memory: self.clone() })
    }
}

/// See [`Memory::window`].
#[derive(Debug)]
pub struct Window {
    pub slice: VolatileSlice<'static>,
    _memory: Arc<Memory>,
}

/// Which pages we wrote, for a front end that migrates the guest. One bit per 4 KiB page.
#[derive(Debug)]
pub struct DirtyLog {
    _watch: Watch,
    bits: MmapRegion<()>,
}

const LOG_PAGE_BYTES: u64 = 4096;

impl DirtyLog {
    pub fn map(file: File, offset: u64, len: u64, line: &Arc<Lifeline>) -> Result<DirtyLog, RegionRefused> {
        check_file(&file, offset, len)?;
        let len = usize::try_from(len).map_err(|_| RegionRefused::TooLarge)?;
        let bits = MmapRegion::from_file(FileOffset::new(file, offset), len)
            .map_err(|e| RegionRefused::Map(io::Error::other(e)))?;
        Ok(DirtyLog { _watch: Watch::new(&bits, line, Cause::LogGone), bits })
    }

    /// Pages beyond the log are the front end's mistake and are passed over.
    pub fn mark(&self, addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = addr / LOG_PAGE_BYTES;
        let last = addr.saturating_add(len - 1) / LOG_PAGE_BYTES;
        for page in first..=last {
            let Ok(byte) = usize::try_from(page / 8) else { return };
            if byte >= self.bits.size() {
                return;
            }
            // SAFETY: `byte` is inside the mapping, which lives as long as `self`; the other side uses atomic
            // access on it too.
            let bits = unsafe { AtomicU8::from_ptr(self.bits.as_ptr().add(byte)) };
            bits.fetch_or(1 << (page % 8), Ordering::Relaxed);
        }
    }
}

/// Why a region of the front end's is not mapped. The message is refused; the session goes on.
#[derive(Debug, thiserror::Error)]
pub enum RegionRefused {
    #[error("its addresses overflow or its size is zero")]
    BadRange,
    #[error("its file descriptor is not a file of memory")]
    NotMemory,
    #[error("it is longer than the file behind it")]
    TooShort,
    #[error("its file may be shrunk under us")]
    Unsealed,
    #[error("the guest's memory is not shared with us: what the guest writes is not there. {HOW_TO_SHARE}")]
    Private,
    #[error("it overlaps another region")]
    Overlaps,
    #[error("too many regions")]
    TooMany,
    #[error("more memory than we are willing to map")]
    TooLarge,
    #[error("no such region")]
    Unknown,
    #[error("cannot map it")]
    Map(#[source] io::Error),
}

fn check_file(file: &File, offset: u64, len: u64) -> Result<Stat, RegionRefused> {
    let stat = rustix::fs::fstat(file.as_fd()).map_err(|e| RegionRefused::Map(e.into()))?;
    // memfd, tmpfs and hugetlbfs are all regular files; a device's memory has no business here.
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(RegionRefused::NotMemory);
    }
    let end = offset.checked_add(len).ok_or(RegionRefused::BadRange)?;
    if u64::try_from(stat.st_size).unwrap_or(0) < end {
        return Err(RegionRefused::TooShort);
    }
    Ok(stat)
}

/// One region as the front end described it.
#[derive(Debug)]
struct Entry {
    user_addr: u64,
    guest_addr: u64,
    len: u64,
    /// Which bytes of which file: device, inode, offset.
    of: (u64, u64, u64),
    /// Before what it watches: see [`Watch`].
    watch: Arc<Watch>,
    region: Arc<GuestRegionMmap<()>>,
}

impl Entry {
    /// Whether all of it is there still, at the same addresses of the guest's, in another table's entry.
    fn is_in(&self, other: &Entry) -> bool {
        let (device, inode, offset) = other.of;
        self.guest_addr >= other.guest_addr
            && self.guest_addr + self.len <= other.guest_addr + other.len
            && self.of == (device, inode, offset + (self.guest_addr - other.guest_addr))
    }
}

/// What the front end told us to map, by its own addresses.
#[derive(Debug)]
pub struct MemoryTable {
    entries: Vec<Entry>,
    require_sealed: bool,
    front_end: Peer,
    /// Of the session that it belongs to.
    line: Arc<Lifeline>,
}

impl MemoryTable {
    pub fn new(require_sealed: bool, front_end: Peer, line: Arc<Lifeline>) -> MemoryTable {
        MemoryTable { entries: Vec::new(), require_sealed, front_end, line }
    }

    /// The whole table anew. On refusal the old one stays. True: something of it is gone.
    pub fn replace(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<bool, RegionRefused> {
        let mut new = MemoryTable::new(self.require_sealed, self.front_end.clone(), self.line.clone());
        for (region, file) in regions.iter().zip(files) {
            new.add(region, file)?;
        }
        let takes_away = !self.entries.iter().all(|old| new.entries.iter().any(|new| old.is_in(new)));
        *self = new;
        Ok(takes_away)
    }

    pub fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<(), RegionRefused> {
        // The message is packed: copy the fields before looking at them.
        let (guest_addr, len, user_addr, offset) =
            (region.guest_phys_addr, region.memory_size, region.user_addr, region.mmap_offset);
        let ends = [guest_addr, user_addr, offset].map(|start| start.checked_add(len));
        if len == 0 || ends.contains(&None) {
            return Err(RegionRefused::BadRange);
        }
        if self.entries.len() >= MEMORY_SLOTS_MAX {
            return Err(RegionRefused::TooMany);
        }
        let mapped: u64 = self.entries.iter().map(|e| e.len).sum();
        if mapped.saturating_add(len) > MAPPED_BYTES_MAX {
            return Err(RegionRefused::TooLarge);
        }
        // Two names for one piece of guest-physical memory are a mistake; one piece of the front end's memory
        // under two guest addresses is an alias, and firmware has some.
        if self.entries.iter().any(|e| guest_addr < e.guest_addr + e.len && e.guest_addr < guest_addr + len) {
            return Err(RegionRefused::Overlaps);
        }
        let stat = check_file(&file, offset, len)?;
        if self.require_sealed {
            let seals = rustix::fs::fcntl_get_seals(&file).map_err(|_| RegionRefused::Unsealed)?;
            if !seals.contains(SealFlags::SHRINK) {
                return Err(RegionRefused::Unsealed);
            }
        }
        if is_private(&self.front_end, user_addr, &file) {
            return Err(RegionRefused::Private);
        }
        let size = usize::try_from(len).map_err(|_| RegionRefused::TooLarge)?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), size)
            .map_err(|e| RegionRefused::Map(io::Error::other(e)))?;
        // A guest's memory has no place in our core dumps. Best effort: some file systems refuse.
        // SAFETY: the range is exactly the mapping just made, and the advice does not change its contents.
        let _ =
            unsafe { rustix::mm::madvise(mapping.as_ptr().cast(), size, rustix::mm::Advice::LinuxDontDump) };
        let watch = Arc::new(Watch::new(&mapping, &self.line, Cause::MemoryGone));
        let region =
            GuestRegionMmap::new(mapping, GuestAddress(guest_addr)).ok_or(RegionRefused::BadRange)?;
        let of = (stat.st_dev, stat.st_ino, offset);
        self.entries.push(Entry { user_addr, guest_addr, len, of, watch, region: Arc::new(region) });
        Ok(())
    }

    pub fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<(), RegionRefused> {
        let (guest_addr, len, user_addr) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        let at = self
            .entries
            .iter()
            .position(|e| e.guest_addr == guest_addr && e.len == len && e.user_addr == user_addr)
            .ok_or(RegionRefused::Unknown)?;
        self.entries.remove(at);
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The front end's address as a guest-physical one.
    pub fn to_guest(&self, user_addr: u64) -> Option<u64> {
        let entry =
            self.entries.iter().find(|e| user_addr >= e.user_addr && user_addr - e.user_addr < e.len)?;
        Some(user_addr - entry.user_addr + entry.guest_addr)
    }

    /// What is mapped now, for the I/O thread.
    pub fn snapshot(&self) -> Arc<Memory> {
        let mut regions: Vec<_> = self.entries.iter().map(|e| e.region.clone()).collect();
        regions.sort_by_key(|region| vm_memory::GuestMemoryRegion::start_addr(region.as_ref()));
        let map = if regions.is_empty() {
            GuestMemoryMmap::new()
        } else {
            GuestMemoryMmap::from_arc_regions(regions).expect("sorted, and `add` refuses overlaps")
        };
        let watches = self.entries.iter().map(|e| e.watch.clone()).collect();
        Arc::new(Memory { _watches: watches, ..Memory::new(map) })
    }
}
