//! A chunk store beside a model of it, on a disk that can lose power.
//!
//! The model is a log of changes and, after each of them, what every sector must hold. The store may be killed or
//! lose power at any moment: it is opened again on what survived, the log is applied from what it says is applied,
//! and then it must hold exactly what the model holds.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use evolute_chunkserver::chunk_store::seams::{Catalog, KeyChange, KeyValue, Parts};
use evolute_chunkserver::chunk_store::{ChunkStore, CopysetRecord, Identity, StoreError, StoreOptions};
use evolute_chunkserver::disk::Disk;
use evolute_chunkserver::disk::crash::{Crash, Survives};
use evolute_protocol::checksum::{checksums, first_mismatch};
use evolute_protocol::geometry::CHUNK_BYTES;
use evolute_protocol::id::{ChunkIndex, ChunkKey, ChunkserverId, ClusterId, CopysetId, VolumeId};

pub const COPYSET: CopysetId = CopysetId(7);
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
    Write { chunk: usize, sector: usize, count: usize },
    Zero { chunk: usize, sector: usize, count: usize },
    DropChunk { chunk: usize },
    DropVolume { chunk: usize },
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
        }
    }
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
        let record =
            CopysetRecord { copyset: COPYSET, applied: 0, state: Bytes::new(), created: Bytes::new() };
        world.store.as_ref().unwrap().put_copyset(record).unwrap();
        world
    }

    fn on(disk: Crash, kv: CrashKeyValue, log: Vec<Change>, history: Vec<Contents>) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        Self { disk, kv, store: None, log, history, is_ahead: false, runtime }
    }

    /// Opens what is on the disk; gives the number of changes it says are applied.
    pub fn open(&mut self) -> Result<usize, StoreError> {
        let parts = Parts {
            path: PathBuf::from("crash disk"),
            disk: Arc::new(self.disk.clone()),
            catalog: Box::new(self.kv.clone()),
        };
        let options = StoreOptions { open_chunks_max: Some(2), ..StoreOptions::default() };
        let (store, copysets) = ChunkStore::open_parts(parts, options, &identity())?;
        self.store = Some(store);
        Ok(copysets.first().map_or(0, |record| usize::try_from(record.applied).unwrap()))
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
        let record = CopysetRecord { copyset: COPYSET, applied, state: Bytes::new(), created: Bytes::new() };
        let done = self.store.as_mut().unwrap().begin_checkpoint(vec![record]);
        self.is_ahead |= applied < self.log.len() as u64;
        let done = self.runtime.block_on(done)?;
        self.is_ahead &= done.applied.first().is_none_or(|(_, applied)| *applied < self.log.len() as u64);
        Ok(())
    }

    /// Begins a checkpoint and leaves it: whatever follows happens while it drains.
    pub fn begin_checkpoint(&mut self) {
        let applied = self.log.len() as u64;
        let record = CopysetRecord { copyset: COPYSET, applied, state: Bytes::new(), created: Bytes::new() };
        let mut done = Box::pin(self.store.as_mut().unwrap().begin_checkpoint(vec![record]));
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
        Self { is_ahead: self.is_ahead, ..found }
    }

    fn block(&self, chunk: usize, block: usize) -> Option<Bytes> {
        let offset = u32::try_from(FIRST_SECTOR * SECTOR + block * 4096).unwrap();
        self.read(chunk, offset, 4096)
    }

    /// `None`: unreadable. Everything else is checked against its checksums.
    pub fn read(&self, chunk: usize, offset: u32, len: u32) -> Option<Bytes> {
        let store = self.store.as_ref().unwrap();
        let key = chunk_key(chunk);
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
