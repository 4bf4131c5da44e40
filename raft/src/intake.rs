//! Whether entries may be taken now: not while this process has no place to put them.
//!
//! A follower on a full disk would otherwise take everything, because nothing it takes is refused: its log cannot be
//! recycled before the owner's checkpoint, which waits for space, and the owner's memory holds what it applied. So
//! appends with entries are held back, and refused when that lasts. Its leader tries again by and by, from the log or, when
//! that is gone, with a raft snapshot; the others are a majority meanwhile. Appends without entries, votes and everything
//! else go on: a replica that takes nothing still knows its leader, and a group that takes nothing still elects one.
//!
//! Two say when: the log, which must have a file for what it is given (a quarter of the last one is kept for votes and
//! marks), and the owner ([`crate::Node::admit`]).

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use crate::log::Log;

/// How long an append waits for room before it is refused: a checkpoint that is merely slow holds the leader up, and does
/// not make it begin anew. Short of the silence after which a leader gives up on a session.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(20);

type Admits = Rc<dyn Fn(u64) -> bool>;

/// One per thread: its groups share the log and the owner's memory.
pub(crate) struct Intake {
    log: Log,
    admits: RefCell<Option<Admits>>,
    /// Of appends and proposals that were let in and are not answered yet.
    bytes: Cell<u64>,
}

/// Something that was let in. Dropped when it is answered.
pub(crate) struct Taken {
    intake: Rc<Intake>,
    bytes: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.intake.bytes.set(self.intake.bytes.get() - self.bytes);
    }
}

impl Intake {
    pub fn new(log: Log) -> Rc<Self> {
        Rc::new(Self { log, admits: RefCell::default(), bytes: Cell::default() })
    }

    pub fn ask(&self, admits: impl Fn(u64) -> bool + 'static) {
        *self.admits.borrow_mut() = Some(Rc::new(admits));
    }

    /// Lets in a proposal of this process's own. How much of those the owner wants, it knows itself.
    pub fn propose(self: &Rc<Self>, bytes: u64) -> Option<Taken> {
        let after = self.bytes.get() + bytes;
        self.log.has_room(after).then(|| self.taken(bytes))
    }

    /// Lets in entries of a leader, if there is room for them.
    fn append(self: &Rc<Self>, bytes: u64) -> Option<Taken> {
        let after = self.bytes.get() + bytes;
        let admits = self.admits.borrow().clone();
        let room = self.log.has_room(after) && admits.is_none_or(|admits| admits(after));
        room.then(|| self.taken(bytes))
    }

    /// The same, waiting for room; nothing needs none. `None`: there was none for [`PATIENCE`]. Cancel-safe.
    pub async fn wait(self: &Rc<Self>, bytes: u64) -> Option<Taken> {
        let begun = Instant::now();
        loop {
            let taken = if bytes == 0 { Some(self.taken(0)) } else { self.append(bytes) };
            if let Some(taken) = taken {
                return Some(taken);
            }
            if begun.elapsed() >= PATIENCE {
                return None;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn taken(self: &Rc<Self>, bytes: u64) -> Taken {
        self.bytes.set(self.bytes.get() + bytes);
        Taken { intake: self.clone(), bytes }
    }
}
