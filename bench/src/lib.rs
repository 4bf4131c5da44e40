//! Questions about speed, and the guest-free vhost-user front end that asks them.
//!
//! - [`front_end`]: drives a vhost-user-blk server as a guest's driver would, without a guest: load, latency,
//!   verification. The program `vublk-bench` is its command line.
//! - [`runner`]: what `make bench` runs: Evolute and qemu-storage-daemon on the same machine in the same minutes,
//!   turn by turn, and what only a cluster of its own can answer. The program is `evolute-bench`.
//! - [`report`]: tables and plots for docs/performance.md, from what the runner wrote.
//! - [`profile`]: what `make bench-profile` runs: where each µs of a load goes, per process.
//!
//! Evolute is started as processes, as an operator would; nothing of it is linked in.

pub mod front_end;
pub mod profile;
pub mod report;
pub mod runner;
