//! What a replica has, told to a control plane that was put back from an older copy.

use std::collections::BTreeMap;

use evolute_protocol::id::VolumeId;
use evolute_protocol::rpc::{CopysetInventory, MemberReport, VolumeInventory};

use crate::chunk_store::ChunkStore;
use crate::copyset::Copyset;
use crate::heartbeat::{member, role};

/// Members, fences and chunks of one replica, as of what it has applied.
pub fn copyset(copyset: &Copyset, store: &ChunkStore) -> CopysetInventory {
    let status = copyset.group().status();
    let mut volumes: BTreeMap<VolumeId, VolumeInventory> = BTreeMap::new();
    for (&volume, writers) in copyset.state().borrow().writers() {
        let dropped = writers.is_deleted();
        let attachment = if dropped { 0 } else { writers.epoch().attachment };
        volumes.insert(volume, VolumeInventory { volume: volume.0, attachment, dropped, chunks: Vec::new() });
    }
    for chunk in store.chunks_from(copyset.id(), None) {
        let of = volumes
            .entry(chunk.volume)
            .or_insert_with(|| VolumeInventory { volume: chunk.volume.0, ..VolumeInventory::default() });
        add(&mut of.chunks, chunk.index.0);
    }
    CopysetInventory {
        copyset: copyset.id().0,
        replica: status.me.replica.0,
        role: role(status.role).into(),
        term: status.term,
        members: status.members.iter().map(|of| MemberReport { matched_index: 0, ..member(of) }).collect(),
        volumes: volumes.into_values().collect(),
    }
}

/// Chunks come in order; neighbours become one pair of first and count.
fn add(ranges: &mut Vec<u64>, chunk: impl Into<u64>) {
    let chunk = chunk.into();
    if let [.., first, count] = &mut ranges[..]
        && *first + *count == chunk
    {
        *count += 1;
        return;
    }
    ranges.extend([chunk, 1]);
}

#[cfg(test)]
mod tests {
    use super::add;

    #[test]
    fn neighbours_become_one_range() {
        let mut ranges = Vec::new();
        for chunk in [0_u32, 1, 2, 5, 7, 8] {
            add(&mut ranges, chunk);
        }
        assert_eq!(ranges, [0, 3, 5, 1, 7, 2]);
    }
}
