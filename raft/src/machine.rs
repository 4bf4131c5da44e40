//! The owner's side of a group: what it does with committed entries, and how openraft's state machine is made of it.
//!
//! openraft's *snapshot* is the owner's checkpoint: a position, the membership there, and no data, because the owner
//! keeps its own. It lets the log before it be purged. Only when a replica needs entries that are purged does data move:
//! then openraft's handle to a snapshot is the owner's [`SnapshotSource`] here, and its [`SnapshotSink`] there
//! (`peer/snapshot`).
//!
//! How an install survives a crash at any point: the log notes durably which position is being installed, then the
//! owner switches to the staged state, durably, and then the log up to it is purged. Found after a restart: the old
//! state (nothing happened), or the new state and a log that does not reach it, which that note allows
//! ([`crate::StartError::LogBehind`] otherwise): it is purged now.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{Stream, TryStreamExt};
use openraft::OptionalSend;
use openraft::entry::RaftEntry;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};

use crate::bounds::{CONFIGURATIONS_MAX, MEMBERS_MAX};
use crate::state::{Consistent, State};
use crate::types::{
    Host, LogId, Membership, Payload, Snapshot, SnapshotMeta, StoredMembership, Types, log_id, member,
    position,
};
use crate::{Command, Member, Position};

/// What an entry says.
#[derive(Debug)]
pub enum Applying {
    /// What somebody proposed.
    Command(Command),
    /// The group's members changed. Opaque: keep it and hand it back in [`Restored::membership`].
    Membership(Bytes),
    /// A new leader's first entry. Means nothing, but moves the position.
    Blank,
}

/// How far an owner's own storage has come, durably.
#[derive(Debug, Clone, Default)]
pub struct Restored {
    /// The last entry whose effect it holds. `None`: nothing yet.
    pub applied: Option<Position>,
    /// The last membership applied at or before that.
    pub membership: Option<Bytes>,
}

/// What a group's entries do. Lives on the group's thread.
pub trait StateMachine: 'static {
    /// What the owner's own storage holds durably; entries after it are applied (again) from the log.
    fn restored(&self) -> Restored;

    /// Applies one entry, in log order. The result goes to whoever proposed it (empty: plain ok, costs nothing).
    /// Called for the same entry again after a restart unless a checkpoint covered it.
    fn apply(&mut self, at: Position, what: Applying) -> Bytes;

    /// Begins a raft snapshot of what the last durable checkpoint holds, for a replica that needs entries the log does
    /// not have any more. Applying and checkpoints go on while it is read. `None`: this owner has none to give.
    fn snapshot(&mut self) -> Option<Box<dyn SnapshotSource>> {
        None
    }

    /// A raft snapshot begins to arrive. Whatever it brings is staged beside the present state, which stays as it is
    /// and goes on being read, until [`Self::install`]. Several may be staged at a time: one that is given up is
    /// dropped, perhaps after the next began.
    fn receive(&mut self, head: SnapshotHead) -> io::Result<Box<dyn SnapshotSink>> {
        Err(unsupported(&head))
    }

    /// Everything is in `sink`, which is one that [`Self::receive`] made: replaces this replica's state by it, durably
    /// and at once (a crash leaves all of the old or all of the new), before it returns. Afterwards `restored` says
    /// `head`, and the next entry applied is the one after `head.at`. An error is the end of this replica.
    fn install<'a>(
        &'a mut self,
        head: SnapshotHead,
        sink: Box<dyn SnapshotSink>,
    ) -> LocalFuture<'a, io::Result<()>> {
        drop(sink);
        Box::pin(async move { Err(unsupported(&head)) })
    }
}

fn unsupported(head: &SnapshotHead) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, format!("no raft snapshots here: one at {} came", head.at))
}

/// A future of the group's thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What a raft snapshot is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotHead {
    /// The last entry whose effect it holds for certain. It may hold effects of later, committed entries, because it
    /// is read while they are applied; applying those again must change nothing.
    pub at: Position,
    /// The last membership at or before that, as in [`Restored::membership`].
    pub membership: Bytes,
}

/// The sending end of a raft snapshot: the owner's frames, whose content means nothing here.
pub trait SnapshotSource {
    /// A durable checkpoint of the owner's that is not older than the last one [`crate::Group::checkpointed`] heard of.
    fn head(&self) -> SnapshotHead;

    /// The next frame, at most [`SNAPSHOT_FRAME_BYTES_MAX`] long; `None` at the end. Called again only when the frame
    /// before is on its way, one call at a time. An error ends the transfer; it begins anew later. The future may be
    /// dropped before it is done; then the source is dropped, too.
    fn next(&mut self) -> LocalFuture<'_, io::Result<Option<Bytes>>>;
}

/// The receiving end: stages what comes. Dropped without [`StateMachine::install`], it leaves nothing behind.
pub trait SnapshotSink {
    /// The next frame, in the order the source gave them, each once. An error ends the transfer. The future may be
    /// dropped before it is done; then the sink is dropped, too.
    fn put(&mut self, frame: Bytes) -> LocalFuture<'_, io::Result<()>>;

    /// For the owner to have its own type back in [`StateMachine::install`].
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

/// No frame of a raft snapshot is longer.
pub const SNAPSHOT_FRAME_BYTES_MAX: usize = 1 << 20;

/// Entries applied before other tasks of the thread get their turn: about a hundred microseconds of overlay inserts.
/// Ticks and elections must not wait behind a long replay.
const APPLY_TURN: u32 = 128;

/// openraft's view of the owner's state machine.
pub(crate) struct Machine {
    owner: Box<dyn StateMachine>,
    state: Rc<State>,
    membership: StoredMembership,
}

impl Machine {
    pub fn new(owner: Box<dyn StateMachine>, state: Rc<State>, membership: StoredMembership) -> Self {
        Self { owner, state, membership }
    }

    fn apply_one(&mut self, id: LogId, payload: Payload) -> Bytes {
        let at = position(&id);
        if let Payload::Membership(membership) = &payload {
            self.membership = StoredMembership::new(Some(id), membership.clone());
            self.state.membership_applied(&self.membership);
        }
        let result = self.owner.apply(at, applying(id, payload));
        self.state.set_applied(at);
        result
    }
}

/// An entry as owners see it.
pub(crate) fn applying(id: LogId, payload: Payload) -> Applying {
    match payload {
        Payload::Normal(command) => Applying::Command(command),
        Payload::Blank => Applying::Blank,
        Payload::Membership(membership) => {
            Applying::Membership(encode_membership(&StoredMembership::new(Some(id), membership)))
        }
    }
}

/// What openraft hands from one end of a raft snapshot to the other.
pub(crate) enum SnapshotData {
    /// Nothing but the position: the owner's checkpoint, or an owner that has none to give.
    Position,
    Source(Box<dyn SnapshotSource>),
    Staged(Staged),
}

/// A raft snapshot that arrived whole.
pub(crate) struct Staged {
    pub head: SnapshotHead,
    pub sink: Box<dyn SnapshotSink>,
    /// The sender had applied this when it read the last of it.
    pub consistent_from: u64,
}

impl fmt::Debug for SnapshotData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Position => "Position",
            Self::Source(_) => "Source",
            Self::Staged(_) => "Staged",
        })
    }
}

impl Machine {
    /// [`StateMachine::receive`].
    pub fn receive(&mut self, head: SnapshotHead) -> io::Result<Box<dyn SnapshotSink>> {
        self.owner.receive(head)
    }

    /// The owner's snapshot, if it has one that openraft can use: at least as new as what was purged.
    fn source(&mut self) -> Option<(SnapshotMeta, Box<dyn SnapshotSource>)> {
        // Only a leader that runs is asked for data; openraft also asks at its start.
        self.state.running()?;
        let source = self.owner.snapshot()?;
        let head = source.head();
        let last_log_id = Some(log_id(head.at));
        let Some(last_membership) = decode_membership(&head.membership) else {
            tracing::error!(group = %self.state.id, at = %head.at, "the owner's snapshot has no membership");
            return None;
        };
        let checkpointed = self.state.checkpointed.borrow().last_log_id;
        if last_log_id < checkpointed {
            tracing::error!(group = %self.state.id, at = %head.at, ?checkpointed, "the owner's snapshot is too old");
            return None;
        }
        Some((SnapshotMeta { last_log_id, last_membership }, source))
    }

    async fn install(&mut self, meta: &SnapshotMeta, staged: Staged) -> io::Result<()> {
        let Staged { head, sink, consistent_from } = staged;
        let at = head.at;
        assert_eq!(meta.last_log_id, Some(log_id(at)), "{}: another snapshot arrived", self.state.id);
        if let Some(log) = self.state.log() {
            log.set_installing(at).await.map_err(io::Error::other)?;
        }
        // Nobody reads what is half the one and half the other.
        self.state.set_consistent(Consistent::Installing);
        self.owner.install(head, sink).await?;
        self.membership = meta.last_membership.clone();
        *self.state.checkpointed.borrow_mut() = meta.clone();
        self.state.set_applied(at);
        self.state.set_consistent(Consistent::From(consistent_from));
        tracing::info!(group = %self.state.id, %at, consistent_from, "a raft snapshot is installed");
        Ok(())
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Checkpoint;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.state.applied.get().map(log_id), self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        let mut turn = 0;
        while let Some((entry, responder)) = entries.try_next().await? {
            let result = self.apply_one(entry.log_id(), entry.payload);
            if let Some(responder) = responder {
                responder.send(result);
            }
            turn += 1;
            if turn == APPLY_TURN {
                turn = 0;
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Checkpoint {
        Checkpoint(self.state.clone())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> Result<(), io::Error> {
        match snapshot {
            SnapshotData::Staged(staged) => self.install(meta, staged).await,
            SnapshotData::Position | SnapshotData::Source(_) => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "a raft snapshot without data"))
            }
        }
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        if let Some((meta, source)) = self.source() {
            return Ok(Some(Snapshot { meta, snapshot: SnapshotData::Source(source) }));
        }
        // For openraft not to have one is the end of a leader. The network refuses to send this.
        let meta = self.state.checkpointed.borrow().clone();
        Ok(meta.last_log_id.is_some().then_some(Snapshot { meta, snapshot: SnapshotData::Position }))
    }
}

/// Tells openraft how far the owner's checkpoint has come.
pub(crate) struct Checkpoint(Rc<State>);

impl RaftSnapshotBuilder<Types> for Checkpoint {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let meta = self.0.checkpointed.borrow().clone();
        Ok(Snapshot { meta, snapshot: SnapshotData::Position })
    }
}

/// A membership and its position, as owners keep it and the log and peers carry it (docs/log-format.md).
pub(crate) fn encode_membership(stored: &StoredMembership) -> Bytes {
    let mut out = BytesMut::new();
    let at = stored.log_id().as_ref().map(position);
    out.put_u8(u8::from(at.is_some()));
    let at = at.unwrap_or_default();
    out.put_u64_le(at.term);
    out.put_u64_le(at.index);
    put_membership(&mut out, stored.membership());
    out.freeze()
}

/// `None` when the bytes are not what [`encode_membership`] makes.
pub(crate) fn decode_membership(bytes: &[u8]) -> Option<StoredMembership> {
    let mut from = bytes;
    let known = from.try_get_u8().ok()? == 1;
    let at = Position { term: from.try_get_u64_le().ok()?, index: from.try_get_u64_le().ok()? };
    let membership = get_membership(&mut from)?;
    from.is_empty().then(|| StoredMembership::new(known.then(|| log_id(at)), membership))
}

/// The voters of a membership as owners keep it ([`Restored::membership`]); of one that changes, the old and the new
/// ones. `None`: it is not one of ours.
pub fn voters_of(membership: &[u8]) -> Option<Vec<Member>> {
    let stored = decode_membership(membership)?;
    let membership = stored.membership();
    let is_voter =
        |replica: &u64| membership.get_joint_config().iter().any(|config| config.contains(replica));
    let voters = membership.nodes().filter(|(replica, _)| is_voter(replica));
    Some(voters.map(|(&replica, &host)| member(replica, host)).collect())
}

pub(crate) fn put_membership(out: &mut BytesMut, membership: &Membership) {
    let configs = membership.get_joint_config();
    out.put_u32_le(length(configs.len()));
    for config in configs {
        out.put_u32_le(length(config.len()));
        for &replica in config {
            out.put_u64_le(replica);
        }
    }
    out.put_u32_le(length(membership.nodes().count()));
    for (&replica, host) in membership.nodes() {
        out.put_u64_le(replica);
        out.put_u64_le(host.0);
    }
}

pub(crate) fn get_membership(from: &mut &[u8]) -> Option<Membership> {
    let mut configs = Vec::new();
    for _ in 0..count(from, CONFIGURATIONS_MAX)? {
        let mut config = std::collections::BTreeSet::new();
        for _ in 0..count(from, MEMBERS_MAX)? {
            config.insert(from.try_get_u64_le().ok()?);
        }
        configs.push(config);
    }
    let mut nodes = std::collections::BTreeMap::new();
    for _ in 0..count(from, MEMBERS_MAX)? {
        nodes.insert(from.try_get_u64_le().ok()?, Host(from.try_get_u64_le().ok()?));
    }
    Membership::new(configs, nodes).ok()
}

fn count(from: &mut &[u8], max: u32) -> Option<u32> {
    from.try_get_u32_le().ok().filter(|&count| count <= max)
}

fn length(n: usize) -> u32 {
    u32::try_from(n).expect("a membership has a handful of members")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::{decode_membership, encode_membership};
    use crate::types::{Host, Membership, StoredMembership, log_id};
    use crate::{Position, group};

    #[test]
    fn a_membership_survives_its_bytes_and_nothing_else_passes_for_one() {
        let nodes = BTreeMap::from([(1, Host(10)), (2, Host(20)), (3, Host(30)), (4, Host(40))]);
        let joint = vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([2, 3, 4])];
        let membership = Membership::new(joint, nodes).expect("every voter is a node");
        let stored = StoredMembership::new(Some(log_id(Position { term: 3, index: 9 })), membership);
        for stored in [stored, group::no_membership()] {
            let bytes = encode_membership(&stored);
            assert_eq!(decode_membership(&bytes), Some(stored));
            for cut in 0..bytes.len() {
                assert_eq!(decode_membership(&bytes[..cut]), None, "cut at {cut}");
            }
        }
        assert_eq!(decode_membership(&[0xff; 64]), None);
    }
}
