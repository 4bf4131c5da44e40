//! What an MDS that was put back from an older copy learns from its chunkservers: a pure function from the state and what
//! they say they have to one command.
//!
//! What always holds: every number in the command is above what anybody remembers; a chunk that a replica has is mapped
//! to that replica's copyset; what cannot be told apart yet is an error, and nothing is half learnt.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use evolute_protocol::geometry::{CHUNKS_PER_SEGMENT, GIB, SEGMENT_BYTES, VOLUME_BYTES_MAX};
use evolute_protocol::id::{ChunkserverId, CopysetId, SegmentIndex, VolumeId};
use evolute_protocol::rpc::{CopysetInventory, Inventory, Role};

use crate::placement::segment::deal;
use crate::state::State;
use crate::state::command::{
    Adopt, AdoptedChunkserver, AdoptedCopyset, AdoptedReplica, AdoptedSegment, AdoptedVolume,
    RegisterChunkserver, SeenReign,
};
use crate::state::copyset::REPLICAS;
use crate::state::reign::Seen;
use crate::state::topology::DEFAULT_POOL;
use crate::state::volume::{ATTACHMENT_MAX, WIDTH_MAX};

/// Numbers that the MDS gave in its last moments may be remembered by nobody yet, and still be used.
const MARGIN: u32 = 1000;
/// A chunk of a volume of the largest size.
const CHUNKS_MAX: u64 = VOLUME_BYTES_MAX / SEGMENT_BYTES * CHUNKS_PER_SEGMENT;

pub type Inventories = BTreeMap<ChunkserverId, Inventory>;

/// What the chunkservers know of one volume.
#[derive(Debug, Default)]
struct Found {
    copysets: BTreeSet<CopysetId>,
    attachment: u32,
    dropped: bool,
    chunks: BTreeMap<u64, CopysetId>,
}

pub fn seen_of(state: &evolute_protocol::rpc::MdsState) -> Option<Seen> {
    let reign = Bytes::copy_from_slice(&state.reign);
    (!reign.is_empty()).then_some(Seen { reign, ordinal: state.ordinal, index: state.applied_index })
}

/// Everything that the inventories know and the state does not. An error says what has to be waited for.
pub fn plan(
    state: &State,
    inventories: &Inventories,
    reign: [u8; 16],
    after_index: u64,
    at_unix_ms: u64,
    accepted: bool,
) -> Result<Adopt, String> {
    let mut adopt = Adopt {
        reign: Bytes::copy_from_slice(&reign),
        after_index,
        accepted,
        chunkserver: state.chunkservers_given(),
        copyset: state.copysets_given(),
        replica: state.replicas_given(),
        volume: state.volumes_given(),
        attachment: state.attachments_given(),
        ..Adopt::default()
    };
    let mut seen: BTreeMap<Bytes, SeenReign> = BTreeMap::new();
    for (&id, inventory) in inventories {
        adopt.chunkserver = adopt.chunkserver.max(id.0);
        if !state.chunkservers().contains_key(&id) {
            adopt.chunkservers.push(forgotten_chunkserver(id, inventory, at_unix_ms));
        }
        let Some(of) = &inventory.seen else { continue };
        adopt.chunkserver = adopt.chunkserver.max(of.chunkserver);
        adopt.copyset = adopt.copyset.max(of.copyset);
        adopt.replica = adopt.replica.max(of.replica);
        adopt.volume = adopt.volume.max(of.volume);
        adopt.attachment = adopt.attachment.max(of.attachment);
        let Some(of) = seen_of(of).filter(|of| !state.has_been(of)) else { continue };
        let known = seen.entry(of.reign.clone()).or_insert_with(|| SeenReign {
            reign: of.reign.clone(),
            ordinal: of.ordinal,
            index: of.index,
        });
        known.index = known.index.max(of.index);
    }
    adopt.seen = seen.into_values().collect();
    adopt.seen.sort_by_key(|seen| seen.ordinal);

    let mut by_copyset: BTreeMap<CopysetId, Vec<&CopysetInventory>> = BTreeMap::new();
    let mut volumes: BTreeMap<VolumeId, Found> = BTreeMap::new();
    for replica in inventories.values().flat_map(|inventory| &inventory.copysets) {
        let id = CopysetId(replica.copyset);
        adopt.copyset = adopt.copyset.max(id.0);
        adopt.replica = adopt.replica.max(replica.replica);
        by_copyset.entry(id).or_default().push(replica);
        for volume in &replica.volumes {
            adopt.volume = adopt.volume.max(volume.volume);
            let found = volumes.entry(VolumeId(volume.volume)).or_default();
            found.copysets.insert(id);
            found.dropped |= volume.dropped;
            found.attachment = found.attachment.max(volume.attachment.min(ATTACHMENT_MAX));
            for range in volume.chunks.chunks_exact(2) {
                let end = range[0].saturating_add(range[1]).min(CHUNKS_MAX);
                found.chunks.extend((range[0]..end).map(|chunk| (chunk, id)));
            }
        }
    }
    for (&id, replicas) in &by_copyset {
        if let Some(copyset) = members(state, inventories, id, replicas)? {
            adopt.replica = copyset.replicas.iter().map(|r| r.replica).fold(adopt.replica, u64::max);
            adopt.copysets.push(copyset);
        }
    }
    for (&id, found) in &volumes {
        adopt.attachment = adopt.attachment.max(found.attachment);
        learn_volume(state, id, found, at_unix_ms, &mut adopt);
    }
    adopt.volume = adopt.volume.saturating_add(u64::from(MARGIN));
    adopt.attachment = adopt.attachment.saturating_add(MARGIN).min(ATTACHMENT_MAX - 1);
    Ok(adopt)
}

fn forgotten_chunkserver(id: ChunkserverId, inventory: &Inventory, at_unix_ms: u64) -> AdoptedChunkserver {
    AdoptedChunkserver {
        chunkserver: id.0,
        as_registered: Some(RegisterChunkserver {
            token: Bytes::copy_from_slice(&inventory.token),
            instance: Bytes::new(),
            address: inventory.address.clone(),
            zone: inventory.zone.clone(),
            server: inventory.server.clone(),
            pool: DEFAULT_POOL.to_owned(),
            capacity_bytes: inventory.capacity_bytes,
            version: inventory.version.clone(),
            at_unix_ms,
        }),
    }
}

/// The copyset's members, if they are not those that the state knows.
fn members(
    state: &State,
    inventories: &Inventories,
    id: CopysetId,
    replicas: &[&CopysetInventory],
) -> Result<Option<AdoptedCopyset>, String> {
    let record = state.copysets().get(&id);
    let leaders =
        replicas.iter().filter(|replica| replica.role() == Role::Leader && !replica.members.is_empty());
    let Some(leader) = leaders.max_by_key(|replica| replica.term) else {
        let known = |replica: &&CopysetInventory| {
            record.is_some_and(|record| record.everyone().any(|known| known.id.0 == replica.replica))
        };
        if replicas.iter().all(known) {
            return Ok(None);
        }
        return Err(format!("{id} has no leader that could say who its members are"));
    };
    let voters: Vec<_> = leader.members.iter().filter(|member| member.voter).collect();
    let same = |record: &crate::state::Copyset| {
        let mut ours: Vec<_> = record.replicas.iter().map(|replica| replica.id.0).collect();
        let mut theirs: Vec<_> = voters.iter().map(|voter| voter.replica).collect();
        ours.sort_unstable();
        theirs.sort_unstable();
        ours == theirs
    };
    if record.is_some_and(same) {
        return Ok(None);
    }
    if voters.len() != REPLICAS {
        return Err(format!("{id} is changing its members"));
    }
    for voter in &voters {
        let chunkserver = ChunkserverId(voter.chunkserver);
        if !inventories.contains_key(&chunkserver) && !state.chunkservers().contains_key(&chunkserver) {
            return Err(format!("{chunkserver}, a member of {id}, has not said what it has"));
        }
    }
    let member = |voter: &&evolute_protocol::rpc::MemberReport| AdoptedReplica {
        replica: voter.replica,
        chunkserver: voter.chunkserver,
    };
    Ok(Some(AdoptedCopyset {
        copyset: id.0,
        pool: DEFAULT_POOL.to_owned(),
        replicas: voters.iter().map(member).collect(),
    }))
}

fn learn_volume(state: &State, id: VolumeId, found: &Found, at_unix_ms: u64, adopt: &mut Adopt) {
    let record = state.volumes().get(&id);
    if found.dropped {
        if record.is_some() {
            adopt.dropped.push(id.0);
        }
        return;
    }
    // This state itself deleted it; that is being carried out, or was.
    let deleted = record.is_none() && id.0 <= state.volumes_given();
    if deleted || id.0 == 0 || found.copysets.is_empty() {
        return;
    }
    let ring = match record {
        Some(volume) => volume.copysets.clone(),
        None => ring_of(found),
    };
    let mut segments: BTreeMap<SegmentIndex, BTreeMap<u64, CopysetId>> = BTreeMap::new();
    for (&chunk, &copyset) in &found.chunks {
        let index = SegmentIndex(u32::try_from(chunk / CHUNKS_PER_SEGMENT).unwrap_or(u32::MAX));
        segments.entry(index).or_default().insert(chunk % CHUNKS_PER_SEGMENT, copyset);
    }
    let last = segments.last_key_value().map_or(0, |(index, _)| u64::from(index.0) + 1);
    let new = record.is_none_or(|volume| found.attachment > volume.attachment);
    let mut copysets = ring.clone();
    copysets.extend(found.copysets.iter().filter(|copyset| !ring.contains(copyset)));
    if new || copysets.len() > ring.len() {
        adopt.volumes.push(AdoptedVolume {
            volume: id.0,
            name: name_of(state, id),
            size_bytes: (last * SEGMENT_BYTES).clamp(GIB, VOLUME_BYTES_MAX),
            copysets: copysets.iter().map(|copyset| copyset.0).collect(),
            attachment: found.attachment,
            at_unix_ms,
        });
    }
    for (index, chunks) in segments {
        if record.is_some_and(|volume| volume.segments.contains_key(&index)) {
            continue;
        }
        adopt.segments.push(AdoptedSegment {
            volume: id.0,
            segment: index.0,
            chunk_copysets: segment_of(&ring, index, &chunks).into_iter().map(|copyset| copyset.0).collect(),
        });
    }
}

fn name_of(state: &State, id: VolumeId) -> String {
    let mut name = format!("recovered-{}", id.0);
    while state.volume_named(&name).is_some() {
        name.push('x');
    }
    name
}

/// The order in which a forgotten volume's chunks go round its copysets. Its writer fenced every one of them, so all of
/// them know the volume; who has no chunk of it comes in any order.
fn ring_of(found: &Found) -> Vec<CopysetId> {
    let all: Vec<_> = found.copysets.iter().copied().take(WIDTH_MAX as usize).collect();
    let mut places: Vec<Option<CopysetId>> = vec![None; all.len()];
    for (&chunk, &copyset) in &found.chunks {
        let place = usize::try_from(chunk % all.len() as u64).unwrap_or(0);
        if places[place].is_none() && !places.contains(&Some(copyset)) {
            places[place] = Some(copyset);
        }
    }
    let mut rest =
        all.into_iter().filter(|copyset| !places.contains(&Some(*copyset))).collect::<Vec<_>>().into_iter();
    places.into_iter().filter_map(|place| place.or_else(|| rest.next())).collect()
}

/// A segment's map: each chunk where it was found, and those that nobody has where the ring that explains the others
/// would have put them.
fn segment_of(ring: &[CopysetId], index: SegmentIndex, found: &BTreeMap<u64, CopysetId>) -> Vec<CopysetId> {
    let explains = |map: &[CopysetId]| {
        found
            .iter()
            .all(|(&chunk, copyset)| usize::try_from(chunk).is_ok_and(|at| map.get(at) == Some(copyset)))
    };
    // Copysets without room were left out of it, if some had none.
    let narrow: Vec<_> =
        ring.iter().copied().filter(|copyset| found.values().any(|found| found == copyset)).collect();
    let whole = deal(ring, index);
    let mut map = match narrow.is_empty() {
        false if !explains(&whole) && explains(&deal(&narrow, index)) => deal(&narrow, index),
        _ => whole,
    };
    for (&chunk, &copyset) in found {
        if let Some(place) = usize::try_from(chunk).ok().and_then(|at| map.get_mut(at)) {
            *place = copyset;
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::{Found, Inventories, plan, ring_of, segment_of};
    use crate::state::command::{
        AllocateSegment, Attach, BeginReign, CreateCopysets, CreateVolume, NewCopyset, RegisterChunkserver,
    };
    use crate::state::reign::{FORGOTTEN_HOLDER, Seen};
    use crate::state::{Command, State};
    use bytes::Bytes;
    use evolute_protocol::geometry::GIB;
    use evolute_protocol::id::{ChunkserverId, CopysetId, SegmentIndex, VolumeId};
    use evolute_protocol::rpc::{CopysetInventory, Inventory, MdsState, MemberReport, Role, VolumeInventory};
    use std::collections::BTreeMap;

    fn apply(state: &mut State, command: &Command) {
        let (outcome, _) = state.apply(command);
        outcome.expect("applied");
    }

    fn reign(id: u8, after_index: u64) -> Command {
        Command::BeginReign(BeginReign { reign: Bytes::from(vec![id; 16]), after_index })
    }

    /// Three chunkservers, copysets 1 to 3, volume 1 over them with segment 0 and attachment 1.
    fn copy() -> State {
        let mut state = State::default();
        apply(&mut state, &reign(1, 0));
        for n in 1..=3_u8 {
            let register = RegisterChunkserver {
                token: Bytes::from(vec![n; 32]),
                instance: Bytes::from(vec![n; 16]),
                address: format!("127.0.0.1:780{n}"),
                zone: format!("z{n}"),
                server: "s".to_owned(),
                pool: "default".to_owned(),
                ..RegisterChunkserver::default()
            };
            apply(&mut state, &Command::RegisterChunkserver(register));
        }
        let new = NewCopyset { chunkservers: vec![1, 2, 3], first_leader: 1 };
        let copysets = CreateCopysets { pool: "default".to_owned(), seen: 0, copysets: vec![new; 3] };
        apply(&mut state, &Command::CreateCopysets(copysets));
        let create = CreateVolume {
            name: "a".to_owned(),
            size_bytes: 8 * GIB,
            copysets: vec![2, 3, 1],
            at_unix_ms: 0,
        };
        apply(&mut state, &Command::CreateVolume(create));
        let attach = Attach { name: "a".to_owned(), holder: "h".to_owned(), ..Attach::default() };
        apply(&mut state, &Command::Attach(attach));
        let chunk_copysets = vec![2; 64];
        let allocate = AllocateSegment { volume: 1, attachment: 1, segment: 0, chunk_copysets };
        apply(&mut state, &Command::AllocateSegment(allocate));
        state
    }

    fn holds(volume: u64, attachment: u32, chunks: &[u64]) -> VolumeInventory {
        VolumeInventory { volume, attachment, dropped: false, chunks: chunks.to_vec() }
    }

    fn leads(copyset: u32, members: [(u64, u32); 3], volumes: Vec<VolumeInventory>) -> CopysetInventory {
        let member =
            |(replica, chunkserver)| MemberReport { replica, chunkserver, matched_index: 0, voter: true };
        CopysetInventory {
            copyset,
            replica: members[0].0,
            role: Role::Leader.into(),
            term: 5,
            members: members.into_iter().map(member).collect(),
            volumes,
        }
    }

    fn says(id: u32, copysets: Vec<CopysetInventory>) -> (ChunkserverId, Inventory) {
        let seen = MdsState {
            reign: vec![9; 16],
            ordinal: 7,
            applied_index: 50,
            chunkserver: 4,
            copyset: 4,
            replica: 20,
            volume: 3,
            attachment: 9,
        };
        let inventory = Inventory {
            chunkserver: id,
            token: vec![8; 32],
            address: format!("127.0.0.1:990{id}"),
            zone: format!("z{id}"),
            server: "s".to_owned(),
            seen: Some(seen),
            copysets,
            ..Inventory::default()
        };
        (ChunkserverId(id), inventory)
    }

    #[test]
    fn everything_that_anybody_remembers_is_taken_over_and_every_number_is_above_it() {
        let mut state = copy();
        let own = [(1, 1), (2, 2), (3, 3)];
        let dropped = VolumeInventory { volume: 3, dropped: true, ..VolumeInventory::default() };
        // Chunk 64 is segment 1 of volume 1; volume 2 was forgotten, its chunk 130 lies in segment 2.
        let inventories: Inventories = [
            says(1, vec![leads(1, own, vec![holds(1, 6, &[65, 1]), holds(2, 2, &[130, 1]), dropped])]),
            says(2, vec![leads(4, [(20, 1), (21, 2), (22, 4)], vec![holds(2, 2, &[])])]),
            says(3, vec![]),
            says(4, vec![]),
        ]
        .into();
        let adopt = plan(&state, &inventories, [5; 16], 40, 0, false).expect("it fits together");
        apply(&mut state, &Command::Adopt(adopt));
        assert!(state.is_put_back());
        assert!(state.chunkservers_given() >= 4 && state.copysets_given() >= 4);
        assert!(state.replicas_given() >= 22 && state.volumes_given() > 3);
        assert_eq!(state.chunkservers()[&ChunkserverId(4)].address, "127.0.0.1:9904");
        let learnt = &state.copysets()[&CopysetId(4)];
        assert_eq!(
            learnt.replicas.iter().map(|r| (r.id.0, r.chunkserver.0)).collect::<Vec<_>>(),
            [(20, 1), (21, 2), (22, 4)]
        );
        assert!(learnt.replicas.iter().all(|replica| replica.created), "none is made anew under its number");
        let a = &state.volumes()[&VolumeId(1)];
        assert_eq!((a.attachment, a.segments.len()), (6, 2));
        assert_eq!(a.attached.as_ref().expect("somebody has it").holder, FORGOTTEN_HOLDER);
        let map = &a.segments[&SegmentIndex(1)];
        assert_eq!(map[1], CopysetId(1), "where it was found");
        assert_eq!(map[0], CopysetId(3), "64 mod 3 = 1, the second of the ring");
        let (id, recovered) = state.volume_named("recovered-2").expect("it is back");
        assert_eq!((id, recovered.size_bytes, recovered.attachment), (VolumeId(2), 3 * GIB, 2));
        assert_eq!(recovered.segments[&SegmentIndex(2)][2], CopysetId(1));
        assert!(!state.volumes().contains_key(&VolumeId(3)), "it was deleted");
        // The next attachment is above those that are remembered, of any volume.
        let attach = Attach { name: "a".to_owned(), holder: "x".to_owned(), ..Attach::default() };
        apply(&mut state, &Command::Attach(attach));
        assert!(state.volumes()[&VolumeId(1)].attachment > 9);
        // What they had seen is a part of its history now, and the reign that begins is above it.
        let seen = |index| Seen { reign: Bytes::from(vec![9; 16]), ordinal: 7, index };
        assert!(state.has_been(&seen(50)) && !state.has_been(&seen(51)));
        assert!(state.reign().is_some_and(|reign| reign.ordinal > 7 && reign.id == vec![5; 16]));
        // As it is loaded again.
        let mut loaded = State::default();
        for (key, value) in state.records() {
            loaded.load(&key, &value).expect("ours");
        }
        assert_eq!(loaded, state);
    }

    #[test]
    fn what_cannot_be_told_apart_yet_is_waited_for() {
        let state = copy();
        let follower =
            CopysetInventory { role: Role::Follower.into(), ..leads(4, [(20, 1), (21, 2), (22, 4)], vec![]) };
        let stranger = leads(4, [(20, 1), (21, 2), (22, 9)], vec![]);
        for (says_one, expected) in [(follower, "no leader"), (stranger, "chunkserver-9")] {
            let inventories: Inventories = [says(1, vec![says_one]), says(4, vec![])].into();
            let why = plan(&state, &inventories, [5; 16], 40, 0, false).expect_err("not yet");
            assert!(why.contains(expected), "{why}");
        }
    }

    #[test]
    fn a_state_knows_what_it_has_been() {
        let mut state = copy();
        apply(&mut state, &reign(2, 30));
        let seen = |id: u8, index| Seen { reign: Bytes::from(vec![id; 16]), ordinal: 1, index };
        for (id, index, known) in
            [(1, 10, true), (1, 30, true), (1, 31, false), (2, 31, true), (2, 4000, true), (3, 1, false)]
        {
            assert_eq!(state.has_been(&seen(id, index)), known, "reign {id} at {index}");
        }
    }

    #[test]
    fn a_segments_map_is_the_ring_that_explains_what_was_found() {
        let ring = [1, 2, 3].map(CopysetId);
        let found = |pairs: &[(u64, u32)]| -> BTreeMap<u64, CopysetId> {
            pairs.iter().map(|&(chunk, copyset)| (chunk, CopysetId(copyset))).collect()
        };
        let map = |pairs: &[(u64, u32)]| segment_of(&ring, SegmentIndex(0), &found(pairs));
        assert_eq!(map(&[(0, 1), (4, 2)])[..3], ring);
        // The second one had no room when it was allocated.
        assert_eq!(map(&[(0, 1), (1, 3), (2, 1)])[..4], [1, 3, 1, 3].map(CopysetId));
        assert_eq!(map(&[(0, 3), (1, 3)])[..3], [3, 3, 3].map(CopysetId));
        let known = Found {
            copysets: [CopysetId(4), CopysetId(7), CopysetId(9)].into(),
            chunks: found(&[(3, 9), (8, 4)]),
            ..Found::default()
        };
        assert_eq!(ring_of(&known), [9, 7, 4].map(CopysetId));
    }
}
