//! Whatever a crash leaves, the store opens on it, passes nothing torn off as data, and is exactly what it was once
//! the log is applied from where it says.

mod chunk_store_model;

use chunk_store_model::{CHUNKS, Change, SECTORS, World};
use evolute_chunkserver::chunk_store::StoreError;
use evolute_chunkserver::disk::Disk;
use evolute_chunkserver::disk::crash::Survives;
use proptest::prelude::{Just, Strategy, prop_oneof};
use proptest::test_runner::{Config, TestRunner};

#[derive(Debug, Clone)]
enum Step {
    Change(Change),
    Checkpoint,
    /// Goes on by itself while what follows happens.
    BeginCheckpoint,
    Kill,
    Other,
    Install {
        ranges: Vec<(usize, usize, usize)>,
        /// The power goes this many operations in.
        cut: Option<(u64, Survives)>,
    },
    PowerCut {
        /// During a checkpoint, this many operations in; else between two steps.
        operations_in: Option<u64>,
        survives: Survives,
        /// Again while the store is being opened, this many operations in.
        again_in: Option<u64>,
        /// A checkpoint after this many replayed changes.
        checkpoint_after: Option<usize>,
    },
    Check,
}

fn write(chunk: usize, sector: usize, count: usize) -> Step {
    Step::Change(Change::Write { chunk, sector, count })
}

fn zero(chunk: usize, sector: usize, count: usize) -> Step {
    Step::Change(Change::Zero { chunk, sector, count })
}

/// Applies steps until one fails, which only a power cut makes them do.
fn run(world: &mut World, steps: &[Step]) -> bool {
    for step in steps {
        match step {
            Step::Change(change) => world.change(change.clone()),
            Step::Checkpoint => {
                if world.checkpoint().is_err() {
                    return false;
                }
            }
            Step::BeginCheckpoint => world.begin_checkpoint(),
            Step::Check => world.check(),
            Step::Other => world.write_other(),
            Step::Install { ranges, cut: None } => {
                if world.install(ranges.clone()).is_err() {
                    return false;
                }
            }
            Step::Install { .. } | Step::Kill | Step::PowerCut { .. } => {
                unreachable!("not in the workloads given here")
            }
        }
    }
    true
}

/// Opens after a crash, looks, applies the log, looks, and goes on living.
fn recover(world: &mut World, story: &str) {
    let applied = world.open().unwrap_or_else(|e| panic!("{story}: a crash never costs us the store: {e:?}"));
    world.check_before_replay(applied);
    world.replay(applied..world.log.len());
    world.check();
    world.checkpoint().unwrap_or_else(|e| panic!("{story}: {e:?}"));
    world.check();
    world.kill();
    let applied = world.open().expect("opens again");
    assert_eq!(applied, world.log.len(), "{story}");
    world.check();
}

/// Short workloads, each of them a way to go wrong.
fn workloads() -> Vec<(&'static str, Vec<Step>)> {
    let (c, k) = (|| Step::Checkpoint, |chunk| Step::Change(Change::DropChunk { chunk }));
    let v = |chunk| Step::Change(Change::DropVolume { chunk });
    vec![
        ("a new chunk", vec![write(0, 0, 8), c()]),
        ("whole blocks overwritten", vec![write(0, 0, 64), c(), write(0, 0, 64), c()]),
        ("a sub-block write merges in place", vec![write(0, 0, 24), c(), write(0, 9, 3), c()]),
        ("a sub-block write on nothing", vec![write(0, 3, 1), c(), write(0, 4, 1), c()]),
        (
            "a block assembled from parts",
            vec![
                write(0, 0, 8),
                c(),
                write(0, 0, 4),
                write(0, 4, 4),
                write(1, 0, 1),
                c(),
                write(0, 2, 1),
                c(),
            ],
        ),
        (
            "a neighbour's checksum is not touched",
            vec![write(0, 0, 64), c(), write(0, 8, 8), c(), zero(0, 24, 8), c()],
        ),
        ("zeroed and written again", vec![write(0, 0, 32), c(), zero(0, 0, 16), c(), write(0, 8, 3), c()]),
        ("zeroed in part", vec![write(0, 0, 16), c(), zero(0, 4, 8), c()]),
        ("a chunk dropped", vec![write(0, 0, 8), write(1, 0, 8), c(), k(0), c()]),
        ("dropped and written again", vec![write(0, 0, 64), c(), k(0), write(0, 8, 8), write(0, 17, 2), c()]),
        ("dropped, drained, written again", vec![write(0, 0, 8), c(), k(0), c(), write(0, 0, 12), c()]),
        (
            "emptied block by block",
            vec![write(0, 0, 16), c(), zero(0, 0, 8), c(), zero(0, 8, 8), c(), write(0, 0, 1), c()],
        ),
        (
            "a volume dropped",
            vec![write(0, 0, 9), write(1, 3, 9), write(2, 0, 8), c(), v(0), c(), write(2, 1, 1), c()],
        ),
        (
            "both sides of a checksum sector",
            vec![write(0, 20, 24), c(), write(0, 30, 4), write(2, 31, 2), c()],
        ),
    ]
}

/// Power is cut at every operation of every workload, with everything, nothing, or some of what was not synced
/// surviving, and the batch under way there or not.
#[test]
fn power_may_be_cut_at_any_operation() {
    let mut images = 0;
    for (story, steps) in workloads() {
        let mut undisturbed = World::new(false);
        assert!(run(&mut undisturbed, &steps), "{story}");
        undisturbed.check();
        undisturbed.kill();
        let operations = undisturbed.disk.operations();
        for cut in 0..=operations {
            for lands in [false, true] {
                let mut world = World::new(lands);
                if cut < world.disk.operations() {
                    continue;
                }
                world.disk.cut_power_at(cut);
                run(&mut world, &steps);
                let kept = [Survives::Everything, Survives::Nothing];
                for survives in kept.into_iter().chain((0..6).map(|seed| Survives::Some(seed * 977 + cut))) {
                    let mut crashed = world.after_crash(survives);
                    recover(&mut crashed, &format!("{story}: cut at {cut}, {survives:?}, lands {lands}"));
                    images += 1;
                }
            }
        }
    }
    assert!(images > 3000, "only {images} images");
}

/// The owner may make a checkpoint while it is still applying the log after a crash. Blocks that the crash tore may
/// then be merged before the log has come to what heals them.
#[test]
fn a_checkpoint_may_come_while_the_log_is_being_applied() {
    let mut checkpoints = 0;
    for (story, steps) in workloads() {
        let mut undisturbed = World::new(false);
        run(&mut undisturbed, &steps);
        undisturbed.kill();
        for cut in 0..=undisturbed.disk.operations() {
            let mut world = World::new(false);
            if cut < world.disk.operations() {
                continue;
            }
            world.disk.cut_power_at(cut);
            run(&mut world, &steps);
            for seed in 0..4 {
                for after in 1.. {
                    let mut crashed = world.after_crash(Survives::Some(seed * 31 + cut));
                    let applied = crashed.open().expect("a crash never costs us the store");
                    if applied + after >= crashed.log.len() {
                        break;
                    }
                    crashed.replay(applied..applied + after);
                    crashed.checkpoint_as_of(applied + after).expect("in the middle of the log");
                    recover(
                        &mut crashed.after_crash(Survives::Some(seed)),
                        &format!("{story}: cut at {cut}, seed {seed}, checkpoint after {after}"),
                    );
                    checkpoints += 1;
                }
            }
        }
    }
    assert!(checkpoints > 300, "only {checkpoints} checkpoints");
}

/// Opening repairs what a checkpoint left half merged. The power may go then, too, and again.
#[test]
fn power_may_be_cut_while_a_crash_is_being_repaired() {
    let steps =
        [write(0, 0, 24), write(2, 0, 8), Step::Checkpoint, write(0, 9, 3), write(2, 1, 1), Step::Checkpoint];
    let mut repaired = 0;
    let mut undisturbed = World::new(false);
    run(&mut undisturbed, &steps);
    undisturbed.kill();
    for cut in 0..=undisturbed.disk.operations() {
        let mut world = World::new(false);
        if cut < world.disk.operations() {
            continue;
        }
        world.disk.cut_power_at(cut);
        run(&mut world, &steps);
        for seed in 0..4 {
            for again in 0.. {
                let mut crashed = world.after_crash(Survives::Some(seed));
                crashed.disk.cut_power_at(again);
                let opened = crashed.open().is_ok();
                crashed.kill();
                let was_cut = crashed.disk.is_off();
                let mut twice = crashed.after_crash(Survives::Some(seed + again));
                recover(&mut twice, &format!("cut at {cut}, again at {again} of opening, seed {seed}"));
                if opened && !was_cut {
                    break;
                }
                repaired += 1;
            }
        }
    }
    assert!(repaired > 100, "opening was cut only {repaired} times");
}

fn range_of_sectors() -> impl Strategy<Value = (usize, usize, usize)> + Clone {
    (0..CHUNKS, 0..SECTORS, 1..28_usize)
        .prop_map(|(chunk, sector, count)| (chunk, sector, count.min(SECTORS - sector)))
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = range_of_sectors();
    let sub_block = (0..CHUNKS, 0..SECTORS / 8, 0..8_usize, 1..8_usize)
        .prop_map(|(chunk, block, sector, count)| (chunk, block * 8 + sector, count.min(8 - sector)));
    let blocks = (0..CHUNKS, 0..SECTORS / 8, 1..4_usize)
        .prop_map(|(chunk, block, count)| (chunk, block * 8, (count * 8).min(SECTORS - block * 8)));
    let survives = prop_oneof![
        Just(Survives::Everything),
        Just(Survives::Nothing),
        (0..u64::MAX).prop_map(Survives::Some),
    ];
    let cut = (
        proptest::option::of(0..30_u64),
        survives.clone(),
        proptest::option::of(0..12_u64),
        proptest::option::of(0..6_usize),
    )
        .prop_map(|(operations_in, survives, again_in, checkpoint_after)| Step::PowerCut {
            operations_in,
            survives,
            again_in,
            checkpoint_after,
        });
    let step = prop_oneof![
        4 => range.clone().prop_map(|(chunk, sector, count)| write(chunk, sector, count)),
        4 => sub_block.clone().prop_map(|(chunk, sector, count)| write(chunk, sector, count)),
        4 => blocks.clone().prop_map(|(chunk, sector, count)| write(chunk, sector, count)),
        1 => range.prop_map(|(chunk, sector, count)| zero(chunk, sector, count)),
        1 => sub_block.prop_map(|(chunk, sector, count)| zero(chunk, sector, count)),
        1 => blocks.prop_map(|(chunk, sector, count)| zero(chunk, sector, count)),
        1 => (0..CHUNKS).prop_map(|chunk| Step::Change(Change::DropChunk { chunk })),
        1 => (0..CHUNKS).prop_map(|chunk| Step::Change(Change::DropVolume { chunk })),
        1 => Just(Step::Other),
        2 => (proptest::collection::vec(range_of_sectors(), 0..4), proptest::option::of((0..16_u64, survives.clone())))
            .prop_map(|(ranges, cut)| Step::Install { ranges, cut }),
        3 => Just(Step::Checkpoint),
        2 => Just(Step::BeginCheckpoint),
        1 => Just(Step::Kill),
        4 => cut,
        2 => Just(Step::Check),
    ];
    proptest::collection::vec(step, 1..40)
}

/// Any changes, checkpoints, kills and power cuts in any order: the store is always what the model is.
#[test]
fn the_store_is_its_model_through_any_crashes() {
    let cases = std::env::var("EVOLUTE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(1500);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 20_000, ..Config::default() };
    let live = |steps: Vec<Step>| {
        let mut world = World::new(false);
        for step in steps {
            match step {
                Step::Kill => {
                    world.kill();
                    let applied = world.open().expect("opens");
                    world.check_before_replay(applied);
                    world.replay(applied..world.log.len());
                }
                Step::Install { ranges, cut: Some((operations_in, survives)) } => {
                    world.disk.cut_power_at(world.disk.operations() + operations_in);
                    let _ = world.install(ranges);
                    world = world.after_crash(survives);
                    let applied = world.open().expect("a crash never costs us the store");
                    world.check_before_replay(applied);
                    world.replay(applied..world.log.len());
                    world.check();
                }
                Step::PowerCut { operations_in, survives, again_in, checkpoint_after } => {
                    if let Some(operations) = operations_in {
                        world.disk.cut_power_at(world.disk.operations() + operations);
                        let _ = world.checkpoint();
                    }
                    world = world.after_crash(survives);
                    if let Some(again) = again_in {
                        world.disk.cut_power_at(again);
                        let _ = world.open();
                        world = world.after_crash(survives);
                    }
                    let mut applied = world.open().expect("a crash never costs us the store");
                    world.check_before_replay(applied);
                    if let Some(after) = checkpoint_after {
                        let until = (applied + after).min(world.log.len());
                        world.replay(applied..until);
                        world.checkpoint_as_of(until).expect("a checkpoint in the middle of the log");
                        applied = until;
                    }
                    world.replay(applied..world.log.len());
                }
                other => assert!(run(&mut world, &[other])),
            }
        }
        world.check();
        Ok(())
    };
    TestRunner::new(config).run(&steps(), live).unwrap();
}

/// A failed sync means nobody knows what the disk holds: the store says so from then on and tries nothing again.
#[test]
fn after_a_failed_sync_the_store_is_dead_and_the_log_has_it_all() {
    let steps =
        [write(0, 0, 24), write(2, 0, 8), Step::Checkpoint, write(0, 9, 3), write(1, 1, 1), zero(2, 0, 8)];
    for syncs in 0.. {
        let mut world = World::new(false);
        run(&mut world, &steps);
        world.disk.fail_sync_after(syncs);
        let Err(error) = world.checkpoint() else {
            assert!(syncs > 2, "rescue file and two chunk files are synced");
            break;
        };
        assert!(matches!(error, StoreError::SyncFailed { .. }), "{error}");
        let operations = world.disk.operations();
        let again = world.checkpoint().expect_err("dead");
        assert!(matches!(again, StoreError::SyncFailed { .. }), "{again}");
        assert!(world.store.as_ref().unwrap().failed().is_some());
        assert_eq!(world.disk.operations(), operations, "nothing was tried again");
        // What is in memory still answers; and a restart, with or without a power cut, has the log.
        world.check();
        for survives in [Survives::Everything, Survives::Nothing, Survives::Some(syncs)] {
            recover(&mut world.after_crash(survives), &format!("sync {syncs} failed, {survives:?}"));
        }
    }
}

/// A full disk is not a broken one: nothing is lost, reads go on, and with space the checkpoint is made good. The
/// power may go while it is full.
#[test]
fn a_full_disk_waits_for_space_and_loses_nothing() {
    let before = [write(0, 0, 24), write(2, 0, 8), Step::Checkpoint];
    let after = [write(0, 9, 3), write(0, 32, 32), write(1, 0, 64), zero(2, 0, 8)];
    let mut refused = 0;
    for free in (0..80).map(|sectors| sectors * 512) {
        let mut world = World::new(false);
        run(&mut world, &before);
        let space = world.disk.space().unwrap();
        let limit = space.total - space.available + free;
        run(&mut world, &after);
        // What the store is told of free space is too much: it finds out in the middle of writing.
        world.disk.limit_writes(Some(limit));
        let outcome = world.checkpoint();
        if let Err(error) = outcome {
            assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
            refused += 1;
            world.check();
            world.change(Change::Write { chunk: 1, sector: 3, count: 4 });
            world.check();
            recover(&mut world.after_crash(Survives::Some(free)), &format!("crashed with {free} bytes free"));
            let mut world = World::new(false);
            run(&mut world, &before);
            run(&mut world, &after);
            world.disk.limit_writes(Some(limit));
            world.checkpoint().expect_err("as before");
            world.change(Change::Write { chunk: 1, sector: 3, count: 4 });
            world.disk.limit_writes(None);
            world.checkpoint().expect("there is space again");
            world.check();
            world.checkpoint().expect("what came later");
            recover(&mut world.after_crash(Survives::Nothing), &format!("had {free} bytes free"));
        }
    }
    assert!(refused > 40, "refused only {refused} times");
}

/// A drain that ran out of space is done again from the start. Its first attempt has merged blocks in place that are
/// not synced: what rescues them must not be touched by the second, in which the power goes.
#[test]
fn power_may_be_cut_while_a_drain_that_found_no_space_is_repeated() {
    let before = [write(0, 0, 24), Step::Checkpoint];
    let after = [write(0, 9, 3), write(0, 17, 1), write(1, 0, 64)];
    let mut cuts = 0;
    for free in [20 * 512, 30 * 512, 40 * 512, 60 * 512] {
        for operations_in in 0..14 {
            for seed in 0..8 {
                let mut world = World::new(false);
                run(&mut world, &before);
                run(&mut world, &after);
                let space = world.disk.space().unwrap();
                world.disk.limit_writes(Some(space.total - space.available + free));
                world.checkpoint().expect_err("no space");
                world.disk.limit_writes(None);
                world.disk.cut_power_at(world.disk.operations() + operations_in);
                cuts += usize::from(world.checkpoint().is_err());
                let story = format!("{free} bytes free, then cut {operations_in} operations in, seed {seed}");
                recover(&mut world.after_crash(Survives::Some(seed)), &story);
            }
        }
    }
    assert!(cuts > 100, "cut only {cuts} times");
}
