//! The MDS from outside: real sockets on loopback, real directories, chunkservers that only talk.

mod bad_input;
mod heartbeat;
mod put_back;
mod registration;
mod repair;
mod restart;
mod support;
mod volumes;
