//! Every crash the disk we assume may leave (`docs/log-format.md`): of the write that was going on, any sectors made
//! it, the others did not.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop, prop_oneof, proptest};

use super::{GROUPS, Model, Models, Op, apply, groups, held, looked_at, open, run, without_votes};
use crate::log::LogError;
use crate::log::format::{self, BATCH_HEADER, FILE_HEADER, FirstBlock};

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

pub type Image = BTreeMap<String, Vec<u8>>;

pub fn image(dir: &Path) -> Image {
    let mut image = Image::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "raftlog")
            // A spare too many may go at any moment.
            && let Ok(bytes) = std::fs::read(&path)
        {
            image.insert(path.file_name().unwrap().to_str().unwrap().to_owned(), bytes);
        }
    }
    image
}

fn restore(image: &Image) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in image {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// `before`, with those of the sectors that changed until `after` for which `made_it` says so. Also: all of them?
fn torn(before: &Image, after: &Image, mut made_it: impl FnMut() -> bool) -> (Image, bool) {
    let (mut torn, mut all) = (after.clone(), true);
    for (name, bytes) in &mut torn {
        let old = before.get(name).cloned().unwrap_or_else(|| vec![0; bytes.len()]);
        for (new, old) in bytes.chunks_mut(SECTOR).zip(old.chunks(SECTOR)) {
            if new != old && !made_it() {
                new.copy_from_slice(old);
                all = false;
            }
        }
    }
    (torn, all)
}

fn op() -> impl Strategy<Value = (u64, Op)> {
    let append = (0..6000_usize, prop_oneof![9 => Just(0_u64), 1 => 1..3_u64]);
    let op = prop_oneof![
        8 => append.prop_map(|(length, later)| Op::Append(length, later)),
        1 => any::<bool>().prop_map(Op::Vote),
        1 => (0..4_usize).prop_map(Op::Truncate),
        3 => (1..12_usize).prop_map(Op::Purge),
    ];
    (0..GROUPS, op)
}

/// A run of operations, cut by crashes: lives of a log.
fn lives() -> impl Strategy<Value = Vec<Vec<(u64, Op)>>> {
    prop::collection::vec(prop::collection::vec(op(), 1..40), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// In every life the last few operations go down together and are torn anyhow. What was durable before them is
    /// there, of them a prefix, and the next life goes on from it: nothing of the torn write comes back later.
    #[test]
    fn a_crash_leaves_what_was_durable_and_a_prefix_of_what_was_not(
        lives in lives(), seed: u64, burst in 1..4_usize,
    ) {
        let mut dir = tempfile::tempdir().unwrap();
        let mut state: Models = (0..GROUPS).map(|group| (group, Model::default())).collect();
        let mut random = seed;
        for life in lives {
            let (settled, torn_ops) = life.split_at(life.len().saturating_sub(burst));
            let (before, after, prefixes) = run(async {
                let log = open(dir.path()).await.unwrap();
                let mut group_logs = groups(&log).await;
                assert_eq!(held(&log).await, state, "a crash later");
                for (group, op) in settled {
                    apply(&mut group_logs[*group as usize], state.get_mut(group).unwrap(), op).await;
                }
                log.synced().await.unwrap();
                // The burst must not wait for a file: what was appended before it would go down, and be durable.
                while !log.core().has_spare() {
                    log.core().push_mark();
                    log.synced().await.unwrap();
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
                let before = image(dir.path());
                let mut prefixes = vec![state.clone()];
                for (group, op) in torn_ops {
                    // A vote waits for the disk, and everything before it then is durable.
                    if matches!(op, Op::Vote(_)) {
                        continue;
                    }
                    apply(&mut group_logs[*group as usize], state.get_mut(group).unwrap(), op).await;
                    prefixes.push(state.clone());
                }
                log.synced().await.unwrap();
                (before, image(dir.path()), prefixes)
            });
            let (crashed, all) = torn(&before, &after, || {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                random >> 62 != 0
            });
            let next = restore(&crashed);
            let looked_at = looked_at(next.path()).expect("as little as an open does");
            state = run(async {
                let log = open(next.path()).await.unwrap_or_else(|error| panic!("a crash never costs the log: {error}"));
                held(&log).await
            });
            assert!(prefixes.contains(&state), "{state:?} is none of {prefixes:?}");
            assert_eq!(looked_at, without_votes(&state), "looking finds what opening finds");
            assert!(!all || Some(&state) == prefixes.last(), "all of it made it");
            dir = next;
        }
    }

    /// A bit of something durable that turns over: the log says so and where, or the bit means nothing.
    #[test]
    fn damage_below_the_durable_mark_is_never_passed_over(
        ops in prop::collection::vec(op(), 20..60), place: prop::sample::Index, bit in 0..8_u32, clean: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut state: Models = (0..GROUPS).map(|group| (group, Model::default())).collect();
        run(async {
            let log = open(dir.path()).await.unwrap();
            let mut group_logs = groups(&log).await;
            for (group, op) in &ops {
                apply(&mut group_logs[*group as usize], state.get_mut(group).unwrap(), op).await;
                log.synced().await.unwrap();
            }
            if clean {
                // Vouches for the last write as well.
                log.close().await;
            }
        });
        let mut damaged = image(dir.path());
        let (name, used) = newest(&damaged);
        let last = *used.last().unwrap();
        if last == FILE_HEADER {
            // All of the file is one write, the last.
            return Ok(());
        }
        let at = place.index(last);
        damaged.get_mut(&name).unwrap()[at] ^= 1 << bit;
        let dir = restore(&damaged);
        let looked_at = looked_at(dir.path());
        run(async {
            match open(dir.path()).await {
                Err(LogError::Damaged { file, .. }) => assert!(file.starts_with(dir.path())),
                // The version is looked at before anything else.
                Err(LogError::NewerVersion { .. }) if (8..12).contains(&at) => {}
                Err(other) => panic!("{other}"),
                Ok(log) => {
                    assert_eq!(held(&log).await, state, "byte {at} of {used:?}");
                    assert_eq!(looked_at.expect("it opens"), without_votes(&state));
                    return;
                }
            }
            assert!(looked_at.is_err(), "opening refuses what looking does not");
        });
    }
}

/// The file written last, and where its batches begin and the last one ends; the last batch excluded, for nothing
/// vouches for it.
fn newest(image: &Image) -> (String, Vec<usize>) {
    let sequence = |bytes: &[u8]| match format::read_file_header(bytes) {
        FirstBlock::Header(header) => header.sequence,
        _ => 0,
    };
    let (name, bytes) = image.iter().max_by_key(|(_, bytes)| sequence(bytes)).unwrap();
    let mut starts = vec![FILE_HEADER];
    while let Some(header) = format::read_batch_header(&bytes[*starts.last().unwrap()..])
        && header.at.sequence == sequence(bytes)
    {
        let next = starts.last().unwrap() + format::blocks(BATCH_HEADER + header.length as usize);
        if next >= bytes.len() {
            break;
        }
        starts.push(next);
    }
    starts.pop();
    (name.clone(), starts)
}

#[test]
fn a_missing_file_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let log = open(dir.path()).await.unwrap();
        let mut group_logs = groups(&log).await;
        let mut model = Model::default();
        for _ in 0..60 {
            apply(&mut group_logs[0], &mut model, &Op::Append(4000, 0)).await;
        }
        log.close().await;
    });
    let whole = image(dir.path());
    assert!(whole.len() >= 4, "{:?}", whole.keys());
    let begun = |bytes: &[u8]| matches!(format::read_file_header(bytes), FirstBlock::Header(_));
    for missing in whole.iter().filter(|(_, bytes)| begun(bytes)).map(|(name, _)| name) {
        let mut image = whole.clone();
        image.remove(missing);
        let dir = restore(&image);
        let opened = run(open(dir.path())).map(|log| log.groups());
        // Without the newest there is nothing that could tell.
        if *missing != newest(&whole).0 {
            assert!(matches!(opened, Err(LogError::Damaged { .. })), "{missing}: {opened:?}");
        }
    }
}
