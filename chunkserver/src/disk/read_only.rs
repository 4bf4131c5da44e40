//! A disk that is only looked at: what is written to it stays in memory, and is read from there.
//!
//! A store that was cut off puts a few blocks right when it is opened; so it can be opened where not a byte may change.
//! Memory is what is written, so nothing that writes for long belongs on it. Nothing is ever durable, and directories are
//! neither made nor removed: a file can be created where there is none.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use evolute_protocol::geometry::SECTOR_BYTES;

use super::direct::Direct;
use super::{Disk, File, Space};

/// By number; `None`: zeroes.
type Sectors = BTreeMap<u64, Option<Vec<u8>>>;

/// What became of a file since the disk is looked at.
#[derive(Clone)]
enum Fate {
    Written(Arc<Mutex<Sectors>>),
    /// Not there before.
    Created(Arc<Mutex<Sectors>>),
    Removed,
}

pub struct ReadOnly {
    below: Direct,
    fates: Mutex<HashMap<PathBuf, Fate>>,
}

impl ReadOnly {
    /// `root` must exist.
    pub fn new(root: &Path) -> Self {
        Self { below: Direct::new(root), fates: Mutex::default() }
    }
}

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disk for ReadOnly {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let mut fates = locked(&self.fates);
        let (below, above) = match fates.get(path) {
            Some(Fate::Removed) => return Err(io::ErrorKind::NotFound.into()),
            Some(Fate::Created(above)) => (None, above.clone()),
            Some(Fate::Written(above)) => (Some(self.below.look(path)?), above.clone()),
            None => {
                let (below, above) = (self.below.look(path)?, Arc::<Mutex<Sectors>>::default());
                fates.insert(path.to_owned(), Fate::Written(above.clone()));
                (Some(below), above)
            }
        };
        Ok(Arc::new(Looked { below, above }))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let mut fates = locked(&self.fates);
        let is_there = match fates.get(path) {
            Some(Fate::Written(_) | Fate::Created(_)) => true,
            Some(Fate::Removed) => false,
            None => self.below.look(path).is_ok(),
        };
        if is_there {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let above = Arc::<Mutex<Sectors>>::default();
        fates.insert(path.to_owned(), Fate::Created(above.clone()));
        Ok(Arc::new(Looked { below: None, above }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        drop(self.open(path)?);
        locked(&self.fates).insert(path.to_owned(), Fate::Removed);
        Ok(())
    }

    fn create_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn remove_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let fates = locked(&self.fates);
        let mut names = self.below.list(path)?;
        names.retain(|name| !matches!(fates.get(&path.join(name)), Some(Fate::Removed | Fate::Created(_))));
        let created =
            fates.iter().filter(|(at, fate)| matches!(fate, Fate::Created(_)) && at.parent() == Some(path));
        names.extend(created.filter_map(|(at, _)| Some(at.file_name()?.to_str()?.to_owned())));
        Ok(names)
    }

    /// Whatever the disk has: nothing here needs it.
    fn space(&self) -> io::Result<Space> {
        Ok(Space { total: u64::MAX, available: u64::MAX })
    }
}

struct Looked {
    below: Option<Arc<dyn File>>,
    above: Arc<Mutex<Sectors>>,
}

impl Looked {
    fn put(&self, offset: u64, sectors: impl Iterator<Item = Option<Vec<u8>>>) {
        assert!(offset.is_multiple_of(SECTOR_BYTES), "{offset} is inside a sector");
        locked(&self.above).extend((offset / SECTOR_BYTES..).zip(sectors));
    }
}

impl File for Looked {
    fn read(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.below {
            Some(below) => below.read(into, offset)?,
            None => into.fill(0),
        }
        let above = locked(&self.above);
        let first = offset / SECTOR_BYTES;
        for (&number, sector) in above.range(first..(offset + into.len() as u64).div_ceil(SECTOR_BYTES)) {
            let at = usize::try_from((number - first) * SECTOR_BYTES).expect("inside what is read");
            let part = &mut into[at..][..usize::try_from(SECTOR_BYTES).expect("512")];
            match sector {
                Some(bytes) => part.copy_from_slice(bytes),
                None => part.fill(0),
            }
        }
        Ok(())
    }

    /// Always by the other way: nobody here is in a hurry.
    fn read_cached(&self, _: &mut [u8], _: u64) -> io::Result<bool> {
        Ok(false)
    }

    fn write(&self, parts: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        let sectors = bytes.chunks(usize::try_from(SECTOR_BYTES).expect("512"));
        self.put(offset, sectors.map(|sector| Some(sector.to_vec())));
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.put(offset, (0..len / SECTOR_BYTES).map(|_| None));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
