//! Log entry → chunk store. A function of the log: no clock, no randomness, no local setting, so that every replica
//! comes to the same bytes.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use bytes::{BufMut, Bytes, BytesMut};
use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::{CopysetId, VolumeId};
use evolute_protocol::wire::reply::Refusal;
use evolute_raft::{
    Applying, LocalFuture, Position, Restored, SnapshotHead, SnapshotSink, SnapshotSource, StateMachine,
};

use super::command::{self, Change};
use super::fence::Verdict;
use super::state::{Created, State};
use super::transfer::{Arriving, Sending, TransferError};
use crate::chunk_store::ChunkStore;

/// The state machine of one replica: its [`State`], and the chunk store of its disk.
pub struct Replica {
    copyset: CopysetId,
    created: Created,
    state: Rc<RefCell<State>>,
    store: Rc<RefCell<ChunkStore>>,
    restored: Restored,
}

impl Replica {
    pub fn new(
        copyset: CopysetId,
        created: Created,
        state: Rc<RefCell<State>>,
        store: Rc<RefCell<ChunkStore>>,
    ) -> Self {
        let restored = restored(&state.borrow());
        Self { copyset, created, state, store, restored }
    }

    async fn install(&mut self, head: &SnapshotHead, arriving: Arriving) -> Result<(), io::Error> {
        let (state, staging) = arriving.complete(head)?;
        if self.state.borrow().applied() > Some(head.at) {
            return Err(TransferError::OtherHead.into());
        }
        let record = state.record(self.copyset, &self.created);
        let installing = self.store.borrow().install(staging, record);
        installing.await.map_err(io::Error::other)?;
        self.restored = restored(&state);
        *self.state.borrow_mut() = state;
        tracing::info!(copyset = %self.copyset, at = %head.at, "a replica that arrived is installed");
        Ok(())
    }

    fn apply_command(&self, at: Position, command: evolute_raft::Command) -> Bytes {
        // A committed entry cannot be skipped: replicas would come apart. It was made by a program of this or an
        // older version (an upgrade goes one version at a time) and its checksum held, so this is our own mistake.
        let changes = command::decode(command)
            .unwrap_or_else(|error| panic!("{}, entry {}: {error}", self.copyset, at.index));
        let mut state = self.state.borrow_mut();
        let mut store = self.store.borrow_mut();
        let mut results = Results::default();
        for (n, change) in changes.iter().enumerate() {
            let verdict = state.writers_mut(change.volume()).take(at.index, change);
            if verdict == Verdict::Apply {
                self.do_change(change, &mut store);
            }
            results.note(n, verdict);
        }
        results.finish(changes.len())
    }

    fn do_change(&self, change: &Change, store: &mut ChunkStore) {
        match change {
            Change::Write(write) => {
                store.write(
                    self.copyset,
                    write.chunk,
                    write.range.offset(),
                    write.data.clone(),
                    &write.checksums,
                );
            }
            Change::Discard(discard) => {
                store.discard(self.copyset, discard.chunk, discard.range.offset(), discard.range.length());
            }
            // Thin: zeroes are not stored, whether or not the guest wanted the space kept.
            Change::WriteZeroes(zeroes) => {
                store.write_zeroes(self.copyset, zeroes.chunk, zeroes.range.offset(), zeroes.range.length());
            }
            Change::Fence(_) | Change::Unfence(_) => {}
            Change::DropVolume(volume) => store.drop_volume(self.copyset, *volume),
        }
    }
}

fn restored(state: &State) -> Restored {
    Restored { applied: state.applied(), membership: state.membership().cloned() }
}

impl StateMachine for Replica {
    fn restored(&self) -> Restored {
        self.restored.clone()
    }

    fn apply(&mut self, at: Position, what: Applying) -> Bytes {
        let result = match what {
            Applying::Command(command) => self.apply_command(at, command),
            Applying::Membership(membership) => {
                self.state.borrow_mut().set_membership(membership);
                Bytes::new()
            }
            Applying::Blank => Bytes::new(),
        };
        self.state.borrow_mut().advance_applied(at);
        result
    }

    fn snapshot(&mut self) -> Option<Box<dyn SnapshotSource>> {
        let store = self.store.borrow();
        match store.copyset(self.copyset) {
            Ok(record) => Some(Box::new(Sending::begin(&store, &record?)?)),
            Err(error) => {
                tracing::error!(copyset = %self.copyset, %error, "what the last checkpoint holds cannot be read");
                None
            }
        }
    }

    fn receive(&mut self, head: SnapshotHead) -> io::Result<Box<dyn SnapshotSink>> {
        Ok(Box::new(Arriving::new(&self.store.borrow(), self.copyset, head)))
    }

    fn install<'a>(
        &'a mut self,
        head: SnapshotHead,
        sink: Box<dyn SnapshotSink>,
    ) -> LocalFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let arriving = sink.into_any().downcast::<Arriving>();
            let arriving = arriving.unwrap_or_else(|_| panic!("{}: a sink that is not ours", self.copyset));
            Self::install(self, &head, *arriving).await
        })
    }
}

/// What became of the changes of one entry, in the bytes that go to whoever proposed it: empty when all were applied,
/// which is the rule; else nine bytes for each.
#[derive(Default)]
struct Results {
    refused: Vec<(usize, Verdict)>,
}

const RESULT_BYTES: usize = 9;

impl Results {
    fn note(&mut self, n: usize, verdict: Verdict) {
        if !matches!(verdict, Verdict::Apply | Verdict::Already) {
            self.refused.push((n, verdict));
        }
    }

    fn finish(self, count: usize) -> Bytes {
        if self.refused.is_empty() {
            return Bytes::new();
        }
        let mut out = BytesMut::zeroed(count * RESULT_BYTES);
        for (n, verdict) in self.refused {
            let mut at = &mut out[n * RESULT_BYTES..];
            match verdict {
                Verdict::Apply | Verdict::Already => at.put_u8(0),
                Verdict::Fenced { current } => {
                    at.put_u8(1);
                    at.put_u64_le(current.to_u64());
                }
                Verdict::NotFenced => at.put_u8(2),
                Verdict::OutOfBounds => at.put_u8(3),
            }
        }
        out.freeze()
    }
}

/// What became of the `n`th change of an entry whose result is `result`.
pub fn result_of(result: &Bytes, n: usize) -> Result<(), Refusal> {
    let Some(bytes) = result.get(n * RESULT_BYTES..(n + 1) * RESULT_BYTES) else { return Ok(()) };
    let mut detail = [0; 8];
    detail.copy_from_slice(&bytes[1..]);
    match bytes[0] {
        0 => Ok(()),
        1 => Err(Refusal::Fenced { current: Epoch::from_u64(u64::from_le_bytes(detail)) }),
        2 => Err(Refusal::NotFenced),
        _ => Err(Refusal::Busy),
    }
}

/// The early form of a verdict, for a request that need not be proposed.
pub fn refusal_of(verdict: Verdict) -> Option<Refusal> {
    match verdict {
        Verdict::Apply | Verdict::Already => None,
        Verdict::Fenced { current } => Some(Refusal::Fenced { current }),
        Verdict::NotFenced => Some(Refusal::NotFenced),
        Verdict::OutOfBounds => Some(Refusal::Busy),
    }
}

/// Volumes dropped in this replica since its process started, for the control plane.
pub fn dropped(state: &State) -> impl Iterator<Item = VolumeId> + '_ {
    state.writers().iter().filter(|(_, writers)| writers.is_deleted()).map(|(volume, _)| *volume)
}

#[cfg(test)]
mod tests {
    use evolute_protocol::epoch::Epoch;
    use evolute_protocol::wire::reply::Refusal;

    use super::{Results, result_of};
    use crate::copyset::fence::Verdict;

    #[test]
    fn each_change_of_an_entry_gets_its_own_answer() {
        let current = Epoch { attachment: 4, incarnation: 2 };
        let verdicts = [Verdict::Apply, Verdict::Fenced { current }, Verdict::Already, Verdict::NotFenced];
        let mut results = Results::default();
        for (n, verdict) in verdicts.iter().enumerate() {
            results.note(n, *verdict);
        }
        let bytes = results.finish(verdicts.len());
        let answers: Vec<_> = (0..verdicts.len()).map(|n| result_of(&bytes, n)).collect();
        assert_eq!(answers, [Ok(()), Err(Refusal::Fenced { current }), Ok(()), Err(Refusal::NotFenced)]);
        assert_eq!(result_of(&Results::default().finish(3), 2), Ok(()));
        assert!(Results::default().finish(3).is_empty());
    }
}
