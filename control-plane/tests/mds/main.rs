//! The MDS from outside: real sockets on loopback, real directories, chunkservers that only talk.

mod heartbeat;
mod support;
