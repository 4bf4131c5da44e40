//! What is small and must be atomic: whose store this is, its copysets, its chunks. One key-value batch per
//! checkpoint and at rare events, never one put per write (a put costs more than a whole log append).
//!
//! Keys: `i` identity, `n` numbers, `c` + copyset, `k` + volume + chunk, `r` + copyset being removed, `x` + admission
//! in the trash, `t` + admission + volume + chunk there, `s` the scrubber's position, `p` the starts of this directory,
//! `l` + copyset its replica's standing (`past.rs`); numbers in keys are big-endian, in values little-endian.
//! Values begin with their version. Drawn in `docs/chunk-format.md`.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use bytes::{Buf, BufMut, Bytes};
use evolute_protocol::checksum::crc32c;
use evolute_protocol::id::{ChunkIndex, ChunkKey, ChunkserverId, ClusterId, CopysetId, VolumeId};

use super::error::StoreError;
use super::format::{self, CHECKSUM_SECTORS};
use super::options::{CopysetRecord, Identity, ScrubPosition};
use super::overlay::Owner;
use super::past::{Standing, Starts};
use super::table::{ChunkRecord, Table};
use super::trash::Trash;
use crate::disk::Disk;

/// An ordered key-value store with atomic, synced batches. RocksDB; in crash tests one whose commit can be cut off.
pub trait KeyValue: Send + Sync {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;
    /// All pairs whose key begins with `prefix`.
    fn scan(&self, prefix: u8, each: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), StoreError>;
    /// All of `changes` (`None` deletes) or none, and durable when this returns.
    fn commit(&self, changes: Vec<KeyChange>) -> Result<(), StoreError>;
}

pub type KeyChange = (Vec<u8>, Option<Vec<u8>>);

/// The store's copysets and chunks, and the only writer of the key-value store. Shared by the shard thread and the
/// checkpoint thread.
pub struct Catalog {
    kv: Box<dyn KeyValue>,
    inner: Mutex<Inner>,
    /// Why nothing can be committed any more.
    failed: OnceLock<StoreError>,
}

struct Inner {
    /// The admission under which each copyset lives here now.
    admissions: HashMap<CopysetId, u64>,
    next_admission: u64,
    /// The last checkpoint that was committed.
    checkpoint: u64,
}

/// What one checkpoint commits.
#[derive(Debug)]
pub struct CheckpointBatch<'a> {
    pub number: u64,
    pub states: &'a [(CopysetRecord, u64)],
    /// `None`: the chunk is gone.
    pub chunks: Vec<(ChunkKey, Option<&'a ChunkRecord>)>,
}

impl Catalog {
    /// Writes the first pairs of a new store.
    pub fn create(kv: &dyn KeyValue, identity: &Identity) -> Result<(), StoreError> {
        kv.commit(vec![
            (vec![IDENTITY], Some(encode_identity(identity))),
            (vec![NUMBERS], Some(encode_numbers(0, 1))),
        ])
    }

    /// Whose store this is; `path` is for the error's text.
    pub fn read_identity(kv: &dyn KeyValue, path: &Path) -> Result<Identity, StoreError> {
        match kv.get(&[IDENTITY])? {
            Some(raw) => decode_identity(&raw, path),
            None => Err(damaged(path, "the identity is missing")),
        }
    }

    /// Reads everything. Chunks whose replica is gone come back separately: their files are to be removed.
    pub fn load(kv: Box<dyn KeyValue>, path: &Path) -> Result<(Self, Loaded), StoreError> {
        let numbers = kv.get(&[NUMBERS])?.ok_or_else(|| damaged(path, "the numbers are missing"))?;
        let (checkpoint, next_admission) =
            decode_numbers(&numbers).ok_or_else(|| damaged(path, "the numbers are unreadable"))?;
        let mut trouble = None;
        let mut copysets = Vec::new();
        let mut admissions = HashMap::new();
        kv.scan(COPYSET, &mut |key, value| match decode_copyset(key, value) {
            Some((record, admission)) => {
                admissions.insert(record.copyset, admission);
                copysets.push(record);
            }
            None => trouble = Some("a copyset's record is unreadable"),
        })?;
        let mut table = Table::default();
        let mut orphans = Vec::new();
        kv.scan(CHUNK, &mut |key, value| match decode_chunk(key, value) {
            Some((chunk, record)) => {
                if admissions.get(&record.owner.copyset) == Some(&record.owner.admission) {
                    table.put(chunk, Some(record));
                } else {
                    orphans.push(chunk);
                }
            }
            None => trouble = Some("a chunk's record is unreadable"),
        })?;
        let mut removed = Vec::new();
        kv.scan(REMOVED, &mut |key, _| match decode_removed(key) {
            Some(copyset) => removed.push(copyset),
            None => trouble = Some("the note of a removed copyset is unreadable"),
        })?;
        match load_trash(&*kv)? {
            Some(trash) => trash.into_iter().for_each(|(admission, trash)| table.put_trash(admission, trash)),
            None => trouble = Some("a record of the trash is unreadable"),
        }
        if let Some(what) = trouble {
            return Err(damaged(path, what));
        }
        let owners = admissions.clone();
        let inner = Inner { admissions, next_admission, checkpoint };
        let catalog = Self { kv, inner: Mutex::new(inner), failed: OnceLock::new() };
        catalog.commit(orphans.into_iter().map(|chunk| (chunk_key(chunk), None)).collect())?;
        Ok((catalog, Loaded { copysets, removed, admissions: owners, table }))
    }

    pub fn checkpoint(&self) -> u64 {
        self.lock().checkpoint
    }

    pub fn failed(&self) -> Option<&StoreError> {
        self.failed.get()
    }

    /// Remembers the first failure; from then on nothing is committed.
    pub fn fail(&self, error: StoreError) -> StoreError {
        self.failed.get_or_init(|| error).clone()
    }

    /// What a write to a chunk file that failed means. Out of space: try again later, nothing is lost. Anything else:
    /// the store is dead.
    pub fn write_failed(&self, disk: &dyn Disk, doing: &str, error: io::Error) -> StoreError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let available = disk.space().map_or(0, |space| space.available);
                StoreError::NoSpace { needed: available + 1, available }
            }
            _ => self.sync_failed(doing, error),
        }
    }

    /// After a failed sync nothing of the disk is trusted any more.
    pub fn sync_failed(&self, doing: &str, error: io::Error) -> StoreError {
        self.fail(StoreError::sync_failed(doing, error))
    }

    /// A copyset's record; one that is new here gets an admission of its own.
    pub fn put_copyset(&self, record: &CopysetRecord) -> Result<Owner, StoreError> {
        let mut inner = self.lock();
        let admission = inner.admissions.get(&record.copyset).copied().unwrap_or(inner.next_admission);
        let next = inner.next_admission.max(admission + 1);
        self.commit(vec![
            (copyset_key(record.copyset), Some(encode_copyset(record, admission))),
            (vec![NUMBERS], Some(encode_numbers(inner.checkpoint, next))),
        ])?;
        inner.admissions.insert(record.copyset, admission);
        inner.next_admission = next;
        Ok(Owner { copyset: record.copyset, admission })
    }

    /// The copyset's record and those of `chunks` are gone. A drain under way cannot bring them back: it commits
    /// nothing of an admission that has ended.
    pub fn delete_copyset(&self, copyset: CopysetId, chunks: &[ChunkKey]) -> Result<(), StoreError> {
        let mut inner = self.lock();
        let mut changes = vec![(copyset_key(copyset), None), (standing_key(copyset), None)];
        changes.extend(chunks.iter().map(|chunk| (chunk_key(*chunk), None)));
        self.commit(changes)?;
        inner.admissions.remove(&copyset);
        Ok(())
    }

    /// In one step all that is known of a replica is replaced: `gone` are its chunks until now, `chunks` those it has
    /// from now on, in files of one generation. It gets a new admission, so that nothing of its former self counts.
    pub fn install(
        &self,
        record: &CopysetRecord,
        gone: &[ChunkKey],
        chunks: &[(ChunkKey, [u8; CHECKSUM_SECTORS])],
        generation: u32,
    ) -> Result<(Owner, Vec<(ChunkKey, ChunkRecord)>), StoreError> {
        let mut inner = self.lock();
        let owner = Owner { copyset: record.copyset, admission: inner.next_admission };
        let chunks: Vec<_> = chunks
            .iter()
            .map(|(key, written)| (*key, ChunkRecord { owner, generation, written: *written, lost: false }))
            .collect();
        let next = inner.next_admission + 1;
        let mut changes = vec![
            (copyset_key(record.copyset), Some(encode_copyset(record, owner.admission))),
            (vec![NUMBERS], Some(encode_numbers(inner.checkpoint, next))),
        ];
        changes.extend(gone.iter().map(|key| (chunk_key(*key), None)));
        changes.extend(chunks.iter().map(|(key, record)| (chunk_key(*key), Some(encode_chunk(record)))));
        self.commit(changes)?;
        inner.admissions.insert(owner.copyset, owner.admission);
        inner.next_admission = next;
        Ok((owner, chunks))
    }

    /// In one step a replica ends here and its chunks are in the trash, under the admission it had. A note says that
    /// it is being removed, until [`Self::forget_removed`]. `None`: there is no such replica.
    pub fn trash(&self, trash: &Trash) -> Result<Option<u64>, StoreError> {
        let mut inner = self.lock();
        let Some(admission) = inner.admissions.get(&trash.copyset).copied() else { return Ok(None) };
        let mut changes = vec![
            (copyset_key(trash.copyset), None),
            (standing_key(trash.copyset), None),
            (removed_key(trash.copyset), Some(vec![VALUE_VERSION])),
            (trash_key(admission), Some(encode_trash(trash))),
        ];
        for (key, record) in &trash.chunks {
            changes.push((chunk_key(*key), None));
            changes.push((trashed_key(admission, *key), Some(encode_chunk(record))));
        }
        self.commit(changes)?;
        inner.admissions.remove(&trash.copyset);
        Ok(Some(admission))
    }

    /// These files of the trash are gone; `last`: and so is all of that replica.
    pub fn forget_trash(
        &self,
        admission: u64,
        chunks: impl Iterator<Item = ChunkKey>,
        last: bool,
    ) -> Result<(), StoreError> {
        let mut changes: Vec<_> = chunks.map(|key| (trashed_key(admission, key), None)).collect();
        if last {
            changes.push((trash_key(admission), None));
        }
        self.commit(changes)
    }

    pub fn forget_removed(&self, copyset: CopysetId) -> Result<(), StoreError> {
        self.commit(vec![(removed_key(copyset), None)])
    }

    /// What is durable of a replica.
    pub fn copyset(&self, copyset: CopysetId) -> Result<Option<CopysetRecord>, StoreError> {
        let key = copyset_key(copyset);
        let value = self.kv.get(&key)?;
        Ok(value.and_then(|value| decode_copyset(&key, &value)).map(|(record, _)| record))
    }

    /// The starts of this directory; none are known of one that an older program served.
    pub fn starts(&self) -> Result<Starts, StoreError> {
        match self.kv.get(&[STARTS])? {
            Some(raw) => {
                Starts::decode(&raw).ok_or_else(|| self.fail(unreadable("the record of its starts")))
            }
            None => Ok(Starts::default()),
        }
    }

    pub fn put_starts(&self, starts: &Starts) -> Result<(), StoreError> {
        self.commit(vec![(vec![STARTS], Some(starts.encode()))])
    }

    pub fn standings(&self) -> Result<BTreeMap<CopysetId, Standing>, StoreError> {
        let (mut standings, mut readable) = (BTreeMap::new(), true);
        self.kv.scan(STANDING, &mut |key, value| match Standing::decode(key, value) {
            Some((copyset, standing)) => drop(standings.insert(copyset, standing)),
            None => readable = false,
        })?;
        if readable { Ok(standings) } else { Err(self.fail(unreadable("the standing of a replica"))) }
    }

    /// All of them in one step.
    pub fn put_standings(&self, standings: &[(CopysetId, Standing)]) -> Result<(), StoreError> {
        self.commit(standings.iter().map(|(id, it)| (standing_key(*id), Some(it.encode()))).collect())
    }

    pub fn scrub_position(&self) -> Result<ScrubPosition, StoreError> {
        let raw = self.kv.get(&[SCRUB])?;
        // One that cannot be read only means that a round begins anew.
        Ok(raw.and_then(|raw| decode_scrub(&raw)).unwrap_or_default())
    }

    pub fn put_scrub_position(&self, position: ScrubPosition) -> Result<(), StoreError> {
        self.commit(vec![(vec![SCRUB], Some(encode_scrub(&position)))])
    }

    pub fn commit_checkpoint(&self, batch: CheckpointBatch<'_>) -> Result<(), StoreError> {
        let mut inner = self.lock();
        let lives = |owner: Owner| inner.admissions.get(&owner.copyset) == Some(&owner.admission);
        let mut changes = vec![(vec![NUMBERS], Some(encode_numbers(batch.number, inner.next_admission)))];
        for (record, admission) in batch.states {
            if lives(Owner { copyset: record.copyset, admission: *admission }) {
                changes.push((copyset_key(record.copyset), Some(encode_copyset(record, *admission))));
            }
        }
        for (key, record) in batch.chunks {
            let value = record.filter(|record| lives(record.owner)).map(encode_chunk);
            changes.push((chunk_key(key), value));
        }
        self.commit(changes)?;
        inner.checkpoint = batch.number;
        Ok(())
    }

    fn commit(&self, changes: Vec<KeyChange>) -> Result<(), StoreError> {
        if let Some(failed) = self.failed.get() {
            return Err(failed.clone());
        }
        if changes.is_empty() {
            return Ok(());
        }
        self.kv.commit(changes).map_err(|e| self.fail(e))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct Loaded {
    pub copysets: Vec<CopysetRecord>,
    /// Copysets whose removal was begun; see [`Catalog::trash`].
    pub removed: Vec<CopysetId>,
    pub admissions: HashMap<CopysetId, u64>,
    pub table: Table,
}

pub fn damaged(path: &Path, what: impl Into<String>) -> StoreError {
    StoreError::Damaged { path: PathBuf::from(path), what: what.into() }
}

const IDENTITY: u8 = b'i';
const NUMBERS: u8 = b'n';
const COPYSET: u8 = b'c';
const CHUNK: u8 = b'k';
const REMOVED: u8 = b'r';
const TRASH: u8 = b'x';
const TRASHED: u8 = b't';
const SCRUB: u8 = b's';
const STARTS: u8 = b'p';
const STANDING: u8 = b'l';

/// Of the values below; the store's own version is in the identity.
const VALUE_VERSION: u8 = 1;

fn encode_identity(identity: &Identity) -> Vec<u8> {
    let mut raw = Vec::new();
    raw.put_u32_le(format::VERSION);
    raw.put_slice(&identity.cluster.0);
    raw.put_u32_le(identity.chunkserver.0);
    raw.put_u32_le(u32::try_from(identity.token.len()).expect("a token is short"));
    raw.put_slice(&identity.token);
    raw.put_u32_le(crc32c(&raw));
    raw
}

fn decode_identity(raw: &[u8], path: &Path) -> Result<Identity, StoreError> {
    let unreadable = || damaged(path, "the identity is unreadable");
    // The version comes first in every format, and last the crc.
    let (version, _) = raw.split_first_chunk().ok_or_else(unreadable)?;
    let (body, crc) = raw.split_last_chunk().ok_or_else(unreadable)?;
    if crc32c(body) != u32::from_le_bytes(*crc) {
        return Err(unreadable());
    }
    let found = u32::from_le_bytes(*version);
    if found > format::VERSION {
        return Err(StoreError::NewerVersion { path: path.into(), found, supported: format::VERSION });
    }
    let mut rest = body.get(4..).ok_or_else(unreadable)?;
    let mut cluster = [0; 16];
    rest.try_copy_to_slice(&mut cluster).map_err(|_| unreadable())?;
    let chunkserver = rest.try_get_u32_le().map_err(|_| unreadable())?;
    let token = rest.try_get_u32_le().map_err(|_| unreadable())? as usize;
    if rest.len() != token {
        return Err(unreadable());
    }
    Ok(Identity {
        cluster: ClusterId(cluster),
        chunkserver: ChunkserverId(chunkserver),
        token: Bytes::copy_from_slice(rest),
    })
}

fn encode_numbers(checkpoint: u64, next_admission: u64) -> Vec<u8> {
    let mut raw = vec![VALUE_VERSION];
    raw.put_u64_le(checkpoint);
    raw.put_u64_le(next_admission);
    raw
}

/// Whatever is counted up, admissions, checkpoints and entries, is nowhere near this.
const COUNTED_MAX: u64 = 1 << 56;
/// The next files' generations are counted on from the highest one.
const GENERATION_MAX: u32 = u32::MAX - (1 << 16);

fn decode_numbers(mut raw: &[u8]) -> Option<(u64, u64)> {
    let known = raw.try_get_u8().ok()? == VALUE_VERSION;
    let numbers = (raw.try_get_u64_le().ok()?, raw.try_get_u64_le().ok()?);
    (known && raw.is_empty() && numbers.0.max(numbers.1) <= COUNTED_MAX).then_some(numbers)
}

fn unreadable(what: &str) -> StoreError {
    damaged(Path::new("meta"), format!("{what} is unreadable"))
}

fn standing_key(copyset: CopysetId) -> Vec<u8> {
    let mut key = vec![STANDING];
    key.put_u32(copyset.0);
    key
}

fn copyset_key(copyset: CopysetId) -> Vec<u8> {
    let mut key = vec![COPYSET];
    key.put_u32(copyset.0);
    key
}

fn encode_copyset(record: &CopysetRecord, admission: u64) -> Vec<u8> {
    let mut raw = vec![VALUE_VERSION];
    raw.put_u64_le(admission);
    raw.put_u64_le(record.applied);
    for part in [&record.created, &record.state] {
        raw.put_u32_le(u32::try_from(part.len()).expect("a copyset's state is far below 4 GiB"));
        raw.put_slice(part);
    }
    raw
}

fn decode_copyset(key: &[u8], mut raw: &[u8]) -> Option<(CopysetRecord, u64)> {
    let copyset = CopysetId(u32::from_be_bytes(key.get(1..)?.try_into().ok()?));
    let known = raw.try_get_u8().ok()? == VALUE_VERSION;
    let admission = raw.try_get_u64_le().ok()?;
    let applied = raw.try_get_u64_le().ok()?;
    if admission.max(applied) > COUNTED_MAX {
        return None;
    }
    let created = take_part(&mut raw)?;
    let state = take_part(&mut raw)?;
    (known && raw.is_empty()).then_some((CopysetRecord { copyset, applied, state, created }, admission))
}

fn take_part(raw: &mut &[u8]) -> Option<Bytes> {
    let len = raw.try_get_u32_le().ok()? as usize;
    let (part, rest) = raw.split_at_checked(len)?;
    *raw = rest;
    Some(Bytes::copy_from_slice(part))
}

fn chunk_key(chunk: ChunkKey) -> Vec<u8> {
    let mut key = vec![CHUNK];
    key.put_u64(chunk.volume.0);
    key.put_u32(chunk.index.0);
    key
}

fn encode_chunk(record: &ChunkRecord) -> Vec<u8> {
    let mut raw = vec![VALUE_VERSION];
    raw.put_u32_le(record.owner.copyset.0);
    raw.put_u64_le(record.owner.admission);
    // Generations, oldest first. Snapshots will add more.
    raw.put_u16_le(1);
    raw.put_u32_le(record.generation);
    // Which checksum sectors are in use, and how many blocks each of those has.
    let in_use = |(sector, count): (usize, &u8)| u64::from(*count > 0) << sector;
    raw.put_u64_le(record.written.iter().enumerate().map(in_use).sum());
    raw.extend(record.written.iter().filter(|count| **count > 0));
    raw
}

fn decode_chunk(key: &[u8], raw: &[u8]) -> Option<(ChunkKey, ChunkRecord)> {
    Some((decode_chunk_key(key.get(1..)?)?, decode_chunk_value(raw)?))
}

fn decode_chunk_key(key: &[u8]) -> Option<ChunkKey> {
    let (volume, index) = key.split_first_chunk()?;
    Some(ChunkKey {
        volume: VolumeId(u64::from_be_bytes(*volume)),
        index: ChunkIndex(u32::from_be_bytes(index.try_into().ok()?)),
    })
}

fn decode_chunk_value(mut raw: &[u8]) -> Option<ChunkRecord> {
    let known = raw.try_get_u8().ok()? == VALUE_VERSION;
    let owner =
        Owner { copyset: CopysetId(raw.try_get_u32_le().ok()?), admission: raw.try_get_u64_le().ok()? };
    let generations = raw.try_get_u16_le().ok()?;
    let generation = raw.try_get_u32_le().ok()?;
    let in_use = raw.try_get_u64_le().ok()?;
    let mut written = [0; CHECKSUM_SECTORS];
    for (sector, count) in written.iter_mut().enumerate() {
        if in_use >> sector & 1 == 1 {
            *count = raw.try_get_u8().ok().filter(|count| (1..=64).contains(count))?;
        }
    }
    let record = ChunkRecord { owner, generation, written, lost: false };
    let sound = generations == 1 && generation < GENERATION_MAX;
    (known && sound && raw.is_empty()).then_some(record)
}

fn removed_key(copyset: CopysetId) -> Vec<u8> {
    let mut key = vec![REMOVED];
    key.put_u32(copyset.0);
    key
}

fn decode_removed(key: &[u8]) -> Option<CopysetId> {
    Some(CopysetId(u32::from_be_bytes(key.get(1..)?.try_into().ok()?)))
}

fn trash_key(admission: u64) -> Vec<u8> {
    let mut key = vec![TRASH];
    key.put_u64(admission);
    key
}

fn encode_trash(trash: &Trash) -> Vec<u8> {
    let mut raw = vec![VALUE_VERSION];
    raw.put_u32_le(trash.copyset.0);
    raw.put_u64_le(trash.since_unix_ms);
    raw
}

fn decode_trash(key: &[u8], mut raw: &[u8]) -> Option<(u64, Trash)> {
    let admission = u64::from_be_bytes(key.get(1..)?.try_into().ok()?);
    let known = raw.try_get_u8().ok()? == VALUE_VERSION;
    let copyset = CopysetId(raw.try_get_u32_le().ok()?);
    let since_unix_ms = raw.try_get_u64_le().ok()?;
    let trash = Trash { copyset, since_unix_ms, chunks: Vec::new() };
    (known && raw.is_empty()).then_some((admission, trash))
}

fn trashed_key(admission: u64, chunk: ChunkKey) -> Vec<u8> {
    let mut key = vec![TRASHED];
    key.put_u64(admission);
    key.extend_from_slice(&chunk_key(chunk)[1..]);
    key
}

fn decode_trashed(key: &[u8], raw: &[u8]) -> Option<(u64, (ChunkKey, ChunkRecord))> {
    let (admission, chunk) = key.get(1..)?.split_first_chunk()?;
    Some((u64::from_be_bytes(*admission), (decode_chunk_key(chunk)?, decode_chunk_value(raw)?)))
}

fn encode_scrub(position: &ScrubPosition) -> Vec<u8> {
    let mut raw = vec![VALUE_VERSION];
    raw.put_u64_le(position.began_unix_ms);
    raw.put_u64_le(position.last_full_unix_ms);
    if let Some((copyset, chunk)) = position.next {
        raw.put_u32_le(copyset.0);
        raw.extend_from_slice(&chunk_key(chunk)[1..]);
    }
    raw
}

fn decode_scrub(mut raw: &[u8]) -> Option<ScrubPosition> {
    if raw.try_get_u8().ok()? != VALUE_VERSION {
        return None;
    }
    let (began_unix_ms, last_full_unix_ms) = (raw.try_get_u64_le().ok()?, raw.try_get_u64_le().ok()?);
    let next = match raw.try_get_u32_le() {
        Ok(copyset) => Some((CopysetId(copyset), decode_chunk_key(raw)?)),
        Err(_) => None,
    };
    Some(ScrubPosition { began_unix_ms, last_full_unix_ms, next })
}

/// `None`: unreadable.
fn load_trash(kv: &dyn KeyValue) -> Result<Option<BTreeMap<u64, Trash>>, StoreError> {
    let mut trash = BTreeMap::new();
    let mut readable = true;
    kv.scan(TRASH, &mut |key, value| match decode_trash(key, value) {
        Some((admission, found)) => drop(trash.insert(admission, found)),
        None => readable = false,
    })?;
    kv.scan(TRASHED, &mut |key, value| {
        let found = decode_trashed(key, value);
        match found.and_then(|(admission, chunk)| Some((trash.get_mut(&admission)?, chunk))) {
            Some((trash, chunk)) => trash.chunks.push(chunk),
            None => readable = false,
        }
    })?;
    Ok(readable.then_some(trash))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bytes::Bytes;
    use evolute_protocol::id::{ChunkIndex, ChunkKey, ChunkserverId, ClusterId, CopysetId, VolumeId};

    use super::super::error::StoreError;
    use super::super::options::{CopysetRecord, Identity};
    use super::super::overlay::Owner;
    use super::super::table::ChunkRecord;
    use super::{
        chunk_key, copyset_key, decode_chunk, decode_copyset, decode_identity, encode_chunk, encode_copyset,
        encode_identity,
    };

    fn identity() -> Identity {
        Identity {
            cluster: ClusterId(*b"cluster-id-16-by"),
            chunkserver: ChunkserverId(7),
            token: Bytes::from_static(b"secret"),
        }
    }

    fn chunk() -> (ChunkKey, ChunkRecord) {
        let mut written = [0; 64];
        (written[0], written[63]) = (64, 1);
        let owner = Owner { copyset: CopysetId(3), admission: 9 };
        let record = ChunkRecord { owner, generation: 1, written, lost: false };
        (ChunkKey { volume: VolumeId(5), index: ChunkIndex(6) }, record)
    }

    fn copyset() -> CopysetRecord {
        CopysetRecord {
            copyset: CopysetId(3),
            applied: 12345,
            state: Bytes::from_static(b"state"),
            created: Bytes::from_static(b"created"),
        }
    }

    #[test]
    fn records_are_those_of_the_first_release() {
        let golden = include_str!("../../tests/golden/catalog-v1.txt");
        let hex = |raw: Vec<u8>| raw.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let (key, record) = chunk();
        let lines = [
            format!("identity {}", hex(encode_identity(&identity()))),
            format!("copyset {} {}", hex(copyset_key(CopysetId(3))), hex(encode_copyset(&copyset(), 9))),
            format!("chunk {} {}", hex(chunk_key(key)), hex(encode_chunk(&record))),
        ];
        assert_eq!(lines.join("\n"), golden.trim_end());
    }

    #[test]
    fn records_survive_their_bytes_and_truncated_ones_are_refused() {
        let (key, record) = chunk();
        let raw = encode_chunk(&record);
        assert_eq!(decode_chunk(&chunk_key(key), &raw), Some((key, record)));
        let copyset_raw = encode_copyset(&copyset(), 9);
        assert_eq!(decode_copyset(&copyset_key(CopysetId(3)), &copyset_raw), Some((copyset(), 9)));
        for end in 0..raw.len() {
            assert_eq!(decode_chunk(&chunk_key(key), &raw[..end]), None, "{end}");
        }
        for end in 0..copyset_raw.len() {
            assert_eq!(decode_copyset(&copyset_key(CopysetId(3)), &copyset_raw[..end]), None, "{end}");
        }
    }

    #[test]
    fn a_bad_identity_is_named() {
        let path = Path::new("/x");
        let raw = encode_identity(&identity());
        assert_eq!(decode_identity(&raw, path).expect("ours"), identity());
        for at in 0..raw.len() {
            let mut bad = raw.clone();
            bad[at] ^= 0x10;
            assert!(matches!(decode_identity(&bad, path), Err(StoreError::Damaged { .. })), "byte {at}");
            assert!(matches!(decode_identity(&raw[..at], path), Err(StoreError::Damaged { .. })), "{at}");
        }
        let mut newer = 2_u32.to_le_bytes().to_vec();
        newer.extend(b"whatever format 2 says");
        newer.extend(evolute_protocol::checksum::crc32c(&newer).to_le_bytes());
        assert!(matches!(
            decode_identity(&newer, path),
            Err(StoreError::NewerVersion { found: 2, supported: 1, .. })
        ));
    }
}
