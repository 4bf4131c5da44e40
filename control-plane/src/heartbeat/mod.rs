//! Reports in, orders out.
//!
//! ```text
//!  chunkserver ──Report──▶ [reports] ──▶ placement, schedulers, health
//!       ▲                                   │
//!       └────────── Orders ◀── [orders] ◀── state
//! ```
//!
//! The stream itself is in `api/chunkservers.rs`. Nothing here decides what should be; see `scheduler`.

pub mod group;
pub mod orders;
pub mod progress;
pub mod reports;
pub mod room;
