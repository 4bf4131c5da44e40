//! Opens a store where not a byte may change: what an opening puts right is put right in memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::ChunkStore;
use super::catalog::{Catalog, KeyChange, KeyValue};
use super::error::StoreError;
use super::options::{Identity, StoreOptions};
use super::recover::{self, Opened, Parts};
use crate::disk::read_only::ReadOnly;

impl ChunkStore {
    /// As [`Self::open`], of a store whose owner is not known, for reading alone. What is applied to it stays in memory:
    /// no checkpoint is for it.
    pub fn look(dir: &Path) -> Result<(Self, Identity, Opened), StoreError> {
        let (below, path) = recover::look_at_catalog(dir)?;
        let identity = Catalog::read_identity(&below, &path)?;
        let catalog = Box::new(Looked { below, above: Mutex::default() });
        let parts = Parts { path: dir.to_path_buf(), disk: Arc::new(ReadOnly::new(dir)), catalog };
        let (store, opened) = Self::open_parts(parts, StoreOptions::default(), &identity)?;
        Ok((store, identity, opened))
    }
}

/// A key-value store that is only read, and what was committed since.
struct Looked<K> {
    below: K,
    above: Mutex<BTreeMap<Vec<u8>, Option<Vec<u8>>>>,
}

impl<K: KeyValue> KeyValue for Looked<K> {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let above = self.above.lock().unwrap_or_else(PoisonError::into_inner);
        match above.get(key) {
            Some(value) => Ok(value.clone()),
            None => self.below.get(key),
        }
    }

    fn scan(&self, prefix: u8, each: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), StoreError> {
        let above = self.above.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pairs: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        self.below.scan(prefix, &mut |key, value| {
            if !above.contains_key(key) {
                pairs.insert(key.to_vec(), value.to_vec());
            }
        })?;
        for (key, value) in above.iter().filter(|(key, _)| key.first() == Some(&prefix)) {
            pairs.extend(value.clone().map(|value| (key.clone(), value)));
        }
        pairs.iter().for_each(|(key, value)| each(key, value));
        Ok(())
    }

    fn commit(&self, changes: Vec<KeyChange>) -> Result<(), StoreError> {
        self.above.lock().unwrap_or_else(PoisonError::into_inner).extend(changes);
        Ok(())
    }
}
