//! Where things go: chunkservers → copysets, copysets → volumes, chunks → copysets. Pure functions over values.
//!
//! - [`copysets`]: three chunkservers in three zones, replicas by capacity, first leaders evenly.
//! - [`volume`]: which copysets a volume spreads over.
//! - [`segment`]: which copyset each chunk of a new segment goes to.
//! - [`room`]: when a chunkserver is too full for anything new, and which copysets get it then.
//!
//! Nothing here knows a clock, a connection or who is alive: the caller passes only what may be used.

pub mod copysets;
pub mod room;
pub mod segment;
pub mod volume;
