//! One disk of three is full for long: the two others go on, it takes only what it has memory and log for, and has everything
//! once there is space.

use bytes::Bytes;
use evolute_chunkserver::chunk_store::StoreOptions;
use evolute_protocol::geometry::MIB;

use crate::client::{Client, block};
use crate::cluster::{Cluster, roomy};
use crate::{FIRST, VOLUME};

const OVERLAY: u64 = 8 * MIB;
/// The overlay, 16 MiB more, and what may be on its way.
const OVERLAY_BOUND: u64 = OVERLAY + 16 * MIB + 4 * MIB;
/// Files of 8 MiB: what fills the overlay, what came before it was full, spare ones.
const LOG_FILES_BOUND: usize = 8;
/// A whole chunk, so often: 144 MiB.
const ROUNDS: u8 = 9;
const PIECES: u32 = 16;
const PIECE: u32 = 1 << 20;

/// A chunk does not fit on chunkserver 3, of which nothing is reserved; the others have all they want.
fn disk(n: u32) -> StoreOptions {
    match n {
        3 => StoreOptions {
            overlay_bytes_max: OVERLAY,
            capacity_bytes: Some(12 * MIB),
            reserve_bytes: Some(0),
            ..roomy(n)
        },
        _ => roomy(n),
    }
}

fn piece(round: u8, at: u32) -> Bytes {
    let number = round * u8::try_from(PIECES).expect("small") + u8::try_from(at).expect("small");
    block(number).repeat(PIECE as usize / 4096).into()
}

fn write_round(client: &mut Client, round: u8) {
    for at in 0..PIECES {
        client.write(at * PIECE, piece(round, at), u64::from(round) * u64::from(PIECES) + u64::from(at) + 1);
    }
}

#[test]
fn a_full_follower_takes_what_it_has_room_for_and_catches_up_when_there_is_more() {
    let mut cluster = Cluster::on_disks(3, disk);
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    let mut most = 0;
    for round in 0..ROUNDS {
        if round == ROUNDS / 2 {
            // Whoever leads, and whichever of the two has its vote.
            cluster.lead(2, 12);
            client = cluster.client(2);
            client.epoch = FIRST;
        }
        write_round(&mut client, round);
        most = most.max(cluster.report(3).usage.overlay_bytes);
        assert!(most <= OVERLAY_BOUND, "{most} bytes are in memory after round {round}");
        let files = cluster.log_files(3);
        assert!(files <= LOG_FILES_BOUND, "{files} log files after round {round}");
    }
    let report = cluster.report(3);
    assert!(report.trouble.contains("nothing more is taken from leaders"), "{}", report.trouble);
    let written = cluster.replica(2).and_then(|replica| replica.status.applied).expect("much").index;
    let status = cluster.replica(3).expect("there").status;
    assert!(status.applied.is_some_and(|at| at.index + 50 < written), "{status:?} has nearly everything");
    assert_eq!(status.leader.map(|it| it.replica.0), Some(12), "it knows who leads");
    // The two that go on may hand over as before.
    cluster.lead(1, 11);

    // Its process ends as it is, and finds a larger disk.
    cluster.stop(3);
    cluster.disk = roomy;
    cluster.start_again(3);
    cluster.until("everything is in the files of all three", || {
        let there = |n| cluster.replica(n).and_then(|replica| replica.status.checkpointed);
        (1..=3).all(|n| there(n).is_some_and(|at| at.index >= written))
    });
    // A machine that is busy with this may find its disk slow for a while.
    let trouble = cluster.report(3).trouble;
    let left = trouble.split("; ").filter(|what| !what.starts_with("the disk is slow: "));
    assert_eq!(left.collect::<String>(), "", "all is well again");
    for n in 1..=3 {
        cluster.lead(n, 10 + u64::from(n));
        let mut client = cluster.client(n);
        client.epoch = FIRST;
        for at in 0..PIECES {
            assert!(client.read(at * PIECE, PIECE) == piece(ROUNDS - 1, at), "piece {at} on chunkserver {n}");
        }
    }
    let data = |n| {
        let file = cluster.files(n).pop().expect("a chunk file");
        std::fs::read(file).expect("read").split_off(64 << 10)
    };
    assert!(data(1) == data(2) && data(2) == data(3), "the files hold the same");
}
