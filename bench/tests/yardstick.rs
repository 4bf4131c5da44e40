//! `evolute-bench` on qemu-storage-daemon alone: loads that follow a write, of a system without chunkservers.
//!
//! Where that program is not installed the test says so and passes: `make deps` installs it.

use std::process::Command;

use evolute_bench::runner::results::Results;

#[test]
fn every_load_on_the_yardstick_is_measured() {
    if Command::new("qemu-storage-daemon").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-storage-daemon is not installed");
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("results.jsonl");
    let loads = ["randread-4k-qd32", "randwrite-4k-qd32", "randrw70-4k-qd32"];
    let ended = Command::new(env!("CARGO_BIN_EXE_evolute-bench"))
        .args(["--store", "tmpfs", "--system", "qsd", "--size", "16M", "--seconds", "0.2", "--out"])
        .arg(&out)
        .args(loads.iter().flat_map(|load| ["--work", load]))
        .output()
        .expect("evolute-bench runs");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let text = std::fs::read_to_string(&out).expect("results");
    let rows = Results::parse(&text).expect("ours").rows;
    let measured: Vec<&str> = rows.iter().map(|row| row.work.as_str()).collect();
    assert_eq!(measured, loads);
}
