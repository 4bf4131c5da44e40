//! `evolute cluster status`: what there is, how it is, and why.

use evolute_protocol::id::ClusterId;
use evolute_protocol::rpc::{ClusterStatus, CopysetStatus, Health, MdsStatus, Role};
use serde::Serialize;

use crate::chunkserver::{ChunkserverView, chunkserver_table};
use crate::failure::Failure;
use crate::mds::Mds;
use crate::output::{Output, table};
use crate::repair::{RepairView, repair_table};
use crate::volume::{VolumeView, volume_table};

/// More copysets than this are shown to a person only when something is wrong with them.
const COPYSETS_SHOWN: usize = 24;

pub async fn status(mds: &mut Mds, output: Output) -> Result<(), Failure> {
    let view = StatusView::from(mds.status().await?);
    output.answer(&view, || view.words());
    Ok(())
}

/// What keeps the MDS from leading, and whether it was told to go on. The shape is in docs/cli.md.
#[derive(Debug, Serialize)]
struct AcceptView {
    is_needed: bool,
    accepted: bool,
    lines: Vec<String>,
}

pub async fn accept_mds(mds: &mut Mds, output: Output, yes: bool) -> Result<(), Failure> {
    let answer = mds.accept_mds(yes).await?;
    let view =
        AcceptView { is_needed: answer.is_needed, accepted: yes && answer.is_needed, lines: answer.lines };
    output.answer(&view, || {
        let mut words: String = view.lines.iter().map(|line| format!("- {line}\n")).collect();
        words += match (view.is_needed, yes) {
            (false, _) => "the MDS leads as it should: nothing is to be accepted\n",
            (true, false) => "nothing was changed; to go on: evolute cluster accept-mds --yes\n",
            (true, true) => "accepted: the MDS goes on\n",
        };
        words
    });
    Ok(())
}

/// The status as `--json` shows it. The shape is in docs/cli.md.
#[derive(Debug, Serialize)]
pub struct StatusView {
    cluster_id: String,
    health: &'static str,
    reasons: Vec<String>,
    mds: Vec<MdsView>,
    chunkservers: Vec<ChunkserverView>,
    copysets: Vec<CopysetView>,
    repairs: Vec<RepairView>,
    volumes: Vec<VolumeView>,
}

#[derive(Debug, Serialize)]
struct MdsView {
    address: String,
    leader: bool,
    term: u64,
    applied_index: u64,
    version: String,
}

#[derive(Debug, Serialize)]
struct CopysetView {
    id: u32,
    pool: String,
    health: &'static str,
    reason: Option<String>,
    leader_chunkserver: Option<u32>,
    term: u64,
    replicas: Vec<ReplicaView>,
}

#[derive(Debug, Serialize)]
struct ReplicaView {
    replica: u64,
    chunkserver: u32,
    online: bool,
    role: &'static str,
    applied_index: u64,
    behind: u64,
}

fn health(health: Health) -> &'static str {
    match health {
        Health::Unknown => "unknown",
        Health::Ok => "ok",
        Health::Degraded => "degraded",
        Health::Stalled => "stalled",
    }
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Unknown => "unknown",
        Role::Leader => "leader",
        Role::Follower => "follower",
        Role::Candidate => "candidate",
        Role::Learner => "learner",
    }
}

fn unless_empty(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

impl From<ClusterStatus> for StatusView {
    fn from(status: ClusterStatus) -> Self {
        let cluster_health = health(status.health());
        let cluster_id = match <[u8; 16]>::try_from(status.cluster_id.as_slice()) {
            Ok(bytes) => ClusterId(bytes).to_string(),
            Err(_) => "unknown".to_owned(),
        };
        Self {
            cluster_id,
            health: cluster_health,
            reasons: status.reasons,
            mds: status.mds.into_iter().map(MdsView::from).collect(),
            chunkservers: status.chunkservers.into_iter().map(ChunkserverView::from).collect(),
            copysets: status.copysets.into_iter().map(CopysetView::from).collect(),
            repairs: status.repairs.into_iter().map(RepairView::from).collect(),
            volumes: status.volumes.into_iter().map(VolumeView::from).collect(),
        }
    }
}

impl From<MdsStatus> for MdsView {
    fn from(mds: MdsStatus) -> Self {
        Self {
            address: mds.address,
            leader: mds.leader,
            term: mds.term,
            applied_index: mds.applied_index,
            version: mds.version,
        }
    }
}

impl From<CopysetStatus> for CopysetView {
    fn from(copyset: CopysetStatus) -> Self {
        Self {
            id: copyset.id,
            health: health(copyset.health()),
            pool: copyset.pool,
            reason: unless_empty(copyset.reason),
            leader_chunkserver: (copyset.leader_chunkserver != 0).then_some(copyset.leader_chunkserver),
            term: copyset.term,
            replicas: copyset
                .replicas
                .into_iter()
                .map(|r| ReplicaView {
                    replica: r.replica,
                    chunkserver: r.chunkserver,
                    online: r.online,
                    role: role(r.role()),
                    applied_index: r.applied_index,
                    behind: r.behind,
                })
                .collect(),
        }
    }
}

impl StatusView {
    fn words(&self) -> String {
        let mut parts = vec![format!("cluster {}: {}", self.cluster_id, self.health)];
        for reason in &self.reasons {
            parts.push(format!("  - {reason}"));
        }
        parts.push(self.mds_words());
        parts.push(self.chunkserver_words());
        parts.push(self.copyset_words());
        parts.extend(self.repair_words());
        parts.push(if self.volumes.is_empty() {
            "\nNo volumes.".to_owned()
        } else {
            format!("\nVolumes\n{}", volume_table(&self.volumes))
        });
        parts.join("\n")
    }

    fn mds_words(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .mds
            .iter()
            .map(|m| {
                let role = if m.leader { "leader" } else { "follower" };
                vec![
                    m.address.clone(),
                    role.to_owned(),
                    m.term.to_string(),
                    m.applied_index.to_string(),
                    m.version.clone(),
                ]
            })
            .collect();
        format!("\nControl plane\n{}", table(&["ADDRESS", "ROLE", ">TERM", ">APPLIED", "VERSION"], &rows))
    }

    fn chunkserver_words(&self) -> String {
        if self.chunkservers.is_empty() {
            return "\nNo chunkservers have registered.".to_owned();
        }
        format!("\nChunkservers\n{}", chunkserver_table(&self.chunkservers))
    }

    fn repair_words(&self) -> Option<String> {
        if self.repairs.is_empty() {
            return None;
        }
        Some(format!("\nReplicas that take another one's place\n{}", repair_table(&self.repairs)))
    }

    fn copyset_words(&self) -> String {
        if self.copysets.is_empty() {
            return "\nNo copysets yet: they are made once chunkservers in three zones are there.".to_owned();
        }
        let well = self.copysets.iter().filter(|c| c.health == "ok").count();
        let summary = format!("\nCopysets: {} of {} ok", well, self.copysets.len());
        let all = self.copysets.len() <= COPYSETS_SHOWN;
        let rows: Vec<Vec<String>> =
            self.copysets.iter().filter(|c| all || c.health != "ok").map(CopysetView::row).collect();
        if rows.is_empty() {
            return summary;
        }
        format!("{summary}\n{}", table(&[">ID", "HEALTH", ">TERM", "LEADER", "REPLICAS", "WHY"], &rows))
    }
}

impl CopysetView {
    fn row(&self) -> Vec<String> {
        let replicas: Vec<String> = self
            .replicas
            .iter()
            .map(|r| match (r.online, r.behind) {
                (false, _) => format!("{} offline", r.chunkserver),
                (true, 0) => r.chunkserver.to_string(),
                (true, behind) => format!("{} ({behind} behind)", r.chunkserver),
            })
            .collect();
        vec![
            self.id.to_string(),
            self.health.to_owned(),
            self.term.to_string(),
            self.leader_chunkserver.map_or("none".to_owned(), |id| id.to_string()),
            replicas.join(", "),
            self.reason.clone().unwrap_or_default(),
        ]
    }
}
