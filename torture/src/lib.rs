//! The proof under faults: believe nobody, run it.
//!
//! ```text
//!  blkcheck (workload) ──▶ driver (rings, vhost-user, reconnect) ──▶ any vhost-user-blk server
//!      │ every op, every sector read                                  ▲ killed, stopped, cut off, cut from power
//!      ▼                                                              │
//!  history ──▶ register (pure: is this a register?)           supervisor (seeded schedule)
//! ```
//!
//! - [`content`]: what is written names its writer, so that what is read can be judged.
//! - [`register`]: the exact per-sector check, a pure function.
//! - [`history`]: what was asked and answered in one round, and its check.
//! - [`driver`]: a guest's driver over the real socket, which survives its backend as QEMU does.
//! - [`blkcheck`]: the load, its rounds, its report. The program `blkcheck` is its command line.
//! - [`supervisor`]: a cluster of real processes, faults by seed, the coverage gate. The program `torture`.
//! - [`sheet`]: what several runs together say. `torture report`.
//!
//! What always holds: a run says `pass` only if every check was made, nothing was undecided and every listed fault
//! happened; it says `fail` only with a violation one can read; everything else is `unknown`. Programs under test
//! are started as an operator does, and nothing of them is linked in.

pub mod blkcheck;
pub mod content;
pub mod driver;
pub mod history;
pub mod random;
pub mod register;
pub mod sheet;
pub mod supervisor;
