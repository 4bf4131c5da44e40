//! The bytes of version 1. They must not change: logs written by it are out there.

use openraft::entry::RaftEntry;
use openraft::storage::RaftLogStorage;
use openraft::{AsyncRuntime, EntryPayload};

use super::{Model, Op, apply, groups, held, open, run};
use crate::log::Log;
use crate::runtime::LocalRt;
use crate::types::{Entry, IoFlushed, log_id};
use crate::{GroupId, Position, ReplicaId};

/// The used part of a file that [`write`] wrote when version 1 was made.
const VERSION_1: &[u8] = include_bytes!("golden/version-1.log");
const USED: usize = VERSION_1.len();

/// One record of every kind.
async fn write(log: &Log) -> Model {
    let mut group = groups(log).await.remove(0);
    let mut model = Model::default();
    for op in [
        Op::Vote(false),
        Op::Append(10, 0),
        Op::Append(5000, 1),
        Op::Vote(true),
        Op::Append(0, 0),
        Op::Truncate(1),
        Op::Append(300, 1),
        Op::Purge(1),
    ] {
        apply(&mut group, &mut model, &op).await;
        log.synced().await.expect("durable");
    }
    let mut other = log.group(GroupId(1), ReplicaId(101)).await.expect("a group");
    let blank = Entry::new(log_id(Position { term: 1, index: 0 }), EntryPayload::Blank);
    other.append([blank], IoFlushed::noop()).await.expect("appended");
    log.synced().await.expect("durable");
    log.remove_group(GroupId(1)).await.expect("removed");
    log.remove_group(GroupId(2)).await.expect("removed");
    log.close().await;
    model
}

#[test]
fn version_1_is_still_written_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    run(async { write(&open(dir.path()).await.expect("a log")).await });
    let written = std::fs::read(dir.path().join("0001.raftlog")).unwrap();
    assert!(written[USED..].iter().all(|&byte| byte == 0), "more than there was");
    if let Some(at) = (0..USED).find(|&at| written[at] != VERSION_1[at]) {
        panic!("byte {at} is {:#04x} and was {:#04x}", written[at], VERSION_1[at]);
    }
}

#[test]
fn version_1_is_still_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = VERSION_1.to_vec();
    file.resize(64 << 10, 0);
    std::fs::write(dir.path().join("0001.raftlog"), file).unwrap();
    let found = LocalRt::new(1).block_on(async { held(&open(dir.path()).await.expect("a log")).await });
    let other = tempfile::tempdir().unwrap();
    let model = run(async { write(&open(other.path()).await.expect("a log")).await });
    assert_eq!(found.into_iter().collect::<Vec<_>>(), [(0, model)]);
}

/// Made the golden file. Only a new version gets a new one, beside the old.
#[test]
#[ignore = "writes src/log/tests/golden/new.log"]
fn write_golden() {
    let dir = tempfile::tempdir().unwrap();
    run(async { write(&open(dir.path()).await.expect("a log")).await });
    let mut written = std::fs::read(dir.path().join("0001.raftlog")).unwrap();
    let used = written.iter().rposition(|&byte| byte != 0).unwrap().next_multiple_of(4096);
    written.truncate(used);
    std::fs::write("src/log/tests/golden/new.log", written).unwrap();
}
