//! Three replicas on three threads, over real connections: what a group promises while its members come and go.

mod processes;

use std::sync::mpsc;

use bytes::Bytes;
use evolute_raft::{Command, HandleError, LeaderChange, ProposeError, ReplicaId, Role};
use processes::{Cluster, eventually};

#[test]
fn every_replica_applies_what_the_leader_answered_in_order() {
    let cluster = Cluster::of(3);
    for command in ["a", "b", "c"] {
        cluster.propose(command);
    }
    for at in 0..3 {
        cluster.applied(at, &["a", "b", "c"]);
    }
    let leader = cluster.leader();
    let status = cluster.status(leader);
    assert_eq!((status.role, status.members.len()), (Role::Leader, 3));
    assert_eq!(status.leader, Some(cluster.process(leader).member));
}

#[test]
fn a_follower_names_the_leader() {
    let cluster = Cluster::of(3);
    cluster.propose("a");
    let leader = cluster.leader();
    let follower = (leader + 1) % 3;
    cluster.applied(follower, &["a"]);
    let outcome = cluster.wait_for(cluster.process(follower).handle.propose(Bytes::from_static(b"b")));
    assert_eq!(outcome, Err(ProposeError::NotLeader { leader: Some(cluster.process(leader).member) }));
    assert_eq!(cluster.wait_for(cluster.process(follower).handle.leads_term()), None);
}

#[test]
fn a_group_outlives_its_leader_and_the_dead_one_catches_up_from_its_log() {
    let mut cluster = Cluster::of(3);
    cluster.propose("a");
    let old = cluster.leader();
    let term = cluster.status(old).term;
    cluster.kill(old);
    cluster.propose("b");
    assert!(cluster.status(cluster.leader()).term > term);
    cluster.restart(old);
    cluster.applied(old, &["a", "b"]);
    cluster.propose("c");
    for at in 0..3 {
        cluster.applied(at, &["a", "b", "c"]);
    }
}

#[test]
fn everything_answered_survives_the_death_of_all() {
    let mut cluster = Cluster::of(3);
    let commands = ["a", "b", "c", "d", "e"];
    for (round, command) in commands.into_iter().enumerate() {
        cluster.propose(command);
        for at in 0..3 {
            cluster.kill(at);
        }
        for at in 0..3 {
            cluster.restart(at);
        }
        cluster.leader();
        for at in 0..3 {
            cluster.applied(at, &commands[..=round]);
        }
    }
}

#[test]
fn leadership_ends_with_the_leader_s_majority_elsewhere() {
    let cluster = Cluster::of(3);
    cluster.propose("a");
    let old = cluster.leader();
    let (tell, told) = mpsc::channel::<LeaderChange>();
    cluster.process(old).on_thread(move |_, group, _| {
        let listening = group.clone();
        group.on_leader_change(move |change| {
            // By the time anybody hears of the new leader, the old one serves no more.
            assert!(change.me || listening.leadership().is_none());
            let _ = tell.send(change);
        });
    });
    let new = (old + 1) % 3;
    let to = cluster.process(new).member.replica;
    cluster.wait_for(cluster.process(old).handle.transfer_leader(to)).expect("transferred");
    assert_eq!(cluster.wait_for(cluster.process(old).handle.leads_term()), None);
    let change = told.recv().expect("an event");
    assert_eq!((change.leader, change.me), (to, false));
    assert_eq!(cluster.leader(), new);
    cluster.propose("b");
    cluster.applied(old, &["a", "b"]);
}

#[test]
fn a_member_is_replaced_while_the_group_serves() {
    let mut cluster = Cluster::of(3);
    cluster.propose("a");
    let new = cluster.add();
    let leader = cluster.leader();
    let leaving = (leader + 1) % 3;
    let handle = cluster.process(leader).handle.clone();
    cluster.wait_for(handle.add_learner(new)).expect("a learner");
    cluster.applied(3, &["a"]);
    assert_eq!(cluster.role(3), Role::Learner);
    let unknown = cluster.wait_for(handle.change_members(vec![ReplicaId(77)]));
    assert_eq!(unknown, Err(HandleError::NotAMember(ReplicaId(77))));
    let voters: Vec<ReplicaId> =
        (0..4).filter(|&at| at != leaving).map(|at| cluster.process(at).member.replica).collect();
    cluster.wait_for(handle.change_members(voters)).expect("changed");
    cluster.kill(leaving);
    cluster.propose("b");
    cluster.applied(3, &["a", "b"]);
    // The new one counts: with an old one gone there still is a majority.
    let other = (0..3).find(|&at| at != leaving && at != leader).expect("three");
    cluster.kill(other);
    cluster.propose("c");
    cluster.applied(3, &["a", "b", "c"]);
}

#[test]
fn a_removed_leader_steps_down() {
    let cluster = Cluster::of(3);
    cluster.propose("a");
    let old = cluster.leader();
    let handle = cluster.process(old).handle.clone();
    let voters = (0..3).filter(|&at| at != old).map(|at| cluster.process(at).member.replica).collect();
    cluster.wait_for(handle.change_members(voters)).expect("changed");
    eventually("the removed leader serves no more", || {
        (cluster.wait_for(handle.leads_term()).is_none() && cluster.role(old) != Role::Leader).then_some(())
    });
    eventually("another leads", || (cluster.leader() != old).then_some(()));
    cluster.propose("b");
    let next = cluster.leader();
    cluster.applied(next, &["a", "b"]);
}

#[test]
fn without_a_majority_nothing_is_answered_and_nothing_is_lost() {
    let mut cluster = Cluster::of(3);
    cluster.propose("a");
    let leader = cluster.leader();
    let (first, second) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.kill(first);
    cluster.kill(second);
    let (tell, told) = mpsc::channel();
    cluster.process(leader).on_thread(move |_, group, _| {
        group.propose(Command::from(Bytes::from_static(b"b")), move |outcome| drop(tell.send(outcome)));
    });
    cluster.restart(first);
    // Applied now, or refused because another leads; never forgotten.
    match told.recv().expect("exactly one answer") {
        Ok(_) => cluster.applied(first, &["a", "b"]),
        Err(ProposeError::NotLeader { .. }) => {}
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn nobody_purges_what_a_dead_member_still_lacks() {
    let mut cluster = Cluster::of(3);
    cluster.propose("a");
    let dead = (cluster.leader() + 1) % 3;
    cluster.applied(dead, &["a"]);
    cluster.kill(dead);
    for _ in 0..20 {
        cluster.propose("b");
    }
    let checkpoint = |cluster: &Cluster| {
        for process in cluster.running() {
            process.on_thread(|_, group, restored| {
                let restored = restored.borrow().clone();
                group.checkpointed(restored.applied.expect("applied"), restored.membership);
            });
        }
    };
    checkpoint(&cluster);
    let mut wanted = vec!["a"];
    wanted.extend(["b"; 20]);
    cluster.restart(dead);
    cluster.applied(dead, &wanted);
    // Now that everybody has everything, it goes.
    eventually("purged everywhere", || {
        cluster.propose("c");
        wanted.push("c");
        checkpoint(&cluster);
        let purged = |at: usize| cluster.status(at).purged.map_or(0, |at| at.index);
        (0..3).all(|at| purged(at) > 20).then_some(())
    });
    for at in 0..3 {
        cluster.applied(at, &wanted);
    }
}
