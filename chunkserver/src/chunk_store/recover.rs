//! Opens a store, or creates one; after a crash, puts right what the log cannot.
//!
//! Opening never formats over anything: a directory that holds files but no whole store is refused by name.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use evolute_protocol::id::{ChunkKey, CopysetId, VolumeId};

use crate::disk::Disk;

use super::catalog::{Catalog, KeyValue, Loaded, damaged};
use super::checkpoint::CheckpointThread;
use super::chunk_file::OpenChunks;
use super::drain::{Drainer, Frozen, layer_of};
use super::error::StoreError;
use super::format::{CHUNKS_DIR, parse_file_name, parse_volume_dir, volume_dir};
use super::options::{CopysetRecord, Identity, StoreOptions};
use super::overlay::{Layer, Owner};
use super::pace::Filling;
use super::rescue::{self, RESCUE_FILE};
use super::rocks::Rocks;
use super::shard::{Shard, default_open_chunks};
use super::table::{FIRST_GENERATION, Table};

const CATALOG_DIR: &str = "meta";
/// The catalog while a store is being created: renamed when everything else is there.
const CATALOG_DIR_NEW: &str = "meta.new";

/// The identity of the store in `dir`, if there is a store.
pub fn identity(dir: &Path) -> Result<Option<Identity>, StoreError> {
    match look_at(dir)? {
        Found::Nothing => Ok(None),
        Found::Store => {
            let path = dir.join(CATALOG_DIR);
            Catalog::read_identity(&Rocks::open(&path)?, &path).map(Some)
        }
    }
}

/// The catalog of the store in `dir`, which is created if there is nothing.
pub fn open_catalog(dir: &Path, disk: &dyn Disk, identity: &Identity) -> Result<Rocks, StoreError> {
    if look_at(dir)? == Found::Nothing {
        create(dir, disk, identity)?;
    }
    Rocks::open(&dir.join(CATALOG_DIR))
}

/// The catalog of the store that must be in `dir`, and its path, for reading alone.
pub fn look_at_catalog(dir: &Path) -> Result<(Rocks, PathBuf), StoreError> {
    if look_at(dir)? == Found::Nothing {
        let doing = format!("looking for a chunk store in {}", dir.display());
        return Err(StoreError::io(doing, io::ErrorKind::NotFound.into()));
    }
    let path = dir.join(CATALOG_DIR);
    Ok((Rocks::look(&path)?, path))
}

#[derive(PartialEq, Eq)]
enum Found {
    Nothing,
    Store,
}

fn look_at(dir: &Path) -> Result<Found, StoreError> {
    let doing = || format!("listing {}", dir.display());
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        entries => entries.map_err(|e| StoreError::io(doing(), e))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| StoreError::io(doing(), e))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    let has = |name: &str| names.iter().any(|found| found == name);
    if has(CATALOG_DIR) {
        return match [CHUNKS_DIR, RESCUE_FILE].into_iter().find(|name| !has(name)) {
            None => Ok(Found::Store),
            Some(missing) => Err(damaged(dir, format!("{missing:?} is missing"))),
        };
    }
    if has(CATALOG_DIR_NEW) || names.is_empty() {
        // A creation was interrupted, or never begun.
        return Ok(Found::Nothing);
    }
    if has(CHUNKS_DIR) {
        return Err(damaged(dir, format!("{CATALOG_DIR:?} is missing")));
    }
    // A mount point has one from its birth.
    match names.into_iter().find(|name| name != "lost+found") {
        None => Ok(Found::Nothing),
        Some(found) => Err(StoreError::NotEmpty { path: dir.into(), found }),
    }
}

/// The rename of the catalog is what makes it a store: interrupted before, it is begun again.
fn create(dir: &Path, disk: &dyn Disk, identity: &Identity) -> Result<(), StoreError> {
    let catalog = dir.join(CATALOG_DIR_NEW);
    let prepare = || -> io::Result<()> {
        fs::create_dir_all(dir)?;
        match fs::remove_dir_all(&catalog) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        // Seen by whoever looks at an interrupted creation.
        fs::create_dir(&catalog)?;
        disk.create_dir(Path::new(CHUNKS_DIR))?;
        match disk.create(Path::new(RESCUE_FILE)) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            _ => Ok(()),
        }
    };
    let creating = || format!("creating a store in {}", dir.display());
    prepare().map_err(|e| StoreError::io(creating(), e))?;
    let kv = Rocks::create(&catalog)?;
    Catalog::create(&kv, identity)?;
    drop(kv);
    let finish = || -> io::Result<()> {
        fs::rename(&catalog, dir.join(CATALOG_DIR))?;
        fs::File::open(dir)?.sync_all()?;
        match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => fs::File::open(parent)?.sync_all(),
            _ => Ok(()),
        }
    };
    finish().map_err(|e| StoreError::io(creating(), e))
}

/// The pieces a store is made of. Real ones from [`super::ChunkStore::open`], others in crash tests.
pub struct Parts {
    /// For the text of errors.
    pub path: PathBuf,
    pub disk: Arc<dyn Disk>,
    pub catalog: Box<dyn KeyValue>,
}

impl Parts {
    pub fn open(self, options: StoreOptions, identity: &Identity) -> Result<(Shard, Opened), StoreError> {
        let Self { path, disk, catalog } = self;
        check_identity(&path, Catalog::read_identity(&*catalog, &path)?, identity)?;
        let (catalog, loaded) = Catalog::load(catalog, &path)?;
        let Loaded { copysets, removed, admissions, mut table } = loaded;
        let doing = |what: &str| format!("{what} in {}", path.display());
        let volumes =
            match_files(&*disk, &mut table).map_err(|e| StoreError::io(doing("listing chunks"), e))?;
        let rescue = disk
            .open(Path::new(RESCUE_FILE))
            .map_err(|e| StoreError::io(doing("opening the rescue file"), e))?;
        let space = disk.space().map_err(|e| StoreError::io(doing("asking for free space"), e))?;
        let catalog = Arc::new(catalog);
        let taken = all_files(&table).map(|(_, generation)| generation).max();
        let generations = Arc::new(AtomicU32::new(taken.unwrap_or(FIRST_GENERATION) + 1));
        let table = Arc::new(RwLock::new(table));
        let cluster = identity.cluster;
        let filling = Arc::<Filling>::default();
        let mut drainer = Drainer {
            disk: disk.clone(),
            catalog: catalog.clone(),
            table: table.clone(),
            cluster,
            rescue,
            volumes,
            capacity: options.capacity_bytes.unwrap_or(space.total),
            generations: generations.clone(),
            filling: filling.clone(),
            overlay_bytes_max: options.overlay_bytes_max,
        };
        put_back_rescued(&mut drainer, &admissions)?;
        let shard = Shard {
            active: Layer::default(),
            draining: None,
            swapping: None,
            table,
            open_chunks: OpenChunks::new(options.open_chunks_max.unwrap_or_else(default_open_chunks)),
            disk,
            catalog,
            admissions,
            installed: HashMap::new(),
            repairs: HashSet::new(),
            watches: Vec::new(),
            arriving: Vec::new(),
            generations,
            thread: CheckpointThread::start(drainer)?,
            filling,
            options,
            cluster,
            version: 0,
            last_checkpoint: Instant::now(),
            space,
        };
        Ok((shard, Opened { copysets, removed }))
    }
}

/// What is found in a store.
#[derive(Debug, Default)]
pub struct Opened {
    /// What the log must be replayed from.
    pub copysets: Vec<CopysetRecord>,
    /// Copysets whose removal was begun and not finished: see [`super::ChunkStore::removed`].
    pub removed: Vec<CopysetId>,
}

/// Every chunk file that has a record, in use or in the trash.
fn all_files(table: &Table) -> impl Iterator<Item = (ChunkKey, u32)> {
    let trashed = table.trash().values().flat_map(|trash| trash.chunks.iter());
    let trashed = trashed.map(|(key, record)| (*key, record.generation));
    table.iter().map(|(key, record)| (key, record.generation)).chain(trashed)
}

fn check_identity(path: &Path, found: Identity, expected: &Identity) -> Result<(), StoreError> {
    let path = path.to_path_buf();
    if found.cluster != expected.cluster {
        return Err(StoreError::WrongCluster { path, found: found.cluster, expected: expected.cluster });
    }
    if found != *expected {
        let (found, expected) = (found.chunkserver, expected.chunkserver);
        return Err(StoreError::WrongChunkserver { path, found, expected });
    }
    Ok(())
}

/// Compares files and records. A file without a record was being created, or removed, when the crash came: it goes.
/// A record without a file is a loss: reads of the chunk say so. Gives the volumes that have a directory.
fn match_files(disk: &dyn Disk, table: &mut Table) -> io::Result<HashSet<VolumeId>> {
    let mut volumes = HashSet::new();
    let wanted: HashSet<(ChunkKey, u32)> = all_files(table).collect();
    let mut present: HashSet<(ChunkKey, u32)> = HashSet::new();
    for name in disk.list(Path::new(CHUNKS_DIR))? {
        let Some(volume) = parse_volume_dir(&name) else { continue };
        volumes.insert(volume);
        for name in disk.list(&volume_dir(volume))? {
            let Some((index, generation)) = parse_file_name(&name) else { continue };
            let key = ChunkKey { volume, index };
            if wanted.contains(&(key, generation)) {
                present.insert((key, generation));
            } else {
                disk.remove(&volume_dir(volume).join(name))?;
            }
        }
    }
    // A directory may be there only because this process's predecessor was killed before it synced it.
    disk.sync_dir(Path::new(CHUNKS_DIR))?;
    let lost: Vec<_> = table
        .iter()
        .filter(|(key, record)| !present.contains(&(*key, record.generation)))
        .map(|(key, record)| (key, record.clone()))
        .collect();
    for (key, mut record) in lost {
        tracing::error!(chunk = %key, "a chunk file is missing; repair the chunk from a peer");
        record.lost = true;
        table.put(key, Some(record));
    }
    Ok(volumes)
}

/// A checkpoint was cut off after its rescue file was synced: its merged blocks may be torn in the chunk files.
/// They are drained again, as a small checkpoint of their own; the log heals the rest.
fn put_back_rescued(drainer: &mut Drainer, admissions: &HashMap<CopysetId, u64>) -> Result<(), StoreError> {
    let committed = drainer.catalog.checkpoint();
    let mut blocks = rescue::read(&*drainer.rescue, drainer.cluster.0, committed)
        .map_err(|e| StoreError::io("reading the rescue file", e))?;
    let lives = |owner: &Owner| admissions.get(&owner.copyset) == Some(&owner.admission);
    blocks.retain(|rescued| lives(&rescued.owner));
    if blocks.is_empty() {
        return Ok(());
    }
    tracing::info!(blocks = blocks.len(), "putting back blocks of a checkpoint that was cut off");
    let layer = Arc::new(layer_of(blocks));
    let frozen = Frozen { layer, states: Vec::new(), rescued: AtomicBool::new(true) };
    let drained = drainer.drain(&frozen)?;
    let mut table = drainer.table.write().unwrap_or_else(PoisonError::into_inner);
    for chunk in drained.chunks {
        table.put(chunk.key, chunk.record);
    }
    Ok(())
}
