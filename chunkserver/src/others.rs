//! What this chunkserver last heard of the others' disks, from the control plane.
//!
//! It stays true for as long as nothing else is heard, also while the control plane is away. Whoever was never heard
//! of is taken to be well: at worst a leader is handed to one that hands it on.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::Duration;

use evolute_protocol::id::ChunkserverId;

/// Why a disk should not lead while another can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Trouble {
    /// It has no room for a new chunk.
    pub full: bool,
    pub slow: bool,
}

/// What the control plane says at a time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Told {
    pub disks: BTreeMap<ChunkserverId, Trouble>,
    /// What a write of the log usually takes the others, if they made any.
    pub usual_write: Option<Duration>,
}

/// What was heard. Of the shard's thread.
#[derive(Debug, Default)]
pub struct Others {
    disks: RefCell<BTreeMap<ChunkserverId, Trouble>>,
    usual_write: Cell<Option<Duration>>,
}

impl Others {
    pub fn hear(&self, told: Told) {
        // Nobody writes, or the control plane has just begun to listen: what was usual still is.
        if told.usual_write.is_some() {
            self.usual_write.set(told.usual_write);
        }
        *self.disks.borrow_mut() = told.disks;
    }

    pub fn disk(&self, of: ChunkserverId) -> Trouble {
        self.disks.borrow().get(&of).copied().unwrap_or_default()
    }

    pub fn usual_write(&self) -> Option<Duration> {
        self.usual_write.get()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use evolute_protocol::id::ChunkserverId;

    use super::{Others, Told, Trouble};

    #[test]
    fn the_last_word_counts_and_silence_changes_nothing() {
        let (others, two) = (Others::default(), ChunkserverId(2));
        assert_eq!((others.disk(two), others.usual_write()), (Trouble::default(), None), "nothing was heard");
        let (full, usual) = (Trouble { full: true, slow: false }, Some(Duration::from_millis(3)));
        others.hear(Told { disks: BTreeMap::from([(two, full)]), usual_write: usual });
        assert_eq!((others.disk(two), others.usual_write()), (full, usual));
        others.hear(Told { disks: BTreeMap::from([(two, Trouble::default())]), usual_write: None });
        assert_eq!((others.disk(two), others.usual_write()), (Trouble::default(), usual));
    }
}
