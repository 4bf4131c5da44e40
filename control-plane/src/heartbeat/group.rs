//! A copyset's Raft group as its leader reports it: the truth about who is a member, of which the state is the record.

use std::collections::BTreeSet;
use std::time::Instant;

use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId};
use evolute_protocol::rpc::{MemberReport, ReplicaReport, Role};

use super::reports::Reports;
use crate::state::Copyset;

/// Entries a replica may lag behind its leader, by the leader's own count, and count as caught up: what is in flight in
/// a busy copyset, and milliseconds to catch up with.
pub const CAUGHT_UP_WITHIN: u64 = 256;

/// What the leader of the newest term says, while it is online.
#[derive(Debug, Clone, Copy)]
pub struct Group<'a> {
    pub leader: ChunkserverId,
    pub says: &'a ReplicaReport,
}

impl<'a> Group<'a> {
    /// `None`: nobody leads, or the leader itself has not been heard.
    pub fn of(id: CopysetId, copyset: &Copyset, reports: &'a Reports, now: Instant) -> Option<Self> {
        let members = copyset.everyone().map(|replica| replica.chunkserver);
        let known = reports.leader(id, members, now)?;
        let says = reports.online(known.chunkserver, now)?.replicas.get(&id)?;
        let itself = says.role() == Role::Leader && says.term >= known.term;
        itself.then_some(Self { leader: known.chunkserver, says })
    }

    pub fn member(&self, id: ReplicaId) -> Option<&'a MemberReport> {
        self.says.members.iter().find(|member| member.replica == id.0)
    }

    pub fn is_voter(&self, id: ReplicaId) -> bool {
        self.member(id).is_some_and(|member| member.voter)
    }

    /// During a change of members these are the old ones and the new ones.
    pub fn voters(&self) -> BTreeSet<ReplicaId> {
        voters(self.says)
    }

    /// Entries it lacks. `None`: no member.
    pub fn behind(&self, id: ReplicaId) -> Option<u64> {
        Some(self.says.last_index.saturating_sub(self.member(id)?.matched_index))
    }

    pub fn has_caught_up(&self, id: ReplicaId) -> bool {
        self.behind(id).is_some_and(|behind| behind <= CAUGHT_UP_WITHIN)
    }
}

/// As one replica knows them.
pub fn voters(report: &ReplicaReport) -> BTreeSet<ReplicaId> {
    report.members.iter().filter(|member| member.voter).map(|member| ReplicaId(member.replica)).collect()
}
