//! What we tell the control plane, and what it asks of us.
//!
//! One bidirectional stream: reports out (at once after connecting, when a leader changes, and every interval), orders
//! in. Without a control plane, or with a wrong one, this chunkserver serves on; it keeps calling.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId, VolumeId};
use evolute_protocol::rpc::chunkservers_client::ChunkserversClient;
use evolute_protocol::rpc::{
    ChunkserverAddress, ErrorWord, Inventory, MemberReport, Order, Orders, RegisterRequest, RegisterResponse,
    ReplicaReport, Report, Role, Start, StartDecision, order,
};
use evolute_raft::{GroupStatus, MemberStatus};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::addresses::Addresses;
use crate::chunk_store::{self, Identity, Starts};
use crate::copyset::chunkserver_of;
use crate::copyset::members::MemberChange;
use crate::copyset::state::Created;
use crate::mds_memory::{self, MdsMemory};
use crate::others::{Told, Trouble};
use crate::shard::{Judgement, Past, ReplicaOfReport, ShardHandle, ShardReport, ToShard};

/// A control plane that does not answer within this is asked elsewhere.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// As [`CALL_TIMEOUT`], when somebody waits for this process to end.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// As [`CALL_TIMEOUT`], of a registration, which may have to wait for a predecessor's end and for a commit.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(15);
/// One that lets a registration wait answers pings all the while. One that does not is silent, and another one may not be.
const REGISTER_PING: Duration = Duration::from_secs(1);
const REGISTER_SILENCE: Duration = Duration::from_secs(2);
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// Short: a control plane that was started again gives no numbers before most of its chunkservers are back.
const RETRY_LAST: Duration = Duration::from_secs(1);
/// The same complaint about the same control plane is logged again after this.
const SAY_AGAIN: Duration = Duration::from_secs(600);
/// Between reports to a control plane that does not say how often it wants them.
const INTERVAL_UNTOLD: Duration = Duration::from_secs(10);
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
    /// What it has obeyed.
    pub memory: Arc<MdsMemory>,
}

/// The control plane will never take us as we are: this process must not serve.
#[derive(Debug, thiserror::Error)]
#[error("the control plane refused this chunkserver ({word}): {message}")]
pub struct Refused {
    word: ErrorWord,
    message: String,
}

/// What a refusal means for a process that has an identity. Peers and clients may need it, whatever a control plane
/// says that is another cluster's, empty, or put back from an old copy: only its own can end it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Ask again, and elsewhere.
    GoOn,
    /// The control plane knows this chunkserver, and this process must not be it.
    End,
}

impl Verdict {
    /// `taken`: a control plane has taken this process before.
    fn of(word: Option<ErrorWord>, taken: bool) -> Self {
        match word {
            // Both were once one: two that vote as one replica could undo a commit.
            Some(ErrorWord::DuplicateChunkserver) => Self::End,
            // Started with a directory or with settings of another place. Nobody counts on this process yet.
            Some(ErrorWord::Invalid) if !taken => Self::End,
            _ => Self::GoOn,
        }
    }
}

/// Asks every control plane in turn until one gives an identity, to a chunkserver that has none.
pub async fn first_registration(who: &Introduction) -> Result<RegisterResponse, Refused> {
    let (mut pause, mut complaints) = (RETRY_FIRST, Complaints::default());
    loop {
        for mds in &who.mds {
            let status = match register(mds, who, None, &Past::default(), StartDecision::None).await {
                Ok(response) => return Ok(response),
                Err(status) => status,
            };
            // It serves nobody: whoever started it had better know at once.
            if let Some(word) = for_ever(&status) {
                return Err(Refused { word, message: status.message().to_owned() });
            }
            complaints.say(mds, &status);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_LAST);
    }
}

async fn register(
    mds: &str,
    who: &Introduction,
    identity: Option<&Identity>,
    past: &Past,
    decided: StartDecision,
) -> Result<RegisterResponse, Status> {
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
        mds_seen: Some(who.memory.obeyed()),
        starts: past.starts.all.iter().map(started).collect(),
        decided: decided.into(),
        ends: past.ends.clone(),
    };
    let pinged = endpoint(mds).http2_keep_alive_interval(REGISTER_PING).keep_alive_timeout(REGISTER_SILENCE);
    let mut client = ChunkserversClient::new(pinged.connect_lazy());
    match tokio::time::timeout(REGISTER_TIMEOUT, client.register(request)).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(Status::unavailable("no answer")),
    }
}

fn started(start: &chunk_store::Start) -> Start {
    Start { number: start.number, instance: start.instance.to_vec() }
}

/// A refusal that trying again does not change.
fn for_ever(status: &Status) -> Option<ErrorWord> {
    use ErrorWord::{Busy, MdsPutBack, NotLeader};
    ErrorWord::of(status).filter(|word| !matches!(word, Busy | MdsPutBack | NotLeader))
}

/// Tells the control plane that this process has ended in order, if one is there: a copy of the directory from before will
/// not know of that.
pub async fn end(who: &Introduction, identity: &Identity, starts: Starts) {
    let past = Past { starts, ends: Vec::new() };
    for mds in &who.mds {
        let telling = register(mds, who, Some(identity), &past, StartDecision::None);
        if let Ok(Ok(_)) = tokio::time::timeout(END_TIMEOUT, telling).await {
            return;
        }
    }
    tracing::info!(
        "no control plane heard of the end; that is of use only if the directory is put back to an older copy"
    );
}

/// What was said about each control plane that does not take us, so that a line is logged for a change and not for
/// every attempt.
#[derive(Default)]
struct Complaints {
    said: BTreeMap<String, (String, Instant)>,
}

impl Complaints {
    fn say(&mut self, mds: &str, status: &Status) {
        if ErrorWord::of(status) == Some(ErrorWord::NotLeader) {
            return;
        }
        let reason = reason(status);
        match self.said.get(mds) {
            Some((said, at)) if *said == reason && at.elapsed() < SAY_AGAIN => return,
            _ => {}
        }
        let word = ErrorWord::of(status).map_or("", ErrorWord::as_str);
        tracing::warn!(mds, word, %reason, "the control plane does not take this chunkserver; serving and asking on");
        self.said.insert(mds.to_owned(), (reason, Instant::now()));
    }

    fn over(&mut self, mds: &str) {
        self.said.remove(mds);
    }
}

fn reason(status: &Status) -> String {
    if status.code() == Code::Unavailable { "not reachable".into() } else { status.message().to_owned() }
}

fn channel(mds: &str) -> Channel {
    endpoint(mds).connect_lazy()
}

fn endpoint(mds: &str) -> Endpoint {
    // An address that is none fails like one that does not answer: by name, when it is called.
    Endpoint::from_shared(format!("http://{mds}"))
        .unwrap_or_else(|_| Endpoint::from_static("http://0.0.0.0:0"))
        .connect_timeout(CALL_TIMEOUT)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
}

/// Reports and obeys, for as long as this process may be this chunkserver. Cancel-safe: nothing is lost that the next
/// stream would not repeat.
pub async fn run(
    who: &Introduction,
    identity: &Identity,
    shard: &ShardHandle,
    addresses: &Addresses,
) -> Refused {
    let (mut pause, mut complaints, mut taken) = (RETRY_FIRST, Complaints::default(), false);
    let mut decided = StartDecision::None;
    loop {
        for mds in &who.mds {
            let Some(past) = shard.past().await else { return shard_stopped().await };
            let over = match register(mds, who, Some(identity), &past, decided).await {
                Ok(answer) => {
                    complaints.over(mds);
                    match settle(shard, &past.starts, &answer).await {
                        Ok(Settled::Newest) => {
                            taken = true;
                            decided = StartDecision::None;
                            let interval = match (who.heartbeat_interval_s, answer.report_interval_ms) {
                                (Some(seconds), _) => Duration::from_secs(seconds),
                                (None, 0) => INTERVAL_UNTOLD,
                                (None, told) => Duration::from_millis(told),
                            };
                            stream(mds, identity, who, shard, addresses, interval).await
                        }
                        Ok(Settled::Decided(as_told)) => {
                            decided = as_told;
                            Ok(())
                        }
                        Ok(Settled::NotYet) => {
                            Err(Status::unavailable("its start is not noted on this disk yet"))
                        }
                        Err(refused) => return refused,
                    }
                }
                refused => refused.map(drop),
            };
            match over {
                Ok(()) => pause = RETRY_FIRST,
                Err(status) => {
                    let word = ErrorWord::of(&status);
                    if let (Verdict::End, Some(word)) = (Verdict::of(word, taken), word) {
                        if word == ErrorWord::DuplicateChunkserver {
                            shard.judged(Judgement::Beside).await;
                        }
                        return Refused { word, message: status.message().to_owned() };
                    }
                    if word == Some(ErrorWord::MdsPutBack) {
                        recall(mds, who, identity, shard).await;
                    }
                    complaints.say(mds, &status);
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_LAST);
    }
}

/// Tells an MDS that was put back from an older copy everything that is here. It asks again if that is lost.
async fn recall(mds: &str, who: &Introduction, identity: &Identity, shard: &ShardHandle) {
    let Some(copysets) = shard.recall().await else { return };
    let inventory = Inventory {
        chunkserver: identity.chunkserver.0,
        token: identity.token.to_vec(),
        cluster_id: identity.cluster.0.to_vec(),
        address: who.address.clone(),
        zone: who.zone.clone(),
        server: who.server.clone(),
        capacity_bytes: who.capacity_bytes,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        seen: Some(who.memory.obeyed()),
        copysets,
    };
    let mut client = ChunkserversClient::new(channel(mds));
    match tokio::time::timeout(REGISTER_TIMEOUT, client.recall(inventory)).await {
        Ok(Ok(_)) => tracing::warn!(mds, "an MDS that was put back from an older copy was told what is here"),
        Ok(Err(status)) => tracing::warn!(mds, reason = reason(&status), "an MDS was not told what is here"),
        Err(_) => tracing::warn!(mds, "an MDS did not take what it was told of what is here"),
    }
}

/// May these orders be carried out? Of a newer state they are once that is stored.
async fn may_obey(mds: &str, memory: &Arc<MdsMemory>, orders: &Orders) -> bool {
    match memory.judge(orders.mds_state.as_ref()) {
        mds_memory::Orders::Obeyed => true,
        mds_memory::Orders::Refused => {
            if !orders.orders.is_empty() {
                tracing::warn!(
                    mds,
                    "this MDS is older than one that was obeyed before: its orders are not carried out"
                );
            }
            false
        }
        mds_memory::Orders::Newer => {
            let (memory, state) = (Arc::clone(memory), orders.mds_state.clone().unwrap_or_default());
            let stored = tokio::task::spawn_blocking(move || memory.store(&state)).await;
            let error = match stored {
                Ok(Ok(())) => return true,
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            tracing::warn!(mds, error, "cannot store which MDS is obeyed: its orders are not carried out");
            false
        }
    }
}

/// What became of the control plane's word on this directory's starts.
enum Settled {
    /// It is the newest, and its replicas vote.
    Newest,
    /// Noted; to be said with the next registration.
    Decided(StartDecision),
    /// It could not be noted. Ask again.
    NotYet,
}

/// Has the answer to a registration taken note of, durably, before anything else is done about it.
async fn settle(shard: &ShardHandle, starts: &Starts, answer: &RegisterResponse) -> Result<Settled, Refused> {
    let (judgement, settled) = if !answer.put_back.is_empty() {
        if starts.beside {
            return Err(Refused { word: ErrorWord::DuplicateChunkserver, message: a_copy(&answer.put_back) });
        }
        tracing::error!(
            reason = answer.put_back,
            "this directory was put back to an older copy: what it holds does not vote any more and is made anew from \
             the other chunkservers"
        );
        (Judgement::PutBack, Settled::Decided(StartDecision::Forgotten))
    } else if answer.accepted {
        tracing::warn!("an operator accepted this directory: what it holds counts, whatever it lacks");
        (Judgement::Accepted, Settled::Decided(StartDecision::Accepted))
    } else {
        (Judgement::Newest, Settled::Newest)
    };
    Ok(if shard.judged(judgement).await { settled } else { Settled::NotYet })
}

/// The process is about to end, for its own reasons.
async fn shard_stopped() -> Refused {
    std::future::pending().await
}

fn a_copy(why: &str) -> String {
    format!(
        "{why}; and it was started beside the original before, so it is a copy of that: start the original, or put this \
         directory in its place if that is lost"
    )
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
                    if orders.recall {
                        recall(mds, who, identity, shard).await;
                    }
                    let before = who.memory.obeyed().reign;
                    if !may_obey(mds, &who.memory, &orders).await {
                        continue;
                    }
                    shard.send(ToShard::Hear(told(&orders)));
                    addresses.learn(orders.addresses.into_iter().map(|a| (a.chunkserver, a.address)).collect());
                    for order in orders.orders {
                        obey(shard, order);
                    }
                    // Whoever leads anew waits for hearing that it is remembered.
                    if who.memory.obeyed().reign == before {
                        continue;
                    }
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
            .chain(report.failed.iter().map(|(copyset, failed)| ReplicaReport {
                copyset: copyset.0,
                replica: failed.replica.0,
                failed: failed.why.clone(),
                put_back: failed.put_back,
                ..ReplicaReport::default()
            }))
            .collect(),
        volumes: report.volumes,
        mds_seen: Some(who.memory.obeyed()),
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
        members: status.members.iter().map(member).collect(),
        dropped_volumes: replica.dropped.iter().map(|volume| volume.0).collect(),
        data_bytes: replica.data_bytes,
        put_back: false,
        failed: match status.role {
            evolute_raft::Role::Stopped => "its Raft group has stopped".to_owned(),
            _ => String::new(),
        },
    }
}

pub(crate) fn member(of: &MemberStatus) -> MemberReport {
    MemberReport {
        replica: of.member.replica.0,
        chunkserver: chunkserver_of(of.member).0,
        matched_index: of.matched.unwrap_or(0),
        voter: of.voter,
    }
}

pub(crate) fn role(role: evolute_raft::Role) -> Role {
    match role {
        evolute_raft::Role::Leader => Role::Leader,
        evolute_raft::Role::Follower => Role::Follower,
        evolute_raft::Role::Candidate => Role::Candidate,
        evolute_raft::Role::Learner => Role::Learner,
        evolute_raft::Role::Stopped => Role::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{ErrorWord, Introduction, MdsMemory, Past, StartDecision, Verdict, register};

    /// A control plane that stands still accepts connections for ever. Only the bound of a registration ended this.
    #[tokio::test]
    async fn a_silent_control_plane_is_left_before_a_registration_may_last() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let dir = tempfile::tempdir().expect("temp dir");
        let who = Introduction {
            mds: Vec::new(),
            address: "127.0.0.1:1".into(),
            zone: "z".into(),
            server: "s".into(),
            capacity_bytes: 1,
            instance: vec![1; 16],
            heartbeat_interval_s: None,
            memory: Arc::new(MdsMemory::open(dir.path()).expect("opened")),
        };
        let mds = silent.local_addr().expect("an address").to_string();
        let left =
            register(&mds, &who, None, &Past::default(), StartDecision::None).await.expect_err("silent");
        assert_ne!(
            left.message(),
            "no answer",
            "its silence was noticed, not only that the answer did not come"
        );
    }

    #[test]
    fn only_its_own_control_plane_ends_a_chunkserver_that_has_an_identity() {
        use ErrorWord::{DuplicateChunkserver, Invalid, NotFound, NotLeader, WrongCluster, WrongToken};
        for (word, when_new, later) in [
            (None, Verdict::GoOn, Verdict::GoOn),
            (Some(NotLeader), Verdict::GoOn, Verdict::GoOn),
            (Some(WrongCluster), Verdict::GoOn, Verdict::GoOn),
            (Some(WrongToken), Verdict::GoOn, Verdict::GoOn),
            (Some(NotFound), Verdict::GoOn, Verdict::GoOn),
            (Some(Invalid), Verdict::End, Verdict::GoOn),
            (Some(DuplicateChunkserver), Verdict::End, Verdict::End),
        ] {
            assert_eq!((Verdict::of(word, false), Verdict::of(word, true)), (when_new, later), "{word:?}");
        }
    }
}
