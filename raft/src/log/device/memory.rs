//! A file system in memory: a write is a copy, and done when the call returns. io_uring hands writes to such files to a
//! thread of its own, which costs two wake-ups and more than the copy.

use std::io;
use std::path::Path;

use super::writer::write_all;
use super::{Completion, Device, Write};

/// `statfs` says so of tmpfs and ramfs.
const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;

/// Whether what is in this directory is in memory.
pub fn is_in_memory(dir: &Path) -> io::Result<bool> {
    let kind = rustix::fs::statfs(dir)?.f_type;
    Ok([TMPFS, RAMFS].contains(&kind))
}

/// Writes at once.
#[derive(Default)]
pub struct Memory(Vec<Completion>);

impl Device for Memory {
    unsafe fn submit(&mut self, write: Write) -> io::Result<()> {
        // SAFETY: the caller keeps bytes and file alive until the completion is reaped, which is after this.
        let outcome = unsafe { write_all(&write) };
        self.0.push(Completion { token: write.token, outcome });
        Ok(())
    }

    fn reap(&mut self, completed: &mut Vec<Completion>) {
        completed.append(&mut self.0);
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }
}
