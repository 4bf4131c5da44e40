//! What a replica of a copyset knows beside its chunks, and the bytes in which a checkpoint keeps it.

use std::collections::BTreeMap;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId, VolumeId};
use evolute_raft::{Member, Position, ProcessId};

use super::fence::{Writers, WritersByVolume, get_writers, put_writers};
use crate::chunk_store::CopysetRecord;

const VERSION: u8 = 1;

/// Of a joining replica's [`Created`].
const JOINING_VERSION: u8 = 2;

/// The members a copyset had when this replica was created, and its place among them. Never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    pub replica: ReplicaId,
    /// The replica that should lead first, so that leaders begin evenly spread.
    pub first_leader: ReplicaId,
    pub members: Vec<(ReplicaId, ChunkserverId)>,
    /// It waits to be added to a group that runs already: it never begins one.
    pub joining: bool,
}

impl Created {
    pub fn raft_members(&self) -> Vec<Member> {
        self.members
            .iter()
            .map(|(replica, chunkserver)| Member {
                replica: evolute_raft::ReplicaId(replica.0),
                process: ProcessId(u64::from(chunkserver.0)),
            })
            .collect()
    }
}

/// What the log has made of this replica so far, beside its chunks.
#[derive(Debug, Default)]
pub struct State {
    applied: Option<Position>,
    membership: Option<Bytes>,
    writers: WritersByVolume,
}

/// A copyset's saved state is not what we wrote, or of a newer version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{copyset}: its saved state does not make sense")]
pub struct DamagedState {
    copyset: CopysetId,
}

impl State {
    /// What a record says of everything but [`Created`].
    pub fn parse(record: &CopysetRecord) -> Result<Self, DamagedState> {
        parse_state(record).ok_or(DamagedState { copyset: record.copyset })
    }

    pub fn applied(&self) -> Option<Position> {
        self.applied
    }

    pub fn membership(&self) -> Option<&Bytes> {
        self.membership.as_ref()
    }

    pub fn writers(&self) -> &BTreeMap<VolumeId, Writers> {
        &self.writers
    }

    pub fn writers_mut(&mut self, volume: VolumeId) -> &mut Writers {
        self.writers.entry(volume).or_default()
    }

    pub fn set_membership(&mut self, membership: Bytes) {
        self.membership = Some(membership);
    }

    pub fn advance_applied(&mut self, to: Position) {
        assert!(
            self.applied.is_none_or(|at| at.index < to.index),
            "{:?} cannot apply {to:?} again",
            self.applied
        );
        self.applied = Some(to);
    }

    /// The record a checkpoint keeps of this replica as it is now.
    pub fn record(&self, copyset: CopysetId, created: &Created) -> CopysetRecord {
        let mut state = BytesMut::new();
        state.put_u8(VERSION);
        state.put_u64_le(self.applied.map_or(0, |at| at.term));
        match &self.membership {
            None => state.put_u32_le(0),
            Some(membership) => {
                state.put_u32_le(u32::try_from(membership.len()).expect("a few members"));
                state.put_slice(membership);
            }
        }
        put_writers(&self.writers, &mut state);
        CopysetRecord {
            copyset,
            applied: self.applied.map_or(0, |at| at.index),
            state: state.freeze(),
            created: put_created(created),
        }
    }
}

/// What a record says.
pub fn restore(record: &CopysetRecord) -> Result<(State, Created), DamagedState> {
    let state = State::parse(record)?;
    let created = created_of(record).ok_or(DamagedState { copyset: record.copyset })?;
    Ok((state, created))
}

/// Which replica this is, even if the rest of the record is of no use.
pub fn created_of(record: &CopysetRecord) -> Option<Created> {
    get_created(record.created.clone())
}

fn parse_state(record: &CopysetRecord) -> Option<State> {
    let mut bytes = record.state.clone();
    if bytes.try_get_u8().ok()? != VERSION {
        return None;
    }
    let term = bytes.try_get_u64_le().ok()?;
    let length = bytes.try_get_u32_le().ok()? as usize;
    if bytes.len() < length {
        return None;
    }
    let membership = bytes.split_to(length);
    let writers = get_writers(&mut bytes).ok()?;
    // A later entry of the volume could not be applied after that.
    if writers.values().any(|writers| writers.last_index() > record.applied) {
        return None;
    }
    // Index 0 with term 0 is the membership a copyset begins with; only a record with a membership has applied it.
    let applied = (!membership.is_empty()).then_some(Position { term, index: record.applied });
    bytes.is_empty().then_some(State {
        applied,
        membership: (!membership.is_empty()).then_some(membership),
        writers,
    })
}

fn put_created(created: &Created) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u8(if created.joining { JOINING_VERSION } else { VERSION });
    out.put_u64_le(created.replica.0);
    out.put_u64_le(created.first_leader.0);
    out.put_u8(u8::try_from(created.members.len()).expect("a few members"));
    for (replica, chunkserver) in &created.members {
        out.put_u64_le(replica.0);
        out.put_u32_le(chunkserver.0);
    }
    out.freeze()
}

fn get_created(mut bytes: Bytes) -> Option<Created> {
    let joining = match bytes.try_get_u8().ok()? {
        VERSION => false,
        JOINING_VERSION => true,
        _ => return None,
    };
    let replica = ReplicaId(bytes.try_get_u64_le().ok()?);
    let first_leader = ReplicaId(bytes.try_get_u64_le().ok()?);
    let mut members = Vec::new();
    for _ in 0..bytes.try_get_u8().ok()? {
        members.push((ReplicaId(bytes.try_get_u64_le().ok()?), ChunkserverId(bytes.try_get_u32_le().ok()?)));
    }
    bytes.is_empty().then_some(Created { replica, first_leader, members, joining })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use evolute_protocol::epoch::Epoch;
    use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId, VolumeId};
    use evolute_raft::Position;

    use super::{Created, State, restore};

    fn created() -> Created {
        let members = (1..=3).map(|n| (ReplicaId(u64::from(n) + 10), ChunkserverId(n))).collect();
        Created { replica: ReplicaId(12), first_leader: ReplicaId(11), members, joining: false }
    }

    #[test]
    fn a_record_brings_back_what_was_saved() {
        let mut state = State::default();
        state.set_membership(Bytes::from_static(b"members"));
        state.advance_applied(Position { term: 0, index: 0 });
        state.writers_mut(VolumeId(4)).fence(Epoch { attachment: 1, incarnation: 0 });
        state.advance_applied(Position { term: 3, index: 9 });
        let record = state.record(CopysetId(7), &created());
        let (back, made) = restore(&record).expect("ours");
        assert_eq!((back.applied(), back.writers()), (state.applied(), state.writers()));
        assert_eq!((back.membership(), made), (state.membership(), created()));
    }

    #[test]
    fn a_new_replica_has_applied_nothing() {
        let record = State::default().record(CopysetId(7), &created());
        assert_eq!(restore(&record).expect("ours").0.applied(), None);
    }

    #[test]
    fn a_joining_replica_remembers_that_it_joins() {
        let created = Created { joining: true, ..created() };
        let record = State::default().record(CopysetId(7), &created);
        assert_eq!(restore(&record).expect("ours").1, created);
    }

    #[test]
    fn a_damaged_record_is_refused() {
        let mut record = State::default().record(CopysetId(7), &created());
        record.state = record.state.slice(..record.state.len() - 1);
        assert!(restore(&record).is_err());
    }
}
