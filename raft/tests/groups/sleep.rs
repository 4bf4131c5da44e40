//! Groups that have nothing to do sleep, and wake up for whatever concerns them.
//!
//! Who leads must not change with that; but a leader that this machine had no time for is rightly taken for dead. So what
//! is seen counts if every thread could run all the time, and a test begins again if one could not.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::processes::{Cluster, GROUP, Process, eventually};

/// A machine that lets no test of so many run tells nothing about it.
const ATTEMPTS: u32 = 8;

/// Does what is to be seen until it is seen: `None`, a thread stood still.
fn undisturbed(seen: impl Fn() -> Option<()>) {
    if (0..ATTEMPTS).find_map(|_| seen()).is_none() {
        eprintln!("threads stood still in each of {ATTEMPTS} attempts: nothing is proven");
    }
}

/// Three members that have all fallen asleep, and the leader's place among them.
fn asleep() -> Option<(Cluster, usize)> {
    let cluster = Cluster::of(3);
    cluster.propose("a");
    // Or it may have been proposed to two leaders.
    cluster.all_ran(None).then_some(())?;
    (0..3).for_each(|at| cluster.applied(at, &["a"]));
    all_sleep(&cluster);
    let leader = cluster.leader();
    Some((cluster, leader))
}

fn all_sleep(cluster: &Cluster) {
    eventually("all are asleep", || (0..3).all(|at| cluster.status(at).asleep).then_some(()));
}

fn others(leader: usize) -> [usize; 2] {
    [(leader + 1) % 3, (leader + 2) % 3]
}

/// Who leads, and in which term.
fn reign(cluster: &Cluster) -> (usize, u64) {
    let leader = cluster.leader();
    (leader, cluster.status(leader).term)
}

/// That this one still leads; `None` if it need not, for a thread stood still, other than that of who was `frozen`.
fn still_leads(cluster: &Cluster, since: (usize, u64), frozen: Option<usize>) -> Option<()> {
    let now = reign(cluster);
    cluster.all_ran(frozen).then(|| assert_eq!(now, since))
}

#[test]
fn a_group_that_has_nothing_to_do_sleeps_and_takes_what_it_is_asked_to() {
    undisturbed(|| {
        let (cluster, leader) = asleep()?;
        let since = reign(&cluster);
        // Longer than any election takes: nobody misses the heartbeats.
        std::thread::sleep(Duration::from_secs(2));
        let sleep = (0..3).all(|at| cluster.status(at).asleep);
        // Nobody asks the members any more, and the leader knows that they are there.
        let heard = cluster.status(leader).other_voters().all(|it| it.heard);
        cluster.all_ran(None).then(|| assert!(sleep && heard, "asleep: {sleep}, heard: {heard}"))?;
        let mut wanted = vec!["a"];
        for _ in 0..3 {
            // The first of them by the leader itself, with nobody to try it again: it is held, not refused.
            let handle = cluster.process(leader).handle();
            let outcomes = cluster.wait_for(futures::future::join_all(
                ["b", "c", "d"].map(|it| handle.propose(Bytes::from_static(it.as_bytes()))),
            ));
            let answered = Instant::now();
            wanted.extend(["b", "c", "d"]);
            cluster.all_ran(None).then(|| assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}"))?;
            let asleep_again = cluster.status(leader).asleep;
            // Unless it was this thread that stood still: they sleep again after a while.
            assert!(!asleep_again || answered.elapsed() > Duration::from_millis(500));
            (0..3).for_each(|at| cluster.applied(at, &wanted));
            all_sleep(&cluster);
        }
        still_leads(&cluster, since, None)
    });
}

#[test]
fn a_sleeping_group_outlives_its_leader() {
    undisturbed(|| {
        let (mut cluster, old) = asleep()?;
        cluster.kill(old);
        let new = cluster.leader_among(&others(old));
        cluster.propose_to(&others(old), "b".into());
        cluster.all_ran(None).then_some(())?;
        cluster.restart(old);
        cluster.applied(old, &["a", "b"]);
        all_sleep(&cluster);
        let leader = cluster.leader();
        cluster.all_ran(None).then(|| assert_eq!(leader, new))
    });
}

/// Its kernel keeps every connection as it is.
#[test]
fn a_sleeping_group_notices_that_its_leader_s_process_is_frozen() {
    undisturbed(|| {
        let (cluster, old) = asleep()?;
        let thaw = cluster.process(old).freeze();
        let new = cluster.leader_among(&others(old));
        cluster.propose_to(&others(old), "b".into());
        cluster.all_ran(Some(old)).then_some(())?;
        thaw.send(()).expect("it is frozen");
        cluster.applied(old, &["a", "b"]);
        all_sleep(&cluster);
        let leader = cluster.leader();
        cluster.all_ran(Some(old)).then(|| assert_eq!(leader, new))
    });
}

#[test]
fn a_follower_that_was_frozen_or_starts_again_does_not_unseat_a_leader_that_sleeps() {
    undisturbed(|| {
        let (mut cluster, leader) = asleep()?;
        let since = reign(&cluster);
        for at in others(leader) {
            let thaw = cluster.process(at).freeze();
            eventually("the leader is awake", || (!cluster.status(leader).asleep).then_some(()));
            // As it notices whatever a frozen follower may miss.
            std::thread::sleep(Duration::from_secs(1));
            thaw.send(()).expect("it is frozen");
            all_sleep(&cluster);
            still_leads(&cluster, since, Some(at))?;
            cluster.kill(at);
            cluster.restart(at);
            cluster.applied(at, &["a"]);
            all_sleep(&cluster);
            still_leads(&cluster, since, None)?;
        }
        cluster.propose("b");
        cluster.all_ran(None).then_some(())?;
        (0..3).for_each(|at| cluster.applied(at, &["a", "b"]));
        Some(())
    });
}

#[test]
fn a_candidate_is_refused_by_those_who_sleep() {
    undisturbed(|| {
        let (cluster, leader) = asleep()?;
        let since = reign(&cluster);
        for at in others(leader) {
            // Again, for it asks nobody as long as what it heard last is not old.
            eventually("the leader shows itself", || {
                cluster.process(at).with_group(|group| {
                    tokio::task::spawn_local(async move { group.elect().await });
                });
                (!cluster.status(leader).asleep || !cluster.all_ran(None)).then_some(())
            });
            all_sleep(&cluster);
            still_leads(&cluster, since, None)?;
        }
        Some(())
    });
}

/// Its process lives, and so the others hear from it.
#[test]
fn a_leader_whose_replica_stops_wakes_the_others() {
    undisturbed(|| {
        let (cluster, old) = asleep()?;
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
        Some(())
    });
}

#[test]
fn a_sleeping_leader_hands_over() {
    undisturbed(|| {
        let (cluster, old) = asleep()?;
        let new = others(old)[0];
        let handle = cluster.process(old).handle();
        let outcome = cluster.wait_for(handle.transfer_leader(cluster.members[new].replica));
        let leader = cluster.leader();
        cluster.all_ran(None).then_some(())?;
        outcome.expect("it knows that the other is there");
        assert_eq!(leader, new);
        all_sleep(&cluster);
        Some(())
    });
}

/// Whatever falls asleep with a connection that was cut under it would wait for ever for who called on it.
#[test]
fn sleeping_members_find_each_other_again_when_their_connections_are_cut() {
    undisturbed(|| {
        let (cluster, _) = asleep()?;
        let since = reign(&cluster);
        for _ in 0..3 {
            cluster.running().for_each(Process::cut);
            std::thread::sleep(Duration::from_millis(300));
            all_sleep(&cluster);
        }
        cluster.propose("b");
        cluster.all_ran(None).then_some(())?;
        (0..3).for_each(|at| cluster.applied(at, &["a", "b"]));
        still_leads(&cluster, since, None)
    });
}
