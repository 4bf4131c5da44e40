//! What replicas of a copyset promise each other, asked of real chunkservers (threads of one process, with real
//! sockets, logs and stores): a replica is replaced under load, one that was moved away leaves nothing, damage is
//! repaired.

#[path = "../data_path/client.rs"]
#[allow(dead_code, reason = "each test program uses its own part of it")]
mod client;
mod cluster;
mod compare;
mod damage;
mod full;
mod impossible;
mod offline;
mod put_back;
mod transfer;

use client::{Client, block};
use cluster::{COPYSET, Cluster};
use evolute_chunkserver::shard::ToShard;
use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::{ReplicaId, VolumeId};

const VOLUME: VolumeId = VolumeId(5);
const FIRST: Epoch = Epoch { attachment: 1, incarnation: 0 };

/// What the first blocks of the chunk must hold, and the client's count of its changes.
struct Model {
    blocks: Vec<u8>,
    sequence: u64,
}

impl Model {
    fn new(blocks: usize) -> Self {
        Self { blocks: vec![0; blocks], sequence: 0 }
    }

    fn write(&mut self, client: &mut Client, at: usize) {
        self.sequence += 1;
        let byte = u8::try_from(1 + self.sequence % 250).expect("small");
        client.write(u32::try_from(at * 4096).expect("small"), block(byte), self.sequence);
        self.blocks[at] = byte;
    }

    fn check(&self, client: &mut Client) {
        for (at, byte) in self.blocks.iter().enumerate() {
            let found = client.read(u32::try_from(at * 4096).expect("small"), 4096);
            assert!(found == vec![*byte; 4096], "block {at} is {}, not {byte}", found[0]);
        }
    }
}

/// One of three is gone for good. Another takes its place while the guest writes on; it begins with what the log does
/// not have any more, and then holds everything. The one that was gone comes back and is told to leave: nothing of it
/// stays.
#[test]
fn a_replica_is_replaced_under_load_and_the_old_one_leaves_nothing() {
    let mut cluster = Cluster::start(4);
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    let mut model = Model::new(600);
    (0..600).for_each(|at| model.write(&mut client, at));
    client.discard(4096 * 100, 4096 * 50, 100_000);
    model.blocks[100..150].fill(0);
    cluster.until("the log's beginning is gone", || {
        cluster.replica(1).is_some_and(|r| r.status.purged.is_some_and(|at| at.index > 600))
    });
    cluster.stop(3);
    cluster.host(4, 14, true);
    cluster.until("the new one is hosted", || cluster.replica(4).is_some());
    let mut n = 0;
    cluster.until("the members are changed", || {
        // As the control plane does: again and again.
        cluster.change(1, (14, 4), 13);
        for _ in 0..20 {
            n += 1;
            model.write(&mut client, (n * 37) % 600);
        }
        cluster.voters(1) == Some(vec![11, 12, 14])
    });
    (0..50).for_each(|n| model.write(&mut client, n * 7));
    model.check(&mut client);
    cluster.lead(4, 14);
    let mut client = cluster.client(4);
    client.epoch = FIRST;
    model.check(&mut client);
    (0..50).for_each(|n| model.write(&mut client, n * 11));
    model.check(&mut client);
    // A late duplicate from before the new one was there.
    client.write(0, block(255), 1);
    model.check(&mut client);
    let used = 4096 * model.blocks.iter().filter(|byte| **byte > 0).count() as u64;
    cluster.until("what the volume uses is counted", || {
        let volumes = cluster.report(4).volumes;
        volumes.len() == 1 && volumes[0].used_bytes == used
    });
    assert_eq!(cluster.replica(4).expect("there").data_bytes, used);

    cluster.start_again(3);
    assert!(!cluster.files(3).is_empty());
    cluster.send(3, ToShard::Remove { copyset: COPYSET, replica: ReplicaId(99) });
    cluster.send(3, ToShard::Remove { copyset: COPYSET, replica: ReplicaId(13) });
    cluster.until("it is gone", || cluster.replica(3).is_none());
    cluster.until("and so are its data", || cluster.files(3).is_empty());
    cluster.stop(3);
    cluster.start_again(3);
    let report = cluster.report(3);
    assert!(report.replicas.is_empty() && report.failed.is_empty() && report.trouble.is_empty());
    // It may host another replica of the same copyset.
    cluster.host(3, 15, true);
    cluster.until("the members are changed again", || {
        cluster.change(4, (15, 3), 12);
        cluster.voters(4) == Some(vec![11, 14, 15])
    });
    cluster.lead(3, 15);
    let mut client = cluster.client(3);
    client.epoch = FIRST;
    model.check(&mut client);
}

/// A replica was hosted and not added yet, or was filled and not made a voter yet, when its process ended.
#[test]
fn a_joining_replica_survives_a_restart() {
    let mut cluster = Cluster::start(4);
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    let mut model = Model::new(64);
    (0..64).for_each(|at| model.write(&mut client, at));
    cluster.host(4, 14, true);
    cluster.until("it is hosted", || cluster.replica(4).is_some());
    cluster.stop(4);
    cluster.start_again(4);
    assert!(cluster.replica(4).is_some_and(|replica| replica.status.members.is_empty()));
    cluster.until("the members are changed", || {
        cluster.change(1, (14, 4), 12);
        cluster.voters(1) == Some(vec![11, 13, 14])
    });
    cluster.stop(4);
    model.write(&mut client, 5);
    cluster.start_again(4);
    cluster.lead(4, 14);
    let mut client = cluster.client(4);
    client.epoch = FIRST;
    model.check(&mut client);
}

/// The leader itself is to leave: it hands over first, and nothing is lost.
#[test]
fn a_leader_that_is_replaced_hands_over_first() {
    let cluster = Cluster::start(4);
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    let mut model = Model::new(64);
    (0..64).for_each(|at| model.write(&mut client, at));
    cluster.host(4, 14, true);
    cluster.until("the leader is another one", || {
        (1..=3).for_each(|n| cluster.change(n, (14, 4), 11));
        cluster.voters(2) == Some(vec![12, 13, 14])
    });
    cluster.send(1, ToShard::Remove { copyset: COPYSET, replica: ReplicaId(11) });
    cluster.until("it is gone", || cluster.replica(1).is_none() && cluster.files(1).is_empty());
    let leader = (2..=4).find(|n| cluster.leads(*n)).expect("somebody leads");
    let mut client = cluster.client(leader);
    client.epoch = FIRST;
    model.check(&mut client);
    model.write(&mut client, 9);
    model.check(&mut client);
}
