//! Reads from replicas that do not lead: they go on without a leader, and are never older than what was acknowledged.

use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::CopysetId;
use evolute_protocol::wire::reply::Freshness;

use super::cluster::{Cluster, SERVERS};
use super::rig::Rig;
use super::{patient, pattern};
use crate::backing::{Outcome, Request};
use crate::volume::VolumeOptions;
use crate::volume::control::Ask;

const C1: CopysetId = CopysetId(1);
const BLOCK: u64 = 4096;

/// Attached, connected to all replicas, and the first `blocks` blocks written.
fn written(cluster: &Cluster, options: VolumeOptions, blocks: u64) -> Rig {
    let mut rig = Rig::attached(cluster, options);
    for n in 0..blocks {
        assert_eq!(rig.write(n * BLOCK, pattern(n, 4096)), Outcome::Done);
    }
    rig.until("connected to all", |rig| rig.volume.peers.iter().all(|peer| peer.is_open()));
    rig
}

fn followed(cluster: &Cluster) -> u64 {
    cluster.state().followed.values().sum()
}

/// Both followers know nothing of what comes after this.
fn leave_behind(cluster: &Cluster, followers: &[usize]) {
    let mut state = cluster.state();
    let past = state.past(C1);
    for follower in followers {
        state.fault(SERVERS[*follower]).behind.insert(C1, past.clone());
    }
}

#[test]
fn reads_go_on_while_the_leader_says_nothing_and_come_back_to_it() {
    let cluster = Cluster::start(1);
    let mut rig = written(&cluster, patient(), 8);
    cluster.state().fault(SERVERS[0]).hung = true;
    let many: Vec<_> =
        (0..200u64).map(|n| rig.submit(Request::Read { offset: n % 8 * BLOCK, len: 4096 })).collect();
    for (n, ticket) in (0..).zip(many) {
        assert_eq!(rig.wait(ticket), data(n % 8));
    }
    for n in 0..8 {
        assert_eq!(rig.read(n * BLOCK, 4096), pattern(n, 4096));
    }
    let state = cluster.state();
    assert!(state.followed.len() == 2, "not all were asked of one follower: {:?}", state.followed);
    drop(state);
    // Only what it was asked before it was known to be mute went to it, not all of this.
    assert!(cluster.state().requests[&SERVERS[0]] <= 8 + 200);
    cluster.state().fault(SERVERS[0]).hung = false;
    assert_eq!(rig.write(0, pattern(9, 4096)), Outcome::Done);
    let before = followed(&cluster);
    for _ in 0..50 {
        assert_eq!(rig.read(0, 4096), pattern(9, 4096));
    }
    assert!(followed(&cluster) < before + 50, "the leader answers again, and is asked");
}

fn data(n: u64) -> Outcome {
    Outcome::Data([Bytes::from(pattern(n, 4096))].into_iter().collect())
}

#[test]
fn reads_go_on_while_nobody_leads_and_writes_wait() {
    let cluster = Cluster::start(1);
    let mut rig = written(&cluster, patient(), 8);
    cluster.state().lead(C1, None);
    cluster.kill(SERVERS[0]);
    let write = rig.submit(Request::Write { offset: 9 * BLOCK, data: Bytes::from(pattern(9, 4096)) });
    for n in 0..100 {
        assert_eq!(rig.read(n % 8 * BLOCK, 4096), pattern(n % 8, 4096));
    }
    assert!(!rig.outcomes.contains_key(&write));
    cluster.state().lead(C1, Some(SERVERS[2]));
    assert_eq!(rig.wait(write), Outcome::Done);
    assert_eq!(rig.read(9 * BLOCK, 4096), pattern(9, 4096));
}

/// Only reads are under way, so nobody waits for the leader: a new one must be found all the same.
#[test]
fn a_volume_that_only_reads_finds_the_new_leader_too() {
    let cluster = Cluster::start(1);
    // Long enough that no read is ever silent for so long: a follower has answered it by then.
    let options = VolumeOptions { silence: Duration::from_millis(400), ..patient() };
    let mut rig = written(&cluster, options, 8);
    cluster.state().fault(SERVERS[0]).hung = true;
    cluster.state().lead(C1, Some(SERVERS[1]));
    let found = |rig: &Rig| {
        let mut routes = rig.volume.routing.iter();
        routes.all(|route| route.confirmed && rig.volume.peers[route.target].id == SERVERS[1])
    };
    rig.until("the new leader is asked", |rig| {
        let ticket = rig.submit(Request::Read { offset: 0, len: 4096 });
        assert_eq!(rig.wait(ticket), data(0));
        found(rig)
    });
}

/// The leader acknowledged a write and died; its followers have the entry and do not know that it is committed. What
/// they have of that block is older than what the guest was told.
#[test]
fn a_follower_is_asked_for_no_bytes_it_may_lack_the_last_write_of() {
    let cluster = Cluster::start(1);
    let mut rig = written(&cluster, patient(), 8);
    leave_behind(&cluster, &[1, 2]);
    assert_eq!(rig.write(0, pattern(77, 4096)), Outcome::Done);
    cluster.state().lead(C1, None);
    cluster.kill(SERVERS[0]);
    let read = rig.submit(Request::Read { offset: 0, len: 4096 });
    let beside = rig.submit(Request::Read { offset: 512, len: 512 });
    rig.until("both said that they are behind", |_| cluster.state().refused_behind >= 4);
    // Everything else is there, although the last entry of the volume is not.
    for n in 1..8 {
        assert_eq!(rig.read(n * BLOCK, 4096), pattern(n, 4096));
    }
    assert!(!rig.outcomes.contains_key(&read) && !rig.outcomes.contains_key(&beside));
    cluster.state().lead(C1, Some(SERVERS[1]));
    assert_eq!(rig.wait(read), data(77));
    assert!(matches!(rig.wait(beside), Outcome::Data(_)));
}

#[test]
fn an_answer_that_is_not_fresh_enough_is_not_given_to_the_guest() {
    let cluster = Cluster::start(1);
    let mut rig = written(&cluster, patient(), 8);
    leave_behind(&cluster, &[1, 2]);
    assert_eq!(rig.write(0, pattern(77, 4096)), Outcome::Done);
    cluster.state().fault(SERVERS[0]).hung = true;
    cluster.state().fault(SERVERS[1]).careless = true;
    cluster.state().fault(SERVERS[2]).careless = true;
    let read = rig.submit(Request::Read { offset: 0, len: 4096 });
    rig.until("both were careless", |rig| rig.volume.counters().stale_reads >= 1);
    assert!(rig.outcomes.is_empty());
    cluster.state().fault(SERVERS[0]).hung = false;
    // It is not asked again, for it has not said no; but others are, and lead it back.
    cluster.kill(SERVERS[0]);
    cluster.revive(SERVERS[0]);
    assert_eq!(rig.wait(read), data(77));
}

/// The leader acknowledged a write and died. Its followers have it in their logs, and the volume can tell them that it is
/// committed.
#[test]
fn what_a_dead_leader_acknowledged_is_read_from_a_log_that_has_it() {
    let cluster = Cluster::start(1);
    let mut rig = written(&cluster, patient(), 8);
    leave_behind(&cluster, &[1, 2]);
    assert_eq!(rig.write(0, pattern(77, 4096)), Outcome::Done);
    {
        let mut state = cluster.state();
        let (term, index) = (state.groups[&C1].term, state.groups[&C1].index);
        // One has a longer log, of a leader that may never have known of the write.
        state.fault(SERVERS[1]).logged = Some(Freshness { term: term - 1, index: index + 5 });
        state.fault(SERVERS[2]).logged = Some(Freshness { term, index });
        state.lead(C1, None);
    }
    cluster.kill(SERVERS[0]);
    for _ in 0..20 {
        assert_eq!(rig.read(0, 4096), pattern(77, 4096));
    }
    let state = cluster.state();
    assert!(state.refused_behind > 0);
    assert_eq!(state.followed.keys().collect::<Vec<_>>(), [&SERVERS[2]]);
}

/// Both followers could not answer at first, for whatever reason, and nobody leads yet.
#[test]
fn followers_are_asked_again_while_nobody_leads() {
    let cluster = Cluster::start(1);
    let mut rig = written(&cluster, patient(), 8);
    leave_behind(&cluster, &[1, 2]);
    assert_eq!(rig.write(0, pattern(77, 4096)), Outcome::Done);
    cluster.state().lead(C1, None);
    cluster.kill(SERVERS[0]);
    let reads: Vec<_> = (0..3).map(|_| rig.submit(Request::Read { offset: 0, len: 4096 })).collect();
    rig.until("all were told that all are behind", |_| cluster.state().refused_behind >= 6);
    assert!(rig.outcomes.is_empty());
    cluster.state().fault(SERVERS[2]).behind.clear();
    for read in reads {
        assert_eq!(rig.wait(read), data(77));
    }
}

/// Whether a change in flight is visible may depend on the replica. A guest that saw it must not see it gone.
#[test]
fn of_bytes_that_are_being_changed_a_replica_must_have_all_that_was_shown() {
    let cluster = Cluster::start(1);
    let mut rig = written(&cluster, patient(), 8);
    let acknowledged = cluster.state().groups[&C1].index;
    cluster.state().lead(C1, None);
    cluster.kill(SERVERS[0]);
    let write = rig.submit(Request::Write { offset: 0, data: Bytes::from(pattern(9, 8192)) });
    for (offset, len) in [(0, 512), (4096, 4096), (4096 + 3584, 1024)] {
        rig.read(offset, len);
        let asked = *cluster.state().asked.last().expect("just now");
        assert_eq!((asked.term, asked.index), (1, acknowledged));
    }
    assert_eq!(rig.read(2 * BLOCK, 4096), pattern(2, 4096));
    assert!(cluster.state().asked.last().expect("just now").index < acknowledged);
    // One of the followers applies the change, and the volume hears nothing of it.
    leave_behind(&cluster, &[2]);
    cluster.state().change_unheard(C1, 0, [7; 512]);
    rig.until("it was seen", |rig| rig.read(0, 512) == [7; 512]);
    let many: Vec<_> = (0..20).map(|_| rig.submit(Request::Read { offset: 0, len: 512 })).collect();
    for read in many {
        assert_eq!(rig.wait(read), Outcome::Data([Bytes::from_static(&[7; 512])].into_iter().collect()));
    }
    assert!(cluster.state().refused_behind > 0, "the other follower was not asked");
    assert!(!rig.outcomes.contains_key(&write));
    cluster.state().lead(C1, Some(SERVERS[1]));
    assert_eq!(rig.wait(write), Outcome::Done);
}

/// A leader went on applying while it read: a change may show that came after what it had applied at first.
#[test]
fn what_a_leader_may_have_shown_a_follower_must_have() {
    let cluster = Cluster::start(1);
    let mut rig = written(&cluster, patient(), 8);
    leave_behind(&cluster, &[1, 2]);
    cluster.state().fault(SERVERS[0]).shows_more = 1;
    assert_eq!(rig.read(0, 4096), pattern(0, 4096));
    let applied = cluster.state().groups[&C1].index;
    cluster.state().lead(C1, None);
    cluster.kill(SERVERS[0]);
    let write = rig.submit(Request::Write { offset: 0, data: Bytes::from(pattern(9, 4096)) });
    let read = rig.submit(Request::Read { offset: 0, len: 4096 });
    rig.until("all said that they are behind", |_| cluster.state().refused_behind >= 2);
    assert!(cluster.state().asked.iter().all(|asked| asked.index == applied + 1));
    assert!(!rig.outcomes.contains_key(&read));
    cluster.state().change_unheard(C1, 0, [7; 512]);
    cluster.state().lead(C1, Some(SERVERS[1]));
    assert_eq!(rig.wait(write), Outcome::Done);
    assert!(matches!(rig.wait(read), Outcome::Data(_)));
}

/// A write was given up after it was sent. It may be in the log, and may be applied by some and not yet by others.
#[test]
fn of_bytes_of_a_change_that_was_given_up_a_replica_must_have_all_that_was_shown() {
    let cluster = Cluster::start(1);
    let options = VolumeOptions { fail_after: Some(Duration::from_millis(500)), ..patient() };
    let mut rig = written(&cluster, options, 8);
    let acknowledged = cluster.state().groups[&C1].index;
    cluster.state().fault(SERVERS[0]).hung = true;
    assert!(matches!(rig.write(0, pattern(9, 4096)), Outcome::Failed(_)));
    rig.read(0, 4096);
    assert_eq!(cluster.state().asked.last().expect("just now").index, acknowledged);
    assert_eq!(rig.read(BLOCK, 4096), pattern(1, 4096));
    assert!(cluster.state().asked.last().expect("just now").index < acknowledged);
}

/// A follower has shown an entry that the leader of before does not know: it was deposed by then.
#[test]
fn what_a_follower_has_shown_a_leader_must_know() {
    let cluster = Cluster::start(1);
    let mut rig = written(&cluster, patient(), 8);
    {
        let mut state = cluster.state();
        let past = state.past(C1);
        state.fault(SERVERS[0]).deposed = Some(past);
        state.fault(SERVERS[0]).hung = true;
        // An entry of this volume that only the followers have applied.
        state.groups.get_mut(&C1).expect("there").index += 1;
    }
    assert_eq!(rig.read(0, 4096), pattern(0, 4096));
    assert!(followed(&cluster) > 0);
    cluster.state().fault(SERVERS[0]).hung = false;
    // If it was silent long enough to be mute it is not asked again before it is heard, or connected to anew.
    cluster.kill(SERVERS[0]);
    cluster.revive(SERVERS[0]);
    rig.until("heard of the deposed one", |rig| {
        let ticket = rig.submit(Request::Read { offset: BLOCK, len: 4096 });
        assert_eq!(rig.wait(ticket), data(1));
        rig.volume.counters().stale_reads > 0
    });
}

#[test]
fn a_follower_that_knows_of_our_end_ends_us() {
    let cluster = Cluster::start(1);
    let mut rig = written(&cluster, patient(), 1);
    cluster.state().groups.get_mut(&C1).expect("there").epoch = Epoch { attachment: 4, incarnation: 0 };
    cluster.state().fault(SERVERS[0]).hung = true;
    assert!(matches!(rig.perform(Request::Read { offset: 0, len: 512 }), Outcome::Failed(_)));
    assert!(rig.asked.iter().any(|ask| matches!(ask, Ask::FencedOut(_))));
}

#[test]
fn a_slow_leader_is_helped_out_but_its_followers_are_not_flooded() {
    let cluster = Cluster::start(1);
    let mut rig = written(&cluster, patient(), 8);
    cluster.state().fault(SERVERS[0]).slow = Duration::from_millis(35);
    let (total, mut sent, mut done, mut mute) = (1200u64, 0, 0, false);
    while done < total {
        while sent < total && sent - done < 64 {
            rig.submit(Request::Read { offset: sent % 8 * BLOCK, len: 4096 });
            sent += 1;
        }
        let from = Instant::now();
        rig.turn();
        // One that says nothing for 50 ms, for this machine stood still, is not slow but mute: then all may be asked elsewhere.
        mute |= from.elapsed() > Duration::from_millis(10)
            || rig.volume.peers.iter().any(|peer| peer.is_mute(Instant::now()));
        for (_, outcome) in rig.outcomes.drain() {
            assert!(matches!(outcome, Outcome::Data(_)));
            done += 1;
        }
    }
    let counters = rig.volume.counters();
    assert!(counters.second_questions >= 32, "{counters:?}");
    assert!(counters.second_questions <= 32 + total / 20, "{counters:?}");
    assert!(mute || counters.followers_asked < total / 5, "{counters:?}");
}
