//! A virtual machine's disk: virtqueue in, cluster requests out.

pub mod backing;
pub mod device;
pub mod io_thread;
pub mod volume;
