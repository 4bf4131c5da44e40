//! A cluster of real processes, broken by a seed under a checked load.
//!
//! ```text
//!  schedule (seed) ─▶ inject ─▶ … ─▶ heal      every --round: heal all ─▶ wait whole ─▶ check all ─▶ go on
//!                        │                      at the end: the same, through each leader, without each chunkserver,
//!                                               and what each one's files hold
//!                        ▼
//!   processes, networks, disks, requests       the load goes on all the time, on its own thread
//! ```
//!
//! What always holds: nothing inside the programs helps with a fault; every fault is recorded with the moment it began
//! and was healed, on the load's clock; a fault that was listed and did not happen, or does not count
//! ([`coverage`]), makes the result unknown; whatever was started, mounted or made is taken away, except the folder of
//! a failed run.
//!
//! Start at [`supervise::run`].

pub mod about;
mod acks;
mod active;
mod cluster;
mod course;
pub mod coverage;
mod disk;
pub mod fault;
mod image;
mod last_checks;
mod leaders;
mod network;
mod no_descriptors;
mod offline;
mod operator;
pub mod options;
mod process;
mod proxy;
mod put_back;
mod put_back_mds;
mod recorder;
mod replay;
pub mod report;
pub mod supervise;
mod takeover;
mod unread_log;
mod windows;
mod wrong_mds;
