//! The replicated state: what the cluster has agreed on, as a pure function of its log.
//!
//! ```text
//!  log entry ──decode──▶ Command ──apply──▶ Outcome        to whoever proposed it
//!                                    └────▶ [Key]          the records that changed, for the store
//! ```
//!
//! What always holds:
//!
//! - Apply reads nothing but the state and the command: no clock, no randomness, no setting, no hash order. Two
//!   replicas that applied the same entries hold the same bytes (`records`).
//! - A refused command changes nothing.
//! - Ids are counted up and never given twice, not even after what they named is gone.
//!
//! It does not know who is alive, how full disks are, or what time it is: that is in the chunkservers' reports
//! (`heartbeat`), seen by the leader only, and enters here inside commands.
//!
//! Start at [`State::apply`].

pub mod command;
pub mod copyset;
mod import;
pub mod outcome;
pub mod record;
pub mod reign;
pub mod replace;
pub mod topology;
pub mod volume;

use std::collections::{BTreeMap, BTreeSet};

use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId, VolumeId};

pub use command::Command;
pub use copyset::{Copyset, Pending, Replica};
pub use outcome::{Done, Outcome, Refused, Why};
pub use record::{Damaged, Key};
pub use replace::Reason;
pub use topology::Chunkserver;
pub use volume::Volume;

/// The records a command changed, made or removed.
pub type Changes = Vec<Key>;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    cluster: Option<ClusterId>,
    given: Given,
    chunkservers: BTreeMap<ChunkserverId, Chunkserver>,
    copysets: BTreeMap<CopysetId, Copyset>,
    volumes: BTreeMap<VolumeId, Volume>,
    /// The volumes by name: an index, made again from `volumes` when the state is loaded.
    names: BTreeMap<String, VolumeId>,
    /// Deleted volumes, with the copysets that have not committed their end yet.
    dropping: BTreeMap<VolumeId, BTreeSet<CopysetId>>,
    /// The newest ones, in the order in which they are known here; the last one is this process's.
    reigns: Vec<reign::Reign>,
    /// No volume is attached with this number or a lower one: some were forgotten.
    attachment_floor: u32,
    /// It was put back from an older copy, and no person has looked at what came back.
    put_back: bool,
}

/// The last number given of each kind; 0: none yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Given {
    chunkserver: u32,
    copyset: u32,
    replica: u64,
    volume: u64,
}

impl State {
    /// Carries out one command.
    pub fn apply(&mut self, command: &Command) -> (Outcome, Changes) {
        let mut changes = Changes::new();
        let outcome = match command {
            Command::InitCluster(c) => self.init_cluster(c, &mut changes),
            Command::RegisterChunkserver(c) => self.register_chunkserver(c, &mut changes),
            Command::UpdateChunkserver(c) => self.update_chunkserver(c, &mut changes),
            Command::CreateCopysets(c) => self.create_copysets(c, &mut changes),
            Command::ReplicasCreated(c) => self.replicas_created(c, &mut changes),
            Command::CreateVolume(c) => self.create_volume(c, &mut changes),
            Command::DeleteVolume(c) => self.delete_volume(c, &mut changes),
            Command::VolumeDropped(c) => self.volume_dropped(c, &mut changes),
            Command::Attach(c) => self.attach(c, &mut changes),
            Command::Detach(c) => self.detach(c, &mut changes),
            Command::AllocateSegment(c) => self.allocate_segment(c, &mut changes),
            Command::RetireChunkserver(c) => self.retire_chunkserver(c, &mut changes),
            Command::BeginReplace(c) => self.begin_replace(c, &mut changes),
            Command::ReplaceDone(c) => self.replace_done(c, &mut changes),
            Command::CancelReplace(c) => self.cancel_replace(c, &mut changes),
            Command::ChunkserverStarted(c) => self.chunkserver_started(c, &mut changes),
            Command::DecideChunkserver(c) => self.decide_chunkserver(*c, &mut changes),
            Command::ReplaceUndone(c) => self.replace_undone(c, &mut changes),
            Command::BeginReign(c) => self.begin_reign(c, &mut changes),
            Command::Adopt(c) => self.adopt(c, &mut changes),
            Command::Accept(_) => self.accept(&mut changes),
            Command::BeginImport(c) => self.begin_import(c, &mut changes),
            Command::FinishImport(c) => self.finish_import(c, &mut changes),
            Command::AbandonImport(c) => self.abandon_import(c, &mut changes),
        };
        assert!(outcome.is_ok() || changes.is_empty(), "a refused command changed {changes:?}");
        (outcome, changes)
    }

    pub fn cluster(&self) -> Option<ClusterId> {
        self.cluster
    }

    pub fn chunkservers(&self) -> &BTreeMap<ChunkserverId, Chunkserver> {
        &self.chunkservers
    }

    /// The last chunkserver number given.
    pub fn chunkservers_given(&self) -> u32 {
        self.given.chunkserver
    }

    pub fn copysets(&self) -> &BTreeMap<CopysetId, Copyset> {
        &self.copysets
    }

    /// The last copyset number given.
    pub fn copysets_given(&self) -> u32 {
        self.given.copyset
    }

    /// The last replica number given.
    pub fn replicas_given(&self) -> u64 {
        self.given.replica
    }

    /// The last volume number given.
    pub fn volumes_given(&self) -> u64 {
        self.given.volume
    }

    /// The highest attachment number given for any volume that there is.
    pub fn attachments_given(&self) -> u32 {
        self.volumes.values().map(|volume| volume.attachment).max().unwrap_or(0)
    }

    pub fn volumes(&self) -> &BTreeMap<VolumeId, Volume> {
        &self.volumes
    }

    pub fn volume_named(&self, name: &str) -> Option<(VolumeId, &Volume)> {
        let id = *self.names.get(name)?;
        Some((id, self.volumes.get(&id)?))
    }

    pub fn volumes_by_name(&self) -> impl Iterator<Item = (VolumeId, &Volume)> {
        self.names.values().filter_map(|id| Some((*id, self.volumes.get(id)?)))
    }

    /// Deleted volumes whose end some copysets have still to commit.
    pub fn dropping(&self) -> &BTreeMap<VolumeId, BTreeSet<CopysetId>> {
        &self.dropping
    }
}

#[cfg(test)]
mod tests;
