//! What we tell the control plane, and what it asks of us.
//!
//! One bidirectional stream: reports out (at once after connecting, when a leader changes, and every interval), orders
//! in. Without a control plane this chunkserver serves on; it keeps calling.

use std::time::Duration;

use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId, VolumeId};
use evolute_protocol::rpc::chunkservers_client::ChunkserversClient;
use evolute_protocol::rpc::{
    ChunkserverAddress, ErrorWord, MemberReport, Order, Orders, RegisterRequest, RegisterResponse,
    ReplicaReport, Report, Role, order,
};
use evolute_raft::GroupStatus;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::addresses::Addresses;
use crate::chunk_store::Identity;
use crate::copyset::chunkserver_of;
use crate::copyset::members::MemberChange;
use crate::copyset::state::Created;
use crate::others::{Told, Trouble};
use crate::shard::{ReplicaOfReport, ShardHandle, ShardReport, ToShard};

/// A control plane that does not answer within this is asked elsewhere.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(3);
/// Changes that come together are one report.
const GATHER: Duration = Duration::from_millis(20);

/// Who this chunkserver says it is.
#[derive(Debug, Clone)]
pub struct Introduction {
    pub mds: Vec<String>,
    pub address: String,
    pub zone: String,
    pub server: String,
    pub capacity_bytes: u64,
    /// New at every start of the process.
    pub instance: Vec<u8>,
    pub heartbeat_interval_s: Option<u64>,
}

/// The control plane will never take us as we are: this process must not serve.
#[derive(Debug, thiserror::Error)]
#[error("the control plane refused this chunkserver ({word}): {message}")]
pub struct Refused {
    word: ErrorWord,
    message: String,
}

/// Registers, and keeps trying until the control plane answers. Asks for an identity if there is none yet.
pub async fn register(who: &Introduction, identity: Option<&Identity>) -> Result<RegisterResponse, Refused> {
    let request = RegisterRequest {
        chunkserver: identity.map_or(0, |id| id.chunkserver.0),
        token: identity.map_or_else(Vec::new, |id| id.token.to_vec()),
        cluster_id: identity.map_or_else(Vec::new, |id| id.cluster.0.to_vec()),
        address: who.address.clone(),
        zone: who.zone.clone(),
        server: who.server.clone(),
        capacity_bytes: who.capacity_bytes,
        instance: who.instance.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let mut pause = RETRY_FIRST;
    let mut said = false;
    loop {
        for mds in &who.mds {
            let mut client = ChunkserversClient::new(channel(mds));
            let status = match client.register(request.clone()).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => status,
            };
            if let Some(word) = for_ever(&status) {
                return Err(Refused { word, message: status.message().to_owned() });
            }
            if !said && ErrorWord::of(&status) != Some(ErrorWord::NotLeader) {
                tracing::warn!(mds, error = %reason(&status), "cannot register yet; trying on");
                said = true;
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_LAST);
    }
}

/// A refusal that trying again does not change.
fn for_ever(status: &Status) -> Option<ErrorWord> {
    use ErrorWord::{Busy, NotLeader};
    ErrorWord::of(status).filter(|word| !matches!(word, Busy | NotLeader))
}

fn reason(status: &Status) -> String {
    if status.code() == Code::Unavailable { "not reachable".into() } else { status.message().to_owned() }
}

fn channel(mds: &str) -> Channel {
    // An address that is none fails like one that does not answer: by name, when it is called.
    Endpoint::from_shared(format!("http://{mds}"))
        .unwrap_or_else(|_| Endpoint::from_static("http://0.0.0.0:0"))
        .connect_timeout(CALL_TIMEOUT)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .connect_lazy()
}

/// Reports and obeys until refused for ever. Cancel-safe: nothing is lost that the next stream would not repeat.
pub async fn run(
    who: &Introduction,
    identity: &Identity,
    shard: &ShardHandle,
    addresses: &Addresses,
) -> Refused {
    let mut pause = RETRY_FIRST;
    loop {
        let mut interval = Duration::from_secs(who.heartbeat_interval_s.unwrap_or(10));
        match register(who, Some(identity)).await {
            Ok(answer) => {
                if who.heartbeat_interval_s.is_none() && answer.report_interval_ms > 0 {
                    interval = Duration::from_millis(answer.report_interval_ms);
                }
            }
            Err(refused) => return refused,
        }
        for mds in &who.mds {
            match stream(mds, identity, who, shard, addresses, interval).await {
                Ok(()) => pause = RETRY_FIRST,
                Err(status) => {
                    if let Some(word) = for_ever(&status) {
                        return Refused { word, message: status.message().to_owned() };
                    }
                    tracing::debug!(mds, error = %reason(&status), "no heartbeat");
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_LAST);
    }
}

/// One stream, until it ends.
async fn stream(
    mds: &str,
    identity: &Identity,
    who: &Introduction,
    shard: &ShardHandle,
    addresses: &Addresses,
    interval: Duration,
) -> Result<(), Status> {
    let (reports, outgoing) = mpsc::channel(4);
    let first = match shard.report().await {
        Some(report) => encode(identity, who, report),
        None => return Ok(()),
    };
    // The first report goes in before the call: the server may wait for it before it answers.
    let _ = reports.send(first).await;
    let mut client = ChunkserversClient::new(channel(mds));
    let mut incoming = client.heartbeat(ReceiverStream::new(outgoing)).await?.into_inner();
    tracing::info!(mds, "reporting to the control plane");
    let mut beat = tokio::time::interval(interval);
    beat.tick().await;
    loop {
        tokio::select! {
            orders = incoming.next() => match orders {
                None => return Ok(()),
                Some(orders) => {
                    let orders = orders?;
                    shard.send(ToShard::Hear(told(&orders)));
                    addresses.learn(orders.addresses.into_iter().map(|a| (a.chunkserver, a.address)).collect());
                    for order in orders.orders {
                        obey(shard, order);
                    }
                    continue;
                }
            },
            _ = beat.tick() => {}
            () = shard.changed() => tokio::time::sleep(GATHER).await,
        }
        let Some(report) = shard.report().await else { return Ok(()) };
        if reports.send(encode(identity, who, report)).await.is_err() {
            return Ok(());
        }
    }
}

fn told(orders: &Orders) -> Told {
    let disk =
        |of: &ChunkserverAddress| (ChunkserverId(of.chunkserver), Trouble { full: of.full, slow: of.slow });
    let usual = Some(orders.usual_write_latency_us).filter(|us| *us > 0);
    Told { disks: orders.addresses.iter().map(disk).collect(), usual_write: usual.map(Duration::from_micros) }
}

fn obey(shard: &ShardHandle, order: Order) {
    let to_shard = match order.what {
        Some(order::What::CreateReplica(create)) => ToShard::Host {
            copyset: CopysetId(create.copyset),
            created: Created {
                replica: ReplicaId(create.replica),
                first_leader: ReplicaId(create.first_leader),
                members: create
                    .members
                    .iter()
                    .map(|m| (ReplicaId(m.replica), ChunkserverId(m.chunkserver)))
                    .collect(),
                joining: create.joining,
            },
        },
        Some(order::What::DropVolume(drop)) => {
            ToShard::DropVolume { copyset: CopysetId(drop.copyset), volume: VolumeId(drop.volume) }
        }
        Some(order::What::TransferLeader(transfer)) => ToShard::TransferLeader {
            copyset: CopysetId(transfer.copyset),
            to: ReplicaId(transfer.to_replica),
        },
        Some(order::What::ChangeMembers(change)) => ToShard::ChangeMembers {
            copyset: CopysetId(change.copyset),
            change: MemberChange {
                add: change.add.map(|m| (ReplicaId(m.replica), ChunkserverId(m.chunkserver))),
                // No replica has the number 0.
                remove: Some(ReplicaId(change.remove_replica)).filter(|replica| replica.0 > 0),
            },
        },
        Some(order::What::RemoveReplica(remove)) => {
            ToShard::Remove { copyset: CopysetId(remove.copyset), replica: ReplicaId(remove.replica) }
        }
        None => {
            tracing::warn!("an order this version does not know; upgrade this chunkserver");
            return;
        }
    };
    shard.send(to_shard);
}

fn encode(identity: &Identity, who: &Introduction, report: ShardReport) -> Report {
    Report {
        chunkserver: identity.chunkserver.0,
        token: identity.token.to_vec(),
        instance: who.instance.clone(),
        capacity_bytes: report.usage.capacity,
        used_bytes: report.usage.used,
        free_bytes: report.usage.free,
        replicas: report
            .replicas
            .iter()
            .map(encode_replica)
            .chain(report.failed.iter().map(|(copyset, replica, why)| ReplicaReport {
                copyset: copyset.0,
                replica: replica.0,
                failed: why.clone(),
                ..ReplicaReport::default()
            }))
            .collect(),
        volumes: report.volumes,
        trouble: report.trouble,
        write_latency_us_p50: micros(report.latency.p50),
        write_latency_us_p99: micros(report.latency.p99),
        scrubbed_bytes: report.scrubbed_bytes,
        last_full_scrub_unix_ms: report.last_full_scrub_unix_ms,
        bad_blocks_found: report.bad_blocks_found,
        bad_blocks_repaired: report.bad_blocks_repaired,
        full: report.usage.full,
        slow: report.slow,
        blocks_compared: report.blocks_compared,
        blocks_differing: report.blocks_differing,
        blocks_not_compared: report.blocks_not_compared,
        blocks_undecided: report.blocks_undecided,
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn encode_replica(replica: &ReplicaOfReport) -> ReplicaReport {
    let status: &GroupStatus = &replica.status;
    ReplicaReport {
        copyset: replica.copyset.0,
        replica: status.me.replica.0,
        role: role(status.role).into(),
        term: status.term,
        leader_chunkserver: status.leader.map_or(0, |leader| chunkserver_of(leader).0),
        last_index: status.last.unwrap_or(0),
        committed_index: status.committed.map_or(0, |at| at.index),
        applied_index: status.applied.map_or(0, |at| at.index),
        members: status
            .members
            .iter()
            .map(|m| MemberReport {
                replica: m.member.replica.0,
                chunkserver: chunkserver_of(m.member).0,
                matched_index: m.matched.unwrap_or(0),
                voter: m.voter,
            })
            .collect(),
        dropped_volumes: replica.dropped.iter().map(|volume| volume.0).collect(),
        data_bytes: replica.data_bytes,
        failed: match status.role {
            evolute_raft::Role::Stopped => "its Raft group has stopped".to_owned(),
            _ => String::new(),
        },
    }
}

fn role(role: evolute_raft::Role) -> Role {
    match role {
        evolute_raft::Role::Leader => Role::Leader,
        evolute_raft::Role::Follower => Role::Follower,
        evolute_raft::Role::Candidate => Role::Candidate,
        evolute_raft::Role::Learner => Role::Learner,
        evolute_raft::Role::Stopped => Role::Unknown,
    }
}
