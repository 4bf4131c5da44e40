//! Gives away what is led from a disk that should not lead, to a replica that can.
//!
//! A leader on a slow disk holds up its copysets; one on a full disk refuses what the others have room for. As a follower
//! either harms nobody. So each copyset led here is offered to another replica, again and again until it is gone: a
//! handover may come to nothing, because its target died in that moment.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use evolute_protocol::id::CopysetId;
use evolute_raft::{CAUGHT_UP, GroupStatus, ReplicaId, Role};

use crate::copyset::chunkserver_of;
use crate::copyset::registry::Registry;
use crate::others::{Others, Trouble};

/// Between two tries of one copyset: an election.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// A copyset that came back to a slow disk is left alone for this long: the others may be slow as well, and leaders
/// should not chase each other.
const LEFT_ALONE: Duration = Duration::from_secs(10);

/// What was tried lately.
#[derive(Default)]
pub struct Handovers(BTreeMap<CopysetId, Try>);

struct Try {
    to: ReplicaId,
    at: Instant,
    became: Rc<Cell<Became>>,
}

/// What became of a try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Became {
    #[default]
    UnderWay,
    Moved,
    Failed,
}

/// To whom a copyset can be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Replica(ReplicaId),
    /// Somebody should lead, and lacks too much or has not been heard yet.
    NotYet,
    /// Nobody is any better.
    Nobody,
}

impl Handovers {
    /// Offers what is led here and can be led elsewhere; true: some of it soon, not yet.
    pub fn offer(&mut self, registry: &Registry, others: &Others, mine: Trouble) -> bool {
        self.0.retain(|_, last| last.became.get() == Became::UnderWay || last.at.elapsed() < LEFT_ALONE);
        let mut soon = false;
        for copyset in registry.all() {
            let id = copyset.id();
            let status = copyset.group().status();
            let last = self.0.get(&id);
            let waits = last.is_some_and(|last| !may_follow(last.became.get(), last.at.elapsed(), mine));
            if status.role != Role::Leader || waits {
                continue;
            }
            let to = match target(&status, others, mine, last.map(|last| last.to)) {
                Target::Replica(to) => to,
                Target::NotYet => {
                    soon = true;
                    continue;
                }
                Target::Nobody => continue,
            };
            let became = Rc::<Cell<Became>>::default();
            self.0.insert(id, Try { to, at: Instant::now(), became: Rc::clone(&became) });
            tokio::task::spawn_local(async move {
                match copyset.group().transfer_leader(to).await {
                    Ok(()) => became.set(Became::Moved),
                    Err(error) => {
                        tracing::info!(copyset = %id, %to, %error, "the leader stays on a slow or full disk for now");
                        became.set(Became::Failed);
                    }
                }
            });
        }
        soon
    }
}

/// Whether another try may follow one that began `ago`.
fn may_follow(became: Became, ago: Duration, mine: Trouble) -> bool {
    match became {
        Became::UnderWay => false,
        Became::Moved if !mine.full => ago >= LEFT_ALONE,
        Became::Moved | Became::Failed => ago >= AGAIN_AFTER,
    }
}

/// The one with room, rather not slow, rather not the one tried last, whose log is furthest. A full disk leads nothing
/// that it could refuse, so a slow one takes its place before none does; a slow one is relieved by a quick one only.
fn target(status: &GroupStatus, others: &Others, mine: Trouble, last: Option<ReplicaId>) -> Target {
    let trouble = |member: &evolute_raft::MemberStatus| others.disk(chunkserver_of(member.member));
    let better = |member: &&evolute_raft::MemberStatus| {
        let theirs = trouble(member);
        !theirs.full && (mine.full || !theirs.slow)
    };
    // One that lacks much would stop the copyset until it has it, and one that is silent until an election.
    let needed = status.last.unwrap_or(0).saturating_sub(CAUGHT_UP);
    let can_now = |member: &&evolute_raft::MemberStatus| {
        member.heard && member.matched.is_some_and(|matched| matched >= needed)
    };
    let best = status.other_voters().filter(better).filter(can_now).max_by_key(|member| {
        let replica = member.member.replica;
        (!trouble(member).slow, last != Some(replica), member.matched, Reverse(replica))
    });
    match best {
        Some(member) => Target::Replica(member.member.replica),
        None if status.other_voters().any(|member| better(&member)) => Target::NotYet,
        None => Target::Nobody,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use evolute_protocol::id::ChunkserverId;
    use evolute_raft::{CAUGHT_UP, GroupId, GroupStatus, Member, MemberStatus, ProcessId, ReplicaId, Role};

    use super::{AGAIN_AFTER, Became, LEFT_ALONE, Target, may_follow, target};
    use crate::others::{Others, Told, Trouble};

    const FULL: Trouble = Trouble { full: true, slow: false };
    const SLOW: Trouble = Trouble { full: false, slow: true };
    const LAST: u64 = 1000;

    /// Replica n lives on chunkserver n and leads when n is 1; `matched` are those of 2 and 3, and 4 has no vote.
    fn status(matched: [Option<u64>; 2], silent: &[u64]) -> GroupStatus {
        let member = |n: u64| Member { replica: ReplicaId(n), process: ProcessId(n) };
        let members =
            [(1, true, Some(LAST)), (2, true, matched[0]), (3, true, matched[1]), (4, false, Some(LAST))];
        GroupStatus {
            group: GroupId(3),
            me: member(1),
            role: Role::Leader,
            term: 1,
            leader: Some(member(1)),
            last: Some(LAST),
            committed: None,
            applied: None,
            checkpointed: None,
            purged: None,
            asleep: false,
            members: members
                .map(|(n, voter, matched)| MemberStatus {
                    member: member(n),
                    voter,
                    matched,
                    heard: !silent.contains(&n),
                })
                .to_vec(),
        }
    }

    fn others(told: &[(u32, Trouble)]) -> Others {
        let others = Others::default();
        let disks: BTreeMap<_, _> = told.iter().map(|(id, trouble)| (ChunkserverId(*id), *trouble)).collect();
        others.hear(Told { disks, usual_write: None });
        others
    }

    fn to(n: u64) -> Target {
        Target::Replica(ReplicaId(n))
    }

    #[test]
    fn a_leader_goes_to_one_with_room_that_has_caught_up() {
        let both = [Some(LAST - 1), Some(LAST)];
        for (mine, told, matched, last, wanted) in [
            (FULL, vec![], both, None, to(3)),
            (FULL, vec![(3, FULL)], both, None, to(2)),
            (FULL, vec![(2, FULL), (3, FULL)], both, None, Target::Nobody),
            // Not a slow one if there is another; but rather a slow one than none.
            (FULL, vec![(3, SLOW)], both, None, to(2)),
            (FULL, vec![(2, FULL), (3, SLOW)], both, None, to(3)),
            (SLOW, vec![(2, FULL), (3, SLOW)], both, None, Target::Nobody),
            (SLOW, vec![(2, SLOW), (3, SLOW)], both, None, Target::Nobody),
            (SLOW, vec![(3, FULL)], both, None, to(2)),
            // It came to nothing: the other one is tried, if it may lead.
            (FULL, vec![], both, Some(3), to(2)),
            (FULL, vec![(2, FULL)], both, Some(3), to(3)),
            (FULL, vec![], [None, Some(LAST - CAUGHT_UP)], None, to(3)),
            (FULL, vec![], [None, Some(LAST - CAUGHT_UP - 1)], None, Target::NotYet),
            (FULL, vec![(2, FULL)], [Some(LAST), None], None, Target::NotYet),
        ] {
            let found = target(&status(matched, &[]), &others(&told), mine, last.map(ReplicaId));
            assert_eq!(found, wanted, "{mine:?}, told {told:?}, matched {matched:?}, last tried {last:?}");
        }
    }

    /// Or nobody would lead until an election, and the next try would be the same.
    #[test]
    fn a_leader_does_not_go_to_one_that_is_silent_but_rather_to_a_slow_one() {
        let target = |told: &[(u32, Trouble)], silent: &[u64]| {
            target(&status([Some(LAST), Some(LAST)], silent), &others(told), FULL, None)
        };
        assert_eq!(target(&[(3, SLOW)], &[2]), to(3));
        assert_eq!(target(&[(2, SLOW), (3, FULL)], &[2]), Target::NotYet);
        assert_eq!(target(&[], &[2, 3]), Target::NotYet);
    }

    #[test]
    fn a_failed_try_is_soon_followed_and_slow_disks_do_not_chase_each_other() {
        let just_before = |time: Duration| time - Duration::from_millis(1);
        for (became, mine, after) in [
            (Became::Failed, FULL, AGAIN_AFTER),
            (Became::Failed, SLOW, AGAIN_AFTER),
            (Became::Moved, FULL, AGAIN_AFTER),
            (Became::Moved, SLOW, LEFT_ALONE),
        ] {
            assert!(!may_follow(became, just_before(after), mine), "{became:?} {mine:?}");
            assert!(may_follow(became, after, mine), "{became:?} {mine:?}");
        }
        assert!(!may_follow(Became::UnderWay, LEFT_ALONE * 2, FULL));
    }
}
