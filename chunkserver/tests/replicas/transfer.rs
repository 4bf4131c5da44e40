//! The frames of a replica's transfer: what they bring is what was sent, and anything else is refused.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use evolute_chunkserver::chunk_store::{ChunkStore, Identity, StoreOptions};
use evolute_chunkserver::copyset::apply::Replica;
use evolute_chunkserver::copyset::command::{Change, CommandBuilder};
use evolute_chunkserver::copyset::state::{Created, State};
use evolute_protocol::checksum::checksums;
use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::{ChunkIndex, ChunkKey, ChunkserverId, CopysetId, ReplicaId, VolumeId};
use evolute_protocol::wire::request::{ChangeTag, ChunkRange, Fence, Lane, Sequence, Write};
use evolute_raft::{Applying, Position, SnapshotHead, SnapshotSink, StateMachine};

use crate::cluster::{CLUSTER, COPYSET};

const EPOCH: Epoch = Epoch { attachment: 1, incarnation: 0 };

/// A replica without Raft.
struct Here {
    state: Rc<RefCell<State>>,
    store: Rc<RefCell<ChunkStore>>,
    replica: Replica,
    created: Created,
}

impl Here {
    fn new(dir: &Path) -> Self {
        let identity =
            Identity { cluster: CLUSTER, chunkserver: ChunkserverId(1), token: Bytes::from_static(b"token") };
        let (store, _) =
            ChunkStore::open(&dir.join("store"), StoreOptions::default(), &identity).expect("a new store");
        let members = vec![(ReplicaId(1), ChunkserverId(1))];
        let created = Created { replica: ReplicaId(1), first_leader: ReplicaId(1), members, joining: false };
        let state = State::default();
        store.put_copyset(state.record(COPYSET, &created)).expect("stored");
        let (state, store) = (Rc::new(RefCell::new(state)), Rc::new(RefCell::new(store)));
        let replica = Replica::new(COPYSET, created.clone(), Rc::clone(&state), Rc::clone(&store));
        Self { state, store, replica, created }
    }

    fn apply(&mut self, index: u64) {
        let at = Position { term: 1, index };
        let what = match index {
            0 => Applying::Membership(Bytes::from_static(b"members")),
            1 => command(Change::Fence(Fence { volume: VolumeId(5), epoch: EPOCH })),
            n => command(write(n)),
        };
        self.replica.apply(at, what);
    }

    async fn checkpoint(&self) {
        let record = self.state.borrow().record(COPYSET, &self.created);
        let done = self.store.borrow_mut().begin_checkpoint(vec![record]);
        done.await.expect("a checkpoint");
    }

    async fn frames(&mut self) -> (SnapshotHead, Vec<Bytes>) {
        let mut source = self.replica.snapshot().expect("a checkpoint was made");
        let mut frames = Vec::new();
        while let Some(frame) = source.next().await.expect("frames") {
            frames.push(frame);
        }
        (source.head(), frames)
    }

    async fn read(&self, chunk: u32) -> Vec<u8> {
        let reading = self.store.borrow().read(key(chunk), 0, 1 << 20);
        reading.await.expect("readable").data.concat()
    }
}

fn key(chunk: u32) -> ChunkKey {
    ChunkKey { volume: VolumeId(5), index: ChunkIndex(chunk) }
}

fn command(change: Change) -> Applying {
    let mut builder = CommandBuilder::default();
    builder.push(change);
    Applying::Command(builder.finish())
}

fn write(index: u64) -> Change {
    let n = u32::try_from(index).expect("small");
    let offset = n * 7919 % 2000 * 512;
    let data = Bytes::from(vec![u8::try_from(n % 251).expect("small"); 512 * (1 + n as usize % 40)]);
    let range = ChunkRange::new(offset, u32::try_from(data.len()).expect("small")).expect("a range");
    let tag = ChangeTag { epoch: EPOCH, lane: Lane(0), sequence: Sequence(index), floor: Sequence(1) };
    let checksums = checksums(u64::from(offset), &data);
    Change::Write(Write { chunk: key(n % 3), tag, range, checksums, data })
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(test);
}

async fn put_all(sink: &mut Box<dyn SnapshotSink>, frames: &[Bytes]) -> std::io::Result<()> {
    for frame in frames {
        sink.put(frame.clone()).await?;
    }
    Ok(())
}

/// Fences, sequences and chunks: the replica that was installed applies the rest of the log and is the same as the one
/// it came from, which had gone on meanwhile.
#[test]
fn an_installed_replica_goes_on_as_if_it_had_always_been_there() {
    run(async {
        let (one, two) = (tempfile::tempdir().expect("temp dir"), tempfile::tempdir().expect("temp dir"));
        let (mut from, mut into) = (Here::new(one.path()), Here::new(two.path()));
        assert!(from.replica.snapshot().is_none(), "nothing was checkpointed yet");
        (0..200).for_each(|index| from.apply(index));
        from.checkpoint().await;
        (200..260).for_each(|index| from.apply(index));
        let (head, frames) = from.frames().await;
        assert_eq!(head.at, Position { term: 1, index: 199 });
        (0..7).for_each(|index| into.apply(index));
        into.checkpoint().await;
        let mut sink = into.replica.receive(head.clone()).expect("staged");
        put_all(&mut sink, &frames).await.expect("all of it");
        into.replica.install(head.clone(), sink).await.expect("installed");
        assert_eq!(into.replica.restored().applied, Some(head.at));
        assert_eq!(into.replica.restored().membership, Some(head.membership));
        (200..260).for_each(|index| into.apply(index));
        assert_eq!(from.state.borrow().writers(), into.state.borrow().writers());
        for chunk in 0..3 {
            assert!(from.read(chunk).await == into.read(chunk).await, "chunk {chunk}");
        }
    });
}

/// Every bit of every frame, frames left out, doubled, exchanged, of another copyset: refused, and the replica that is
/// here is as before.
#[test]
fn what_is_not_what_was_sent_is_refused_by_name() {
    run(async {
        let (one, two) = (tempfile::tempdir().expect("temp dir"), tempfile::tempdir().expect("temp dir"));
        let (mut from, mut into) = (Here::new(one.path()), Here::new(two.path()));
        (0..60).for_each(|index| from.apply(index));
        from.checkpoint().await;
        let (head, frames) = from.frames().await;
        (0..7).for_each(|index| into.apply(index));
        let before = into.read(0).await;
        let mut refused = 0;
        let mut wrong: Vec<Vec<Bytes>> = Vec::new();
        for (nth, frame) in frames.iter().enumerate() {
            // Most of the fields, and some of the data.
            for at in (0..frame.len()).filter(|at| *at < 64 || at % 4099 == 0) {
                let mut bad = frame.to_vec();
                bad[at] ^= 1 << (at % 8);
                wrong.push([&frames[..nth], &[Bytes::from(bad)], &frames[nth + 1..]].concat());
            }
            for cut in [0, 3, 15, 16, frame.len() / 2, frame.len() - 1] {
                wrong.push([&frames[..nth], &[frame.slice(..cut)], &frames[nth + 1..]].concat());
            }
            wrong.push([&frames[..nth], &frames[nth + 1..]].concat());
            wrong.push([&frames[..=nth], &frames[nth..]].concat());
            if nth > 0 {
                wrong.push(
                    [&frames[..nth - 1], &[frames[nth].clone(), frames[nth - 1].clone()], &frames[nth + 1..]]
                        .concat(),
                );
            }
        }
        for (nth, frames) in wrong.into_iter().enumerate() {
            let mut sink = into.replica.receive(head.clone()).expect("staged");
            let put = put_all(&mut sink, &frames).await;
            if put.is_ok() {
                // Whatever is left out at the end shows when it is to be installed.
                let error = into.replica.install(head.clone(), sink).await;
                assert!(error.is_err(), "the {nth}th was installed");
            }
            refused += 1;
        }
        assert!(refused > 200, "only {refused}");
        assert!(into.read(0).await == before);
        let mut sink = into.replica.receive(head.clone()).expect("staged");
        put_all(&mut sink, &frames).await.expect("the right ones are taken");
        let other = SnapshotHead { at: Position { term: 1, index: 58 }, ..head.clone() };
        assert!(into.replica.install(other, sink).await.is_err(), "it is of another position");
        let mut sink =
            Replica::new(CopysetId(99), from.created.clone(), Rc::default(), Rc::clone(&into.store))
                .receive(head)
                .expect("staged");
        assert!(put_all(&mut sink, &frames).await.is_err(), "of another copyset");
    });
}
