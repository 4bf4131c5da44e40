//! Groups that have nothing to do sleep, and wake up for whatever concerns them.

use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;

use crate::processes::{Cluster, GROUP, eventually};

/// Three members that have all fallen asleep, and the leader's place among them.
fn asleep() -> (Cluster, usize) {
    let cluster = Cluster::of(3);
    cluster.propose("a");
    (0..3).for_each(|at| cluster.applied(at, &["a"]));
    all_sleep(&cluster);
    let leader = cluster.leader();
    (cluster, leader)
}

fn all_sleep(cluster: &Cluster) {
    eventually("all are asleep", || (0..3).all(|at| cluster.status(at).asleep).then_some(()));
}

fn others(leader: usize) -> [usize; 2] {
    [(leader + 1) % 3, (leader + 2) % 3]
}

#[test]
fn a_group_that_has_nothing_to_do_sleeps_and_takes_what_it_is_asked_to() {
    let (cluster, leader) = asleep();
    let term = cluster.status(leader).term;
    // Longer than any election takes: nobody misses the heartbeats.
    std::thread::sleep(Duration::from_secs(2));
    assert!((0..3).all(|at| cluster.status(at).asleep));
    // Nobody asks the members any more, and the leader knows that they are there.
    assert!(cluster.status(leader).other_voters().all(|it| it.heard));
    let mut wanted = vec!["a"];
    for _ in 0..3 {
        // The first of them by the leader itself, with nobody to try it again: it is held, not refused.
        let handle = cluster.process(leader).handle();
        let outcomes = cluster.wait_for(futures::future::join_all(
            ["b", "c", "d"].map(|it| handle.propose(Bytes::from_static(it.as_bytes()))),
        ));
        wanted.extend(["b", "c", "d"]);
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
        assert!(!cluster.status(leader).asleep);
        (0..3).for_each(|at| cluster.applied(at, &wanted));
        all_sleep(&cluster);
    }
    assert_eq!((cluster.leader(), cluster.status(leader).term), (leader, term));
}

#[test]
fn a_sleeping_group_outlives_its_leader() {
    let (mut cluster, old) = asleep();
    cluster.kill(old);
    let new = cluster.leader_among(&others(old));
    cluster.propose_to(&others(old), "b".into());
    cluster.restart(old);
    cluster.applied(old, &["a", "b"]);
    all_sleep(&cluster);
    assert_eq!(cluster.leader(), new);
}

/// Its kernel keeps every connection as it is.
#[test]
fn a_sleeping_group_notices_that_its_leader_s_process_is_frozen() {
    let (cluster, old) = asleep();
    let thaw = cluster.process(old).freeze();
    let new = cluster.leader_among(&others(old));
    cluster.propose_to(&others(old), "b".into());
    thaw.send(()).expect("it is frozen");
    cluster.applied(old, &["a", "b"]);
    all_sleep(&cluster);
    assert_eq!(cluster.leader(), new);
}

#[test]
fn a_follower_that_was_frozen_or_starts_again_does_not_unseat_a_leader_that_sleeps() {
    let (mut cluster, leader) = asleep();
    let term = cluster.status(leader).term;
    for at in others(leader) {
        let thaw = cluster.process(at).freeze();
        eventually("the leader is awake", || (!cluster.status(leader).asleep).then_some(()));
        // As it notices whatever a frozen follower may miss.
        std::thread::sleep(Duration::from_secs(1));
        thaw.send(()).expect("it is frozen");
        all_sleep(&cluster);
        cluster.kill(at);
        cluster.restart(at);
        cluster.applied(at, &["a"]);
        all_sleep(&cluster);
        assert_eq!((cluster.leader(), cluster.status(leader).term), (leader, term));
    }
    cluster.propose("b");
    (0..3).for_each(|at| cluster.applied(at, &["a", "b"]));
}

#[test]
fn a_candidate_is_refused_by_those_who_sleep() {
    let (cluster, leader) = asleep();
    let term = cluster.status(leader).term;
    for at in others(leader) {
        // Again, for it asks nobody as long as what it heard last is not old.
        eventually("the leader shows itself", || {
            cluster.process(at).with_group(|group| {
                tokio::task::spawn_local(async move { group.elect().await });
            });
            (!cluster.status(leader).asleep).then_some(())
        });
        all_sleep(&cluster);
        assert_eq!((cluster.leader(), cluster.status(leader).term), (leader, term));
    }
}

/// Its process lives, and so the others hear from it.
#[test]
fn a_leader_whose_replica_stops_wakes_the_others() {
    let (cluster, old) = asleep();
    let (tell, stopped) = mpsc::channel();
    cluster.process(old).on_thread(move |node, _| {
        tokio::task::spawn_local(async move {
            node.stop_group(GROUP).await;
            tell.send(()).expect("the test waits");
        });
    });
    stopped.recv().expect("it stops");
    cluster.leader_among(&others(old));
    cluster.propose_to(&others(old), "b".into());
}

#[test]
fn a_sleeping_leader_hands_over() {
    let (cluster, old) = asleep();
    let new = others(old)[0];
    let handle = cluster.process(old).handle();
    cluster
        .wait_for(handle.transfer_leader(cluster.members[new].replica))
        .expect("it knows that the other is there");
    assert_eq!(cluster.leader(), new);
    all_sleep(&cluster);
}

/// Whatever falls asleep with a connection that was cut under it would wait for ever for who called on it.
#[test]
fn sleeping_members_find_each_other_again_when_their_connections_are_cut() {
    let (cluster, leader) = asleep();
    let term = cluster.status(leader).term;
    for _ in 0..3 {
        cluster.running().for_each(crate::processes::Process::cut);
        std::thread::sleep(Duration::from_millis(300));
        all_sleep(&cluster);
    }
    cluster.propose("b");
    (0..3).for_each(|at| cluster.applied(at, &["a", "b"]));
    assert_eq!((cluster.leader(), cluster.status(leader).term), (leader, term));
}
