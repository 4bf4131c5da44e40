//! The data directory: whose it is, which format it has, and that only one process uses it.
//!
//! ```text
//!  DIR/LOCK       held (flock) by the process that uses the directory
//!  DIR/identity   text, below
//!  DIR/raft/      the raft log (evolute-raft owns what is in it)
//!  DIR/state/     RocksDB: the applied state
//! ```
//!
//! `identity` is six lines, each ended by a newline, replaced as a whole by rename:
//!
//! ```text
//!  evolute-mds data directory
//!  format: 1
//!  cluster: 0123456789abcdef0123456789abcdef
//!  member: 1
//!  stage: ready
//!  crc32c: 89abcdef                              of the five lines above
//! ```
//!
//! The stage is `new` until everything else in the directory was made, so an interrupted first start is told apart
//! from a directory that lost its state: the former is made anew, the latter refused. Nothing is ever made in a
//! directory that is neither empty nor ours, nor, unless it was asked for ([`DataDir::init`]), in one that is there and
//! empty: that is what a mount point without its disk looks like.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use evolute_daemon::shell::quoted_path;
use evolute_protocol::checksum::crc32c;
use evolute_protocol::id::ClusterId;
use rustix::fs::{FlockOperation, flock};

/// What this program reads and writes. History: 1, the first one.
pub const FORMAT: u32 = 1;

const TITLE: &str = "evolute-mds data directory";
const IDENTITY: &str = "identity";
const LOCK: &str = "LOCK";
/// An identity is six short lines; more is not one.
const IDENTITY_BYTES_MAX: u64 = 4096;

/// Why a data directory cannot be used. One variant per thing an operator can do next.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("the data directory {dir} is in use by another process")]
    InUse { dir: PathBuf },
    #[error(
        "the data directory {dir} was written by a newer version (format {found}, this program knows {FORMAT}): \
         start the newer program"
    )]
    Newer { dir: PathBuf, found: u64 },
    #[error(
        "{dir} is not a data directory of evolute-mds: {why}. Name an empty or a new directory, nothing was changed"
    )]
    NotOurs { dir: PathBuf, why: String },
    #[error("the identity file of {dir} is damaged ({why}): restore it from a copy, nothing was changed")]
    Damaged { dir: PathBuf, why: &'static str },
    #[error(
        "the data directory {dir} is empty: is its disk mounted? If it is to hold a new cluster, run: \
         evolute-mds init --data-dir {}",
        quoted_path(dir)
    )]
    Empty { dir: PathBuf },
    #[error("there is no data directory {dir}, and --existing forbids to make one: is its disk mounted?")]
    Absent { dir: PathBuf },
    #[error("{missing} is missing in the data directory {dir}: restore it from a copy, nothing was changed")]
    Incomplete { dir: PathBuf, missing: &'static str },
    #[error("{dir} is in use already: it is the data directory of cluster {cluster}. Nothing was changed")]
    NotEmpty { dir: PathBuf, cluster: ClusterId },
    #[error("cannot use the data directory {dir}")]
    Io {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What to do about a directory that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    Made,
    Refused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    New,
    Ready,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    cluster: ClusterId,
    member: u64,
    stage: Stage,
}

/// A data directory that is ours, and locked.
#[derive(Debug)]
pub struct DataDir {
    dir: PathBuf,
    identity: Identity,
    /// Gives the lock back when closed, by whatever death.
    lock: Arc<File>,
}

impl DataDir {
    /// Opens the directory, or makes it when it is `absent`, unless that is forbidden; `fresh` is its cluster's id then.
    pub fn open(dir: &Path, fresh: ClusterId, absent: Absent) -> Result<Self, DataDirError> {
        let io = |source| DataDirError::Io { dir: dir.to_owned(), source };
        if !dir.try_exists().map_err(io)? {
            if absent == Absent::Refused {
                return Err(DataDirError::Absent { dir: dir.to_owned() });
            }
        } else if read_identity(dir)?.is_none() && is_unused(dir)? {
            return Err(DataDirError::Empty { dir: dir.to_owned() });
        }
        let (lock, identity) = take(dir, fresh)?;
        if identity.stage == Stage::Ready {
            for part in ["raft", "state"] {
                if !dir.join(part).is_dir() {
                    return Err(DataDirError::Incomplete { dir: dir.to_owned(), missing: part });
                }
            }
        } else {
            // Nothing was ever promised from here.
            for part in ["raft", "state"] {
                let part = dir.join(part);
                if part.exists() {
                    fs::remove_dir_all(&part).map_err(io)?;
                }
                fs::create_dir(&part).map_err(io)?;
            }
        }
        Ok(Self { dir: dir.to_owned(), identity, lock: Arc::new(lock) })
    }

    /// Makes an absent or an empty directory one in which a new cluster begins at the next start. One that was asked for
    /// before, and not used since, is left as it is. Gives the cluster's id.
    pub fn init(dir: &Path, fresh: ClusterId) -> Result<ClusterId, DataDirError> {
        let (_lock, identity) = take(dir, fresh)?;
        match identity.stage {
            Stage::New => Ok(identity.cluster),
            Stage::Ready => Err(DataDirError::NotEmpty { dir: dir.to_owned(), cluster: identity.cluster }),
        }
    }

    /// True until [`DataDir::made`]: what lies in [`DataDir::raft`] and [`DataDir::state`] is to be made.
    pub fn is_new(&self) -> bool {
        self.identity.stage == Stage::New
    }

    /// Everything in the directory is there and synced.
    pub fn made(&mut self) -> Result<(), DataDirError> {
        let made = Identity { stage: Stage::Ready, ..self.identity.clone() };
        write_identity(&self.dir, &made)
            .map_err(|source| DataDirError::Io { dir: self.dir.clone(), source })?;
        self.identity = made;
        Ok(())
    }

    /// Keeps the directory locked for as long as it is held.
    pub fn lock(&self) -> Arc<File> {
        self.lock.clone()
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    pub fn cluster(&self) -> ClusterId {
        self.identity.cluster
    }

    /// Which member of the MDS group this directory is.
    pub fn member(&self) -> u64 {
        self.identity.member
    }

    pub fn raft(&self) -> PathBuf {
        self.dir.join("raft")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }
}

/// Locks the directory, and writes its identity if it has none. Of a directory that may be used.
fn take(dir: &Path, fresh: ClusterId) -> Result<(File, Identity), DataDirError> {
    let io = |source| DataDirError::Io { dir: dir.to_owned(), source };
    fs::create_dir_all(dir).map_err(io)?;
    if read_identity(dir)?.is_none() {
        refuse_foreign(dir)?;
    }
    let lock = File::options().create(true).append(true).open(dir.join(LOCK)).map_err(io)?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        rustix::io::Errno::WOULDBLOCK => DataDirError::InUse { dir: dir.to_owned() },
        error => io(error.into()),
    })?;
    // Again, under the lock: another process may have made the directory meanwhile.
    let identity = match read_identity(dir)? {
        Some(identity) => identity,
        None => {
            let identity = Identity { cluster: fresh, member: 1, stage: Stage::New };
            write_identity(dir, &identity).map_err(io)?;
            identity
        }
    };
    Ok((lock, identity))
}

/// Nothing in it is ours, not even a lock: it is as an administrator or a new file system left it.
fn is_unused(dir: &Path) -> Result<bool, DataDirError> {
    let io = |source| DataDirError::Io { dir: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(io)? {
        if entry.map_err(io)?.file_name() != "lost+found" {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A directory without an identity may hold only what a new file system or an interrupted first start leaves.
fn refuse_foreign(dir: &Path) -> Result<(), DataDirError> {
    let io = |source| DataDirError::Io { dir: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        let name = name.to_string_lossy();
        if ![LOCK, "lost+found"].contains(&name.as_ref()) && !name.starts_with("identity.new") {
            return Err(DataDirError::NotOurs {
                dir: dir.to_owned(),
                why: format!("it holds {name:?} and no identity"),
            });
        }
    }
    Ok(())
}

fn read_identity(dir: &Path) -> Result<Option<Identity>, DataDirError> {
    let io = |source| DataDirError::Io { dir: dir.to_owned(), source };
    let path = dir.join(IDENTITY);
    let bytes = match fs::metadata(&path) {
        Ok(meta) if meta.len() > IDENTITY_BYTES_MAX || !meta.is_file() => {
            let why = "its identity is not one of this program".to_owned();
            return Err(DataDirError::NotOurs { dir: dir.to_owned(), why });
        }
        Ok(_) => fs::read(&path).map_err(io)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    parse(dir, &bytes).map(Some)
}

fn parse(dir: &Path, bytes: &[u8]) -> Result<Identity, DataDirError> {
    let damaged = |why| DataDirError::Damaged { dir: dir.to_owned(), why };
    let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is not text"))?;
    let (title, rest) = text.split_once('\n').ok_or_else(|| damaged("it is cut off"))?;
    if title != TITLE {
        // Another Evolute program says what it is in its first line, too.
        let shown: String = title.chars().take(60).collect();
        return Err(DataDirError::NotOurs {
            dir: dir.to_owned(),
            why: format!("its identity says {shown:?}"),
        });
    }
    // The version before everything else: how the rest looks is the newer program's business.
    let (format, rest) = rest.split_once('\n').ok_or_else(|| damaged("it is cut off"))?;
    let found: u64 =
        field(format, "format").and_then(|v| v.parse().ok()).ok_or_else(|| damaged("no format"))?;
    if found > u64::from(FORMAT) {
        return Err(DataDirError::Newer { dir: dir.to_owned(), found });
    }
    let (body, crc) = text
        .strip_suffix('\n')
        .and_then(|text| text.rsplit_once('\n'))
        .ok_or_else(|| damaged("it is cut off"))?;
    let crc = field(crc, "crc32c").and_then(|crc| u32::from_str_radix(crc, 16).ok());
    if crc != Some(crc32c(format!("{body}\n").as_bytes())) {
        return Err(damaged("its checksum does not match"));
    }
    let mut lines = rest.lines();
    let mut next = |name| lines.next().and_then(|line| field(line, name));
    let cluster = next("cluster").and_then(|v| v.parse().ok()).ok_or_else(|| damaged("no cluster id"))?;
    let member = next("member").and_then(|v| v.parse().ok()).ok_or_else(|| damaged("no member number"))?;
    let stage = match next("stage") {
        Some("new") => Stage::New,
        Some("ready") => Stage::Ready,
        _ => return Err(damaged("no stage")),
    };
    Ok(Identity { cluster, member, stage })
}

fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.strip_prefix(name)?.strip_prefix(": ")
}

fn write_identity(dir: &Path, identity: &Identity) -> io::Result<()> {
    let stage = match identity.stage {
        Stage::New => "new",
        Stage::Ready => "ready",
    };
    let body = format!(
        "{TITLE}\nformat: {FORMAT}\ncluster: {}\nmember: {}\nstage: {stage}\n",
        identity.cluster, identity.member
    );
    let unfinished = dir.join("identity.new");
    let mut file = File::create(&unfinished)?;
    writeln!(file, "{body}crc32c: {:08x}", crc32c(body.as_bytes()))?;
    file.sync_all()?;
    fs::rename(&unfinished, dir.join(IDENTITY))?;
    // The rename, and whatever was made in the directory before it.
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::{Absent, DataDir, DataDirError, IDENTITY};
    use evolute_protocol::checksum::crc32c;
    use evolute_protocol::id::ClusterId;
    use std::fs;
    use std::path::Path;

    const OURS: ClusterId = ClusterId([7; 16]);
    const OTHER: ClusterId = ClusterId([9; 16]);

    fn open(dir: &Path, fresh: ClusterId) -> Result<DataDir, DataDirError> {
        DataDir::open(dir, fresh, Absent::Made)
    }

    fn made(dir: &Path) {
        if dir.exists() {
            DataDir::init(dir, OURS).expect("an empty directory becomes ours");
        }
        let mut data = open(dir, OURS).expect("an absent directory becomes ours");
        assert!(data.is_new());
        data.made().expect("written");
    }

    fn refused(dir: &Path) -> DataDirError {
        open(dir, OTHER).expect_err("refused")
    }

    #[test]
    fn a_directory_keeps_its_cluster() {
        let dir = tempfile::tempdir().expect("temp dir");
        let dir = dir.path().join("not/yet/there");
        made(&dir);
        let again = open(&dir, OTHER).expect("ours");
        assert_eq!((again.cluster(), again.member(), again.is_new()), (OURS, 1, false));
    }

    #[test]
    fn only_one_process_uses_a_directory() {
        let dir = tempfile::tempdir().expect("temp dir");
        made(dir.path());
        let first = open(dir.path(), OURS).expect("free");
        assert!(matches!(refused(dir.path()), DataDirError::InUse { .. }));
        drop(first);
        open(dir.path(), OTHER).expect("free again");
    }

    #[test]
    fn an_interrupted_first_start_begins_again() {
        let dir = tempfile::tempdir().expect("temp dir");
        DataDir::init(dir.path(), OURS).expect("asked for");
        drop(open(dir.path(), OURS).expect("begun"));
        fs::write(dir.path().join("state/half"), "x").expect("write");
        let again = open(dir.path(), OTHER).expect("begun again");
        assert!(again.is_new() && again.cluster() == OURS && !dir.path().join("state/half").exists());
    }

    #[test]
    fn a_directory_that_lost_its_state_is_not_made_anew() {
        for part in ["state", "raft"] {
            let dir = tempfile::tempdir().expect("temp dir");
            made(dir.path());
            fs::remove_dir_all(dir.path().join(part)).expect("removed");
            assert!(
                matches!(refused(dir.path()), DataDirError::Incomplete { missing, .. } if missing == part)
            );
            assert!(!dir.path().join(part).exists());
        }
        // Without the identity alone, it could be anything.
        let dir = tempfile::tempdir().expect("temp dir");
        made(dir.path());
        fs::remove_file(dir.path().join(IDENTITY)).expect("removed");
        assert!(matches!(refused(dir.path()), DataDirError::NotOurs { .. }));
    }

    /// A mount point without its disk is empty, too; so is a new file system.
    #[test]
    fn an_empty_directory_becomes_ours_only_when_that_was_asked_for() {
        let dir = tempfile::Builder::new().prefix("a b").tempdir().expect("temp dir");
        for _ in 0..2 {
            let error = refused(dir.path());
            assert!(matches!(error, DataDirError::Empty { .. }), "{error}");
            assert!(error.to_string().contains("evolute-mds init --data-dir '/"), "{error}");
            fs::create_dir_all(dir.path().join("lost+found")).expect("made");
        }
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1, "not even a lock file");
        assert_eq!(DataDir::init(dir.path(), OURS).expect("asked for"), OURS);
        assert_eq!(DataDir::init(dir.path(), OTHER).expect("asked for twice"), OURS);
        let mut data = open(dir.path(), OTHER).expect("as asked for");
        assert!(data.is_new() && data.cluster() == OURS);
        data.made().expect("written");
        drop(data);
        let error = DataDir::init(dir.path(), OTHER).expect_err("in use");
        assert!(matches!(error, DataDirError::NotEmpty { cluster: OURS, .. }), "{error}");
        open(dir.path(), OTHER).expect("as it was");
    }

    #[test]
    fn an_absent_directory_is_not_made_where_that_is_forbidden() {
        let dir = tempfile::tempdir().expect("temp dir");
        let dir = dir.path().join("disk/mds");
        let error = DataDir::open(&dir, OURS, Absent::Refused).expect_err("absent");
        assert!(matches!(error, DataDirError::Absent { .. }) && !dir.exists(), "{error}");
        made(&dir);
        DataDir::open(&dir, OTHER, Absent::Refused).expect("there");
    }

    #[test]
    fn somebody_elses_directory_is_left_alone() {
        let dir = tempfile::tempdir().expect("temp dir");
        fs::write(dir.path().join("thesis.tex"), "x").expect("write");
        let error = refused(dir.path());
        assert!(matches!(&error, DataDirError::NotOurs { why, .. } if why.contains("thesis.tex")), "{error}");
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1, "not even a lock file");

        fs::remove_file(dir.path().join("thesis.tex")).expect("removed");
        fs::write(dir.path().join(IDENTITY), "evolute-chunkserver data directory\n1\n").expect("write");
        let error = refused(dir.path());
        assert!(
            matches!(&error, DataDirError::NotOurs { why, .. } if why.contains("chunkserver")),
            "{error}"
        );
        // A file where the directory should be.
        assert!(matches!(refused(&dir.path().join(IDENTITY)), DataDirError::Io { .. }));
    }

    #[test]
    fn a_newer_format_is_named_whatever_follows_it() {
        let dir = tempfile::tempdir().expect("temp dir");
        fs::write(dir.path().join(IDENTITY), "evolute-mds data directory\nformat: 2\nwho knows\n")
            .expect("write");
        assert!(matches!(refused(dir.path()), DataDirError::Newer { found: 2, .. }));
    }

    #[test]
    fn no_damaged_byte_of_an_identity_goes_unnoticed() {
        let dir = tempfile::tempdir().expect("temp dir");
        made(dir.path());
        let path = dir.path().join(IDENTITY);
        let whole = fs::read(&path).expect("read");
        for at in 0..whole.len() {
            for flip in [0x01, 0x20, 0x80] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                fs::write(&path, &bytes).expect("write");
                // A hexadecimal digit in the other case says the same.
                if bytes.eq_ignore_ascii_case(&whole) && at >= whole.len() - 9 {
                    continue;
                }
                let error = refused(dir.path());
                assert!(
                    !matches!(error, DataDirError::Io { .. } | DataDirError::InUse { .. }),
                    "byte {at}: {error}"
                );
            }
            fs::write(&path, &whole[..at]).expect("write");
            refused(dir.path());
        }
        // Intact, but it says nothing.
        let body = "evolute-mds data directory\nformat: 1\n";
        fs::write(&path, format!("{body}crc32c: {:08x}\n", crc32c(body.as_bytes()))).expect("write");
        assert!(matches!(refused(dir.path()), DataDirError::Damaged { why: "no cluster id", .. }));
        fs::write(&path, whole).expect("write");
        open(dir.path(), OTHER).expect("whole again");
    }
}
