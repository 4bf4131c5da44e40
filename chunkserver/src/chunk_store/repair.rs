//! Puts a block that is not what it should be right again, with what other replicas hold.
//!
//! Asking takes a while, and the chunk lives on meanwhile: a change that comes in between is newer than the answer, so
//! the answer is not used then. The block goes into the overlay like a write, but through the rescue file when it is
//! drained, because no log entry holds it.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;
use evolute_protocol::checksum::crc32c;
use evolute_protocol::id::{BlockIndex, ChunkKey, CopysetId};

use super::block::{Block, BlockData, ZEROES};
use super::format::BLOCK;
use super::shard::Shard;
use super::watch::Watch;

/// Watches one block from before another replica is asked for it. One at a time for each block.
pub struct Repair {
    shard: Rc<RefCell<Shard>>,
    copyset: CopysetId,
    chunk: ChunkKey,
    block: BlockIndex,
    watch: Watch,
}

impl Repair {
    /// `None`: somebody is at it already.
    pub fn begin(
        shard: Rc<RefCell<Shard>>,
        copyset: CopysetId,
        chunk: ChunkKey,
        block: BlockIndex,
    ) -> Option<Self> {
        let watch = {
            let mut shard = shard.borrow_mut();
            if !shard.repairs.insert((chunk, block.0)) {
                return None;
            }
            let block_bytes = u32::try_from(BLOCK).expect("4096");
            shard.watch(chunk, u32::from(block.0) * block_bytes, block_bytes)
        };
        Some(Self { shard, copyset, chunk, block, watch })
    }

    /// Nothing has changed the block since the beginning.
    pub fn is_untouched(&self) -> bool {
        self.watch.is_untouched(self.block)
    }

    /// The block is `data`, as of everything applied until now. False: it was changed since the beginning.
    pub fn finish(self, data: Bytes) -> bool {
        assert_eq!(data.len(), BLOCK, "a whole block");
        let shard = &mut *self.shard.borrow_mut();
        if !self.is_untouched() || !shard.admissions.contains_key(&self.copyset) {
            return false;
        }
        let owner = shard.owner(self.copyset);
        let state = if data == ZEROES[..BLOCK] {
            Block::Zero
        } else {
            let crc = crc32c(&data);
            Block::Full { data: BlockData::new(data, 0, crc), assembled: true }
        };
        // Whoever else looks at this block must know that it is another one now.
        let offset = u32::from(self.block.0) * u32::try_from(BLOCK).expect("4096");
        shard.changed(self.chunk, offset, u32::try_from(BLOCK).expect("4096"));
        shard.active.put_block(self.chunk, || owner, self.block.0, state);
        true
    }
}

impl Drop for Repair {
    fn drop(&mut self) {
        self.shard.borrow_mut().repairs.remove(&(self.chunk, self.block.0));
    }
}
