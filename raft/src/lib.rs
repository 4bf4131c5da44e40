//! Raft groups as Evolute's programs use them: openraft and the thread it lives on, one synced log for all
//! groups of a disk, one connection for all groups of a pair of processes.
//!
//! What a group promises its owner: a command that [`Group::propose`] answers with [`Applied`] is in the synced log of
//! a majority and has been applied here, by the owner's [`StateMachine`], in log order; every other replica applies
//! the same commands in the same order. An answer other than that means *unknown*: the command may still be applied
//! later, once.
//!
//! ```text
//!  owner ──propose──▶ group ──▶ openraft ──append──▶ log (one per disk and shard, synced, shared by all groups)
//!    ▲                             │
//!    │                             └──append──▶ peer (one connection per process pair) ──▶ the same on a follower
//!    └──apply, done──◀ machine ◀── committed
//! ```
//!
//! What always holds:
//!
//! - Nothing here is `Send` but [`Handle`]: groups, log and connections of a shard live on one thread
//!   ([`spawn_thread`]), and a write crosses no other between socket and log.
//! - Votes are on disk before they are answered, entries before they are acknowledged.
//! - A log whose write or sync failed is dead ([`Log::failed`]); nothing is retried on it.
//! - A process takes no entries that it has no place for (`intake.rs`): neither memory nor the log grows with what a full
//!   disk keeps from being finished.
//! - The log kept for members that lag is bounded ([`Limits`]). A replica that needs more than is left gets a raft
//!   snapshot from the leader's owner, whole or not at all.
//!
//! It does not know what a command means, how processes find each other ([`Dial`]), or who decided on a group's
//! members. openraft's types, its alpha version and its `!Send` handles stop at this crate's border.
//!
//! Start at [`Node`].

mod bounds;
mod command;
mod group;
mod hibernate;
mod intake;
mod log;
mod machine;
mod node;
mod peer;
mod retain;
mod runtime;
mod state;
mod succession;
mod thread;
mod types;

use std::fmt;

pub use bounds::{Beyond, INDEX_MAX, PROCESS_MAX, REPLICA_MAX, TERM_MAX};
pub use command::{Command, Cursor};
pub use group::{
    Applied, CAUGHT_UP, ChangeError, Group, GroupStatus, LeaderChange, Leadership, MemberStatus,
    ProposeError, Role,
};
pub use log::{
    COMMAND_BYTES_MAX, ImpossibleVote, Log, LogError, LogOptions, LogOwner, LogUsage, OfflineGroup,
    OfflineLog, WriteLatency, lower_votes,
};
pub use machine::{
    Applying, LocalFuture, Restored, SNAPSHOT_FRAME_BYTES_MAX, SnapshotHead, SnapshotSink, SnapshotSource,
    StateMachine, voters_of,
};
pub use node::{Limits, Node, StartError, Timing};
pub use peer::{Dial, DialFuture, Peers, write_all};
pub use thread::{Handle, HandleError, after_others, spawn_thread};

/// A Raft group. Given by the control plane, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u64);

/// One member's place in one group. Fresh for every membership: a replica that left and comes back must not be
/// taken for its former self, whose votes it has forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId(pub u64);

/// Who hosts a replica; what connections are addressed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId(pub u64);

/// One replica of a group and where it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    pub replica: ReplicaId,
    pub process: ProcessId,
}

/// A place in a group's log. Ordered as Raft orders logs: by term, then index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position {
    pub term: u64,
    pub index: u64,
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "group-{}", self.0)
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "replica-{}", self.0)
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process-{}", self.0)
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.replica, self.process)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term, self.index)
    }
}
