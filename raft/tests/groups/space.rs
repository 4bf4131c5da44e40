//! A process whose disk has no room for another file of its log.

use std::path::PathBuf;

use bytes::Bytes;
use evolute_raft::{Limits, ProposeError, Role};

use crate::processes::{Cluster, ENDLESS, eventually};

/// A tenth of a file.
const LONG: usize = 100_000;

/// Takes the names of the files that a process would make next: it can make none.
fn fill_disk(cluster: &Cluster, at: usize) -> Vec<PathBuf> {
    let taken: Vec<_> = (1..20).map(|n| cluster.dirs[at].path().join(format!("{n:04}.new"))).collect();
    // The next file may have that name for a moment, until it is whole.
    taken.iter().for_each(|name| eventually("a name is taken", || std::fs::create_dir_all(name).ok()));
    taken
}

fn make_room(taken: &[PathBuf]) {
    taken.iter().for_each(|name| std::fs::remove_dir(name).expect("a name is free"));
}

fn log_files(cluster: &Cluster, at: usize) -> usize {
    let names = std::fs::read_dir(cluster.dirs[at].path()).expect("a directory");
    let names = names.map(|entry| entry.expect("listed").file_name().into_string().expect("ours"));
    names.filter(|name| name.ends_with(".raftlog")).count()
}

/// It takes no more entries, and the two others go on. It still hears who leads, votes, and has its place in an election;
/// when there is room it has everything.
#[test]
fn a_follower_without_room_for_its_log_still_votes_and_catches_up_later() {
    let mut cluster = Cluster::with_timing(3, Limits::default(), ENDLESS);
    cluster.propose("a");
    let leader = cluster.leader();
    let (full, other) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.applied(full, &["a"]);
    let taken = fill_disk(&cluster, full);
    let long = "b".repeat(LONG);
    let mut wanted = vec!["a"];
    for _ in 0..60 {
        cluster.propose_to(&[0, 1, 2], Bytes::from(long.clone()));
        wanted.push(&long);
    }
    let leader = cluster.leader_among(&[leader, other]);
    let other = 3 - full - leader;
    cluster.applied(leader, &wanted);
    cluster.applied(other, &wanted);
    assert!(log_files(&cluster, full) <= 3, "{} files", log_files(&cluster, full));
    assert!(cluster.process(full).commands.lock().unwrap().len() < 40, "it cannot have all of it");
    // A leader that it never took anything from.
    let to = cluster.process(other).member.replica;
    cluster.transfer(leader, to);
    let term = cluster.status(other).term;
    eventually("it knows the new leader", || {
        let known = cluster.status(full);
        (known.term == term && known.leader.map(|it| it.replica) == Some(to)).then_some(())
    });
    // One that leads by its vote alone, and commits nothing without it.
    cluster.kill(other);
    eventually("it has voted", || {
        let elected = cluster.status(leader);
        (elected.role == Role::Leader && elected.term > term).then_some(())
    });
    make_room(&taken);
    cluster.propose("c");
    wanted.push("c");
    cluster.applied(full, &wanted);
    cluster.restart(other);
    cluster.applied(other, &wanted);
}

/// One that leads takes nothing either: nobody waits for what cannot be written.
#[test]
fn a_leader_without_room_for_its_log_says_that_it_is_busy_until_there_is_some() {
    let cluster = Cluster::of(1);
    cluster.propose("a");
    let taken = fill_disk(&cluster, 0);
    let long = Bytes::from(vec![b'b'; LONG]);
    let propose = || cluster.wait_for(cluster.process(0).handle().propose(long.clone()));
    let refused = (0..60).map(|_| propose()).find_map(Result::err);
    assert_eq!(refused, Some(ProposeError::Busy));
    assert_eq!(propose(), Err(ProposeError::Busy), "it stays so");
    make_room(&taken);
    eventually("there is room", || propose().ok());
}
