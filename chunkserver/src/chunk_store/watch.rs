//! Whether blocks were changed while somebody looked at them, or asked another replica about them.

use std::cell::RefCell;
use std::ops::RangeInclusive;
use std::rc::{Rc, Weak};

use evolute_protocol::id::{BlockIndex, ChunkKey, VolumeId};

use super::overlay::block_of;
use super::shard::Shard;

/// Some blocks of one chunk, watched from the moment it is made until it is dropped.
pub struct Watch(Rc<Watched>);

pub struct Watched {
    chunk: ChunkKey,
    first: u16,
    /// One for each block.
    changed: RefCell<Vec<bool>>,
}

impl Watch {
    pub fn is_untouched(&self, block: BlockIndex) -> bool {
        !self.0.changed.borrow()[usize::from(block.0 - self.0.first)]
    }
}

impl Watched {
    fn blocks(&self) -> RangeInclusive<u16> {
        let count = u16::try_from(self.changed.borrow().len()).expect("at most 4096");
        self.first..=self.first + count - 1
    }

    fn change(&self, blocks: RangeInclusive<u16>) {
        let mine = self.blocks();
        let (first, last) = (*blocks.start().max(mine.start()), *blocks.end().min(mine.end()));
        for block in first..=last {
            self.changed.borrow_mut()[usize::from(block - self.first)] = true;
        }
    }
}

impl Shard {
    /// Watches a range that is not empty.
    pub fn watch(&mut self, chunk: ChunkKey, offset: u32, len: u32) -> Watch {
        let (first, last) = (block_of(offset as usize), block_of((offset + len - 1) as usize));
        let changed = RefCell::new(vec![false; usize::from(last - first) + 1]);
        let watched = Rc::new(Watched { chunk, first, changed });
        self.watches.retain(|other| other.strong_count() > 0);
        self.watches.push(Rc::downgrade(&watched));
        Watch(watched)
    }

    /// Blocks in this range are being changed. Costs nothing as long as nobody watches.
    pub fn changed(&mut self, chunk: ChunkKey, offset: u32, len: u32) {
        if self.watches.is_empty() || len == 0 {
            return;
        }
        let blocks = block_of(offset as usize)..=block_of((offset + len - 1) as usize);
        self.watched(|watched| watched.chunk == chunk).for_each(|watched| watched.change(blocks.clone()));
    }

    pub fn changed_volume(&mut self, volume: VolumeId) {
        self.watched(|watched| watched.chunk.volume == volume)
            .for_each(|watched| watched.change(watched.blocks()));
    }

    /// A whole replica was replaced: whatever was asked for is of another one.
    pub fn changed_all(&mut self) {
        self.watched(|_| true).for_each(|watched| watched.change(watched.blocks()));
    }

    fn watched(&self, these: impl Fn(&Watched) -> bool) -> impl Iterator<Item = Rc<Watched>> {
        self.watches.iter().filter_map(Weak::upgrade).filter(move |watched| these(watched))
    }
}
