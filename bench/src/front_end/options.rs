//! What is asked of a run, and what of it fits the device.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use super::FrontEndError;
use super::content::SECTOR_BYTES;

/// Three descriptors a request (header, data, status) in a ring of 1024.
const DEPTH_PER_QUEUE_MAX: usize = 341;
const BLOCK_BYTES_MAX: usize = 32 << 20;
/// Filling the device in blocks of 4 KiB would take longer than measuring it.
const FILL_BLOCK_BYTES: usize = 128 << 10;

/// Drives a vhost-user-blk server directly (no guest, no kernel) and prints one JSON object.
///
/// Measured is the time from a request being visible in the ring until this program has seen its answer. Every
/// status is checked. Requests still in flight at the end are waited for, but not counted.
#[derive(Debug, Clone, Parser)]
#[command(name = "vublk-bench", version)]
#[command(after_help = "Exit status: 0 good · 1 I/O or verification errors · 2 stalled · 3 usage or set-up

Examples:
  vublk-bench --socket /tmp/cluster/sockets/disk.sock --rw randwrite --qd 32 --prefill --size 1G
  vublk-bench --socket disk.sock --rw randrw --qd 16 --verify --runtime 60 --timeline 100")]
pub struct Options {
    /// The server's socket
    #[arg(long)]
    pub socket: PathBuf,
    /// What to do
    #[arg(long, value_enum, default_value_t = Rw::Randread)]
    pub rw: Rw,
    /// Share of reads of randrw and rw, in per cent
    #[arg(long, default_value = "70", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub rwmixread: u8,
    /// Block size; suffixes K M G (binary)
    #[arg(long, default_value = "4K", value_parser = bytes)]
    pub bs: u64,
    /// Requests in flight in total, spread over the queues
    #[arg(long, default_value_t = 1)]
    pub qd: usize,
    /// Virtqueues, a thread each
    #[arg(long, default_value_t = 1)]
    pub queues: usize,
    /// Seconds measured
    #[arg(long, default_value = "10", value_parser = seconds)]
    pub runtime: Duration,
    /// Seconds run before measuring
    #[arg(long, default_value = "0", value_parser = seconds)]
    pub ramp: Duration,
    /// Bytes of the device to use; 0: up to its end
    #[arg(long, default_value = "0", value_parser = bytes)]
    pub size: u64,
    /// First byte used
    #[arg(long, default_value = "0", value_parser = bytes)]
    pub offset: u64,
    /// Seed of offsets and contents
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Spin on the used ring instead of sleeping until the server calls
    #[arg(long)]
    pub poll: bool,
    /// A FLUSH after so many writes of a queue; 0: none
    #[arg(long, default_value_t = 0, value_name = "WRITES")]
    pub flush_every: u64,
    /// First write the whole range once, in order
    #[arg(long)]
    pub prefill: bool,
    /// Contents derive from (seed, offset, generation): reads are checked, and at the end everything written is
    /// read back
    #[arg(long)]
    pub verify: bool,
    /// Give up when nothing completes for so many seconds
    #[arg(long, default_value = "60", value_parser = seconds)]
    pub stall: Duration,
    /// Add completions per interval of so many milliseconds
    #[arg(long, default_value_t = 0, value_name = "MS")]
    pub timeline: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rw {
    Randread,
    Randwrite,
    Read,
    Write,
    Randrw,
    Rw,
}

impl Rw {
    pub fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite | Self::Randrw)
    }

    /// Share of reads in per cent.
    pub fn reads(self, mix: u8) -> u64 {
        match self {
            Self::Randread | Self::Read => 100,
            Self::Randwrite | Self::Write => 0,
            Self::Randrw | Self::Rw => u64::from(mix),
        }
    }
}

/// Options that fit each other and the device.
#[derive(Debug, Clone)]
pub struct Plan {
    pub options: Options,
    pub block: usize,
    pub fill_block: usize,
    pub depth_per_queue: usize,
    pub ring: u16,
    /// Bytes used of the device.
    pub size: u64,
    /// Every queue has a part of its own, or all cover everything.
    pub parts: bool,
}

impl Plan {
    /// What can be said before there is a device.
    pub fn check(options: &Options) -> Result<(), FrontEndError> {
        let refuse = |why: String| Err(FrontEndError::Usage { why });
        let sector = SECTOR_BYTES as u64;
        if options.bs == 0 || !options.bs.is_multiple_of(sector) || options.bs > BLOCK_BYTES_MAX as u64 {
            return refuse(format!("--bs {} is not a multiple of 512 up to 32M", options.bs));
        }
        if options.queues == 0 || options.qd < options.queues {
            return refuse("--queues is at least 1, and --qd at least --queues".to_owned());
        }
        if options.qd.div_ceil(options.queues) > DEPTH_PER_QUEUE_MAX {
            return refuse(format!("--qd above {DEPTH_PER_QUEUE_MAX} per queue needs more --queues"));
        }
        if !options.offset.is_multiple_of(sector) {
            return refuse("--offset is not a multiple of 512".to_owned());
        }
        if options.runtime.is_zero() {
            return refuse("--runtime is zero".to_owned());
        }
        Ok(())
    }

    pub fn new(options: Options, capacity: u64, has_flush: bool) -> Result<Self, FrontEndError> {
        Self::check(&options)?;
        let refuse = |why: String| Err(FrontEndError::Usage { why });
        if options.flush_every > 0 && !has_flush {
            return refuse("the device offers no FLUSH".to_owned());
        }
        let size = match options.size {
            0 => capacity.saturating_sub(options.offset),
            size => size,
        };
        if options.offset.checked_add(size).is_none_or(|end| end > capacity) {
            return refuse(format!("the device has {capacity} bytes only"));
        }
        let depth_per_queue = options.qd.div_ceil(options.queues);
        let ring = (depth_per_queue * 3 + 1).next_power_of_two().max(64);
        let parts = options.verify || options.prefill || !options.rw.is_random();
        let share = if parts { size / options.queues as u64 } else { size };
        if share / options.bs < depth_per_queue as u64 {
            return refuse("--size is too small for this --bs and --qd".to_owned());
        }
        let block = usize::try_from(options.bs).expect("at most 32 MiB");
        Ok(Self {
            block,
            // A multiple of the block, so that the same blocks are written.
            fill_block: (FILL_BLOCK_BYTES / block).max(1) * block,
            depth_per_queue,
            ring: u16::try_from(ring).expect("at most 1024"),
            size,
            parts,
            options,
        })
    }

    /// First byte and number of blocks of a queue.
    pub fn range(&self, queue: usize) -> (u64, u64) {
        let bs = self.options.bs;
        if !self.parts {
            return (self.options.offset, self.size / bs);
        }
        let blocks = self.size / self.options.queues as u64 / bs;
        (self.options.offset + queue as u64 * blocks * bs, blocks)
    }
}

pub fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("\"{text}\" is no number of bytes; write 4096, 4K, 1M or 2G");
    let (digits, power) = match text.chars().last().map(|c| c.to_ascii_uppercase()) {
        Some('K') => (&text[..text.len() - 1], 10),
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        Some('T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << power).ok_or_else(wrong)
}

pub fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = || format!("\"{text}\" is no number of seconds");
    Duration::try_from_secs_f64(text.parse().map_err(|_| wrong())?).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{Options, Plan, bytes};

    fn plan(words: &str) -> Result<Plan, String> {
        let words = ["vublk-bench", "--socket", "s"].into_iter().chain(words.split_whitespace());
        let options = Options::try_parse_from(words).map_err(|e| e.to_string())?;
        Plan::new(options, 1 << 30, true).map_err(|e| e.to_string())
    }

    #[test]
    fn what_does_not_fit_the_device_is_refused() {
        assert!(plan("").is_ok());
        for (words, why) in [
            ("--bs 100", "multiple of 512"),
            ("--bs 64M", "32M"),
            ("--qd 1 --queues 2", "--qd at least"),
            ("--qd 342", "more --queues"),
            ("--offset 100", "--offset"),
            ("--size 2G", "bytes only"),
            ("--size 16K --qd 8", "too small"),
            ("--runtime 0", "--runtime"),
            ("--rwmixread 101", "101"),
            ("--offset 2G", "bytes only"),
        ] {
            let refused = plan(words).expect_err(words);
            assert!(refused.contains(why), "{words}: {refused}");
        }
    }

    #[test]
    fn queues_share_the_device_without_overlap_where_order_or_content_matters() {
        let parts = plan("--queues 3 --qd 3 --verify --bs 1M").expect("fits");
        let [a, b, c] = [0, 1, 2].map(|queue| parts.range(queue));
        assert_eq!((a, b, c), ((0, 341), (341 << 20, 341), (682 << 20, 341)));
        let all = plan("--queues 3 --qd 3").expect("fits");
        assert_eq!(all.range(2), (0, 1 << 18));
        assert_eq!(bytes("3k"), Ok(3072));
        assert!(bytes("18446744073709551615K").is_err());
    }
}
