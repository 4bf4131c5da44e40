//! A whole replica that arrives takes the place of the one that is here, or it does not: whatever happens in between,
//! there is never a mixture, and the other replicas of the disk do not notice. The same for one that is thrown away.

mod chunk_store_model;

use bytes::Bytes;
use chunk_store_model::{CHUNKS, COPYSET, Change, Contents, SECTORS, World, chunk_key, record};
use evolute_chunkserver::chunk_store::{Extent, StageError, StoreError};
use evolute_chunkserver::disk::Disk;
use evolute_chunkserver::disk::crash::Survives;
use evolute_protocol::checksum::crc32c;
use evolute_protocol::id::{BlockIndex, ChunkKey};

fn write(world: &mut World, chunk: usize, sector: usize, count: usize) {
    world.change(Change::Write { chunk, sector, count });
}

type Ranges = &'static [(usize, usize, usize)];

/// What is here before (in files, in memory, being drained), and what arrives.
type Story = (&'static str, fn(&mut World), Ranges);

fn stories() -> Vec<Story> {
    vec![
        ("an empty replica is filled", |_| {}, &[(0, 0, 24), (2, 8, 8)]),
        (
            "chunks in files are replaced, added, and gone",
            |world| {
                write(world, 0, 0, 64);
                write(world, 1, 3, 9);
                world.write_other();
                let _ = world.checkpoint();
            },
            &[(0, 16, 24), (2, 0, 64)],
        ),
        (
            "what is in memory goes, too",
            |world| {
                write(world, 0, 0, 16);
                let _ = world.checkpoint();
                write(world, 0, 5, 2);
                write(world, 1, 0, 8);
                world.change(Change::DropVolume { chunk: 2 });
                world.write_other();
            },
            &[(0, 8, 16)],
        ),
        (
            "a drain is under way",
            |world| {
                write(world, 0, 0, 24);
                let _ = world.checkpoint();
                write(world, 0, 9, 3);
                write(world, 2, 0, 8);
                world.write_other();
                world.begin_checkpoint();
                write(world, 0, 17, 1);
                world.write_other();
            },
            &[(0, 0, 8), (1, 0, 8)],
        ),
        (
            "a dropped chunk comes back",
            |world| {
                write(world, 0, 0, 24);
                write(world, 1, 0, 24);
                let _ = world.checkpoint();
                world.change(Change::DropChunk { chunk: 0 });
            },
            &[(0, 8, 8)],
        ),
        (
            "nothing arrives",
            |world| {
                write(world, 0, 0, 24);
                let _ = world.checkpoint();
                write(world, 1, 0, 24);
            },
            &[],
        ),
    ]
}

fn recover(world: &mut World, story: &str) {
    let applied = world.open().unwrap_or_else(|e| panic!("{story}: a crash never costs us the store: {e:?}"));
    world.check_before_replay(applied);
    world.replay(applied..world.log.len());
    world.check();
    write(world, 0, 11, 7);
    world.write_other();
    world.checkpoint().unwrap_or_else(|e| panic!("{story}: {e:?}"));
    world.check();
    world.kill();
    assert_eq!(world.open().expect("opens again"), world.log.len(), "{story}");
    world.check();
    let files = world.files();
    world.kill();
    world.open().expect("opens again");
    assert_eq!(world.files(), files, "{story}: nothing more is cleaned up");
    assert!(files.len() <= CHUNKS + 1, "{story}: {files:?}");
}

/// Power is cut at every operation of an installation and of what follows it.
#[test]
fn a_crash_leaves_the_old_replica_or_the_new_one() {
    let (mut old, mut new) = (0, 0);
    for (story, before, ranges) in stories() {
        let live = |world: &mut World, look: bool| -> Result<(), StageError> {
            before(world);
            world.install(ranges.to_vec())?;
            if look {
                world.check();
            }
            write(world, 0, 2, 9);
            world.write_other();
            world.checkpoint()?;
            Ok(())
        };
        let mut undisturbed = World::new(false);
        live(&mut undisturbed, true).unwrap_or_else(|e| panic!("{story}: {e}"));
        undisturbed.check();
        undisturbed.kill();
        for cut in 0..=undisturbed.disk.operations() {
            for lands in [false, true] {
                let mut world = World::new(lands);
                if cut < world.disk.operations() {
                    continue;
                }
                world.disk.cut_power_at(cut);
                let _ = live(&mut world, false);
                let kept = [Survives::Everything, Survives::Nothing];
                for survives in kept.into_iter().chain((0..6).map(|seed| Survives::Some(seed * 977 + cut))) {
                    let mut crashed = world.after_crash(survives);
                    recover(&mut crashed, &format!("{story}: cut at {cut}, {survives:?}, lands {lands}"));
                    let installed = crashed.log.iter().any(|change| matches!(change, Change::Install { .. }));
                    *(if installed { &mut new } else { &mut old }) += 1;
                }
            }
        }
    }
    assert!(old > 300 && new > 300, "{old} times the old one, {new} times the new one");
}

/// The old replica lives on while another one is staged: its changes count if the other never is installed, and are
/// gone if it is. Nothing of the staged one shows before.
#[test]
fn what_is_staged_is_not_seen_before_it_is_installed_and_goes_when_it_is_dropped() {
    let mut world = World::new(false);
    write(&mut world, 0, 0, 24);
    world.checkpoint().unwrap();
    let mut contents: Contents = [[0; SECTORS]; CHUNKS];
    contents[0][0..32].fill(77);
    contents[2][0..8].fill(78);
    let before = world.files();
    let mut staging = world.store.as_ref().unwrap().stage(COPYSET);
    world.stage(&mut staging, &contents).unwrap();
    assert!(world.files().len() > before.len());
    world.check();
    write(&mut world, 0, 3, 8);
    world.change(Change::DropChunk { chunk: 0 });
    world.checkpoint().unwrap();
    write(&mut world, 0, 7, 30);
    world.checkpoint().unwrap();
    world.check();
    // A second transfer begins before the first is given up.
    let mut second = world.store.as_ref().unwrap().stage(COPYSET);
    world.stage(&mut second, &contents).unwrap();
    drop(staging);
    world.write_other();
    world.checkpoint().unwrap();
    world.check();
    world.log.push(Change::Install { ranges: Vec::new() });
    world.history.push(contents);
    world.finish_install(second, world.log.len() as u64).unwrap();
    world.check();
    // Whatever is still to be removed is removed when the thread has ended.
    world.kill();
    assert_eq!(world.files().len(), 3, "{:?}", world.files());
    let dropped = world.open().expect("opens");
    world.replay(dropped..world.log.len());
    world.check();
    let mut third = world.store.as_ref().unwrap().stage(COPYSET);
    world.stage(&mut third, &contents).unwrap();
    drop(third);
    world.kill();
    assert_eq!(world.files().len(), 3, "{:?}", world.files());
}

/// A record of the old replica that was made before the installation, and comes to a checkpoint after it, does not set
/// the new one back.
#[test]
fn a_record_from_before_the_installation_counts_for_nothing() {
    let mut world = World::new(false);
    write(&mut world, 0, 0, 24);
    world.checkpoint().unwrap();
    let stale = record(COPYSET, world.log.len() as u64);
    world.install(vec![(1, 0, 8)]).unwrap();
    let store = world.store.as_mut().unwrap();
    let done = store.begin_checkpoint(vec![stale]);
    let done = world.wait(done).unwrap();
    assert_eq!(done.applied, [], "{done:?}");
    world.kill();
    assert_eq!(world.open().unwrap(), world.log.len());
    world.check();
}

/// A checkpoint was frozen and has not begun to drain: the installation waits for it, or the old replica's changes would
/// be written over the new one.
#[test]
fn an_installation_waits_for_a_checkpoint_that_is_frozen() {
    let mut world = World::new(false);
    write(&mut world, 0, 0, 24);
    world.checkpoint().unwrap();
    write(&mut world, 0, 5, 2);
    write(&mut world, 1, 0, 16);
    let records = vec![record(COPYSET, world.log.len() as u64)];
    let draining = world.store.as_mut().unwrap().begin_checkpoint(records);
    let mut contents: Contents = [[0; SECTORS]; CHUNKS];
    contents[0][0..32].fill(77);
    let mut staging = world.store.as_ref().unwrap().stage(COPYSET);
    world.stage(&mut staging, &contents).unwrap();
    world.wait(staging.finish()).unwrap();
    world.log.push(Change::Install { ranges: Vec::new() });
    world.history.push(contents);
    let installed = record(COPYSET, world.log.len() as u64);
    let installing = world.store.as_ref().unwrap().install(staging, installed);
    let (installed, drained) = world.wait(async { tokio::join!(installing, draining) });
    installed.unwrap();
    drained.unwrap();
    world.check();
    world.kill();
    assert_eq!(world.open().unwrap(), world.log.len());
    world.check();
}

/// What does not fit its checksum, its place or its order is refused, and the replica that is here lives on.
#[test]
fn garbage_is_refused_by_name() {
    let mut world = World::new(false);
    write(&mut world, 0, 0, 24);
    world.checkpoint().unwrap();
    let files = world.files();
    let data = Bytes::from(vec![7; 8192]);
    let crc = crc32c(&data[..4096]);
    let extent = |first, crcs: Vec<u32>| Extent::Data { first, data: data.clone(), crcs };
    let (low, high) = (chunk_key(0), chunk_key(1));
    let put = |world: &World, parts: Vec<(ChunkKey, Extent)>| -> Result<(), StageError> {
        let mut staging = world.store.as_ref().unwrap().stage(COPYSET);
        parts.into_iter().try_for_each(|(key, extent)| world.wait(staging.put(key, vec![extent])))
    };
    let good = || extent(5, vec![crc, crc]);
    put(&world, vec![(low, good()), (high, good())]).expect("nothing is wrong with it");
    let wrong = put(&world, vec![(low, extent(5, vec![crc, crc ^ 1]))]);
    assert!(matches!(wrong, Err(StageError::Mismatch { block: 6, .. })), "{wrong:?}");
    for parts in [
        vec![(low, good()), (low, extent(6, vec![crc, crc]))],
        vec![(high, good()), (low, good())],
        vec![(low, good()), (high, good()), (low, extent(9, vec![crc, crc]))],
        vec![(low, extent(4095, vec![crc, crc]))],
        vec![(low, extent(5, vec![crc; 3]))],
        vec![(low, Extent::Damaged { first: 4000, count: 97 })],
    ] {
        let refused = put(&world, parts.clone());
        assert!(matches!(refused, Err(StageError::OutOfOrder { .. })), "{parts:?}: {refused:?}");
    }
    world.check();
    world.kill();
    assert_eq!(world.files(), files, "nothing is left of it");
}

/// No room: the transfer ends and leaves nothing, the store lives.
#[test]
fn a_full_disk_refuses_what_arrives_and_keeps_what_it_has() {
    let mut world = World::new(false);
    write(&mut world, 0, 0, 64);
    world.checkpoint().unwrap();
    let files = world.files();
    let space = world.disk.space().unwrap();
    for free in [0, 512, 4096, 8192, 20000] {
        world.disk.limit_writes(Some(space.total - space.available + free));
        let refused = world.install(vec![(0, 0, 64), (1, 0, 64), (2, 0, 64)]).expect_err("no room");
        assert!(matches!(refused, StageError::Store(StoreError::NoSpace { .. })), "{refused:?}");
        world.log.pop();
        world.history.pop();
        world.check();
    }
    world.disk.limit_writes(None);
    world.install(vec![(0, 0, 64), (1, 0, 64), (2, 0, 64)]).expect("there is room again");
    world.check();
    world.kill();
    assert_eq!(world.files().len(), 3);
    assert!(world.files().iter().all(|file| !files.contains(file)));
}

/// A replica is read while it is written to and drained; what comes of it, and the log from where the reading began,
/// make the same replica elsewhere.
#[test]
fn a_replica_read_while_it_lives_is_made_good_by_the_log() {
    for seed in 0..40_usize {
        let mut from = World::new(false);
        for n in 0..6 {
            write(&mut from, (seed + n) % CHUNKS, (seed * 7 + n * 11) % 40, 1 + (seed + n * 5) % 24);
            if (seed + n) % 3 == 0 {
                from.checkpoint().unwrap();
            }
        }
        from.checkpoint().unwrap();
        let applied = from.log.len();
        let mut into = World::new(false);
        write(&mut into, seed % CHUNKS, seed % 50, 9);
        into.checkpoint().unwrap();
        write(&mut into, (seed + 1) % CHUNKS, seed % 50, 9);
        let mut export = from.store.as_ref().unwrap().export(COPYSET);
        let mut staging = into.store.as_ref().unwrap().stage(COPYSET);
        let mut n = 0;
        while let Some((chunk, extents)) = from.wait(export.next()) {
            into.wait(staging.put(chunk, extents)).unwrap();
            match (seed + n) % 4 {
                0 => write(&mut from, n % CHUNKS, (seed * 5 + n * 3) % 50, 1 + n % 13),
                1 => from.change(Change::Zero { chunk: (n + 1) % CHUNKS, sector: (seed + n) % 50, count: 9 }),
                2 => from.change(Change::DropChunk { chunk: seed % CHUNKS }),
                _ => from.checkpoint().unwrap(),
            }
            n += 1;
        }
        write(&mut from, seed % CHUNKS, 33, 3);
        into.log.clone_from(&from.log);
        into.history.clone_from(&from.history);
        into.finish_install(staging, applied as u64).unwrap();
        if seed % 2 == 0 {
            into = into.after_crash(Survives::Nothing);
            assert_eq!(into.open().unwrap(), applied);
        }
        into.replay(applied..into.log.len());
        into.check();
        into.checkpoint().unwrap();
        into.kill();
        assert_eq!(into.open().unwrap(), into.log.len());
        into.check();
    }
}

/// A replica is thrown away: its chunks read as zeroes at once and for ever, also when the same copyset comes here
/// again; its files stay until their time is up, through crashes, and then go.
#[test]
fn a_replica_thrown_away_leaves_nothing_to_read_and_after_a_while_nothing_at_all() {
    let (mut there, mut gone) = (0, 0);
    let before = |world: &mut World| {
        write(world, 0, 0, 64);
        write(world, 2, 3, 9);
        world.write_other();
        let _ = world.checkpoint();
        write(world, 1, 0, 8);
        world.begin_checkpoint();
        write(world, 0, 5, 5);
    };
    let live = |world: &mut World| -> Result<(), StoreError> {
        before(world);
        world.wait(world.store.as_ref().unwrap().trash_copyset(COPYSET, 1000))?;
        world.write_other();
        let done = world.store.as_mut().unwrap().begin_checkpoint(vec![]);
        world.wait(done).map(drop)
    };
    let mut undisturbed = World::new(false);
    live(&mut undisturbed).unwrap();
    undisturbed.kill();
    for cut in 0..=undisturbed.disk.operations() {
        for lands in [false, true] {
            let mut world = World::new(lands);
            if cut < world.disk.operations() {
                continue;
            }
            world.disk.cut_power_at(cut);
            let _ = live(&mut world);
            for seed in 0..4 {
                let mut world = world.after_crash(Survives::Some(seed * 7 + cut));
                let opened = world.open_all().expect("a crash never costs us the store");
                world.check_other();
                if let Some(found) = opened.copysets.iter().find(|record| record.copyset == COPYSET) {
                    there += 1;
                    assert_eq!(opened.removed, []);
                    let applied = usize::try_from(found.applied).unwrap();
                    world.replay(applied..world.log.len());
                    world.check();
                    continue;
                }
                gone += 1;
                assert_eq!(opened.removed, [COPYSET]);
                check_gone(&mut world);
            }
        }
    }
    assert!(there > 10 && gone > 10, "{there} there, {gone} gone");
}

fn check_gone(world: &mut World) {
    world.log.clear();
    world.history.truncate(1);
    world.check();
    let trashed = world.files();
    assert!(trashed.len() >= 2, "{trashed:?}");
    let store = world.store.as_mut().unwrap();
    store.removed(COPYSET).unwrap();
    store.put_copyset(record(COPYSET, 0)).unwrap();
    store.empty_trash(1900, 1000);
    // The same chunks are written again, beside what is in the trash.
    write(world, 0, 2, 3);
    world.checkpoint().unwrap();
    write(world, 2, 2, 3);
    world.checkpoint().unwrap();
    world.check();
    assert!(trashed.iter().all(|file| world.files().contains(file)), "it is not time yet");
    assert_eq!(world.files().len(), trashed.len() + 2, "new chunks have files of their own");
    world.kill();
    let opened = world.open_all().unwrap();
    assert_eq!(opened.removed, []);
    world.replay(usize::try_from(opened.copysets[0].applied).unwrap()..world.log.len());
    world.check();
    assert!(trashed.iter().all(|file| world.files().contains(file)), "a restart is no reason");
    let trash_bytes = |world: &World| world.store.as_ref().unwrap().usage().trash_bytes;
    assert!(trash_bytes(world) > 0);
    world.store.as_mut().unwrap().empty_trash(2000, 1000);
    assert_eq!(trash_bytes(world), 0);
    world.check();
    world.kill();
    let left = world.files();
    assert_eq!(left.len(), 3, "{left:?} of {trashed:?}");
    world.open_all().unwrap();
    assert_eq!(trash_bytes(world), 0);
    world.replay(0..world.log.len());
    world.check();
}

/// Space is short: the trash goes before its time.
#[test]
fn the_trash_makes_room_when_room_is_needed() {
    let mut world = World::new(false);
    write(&mut world, 0, 0, 64);
    world.checkpoint().unwrap();
    world.wait(world.store.as_ref().unwrap().trash_copyset(COPYSET, 1000)).unwrap();
    let store = world.store.as_mut().unwrap();
    store.empty_trash(1001, 1000);
    assert!(store.usage().trash_bytes > 0);
    let space = world.disk.space().unwrap();
    world.disk.limit(Some(space.total - space.available + 4096));
    store.usage();
    store.empty_trash(1002, 1000);
    assert_eq!(store.usage().trash_bytes, 0);
    world.kill();
    assert_eq!(world.files(), Vec::<String>::new());
}

/// Each volume's share is counted, through everything that changes it.
#[test]
fn what_a_volume_uses_is_counted() {
    let mut world = World::new(false);
    let uses = |world: &World| {
        let all = world.store.as_ref().unwrap().volume_uses().into_iter();
        Vec::from_iter(all.filter(|((of, _), _)| *of == COPYSET).map(|((_, volume), bytes)| (volume, bytes)))
    };
    let (first, second) = (chunk_key(0).volume, chunk_key(2).volume);
    write(&mut world, 0, 0, 9);
    write(&mut world, 1, 0, 1);
    write(&mut world, 2, 8, 24);
    world.write_other();
    // Also what no checkpoint has seen: after a restart that may be all there is, for minutes.
    assert_eq!(uses(&world), [(first, 3 * 4096), (second, 3 * 4096)]);
    world.checkpoint().unwrap();
    assert_eq!(uses(&world), [(first, 3 * 4096), (second, 3 * 4096)]);
    write(&mut world, 1, 0, 1);
    assert_eq!(uses(&world), [(first, 3 * 4096), (second, 3 * 4096)], "what is written over is not more");
    world.change(Change::Zero { chunk: 2, sector: 8, count: 8 });
    world.checkpoint().unwrap();
    assert_eq!(uses(&world), [(first, 3 * 4096), (second, 2 * 4096)]);
    world.change(Change::DropVolume { chunk: 0 });
    assert_eq!(uses(&world), [(second, 2 * 4096)]);
    world.checkpoint().unwrap();
    assert_eq!(uses(&world), [(second, 2 * 4096)]);
    world.install(vec![(1, 0, 32)]).unwrap();
    assert_eq!(uses(&world), [(first, 4 * 4096)]);
    world.kill();
    world.open().unwrap();
    assert_eq!(uses(&world), [(first, 4 * 4096)]);
    world.wait(world.store.as_ref().unwrap().trash_copyset(COPYSET, 0)).unwrap();
    assert_eq!(uses(&world), []);
}

/// While another replica was asked for a block, the block was changed here: the answer is older and does not count.
#[test]
fn a_repair_never_undoes_a_change() {
    let mut world = World::new(false);
    write(&mut world, 0, 0, 24);
    world.checkpoint().unwrap();
    let block = BlockIndex(60);
    let begin = |world: &World| {
        let store = world.store.as_ref().unwrap();
        store.begin_repair(COPYSET, chunk_key(0), block).expect("nobody is at it")
    };
    let changes: [fn(&mut World); 4] = [
        |world| write(world, 0, 3, 1),
        |world| world.change(Change::Zero { chunk: 0, sector: 7, count: 9 }),
        |world| world.change(Change::DropVolume { chunk: 1 }),
        |world| world.install(vec![(0, 0, 24)]).unwrap(),
    ];
    for change in changes {
        let repair = begin(&world);
        assert!(world.store.as_ref().unwrap().begin_repair(COPYSET, chunk_key(0), block).is_none());
        change(&mut world);
        assert!(!repair.finish(Bytes::from(vec![0xee; 4096])), "it was changed");
        world.check();
    }
    // Changes of neighbours do not matter.
    let repair = begin(&world);
    let before = world.read(0, 60 * 4096, 4096).unwrap();
    write(&mut world, 0, 8, 8);
    write(&mut world, 1, 0, 8);
    assert!(repair.finish(before));
    world.check();
    world.checkpoint().unwrap();
    world.check();
}

/// The sender's disk has rotted: what it cannot read is an error at the receiver too, never zeroes and never older
/// bytes; everything else arrives.
#[test]
fn what_the_sender_cannot_read_arrives_as_damage() {
    let mut from = World::new(false);
    write(&mut from, 0, 0, 40);
    from.checkpoint().unwrap();
    from.kill();
    let file = from.disk.open("chunks/1/5.1".as_ref()).unwrap();
    file.write(&mut [std::io::IoSlice::new(&[0xee; 512])], (64 << 10) + 61 * 4096).unwrap();
    from.open().unwrap();
    let mut into = World::new(false);
    write(&mut into, 0, 0, 40);
    into.checkpoint().unwrap();
    let mut staging = into.store.as_ref().unwrap().stage(COPYSET);
    let mut export = from.store.as_ref().unwrap().export(COPYSET);
    while let Some((chunk, extents)) = from.wait(export.next()) {
        into.wait(staging.put(chunk, extents)).unwrap();
    }
    into.finish_install(staging, 9).unwrap();
    for again in [false, true] {
        for block in 0..5 {
            let (there, here) =
                (from.read(0, (60 + block) * 4096, 4096), into.read(0, (60 + block) * 4096, 4096));
            assert_eq!(there.is_none(), block == 1);
            assert!(there == here, "block {block}, opened again: {again}");
        }
        into.kill();
        into.open_all().unwrap();
    }
}
