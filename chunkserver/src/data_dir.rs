//! The directory of this process: whose it is while it runs.
//!
//! A lock file says that a directory is a chunkserver's. One that is there, empty and without it is never taken by
//! itself: it looks like a mount point without its disk, and a new chunkserver in it would fill the root file system.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use evolute_daemon::shell::quoted_path;
use rustix::fs::{FlockOperation, flock};

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("another process uses {0}; one chunkserver serves one directory")]
    InUse(PathBuf),
    #[error(
        "the data directory {dir} is empty: is its disk mounted? If it is to hold a new chunkserver, run: \
         evolute-chunkserver init --data-dir {}",
        quoted_path(dir)
    )]
    Empty { dir: PathBuf },
    #[error("there is no data directory {dir}, and --existing forbids to make one: is its disk mounted?")]
    Absent { dir: PathBuf },
    #[error("{dir} is not empty (it has {found:?}) and is not a chunkserver's data directory")]
    NotOurs { dir: PathBuf, found: String },
    /// Looked at, not taken: it has no lock file.
    #[error("{0} is not a chunkserver's data directory")]
    NotOne(PathBuf),
    #[error("cannot use {dir}")]
    Io { dir: PathBuf, source: io::Error },
}

/// What to do about a directory that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    Made,
    Refused,
}

/// Its presence says that the directory is a chunkserver's.
const LOCK: &str = "lock";

/// Holds the directory for this process alone.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Takes the directory. One that is `absent` is made, unless that is forbidden; an empty one is refused, and one
    /// with other things in it is left alone.
    pub fn take(path: &Path, absent: Absent) -> Result<Self, DataDirError> {
        let failed = |source| DataDirError::Io { dir: path.to_owned(), source };
        if !path.try_exists().map_err(failed)? {
            if absent == Absent::Refused {
                return Err(DataDirError::Absent { dir: path.to_owned() });
            }
        } else if is_unused(path)? {
            return Err(DataDirError::Empty { dir: path.to_owned() });
        }
        Self::mark(path)
    }

    /// Makes an absent or an empty directory one that a new chunkserver may take. One that is a chunkserver's already
    /// is left as it is.
    pub fn init(path: &Path) -> Result<(), DataDirError> {
        let failed = |source| DataDirError::Io { dir: path.to_owned(), source };
        let _held = Self::mark(path)?;
        File::open(path).and_then(|dir| dir.sync_all()).map_err(failed)
    }

    fn mark(path: &Path) -> Result<Self, DataDirError> {
        let failed = |source| DataDirError::Io { dir: path.to_owned(), source };
        fs::create_dir_all(path).map_err(failed)?;
        is_unused(path)?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(path.join(LOCK));
        Self::hold(path, lock.map_err(failed)?)
    }

    /// Takes a directory that some chunkserver has used, without changing anything in it.
    pub fn look(path: &Path) -> Result<Self, DataDirError> {
        let failed = |source| DataDirError::Io { dir: path.to_owned(), source };
        fs::read_dir(path).map_err(failed)?;
        match File::open(path.join(LOCK)) {
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

/// Nobody has used it: it is as an administrator or a new file system left it. With somebody else's things it is refused.
fn is_unused(path: &Path) -> Result<bool, DataDirError> {
    let failed = |source| DataDirError::Io { dir: path.to_owned(), source };
    if path.join(LOCK).exists() {
        return Ok(false);
    }
    for entry in fs::read_dir(path).map_err(failed)? {
        let found = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        // A file system's own folder is not somebody's data.
        if found != "lost+found" {
            return Err(DataDirError::NotOurs { dir: path.to_owned(), found });
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::{Absent, DataDir, DataDirError};

    fn take(path: &std::path::Path) -> Result<DataDir, DataDirError> {
        DataDir::take(path, Absent::Made)
    }

    #[test]
    fn a_directory_is_one_processs_and_never_somebody_elses() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("not/there/yet");
        let held = take(&path).expect("absent");
        assert!(matches!(take(&path), Err(DataDirError::InUse(_))));
        drop(held);
        DataDir::take(&path, Absent::Refused).expect("ours, and free again");

        let other = tempfile::tempdir().expect("temp dir");
        for taken in ["lost+found/x", "holiday.jpg/x"] {
            std::fs::create_dir_all(other.path().join(taken)).expect("made");
        }
        for refused in [take(other.path()).map(drop), DataDir::init(other.path())] {
            assert!(matches!(refused, Err(DataDirError::NotOurs { found, .. }) if found == "holiday.jpg"));
        }
        assert_eq!(std::fs::read_dir(other.path()).expect("list").count(), 2);
    }

    /// A mount point without its disk is empty, too; so is a new file system.
    #[test]
    fn an_empty_directory_becomes_ours_only_when_that_was_asked_for() {
        let dir = tempfile::Builder::new().prefix("a b").tempdir().expect("temp dir");
        for _ in 0..2 {
            let error = take(dir.path()).expect_err("empty");
            assert!(matches!(error, DataDirError::Empty { .. }), "{error}");
            assert!(error.to_string().contains("evolute-chunkserver init --data-dir '/"), "{error}");
            std::fs::create_dir_all(dir.path().join("lost+found")).expect("made");
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1, "not even a lock file");
        for _ in 0..2 {
            DataDir::init(dir.path()).expect("asked for");
        }
        let held = take(dir.path()).expect("as asked for");
        assert!(matches!(DataDir::init(dir.path()), Err(DataDirError::InUse(_))), "nor while it is used");
        drop(held);
    }

    #[test]
    fn an_absent_directory_is_not_made_where_that_is_forbidden() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("disk/cs");
        assert!(matches!(DataDir::take(&path, Absent::Refused), Err(DataDirError::Absent { .. })));
        assert!(!dir.path().join("disk").exists());
    }
}
