//! Settings of this process, each with default, unit and price. Flags win over the file, the file over the default.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use serde::Deserialize;

use crate::state::volume::WIDTH_MAX;

const DEFAULT_LISTEN: &str = "127.0.0.1:7700";
const DEFAULT_REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// Below this, reports of a hundred chunkservers keep the MDS busy with nothing else.
const REPORT_INTERVAL_MIN: Duration = Duration::from_millis(50);
/// Above this, nobody would call a chunkserver that is gone for three intervals "recently seen".
const REPORT_INTERVAL_MAX: Duration = Duration::from_secs(600);
/// Tests lose chunkservers by the second.
const REPAIR_AFTER_MIN: Duration = Duration::from_millis(100);
/// Thirty days: for whoever wants to decide alone.
const REPAIR_AFTER_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

const EXAMPLES: &str = "\
Examples:
  evolute-mds --data-dir /var/lib/evolute/mds
      The directory is made at the first start, if it is absent; a new cluster begins with it.
  evolute-mds init --data-dir /srv/mds
      The same for a directory that is there and empty, as a new file system is: one that is empty because its disk
      is not mounted must not become a new cluster by itself.
  evolute-mds --data-dir /var/lib/evolute/mds --listen 10.0.0.5:7700
      For chunkservers on other machines. There is no encryption yet: a trusted network only.
  evolute-mds --config /etc/evolute/mds.toml
      Keys are the flags with underscores:  data_dir = \"/var/lib/evolute/mds\"
                                            listen = \"10.0.0.5:7700\"

EVOLUTE_LOG filters the traces on stderr (default: info). SIGTERM or SIGINT stops it cleanly.";

/// The control plane (MDS) of an Evolute cluster: who has what.
#[derive(Debug, Parser)]
#[command(name = "evolute-mds", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    pub task: Option<Task>,
    /// Where the cluster's state is kept. Made when absent; an empty one is refused (see `evolute-mds init`)
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Never make the data directory, also when it is absent: its disk may not be mounted
    #[arg(long)]
    pub existing: bool,
    /// Address and port to serve on; port 0 takes a free one [default: 127.0.0.1:7700]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// Seconds between two reports of a chunkserver; after three missed ones it counts as offline [default: 10]
    #[arg(long, value_name = "SECONDS")]
    pub report_interval_s: Option<f64>,
    /// Copysets a volume spreads over when nobody says otherwise: more is more speed for large volumes, and a Raft
    /// round each [default: 6]
    #[arg(long, value_name = "COPYSETS")]
    pub volume_width: Option<usize>,
    /// Copysets a pool has at least, however few chunkservers are in it: more are more partners to repair from, and
    /// memory and a log tail each [default: 0: two per chunkserver, and as many as a volume is wide]
    #[arg(long, value_name = "COPYSETS")]
    pub copysets_min: Option<usize>,
    /// Copysets a pool never has more than; each costs every member about 150 KiB of memory [default: 1024]
    #[arg(long, value_name = "COPYSETS")]
    pub copysets_max: Option<usize>,
    /// Seconds of silence after which a chunkserver's replicas are made anew elsewhere [default: 600]
    #[arg(long, value_name = "SECONDS")]
    pub repair_after_s: Option<f64>,
    /// Replicas that are replaced at once in the whole cluster; 0: no repair, no moves [default: 16]
    #[arg(long, value_name = "REPLICAS")]
    pub repairs_max: Option<usize>,
    /// TOML file with the same keys; flags win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Written (as JSON: pid, address, ...) once it serves
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
}

/// What else this program does than to serve.
#[derive(Debug, Subcommand)]
pub enum Task {
    /// Make an empty or absent directory the one of a new cluster, which begins when it is served from
    Init {
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
    },
}

/// What a configuration file may say.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    data_dir: Option<PathBuf>,
    #[serde(default)]
    existing: bool,
    listen: Option<String>,
    report_interval_s: Option<f64>,
    volume_width: Option<usize>,
    copysets_min: Option<usize>,
    copysets_max: Option<usize>,
    repair_after_s: Option<f64>,
    repairs_max: Option<usize>,
    ready_file: Option<PathBuf>,
}

/// Everything settled and checked.
#[derive(Debug, Clone)]
pub struct Config {
    pub data_dir: PathBuf,
    /// An absent directory is an error, not a new cluster.
    pub existing: bool,
    pub listen: SocketAddr,
    pub report_interval: Duration,
    pub limits: Limits,
    pub ready_file: Option<PathBuf>,
}

/// What placement keeps to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Copysets a volume spreads over by default. 32 writes over 6 Raft groups cost a third of what they cost over 48.
    pub volume_width: usize,
    /// Copysets per pool, at least: what its chunkservers and its volumes' width ask for may be more.
    pub copysets_min: usize,
    /// Copysets per pool, at most.
    pub copysets_max: usize,
    /// Silence of a chunkserver after which its replicas are made anew elsewhere. Shorter: more data is copied for
    /// machines that were only restarted. Longer: a second failure is more likely to come first. (Ceph waits for ten
    /// minutes, Curve for thirty.)
    pub repair_after: Duration,
    /// Replicas that are replaced at once, in the whole cluster. More is sooner done and slower for guests meanwhile. 0
    /// stops all repair.
    pub repairs_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        let repair_after = Duration::from_secs(600);
        Self { volume_width: 6, copysets_min: 0, copysets_max: 1024, repair_after, repairs_max: 16 }
    }
}

/// A setting that cannot be; the message names it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct Wrong(String);

impl Args {
    pub fn over(self, file: FileConfig) -> Result<Config, Wrong> {
        let wrong = |message: String| Err(Wrong(message));
        let Some(data_dir) = self.data_dir.or(file.data_dir) else {
            return wrong("no data directory: give --data-dir DIR (or data-dir in --config)".to_owned());
        };
        let listen = self.listen.or(file.listen).unwrap_or_else(|| DEFAULT_LISTEN.to_owned());
        let Ok(listen) = listen.parse() else {
            return wrong(format!("--listen {listen:?} is not ADDRESS:PORT, as in {DEFAULT_LISTEN}"));
        };
        let report_interval = match self.report_interval_s.or(file.report_interval_s) {
            None => DEFAULT_REPORT_INTERVAL,
            Some(seconds) => match Duration::try_from_secs_f64(seconds) {
                Ok(interval) if (REPORT_INTERVAL_MIN..=REPORT_INTERVAL_MAX).contains(&interval) => interval,
                _ => return wrong(format!("--report-interval-s {seconds} is not between 0.05 and 600")),
            },
        };
        let default = Limits::default();
        let limits = Limits {
            volume_width: self.volume_width.or(file.volume_width).unwrap_or(default.volume_width),
            copysets_min: self.copysets_min.or(file.copysets_min).unwrap_or(default.copysets_min),
            copysets_max: self.copysets_max.or(file.copysets_max).unwrap_or(default.copysets_max),
            repair_after: match self.repair_after_s.or(file.repair_after_s) {
                None => default.repair_after,
                Some(seconds) => match Duration::try_from_secs_f64(seconds) {
                    Ok(after) if (REPAIR_AFTER_MIN..=REPAIR_AFTER_MAX).contains(&after) => after,
                    _ => return wrong(format!("--repair-after-s {seconds} is not between 0.1 and 2592000")),
                },
            },
            repairs_max: self.repairs_max.or(file.repairs_max).unwrap_or(default.repairs_max),
        };
        if !(1..=WIDTH_MAX as usize).contains(&limits.volume_width) {
            return wrong(format!("--volume-width {} is not between 1 and {WIDTH_MAX}", limits.volume_width));
        }
        if !(1..=100_000).contains(&limits.copysets_max) {
            return wrong(format!("--copysets-max {} is not between 1 and 100000", limits.copysets_max));
        }
        if limits.copysets_min > limits.copysets_max {
            let Limits { copysets_min, copysets_max, .. } = limits;
            return wrong(format!("--copysets-min {copysets_min} is above --copysets-max {copysets_max}"));
        }
        if limits.repairs_max > 10_000 {
            return wrong(format!("--repairs-max {} is not between 0 and 10000", limits.repairs_max));
        }
        let ready_file = self.ready_file.or(file.ready_file);
        let existing = self.existing || file.existing;
        Ok(Config { data_dir, existing, listen, report_interval, limits, ready_file })
    }
}

#[cfg(test)]
mod tests {
    use super::{Args, FileConfig, Limits};
    use clap::Parser;
    use std::time::Duration;

    fn config(args: &[&str], file: &str) -> Result<super::Config, String> {
        let args = Args::try_parse_from([&["evolute-mds"], args].concat()).map_err(|e| e.to_string())?;
        let file: FileConfig = toml(file).map_err(|e| e.to_string())?;
        args.over(file).map_err(|e| e.to_string())
    }

    fn toml(text: &str) -> anyhow::Result<FileConfig> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), text)?;
        evolute_daemon::read_config(file.path())
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let c = config(&["--data-dir", "/d"], "").expect("valid");
        assert_eq!((c.listen.to_string().as_str(), c.report_interval.as_secs()), ("127.0.0.1:7700", 10));
        assert!(c.limits == Limits::default() && !c.existing);
        assert!(config(&["--data-dir", "/d", "--existing"], "").expect("valid").existing);
        assert!(config(&["--data-dir", "/d"], "existing = true").expect("valid").existing);
        let file = "data_dir = '/f'\nlisten = '127.0.0.1:1'\nreport_interval_s = 0.5\nvolume_width = 3\ncopysets_min = 8\ncopysets_max = 9\nrepair_after_s = 60\nrepairs_max = 3";
        let c = config(&["--listen", "127.0.0.1:2", "--volume-width", "4", "--repairs-max", "0"], file)
            .expect("valid");
        assert_eq!((c.data_dir.to_str(), c.listen.port()), (Some("/f"), 2));
        assert_eq!(c.report_interval, Duration::from_millis(500));
        let repair_after = Duration::from_secs(60);
        let limits =
            Limits { volume_width: 4, copysets_min: 8, copysets_max: 9, repair_after, repairs_max: 0 };
        assert_eq!(c.limits, limits);
    }

    #[test]
    fn a_wrong_setting_is_named() {
        for (args, named) in [
            (vec![], "--data-dir"),
            (vec!["--data-dir", "/d", "--listen", "7700"], "--listen"),
            (vec!["--data-dir", "/d", "--report-interval-s", "0"], "--report-interval-s"),
            (vec!["--data-dir", "/d", "--report-interval-s", "nan"], "--report-interval-s"),
            (vec!["--data-dir", "/d", "--report-interval-s", "1e300"], "--report-interval-s"),
            (vec!["--data-dir", "/d", "--volume-width", "0"], "--volume-width"),
            (vec!["--data-dir", "/d", "--volume-width", "65"], "--volume-width"),
            (vec!["--data-dir", "/d", "--copysets-max", "0"], "--copysets-max"),
            (vec!["--data-dir", "/d", "--copysets-min", "1025"], "--copysets-min"),
            (vec!["--data-dir", "/d", "--repair-after-s", "0"], "--repair-after-s"),
            (vec!["--data-dir", "/d", "--repair-after-s", "1e9"], "--repair-after-s"),
            (vec!["--data-dir", "/d", "--repairs-max", "10001"], "--repairs-max"),
            (vec!["--data-dir", "/d", "--colour", "blue"], "--colour"),
        ] {
            let error = config(&args, "").expect_err("wrong");
            assert!(error.contains(named), "{args:?}: {error}");
        }
        let error = config(&["--data-dir", "/d"], "report-intervall-s = 1").expect_err("wrong");
        assert!(error.contains("not valid"), "{error}");
    }
}
