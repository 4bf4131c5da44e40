//! What the chunk store relies on of a disk, checked over the real one and over the one that crash tests use; what is
//! said of files, also over the one that is only looked at.

use std::io::{ErrorKind, IoSlice};
use std::path::Path;
use std::sync::Arc;

use evolute_chunkserver::disk::crash::{Crash, Survives};
use evolute_chunkserver::disk::direct::Direct;
use evolute_chunkserver::disk::read_only::ReadOnly;
use evolute_chunkserver::disk::{Disk, File};

fn on_both(contract: impl Fn(&dyn Disk)) {
    let dir = tempfile::tempdir().unwrap();
    contract(&Direct::new(dir.path()));
    contract(&Crash::new());
}

fn on_all(contract: impl Fn(&dyn Disk)) {
    on_both(&contract);
    let dir = tempfile::tempdir().unwrap();
    contract(&ReadOnly::new(dir.path()));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "it is only looked at");
}

fn path(text: &str) -> &Path {
    Path::new(text)
}

fn read(file: &Arc<dyn File>, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    file.read(&mut data, offset).unwrap();
    let mut cached = vec![0xdd; len];
    if file.read_cached(&mut cached, offset).unwrap() {
        assert_eq!(cached, data, "both ways of reading see the same");
    }
    data
}

#[test]
fn what_was_written_is_read_and_the_rest_is_zeroes() {
    on_all(|disk| {
        let file = disk.create(path("file")).unwrap();
        assert_eq!(read(&file, 0, 1024), [0; 1024], "nothing was written");
        let (a, b) = ([1; 512], [2; 1024]);
        file.write(&mut [IoSlice::new(&a), IoSlice::new(&b)], 4096).unwrap();
        let expected = [vec![0; 512], vec![1; 512], vec![2; 1024], vec![0; 512]].concat();
        assert_eq!(read(&file, 3584, 2560), expected, "also past the end");
        file.sync().unwrap();
        let again = disk.open(path("file")).unwrap();
        assert_eq!(read(&again, 3584, 2560), expected);
    });
}

#[test]
fn more_parts_than_one_call_takes_are_all_written() {
    on_all(|disk| {
        let file = disk.create(path("file")).unwrap();
        let sectors: Vec<[u8; 512]> = (0..3000_u32).map(|n| [n.to_le_bytes()[0]; 512]).collect();
        let mut parts: Vec<_> = sectors.iter().map(|sector| IoSlice::new(sector)).collect();
        file.write(&mut parts, 512).unwrap();
        assert_eq!(read(&file, 512, 3000 * 512), sectors.concat());
    });
}

#[test]
fn a_punched_range_reads_as_zeroes() {
    on_all(|disk| {
        let file = disk.create(path("file")).unwrap();
        file.write(&mut [IoSlice::new(&[7; 16384])], 0).unwrap();
        file.punch(4096, 8192).unwrap();
        assert_eq!(read(&file, 0, 16384), [vec![7; 4096], vec![0; 8192], vec![7; 4096]].concat());
        file.punch(1 << 20, 4096).unwrap();
        assert_eq!(read(&file, 1 << 20, 512), [0; 512]);
    });
}

#[test]
fn names_are_created_once_and_listed_until_removed() {
    on_both(|disk| {
        assert_eq!(disk.open(path("a/b")).err().unwrap().kind(), ErrorKind::NotFound);
        assert_eq!(disk.create(path("a/b")).err().unwrap().kind(), ErrorKind::NotFound);
        disk.create_dir(path("a")).unwrap();
        disk.create_dir(path("a")).unwrap();
        disk.create(path("a/b")).unwrap();
        assert_eq!(disk.create(path("a/b")).err().unwrap().kind(), ErrorKind::AlreadyExists);
        disk.sync_dir(path("a")).unwrap();
        disk.sync_dir(path("")).unwrap();
        assert_eq!(disk.list(path("a")).unwrap(), ["b"]);
        assert_eq!(disk.remove_dir(path("a")).unwrap_err().kind(), ErrorKind::DirectoryNotEmpty);
        let open = disk.open(path("a/b")).unwrap();
        disk.remove(path("a/b")).unwrap();
        assert_eq!(disk.remove(path("a/b")).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(read(&open, 0, 512), [0; 512], "a reader keeps what it has open");
        assert!(disk.list(path("a")).unwrap().is_empty());
        disk.remove_dir(path("a")).unwrap();
        assert!(disk.list(path("a")).is_err());
    });
}

#[test]
fn a_removed_and_recreated_file_is_a_new_one() {
    on_all(|disk| {
        let old = disk.create(path("file")).unwrap();
        old.write(&mut [IoSlice::new(&[1; 512])], 0).unwrap();
        disk.remove(path("file")).unwrap();
        let new = disk.create(path("file")).unwrap();
        assert_eq!(read(&new, 0, 512), [0; 512]);
        assert_eq!(read(&old, 0, 512), [1; 512]);
    });
}

#[test]
fn free_space_is_told() {
    on_all(|disk| {
        let space = disk.space().unwrap();
        assert!(space.available <= space.total && space.total > 0, "{space:?}");
    });
}

#[test]
fn what_is_only_looked_at_changes_in_memory_alone() {
    let dir = tempfile::tempdir().unwrap();
    let before = [vec![1; 512], vec![2; 512], vec![3; 512]].concat();
    std::fs::write(dir.path().join("there"), &before).unwrap();
    let disk = ReadOnly::new(dir.path());
    let file = disk.open(path("there")).unwrap();
    file.write(&mut [IoSlice::new(&[8; 300]), IoSlice::new(&[9; 212])], 512).unwrap();
    file.punch(0, 512).unwrap();
    let now = [vec![0; 512], vec![8; 300], vec![9; 212], vec![3; 512], vec![0; 512]].concat();
    assert!(read(&file, 0, 2048) == now);
    // It is the file's, not that of who has it open.
    assert_eq!(read(&disk.open(path("there")).unwrap(), 512, 512), now[512..1024]);
    disk.create(path("new")).unwrap().write(&mut [IoSlice::new(&[5; 512])], 512).unwrap();
    for taken in ["new", "there"] {
        assert_eq!(disk.create(path(taken)).err().unwrap().kind(), ErrorKind::AlreadyExists);
    }
    assert_eq!(read(&disk.open(path("new")).unwrap(), 0, 1024), [[0; 512], [5; 512]].concat());
    disk.remove(path("there")).unwrap();
    for missing in ["there", "nowhere"] {
        assert_eq!(disk.open(path(missing)).err().unwrap().kind(), ErrorKind::NotFound);
        assert_eq!(disk.remove(path(missing)).unwrap_err().kind(), ErrorKind::NotFound);
    }
    assert_eq!(disk.list(path("")).unwrap(), ["new"]);
    assert_eq!(read(&disk.create(path("there")).unwrap(), 0, 512), [0; 512], "another file");
    assert_eq!(disk.list(path("")).unwrap().len(), 2);
    assert_eq!(std::fs::read(dir.path().join("there")).unwrap(), before);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// The crash disk must be able to lose things, or the tests over it prove nothing.
#[test]
fn a_crash_may_lose_whatever_was_not_synced() {
    let disk = Crash::new();
    let file = disk.create(path("file")).unwrap();
    file.write(&mut [IoSlice::new(&[1; 4096])], 0).unwrap();
    file.sync().unwrap();
    assert!(disk.after_crash(Survives::Nothing).open(path("file")).is_err(), "its name was not synced");
    disk.sync_dir(path("")).unwrap();
    file.write(&mut [IoSlice::new(&[2; 4096])], 0).unwrap();
    let found = |survives| read(&disk.after_crash(survives).open(path("file")).unwrap(), 0, 4096);
    assert_eq!(found(Survives::Nothing), [1; 4096]);
    assert_eq!(found(Survives::Everything), [2; 4096]);
    let torn = (0..20).map(|seed| found(Survives::Some(seed))).filter(|b| b.contains(&1) && b.contains(&2));
    assert!(torn.count() > 10, "blocks are torn between sectors");
    disk.remove(path("file")).unwrap();
    assert!(disk.after_crash(Survives::Nothing).open(path("file")).is_ok(), "a removal may be undone");
}

#[test]
fn after_a_failed_sync_the_bytes_are_lost_and_called_clean() {
    let disk = Crash::new();
    let file = disk.create(path("file")).unwrap();
    disk.sync_dir(path("")).unwrap();
    file.write(&mut [IoSlice::new(&[1; 512])], 0).unwrap();
    disk.fail_sync_after(0);
    assert!(file.sync().is_err());
    assert_eq!(read(&file, 0, 512), [1; 512], "readers still see them");
    file.sync().expect("the next sync knows of nothing to do");
    let found = disk.after_crash(Survives::Everything);
    assert_eq!(read(&found.open(path("file")).unwrap(), 0, 512), [0; 512]);
}

#[test]
fn a_full_disk_says_so() {
    let disk = Crash::new();
    disk.limit(Some(4096));
    let file = disk.create(path("file")).unwrap();
    let error = file.write(&mut [IoSlice::new(&[1; 8192])], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    file.punch(0, 8192).unwrap();
    file.write(&mut [IoSlice::new(&[1; 4096])], 0).unwrap();
}
