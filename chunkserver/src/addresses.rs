//! Where the cluster's chunkservers are: told by the control plane, remembered on disk, so that a chunkserver finds
//! its peers while the control plane is away.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use evolute_protocol::id::ChunkserverId;

/// Shared between the shard's thread, which dials, and the heartbeat, which is told.
#[derive(Debug, Clone)]
pub struct Addresses {
    file: PathBuf,
    known: Arc<RwLock<BTreeMap<u32, String>>>,
}

impl Addresses {
    /// Reads what was remembered. A damaged file is only forgotten: the control plane tells it all again.
    pub fn open(data_dir: &Path) -> Self {
        let file = data_dir.join("addresses.json");
        let known =
            fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        Self { file, known: Arc::new(RwLock::new(known)) }
    }

    pub fn get(&self, chunkserver: ChunkserverId) -> Option<String> {
        self.known.read().unwrap_or_else(|poisoned| poisoned.into_inner()).get(&chunkserver.0).cloned()
    }

    pub fn learn(&self, told: BTreeMap<u32, String>) {
        {
            let mut known = self.known.write().unwrap_or_else(|poisoned| poisoned.into_inner());
            if told.is_empty() || *known == told {
                return;
            }
            known.clone_from(&told);
        }
        if let Err(error) = self.remember(&told) {
            tracing::warn!(file = %self.file.display(), %error, "cannot remember the chunkservers' addresses");
        }
    }

    fn remember(&self, told: &BTreeMap<u32, String>) -> io::Result<()> {
        let unfinished = self.file.with_extension("json.new");
        let mut file = fs::File::create(&unfinished)?;
        file.write_all(&serde_json::to_vec(told)?)?;
        file.sync_all()?;
        fs::rename(&unfinished, &self.file)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use evolute_protocol::id::ChunkserverId;

    use super::Addresses;

    #[test]
    fn addresses_are_remembered_and_damage_is_forgotten() {
        let dir = tempfile::tempdir().expect("temp dir");
        Addresses::open(dir.path()).learn(BTreeMap::from([(3, "127.0.0.1:9".to_owned())]));
        assert_eq!(Addresses::open(dir.path()).get(ChunkserverId(3)).as_deref(), Some("127.0.0.1:9"));
        std::fs::write(dir.path().join("addresses.json"), "{").expect("write");
        assert_eq!(Addresses::open(dir.path()).get(ChunkserverId(3)), None);
    }
}
