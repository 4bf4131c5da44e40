//! The control plane's end of the control thread: which MDS to ask, how long, and what its answers mean.
//!
//! What always holds: a question is asked of one MDS after the other until one answers, for ever; only an answer that
//! names its refusal ends it otherwise. A map that cannot be right is refused by name and never half believed.
//!
//! It does not know what is asked, nor what is remembered of the answers ([`super::control`]).

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId, SegmentIndex};
use evolute_protocol::rpc::volumes_client::VolumesClient;
use evolute_protocol::rpc::{CLUSTER_KEY, ErrorWord, Segment, VolumeMap};
use evolute_protocol::{NotAnAddress, mds_addresses};
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::routing::{ChunkserverPlace, CopysetMembers, Map, SegmentCopysets};

/// How long one question to one MDS may take before the next one is asked.
const CALL_MAX: Duration = Duration::from_secs(5);
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// The map of the largest volume, 64 Ki segments of 64 numbers, is some 20 MiB.
const MAP_BYTES_MAX: usize = 64 << 20;
/// Between rounds over all MDS that did not answer: first, and at most.
const WAIT_MIN: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(1);

/// The addresses of all MDS, checked: each as it was given, and as it is called.
pub type Endpoints = Vec<(String, Endpoint)>;

pub fn endpoints(addresses: &[String]) -> Result<Endpoints, NotAnAddress> {
    let addresses = mds_addresses(addresses)?;
    addresses.iter().map(|address| endpoint(address)).collect()
}

fn endpoint(address: &str) -> Result<(String, Endpoint), NotAnAddress> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| NotAnAddress::This(address.to_owned()))?;
    let endpoint = endpoint.connect_timeout(CONNECT_MAX).timeout(CALL_MAX).tcp_nodelay(true);
    Ok((address.to_owned(), endpoint))
}

/// What the control plane refused, for good.
pub struct Refusal {
    pub word: ErrorWord,
    pub message: String,
}

/// Whoever asks this way says which cluster it belongs to, once it belongs to one: another cluster's MDS at the address
/// of ours must not tell us that the volume was deleted, nor place its data.
pub type Client = VolumesClient<InterceptedService<Channel, Belonging>>;

#[derive(Debug, Clone, Default)]
pub struct Belonging(Arc<OnceLock<AsciiMetadataValue>>);

impl Interceptor for Belonging {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(cluster) = self.0.get() {
            request.metadata_mut().insert(CLUSTER_KEY, cluster.clone());
        }
        Ok(request)
    }
}

/// The MDS we know, and which of them answered last.
pub struct Mds {
    clients: Vec<(String, Client)>,
    belonging: Belonging,
    current: Cell<usize>,
    away_since: Cell<Option<Instant>>,
}

impl Mds {
    /// Connects to nobody yet.
    pub fn new(endpoints: Endpoints) -> Self {
        let belonging = Belonging::default();
        let client = |to: Endpoint| {
            VolumesClient::with_interceptor(to.connect_lazy(), belonging.clone())
                .max_decoding_message_size(MAP_BYTES_MAX)
        };
        Self {
            clients: endpoints.into_iter().map(|(name, to)| (name, client(to))).collect(),
            belonging,
            current: Cell::new(0),
            away_since: Cell::new(None),
        }
    }

    /// From now on only this cluster's MDS answers. A volume never goes to another one.
    pub fn belong_to(&self, cluster: ClusterId) {
        let digits = cluster.to_string().parse().expect("hexadecimal digits");
        self.belonging.0.get_or_init(|| digits);
    }

    /// Asks one after the other until one answers, however long that takes.
    pub async fn call<T, F>(&self, what: &str, ask: impl Fn(Client) -> F) -> Result<T, Refusal>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let (mut wait, mut tried) = (WAIT_MIN, 0);
        loop {
            let at = self.current.get();
            let (name, client) = &self.clients[at];
            let status = match ask(client.clone()).await {
                Ok(answer) => {
                    self.answers();
                    return Ok(answer.into_inner());
                }
                Err(status) => status,
            };
            match ErrorWord::of(&status) {
                Some(ErrorWord::NotLeader | ErrorWord::WrongCluster) | None => {
                    self.current.set((at + 1) % self.clients.len());
                }
                Some(ErrorWord::Busy | ErrorWord::MdsPutBack) => {}
                Some(word) => {
                    self.answers();
                    return Err(Refusal { word, message: status.message().to_owned() });
                }
            }
            tried += 1;
            if tried % self.clients.len() == 0 {
                if self.away_since.get().is_none() && tried > self.clients.len() {
                    self.away_since.set(Some(Instant::now()));
                    warn!("waiting for the control plane to {what} ({name}: {})", status.message());
                }
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(WAIT_MAX);
            }
        }
    }

    fn answers(&self) {
        if let Some(since) = self.away_since.take() {
            info!("the control plane answers again after {:.1} s", since.elapsed().as_secs_f64());
        }
    }
}

/// The control plane's answer cannot be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadMap(pub &'static str);

impl fmt::Display for BadMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

pub fn copysets_of(segment: &Segment) -> Result<SegmentCopysets, BadMap> {
    let copysets: Vec<_> = segment.chunk_copysets.iter().map(|id| CopysetId(*id)).collect();
    copysets.try_into().map_err(|_| BadMap("a segment has 64 chunks"))
}

/// A map as we keep it, checked and with addresses resolved.
pub async fn map_of(from: VolumeMap) -> Result<Map, BadMap> {
    let cluster: [u8; 16] =
        from.cluster_id.as_slice().try_into().map_err(|_| BadMap("a cluster id has 16 bytes"))?;
    let mut map = Map { cluster: ClusterId(cluster), ..Map::default() };
    for route in from.copysets {
        let replicas: Vec<_> =
            route.replicas.iter().map(|replica| ChunkserverId(replica.chunkserver)).collect();
        if replicas.is_empty() {
            return Err(BadMap("a copyset without replicas"));
        }
        for replica in route.replicas {
            let chunkserver = ChunkserverId(replica.chunkserver);
            if !map.chunkservers.iter().any(|place| place.chunkserver == chunkserver) {
                let place = ChunkserverPlace { chunkserver, address: replica.address, resolved: None };
                map.chunkservers.push(place);
            }
        }
        let leader = (route.leader_chunkserver != 0).then_some(ChunkserverId(route.leader_chunkserver));
        map.copysets.push(CopysetMembers { copyset: CopysetId(route.copyset), replicas, leader });
    }
    for segment in from.segments {
        let copysets = copysets_of(&segment)?;
        if copysets.iter().any(|id| !map.copysets.iter().any(|of| of.copyset == *id)) {
            return Err(BadMap("a chunk of a copyset that is not in the map"));
        }
        map.segments.push((SegmentIndex(segment.index), copysets));
    }
    resolve(&mut map).await;
    Ok(map)
}

/// Looks up where each chunkserver is, here and now.
pub async fn resolve(map: &mut Map) {
    for place in &mut map.chunkservers {
        place.resolved = match place.address.parse() {
            Ok(address) => Some(address),
            Err(_) => tokio::net::lookup_host(&place.address).await.ok().and_then(|mut found| found.next()),
        };
    }
}
