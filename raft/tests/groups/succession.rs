//! Who leads next, told by connections and not by the clock: an election by silence takes longer here than any test.

use std::time::Duration;

use evolute_raft::{HandleError, Limits};

use crate::processes::{Cluster, ENDLESS, PATIENCE, Process, eventually};

/// Three members, and the leader's place among them.
fn cluster() -> (Cluster, usize) {
    assert!(PATIENCE.as_millis() < u128::from(ENDLESS.election_ms_min) / 2);
    let cluster = Cluster::with_timing(3, Limits::default(), ENDLESS);
    cluster.propose("a");
    (0..3).for_each(|at| cluster.applied(at, &["a"]));
    let leader = cluster.leader();
    (cluster, leader)
}

#[test]
fn a_follower_that_lost_its_leader_s_connection_leads_without_waiting_for_a_silence() {
    let (mut cluster, old) = cluster();
    let term = cluster.status(old).term;
    let rest: Vec<usize> = (0..3).filter(|&at| at != old).collect();
    cluster.kill(old);
    let new = cluster.leader_among(&rest);
    assert!(cluster.status(new).term > term);
    cluster.propose_to(&rest, "b".into());
    rest.iter().for_each(|&at| cluster.applied(at, &["a", "b"]));
    cluster.restart(old);
    cluster.applied(old, &["a", "b"]);
}

#[test]
fn a_leader_whose_connections_are_cut_and_that_answers_goes_on() {
    let (cluster, leader) = cluster();
    let term = cluster.status(leader).term;
    let wanted: Vec<&str> = ["a"].into_iter().chain(["b"; 20]).collect();
    for count in 2..=wanted.len() {
        cluster.running().for_each(Process::cut);
        cluster.propose("b");
        (0..3).for_each(|at| cluster.applied(at, &wanted[..count]));
    }
    assert_eq!((cluster.leader(), cluster.status(leader).term), (leader, term));
}

/// Each of the others could not reach the leader for a while, and hears it again: it is no better a reason to depose it
/// than that they never lost it.
#[test]
fn a_candidate_is_refused_by_those_who_hear_the_leader_whatever_they_lost_before() {
    let (cluster, leader) = cluster();
    let term = cluster.status(leader).term;
    let (first, second) = ((leader + 1) % 3, (leader + 2) % 3);
    let mut wanted = vec!["a"];
    for at in [first, second] {
        cluster.isolate(at);
        eventually("it has lost the leader", || cluster.status(at).leader.is_none().then_some(()));
        cluster.propose("b");
        wanted.push("b");
        cluster.heal(at);
        // It has heard the leader again when it has this.
        cluster.applied(at, &wanted);
        assert_eq!(cluster.status(at).leader, Some(cluster.members[leader]));
    }
    // As far as they themselves are concerned both may stand now, and do.
    for _ in 0..20 {
        for at in [first, second] {
            cluster.process(at).with_group(|group| {
                tokio::task::spawn_local(async move { group.elect().await });
            });
        }
        cluster.propose("b");
        assert_eq!((cluster.leader(), cluster.status(leader).term), (leader, term));
    }
}

#[test]
fn a_leader_hands_over_to_a_follower_that_asks_and_to_nobody_else() {
    let (cluster, leader) = cluster();
    let term = cluster.status(leader).term;
    let asking = (leader + 1) % 3;
    // A leader has nobody to ask.
    cluster.process(leader).with_group(|group| group.take_over());
    eventually("it leads in the place of the other", || {
        cluster.process(asking).with_group(|group| group.take_over());
        (cluster.leader() == asking).then_some(())
    });
    assert!(cluster.status(asking).term > term);
    cluster.propose("b");
    (0..3).for_each(|at| cluster.applied(at, &["a", "b"]));
    // Whoever evens out leaders leaves this one alone, and nobody else: not one that asked for it and does not lead.
    let stands_in = |at: usize| cluster.process(at).with_group(|group| group.stands_in());
    assert_eq!([0, 1, 2].map(stands_in), [0, 1, 2].map(|at| at == asking));
    // Nor does it move anything to where somebody was not reached, as far as a process has heard of that.
    let (old, third) = (cluster.members[leader].replica, cluster.members[(leader + 2) % 3].replica);
    let out_of_reach = |at: usize, of| cluster.process(at).with_group(move |group| group.is_out_of_reach(of));
    assert_eq!([out_of_reach(asking, old), out_of_reach(asking, third)], [true, false]);
    assert!(!out_of_reach((leader + 2) % 3, old));
    cluster.transfer(asking, cluster.members[leader].replica);
    assert_eq!(cluster.leader(), leader);
    assert_eq!([0, 1, 2].map(stands_in), [false; 3]);
}

/// Or the group would have no leader until an election.
#[test]
fn a_leader_does_not_hand_over_to_one_that_is_silent() {
    let (cluster, leader) = cluster();
    let term = cluster.status(leader).term;
    let silent = (leader + 1) % 3;
    cluster.isolate(silent);
    std::thread::sleep(Duration::from_millis(ENDLESS.heartbeat_ms) * 10);
    let handle = cluster.process(leader).handle();
    let replica = cluster.members[silent].replica;
    assert_eq!(cluster.wait_for(handle.transfer_leader(replica)), Err(HandleError::Silent(replica)));
    assert_eq!((cluster.leader(), cluster.status(leader).term), (leader, term));
    cluster.propose("b");
    cluster.heal(silent);
    cluster.applied(silent, &["a", "b"]);
    cluster.transfer(leader, replica);
    assert_eq!(cluster.leader(), silent);
}
