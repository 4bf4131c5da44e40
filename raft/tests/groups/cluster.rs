//! Three replicas on three threads, over real connections: what a group promises while its members come and go.

use std::sync::mpsc;

use crate::processes::{Cluster, ENDLESS, Process, eventually};
use bytes::Bytes;
use evolute_raft::{Command, LeaderChange, Limits, ProposeError, Role};

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
    let outcome = cluster.wait_for(cluster.process(follower).handle().propose(Bytes::from_static(b"b")));
    assert_eq!(outcome, Err(ProposeError::NotLeader { leader: Some(cluster.process(leader).member) }));
    assert_eq!(cluster.wait_for(cluster.process(follower).handle().leads_term()), None);
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
    let cluster = Cluster::with_timing(3, Limits::default(), ENDLESS);
    cluster.propose("a");
    let old = cluster.leader();
    let (tell, told) = mpsc::channel::<LeaderChange>();
    cluster.process(old).with_group(move |group| {
        let listening = group.clone();
        group.on_leader_change(move |change| {
            // By the time anybody hears of the new leader, the old one serves no more.
            assert!(change.me || listening.leadership().is_none());
            let _ = tell.send(change);
        });
    });
    let new = (old + 1) % 3;
    let to = cluster.process(new).member.replica;
    cluster.transfer(old, to);
    assert_eq!(cluster.wait_for(cluster.process(old).handle().leads_term()), None);
    let change = told.recv().expect("an event");
    assert_eq!((change.leader, change.me), (to, false));
    assert_eq!(cluster.leader(), new);
    cluster.propose("b");
    cluster.applied(old, &["a", "b"]);
}

/// openraft once awaited each follower's answer in its core: one that hung froze the group.
#[test]
fn a_follower_that_hears_and_never_answers_holds_nobody() {
    let mut cluster = Cluster::with_timing(3, Limits::default(), ENDLESS);
    cluster.propose("a");
    let leader = cluster.leader();
    let term = cluster.status(leader).term;
    let (hung, other) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.applied(hung, &["a"]);
    // It lost the leader, so that as far as it is concerned it may stand, and hears nobody from now on.
    cluster.isolate(hung);
    eventually("it has lost the leader", || cluster.status(hung).leader.is_none().then_some(()));
    cluster.process(hung).deafen(true);
    cluster.heal(hung);
    // It still speaks, and must not unseat anybody with that: pre-votes are refused while there is a leader. With a log
    // as good as anybody's first, and then with an old one.
    let stand = |cluster: &Cluster| {
        cluster.process(hung).with_group(|group| {
            tokio::task::spawn_local(async move { group.elect().await });
        });
    };
    stand(&cluster);
    // A learner that hangs from the beginning does not, either.
    cluster.add();
    cluster.process(3).deafen(true);
    cluster.learn(3);
    let mut wanted = vec!["a"];
    wanted.extend(["b"; 500]);
    for (n, command) in wanted[1..].iter().enumerate() {
        if n % 25 == 0 {
            stand(&cluster);
        }
        cluster.propose(command);
    }
    cluster.applied(leader, &wanted);
    cluster.applied(other, &wanted);
    assert_eq!((cluster.leader(), cluster.status(leader).term), (leader, term), "nobody took over");
    cluster.process(hung).deafen(false);
    cluster.process(3).deafen(false);
    cluster.applied(hung, &wanted);
    cluster.applied(3, &wanted);
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
    cluster.process(leader).with_group(move |group| {
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
        cluster.running().for_each(Process::checkpoint);
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
