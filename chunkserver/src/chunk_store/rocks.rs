//! RocksDB as the catalog's key-value store.

use std::io;
use std::path::{Path, PathBuf};

use rocksdb::{DB, DBCompressionType, DBRecoveryMode, Direction, ErrorKind, IteratorMode, LogLevel, Options};
use rocksdb::{WriteBatch, WriteOptions};

use super::catalog::{KeyChange, KeyValue, damaged};
use super::error::StoreError;

pub struct Rocks {
    db: DB,
    path: PathBuf,
}

impl Rocks {
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::with(path, false)
    }

    /// For reading alone: nothing in the directory changes.
    pub fn look(path: &Path) -> Result<Self, StoreError> {
        let db = DB::open_for_read_only(&options(), path, false).map_err(|e| named(path, e))?;
        Ok(Self { db, path: path.to_path_buf() })
    }

    pub fn create(path: &Path) -> Result<Self, StoreError> {
        Self::with(path, true)
    }

    fn with(path: &Path, create: bool) -> Result<Self, StoreError> {
        let mut options = options();
        options.create_if_missing(create);
        options.set_error_if_exists(create);
        let db = DB::open(&options, path).map_err(|e| named(path, e))?;
        Ok(Self { db, path: path.to_path_buf() })
    }
}

fn options() -> Options {
    let mut options = Options::default();
    // A few MB of records: little memory, few files, no background load.
    options.set_write_buffer_size(4 << 20);
    options.set_max_total_wal_size(16 << 20);
    options.set_max_open_files(64);
    options.set_max_background_jobs(2);
    options.set_keep_log_file_num(2);
    // Its notes of what it does go to the same disk, and as Debian builds it RocksDB aborts the process at the second
    // note that cannot be written. So it takes none, and a disk that fails is ours to name.
    options.set_log_level(LogLevel::Header);
    options.set_compression_type(DBCompressionType::None);
    options.set_paranoid_checks(true);
    // A batch torn by a crash was never acknowledged: it and what follows are dropped. Should an older batch rot, we
    // fall back to the checkpoint before it: the log begins later than that one's `applied`, and the caller refuses.
    options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    options
}

impl KeyValue for Rocks {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.db.get(key).map_err(|e| named(&self.path, e))
    }

    fn scan(&self, prefix: u8, each: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), StoreError> {
        for pair in self.db.iterator(IteratorMode::From(&[prefix], Direction::Forward)) {
            let (key, value) = pair.map_err(|e| named(&self.path, e))?;
            if key.first() != Some(&prefix) {
                break;
            }
            each(&key, &value);
        }
        Ok(())
    }

    fn commit(&self, changes: Vec<KeyChange>) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        for (key, value) in changes {
            match value {
                Some(value) => batch.put(key, value),
                None => batch.delete(key),
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(true);
        self.db.write_opt(batch, &options).map_err(|e| {
            StoreError::sync_failed(format!("the batch to {}", self.path.display()), io::Error::other(e))
        })
    }
}

fn named(path: &Path, error: rocksdb::Error) -> StoreError {
    match error.kind() {
        ErrorKind::IOError | ErrorKind::Busy | ErrorKind::TryAgain => {
            StoreError::io(format!("opening {}", path.display()), io::Error::other(error))
        }
        _ => damaged(path, error.into_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::Rocks;
    use crate::chunk_store::catalog::KeyValue;

    #[test]
    fn rocksdb_takes_no_notes_that_a_failing_disk_could_refuse() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("catalog");
        for life in 0..2 {
            let rocks = if life == 0 { Rocks::create(&path) } else { Rocks::open(&path) };
            let rocks = rocks.expect("opened");
            rocks.commit(vec![(b"key".to_vec(), Some(vec![1]))]).expect("durable");
            drop(rocks);
            assert_eq!(std::fs::metadata(path.join("LOG")).expect("made").len(), 0, "life {life}");
        }
    }
}
