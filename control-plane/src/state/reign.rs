//! The times for which one process led, and what makes an MDS whose directory was put back whole again.
//!
//! What always holds:
//!
//! - Every reign has a name that is met nowhere else. A chunkserver that obeyed one tells its name and how far it was; a
//!   state that does not know the name, or did not come so far in it, is older than what was obeyed.
//! - [`Adopt`] only raises and adds: numbers, attachments, what was forgotten. It removes the volumes of which a
//!   chunkserver knows that they were deleted, and nothing else.

use bytes::Bytes;
use evolute_protocol::geometry::CHUNKS_PER_SEGMENT;
use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId, SegmentIndex, VolumeId};

use super::command::{Adopt, AdoptedChunkserver, AdoptedCopyset, AdoptedVolume, BeginReign};
use super::copyset::{Copyset, REPLICAS, Replica};
use super::outcome::{Done, Outcome, Why, refuse};
use super::topology::Chunkserver;
use super::volume::{ATTACHMENT_MAX, Attached, Volume, check_name};
use super::{Changes, Key, State};

/// 128 random bits: not met twice.
pub const REIGN_BYTES: usize = 16;
/// A chunkserver that has been away for longer than this many starts of the MDS counts as one from another history.
pub const REIGNS_MAX: usize = 1024;
/// Who holds a volume whose attachment this state forgot: may allocate, and gives way to whoever attaches next.
pub const FORGOTTEN_HOLDER: &str = "(attached before this MDS was put back from a copy)";

/// One process's time as the leader, or what is known of one that this state has no part in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reign {
    pub id: Bytes,
    /// Rises with every reign that chunkservers obey.
    pub ordinal: u64,
    /// The last index of the log in it; none: it goes on.
    pub end: Option<u64>,
}

/// How far a chunkserver has seen an MDS be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub reign: Bytes,
    pub ordinal: u64,
    pub index: u64,
}

impl State {
    /// Is what was seen a part of this state's own history?
    pub fn has_been(&self, seen: &Seen) -> bool {
        self.reigns
            .iter()
            .any(|reign| reign.id == seen.reign && reign.end.is_none_or(|end| seen.index <= end))
    }

    pub fn reign(&self) -> Option<&Reign> {
        self.reigns.last()
    }

    /// It went on above what it forgot, and nobody has looked at that yet.
    pub fn is_put_back(&self) -> bool {
        self.put_back
    }

    pub fn attachment_floor(&self) -> u32 {
        self.attachment_floor
    }

    pub(super) fn begin_reign(&mut self, command: &BeginReign, changes: &mut Changes) -> Outcome {
        if command.reign.len() != REIGN_BYTES {
            return refuse(Why::Invalid, format!("a reign is named by {REIGN_BYTES} bytes"));
        }
        self.begin(command.reign.clone(), command.after_index);
        changes.push(Key::Reigns);
        Ok(Done::Plain)
    }

    fn begin(&mut self, id: Bytes, after_index: u64) {
        if let Some(last) = self.reigns.last_mut()
            && last.end.is_none()
        {
            last.end = Some(after_index);
        }
        let ordinal = self.reigns.iter().map(|reign| reign.ordinal).max().unwrap_or(0).saturating_add(1);
        self.reigns.push(Reign { id, ordinal, end: None });
        let too_many = self.reigns.len().saturating_sub(REIGNS_MAX);
        self.reigns.drain(..too_many);
    }

    /// A person has looked at what came back.
    pub(super) fn accept(&mut self, changes: &mut Changes) -> Outcome {
        if std::mem::take(&mut self.put_back) {
            changes.push(Key::Cluster);
        }
        Ok(Done::Plain)
    }

    pub(super) fn adopt(&mut self, command: &Adopt, changes: &mut Changes) -> Outcome {
        if let Err(message) = self.check_adopt(command) {
            return refuse(Why::Invalid, message);
        }
        for seen in &command.seen {
            // Below the reign that begins now, so that its ordinal is above all of them.
            let known = self.reigns.iter_mut().find(|reign| reign.id == seen.reign);
            match known {
                Some(reign) => reign.end = reign.end.map(|end| end.max(seen.index)),
                None => self.reigns.push(Reign {
                    id: seen.reign.clone(),
                    ordinal: seen.ordinal,
                    end: Some(seen.index),
                }),
            }
        }
        self.begin(command.reign.clone(), command.after_index);
        let given = &mut self.given;
        given.chunkserver = given.chunkserver.max(command.chunkserver);
        given.copyset = given.copyset.max(command.copyset);
        given.replica = given.replica.max(command.replica);
        given.volume = given.volume.max(command.volume);
        self.attachment_floor = self.attachment_floor.max(command.attachment).min(ATTACHMENT_MAX - 1);
        self.put_back = !command.accepted;
        changes.extend([Key::Cluster, Key::Reigns]);
        for adopted in &command.chunkservers {
            self.adopt_chunkserver(adopted, changes);
        }
        for adopted in &command.copysets {
            self.adopt_copyset(adopted, changes);
        }
        for &dropped in &command.dropped {
            self.adopt_drop(VolumeId(dropped), changes);
        }
        for adopted in &command.volumes {
            self.adopt_volume(adopted, changes);
        }
        for segment in &command.segments {
            let (id, index) = (VolumeId(segment.volume), SegmentIndex(segment.segment));
            let Some(volume) = self.volumes.get_mut(&id) else { continue };
            volume
                .segments
                .entry(index)
                .or_insert_with(|| segment.chunk_copysets.iter().copied().map(CopysetId).collect());
            changes.push(Key::Segment(id, index));
        }
        Ok(Done::Plain)
    }

    fn check_adopt(&self, command: &Adopt) -> Result<(), String> {
        if command.reign.len() != REIGN_BYTES {
            return Err(format!("a reign is named by {REIGN_BYTES} bytes"));
        }
        if let Some(copyset) = command.copysets.iter().find(|copyset| copyset.replicas.len() != REPLICAS) {
            return Err(format!("a copyset has {REPLICAS} replicas, not {}", copyset.replicas.len()));
        }
        if command.segments.iter().any(|segment| segment.chunk_copysets.len() as u64 != CHUNKS_PER_SEGMENT) {
            return Err(format!("a segment maps {CHUNKS_PER_SEGMENT} chunks"));
        }
        for volume in &command.volumes {
            if volume.copysets.is_empty() {
                return Err(format!("{} has no copysets", VolumeId(volume.volume)));
            }
            if !self.volumes.contains_key(&VolumeId(volume.volume)) {
                check_name(&volume.name)?;
            }
        }
        Ok(())
    }

    fn adopt_chunkserver(&mut self, adopted: &AdoptedChunkserver, changes: &mut Changes) {
        let id = ChunkserverId(adopted.chunkserver);
        let Some(register) = &adopted.as_registered else { return };
        self.chunkservers.entry(id).or_insert_with(|| Chunkserver {
            address: register.address.clone(),
            zone: register.zone.clone(),
            server: register.server.clone(),
            pool: register.pool.clone(),
            capacity_bytes: register.capacity_bytes,
            token: register.token.clone(),
            version: register.version.clone(),
            registered_by: register.instance.clone(),
            registered_unix_ms: register.at_unix_ms,
            retiring: false,
            // Its directory says itself since when it is the newest.
            started: None,
            accepted: false,
            dead: false,
        });
        changes.push(Key::Chunkserver(id));
    }

    fn adopt_copyset(&mut self, adopted: &AdoptedCopyset, changes: &mut Changes) {
        let id = CopysetId(adopted.copyset);
        let replica = |member: &super::command::AdoptedReplica| Replica {
            id: ReplicaId(member.replica),
            chunkserver: ChunkserverId(member.chunkserver),
            created: true,
        };
        let replicas: Vec<_> = adopted.replicas.iter().map(replica).collect();
        let first_leader = match self.copysets.get(&id) {
            Some(known) if replicas.iter().any(|replica| replica.id == known.first_leader) => {
                known.first_leader
            }
            _ => replicas[0].id,
        };
        let pool = adopted.pool.clone();
        self.copysets.insert(id, Copyset { pool, replicas, first_leader, pending: None });
        changes.push(Key::Copyset(id));
    }

    fn adopt_drop(&mut self, id: VolumeId, changes: &mut Changes) {
        let Some(volume) = self.volumes.remove(&id) else { return };
        self.names.remove(&volume.name);
        changes.extend(volume.segments.keys().map(|&segment| Key::Segment(id, segment)));
        self.dropping.insert(id, volume.copysets.into_iter().collect());
        changes.extend([Key::Volume(id), Key::Dropping(id)]);
    }

    fn adopt_volume(&mut self, adopted: &AdoptedVolume, changes: &mut Changes) {
        let id = VolumeId(adopted.volume);
        let copysets = adopted.copysets.iter().copied().map(CopysetId);
        if !self.volumes.contains_key(&id) {
            if self.names.contains_key(&adopted.name) {
                return;
            }
            self.names.insert(adopted.name.clone(), id);
        }
        let volume = self.volumes.entry(id).or_insert_with(|| Volume {
            name: adopted.name.clone(),
            size_bytes: adopted.size_bytes,
            copysets: Vec::new(),
            attachment: 0,
            attached: None,
            importing: None,
            created_unix_ms: adopted.at_unix_ms,
            segments: std::collections::BTreeMap::new(),
        });
        for copyset in copysets {
            if !volume.copysets.contains(&copyset) {
                volume.copysets.push(copyset);
            }
        }
        if adopted.attachment > volume.attachment {
            // Whoever has it goes on, also with new segments, until somebody attaches.
            volume.attachment = adopted.attachment;
            let holder = FORGOTTEN_HOLDER.to_owned();
            volume.attached =
                Some(Attached { holder, since_unix_ms: adopted.at_unix_ms, secret_hash: Vec::new() });
        }
        changes.push(Key::Volume(id));
    }
}
