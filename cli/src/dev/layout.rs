//! Where everything of a dev cluster is, and what is kept between two starts (`DIR/dev.toml`).
//!
//! ```text
//!  DIR/dev.toml          ports and volumes; read at every start
//!  DIR/dev.lock          held while the cluster runs, so that two cannot
//!  DIR/logs/NAME.log     what each process says
//!  DIR/run/NAME.json     each process's ready file
//!  DIR/sockets/VOLUME.sock
//!  DATA/mds, DATA/chunkserver-1..3, DATA/backends/VOLUME     DATA is DIR/data, or --data-on
//! ```

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// sockaddr_un holds 108 bytes with the closing zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// What this program writes; a newer number is refused rather than misread.
const FORMAT: u32 = 1;

/// What a dev cluster keeps between two starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    pub format: u32,
    pub mds_port: u16,
    pub chunkserver_ports: [u16; 3],
    /// Absent: DIR/data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_on: Option<PathBuf>,
    /// Served at every start.
    #[serde(default)]
    pub volumes: Vec<String>,
}

impl Kept {
    pub fn new(mds_port: u16, chunkserver_ports: [u16; 3], data_on: Option<PathBuf>) -> Self {
        Self { format: FORMAT, mds_port, chunkserver_ports, data_on, volumes: Vec::new() }
    }
}

#[derive(Debug)]
pub struct Layout {
    pub dir: PathBuf,
    _lock: File,
}

impl Layout {
    /// Makes the directory if absent and takes its lock.
    pub fn open(dir: &Path) -> Result<Self, Failure> {
        let doing = |what: &str, path: &Path| Failure::io(format!("{what} {}", path.display()));
        fs::create_dir_all(dir).map_err(doing("making", dir))?;
        let dir = dir.canonicalize().map_err(doing("looking at", dir))?;
        let lock = lock(&dir)?;
        if !dir.join("dev.toml").exists() {
            refuse_foreign(&dir)?;
        }
        for sub in ["logs", "run", "sockets"] {
            fs::create_dir_all(dir.join(sub)).map_err(doing("making", &dir.join(sub)))?;
        }
        Ok(Self { dir, _lock: lock })
    }

    fn kept_path(&self) -> PathBuf {
        self.dir.join("dev.toml")
    }

    /// What the last start kept; none in a new directory.
    pub fn kept(&self) -> Result<Option<Kept>, Failure> {
        let path = self.kept_path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Failure::Io { doing: format!("reading {}", path.display()), source }),
        };
        let next =
            "mend it, or remove it: new ports are chosen then, and the volumes named by --volume are served";
        let refused = |why: String| Failure::Dev {
            what: format!("{} cannot be used: {why}", path.display()),
            next: next.to_owned(),
        };
        let table: toml::Table = toml::from_str(&text).map_err(|e| refused(e.to_string()))?;
        match table.get("format").and_then(toml::Value::as_integer) {
            Some(format) if format == i64::from(FORMAT) => {}
            Some(format) if format > i64::from(FORMAT) => {
                return Err(Failure::Dev {
                    what: format!(
                        "{} has format {format}, written by a newer evolute; this one knows {FORMAT}",
                        path.display()
                    ),
                    next: "use that newer evolute, or another --dir".to_owned(),
                });
            }
            _ => return Err(refused(format!("it does not say `format = {FORMAT}`"))),
        }
        toml::from_str(&text).map(Some).map_err(|e| refused(e.to_string()))
    }

    pub fn keep(&self, kept: &Kept) -> Result<(), Failure> {
        let path = self.kept_path();
        let doing = || Failure::io(format!("writing {}", path.display()));
        let text = toml::to_string(kept).expect("numbers, paths and names are TOML");
        let text = format!("# Written by `evolute dev`; read at its next start.\n{text}");
        let unfinished = path.with_extension("toml.new");
        fs::write(&unfinished, text).map_err(doing())?;
        fs::rename(&unfinished, &path).map_err(doing())
    }

    pub fn log(&self, process: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{process}.log"))
    }

    pub fn ready_file(&self, process: &str) -> PathBuf {
        self.dir.join("run").join(format!("{process}.json"))
    }

    pub fn socket(&self, volume: &str) -> Result<PathBuf, Failure> {
        let path = self.dir.join("sockets").join(format!("{volume}.sock"));
        if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(Failure::Dev {
                what: format!(
                    "the socket {} would have a path of {} bytes; Linux allows {SOCKET_PATH_BYTES_MAX}",
                    path.display(),
                    path.as_os_str().len()
                ),
                next: "use a --dir with a shorter path".to_owned(),
            });
        }
        Ok(path)
    }

    pub fn data(&self, kept: &Kept) -> PathBuf {
        kept.data_on.clone().unwrap_or_else(|| self.dir.join("data"))
    }
}

/// Two clusters on the same data would be one too many.
fn lock(dir: &Path) -> Result<File, Failure> {
    let path = dir.join("dev.lock");
    let doing = || Failure::io(format!("locking {}", path.display()));
    let mut file =
        File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(doing())?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        let _ = file.read_to_string(&mut holder);
        let holder = holder.trim();
        return Err(Failure::Dev {
            what: format!("{} is served by another `evolute dev`, process {holder}", dir.display()),
            next: format!("use that one, stop it (kill {holder}), or choose another --dir"),
        });
    }
    file.set_len(0).and_then(|()| file.rewind()).map_err(doing())?;
    writeln!(file, "{}", std::process::id()).map_err(doing())?;
    Ok(file)
}

/// A slip such as `--dir ~` must not scatter a cluster over somebody's files.
fn refuse_foreign(dir: &Path) -> Result<(), Failure> {
    let entries = fs::read_dir(dir).map_err(Failure::io(format!("reading {}", dir.display())))?;
    for entry in entries {
        let entry = entry.map_err(Failure::io(format!("reading {}", dir.display())))?;
        let name = entry.file_name();
        let ours = ["dev.lock", "dev.toml.new", "data", "logs", "run", "sockets"];
        if !ours.iter().any(|known| name == *known) {
            return Err(Failure::Dev {
                what: format!(
                    "{} is not empty and no dev cluster: it holds {}",
                    dir.display(),
                    name.to_string_lossy()
                ),
                next: "choose a directory of its own".to_owned(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::{Kept, Layout};
    use crate::failure::Failure;

    #[test]
    fn what_is_kept_is_found_again() {
        let dir = tempfile::tempdir().expect("tempdir");
        let layout = Layout::open(dir.path()).expect("a new directory");
        assert_eq!(layout.kept().expect("readable"), None);
        let mut kept = Kept::new(7700, [1, 2, 3], Some(PathBuf::from("/dev/shm/x")));
        kept.volumes.push("disk".to_owned());
        layout.keep(&kept).expect("writable");
        drop(layout);
        let layout = Layout::open(dir.path()).expect("an old directory");
        assert_eq!(layout.kept().expect("readable"), Some(kept));
    }

    #[test]
    fn a_directory_is_served_once() {
        let dir = tempfile::tempdir().expect("tempdir");
        let _first = Layout::open(dir.path()).expect("a new directory");
        let refused = Layout::open(dir.path()).expect_err("locked");
        assert!(refused.to_string().contains(&std::process::id().to_string()), "{refused}");
    }

    #[test]
    fn a_directory_with_other_things_in_it_is_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::write(dir.path().join("thesis.tex"), "").expect("write");
        let refused = Layout::open(dir.path()).expect_err("not ours");
        assert!(refused.to_string().contains("thesis.tex"), "{refused}");
    }

    #[test]
    fn a_kept_file_that_is_newer_or_broken_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        let layout = Layout::open(dir.path()).expect("a new directory");
        for (text, says) in [
            ("format = 2\n", "newer"),
            ("mds_port = 1\n", "format"),
            ("format = 1\n", "mds_port"),
            ("format = 1\nmds_port = 99999\nchunkserver_ports = [1, 2, 3]", "99999"),
            ("\u{0}", "dev.toml"),
        ] {
            fs::write(layout.kept_path(), text).expect("write");
            let refused = layout.kept().expect_err(text);
            assert!(
                matches!(refused, Failure::Dev { .. }) && refused.to_string().contains(says),
                "{refused}"
            );
        }
    }

    #[test]
    fn a_socket_path_that_linux_cannot_hold_is_refused_before_anything_starts() {
        let dir = tempfile::tempdir().expect("tempdir");
        let layout = Layout::open(dir.path()).expect("a new directory");
        assert!(layout.socket("disk").is_ok());
        assert!(matches!(layout.socket(&"x".repeat(100)), Err(Failure::Dev { .. })));
    }
}
