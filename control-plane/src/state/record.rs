//! The state as records: a key and a value each, as the store keeps them.
//!
//! Keys sort as the state iterates: one byte for the kind, then ids with their highest byte first. Values are
//! protobuf messages; field numbers are never used twice (`docs/control-plane.md` draws them).

use bytes::Bytes;
use evolute_protocol::geometry::CHUNKS_PER_SEGMENT;
use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId, ReplicaId, SegmentIndex, VolumeId};
use prost::Message;

use super::command::Started;
use super::copyset::{Copyset, Pending, Replica};
use super::import::Importing;
use super::reign::Reign;
use super::replace::Reason;
use super::topology::Chunkserver;
use super::volume::{Attached, Volume};
use super::{Given, State};

/// Names one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// The cluster's id and the last numbers given. Always there once a command was applied.
    Cluster,
    /// The reigns of this MDS.
    Reigns,
    Chunkserver(ChunkserverId),
    Copyset(CopysetId),
    Volume(VolumeId),
    Segment(VolumeId, SegmentIndex),
    Dropping(VolumeId),
}

const CLUSTER: u8 = b'a';
const REIGNS: u8 = b'b';
const CHUNKSERVER: u8 = b'c';
const COPYSET: u8 = b'k';
const VOLUME: u8 = b'v';
const SEGMENT: u8 = b'w'; // after its volume: a segment is loaded into what is there already
const DROPPING: u8 = b'x';

/// A record that cannot have been written by this program.
#[derive(Debug, thiserror::Error)]
pub enum Damaged {
    #[error("a record has the unknown key {0:02x?}")]
    Key(Vec<u8>),
    #[error("the record of {key:?} cannot be read")]
    Value {
        key: Key,
        #[source]
        source: prost::DecodeError,
    },
    #[error("the record of {key:?} says what cannot be: {what}")]
    Impossible { key: Key, what: &'static str },
}

impl Key {
    pub fn encode(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(13);
        match self {
            Key::Cluster => bytes.push(CLUSTER),
            Key::Reigns => bytes.push(REIGNS),
            Key::Chunkserver(id) => {
                bytes.push(CHUNKSERVER);
                bytes.extend(id.0.to_be_bytes());
            }
            Key::Copyset(id) => {
                bytes.push(COPYSET);
                bytes.extend(id.0.to_be_bytes());
            }
            Key::Volume(id) => {
                bytes.push(VOLUME);
                bytes.extend(id.0.to_be_bytes());
            }
            Key::Segment(volume, segment) => {
                bytes.push(SEGMENT);
                bytes.extend(volume.0.to_be_bytes());
                bytes.extend(segment.0.to_be_bytes());
            }
            Key::Dropping(id) => {
                bytes.push(DROPPING);
                bytes.extend(id.0.to_be_bytes());
            }
        }
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Damaged> {
        let damaged = || Damaged::Key(bytes.to_vec());
        let (&kind, rest) = bytes.split_first().ok_or_else(damaged)?;
        let four = |at: &[u8]| at.try_into().map(u32::from_be_bytes).map_err(|_| damaged());
        let eight = |at: &[u8]| at.try_into().map(u64::from_be_bytes).map_err(|_| damaged());
        Ok(match (kind, rest.len()) {
            (CLUSTER, 0) => Key::Cluster,
            (REIGNS, 0) => Key::Reigns,
            (CHUNKSERVER, 4) => Key::Chunkserver(ChunkserverId(four(rest)?)),
            (COPYSET, 4) => Key::Copyset(CopysetId(four(rest)?)),
            (VOLUME, 8) => Key::Volume(VolumeId(eight(rest)?)),
            (SEGMENT, 12) => Key::Segment(VolumeId(eight(&rest[..8])?), SegmentIndex(four(&rest[8..])?)),
            (DROPPING, 8) => Key::Dropping(VolumeId(eight(rest)?)),
            _ => return Err(damaged()),
        })
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct ClusterRecord {
    #[prost(bytes = "bytes", tag = "1")]
    cluster: Bytes,
    #[prost(uint32, tag = "2")]
    chunkservers_given: u32,
    #[prost(uint32, tag = "3")]
    copysets_given: u32,
    #[prost(uint64, tag = "4")]
    replicas_given: u64,
    #[prost(uint64, tag = "5")]
    volumes_given: u64,
    #[prost(uint32, tag = "40")]
    attachment_floor: u32,
    #[prost(bool, tag = "41")]
    put_back: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ReignsRecord {
    #[prost(message, repeated, tag = "1")]
    reigns: Vec<ReignRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ReignRecord {
    #[prost(bytes = "bytes", tag = "1")]
    id: Bytes,
    #[prost(uint64, tag = "2")]
    ordinal: u64,
    /// Absent: it goes on.
    #[prost(uint64, optional, tag = "3")]
    end: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ChunkserverRecord {
    #[prost(string, tag = "1")]
    address: String,
    #[prost(string, tag = "2")]
    zone: String,
    #[prost(string, tag = "3")]
    server: String,
    #[prost(string, tag = "4")]
    pool: String,
    #[prost(uint64, tag = "5")]
    capacity_bytes: u64,
    #[prost(bytes = "bytes", tag = "6")]
    token: Bytes,
    #[prost(string, tag = "7")]
    version: String,
    #[prost(bytes = "bytes", tag = "8")]
    registered_by: Bytes,
    #[prost(uint64, tag = "9")]
    registered_unix_ms: u64,
    #[prost(bool, tag = "10")]
    retiring: bool,
    #[prost(message, optional, tag = "50")]
    started: Option<Started>,
    #[prost(bool, tag = "51")]
    accepted: bool,
    #[prost(bool, tag = "52")]
    dead: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CopysetRecord {
    #[prost(string, tag = "1")]
    pool: String,
    #[prost(message, repeated, tag = "2")]
    replicas: Vec<ReplicaRecord>,
    #[prost(uint64, tag = "3")]
    first_leader: u64,
    #[prost(message, optional, tag = "4")]
    pending: Option<PendingRecord>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct PendingRecord {
    #[prost(uint64, tag = "1")]
    old: u64,
    #[prost(message, required, tag = "2")]
    new: ReplicaRecord,
    #[prost(enumeration = "Reason", tag = "3")]
    reason: i32,
    #[prost(bool, tag = "4")]
    over: bool,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct ReplicaRecord {
    #[prost(uint64, tag = "1")]
    replica: u64,
    #[prost(uint32, tag = "2")]
    chunkserver: u32,
    #[prost(bool, tag = "3")]
    created: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct VolumeRecord {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint64, tag = "2")]
    size_bytes: u64,
    #[prost(uint32, repeated, tag = "3")]
    copysets: Vec<u32>,
    #[prost(uint32, tag = "4")]
    attachment: u32,
    #[prost(message, optional, tag = "5")]
    attached: Option<AttachedRecord>,
    #[prost(uint64, tag = "6")]
    created_unix_ms: u64,
    #[prost(message, optional, tag = "60")]
    importing: Option<AttachedRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AttachedRecord {
    #[prost(string, tag = "1")]
    holder: String,
    #[prost(uint64, tag = "2")]
    since_unix_ms: u64,
    #[prost(bytes = "vec", tag = "3")]
    secret_hash: Vec<u8>,
}

/// Of a segment and of a volume that is being dropped alike.
#[derive(Clone, PartialEq, prost::Message)]
struct CopysetListRecord {
    #[prost(uint32, repeated, tag = "1")]
    copysets: Vec<u32>,
}

impl State {
    /// The record's value now; none: it is gone.
    pub fn record(&self, key: Key) -> Option<Vec<u8>> {
        let list = |ids: &mut dyn Iterator<Item = &CopysetId>| {
            CopysetListRecord { copysets: ids.map(|id| id.0).collect() }.encode_to_vec()
        };
        Some(match key {
            Key::Cluster => ClusterRecord {
                cluster: self.cluster.map(|id| Bytes::copy_from_slice(&id.0)).unwrap_or_default(),
                chunkservers_given: self.given.chunkserver,
                copysets_given: self.given.copyset,
                replicas_given: self.given.replica,
                volumes_given: self.given.volume,
                attachment_floor: self.attachment_floor,
                put_back: self.put_back,
            }
            .encode_to_vec(),
            Key::Reigns if self.reigns.is_empty() => return None,
            Key::Reigns => {
                let reign = |reign: &Reign| ReignRecord {
                    id: reign.id.clone(),
                    ordinal: reign.ordinal,
                    end: reign.end,
                };
                ReignsRecord { reigns: self.reigns.iter().map(reign).collect() }.encode_to_vec()
            }
            Key::Chunkserver(id) => {
                let chunkserver = self.chunkservers.get(&id)?.clone();
                ChunkserverRecord {
                    address: chunkserver.address,
                    zone: chunkserver.zone,
                    server: chunkserver.server,
                    pool: chunkserver.pool,
                    capacity_bytes: chunkserver.capacity_bytes,
                    token: chunkserver.token,
                    version: chunkserver.version,
                    registered_by: chunkserver.registered_by,
                    registered_unix_ms: chunkserver.registered_unix_ms,
                    retiring: chunkserver.retiring,
                    started: chunkserver.started,
                    accepted: chunkserver.accepted,
                    dead: chunkserver.dead,
                }
                .encode_to_vec()
            }
            Key::Copyset(id) => {
                let copyset = self.copysets.get(&id)?;
                let replica = |replica: &Replica| ReplicaRecord {
                    replica: replica.id.0,
                    chunkserver: replica.chunkserver.0,
                    created: replica.created,
                };
                CopysetRecord {
                    pool: copyset.pool.clone(),
                    replicas: copyset.replicas.iter().map(replica).collect(),
                    first_leader: copyset.first_leader.0,
                    pending: copyset.pending.as_ref().map(|pending| PendingRecord {
                        old: pending.old.0,
                        new: replica(&pending.new),
                        reason: pending.reason.into(),
                        over: pending.over,
                    }),
                }
                .encode_to_vec()
            }
            Key::Volume(id) => {
                let volume = self.volumes.get(&id)?;
                VolumeRecord {
                    name: volume.name.clone(),
                    size_bytes: volume.size_bytes,
                    copysets: volume.copysets.iter().map(|id| id.0).collect(),
                    attachment: volume.attachment,
                    attached: volume.attached.clone().map(|attached| AttachedRecord {
                        holder: attached.holder,
                        since_unix_ms: attached.since_unix_ms,
                        secret_hash: attached.secret_hash,
                    }),
                    created_unix_ms: volume.created_unix_ms,
                    importing: volume.importing.clone().map(|importing| AttachedRecord {
                        holder: importing.by,
                        since_unix_ms: importing.since_unix_ms,
                        ..AttachedRecord::default()
                    }),
                }
                .encode_to_vec()
            }
            Key::Segment(volume, segment) => {
                list(&mut self.volumes.get(&volume)?.segments.get(&segment)?.iter())
            }
            Key::Dropping(id) => list(&mut self.dropping.get(&id)?.iter()),
        })
    }

    /// Every record, in key order: what two replicas that agree hold alike.
    pub fn records(&self) -> impl Iterator<Item = (Vec<u8>, Vec<u8>)> {
        let segments = self
            .volumes
            .iter()
            .flat_map(|(&volume, v)| v.segments.keys().map(move |&segment| Key::Segment(volume, segment)));
        [Key::Cluster, Key::Reigns]
            .into_iter()
            .chain(self.chunkservers.keys().copied().map(Key::Chunkserver))
            .chain(self.copysets.keys().copied().map(Key::Copyset))
            .chain(self.volumes.keys().copied().map(Key::Volume))
            .chain(segments)
            .chain(self.dropping.keys().copied().map(Key::Dropping))
            .filter_map(|key| Some((key.encode(), self.record(key)?)))
    }

    /// Puts a record that was stored back to its place. In key order, into an empty state.
    pub fn load(&mut self, key: &[u8], value: &[u8]) -> Result<(), Damaged> {
        let key = Key::decode(key)?;
        let unreadable = |source| Damaged::Value { key, source };
        let impossible = |what| Damaged::Impossible { key, what };
        match key {
            Key::Cluster => {
                let record = ClusterRecord::decode(value).map_err(unreadable)?;
                self.cluster = match record.cluster.len() {
                    0 => None,
                    16 => Some(ClusterId(record.cluster[..].try_into().expect("16 bytes"))),
                    _ => return Err(impossible("a cluster id of a wrong length")),
                };
                (self.attachment_floor, self.put_back) = (record.attachment_floor, record.put_back);
                self.given = Given {
                    chunkserver: record.chunkservers_given,
                    copyset: record.copysets_given,
                    replica: record.replicas_given,
                    volume: record.volumes_given,
                };
            }
            Key::Reigns => {
                let record = ReignsRecord::decode(value).map_err(unreadable)?;
                let reign =
                    |reign: ReignRecord| Reign { id: reign.id, ordinal: reign.ordinal, end: reign.end };
                self.reigns = record.reigns.into_iter().map(reign).collect();
            }
            Key::Chunkserver(id) => {
                let record = ChunkserverRecord::decode(value).map_err(unreadable)?;
                self.chunkservers.insert(
                    id,
                    Chunkserver {
                        address: record.address,
                        zone: record.zone,
                        server: record.server,
                        pool: record.pool,
                        capacity_bytes: record.capacity_bytes,
                        token: record.token,
                        version: record.version,
                        registered_by: record.registered_by,
                        registered_unix_ms: record.registered_unix_ms,
                        retiring: record.retiring,
                        started: record.started,
                        accepted: record.accepted,
                        dead: record.dead,
                    },
                );
            }
            Key::Copyset(id) => {
                let record = CopysetRecord::decode(value).map_err(unreadable)?;
                let replica = |record: ReplicaRecord| Replica {
                    id: ReplicaId(record.replica),
                    chunkserver: ChunkserverId(record.chunkserver),
                    created: record.created,
                };
                let pending = |record: PendingRecord| match Reason::try_from(record.reason) {
                    Ok(reason) => Ok(Pending {
                        old: ReplicaId(record.old),
                        new: replica(record.new),
                        reason,
                        over: record.over,
                    }),
                    Err(_) => Err(impossible("a replica replaced for no reason")),
                };
                let copyset = Copyset {
                    pool: record.pool,
                    replicas: record.replicas.into_iter().map(replica).collect(),
                    first_leader: ReplicaId(record.first_leader),
                    pending: record.pending.map(pending).transpose()?,
                };
                self.copysets.insert(id, copyset);
            }
            Key::Volume(id) => {
                let record = VolumeRecord::decode(value).map_err(unreadable)?;
                let attached = |record: AttachedRecord| Attached {
                    holder: record.holder,
                    since_unix_ms: record.since_unix_ms,
                    secret_hash: record.secret_hash,
                };
                if record.copysets.is_empty() {
                    return Err(impossible("a volume without copysets"));
                }
                if self.names.insert(record.name.clone(), id).is_some() {
                    return Err(impossible("the name of another volume"));
                }
                let volume = Volume {
                    name: record.name,
                    size_bytes: record.size_bytes,
                    copysets: record.copysets.into_iter().map(CopysetId).collect(),
                    attachment: record.attachment,
                    attached: record.attached.map(attached),
                    importing: record
                        .importing
                        .map(|record| Importing { by: record.holder, since_unix_ms: record.since_unix_ms }),
                    created_unix_ms: record.created_unix_ms,
                    segments: std::collections::BTreeMap::new(),
                };
                self.volumes.insert(id, volume);
            }
            Key::Segment(id, segment) => {
                let record = CopysetListRecord::decode(value).map_err(unreadable)?;
                if record.copysets.len() as u64 != CHUNKS_PER_SEGMENT {
                    return Err(impossible("a segment without its 64 chunks"));
                }
                let volume = self.volumes.get_mut(&id).ok_or_else(|| impossible("a segment of no volume"))?;
                volume.segments.insert(segment, record.copysets.into_iter().map(CopysetId).collect());
            }
            Key::Dropping(id) => {
                let record = CopysetListRecord::decode(value).map_err(unreadable)?;
                self.dropping.insert(id, record.copysets.into_iter().map(CopysetId).collect());
            }
        }
        Ok(())
    }
}
