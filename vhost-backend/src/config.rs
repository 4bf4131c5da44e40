//! Settings of this process: flags, or the same names in a TOML file. A flag wins over the file.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use evolute_protocol::{NotAnAddress, mds_addresses};
use serde::Deserialize;

use crate::connections::DISKS_MAX;
use crate::device::{SocketAccess, group_of};

/// Serves Evolute volumes to virtual machines as vhost-user-blk devices: one, or several by one process.
#[derive(Debug, Clone, Default, Parser, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[command(
    name = "evolute-vhost",
    version,
    after_help = "Examples:
  evolute-vhost --socket-path /run/evolute/vm1.sock --volume vm1 --mds 10.0.0.1:7700 --state-dir /var/lib/evolute/vm1
  qemu-system-x86_64 … -object memory-backend-memfd,id=mem,size=4G,share=on -machine q35,memory-backend=mem \\
      -chardev socket,id=c0,path=/run/evolute/vm1.sock,reconnect=1 -device vhost-user-blk-pci,chardev=c0,num-queues=4
  evolute-vhost --disk root=/run/evolute/root.sock --disk data=/run/evolute/data.sock --mds 10.0.0.1:7700

The socket listens before anything else is done. While no chunkserver or control plane is reachable the guest's
requests wait; they resume by themselves. SIGTERM ends the process cleanly; after a kill -9, start it again: QEMU
reconnects and every request in flight is done again, once.
EVOLUTE_LOG filters the traces on stderr (default: info)."
)]
pub struct Args {
    /// TOML file with these settings (keys are the flags' names with underscores)
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Listen for the virtual machine monitor on this Unix socket
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,
    /// Use this already connected Unix socket instead
    #[arg(long, value_name = "FDNUM")]
    #[serde(skip)]
    pub fd: Option<i32>,
    /// Permissions of the socket: whoever can connect can read and write the disk [default: 0600]
    #[arg(long, value_name = "OCTAL", conflicts_with = "fd")]
    pub socket_mode: Option<String>,
    /// Group of the socket, by name or number, as for a virtual machine monitor of another user with --socket-mode 0660
    #[arg(long, value_name = "GROUP", conflicts_with = "fd")]
    pub socket_group: Option<String>,
    /// The volume's name
    #[arg(long, value_name = "NAME")]
    pub volume: Option<String>,
    /// Serve this volume at this socket; again for each volume, in place of --volume and --socket-path. They share one
    /// I/O thread, which costs less than a process each, and a crash, which they come back from together
    #[arg(long, value_name = "VOLUME=SOCKET", conflicts_with_all = ["volume", "socket_path", "fd", "serial"])]
    pub disk: Vec<String>,
    /// Control plane addresses, separated by commas
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    pub mds: Vec<String>,
    /// Remembers the attachment here, so that a restart needs no control plane
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Take the volume from whoever else holds it; that one is fenced out
    #[arg(long)]
    #[serde(default)]
    pub takeover: bool,
    /// The guest may not write
    #[arg(long)]
    #[serde(default)]
    pub read_only: bool,
    /// What the guest reads as the disk's serial number, up to 20 bytes [default: the volume's name]
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<String>,
    /// Most queues a front end may use; each is built when it is first used [default: 256]
    #[arg(long, value_name = "N")]
    pub queues: Option<u16>,
    /// Microseconds to look for more work before sleeping, while few requests are out, the last wait was that short and
    /// nobody else wants the core. Lowers latency, costs CPU; 0: sleep at once [default: 100]
    #[arg(long, value_name = "US")]
    pub spin_us: Option<u64>,
    /// Fail requests that could not be served for this long, instead of holding them [default: 0, hold for ever]
    #[arg(long, value_name = "SECONDS")]
    pub fail_after_s: Option<u64>,
    /// Written (by rename) once guests are served: {"pid":…,"socket":"…","volume":"…","size_bytes":…}, or with --disk
    /// {"pid":…,"disks":[{"socket":"…","volume":"…","size_bytes":…}]}
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
    /// Print what this program can do, as QEMU's vhost-user conventions ask, and exit
    #[arg(long)]
    #[serde(skip)]
    pub print_capabilities: bool,
}

/// What `--print-capabilities` prints (QEMU's `docs/interop/vhost-user.json`).
pub const CAPABILITIES: &str = r#"{"type":"block","features":["read-only"]}"#;

/// Where the virtual machine monitor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Socket {
    Listen(PathBuf),
    Connected(i32),
}

/// One volume and the socket it is served at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub volume: String,
    pub socket: Socket,
    pub serial: String,
}

/// The settings, complete.
#[derive(Debug, Clone)]
pub struct Config {
    /// At least one.
    pub disks: Vec<Disk>,
    /// They were given by `--disk`: the ready file lists them.
    pub lists_disks: bool,
    pub access: SocketAccess,
    pub mds: Vec<String>,
    pub state_dir: Option<PathBuf>,
    pub takeover: bool,
    pub read_only: bool,
    pub queues: u16,
    pub spin: Duration,
    pub fail_after: Option<Duration>,
    pub ready_file: Option<PathBuf>,
}

/// What is wrong with the settings.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("--{0} is missing (give it as a flag or in the --config file)")]
    Missing(&'static str),
    #[error("--queues must be 1 to 256, not {0}")]
    Queues(u16),
    #[error("--spin-us must be at most 1000, not {0}")]
    Spin(u64),
    #[error("--serial must be at most 20 bytes, not {0}")]
    Serial(usize),
    #[error("--fd {0} is not a descriptor given to this process")]
    Fd(i32),
    #[error("--socket-mode must be octal, 0 to 777, such as 0660; not {0:?}")]
    SocketMode(String),
    #[error("--socket-group: {0}")]
    SocketGroup(String),
    #[error("--disk must be VOLUME=SOCKET, not {0:?}")]
    Disk(String),
    #[error("--disk has {0:?} twice")]
    Twice(String),
    #[error("--disk is given {0} times; one process serves {DISKS_MAX} disks at most")]
    TooMany(usize),
    #[error("--disk takes the place of --{0}: give one of them")]
    DiskAnd(&'static str),
    #[error("--mds: {0}")]
    Mds(#[from] NotAnAddress),
}

/// Bytes of a virtio disk's serial number.
const SERIAL_BYTES: usize = 20;
/// A few times what it takes to wake a core that sleeps (docs/performance.md): longer waits are better slept through.
const SPIN_US: u64 = 100;

impl Args {
    /// These flags over the settings of a file.
    pub fn or(self, mut file: Self) -> Self {
        // Which disks there are is one setting, however it is given.
        if !self.disk.is_empty() {
            (file.volume, file.socket_path, file.serial) = (None, None, None);
        } else if self.volume.is_some() || self.socket_path.is_some() || self.fd.is_some() {
            file.disk.clear();
        }
        Self {
            config: self.config,
            socket_path: if self.fd.is_some() { None } else { self.socket_path.or(file.socket_path) },
            fd: self.fd,
            socket_mode: self.socket_mode.or(file.socket_mode),
            socket_group: self.socket_group.or(file.socket_group),
            volume: self.volume.or(file.volume),
            disk: if self.disk.is_empty() { file.disk } else { self.disk },
            mds: if self.mds.is_empty() { file.mds } else { self.mds },
            state_dir: self.state_dir.or(file.state_dir),
            takeover: self.takeover || file.takeover,
            read_only: self.read_only || file.read_only,
            serial: self.serial.or(file.serial),
            queues: self.queues.or(file.queues),
            spin_us: self.spin_us.or(file.spin_us),
            fail_after_s: self.fail_after_s.or(file.fail_after_s),
            ready_file: self.ready_file.or(file.ready_file),
            print_capabilities: self.print_capabilities,
        }
    }

    pub fn check(self) -> Result<Config, ConfigError> {
        let disks = self.disks()?;
        if self.mds.is_empty() {
            return Err(ConfigError::Missing("mds"));
        }
        let mds = mds_addresses(&self.mds)?;
        let queues = self.queues.unwrap_or(256);
        if !(1..=256).contains(&queues) {
            return Err(ConfigError::Queues(queues));
        }
        let spin_us = self.spin_us.unwrap_or(SPIN_US);
        if spin_us > 1000 {
            return Err(ConfigError::Spin(spin_us));
        }
        Ok(Config {
            disks,
            lists_disks: !self.disk.is_empty(),
            access: self.access()?,
            mds,
            state_dir: self.state_dir,
            takeover: self.takeover,
            read_only: self.read_only,
            queues,
            spin: Duration::from_micros(spin_us),
            fail_after: self.fail_after_s.filter(|&s| s > 0).map(Duration::from_secs),
            ready_file: self.ready_file,
        })
    }

    fn access(&self) -> Result<SocketAccess, ConfigError> {
        let mut access = SocketAccess::default();
        if let Some(text) = &self.socket_mode {
            let mode = u32::from_str_radix(text, 8).ok().filter(|&mode| mode <= 0o777);
            access.mode = mode.ok_or_else(|| ConfigError::SocketMode(text.clone()))?;
        }
        if let Some(text) = &self.socket_group {
            access.group = Some(group_of(text).map_err(ConfigError::SocketGroup)?);
        }
        Ok(access)
    }

    fn disks(&self) -> Result<Vec<Disk>, ConfigError> {
        if self.disk.is_empty() {
            return self.only_disk().map(|disk| vec![disk]);
        }
        for (flag, given) in [
            ("volume", self.volume.is_some()),
            ("socket-path", self.socket_path.is_some()),
            ("fd", self.fd.is_some()),
            ("serial", self.serial.is_some()),
        ] {
            if given {
                return Err(ConfigError::DiskAnd(flag));
            }
        }
        if self.disk.len() > DISKS_MAX {
            return Err(ConfigError::TooMany(self.disk.len()));
        }
        let mut disks: Vec<Disk> = Vec::new();
        for text in &self.disk {
            let parts = text.split_once('=').filter(|(volume, path)| !volume.is_empty() && !path.is_empty());
            let (volume, path) = parts.ok_or_else(|| ConfigError::Disk(text.clone()))?;
            let socket = Socket::Listen(path.into());
            if disks.iter().any(|disk| disk.volume == volume) {
                return Err(ConfigError::Twice(volume.to_owned()));
            }
            if disks.iter().any(|disk| disk.socket == socket) {
                return Err(ConfigError::Twice(path.to_owned()));
            }
            disks.push(Disk { volume: volume.to_owned(), socket, serial: serial_of(volume) });
        }
        Ok(disks)
    }

    fn only_disk(&self) -> Result<Disk, ConfigError> {
        let socket = match (self.fd, &self.socket_path) {
            (Some(fd), _) if fd > 2 => Socket::Connected(fd),
            (Some(fd), _) => return Err(ConfigError::Fd(fd)),
            (None, Some(path)) => Socket::Listen(path.clone()),
            (None, None) => return Err(ConfigError::Missing("socket-path")),
        };
        let volume = self.volume.clone().ok_or(ConfigError::Missing("volume"))?;
        let serial = match &self.serial {
            Some(serial) if serial.len() > SERIAL_BYTES => return Err(ConfigError::Serial(serial.len())),
            Some(serial) => serial.clone(),
            None => serial_of(&volume),
        };
        Ok(Disk { volume, socket, serial })
    }
}

/// A long volume name keeps its end, where names usually differ.
fn serial_of(volume: &str) -> String {
    let fits = |&at: &usize| volume.is_char_boundary(at) && volume.len() - at <= SERIAL_BYTES;
    let from = (0..=volume.len()).find(fits);
    volume[from.unwrap_or(volume.len())..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::{Args, CAPABILITIES, ConfigError, DISKS_MAX, Socket, SocketAccess};

    fn args() -> Args {
        Args {
            socket_path: Some("/s".into()),
            volume: Some("vm".into()),
            mds: vec!["127.0.0.1:1".into()],
            ..Args::default()
        }
    }

    #[test]
    fn bad_settings_are_named() {
        for (args, error) in [
            (Args { socket_path: None, ..args() }, ConfigError::Missing("socket-path")),
            (Args { volume: None, ..args() }, ConfigError::Missing("volume")),
            (Args { mds: vec![], ..args() }, ConfigError::Missing("mds")),
            (Args { queues: Some(0), ..args() }, ConfigError::Queues(0)),
            (Args { queues: Some(257), ..args() }, ConfigError::Queues(257)),
            (Args { serial: Some("x".repeat(21)), ..args() }, ConfigError::Serial(21)),
            (Args { fd: Some(1), ..args() }, ConfigError::Fd(1)),
            (Args { socket_mode: Some("1000".into()), ..args() }, ConfigError::SocketMode("1000".into())),
            (Args { socket_mode: Some("0x6".into()), ..args() }, ConfigError::SocketMode("0x6".into())),
            (
                Args { socket_group: Some("nobody here".into()), ..args() },
                ConfigError::SocketGroup("there is no group \"nobody here\"".into()),
            ),
        ] {
            assert_eq!(args.check().unwrap_err(), error);
        }
    }

    #[test]
    fn several_disks_are_given_by_name_and_socket() {
        let of = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let disks = |texts: &[&str]| Args { disk: of(texts), mds: args().mds, ..Args::default() };
        let config = disks(&["a=/a", "b=/b=c"]).check().expect("good");
        assert_eq!((config.disks.len(), &config.disks[1].socket), (2, &Socket::Listen("/b=c".into())));
        let many: Vec<_> = (0..=DISKS_MAX).map(|n| format!("{n}=/{n}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        assert!(disks(&many[1..]).check().is_ok());
        for (args, error) in [
            (disks(&many), ConfigError::TooMany(DISKS_MAX + 1)),
            (disks(&["a"]), ConfigError::Disk("a".into())),
            (disks(&["=/a"]), ConfigError::Disk("=/a".into())),
            (disks(&["a=/a", "a=/b"]), ConfigError::Twice("a".into())),
            (disks(&["a=/a", "b=/a"]), ConfigError::Twice("/a".into())),
            (Args { disk: of(&["a=/a"]), ..args() }, ConfigError::DiskAnd("volume")),
        ] {
            assert_eq!(args.check().unwrap_err(), error);
        }
        // The flags say which disks there are, the file the rest.
        assert_eq!(disks(&["a=/a"]).or(args()).check().expect("good").disks[0].volume, "a");
        assert_eq!(args().or(disks(&["a=/a"])).check().expect("good").disks[0].volume, "vm");
    }

    #[test]
    fn the_serial_is_the_end_of_the_volumes_name() {
        let config =
            Args { volume: Some("a-very-long-volume-name-01".into()), ..args() }.check().expect("good");
        assert_eq!(config.disks[0].serial, "-long-volume-name-01");
    }

    #[test]
    fn the_sockets_mode_is_octal_and_its_group_a_name_or_a_number() {
        let access = |mode: &str, group: &str| {
            let args = Args { socket_mode: Some(mode.into()), socket_group: Some(group.into()), ..args() };
            args.check().expect("good").access
        };
        assert_eq!(args().check().expect("good").access, SocketAccess::default());
        assert_eq!(access("0660", "root"), SocketAccess { mode: 0o660, group: Some(0) });
        assert_eq!(access("666", "36"), SocketAccess { mode: 0o666, group: Some(36) });
    }

    #[test]
    fn a_descriptor_wins_over_a_path() {
        let config = Args { fd: Some(7), ..Args::default() }.or(args()).check().expect("good");
        assert_eq!(config.disks[0].socket, Socket::Connected(7));
        assert!(serde_json::from_str::<serde_json::Value>(CAPABILITIES).is_ok());
    }
}
