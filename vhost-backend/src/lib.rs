//! A virtual machine's disk: virtqueue in, cluster requests out.
//!
//! In the order data flows: [`device`] takes requests out of the guest's rings and answers them; [`backing`] is the border
//! it hands them over; [`volume`] sends each piece to the chunkserver that leads it, over [`connections`]. [`io_thread`] is
//! the one thread all of that happens on, for every disk of the process.
//!
//! `device` never names a chunk; `volume` never names a descriptor.

pub mod backing;
pub mod config;
pub mod connections;
pub mod device;
pub mod io_thread;
mod spin;
pub mod volume;
mod wait;
