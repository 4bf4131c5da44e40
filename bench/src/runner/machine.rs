//! What a number depends on besides the code: the machine, its memory, where the data are.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{statfs, statvfs};

use super::results::Figure;

/// Where the data of a run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Store {
    Tmpfs,
    Disk,
}

impl Store {
    /// As in the JSON lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
        }
    }

    /// The directory under which one of our own is made.
    pub fn base(self) -> Result<PathBuf, String> {
        match self {
            Self::Tmpfs if is_memory(Path::new("/dev/shm")) => Ok(PathBuf::from("/dev/shm")),
            Self::Tmpfs => Err("/dev/shm is no tmpfs on this machine".to_owned()),
            Self::Disk => {
                let cache = std::env::home_dir().map(|home| home.join(".cache/evolute"));
                let candidates = [Some(PathBuf::from("/var/tmp")), cache];
                candidates
                    .into_iter()
                    .flatten()
                    .find(|dir| (dir.is_dir() || fs::create_dir_all(dir).is_ok()) && !is_memory(dir))
                    .ok_or_else(|| "neither /var/tmp nor ~/.cache/evolute is on a disk".to_owned())
            }
        }
    }
}

fn is_memory(dir: &Path) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    #[expect(clippy::useless_conversion, reason = "f_type is not an i64 on every architecture")]
    statfs(dir).is_ok_and(|fs| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&i64::from(fs.f_type)))
}

/// Three replicas, qsd's file, and what the logs of the chunkservers may hold besides.
const COPIES: u64 = 4;
const LOGS_BYTES: u64 = 3 << 30;
const GIB: u64 = 1 << 30;

/// As large as fits twice over, from 1 to 3 GiB: larger than any cache of ours, quick to fill.
pub fn volume_bytes(store: Store, base: &Path) -> Result<u64, String> {
    let free = free_bytes(store, base);
    let fits = (free / 2).saturating_sub(LOGS_BYTES) / COPIES / GIB;
    if fits == 0 {
        expect_room(store, base, GIB)?;
    }
    Ok(fits.clamp(1, 3) * GIB)
}

/// Refuses where a volume of so many bytes has no room.
pub fn expect_room(store: Store, base: &Path, volume: u64) -> Result<(), String> {
    let (needed, there) = (volume.saturating_mul(COPIES).saturating_add(LOGS_BYTES), free_bytes(store, base));
    if needed <= there {
        return Ok(());
    }
    Err(format!("{} has {} GiB free; {} GiB are needed", base.display(), there / GIB, needed / GIB))
}

fn free_bytes(store: Store, base: &Path) -> u64 {
    let space = statvfs(base).map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize)).unwrap_or(0);
    match store {
        Store::Tmpfs => space.min(available_memory()),
        Store::Disk => space,
    }
}

fn available_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|rest| rest.split_whitespace().next()).and_then(|n| n.parse().ok());
    kib.unwrap_or(0) << 10
}

/// As results, so that the report knows where and when its numbers were measured.
pub fn run_figures(commit: Option<&str>) -> Vec<Figure> {
    let figure = |name, value, unit| Figure::new((RUN, "any", "machine"), name, value, unit);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let gib = available_memory() as f64 / GIB as f64;
    vec![
        figure("machine", cores() as f64, "CPUs").noted(cpu_model()),
        figure("memory free", gib, "GiB").noted(format!("Linux {}", kernel())),
        figure("began", now.as_secs() as f64, "s since 1970")
            .noted(format!("commit {}", commit.unwrap_or("unknown"))),
    ]
}

/// The work under which the run itself is told.
pub const RUN: &str = "run";

fn cpu_model() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
    model.map_or("unknown CPU", |rest| rest.trim_start_matches([' ', '\t', ':'])).to_owned()
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(0, |n| n.get())
}

fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Store, expect_room, volume_bytes};

    #[test]
    fn a_store_is_where_its_name_says() {
        if let (Ok(memory), Ok(disk)) = (Store::Tmpfs.base(), Store::Disk.base()) {
            assert_ne!(memory, disk);
        }
        assert!(volume_bytes(Store::Disk, Path::new("/nonexistent")).is_err());
        let refused = expect_room(Store::Disk, Path::new("/"), 1 << 60).expect_err("an exbibyte");
        assert!(refused.contains("are needed"), "{refused}");
    }
}
