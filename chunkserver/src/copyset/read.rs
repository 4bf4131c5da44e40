//! Leader: serve what is applied, and say how fresh it is.
//!
//! No lease and no quorum round: the answer carries the term and the index of the volume's last applied entry, and
//! the volume discards one that is older than what it has seen (design.md §5). A leader serves once it has applied
//! an entry of its own term, so that everything committed before it led is applied.

use std::rc::Rc;

use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::VolumeId;
use evolute_protocol::wire::reply::{ChunkInfo, Freshness, Refusal, Reply};
use evolute_protocol::wire::request::{AskChunkInfo, Read};

use super::apply::refusal_of;
use super::fence::Verdict;
use super::{Caller, Copyset};
use crate::chunk_store::{ReadData, ReadError};

impl Copyset {
    pub(super) fn read(self: &Rc<Self>, read: Read, caller: Caller) {
        // Taken before the data is read: the data can only be fresher than it says.
        let fresh = match self.may_read(read.chunk.volume, read.epoch) {
            Ok(fresh) => fresh,
            Err(refused) => return self.answer(&caller, &refused),
        };
        let (offset, length) = (read.range.offset(), read.range.length());
        let store = self.store.borrow();
        match store.try_read(read.chunk, offset, length) {
            Ok(Some(data)) => {
                drop(store);
                self.answer(&caller, &data_reply(fresh, data));
            }
            Ok(None) => {
                let reading = store.read(read.chunk, offset, length);
                let copyset = Rc::clone(self);
                tokio::task::spawn_local(async move {
                    let reply = match reading.await {
                        Ok(data) => data_reply(fresh, data),
                        Err(error) => copyset.unreadable(&read, &error),
                    };
                    copyset.answer(&caller, &reply);
                });
            }
            Err(error) => {
                drop(store);
                self.answer(&caller, &self.unreadable(&read, &error));
            }
        }
    }

    pub(super) fn chunk_info(&self, ask: AskChunkInfo, caller: &Caller) {
        let reply = match self.may_read(ask.chunk.volume, ask.epoch) {
            Err(refused) => refused,
            Ok(fresh) => {
                let info = self.store.borrow().chunk_info(ask.chunk);
                let info = ChunkInfo { allocated_bytes: info.allocated_bytes, generation: info.generation };
                Reply::Info { fresh, info }
            }
        };
        self.answer(caller, &reply);
    }

    fn may_read(&self, volume: VolumeId, epoch: Epoch) -> Result<Freshness, Reply> {
        let Some(leadership) = self.group.leadership() else { return Err(self.not_leader()) };
        let state = self.state.borrow();
        let Some(writers) = state.writers().get(&volume) else {
            return Err(Reply::Refused(Refusal::NotFenced));
        };
        match writers.judge_epoch(epoch) {
            Verdict::Apply => Ok(Freshness { term: leadership.term, index: writers.last_index() }),
            verdict => Err(Reply::Refused(refusal_of(verdict).unwrap_or(Refusal::Busy))),
        }
    }

    fn unreadable(&self, read: &Read, error: &ReadError) -> Reply {
        tracing::error!(copyset = %self.id, chunk = %read.chunk, %error, "a read failed");
        let ReadError::Unreadable { block, .. } = error;
        let block = *block;
        Reply::Refused(Refusal::Unreadable { block })
    }
}

fn data_reply(fresh: Freshness, read: ReadData) -> Reply {
    Reply::Data { fresh, checksums: read.checksums, data: read.data }
}
