//! What to do to which cluster. The fields are the command line of `torture`.

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};

use super::fault::Fault;

/// Starts a cluster of real processes, breaks it by a seed while every answer is checked, heals it, and checks all.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "torture",
    version,
    after_help = "Needs root (network namespaces; mounts for power cuts). Ends early and cleanly on SIGINT or SIGTERM, which makes the
result unknown. After a failure the folder with every log and the data is kept and named.

Exit status: 0 pass: every check was made, none failed, every listed fault happened; 1 fail: a violation, a process that
died by itself, or a cluster that did not heal; 2 wrong usage; 3 could not run; 4 unknown: something was not checked or
a listed fault did not happen.

The seed decides which fault comes when and for how long, and which requests are made; the timing of a real machine
is not repeated by it.

Examples:
  torture --duration 60 --seed 7
  torture --duration 3600 --faults kills,stops,partitions --json report.json
  torture --duration 600 --faults power-one,power-all --every-ms 4000
  torture --faults all,-full-disk --chunkservers 4 --work /var/tmp/torture
  torture report monday.json tuesday.json --out docs/torture-report.md",
    args_conflicts_with_subcommands = true
)]
#[command(before_long_help = Fault::table())]
pub struct Options {
    #[command(subcommand)]
    pub task: Option<Task>,
    /// Seconds of faults; healing and the last checks come after
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub duration: u64,
    /// Go on for so many seconds more, at most, with those kinds of faults that do not count yet
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub until_covered: u64,
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Faults and groups of them, separated by commas; `-NAME` takes one away
    #[arg(long, value_name = "LIST", default_value = "kills,stops,restarts,partitions")]
    pub faults: String,
    /// A fault begins every so many milliseconds, on average; the true pause is between half and one and a half of it
    #[arg(long, value_name = "MS", default_value_t = 4000)]
    pub every_ms: u64,
    /// Faults at a time, at most
    #[arg(long, default_value_t = 2)]
    pub overlap: usize,
    #[arg(long, default_value_t = 3)]
    pub chunkservers: usize,
    /// Requests per second, at most; 0: as many as are answered
    #[arg(long, default_value_t = 1500)]
    pub rate: u64,
    /// Size of the checked area, from the volume's beginning
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub area_mib: u64,
    /// Seconds between two complete checks, with everything healed
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub round: u64,
    /// A fault counts with so many acknowledged changes from its beginning until 3 s after it was healed; without one
    /// that counts, of each kind, the result is unknown
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub window_acks: u64,
    /// Of which commit the programs are, for the report
    #[arg(long, value_name = "WORDS", env = "EVOLUTE_COMMIT")]
    pub commit: Option<String>,
    /// Folder for data and logs; a new one in it is used, and removed after a pass
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    pub work: PathBuf,
    /// Keep the folder whatever happens
    #[arg(long)]
    pub keep: bool,
    /// Where the programs are [default: beside this one]
    #[arg(long, value_name = "DIR", env = "EVOLUTE_PROGRAMS")]
    pub programs: Option<PathBuf>,
    /// Size of each chunkserver's disk image (power and disk faults only)
    #[arg(long, value_name = "MIB", default_value_t = 3072)]
    pub image_mib: u64,
    /// Write the report here too, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What else this program does than to break clusters.
#[derive(Debug, Clone, Subcommand)]
pub enum Task {
    /// Makes one sheet of the JSON reports of one or several runs
    Report {
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        #[arg(long, value_name = "FILE", default_value = "docs/torture-report.md")]
        out: PathBuf,
    },
}

impl Options {
    /// Where the programs are.
    pub fn programs(&self) -> std::io::Result<PathBuf> {
        let beside = || Ok(std::env::current_exe()?.parent().unwrap_or(Path::new(".")).to_owned());
        self.programs.clone().map_or_else(beside, Ok)
    }

    pub fn wrong(&self) -> Option<String> {
        let between = |name: &str, value: u64, min: u64, max: u64| {
            (value < min || value > max).then(|| format!("--{name} {value} is not between {min} and {max}"))
        };
        Fault::parse_list(&self.faults)
            .err()
            .or_else(|| between("every-ms", self.every_ms, 100, 600_000))
            .or_else(|| between("overlap", self.overlap as u64, 1, 4))
            .or_else(|| between("chunkservers", self.chunkservers as u64, 3, 9))
            .or_else(|| between("area-mib", self.area_mib, 1, 1024))
            .or_else(|| between("round", self.round, 5, 3600))
            .or_else(|| between("image-mib", self.image_mib, 512, 1 << 20))
    }
}
