//! What one chunkserver is to do now: the difference between the state and its last report, and nothing else.
//!
//! There is no list of orders to keep or to lose. As long as the difference is there the order is given again; once a
//! report shows the deed it is not. Only transfers of leadership are remembered, because to repeat one is to undo it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId};
use evolute_protocol::rpc::{
    ChangeMembers, CreateReplica, DropVolume, MemberReport, Order, RemoveReplica, ReplicaReport,
    TransferLeader, order,
};

use super::group::Group;
use super::reports::Reports;
use crate::state::{Copyset, Replica, State};

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
        let here = report.replicas.get(&copyset);
        let concerned = record.everyone().any(|replica| replica.chunkserver == id);
        if here.is_none() && !concerned {
            continue;
        }
        let group = Group::of(copyset, record, reports, now);
        orders.extend(match here {
            None => host(id, copyset, record),
            Some(here) => remove(id, state, copyset, record, here, group.as_ref()),
        });
        if let Some(group) = group.filter(|group| group.leader == id) {
            orders.extend(change(copyset, record, &group, reports, now));
        }
    }
    let leads = |copyset: CopysetId| {
        let members = state.copysets().get(&copyset).into_iter().flat_map(|record| record.everyone());
        let leader = reports.leader(copyset, members.map(|replica| replica.chunkserver), now);
        leader.is_some_and(|leader| leader.chunkserver == id)
    };
    for (&volume, copysets) in state.dropping() {
        for &copyset in copysets.iter().filter(|&&copyset| leads(copyset)) {
            orders.push(order::What::DropVolume(DropVolume { copyset: copyset.0, volume: volume.0 }));
        }
    }
    for (&copyset, transfer) in transfers {
        // It may have become full or slow since, and given the leadership back.
        let can_lead =
            reports.last(transfer.to_chunkserver).is_none_or(|report| !report.full && !report.slow);
        if transfer.from == id && transfer.is_waiting(now) && can_lead && leads(copyset) {
            let to_replica = transfer.to.0;
            orders.push(order::What::TransferLeader(TransferLeader { copyset: copyset.0, to_replica }));
        }
    }
    orders.into_iter().map(|what| Order { what: Some(what) }).collect()
}

/// What a chunkserver without a replica of the copyset should have. A replica that was there once must not be made anew
/// under its old id: see state/copyset.rs.
fn host(id: ChunkserverId, copyset: CopysetId, record: &Copyset) -> Option<order::What> {
    let joining =
        record.pending.filter(|pending| pending.new.chunkserver == id && !pending.over).map(|p| p.new);
    let replica = joining.or_else(|| record.replica_on(id).copied())?;
    (!replica.created).then(|| {
        order::What::CreateReplica(CreateReplica {
            copyset: copyset.0,
            replica: replica.id.0,
            members: record.replicas.iter().map(member).collect(),
            first_leader: record.first_leader.0,
            joining: joining.is_some(),
        })
    })
}

/// A replica that is to go. Never one that this state gave no number to, nor one that a group may still count on.
fn remove(
    id: ChunkserverId,
    state: &State,
    copyset: CopysetId,
    record: &Copyset,
    here: &ReplicaReport,
    group: Option<&Group>,
) -> Option<order::What> {
    let replica = ReplicaId(here.replica);
    let is_member = |group: &Group| group.member(replica).is_some() || group.says.term < here.term;
    let left = group.is_some_and(|group| !is_member(group));
    let goes = if record.everyone().any(|known| known.id == replica) {
        // It makes room for the one that replaces it in its own place.
        let in_place = record
            .pending
            .is_some_and(|pending| pending.old == replica && pending.new.chunkserver == id && !pending.over);
        in_place && (left || !here.failed.is_empty())
    } else {
        left && (1..=state.replicas_given()).contains(&replica.0)
    };
    goes.then_some(order::What::RemoveReplica(RemoveReplica { copyset: copyset.0, replica: replica.0 }))
}

/// What the leader is to do about its group's members. One thing at a time: a newer order takes the place of an older.
fn change(
    copyset: CopysetId,
    record: &Copyset,
    group: &Group,
    reports: &Reports,
    now: Instant,
) -> Option<order::What> {
    let order = |add: Option<MemberReport>, remove: ReplicaId| {
        let change = ChangeMembers { copyset: copyset.0, add, remove_replica: remove.0 };
        Some(order::What::ChangeMembers(change))
    };
    // A change that was cancelled, and began all the same.
    let known = |id: u64| record.everyone().any(|replica| replica.id.0 == id);
    if let Some(stray) = group.says.members.iter().find(|member| !member.voter && !known(member.replica)) {
        return order(None, ReplicaId(stray.replica));
    }
    let pending = record.pending?;
    let new = pending.new;
    if group.is_voter(new.id) {
        // Half way there is no way back: it is finished by whoever leads.
        return group.member(pending.old).and_then(|_| order(Some(member(&new)), pending.old));
    }
    if pending.over {
        return group.member(new.id).and_then(|_| order(None, new.id));
    }
    let there = reports.online(new.chunkserver, now).and_then(|report| report.replicas.get(&copyset));
    let hosted = there.is_some_and(|there| there.replica == new.id.0);
    if hosted { order(Some(member(&new)), pending.old) } else { None }
}

fn member(replica: &Replica) -> MemberReport {
    MemberReport { replica: replica.id.0, chunkserver: replica.chunkserver.0, matched_index: 0, voter: true }
}

impl Transfer {
    /// It may still happen.
    pub fn is_waiting(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) <= TRANSFER_PATIENCE
    }
}

#[cfg(test)]
mod tests {
    use super::{Transfer, Transfers, orders};
    use crate::scheduler::world::World;
    use crate::state::command::{
        BeginReplace, CancelReplace, CreateVolume, CreatedReplica, DeleteVolume, ReplaceUndone,
        ReplicasCreated,
    };
    use crate::state::{Command, Reason};
    use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId};
    use evolute_protocol::rpc::{
        ChangeMembers, DropVolume, MemberReport, RemoveReplica, ReplicaReport, Role, TransferLeader, order,
    };
    use std::time::Duration;

    const ONE: ChunkserverId = ChunkserverId(1);

    fn told(world: &World, id: ChunkserverId, transfers: &Transfers) -> Vec<order::What> {
        let orders = orders(id, &world.state, &world.reports, transfers, world.now);
        orders.into_iter().map(|order| order.what.expect("an order says what")).collect()
    }

    #[test]
    fn a_replica_is_created_until_it_was_seen_once() {
        let mut world = World::with_three_chunkservers();
        assert_eq!(told(&world, ONE, &Transfers::new()), []);
        world.add_copyset([1, 2, 3]);
        for _ in 0..2 {
            let told = told(&world, ONE, &Transfers::new());
            let [order::What::CreateReplica(create)] = &told[..] else { panic!("{told:?}") };
            let mine = create.members.iter().find(|member| member.chunkserver == 1).expect("a member");
            assert_eq!((create.copyset, create.members.len(), create.replica), (7, 3, mine.replica));
            assert_eq!(create.first_leader, create.replica);
        }
        // Reported, but the state does not know yet.
        let replica = world.state.copysets()[&CopysetId(7)].replica_on(ONE).expect("a member").id.0;
        world.report_only(ONE, CopysetId(7), replica);
        assert_eq!(told(&world, ONE, &Transfers::new()), []);
        // It was there once, and is not any more: its votes are gone, so it must not come back under that id.
        let replicas = vec![CreatedReplica { copyset: 7, replica }];
        world.apply(&Command::ReplicasCreated(ReplicasCreated { replicas })).expect("applied");
        world.report(ONE);
        assert_eq!(told(&world, ONE, &Transfers::new()), []);
    }

    /// Copyset 1 on 1 (leads), 2, 3; chunkserver 4 is to take the place of 3.
    #[test]
    fn a_new_replica_is_hosted_then_joins_and_goes_again_when_it_is_not_wanted() {
        let mut world = World::with_three_chunkservers();
        let four = world.register("z3");
        let old = world.state.copysets()[&CopysetId(1)].replica_on(ChunkserverId(3)).expect("a member").id.0;
        let (copyset, reason) = (1, Reason::Silent.into());
        let begin = BeginReplace { copyset, old_replica: old, chunkserver: four.0, reason };
        world.apply(&Command::BeginReplace(begin)).expect("begun");
        let new = world.state.replicas_given();
        world.lead(&[1, 2, 3, 1, 2, 3]);
        let told_each = |world: &World| [ONE, four].map(|id| told(world, id, &Transfers::new()));

        let [leader, joining] = told_each(&world);
        let [order::What::CreateReplica(create)] = &joining[..] else { panic!("{joining:?}") };
        assert!(create.joining && create.replica == new && create.members.iter().all(|m| m.replica != new));
        assert_eq!(leader, [], "it is not there yet");
        world.report_only(four, CopysetId(1), new);
        let add = Some(MemberReport { replica: new, chunkserver: 4, matched_index: 0, voter: true });
        let change = order::What::ChangeMembers(ChangeMembers { copyset, add, remove_replica: old });
        assert_eq!(told_each(&world), [vec![change], vec![]]);

        let cancel = CancelReplace { copyset, new_replica: new };
        world.apply(&Command::CancelReplace(cancel)).expect("cancelled");
        assert_eq!(told_each(&world), [vec![], vec![]], "nobody took it in; but it may be on the way");
        world.apply(&Command::ReplaceUndone(ReplaceUndone { copyset, new_replica: new })).expect("undone");
        let remove = order::What::RemoveReplica(RemoveReplica { copyset, replica: new });
        assert_eq!(told_each(&world), [vec![], vec![remove]]);
        // Nothing goes that somebody may still count on, or that we know nothing about.
        for (copyset, replica, leader) in [(1, new, 0), (1, new + 1, 1), (99, new, 1), (1, 0, 1)] {
            world.lead(&[leader, 2, 3, 1, 2, 3]);
            world.report_only(four, CopysetId(copyset), replica);
            assert_eq!(told(&world, four, &Transfers::new()), [], "{copyset} {replica} led by {leader}");
        }
    }

    /// Copyset 1 on 1 (leads), 2, 3. A chunkserver hosts one replica of a copyset, so one that is made anew in its own
    /// place has to wait until the old one is away.
    #[test]
    fn a_replica_makes_room_for_the_one_in_its_own_place_when_nobody_counts_on_it() {
        let three = ChunkserverId(3);
        let (failed, well, member, left) = (true, false, true, false);
        for (replaced_on, cancelled, failed, member, goes) in [
            (three, false, failed, member, true),
            (three, false, well, left, true),
            (three, false, well, member, false),
            (three, true, failed, left, false),
            (ChunkserverId(4), false, failed, left, false),
        ] {
            let mut world = World::with_three_chunkservers();
            world.register("z3");
            let record = world.state.copysets()[&CopysetId(1)].clone();
            let old = record.replica_on(three).expect("a member").id.0;
            let (copyset, reason) = (1, Reason::Lost.into());
            let begin = BeginReplace { copyset, old_replica: old, chunkserver: replaced_on.0, reason };
            world.apply(&Command::BeginReplace(begin)).expect("begun");
            let new = world.state.replicas_given();
            if cancelled {
                let cancel = CancelReplace { copyset, new_replica: new };
                world.apply(&Command::CancelReplace(cancel)).expect("cancelled");
            }
            let members = record.replicas.iter().filter(|replica| member || replica.id.0 != old);
            let members = members.map(super::member).collect();
            let leads = ReplicaReport {
                copyset,
                replica: record.first_leader.0,
                role: Role::Leader.into(),
                term: 3,
                leader_chunkserver: 1,
                members,
                ..ReplicaReport::default()
            };
            world.take(ONE, vec![leads]);
            let says = |replica, failed: bool| {
                let failed = if failed { "its log is damaged".to_owned() } else { String::new() };
                vec![ReplicaReport { copyset, replica, failed, ..ReplicaReport::default() }]
            };
            world.take(three, says(old, failed));
            let expected = order::What::RemoveReplica(RemoveReplica { copyset, replica: old });
            let expected = if goes { vec![expected] } else { vec![] };
            let case = format!("on {replaced_on}, cancelled {cancelled}, failed {failed}, member {member}");
            assert_eq!(told(&world, three, &Transfers::new()), expected, "{case}");
            // The new one is not what has to go.
            world.take(three, says(new, true));
            assert_eq!(told(&world, three, &Transfers::new()), [], "{case}");
        }
    }

    #[test]
    fn nobody_is_told_anything_before_it_reported() {
        let mut world = World::with_three_chunkservers();
        let id = world.register("z4");
        world.add_copyset([id.0, 2, 3]);
        world.reconnect(id);
        assert_eq!(told(&world, id, &Transfers::new()), []);
        world.report(id);
        assert_eq!(told(&world, id, &Transfers::new()).len(), 1);
    }

    #[test]
    fn the_end_of_a_volume_is_the_leaders_business() {
        let mut world = World::with_three_chunkservers();
        let (name, copysets) = ("web".to_owned(), vec![1, 2, 4]);
        let create = CreateVolume { name: name.clone(), size_bytes: 1 << 20, copysets, at_unix_ms: 0 };
        world.apply(&Command::CreateVolume(create)).expect("created");
        world.apply(&Command::DeleteVolume(DeleteVolume { name, force: false })).expect("deleted");
        let told_each = |world: &World| [1, 2, 3].map(|id| told(world, ChunkserverId(id), &Transfers::new()));
        let drop = |copyset| order::What::DropVolume(DropVolume { copyset, volume: 1 });
        assert_eq!(told_each(&world), [vec![drop(1), drop(4)], vec![drop(2)], vec![]]);
        world.lead(&[3, 0, 3, 1, 2, 3]);
        assert_eq!(told_each(&world), [vec![drop(4)], vec![], vec![drop(1)]]);
    }

    #[test]
    fn a_transfer_is_ordered_while_it_can_still_happen() {
        let mut world = World::with_three_chunkservers();
        let to = world.state.copysets()[&CopysetId(1)].replica_on(ChunkserverId(2)).expect("a member").id;
        let transfer = Transfer { from: ONE, to, to_chunkserver: ChunkserverId(2), since: world.now };
        let transfers = Transfers::from([(CopysetId(1), transfer)]);
        let ReplicaId(to_replica) = to;
        let expected = order::What::TransferLeader(TransferLeader { copyset: 1, to_replica });
        assert_eq!(told(&world, ONE, &transfers), [expected]);
        assert_eq!(told(&world, ChunkserverId(2), &transfers), []);
        world.lead(&[2, 2, 3, 1, 2, 3]);
        assert_eq!(told(&world, ONE, &transfers), [], "it has happened");
        world.full.insert(ChunkserverId(2));
        world.lead(&[1, 2, 3, 1, 2, 3]);
        assert_eq!(told(&world, ONE, &transfers), [], "it became full, and gave it back");
        world.full.clear();
        world.lead(&[1, 2, 3, 1, 2, 3]);
        world.pass(Duration::from_secs(6));
        assert_eq!(told(&world, ONE, &transfers), [], "it did not happen, and may not be wanted any more");
    }
}
