//! openraft's own storage suite over our log, on real files.
//!
//! Its tests of a state machine want one that can be asked for a snapshot at any moment and be given another's. Ours
//! has no data to give; [`Obliging`] fills that in around it, and leaves applying to the real one.

use std::cell::Cell;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{AsyncRuntime, OptionalSend, StorageError};

use crate::group::no_membership;
use crate::intake::Intake;
use crate::log::{GroupLog, Log, LogOptions, LogOwner};
use crate::machine::{Applying, Machine, Restored, SnapshotData, StateMachine};
use crate::runtime::LocalRt;
use crate::state::{Bounds, State};
use crate::types::{LogId, Snapshot, SnapshotMeta, StoredMembership, Types, position};
use crate::{GroupId, Member, Position, ProcessId, ReplicaId};

struct Nothing;

impl StateMachine for Nothing {
    fn restored(&self) -> Restored {
        Restored::default()
    }

    fn apply(&mut self, _at: Position, _what: Applying) -> Bytes {
        Bytes::new()
    }
}

struct Obliging(Machine, Rc<State>);

struct Now(SnapshotMeta);

impl RaftSnapshotBuilder<Types> for Now {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        Ok(Snapshot { meta: self.0.clone(), snapshot: SnapshotData::Position })
    }
}

impl RaftStateMachine<Types> for Obliging {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Now;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        self.0.applied_state().await
    }

    async fn apply<S>(&mut self, entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        self.0.apply(entries).await
    }

    async fn get_snapshot_builder(&mut self) -> Now {
        let (last_log_id, last_membership) = self.0.applied_state().await.expect("never fails");
        let meta = SnapshotMeta { last_log_id, last_membership };
        *self.1.checkpointed.borrow_mut() = meta.clone();
        Now(meta)
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        _snapshot: SnapshotData,
    ) -> Result<(), io::Error> {
        *self.1.checkpointed.borrow_mut() = meta.clone();
        self.1.applied.set(meta.last_log_id.as_ref().map(position));
        self.0 = Machine::new(Box::new(Nothing), self.1.clone(), meta.last_membership.clone());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        self.0.get_current_snapshot().await
    }
}

/// A new group of a new log for every test. Small files, and hardly an entry in memory: the suite reads back much.
struct Builder {
    base: PathBuf,
    io_uring: bool,
    groups: AtomicU64,
}

impl StoreBuilder<Types, GroupLog, Obliging, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, GroupLog, Obliging), StorageError<Types>> {
        let dir = tempfile::tempdir_in(&self.base).expect("a directory");
        let me = Member { replica: ReplicaId(0), process: ProcessId(1) };
        let options = LogOptions {
            file_bytes: 64 << 10,
            memory_bytes_max: 1000,
            io_uring: self.io_uring,
            ..LogOptions::new(LogOwner { cluster: [1; 16], process: me.process })
        };
        let log = Log::open(dir.path(), options).await.expect("a log");
        let group = GroupId(self.groups.fetch_add(1, Ordering::Relaxed));
        let intake = Intake::new(log.clone());
        let log = log.group(group, me.replica).await.expect("a group");
        let meta = SnapshotMeta { last_log_id: None, last_membership: no_membership() };
        let second = Duration::from_secs(1);
        let bounds =
            Bounds { command_bytes_max: 4096, election_max: second, lately: second, retain_bytes: u64::MAX };
        let state = State::new(group, me, None, meta, bounds, intake, Rc::new(Cell::new(true)));
        let machine = Machine::new(Box::new(Nothing), state.clone(), no_membership());
        Ok((dir, log, Obliging(machine, state)))
    }
}

#[test]
fn openraft_accepts_it_as_a_log() {
    // On a disk by io_uring and by the thread, and in memory.
    for (base, io_uring) in
        [(std::env::temp_dir(), true), (std::env::temp_dir(), false), ("/dev/shm".into(), true)]
    {
        let shown = base.display().to_string();
        let builder = Builder { base, io_uring, groups: AtomicU64::default() };
        let outcome = LocalRt::new(1).block_on(Suite::test_all(builder));
        outcome.unwrap_or_else(|error| panic!("in {shown}, io_uring {io_uring}: {error}"));
    }
}
