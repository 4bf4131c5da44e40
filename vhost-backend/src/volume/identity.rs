//! Who holds a volume: not a name, which two machines can share and anybody can read off, but a secret that one place has.
//!
//! The control plane keeps only the secret's hash. Whoever has the secret attaches again without taking over: the same
//! place after a crash, or under another host name.
//!
//! What always holds: a state directory that was copied to another machine, a cloned host's for example, is no identity
//! there. It gets a new one, and what it remembers of attachments is not used ([`super::attach`]).

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::attach::StateError;

const FILE: &str = "holder.json";
const VERSION: u32 = 1;

/// What only one place knows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret([u8; 32]);

/// Never into a log.
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// Of a process that does not come back.
    pub fn random() -> Self {
        Self(rand::random())
    }

    /// Of one place on this machine, the same whenever it is asked for: by what the state directory keeps, or without one
    /// by what this boot of the machine has to itself.
    pub fn of_place(state_dir: Option<&Path>, place: &str) -> Result<Self, StateError> {
        let Some(directory) = state_dir else { return Ok(Self::of_boot(place)) };
        let kept = Holder::of(directory, &Machine::this())?.secret;
        Ok(Self(hash(&[b"state", kept.as_bytes(), place.as_bytes()])))
    }

    /// What a place is known by that has no state directory.
    pub fn of_boot(place: &str) -> Self {
        let Machine { machine_id, boot, .. } = Machine::this();
        let [id, boot] = [machine_id, boot].map(Option::unwrap_or_default);
        Self(hash(&[b"boot", id.as_bytes(), boot.as_bytes(), place.as_bytes()]))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Tells this secret from another, and gives nothing of it away.
    pub fn fingerprint(&self) -> String {
        hex(&hash(&[b"fingerprint", &self.0]))
    }
}

fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What tells this machine from its clones. A process that may not read one of them knows less.
#[derive(Debug, Clone, Default)]
struct Machine {
    machine_id: Option<String>,
    product: Option<String>,
    boot: Option<String>,
}

impl Machine {
    fn this() -> Self {
        let read = |path| fs::read_to_string(path).ok().map(|text: String| text.trim().to_owned());
        Self {
            machine_id: read("/etc/machine-id"),
            product: read("/sys/class/dmi/id/product_uuid"),
            boot: read("/proc/sys/kernel/random/boot_id"),
        }
    }
}

/// The file: readable by its owner alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Holder {
    version: u32,
    secret: String,
    machine_id: Option<String>,
    product: Option<String>,
}

impl Holder {
    /// What the directory keeps; made where there is none, and made anew where it is of another machine.
    fn of(directory: &Path, machine: &Machine) -> Result<Self, StateError> {
        let path = directory.join(FILE);
        let failed = |verb| {
            let path = path.clone();
            move |source| StateError::Io { path, verb, source }
        };
        StateError::make(directory)?;
        if let Some(kept) = Self::load(&path)? {
            if kept.is_of(machine) {
                return Ok(kept);
            }
            tracing::warn!(
                directory = %directory.display(),
                "this state directory is a copy of another machine's: it is not the holder of what that one attached"
            );
            fs::remove_file(&path).map_err(failed("replaced"))?;
        }
        let new = Self {
            version: VERSION,
            secret: hex(&rand::random::<[u8; 32]>()),
            machine_id: machine.machine_id.clone(),
            product: machine.product.clone(),
        };
        new.put(directory, &path).map_err(failed("written"))?;
        // Of several that start at once, the first one's counts.
        Self::load(&path)?.ok_or_else(|| failed("read")(io::ErrorKind::NotFound.into()))
    }

    fn load(path: &Path) -> Result<Option<Self>, StateError> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StateError::Io { path: path.to_owned(), verb: "read", source }),
        };
        let damaged = || StateError::Damaged(path.to_owned());
        let kept: Self = serde_json::from_slice(&bytes).map_err(|_| damaged())?;
        match kept.version {
            VERSION if kept.secret.len() == 64 => Ok(Some(kept)),
            version if version > VERSION => Err(StateError::Newer { path: path.to_owned(), version }),
            _ => Err(damaged()),
        }
    }

    /// On disk when this returns, unless somebody else's is there by then.
    fn put(&self, directory: &Path, path: &Path) -> io::Result<()> {
        let beside = directory.join(format!("{FILE}.{}", std::process::id()));
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        let linked = fs::hard_link(&beside, path);
        fs::remove_file(&beside)?;
        match linked {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        fs::File::open(directory)?.sync_all()
    }

    fn is_of(&self, machine: &Machine) -> bool {
        let same = |kept: &Option<String>, here: &Option<String>| match (kept, here) {
            (Some(kept), Some(here)) => kept == here,
            _ => true,
        };
        same(&self.machine_id, &machine.machine_id) && same(&self.product, &machine.product)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_state_directory_that_cannot_be_made_is_named_with_what_to_do() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("file");
        fs::write(&file, "").expect("written");
        let directory = file.join("vm1");
        let refused = Holder::of(&directory, &Machine::this()).expect_err("refused").to_string();
        let expected = format!("{} cannot be made: make it for this user, or", directory.display());
        assert!(refused.starts_with(&expected), "{refused}");
    }

    const PLACE: &str = "/run/evolute/vm1.sock";

    #[test]
    fn a_place_is_the_same_whenever_it_is_asked_for_and_no_other_one_is() {
        let (one, other) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("another"));
        let of = |dir: &Path, place| Secret::of_place(Some(dir), place).expect("kept");
        let first = of(one.path(), PLACE);
        assert_eq!(first, of(one.path(), PLACE));
        assert_ne!(first, of(one.path(), "/run/evolute/vm2.sock"));
        assert_ne!(first, of(other.path(), PLACE), "as on two hosts of one name");
        let without = |place| Secret::of_place(None, place).expect("no directory");
        assert_eq!(without(PLACE), Secret::of_boot(PLACE));
        assert_ne!(without(PLACE), without("/run/evolute/vm2.sock"));
        assert_ne!(Secret::random(), Secret::random());
    }

    #[test]
    fn nobody_else_reads_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let secret = Secret::of_place(Some(directory.path()), PLACE).expect("kept");
        let file = directory.path().join(FILE);
        assert_eq!(fs::metadata(&file).expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1, "nothing is left beside it");
        assert_eq!(format!("{secret:?}"), "Secret");
        assert_ne!(secret.fingerprint(), hex(secret.bytes()));
    }

    #[test]
    fn a_copy_on_another_machine_is_another_holder() {
        let directory = tempfile::tempdir().expect("a directory");
        let machine = |id: Option<&str>, product: Option<&str>| Machine {
            machine_id: id.map(str::to_owned),
            product: product.map(str::to_owned),
            boot: None,
        };
        let of = |machine| Holder::of(directory.path(), &machine).expect("kept").secret;
        let first = of(machine(Some("a"), Some("p")));
        assert_eq!(of(machine(Some("a"), Some("p"))), first);
        assert_eq!(of(machine(Some("a"), None)), first, "who may not read it does not guess");
        let clone = of(machine(Some("a"), Some("q")));
        assert_ne!(clone, first);
        assert_ne!(of(machine(Some("b"), Some("q"))), clone);
    }

    #[test]
    fn a_damaged_or_newer_file_is_refused_by_name() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join(FILE);
        for bad in ["", "{", r#"{"version":1,"secret":"short"}"#, r#"{"version":0,"secret":""}"#] {
            fs::write(&file, bad).expect("written");
            let refused = Secret::of_place(Some(directory.path()), PLACE).expect_err(bad);
            assert!(matches!(refused, StateError::Damaged(ref path) if *path == file), "{refused}");
        }
        fs::write(&file, r#"{"version":2,"secret":"","machine_id":null,"product":null}"#).expect("written");
        let refused = Secret::of_place(Some(directory.path()), PLACE).expect_err("newer");
        assert!(matches!(refused, StateError::Newer { version: 2, .. }), "{refused}");
    }
}
