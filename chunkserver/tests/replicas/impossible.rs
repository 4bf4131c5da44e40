//! What forged frames have left on the disks of a cluster that knew no bounds: seen, said, and put right by a command.

use std::path::Path;
use std::process::{Command, Output};

use bytes::Bytes;
use evolute_chunkserver::chunk_store::{ChunkStore, Identity, StoreOptions};
use evolute_chunkserver::copyset::state::restore;
use evolute_chunkserver::data_dir::DataDir;
use evolute_chunkserver::impossible::repair;
use evolute_chunkserver::inspect::inspect;
use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::ChunkserverId;
use evolute_protocol::wire::reply::{Refusal, Reply};
use evolute_raft::{
    GroupId, ImpossibleVote, LogOptions, LogOwner, ProcessId, ReplicaId, lower_votes, spawn_thread,
};

use crate::client::block;
use crate::cluster::{CLUSTER, COPYSET, Cluster};
use crate::{FIRST, VOLUME};

const SECOND: Epoch = Epoch { attachment: 2, incarnation: 0 };

/// The command, as an operator types it.
fn run(task: &str, dir: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_evolute-chunkserver"));
    command.args([task, "--data-dir"]).arg(dir).args(more).output().expect("it runs")
}

fn says(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].concat().iter().map(|byte| char::from(*byte)).collect()
}

/// The replica of chunkserver `n` has voted in the last term there is.
fn poison_vote(cluster: &Cluster, n: u32) {
    let owner = LogOwner { cluster: CLUSTER.0, process: ProcessId(u64::from(n)) };
    let options = LogOptions { file_bytes: 8 << 20, ..LogOptions::new(owner) };
    let replica = ReplicaId(10 + u64::from(n));
    let group = GroupId(u64::from(COPYSET.0));
    let vote = ImpossibleVote { group, replica, term: 0, lowered: Some(u64::MAX) };
    let dir = cluster.dir(n).join("log");
    let voting =
        spawn_thread(
            "vote",
            move || async move { lower_votes(&dir, options, &[vote]).await.expect("written") },
        );
    voting.expect("a thread").join().expect("no panic");
}

/// Chunkserver `n` has applied a fence that only a deletion may set.
fn poison_fence(cluster: &Cluster, n: u32) {
    let data_dir = DataDir::look(cluster.dir(n)).expect("stopped");
    let identity =
        Identity { cluster: CLUSTER, chunkserver: ChunkserverId(n), token: Bytes::from_static(b"token") };
    let (store, opened) =
        ChunkStore::open(&data_dir.store(), StoreOptions::default(), &identity).expect("a store");
    let (mut state, created) = restore(&opened.copysets[0]).expect("a replica");
    state.writers_mut(VOLUME).fence(Epoch::DELETED);
    store.put_copyset(state.record(COPYSET, &created)).expect("written");
}

#[test]
fn a_copyset_that_voted_in_the_last_term_is_repaired_by_the_command() {
    let mut cluster = Cluster::start(3);
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    client.write(0, block(1), 1);
    (1..=3).rev().for_each(|n| cluster.stop(n));
    for n in 1..=3 {
        let looked = run("repair", cluster.dir(n), &[]);
        assert!(looked.status.success() && says(&looked).contains("nothing to repair"), "{looked:?}");
        poison_vote(&cluster, n);
        let looked = run("inspect", cluster.dir(n), &[]);
        assert_eq!(looked.status.code(), Some(3), "{looked:?}");
        let said = says(&looked);
        assert!(said.contains(&format!("replica-{}", 10 + n)) && said.contains("repair"), "{said}");
    }
    // The others of its copysets are served: it starts, and says which is not.
    (1..=3).for_each(|n| cluster.start_again(n));
    for n in 1..=3 {
        let report = cluster.report(n);
        assert!(
            report.replicas.is_empty() && report.trouble.contains("evolute-chunkserver repair"),
            "{}",
            report.trouble
        );
        cluster.stop(n);
    }
    for n in 1..=3 {
        let looked = run("repair", cluster.dir(n), &["--json"]);
        assert_eq!(looked.status.code(), Some(3), "{looked:?}");
        assert_eq!(run("inspect", cluster.dir(n), &[]).status.code(), Some(3), "only looked at");
        let repaired = run("repair", cluster.dir(n), &["--yes"]);
        assert!(repaired.status.success() && says(&repaired).contains("lowered to"), "{repaired:?}");
        assert!(run("inspect", cluster.dir(n), &[]).status.success());
    }
    (1..=3).for_each(|n| cluster.start_again(n));
    cluster.lead(2, 12);
    let mut client = cluster.client(2);
    client.fence(VOLUME, SECOND);
    assert_eq!(client.read(0, 4096), block(1));
    client.write(4096, block(2), 1);
}

/// Every replica agrees that the volume is deleted, which it is not. The leader takes it back for all of them.
#[test]
fn a_volume_that_a_forged_fence_ended_is_repaired_by_the_command() {
    let mut cluster = Cluster::start(3);
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    client.write(0, block(1), 1);
    client.until(|client| client.in_files() > 0);
    cluster.until("every replica has a checkpoint of it", || {
        let done = |n| cluster.replica(n).and_then(|it| Some((it.status.checkpointed?, it.status.applied?)));
        (1..=3).all(|n| done(n).is_some_and(|(checkpointed, applied)| checkpointed == applied))
    });
    (1..=3).rev().for_each(|n| cluster.stop(n));
    for n in 1..=3 {
        poison_fence(&cluster, n);
        let looked = run("inspect", cluster.dir(n), &[]);
        assert_eq!(looked.status.code(), Some(3), "{looked:?}");
        assert!(says(&looked).contains("IMPOSSIBLE FENCE: volume 5"), "{looked:?}");
    }
    (1..=3).for_each(|n| cluster.start_again(n));
    cluster.lead(1, 11);
    let deleted = Reply::Refused(Refusal::Fenced { current: Epoch::DELETED });
    assert_eq!(cluster.client(1).try_fence(VOLUME, SECOND), deleted);
    (1..=3).rev().for_each(|n| cluster.stop(n));
    for n in 1..=3 {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let looked =
            runtime.block_on(async { repair(cluster.dir(n), 0, &[VOLUME.0], false) }).expect("looked at");
        assert_eq!((looked.fences.len(), looked.fences[0].volume), (1, VOLUME.0));
        assert!(!looked.is_done());
        assert!(run("repair", cluster.dir(n), &["--unfence", "5", "--yes"]).status.success());
    }
    (1..=3).for_each(|n| cluster.start_again(n));
    cluster.lead(3, 13);
    let mut client = cluster.client(3);
    client.until(|client| client.try_fence(VOLUME, SECOND) != deleted);
    client.fence(VOLUME, SECOND);
    assert_eq!(client.read(0, 4096), block(1));
    client.write(4096, block(2), 1);
    let unfenced = |n| !cluster.dir(n).join("unfence.json").exists();
    cluster.until("it is done for good", || (1..=3).all(unfenced));
    (1..=3).rev().for_each(|n| cluster.stop(n));
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    for n in 1..=3 {
        assert!(runtime.block_on(inspect(cluster.dir(n), None)).expect("stopped").is_sound());
    }
}

/// The fence is one that a writer could have, and none has: the operator names the volume.
#[test]
fn a_possible_fence_that_nobody_came_with_is_taken_back_by_name() {
    let mut cluster = Cluster::start(3);
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    client.write(0, block(1), 1);
    client.fence(VOLUME, Epoch { attachment: 1 << 20, incarnation: 0 });
    (1..=3).rev().for_each(|n| cluster.stop(n));
    for n in 1..=3 {
        let looked = run("repair", cluster.dir(n), &[]);
        assert!(looked.status.success(), "it may be anybody's: {looked:?}");
        assert!(run("repair", cluster.dir(n), &["--unfence", "5", "--yes"]).status.success());
    }
    (1..=3).for_each(|n| cluster.start_again(n));
    cluster.lead(2, 12);
    let mut client = cluster.client(2);
    client.until(|client| matches!(client.try_fence(VOLUME, SECOND), Reply::Done(_)));
    client.fence(VOLUME, SECOND);
    assert_eq!(client.read(0, 4096), block(1));
    client.write(4096, block(2), 1);
}

/// A volume that was deleted stays so, whatever is run; one that was not and has nothing here is named by hand.
#[test]
fn a_deleted_volume_is_no_forgery() {
    let mut cluster = Cluster::start(3);
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    client.write(0, block(1), 1);
    cluster.send(1, evolute_chunkserver::shard::ToShard::DropVolume { copyset: COPYSET, volume: VOLUME });
    let deleted = Reply::Refused(Refusal::Fenced { current: Epoch::DELETED });
    client.until(|client| client.try_read(0, 512) == deleted);
    (1..=3).rev().for_each(|n| cluster.stop(n));
    for n in 1..=3 {
        assert!(run("inspect", cluster.dir(n), &[]).status.success(), "{n}");
    }
    let looked = run("repair", cluster.dir(1), &[]);
    assert!(looked.status.success() && says(&looked).contains("nothing to repair"), "{looked:?}");
    assert_eq!(run("repair", cluster.dir(1), &["--unfence", "5"]).status.code(), Some(3));
}
