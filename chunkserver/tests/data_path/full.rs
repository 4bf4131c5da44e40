//! Disks without room: three shards of one copyset in this process, told of each other's disks as the control plane
//! would.

use std::time::{Duration, Instant};

use evolute_chunkserver::chunk_store::StoreOptions;
use evolute_chunkserver::others::{Told, Trouble};
use evolute_chunkserver::shard::ToShard;
use evolute_protocol::geometry::GIB;
use evolute_protocol::wire::reply::{Refusal, Reply};

use super::client::block;
use super::followers::{Three, id};
use super::{FIRST, VOLUME};

/// A disk that keeps back more than it has has no room for anything new.
fn full(is: bool) -> StoreOptions {
    StoreOptions { reserve_bytes: is.then_some((1 << 20) * GIB), ..StoreOptions::default() }
}

fn tell(three: &Three, full: &[usize]) {
    let trouble = |n: usize| (id(n), Trouble { full: full.contains(&n), slow: false });
    let disks: std::collections::BTreeMap<_, _> = (0..3).map(trouble).collect();
    for running in three.running.iter().flatten() {
        running.handle.send(ToShard::Hear(Told { disks: disks.clone(), usual_write: None }));
    }
}

/// Asks whoever leads, as a backend does, until it is done; who did it.
fn write(three: &Three) -> usize {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < deadline, "waited for a minute");
        let (leader, mut client) = three.leader();
        let fenced = client.try_fence(VOLUME, FIRST);
        client.epoch = FIRST;
        if !matches!(fenced, Reply::Done(_)) {
            continue;
        }
        match client.try_write(0, block(1), 1) {
            Reply::Done(_) => return leader,
            Reply::Refused(Refusal::Busy | Refusal::NotLeader { .. }) => {}
            other => panic!("chunkserver {leader} says {other:?}"),
        }
    }
}

/// An outage of one replica is a pause, and so is its disk being full: whoever leads first, a write is done by one that
/// has room.
#[test]
fn what_one_disk_has_room_for_is_done_there_and_never_refused() {
    // The first one leads first. In the second round nobody knows who else is full: it is found out.
    for (with_room, told) in [(vec![1, 2], vec![0]), (vec![2], vec![]), (vec![2], vec![0, 1])] {
        let three = Three::start_on(|n| full(!with_room.contains(&n)));
        tell(&three, &told);
        let done_by = write(&three);
        assert!(with_room.contains(&done_by), "{done_by} of {with_room:?}");
        three.end();
    }
}

/// Full is not unreachable: nobody waits for what cannot come.
#[test]
fn where_nobody_has_room_the_answer_comes_at_once() {
    let three = Three::start_on(|_| full(true));
    tell(&three, &[0, 1, 2]);
    let (_, mut leader) = three.leader();
    leader.fence(VOLUME, FIRST);
    for _ in 0..10 {
        assert_eq!(leader.try_write(0, block(1), 1), Reply::Refused(Refusal::NoSpace));
    }
    // What needs no room is done.
    leader.discard(0, 4096, 2);
    three.end();
}
