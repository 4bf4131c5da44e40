//! The real disk: a directory of a file system. The only file that opens chunk files.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use evolute_daemon::door::open;
use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev};

use super::{Disk, File, Space};

/// Parts of one `pwritev`, as many as Linux takes.
const PARTS_MAX: usize = 1024;

pub struct Direct {
    root: PathBuf,
}

impl Direct {
    /// `root` must exist.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_path_buf() }
    }
}

impl Direct {
    /// An existing file, for reading alone.
    pub(super) fn look(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = open(|| fs::File::open(self.root.join(path)))?;
        Ok(Arc::new(DirectFile { file }))
    }
}

impl Disk for Direct {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = open(|| fs::OpenOptions::new().read(true).write(true).open(self.root.join(path)))?;
        Ok(Arc::new(DirectFile { file }))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create_new(true);
        let file = open(|| options.open(self.root.join(path)))?;
        Ok(Arc::new(DirectFile { file }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(self.root.join(path))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        match fs::create_dir(self.root.join(path)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(self.root.join(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        open(|| fs::File::open(self.root.join(path)))?.sync_all()
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in open(|| fs::read_dir(self.root.join(path)))? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    }

    fn space(&self) -> io::Result<Space> {
        space(&self.root)
    }
}

/// How large the file system of `path` is, and what is left of it for us.
pub fn space(path: &Path) -> io::Result<Space> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(Space { total: stat.f_blocks * stat.f_frsize, available: stat.f_bavail * stat.f_frsize })
}

struct DirectFile {
    file: fs::File,
}

impl File for DirectFile {
    fn read(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            match self.file.read_at(&mut into[done..], offset + done as u64) {
                Ok(0) => {
                    into[done..].fill(0);
                    return Ok(());
                }
                Ok(read) => done += read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn read_cached(&self, into: &mut [u8], offset: u64) -> io::Result<bool> {
        let wanted = into.len();
        match preadv2(&self.file, &mut [IoSliceMut::new(into)], offset, ReadWriteFlags::NOWAIT) {
            // Fewer: the rest is not in the page cache (or past the end: let the other way find out).
            Ok(read) => Ok(read == wanted),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            // tmpfs and others that never wait for a device.
            Err(Errno::OPNOTSUPP) => self.read(into, offset).map(|()| true),
            Err(e) => Err(e.into()),
        }
    }

    fn write(&self, parts: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        let mut parts = parts;
        while !parts.is_empty() {
            let batch = parts.len().min(PARTS_MAX);
            match pwritev(&self.file, &parts[..batch], offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    offset += written as u64;
                    IoSlice::advance_slices(&mut parts, written);
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        match fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
            // Nothing relies on the zeroes but freed space: a block not marked written is never read.
            Err(Errno::OPNOTSUPP) => Ok(()),
            other => Ok(other?),
        }
    }

    fn start_writeback(&self) {
        use std::os::fd::AsRawFd;
        // SAFETY: takes no pointers; the descriptor is open as long as `self.file` lives.
        // A hint: what it cannot start, the sync will do, and report.
        unsafe { libc::sync_file_range(self.file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    }

    fn forget_cached(&self, offset: u64, len: u64) {
        // A hint: at worst the read that follows is answered from memory, as other reads are.
        let _ = fadvise(&self.file, offset, NonZeroU64::new(len), Advice::DontNeed);
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
