//! Serve what is applied, and say how fresh it is.
//!
//! No lease and no quorum round (design.md §5; the whole argument: `docs/semantics.md`, "Reads"). Two questions, two
//! ways to be sure:
//!
//! - `Read` is for the leader. The answer carries the term and the index of the volume's last applied entry *before*
//!   the data was read, and the volume discards one that is older than what it has seen. A leader serves once it has
//!   applied an entry of its own term, so that everything committed before it led is applied.
//! - `ReadAtLeast` is for any replica. The volume says which entry the bytes may depend on; a replica that has applied
//!   it answers, one whose log proves that it has it lays it over what it has applied (`ahead.rs`), the others refuse.
//!
//! Either answer says, too, what the data can hold at most: the index *after* it was read, and a term whose leader and
//! all later ones have that entry. The volume will not be content with less from anybody.

use std::rc::Rc;

use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::VolumeId;
use evolute_protocol::wire::reply::{ChunkInfo, Freshness, Refusal, Reply};
use evolute_protocol::wire::request::{AskChunkInfo, Read, ReadAtLeast};

use super::apply::refusal_of;
use super::fence::{Verdict, Writers};
use super::{Caller, Copyset};
use crate::chunk_store::{ReadData, ReadError};

impl Copyset {
    pub(super) fn read(self: &Rc<Self>, read: Read, caller: Caller) {
        match self.may_read(read.chunk.volume, read.epoch) {
            Ok(fresh) => self.read_data(read, caller, Some(fresh)),
            Err(refusal) => self.answer(&caller, &Reply::Refused(refusal)),
        }
    }

    pub(super) fn read_at_least(self: &Rc<Self>, ask: ReadAtLeast, caller: Caller) {
        match self.may_read_at_least(&ask) {
            Ok(()) => self.read_data(ask.read, caller, None),
            Err(Refusal::Behind { .. }) if self.may_read_ahead(&ask) => {
                let copyset = Rc::clone(self);
                tokio::task::spawn_local(async move {
                    match copyset.read_ahead(&ask).await {
                        Some(reply) => copyset.answer(&caller, &reply),
                        // All of it is applied by now.
                        None => copyset.read_at_least(ask, caller),
                    }
                });
            }
            Err(refusal) => self.answer(&caller, &Reply::Refused(refusal)),
        }
    }

    /// Reads and answers. `fresh` is what a leader took before; others take it when all data has been read.
    fn read_data(self: &Rc<Self>, read: Read, caller: Caller, fresh: Option<Freshness>) {
        let (offset, length) = (read.range.offset(), read.range.length());
        let store = self.store.borrow();
        let tried = store.try_read(read.chunk, offset, length);
        if let Ok(Some(data)) = tried {
            drop(store);
            let fresh = fresh.map_or_else(|| self.read_by(read.chunk.volume), Ok);
            return self.answer(&caller, &data_reply(fresh.map(|fresh| (fresh, fresh.index)), data));
        }
        let reading = store.read(read.chunk, offset, length);
        let copyset = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let reply = match reading.await {
                Ok(data) => data_reply(copyset.held(fresh, read.chunk.volume), data),
                // Others may have it, and may be asking because they do not: never wait for them here.
                Err(error) if fresh.is_none() => copyset.repair_later(&read, &error),
                Err(_) => match copyset.read_repaired(read.chunk, read.range).await {
                    Ok(data) => data_reply(copyset.held(fresh, read.chunk.volume), data),
                    Err(error) => copyset.unreadable(&read, &error),
                },
            };
            copyset.answer(&caller, &reply);
        });
    }

    /// What data that have just been read hold at least and at most.
    fn held(&self, before: Option<Freshness>, volume: VolumeId) -> Result<(Freshness, u64), Refusal> {
        let after = self.read_by(volume)?;
        match before {
            None => Ok((after, after.index)),
            // Under another leader, what came in between may be unknown to the one of `before`.
            Some(before) if self.group.leadership().map(|leads| leads.term) == Some(before.term) => {
                Ok((before, after.index))
            }
            Some(_) => Err(self.not_leader()),
        }
    }

    pub(super) fn repair_later(self: &Rc<Self>, read: &Read, error: &ReadError) -> Reply {
        let (chunk, ReadError::Unreadable { block }) = (read.chunk, *error);
        let copyset = Rc::clone(self);
        tokio::task::spawn_local(async move { copyset.repair(chunk, block).await });
        Reply::Refused(Refusal::Behind { applied: self.applied_of(chunk.volume).index })
    }

    pub(super) fn chunk_info(&self, ask: AskChunkInfo, caller: &Caller) {
        let reply = match self.may_read(ask.chunk.volume, ask.epoch) {
            Err(refusal) => Reply::Refused(refusal),
            Ok(fresh) => {
                let info = self.store.borrow().chunk_info(ask.chunk);
                let info = ChunkInfo { allocated_bytes: info.allocated_bytes, generation: info.generation };
                Reply::Info { fresh, info }
            }
        };
        self.answer(caller, &reply);
    }

    fn may_read(&self, volume: VolumeId, epoch: Epoch) -> Result<Freshness, Refusal> {
        let Some(leadership) = self.group.leadership() else { return Err(self.not_leader()) };
        let state = self.state.borrow();
        let Some(writers) = state.writers().get(&volume) else {
            return Err(Refusal::NotFenced);
        };
        match writers.judge_epoch(epoch) {
            Verdict::Apply => Ok(Freshness { term: leadership.term, index: writers.last_index() }),
            verdict => Err(refusal_of(verdict).unwrap_or(Refusal::Busy)),
        }
    }

    /// Decides alone whether a replica that need not lead may answer.
    pub(super) fn may_read_at_least(&self, ask: &ReadAtLeast) -> Result<(), Refusal> {
        let state = self.state.borrow();
        let writers = state.writers().get(&ask.read.chunk.volume);
        let verdict = writers.map_or(Verdict::NotFenced, |writers| writers.judge_epoch(ask.read.epoch));
        let applied = writers.map_or(0, Writers::last_index);
        match verdict {
            Verdict::Apply if applied >= ask.index && self.group.consistent_from().is_none() => Ok(()),
            Verdict::Fenced { current } => Err(Refusal::Fenced { current }),
            // Its own fence may be on the way here.
            _ => Err(Refusal::Behind { applied }),
        }
    }

    /// How much of a volume is applied here, and a term whose leader and all later ones have that.
    pub(super) fn applied_of(&self, volume: VolumeId) -> Freshness {
        let index = self.state.borrow().writers().get(&volume).map_or(0, Writers::last_index);
        Freshness { term: self.group.applied_in(), index }
    }

    /// What data that have just been read can hold at most. Not known when this replica was replaced meanwhile: it
    /// began with data that are ahead of what it has applied.
    pub(super) fn read_by(&self, volume: VolumeId) -> Result<Freshness, Refusal> {
        let fresh = self.applied_of(volume);
        match self.group.consistent_from() {
            None => Ok(fresh),
            Some(_) => Err(Refusal::Behind { applied: fresh.index }),
        }
    }

    fn unreadable(&self, read: &Read, error: &ReadError) -> Reply {
        tracing::error!(copyset = %self.id, chunk = %read.chunk, %error, "a read failed");
        let ReadError::Unreadable { block, .. } = error;
        let block = *block;
        Reply::Refused(Refusal::Unreadable { block })
    }
}

pub(super) fn data_reply(held: Result<(Freshness, u64), Refusal>, read: ReadData) -> Reply {
    match held {
        Ok((fresh, shown)) => Reply::Data { fresh, shown, checksums: read.checksums, data: read.data },
        Err(refusal) => Reply::Refused(refusal),
    }
}
