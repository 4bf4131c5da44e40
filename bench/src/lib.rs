//! Questions about speed, and the guest-free vhost-user front end that asks them.
//!
//! - [`front_end`]: drives a vhost-user-blk server as a guest's driver would, without a guest: load, latency,
//!   verification. The program `vublk-bench` is its command line.
//! - [`runner`]: what `make bench` runs: Evolute and qemu-storage-daemon on the same machine in the same minutes,
//!   turn by turn. The program is `evolute-bench`.
//!
//! Both start Evolute as processes, as an operator would; nothing of Evolute is linked in.

pub mod front_end;
pub mod runner;
