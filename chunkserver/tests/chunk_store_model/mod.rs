//! A chunk store beside a model of it, on a disk that can lose power.
//!
//! The model is a log of changes and, after each of them, what every sector must hold. The store may be killed or
//! lose power at any moment: it is opened again on what survived, the log is applied from what it says is applied,
//! and then it must hold exactly what the model holds.

#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use evolute_chunkserver::chunk_store::seams::{Catalog, KeyChange, KeyValue, Parts};
use evolute_chunkserver::chunk_store::{
    ChunkStore, CopysetRecord, Extent, Identity, Opened, StageError, Staging, StoreError, StoreOptions,
};
use evolute_chunkserver::disk::Disk;
use evolute_chunkserver::disk::crash::{Crash, Survives};
use evolute_protocol::checksum::{checksums, first_mismatch};
use evolute_protocol::geometry::CHUNK_BYTES;
use evolute_protocol::id::{ChunkIndex, ChunkKey, ChunkserverId, ClusterId, CopysetId, VolumeId};

pub const COPYSET: CopysetId = CopysetId(7);
/// Another replica of the same store, with one chunk, in a volume of the first one's.
pub const OTHER: CopysetId = CopysetId(8);
const OTHER_CHUNK: ChunkKey = ChunkKey { volume: VolumeId(1), index: ChunkIndex(9) };
pub const CHUNKS: usize = 3;
/// Sectors that are written and looked at: blocks 60 to 67, on both sides of a border between checksum sectors.
pub const SECTORS: usize = 64;
const FIRST_SECTOR: usize = 480;
const SECTOR: usize = 512;

pub fn identity() -> Identity {
    Identity {
        cluster: ClusterId([9; 16]),
        chunkserver: ChunkserverId(1),
        token: Bytes::from_static(b"token"),
    }
}

/// Chunks 0 and 1 are of one volume, chunk 2 of another.
pub fn chunk_key(chunk: usize) -> ChunkKey {
    let (volume, index) = [(1, 5), (1, 6), (2, 5)][chunk];
    ChunkKey { volume: VolumeId(volume), index: ChunkIndex(index) }
}

#[derive(Debug, Clone)]
pub enum Change {
    Write {
        chunk: usize,
        sector: usize,
        count: usize,
    },
    Zero {
        chunk: usize,
        sector: usize,
        count: usize,
    },
    DropChunk {
        chunk: usize,
    },
    DropVolume {
        chunk: usize,
    },
    /// The replica as another one had it then: nothing but these ranges (chunk, sector, count).
    Install {
        ranges: Vec<(usize, usize, usize)>,
    },
}

/// What each sector holds: the number of the change that wrote it, 0 for zeroes.
pub type Contents = [[u64; SECTORS]; CHUNKS];

fn sector_bytes(tag: u64, sector: usize) -> Vec<u8> {
    let word = if tag == 0 { 0 } else { tag << 16 | sector as u64 };
    word.to_le_bytes().repeat(SECTOR / 8)
}

impl Change {
    fn on_model(&self, tag: u64, contents: &mut Contents) {
        match *self {
            Self::Write { chunk, sector, count } => contents[chunk][sector..sector + count].fill(tag),
            Self::Zero { chunk, sector, count } => contents[chunk][sector..sector + count].fill(0),
            Self::DropChunk { chunk } => contents[chunk] = [0; SECTORS],
            Self::DropVolume { chunk } => {
                for other in (0..CHUNKS).filter(|c| chunk_key(*c).volume == chunk_key(chunk).volume) {
                    contents[other] = [0; SECTORS];
                }
            }
            Self::Install { ref ranges } => {
                *contents = Contents::default_contents();
                for (chunk, sector, count) in ranges {
                    contents[*chunk][*sector..sector + count].fill(tag);
                }
            }
        }
    }

    fn on_store(&self, tag: u64, store: &mut ChunkStore) {
        let offset = |sector: usize| u32::try_from((FIRST_SECTOR + sector) * SECTOR).expect("in a chunk");
        let len = |count: usize| u32::try_from(count * SECTOR).expect("in a chunk");
        match *self {
            Self::Write { chunk, sector, count } => {
                let data: Vec<u8> = (sector..sector + count).flat_map(|s| sector_bytes(tag, s)).collect();
                let sums = checksums(u64::from(offset(sector)), &data);
                store.write(COPYSET, chunk_key(chunk), offset(sector), Bytes::from(data), &sums);
            }
            Self::Zero { chunk, sector, count } => {
                store.discard(COPYSET, chunk_key(chunk), offset(sector), len(count));
            }
            Self::DropChunk { chunk } => {
                store.discard(COPYSET, chunk_key(chunk), 0, u32::try_from(CHUNK_BYTES).expect("16 MiB"));
            }
            Self::DropVolume { chunk } => store.drop_volume(COPYSET, chunk_key(chunk).volume),
            Self::Install { .. } => panic!("the log up to an installed replica is gone"),
        }
    }
}

pub fn record(copyset: CopysetId, applied: u64) -> CopysetRecord {
    CopysetRecord { copyset, applied, state: Bytes::new(), created: Bytes::new() }
}

type Pairs = BTreeMap<Vec<u8>, Vec<u8>>;

/// The key-value store, on the same power supply as the disk.
#[derive(Clone)]
pub struct CrashKeyValue {
    pairs: Arc<Mutex<Pairs>>,
    disk: Crash,
    /// Whether the batch under way when the power goes is there afterwards.
    lands: bool,
}

impl KeyValue for CrashKeyValue {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.pairs.lock().unwrap().get(key).cloned())
    }

    fn scan(&self, prefix: u8, each: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), StoreError> {
        let pairs = self.pairs.lock().unwrap();
        pairs.iter().filter(|(key, _)| key[0] == prefix).for_each(|(key, value)| each(key, value));
        Ok(())
    }

    fn commit(&self, changes: Vec<KeyChange>) -> Result<(), StoreError> {
        let was_off = self.disk.is_off();
        let stepped = self.disk.step();
        if stepped.is_ok() || (self.lands && !was_off) {
            let mut pairs = self.pairs.lock().unwrap();
            for (key, value) in changes {
                match value {
                    Some(value) => pairs.insert(key, value),
                    None => pairs.remove(&key),
                };
            }
        }
        stepped.map_err(|_| StoreError::Closed)
    }
}

pub struct World {
    pub disk: Crash,
    pub kv: CrashKeyValue,
    pub store: Option<ChunkStore>,
    pub log: Vec<Change>,
    /// What must be there after each change; one more than there are changes.
    pub history: Vec<Contents>,
    /// A checkpoint was made while the log was still being applied after a crash. The files may then hold sectors
    /// of later changes beside those of earlier ones, until the log is applied to where it had been.
    is_ahead: bool,
    /// How often the other replica's chunk was written, each time whole.
    pub other: u64,
    runtime: tokio::runtime::Runtime,
}

impl World {
    /// A new store, without any change. `lands`: see [`CrashKeyValue`].
    pub fn new(lands: bool) -> Self {
        let disk = Crash::new();
        let kv = CrashKeyValue { pairs: Arc::default(), disk: disk.clone(), lands };
        disk.create_dir("chunks".as_ref()).unwrap();
        disk.create("rescue".as_ref()).unwrap();
        disk.sync_dir("".as_ref()).unwrap();
        Catalog::create(&kv, &identity()).unwrap();
        let mut world = Self::on(disk, kv, Vec::new(), vec![Contents::default_contents()]);
        world.open().expect("a new store opens");
        for copyset in [COPYSET, OTHER] {
            world.store.as_ref().unwrap().put_copyset(record(copyset, 0)).unwrap();
        }
        world
    }

    fn on(disk: Crash, kv: CrashKeyValue, log: Vec<Change>, history: Vec<Contents>) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        Self { disk, kv, store: None, log, history, is_ahead: false, other: 0, runtime }
    }

    /// Opens what is on the disk; gives the number of changes it says are applied. An installation that the crash
    /// undid never was.
    pub fn open(&mut self) -> Result<usize, StoreError> {
        let opened = self.open_all()?;
        let applied = opened.copysets.iter().find(|record| record.copyset == COPYSET);
        let applied = applied.map_or(0, |record| usize::try_from(record.applied).unwrap());
        let installing = |change: &Change| matches!(change, Change::Install { .. });
        if let Some(undone) = self.log[applied..].iter().position(installing) {
            self.log.truncate(applied + undone);
            self.history.truncate(applied + undone + 1);
        }
        Ok(applied)
    }

    /// The other replica's log is applied at once.
    pub fn open_all(&mut self) -> Result<Opened, StoreError> {
        let parts = Parts {
            path: PathBuf::from("crash disk"),
            disk: Arc::new(self.disk.clone()),
            catalog: Box::new(self.kv.clone()),
        };
        let options = StoreOptions { open_chunks_max: Some(2), ..StoreOptions::default() };
        let (store, opened) = ChunkStore::open_parts(parts, options, &identity())?;
        self.store = Some(store);
        let other = opened.copysets.iter().find(|record| record.copyset == OTHER);
        assert!(other.is_none_or(|record| record.applied <= self.other));
        for tag in other.map_or(0, |record| record.applied)..self.other {
            self.apply_other(tag + 1);
        }
        Ok(opened)
    }

    fn apply_other(&mut self, tag: u64) {
        let data: Vec<u8> = (0..SECTORS).flat_map(|sector| sector_bytes(tag, sector)).collect();
        let sums = checksums(0, &data);
        self.store.as_mut().unwrap().write(OTHER, OTHER_CHUNK, 0, Bytes::from(data), &sums);
    }

    pub fn write_other(&mut self) {
        self.other += 1;
        self.apply_other(self.other);
    }

    /// The whole of a replica, brought and installed; on an error it may be there after a crash, or not.
    pub fn install(&mut self, ranges: Vec<(usize, usize, usize)>) -> Result<(), StageError> {
        let change = Change::Install { ranges };
        let mut contents = Contents::default_contents();
        let tag = self.log.len() as u64 + 1;
        change.on_model(tag, &mut contents);
        let mut staging = self.store.as_ref().unwrap().stage(COPYSET);
        self.log.push(change);
        self.history.push(contents);
        self.stage(&mut staging, &contents)?;
        self.finish_install(staging, tag)
    }

    pub fn finish_install(&self, mut staging: Staging, applied: u64) -> Result<(), StageError> {
        self.runtime.block_on(staging.finish())?;
        let install = self.store.as_ref().unwrap().install(staging, record(COPYSET, applied));
        Ok(self.runtime.block_on(install)?)
    }

    pub fn stage(&self, staging: &mut Staging, contents: &Contents) -> Result<(), StageError> {
        for chunk in 0..CHUNKS {
            for block in (0..SECTORS / 8).filter(|b| contents[chunk][b * 8..b * 8 + 8].iter().any(|t| *t > 0))
            {
                let data = Bytes::from(expected(contents, chunk, block));
                let crcs = checksums(0, &data).to_vec();
                let first = u16::try_from(FIRST_SECTOR / 8 + block).unwrap();
                let extent = Extent::Data { first, data, crcs };
                self.runtime.block_on(staging.put(chunk_key(chunk), vec![extent]))?;
            }
        }
        Ok(())
    }

    pub fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// The names of all chunk files.
    pub fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        for volume in self.disk.list("chunks".as_ref()).unwrap() {
            for name in self.disk.list(format!("chunks/{volume}").as_ref()).unwrap() {
                files.push(format!("{volume}/{name}"));
            }
        }
        files.sort();
        files
    }

    pub fn change(&mut self, change: Change) {
        let mut contents = *self.history.last().unwrap();
        self.log.push(change.clone());
        change.on_model(self.log.len() as u64, &mut contents);
        self.history.push(contents);
        change.on_store(self.log.len() as u64, self.store.as_mut().unwrap());
    }

    pub fn replay(&mut self, changes: std::ops::Range<usize>) {
        for nth in changes {
            self.log[nth].on_store(nth as u64 + 1, self.store.as_mut().unwrap());
        }
    }

    pub fn checkpoint(&mut self) -> Result<(), StoreError> {
        self.checkpoint_as_of(self.log.len())
    }

    pub fn checkpoint_as_of(&mut self, applied: usize) -> Result<(), StoreError> {
        let applied = applied as u64;
        let records = vec![record(COPYSET, applied), record(OTHER, self.other)];
        let done = self.store.as_mut().unwrap().begin_checkpoint(records);
        self.is_ahead |= applied < self.log.len() as u64;
        let done = self.runtime.block_on(done)?;
        self.is_ahead &= done.applied.first().is_none_or(|(_, applied)| *applied < self.log.len() as u64);
        Ok(())
    }

    /// Begins a checkpoint and leaves it: whatever follows happens while it drains.
    pub fn begin_checkpoint(&mut self) {
        let records = vec![record(COPYSET, self.log.len() as u64), record(OTHER, self.other)];
        let mut done = Box::pin(self.store.as_mut().unwrap().begin_checkpoint(records));
        let _ = self.runtime.block_on(async { futures_poll_once(&mut done).await });
    }

    /// The process is killed: what was written to files stays as it is.
    pub fn kill(&mut self) {
        self.store = None;
    }

    /// The power goes: what is found afterwards, in a world of its own.
    pub fn after_crash(&mut self, survives: Survives) -> Self {
        self.store = None;
        let disk = self.disk.after_crash(survives);
        let pairs = Arc::new(Mutex::new(self.kv.pairs.lock().unwrap().clone()));
        let kv = CrashKeyValue { pairs, disk: disk.clone(), lands: self.kv.lands };
        let found = Self::on(disk, kv, self.log.clone(), self.history.clone());
        Self { is_ahead: self.is_ahead, other: self.other, ..found }
    }

    fn block(&self, chunk: usize, block: usize) -> Option<Bytes> {
        let offset = u32::try_from(FIRST_SECTOR * SECTOR + block * 4096).unwrap();
        self.read(chunk, offset, 4096)
    }

    /// `None`: unreadable. Everything else is checked against its checksums.
    pub fn read(&self, chunk: usize, offset: u32, len: u32) -> Option<Bytes> {
        self.read_key(chunk_key(chunk), offset, len)
    }

    fn read_key(&self, key: ChunkKey, offset: u32, len: u32) -> Option<Bytes> {
        let store = self.store.as_ref().unwrap();
        let read = match store.try_read(key, offset, len) {
            Ok(Some(read)) => read,
            Ok(None) => self.runtime.block_on(store.read(key, offset, len)).ok()?,
            Err(_) => return None,
        };
        let data = Bytes::from(read.data.concat());
        assert_eq!(data.len(), len as usize);
        assert_eq!(first_mismatch(u64::from(offset), &data, &read.checksums), None, "{key} at {offset}");
        Some(data)
    }

    /// Before the log is applied: every block is whole, as it was at some time since `applied`, or unreadable.
    pub fn check_before_replay(&self, applied: usize) {
        for chunk in 0..CHUNKS {
            for block in 0..SECTORS / 8 {
                let Some(found) = self.block(chunk, block) else { continue };
                let then: Vec<_> =
                    self.history[applied..].iter().map(|then| expected(then, chunk, block)).collect();
                let known = if self.is_ahead {
                    let sector = |n: usize| n * SECTOR..(n + 1) * SECTOR;
                    (0..8).all(|n| then.iter().any(|then| then[sector(n)] == found[sector(n)]))
                } else {
                    then.iter().any(|then| *then == found)
                };
                assert!(known, "chunk {chunk} block {block} was never {:?}", tags(&found));
            }
        }
    }

    pub fn check(&self) {
        let now = self.history.last().unwrap();
        for chunk in 0..CHUNKS {
            for block in 0..SECTORS / 8 {
                let found = self.block(chunk, block);
                let found = found.unwrap_or_else(|| panic!("chunk {chunk} block {block} is unreadable"));
                let expected = expected(now, chunk, block);
                assert!(
                    found == expected,
                    "chunk {chunk} block {block} is {:?}, not {:?}",
                    tags(&found),
                    tags(&expected)
                );
            }
            // In one piece, and not at block borders.
            let (from, until) = (3, SECTORS - 5);
            let offset = u32::try_from((FIRST_SECTOR + from) * SECTOR).unwrap();
            let len = u32::try_from((until - from) * SECTOR).unwrap();
            let all: Vec<u8> = (from..until).flat_map(|s| sector_bytes(now[chunk][s], s)).collect();
            assert!(self.read(chunk, offset, len).expect("readable") == all, "chunk {chunk} in one piece");
        }
        self.check_other();
    }

    pub fn check_other(&self) {
        let all: Vec<u8> = (0..SECTORS).flat_map(|sector| sector_bytes(self.other, sector)).collect();
        let found = self.read_key(OTHER_CHUNK, 0, u32::try_from(all.len()).unwrap()).expect("readable");
        assert!(found == all, "the other replica is not what it was");
    }
}

trait DefaultContents {
    fn default_contents() -> Self;
}

impl DefaultContents for Contents {
    fn default_contents() -> Self {
        [[0; SECTORS]; CHUNKS]
    }
}

fn expected(contents: &Contents, chunk: usize, block: usize) -> Vec<u8> {
    (block * 8..block * 8 + 8).flat_map(|sector| sector_bytes(contents[chunk][sector], sector)).collect()
}

fn tags(data: &[u8]) -> Vec<u64> {
    data.chunks(SECTOR).map(|s| u64::from_le_bytes(s[..8].try_into().unwrap()) >> 16).collect()
}

async fn futures_poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    std::future::poll_fn(|context| match std::pin::Pin::new(&mut *future).poll(context) {
        std::task::Poll::Ready(output) => std::task::Poll::Ready(Some(output)),
        std::task::Poll::Pending => std::task::Poll::Ready(None),
    })
    .await
}
