//! `evolute cluster status`: what there is, how it is, and why.

use evolute_protocol::id::ClusterId;
use evolute_protocol::rpc::{ChunkserverStatus, ClusterStatus, CopysetStatus, Health, MdsStatus, Role};
use serde::Serialize;

use crate::failure::Failure;
use crate::mds::Mds;
use crate::output::{Output, ago, table};
use crate::size::human;
use crate::volume::{VolumeView, volume_table};

/// More copysets than this are shown to a person only when something is wrong with them.
const COPYSETS_SHOWN: usize = 24;

pub async fn status(mds: &mut Mds, output: Output) -> Result<(), Failure> {
    let view = StatusView::from(mds.status().await?);
    output.answer(&view, || view.words());
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
struct ChunkserverView {
    id: u32,
    address: String,
    pool: String,
    zone: String,
    server: String,
    online: bool,
    last_report_ms_ago: u64,
    capacity_bytes: u64,
    used_bytes: u64,
    free_bytes: u64,
    replicas: u32,
    leaders: u32,
    trouble: Option<String>,
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

impl From<ChunkserverStatus> for ChunkserverView {
    fn from(c: ChunkserverStatus) -> Self {
        Self {
            id: c.id,
            address: c.address,
            pool: c.pool,
            zone: c.zone,
            server: c.server,
            online: c.online,
            last_report_ms_ago: c.last_report_ms_ago,
            capacity_bytes: c.capacity_bytes,
            used_bytes: c.used_bytes,
            free_bytes: c.free_bytes,
            replicas: c.replicas,
            leaders: c.leaders,
            trouble: unless_empty(c.trouble),
            version: c.version,
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
        let rows: Vec<Vec<String>> = self
            .chunkservers
            .iter()
            .map(|c| {
                let state = match (&c.trouble, c.online) {
                    (_, false) => format!("offline, last heard {}", ago(c.last_report_ms_ago)),
                    (Some(trouble), true) => trouble.clone(),
                    (None, true) => "online".to_owned(),
                };
                vec![
                    c.id.to_string(),
                    c.address.clone(),
                    c.zone.clone(),
                    c.server.clone(),
                    human(c.capacity_bytes),
                    human(c.used_bytes),
                    human(c.free_bytes),
                    c.replicas.to_string(),
                    c.leaders.to_string(),
                    state,
                ]
            })
            .collect();
        let headings = [
            ">ID",
            "ADDRESS",
            "ZONE",
            "SERVER",
            ">CAPACITY",
            ">USED",
            ">FREE",
            ">REPLICAS",
            ">LEADERS",
            "STATE",
        ];
        format!("\nChunkservers\n{}", table(&headings, &rows))
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
