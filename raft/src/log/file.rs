//! One file of the log: opened twice, for writes that are durable when they complete and for reads from the page
//! cache. Or once, by who only looks.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use evolute_daemon::door::open;

use super::LogError;

/// A file in one of its lives.
#[derive(Debug)]
pub struct LogFile {
    pub path: PathBuf,
    read: File,
    /// `None`: [`Access::Read`].
    write: Option<File>,
}

/// What may be done to the files of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Write,
    /// Nothing in the directory changes, nor its names.
    Read,
}

/// What is prefilled at once.
const FILL: usize = 1 << 20;

pub fn failed(doing: &'static str, file: &Path) -> impl FnOnce(io::Error) -> LogError {
    move |source| LogError::Io { doing, file: file.to_owned(), source: Arc::new(source) }
}

impl LogFile {
    /// Opens an existing file.
    pub fn open(path: PathBuf, access: Access) -> Result<Self, LogError> {
        let read = open(|| File::open(&path)).map_err(failed("open", &path))?;
        if access == Access::Read {
            return Ok(Self { path, read, write: None });
        }
        let with = |flags| open(|| OpenOptions::new().write(true).custom_flags(flags).open(&path));
        // A file system that cannot write around its cache says EINVAL; O_DSYNC alone is as durable, only slower.
        let write = with(libc::O_DIRECT | libc::O_DSYNC)
            .or_else(|_| with(libc::O_DSYNC))
            .map_err(failed("open for writing", &path))?;
        Ok(Self { path, read, write: Some(write) })
    }

    /// Makes a file of `bytes` zeroes. They are really written: a block that was only promised would cost the
    /// file system a journal commit at its first write.
    pub fn create(path: PathBuf, bytes: u64) -> Result<Self, LogError> {
        let unfinished = path.with_extension("new");
        let fill = || -> io::Result<()> {
            let mut file = open(|| File::create(&unfinished))?;
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
            let zeroes = vec![0; FILL];
            let mut left = bytes;
            while left > 0 {
                let now = usize::try_from(left).unwrap_or(FILL).min(FILL);
                file.write_all(&zeroes[..now])?;
                left -= now as u64;
            }
            file.sync_all()?;
            std::fs::rename(&unfinished, &path)?;
            sync_dir(&path)
        };
        if let Err(error) = fill() {
            // What there is of it is space that others need. Should it stay, the next try begins it anew.
            let _ = std::fs::remove_file(&unfinished);
            return Err(failed("create", &path)(error));
        }
        Self::open(path, Access::Write)
    }

    pub fn write_fd(&self) -> RawFd {
        self.write.as_ref().expect("who only looks never writes").as_raw_fd()
    }

    /// Fills `into` from `offset`; a file that ends before is an error.
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> Result<(), LogError> {
        self.read.read_exact_at(into, offset).map_err(failed("read", &self.path))
    }

    pub fn len(&self) -> Result<u64, LogError> {
        Ok(self.read.metadata().map_err(failed("look at", &self.path))?.len())
    }

    /// Takes the file out of the directory. Its bytes go with its last user.
    pub fn remove(&self) -> Result<(), LogError> {
        std::fs::remove_file(&self.path).map_err(failed("remove", &self.path))
    }
}

/// Makes names durable.
fn sync_dir(file: &Path) -> io::Result<()> {
    let dir = file.parent().unwrap_or(Path::new("."));
    open(|| File::open(dir))?.sync_all()
}
