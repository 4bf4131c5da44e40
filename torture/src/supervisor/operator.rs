//! An operator's hands: the tool, and copies of directories.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::Value;

use super::process::{enter, run, tool};

/// What takes longer has met several faults one after the other, all of which are healed by then.
const DONE_WITHIN_S: &str = "150";

/// The operator's tool.
#[derive(Debug, Clone)]
pub struct Evolute {
    pub program: PathBuf,
    pub mds: String,
    pub hub: Arc<File>,
}

impl Evolute {
    /// One question; an MDS that is away is not waited for.
    pub fn ask(&self, arguments: &[&str]) -> Result<Value> {
        answer(self.command(Command::new(&self.program), "2").args(arguments))
    }

    /// Something that may wait for I/O. For threads that nobody waits for.
    pub fn carry_out(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", DONE_WITHIN_S]).arg(&self.program);
        answer(self.command(command, "15").args(arguments))
    }

    fn command(&self, mut command: Command, timeout: &str) -> Command {
        command.args(["--mds", &self.mds, "--timeout", timeout, "--json"]);
        enter(&mut command, Some(self.hub.clone()));
        command
    }
}

fn answer(command: &mut Command) -> Result<Value> {
    last_object(&run(command)?).context("the tool printed no JSON")
}

/// Some commands say how far they are before they are done.
fn last_object(answer: &str) -> Result<Value> {
    let mut last = None;
    for object in serde_json::Deserializer::from_str(answer).into_iter() {
        last = Some(object?);
    }
    last.context("it is empty")
}

/// Of the directory of a program that does not run.
pub fn copy(dir: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    tool("cp", &["-a", "--sparse=always", &format!("{}/.", dir.display()), &to.display().to_string()])
        .map(drop)
}

/// What the directory was becomes what the copy is, on the disk too; the copy is gone.
pub fn put_back(copied: &Path, dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
    }
    copy(copied, dir)?;
    tool("sync", &["-f", &dir.display().to_string()])?;
    Ok(fs::remove_dir_all(copied)?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{copy, last_object, put_back};

    #[test]
    fn what_is_put_back_is_what_was_copied_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let (dir, copied) = (folder.path().join("dir"), folder.path().join("copy"));
        fs::create_dir_all(dir.join("log")).expect("made");
        fs::write(dir.join("log/1"), "old").expect("written");
        copy(&dir, &copied).expect("copied");
        fs::write(dir.join("log/1"), "new").expect("written");
        fs::write(dir.join("log/2"), "newer").expect("written");
        fs::create_dir(dir.join("store")).expect("made");
        put_back(&copied, &dir).expect("put back");
        assert_eq!(fs::read_to_string(dir.join("log/1")).expect("read"), "old");
        assert!(!dir.join("log/2").exists() && !dir.join("store").exists() && !copied.exists());
    }

    #[test]
    fn the_last_of_several_answers_counts() {
        assert_eq!(
            last_object("{\"event\": \"progress\"}\n{\"event\": \"done\"}\n").expect("one")["event"],
            "done"
        );
        assert_eq!(last_object("{\n  \"id\": 7,\n  \"of\": {}\n}\n").expect("one")["id"], 7);
        assert!(last_object("").is_err());
    }
}
