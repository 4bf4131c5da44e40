//! The guest's right to exactly one answer.
//!
//! A [`Completion`] is made when a head leaves the avail ring and spent when its answer is ready for the used ring. A
//! lost one hangs a process in the guest for ever, so dropping it unspent is a bug in this program, and says so.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use super::chain::{Buffer, Chain};
use super::memory::{DirtyLog, Memory};
use super::request::{STATUS_IOERR, STATUS_OK};
use crate::backing::{Outcome, Request};

/// What goes into the used ring.
#[must_use = "the guest waits for it"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    /// Bytes written from the start of the writable part.
    pub len: u32,
}

/// See the module. Three ways to spend it: [`finish`](Completion::finish), [`answer`](Completion::answer), and
/// [`abandon`](Completion::abandon) once its ring is gone.
#[must_use = "the guest waits for an answer"]
#[derive(Debug)]
pub struct Completion {
    queue: u16,
    head: u16,
    /// Where the status goes; none if the chain has no place for it.
    status_at: Option<u64>,
    /// Where a read's data go.
    data: SmallVec<[Buffer; 2]>,
    /// The memory these addresses were checked in; kept mapped until the answer.
    memory: Arc<Memory>,
    spent: bool,
}

impl Completion {
    /// For the head just taken, after its chain was walked and parsed (or refused).
    pub fn new(queue: u16, head: u16, chain: &Chain, memory: &Arc<Memory>) -> Completion {
        Completion {
            queue,
            head,
            status_at: chain.status_at,
            data: SmallVec::from_slice(&chain.writable),
            memory: memory.clone(),
            spent: false,
        }
    }

    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// The backing's outcome. `asked` is the length of a read, 0 for everything else.
    pub fn finish(self, outcome: Outcome, asked: u32, log: Option<&DirtyLog>) -> Used {
        match outcome {
            Outcome::Done => {
                assert!(asked == 0, "a read of {asked} bytes was answered without data");
                self.answer(STATUS_OK, log)
            }
            Outcome::Data(pieces) => {
                let got: usize = pieces.iter().map(Bytes::len).sum();
                assert!(got == asked as usize, "a read of {asked} bytes was answered with {got}");
                match self.write_data(&pieces, log) {
                    true => self.answer_with(STATUS_OK, asked, log),
                    false => self.answer(STATUS_IOERR, log),
                }
            }
            Outcome::Failed(_) => self.answer(STATUS_IOERR, log),
        }
    }

    /// A status and nothing else.
    pub fn answer(self, status: u8, log: Option<&DirtyLog>) -> Used {
        self.answer_with(status, 0, log)
    }

    /// A status after data of our own, as much of it as the guest has room for.
    pub fn answer_with_bytes(self, bytes: &[u8], log: Option<&DirtyLog>) -> Used {
        let room: usize = self.data.iter().map(|b| b.len as usize).sum();
        let piece = Bytes::copy_from_slice(&bytes[..room.min(bytes.len())]);
        let len = u32::try_from(piece.len()).expect("a serial number");
        match self.write_data(&[piece], log) {
            true => self.answer_with(STATUS_OK, len, log),
            false => self.answer(STATUS_IOERR, log),
        }
    }

    /// No answer: the ring is gone, or its request stays recorded as in flight and is done again. Guest memory is
    /// not touched, now or later.
    pub fn abandon(mut self) {
        self.spent = true;
    }

    fn answer_with(mut self, status: u8, data_len: u32, log: Option<&DirtyLog>) -> Used {
        self.spent = true;
        let Some(at) = self.status_at else { return Used { head: self.head, len: 0 } };
        // It was there when we walked the chain, and this snapshot keeps it mapped.
        self.memory.write(at, &[status]).expect("checked when the chain was walked");
        if let Some(log) = log {
            log.mark(at, 1);
        }
        Used { head: self.head, len: data_len + 1 }
    }

    /// False: the pieces do not fit.
    fn write_data(&self, pieces: &[Bytes], log: Option<&DirtyLog>) -> bool {
        let mut buffers = self.data.iter().copied();
        let mut into = Buffer { addr: 0, len: 0 };
        for piece in pieces {
            let mut rest: &[u8] = piece;
            while !rest.is_empty() {
                if into.len == 0 {
                    let Some(next) = buffers.next() else { return false };
                    into = next;
                }
                let n = rest.len().min(into.len as usize);
                let (now, later) = rest.split_at(n);
                self.memory.write(into.addr, now).expect("checked when the chain was walked");
                if let Some(log) = log {
                    log.mark(into.addr, n as u64);
                }
                rest = later;
                into.addr += n as u64;
                into.len -= u32::try_from(n).expect("at most into.len");
            }
        }
        true
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        assert!(
            self.spent || std::thread::panicking(),
            "request {} of queue {} was dropped without an answer",
            self.head,
            self.queue
        );
    }
}

/// How long a read is, as `finish` wants to know it.
pub fn asked(request: &Request) -> u32 {
    match request {
        Request::Read { len, .. } => *len,
        _ => 0,
    }
}
