//! Holding the volume: who we are to the cluster, and what a restart remembers of it.
//!
//! The epoch is (attachment, incarnation). The control plane raises the attachment; a backend that comes back on the
//! same host raises only the incarnation, from what it remembers here, and so comes back while the control plane is
//! away (design.md §5).
//!
//! What always holds:
//!
//! - What is remembered is on disk before it is used: an incarnation before anything is fenced with it, a segment
//!   before anything is written to it. A backend that remembered less would hand out zeroes where data is.
//! - A file that is damaged, of a newer version or of another volume is refused by name; it is never guessed at and
//!   never overwritten.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use evolute_protocol::checksum::crc32c;
use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::{ChunkserverId, CopysetId, SegmentIndex, VolumeId};
use serde::{Deserialize, Serialize};

use super::routing::{CHUNKS, ChunkserverPlace, CopysetMembers, Map};

/// The right to write a volume, and where the volume is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    pub volume: VolumeId,
    pub size_bytes: u64,
    pub epoch: Epoch,
    pub map: Map,
    /// From the state directory, without asking the control plane: somebody may have taken the volume over since.
    pub remembered: bool,
}

/// What the state directory keeps of an attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remembered {
    pub name: String,
    /// Who attached, by name, and what tells its secret from others' ([`super::identity`]). Another place must ask the
    /// control plane for itself.
    pub holder: String,
    pub fingerprint: Option<String>,
    pub volume: VolumeId,
    pub size_bytes: u64,
    pub epoch: Epoch,
    pub map: Map,
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{path}: cannot be {verb}")]
    Io {
        path: PathBuf,
        verb: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(
        "{0}: damaged (it is not what was written). Remove it to attach through the control plane instead"
    )]
    Damaged(PathBuf),
    #[error("{path}: written by a newer program (version {version}; this one knows {VERSION})")]
    Newer { path: PathBuf, version: u32 },
    #[error("{} cannot be made: make it for this user, or name another one with --state-dir", .directory.display())]
    Make {
        directory: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{0:?} cannot be a volume's name")]
    Name(String),
}

impl StateError {
    /// The directory is there when this returns.
    pub fn make(directory: &Path) -> Result<(), StateError> {
        fs::create_dir_all(directory)
            .map_err(|source| StateError::Make { directory: directory.to_owned(), source })
    }
}

/// The file's first words: what it is, its version, the checksum of everything behind the first line.
const MAGIC: &str = "evolute-attachment";
const VERSION: u32 = 1;

/// Where an attachment is remembered: one file per volume.
#[derive(Debug, Clone)]
pub struct StateFile {
    path: PathBuf,
}

impl StateFile {
    pub fn new(directory: &Path, volume: &str) -> Result<Self, StateError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if volume.is_empty() || volume.len() > 128 || volume.starts_with('.') || !volume.chars().all(allowed)
        {
            return Err(StateError::Name(volume.to_owned()));
        }
        StateError::make(directory)?;
        Ok(Self { path: directory.join(format!("{volume}.attachment")) })
    }

    fn failed(&self, verb: &'static str) -> impl FnOnce(io::Error) -> StateError {
        let path = self.path.clone();
        move |source| StateError::Io { path, verb, source }
    }

    /// What was saved last; `None` if nothing is.
    pub fn load(&self) -> Result<Option<Remembered>, StateError> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed("read")(error)),
        };
        let damaged = || StateError::Damaged(self.path.clone());
        let end = bytes.iter().position(|byte| *byte == b'\n').ok_or_else(damaged)?;
        let header = std::str::from_utf8(&bytes[..end]).map_err(|_| damaged())?;
        let body = &bytes[end + 1..];
        let mut words = header.split(' ');
        let (magic, version, crc) = (words.next(), words.next(), words.next());
        let version: u32 = version.and_then(|text| text.parse().ok()).ok_or_else(damaged)?;
        if magic != Some(MAGIC) || words.next().is_some() || version == 0 {
            return Err(damaged());
        }
        if version > VERSION {
            return Err(StateError::Newer { path: self.path.clone(), version });
        }
        if crc != Some(format!("{:08x}", crc32c(body)).as_str()) {
            return Err(damaged());
        }
        let saved: Saved = serde_json::from_slice(body).map_err(|_| damaged())?;
        saved.restore().map(Some).ok_or_else(damaged)
    }

    /// Replaces what was saved; on disk when this returns.
    pub fn save(&self, remembered: &Remembered) -> Result<(), StateError> {
        let body = serde_json::to_vec(&Saved::new(remembered))
            .map_err(|error| self.failed("written")(io::Error::other(error)))?;
        let beside = self.path.with_extension("attachment.new");
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&beside)?;
            writeln!(file, "{MAGIC} {VERSION} {:08x}", crc32c(&body))?;
            file.write_all(&body)?;
            file.sync_all()?;
            fs::rename(&beside, &self.path)?;
            self.sync_directory()
        };
        write().map_err(self.failed("written"))
    }

    /// The attachment was given back.
    pub fn forget(&self) -> Result<(), StateError> {
        match fs::remove_file(&self.path) {
            Ok(()) => self.sync_directory().map_err(self.failed("removed")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(self.failed("removed")(error)),
        }
    }

    fn sync_directory(&self) -> io::Result<()> {
        match self.path.parent() {
            Some(directory) => File::open(directory)?.sync_all(),
            None => Ok(()),
        }
    }
}

/// [`Remembered`] as the file has it: plain numbers and names, so that an operator can read it.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    volume_name: String,
    holder: String,
    /// Not in files of before it was.
    #[serde(default)]
    holder_fingerprint: Option<String>,
    volume: u64,
    size_bytes: u64,
    attachment: u32,
    incarnation: u32,
    cluster: String,
    chunkservers: BTreeMap<u32, String>,
    copysets: BTreeMap<u32, SavedCopyset>,
    segments: BTreeMap<u32, Vec<u32>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedCopyset {
    chunkservers: Vec<u32>,
    leader: Option<u32>,
}

impl Saved {
    fn new(from: &Remembered) -> Self {
        let map = &from.map;
        let chunkserver = |place: &ChunkserverPlace| (place.chunkserver.0, place.address.clone());
        let copyset = |members: &CopysetMembers| {
            let chunkservers = members.replicas.iter().map(|id| id.0).collect();
            (members.copyset.0, SavedCopyset { chunkservers, leader: members.leader.map(|id| id.0) })
        };
        Self {
            volume_name: from.name.clone(),
            holder: from.holder.clone(),
            holder_fingerprint: from.fingerprint.clone(),
            volume: from.volume.0,
            size_bytes: from.size_bytes,
            attachment: from.epoch.attachment,
            incarnation: from.epoch.incarnation,
            cluster: map.cluster.to_string(),
            chunkservers: map.chunkservers.iter().map(chunkserver).collect(),
            copysets: map.copysets.iter().map(copyset).collect(),
            segments: map
                .segments
                .iter()
                .map(|(segment, copysets)| (segment.0, copysets.iter().map(|id| id.0).collect()))
                .collect(),
        }
    }

    fn restore(self) -> Option<Remembered> {
        let mut segments = Vec::with_capacity(self.segments.len());
        for (segment, copysets) in self.segments {
            let copysets: Vec<_> = copysets.into_iter().map(CopysetId).collect();
            if copysets.iter().any(|id| !self.copysets.contains_key(&id.0)) {
                return None;
            }
            let copysets: [CopysetId; CHUNKS] = copysets.try_into().ok()?;
            segments.push((SegmentIndex(segment), copysets));
        }
        let chunkserver = |(id, address): (u32, String)| ChunkserverPlace {
            chunkserver: ChunkserverId(id),
            resolved: address.parse().ok(),
            address,
        };
        let copyset = |(id, saved): (u32, SavedCopyset)| CopysetMembers {
            copyset: CopysetId(id),
            replicas: saved.chunkservers.into_iter().map(ChunkserverId).collect(),
            leader: saved.leader.map(ChunkserverId),
        };
        Some(Remembered {
            name: self.volume_name,
            holder: self.holder,
            fingerprint: self.holder_fingerprint,
            volume: VolumeId(self.volume),
            size_bytes: self.size_bytes,
            epoch: Epoch { attachment: self.attachment, incarnation: self.incarnation },
            map: Map {
                cluster: self.cluster.parse().ok()?,
                segments,
                copysets: self.copysets.into_iter().map(copyset).collect(),
                chunkservers: self.chunkservers.into_iter().map(chunkserver).collect(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use evolute_protocol::epoch::Epoch;
    use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId, SegmentIndex, VolumeId};

    use super::{Remembered, StateError, StateFile};
    use crate::volume::routing::{CHUNKS, ChunkserverPlace, CopysetMembers, Map};

    fn remembered() -> Remembered {
        Remembered {
            name: "disk".into(),
            holder: "host:/run/disk.sock".into(),
            fingerprint: Some("f".into()),
            volume: VolumeId(7),
            size_bytes: 1 << 30,
            epoch: Epoch { attachment: 3, incarnation: 9 },
            map: Map {
                cluster: ClusterId([5; 16]),
                segments: vec![(SegmentIndex(0), [CopysetId(2); CHUNKS])],
                copysets: vec![CopysetMembers {
                    copyset: CopysetId(2),
                    replicas: vec![ChunkserverId(1), ChunkserverId(2), ChunkserverId(3)],
                    leader: Some(ChunkserverId(2)),
                }],
                chunkservers: (1..4)
                    .map(|id| ChunkserverPlace {
                        chunkserver: ChunkserverId(id),
                        address: format!("127.0.0.1:{}", 9000 + id),
                        resolved: format!("127.0.0.1:{}", 9000 + id).parse().ok(),
                    })
                    .collect(),
            },
        }
    }

    #[test]
    fn what_is_saved_is_found_again_and_forgotten_when_told() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = StateFile::new(&directory.path().join("deep/er"), "disk").expect("a good name");
        assert!(matches!(file.load(), Ok(None)));
        file.save(&remembered()).expect("saved");
        assert_eq!(file.load().expect("readable"), Some(remembered()));
        file.forget().expect("removed");
        file.forget().expect("twice is once");
        assert!(matches!(file.load(), Ok(None)));
    }

    #[test]
    fn a_damaged_file_is_refused_by_name_wherever_the_damage_is() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = StateFile::new(directory.path(), "disk").expect("a good name");
        file.save(&remembered()).expect("saved");
        let good = fs::read(&file.path).expect("there");
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&file.path, &bad).expect("written");
            let refused = file.load().expect_err("damaged").to_string();
            assert!(refused.contains("disk.attachment"), "byte {at}: {refused}");
        }
        for length in 0..good.len() {
            fs::write(&file.path, &good[..length]).expect("written");
            assert!(matches!(file.load(), Err(StateError::Damaged(_))), "{length} bytes");
        }
    }

    #[test]
    fn a_newer_file_is_refused_as_such() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = StateFile::new(directory.path(), "disk").expect("a good name");
        fs::write(&file.path, "evolute-attachment 2 00000000\nwhatever").expect("written");
        assert!(matches!(file.load(), Err(StateError::Newer { version: 2, .. })));
    }

    #[test]
    fn a_name_cannot_leave_the_directory() {
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["", "..", "../x", "a/b", ".hidden", "a b", "ä"] {
            assert!(matches!(StateFile::new(directory.path(), name), Err(StateError::Name(_))), "{name:?}");
        }
    }
}
