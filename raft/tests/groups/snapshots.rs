//! A replica that needs entries which are gone gets a raft snapshot: whole, once, whatever dies on the way.

use std::sync::atomic::Ordering;

use crate::processes::{Cluster, ENDLESS, GROUP, Hold, Process, eventually, member};
use bytes::Bytes;
use evolute_raft::{Limits, LogUsage, Role};

fn command(number: u64) -> Bytes {
    let mut command = vec![7; 4096];
    command[..8].copy_from_slice(&number.to_le_bytes());
    command.into()
}

fn fill(cluster: &Cluster, these: &[usize], numbers: std::ops::Range<u64>) {
    numbers.for_each(|number| cluster.propose_to(these, command(number)));
}

fn purged(cluster: &Cluster, at: usize) -> u64 {
    cluster.status(at).purged.map_or(0, |at| at.index)
}

/// All of these have checkpointed and purged everything up to what their leader has applied now.
fn purge(cluster: &Cluster, these: &[usize]) {
    let upto =
        cluster.process(cluster.leader_among(these)).with_group(|group| group.applied()).expect("something");
    eventually("purged", || {
        these.iter().for_each(|&at| cluster.process(at).checkpoint());
        these.iter().for_each(|&at| {
            cluster
                .process(at)
                .on_thread(|node, _| drop(tokio::task::spawn_local(async move { node.purge().await })))
        });
        these.iter().all(|&at| purged(cluster, at) >= upto.index).then_some(())
    });
}

/// Three members whose logs do not begin at the beginning any more, and a fourth process.
fn three_and_one(commands: u64) -> Cluster {
    three_and_one_with(commands, Limits::default())
}

fn three_and_one_with(commands: u64, limits: Limits) -> Cluster {
    // What is sent is counted, and another leader would begin anew.
    let mut cluster = Cluster::with_timing(3, limits, ENDLESS);
    fill(&cluster, &[0, 1, 2], 0..commands);
    purge(&cluster, &[0, 1, 2]);
    cluster.add();
    cluster
}

fn count(of: &std::sync::Arc<std::sync::atomic::AtomicU64>) -> u64 {
    of.load(Ordering::SeqCst)
}

fn waits(process: &Process) {
    eventually("somebody waits there", || process.watch.is_waiting().then_some(()));
}

#[test]
fn a_replica_that_joins_a_purged_group_becomes_equal_and_counts() {
    let mut cluster = three_and_one(50);
    cluster.learn(3);
    fill(&cluster, &[0, 1, 2], 50..60);
    cluster.equal(&[0, 1, 2, 3]);
    assert_eq!(count(&cluster.process(3).watch.installed), 1);
    assert_eq!(cluster.role(3), Role::Learner);
    let leader = cluster.leader();
    let others: Vec<usize> = (0..3).filter(|&at| at != leader).collect();
    cluster.change(&[leader, others[0], 3]);
    cluster.kill(others[1]);
    cluster.kill(others[0]);
    fill(&cluster, &[leader, 3], 60..70);
    cluster.equal(&[leader, 3]);
    // It goes on from what it has, and not from a snapshot again.
    cluster.kill(3);
    cluster.restart(3);
    fill(&cluster, &[leader, 3], 70..75);
    cluster.equal(&[leader, 3]);
    assert_eq!(count(&cluster.process(3).watch.begun), 0);
}

#[test]
fn the_group_serves_while_a_snapshot_stands_still_and_keeps_what_comes_after_it() {
    // Whatever comes during it lies beyond what is kept for members who merely lag.
    let cluster = three_and_one_with(50, Limits { log_retain_bytes: 1 << 20, ..RETAIN });
    let leader = cluster.leader();
    cluster.process(leader).watch.hold(Hold::Source, 10);
    cluster.learn(3);
    waits(cluster.process(leader));
    let before = purged(&cluster, leader);
    fill(&cluster, &[0, 1, 2], 50..800);
    cluster.running().for_each(Process::checkpoint);
    let applied = cluster.process(leader).with_group(|group| group.applied()).expect("something");
    let others = [(leader + 1) % 3, (leader + 2) % 3];
    eventually("the others, who send nothing, have purged", || {
        cluster.running().for_each(Process::checkpoint);
        others.iter().all(|&at| purged(&cluster, at) > before).then_some(())
    });
    assert!(cluster.status(leader).checkpointed >= Some(applied));
    assert_eq!(purged(&cluster, leader), before, "nothing goes that the new member will need");
    cluster.process(leader).watch.release();
    cluster.equal(&[0, 1, 2, 3]);
    assert_eq!(count(&cluster.process(3).watch.begun), 1, "one snapshot was enough");
    // And now it goes.
    purge(&cluster, &[0, 1, 2, 3]);
}

#[test]
fn a_broken_connection_goes_on_with_the_next_frame() {
    let cluster = three_and_one(60);
    let leader = cluster.leader();
    cluster.process(leader).watch.hold(Hold::Source, 30);
    cluster.learn(3);
    waits(cluster.process(leader));
    for _ in 0..3 {
        cluster.process(3).cut();
        // A frame that is on its way when the connection goes is sent again.
        cluster
            .process(leader)
            .watch
            .hold(Hold::Source, 30 + count(&cluster.process(leader).watch.frames_read) % 7);
    }
    cluster.process(leader).watch.release();
    cluster.process(3).cut();
    cluster.equal(&[0, 1, 2, 3]);
    let (read, put) =
        (count(&cluster.process(leader).watch.frames_read), count(&cluster.process(3).watch.frames_put));
    assert_eq!((count(&cluster.process(3).watch.begun), read), (1, put), "each frame once");
}

#[test]
fn a_connection_broken_while_frames_are_staged_loses_none_and_doubles_none() {
    let cluster = three_and_one(60);
    cluster.process(3).watch.hold(Hold::Put, 5);
    cluster.learn(3);
    waits(cluster.process(3));
    for _ in 0..5 {
        cluster.process(3).cut();
        std::thread::yield_now();
    }
    cluster.process(3).watch.release();
    cluster.equal(&[0, 1, 2, 3]);
    let leader = cluster.leader();
    let (read, put) =
        (count(&cluster.process(leader).watch.frames_read), count(&cluster.process(3).watch.frames_put));
    assert_eq!((count(&cluster.process(3).watch.begun), read), (1, put), "each frame once");
}

#[test]
fn a_receiver_that_dies_at_any_point_has_its_old_state_or_the_new_one() {
    for hold in [Hold::Put, Hold::BeforeSwitch, Hold::AfterSwitch] {
        let mut cluster = Cluster::of(3);
        fill(&cluster, &[0, 1, 2], 0..20);
        let away = (cluster.leader() + 1) % 3;
        let rest: Vec<usize> = (0..3).filter(|&at| at != away).collect();
        cluster.equal(&[0, 1, 2]);
        cluster.process(away).checkpoint();
        let old = cluster.process(away).with_group(|group| group.applied());
        // It leaves, and is replaced by a learner that is itself: only a new member is without the log of the group.
        cluster.isolate(away);
        fill(&cluster, &rest, 20..60);
        cluster.change(&rest);
        purge(&cluster, &rest);
        cluster.process(away).watch.hold(hold, if hold == Hold::Put { 3 } else { 0 });
        cluster.heal(away);
        // The same replica under its old id: its log ends before what the others have.
        cluster.learn(away);
        waits(cluster.process(away));
        let new = cluster.process(away).watch.clone();
        cluster.kill(away);
        cluster.restart(away);
        let restored = cluster.process(away).on_thread(|_, owner| owner.restored());
        match hold {
            Hold::AfterSwitch => {
                assert!(restored > old && count(&new.installed) == 1, "{hold:?}: {restored:?}")
            }
            _ => assert!(restored == old && count(&new.installed) == 0, "{hold:?}: {restored:?}"),
        }
        fill(&cluster, &rest, 60..70);
        cluster.equal(&[0, 1, 2]);
        // The log is whole again, too.
        cluster.kill(away);
        cluster.restart(away);
        fill(&cluster, &rest, 70..72);
        cluster.equal(&[0, 1, 2]);
    }
}

#[test]
fn a_sender_that_dies_is_replaced_by_the_next_leader() {
    let mut cluster = three_and_one(50);
    let leader = cluster.leader();
    cluster.process(leader).watch.hold(Hold::Source, 10);
    cluster.learn(3);
    waits(cluster.process(leader));
    cluster.kill(leader);
    let rest: Vec<usize> = (0..3).filter(|&at| at != leader).collect();
    fill(&cluster, &rest, 50..60);
    cluster.equal(&[rest[0], rest[1], 3]);
    assert_eq!(count(&cluster.process(3).watch.begun), 2, "the second dropped the first");
    cluster.restart(leader);
    cluster.equal(&[0, 1, 2, 3]);
}

#[test]
fn a_leader_that_steps_down_cancels_what_it_sends() {
    let cluster = three_and_one(50);
    let old = cluster.leader();
    cluster.process(old).watch.hold(Hold::Source, 10);
    cluster.learn(3);
    waits(cluster.process(old));
    let to = (old + 1) % 3;
    cluster.transfer(old, cluster.members[to].replica);
    // Its source is still held: what arrives is from the new leader.
    cluster.equal(&[0, 1, 2, 3]);
    eventually("the old one has let go", || (!cluster.process(old).watch.is_waiting()).then_some(()));
}

#[test]
fn what_a_snapshot_holds_beyond_its_position_is_not_served_before_it_is_applied() {
    let mut cluster = three_and_one(50);
    let leader = cluster.leader();
    cluster.process(leader).watch.hold(Hold::Source, 3);
    cluster.process(3).watch.hold(Hold::AfterSwitch, 0);
    cluster.learn(3);
    waits(cluster.process(leader));
    fill(&cluster, &[0, 1, 2], 50..80);
    cluster.process(leader).watch.release();
    waits(cluster.process(3));
    let consistent = |cluster: &Cluster| cluster.process(3).with_group(|group| group.consistent_from());
    assert_eq!(consistent(&cluster), Some(u64::MAX), "neither the old state nor the new one");
    cluster.isolate(3);
    cluster.process(3).watch.release();
    let at = eventually("installed", || cluster.process(3).with_group(|group| group.applied()));
    let beyond = *cluster.process(3).commands.lock().unwrap().keys().last().expect("commands");
    assert!(beyond > at.index, "read while the leader went on: {beyond} is beyond {at}");
    eventually("installed and bounded", || {
        consistent(&cluster)
            .filter(|&from| from != u64::MAX)
            .map(|from| assert!(from >= beyond, "{from} < {beyond}"))
    });
    // The bound of a former life is gone, and what it was about is not: nobody has said yet what is committed.
    cluster.kill(3);
    cluster.restart(3);
    assert_eq!(consistent(&cluster), Some(u64::MAX));
    cluster.heal(3);
    eventually("consistent again", || consistent(&cluster).is_none().then_some(()));
    let applied = cluster.process(3).with_group(|group| group.applied()).expect("something");
    assert!(applied.index >= beyond, "{applied} is before {beyond}");
    cluster.equal(&[0, 1, 2, 3]);
}

fn usage(cluster: &Cluster, at: usize) -> LogUsage {
    cluster.process(at).on_thread(|node, _| node.log().usage())
}

const RETAIN: Limits = Limits { log_retain_bytes: 4 << 20, snapshot_bytes_per_second: 1 << 30 };

/// 12 MiB through a log that keeps 4.
fn long_absence(cluster: &Cluster, rest: &[usize]) {
    for round in 0..24_u64 {
        let commands = (0..8).map(|number| {
            let mut command = vec![1; 64 << 10];
            command[..8].copy_from_slice(&(round * 8 + number).to_le_bytes());
            Bytes::from(command)
        });
        let commands: Vec<Bytes> = commands.collect();
        // All of them again, if a leader refuses any of them: what is applied twice is only more of it.
        eventually("eight commands applied", || {
            let handle = cluster.process(cluster.leader_among(rest)).handle();
            let proposed = commands.iter().map(|command| handle.propose(command.clone()));
            let outcomes = cluster.wait_for(futures::future::join_all(proposed));
            outcomes.iter().all(Result::is_ok).then_some(())
        });
        if round % 2 == 0 {
            rest.iter().for_each(|&at| cluster.process(at).checkpoint());
        }
    }
}

/// Three that are equal, one of whom does not lead and is about to be away, and the rest.
fn one_to_be_away() -> (Cluster, usize, Vec<usize>) {
    let cluster = Cluster::with_limits(3, RETAIN);
    fill(&cluster, &[0, 1, 2], 0..5);
    cluster.equal(&[0, 1, 2]);
    let away = (cluster.leader() + 1) % 3;
    let rest = (0..3).filter(|&at| at != away).collect();
    (cluster, away, rest)
}

#[test]
fn the_log_kept_for_a_member_that_is_away_is_bounded_and_it_comes_back_by_a_snapshot() {
    let (mut cluster, away, rest) = one_to_be_away();
    cluster.process(away).checkpoint();
    cluster.kill(away);
    long_absence(&cluster, &rest);
    bounded(&cluster, &rest);
    cluster.restart(away);
    cluster.equal(&[0, 1, 2]);
    assert_eq!(count(&cluster.process(away).watch.installed), 1);
}

/// It stands for election with the vote of the one that lags, and needs it again to commit anything.
#[test]
fn a_leader_brings_up_the_only_member_that_is_left_before_it_serves() {
    let (mut cluster, away, rest) = one_to_be_away();
    cluster.kill(away);
    long_absence(&cluster, &rest);
    bounded(&cluster, &rest);
    rest.iter().for_each(|&at| cluster.kill(at));
    cluster.restart(rest[0]);
    cluster.restart(away);
    cluster.equal(&[rest[0], away]);
    assert_eq!(count(&cluster.process(away).watch.installed), 1);
    fill(&cluster, &[rest[0], away], 200..210);
}

fn bounded(cluster: &Cluster, these: &[usize]) {
    eventually("the log is bounded", || {
        these.iter().for_each(|&at| cluster.process(at).checkpoint());
        these.iter().for_each(|&at| {
            cluster
                .process(at)
                .on_thread(|node, _| drop(tokio::task::spawn_local(async move { node.purge().await })))
        });
        // The bound, the file being written, and the checkpoint's granularity.
        these
            .iter()
            .all(|&at| usage(cluster, at).live_bytes <= RETAIN.log_retain_bytes + (2 << 20))
            .then_some(())
    });
}

#[test]
fn a_member_that_hears_and_never_answers_does_not_hold_the_log_either() {
    let cluster = Cluster::with_limits(3, RETAIN);
    fill(&cluster, &[0, 1, 2], 0..5);
    let hung = (cluster.leader() + 1) % 3;
    let rest: Vec<usize> = (0..3).filter(|&at| at != hung).collect();
    cluster.process(hung).deafen(true);
    long_absence(&cluster, &rest);
    bounded(&cluster, &rest);
}

#[test]
fn a_member_away_for_a_short_time_catches_up_from_the_log() {
    let (mut cluster, away, rest) = one_to_be_away();
    cluster.kill(away);
    fill(&cluster, &rest, 5..50);
    rest.iter().for_each(|&at| cluster.process(at).checkpoint());
    cluster.restart(away);
    cluster.equal(&[0, 1, 2]);
    assert_eq!(count(&cluster.process(away).watch.begun), 0);
}

/// A leader cut off with a change of members in its log that nobody else has: when it comes back by a snapshot, that
/// change never was.
#[test]
fn the_members_of_a_snapshot_replace_those_of_a_change_that_never_was() {
    let mut cluster = Cluster::of(3);
    fill(&cluster, &[0, 1, 2], 0..20);
    cluster.equal(&[0, 1, 2]);
    let old = cluster.leader();
    let rest: Vec<usize> = (0..3).filter(|&at| at != old).collect();
    cluster.process(old).checkpoint();
    cluster.isolate(old);
    let stranger = member(77);
    // Appended there, and never committed.
    cluster.process(old).with_group(move |group| {
        tokio::task::spawn_local(async move { group.add_learner(stranger).await });
    });
    let knows =
        |cluster: &Cluster, at: usize| cluster.status(at).members.iter().any(|it| it.member == stranger);
    eventually("it believes in the stranger", || knows(&cluster, old).then_some(()));
    fill(&cluster, &rest, 20..40);
    cluster.add();
    cluster.learn(3);
    cluster.change(&[rest[0], rest[1], 3]);
    cluster.equal(&[rest[0], rest[1], 3]);
    purge(&cluster, &[rest[0], rest[1], 3]);
    // It is taken back, without its log being of any use.
    cluster.learn(old);
    cluster.heal(old);
    cluster.equal(&[0, 1, 2, 3]);
    assert_eq!(count(&cluster.process(old).watch.installed), 1);
    for life in 0..2 {
        assert!(!knows(&cluster, old), "life {life}: the stranger is back");
        let members = cluster.status(old).members;
        let voters = members.iter().filter(|it| it.voter).count();
        assert_eq!((members.len(), voters), (4, 3), "life {life}: {members:?}");
        cluster.kill(old);
        cluster.restart(old);
        fill(&cluster, &[rest[0], rest[1], 3], 40 + life..41 + life);
        cluster.equal(&[0, 1, 2, 3]);
    }
}

#[test]
fn a_receiver_that_cannot_says_why_and_the_group_goes_on() {
    let cluster = three_and_one(30);
    cluster.process(3).watch.refuse("no room");
    cluster.learn(3);
    eventually("refused, more than once", || (count(&cluster.process(3).watch.begun) > 2).then_some(()));
    fill(&cluster, &[0, 1, 2], 30..40);
    cluster.process(3).watch.refuse("");
    cluster.equal(&[0, 1, 2, 3]);
    let group = cluster.process(3).on_thread(|node, _| node.log().groups());
    assert_eq!(group, [GROUP]);
}
