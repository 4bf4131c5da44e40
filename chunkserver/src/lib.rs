//! Stores replicas of chunks on one disk.
//!
//! In the order data flows: `server` takes requests from sockets, [`copyset`] makes them entries of a Raft group's
//! log and applies them, [`chunk_store`] keeps the bytes, [`disk`] is the only one to open chunk files. [`shard`] is
//! the thread all of that lives on; [`heartbeat`] talks to the control plane from another one. [`inspect`] reads the files
//! of a chunkserver that does not run.
//!
//! Start at [`shard`].

pub mod addresses;
mod checkpoint;
pub mod chunk_store;
pub mod config;
pub mod copyset;
pub mod data_dir;
pub mod disk;
mod handover;
pub mod heartbeat;
pub mod impossible;
pub mod inspect;
pub mod loopback;
pub mod mds_memory;
mod neighbours;
pub mod others;
pub mod recall;
pub mod scrub;
mod server;
pub mod shard;
mod slow_disk;
