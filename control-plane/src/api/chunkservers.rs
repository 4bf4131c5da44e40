//! Chunkservers: who they are, what they report, what they are told.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_protocol::bounds::{INDEX_MAX, TERM_MAX};
use evolute_protocol::id::ChunkserverId;
use evolute_protocol::rpc::chunkservers_server;
use evolute_protocol::rpc::{
    ChunkserverAddress, ErrorWord, Inventory, LogEnd, MdsState, Order, Orders, RecallResponse,
    RegisterRequest, RegisterResponse, Report, Start, StartDecision,
};
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Chunkservers, invalid, unexpected};
use crate::adopt::seen_of;
use crate::heartbeat::orders::orders;
use crate::heartbeat::reports::{Reports, StreamNumber};
use crate::mds::{Mds, unix_ms};
use crate::port::Caller;
use crate::standing::Now;
use crate::state::command::{ChunkserverStarted, RegisterChunkserver, Started, UpdateChunkserver};
use crate::state::topology::{DEFAULT_POOL, cannot_move, check_address, check_place_name};
use crate::state::{Chunkserver, Command, Done, State};

/// A stream begins with a report; whoever says nothing at all is cut off.
const FIRST_REPORT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a second process is kept waiting before it is refused: the end of its predecessor's stream takes
/// milliseconds to arrive, more on a busy machine. A refused chunkserver ends for good.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(2);
/// Orders on their way to one chunkserver. What does not fit is said again with its next report.
const ORDERS_IN_FLIGHT: usize = 8;
/// Random bytes that name a process. Longer ones would only be kept in memory.
const INSTANCE_BYTES: std::ops::RangeInclusive<usize> = 1..=64;
const VERSION_BYTES_MAX: usize = 64;
/// Starts that no MDS has confirmed, and one that did.
const STARTS_MAX: usize = 4096;
/// Between two times at which a chunkserver is told that this MDS went on.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// Numbers that nobody can have reached: whoever reports them would be believed before all others, for ever.
fn check_report(report: &Report) -> Result<(), String> {
    let beyond = |what: &str, number: u64, max: u64| match number <= max {
        true => Ok(()),
        false => Err(format!("a report with {what} {number}, which nobody can have reached")),
    };
    report.replicas.iter().try_for_each(|replica| {
        beyond("term", replica.term, TERM_MAX)?;
        for index in [replica.last_index, replica.committed_index, replica.applied_index] {
            beyond("index", index, INDEX_MAX)?;
        }
        Ok(())
    })
}

#[tonic::async_trait]
impl chunkservers_server::Chunkservers for Chunkservers {
    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let (mds, request) = (&self.0, request.into_inner());
        check_shape(&request).map_err(invalid)?;
        let cluster = mds.replicated.cluster();
        if !request.cluster_id.is_empty() && request.cluster_id != cluster.0 {
            return Err(ErrorWord::WrongCluster.status(format!(
                "this is cluster {cluster}, the chunkserver at {} belongs to another one",
                request.address
            )));
        }
        let (id, token, verdict) = match request.chunkserver {
            0 => {
                let (id, token) = register_new(mds, &request).await?;
                (id, token, Verdict::Newest)
            }
            id => register_again(mds, ChunkserverId(id), &request).await?,
        };
        mds.reports().registered(id, request.instance.into(), Instant::now());
        let interval = mds.reports().interval();
        Ok(Response::new(RegisterResponse {
            chunkserver: id.0,
            token: token.to_vec(),
            cluster_id: cluster.0.to_vec(),
            report_interval_ms: milliseconds(interval),
            accepted: verdict == Verdict::Accepted,
            put_back: match verdict {
                Verdict::PutBack(why) => why,
                Verdict::Newest | Verdict::Accepted => String::new(),
            },
        }))
    }

    async fn recall(&self, request: Request<Inventory>) -> Result<Response<RecallResponse>, Status> {
        let (mds, inventory) = (&self.0, request.into_inner());
        let (id, cluster) = (ChunkserverId(inventory.chunkserver), mds.replicated.cluster());
        if inventory.cluster_id != cluster.0 {
            return Err(ErrorWord::WrongCluster.status(format!("this is cluster {cluster}")));
        }
        check_address(&inventory.address).map_err(invalid)?;
        check_place_name("zone", &inventory.zone).map_err(invalid)?;
        check_place_name("server", &inventory.server).map_err(invalid)?;
        mds.replicated
            .read(|state| match state.chunkservers().get(&id) {
                Some(known) if !same_secret(&known.token, &inventory.token) => {
                    Err(ErrorWord::WrongToken.status(format!("that is not the token of {id}")))
                }
                None if id.0 <= state.chunkservers_given() => {
                    Err(ErrorWord::NotFound.status(format!("this cluster has no {id}")))
                }
                _ => Ok(()),
            })
            .await??;
        mds.standing().take_inventory(id, inventory);
        mds.tell();
        Ok(Response::new(RecallResponse {}))
    }

    type HeartbeatStream = Pin<Box<dyn Stream<Item = Result<Orders, Status>> + Send>>;

    /// Answers at once, and refuses (if so) in the stream: a client may want the answer before it sends its first
    /// report.
    async fn heartbeat(
        &self,
        request: Request<Streaming<Report>>,
    ) -> Result<Response<Self::HeartbeatStream>, Status> {
        let (to, orders) = mpsc::channel(ORDERS_IN_FLIGHT);
        let caller = request.extensions().get::<Caller>().cloned();
        let (mds, reports) = (self.0.clone(), request.into_inner());
        tokio::spawn(async move {
            if let Err(refused) = serve(&mds, reports, &to, caller).await {
                tracing::info!(%refused, "a heartbeat stream is over");
                let _ = to.send(Err(refused)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(orders))))
    }
}

fn check_shape(request: &RegisterRequest) -> Result<(), String> {
    check_address(&request.address)?;
    check_place_name("zone", &request.zone)?;
    check_place_name("server", &request.server)?;
    if !INSTANCE_BYTES.contains(&request.instance.len()) {
        return Err(format!("an instance has 1 to 64 random bytes, not {}", request.instance.len()));
    }
    if request.version.len() > VERSION_BYTES_MAX || request.version.chars().any(char::is_control) {
        return Err(format!("a version has at most {VERSION_BYTES_MAX} bytes of text"));
    }
    if request.starts.len() > STARTS_MAX
        || request.starts.iter().any(|start| !INSTANCE_BYTES.contains(&start.instance.len()))
        || request.starts.last().is_some_and(|start| start.instance != request.instance)
    {
        return Err(format!("at most {STARTS_MAX} starts, the last of them this one"));
    }
    match (request.chunkserver, request.token.is_empty(), request.cluster_id.is_empty()) {
        (0, false, _) => Err("a token without a chunkserver id".to_owned()),
        (1.., true, _) => Err("a chunkserver id without its token".to_owned()),
        (1.., _, true) => Err("a chunkserver id without its cluster's id".to_owned()),
        _ => Ok(()),
    }
}

async fn register_new(mds: &Mds, request: &RegisterRequest) -> Result<(ChunkserverId, Bytes), Status> {
    mds.may_give().await?;
    let token: [u8; 32] = rand::random();
    let command = RegisterChunkserver {
        token: Bytes::copy_from_slice(&token),
        instance: Bytes::copy_from_slice(&request.instance),
        address: request.address.clone(),
        zone: request.zone.clone(),
        server: request.server.clone(),
        pool: DEFAULT_POOL.to_owned(),
        capacity_bytes: request.capacity_bytes,
        version: request.version.clone(),
        at_unix_ms: unix_ms(),
    };
    match mds.carry_out(Command::RegisterChunkserver(command)).await? {
        Done::Registered { chunkserver, token } => {
            tracing::info!(%chunkserver, address = request.address, zone = request.zone, "registered");
            Ok((chunkserver, token))
        }
        other => Err(unexpected(&other)),
    }
}

async fn register_again(
    mds: &Mds,
    id: ChunkserverId,
    request: &RegisterRequest,
) -> Result<(ChunkserverId, Bytes, Verdict), Status> {
    let update = UpdateChunkserver {
        chunkserver: id.0,
        address: request.address.clone(),
        server: request.server.clone(),
        capacity_bytes: request.capacity_bytes,
        version: request.version.clone(),
        zone: request.zone.clone(),
    };
    let deadline = tokio::time::Instant::now() + PREDECESSOR_PATIENCE;
    let mut news = mds.news();
    let (token, same, verdict, note, ended) = loop {
        news.mark_unchanged();
        let answer = mds.replicated.read(|state| {
            let known = prove(mds, state, id, &request.token, &request.instance, request.mds_seen.as_ref())?;
            if known.zone != request.zone && state.holds_replicas(id) {
                return Err(invalid(cannot_move(id, known, &request.zone)));
            }
            let same = known.zone == update.zone
                && known.address == update.address
                && known.server == update.server
                && known.capacity_bytes == update.capacity_bytes
                && known.version == update.version;
            let newest = request.starts.last().map(started);
            let is_news = newest.is_some() && known.started != newest;
            let mut verdict = verdict(id, known, &request.starts, request.decided());
            // Of a start that nobody has heard of: until that is over it acknowledges nothing, so no leader can know more.
            if verdict == Verdict::Newest && is_news && request.decided() == StartDecision::None {
                verdict = verdict_by_logs(id, &mds.reports(), &request.ends);
            }
            let note = known.dead
                || (verdict == Verdict::Newest && is_news)
                || (known.accepted && request.decided() == StartDecision::Accepted);
            let ended = known.started.as_ref().zip(newest.as_ref()).is_some_and(|(known, newest)| {
                known.instance == newest.instance && known.number < newest.number
            });
            Ok((known.token.clone(), same, verdict, note, ended))
        });
        match answer.await? {
            // Whoever was killed a moment ago has closed its connection, but perhaps its stream's end has not been seen
            // yet. If it is still there after that, it is alive.
            Err(status) if ErrorWord::of(&status) == Some(ErrorWord::DuplicateChunkserver) => {
                if tokio::time::timeout_at(deadline, news.changed()).await.is_err() {
                    return Err(status);
                }
            }
            answer => break answer?,
        }
    };
    if !same {
        mds.carry_out(Command::UpdateChunkserver(update)).await?;
    }
    match &verdict {
        Verdict::Newest if note => {
            let start = request.starts.last().map(started);
            let accepted = request.decided() == StartDecision::Accepted;
            if accepted {
                mds.reports().accept(&request.ends);
            }
            let command = ChunkserverStarted { chunkserver: id.0, start, accepted };
            mds.carry_out(Command::ChunkserverStarted(command)).await?;
        }
        Verdict::Newest | Verdict::Accepted => {}
        Verdict::PutBack(why) => tracing::warn!(chunkserver = %id, why, "was put back to an older copy"),
    }
    let what = if ended { "has ended in order" } else { "is back" };
    tracing::info!(chunkserver = %id, address = request.address, "{what}");
    Ok((id, token, verdict))
}

/// What the starts of a directory say about it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Newest,
    /// It lacks a start. Why that is sure, as a sentence.
    PutBack(String),
    /// It lacks one, and an operator knows.
    Accepted,
}

fn started(start: &Start) -> Started {
    Started { number: start.number, instance: Bytes::copy_from_slice(&start.instance) }
}

/// A directory in whose past the newest start is that this cluster knows is the newest. One whose past begins later is
/// newer than what an MDS that was itself put back remembers.
fn verdict(id: ChunkserverId, known: &Chunkserver, starts: &[Start], decided: StartDecision) -> Verdict {
    if known.accepted && decided != StartDecision::Accepted {
        return Verdict::Accepted;
    }
    let (Some(newest), Some(first), Some(last)) = (&known.started, starts.first(), starts.last()) else {
        // An older program, or the first start that is counted.
        return Verdict::Newest;
    };
    let knows = newest.number < first.number || starts.iter().any(|start| started(start) == *newest);
    if knows || decided != StartDecision::None {
        return Verdict::Newest;
    }
    Verdict::PutBack(format!(
        "{id} was put back to an older copy of its directory: that copy knows of starts up to number {}, and not of \
         start {}, which this cluster has seen",
        last.number.saturating_sub(1),
        newest.number
    ))
}

/// One whose log ends before what it had acknowledged is older than it was: also if it was copied while it ran, and has had
/// no start since.
fn verdict_by_logs(id: ChunkserverId, reports: &Reports, ends: &[LogEnd]) -> Verdict {
    reports.lacks(ends).map_or(Verdict::Newest, |(end, reached)| {
        Verdict::PutBack(format!(
            "{id} was put back to an older copy of its directory: the log of its replica of copyset-{} ends at entry {}, and \
             it had acknowledged entry {reached}",
            end.copyset, end.last_index
        ))
    })
}

/// Is this process that chunkserver, and nobody else?
fn prove<'a>(
    mds: &Mds,
    state: &'a State,
    id: ChunkserverId,
    token: &[u8],
    instance: &[u8],
    seen: Option<&MdsState>,
) -> Result<&'a Chunkserver, Status> {
    let Some(known) = state.chunkservers().get(&id) else {
        // A number alone proves nothing. One that comes with a reign that is not ours was given in it.
        let foreign = seen.and_then(seen_of).is_some_and(|seen| !state.has_been(&seen));
        if foreign && id.0 > state.chunkservers_given() {
            mds.standing().forgot(id);
            return Err(ErrorWord::MdsPutBack
                .status(format!("this MDS was put back from an older copy: it does not know {id}")));
        }
        return Err(ErrorWord::NotFound.status(if id.0 <= state.chunkservers_given() {
            format!("{id} was removed from this cluster; an empty directory makes it a new one")
        } else {
            format!("this cluster has no {id}")
        }));
    };
    if !same_secret(&known.token, token) {
        return Err(ErrorWord::WrongToken.status(format!("that is not the token of {id}")));
    }
    mds.reports().check_instance(id, instance, Instant::now()).map_err(|other| {
        ErrorWord::DuplicateChunkserver.status(format!(
            "another process has been {id} for {} s, at {}: is its data directory in use twice, as a copy?",
            other.since.as_secs(),
            known.address
        ))
    })?;
    Ok(known)
}

/// Takes as long for a near miss as for a wild guess.
fn same_secret(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len() && one.iter().zip(other).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

/// One heartbeat stream, from its first report to its end.
async fn serve(
    mds: &Arc<Mds>,
    mut reports: Streaming<Report>,
    to: &mpsc::Sender<Result<Orders, Status>>,
    caller: Option<Caller>,
) -> Result<(), Status> {
    let first = tokio::time::timeout(FIRST_REPORT_PATIENCE, reports.message()).await;
    let Some(first) = first.map_err(|_| invalid("no report came"))?? else { return Ok(()) };
    let (id, instance) = (ChunkserverId(first.chunkserver), Bytes::copy_from_slice(&first.instance));
    if !INSTANCE_BYTES.contains(&instance.len()) {
        return Err(invalid("an instance has 1 to 64 random bytes"));
    }
    mds.replicated
        .read(|state| prove(mds, state, id, &first.token, &instance, first.mds_seen.as_ref()).map(|_| ()))
        .await??;
    let number = mds.reports().open_stream(id, instance.clone(), Instant::now());
    tracing::info!(chunkserver = %id, "connected");
    let mut stream = HeartbeatStream {
        mds,
        id,
        instance,
        number,
        said: Vec::new(),
        told: None,
        tell_at: None,
        asked: false,
        addresses: None,
        usual_write_us: None,
        reported: false,
        caller,
    };
    let over = stream.run(first, &mut reports, to).await;
    mds.reports().close_stream(id, number, Instant::now());
    mds.standing().left(id);
    mds.tell();
    tracing::info!(chunkserver = %id, "disconnected");
    over
}

struct HeartbeatStream<'a> {
    mds: &'a Mds,
    id: ChunkserverId,
    instance: Bytes,
    number: StreamNumber,
    /// Orders given since the last report.
    said: Vec<Order>,
    /// Where this MDS is, as last told, and when.
    told: Option<(MdsState, Instant)>,
    /// When it is to be told again: it went on since.
    tell_at: Option<Instant>,
    /// It was asked what it has, since its last report.
    asked: bool,
    /// The addresses as last sent.
    addresses: Option<Vec<ChunkserverAddress>>,
    /// What is usual among the others, as last sent.
    usual_write_us: Option<u64>,
    /// It has reported since it was last told anything. What is usual changes with every report of anybody; it is
    /// told once per report of its own.
    reported: bool,
    /// Whose connection it is.
    caller: Option<Caller>,
}

impl HeartbeatStream<'_> {
    async fn run(
        &mut self,
        first: Report,
        reports: &mut Streaming<Report>,
        to: &mpsc::Sender<Result<Orders, Status>>,
    ) -> Result<(), Status> {
        let mut version = self.mds.replicated.version();
        let mut news = self.mds.news();
        self.take(first).await?;
        loop {
            version.mark_unchanged();
            news.mark_unchanged();
            self.give(to).await?;
            tokio::select! {
                report = reports.message() => match report {
                    Ok(Some(report)) => self.take(report).await?,
                    // Its process stopped, or died, or the connection did.
                    Ok(None) | Err(_) => return Ok(()),
                },
                _ = version.changed() => {}
                _ = news.changed() => {}
                () = until(self.tell_at) => {}
                () = self.mds.stopping() => {
                    return Err(ErrorWord::NotLeader.status("this MDS is stopping"));
                }
            }
            let accepted = |state: &State| state.chunkservers().get(&self.id).is_none_or(|it| it.accepted);
            if self.mds.replicated.read(accepted).await? {
                return Err(ErrorWord::Busy
                    .status(format!("something was decided about {}: register again", self.id)));
            }
            if !self.mds.reports().is_newest(self.id, self.number) {
                return Err(ErrorWord::DuplicateChunkserver
                    .status(format!("a newer stream or another process speaks for {}", self.id)));
            }
        }
    }

    async fn take(&mut self, report: Report) -> Result<(), Status> {
        if report.chunkserver != self.id.0 || report.instance != self.instance {
            return Err(invalid(format!("a report of somebody else in the stream of {}", self.id)));
        }
        check_report(&report).map_err(invalid)?;
        if let Some(caller) = &self.caller {
            caller.was_of_use();
        }
        // What was said and is not done by now is said again.
        self.said.clear();
        (self.reported, self.asked) = (true, false);
        let seen = report.mds_seen.clone();
        let mds = self.mds;
        mds.replicated.read(|state| mds.standing().introduce(self.id, seen.as_ref(), state)).await?;
        self.mds.reports().take(self.id, self.number, report, Instant::now());
        self.mds.tell();
        Ok(())
    }

    /// Says what has not been said since the last report.
    async fn give(&mut self, to: &mpsc::Sender<Result<Orders, Status>>) -> Result<(), Status> {
        let (orders, addresses, usual, interval, standing) = self
            .mds
            .replicated
            .read(|state| {
                let reports = self.mds.reports();
                let now = Instant::now();
                let orders = orders(self.id, state, &reports, &self.mds.transfers(), now);
                let standing = self.stand(state);
                let orders = if standing.obeyed { orders } else { Vec::new() };
                let usual = reports.usual_write_us(self.id, now);
                (orders, addresses(state, &reports), usual, reports.interval(), standing)
            })
            .await?;
        let new: Vec<Order> = orders.into_iter().filter(|order| !self.said.contains(order)).collect();
        let moved = self.addresses.as_ref() != Some(&addresses);
        let unusual = std::mem::take(&mut self.reported) && self.usual_write_us != usual;
        let ask = standing.asks && !self.asked;
        let tell = self.is_to_be_told(standing.state.as_ref());
        if new.is_empty() && !moved && !unusual && !ask && !tell {
            return Ok(());
        }
        let message = Orders {
            orders: new.clone(),
            addresses: addresses.clone(),
            report_interval_ms: milliseconds(interval),
            usual_write_latency_us: usual.unwrap_or(0),
            mds_state: standing.state.clone(),
            recall: standing.asks,
        };
        match to.try_send(Ok(message)) {
            Ok(()) => {
                self.said.extend(new);
                self.addresses = Some(addresses);
                self.usual_write_us = usual;
                self.told = standing.state.map(|state| (state, Instant::now()));
                self.tell_at = None;
                self.asked = standing.asks;
                Ok(())
            }
            // It does not read. Its next report brings us back here.
            Err(TrySendError::Full(_)) => Ok(()),
            Err(TrySendError::Closed(_)) => Ok(()),
        }
    }
}

/// What this MDS may say to a chunkserver.
struct Stand {
    obeyed: bool,
    /// None: it has no standing to be remembered.
    state: Option<MdsState>,
    asks: bool,
}

impl HeartbeatStream<'_> {
    fn stand(&self, state: &State) -> Stand {
        let mut standing = self.mds.standing();
        let now = standing.look(state);
        let reign = state.reign().filter(|_| matches!(now, Now::Telling | Now::Confirmed));
        Stand {
            obeyed: now == Now::Confirmed && !state.is_put_back(),
            state: reign.map(|reign| MdsState {
                reign: reign.id.to_vec(),
                ordinal: reign.ordinal,
                applied_index: self.mds.replicated.applied_index(),
                chunkserver: state.chunkservers_given(),
                copyset: state.copysets_given(),
                replica: state.replicas_given(),
                volume: state.volumes_given(),
                attachment: state.attachments_given(),
            }),
            asks: standing.wants_inventory(self.id),
        }
    }

    /// A new reign at once; where it is in one a few times a second at most: each is a write on a chunkserver's disk.
    fn is_to_be_told(&mut self, state: Option<&MdsState>) -> bool {
        let Some(state) = state else { return false };
        let Some((told, at)) = &self.told else { return true };
        if told == state {
            return false;
        }
        let due = *at + TELL_EVERY;
        if told.reign != state.reign || Instant::now() >= due {
            return true;
        }
        self.tell_at = Some(due);
        false
    }
}

/// For ever, if there is no time to wait for. Cancel-safe.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn addresses(state: &State, reports: &Reports) -> Vec<ChunkserverAddress> {
    let address = |(&id, chunkserver): (&ChunkserverId, &Chunkserver)| {
        // Also of one that is offline: its disk is what it was.
        let report = reports.last(id);
        ChunkserverAddress {
            chunkserver: id.0,
            address: chunkserver.address.clone(),
            full: report.is_some_and(|report| report.full),
            slow: report.is_some_and(|report| report.slow),
        }
    };
    state.chunkservers().iter().map(address).collect()
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
