//! A disk in memory that knows what a crash may leave behind. For tests.
//!
//! It grants exactly what [`super`] promises and no more: until a sync, every written sector and every changed name
//! may survive or not, each by itself, and of several changes to one sector any may be the one that stays. Power can
//! be cut at any operation, a sync can fail (and then, as Linux does, the pages count as clean), and space can end.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Disk, File, Space};

const SECTOR: usize = 512;

/// `None`: zeroes.
type Content = Option<Arc<[u8; SECTOR]>>;

#[derive(Clone, Default)]
pub struct Crash {
    state: Arc<Mutex<State>>,
}

/// What survives of everything that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survives {
    Everything,
    Nothing,
    /// Each sector and each name by itself, as the seed has it.
    Some(u64),
}

#[derive(Clone, Default)]
struct State {
    names: BTreeMap<PathBuf, Name>,
    inodes: Vec<Inode>,
    operations: u64,
    off_at: Option<u64>,
    is_off: bool,
    syncs: u64,
    fail_sync: Option<u64>,
    bytes_max: Option<u64>,
    is_honest: bool,
}

/// What a name may stand for after a crash: the first is durable, the last is what everybody sees.
#[derive(Clone)]
struct Name(Vec<Option<Node>>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Node {
    Dir,
    File(usize),
}

#[derive(Clone, Default)]
struct Inode {
    sectors: BTreeMap<u64, Sector>,
}

#[derive(Clone, Default)]
struct Sector {
    durable: Content,
    pending: Vec<Content>,
    /// Seen by readers, called clean by the kernel, and not on the disk: a sync failed.
    lost: Option<Content>,
}

impl Sector {
    fn current(&self) -> &Content {
        self.pending.last().or(self.lost.as_ref()).unwrap_or(&self.durable)
    }

    fn put(&mut self, content: Content) {
        self.pending.push(content);
    }
}

impl Crash {
    pub fn new() -> Self {
        Self::default()
    }

    /// Operations so far: everything that changes the disk.
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// The power goes while this operation is under way; it and all later ones fail.
    pub fn cut_power_at(&self, operation: u64) {
        self.lock().off_at = Some(operation);
    }

    /// Counts as an operation something else that is on the same power supply.
    pub fn step(&self) -> io::Result<()> {
        self.lock().step()
    }

    pub fn is_off(&self) -> bool {
        self.lock().is_off
    }

    /// The sync after this many more fails.
    pub fn fail_sync_after(&self, syncs: u64) {
        let mut state = self.lock();
        state.fail_sync = Some(state.syncs + syncs);
    }

    /// The disk holds no more than this.
    pub fn limit(&self, bytes: Option<u64>) {
        let mut state = self.lock();
        (state.bytes_max, state.is_honest) = (bytes, true);
    }

    /// The same, but who asks for free space is not told: it ends in the middle of a write.
    pub fn limit_writes(&self, bytes: Option<u64>) {
        let mut state = self.lock();
        (state.bytes_max, state.is_honest) = (bytes, false);
    }

    /// The disk as it may be found after a crash now, with power again.
    pub fn after_crash(&self, survives: Survives) -> Self {
        let mut choose =
            Chooser { survives, state: if let Survives::Some(seed) = survives { seed } else { 0 } };
        let before = self.lock();
        let mut names = BTreeMap::new();
        for (path, Name(versions)) in &before.names {
            let parent = path.parent().unwrap_or(Path::new(""));
            let reachable = parent == Path::new("") || names.contains_key(parent);
            let chosen = versions[choose.index(versions.len())];
            if let (true, Some(node)) = (reachable, chosen) {
                names.insert(path.clone(), Name(vec![Some(node)]));
            }
        }
        let mut inodes = before.inodes.clone();
        for inode in &mut inodes {
            for sector in inode.sectors.values_mut() {
                let chosen = choose.index(sector.pending.len() + 1);
                if let Some(chosen) = chosen.checked_sub(1) {
                    sector.durable = sector.pending[chosen].clone();
                }
                sector.pending.clear();
                sector.lost = None;
            }
        }
        let state = State { names, inodes, ..State::default() };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Chooser {
    survives: Survives,
    state: u64,
}

impl Chooser {
    /// One of `count` versions, the first being the durable one.
    fn index(&mut self, count: usize) -> usize {
        match self.survives {
            Survives::Everything => count - 1,
            Survives::Nothing => 0,
            Survives::Some(_) => {
                // splitmix64
                self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = self.state;
                z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
                usize::try_from((z ^ z >> 31) % count as u64).expect("below count")
            }
        }
    }
}

impl State {
    fn step(&mut self) -> io::Result<()> {
        if !self.is_off {
            self.is_off = self.off_at == Some(self.operations);
            self.operations += 1;
        }
        if self.is_off { Err(io::Error::other("the power is off")) } else { Ok(()) }
    }

    fn node(&self, path: &Path) -> Option<Node> {
        if path == Path::new("") {
            return Some(Node::Dir);
        }
        *self.names.get(path)?.0.last()?
    }

    fn set(&mut self, path: &Path, node: Option<Node>) {
        self.names.entry(path.to_path_buf()).or_insert_with(|| Name(vec![None])).0.push(node);
    }

    fn children(&self, dir: &Path) -> impl Iterator<Item = &Path> {
        self.names
            .iter()
            .filter(move |(path, _)| path.parent() == Some(dir))
            .filter(|(_, name)| name.0.last().is_some_and(Option::is_some))
            .map(|(path, _)| path.as_path())
    }

    fn used(&self) -> u64 {
        let inodes = self.inodes.iter().flat_map(|inode| inode.sectors.values());
        inodes.filter(|sector| sector.current().is_some()).count() as u64 * SECTOR as u64
    }

    fn new_file(&mut self) -> usize {
        self.inodes.push(Inode::default());
        self.inodes.len() - 1
    }
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk for Crash {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        match self.lock().node(path) {
            Some(Node::File(inode)) => Ok(Arc::new(CrashFile { disk: self.clone(), inode })),
            _ => Err(not_found()),
        }
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let mut state = self.lock();
        if state.node(path).is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if state.node(path.parent().unwrap_or(Path::new(""))) != Some(Node::Dir) {
            return Err(not_found());
        }
        let stepped = state.step();
        let inode = state.new_file();
        state.set(path, Some(Node::File(inode)));
        stepped?;
        Ok(Arc::new(CrashFile { disk: self.clone(), inode }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if !matches!(state.node(path), Some(Node::File(_))) {
            return Err(not_found());
        }
        let stepped = state.step();
        state.set(path, None);
        stepped
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.node(path) == Some(Node::Dir) {
            return Ok(());
        }
        let stepped = state.step();
        state.set(path, Some(Node::Dir));
        stepped
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.node(path) != Some(Node::Dir) {
            return Err(not_found());
        }
        if state.children(path).next().is_some() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        let stepped = state.step();
        state.set(path, None);
        stepped
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.node(path) != Some(Node::Dir) {
            return Err(not_found());
        }
        state.step()?;
        for (name, versions) in &mut state.names {
            if name.parent() == Some(path) {
                versions.0.drain(..versions.0.len() - 1);
            }
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.lock();
        if state.node(path) != Some(Node::Dir) {
            return Err(not_found());
        }
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok(state.children(path).filter_map(name).collect())
    }

    fn space(&self) -> io::Result<Space> {
        let state = self.lock();
        let total = state.bytes_max.filter(|_| state.is_honest).unwrap_or(1 << 40);
        Ok(Space { total, available: total.saturating_sub(state.used()) })
    }
}

struct CrashFile {
    disk: Crash,
    inode: usize,
}

impl File for CrashFile {
    fn read(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.disk.lock();
        if state.is_off {
            return Err(io::Error::other("the power is off"));
        }
        assert!(offset.is_multiple_of(SECTOR as u64) && into.len().is_multiple_of(SECTOR));
        for (number, bytes) in (offset / SECTOR as u64..).zip(into.chunks_exact_mut(SECTOR)) {
            match state.inodes[self.inode].sectors.get(&number).map(Sector::current) {
                Some(Some(content)) => bytes.copy_from_slice(&**content),
                _ => bytes.fill(0),
            }
        }
        Ok(())
    }

    fn read_cached(&self, into: &mut [u8], offset: u64) -> io::Result<bool> {
        self.read(into, offset).map(|()| true)
    }

    fn write(&self, parts: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        assert!(offset.is_multiple_of(SECTOR as u64));
        let data = parts.iter().flat_map(|part| part.iter().copied()).collect::<Vec<u8>>();
        assert!(data.len().is_multiple_of(SECTOR));
        let mut state = self.disk.lock();
        if state.is_off {
            return Err(io::Error::other("the power is off"));
        }
        let stepped = state.step();
        let mut left = state.bytes_max.map_or(u64::MAX, |max| max.saturating_sub(state.used()));
        let sectors = &mut state.inodes[self.inode].sectors;
        for (number, bytes) in (offset / SECTOR as u64..).zip(data.chunks_exact(SECTOR)) {
            let sector = sectors.entry(number).or_default();
            if sector.current().is_none() {
                left = left.checked_sub(SECTOR as u64).ok_or(io::ErrorKind::StorageFull)?;
            }
            sector.put(Some(Arc::new(bytes.try_into().expect("one sector"))));
        }
        stepped
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.disk.lock();
        if state.is_off {
            return Err(io::Error::other("the power is off"));
        }
        let stepped = state.step();
        let range = offset / SECTOR as u64..(offset + len) / SECTOR as u64;
        for (_, sector) in state.inodes[self.inode].sectors.range_mut(range) {
            sector.put(None);
        }
        stepped
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.lock();
        state.step()?;
        let failed = state.fail_sync == Some(state.syncs);
        state.syncs += 1;
        for sector in state.inodes[self.inode].sectors.values_mut() {
            if let Some(last) = sector.pending.pop() {
                sector.pending.clear();
                if failed {
                    sector.lost = Some(last);
                } else {
                    (sector.durable, sector.lost) = (last, None);
                }
            }
        }
        if failed { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }
}
