//! A copyset is one Raft group: the same three chunkservers, one log, many chunks.
//!
//! Every write to a chunk is an entry in its copyset's log. The leader orders entries, a majority makes them
//! durable, each replica applies them to its chunk store in log order.
//!
//! ```text
//!  server ──Write──▶ write.rs ──propose──▶ raft ──append──▶ raft::log, followers
//!                       ▲                   │
//!  server ◀──Reply──────┘◀──── apply.rs ◀───┘ committed
//!                                 └──────────────▶ chunk_store
//!  server ──Read───▶ read.rs ──▶ chunk_store      (a follower, too: ReadAtLeast; what it has not applied yet: ahead.rs)
//!  scrub ──────────▶ compare.rs ──▶ chunk_store, and the same blocks of the other replicas
//! ```
//!
//! What always holds:
//!
//! - Acked means durable. A reply leaves after its entry is on a majority and applied here.
//! - An old epoch changes nothing. It is refused in `write.rs`, and again in `apply.rs`, because the epoch may rise
//!   between the two. Raising it is itself a log entry, so every replica refuses the same writes.
//! - A change is applied once, however often it is sent (`fence.rs`).
//! - Apply is a function of the log: no clock, no randomness, no local setting. Comparing replicas relies on this.
//!
//! It does not know sockets (`server`), files (`chunk_store`) or why these three chunkservers were chosen (the
//! control plane).
//!
//! Start at [`Copyset::submit`].

mod ahead;
pub mod apply;
pub mod command;
pub mod compare;
pub mod fence;
pub mod members;
mod read;
pub mod registry;
pub mod repair;
pub mod state;
pub mod transfer;
mod write;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;
use evolute_protocol::id::{ChunkserverId, CopysetId};
use evolute_protocol::wire::RequestId;
use evolute_protocol::wire::reply::{Refusal, Reply};
use evolute_protocol::wire::request::{Request, TakeOver};
use evolute_raft::{Group, Member, Position};

use self::apply::refusal_of;
use self::command::Change;
use self::fence::{Verdict, Writers};
use self::repair::Repairs;
use self::state::{Created, State};
use self::write::Waiting;
use crate::chunk_store::{ChunkStore, CopysetRecord};
use crate::others::Others;

/// Where an answer goes. `server` makes one of each connection.
pub trait Answer {
    fn answer(&self, copyset: CopysetId, to: &Caller, reply: &Reply);
}

/// Who asked, and for which request. Every one is answered exactly once.
#[derive(Clone)]
pub struct Caller {
    pub to: Rc<dyn Answer>,
    pub request: RequestId,
    /// What it asked to be read.
    pub read_bytes: usize,
}

/// One running replica of a copyset. Lives on the shard's thread.
pub struct Copyset {
    id: CopysetId,
    created: Created,
    group: Group,
    state: Rc<RefCell<State>>,
    store: Rc<RefCell<ChunkStore>>,
    waiting: RefCell<Waiting>,
    entries_in_flight: Cell<usize>,
    others: Rc<Others>,
    repairs: Rc<Repairs>,
    /// A fence was last refused for an epoch that nobody believes, and that was said.
    disbelieved: Cell<Option<Instant>>,
    /// What checkpoints that are not done yet will make durable: the log may be recycled up to there then.
    frozen: RefCell<VecDeque<(Position, Option<Bytes>)>>,
}

impl Copyset {
    pub fn new(
        id: CopysetId,
        created: Created,
        group: Group,
        state: Rc<RefCell<State>>,
        store: Rc<RefCell<ChunkStore>>,
        repairs: Rc<Repairs>,
        others: Rc<Others>,
    ) -> Self {
        Self {
            id,
            created,
            group,
            state,
            store,
            waiting: RefCell::default(),
            entries_in_flight: Cell::new(0),
            others,
            repairs,
            disbelieved: Cell::default(),
            frozen: RefCell::default(),
        }
    }

    pub fn id(&self) -> CopysetId {
        self.id
    }

    pub fn created(&self) -> &Created {
        &self.created
    }

    pub fn group(&self) -> &Group {
        &self.group
    }

    pub fn state(&self) -> &RefCell<State> {
        &self.state
    }

    /// Takes a request. Changes wait until [`Copyset::flush`], so that those which arrive together become one entry.
    pub fn submit(self: &Rc<Self>, request: Request, caller: Caller) {
        match request {
            Request::Write(write) => {
                if write.damaged_piece().is_some() {
                    return self.answer(&caller, &Reply::Refused(Refusal::Damaged));
                }
                self.change(Change::Write(write), caller);
            }
            Request::Discard(discard) => self.change(Change::Discard(discard), caller),
            Request::WriteZeroes(zeroes) => self.change(Change::WriteZeroes(zeroes), caller),
            Request::Fence(fence) => self.change(Change::Fence(fence), caller),
            Request::Read(read) => self.read(read, caller),
            Request::ReadAtLeast(ask) => self.read_at_least(ask, caller),
            Request::ChunkInfo(ask) => self.chunk_info(ask, &caller),
            Request::Digests(ask) => self.digests(ask, caller),
            Request::Doubt(doubt) => self.doubted(doubt, &caller),
            Request::TakeOver(ask) => self.take_over(ask, &caller),
        }
    }

    /// The record of this replica as it is now, remembered until [`Copyset::checkpointed`].
    pub fn freeze(&self) -> CopysetRecord {
        let state = self.state.borrow();
        if let Some(applied) = state.applied() {
            let mut frozen = self.frozen.borrow_mut();
            if frozen.back().is_none_or(|(at, _)| *at != applied) {
                frozen.push_back((applied, state.membership().cloned()));
            }
        }
        state.record(self.id, &self.created)
    }

    /// The store holds everything up to `applied` durably.
    pub fn checkpointed(&self, applied: u64) {
        let mut frozen = self.frozen.borrow_mut();
        let mut reached = None;
        while frozen.front().is_some_and(|(at, _)| at.index <= applied) {
            reached = frozen.pop_front();
        }
        if let Some((at, membership)) = reached {
            self.group.checkpointed(at, membership);
        }
    }

    /// The leader is asked only on the word of somebody who may write here.
    fn take_over(&self, ask: TakeOver, caller: &Caller) {
        let judge = |writers: &Writers| writers.judge_epoch(ask.epoch);
        let verdict = self.state.borrow().writers().get(&ask.volume).map_or(Verdict::NotFenced, judge);
        if let Some(refusal) = refusal_of(verdict) {
            return self.answer(caller, &Reply::Refused(refusal));
        }
        self.group.take_over();
        self.answer(caller, &Reply::Refused(self.not_leader()));
    }

    fn answer(&self, caller: &Caller, reply: &Reply) {
        caller.to.answer(self.id, caller, reply);
    }

    fn not_leader(&self) -> Refusal {
        Refusal::NotLeader { leader: self.group.status().leader.map(chunkserver_of) }
    }
}

/// The chunkserver that hosts a member: process ids are chunkserver ids here.
pub fn chunkserver_of(member: Member) -> ChunkserverId {
    ChunkserverId(u32::try_from(member.process.0).expect("made from a chunkserver id"))
}
