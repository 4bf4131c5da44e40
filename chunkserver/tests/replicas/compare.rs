//! Replicas are compared: what no checksum can see is found and put right, and nothing else is touched.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use evolute_chunkserver::shard::ShardReport;
use evolute_protocol::checksum::crc32c;
use evolute_protocol::epoch::Epoch;
use evolute_protocol::wire::reply::{Freshness, Refusal, Reply};
use evolute_protocol::wire::request::{AskDigests, ChunkRange, Doubt, Read, ReadAtLeast, Request};

use crate::client::{Client, block};
use crate::cluster::Cluster;
use crate::{FIRST, Model, VOLUME};

/// Four checksum sectors' worth.
const BLOCKS: usize = 256;
const PER_SECTOR: usize = 64;
const DATA_AT: usize = 64 << 10;
const SECTORS_AT: usize = 4 << 10;

fn begun(cluster: &Cluster) -> (Client, Model) {
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    (client, Model::new(BLOCKS))
}

/// Writes everything anew, and waits until no replica needs its log for it any more.
fn write_all(cluster: &Cluster, client: &mut Client, model: &mut Model) {
    (0..BLOCKS).for_each(|at| model.write(client, at));
    let written = cluster.replica(1).and_then(|replica| replica.status.applied).expect("much").index;
    cluster.until("all of it is checkpointed", || {
        let checkpointed = |n| cluster.replica(n).and_then(|replica| replica.status.checkpointed);
        (1..=3).all(|n| checkpointed(n).is_some_and(|at| at.index >= written))
    });
    cluster.until("it is in the files", || (1..=3).all(|n| holds(cluster, n, model)));
}

fn file(cluster: &Cluster, n: u32) -> File {
    let files = cluster.files(n);
    OpenOptions::new().read(true).write(true).open(&files[0]).expect("a chunk file")
}

fn holds(cluster: &Cluster, n: u32, model: &Model) -> bool {
    if cluster.files(n).is_empty() {
        return false;
    }
    let mut found = vec![0; BLOCKS * 4096];
    let read = file(cluster, n).read_exact_at(&mut found, DATA_AT as u64);
    read.is_ok() && found.chunks(4096).zip(&model.blocks).all(|(block, byte)| block == [*byte; 4096])
}

fn copy(cluster: &Cluster, n: u32) -> Vec<u8> {
    std::fs::read(&cluster.files(n)[0]).expect("a chunk file")
}

/// Takes everything in the blocks of one checksum sector back to what it was, its checksums too.
fn take_back(file: &File, old: &[u8], sector: usize) {
    let at = SECTORS_AT + sector * 512;
    file.write_all_at(&old[at..at + 512], at as u64).expect("written");
    let at = DATA_AT + sector * PER_SECTOR * 4096;
    file.write_all_at(&old[at..at + PER_SECTOR * 4096], at as u64).expect("written");
}

/// Reads everything through each replica in turn.
fn check_all(cluster: &Cluster, model: &Model) {
    for n in 1..=3 {
        cluster.lead(n, 10 + u64::from(n));
        let mut client = cluster.client(n);
        client.epoch = FIRST;
        model.check(&mut client);
    }
}

/// Found bad, repaired; of these, by comparison alone; undecided.
fn counted(report: &ShardReport) -> (u64, u64, u64, u64) {
    let bad = (report.bad_blocks_found, report.bad_blocks_repaired);
    (bad.0, bad.1, report.blocks_differing, report.blocks_undecided)
}

/// Its only chunk file becomes what it was.
fn put_back(cluster: &mut Cluster, n: u32, file: Vec<u8>) {
    cluster.stop(n);
    std::fs::write(&cluster.files(n)[0], file).expect("put back");
    cluster.start_again(n);
}

/// A chunk file of one replica is put back from an old copy, whole, with all its checksums: nothing in it is damaged,
/// and all of it is old. The others know.
#[test]
fn a_file_put_back_from_an_old_copy_is_found_and_repaired() {
    let mut cluster = Cluster::scrubbed(3, 0);
    let (mut client, mut model) = begun(&cluster);
    write_all(&cluster, &mut client, &mut model);
    let old = copy(&cluster, 2);
    write_all(&cluster, &mut client, &mut model);
    put_back(&mut cluster, 2, old);
    cluster.until("the file is as it should be", || holds(&cluster, 2, &model));
    let all = BLOCKS as u64;
    // Who did not answer once is undecided until the next round; all other counters only grow.
    cluster.until("it is counted there and nowhere else", || {
        counted(&cluster.report(2)) == (all, all, all, 0)
            && [1, 3].iter().all(|n| counted(&cluster.report(*n)) == (0, 0, 0, 0))
    });
    check_all(&cluster, &model);
}

/// What the guest wrote is missing on one replica, where nothing was ever written as far as it can tell; then the other
/// way round: it still has what was discarded.
#[test]
fn what_one_replica_has_lost_is_brought_back_and_what_it_kept_is_discarded() {
    let mut cluster = Cluster::scrubbed(3, 0);
    let (mut client, mut model) = begun(&cluster);
    write_all(&cluster, &mut client, &mut model);
    thin_out(&cluster, &mut client, &mut model);
    let thin = copy(&cluster, 2);
    write_all(&cluster, &mut client, &mut model);
    let full = copy(&cluster, 2);
    put_back(&mut cluster, 2, thin);
    cluster.until("everything is there", || holds(&cluster, 2, &model));
    let all = BLOCKS as u64;
    cluster.until("it is counted", || counted(&cluster.report(2)) == (all, all, all, 0));
    let mut client = client_of_leader(&cluster);
    thin_out(&cluster, &mut client, &mut model);
    put_back(&mut cluster, 2, full);
    let gone = (BLOCKS - BLOCKS / PER_SECTOR) as u64;
    cluster.until("it is discarded", || counted(&cluster.report(2)) == (gone, gone, gone, 0));
    check_all(&cluster, &model);
}

/// Discards all but the first block of each checksum sector, which so stays a valid one.
fn thin_out(cluster: &Cluster, client: &mut Client, model: &mut Model) {
    for sector in 0..BLOCKS / PER_SECTOR {
        let first = sector * PER_SECTOR + 1;
        model.sequence += 1;
        client.discard(at_byte(first), at_byte(PER_SECTOR - 1), model.sequence);
        model.blocks[first..first + PER_SECTOR - 1].fill(0);
    }
    let left = (BLOCKS / PER_SECTOR * 4096) as u64;
    cluster.until("it is freed", || {
        (1..=3).all(|n| cluster.replica(n).is_some_and(|replica| replica.data_bytes == left))
    });
}

/// Checksums are read once and remembered. What becomes of them on the disk meanwhile is found all the same.
#[test]
fn rot_of_what_is_remembered_in_memory_is_found() {
    let cluster = Cluster::scrubbed(3, 0);
    let (mut client, mut model) = begun(&cluster);
    write_all(&cluster, &mut client, &mut model);
    model.check(&mut client);
    let file = file(&cluster, 1);
    file.write_all_at(&[0xee; 8], (SECTORS_AT + 2 * 512 + 40) as u64).expect("written");
    let all = PER_SECTOR as u64;
    cluster.until("it is found and repaired", || counted(&cluster.report(1)) == (all, all, 0, 0));
    check_all(&cluster, &model);
}

fn client_of_leader(cluster: &Cluster) -> Client {
    cluster.lead(1, 11);
    let mut client = cluster.client(1);
    client.epoch = FIRST;
    client
}

/// Three replicas, three stories: nobody is believed, nothing is changed, and it is said by name until it is written anew.
#[test]
fn without_a_majority_nothing_is_changed_and_it_is_said_so() {
    let mut cluster = Cluster::scrubbed(3, 0);
    let (mut client, mut model) = begun(&cluster);
    let mut old = Vec::new();
    for n in [2, 3] {
        write_all(&cluster, &mut client, &mut model);
        old.push((n, copy(&cluster, n)));
    }
    write_all(&cluster, &mut client, &mut model);
    for (n, _) in &old {
        cluster.stop(*n);
    }
    for (n, old) in &old {
        take_back(&file(&cluster, *n), old, 3);
    }
    for (n, _) in &old {
        cluster.start_again(*n);
    }
    let names = ["copyset-3", "chunkserver-1", "chunkserver-2", "chunkserver-3", "block-192"];
    cluster.until("everybody says so, and all are named", || {
        let trouble = cluster.report(1).trouble;
        (1..=3).all(|n| counted(&cluster.report(n)) == (0, 0, 0, PER_SECTOR as u64))
            && names.iter().all(|name| trouble.contains(name))
    });
    for (n, old) in &old {
        let at = DATA_AT + 200 * 4096;
        assert!(copy(&cluster, *n)[at..at + 4096] == old[at..at + 4096], "chunkserver {n} was changed");
    }
    let mut client = client_of_leader(&cluster);
    (0..BLOCKS).for_each(|at| model.write(&mut client, at));
    cluster.until("nothing is left to decide", || {
        (1..=3).all(|n| counted(&cluster.report(n)) == (0, 0, 0, 0) && cluster.report(n).trouble.is_empty())
    });
    check_all(&cluster, &model);
}

/// What nobody could decide is mended by a write. Nobody has to wait for the next round of the scrubber to see it.
#[test]
fn what_could_not_be_decided_is_looked_at_again_before_the_next_round() {
    let mut cluster = Cluster::start(3);
    let (mut client, mut model) = begun(&cluster);
    let mut old = Vec::new();
    for n in [2, 3] {
        write_all(&cluster, &mut client, &mut model);
        old.push((n, copy(&cluster, n)));
    }
    write_all(&cluster, &mut client, &mut model);
    cluster.stop(2);
    cluster.stop(3);
    for (n, old) in &old {
        take_back(&file(&cluster, *n), old, 0);
    }
    cluster.start_again(2);
    cluster.start_again(3);
    let mut client = client_of_leader(&cluster);
    let all = (0, 0, 0, PER_SECTOR as u64);
    cluster.until("somebody was asked to look", || {
        assert!(matches!(doubt(&mut client, 1 << 20), Reply::Done(_) | Reply::Refused(_)));
        (1..=3).any(|n| counted(&cluster.report(n)) == all)
    });
    (0..PER_SECTOR).for_each(|at| model.write(&mut client, at));
    let undecided = || (1..=3).map(|n| cluster.report(n).blocks_undecided).sum::<u64>();
    let before = undecided();
    cluster.until("it is looked at again", || undecided() < before);
    check_all(&cluster, &model);
}

/// The guest writes, trims and overwrites parts of blocks all the time, leaders change, a replica is away and comes
/// back. Comparison goes on, and never takes what is merely new for what is wrong.
#[test]
fn what_is_being_written_is_never_taken_for_wrong() {
    let mut cluster = Cluster::scrubbed(3, 0);
    let (mut client, mut model) = begun(&cluster);
    let mut n = 0;
    let mut write_for_a_while = |cluster: &Cluster, model: &mut Model, client: &mut Client, blocks: u64| {
        let goal: Vec<_> = (1..=3)
            .map(|server| cluster.is_running(server).then(|| cluster.report(server).blocks_compared + blocks))
            .collect();
        let compared = |server: u32| {
            goal[server as usize - 1].is_none_or(|goal| cluster.report(server).blocks_compared >= goal)
        };
        cluster.until("much was compared", || {
            for _ in 0..200 {
                n += 1;
                let at = n * 37 % BLOCKS;
                model.write(client, at);
                if n.is_multiple_of(5) {
                    model.sequence += 1;
                    let byte = model.blocks[at];
                    client.write(at_byte(at) + 512, vec![byte; 1024].into(), model.sequence);
                }
                if n.is_multiple_of(7) {
                    model.sequence += 1;
                    client.discard(at_byte(at), 4096, model.sequence);
                    model.blocks[at] = 0;
                }
            }
            (1..=3).all(compared)
        });
    };
    for leader in [1, 2, 3] {
        cluster.lead(leader, 10 + u64::from(leader));
        client = cluster.client(leader);
        client.epoch = FIRST;
        write_for_a_while(&cluster, &mut model, &mut client, 5000);
        let away = leader % 3 + 1;
        cluster.stop(away);
        write_for_a_while(&cluster, &mut model, &mut client, 2000);
        cluster.start_again(away);
        write_for_a_while(&cluster, &mut model, &mut client, 2000);
    }
    for n in 1..=3 {
        assert_eq!(counted(&cluster.report(n)), (0, 0, 0, 0), "chunkserver {n}");
    }
    drop(client);
    check_all(&cluster, &model);
}

fn at_byte(block: usize) -> u32 {
    u32::try_from(block * 4096).expect("small")
}

fn blocks_from_0(client: &Client, length: u32) -> Read {
    let range = ChunkRange::new(0, length).expect("a good range");
    Read { chunk: client.chunk(), epoch: client.epoch, range }
}

fn digests(client: &mut Client, length: u32, index: u64) -> Reply {
    let of = ReadAtLeast { read: blocks_from_0(client, length), index, term: ReadAtLeast::APPLIED_ONLY };
    client.ask(&Request::Digests(AskDigests { of }))
}

fn doubt(client: &mut Client, length: u32) -> Reply {
    let of = blocks_from_0(client, length);
    client.ask(&Request::Doubt(Doubt { of }))
}

/// A question for digests is fenced as a read is; a doubt that is none changes nothing.
#[test]
fn digests_are_told_to_those_who_may_read() {
    let cluster = Cluster::start(3);
    let (mut client, mut model) = begun(&cluster);
    (0..4).for_each(|at| model.write(&mut client, at));
    let expected: Vec<_> = model.blocks[..6].iter().map(|byte| crc32c(&[*byte; 4096])).collect();
    let Freshness { index, .. } = client.read_fresh(0, 512);
    match digests(&mut client, 6 * 4096, index) {
        Reply::Digests { fresh, digests } => assert_eq!((fresh.index, &digests[..]), (index, &expected[..])),
        other => panic!("{other:?}"),
    }
    assert_eq!(digests(&mut client, 4096, index + 1), Reply::Refused(Refusal::Behind { applied: index }));
    assert!(matches!(doubt(&mut client, 1 << 20), Reply::Done(_)));
    cluster.until("it looked", || cluster.report(1).blocks_compared >= 256);
    assert_eq!(counted(&cluster.report(1)), (0, 0, 0, 0));
    client.epoch = Epoch { attachment: 9, incarnation: 0 };
    assert!(matches!(digests(&mut client, 4096, 0), Reply::Refused(Refusal::Behind { .. })));
    client.epoch = Epoch::default();
    for reply in [digests(&mut client, 4096, 0), doubt(&mut client, 4096)] {
        assert_eq!(reply, Reply::Refused(Refusal::Fenced { current: FIRST }));
    }
    client.epoch = FIRST;
    assert_eq!(client.read(0, 4096), block(model.blocks[0]));
}

/// Every kind of damage a disk can do to one replica. As much is found as was done, all of it is repaired, and what
/// the guest reads is right: of what checksums see at any time, of what only comparison sees once it was compared.
#[test]
fn every_kind_of_rot_is_found_as_often_as_it_was_done_and_repaired() {
    let mut cluster = Cluster::scrubbed(3, 0);
    let (mut client, mut model) = begun(&cluster);
    write_all(&cluster, &mut client, &mut model);
    let old = copy(&cluster, 3);
    write_all(&cluster, &mut client, &mut model);
    let (mut injected, mut before) = ([0; 4], 0);
    let kinds = ["bits flipped in data", "checksum sector", "blocks exchanged", "old data and checksums"];
    for (kind, name) in kinds.iter().enumerate() {
        cluster.lead(1, 11);
        cluster.stop(3);
        let file = file(&cluster, 3);
        let place = |block: usize| (DATA_AT + (kind * PER_SECTOR + block) * 4096) as u64;
        injected[kind] = match kind {
            0 => {
                let flipped = [0, 7, 31, 32, 63];
                for block in flipped {
                    let byte = model.blocks[block];
                    file.write_all_at(&[byte ^ 1 << (block % 8)], place(block) + 4095).expect("written");
                }
                flipped.len()
            }
            1 => {
                let mut sector = [0; 512];
                file.read_exact_at(&mut sector, (SECTORS_AT + 512) as u64).expect("read");
                sector[100] ^= 4;
                file.write_all_at(&sector, (SECTORS_AT + 512) as u64).expect("written");
                PER_SECTOR
            }
            2 => {
                for (one, other) in [(3, 4), (10, 60)] {
                    let (a, b) =
                        (model.blocks[kind * PER_SECTOR + one], model.blocks[kind * PER_SECTOR + other]);
                    file.write_all_at(&[b; 4096], place(one)).expect("written");
                    file.write_all_at(&[a; 4096], place(other)).expect("written");
                }
                4
            }
            _ => {
                take_back(&file, &old, kind);
                PER_SECTOR
            }
        };
        cluster.start_again(3);
        if kind < 3 {
            // At once, by whoever has the damage.
            cluster.lead(3, 13);
            let mut client = cluster.client(3);
            client.epoch = FIRST;
            model.check(&mut client);
        }
        cluster.until("it is repaired", || holds(&cluster, 3, &model));
        check_all(&cluster, &model);
        cluster.until("nothing is undecided", || counted(&cluster.report(3)).3 == 0);
        let (found, repaired, compared, undecided) = counted(&cluster.report(3));
        // The process began anew: so did its counters.
        println!("{name}: {} blocks injected, {found} detected, {repaired} repaired", injected[kind]);
        println!(
            "    of these by comparison {compared}, undecided {undecided}, served wrong 0 of {} reads",
            3 * BLOCKS
        );
        let expected = injected[kind] as u64;
        assert_eq!((found, repaired, undecided), (expected, expected, 0), "{name}");
        assert_eq!(compared, if kind == 3 { expected } else { 0 }, "{name}");
        before += expected;
    }
    println!("in all: {before} blocks injected = detected = repaired");
}
