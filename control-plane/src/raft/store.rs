//! The applied state on disk: RocksDB, one synced batch per entry.
//!
//! A batch holds the records that the entry changed and the position of the entry, so what is on disk is always the
//! state after some whole entry. The raft log keeps what comes after it.
//!
//! ```text
//!  's' + record key   → record          (state/record.rs)
//!  "applied"          → term, index     two u64, highest byte first
//!  "membership"       → as raft/ gave it
//! ```

use std::fs::File;
use std::sync::Arc;

use bytes::Bytes;
use evolute_raft::{Position, Restored};
use rocksdb::{DB, IteratorMode, LogLevel, Options, WriteBatch, WriteOptions};

use super::data_dir::DataDir;
use crate::state::{Damaged, Key, State};

const RECORD: u8 = b's';
const APPLIED: &[u8] = b"applied";
const MEMBERSHIP: &[u8] = b"membership";
/// The whole state of a large cluster is tens of MiB; RocksDB's default of 64 MiB per buffer would never be filled.
const WRITE_BUFFER_BYTES: usize = 8 << 20;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk, the file system, or RocksDB itself.
    #[error("the state's RocksDB failed")]
    RocksDb(#[from] rocksdb::Error),
    /// What RocksDB vouches for makes no sense to us.
    #[error("the stored state is damaged")]
    Damaged(#[from] Damaged),
    #[error("the stored state is damaged: the applied position has {0} bytes")]
    Position(usize),
}

pub struct Store {
    db: DB,
    /// Given back after the database is closed: fields are dropped in this order.
    _lock: Arc<File>,
}

impl Store {
    /// Opens what is there, or makes it in a new directory.
    pub fn open(dir: &DataDir) -> Result<(Self, State, Restored), StoreError> {
        let mut options = Options::default();
        options.create_if_missing(dir.is_new());
        options.set_write_buffer_size(WRITE_BUFFER_BYTES);
        options.set_max_open_files(64);
        options.set_keep_log_file_num(2);
        // As Debian builds it RocksDB aborts the process at the second note of its own that its disk refuses. It takes none
        // (with a bound on their size it would write headers all the same).
        options.set_log_level(LogLevel::Header);
        let db = DB::open(&options, dir.state())?;
        // What recovery read out of RocksDB's own log may not be synced yet, and raft is about to rely on it.
        db.flush()?;
        let mut state = State::default();
        let mut restored = Restored::default();
        for item in db.iterator(IteratorMode::Start) {
            let (key, value) = item?;
            match key.split_first() {
                Some((&RECORD, key)) => state.load(key, &value)?,
                _ if &*key == APPLIED => restored.applied = Some(decode_position(&value)?),
                _ if &*key == MEMBERSHIP => restored.membership = Some(Bytes::from(value)),
                _ => return Err(Damaged::Key(key.into_vec()).into()),
            }
        }
        Ok((Self { db, _lock: dir.lock() }, state, restored))
    }

    /// One entry's effect. Durable when this returns.
    pub fn save(
        &self,
        at: Position,
        membership: Option<&Bytes>,
        records: impl Iterator<Item = (Key, Option<Vec<u8>>)>,
    ) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        for (key, record) in records {
            let mut full = vec![RECORD];
            full.extend(key.encode());
            match record {
                Some(record) => batch.put(full, record),
                None => batch.delete(full),
            }
        }
        if let Some(membership) = membership {
            batch.put(MEMBERSHIP, membership);
        }
        batch.put(APPLIED, [at.term.to_be_bytes(), at.index.to_be_bytes()].concat());
        let mut synced = WriteOptions::default();
        synced.set_sync(true);
        Ok(self.db.write_opt(batch, &synced)?)
    }
}

fn decode_position(bytes: &[u8]) -> Result<Position, StoreError> {
    let wrong = || StoreError::Position(bytes.len());
    let (term, index) = bytes.split_at_checked(8).ok_or_else(wrong)?;
    Ok(Position {
        term: u64::from_be_bytes(term.try_into().map_err(|_| wrong())?),
        index: u64::from_be_bytes(index.try_into().map_err(|_| wrong())?),
    })
}
