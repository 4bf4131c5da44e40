//! Whatever waits has a clock: in each place in which a request may wait, what is due happens although nothing else does.
//!
//! The loop sleeps here as it does in a process: until an event, or until the time that it set itself.

use std::time::Duration;

use bytes::Bytes;
use evolute_protocol::geometry::{CHUNK_BYTES, GIB};
use evolute_protocol::id::CopysetId;
use evolute_protocol::wire::reply::Refusal;

use super::cluster::{Cluster, SERVERS};
use super::rig::{EPOCH, Rig, attachment, data};
use super::{C1, pattern, quick};
use crate::backing::{Backing, Failure, Outcome, Request, Ticket};
use crate::volume::VolumeOptions;
use crate::volume::control::{Ask, News};

/// Longer than any of what is looked for takes on a machine at rest.
const LIMIT: Duration = Duration::from_millis(400);

fn limited() -> VolumeOptions {
    VolumeOptions { fail_after: Some(LIMIT), ..quick() }
}

fn asks_for_a_map(rig: &mut Rig) -> bool {
    while let Ok(ask) = rig.control.asks.try_recv() {
        rig.asked.push(ask);
    }
    rig.asked.iter().any(|ask| matches!(ask, Ask::Map))
}

fn write_at(rig: &mut Rig, offset: u64) -> Ticket {
    rig.submit(Request::Write { offset, data: Bytes::from(pattern(1, 4096)) })
}

fn fails(rig: &mut Rig, ticket: Ticket) {
    rig.until_by_its_own_clock("failed", |rig| rig.outcomes.contains_key(&ticket));
    assert_eq!(rig.outcomes.remove(&ticket), Some(Outcome::Failed(Failure::Io)));
}

/// Attached, and then everybody is gone before anything is asked.
fn idle_and_alone(options: VolumeOptions) -> (Cluster, Rig) {
    let cluster = Cluster::start(3);
    let mut rig = Rig::attached(&cluster, options);
    rig.until("connected to all", |rig| rig.volume.peers.iter().all(|peer| peer.is_open()));
    SERVERS.iter().for_each(|server| cluster.kill(*server));
    rig.until("alone", |rig| rig.volume.peers.iter().all(|peer| !peer.is_open()));
    rig.turn_for(Duration::from_millis(300));
    (cluster, rig)
}

/// The host of each chunkserver came back with another address while the guest was idle. Nothing that it asks then can be
/// sent to anybody, so nothing that was sent is missed.
#[test]
fn an_idle_disk_finds_chunkservers_that_all_moved() {
    for kind in ["read", "write"] {
        let mut cluster = Cluster::start(3);
        let mut rig = Rig::attached(&cluster, quick());
        cluster.move_all();
        rig.until("alone", |rig| rig.volume.peers.iter().all(|peer| !peer.is_open()));
        rig.asked.clear();
        let ticket = match kind {
            "read" => rig.submit(Request::Read { offset: 0, len: 4096 }),
            _ => write_at(&mut rig, CHUNK_BYTES),
        };
        rig.until_by_its_own_clock("asked for a map", asks_for_a_map);
        rig.tell(News::Map(Box::new(cluster.map())));
        rig.until_by_its_own_clock("answered", |rig| rig.outcomes.contains_key(&ticket));
        match rig.outcomes.remove(&ticket).expect("there") {
            Outcome::Failed(failure) => panic!("a {kind} failed: {failure:?}"),
            Outcome::Done => {}
            read => assert_eq!(data(read), vec![0; 4096]),
        }
    }
}

#[test]
fn what_was_never_sent_fails_after_the_limit() {
    let (_cluster, mut rig) = idle_and_alone(limited());
    let read = rig.submit(Request::Read { offset: 0, len: 4096 });
    let write = write_at(&mut rig, CHUNK_BYTES);
    fails(&mut rig, read);
    fails(&mut rig, write);
}

#[test]
fn what_was_never_sent_is_told_to_be_held() {
    let (_cluster, mut rig) = idle_and_alone(quick());
    write_at(&mut rig, 0);
    rig.until_by_its_own_clock("held", |rig| {
        rig.volume.routing.iter().any(|route| route.held_since.is_some())
    });
}

/// "Waiting for a leader" was said of all of these.
#[test]
fn what_holds_io_is_said_of_each_chunkserver() {
    let why = |rig: &Rig| {
        let index = rig.volume.routing.indices().next().expect("a copyset");
        rig.volume.why_held(index)
    };
    let (_cluster, mut rig) = idle_and_alone(quick());
    write_at(&mut rig, 0);
    let said = why(&rig);
    assert!(said.contains("only 0 of its 3 chunkservers can be reached"), "{said}");
    assert!(said.contains(&format!("{} cannot be reached", SERVERS[2])), "{said}");

    for (refusal, words) in [
        (Refusal::NotLeader { leader: None }, "says that nobody leads"),
        (Refusal::Busy, "answers: busy"),
        (Refusal::NoSuchCopyset, "answers: no replica of that copyset"),
    ] {
        let cluster = Cluster::start(1);
        let mut rig = Rig::attached(&cluster, quick());
        cluster.kill(SERVERS[1]);
        for server in SERVERS {
            cluster.state().fault(server).refuse = Some(refusal);
        }
        let ticket = write_at(&mut rig, 0);
        let expected = format!("{} {words}", SERVERS[0]);
        rig.until_by_its_own_clock("said", |rig| {
            let said = why(rig);
            said.contains(&expected) && said.contains(&format!("{} cannot be reached", SERVERS[1]))
        });
        SERVERS.iter().for_each(|server| cluster.state().fault(*server).refuse = None);
        assert_eq!(rig.wait(ticket), Outcome::Done);
        let said = why(&rig);
        assert!(!said.contains(words), "it is over: {said}");
    }
}

#[test]
fn what_waits_for_a_segment_fails_after_the_limit_and_is_told_to_be_held_without_one() {
    let cluster = Cluster::start(3);
    let mut rig = Rig::attached(&cluster, limited());
    let write = write_at(&mut rig, 7 * GIB);
    fails(&mut rig, write);
    let mut rig = Rig::attached(&cluster, quick());
    write_at(&mut rig, 7 * GIB);
    rig.until_by_its_own_clock("held", |rig| rig.volume.segments_held_since.is_some());
}

#[test]
fn what_waits_to_be_attached_fails_after_the_limit_and_is_told_to_be_held_without_one() {
    let mut rig = Rig::new(limited());
    assert!(rig.volume.ready(), "what stays in the rings is not known to wait");
    let read = rig.submit(Request::Read { offset: 0, len: 4096 });
    fails(&mut rig, read);
    let mut rig = Rig::new(quick());
    rig.submit(Request::Read { offset: 0, len: 4096 });
    rig.until_by_its_own_clock("held", |rig| rig.volume.attaching_held);
}

/// Taken up from the state directory: the addresses in it are those of before, and the fences reach nobody.
#[test]
fn what_waits_for_a_fence_finds_chunkservers_that_all_moved() {
    let mut cluster = Cluster::start(3);
    let before = attachment(&cluster, EPOCH, true);
    cluster.move_all();
    let mut rig = Rig::new(quick());
    let write = write_at(&mut rig, 0);
    rig.tell(before);
    rig.until_by_its_own_clock("asked for a map", asks_for_a_map);
    rig.tell(News::Map(Box::new(cluster.map())));
    rig.until_by_its_own_clock("answered", |rig| rig.outcomes.contains_key(&write));
    assert_eq!(rig.outcomes.remove(&write), Some(Outcome::Done));
}

#[test]
fn what_waits_for_a_fence_fails_after_the_limit() {
    let cluster = Cluster::start(3);
    SERVERS.iter().for_each(|server| cluster.kill(*server));
    let mut rig = Rig::new(limited());
    rig.tell(attachment(&cluster, EPOCH, false));
    let write = write_at(&mut rig, 0);
    fails(&mut rig, write);
}

/// The first of the same bytes is out and not answered; the others are not even admitted.
#[test]
fn what_waits_behind_others_of_the_same_bytes_fails_after_the_limit() {
    let cluster = Cluster::start(3);
    let mut rig = Rig::attached(&cluster, limited());
    cluster.state().lead(C1, None);
    let tickets: Vec<_> = (0..3).map(|_| write_at(&mut rig, 0)).collect();
    for ticket in tickets {
        fails(&mut rig, ticket);
    }
}

#[test]
fn what_waits_for_room_fails_after_the_limit() {
    let cluster = Cluster::start(3);
    let options = VolumeOptions { operations_max: 2, bytes_max: 8192, ..limited() };
    let mut rig = Rig::attached(&cluster, options);
    SERVERS.iter().for_each(|server| cluster.state().fault(*server).hung = true);
    let tickets: Vec<_> = (0..6).map(|n| write_at(&mut rig, n * CHUNK_BYTES)).collect();
    for ticket in tickets {
        fails(&mut rig, ticket);
    }
}

/// A discard of many pieces: those that are not made yet wait for those that are out.
#[test]
fn a_long_request_fails_after_the_limit_as_a_whole() {
    let cluster = Cluster::start(3);
    let mut rig = Rig::attached(&cluster, limited());
    (1..=3).for_each(|copyset| cluster.state().lead(CopysetId(copyset), None));
    let discard = rig.submit(Request::Discard { offset: 0, len: GIB });
    fails(&mut rig, discard);
}

/// A copyset that asks for patience again and again, and one that must be fenced again first.
#[test]
fn what_waits_for_patience_or_a_new_fence_fails_after_the_limit() {
    for refusal in [Refusal::Busy, Refusal::NotFenced, Refusal::NoSuchCopyset] {
        let cluster = Cluster::start(1);
        let mut rig = Rig::attached(&cluster, limited());
        SERVERS.iter().for_each(|server| cluster.state().fault(*server).refuse = Some(refusal));
        let write = write_at(&mut rig, 0);
        fails(&mut rig, write);
    }
}

/// Nothing waits: the loop sleeps until somebody wakes it.
#[test]
fn a_disk_at_rest_has_no_clock() {
    let cluster = Cluster::start(3);
    let mut rig = Rig::attached(&cluster, quick());
    assert_eq!(rig.write(0, pattern(1, 4096)), Outcome::Done);
    rig.until_by_its_own_clock("at rest", |rig| rig.volume.deadline().is_none());
}
