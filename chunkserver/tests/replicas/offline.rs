//! A chunkserver's files say what it stores, without it, and stay as they are.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use evolute_chunkserver::data_dir::DataDirError;
use evolute_chunkserver::inspect::{InspectError, Inspection, inspect};

use crate::cluster::{COPYSET, Cluster};
use crate::{FIRST, Model, VOLUME, damage};

/// Names, bytes and times of everything in a directory.
fn everything(dir: &Path) -> BTreeMap<PathBuf, (Option<Vec<u8>>, SystemTime)> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).expect("listed") {
            let (path, kind) = entry.map(|e| (e.path(), e.file_type().expect("a kind"))).expect("listed");
            let bytes = kind.is_file().then(|| std::fs::read(&path).expect("read"));
            if kind.is_dir() {
                dirs.push(path.clone());
            }
            let changed = std::fs::metadata(&path).and_then(|file| file.modified()).expect("a time");
            found.insert(path, (bytes, changed));
        }
    }
    found
}

fn look(dir: &Path, export: Option<&Path>) -> Result<Inspection, InspectError> {
    let before = dir.exists().then(|| everything(dir));
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let seen = runtime.block_on(inspect(dir, export));
    assert!(before.is_none_or(|before| before == everything(dir)), "looking changed something");
    seen
}

fn exported(seen: &Inspection, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    let file = std::fs::File::open(&seen.exports[&VOLUME.0]).expect("exported");
    file.read_exact_at(&mut data, 0).expect("a whole chunk");
    assert_eq!(file.metadata().expect("there").len(), 16 << 20);
    data
}

fn bytes_of(model: &Model) -> Vec<u8> {
    model.blocks.iter().flat_map(|byte| [*byte; 4096]).collect()
}

/// Nothing of it has reached a chunk file: everything acknowledged is found in the log of each replica.
#[test]
fn what_is_only_in_the_log_is_found_there() {
    let mut cluster = Cluster::without_checkpoints(3);
    let mut client = cluster.client(1);
    client.fence(VOLUME, FIRST);
    let mut model = Model::new(100);
    (0..200).for_each(|n| model.write(&mut client, n * 7 % 100));
    client.discard(4096 * 20, 4096 * 30, 100_000);
    model.blocks[20..50].fill(0);
    cluster.until("every follower has it", || {
        let applied = |n| cluster.replica(n).and_then(|replica| replica.status.applied);
        applied(1).is_some() && applied(1) == applied(2) && applied(1) == applied(3)
    });
    // The leader last: the others would elect one, with an entry that it lacks.
    (1..=3).rev().for_each(|n| cluster.stop(n));
    let mut ends = Vec::new();
    for n in 1..=3 {
        let out = tempfile::tempdir().expect("temp dir");
        let seen = look(cluster.dir(n), Some(&out.path().join("new"))).expect("a stopped chunkserver");
        assert!(seen.is_sound() && seen.chunkserver == n && seen.removed.is_empty(), "{seen:?}");
        let [replica] = &seen.replicas[..] else { panic!("{seen:?}") };
        assert_eq!((replica.copyset, replica.replica), (COPYSET.0, 10 + u64::from(n)));
        assert_eq!(replica.members.len(), 3);
        assert!(replica.checkpointed.is_none_or(|at| at.index < 10), "{seen:?}");
        assert_eq!(replica.chunks.iter().map(|chunk| chunk.blocks).sum::<usize>(), 70);
        assert!(exported(&seen, 100 * 4096) == bytes_of(&model), "chunkserver {n} holds something else");
        ends.push(replica.last.expect("a log"));
        // What was exported before is nobody's to write over.
        let again = look(cluster.dir(n), Some(&out.path().join("new")));
        assert!(matches!(again, Err(InspectError::Export { .. })), "{again:?}");
    }
    assert!(ends.iter().all(|end| *end == ends[0] && end.index > 200), "{ends:?}");
    (1..=3).for_each(|n| cluster.start_again(n));
    cluster.lead(2, 12);
    let mut client = cluster.client(2);
    client.epoch = FIRST;
    model.check(&mut client);
}

/// One byte of one block has changed: that block is named, and its export says so; all others are as they were.
#[test]
fn a_block_that_rotted_is_named_and_never_exported_as_zeroes() {
    let mut cluster = Cluster::start(3);
    let (_client, model) = damage::filled(&cluster);
    cluster.stop(2);
    let file = std::fs::File::options().write(true).open(&cluster.files(2)[0]).expect("a chunk file");
    file.write_all_at(&[model.blocks[17] ^ 1], damage::DATA_AT + 17 * 4096 + 5).expect("rotted");
    let out = tempfile::tempdir().expect("temp dir");
    let seen = look(cluster.dir(2), Some(out.path())).expect("a stopped chunkserver");
    assert!(!seen.is_sound());
    assert_eq!(seen.replicas[0].chunks[0].unreadable, [17]);
    assert!(seen.words().contains("UNREADABLE: volume 5, chunk 0, blocks [17]"), "{}", seen.words());
    let (data, mut wanted) = (exported(&seen, damage::BLOCKS * 4096), bytes_of(&model));
    let instead = &data[17 * 4096..18 * 4096];
    assert!(instead.starts_with(b"evolute: block cannot be read."));
    wanted[17 * 4096..18 * 4096].copy_from_slice(instead);
    assert!(data == wanted, "other blocks changed");
}

#[test]
fn a_directory_in_use_or_not_ours_is_refused_and_left_alone() {
    let cluster = Cluster::start(3);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let in_use = runtime.block_on(inspect(cluster.dir(1), None));
    assert!(matches!(in_use, Err(InspectError::DataDir(DataDirError::InUse(_)))), "{in_use:?}");
    let empty = tempfile::tempdir().expect("temp dir");
    let not_one = look(empty.path(), None);
    assert!(matches!(not_one, Err(InspectError::DataDir(DataDirError::NotOne(_)))), "{not_one:?}");
    assert!(look(&empty.path().join("missing"), None).is_err());
    // One that was stopped before it had a store.
    std::fs::write(empty.path().join("lock"), "").expect("written");
    assert!(matches!(look(empty.path(), None), Err(InspectError::Store(_))));
    let inside = look(empty.path(), Some(&empty.path().join("a/b")));
    assert!(matches!(inside, Err(InspectError::ExportInside(_))), "{inside:?}");
}
