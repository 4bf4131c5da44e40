//! Settings of this process: flags, or the same names in a TOML file. A flag wins over the file.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use evolute_protocol::{NotAnAddress, mds_addresses};
use serde::Deserialize;

/// Stores replicas of chunks on one disk, for an Evolute cluster.
#[derive(Debug, Clone, Default, Parser, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[command(
    name = "evolute-chunkserver",
    version,
    after_help = "Examples:
  evolute-chunkserver --data-dir /srv/evolute/disk1 --mds 10.0.0.1:7700 --listen 10.0.0.5:7710 --zone rack1 --server host5
  evolute-chunkserver --config /etc/evolute/chunkserver.toml --listen 127.0.0.1:0 --ready-file /run/cs.ready
  evolute-chunkserver init --data-dir /srv/evolute/disk1
  evolute-chunkserver inspect --data-dir /srv/evolute/disk1
  evolute-chunkserver repair --data-dir /srv/evolute/disk1

One process serves one disk. SIGTERM stops it cleanly; a kill -9 loses nothing that was acknowledged.
EVOLUTE_LOG filters the traces on stderr (default: info).",
    args_conflicts_with_subcommands = true
)]
pub struct Args {
    #[command(subcommand)]
    #[serde(skip)]
    pub task: Option<Task>,
    /// TOML file with these settings (keys are the flags' names with underscores)
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Directory of this disk: log, chunks, small state. Made if absent, refused if it is empty (see
    /// `evolute-chunkserver init`) or not ours
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Never make the data directory, also when it is absent: its disk may not be mounted
    #[arg(long)]
    pub existing: bool,
    /// Control plane addresses, separated by commas
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    pub mds: Vec<String>,
    /// Where clients and other chunkservers connect; port 0 picks a free one [default: 127.0.0.1:7710]
    #[arg(long, value_name = "IP:PORT")]
    pub listen: Option<SocketAddr>,
    /// The address others are told, if it is not the one listened on
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// Failure domain: no two replicas of a copyset share one [default: default]
    #[arg(long, value_name = "NAME")]
    pub zone: Option<String>,
    /// The machine, for people reading the topology [default: the host's name]
    #[arg(long, value_name = "NAME")]
    pub server: Option<String>,
    /// Bytes of the disk to use, at most [default: all of the file system]
    #[arg(long, value_name = "BYTES")]
    pub capacity_bytes: Option<u64>,
    /// Seconds between reports to the control plane [default: what the control plane says, 10]
    #[arg(long, value_name = "SECONDS")]
    pub heartbeat_interval_s: Option<u64>,
    /// Memory for writes that are in the log but not yet in chunk files, in MiB. More: fewer device writes, a
    /// longer restart [default: 256]
    #[arg(long, value_name = "MIB")]
    pub overlay_mib: Option<u64>,
    /// Bytes of one log file, in MiB [default: 64]
    #[arg(long, value_name = "MIB")]
    pub log_file_mib: Option<u64>,
    /// Log kept for replicas that lag, in MiB, at most; one that lacks more is filled from the leader's chunks
    /// [default: 4096]
    #[arg(long, value_name = "MIB")]
    pub log_retain_mib: Option<u64>,
    /// Seconds for which the data of a replica that was moved away are kept, unless space is short [default: 600]
    #[arg(long, value_name = "SECONDS")]
    pub trash_delay_s: Option<u64>,
    /// What the scrubber reads in a second, in MiB, at most; half of it for other chunkservers that compare their
    /// replicas [default: 20]
    #[arg(long, value_name = "MIB")]
    pub scrub_mib_s: Option<u64>,
    /// Hours from one round of the scrubber to the next [default: 168]
    #[arg(long, value_name = "HOURS")]
    pub scrub_period_h: Option<u64>,
    /// Written (by rename) once requests are served: {"pid":…,"address":"…","chunkserver":…}
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
}

/// What else this program does than to serve.
#[derive(Debug, Clone, Subcommand)]
pub enum Task {
    /// Makes an empty or absent directory one that a new chunkserver may take at its start: one that is empty because
    /// its disk is not mounted must not become one by itself
    Init {
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
    },
    /// Reads everything in the data directory of a chunkserver that does not run, without changing a byte of it
    #[command(
        after_help = "For each replica: how far its log and its chunk files go, its members, its chunks, and every block that cannot
be read. Log entries after the checkpoint are applied in memory, committed or not: which of the last ones are, only
the logs of a majority can tell. The one that ends last (by term, then index) has everything that was acknowledged.

Exit status: 0 all of it is sound; 1 it could not be read; 2 wrong usage; 3 a block cannot be read, or a replica could
not run.

Examples:
  evolute-chunkserver inspect --data-dir /srv/evolute/disk1
  evolute-chunkserver inspect --data-dir /srv/evolute/disk1 --json --export /var/tmp/disk1"
    )]
    Inspect {
        /// The chunkserver's directory; refused while a chunkserver uses it
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
        /// Print JSON instead of words
        #[arg(long)]
        json: bool,
        /// Folder for a sparse raw image of each volume, volume-N.raw, as far as its chunks are here; a block that cannot
        /// be read says so in it
        #[arg(long, value_name = "DIR")]
        export: Option<PathBuf>,
    },
    /// Puts right what a forged or mangled message can have left in the data directory of a chunkserver that does not run: votes
    /// beyond every term, fences beyond every writer
    #[command(
        after_help = "Without --yes it only says what it would do. A vote is lowered to a term above every one that the copyset had a leader
in; a fence is taken back by the copyset's leader, after the start. Stop the backends of such a volume first, run this on
every chunkserver that has a replica of the copyset, start them, and start the backend with --takeover.

Exit status: 0 nothing to repair, or all of it is repaired; 1 it could not be done; 2 wrong usage; 3 there is something to
repair (without --yes), or something that cannot be.

Examples:
  evolute-chunkserver repair --data-dir /srv/evolute/disk1
  evolute-chunkserver repair --data-dir /srv/evolute/disk1 --yes
  evolute-chunkserver repair --data-dir /srv/evolute/disk1 --unfence 7 --yes"
    )]
    Repair {
        /// The chunkserver's directory; refused while a chunkserver uses it
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
        /// Print JSON instead of words
        #[arg(long)]
        json: bool,
        /// Do it
        #[arg(long)]
        yes: bool,
        /// Lower no vote below this term: the highest that `inspect` shows on any chunkserver of the copyset
        #[arg(long, value_name = "TERM", default_value_t = 0)]
        above: u64,
        /// A volume's number (`evolute volume show`) whose fences nobody came with: a deletion that was none, or an attachment
        /// far above that of `evolute volume show`
        #[arg(long, value_name = "VOLUME")]
        unfence: Vec<u64>,
    },
}

/// The settings, complete.
#[derive(Debug, Clone)]
pub struct Config {
    pub data_dir: PathBuf,
    /// An absent directory is an error, not a new chunkserver.
    pub existing: bool,
    pub mds: Vec<String>,
    pub listen: SocketAddr,
    pub advertise: Option<String>,
    pub zone: String,
    pub server: String,
    pub capacity_bytes: Option<u64>,
    pub heartbeat_interval_s: Option<u64>,
    pub overlay_mib: u64,
    pub log_file_mib: u64,
    pub log_retain_mib: u64,
    pub trash_delay_s: u64,
    pub scrub_mib_s: u64,
    pub scrub_period_h: u64,
    pub ready_file: Option<PathBuf>,
}

/// What is wrong with the settings.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("--{0} is missing (give it as a flag or in the --config file)")]
    Missing(&'static str),
    #[error("--{name} must be {range}, not {value}")]
    OutOfRange { name: &'static str, range: &'static str, value: u64 },
    #[error("--{0} must not be empty, longer than 128 bytes, or have spaces or control characters")]
    BadName(&'static str),
    #[error("--mds: {0}")]
    Mds(#[from] NotAnAddress),
}

impl Args {
    /// These flags over the settings of a file.
    pub fn or(self, file: Self) -> Self {
        Self {
            task: self.task,
            config: self.config,
            data_dir: self.data_dir.or(file.data_dir),
            existing: self.existing || file.existing,
            mds: if self.mds.is_empty() { file.mds } else { self.mds },
            listen: self.listen.or(file.listen),
            advertise: self.advertise.or(file.advertise),
            zone: self.zone.or(file.zone),
            server: self.server.or(file.server),
            capacity_bytes: self.capacity_bytes.or(file.capacity_bytes),
            heartbeat_interval_s: self.heartbeat_interval_s.or(file.heartbeat_interval_s),
            overlay_mib: self.overlay_mib.or(file.overlay_mib),
            log_file_mib: self.log_file_mib.or(file.log_file_mib),
            log_retain_mib: self.log_retain_mib.or(file.log_retain_mib),
            trash_delay_s: self.trash_delay_s.or(file.trash_delay_s),
            scrub_mib_s: self.scrub_mib_s.or(file.scrub_mib_s),
            scrub_period_h: self.scrub_period_h.or(file.scrub_period_h),
            ready_file: self.ready_file.or(file.ready_file),
        }
    }

    pub fn check(self) -> Result<Config, ConfigError> {
        if self.mds.is_empty() {
            return Err(ConfigError::Missing("mds"));
        }
        let mds = mds_addresses(&self.mds)?;
        Ok(Config {
            data_dir: self.data_dir.ok_or(ConfigError::Missing("data-dir"))?,
            existing: self.existing,
            mds,
            listen: self.listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 7710))),
            advertise: self.advertise,
            zone: name("zone", self.zone.unwrap_or_else(|| "default".into()))?,
            server: name("server", self.server.unwrap_or_else(host_name))?,
            capacity_bytes: self.capacity_bytes,
            heartbeat_interval_s: match self.heartbeat_interval_s {
                Some(value @ (0 | 3601..)) => {
                    return Err(ConfigError::OutOfRange {
                        name: "heartbeat-interval-s",
                        range: "1 to 3600",
                        value,
                    });
                }
                interval => interval,
            },
            overlay_mib: in_range("overlay-mib", "16 to 65536", self.overlay_mib.unwrap_or(256), 16, 65536)?,
            log_file_mib: in_range("log-file-mib", "8 to 1024", self.log_file_mib.unwrap_or(64), 8, 1024)?,
            log_retain_mib: in_range(
                "log-retain-mib",
                "8 to 1048576",
                self.log_retain_mib.unwrap_or(4096),
                8,
                1 << 20,
            )?,
            trash_delay_s: in_range(
                "trash-delay-s",
                "0 to 2592000",
                self.trash_delay_s.unwrap_or(600),
                0,
                30 * 24 * 3600,
            )?,
            scrub_mib_s: in_range("scrub-mib-s", "1 to 10240", self.scrub_mib_s.unwrap_or(20), 1, 10240)?,
            scrub_period_h: in_range(
                "scrub-period-h",
                "1 to 8760",
                self.scrub_period_h.unwrap_or(168),
                1,
                8760,
            )?,
            ready_file: self.ready_file,
        })
    }
}

fn in_range(
    name: &'static str,
    range: &'static str,
    value: u64,
    min: u64,
    max: u64,
) -> Result<u64, ConfigError> {
    if (min..=max).contains(&value) { Ok(value) } else { Err(ConfigError::OutOfRange { name, range, value }) }
}

fn name(flag: &'static str, value: String) -> Result<String, ConfigError> {
    let good = !value.is_empty()
        && value.len() <= 128
        && !value.contains(|c: char| c.is_whitespace() || c.is_control());
    if good { Ok(value) } else { Err(ConfigError::BadName(flag)) }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::{Args, ConfigError};

    fn args() -> Args {
        Args { data_dir: Some("/d".into()), mds: vec!["127.0.0.1:1".into()], ..Args::default() }
    }

    #[test]
    fn a_flag_wins_over_the_file() {
        let flags = Args { zone: Some("a".into()), ..args() };
        let file =
            Args { zone: Some("b".into()), server: Some("s".into()), existing: true, ..Args::default() };
        let config = flags.or(file).check().expect("complete");
        assert!(config.existing && !args().check().expect("complete").existing);
        assert_eq!((config.zone.as_str(), config.server.as_str()), ("a", "s"));
    }

    #[test]
    fn bad_settings_are_named() {
        assert_eq!(Args { mds: vec![], ..args() }.check().unwrap_err(), ConfigError::Missing("mds"));
        assert_eq!(Args { data_dir: None, ..args() }.check().unwrap_err(), ConfigError::Missing("data-dir"));
        assert_eq!(
            Args { zone: Some(" ".into()), ..args() }.check().unwrap_err(),
            ConfigError::BadName("zone")
        );
        assert!(matches!(
            Args { overlay_mib: Some(1), ..args() }.check().unwrap_err(),
            ConfigError::OutOfRange { name: "overlay-mib", .. }
        ));
    }
}
