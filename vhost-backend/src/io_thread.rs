//! The I/O thread.

use std::io;
use std::sync::Arc;

/// Wakes the I/O thread from any thread: the backing's [`on_wake`](crate::backing::Backing::on_wake) runs soon after.
#[derive(Clone, Debug)]
pub struct WakerHandle(Arc<mio::Waker>);

impl WakerHandle {
    pub(crate) fn new(registry: &mio::Registry, token: mio::Token) -> io::Result<WakerHandle> {
        Ok(WakerHandle(Arc::new(mio::Waker::new(registry, token)?)))
    }

    /// Cheap, callable from any thread; several calls before the loop turns count as one.
    pub fn wake(&self) {
        // An eventfd can only fail to be written when its counter is full, and then the loop wakes anyway.
        let _ = self.0.wake();
    }
}
