//! What an operator copies from deploy/ works: the configurations load with the programs' own types, and the other files
//! name programs and paths that exist.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser as _;
use evolute_daemon::read_config;

fn deploy(name: &str) -> PathBuf {
    // cargo runs tests in their package's folder. The one it was built in may be another clone's, which shares our build output.
    Path::new("../deploy").join(name)
}

#[test]
fn the_control_planes_configuration_is_complete() {
    use evolute_control_plane::config::{Args, FileConfig};
    let file: FileConfig = read_config(&deploy("mds.toml")).expect("valid");
    let config = Args::parse_from(["evolute-mds"]).over(file).expect("complete");
    assert_eq!(config.data_dir, Path::new("/var/lib/evolute/mds"));
    assert!(config.existing, "a machine whose disk is not mounted founds no new cluster");
}

#[test]
fn a_chunkservers_configuration_is_complete() {
    use evolute_chunkserver::config::Args;
    let file: Args = read_config(&deploy("chunkserver.toml")).expect("valid");
    let config = Args::parse_from(["evolute-chunkserver"]).or(file).check().expect("complete");
    assert_eq!(config.data_dir, Path::new("/srv/evolute/disk1"));
    assert!(config.existing, "a machine whose disk is not mounted makes no new chunkserver");
}

#[test]
fn a_backends_configuration_is_complete() {
    use evolute_vhost_backend::config::Args;
    let file: Args = read_config(&deploy("vhost.toml")).expect("valid");
    let config = Args::parse_from(["evolute-vhost"]).or(file).check().expect("complete");
    assert_eq!(config.disks[0].volume, "vm1");
    // The unit's directories: /run/evolute is made by RuntimeDirectory, the state by StateDirectory.
    let unit = fs::read_to_string(deploy("systemd/evolute-vhost@.service")).expect("there");
    assert!(unit.contains("RuntimeDirectory=evolute\n") && unit.contains("evolute/vhost/%i\n"));
    assert_eq!(config.state_dir.as_deref(), Some(Path::new("/var/lib/evolute/vhost/vm1")));
}

#[test]
fn the_descriptor_is_what_qemu_asks_of_it() {
    let text = fs::read_to_string(deploy("50-evolute-vhost.json")).expect("there");
    let descriptor: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(descriptor["type"], "block");
    assert_eq!(descriptor["binary"], "/usr/bin/evolute-vhost");
    assert!(descriptor["description"].is_string());
}

#[test]
fn every_unit_is_sandboxed_and_starts_a_program_with_its_configuration() {
    for (unit, program) in [
        ("evolute-mds.service", "evolute-mds"),
        ("evolute-chunkserver@.service", "evolute-chunkserver"),
        ("evolute-vhost@.service", "evolute-vhost"),
    ] {
        let text = fs::read_to_string(deploy("systemd").join(unit)).expect("there");
        for line in [
            "NoNewPrivileges=yes",
            "ProtectSystem=strict",
            "SystemCallFilter=@system-service",
            "User=evolute",
        ] {
            assert!(text.lines().any(|l| l == line), "{unit} lacks {line}");
        }
        assert!(text.contains(&format!("ExecStart=/usr/bin/{program} --config /etc/evolute/")), "{unit}");
    }
}

#[test]
fn no_unit_is_ever_given_up_and_systemd_finds_nothing_wrong_with_any() {
    let Ok(_) = std::process::Command::new("systemd-analyze").arg("--version").output() else {
        eprintln!("skipped: no systemd-analyze here");
        return;
    };
    let dir = tempfile::tempdir().expect("temp dir");
    let mut units = Vec::new();
    for name in ["evolute-mds.service", "evolute-chunkserver@.service", "evolute-vhost@.service"] {
        let unit = fs::read_to_string(deploy("systemd").join(name)).expect("there");
        for key in ["StartLimitIntervalSec=0\n", "Type=notify\n", "TimeoutStartSec=infinity\n", "Restart="] {
            assert!(unit.contains(key), "{name} has no {key}");
        }
        // The programs are not installed here, and there is no such user.
        let unit = unit.replace("ExecStart=/usr/bin/evolute", "ExecStart=/bin/true /usr/bin/evolute");
        let unit = unit.replace("User=evolute\n", "");
        let path = dir.path().join(name.replace('@', "@x"));
        fs::write(&path, unit).expect("written");
        units.push(path);
    }
    let seen =
        std::process::Command::new("systemd-analyze").arg("verify").args(&units).output().expect("run");
    let words = String::from_utf8_lossy(&seen.stderr);
    let ours: Vec<_> = words.lines().filter(|line| line.contains("evolute")).collect();
    assert!(ours.is_empty(), "{ours:?}");
}
