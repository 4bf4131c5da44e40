//! Members come, go, and come back; the group serves all the while.

use std::cell::Cell;
use std::sync::mpsc;

use bytes::Bytes;
use evolute_raft::{Command, HandleError, Limits, ReplicaId, Role};

use crate::processes::{Cluster, ENDLESS, Hold, Process, eventually};

fn ids(cluster: &Cluster, these: &[usize]) -> Vec<ReplicaId> {
    these.iter().map(|&at| cluster.members[at].replica).collect()
}

#[test]
fn a_member_is_replaced_by_one_call_while_the_group_serves() {
    let mut cluster = Cluster::with_timing(3, Limits::default(), ENDLESS);
    cluster.propose("a");
    cluster.add();
    let leader = cluster.leader();
    let (leaving, other) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.learn(3);
    // Asked again, it is one already.
    cluster.learn(3);
    cluster.applied(3, &["a"]);
    assert_eq!(cluster.role(3), Role::Learner);
    let handle = cluster.process(leader).handle();
    let unknown = cluster.wait_for(handle.change_members(vec![ReplicaId(77)]));
    assert_eq!(unknown, Err(HandleError::NotAMember(ReplicaId(77))));
    cluster.change(&[leader, other, 3]);
    let members = cluster.status(leader).members;
    assert!(members.len() == 3 && members.iter().all(|it| it.voter), "{members:?}");
    // Asked again, nothing changes.
    cluster.change(&[leader, other, 3]);
    cluster.kill(leaving);
    cluster.propose("b");
    cluster.applied(3, &["a", "b"]);
    // The new one counts: with an old one gone there still is a majority.
    cluster.kill(other);
    cluster.propose("c");
    cluster.applied(3, &["a", "b", "c"]);
}

#[test]
fn a_learner_that_lags_is_not_made_a_voter() {
    let mut cluster = Cluster::with_timing(3, Limits::default(), ENDLESS);
    cluster.propose("a");
    cluster.add();
    let leader = cluster.leader();
    let handle = cluster.process(leader).handle();
    cluster.isolate(3);
    cluster.learn(3);
    let (tell, told) = mpsc::channel();
    cluster.process(leader).with_group(move |group| {
        for _ in 0..400 {
            let tell = tell.clone();
            group.propose(Command::from(vec![1]), move |outcome| {
                let _ = tell.send(outcome.is_ok());
            });
        }
    });
    (0..400).for_each(|_| assert!(told.recv().expect("an answer")));
    let voters = ids(&cluster, &[leader, (leader + 1) % 3, 3]);
    let refused = cluster.wait_for(handle.change_members(voters));
    let Err(HandleError::Behind { replica, entries }) = refused else { panic!("{refused:?}") };
    assert!(replica == cluster.members[3].replica && entries > 400, "{refused:?}");
    assert_eq!(cluster.status(leader).members.iter().filter(|it| it.voter).count(), 3, "nothing has changed");
    cluster.heal(3);
    cluster.change(&[leader, (leader + 1) % 3, 3]);
    cluster.equal(&[leader, (leader + 1) % 3, 3]);
}

#[test]
fn a_learner_that_is_not_wanted_any_more_leaves_with_the_change() {
    let mut cluster = Cluster::of(3);
    cluster.add();
    cluster.learn(3);
    cluster.change(&[0, 1, 2]);
    let members = cluster.status(cluster.leader()).members;
    assert!(members.len() == 3 && members.iter().all(|it| it.voter), "{members:?}");
}

#[test]
fn a_leader_that_is_removed_hands_over_and_steps_down() {
    let cluster = Cluster::of(3);
    cluster.propose("a");
    let old = cluster.leader();
    let rest: Vec<usize> = (0..3).filter(|&at| at != old).collect();
    let handle = cluster.process(old).handle();
    cluster.wait_for(handle.change_members(ids(&cluster, &rest))).expect("changed");
    eventually("the removed leader serves no more", || {
        (cluster.wait_for(handle.leads_term()).is_none() && cluster.role(old) != Role::Leader).then_some(())
    });
    let next = cluster.leader_among(&rest);
    cluster.propose_to(&rest, Bytes::from_static(b"b"));
    cluster.applied(next, &["a", "b"]);
}

#[test]
fn a_change_left_half_done_by_its_leader_is_finished_by_the_next() {
    let mut cluster = Cluster::of(3);
    cluster.propose("a");
    cluster.add();
    cluster.learn(3);
    cluster.equal(&[0, 1, 2, 3]);
    let old = cluster.leader();
    let rest: Vec<usize> = (0..4).filter(|&at| at != old).collect();
    let voters = ids(&cluster, &rest);
    // It dies at some point of the change; whatever got through, asking again ends it.
    cluster.process(old).with_group(move |group| {
        tokio::task::spawn_local(async move { group.change_members(voters).await });
    });
    cluster.kill(old);
    cluster.change(&rest);
    cluster.propose("b");
    let leader = cluster.leader();
    let members = cluster.status(leader).members;
    assert!(members.len() == 3 && members.iter().all(|it| it.voter), "{members:?}");
    cluster.equal(&rest);
}

/// The everyday work of a balancer: a process's replica leaves and a fresh one joins there, again and again, while
/// writes, checkpoints and purges go on, and now and then somebody dies.
#[test]
fn replicas_that_leave_and_come_back_under_fresh_ids_are_equal_after_every_round() {
    let limits = Limits { log_retain_bytes: 1 << 20, snapshot_bytes_per_second: 1 << 30 };
    let mut cluster = Cluster::with_limits(3, limits);
    let written = Cell::new(0_u64);
    let write = |cluster: &Cluster, these: &[usize], count: u64| {
        for _ in 0..count {
            let mut command = vec![3; 4096];
            command[..8].copy_from_slice(&written.get().to_le_bytes());
            written.set(written.get() + 1);
            cluster.propose_to(these, command.into());
        }
    };
    for round in 0..12_u64 {
        let moving = usize::try_from(round % 3).expect("small");
        let rest: Vec<usize> = (0..3).filter(|&at| at != moving).collect();
        write(&cluster, &[0, 1, 2], 20);
        cluster.change(&rest);
        cluster.running().for_each(Process::checkpoint);
        write(&cluster, &rest, 20);
        cluster.replace(moving, ReplicaId(1000 + round));
        if round % 4 == 1 {
            // What it forgot stays forgotten.
            cluster.kill(moving);
            cluster.restart(moving);
        }
        rest.iter().for_each(|&at| cluster.process(at).checkpoint());
        if round % 4 == 2 {
            cluster.process(moving).watch.hold(Hold::Put, 2);
        }
        cluster.learn(moving);
        write(&cluster, &rest, 20);
        cluster.process(moving).watch.release();
        if round % 4 == 3 {
            let leader = cluster.leader_among(&rest);
            let to = cluster.members[rest.iter().copied().find(|&at| at != leader).expect("two")].replica;
            let _ = cluster.wait_for(cluster.process(leader).handle().transfer_leader(to));
        }
        cluster.change(&[0, 1, 2]);
        cluster.equal(&[0, 1, 2]);
        let commands = cluster.process(moving).commands.lock().unwrap().len() as u64;
        assert!(commands >= written.get(), "round {round}: {commands} of {}", written.get());
    }
}
