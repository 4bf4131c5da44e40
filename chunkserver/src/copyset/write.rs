//! Leader: admit, refuse early, gather, propose, answer when applied.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::VolumeId;
use evolute_protocol::wire::reply::{Freshness, Refusal, Reply};
use evolute_protocol::wire::request::Fence;
use evolute_raft::{Applied, ProposeError};
use smallvec::SmallVec;

use super::apply::{refusal_of, result_of};
use super::command::{Change, CommandBuilder};
use super::fence::{Verdict, Writers};
use super::{Caller, Copyset, chunkserver_of};
use crate::chunk_store::Pressure;

/// Entries of one copyset between proposal and answer. A second one keeps the log busy while the first is on its
/// way to the followers; more would only make entries smaller (a round costs the same whatever it holds:
/// `reference/rust-stack.md` §2.2).
const ENTRIES_IN_FLIGHT_MAX: usize = 2;
/// Data of one entry: a few of the longest requests, so that a stream of large writes does not keep small ones out.
const ENTRY_BYTES_MAX: usize = 2 << 20;
/// Changes of one entry; their count fits 16 bits and their fields some tens of KiB.
const ENTRY_CHANGES_MAX: usize = 1024;
/// What may wait on one copyset: beyond it the answer is `Busy`. 64 MiB × 100 copysets is the most a chunkserver
/// could be made to hold, and only if every copyset stalled at once.
const WAITING_BYTES_MAX: usize = 64 << 20;
const WAITING_CHANGES_MAX: usize = 16 << 10;
/// Whoever makes up fences makes up many.
const DISBELIEF_SAID_EVERY: Duration = Duration::from_secs(10);

/// Changes that arrived and are not proposed yet.
#[derive(Default)]
pub(super) struct Waiting {
    changes: VecDeque<(Change, Caller)>,
    bytes: usize,
}

fn data_bytes(change: &Change) -> usize {
    if let Change::Write(write) = change { write.data.len() } else { 0 }
}

impl Copyset {
    /// Admits a change to the next entry, or answers at once.
    pub(super) fn change(self: &Rc<Self>, change: Change, caller: Caller) {
        let Some(leadership) = self.group.leadership() else {
            return self.answer(&caller, &Reply::Refused(self.not_leader()));
        };
        let (verdict, last_index) = self.early_verdict(&change);
        if let Some(refusal) = refusal_of(verdict) {
            return self.answer(&caller, &Reply::Refused(refusal));
        }
        if verdict == Verdict::Already {
            let fresh = Freshness { term: leadership.term, index: last_index };
            return self.answer(&caller, &Reply::Done(fresh));
        }
        if let Change::Write(write) = &change {
            let (offset, length) = (write.range.offset(), write.range.length());
            let has_room = self.store.borrow().has_room_for(write.chunk, offset, length);
            if !has_room {
                // While another has room this is an outage of one replica, so a pause: the leadership is on its way to
                // that one (`crate::slow_disk`).
                let refusal = if self.another_has_room() { Refusal::Busy } else { Refusal::NoSpace };
                return self.answer(&caller, &Reply::Refused(refusal));
            }
        }
        let mut waiting = self.waiting.borrow_mut();
        let bytes = data_bytes(&change);
        if waiting.bytes + bytes > WAITING_BYTES_MAX || waiting.changes.len() >= WAITING_CHANGES_MAX {
            drop(waiting);
            return self.answer(&caller, &Reply::Refused(Refusal::Busy));
        }
        waiting.bytes += bytes;
        waiting.changes.push_back((change, caller));
    }

    /// As far as was heard.
    fn another_has_room(&self) -> bool {
        let status = self.group.status();
        status.other_voters().any(|voter| !self.others.disk(chunkserver_of(voter.member)).full)
    }

    /// What `apply.rs` would say now; its own word counts.
    fn early_verdict(&self, change: &Change) -> (Verdict, u64) {
        let state = self.state.borrow();
        let writers = state.writers().get(&change.volume());
        // After its fence was taken back it is as one that is not known.
        let known = || writers.map(Writers::epoch).filter(|epoch| *epoch != Epoch::default());
        let verdict = match (change, writers) {
            (Change::DropVolume(_) | Change::Unfence(_), _) => Verdict::Apply,
            (Change::Fence(fence), _) if !fence.epoch.may_follow(known()) => {
                self.disbelieve(fence, known());
                Verdict::OutOfBounds
            }
            (Change::Fence(_), None) => Verdict::Apply,
            (_, None) => Verdict::NotFenced,
            (Change::Fence(fence), Some(writers)) => match writers.judge_epoch(fence.epoch) {
                Verdict::NotFenced => Verdict::Apply,
                other => other,
            },
            (Change::Write(write), Some(writers)) => writers.judge(&write.tag),
            (Change::Discard(discard), Some(writers)) => writers.judge(&discard.tag),
            (Change::WriteZeroes(zeroes), Some(writers)) => writers.judge(&zeroes.tag),
        };
        (verdict, writers.map_or(0, Writers::last_index))
    }

    /// A fence that is far above the newest epoch here was made up. A function of a clock and of what is here, so it is
    /// asked before anything is proposed, and never of an entry.
    fn disbelieve(&self, fence: &Fence, known: Option<Epoch>) {
        if self.disbelieved.get().is_none_or(|said| said.elapsed() > DISBELIEF_SAID_EVERY) {
            self.disbelieved.set(Some(Instant::now()));
            let known = known.unwrap_or_default();
            tracing::warn!(copyset = %self.id, volume = %fence.volume, asked = %fence.epoch, %known,
                "refused a fence: no writer can have come so far");
        }
    }

    /// Proposes what waits, as long as entries may be in flight and the overlay has room.
    pub fn flush(self: &Rc<Self>) {
        while self.entries_in_flight.get() < ENTRIES_IN_FLIGHT_MAX {
            let mut waiting = self.waiting.borrow_mut();
            if waiting.changes.is_empty() || self.store.borrow().pressure() == Pressure::Pace {
                return;
            }
            let mut builder = CommandBuilder::default();
            let mut callers: SmallVec<[Caller; 4]> = SmallVec::new();
            while let Some((change, _)) = waiting.changes.front() {
                let bytes = data_bytes(change);
                let full =
                    callers.len() >= ENTRY_CHANGES_MAX || builder.data_bytes() + bytes > ENTRY_BYTES_MAX;
                if full && !callers.is_empty() {
                    break;
                }
                let Some((change, caller)) = waiting.changes.pop_front() else { break };
                waiting.bytes -= bytes;
                builder.push(change);
                callers.push(caller);
            }
            drop(waiting);
            self.entries_in_flight.set(self.entries_in_flight.get() + 1);
            let copyset = Rc::clone(self);
            self.group.propose(builder.finish(), move |outcome| copyset.proposed(&callers, &outcome));
        }
    }

    fn proposed(self: &Rc<Self>, callers: &[Caller], outcome: &Result<Applied, ProposeError>) {
        self.entries_in_flight.set(self.entries_in_flight.get() - 1);
        match outcome {
            Ok(applied) => {
                let done = Reply::Done(Freshness { term: self.group.applied_in(), index: applied.at.index });
                for (n, caller) in callers.iter().enumerate() {
                    match result_of(&applied.result, n) {
                        Ok(()) => self.answer(caller, &done),
                        Err(refusal) => self.answer(caller, &Reply::Refused(refusal)),
                    }
                }
            }
            // Whether the entry will still be committed is unknown; the client sends the same changes again, and
            // their sequences decide.
            Err(error) => {
                let refusal = match error {
                    ProposeError::NotLeader { leader } => {
                        Refusal::NotLeader { leader: leader.map(chunkserver_of) }
                    }
                    // `TooLarge` cannot be: an entry of ours is far below the bound of the log.
                    ProposeError::Busy | ProposeError::Stopped | ProposeError::TooLarge => Refusal::Busy,
                };
                callers.iter().for_each(|caller| self.answer(caller, &Reply::Refused(refusal)));
            }
        }
        if self.group.leadership().is_some() { self.flush() } else { self.refuse_waiting() }
    }

    /// Not the leader any more: those who wait must ask the one who is.
    pub fn refuse_waiting(&self) {
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        if waiting.changes.is_empty() {
            return;
        }
        let reply = Reply::Refused(self.not_leader());
        for (_, caller) in &waiting.changes {
            self.answer(caller, &reply);
        }
    }

    /// Commits the end of a volume here, if this replica leads; it is done again until it shows.
    pub fn drop_volume(self: &Rc<Self>, volume: VolumeId) {
        let gone = self
            .state
            .borrow()
            .writers()
            .get(&volume)
            .is_some_and(|w| w.judge_epoch(Epoch::DELETED) == Verdict::Apply);
        if gone || self.group.leadership().is_none() {
            return;
        }
        self.propose_alone(Change::DropVolume(volume), volume, "the volume is not dropped yet");
    }

    /// Takes back a fence that nobody came with, if this replica leads. True: it still holds here, ask again.
    pub fn unfence(self: &Rc<Self>, fence: Fence) -> bool {
        let state = self.state.borrow();
        let epoch = state.writers().get(&fence.volume).map(Writers::epoch);
        let holds = epoch == Some(fence.epoch);
        // After a start the fence may still be in the log, to be applied again.
        let applied = state.applied().map(|at| at.index);
        drop(state);
        if !holds && applied < self.group.last_logged().map(|at| at.index) {
            return true;
        }
        if holds && self.group.leadership().is_some() {
            self.propose_alone(Change::Unfence(fence), fence.volume, "the fence is not taken back yet");
        }
        holds
    }

    fn propose_alone(&self, change: Change, volume: VolumeId, not_yet: &'static str) {
        let mut builder = CommandBuilder::default();
        builder.push(change);
        let copyset = self.id();
        self.group.propose(builder.finish(), move |outcome| {
            if let Err(error) = outcome {
                tracing::info!(%copyset, %volume, %error, "{not_yet}");
            }
        });
    }
}
