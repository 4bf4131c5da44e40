//! Chunkservers: who they are, what they report, what they are told.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_protocol::bounds::{INDEX_MAX, TERM_MAX};
use evolute_protocol::id::ChunkserverId;
use evolute_protocol::rpc::chunkservers_server;
use evolute_protocol::rpc::{
    ChunkserverAddress, ErrorWord, Order, Orders, RegisterRequest, RegisterResponse, Report,
};
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Chunkservers, invalid, unexpected};
use crate::heartbeat::orders::orders;
use crate::heartbeat::reports::{Reports, StreamNumber};
use crate::mds::{Mds, unix_ms};
use crate::port::Caller;
use crate::state::command::{RegisterChunkserver, UpdateChunkserver};
use crate::state::topology::{DEFAULT_POOL, check_address, check_place_name};
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
        let (id, token) = match request.chunkserver {
            0 => register_new(mds, &request).await?,
            id => register_again(mds, ChunkserverId(id), &request).await?,
        };
        mds.reports().registered(id, request.instance.into(), Instant::now());
        let interval = mds.reports().interval();
        Ok(Response::new(RegisterResponse {
            chunkserver: id.0,
            token: token.to_vec(),
            cluster_id: cluster.0.to_vec(),
            report_interval_ms: milliseconds(interval),
        }))
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
    match (request.chunkserver, request.token.is_empty(), request.cluster_id.is_empty()) {
        (0, false, _) => Err("a token without a chunkserver id".to_owned()),
        (1.., true, _) => Err("a chunkserver id without its token".to_owned()),
        (1.., _, true) => Err("a chunkserver id without its cluster's id".to_owned()),
        _ => Ok(()),
    }
}

async fn register_new(mds: &Mds, request: &RegisterRequest) -> Result<(ChunkserverId, Bytes), Status> {
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
) -> Result<(ChunkserverId, Bytes), Status> {
    let update = UpdateChunkserver {
        chunkserver: id.0,
        address: request.address.clone(),
        server: request.server.clone(),
        capacity_bytes: request.capacity_bytes,
        version: request.version.clone(),
    };
    let deadline = tokio::time::Instant::now() + PREDECESSOR_PATIENCE;
    let mut news = mds.news();
    let (token, same) = loop {
        news.mark_unchanged();
        let answer = mds.replicated.read(|state| {
            let known = prove(mds, state, id, &request.token, &request.instance)?;
            if known.zone != request.zone {
                return Err(invalid(format!(
                    "{id} is in zone {}, its copysets were placed by that: it cannot move to zone {}",
                    known.zone, request.zone
                )));
            }
            let same = known.address == update.address
                && known.server == update.server
                && known.capacity_bytes == update.capacity_bytes
                && known.version == update.version;
            Ok((known.token.clone(), same))
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
    tracing::info!(chunkserver = %id, address = request.address, "is back");
    Ok((id, token))
}

/// Is this process that chunkserver, and nobody else?
fn prove<'a>(
    mds: &Mds,
    state: &'a State,
    id: ChunkserverId,
    token: &[u8],
    instance: &[u8],
) -> Result<&'a Chunkserver, Status> {
    let Some(known) = state.chunkservers().get(&id) else {
        return Err(ErrorWord::NotFound.status(format!("this cluster has no {id}")));
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
    mds.replicated.read(|state| prove(mds, state, id, &first.token, &instance).map(|_| ())).await??;
    let number = mds.reports().open_stream(id, instance.clone(), Instant::now());
    tracing::info!(chunkserver = %id, "connected");
    let mut stream = HeartbeatStream {
        mds,
        id,
        instance,
        number,
        said: Vec::new(),
        addresses: None,
        usual_write_us: None,
        reported: false,
        caller,
    };
    let over = stream.run(first, &mut reports, to).await;
    mds.reports().close_stream(id, number, Instant::now());
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
        self.take(first)?;
        loop {
            version.mark_unchanged();
            news.mark_unchanged();
            self.give(to).await?;
            tokio::select! {
                report = reports.message() => match report {
                    Ok(Some(report)) => self.take(report)?,
                    // Its process stopped, or died, or the connection did.
                    Ok(None) | Err(_) => return Ok(()),
                },
                _ = version.changed() => {}
                _ = news.changed() => {}
                () = self.mds.stopping() => {
                    return Err(ErrorWord::NotLeader.status("this MDS is stopping"));
                }
            }
            if !self.mds.reports().is_newest(self.id, self.number) {
                return Err(ErrorWord::DuplicateChunkserver
                    .status(format!("a newer stream or another process speaks for {}", self.id)));
            }
        }
    }

    fn take(&mut self, report: Report) -> Result<(), Status> {
        if report.chunkserver != self.id.0 || report.instance != self.instance {
            return Err(invalid(format!("a report of somebody else in the stream of {}", self.id)));
        }
        check_report(&report).map_err(invalid)?;
        if let Some(caller) = &self.caller {
            caller.was_of_use();
        }
        // What was said and is not done by now is said again.
        self.said.clear();
        self.reported = true;
        self.mds.reports().take(self.id, self.number, report, Instant::now());
        self.mds.tell();
        Ok(())
    }

    /// Says what has not been said since the last report.
    async fn give(&mut self, to: &mpsc::Sender<Result<Orders, Status>>) -> Result<(), Status> {
        let (orders, addresses, usual, interval) = self
            .mds
            .replicated
            .read(|state| {
                let reports = self.mds.reports();
                let now = Instant::now();
                let orders = orders(self.id, state, &reports, &self.mds.transfers(), now);
                let usual = reports.usual_write_us(self.id, now);
                (orders, addresses(state, &reports), usual, reports.interval())
            })
            .await?;
        let new: Vec<Order> = orders.into_iter().filter(|order| !self.said.contains(order)).collect();
        let moved = self.addresses.as_ref() != Some(&addresses);
        let unusual = std::mem::take(&mut self.reported) && self.usual_write_us != usual;
        if new.is_empty() && !moved && !unusual {
            return Ok(());
        }
        let message = Orders {
            orders: new.clone(),
            addresses: addresses.clone(),
            report_interval_ms: milliseconds(interval),
            usual_write_latency_us: usual.unwrap_or(0),
        };
        match to.try_send(Ok(message)) {
            Ok(()) => {
                self.said.extend(new);
                self.addresses = Some(addresses);
                self.usual_write_us = usual;
                Ok(())
            }
            // It does not read. Its next report brings us back here.
            Err(TrySendError::Full(_)) => Ok(()),
            Err(TrySendError::Closed(_)) => Ok(()),
        }
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
