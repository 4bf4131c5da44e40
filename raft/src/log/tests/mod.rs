//! The log against a model of it: what was told durable is there after any crash, and damage is never passed over.

#![expect(clippy::cast_possible_truncation, reason = "small numbers of tests")]

mod crash;
mod failing;
mod golden;
mod suite;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use openraft::async_runtime::Oneshot;
use openraft::entry::RaftEntry;
use openraft::storage::{RaftLogReader, RaftLogStorage};
use openraft::{AsyncRuntime, EntryPayload};

use super::file::LogFile;
use super::{GroupLog, Log, LogError, LogOptions, LogOwner, OfflineLog, recover};
use crate::machine::{Applying, Restored, StateMachine};
use crate::runtime::LocalRt;
use crate::types::{Entry, IoFlushed, Vote, log_id, position};
use crate::{Command, GroupId, Position, ProcessId, ReplicaId};

const OWNER: LogOwner = LogOwner { cluster: [5; 16], process: ProcessId(7) };
const GROUPS: u64 = 3;

fn options() -> LogOptions {
    LogOptions { file_bytes: 64 << 10, memory_bytes_max: 4000, ..LogOptions::new(OWNER) }
}

fn run<F: Future>(future: F) -> F::Output {
    LocalRt::new(1).block_on(future)
}

/// What one group's log is to hold.
#[derive(Debug, Clone, PartialEq, Default)]
struct Model {
    vote: Option<Vote>,
    purged: Option<Position>,
    entries: Vec<(Position, Vec<u8>)>,
}

type Models = BTreeMap<u64, Model>;

impl Model {
    fn next(&self) -> u64 {
        let last = self.entries.last().map(|entry| entry.0).or(self.purged);
        last.map_or(0, |last| last.index + 1)
    }

    fn term(&self) -> u64 {
        let last = self.entries.last().map(|entry| entry.0).or(self.purged);
        last.map_or(1, |last| last.term)
    }
}

/// One thing done to a log.
#[derive(Debug, Clone)]
enum Op {
    /// This many bytes, in a term this much later.
    Append(usize, u64),
    Vote(bool),
    /// Drops this many of the last entries.
    Truncate(usize),
    /// Drops this many of the first entries.
    Purge(usize),
}

async fn groups(log: &Log) -> Vec<GroupLog> {
    let mut groups = Vec::new();
    for group in 0..GROUPS {
        groups.push(log.group(GroupId(group), ReplicaId(100 + group)).await.expect("a group"));
    }
    log.synced().await.expect("durable");
    groups
}

fn entry(at: Position, bytes: Vec<u8>) -> Entry {
    // In two parts, as commands are.
    let bytes = Bytes::from(bytes);
    let command: Command =
        [bytes.slice(..bytes.len() / 2), bytes.slice(bytes.len() / 2..)].into_iter().collect();
    Entry::new(log_id(at), EntryPayload::Normal(command))
}

/// Does `op` to the log and to the model, without waiting for the disk.
async fn apply(group: &mut GroupLog, model: &mut Model, op: &Op) {
    match *op {
        Op::Append(length, later) => {
            let at = Position { term: model.term() + later, index: model.next() };
            let bytes: Vec<u8> = (0..length).map(|n| (at.index as usize * 31 + n).to_le_bytes()[0]).collect();
            group.append([entry(at, bytes.clone())], IoFlushed::noop()).await.expect("appended");
            model.entries.push((at, bytes));
        }
        Op::Vote(committed) => {
            let term = model.vote.map_or(1, |vote| vote.leader_id.term + 1);
            let vote = if committed { Vote::new_committed(term, 3) } else { Vote::new(term, 4) };
            group.save_vote(&vote).await.expect("saved");
            model.vote = Some(vote);
        }
        Op::Truncate(count) => {
            let keep = model.entries.len() - count.min(model.entries.len());
            let last = match keep {
                0 => model.purged,
                keep => Some(model.entries[keep - 1].0),
            };
            group.truncate_after(last.map(log_id)).await.expect("truncated");
            model.entries.truncate(keep);
        }
        Op::Purge(count) => {
            let count = count.min(model.entries.len());
            if count > 0 {
                let upto = model.entries[count - 1].0;
                group.purge(log_id(upto)).await.expect("purged");
                model.purged = Some(upto);
                model.entries.drain(..count);
            }
        }
    }
}

/// What a log holds.
async fn held(log: &Log) -> Models {
    let mut all = Models::new();
    for group in log.groups() {
        let replica = log.replica(group).expect("known");
        let mut group_log = log.group(group, replica).await.expect("a group");
        let mut model = Model {
            vote: group_log.read_vote().await.expect("read"),
            purged: group_log.bounds().0,
            entries: Vec::new(),
        };
        for entry in group_log.try_get_log_entries(..).await.expect("read") {
            let EntryPayload::Normal(command) = &entry.payload else { panic!("{entry:?}") };
            let bytes = command.clone().into_cursor().take(command.len()).expect("all of it");
            model.entries.push((position(&entry.log_id()), bytes.to_vec()));
        }
        all.insert(group.0, model);
    }
    all
}

/// An owner that writes down what it is told to apply.
struct Told {
    restored: Restored,
    entries: Vec<(Position, Vec<u8>)>,
}

impl StateMachine for Told {
    fn restored(&self) -> Restored {
        self.restored.clone()
    }

    fn apply(&mut self, at: Position, what: Applying) -> Bytes {
        let Applying::Command(command) = what else { panic!("{what:?}") };
        let length = command.len();
        self.entries.push((at, command.into_cursor().take(length).expect("all of it").to_vec()));
        Bytes::new()
    }
}

/// What a log is found to hold that is only looked at: of votes, the terms. It stays as it is.
fn looked_at(dir: &Path) -> Result<BTreeMap<u64, (Option<u64>, Model)>, LogError> {
    let before = crash::image(dir);
    let opened = OfflineLog::open(dir, OWNER);
    let log = opened.inspect_err(|_| assert_eq!(crash::image(dir), before))?;
    let mut all = BTreeMap::new();
    for id in 0..GROUPS {
        let Some(group) = log.group(GroupId(id)) else { continue };
        let restored = Restored { applied: group.purged, membership: None };
        let mut told = Told { restored, entries: Vec::new() };
        log.replay(GroupId(id), group.replica, &mut told).expect("nothing is missing");
        assert_eq!(group.last, told.entries.last().map(|entry| entry.0).or(group.purged));
        all.insert(id, (group.term, Model { vote: None, purged: group.purged, entries: told.entries }));
    }
    assert_eq!(crash::image(dir), before);
    Ok(all)
}

/// The same of what a log holds that runs.
fn without_votes(models: &Models) -> BTreeMap<u64, (Option<u64>, Model)> {
    let of =
        |model: &Model| (model.vote.map(|vote| vote.leader_id.term), Model { vote: None, ..model.clone() });
    models.iter().map(|(group, model)| (*group, of(model))).collect()
}

async fn open(dir: &Path) -> Result<Log, LogError> {
    Log::open(dir, options()).await
}

#[test]
fn somebody_else_s_log_is_refused_and_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let log = open(dir.path()).await.unwrap();
        groups(&log).await;
        assert!(matches!(open(dir.path()).await, Err(LogError::InUse { .. })), "two at a time");
        log.close().await;
    });
    let bytes = || std::fs::read(dir.path().join("0001.raftlog")).unwrap();
    let before = bytes();
    for owner in [LogOwner { cluster: [6; 16], ..OWNER }, LogOwner { process: ProcessId(8), ..OWNER }] {
        let opened = run(Log::open(dir.path(), LogOptions { owner, ..options() }));
        assert!(matches!(opened, Err(LogError::WrongOwner { found: OWNER, .. })));
    }
    let mut newer = before.clone();
    newer[8] = 9;
    std::fs::write(dir.path().join("0001.raftlog"), &newer).unwrap();
    assert!(matches!(run(open(dir.path())), Err(LogError::NewerVersion { found: 9, known: 1, .. })));
    assert_eq!(bytes(), newer);
    std::fs::write(dir.path().join("0001.raftlog"), &before).unwrap();
    run(async { assert_eq!(open(dir.path()).await.unwrap().groups().len(), 3) });
}

#[test]
fn a_group_has_one_replica_here_until_it_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let log = open(dir.path()).await.unwrap();
        let mut group = log.group(GroupId(1), ReplicaId(5)).await.unwrap();
        group.save_vote(&Vote::new(3, 5)).await.unwrap();
        let other = log.group(GroupId(1), ReplicaId(6)).await;
        assert!(matches!(other, Err(LogError::OtherReplica { found: ReplicaId(5), .. })));
        log.remove_group(GroupId(1)).await.unwrap();
    });
    run(async {
        let log = open(dir.path()).await.unwrap();
        assert_eq!(log.groups(), []);
        let mut group = log.group(GroupId(1), ReplicaId(6)).await.unwrap();
        assert_eq!(group.read_vote().await.unwrap(), None);
    });
}

#[test]
fn old_entries_are_read_back_from_the_files_and_memory_stays_bounded() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let log = open(dir.path()).await.unwrap();
        let mut groups = groups(&log).await;
        let mut models = vec![Model::default(); groups.len()];
        for round in 0..120 {
            let at = round % groups.len();
            apply(&mut groups[at], &mut models[at], &Op::Append(1000 + round, 0)).await;
        }
        log.synced().await.unwrap();
        assert!(log.usage().memory_bytes <= options().memory_bytes_max, "{:?}", log.usage());
        for (group, model) in models.into_iter().enumerate() {
            assert_eq!(held(&log).await[&(group as u64)], model);
        }
        // A reader that wants little gets little, and at least one.
        assert_eq!(groups[0].limited_get_log_entries(0, 1).await.unwrap().len(), 1);
    });
}

#[test]
fn an_append_is_told_durable_when_it_is() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let log = open(dir.path()).await.unwrap();
        let mut group = groups(&log).await.remove(0);
        let (tell, told) = <LocalRt as AsyncRuntime>::Oneshot::channel();
        let at = Position { term: 1, index: 0 };
        group.append([entry(at, vec![1; 100])], IoFlushed::signal(tell)).await.unwrap();
        assert_eq!((group.bounds().1, group.durable()), (Some(at), None));
        told.await.unwrap().unwrap();
        assert_eq!(group.durable(), Some(0));
    });
}

/// To make a file is as much writing as to fill it: those that a checkpoint sets free are used again.
#[test]
fn files_are_made_once_for_as_many_as_are_needed_at_a_time_and_go_when_they_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let newest_name = || {
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        names.filter_map(|path| recover::file_number(&path)).max().unwrap()
    };
    run(async {
        let log = open(dir.path()).await.unwrap();
        let mut group = groups(&log).await.remove(0);
        let mut model = Model::default();
        let mut after_first = None;
        for _ in 0..8 {
            while log.usage().live_bytes < 8 * options().file_bytes {
                apply(&mut group, &mut model, &Op::Append(5000, 0)).await;
                log.synced().await.unwrap();
            }
            apply(&mut group, &mut model, &Op::Purge(usize::MAX)).await;
            // Says that they are free.
            apply(&mut group, &mut model, &Op::Append(100, 0)).await;
            log.synced().await.unwrap();
            assert!(log.usage().live_bytes <= 2 * options().file_bytes, "{:?}", log.usage());
            // One may be in the making when others come free.
            let most = *after_first.get_or_insert_with(newest_name) + 1;
            assert!(newest_name() <= most, "{} files were made, not {most}", newest_name());
        }
        let spares = (log.usage().file_bytes - log.usage().live_bytes) / options().file_bytes;
        assert!(spares > 5, "{:?}", log.usage());
        let after = |seconds| Instant::now() + Duration::from_secs(seconds);
        assert_eq!(log.core().surplus(after(40)).len(), 0, "they were needed until now");
        assert_eq!(log.core().surplus(after(80)).len() as u64, spares - 2);
    });
}

/// A log that was cut short leaves any number of files that nobody needs.
#[test]
fn spare_files_that_are_found_at_the_start_go_but_for_two() {
    let dir = tempfile::tempdir().unwrap();
    for number in 1..=22 {
        LogFile::create(recover::file_name(dir.path(), number), options().file_bytes).unwrap();
    }
    run(async {
        let log = open(dir.path()).await.unwrap();
        let spares = || (log.usage().file_bytes - log.usage().live_bytes) / options().file_bytes;
        assert_eq!(spares(), 16);
        log.core().surplus(Instant::now() + Duration::from_secs(40));
        assert_eq!(spares(), 2);
    });
}

/// A crash in the midst of installing a raft snapshot may be found much later, when the file that said so is long gone.
#[test]
fn what_is_being_installed_is_remembered_however_far_the_log_goes() {
    let dir = tempfile::tempdir().unwrap();
    let at = Position { term: 9, index: 900 };
    let mut busy = Model::default();
    for life in 0..4 {
        run(async {
            let log = open(dir.path()).await.unwrap();
            let mut groups = groups(&log).await;
            match life {
                0 => groups[0].set_installing(at).await.unwrap(),
                1 => assert_eq!(groups[0].installing(), Some(at)),
                2 => groups[0].purge(log_id(at)).await.unwrap(),
                _ => {
                    assert_eq!(groups[0].installing(), None);
                    assert_eq!(groups[0].bounds(), (Some(at), Some(at)));
                }
            }
            // Through every file, several times.
            for _ in 0..200 {
                apply(&mut groups[1], &mut busy, &Op::Append(3000, 0)).await;
                apply(&mut groups[1], &mut busy, &Op::Purge(1)).await;
                log.synced().await.unwrap();
            }
            assert!(
                log.usage().live_bytes <= 3 * options().file_bytes,
                "the first file is gone: {:?}",
                log.usage()
            );
        });
    }
}
