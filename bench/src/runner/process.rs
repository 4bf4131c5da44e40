//! What the kernel tells of a process besides its CPU time: memory, bytes sent to the disk, age.
//!
//! A number that cannot be read is an error with the file's name: a zero would look like a very good result.

use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{major, minor};

use super::BenchError;

/// Resident memory now and at most since [`forget_peak`], in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub now: u64,
    pub peak: u64,
}

pub fn memory(pid: u32) -> Result<Memory, BenchError> {
    let (path, text) = read(pid, "status")?;
    memory_in(&text).ok_or(BenchError::Unreadable { path })
}

/// The peak begins anew.
pub fn forget_peak(pid: u32) -> Result<(), BenchError> {
    /// "Reset the peak resident set size" of proc(5).
    const PEAK: &str = "5";
    let path = format!("/proc/{pid}/clear_refs");
    fs::write(&path, PEAK).map_err(|source| BenchError::Io { doing: format!("writing {path}"), source })
}

/// Bytes written so far, by everybody, to the disk that holds `path`; none where that is no disk.
pub fn disk_written_bytes(path: &Path) -> Option<u64> {
    let device = fs::metadata(path).ok()?.st_dev();
    let (major, minor) = (major(device), minor(device));
    let stat = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    sectors_written_in(&stat).map(|sectors| sectors * 512)
}

/// How long ago it was started, to a hundredth of a second.
pub fn age(pid: u32) -> Result<Duration, BenchError> {
    let (path, stat) = read(pid, "stat")?;
    let ticks = start_ticks_in(&stat).ok_or(BenchError::Unreadable { path })?;
    // SAFETY: sysconf reads a constant of the system.
    let per_second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100).max(1);
    let started = Duration::from_millis(ticks.saturating_mul(1000) / per_second);
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now = Duration::from_secs(u64::try_from(now.tv_sec).unwrap_or(0))
        + Duration::from_nanos(u64::try_from(now.tv_nsec).unwrap_or(0));
    Ok(now.saturating_sub(started))
}

fn read(pid: u32, file: &str) -> Result<(String, String), BenchError> {
    let path = format!("/proc/{pid}/{file}");
    match fs::read_to_string(&path) {
        Ok(text) => Ok((path, text)),
        Err(source) => Err(BenchError::Io { doing: format!("reading {path}"), source }),
    }
}

/// The number after a word at the beginning of a line.
fn number_after(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

fn memory_in(status: &str) -> Option<Memory> {
    let kib = |name| number_after(status, name).map(|kib| kib << 10);
    Some(Memory { now: kib("VmRSS:")?, peak: kib("VmHWM:")? })
}

/// The seventh number is sectors of 512 bytes, whatever the disk's own are.
fn sectors_written_in(stat: &str) -> Option<u64> {
    stat.split_whitespace().nth(6)?.parse().ok()
}

/// Field 22; the name before it, in parentheses, may hold anything.
fn start_ticks_in(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Memory, age, memory, memory_in, sectors_written_in, start_ticks_in};

    #[test]
    fn files_of_the_kernel_are_read_as_they_are() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(memory_in(status), Some(Memory { now: 1 << 20, peak: 2 << 20 }));
        assert_eq!(memory_in("Name:\tx\n"), None);
        assert_eq!(sectors_written_in("  1 2 3 4 5 6 77 8 9 10 11"), Some(77));
        let stat = "12 (a) b (c) R 1 12 12 0 -1 4194304 100 0 0 0 70 5 0 0 20 0 1 0 4321 1 1";
        assert_eq!(start_ticks_in(stat), Some(4321));
        assert_eq!(start_ticks_in(""), None);
    }

    #[test]
    fn this_process_has_memory_and_an_age_and_a_missing_one_is_named() {
        let me = std::process::id();
        let found = memory(me).expect("ours");
        assert!(found.now > 0 && found.peak >= found.now, "{found:?}");
        assert!(age(me).expect("ours") < Duration::from_secs(3600));
        assert!(memory(u32::MAX).expect_err("nobody").to_string().contains("/proc/4294967295/status"));
    }
}
