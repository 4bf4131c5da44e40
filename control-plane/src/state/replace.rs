//! A replica takes another one's place.
//!
//! ```text
//!            BeginReplace                    ReplaceDone
//!  {a, b, c} ───────────▶ {a, b, c} + d ───────────────▶ {a, b, d}      d has a number of its own
//!                               │ CancelReplace
//!                               ▼              ReplaceUndone
//!                         {a, b, c} + d, over ─────────────▶ {a, b, c}
//! ```
//!
//! The Raft group decides what its membership is; this state asks for a change and then writes down what became of it.
//! So `ReplaceDone` carries everything it needs and is taken even when nothing (any more) is pending: a change that was
//! cancelled too late has happened all the same. And a cancelled change stays, as over, until the group is seen without
//! the new replica, for only then may another one begin.
//!
//! What always holds ([`State::check_copyset`]): members are in different zones, with the new one in the old one's place
//! too; one change per copyset; the replica to be replaced is a member; no number is given twice.

use std::collections::BTreeSet;

use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId};

use super::command::{BeginReplace, CancelReplace, ReplaceDone, ReplaceUndone};
use super::copyset::{Copyset, Pending, REPLICAS, Replica};
use super::outcome::{Done, Outcome, Refused, Why, refuse};
use super::{Changes, Key, State};

/// Why a replica is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Reason {
    /// Its chunkserver does not report.
    Silent = 1,
    /// Its chunkserver reports, but has lost it.
    Lost = 2,
    /// Its chunkserver is to become empty.
    Retiring = 3,
    /// Another chunkserver has less to do.
    Balance = 4,
}

impl State {
    pub(super) fn begin_replace(&mut self, command: &BeginReplace, changes: &mut Changes) -> Outcome {
        let (id, old) = (CopysetId(command.copyset), ReplicaId(command.old_replica));
        let chunkserver = ChunkserverId(command.chunkserver);
        let Some(copyset) = self.copysets.get(&id) else {
            return refuse(Why::NotFound, format!("there is no {id}"));
        };
        let Ok(reason) = Reason::try_from(command.reason) else {
            return refuse(Why::Invalid, format!("{} is no reason to replace a replica", command.reason));
        };
        if let Some(pending) = &copyset.pending {
            let message = format!("{id} is exchanging {} for {} already", pending.old, pending.new.id);
            return refuse(Why::Stale, message);
        }
        let Some(replaced) = copyset.replica(old) else {
            return refuse(Why::Stale, format!("{old} is no member of {id}"));
        };
        if replaced.chunkserver == chunkserver && reason != Reason::Lost {
            return refuse(Why::Invalid, format!("{old} is on {chunkserver} already"));
        }
        self.check_place(id, copyset, old, chunkserver)?;
        if self.chunkservers[&chunkserver].retiring {
            return refuse(Why::Stale, format!("{chunkserver} is retiring"));
        }
        // 2^64 replicas are not reached by counting.
        self.given.replica += 1;
        let new = Replica { id: ReplicaId(self.given.replica), chunkserver, created: false };
        let copyset = self.copysets.get_mut(&id).expect("it was there a moment ago");
        copyset.pending = Some(Pending { old, new, reason, over: false });
        changes.extend([Key::Cluster, Key::Copyset(id)]);
        self.assert_copyset(id);
        Ok(Done::Plain)
    }

    pub(super) fn replace_done(&mut self, command: &ReplaceDone, changes: &mut Changes) -> Outcome {
        let (id, old) = (CopysetId(command.copyset), ReplicaId(command.old_replica));
        let (new, chunkserver) = (ReplicaId(command.new_replica), ChunkserverId(command.chunkserver));
        let Some(copyset) = self.copysets.get(&id) else {
            return refuse(Why::NotFound, format!("there is no {id}"));
        };
        if copyset.replica(new).is_some() && copyset.replica(old).is_none() {
            // Reports repeat themselves.
            return Ok(Done::Plain);
        }
        if copyset.replica(old).is_none() {
            return refuse(Why::Stale, format!("{old} is no member of {id}"));
        }
        if new.0 == 0 || new.0 > self.given.replica {
            return refuse(Why::Invalid, format!("{new} was never given"));
        }
        let elsewhere = |(other, copyset): (&CopysetId, &Copyset)| {
            *other != id && copyset.everyone().any(|replica| replica.id == new)
        };
        if self.copysets.iter().any(elsewhere) || copyset.replica(new).is_some() {
            return refuse(Why::Invalid, format!("{new} has another place"));
        }
        self.check_place(id, copyset, old, chunkserver)?;
        let copyset = self.copysets.get_mut(&id).expect("it was there a moment ago");
        for replica in copyset.replicas.iter_mut().filter(|replica| replica.id == old) {
            *replica = Replica { id: new, chunkserver, created: true };
        }
        if copyset.first_leader == old {
            copyset.first_leader = new;
        }
        // Whatever was pending was decided for members that are not these.
        copyset.pending = None;
        changes.push(Key::Copyset(id));
        self.assert_copyset(id);
        Ok(Done::Plain)
    }

    pub(super) fn cancel_replace(&mut self, command: &CancelReplace, changes: &mut Changes) -> Outcome {
        let id = CopysetId(command.copyset);
        let pending = self.pending_mut(id, ReplicaId(command.new_replica))?;
        if !pending.over {
            pending.over = true;
            changes.push(Key::Copyset(id));
        }
        Ok(Done::Plain)
    }

    pub(super) fn replace_undone(&mut self, command: &ReplaceUndone, changes: &mut Changes) -> Outcome {
        let (id, new) = (CopysetId(command.copyset), ReplicaId(command.new_replica));
        if !self.pending_mut(id, new)?.over {
            return refuse(Why::Invalid, format!("the change to {new} of {id} was not cancelled"));
        }
        self.copysets.get_mut(&id).expect("it was there a moment ago").pending = None;
        changes.push(Key::Copyset(id));
        Ok(Done::Plain)
    }

    fn pending_mut(&mut self, id: CopysetId, new: ReplicaId) -> Result<&mut Pending, Refused> {
        let Some(copyset) = self.copysets.get_mut(&id) else {
            return Err(Refused { why: Why::NotFound, message: format!("there is no {id}") });
        };
        let pending = copyset.pending.as_mut().filter(|pending| pending.new.id == new);
        let message = || format!("{id} is not waiting for {new}");
        pending.ok_or_else(|| Refused { why: Why::Stale, message: message() })
    }

    /// May a replica on this chunkserver stand in the place of `old`?
    fn check_place(
        &self,
        id: CopysetId,
        copyset: &Copyset,
        old: ReplicaId,
        chunkserver: ChunkserverId,
    ) -> Result<(), Refused> {
        let Some(place) = self.chunkservers.get(&chunkserver) else {
            return Err(Refused { why: Why::NotFound, message: format!("there is no {chunkserver}") });
        };
        let invalid = |message| Err(Refused { why: Why::Invalid, message });
        if place.pool != copyset.pool {
            return invalid(format!(
                "{chunkserver} is in pool {}, {id} in pool {}",
                place.pool, copyset.pool
            ));
        }
        for stays in copyset.replicas.iter().filter(|replica| replica.id != old) {
            if self.chunkservers[&stays.chunkserver].zone == place.zone {
                return invalid(format!("{id} has a replica in zone {} already", place.zone));
            }
        }
        Ok(())
    }

    /// What always holds of a copyset; says what does not.
    pub fn check_copyset(&self, id: CopysetId) -> Result<(), String> {
        let Some(copyset) = self.copysets.get(&id) else { return Ok(()) };
        let zones = |replicas: &mut dyn Iterator<Item = &Replica>| {
            let zone = |replica: &Replica| Some(&self.chunkservers.get(&replica.chunkserver)?.zone);
            replicas.filter_map(zone).collect::<BTreeSet<_>>().len()
        };
        if copyset.replicas.len() != REPLICAS || zones(&mut copyset.replicas.iter()) != REPLICAS {
            return Err(format!("{id} has not {REPLICAS} replicas in {REPLICAS} zones"));
        }
        if copyset.replica(copyset.first_leader).is_none() {
            return Err(format!("{} leads {id} first but is no member", copyset.first_leader));
        }
        let ids: BTreeSet<_> = copyset.everyone().map(|replica| replica.id).collect();
        if ids.len() != copyset.everyone().count() || ids.iter().any(|id| id.0 > self.given.replica) {
            return Err(format!("the replicas of {id} have numbers that were not given to them"));
        }
        if let Some(pending) = &copyset.pending {
            if copyset.replica(pending.old).is_none() {
                return Err(format!("{} is to be replaced but is no member of {id}", pending.old));
            }
            let mut then = copyset.replicas.iter().filter(|replica| replica.id != pending.old);
            if zones(&mut (&mut then).chain(std::iter::once(&pending.new))) != REPLICAS {
                return Err(format!("{id} will have two replicas in one zone"));
            }
        }
        Ok(())
    }

    fn assert_copyset(&self, id: CopysetId) {
        if let Err(broken) = self.check_copyset(id) {
            panic!("the state broke its own rule: {broken}");
        }
    }
}
