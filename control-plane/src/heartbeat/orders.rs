//! What one chunkserver is to do now: the difference between the state and its last report, and nothing else.
//!
//! There is no list of orders to keep or to lose. As long as the difference is there the order is given again; once a
//! report shows the deed it is not. Only transfers of leadership are remembered, because to repeat one is to undo it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId};
use evolute_protocol::rpc::{CreateReplica, DropVolume, MemberReport, Order, TransferLeader, order};

use super::reports::Reports;
use crate::state::{Copyset, State};

/// A transfer that has not happened by then (one to three elections) will not.
pub const TRANSFER_PATIENCE: Duration = Duration::from_secs(5);

/// A transfer of leadership that was ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    pub from: ChunkserverId,
    pub to: ReplicaId,
    pub to_chunkserver: ChunkserverId,
    pub since: Instant,
}

pub type Transfers = BTreeMap<CopysetId, Transfer>;

/// Everything the chunkserver should be told. Empty until its first report: what it has is not known.
pub fn orders(
    id: ChunkserverId,
    state: &State,
    reports: &Reports,
    transfers: &Transfers,
    now: Instant,
) -> Vec<Order> {
    let Some(report) = reports.last(id) else { return Vec::new() };
    let mut orders = Vec::new();
    for (&copyset, record) in state.copysets() {
        let Some(replica) = record.replica_on(id) else { continue };
        // A replica that was there once must not be made anew under its old id: see state/copyset.rs.
        if !replica.created && !report.replicas.contains_key(&copyset) {
            orders.push(order::What::CreateReplica(create_replica(copyset, record, replica.id)));
        }
    }
    let leads = |copyset: CopysetId| {
        let members = state.copysets().get(&copyset).into_iter().flat_map(|record| &record.replicas);
        let leader = reports.leader(copyset, members.map(|replica| replica.chunkserver), now);
        leader.is_some_and(|leader| leader.chunkserver == id)
    };
    for (&volume, copysets) in state.dropping() {
        for &copyset in copysets.iter().filter(|&&copyset| leads(copyset)) {
            orders.push(order::What::DropVolume(DropVolume { copyset: copyset.0, volume: volume.0 }));
        }
    }
    for (&copyset, transfer) in transfers {
        if transfer.from == id && transfer.is_waiting(now) && leads(copyset) {
            let to_replica = transfer.to.0;
            orders.push(order::What::TransferLeader(TransferLeader { copyset: copyset.0, to_replica }));
        }
    }
    orders.into_iter().map(|what| Order { what: Some(what) }).collect()
}

fn create_replica(id: CopysetId, copyset: &Copyset, replica: ReplicaId) -> CreateReplica {
    let member = |replica: &crate::state::Replica| MemberReport {
        replica: replica.id.0,
        chunkserver: replica.chunkserver.0,
        matched_index: 0,
    };
    CreateReplica {
        copyset: id.0,
        replica: replica.0,
        members: copyset.replicas.iter().map(member).collect(),
        first_leader: copyset.first_leader.0,
    }
}

impl Transfer {
    /// It may still happen.
    pub fn is_waiting(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) <= TRANSFER_PATIENCE
    }
}
