//! The words all Evolute programs share, how they look as bytes, and how they travel.
//!
//! - [`id`], [`epoch`], [`geometry`]: names, the fencing number, sizes.
//! - [`checksum`]: the crc32c that travels with every piece of data from the guest to the disk.
//! - [`mds_addresses()`]: the control plane's addresses, as people give them.
//! - [`wire`]: the data path's frames; pure: bytes in, values out.
//! - [`rpc`]: the control plane's services, generated from `proto/`; kept apart from [`wire`].
//!
//! Nothing here opens a socket or a file.

pub mod bounds;
pub mod checksum;
pub mod epoch;
pub mod geometry;
pub mod id;
mod mds_addresses;
pub mod rpc;
pub mod wire;

pub use mds_addresses::{NotAnAddress, mds_addresses};
