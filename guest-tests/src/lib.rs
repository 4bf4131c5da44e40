//! Contracts, checked by real guests against a real cluster.
//!
//! Three nouns are enough to write any test here:
//!
//! - [`Guest`]: a Linux under QEMU whose disks are vhost-user sockets. It boots, runs commands, is switched off.
//! - [`Cluster`]: the real programs as real processes on loopback, in the folder of the test.
//! - [`fault`]: what happens to a process: killed, frozen, started again.
//!
//! [`story`] is the frame around a test: it gives the test the machine and a folder (the [`Scene`]), ends every
//! process it started, and on a failure prints where the logs are and how they end.
//!
//! ```text
//!  test ──▶ Cluster ──▶ evolute-mds, evolute-chunkserver ×3, evolute-vhost ──socket──┐
//!    └────▶ Guest ────▶ QEMU ◀────────────────────── vhost-user ─────────────────────┘
//!             │ ▲ second serial port: commands in, output and status out
//!             ▼ │
//!           agent (images/guest/agent)
//! ```
//!
//! It knows no crate of the programs it tests: only their flags, their ready files and the `evolute` tool.
//!
//! Start at [`story`] and any file in `tests/`.

mod accelerator;
mod agent;
mod cluster;
pub mod fault;
mod guest;
mod images;
mod process;
mod qmp;
mod scene;
mod tiny;
mod verify;
mod wait;

pub use agent::Output;
pub use cluster::Cluster;
pub use guest::{Background, Boot, Guest};
pub use images::Images;
pub use process::Process;
pub use scene::{Scene, demonstrate, story};
pub use tiny::{Memory, TinyGuest, Under};
pub use verify::{Verified, Verify, Verifying};
pub use wait::until;
