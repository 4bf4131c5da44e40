//! Where the guest images are, as `images/Makefile` says, and whether they are still what was built.

use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

#[derive(Clone, Debug)]
pub struct Images {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    debian: PathBuf,
}

impl Images {
    /// The kernel and the initramfs, checked against their checksums once per test program.
    pub fn find() -> Result<&'static Images> {
        static FOUND: OnceLock<Images> = OnceLock::new();
        if let Some(images) = FOUND.get() {
            return Ok(images);
        }
        let images = Images::look()?;
        Ok(FOUND.get_or_init(|| images))
    }

    fn look() -> Result<Images> {
        let recipes = recipes()?;
        let answer = Command::new("make")
            .args(["--silent", "--no-print-directory", "path", "-C"])
            .arg(&recipes)
            // We may run below `make test`, whose job server is not for us.
            .env_remove("MAKEFLAGS")
            .env_remove("MAKELEVEL")
            .output()
            .context("cannot run make")?;
        ensure!(answer.status.success(), "make path: {}", String::from_utf8_lossy(&answer.stderr));
        let answer = String::from_utf8(answer.stdout)?;
        let folder = |name: &str| {
            answer
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .map(PathBuf::from)
                .with_context(|| format!("`make path` in {} does not name {name}", recipes.display()))
        };
        Ok(Images {
            kernel: intact(&folder("kernel")?)?.join("vmlinuz"),
            initramfs: intact(&folder("initramfs")?)?.join("initramfs.cpio"),
            debian: folder("debian")?,
        })
    }

    /// The Debian disk: raw, sparse, one ext4.
    pub fn debian(&self) -> Result<PathBuf> {
        Ok(intact(&self.debian)?.join("debian.raw"))
    }
}

/// `images/` of the clone we are run in, by make or by cargo. Not of the one we were built in: all clones of a machine share
/// their build output, and that one may be gone.
fn recipes() -> Result<PathBuf> {
    let here = std::env::current_dir().context("where are we?")?;
    let found = here.ancestors().map(|dir| dir.join("images")).find(|dir| dir.join("Makefile").exists());
    found.with_context(|| format!("there is no images/Makefile in {} or above it", here.display()))
}

/// The folder, if its files have the checksums they were built with.
fn intact(folder: &Path) -> Result<&Path> {
    if !folder.join("SHA256SUMS").exists() {
        bail!("{} is not built yet: make -C images", folder.display());
    }
    let check =
        Command::new("sha256sum").args(["--quiet", "--check", "SHA256SUMS"]).current_dir(folder).output()?;
    ensure!(
        check.status.success(),
        "{} is not what was built: {}Build it again: make -C images",
        folder.display(),
        String::from_utf8_lossy(&check.stdout)
    );
    Ok(folder)
}
