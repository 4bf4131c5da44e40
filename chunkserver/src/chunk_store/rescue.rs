//! The rescue file: blocks that a checkpoint is about to merge in place, written whole and synced before.
//!
//! A block written as a whole heals from the log if a crash tears it in the chunk file. A block merged from some
//! sectors of the log and a base in the file does not: the base is what was torn. So it is first written here
//! (double write), and put back when the store is opened. Drawn in `docs/chunk-format.md`.

use std::io::{self, IoSlice};

use bytes::Bytes;
use evolute_protocol::checksum::crc32c;
use evolute_protocol::id::{ChunkIndex, ChunkKey, CopysetId, VolumeId};

use crate::disk::File;

use super::block::BlockData;
use super::format::{BLOCK, BLOCKS, ClusterIdBytes, VERSION, get_u32, get_u64, put};
use super::overlay::Owner;

pub const RESCUE_FILE: &str = "rescue";

const MAGIC: [u8; 8] = *b"EVORESCU";

const MAGIC_AT: usize = 0;
const VERSION_AT: usize = MAGIC_AT + size_of::<u64>();
const COUNT_AT: usize = VERSION_AT + size_of::<u32>();
const CLUSTER_AT: usize = COUNT_AT + size_of::<u32>();
const CHECKPOINT_AT: usize = CLUSTER_AT + size_of::<ClusterIdBytes>();
const INDEX_CRC_AT: usize = CHECKPOINT_AT + size_of::<u64>();
const HEADER_CRC_AT: usize = BLOCK - size_of::<u32>();
const _: () = assert!(INDEX_CRC_AT + size_of::<u32>() <= HEADER_CRC_AT);

const ENTRY_VOLUME_AT: usize = 0;
const ENTRY_CHUNK_AT: usize = ENTRY_VOLUME_AT + size_of::<u64>();
const ENTRY_GENERATION_AT: usize = ENTRY_CHUNK_AT + size_of::<u32>();
const ENTRY_COPYSET_AT: usize = ENTRY_GENERATION_AT + size_of::<u32>();
const ENTRY_BLOCK_AT: usize = ENTRY_COPYSET_AT + size_of::<u32>();
const ENTRY_ADMISSION_AT: usize = ENTRY_BLOCK_AT + size_of::<u32>();
const ENTRY_CRC_AT: usize = ENTRY_ADMISSION_AT + size_of::<u64>();
const ENTRY_BYTES: usize = 64;
const _: () = assert!(ENTRY_CRC_AT + size_of::<u32>() <= ENTRY_BYTES && BLOCK.is_multiple_of(ENTRY_BYTES));

/// One block, and where it belongs.
#[derive(Debug, Clone)]
pub struct Rescued {
    pub key: ChunkKey,
    pub generation: u32,
    pub owner: Owner,
    pub block: u16,
    pub data: BlockData,
}

const fn index_bytes(count: usize) -> usize {
    (count * ENTRY_BYTES).next_multiple_of(BLOCK)
}

/// What the file takes with `count` blocks.
pub const fn file_bytes(count: usize) -> u64 {
    if count == 0 { 0 } else { (BLOCK + index_bytes(count) + count * BLOCK) as u64 }
}

/// Writes; the caller syncs. Overwrites whatever an earlier checkpoint left; that one is committed, so nobody needs it.
pub fn write(
    file: &dyn File,
    cluster: ClusterIdBytes,
    checkpoint: u64,
    blocks: &[Rescued],
) -> io::Result<()> {
    let mut index = vec![0; index_bytes(blocks.len())];
    for (rescued, entry) in blocks.iter().zip(index.chunks_exact_mut(ENTRY_BYTES)) {
        put(entry, ENTRY_VOLUME_AT, &rescued.key.volume.0.to_le_bytes());
        put(entry, ENTRY_CHUNK_AT, &rescued.key.index.0.to_le_bytes());
        put(entry, ENTRY_GENERATION_AT, &rescued.generation.to_le_bytes());
        put(entry, ENTRY_COPYSET_AT, &rescued.owner.copyset.0.to_le_bytes());
        put(entry, ENTRY_BLOCK_AT, &u32::from(rescued.block).to_le_bytes());
        put(entry, ENTRY_ADMISSION_AT, &rescued.owner.admission.to_le_bytes());
        put(entry, ENTRY_CRC_AT, &rescued.data.crc.to_le_bytes());
    }
    let mut header = [0; BLOCK];
    put(&mut header, MAGIC_AT, &MAGIC);
    put(&mut header, VERSION_AT, &VERSION.to_le_bytes());
    put(&mut header, COUNT_AT, &u32::try_from(blocks.len()).expect("an overlay's blocks").to_le_bytes());
    put(&mut header, CLUSTER_AT, &cluster);
    put(&mut header, CHECKPOINT_AT, &checkpoint.to_le_bytes());
    put(&mut header, INDEX_CRC_AT, &crc32c(&index).to_le_bytes());
    let crc = crc32c(&header[..HEADER_CRC_AT]);
    put(&mut header, HEADER_CRC_AT, &crc.to_le_bytes());

    let mut parts = vec![IoSlice::new(&header), IoSlice::new(&index)];
    parts.extend(blocks.iter().map(|rescued| IoSlice::new(rescued.data.bytes())));
    file.write(&mut parts, 0)
}

/// What must be put back: the intact blocks of the checkpoint after `committed`. Anything that is not intact was
/// being written when the crash came, and then no chunk file had been touched.
pub fn read(file: &dyn File, cluster: ClusterIdBytes, committed: u64) -> io::Result<Vec<Rescued>> {
    let mut header = [0; BLOCK];
    file.read(&mut header, 0)?;
    let ours = header[..VERSION_AT] == MAGIC
        && crc32c(&header[..HEADER_CRC_AT]) == get_u32(&header, HEADER_CRC_AT)
        && get_u32(&header, VERSION_AT) == VERSION
        && header[CLUSTER_AT..CHECKPOINT_AT] == cluster;
    if !ours || get_u64(&header, CHECKPOINT_AT) != committed + 1 {
        return Ok(Vec::new());
    }
    let count = get_u32(&header, COUNT_AT) as usize;
    let mut index = vec![0; index_bytes(count)];
    file.read(&mut index, BLOCK as u64)?;
    if crc32c(&index) != get_u32(&header, INDEX_CRC_AT) {
        return Ok(Vec::new());
    }
    let mut blocks = Vec::new();
    for (nth, entry) in index.chunks_exact(ENTRY_BYTES).take(count).enumerate() {
        let mut data = vec![0; BLOCK];
        file.read(&mut data, (BLOCK + index.len() + nth * BLOCK) as u64)?;
        let data = BlockData::new(Bytes::from(data), 0, get_u32(entry, ENTRY_CRC_AT));
        let block = u16::try_from(get_u32(entry, ENTRY_BLOCK_AT)).ok().filter(|b| usize::from(*b) < BLOCKS);
        let (Some(block), true) = (block, data.is_intact()) else { continue };
        let key = ChunkKey {
            volume: VolumeId(get_u64(entry, ENTRY_VOLUME_AT)),
            index: ChunkIndex(get_u32(entry, ENTRY_CHUNK_AT)),
        };
        let owner = Owner {
            copyset: CopysetId(get_u32(entry, ENTRY_COPYSET_AT)),
            admission: get_u64(entry, ENTRY_ADMISSION_AT),
        };
        blocks.push(Rescued { key, generation: get_u32(entry, ENTRY_GENERATION_AT), owner, block, data });
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::sync::Arc;

    use bytes::Bytes;
    use evolute_protocol::checksum::crc32c;
    use evolute_protocol::id::{ChunkIndex, ChunkKey, CopysetId, VolumeId};

    use crate::disk::crash::Crash;
    use crate::disk::{Disk, File};

    use super::super::block::BlockData;
    use super::super::overlay::Owner;
    use super::{Rescued, file_bytes, read, write};

    const CLUSTER: [u8; 16] = *b"cluster-id-16-by";

    fn file() -> Arc<dyn File> {
        Crash::new().create("rescue".as_ref()).expect("a new file")
    }

    fn rescued(block: u16) -> Rescued {
        let data = Bytes::from(vec![7; 4096]);
        let crc = crc32c(&data);
        Rescued {
            key: ChunkKey { volume: VolumeId(5), index: ChunkIndex(6) },
            generation: 1,
            owner: Owner { copyset: CopysetId(3), admission: 9 },
            block,
            data: BlockData::new(data, 0, crc),
        }
    }

    #[test]
    fn the_file_is_the_one_of_the_first_release() {
        let golden = include_bytes!("../../tests/golden/rescue-v1.bin");
        let file = file();
        write(&*file, CLUSTER, 42, &[rescued(130)]).expect("written");
        let mut raw = vec![0; golden.len() + 512];
        file.read(&mut raw, 0).expect("read");
        assert!(raw[..golden.len()] == golden[..] && raw[golden.len()..] == [0; 512]);
        assert_eq!(file_bytes(1), golden.len() as u64);
    }

    /// Only the whole file of the very next checkpoint counts, and of it only whole blocks.
    #[test]
    fn what_is_not_intact_or_not_due_is_not_put_back() {
        let file = file();
        let blocks: Vec<_> = (0..70).map(rescued).collect();
        write(&*file, CLUSTER, 42, &blocks).expect("written");
        let found = |committed| read(&*file, CLUSTER, committed).expect("read").len();
        assert_eq!((found(41), found(40), found(42), found(0)), (70, 0, 0, 0));
        assert_eq!(read(&*file, [0; 16], 41).expect("read").len(), 0, "another cluster's");
        let rot = |at: u64| file.write(&mut [IoSlice::new(&[0xee; 512])], at).expect("written");
        rot(file_bytes(70) - 512);
        assert_eq!(found(41), 69, "one block is torn");
        rot(4096 + 512);
        assert_eq!(found(41), 0, "the index is torn");
    }
}
