//! Copysets: which three chunkservers keep the same chunks.
//!
//! A replica id is given once and belongs to one place in one membership. What the state remembers about a replica
//! beyond that is whether it was ever seen alive: a chunkserver is told to create it only before. A replica that was
//! seen and is gone has forgotten its votes and its log; created anew under the same id it could undo a commit.

use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId};

use super::command::{CreateCopysets, NewCopyset, ReplicasCreated};
use super::outcome::{Done, Outcome, Why, refuse};
use super::replace::Reason;
use super::{Changes, Key, State};

/// Three replicas: any one may be lost at any time.
pub const REPLICAS: usize = 3;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copyset {
    pub pool: String,
    /// [`REPLICAS`] of them, no two in one zone.
    pub replicas: Vec<Replica>,
    /// Who should lead first, and where leadership goes back to when that evens things out.
    pub first_leader: ReplicaId,
    /// The replica that is to take another one's place.
    pub pending: Option<Pending>,
}

/// A change of one replica that has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pending {
    /// A member, until the new one is.
    pub old: ReplicaId,
    pub new: Replica,
    pub reason: Reason,
    /// Cancelled; the new one is to leave the group if it has got into it.
    pub over: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replica {
    pub id: ReplicaId,
    pub chunkserver: ChunkserverId,
    /// It was reported at least once.
    pub created: bool,
}

impl Copyset {
    pub fn replica_on(&self, chunkserver: ChunkserverId) -> Option<&Replica> {
        self.replicas.iter().find(|replica| replica.chunkserver == chunkserver)
    }

    pub fn replica(&self, id: ReplicaId) -> Option<&Replica> {
        self.replicas.iter().find(|replica| replica.id == id)
    }

    /// The members, and the one that is to become a member.
    pub fn everyone(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.iter().chain(self.pending.as_ref().map(|pending| &pending.new))
    }

    pub fn first_leader_chunkserver(&self) -> Option<ChunkserverId> {
        self.replica(self.first_leader).map(|replica| replica.chunkserver)
    }
}

impl State {
    pub(super) fn create_copysets(&mut self, command: &CreateCopysets, changes: &mut Changes) -> Outcome {
        if command.seen != self.given.copyset {
            return refuse(
                Why::Stale,
                format!("{} copysets exist, the decision knew {}", self.given.copyset, command.seen),
            );
        }
        for new in &command.copysets {
            if let Err(message) = self.check_members(&command.pool, new) {
                return refuse(Why::Invalid, message);
            }
        }
        let count = u32::try_from(command.copysets.len()).unwrap_or(u32::MAX);
        if self.given.copyset.checked_add(count).is_none() {
            return refuse(Why::Invalid, "no copyset id is left");
        }
        for new in &command.copysets {
            self.given.copyset += 1;
            let id = CopysetId(self.given.copyset);
            let mut first_leader = ReplicaId(0);
            let mut replicas = Vec::with_capacity(new.chunkservers.len());
            for &chunkserver in &new.chunkservers {
                // 2^64 replicas are not reached by counting.
                self.given.replica += 1;
                let replica = ReplicaId(self.given.replica);
                if chunkserver == new.first_leader {
                    first_leader = replica;
                }
                replicas.push(Replica {
                    id: replica,
                    chunkserver: ChunkserverId(chunkserver),
                    created: false,
                });
            }
            self.copysets
                .insert(id, Copyset { pool: command.pool.clone(), replicas, first_leader, pending: None });
            changes.push(Key::Copyset(id));
        }
        changes.push(Key::Cluster);
        Ok(Done::Plain)
    }

    /// Placement promised this; the state keeps it.
    fn check_members(&self, pool: &str, new: &NewCopyset) -> Result<(), String> {
        if new.chunkservers.len() != REPLICAS {
            return Err(format!("a copyset has {REPLICAS} replicas, not {}", new.chunkservers.len()));
        }
        let mut zones = Vec::with_capacity(REPLICAS);
        for &id in &new.chunkservers {
            let id = ChunkserverId(id);
            let Some(chunkserver) = self.chunkservers.get(&id) else {
                return Err(format!("there is no {id}"));
            };
            if chunkserver.pool != pool {
                return Err(format!("{id} is in pool {}, not {pool}", chunkserver.pool));
            }
            if zones.contains(&&chunkserver.zone) {
                return Err(format!("two replicas of one copyset in zone {}", chunkserver.zone));
            }
            zones.push(&chunkserver.zone);
        }
        if !new.chunkservers.contains(&new.first_leader) {
            return Err(format!("{} leads first but has no replica", ChunkserverId(new.first_leader)));
        }
        Ok(())
    }

    pub(super) fn replicas_created(&mut self, command: &ReplicasCreated, changes: &mut Changes) -> Outcome {
        for seen in &command.replicas {
            let id = CopysetId(seen.copyset);
            // A report about a copyset or a replica we do not know says nothing about one that we know.
            let Some(copyset) = self.copysets.get_mut(&id) else { continue };
            let joining = copyset.pending.as_mut().map(|pending| &mut pending.new);
            let known =
                copyset.replicas.iter_mut().chain(joining).find(|replica| replica.id.0 == seen.replica);
            let Some(replica) = known.filter(|replica| !replica.created) else { continue };
            replica.created = true;
            changes.push(Key::Copyset(id));
        }
        Ok(Done::Plain)
    }
}
