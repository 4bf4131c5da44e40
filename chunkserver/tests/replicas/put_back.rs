//! Directories that an operator put back to an older copy, or whose log somebody deleted: they have forgotten what they
//! voted for and acknowledged, so they never vote, and nothing that was acknowledged is lost or shown as it was before.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use evolute_chunkserver::shard::Judgement;
use evolute_protocol::wire::reply::Reply;
use evolute_raft::Role;

use crate::client::{Client, block};
use crate::cluster::{COPYSET, Cluster};
use crate::{FIRST, Model, VOLUME};

/// Several times what an election takes.
const LONG_ENOUGH: Duration = Duration::from_secs(4);

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").args(["-a", "--sparse=always"]).arg(from.join(".")).arg(to).status();
    assert!(copied.expect("cp runs").success());
}

fn put_back(old: &Path, dir: &Path) {
    for entry in std::fs::read_dir(dir).expect("listed") {
        let path = entry.expect("listed").path();
        let removed =
            if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.expect("removed");
    }
    copy(old, dir);
}

/// Chunkserver 1 has the directory that it had before the last writes, which it and 2 acknowledged while 3 was away; 1
/// and 3 run, 2 does not. The model holds all that was acknowledged.
fn one_that_was_put_back() -> (Cluster, Model) {
    let mut cluster = Cluster::start(3);
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    let mut model = Model::new(20);
    (0..20).for_each(|at| model.write(&mut client, at));
    cluster.stop(1);
    let old = tempfile::tempdir().expect("temp dir");
    copy(cluster.dir(1), old.path());
    cluster.start_again(1);
    cluster.lead(1, 11);
    cluster.stop(3);
    let mut client = writer(&cluster, 1);
    (0..20).for_each(|at| model.write(&mut client, at));
    cluster.stop(2);
    cluster.stop(1);
    put_back(old.path(), cluster.dir(1));
    cluster.start_again(3);
    cluster.start_unjudged(1, "after the copy");
    (cluster, model)
}

/// Of the one who leads, as who fenced the volume.
fn writer(cluster: &Cluster, n: u32) -> Client {
    let mut client = cluster.client(n);
    client.fence(VOLUME, FIRST);
    client
}

fn nobody_leads(cluster: &Cluster) {
    let until = Instant::now() + LONG_ENOUGH;
    while Instant::now() < until {
        for n in [1, 3] {
            let leads = cluster.replica(n).is_some_and(|replica| replica.status.role == Role::Leader);
            assert!(!leads, "chunkserver {n} leads, and lacks what was acknowledged");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_replica_that_was_put_back_never_votes_and_nothing_acknowledged_is_lost() {
    let (mut cluster, model) = one_that_was_put_back();
    nobody_leads(&cluster);
    cluster.judge(1, Judgement::PutBack);
    assert!(cluster.report(1).failed[&COPYSET].put_back, "it is told");
    nobody_leads(&cluster);
    // It remembers that, also when the next start is confirmed.
    cluster.stop(1);
    cluster.start_unjudged(1, "another start");
    cluster.judge(1, Judgement::Newest);
    assert!(cluster.report(1).failed[&COPYSET].put_back);
    nobody_leads(&cluster);
    cluster.start_again(2);
    cluster.until("2 leads, which has everything", || cluster.leads(2));
    model.check(&mut writer(&cluster, 2));
}

#[test]
fn what_an_operator_accepts_counts_as_it_is() {
    let (cluster, model) = one_that_was_put_back();
    cluster.judge(1, Judgement::PutBack);
    cluster.judge(1, Judgement::Accepted);
    cluster.judge(1, Judgement::Newest);
    assert!(cluster.report(1).failed.values().all(|failed| !failed.put_back));
    cluster.until("one of the two leads", || cluster.leads(1) || cluster.leads(3));
    let leader = if cluster.leads(1) { 1 } else { 3 };
    let found = writer(&cluster, leader).read(0, 4096);
    assert_ne!(
        found[0], model.blocks[0],
        "what was written after the copy is lost, as the operator was told"
    );
    assert_eq!(found, vec![1 + 1; 4096], "and what was there before is there");
}

/// Nobody but its directory knows of this start. If what it acknowledged counted, and the directory were put back to before
/// the start, nothing would show that it lacks that.
#[test]
fn what_it_stores_counts_for_nothing_before_its_start_is_known() {
    let mut cluster = Cluster::start(3);
    cluster.client(1).fence(VOLUME, FIRST);
    cluster.lead(2, 12);
    let mut client = writer(&cluster, 2);
    cluster.stop(1);
    cluster.start_unjudged(1, "while no control plane is there");
    cluster.stop(3);
    let before = cluster.replica(2).and_then(|replica| replica.status.committed).expect("2 leads");
    client.send_all(&[client.write_of(0, block(7), 1)]);
    let until = Instant::now() + LONG_ENOUGH;
    while Instant::now() < until {
        let committed = cluster.replica(2).and_then(|replica| replica.status.committed);
        assert_eq!(committed, Some(before), "2 alone is no majority");
        std::thread::sleep(Duration::from_millis(50));
    }
    cluster.judge(1, Judgement::Newest);
    assert!(matches!(client.take(), Reply::Done(_)));
    assert_eq!(client.read(0, 4096), vec![7; 4096]);
}

/// Before the first checkpoint the votes, and all that was written, are in the log alone.
#[test]
fn a_replica_whose_log_was_deleted_is_lost_and_not_new() {
    let mut cluster = Cluster::without_checkpoints(3);
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    let mut model = Model::new(5);
    (0..5).for_each(|at| model.write(&mut client, at));
    cluster.lead(2, 12);
    cluster.stop(1);
    let log = cluster.dir(1).join("log");
    for entry in std::fs::read_dir(&log).expect("listed") {
        let path = entry.expect("listed").path();
        assert!(
            path.extension().is_none_or(|extension| extension != "log"),
            "a name that people delete: {path:?}"
        );
        std::fs::remove_file(path).expect("deleted");
    }
    cluster.start_again(1);
    let failed = cluster.report(1).failed;
    assert!(failed.get(&COPYSET).is_some_and(|failed| failed.why.contains("log is gone")), "{failed:?}");
    assert!(cluster.replica(1).is_none(), "it does not run");
    model.check(&mut writer(&cluster, 2));
}
