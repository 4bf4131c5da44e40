//! The control plane (MDS): who has what.
//!
//! ```text
//!  clients ──▶ api ──propose──▶ raft ──apply──▶ state        what the cluster agreed on
//!               │                                 │
//!  chunkservers ┴─ heartbeat (reports, orders) ◀──┤
//!                                 │               │
//!               health ◀──────────┼── placement ◀─┴── scheduler, run by steward
//! ```
//!
//! What always holds:
//!
//! - Everything that must survive is a command in the log; everything else is said again by the chunkservers.
//! - It is never on the path of an I/O to allocated space. With no MDS at all, attached disks go on.
//! - Decisions are plain functions of the state and the reports; only `api`, `raft` and `steward` wait for anything.
//!
//! It does not know what a chunk holds, what a guest is, or how replicas agree among themselves.
//!
//! Start at [`mds::Server`], [`state::State::apply`], [`scheduler::plan`].

pub mod adopt;
mod api;
pub mod config;
pub mod health;
pub mod heartbeat;
pub mod mds;
pub mod placement;
mod port;
pub mod raft;
pub mod scheduler;
pub mod standing;
pub mod state;
mod steward;
