//! The data path's frames: header, checksum, length. Bytes in, values out; no I/O. Drawn in `docs/wire.md`.
//!
//! A connection begins with a [`Hello`](hello::Hello) and its answer. After that, on a client's connection, every
//! frame towards the chunkserver is a [`Request`](request::Request), every frame back a [`Reply`](reply::Reply).
//! Requests are sent in order; replies come in any order and carry the request's number.
//!
//! What always holds of a decoded value: it is of a version we speak, its header and fields have the right checksum,
//! its range lies inside one chunk in whole sectors, and it has one checksum per piece of its data. That the data
//! *matches* those checksums is asked of the value itself (`Write::damaged_piece`), since it costs time.

pub mod frame;
pub mod hello;
pub mod reply;
pub mod request;

pub use frame::{FrameReader, RequestId, WireError};
