//! What to run. The fields are the command line of `blkcheck`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::driver::DeviceOptions;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Discard {
    /// A discarded sector reads as zeroes from then on, as Evolute promises.
    Zeroes,
    /// Not used: virtio lets a device return anything for discarded sectors.
    Off,
}

/// Loads a vhost-user-blk device and checks that every sector is an atomic register.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "blkcheck",
    version,
    after_help = "The device must be fresh: the area is expected to read as zeroes at first. Everything in it is overwritten.
The server may be killed and started again at any time on the same socket; requests under way must be completed by it.

Exit status: 0 every check was made and none failed; 1 a violation, or a server that broke the protocol; 2 wrong usage;
3 could not run at all; 4 unknown: stopped early, requests that were never answered, or sectors left undecided.

Examples:
  blkcheck --socket /run/evolute/disk.sock --duration 60
  blkcheck --socket /tmp/qsd.sock --discard off --queues 4 --area-mib 16 --seed 7 --json"
)]
pub struct Options {
    /// The server's Unix socket
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Seconds of load; 0: until stopped
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub duration: u64,
    /// Repeats a run's requests (not their timing)
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Size of the checked area. Crosses chunk borders from 16 MiB on
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub area_mib: u64,
    /// Where the area begins
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    pub offset_mib: u64,
    #[arg(long, default_value_t = 4)]
    pub queues: u16,
    /// Requests under way per queue, at most
    #[arg(long, default_value_t = 16)]
    pub depth: usize,
    /// Requests per second, at most; 0: as many as are answered
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub rate: u64,
    /// Of a hundred requests, how many read
    #[arg(long, value_name = "PERCENT", default_value_t = 45)]
    pub reads: u64,
    /// Longest request
    #[arg(long, value_name = "KIB", default_value_t = 1024)]
    pub size_max_kib: u32,
    #[arg(long, value_enum, default_value_t = Discard::Zeroes)]
    pub discard: Discard,
    /// Never two requests for one sector at a time, unless both read. For servers that do not promise that a sector
    /// under overlapping requests is never a mix, such as any over a page cache
    #[arg(long)]
    pub no_overlap: bool,
    /// Seconds of load between two complete checks
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub round: u64,
    /// Give up when nothing is answered for so long
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub stall: u64,
    /// Pause between attempts to reach a server that went away (QEMU's reconnect=1 is 1000)
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub reconnect_ms: u64,
    /// Print the report as one JSON object instead of words
    #[arg(long)]
    pub json: bool,
}

impl Options {
    /// Everything at its default, as tests and the supervisor want it.
    pub fn new(socket: PathBuf) -> Self {
        let arguments = [std::ffi::OsString::from("blkcheck"), "--socket".into(), socket.into()];
        Self::parse_from(arguments)
    }

    pub fn device(&self) -> DeviceOptions {
        DeviceOptions {
            socket: self.socket.clone(),
            queues: self.queues,
            depth: self.depth,
            reconnect_every: Duration::from_millis(self.reconnect_ms),
            seed: self.seed,
        }
    }

    /// What no run can be made with, in words.
    pub fn wrong(&self) -> Option<String> {
        let between = |name: &str, value: u64, min: u64, max: u64| {
            (value < min || value > max).then(|| format!("--{name} {value} is not between {min} and {max}"))
        };
        between("queues", self.queues.into(), 1, 64)
            .or_else(|| between("depth", self.depth as u64, 1, 64))
            .or_else(|| between("area-mib", self.area_mib, 1, 1 << 20))
            .or_else(|| between("size-max-kib", self.size_max_kib.into(), 1, 1024))
            .or_else(|| between("reads", self.reads, 0, 100))
            .or_else(|| between("round", self.round, 1, 3600))
            .or_else(|| between("stall", self.stall, 1, 86_400))
            .or_else(|| between("reconnect-ms", self.reconnect_ms, 1, 60_000))
    }
}
