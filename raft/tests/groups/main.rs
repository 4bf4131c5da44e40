//! What groups promise, checked with processes of several threads over real sockets, logs and files.

mod cluster;
mod forged;
mod members;
mod processes;
mod sleep;
mod snapshots;
mod space;
mod succession;
