//! A replica's chunks, read one after the other while it goes on living: what another replica begins with.
//!
//! The list of chunks is made at the beginning; what each holds is read when it is its turn, from memory and files,
//! and verified. So different blocks are as of different moments, each at or after the beginning. Whoever receives
//! them must apply the log from there: every change since is in it, and applying one again changes nothing.

use bytes::Bytes;
use evolute_protocol::checksum::crc32c;
use evolute_protocol::id::ChunkKey;

use super::block::ZEROES;
use super::error::ReadError;
use super::format::{BLOCK, BLOCKS, ZERO_BLOCK_CRC};
use super::options::ReadData;
use super::stage::Extent;
use super::{ChunkStore, format};

/// Blocks read at a time: with their checksums they fit a frame of 1 MiB.
pub const EXPORT_BLOCKS_MAX: usize = 192;

pub struct Export {
    store: ChunkStore,
    /// Those to come, the next one last.
    chunks: Vec<ChunkKey>,
    at: usize,
}

impl Export {
    pub(super) fn new(store: ChunkStore, mut chunks: Vec<ChunkKey>) -> Self {
        chunks.reverse();
        Self { store, chunks, at: 0 }
    }

    /// Some blocks of the next chunk that has any, in order; `None`: that was all. The caller decides how fast.
    pub async fn next(&mut self) -> Option<(ChunkKey, Vec<Extent>)> {
        loop {
            let chunk = *self.chunks.last()?;
            let (first, count) = (self.at, EXPORT_BLOCKS_MAX.min(BLOCKS - self.at));
            self.at += count;
            if self.at == BLOCKS {
                self.at = 0;
                self.chunks.pop();
            }
            let extents = self.store.extents(chunk, block(first), block(count)).await;
            if !extents.is_empty() {
                return Some((chunk, extents));
            }
            // Empty space costs no waiting; others of this thread must get their turn nevertheless.
            tokio::task::yield_now().await;
        }
    }
}

fn block(number: usize) -> u16 {
    u16::try_from(number).expect("at most 4096")
}

impl ChunkStore {
    /// What a range of blocks holds, without those that are zeroes: all of it verified, each block as of a moment
    /// after the first poll. Cancel-safe.
    pub fn extents(
        &self,
        chunk: ChunkKey,
        first: u16,
        count: u16,
    ) -> impl Future<Output = Vec<Extent>> + use<> + 'static {
        let store = Self { shard: self.shard.clone() };
        async move {
            if let Ok(read) = store.read_blocks(chunk, first, count).await {
                return extents_of(first, &read);
            }
            let mut extents = Vec::new();
            for block in first..first + count {
                match store.read_blocks(chunk, block, 1).await {
                    Ok(read) => extents.extend(extents_of(block, &read)),
                    Err(ReadError::Unreadable { .. }) => push_damaged(&mut extents, block),
                }
            }
            extents
        }
    }

    /// The same of the disk itself: what the kernel or this store remember of the file is not believed.
    pub fn extents_of_disk(
        &self,
        chunk: ChunkKey,
        first: u16,
        count: u16,
    ) -> impl Future<Output = Vec<Extent>> + use<> + 'static {
        let (forgetting, reading) =
            (self.forget_cached(chunk, first, count), self.extents(chunk, first, count));
        async move {
            forgetting.await;
            reading.await
        }
    }

    async fn read_blocks(&self, chunk: ChunkKey, first: u16, count: u16) -> Result<ReadData, ReadError> {
        let block_bytes = u32::try_from(BLOCK).expect("4096");
        let (offset, len) = (u32::from(first) * block_bytes, u32::from(count) * block_bytes);
        let read = match self.try_read(chunk, offset, len)? {
            Some(read) => read,
            None => self.read(chunk, offset, len).await?,
        };
        // What is in memory was not verified since it came.
        let blocks = read.data.iter().flat_map(|part| part.chunks_exact(BLOCK));
        match (first..).zip(blocks.zip(&read.checksums)).find(|(_, (data, crc))| crc32c(data) != **crc) {
            Some((block, _)) => Err(ReadError::Unreadable { block: format::block_index(block) }),
            None => Ok(read),
        }
    }
}

fn extents_of(first: u16, read: &ReadData) -> Vec<Extent> {
    let mut extents = Vec::new();
    let mut block = first;
    let mut crcs = read.checksums.iter();
    for part in &read.data {
        // The run of blocks in this part that is not over yet: where it begins, and its checksums.
        let mut run: Option<(usize, Vec<u32>)> = None;
        for (nth, (data, crc)) in part.chunks_exact(BLOCK).zip(&mut crcs).enumerate() {
            if *crc == ZERO_BLOCK_CRC && data == &ZEROES[..BLOCK] {
                extents.extend(run.take().map(|run| extent_of(block, part, run)));
            } else {
                run.get_or_insert_with(|| (nth, Vec::new())).1.push(*crc);
            }
        }
        extents.extend(run.map(|run| extent_of(block, part, run)));
        block += u16::try_from(part.len() / BLOCK).expect("at most 4096");
    }
    extents
}

fn extent_of(part_first: u16, part: &Bytes, (begin, crcs): (usize, Vec<u32>)) -> Extent {
    let data = part.slice(begin * BLOCK..(begin + crcs.len()) * BLOCK);
    Extent::Data { first: part_first + u16::try_from(begin).expect("at most 4096"), data, crcs }
}

fn push_damaged(extents: &mut Vec<Extent>, block: u16) {
    if let Some(Extent::Damaged { first, count }) = extents.last_mut()
        && *first + *count == block
    {
        *count += 1;
        return;
    }
    extents.push(Extent::Damaged { first: block, count: 1 });
}
