//! Puts a block that cannot be read right again, with what another replica holds.
//!
//! Asking takes a while, and the chunk lives on meanwhile: a change that comes in between is newer than the answer, so
//! the answer is not used then. The block goes into the overlay like a write, but through the rescue file when it is
//! drained, because no log entry holds it.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;
use evolute_protocol::checksum::crc32c;
use evolute_protocol::id::{BlockIndex, ChunkKey, CopysetId, VolumeId};

use super::block::{Block, BlockData, ZEROES};
use super::format::BLOCK;
use super::overlay::block_of;
use super::shard::Shard;

/// Watches one block from before another replica is asked for it.
pub struct Repair {
    shard: Rc<RefCell<Shard>>,
    copyset: CopysetId,
    chunk: ChunkKey,
    block: u16,
}

impl Repair {
    /// `None`: somebody is at it already.
    pub fn begin(
        shard: Rc<RefCell<Shard>>,
        copyset: CopysetId,
        chunk: ChunkKey,
        block: BlockIndex,
    ) -> Option<Self> {
        {
            let repairs = &mut shard.borrow_mut().repairs;
            if repairs.contains_key(&(chunk, block.0)) {
                return None;
            }
            repairs.insert((chunk, block.0), false);
        }
        Some(Self { shard, copyset, chunk, block: block.0 })
    }

    /// The block is `data`, as of everything applied until now. False: it was changed since the beginning.
    pub fn finish(self, data: Bytes) -> bool {
        assert_eq!(data.len(), BLOCK, "a whole block");
        let shard = &mut *self.shard.borrow_mut();
        let changed = shard.repairs.get(&(self.chunk, self.block)) != Some(&false);
        if changed || !shard.admissions.contains_key(&self.copyset) {
            return false;
        }
        let owner = shard.owner(self.copyset);
        let state = if data == ZEROES[..BLOCK] {
            Block::Zero
        } else {
            let crc = crc32c(&data);
            Block::Full { data: BlockData::new(data, 0, crc), assembled: true }
        };
        shard.active.put_block(self.chunk, || owner, self.block, state);
        true
    }
}

impl Drop for Repair {
    fn drop(&mut self) {
        self.shard.borrow_mut().repairs.remove(&(self.chunk, self.block));
    }
}

impl Shard {
    /// Blocks in this range are being changed. Costs nothing as long as nothing is being repaired.
    pub fn changed(&mut self, chunk: ChunkKey, offset: u32, len: u32) {
        if self.repairs.is_empty() || len == 0 {
            return;
        }
        let blocks = block_of(offset as usize)..=block_of((offset + len - 1) as usize);
        for ((_, _), changed) in
            self.repairs.iter_mut().filter(|((of, block), _)| *of == chunk && blocks.contains(block))
        {
            *changed = true;
        }
    }

    pub fn changed_volume(&mut self, volume: VolumeId) {
        for ((_, _), changed) in self.repairs.iter_mut().filter(|((of, _), _)| of.volume == volume) {
            *changed = true;
        }
    }

    /// A whole replica was replaced: whatever was asked for is of another one.
    pub fn changed_all(&mut self) {
        self.repairs.values_mut().for_each(|changed| *changed = true);
    }
}
