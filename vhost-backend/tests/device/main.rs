//! The guest edge over its real socket: a front end made of the `vhost` crate's messages, rings in shared memory driven by
//! hand, and a backing that records and can be held back.

#![expect(clippy::cast_possible_truncation, reason = "lengths and indexes are the tests' own, and small")]

mod callers;
mod chains;
mod cut_off;
mod disk;
mod front_end;
mod messages;
mod pausing;
mod replay;
mod sharing;
mod sizing;
mod stopping;
