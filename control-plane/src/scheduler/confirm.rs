//! What the reports show to be done, put into the state: replicas that exist, replicas that took another one's place,
//! deleted volumes that are gone.

use std::collections::BTreeSet;
use std::time::Instant;

use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId};

use crate::heartbeat::group::{Group, voters};
use crate::heartbeat::reports::Reports;
use crate::state::command::{CreatedReplica, ReplaceDone, ReplaceUndone, ReplicasCreated, VolumeDropped};
use crate::state::copyset::REPLICAS;
use crate::state::{Command, Copyset, State};

pub fn plan(state: &State, reports: &Reports, now: Instant) -> Vec<Command> {
    let mut commands = Vec::new();
    let mut replicas = Vec::new();
    for (&id, copyset) in state.copysets() {
        for replica in copyset.everyone().filter(|replica| !replica.created) {
            let reported =
                reports.online(replica.chunkserver, now).and_then(|report| report.replicas.get(&id));
            if reported.is_some_and(|reported| reported.replica == replica.id.0) {
                replicas.push(CreatedReplica { copyset: id.0, replica: replica.id.0 });
            }
        }
    }
    if !replicas.is_empty() {
        commands.push(Command::ReplicasCreated(ReplicasCreated { replicas }));
    }
    commands
        .extend(state.copysets().iter().filter_map(|(&id, copyset)| membership(id, copyset, reports, now)));
    for (&volume, copysets) in state.dropping() {
        for &copyset in copysets {
            let members = state.copysets().get(&copyset).into_iter().flat_map(|record| record.everyone());
            // A leader says so after the drop was committed; it stays true whoever leads by now.
            let dropped = members.into_iter().any(|replica| {
                let report = reports.online(replica.chunkserver, now);
                report.and_then(|report| report.replicas.get(&copyset)).is_some_and(|reported| {
                    reported.replica == replica.id.0 && reported.dropped_volumes.contains(&volume.0)
                })
            });
            if dropped {
                commands.push(Command::VolumeDropped(VolumeDropped { copyset: copyset.0, volume: volume.0 }));
            }
        }
    }
    commands
}

/// The state follows the group. A membership counts when two of its three members have it in their logs, one of them
/// the leader: then it is committed, and no other leader can come without it.
fn membership(id: CopysetId, copyset: &Copyset, reports: &Reports, now: Instant) -> Option<Command> {
    let group = Group::of(id, copyset, reports, now)?;
    let there = group.voters();
    let known: BTreeSet<ReplicaId> = copyset.replicas.iter().map(|replica| replica.id).collect();
    if there == known {
        let over =
            copyset.pending.filter(|pending| pending.over && group.member(pending.new.id).is_none())?;
        let undone = ReplaceUndone { copyset: id.0, new_replica: over.new.id.0 };
        return Some(Command::ReplaceUndone(undone));
    }
    let (mut gone, mut come) = (known.difference(&there), there.difference(&known));
    let (Some(&old), None, Some(&new), None) = (gone.next(), gone.next(), come.next(), come.next()) else {
        return None;
    };
    let agrees = |id_and_report: &(ChunkserverId, ReplicaId)| {
        let (chunkserver, replica) = *id_and_report;
        let report = reports.online(chunkserver, now).and_then(|report| report.replicas.get(&id));
        report.is_some_and(|report| report.replica == replica.0 && voters(report) == there)
    };
    let members = group.says.members.iter().filter(|member| member.voter);
    let agreed =
        members.map(|m| (ChunkserverId(m.chunkserver), ReplicaId(m.replica))).filter(|m| agrees(m)).count();
    if agreed <= REPLICAS / 2 {
        return None;
    }
    let chunkserver = group.member(new)?.chunkserver;
    Some(Command::ReplaceDone(ReplaceDone {
        copyset: id.0,
        old_replica: old.0,
        new_replica: new.0,
        chunkserver,
    }))
}

#[cfg(test)]
mod tests {
    use super::plan;
    use crate::scheduler::world::World;
    use crate::state::command::{
        BeginReplace, CancelReplace, CreateVolume, CreatedReplica, DeleteVolume, ReplaceDone, ReplaceUndone,
        ReplicasCreated, VolumeDropped,
    };
    use crate::state::{Command, Reason};
    use evolute_protocol::id::{ChunkserverId, CopysetId};
    use evolute_protocol::rpc::{MemberReport, ReplicaReport, Role};

    #[test]
    fn a_replica_that_was_seen_is_remembered() {
        let mut world = World::with_three_chunkservers();
        assert!(world.state.copysets().values().all(|copyset| copyset.replicas.iter().all(|r| r.created)));
        assert_eq!(plan(&world.state, &world.reports, world.now), [], "and said once");

        // A seventh, seen on one of its chunkservers so far.
        world.add_copyset([1, 2, 3]);
        let [one, _, _] = world.state.copysets()[&CopysetId(7)].replicas[..] else { panic!("three") };
        world.report_only(ChunkserverId(1), CopysetId(7), one.id.0 + 1);
        assert_eq!(plan(&world.state, &world.reports, world.now), [], "another replica than ours");
        world.report_only(ChunkserverId(1), CopysetId(7), one.id.0);
        let replicas = vec![CreatedReplica { copyset: 7, replica: one.id.0 }];
        let expected = Command::ReplicasCreated(ReplicasCreated { replicas });
        assert_eq!(plan(&world.state, &world.reports, world.now), [expected]);
    }

    /// Copyset 1 on 1 (leads), 2, 3, the last of which chunkserver 4 is to replace; their replicas, and the new one.
    fn being_replaced() -> (World, [u64; 3], u64) {
        let mut world = World::with_three_chunkservers();
        let four = world.register("z3");
        let copyset = world.state.copysets()[&CopysetId(1)].clone();
        let members = [1, 2, 3].map(|on| copyset.replica_on(ChunkserverId(on)).expect("a member").id.0);
        let reason = Reason::Silent.into();
        let begin = BeginReplace { copyset: 1, old_replica: members[2], chunkserver: four.0, reason };
        world.apply(&Command::BeginReplace(begin)).expect("begun");
        let new = world.state.replicas_given();
        (world, members, new)
    }

    /// A report of one replica of copyset 1, with the members as it knows them. The one on chunkserver 1 leads.
    fn say(world: &mut World, on: u32, replica: u64, voters: &[(u64, u32)], learners: &[(u64, u32)]) {
        let members = voters.iter().map(|it| (it, true)).chain(learners.iter().map(|it| (it, false)));
        let members = members.map(|(&(replica, chunkserver), voter)| MemberReport {
            replica,
            chunkserver,
            matched_index: 1000,
            voter,
        });
        let role = if on == 1 { Role::Leader } else { Role::Follower };
        let report = ReplicaReport {
            copyset: 1,
            replica,
            role: role.into(),
            term: 3,
            leader_chunkserver: 1,
            members: members.collect(),
            ..ReplicaReport::default()
        };
        world.take(ChunkserverId(on), vec![report]);
    }

    /// A leader that is deposed before anybody else has it takes its membership along.
    #[test]
    fn a_membership_counts_when_two_of_its_three_members_have_it() {
        let (mut world, [one, two, old], new) = being_replaced();
        let four = ChunkserverId(4);
        let before = [(one, 1), (two, 2), (old, 3)];
        let half_way = [(one, 1), (two, 2), (old, 3), (new, 4)];
        let after = [(one, 1), (two, 2), (new, 4)];
        // Three has been told of it as a learner, which has no vote.
        let left = [(old, 3)];
        for (leader, follower, follower_is, learners, counts) in [
            (&before[..], &before[..], two, &[][..], false),
            (&half_way, &half_way, two, &[], false),
            (&after, &half_way, two, &[], false),
            (&after, &after, two, &[], true),
            // What another replica on that chunkserver says says nothing of this one.
            (&after, &after, two + 1, &[], false),
            (&after, &half_way, two, &left, false),
        ] {
            say(&mut world, 1, one, leader, learners);
            say(&mut world, 2, follower_is, follower, learners);
            say(&mut world, 3, old, leader, learners);
            let (copyset, old_replica, new_replica) = (1, old, new);
            let done = ReplaceDone { copyset, old_replica, new_replica, chunkserver: four.0 };
            let expected = if counts { vec![Command::ReplaceDone(done)] } else { vec![] };
            let case = format!("{leader:?} {follower:?} of {follower_is}, {learners:?}");
            assert_eq!(plan(&world.state, &world.reports, world.now), expected, "{case}");
        }
        // Two that come, or two that go, are no exchange of one for another.
        let two_come = [(one, 1), (two, 2), (new, 4), (new + 1, 5)];
        let two_go = [(one, 1), (new, 4)];
        for members in [&two_come[..], &two_go] {
            say(&mut world, 1, one, members, &[]);
            say(&mut world, 4, new, members, &[]);
            say(&mut world, 2, two, members, &[]);
            let planned = plan(&world.state, &world.reports, world.now);
            let done = planned.iter().any(|command| matches!(command, Command::ReplaceDone(_)));
            assert!(!done, "{members:?}: {planned:?}");
        }
    }

    /// A new one that is still a learner may yet become a member: another change must not begin beside it.
    #[test]
    fn a_change_that_was_cancelled_is_over_when_the_group_is_without_the_new_one() {
        let (mut world, [one, two, old], new) = being_replaced();
        let members = [(one, 1), (two, 2), (old, 3)];
        let learner = [(new, 4)];
        let undone = Command::ReplaceUndone(ReplaceUndone { copyset: 1, new_replica: new });
        say(&mut world, 1, one, &members, &[]);
        assert_eq!(plan(&world.state, &world.reports, world.now), [], "it is still wanted");
        let cancel = CancelReplace { copyset: 1, new_replica: new };
        world.apply(&Command::CancelReplace(cancel)).expect("cancelled");
        say(&mut world, 1, one, &members, &learner);
        assert_eq!(plan(&world.state, &world.reports, world.now), [], "it is still there");
        say(&mut world, 1, one, &members, &[]);
        assert_eq!(plan(&world.state, &world.reports, world.now), [undone]);
    }

    #[test]
    fn a_deleted_volume_is_gone_when_its_copysets_say_so() {
        let mut world = World::with_three_chunkservers();
        let (name, copysets) = ("web".to_owned(), vec![1, 4]);
        let create = CreateVolume { name: name.clone(), size_bytes: 1 << 20, copysets, at_unix_ms: 0 };
        world.apply(&Command::CreateVolume(create)).expect("created");
        world.say_dropped(ChunkserverId(1), CopysetId(1), 1);
        assert_eq!(plan(&world.state, &world.reports, world.now), [], "nobody deleted it");
        world.apply(&Command::DeleteVolume(DeleteVolume { name, force: false })).expect("deleted");
        for (copyset, left) in [(1, 1), (4, 0)] {
            world.say_dropped(ChunkserverId(1), CopysetId(copyset), 1);
            let [command] = &plan(&world.state, &world.reports, world.now)[..] else { panic!("one") };
            assert_eq!(*command, Command::VolumeDropped(VolumeDropped { copyset, volume: 1 }));
            world.apply(command).expect("applied");
            assert_eq!(world.state.dropping().values().map(|waiting| waiting.len()).sum::<usize>(), left);
        }
    }
}
