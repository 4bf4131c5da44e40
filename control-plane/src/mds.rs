//! One MDS: what its parts share, and how it starts and stops.
//!
//! ```text
//!  api ──▶ Mds { replicated state, reports, transfers } ◀── steward (schedulers)
//! ```

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use evolute_daemon::door::Kind;
use evolute_protocol::id::ClusterId;
use evolute_protocol::rpc::ErrorWord;
use evolute_protocol::rpc::chunkservers_server::ChunkserversServer;
use evolute_protocol::rpc::cluster_server::ClusterServer;
use evolute_protocol::rpc::volumes_server::VolumesServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::service::interceptor::InterceptedService;

use crate::adopt;
use crate::api;
use crate::config::{Config, Limits};
use crate::heartbeat::orders::Transfers;
use crate::heartbeat::progress::Progress;
use crate::heartbeat::reports::Reports;
use crate::port;
use crate::raft::data_dir::{Absent, DataDir, DataDirError};
use crate::raft::{NoOutcome, Replicated, StartError};
use crate::standing::{Now, Standing};
use crate::state::Command;
use crate::steward;

/// A peer that answers no ping for this long is gone, though its connection was never closed.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// The largest message a chunkserver sends: a report of 20 000 replicas.
pub const REPORT_BYTES_MAX: usize = 16 << 20;
/// The largest of anybody else: names, and numbers.
const REQUEST_BYTES_MAX: usize = 128 << 10;
/// Requests one connection may have open. A chunkserver needs two, a backend a few.
const REQUESTS_PER_CONNECTION_MAX: u32 = 32;
/// What may arrive and is not read yet, of one request and of one connection.
const WINDOW_BYTES: u32 = 256 << 10;
/// Names and values that a request begins with.
const HEADER_BYTES_MAX: u32 = 16 << 10;
/// How long connections get to end once this MDS stops.
const CLOSING_PATIENCE: Duration = Duration::from_secs(2);

/// As long as a proposal waits: see `raft`. Less than callers wait.
const MAY_GIVE_PATIENCE: Duration = Duration::from_secs(10);

/// What all requests work on.
pub struct Mds {
    pub replicated: Replicated,
    pub limits: Limits,
    pub address: SocketAddr,
    pub data_dir: PathBuf,
    reports: Mutex<Reports>,
    transfers: Mutex<Transfers>,
    progress: Mutex<Progress>,
    standing: Mutex<Standing>,
    /// Counts what the reports and the transfers brought.
    news: watch::Sender<u64>,
    stopping: watch::Sender<bool>,
}

impl Mds {
    /// Locked for moments only, never across an await; after the state, before the others.
    pub fn reports(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock().expect("a panic ends the process")
    }

    /// As [`Mds::reports`], the last in the order.
    pub fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().expect("a panic ends the process")
    }

    /// As [`Mds::reports`], after them and before the progress.
    pub fn transfers(&self) -> MutexGuard<'_, Transfers> {
        self.transfers.lock().expect("a panic ends the process")
    }

    /// As [`Mds::reports`]; held with no other.
    pub fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().expect("a panic ends the process")
    }

    /// Waits, within the bound of every request, until this MDS may give what is never given twice.
    pub async fn may_give(&self) -> Result<(), Status> {
        let (mut news, mut version) = (self.news(), self.replicated.version());
        let deadline = tokio::time::Instant::now() + MAY_GIVE_PATIENCE;
        loop {
            news.mark_unchanged();
            version.mark_unchanged();
            let refused = match self.replicated.read(|state| self.standing().look(state)).await? {
                Now::Confirmed => return Ok(()),
                Now::Waiting { missing } => ErrorWord::Busy.status(format!(
                    "this MDS started lately and gives nothing before more than half of its chunkservers are back: {} \
                     missing, the first is {}; if they stay away: evolute cluster accept-mds",
                    missing.len(),
                    missing.first().map(ToString::to_string).unwrap_or_default()
                )),
                Now::Telling => ErrorWord::Busy.status("this MDS started lately and introduces itself to its chunkservers"),
                Now::Held { why } => ErrorWord::MdsPutBack.status(format!(
                    "this MDS was put back from an older copy ({why}): it gives nothing before it knows again what they \
                     have. See `evolute cluster status`; evolute cluster accept-mds makes it go on"
                )),
            };
            let changed = async {
                tokio::select! { _ = news.changed() => {} _ = version.changed() => {} }
            };
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Err(refused);
            }
        }
    }

    /// Learns back what the chunkservers said they have; an error says what that waits for.
    pub async fn adopt(&self, accepted: bool) -> Result<Result<(), String>, NoOutcome> {
        let planned = self
            .replicated
            .read(|state| {
                let after_index = self.replicated.applied_index();
                let standing = self.standing();
                adopt::plan(state, standing.inventories(), rand::random(), after_index, unix_ms(), accepted)
            })
            .await?;
        let learnt = match planned {
            Ok(learnt) => learnt,
            Err(why) => return Ok(Err(why)),
        };
        tracing::warn!(
            chunkservers = learnt.chunkservers.len(),
            copysets = learnt.copysets.len(),
            volumes = learnt.volumes.len(),
            segments = learnt.segments.len(),
            dropped = learnt.dropped.len(),
            accepted,
            "this MDS was put back from an older copy; its chunkservers told it what it forgot"
        );
        let outcome = self.replicated.propose(Command::Adopt(learnt)).await?;
        if let Err(refused) = outcome {
            return Ok(Err(refused.message));
        }
        self.standing().adopted();
        self.tell();
        Ok(Ok(()))
    }

    /// Reports or transfers changed: orders may be due, schedulers may have something to do.
    pub fn tell(&self) {
        self.news.send_modify(|count| *count += 1);
    }

    pub fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    pub fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Waits until this MDS stops. Cancel-safe.
    pub async fn stopping(&self) {
        // An error means that the sender is gone, and with it everything to wait for.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }
}

pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Why this MDS does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Start(#[from] StartError),
}

/// An MDS that serves.
pub struct Server {
    mds: Arc<Mds>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
    steward: JoinHandle<()>,
}

impl Server {
    /// Binds, opens the data directory, leads, serves. Whoever gets an address can talk to it at once.
    pub async fn start(config: &Config) -> Result<Self, ServeError> {
        let listen = |source| ServeError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let dir = config.data_dir.clone();
        let fresh = ClusterId(rand::random());
        let absent = if config.existing { Absent::Refused } else { Absent::Made };
        let dir = tokio::task::spawn_blocking(move || DataDir::open(&dir, fresh, absent))
            .await
            .map_err(|error| StartError::Ended(error.to_string()))?
            .map_err(|error: DataDirError| StartError::from(error))?;
        let replicated = Replicated::start(dir).await?;
        let ours = replicated.cluster();
        let mds = Arc::new(Mds {
            replicated,
            limits: config.limits,
            address,
            data_dir: config.data_dir.clone(),
            reports: Mutex::new(Reports::new(config.report_interval, Instant::now())),
            transfers: Mutex::default(),
            progress: Mutex::default(),
            standing: Mutex::default(),
            news: watch::Sender::new(0),
            stopping: watch::Sender::new(false),
        });
        let stopped = mds.clone();
        let volumes =
            VolumesServer::new(api::Volumes(mds.clone())).max_decoding_message_size(REQUEST_BYTES_MAX);
        let chunkservers = ChunkserversServer::new(api::Chunkservers(mds.clone()))
            .max_decoding_message_size(REPORT_BYTES_MAX);
        let cluster =
            ClusterServer::new(api::Cluster(mds.clone())).max_decoding_message_size(REQUEST_BYTES_MAX);
        let serving = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .tcp_nodelay(true)
            .max_concurrent_streams(REQUESTS_PER_CONNECTION_MAX)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .add_service(InterceptedService::new(volumes, move |request| {
                port::asks(port::belongs(request, ours)?, Kind::Caller)
            }))
            .add_service(InterceptedService::new(chunkservers, |request| port::asks(request, Kind::Peer)))
            .add_service(InterceptedService::new(cluster, |request| port::asks(request, Kind::Caller)))
            .serve_with_incoming_shutdown(port::callers(listener), async move { stopped.stopping().await });
        let serving = tokio::spawn(serving);
        let steward = tokio::spawn(steward::run(mds.clone()));
        Ok(Self { mds, serving, steward })
    }

    pub fn address(&self) -> SocketAddr {
        self.mds.address
    }

    pub fn cluster(&self) -> ClusterId {
        self.mds.replicated.cluster()
    }

    /// Waits until this MDS cannot go on, and says why. Cancel-safe.
    pub async fn failed(&self) -> String {
        self.mds.replicated.failed().await
    }

    /// Closes the port and all streams, then the state.
    pub async fn stop(self) {
        let Self { mds, mut serving, steward } = self;
        mds.stopping.send_replace(true);
        let _ = steward.await;
        if tokio::time::timeout(CLOSING_PATIENCE, &mut serving).await.is_err() {
            serving.abort();
            let _ = serving.await;
        }
        mds.replicated.stop().await;
    }
}
