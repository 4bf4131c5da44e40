//! The epoch rule and the rule against doing a change twice, in one place: plain functions over values.
//!
//! Part of a copyset's replicated state, so every replica comes to the same verdict for the same entry. Asked twice:
//! by `write.rs` before a change is proposed, to refuse early, and by `apply.rs`, whose verdict counts, because a
//! fence may be committed between the two. And, on a copy, by `ahead.rs`, which must come to what `apply.rs` will.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::VolumeId;
use evolute_protocol::wire::request::{ChangeTag, Lane, Sequence};

use super::command::Change;

/// Sequences a lane may have applied above its floor: a guest's queues hold 256 × 1024 requests at most, far less in
/// practice. 64 Ki × 8 B bounds the memory one hostile client can take per lane at 0.5 MiB.
pub const SEQUENCES_ABOVE_FLOOR_MAX: usize = 64 << 10;
/// I/O threads of one volume.
pub const LANES_MAX: usize = 64;

/// What to do with a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Apply,
    /// It was applied before: answer it, change nothing.
    Already,
    Fenced {
        current: Epoch,
    },
    /// Its epoch was never fenced in here.
    NotFenced,
    /// It would pass a bound that no good client reaches.
    OutOfBounds,
}

/// What a copyset knows of one volume's writers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Writers {
    epoch: Epoch,
    /// The last entry that concerned this volume.
    last_index: u64,
    lanes: BTreeMap<Lane, LaneState>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct LaneState {
    /// Everything below was answered: a change that comes with such a sequence is a late duplicate.
    floor: Sequence,
    /// Applied, at or above the floor.
    applied: BTreeSet<Sequence>,
}

impl LaneState {
    fn has_applied(&self, sequence: Sequence) -> bool {
        sequence < self.floor || self.applied.contains(&sequence)
    }
}

impl Writers {
    /// The index of the last entry of this volume that was applied.
    pub fn last_index(&self) -> u64 {
        self.last_index
    }

    /// The one that is served.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub fn is_deleted(&self) -> bool {
        self.epoch == Epoch::DELETED
    }

    /// An entry concerned this volume, whatever its verdict.
    pub fn touch(&mut self, index: u64) {
        assert!(index >= self.last_index, "entry {index} after {}", self.last_index);
        self.last_index = index;
    }

    /// Whether requests of `epoch` are served.
    pub fn judge_epoch(&self, epoch: Epoch) -> Verdict {
        if epoch == self.epoch {
            Verdict::Apply
        } else if epoch < self.epoch {
            Verdict::Fenced { current: self.epoch }
        } else {
            Verdict::NotFenced
        }
    }

    /// What would become of a change that came now.
    pub fn judge(&self, tag: &ChangeTag) -> Verdict {
        match self.judge_epoch(tag.epoch) {
            Verdict::Apply => {}
            refused => return refused,
        }
        match self.lanes.get(&tag.lane) {
            None if self.lanes.len() >= LANES_MAX => Verdict::OutOfBounds,
            None => Verdict::Apply,
            Some(lane) if lane.has_applied(tag.sequence) => Verdict::Already,
            Some(lane) if lane.applied.len() >= SEQUENCES_ABOVE_FLOOR_MAX && tag.floor <= lane.floor => {
                Verdict::OutOfBounds
            }
            Some(_) => Verdict::Apply,
        }
    }

    /// Judges a change and, when it is to be applied, remembers that it was.
    pub fn admit(&mut self, tag: &ChangeTag) -> Verdict {
        let verdict = self.judge(tag);
        if verdict == Verdict::Apply {
            let lane = self.lanes.entry(tag.lane).or_default();
            if tag.floor > lane.floor {
                lane.floor = tag.floor;
                lane.applied = lane.applied.split_off(&tag.floor);
            }
            lane.applied.insert(tag.sequence);
        }
        verdict
    }

    /// What the entry at `index` makes of one of its changes.
    pub fn take(&mut self, index: u64, change: &Change) -> Verdict {
        self.touch(index);
        match change {
            Change::Write(write) => self.admit(&write.tag),
            Change::Discard(discard) => self.admit(&discard.tag),
            Change::WriteZeroes(zeroes) => self.admit(&zeroes.tag),
            Change::Fence(fence) => self.fence(fence.epoch),
            Change::DropVolume(_) => self.fence(Epoch::DELETED),
            Change::Unfence(fence) => self.unfence(fence.epoch),
        }
    }

    /// Takes back a fence that nobody came with. The next writer begins anew; every one that was refused by that fence has
    /// stopped for ever. Any other fence stays.
    fn unfence(&mut self, epoch: Epoch) -> Verdict {
        if self.epoch != epoch {
            return Verdict::Already;
        }
        self.epoch = Epoch::default();
        self.lanes.clear();
        Verdict::Apply
    }

    /// Raises the epoch. The same one again changes nothing; a lower one is refused.
    pub fn fence(&mut self, epoch: Epoch) -> Verdict {
        if epoch < self.epoch {
            return Verdict::Fenced { current: self.epoch };
        }
        if epoch > self.epoch {
            self.epoch = epoch;
            // A new writer counts its sequences anew.
            self.lanes.clear();
        }
        Verdict::Apply
    }
}

/// Every volume that ever wrote to a copyset, as a checkpoint keeps it.
pub type WritersByVolume = BTreeMap<VolumeId, Writers>;

/// The checkpoint's bytes are not what we wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a copyset's saved fences and sequences do not make sense")]
pub struct DamagedWriters;

pub fn put_writers(volumes: &WritersByVolume, out: &mut BytesMut) {
    put_count(out, volumes.len());
    for (id, writers) in volumes {
        out.put_u64_le(id.0);
        out.put_u64_le(writers.epoch.to_u64());
        out.put_u64_le(writers.last_index);
        put_count(out, writers.lanes.len());
        for (lane, state) in &writers.lanes {
            out.put_u16_le(lane.0);
            out.put_u64_le(state.floor.0);
            put_count(out, state.applied.len());
            for sequence in &state.applied {
                out.put_u64_le(sequence.0);
            }
        }
    }
}

pub fn get_writers(bytes: &mut Bytes) -> Result<WritersByVolume, DamagedWriters> {
    let mut volumes = WritersByVolume::new();
    for _ in 0..get_u32(bytes)? {
        let id = VolumeId(get_u64(bytes)?);
        let mut writers = Writers {
            epoch: Epoch::from_u64(get_u64(bytes)?),
            last_index: get_u64(bytes)?,
            lanes: BTreeMap::new(),
        };
        for _ in 0..get_u32(bytes)? {
            let lane = Lane(bytes.try_get_u16_le().map_err(|_| DamagedWriters)?);
            let mut state = LaneState { floor: Sequence(get_u64(bytes)?), applied: BTreeSet::new() };
            for _ in 0..get_u32(bytes)? {
                state.applied.insert(Sequence(get_u64(bytes)?));
            }
            writers.lanes.insert(lane, state);
        }
        volumes.insert(id, writers);
    }
    Ok(volumes)
}

fn put_count(out: &mut BytesMut, count: usize) {
    out.put_u32_le(u32::try_from(count).expect("bounded far below 4 Gi"));
}

fn get_u32(bytes: &mut Bytes) -> Result<u32, DamagedWriters> {
    bytes.try_get_u32_le().map_err(|_| DamagedWriters)
}

fn get_u64(bytes: &mut Bytes) -> Result<u64, DamagedWriters> {
    bytes.try_get_u64_le().map_err(|_| DamagedWriters)
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use evolute_protocol::epoch::Epoch;
    use evolute_protocol::id::VolumeId;
    use evolute_protocol::wire::request::{ChangeTag, Lane, Sequence};

    use super::{SEQUENCES_ABOVE_FLOOR_MAX, Verdict, Writers, WritersByVolume, get_writers, put_writers};

    const FIRST: Epoch = Epoch { attachment: 1, incarnation: 0 };
    const SECOND: Epoch = Epoch { attachment: 1, incarnation: 1 };

    fn tag(epoch: Epoch, sequence: u64, floor: u64) -> ChangeTag {
        ChangeTag { epoch, lane: Lane(0), sequence: Sequence(sequence), floor: Sequence(floor) }
    }

    fn fenced(epoch: Epoch) -> Writers {
        let mut writers = Writers::default();
        assert_eq!(writers.fence(epoch), Verdict::Apply);
        writers
    }

    #[test]
    fn nothing_of_an_older_epoch_is_applied_after_a_fence() {
        let mut writers = fenced(FIRST);
        assert_eq!(writers.admit(&tag(FIRST, 1, 1)), Verdict::Apply);
        assert_eq!(writers.fence(SECOND), Verdict::Apply);
        assert_eq!(writers.admit(&tag(FIRST, 2, 1)), Verdict::Fenced { current: SECOND });
        assert_eq!(writers.fence(FIRST), Verdict::Fenced { current: SECOND });
        assert_eq!(writers.admit(&tag(SECOND, 1, 1)), Verdict::Apply);
        assert_eq!(writers.fence(Epoch::DELETED), Verdict::Apply);
        assert_eq!(writers.admit(&tag(SECOND, 2, 1)), Verdict::Fenced { current: Epoch::DELETED });
        assert!(writers.is_deleted());
    }

    #[test]
    fn an_epoch_that_was_never_fenced_in_is_not_served() {
        assert_eq!(Writers::default().admit(&tag(FIRST, 1, 1)), Verdict::NotFenced);
        assert_eq!(fenced(FIRST).judge_epoch(SECOND), Verdict::NotFenced);
    }

    #[test]
    fn a_late_duplicate_changes_nothing_after_any_number_of_later_writes() {
        let mut writers = fenced(FIRST);
        for sequence in [3, 1, 2, 5] {
            assert_eq!(writers.admit(&tag(FIRST, sequence, 1)), Verdict::Apply);
            assert_eq!(writers.admit(&tag(FIRST, sequence, 1)), Verdict::Already);
        }
        // 4 was never applied here (another copyset's); the client has answers for all below 6.
        assert_eq!(writers.admit(&tag(FIRST, 6, 6)), Verdict::Apply);
        for sequence in 1..=6 {
            assert_eq!(writers.admit(&tag(FIRST, sequence, 1)), Verdict::Already, "{sequence}");
        }
        assert_eq!(writers.admit(&tag(FIRST, 7, 6)), Verdict::Apply);
    }

    #[test]
    fn the_same_fence_again_does_not_forget_what_was_applied() {
        let mut writers = fenced(FIRST);
        writers.admit(&tag(FIRST, 1, 1));
        assert_eq!(writers.fence(FIRST), Verdict::Apply);
        assert_eq!(writers.admit(&tag(FIRST, 1, 1)), Verdict::Already);
    }

    #[test]
    fn only_the_fence_that_is_named_is_taken_back() {
        let mut writers = fenced(SECOND);
        writers.admit(&tag(SECOND, 1, 1));
        assert_eq!(writers.unfence(FIRST), Verdict::Already);
        assert_eq!(writers.judge_epoch(SECOND), Verdict::Apply);
        assert_eq!(writers.unfence(SECOND), Verdict::Apply);
        assert_eq!(writers.admit(&tag(SECOND, 2, 1)), Verdict::NotFenced);
        assert_eq!(writers.fence(FIRST), Verdict::Apply);
        assert_eq!(writers.admit(&tag(FIRST, 1, 1)), Verdict::Apply);
    }

    #[test]
    fn a_client_that_never_raises_its_floor_meets_a_bound() {
        let mut writers = fenced(FIRST);
        for sequence in 1..=SEQUENCES_ABOVE_FLOOR_MAX as u64 {
            assert_eq!(writers.admit(&tag(FIRST, sequence, 1)), Verdict::Apply);
        }
        let next = SEQUENCES_ABOVE_FLOOR_MAX as u64 + 1;
        assert_eq!(writers.admit(&tag(FIRST, next, 1)), Verdict::OutOfBounds);
        assert_eq!(writers.admit(&tag(FIRST, next, 2)), Verdict::Apply);
    }

    #[test]
    fn a_checkpoint_keeps_it_all_and_refuses_damage() {
        let mut writers = fenced(FIRST);
        writers.admit(&tag(FIRST, 4, 2));
        writers.touch(17);
        let volumes = WritersByVolume::from([(VolumeId(3), writers), (VolumeId(9), Writers::default())]);
        let mut bytes = BytesMut::new();
        put_writers(&volumes, &mut bytes);
        let bytes = bytes.freeze();
        assert_eq!(get_writers(&mut bytes.clone()), Ok(volumes));
        for length in 0..bytes.len() {
            assert!(get_writers(&mut bytes.slice(..length)).is_err(), "{length}");
        }
    }
}
