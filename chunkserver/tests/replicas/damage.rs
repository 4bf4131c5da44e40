//! Rot is found, put right from another replica, and never served.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use evolute_protocol::wire::reply::{Refusal, Reply};

use crate::client::Client;
use crate::cluster::Cluster;
use crate::{FIRST, Model, VOLUME};

pub const BLOCKS: usize = 64;
pub const DATA_AT: u64 = 64 << 10;

/// A written chunk, of which each of the first three servers has everything in its file, and nothing in memory any more:
/// while a checkpoint is under way, what its layer holds is read from there.
pub fn filled(cluster: &Cluster) -> (Client, Model) {
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    let mut model = Model::new(BLOCKS);
    (0..BLOCKS).for_each(|at| model.write(&mut client, at));
    let only_in_file = |n| is_in_file(cluster, n, &model) && cluster.report(n).usage.overlay_bytes == 0;
    cluster.until("it is in the files", || (1..=3).all(only_in_file));
    (client, model)
}

fn file(cluster: &Cluster, n: u32) -> Option<File> {
    let path = cluster.files(n).into_iter().next()?;
    OpenOptions::new().read(true).write(true).open(path).ok()
}

fn is_in_file(cluster: &Cluster, n: u32, model: &Model) -> bool {
    let Some(file) = file(cluster, n) else { return false };
    let mut found = vec![0; BLOCKS * 4096];
    let read = file.read_exact_at(&mut found, DATA_AT);
    read.is_ok() && found.chunks(4096).zip(&model.blocks).all(|(block, byte)| block == [*byte; 4096])
}

fn rot(cluster: &Cluster, n: u32, block: usize) {
    let file = file(cluster, n).expect("there is a file");
    file.write_all_at(&[0xee; 100], DATA_AT + block as u64 * 4096 + 700).expect("written");
}

fn counted(cluster: &Cluster, n: u32) -> (u64, u64) {
    let report = cluster.report(n);
    (report.bad_blocks_found, report.bad_blocks_repaired)
}

/// Blocks of the leader rot. The guest notices nothing; the file is as it should be afterwards.
#[test]
fn a_bad_block_is_served_from_another_replica_and_repaired() {
    let cluster = Cluster::start(3);
    let (mut client, mut model) = filled(&cluster);
    for block in [3, 17, 18, 19, 63] {
        rot(&cluster, 1, block);
    }
    // One of them is partly written before anybody has read it.
    client.write(18 * 4096 + 512, vec![model.blocks[18]; 512].into(), 900);
    model.check(&mut client);
    assert_eq!(counted(&cluster, 1), (5, 5));
    cluster.until("the file is repaired", || is_in_file(&cluster, 1, &model));
    model.write(&mut client, 17);
    model.check(&mut client);
    assert_eq!(counted(&cluster, 1), (5, 5));
}

/// The leader's whole file is gone, and of another one the header.
#[test]
fn a_missing_or_unreadable_file_is_repaired_block_by_block() {
    let mut cluster = Cluster::start(3);
    let (_, model) = filled(&cluster);
    for (damaged, n) in [(false, 1), (true, 2)] {
        cluster.stop(n);
        if damaged {
            file(&cluster, n).expect("there").write_all_at(&[0xee; 64], 0).expect("written");
        } else {
            std::fs::remove_file(&cluster.files(n)[0]).expect("removed");
        }
        cluster.start_again(n);
        cluster.lead(n, 10 + u64::from(n));
        let mut client = cluster.client(n);
        client.epoch = FIRST;
        model.check(&mut client);
        let (found, repaired) = counted(&cluster, n);
        assert!(found >= BLOCKS as u64 && found == repaired, "{found} found, {repaired} repaired");
        cluster.until("the file is there again", || is_in_file(&cluster, n, &model));
    }
}

/// All three have lost the same block: it is said so, by name, and nothing else suffers. A new write mends it.
#[test]
fn a_block_that_no_replica_has_is_named_and_never_made_up() {
    let cluster = Cluster::start(3);
    let (mut client, mut model) = filled(&cluster);
    (1..=3).for_each(|n| rot(&cluster, n, 5));
    match client.try_read(4 * 4096, 3 * 4096) {
        Reply::Refused(Refusal::Unreadable { block }) => assert_eq!(block.0, 5),
        other => panic!("served: {other:?}"),
    }
    let (found, repaired) = counted(&cluster, 1);
    assert_eq!((found, repaired), (1, 0));
    assert_eq!(client.read(4 * 4096, 4096)[..], [model.blocks[4]; 4096]);
    model.write(&mut client, 5);
    model.check(&mut client);
}

/// Nobody reads a follower. Its scrubber does.
#[test]
fn the_scrubber_finds_and_repairs_what_nobody_reads() {
    let mut cluster = Cluster::scrubbed(3, 0);
    let (mut client, model) = filled(&cluster);
    rot(&cluster, 2, 9);
    rot(&cluster, 1, 10);
    cluster.until("they are repaired", || is_in_file(&cluster, 2, &model) && is_in_file(&cluster, 1, &model));
    assert_eq!((counted(&cluster, 1), counted(&cluster, 2)), ((1, 1), (1, 1)));
    model.check(&mut client);
    // The first rounds may have found nothing there yet.
    let all = (BLOCKS * 4096) as u64;
    cluster.until("everything was read", || cluster.report(2).scrubbed_bytes >= all);
    cluster.until("a round is over", || cluster.report(2).last_full_scrub_unix_ms > 0);
    let report = cluster.report(2);
    // When everything had last been read survives a restart.
    cluster.stop(2);
    cluster.start_again(2);
    assert!(cluster.report(2).last_full_scrub_unix_ms >= report.last_full_scrub_unix_ms);
}
