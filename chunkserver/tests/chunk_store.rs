//! What the chunk store promises, on a real directory with a real RocksDB.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use evolute_chunkserver::chunk_store::{
    ChunkStore, CopysetRecord, Identity, Pressure, ReadData, ReadError, StoreError, StoreOptions,
};
use evolute_protocol::checksum::{checksums, crc32c, first_mismatch};
use evolute_protocol::geometry::{CHUNK_BYTES, MIB};
use evolute_protocol::id::{BlockIndex, ChunkIndex, ChunkKey, ChunkserverId, ClusterId, CopysetId, VolumeId};
use tempfile::TempDir;

const COPYSET: CopysetId = CopysetId(3);
const CHUNK: ChunkKey = ChunkKey { volume: VolumeId(11), index: ChunkIndex(22) };
const DATA_AT: u64 = 64 << 10;
const CHECKSUMS_AT: u64 = 4 << 10;

struct Store {
    dir: TempDir,
    options: StoreOptions,
    store: Option<ChunkStore>,
    runtime: tokio::runtime::Runtime,
}

impl Store {
    fn new() -> Self {
        Self::with(StoreOptions::default())
    }

    fn with(options: StoreOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut this = Self { dir, options, store: None, runtime };
        this.reopen();
        this.get().put_copyset(record(COPYSET, 0)).unwrap();
        this
    }

    fn get(&mut self) -> &mut ChunkStore {
        self.store.as_mut().unwrap()
    }

    fn reopen(&mut self) -> Vec<CopysetRecord> {
        self.store = None;
        let (store, opened) =
            ChunkStore::open(&self.dir.path().join("store"), self.options.clone(), &identity()).unwrap();
        self.store = Some(store);
        opened.copysets
    }

    fn write(&mut self, chunk: ChunkKey, offset: u32, data: &[u8]) {
        let sums = checksums(u64::from(offset), data);
        self.get().write(COPYSET, chunk, offset, Bytes::copy_from_slice(data), &sums);
    }

    fn checkpoint(&mut self) -> Result<u64, StoreError> {
        let done = self.get().begin_checkpoint(vec![record(COPYSET, 1)]);
        self.runtime.block_on(done).map(|done| done.bytes)
    }

    fn read(&mut self, chunk: ChunkKey, offset: u32, len: u32) -> Result<Vec<u8>, ReadError> {
        let tried = self.get().try_read(chunk, offset, len)?;
        let waited = self.store.as_ref().unwrap().read(chunk, offset, len);
        let waited = checked(offset, len, &self.runtime.block_on(waited)?);
        if let Some(tried) = tried {
            assert_eq!(checked(offset, len, &tried), waited, "both ways of reading say the same");
        }
        Ok(waited)
    }

    fn file(&self, chunk: ChunkKey) -> PathBuf {
        let name = format!("store/chunks/{}/{}.1", chunk.volume.0, chunk.index.0);
        self.dir.path().join(name)
    }

    /// Changes a chunk's file behind the store's back, which forgets what it knew of it.
    fn meddle(&mut self, chunk: ChunkKey, with: impl FnOnce(&fs::File)) {
        self.store = None;
        with(&fs::OpenOptions::new().read(true).write(true).open(self.file(chunk)).unwrap());
        self.reopen();
    }
}

fn checked(offset: u32, len: u32, read: &ReadData) -> Vec<u8> {
    let data = read.data.concat();
    assert_eq!(data.len(), len as usize);
    assert_eq!(first_mismatch(u64::from(offset), &Bytes::from(data.clone()), &read.checksums), None);
    data
}

fn identity() -> Identity {
    Identity {
        cluster: ClusterId([1; 16]),
        chunkserver: ChunkserverId(2),
        token: Bytes::from_static(b"token"),
    }
}

fn record(copyset: CopysetId, applied: u64) -> CopysetRecord {
    let (state, created) = (Bytes::from_static(b"dedupe"), Bytes::from_static(b"members"));
    CopysetRecord { copyset, applied, state, created }
}

fn other(index: u32) -> ChunkKey {
    ChunkKey { index: ChunkIndex(index), ..CHUNK }
}

fn unreadable<T>(block: u16) -> Result<T, ReadError> {
    Err(ReadError::Unreadable { block: BlockIndex(block) })
}

/// Bytes that differ at every place.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| seed ^ (at % 251).to_le_bytes()[0] ^ (at / 4096).to_le_bytes()[0]).collect()
}

#[test]
fn what_was_written_is_read_from_memory_from_the_file_and_after_a_restart() {
    let mut store = Store::new();
    let data = pattern(1, 1 << 20);
    store.write(CHUNK, 8192, &data);
    store.write(CHUNK, 512, &data[..1024]);
    let mut expected = vec![0; 2 << 20];
    expected[8192..8192 + data.len()].copy_from_slice(&data);
    expected[512..1536].copy_from_slice(&data[..1024]);
    for place in ["memory", "file", "restart"] {
        for (offset, len) in [(0, 512), (0, 2 << 20), (512, 1024), (8192, 1 << 20), (4096 * 7 + 1024, 9216)] {
            let read = store.read(CHUNK, offset, len).unwrap();
            assert!(read == expected[offset as usize..][..len as usize], "{place} at {offset}+{len}");
        }
        match place {
            "memory" => assert_eq!(store.checkpoint().unwrap(), (1 << 20) + 4096 + 5 * 512),
            _ => assert_eq!(store.reopen(), [record(COPYSET, 1)]),
        }
    }
}

#[test]
fn a_read_comes_in_as_few_parts_as_possible() {
    let mut store = Store::new();
    store.write(CHUNK, 4096, &pattern(1, 1 << 20));
    for place in ["memory", "file"] {
        let whole = store.get().read(CHUNK, 4096, 1 << 20);
        let whole = store.runtime.block_on(whole).unwrap();
        assert_eq!((whole.data.len(), whole.checksums.len()), (1, 256), "{place}");
        let tried = store.get().try_read(CHUNK, 4096, 1 << 20).unwrap();
        assert_eq!(tried.as_ref(), Some(&whole), "{place}: what was just read waits for nobody");
        let holes = store.get().try_read(CHUNK, 8 << 20, 1 << 20).unwrap().expect("holes wait for nobody");
        assert_eq!(holes.data.len(), 1);
        store.checkpoint().unwrap();
    }
}

/// A guest with 512-byte sectors writes less than a block, again and again, over memory, over the file, over both.
#[test]
fn sectors_are_laid_over_whatever_is_below_them() {
    let mut store = Store::new();
    let mut expected = pattern(1, 32768);
    store.write(CHUNK, 0, &expected);
    for round in 0..12_u8 {
        for sector in [usize::from(round), 17, 18 + usize::from(round) * 2] {
            let data = [round * 16 + 1; 512];
            expected[sector * 512..][..512].copy_from_slice(&data);
            store.write(CHUNK, u32::try_from(sector * 512).unwrap(), &data);
            assert!(store.read(CHUNK, 0, 32768).unwrap() == expected, "round {round} sector {sector}");
        }
        if round % 3 == 1 {
            store.checkpoint().unwrap();
            assert!(store.read(CHUNK, 0, 32768).unwrap() == expected, "drained after {round}");
        }
        if round % 4 == 3 {
            store.checkpoint().unwrap();
            store.reopen();
        }
    }
}

#[test]
fn discarded_space_reads_as_zeroes_for_ever_and_is_given_back() {
    let mut store = Store::new();
    store.write(CHUNK, 0, &pattern(3, 4 << 20));
    store.checkpoint().unwrap();
    let allocated = |store: &Store| fs::metadata(store.file(CHUNK)).unwrap().blocks() * 512;
    let before = allocated(&store);
    store.get().discard(COPYSET, CHUNK, 4096 + 512, (2 << 20) + 1024);
    let mut expected = pattern(3, 4 << 20);
    expected[4608..4608 + (2 << 20) + 1024].fill(0);
    for _ in 0..3 {
        for at in [0, 4096, 1 << 20, (2 << 20) + 4096, 3 << 20] {
            let read = store.read(CHUNK, u32::try_from(at).unwrap(), 8192).unwrap();
            assert!(read == expected[at..at + 8192], "at {at}");
        }
        store.checkpoint().unwrap();
        store.reopen();
    }
    assert!(before - allocated(&store) >= (2 << 20) - 8192, "holes are punched");
    let info = store.get().chunk_info(CHUNK);
    assert_eq!((info.allocated_bytes, info.generation), ((1024 - 511) * 4096, 1));
}

#[test]
fn a_chunk_with_nothing_left_loses_its_file() {
    let mut store = Store::new();
    for (way, chunk) in [("whole", CHUNK), ("in parts", other(5)), ("with its volume", other(6))] {
        store.write(chunk, 65536, &pattern(1, 8192));
        store.checkpoint().unwrap();
        assert!(store.file(chunk).exists(), "{way}");
        match way {
            "whole" => store.get().discard(COPYSET, chunk, 0, u32::try_from(CHUNK_BYTES).unwrap()),
            "in parts" => (0..4).for_each(|n| store.get().discard(COPYSET, chunk, 65536 + n * 2048, 2048)),
            _ => store.get().drop_volume(COPYSET, chunk.volume),
        }
        store.checkpoint().unwrap();
        assert_eq!(store.read(chunk, 65536, 8192).unwrap(), [0; 8192], "{way}");
        store.reopen();
        if way == "in parts" {
            // Zeroes written over parts of a block are data until the block is zeroed as a whole.
            store.get().discard(COPYSET, chunk, 65536, 8192);
            store.checkpoint().unwrap();
            store.reopen();
        }
        assert!(!store.file(chunk).exists(), "{way}");
        assert_eq!(store.get().chunk_info(chunk).generation, 0);
    }
    assert_eq!(store.get().usage().used, 0);
}

/// The bytes of a deleted volume, or of discarded space, are in no file of the store any more.
#[test]
fn nothing_is_left_of_what_was_discarded() {
    let mut store = Store::new();
    let canary = *b"the bytes of another tenant, 32!";
    let secret = canary.repeat(4096 * 4 / 32);
    store.write(CHUNK, 0, &secret);
    store.write(other(1), 0, &secret);
    store.checkpoint().unwrap();
    // Through the rescue file, too.
    store.write(CHUNK, 512, &secret[..512]);
    store.checkpoint().unwrap();
    let found = |store: &Store| {
        let mut files = 0;
        let mut dirs = vec![store.dir.path().join("store")];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    dirs.push(entry.path());
                } else {
                    let data = fs::read(entry.path()).unwrap();
                    files += usize::from(data.windows(32).any(|bytes| bytes == canary));
                }
            }
        }
        files
    };
    store.store = None;
    assert_eq!(found(&store), 2, "the search finds it where it is");
    store.reopen();
    store.get().discard(COPYSET, CHUNK, 0, 16384);
    store.write(CHUNK, 0, &[1; 512]);
    store.get().discard(COPYSET, other(1), 0, 4 * 4096);
    store.checkpoint().unwrap();
    assert_eq!(store.read(CHUNK, 512, 16384 - 512).unwrap(), vec![0; 16384 - 512]);
    store.store = None;
    assert_eq!(found(&store), 0);
}

/// A file where a new one is to be, as a drain leaves one that a crash interrupts: nothing in it counts, whatever its
/// checksums say.
#[test]
fn a_file_that_no_record_knows_is_emptied_before_it_is_used() {
    let mut store = Store::new();
    let secret = b"the bytes of another tenant, 32!".repeat((1 << 20) / 32);
    store.write(CHUNK, 0, &secret);
    store.checkpoint().unwrap();
    let file = store.file(CHUNK);
    let kept = fs::read(&file).unwrap();
    store.get().discard(COPYSET, CHUNK, 0, 1 << 20);
    store.checkpoint().unwrap();
    // The file goes after the checkpoint, and before the next.
    store.write(other(1), 0, &[1; 512]);
    store.checkpoint().unwrap();
    assert!(!file.exists());
    fs::write(&file, kept).unwrap();
    store.write(CHUNK, 0, &[1; 512]);
    store.checkpoint().unwrap();
    store.reopen();
    assert_eq!(store.read(CHUNK, 512, (1 << 20) - 512).unwrap(), vec![0; (1 << 20) - 512]);
    let left = fs::read(store.file(CHUNK)).unwrap();
    assert!(!left.windows(32).any(|bytes| bytes == &secret[..32]), "the bytes are still in the file");
}

#[test]
fn a_flipped_bit_is_never_passed_off_as_data() {
    let mut store = Store::new();
    store.write(CHUNK, 0, &pattern(1, 1 << 20));
    store.checkpoint().unwrap();
    store.meddle(CHUNK, |file| file.write_all_at(b"x", DATA_AT + 5 * 4096 + 77).unwrap());
    assert_eq!(store.read(CHUNK, 5 * 4096, 4096), unreadable(5));
    assert_eq!(store.read(CHUNK, 0, 65536), unreadable(5));
    assert!(store.read(CHUNK, 0, 5 * 4096).is_ok() && store.read(CHUNK, 6 * 4096, 65536).is_ok());
    // Some of its sectors written anew do not make it good: the others are still unknown.
    store.write(CHUNK, 5 * 4096, &[9; 512]);
    assert_eq!(store.read(CHUNK, 5 * 4096, 512), unreadable(5));
    store.checkpoint().unwrap();
    store.reopen();
    assert_eq!(store.read(CHUNK, 5 * 4096, 4096), unreadable(5));
    // Written as a whole it is good again.
    store.write(CHUNK, 5 * 4096, &[8; 4096]);
    store.checkpoint().unwrap();
    store.reopen();
    assert_eq!(store.read(CHUNK, 5 * 4096, 4096).unwrap(), [8; 4096]);
    assert!(store.read(CHUNK, 0, 1 << 20).is_ok());
}

#[test]
fn a_block_put_back_to_an_older_one_or_moved_is_noticed() {
    let mut store = Store::new();
    store.write(CHUNK, 0, &pattern(1, 16384));
    store.checkpoint().unwrap();
    store.write(CHUNK, 4096, &pattern(2, 4096));
    store.checkpoint().unwrap();
    store.meddle(CHUNK, |file| {
        // The write of block 1 was lost; block 3 went where block 2 is.
        file.write_all_at(&pattern(1, 16384)[4096..8192], DATA_AT + 4096).unwrap();
        file.write_all_at(&pattern(1, 16384)[12288..], DATA_AT + 2 * 4096).unwrap();
    });
    assert!(store.read(CHUNK, 0, 4096).is_ok());
    assert_eq!(store.read(CHUNK, 4096, 4096), unreadable(1));
    assert_eq!(store.read(CHUNK, 8192, 4096), unreadable(2));
    assert!(store.read(CHUNK, 12288, 4096).is_ok());
}

#[test]
fn a_lost_checksum_sector_costs_its_64_blocks_and_no_other() {
    let mut store = Store::new();
    store.write(CHUNK, 0, &pattern(1, 1 << 20));
    store.checkpoint().unwrap();
    for rot in [&[0; 512][..], &[0xff; 4]] {
        store.meddle(CHUNK, |file| file.write_all_at(rot, CHECKSUMS_AT + 512).unwrap());
        assert!(store.read(CHUNK, 0, 64 * 4096).is_ok(), "the sector before");
        assert!(store.read(CHUNK, 128 * 4096, 4096).is_ok(), "the sector behind");
        assert!(matches!(store.read(CHUNK, 100 * 4096, 4096), Err(ReadError::Unreadable { .. })));
        // Writing one block says nothing about the others.
        store.write(CHUNK, 100 * 4096, &[5; 4096]);
        store.checkpoint().unwrap();
        store.reopen();
        assert_eq!(store.read(CHUNK, 100 * 4096, 4096).unwrap(), [5; 4096]);
        assert_eq!(store.read(CHUNK, 101 * 4096, 4096), unreadable(101));
        store.write(CHUNK, 64 * 4096, &pattern(4, 128 * 4096));
        store.checkpoint().unwrap();
        store.reopen();
        assert!(store.read(CHUNK, 0, 1 << 20).is_ok());
    }
}

#[test]
fn a_missing_misplaced_or_foreign_file_is_not_read() {
    for fault in ["missing", "swapped", "zeroed header"] {
        let mut store = Store::new();
        for chunk in [CHUNK, other(9)] {
            store.write(chunk, 0, &pattern(1, 8192));
        }
        store.checkpoint().unwrap();
        store.store = None;
        let (a, b, temporary) = (store.file(CHUNK), store.file(other(9)), store.dir.path().join("temporary"));
        match fault {
            "missing" => fs::remove_file(&a).unwrap(),
            "swapped" => {
                fs::rename(&a, &temporary).unwrap();
                fs::rename(&b, &a).unwrap();
                fs::rename(&temporary, &b).unwrap();
            }
            _ => fs::OpenOptions::new().write(true).open(&a).unwrap().write_all_at(&[0; 4096], 0).unwrap(),
        }
        store.reopen();
        assert_eq!(store.get().usage().damaged_chunks, u64::from(fault == "missing"));
        assert_eq!(store.read(CHUNK, 4096, 4096), unreadable(1), "{fault}");
        let never_written = store.read(CHUNK, 1 << 20, 4096);
        assert_eq!(
            never_written.unwrap(),
            [0; 4096],
            "{fault}: the catalog knows that this was never written"
        );
        // New writes are good; what was lost stays lost, also after restarts.
        store.write(CHUNK, 0, &[6; 4096]);
        store.write(CHUNK, 1 << 20, &[7; 512]);
        store.checkpoint().unwrap();
        for _ in 0..2 {
            assert_eq!(store.read(CHUNK, 0, 4096).unwrap(), [6; 4096], "{fault}");
            assert_eq!(store.read(CHUNK, 1 << 20, 512).unwrap(), [7; 512], "{fault}");
            assert_eq!(store.read(CHUNK, 4096, 4096), unreadable(1), "{fault}");
            store.reopen();
        }
    }
}

#[test]
fn wrong_directories_are_refused_by_name_and_left_alone() {
    let mut store = Store::new();
    store.write(CHUNK, 0, &pattern(1, 4096));
    store.checkpoint().unwrap();
    store.store = None;
    let dir = store.dir.path().join("store");
    let open = |dir: &Path, identity: &Identity| {
        ChunkStore::open(dir, StoreOptions::default(), identity).err().expect("refused")
    };
    let of = |cluster, chunkserver, token| Identity {
        cluster: ClusterId([cluster; 16]),
        chunkserver: ChunkserverId(chunkserver),
        token: Bytes::from_static(token),
    };
    assert!(matches!(open(&dir, &of(9, 2, b"token")), StoreError::WrongCluster { .. }));
    assert!(matches!(open(&dir, &of(1, 9, b"token")), StoreError::WrongChunkserver { .. }));
    assert!(matches!(open(&dir, &of(1, 2, b"other")), StoreError::WrongChunkserver { .. }));
    assert_eq!(ChunkStore::identity(&dir).unwrap(), Some(identity()));

    let missing = |name: &str| {
        fs::rename(dir.join(name), dir.with_extension("away")).unwrap();
        let error = open(&dir, &identity());
        assert!(matches!(ChunkStore::identity(&dir), Err(StoreError::Damaged { .. })), "{name}");
        fs::rename(dir.with_extension("away"), dir.join(name)).unwrap();
        error
    };
    for name in ["meta", "chunks", "rescue"] {
        assert!(matches!(missing(name), StoreError::Damaged { .. }), "{name}");
    }
    let foreign = store.dir.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("thesis.odt"), "years of work").unwrap();
    assert!(
        matches!(open(&foreign, &identity()), StoreError::NotEmpty { found, .. } if found == "thesis.odt")
    );
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1);
    assert!(matches!(open(&foreign.join("thesis.odt"), &identity()), StoreError::Io { .. }));

    store.reopen();
    assert!(matches!(open(&dir, &identity()), StoreError::Io { .. }), "one process at a time");
    assert_eq!(store.read(CHUNK, 0, 4096).unwrap(), pattern(1, 4096));
}

#[test]
fn a_newer_format_and_a_damaged_catalog_are_told_apart() {
    let put = |dir: &Path, key: &[u8], value: Option<&[u8]>| {
        let db = rocksdb::DB::open_default(dir.join("meta")).unwrap();
        match value {
            Some(value) => db.put(key, value).unwrap(),
            None => db.delete(key).unwrap(),
        }
    };
    let refused = |how: &dyn Fn(&Path)| {
        let mut store = Store::new();
        store.write(CHUNK, 0, &pattern(1, 4096));
        store.checkpoint().unwrap();
        store.store = None;
        let dir = store.dir.path().join("store");
        how(&dir);
        let refused = ChunkStore::open(&dir, StoreOptions::default(), &identity()).err().expect("refused");
        assert!(store.file(CHUNK).exists());
        refused
    };
    let mut newer = 2_u32.to_le_bytes().to_vec();
    newer.extend(b"as format 2 has it");
    newer.extend(crc32c(&newer).to_le_bytes());
    let newer = refused(&|dir| put(dir, b"i", Some(&newer)));
    assert!(matches!(newer, StoreError::NewerVersion { found: 2, supported: 1, .. }), "{newer}");
    for (key, value) in [
        (&b"i"[..], None),
        (b"i", Some(&b"garbage"[..])),
        (b"n", None),
        (b"n", Some(b"\x01")),
        (b"c\0\0\0\x03", Some(b"\x01garbage")),
        (b"k\0\0\0\0\0\0\0\x0b\0\0\0\x16", Some(b"\x09")),
    ] {
        let error = refused(&|dir| put(dir, key, value));
        assert!(matches!(error, StoreError::Damaged { .. }), "{key:?}: {error}");
    }
    for file in ["CURRENT", "MANIFEST"] {
        let error = refused(&|dir| {
            let mut names = fs::read_dir(dir.join("meta")).unwrap().map(|entry| entry.unwrap().path());
            let named = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with(file);
            fs::write(names.find(named).unwrap(), "garbage").unwrap();
        });
        assert!(matches!(error, StoreError::Damaged { .. } | StoreError::Io { .. }), "{file}: {error}");
    }
}

#[test]
fn an_interrupted_creation_is_begun_again() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(ChunkStore::identity(dir.path()).unwrap(), None);
    assert_eq!(ChunkStore::identity(&dir.path().join("missing")).unwrap(), None);
    fs::create_dir(dir.path().join("lost+found")).unwrap();
    fs::create_dir(dir.path().join("meta.new")).unwrap();
    fs::write(dir.path().join("meta.new/CURRENT"), "half").unwrap();
    fs::create_dir(dir.path().join("chunks")).unwrap();
    assert_eq!(ChunkStore::identity(dir.path()).unwrap(), None);
    ChunkStore::open(dir.path(), StoreOptions::default(), &identity()).unwrap();
    assert_eq!(ChunkStore::identity(dir.path()).unwrap(), Some(identity()));
}

#[test]
fn at_its_bound_the_overlay_asks_for_pace_until_it_is_drained() {
    let mut store = Store::with(StoreOptions {
        overlay_bytes_max: 2 * MIB,
        reserve_bytes: Some(0),
        ..StoreOptions::default()
    });
    assert_eq!(store.get().pressure(), Pressure::Free);
    // The same block over and over: each write may keep its own buffer alive, so each counts.
    for _ in 0..300 {
        store.write(CHUNK, 0, &[1; 4096]);
    }
    assert!(store.get().checkpoint_due(), "half full");
    assert_eq!(store.get().pressure(), Pressure::Free);
    for _ in 0..300 {
        store.write(CHUNK, 0, &[1; 4096]);
    }
    assert_eq!(store.get().pressure(), Pressure::Pace);
    store.checkpoint().unwrap();
    assert_eq!(store.get().pressure(), Pressure::Free);
    assert!(!store.get().checkpoint_due());
    assert_eq!(store.get().usage().overlay_bytes, 0);
}

#[test]
fn at_the_reserve_new_chunks_are_refused_and_old_ones_overwritten() {
    let mut store = Store::with(StoreOptions {
        capacity_bytes: Some(64 * MIB),
        reserve_bytes: Some(32 * MIB),
        ..StoreOptions::default()
    });
    for chunk in 0..3 {
        assert_eq!(store.get().pressure(), Pressure::Free);
        store.write(other(chunk), 0, &pattern(1, 12 << 20));
        store.checkpoint().unwrap();
    }
    let usage = store.get().usage();
    assert!(usage.full && usage.near_full && usage.used > 36 * MIB && usage.free < 28 * MIB, "{usage:?}");
    assert_eq!(store.get().pressure(), Pressure::Full);
    assert!(!store.get().has_room_for(CHUNK, 0, 4096), "a new chunk");
    assert!(store.get().has_room_for(other(1), 13 << 20, 4096), "a chunk we have may grow");
    store.write(CHUNK, 0, &pattern(1, 12 << 20));
    store.checkpoint().unwrap();
    assert!(!store.get().has_room_for(other(1), 13 << 20, 4096), "deep in the reserve it may not");
    assert!(store.get().has_room_for(other(1), 5 << 20, 65536), "overwrites always may");
    store.write(other(1), 5 << 20, &pattern(2, 65536));
    store.checkpoint().unwrap();
    store.get().discard(COPYSET, CHUNK, 0, u32::try_from(CHUNK_BYTES).unwrap());
    store.get().discard(COPYSET, other(0), 0, u32::try_from(CHUNK_BYTES).unwrap());
    store.checkpoint().unwrap();
    assert_eq!(store.get().pressure(), Pressure::Free, "space came back");
}

/// What is overwritten has its space, however sparse the chunk is: its checksum sectors tell what is new.
#[test]
fn on_a_disk_full_to_the_last_block_what_is_there_is_overwritten() {
    // Every other block of 16, the page of their checksums and the header's.
    let capacity_bytes = Some((8 + 2) * 4096);
    let mut store = Store::with(StoreOptions { capacity_bytes, ..StoreOptions::default() });
    (0..8).for_each(|block| store.write(CHUNK, block * 8192, &pattern(1, 4096)));
    store.checkpoint().unwrap();
    assert_eq!(store.get().usage().free, 0);
    (0..8).for_each(|block| store.write(CHUNK, block * 8192, &pattern(2, 4096)));
    store.write(CHUNK, 0, &pattern(3, 512));
    store.checkpoint().unwrap();
    assert_eq!(store.get().usage().overlay_bytes, 0);
    store.write(CHUNK, 4096, &pattern(4, 4096));
    let error = store.checkpoint().unwrap_err();
    assert!(matches!(error, StoreError::NoSpace { needed: 4096, available: 0 }), "{error}");
    let mut expected = [pattern(2, 4096), pattern(4, 4096)].concat();
    expected[..512].copy_from_slice(&pattern(3, 512));
    assert_eq!(store.read(CHUNK, 0, 8192).unwrap(), expected);
}

/// A read that meets a checkpoint is tried again; in the end it tells which block it is, as any other.
#[test]
fn damage_is_named_while_a_checkpoint_is_under_way() {
    let capacity_bytes = Some((8 + 2) * 4096);
    let mut store = Store::with(StoreOptions { capacity_bytes, ..StoreOptions::default() });
    store.write(CHUNK, 0, &pattern(1, 8 * 4096));
    store.checkpoint().unwrap();
    store.meddle(CHUNK, |file| file.write_all_at(&[0xee; 100], DATA_AT + 5 * 4096 + 700).unwrap());
    // It waits for space.
    store.write(CHUNK, 9 * 4096, &pattern(2, 4096));
    store.checkpoint().unwrap_err();
    assert_eq!(store.read(CHUNK, 3 * 4096, 4 * 4096), unreadable(5));
}

#[test]
fn what_others_order_is_let_in_while_there_is_memory_for_it() {
    let mut store = Store::with(StoreOptions {
        overlay_bytes_max: 20 * MIB,
        capacity_bytes: Some(MIB),
        ..StoreOptions::default()
    });
    assert!(store.get().admits(40 * MIB) && !store.get().admits(40 * MIB + 1));
    // Frozen and waiting for space, or not frozen yet: both are memory.
    store.write(CHUNK, 0, &pattern(1, 10 << 20));
    store.checkpoint().unwrap_err();
    store.write(other(1), 0, &pattern(1, 10 << 20));
    assert!(store.get().admits(19 * MIB) && !store.get().admits(20 * MIB));
    let mut small = Store::with(StoreOptions { overlay_bytes_max: MIB, ..StoreOptions::default() });
    assert!(
        small.get().admits(17 * MIB) && !small.get().admits(17 * MIB + 1),
        "the longest append finds room"
    );
}

#[test]
fn what_a_replica_left_is_never_taken_for_the_next_ones() {
    for drained in [false, true] {
        let mut store = Store::new();
        store.write(CHUNK, 0, &pattern(1, 16384));
        if drained {
            store.checkpoint().unwrap();
        }
        store.get().delete_copyset(COPYSET).unwrap();
        assert_eq!(store.read(CHUNK, 0, 16384).unwrap(), [0; 16384]);
        store.get().put_copyset(record(COPYSET, 0)).unwrap();
        store.write(CHUNK, 4096, &pattern(2, 4096));
        let expected = [vec![0; 4096], pattern(2, 4096), vec![0; 8192]].concat();
        assert_eq!(store.read(CHUNK, 0, 16384).unwrap(), expected);
        // Killed: the new replica's log has one write; the old one's chunk must not show up below it.
        assert_eq!(store.reopen(), [record(COPYSET, 0)]);
        assert_eq!(store.read(CHUNK, 0, 16384).unwrap(), [0; 16384]);
        store.write(CHUNK, 4096, &pattern(2, 4096));
        store.checkpoint().unwrap();
        store.reopen();
        assert_eq!(store.read(CHUNK, 0, 16384).unwrap(), expected);
        store.get().delete_copyset(COPYSET).unwrap();
        assert_eq!(store.reopen(), []);
        assert!(!store.file(CHUNK).exists());
    }
}

/// Should a chunk's record ever outlive its replica, the chunk goes with it.
#[test]
fn a_chunk_of_no_replica_that_lives_here_is_removed() {
    let mut store = Store::new();
    store.write(CHUNK, 0, &pattern(1, 4096));
    store.checkpoint().unwrap();
    store.store = None;
    let db = rocksdb::DB::open_default(store.dir.path().join("store/meta")).unwrap();
    let key = b"k\0\0\0\0\0\0\0\x0b\0\0\0\x16";
    let mut value = db.get(key).unwrap().expect("the chunk's record");
    value[5] ^= 0x40;
    db.put(key, value).unwrap();
    drop(db);
    store.reopen();
    assert_eq!(store.read(CHUNK, 0, 4096).unwrap(), [0; 4096]);
    assert!(!store.file(CHUNK).exists());
}

/// A drain that was under way when its copyset was deleted brings nothing back.
#[test]
fn a_copyset_deleted_during_a_drain_stays_deleted() {
    let mut store = Store::new();
    store.get().put_copyset(record(CopysetId(4), 0)).unwrap();
    store.write(CHUNK, 0, &pattern(1, 1 << 20));
    let keys = (0..200).map(other);
    for key in keys {
        store.write(key, 0, &pattern(1, 4096));
    }
    let states = vec![record(COPYSET, 5), record(CopysetId(4), 6)];
    let draining = store.get().begin_checkpoint(states);
    let mut draining = Box::pin(draining);
    store.runtime.block_on(async {
        tokio::select! { biased; _ = &mut draining => {}, () = std::future::ready(()) => {} }
    });
    store.get().delete_copyset(COPYSET).unwrap();
    store.get().put_copyset(record(COPYSET, 0)).unwrap();
    store.runtime.block_on(draining).unwrap();
    assert_eq!(store.read(CHUNK, 0, 4096).unwrap(), [0; 4096]);
    let mut records = store.reopen();
    records.sort_by_key(|record| record.copyset);
    assert_eq!(records, [record(COPYSET, 0), record(CopysetId(4), 6)]);
    assert_eq!(store.read(CHUNK, 0, 4096).unwrap(), [0; 4096]);
    assert_eq!(store.get().usage().chunks, 0);
}

#[test]
fn a_dropped_checkpoint_future_loses_nothing() {
    let mut store = Store::new();
    store.write(CHUNK, 0, &pattern(1, 4096));
    drop(store.get().begin_checkpoint(vec![record(COPYSET, 1)]));
    store.write(CHUNK, 4096, &pattern(2, 4096));
    // This one is about what was frozen first, and says so.
    let done = store.get().begin_checkpoint(vec![record(COPYSET, 2)]);
    assert_eq!(store.runtime.block_on(done).unwrap().applied, [(COPYSET, 1)]);
    let done = store.get().begin_checkpoint(vec![record(COPYSET, 3)]);
    assert_eq!(store.runtime.block_on(done).unwrap().applied, [(COPYSET, 3)]);
    assert_eq!(store.reopen(), [record(COPYSET, 3)]);
    assert_eq!(store.read(CHUNK, 4096, 4096).unwrap(), pattern(2, 4096));
}

/// Reads off the thread meet checkpoints that write the same blocks, whole and in part: never a mix, never an error.
#[test]
fn reads_and_checkpoints_do_not_disturb_each_other() {
    let mut store = Store::new();
    let tag = |n: u32| -> Vec<u8> { n.to_le_bytes().repeat(128) };
    let mut newest = vec![0_u32; 256];
    let mut random = 12345_u32;
    let mut next = |below: u32| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 8) % below
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let mut draining = None;
        for round in 1..1500_u32 {
            for _ in 0..4 {
                let (sector, count) = (next(248), next(8) + 1);
                let data: Vec<u8> = (0..count).flat_map(|_| tag(round)).collect();
                store.write(CHUNK, sector * 512, &data);
                newest[sector as usize..(sector + count) as usize].fill(round);
            }
            if next(3) == 0 {
                let done = store.get().begin_checkpoint(vec![record(COPYSET, u64::from(round))]);
                draining = Some(tokio::task::spawn_local(done));
            }
            let (sector, count) = (next(200), next(56) + 1);
            let expected: Vec<u8> =
                newest[sector as usize..(sector + count) as usize].iter().flat_map(|n| tag(*n)).collect();
            let read = store.get().read(CHUNK, sector * 512, count * 512);
            let reading = tokio::task::spawn_local(read);
            let read = reading.await.unwrap().unwrap_or_else(|e| panic!("round {round}: {e}"));
            assert!(checked(sector * 512, count * 512, &read) == expected, "round {round}");
            if next(4) == 0
                && let Some(draining) = draining.take()
            {
                draining.await.unwrap().unwrap();
            }
        }
    });
}

/// A volume is filled, deleted, and another one written sparsely in its place, by blocks and by sectors, while the first
/// one's replica is still in the trash: nowhere does a byte of the first one show.
#[test]
fn a_new_volume_never_reads_what_an_old_one_left() {
    const OLD: VolumeId = VolumeId(1);
    const NEW: VolumeId = VolumeId(2);
    let chunk = |volume, index| ChunkKey { volume, index: ChunkIndex(index) };
    let canary = b"another tenant's".repeat(4 << 16);
    let mut store = Store::new();
    let fill = |store: &mut Store, volume| {
        (0..3).for_each(|n| (0..4).for_each(|at| store.write(chunk(volume, n), at << 22, &canary)));
        store.checkpoint().unwrap();
    };
    fill(&mut store, OLD);
    store.get().drop_volume(COPYSET, OLD);
    fill(&mut store, NEW);
    let full = store.get().usage();
    let trashing = store.get().trash_copyset(COPYSET, 0);
    store.runtime.block_on(trashing).unwrap();
    assert_eq!((store.get().usage().used, store.get().usage().trash_bytes), (0, full.used));
    store.get().put_copyset(record(COPYSET, 0)).unwrap();
    let written =
        [(0, 4096 * 7, 4096), (1, 512 * 9, 512), (1, (5 << 20) + 3584, 1024), (2, (16 << 20) - 512, 512)];
    for (n, offset, len) in written {
        store.write(chunk(OLD, n), offset, &vec![9; len]);
        store.write(chunk(NEW, n), offset, &vec![9; len]);
    }
    for again in [false, true] {
        for key in [OLD, NEW].into_iter().flat_map(|volume| (0..3).map(move |n| chunk(volume, n))) {
            let mut expected = vec![0; 16 << 20];
            for (_, offset, len) in written.iter().filter(|(n, ..)| *n == key.index.0) {
                expected[*offset as usize..*offset as usize + len].fill(9);
            }
            for mib in 0..16 {
                let read = store.read(key, mib << 20, 1 << 20).unwrap();
                assert!(read == expected[(mib as usize) << 20..][..1 << 20], "{key} at {mib} MiB, {again}");
            }
        }
        store.checkpoint().unwrap();
        store.reopen();
    }
    store.get().empty_trash(1, 0);
    store.reopen();
    let usage = store.get().usage();
    assert!(usage.used < 1 << 20 && usage.trash_bytes == 0, "{usage:?}");
    let space: u64 =
        walk(&store.dir.path().join("store/chunks")).iter().map(|file| file.blocks() * 512).sum();
    assert!(space < 1 << 20, "{space} bytes are taken");
}

fn walk(dir: &Path) -> Vec<fs::Metadata> {
    let dirs = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    dirs.flat_map(|dir| fs::read_dir(dir).unwrap()).map(|entry| entry.unwrap().metadata().unwrap()).collect()
}
