//! A thread that writes, for hosts without io_uring. Two thread switches dearer per batch, otherwise the same.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};

use super::{Completion, Device, Write};

pub struct Writer {
    writes: Option<mpsc::Sender<Started>>,
    done: Arc<Done>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Done {
    completed: Mutex<Vec<Completion>>,
    changed: Condvar,
}

impl Done {
    fn lock(&self) -> MutexGuard<'_, Vec<Completion>> {
        self.completed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Started(Write);

// SAFETY: `Device::submit` demands that bytes and file outlive the write, on whatever thread it happens.
unsafe impl Send for Started {}

impl Writer {
    pub fn new(event: OwnedFd) -> io::Result<Self> {
        let (writes, started) = mpsc::channel::<Started>();
        let done = Arc::new(Done::default());
        let reporting = done.clone();
        let event = File::from(event);
        let thread = std::thread::Builder::new().name("raft-log".to_owned()).spawn(move || {
            while let Ok(Started(write)) = started.recv() {
                // SAFETY: as above.
                let outcome = unsafe { write_all(&write) };
                reporting.lock().push(Completion { token: write.token, outcome });
                reporting.changed.notify_all();
                // Can fail only when the counter is full, and then the reader is woken already.
                let _ = rustix::io::write(&event, &1_u64.to_ne_bytes());
            }
        })?;
        Ok(Self { writes: Some(writes), done, thread: Some(thread) })
    }
}

/// Writes, and waits for it.
///
/// # Safety
/// Bytes and file are alive and unchanged meanwhile.
pub unsafe fn write_all(write: &Write) -> io::Result<usize> {
    // SAFETY: the caller's word.
    let (bytes, file) = unsafe {
        (std::slice::from_raw_parts(write.start, write.length), BorrowedFd::borrow_raw(write.file))
    };
    loop {
        match rustix::io::pwrite(file, bytes, write.offset) {
            Err(rustix::io::Errno::INTR) => {}
            outcome => return Ok(outcome?),
        }
    }
}

impl Device for Writer {
    unsafe fn submit(&mut self, write: Write) -> io::Result<()> {
        let writes = self.writes.as_ref().expect("present until dropped");
        writes.send(Started(write)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn reap(&mut self, completed: &mut Vec<Completion>) {
        completed.append(&mut self.done.lock());
    }

    fn wait(&mut self) -> io::Result<()> {
        let done = self.done.lock();
        drop(
            self.done
                .changed
                .wait_while(done, |done| done.is_empty())
                .unwrap_or_else(PoisonError::into_inner),
        );
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.writes = None;
        if let Some(thread) = self.thread.take() {
            // Its only panic would be an allocation failure, and the process is gone then.
            let _ = thread.join();
        }
    }
}
