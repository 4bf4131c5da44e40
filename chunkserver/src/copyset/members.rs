//! Changes a copyset's members as the control plane wants it: what to do next, decided from what the group says of
//! itself, and done one step at a time. An order may come any number of times, to a group in any state.

use std::rc::Rc;
use std::time::Duration;

use evolute_protocol::id::{ChunkserverId, ReplicaId};
use evolute_raft::{CAUGHT_UP, ChangeError, GroupStatus, Member, ProcessId, Role};

use super::Copyset;

/// What the members shall be: one more, one less, or one in the place of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberChange {
    pub add: Option<(ReplicaId, ChunkserverId)>,
    pub remove: Option<ReplicaId>,
}

/// How often a learner is looked at, and how soon something refused is tried again.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Done,
    /// Somebody else leads; the order will go there.
    NotLeader,
    AddLearner(Member),
    /// The learner is not there yet.
    Wait,
    /// The leader is the one to go.
    HandOver(evolute_raft::ReplicaId),
    Change(Vec<evolute_raft::ReplicaId>),
}

fn next(status: &GroupStatus, change: &MemberChange) -> Step {
    if status.role != Role::Leader {
        return Step::NotLeader;
    }
    let find = |replica: ReplicaId| status.members.iter().find(|m| m.member.replica.0 == replica.0);
    let leaving = change.remove.and_then(find);
    if let Some((replica, chunkserver)) = change.add {
        match find(replica) {
            None => {
                let process = ProcessId(u64::from(chunkserver.0));
                return Step::AddLearner(Member { replica: evolute_raft::ReplicaId(replica.0), process });
            }
            Some(there) if there.voter && leaving.is_none() => return Step::Done,
            Some(there) => {
                let matched = there.matched.unwrap_or(0);
                if !there.voter && matched + CAUGHT_UP < status.last.unwrap_or(0) {
                    return Step::Wait;
                }
            }
        }
    } else if leaving.is_none() {
        return Step::Done;
    }
    let stays = |replica: evolute_raft::ReplicaId| change.remove.is_none_or(|gone| gone.0 != replica.0);
    if !stays(status.me.replica) {
        return match status.furthest_other() {
            Some(next) => Step::HandOver(next.member.replica),
            None => Step::Wait,
        };
    }
    let added = |replica: evolute_raft::ReplicaId| change.add.is_some_and(|(add, _)| add.0 == replica.0);
    let voters = status
        .members
        .iter()
        .filter(|m| (m.voter || added(m.member.replica)) && stays(m.member.replica))
        .map(|m| m.member.replica)
        .collect();
    Step::Change(voters)
}

/// Carries out a change as long as this replica leads. Cancel-safe: what was begun is found by whoever goes on.
pub async fn carry_out(copyset: Rc<Copyset>, change: MemberChange) {
    let (id, group) = (copyset.id(), copyset.group());
    loop {
        let step = next(&group.status(), &change);
        let outcome = match step {
            Step::Done | Step::NotLeader => return,
            Step::Wait => Ok(()),
            Step::AddLearner(member) => {
                tracing::info!(copyset = %id, %member, "a replica joins");
                group.add_learner(member).await
            }
            Step::HandOver(to) => {
                tracing::info!(copyset = %id, %to, "handing over: this replica is to leave");
                group.transfer_leader(to).await
            }
            Step::Change(voters) => {
                tracing::info!(copyset = %id, ?voters, "changing members");
                group.change_members(voters).await
            }
        };
        match outcome {
            Err(ChangeError::Stopped) => return,
            Err(error) => tracing::debug!(copyset = %id, %error, "the members are not changed yet"),
            Ok(()) => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use evolute_protocol::id::{ChunkserverId, ReplicaId};
    use evolute_raft::{GroupId, GroupStatus, Member, MemberStatus, ProcessId, Role};

    use super::{MemberChange, Step, next};

    /// Replica n lives on chunkserver n; `me` is 11.
    fn status(role: Role, members: &[(u64, bool, u64)]) -> GroupStatus {
        let member = |n: u64| Member { replica: evolute_raft::ReplicaId(n), process: ProcessId(n - 10) };
        let members = members
            .iter()
            .map(|(n, voter, matched)| MemberStatus {
                member: member(*n),
                voter: *voter,
                matched: Some(*matched),
                heard: true,
            })
            .collect();
        GroupStatus {
            group: GroupId(3),
            me: member(11),
            role,
            term: 1,
            leader: Some(member(11)),
            last: Some(1000),
            committed: None,
            applied: None,
            checkpointed: None,
            purged: None,
            asleep: false,
            members,
        }
    }

    fn change(add: u64, remove: u64) -> MemberChange {
        let add = (add > 0).then(|| (ReplicaId(add), ChunkserverId(u32::try_from(add).expect("small") - 10)));
        MemberChange { add, remove: (remove > 0).then_some(ReplicaId(remove)) }
    }

    fn replicas(of: &[u64]) -> Vec<evolute_raft::ReplicaId> {
        of.iter().map(|n| evolute_raft::ReplicaId(*n)).collect()
    }

    const THREE: [(u64, bool, u64); 3] = [(11, true, 1000), (12, true, 990), (13, true, 0)];

    fn with(fourth: (u64, bool, u64)) -> GroupStatus {
        status(Role::Leader, &[THREE[0], THREE[1], THREE[2], fourth])
    }

    #[test]
    fn a_replica_is_replaced_step_by_step_and_no_step_is_taken_twice() {
        let replace = change(14, 13);
        let joining = Member { replica: evolute_raft::ReplicaId(14), process: ProcessId(4) };
        assert_eq!(next(&status(Role::Leader, &THREE), &replace), Step::AddLearner(joining));
        assert_eq!(next(&with((14, false, 0)), &replace), Step::Wait);
        assert_eq!(next(&with((14, false, 743)), &replace), Step::Wait);
        assert_eq!(next(&with((14, false, 744)), &replace), Step::Change(replicas(&[11, 12, 14])));
        // Half way through a joint change both are voters: the change is asked for again.
        assert_eq!(next(&with((14, true, 1000)), &replace), Step::Change(replicas(&[11, 12, 14])));
        let after = status(Role::Leader, &[THREE[0], THREE[1], (14, true, 1000)]);
        assert_eq!(next(&after, &replace), Step::Done);
    }

    #[test]
    fn only_a_leader_changes_members_and_not_itself_away() {
        assert_eq!(next(&status(Role::Follower, &THREE), &change(14, 13)), Step::NotLeader);
        let leave = change(14, 11);
        assert_eq!(next(&with((14, false, 0)), &leave), Step::Wait, "it serves until the other one is there");
        let to = evolute_raft::ReplicaId(12);
        assert_eq!(next(&with((14, false, 1000)), &leave), Step::HandOver(to), "the one that has most");
    }

    #[test]
    fn a_learner_that_is_not_wanted_any_more_is_taken_out() {
        assert_eq!(next(&with((14, false, 5)), &change(0, 14)), Step::Change(replicas(&[11, 12, 13])));
        assert_eq!(next(&status(Role::Leader, &THREE), &change(0, 14)), Step::Done);
    }

    /// Another one was tried before and is still a learner: it does not become a voter with the new one.
    #[test]
    fn nobody_becomes_a_voter_who_was_not_asked_for() {
        let members = [THREE[0], THREE[1], THREE[2], (14, false, 1000), (15, false, 1000)];
        let status = status(Role::Leader, &members);
        assert_eq!(next(&status, &change(15, 13)), Step::Change(replicas(&[11, 12, 15])));
    }
}
