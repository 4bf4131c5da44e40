//! KVM where it really works, else TCG.
//!
//! A `/dev/kvm` that opens proves nothing: on some machines (nested, filtered) it opens and no kernel ever boots
//! under it. So it is tried once, by booting, and the answer is kept in the cache, one per host kernel and QEMU.

use crate::guest::{Boot, Guest};
use crate::scene::{Scene, cache_folder};
use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// A guest under a KVM that works is up in about a second.
const TRY_FOR: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    pub fn as_str(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        }
    }

    fn parse(word: &str) -> Option<Accelerator> {
        [Accelerator::Kvm, Accelerator::Tcg].into_iter().find(|it| it.as_str() == word)
    }

    /// `EVOLUTE_ACCEL`, or what was found before on this machine, or what a try shows now.
    pub fn choose(scene: &Scene) -> Result<Accelerator> {
        if let Ok(word) = std::env::var("EVOLUTE_ACCEL") {
            return Accelerator::parse(&word)
                .with_context(|| format!("EVOLUTE_ACCEL is {word:?}, and may be kvm or tcg"));
        }
        let remembered = remembered_in()?;
        if let Some(found) =
            std::fs::read_to_string(&remembered).ok().and_then(|word| Accelerator::parse(word.trim()))
        {
            return Ok(found);
        }
        let found = Accelerator::try_kvm(scene);
        std::fs::write(&remembered, found.as_str())?;
        scene.tell(format_args!(
            "guests run under {} (remembered in {})",
            found.as_str(),
            remembered.display()
        ));
        Ok(found)
    }

    fn try_kvm(scene: &Scene) -> Accelerator {
        if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
            return Accelerator::Tcg;
        }
        scene.tell("there is a /dev/kvm: trying whether a guest boots under it");
        match Guest::boot_under(scene, &Boot::tools(), Accelerator::Kvm, TRY_FOR) {
            Ok(_) => Accelerator::Kvm,
            Err(error) => {
                scene.tell(format_args!("it does not: {}", error.root_cause()));
                Accelerator::Tcg
            }
        }
    }
}

fn remembered_in() -> Result<PathBuf> {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let (major, minor) = qemu_version()?;
    let name = format!("accelerator-{}-qemu-{major}.{minor}", host.trim());
    Ok(cache_folder()?.join(name))
}

/// QEMU's version, for the one option whose name depends on it.
pub fn qemu_version() -> Result<(u32, u32)> {
    let answer = Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
        .context("no qemu-system-x86_64: sudo apt-get install --no-install-recommends qemu-system-x86")?;
    let text = String::from_utf8_lossy(&answer.stdout);
    let Some(version) = parse_version(&text) else { bail!("what version is this: {text}") };
    Ok(version)
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix("QEMU emulator version ")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_qemu_prints_them() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        assert_eq!(parse_version(debian), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(parse_version("qemu: no such option"), None);
    }
}
