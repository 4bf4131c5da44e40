//! The file by which a program says that it serves now: it appears whole or not at all, and it never costs anybody a file.
//!
//! Its path is given by a person, so it may name anything. Only what is a ready file already, or is empty, is replaced or
//! removed; anything else (an image, a device, a link) is refused by name.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;

/// Ours are a line, or some lines for many disks. Longer: not ours, and not read to find out.
const READY_FILE_BYTES_MAX: u64 = 1 << 20;

/// Writes it, by rename. Its content is an object with the field `pid`.
pub fn write_ready_file<T: Serialize>(path: &Path, content: &T) -> anyhow::Result<()> {
    let write = || -> io::Result<()> {
        refuse_foreign(path)?;
        let unfinished = unfinished(path)?;
        // What a killed program of our number left is removed, a file of somebody else's is not.
        refuse_foreign(&unfinished)?;
        let _ = fs::remove_file(&unfinished);
        let mut file = fs::File::create_new(&unfinished)?;
        serde_json::to_writer(&mut file, content)?;
        file.write_all(b"\n")?;
        drop(file);
        fs::rename(&unfinished, path)
    };
    write().with_context(|| format!("cannot write the ready file {}", path.display()))
}

/// Refuses a path at which a ready file could not be written later, before anything was begun.
pub fn check_ready_file(path: &Path) -> anyhow::Result<()> {
    refuse_foreign(path).with_context(|| format!("cannot write the ready file {}", path.display()))
}

/// Takes it back, if it is one.
pub fn remove_ready_file(path: &Path) -> io::Result<()> {
    match is_ready_file(path) {
        Ok(true) => fs::remove_file(path),
        Ok(false) => Err(foreign()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn unfinished(path: &Path) -> io::Result<PathBuf> {
    let mut name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it has no file name"))?
        .to_owned();
    name.push(format!(".{}", std::process::id()));
    Ok(path.with_file_name(name))
}

fn foreign() -> io::Error {
    let why = "what is there is no ready file, and is left alone";
    io::Error::new(io::ErrorKind::AlreadyExists, why)
}

fn refuse_foreign(path: &Path) -> io::Result<()> {
    match is_ready_file(path) {
        Ok(true) => Ok(()),
        Ok(false) => Err(foreign()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn is_ready_file(path: &Path) -> io::Result<bool> {
    let found = fs::symlink_metadata(path)?;
    if !found.is_file() || found.len() > READY_FILE_BYTES_MAX {
        return Ok(false);
    }
    let mut text = Vec::new();
    fs::File::open(path)?.take(READY_FILE_BYTES_MAX).read_to_end(&mut text)?;
    let object = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&text);
    // Empty: made by `mktemp` or `touch` for us.
    Ok(text.is_empty() || object.is_ok_and(|object| object.contains_key("pid")))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::{check_ready_file, remove_ready_file, write_ready_file};

    #[test]
    fn a_ready_file_replaces_a_ready_file_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        let content = serde_json::json!({ "pid": 1 });
        fs::write(path("empty"), "").expect("written");
        for name in ["new", "new", "empty"] {
            check_ready_file(&path(name)).expect("good");
            write_ready_file(&path(name), &content).expect("written");
            assert_eq!(fs::read(path(name)).expect("there"), b"{\"pid\":1}\n");
        }
        fs::write(path("image"), "my only copy").expect("written");
        fs::write(path("json"), "{\"name\":\"somebody's\"}").expect("written");
        fs::create_dir(path("directory")).expect("made");
        symlink(path("image"), path("link")).expect("made");
        for name in ["image", "json", "directory", "link"] {
            let refused = write_ready_file(&path(name), &content).expect_err("refused");
            assert!(format!("{refused:#}").contains("left alone"), "{refused:#}");
            assert!(check_ready_file(&path(name)).is_err() && remove_ready_file(&path(name)).is_err());
            assert!(path(name).exists());
        }
        assert_eq!(fs::read(path("image")).expect("there"), b"my only copy");
        remove_ready_file(&path("new")).expect("removed");
        remove_ready_file(&path("new")).expect("nothing to remove");
        assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 5, "nothing is left beside");
    }
}
