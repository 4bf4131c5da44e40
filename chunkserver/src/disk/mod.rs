//! The disk as the chunk store sees it, and what durable means.
//!
//! This is the seam for tests: [`direct::Direct`] is a directory of the real file system and the only code that
//! opens chunk files; [`crash::Crash`] keeps in memory what a crash may leave behind. One suite of contracts
//! (`tests/chunk_store_disk.rs`) runs over both. [`read_only::ReadOnly`] is a directory that must not change.
//!
//! What durable means here:
//!
//! - Bytes are durable once [`File::sync`] returned Ok; until then a crash keeps or loses each 512-byte sector by
//!   itself. A sector is never half written.
//! - A name (created or removed) is durable once [`Disk::sync_dir`] of its directory returned Ok; until then a
//!   crash may undo it.
//! - After a failed sync nobody knows which sectors are there. It is never repeated.
//!
//! Offsets and lengths are whole sectors. Space never written reads as zeroes, also past the end of the file.

pub mod crash;
pub mod direct;
pub mod read_only;

use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::Arc;

/// A directory tree on one disk; paths are relative to it.
pub trait Disk: Send + Sync {
    /// An existing file, for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>>;
    /// A new file; refuses if there is one.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// A new directory; fine if it is there.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// An empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// The names created in and removed from `path` are durable from now on.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Names in a directory, in no order.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    fn space(&self) -> io::Result<Space>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Space {
    pub total: u64,
    pub available: u64,
}

pub trait File: Send + Sync {
    fn read(&self, into: &mut [u8], offset: u64) -> io::Result<()>;
    /// Reads only what takes no waiting for the device; `false`: some of it would, and `into` holds nothing of use.
    fn read_cached(&self, into: &mut [u8], offset: u64) -> io::Result<bool>;
    /// All of `parts`, one after the other. On an error any of it may have been written.
    fn write(&self, parts: &mut [IoSlice<'_>], offset: u64) -> io::Result<()>;
    /// The range reads as zeroes and its space is freed, where the file system can.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Begins to write back what was written, so that a later [`Self::sync`] of many files waits less. A hint.
    fn start_writeback(&self) {}
    /// Drops what memory keeps of a range and the device has, so that the next read asks the device. A hint.
    fn forget_cached(&self, _offset: u64, _len: u64) {}
    fn sync(&self) -> io::Result<()>;
}
