//! The directory of this process: whose it is while it runs.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("another process uses {0}; one chunkserver serves one directory")]
    InUse(PathBuf),
    #[error("{dir} is not empty (it has {found:?}) and is not a chunkserver's data directory")]
    NotOurs { dir: PathBuf, found: String },
    /// Looked at, not taken: it has no lock file.
    #[error("{0} is not a chunkserver's data directory")]
    NotOne(PathBuf),
    #[error("cannot use {dir}")]
    Io { dir: PathBuf, source: io::Error },
}

/// Holds the directory for this process alone.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Takes the directory, or makes it. One with other things in it is left alone.
    pub fn take(path: &Path) -> Result<Self, DataDirError> {
        let failed = |source| DataDirError::Io { dir: path.to_owned(), source };
        fs::create_dir_all(path).map_err(failed)?;
        let lock_file = path.join("lock");
        if !lock_file.exists()
            && let Some(entry) = fs::read_dir(path).map_err(failed)?.next()
        {
            let found = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            // A file system's own folder is not somebody's data.
            if found != "lost+found" {
                return Err(DataDirError::NotOurs { dir: path.to_owned(), found });
            }
        }
        let lock =
            OpenOptions::new().create(true).truncate(false).write(true).open(&lock_file).map_err(failed)?;
        Self::hold(path, lock)
    }

    /// Takes a directory that some chunkserver has used, without changing anything in it.
    pub fn look(path: &Path) -> Result<Self, DataDirError> {
        let failed = |source| DataDirError::Io { dir: path.to_owned(), source };
        fs::read_dir(path).map_err(failed)?;
        match File::open(path.join("lock")) {
            Ok(lock) => Self::hold(path, lock),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(DataDirError::NotOne(path.to_owned()))
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn hold(path: &Path, lock: File) -> Result<Self, DataDirError> {
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(DataDirError::InUse(path.to_owned())),
            Err(error) => Err(DataDirError::Io { dir: path.to_owned(), source: error.into() }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the chunk store lives.
    pub fn store(&self) -> PathBuf {
        self.path.join("store")
    }

    /// Where the log lives.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }
}

#[cfg(test)]
mod tests {
    use super::{DataDir, DataDirError};

    #[test]
    fn a_directory_is_one_processs_and_never_somebody_elses() {
        let dir = tempfile::tempdir().expect("temp dir");
        let held = DataDir::take(dir.path()).expect("empty");
        assert!(matches!(DataDir::take(dir.path()), Err(DataDirError::InUse(_))));
        drop(held);
        DataDir::take(dir.path()).expect("ours, and free again");

        let other = tempfile::tempdir().expect("temp dir");
        std::fs::write(other.path().join("holiday.jpg"), "x").expect("write");
        assert!(matches!(DataDir::take(other.path()), Err(DataDirError::NotOurs { .. })));
        assert_eq!(std::fs::read_dir(other.path()).expect("list").count(), 1);
    }
}
