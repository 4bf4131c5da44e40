//! What may be typed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::size::VolumeSize;

const EXIT_STATUS: &str = "Exit status: 0 done · 1 failed · 2 wrong usage, size or name · 3 not found · 4 exists already · \
5 in use elsewhere · 6 no control plane reachable, or busy · 7 not enough chunkservers or room · \
8 the connection broke, outcome unknown · 130 interrupted";

/// Volumes and clusters of Evolute, the replicated network block store.
#[derive(Debug, Parser)]
#[command(name = "evolute", version, disable_help_subcommand = false, after_help = EXIT_STATUS)]
#[command(after_long_help = format!("Examples:
  evolute dev --dir /tmp/cluster --volume disk:10G     a whole cluster on this machine
  evolute volume create disk --size 10G
  evolute volume import debian.raw --name debian
  evolute chunkserver retire 4 --wait                  before its machine goes away
  evolute --mds 10.0.0.1:7700,10.0.0.2:7700 cluster status --json

{EXIT_STATUS}
What --json prints: docs/cli.md"))]
pub struct Args {
    /// Addresses of the control plane, HOST:PORT, several separated by commas; asked in turn until one leads. One that
    /// is empty is refused, also that of EVOLUTE_MDS
    #[arg(
        long,
        global = true,
        env = "EVOLUTE_MDS",
        default_value = "127.0.0.1:7700",
        value_name = "ADDR[,ADDR]"
    )]
    pub mds: String,
    /// Print JSON, for programs; errors become {"error": …} on standard error
    #[arg(long, global = true)]
    pub json: bool,
    /// Seconds to wait for an answer of the control plane
    #[arg(long, global = true, default_value = "15", value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Duration,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create, list, show, delete and import volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// List and show chunkservers; take them out of service and back
    #[command(subcommand)]
    Chunkserver(ChunkserverCommand),
    /// How the cluster is
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Run a whole cluster under one directory, for trying and for tests
    Dev(Box<DevArgs>),
}

#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Create an empty volume; its space is taken when it is written
    #[command(after_help = "Example: evolute volume create disk --size 10G")]
    Create {
        /// 1 to 128 of A-Z a-z 0-9 . _ - beginning with a letter or digit
        name: String,
        /// A multiple of 1M from 1M to 64T; binary: 10G is 10 × 2^30 bytes
        #[arg(long)]
        size: VolumeSize,
        /// Copysets it spreads over; 0 leaves it to the cluster
        #[arg(long, default_value = "0", value_name = "N")]
        width: u32,
    },
    /// All volumes
    #[command(visible_alias = "ls")]
    List,
    /// One volume, with who holds it
    Show { name: String },
    /// Delete a volume and all its data
    #[command(visible_alias = "rm")]
    Delete {
        name: String,
        /// Also when a backend holds it, which is fenced out first
        #[arg(long)]
        force: bool,
    },
    /// Copy a raw disk image into a volume
    Import(ImportArgs),
}

#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  evolute chunkserver list
  evolute chunkserver show 4
  evolute chunkserver retire 4 --wait      returns when it holds nothing any more and can be stopped
  evolute chunkserver unretire 4           what has moved stays where it is")]
pub enum ChunkserverCommand {
    /// All chunkservers, with what they hold and how they are
    #[command(visible_alias = "ls")]
    List,
    /// One chunkserver: its copysets, its integrity, what moves from and to it
    #[command(after_help = "Example: evolute chunkserver show 4")]
    Show {
        /// Its number, as in `evolute chunkserver list`
        #[arg(value_parser = chunkserver_id)]
        id: u32,
    },
    /// Move every replica off a chunkserver, one after the other; each copyset keeps three all the time
    #[command(after_help = "Examples:
  evolute chunkserver retire 4
  evolute chunkserver retire 4 --wait --json      one object per line: retiring, progress, empty")]
    Retire {
        /// Its number, as in `evolute chunkserver list`
        #[arg(value_parser = chunkserver_id)]
        id: u32,
        /// Return when it is empty, and tell how far it is meanwhile
        #[arg(long)]
        wait: bool,
    },
    /// Stop retiring it: it gets replicas again
    #[command(after_help = "Example: evolute chunkserver unretire 4")]
    Unretire {
        /// Its number, as in `evolute chunkserver list`
        #[arg(value_parser = chunkserver_id)]
        id: u32,
    },
    /// It was put back to an older copy of its directory, and nothing newer is left: make that copy count. What was
    /// written since the copy was made is lost
    #[command(after_help = "Example: evolute chunkserver accept 4")]
    Accept(Decide),
    /// It does not come back: make its replicas anew elsewhere at once, instead of after --repair-after-s. If it comes
    /// back all the same, what has not moved yet stays with it
    #[command(after_help = "Example: evolute chunkserver declare-dead 4")]
    DeclareDead(Decide),
    /// Take one that holds nothing and does not run off the list. Its number is never given again
    #[command(after_help = "Example: evolute chunkserver remove 4")]
    Remove(Decide),
}

#[derive(Debug, clap::Args)]
pub struct Decide {
    /// Its number, as in `evolute chunkserver list`
    #[arg(value_parser = chunkserver_id)]
    pub id: u32,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

/// `4`, or `chunkserver-4` as messages write it.
fn chunkserver_id(text: &str) -> Result<u32, String> {
    match text.strip_prefix("chunkserver-").unwrap_or(text).parse() {
        Ok(id @ 1..) => Ok(id),
        _ => Err("a chunkserver is named by its number, for instance 4".to_owned()),
    }
}

#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Control plane, chunkservers, copysets with their health and why, repairs under way, volumes
    #[command(after_help = "Example: evolute cluster status --json")]
    Status,
    /// Let a control plane go on that was put back from an older copy, or that waits for chunkservers which stay away
    #[command(after_help = "Without --yes it only says what is so and what going on would mean.

Examples:
  evolute cluster accept-mds
  evolute cluster accept-mds --yes")]
    AcceptMds {
        /// Do it
        #[arg(long)]
        yes: bool,
    },
}

/// Copy a raw disk image into a volume; holes and zeroes are skipped
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  evolute volume import debian.raw --name debian
  evolute volume import debian.raw --name debian --size 20G     a larger disk than the image
  evolute volume import debian.raw --into disk                  an existing, empty, unattached volume
  qemu-img convert -O raw image.qcow2 image.raw                 other formats first become raw")]
pub struct ImportArgs {
    /// A raw image: a file or a block device
    pub file: PathBuf,
    /// Create a volume of this name
    #[arg(long, conflicts_with = "into", required_unless_present = "into")]
    pub name: Option<String>,
    /// Write into this volume, which must be empty and unattached
    #[arg(long, value_name = "NAME", conflicts_with_all = ["size", "width"])]
    pub into: Option<String>,
    /// Size of the new volume; default: the image's, rounded up to 1M
    #[arg(long)]
    pub size: Option<VolumeSize>,
    /// Copysets the new volume spreads over; 0 leaves it to the cluster
    #[arg(long, default_value = "0", value_name = "N")]
    pub width: u32,
    /// Take the file's bytes as they are, whatever they look like
    #[arg(long)]
    pub raw: bool,
}

/// Run a whole cluster under one directory on loopback: a control plane, three chunkservers in three zones and a
/// backend per volume. No root needed. Started again, it finds its data
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  evolute dev --dir /tmp/cluster --volume disk:10G
  evolute dev --dir /tmp/cluster                     again: same ports, same volumes, same data
  evolute dev --dir /tmp/cluster --data-on /dev/shm/cluster --volume fast:2G

It stays in the foreground; Ctrl-C stops everything in order. Logs are under DIR/logs, ports in DIR/dev.toml.")]
pub struct DevArgs {
    /// Where everything of the cluster is; made if absent
    #[arg(long)]
    pub dir: PathBuf,
    /// Serve this volume; with a size it is created if absent. Kept for the next start
    #[arg(long = "volume", value_name = "NAME[:SIZE]")]
    pub volumes: Vec<DevVolume>,
    /// Serve all volumes by one backend process, as for the disks of one virtual machine, instead of one each
    #[arg(long)]
    pub one_backend: bool,
    /// Permissions of the sockets, for `evolute-vhost --socket-mode`, which checks them
    #[arg(long, value_name = "OCTAL")]
    pub socket_mode: Option<String>,
    /// Group of the sockets, by name or number, for `evolute-vhost --socket-group`
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// Put the data (not sockets, logs and ports) under this directory, for instance on /dev/shm
    #[arg(long, value_name = "DIR", visible_alias = "chunkserver-dir-base")]
    pub data_on: Option<PathBuf>,
    /// Port of the control plane of a new cluster; default: 7700 if free, else another; 0: any
    #[arg(long, value_name = "PORT")]
    pub mds_port: Option<u16>,
    /// Choose all ports anew (a port of DIR/dev.toml was taken by somebody else)
    #[arg(long)]
    pub new_ports: bool,
    /// Write the JSON description of the running cluster here, by rename, once it is ready
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
    /// Copysets of the cluster, at least (`--copysets-min` of evolute-mds): for seeing what many of them cost; 0: as
    /// few as three chunkservers need. Every start asks anew, and those that are there stay
    #[arg(long, default_value = "0", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1024))]
    pub copysets: u32,
    /// Seconds to wait until everything is ready
    #[arg(long, default_value = "60", value_name = "SECONDS", value_parser = seconds)]
    pub start_timeout: Duration,
    /// How often a process that dies is started again within a minute before it stays down; 0: never. Default: it is
    /// started again however often it dies, after pauses that grow to 5 s
    #[arg(long, value_name = "N")]
    pub restarts: Option<u32>,
    /// Where the daemons are; default: next to this program
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
}

/// `NAME` or `NAME:SIZE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DevVolume {
    pub name: String,
    pub size: Option<VolumeSize>,
}

impl std::str::FromStr for DevVolume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, size) = match text.split_once(':') {
            None => (text, None),
            Some((name, size)) => {
                (name, Some(size.parse().map_err(|e: crate::size::NotASize| e.to_string())?))
            }
        };
        // The name becomes a file name here, so the rule of the control plane is checked before it is asked.
        let fits = name.len() <= 128
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if !fits {
            return Err(format!(
                "\"{name}\" is no volume name: 1 to 128 of A-Z a-z 0-9 . _ - beginning with a letter or digit"
            ));
        }
        Ok(Self { name: name.to_owned(), size })
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("\"{text}\" is not a number of seconds"))?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("give a number of seconds above zero".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::{Args, DevVolume};
    use crate::size::VolumeSize;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_dev_volume_has_a_name_that_can_be_a_file() {
        let parse = str::parse::<DevVolume>;
        assert_eq!(parse("a"), Ok(DevVolume { name: "a".into(), size: None }));
        assert_eq!(parse("a:1G"), Ok(DevVolume { name: "a".into(), size: Some(VolumeSize(1 << 30)) }));
        for bad in ["", ":1G", "../a", ".a", "a/b", "a:", "a:1", "a b", &"x".repeat(129)] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn import_names_its_volume_exactly_once() {
        let parse = |rest: &[&str]| {
            Args::try_parse_from(["evolute", "volume", "import", "f"].iter().chain(rest)).map(|_| ())
        };
        assert!(parse(&["--name", "a"]).is_ok());
        assert!(parse(&["--into", "a"]).is_ok());
        assert!(parse(&[]).is_err());
        assert!(parse(&["--name", "a", "--into", "a"]).is_err());
        assert!(parse(&["--into", "a", "--size", "1G"]).is_err());
    }
}
