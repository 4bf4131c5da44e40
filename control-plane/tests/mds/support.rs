//! An MDS in this process or in one of its own, and chunkservers that only talk.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use evolute_control_plane::config::{Config, Limits};
use evolute_control_plane::mds::Server;
use evolute_protocol::geometry::{GIB, TIB};
use evolute_protocol::rpc::chunkservers_client::ChunkserversClient;
use evolute_protocol::rpc::cluster_client::ClusterClient;
use evolute_protocol::rpc::volumes_client::VolumesClient;
use evolute_protocol::rpc::{AcceptMdsRequest, CopysetInventory, Inventory, MdsState, VolumeInventory};
use evolute_protocol::rpc::{
    ChangeMembers, ClusterStatus, CreateReplica, ErrorWord, MemberReport, Order, RegisterRequest,
    RegisterResponse, ReplicaReport, Report, Role, StatusRequest, VolumeUse, order,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

/// Long enough for a loaded machine; nothing waits that long when all is well.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub async fn until<F: Future<Output = bool>>(what: &str, mut happened: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !happened().await {
        assert!(Instant::now() < deadline, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An MDS in this process, with its own directory.
pub struct Mds {
    pub dir: tempfile::TempDir,
    pub server: Option<Server>,
    pub address: SocketAddr,
    interval: Duration,
    limits: Limits,
}

impl Mds {
    pub async fn start() -> Self {
        // Long, so that nothing in a test happens because time passed.
        Self::with_interval(Duration::from_secs(60)).await
    }

    pub async fn with_interval(interval: Duration) -> Self {
        Self::with(interval, Limits::default()).await
    }

    pub async fn with(interval: Duration, limits: Limits) -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut this = Self { dir, server: None, address: ([127, 0, 0, 1], 0).into(), interval, limits };
        this.start_again().await;
        this
    }

    pub async fn start_again(&mut self) {
        let config = Config {
            data_dir: self.dir.path().join("mds"),
            existing: false,
            listen: ([127, 0, 0, 1], 0).into(),
            report_interval: self.interval,
            limits: self.limits,
            ready_file: None,
        };
        let server = Server::start(&config).await.expect("it starts");
        self.address = server.address();
        self.server = Some(server);
    }

    pub async fn stop(&mut self) {
        self.server.take().expect("running").stop().await;
    }
}

pub async fn channel(address: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{address}")).expect("a URI").connect().await.expect("it listens")
}

pub async fn volumes(address: SocketAddr) -> VolumesClient<Channel> {
    VolumesClient::new(channel(address).await)
}

pub async fn status(address: SocketAddr) -> ClusterStatus {
    ClusterClient::new(channel(address).await).status(StatusRequest {}).await.expect("a status").into_inner()
}

/// The word of a refusal.
pub fn word<T: std::fmt::Debug>(result: Result<T, Status>) -> ErrorWord {
    let status = result.expect_err("it should be refused");
    ErrorWord::of(&status).unwrap_or_else(|| panic!("not a refusal of ours: {status:?}"))
}

/// What a chunkserver keeps on its disk.
#[derive(Debug, Clone)]
pub struct Identity {
    pub id: u32,
    pub token: Vec<u8>,
    pub cluster: Vec<u8>,
    pub zone: String,
    pub replicas: BTreeMap<u32, ReplicaReport>,
    /// The newest state of an MDS that it has obeyed.
    pub obeyed: MdsState,
    /// What it says it has when it is asked: of each copyset.
    pub volumes: Vec<VolumeInventory>,
}

pub fn instance() -> Vec<u8> {
    rand::random::<[u8; 16]>().to_vec()
}

pub fn first_registration(zone: &str) -> RegisterRequest {
    RegisterRequest {
        address: "127.0.0.1:7801".to_owned(),
        zone: zone.to_owned(),
        server: format!("server-in-{zone}"),
        capacity_bytes: TIB,
        instance: instance(),
        version: "0.1.0".to_owned(),
        ..RegisterRequest::default()
    }
}

pub fn registration(identity: &Identity) -> RegisterRequest {
    RegisterRequest {
        chunkserver: identity.id,
        token: identity.token.clone(),
        cluster_id: identity.cluster.clone(),
        mds_seen: Some(identity.obeyed.clone()),
        ..first_registration(&identity.zone)
    }
}

pub async fn register(mds: SocketAddr, request: RegisterRequest) -> Result<RegisterResponse, Status> {
    let mut client = ChunkserversClient::new(channel(mds).await);
    client.register(request).await.map(tonic::Response::into_inner)
}

/// A chunkserver without a disk: registers, reports, does as it is told, and leads what it is to lead first.
pub struct Chunkserver {
    pub identity: Identity,
    pub seen: Arc<Mutex<Seen>>,
    pub instance: Vec<u8>,
    reports: mpsc::Sender<Report>,
    stream: JoinHandle<()>,
    chatter: Option<JoinHandle<()>>,
}

/// What the Raft groups of the clusters of these tests agreed on, by control plane and copyset, once members changed.
static GROUPS: Mutex<BTreeMap<(SocketAddr, u32), Group>> = Mutex::new(BTreeMap::new());

#[derive(Clone)]
struct Group {
    members: Vec<MemberReport>,
    leader: u32,
    term: u64,
}

#[derive(Debug, Default)]
pub struct Seen {
    pub orders: Vec<Order>,
    pub addresses: BTreeMap<u32, String>,
    pub replicas: BTreeMap<u32, ReplicaReport>,
    pub free_bytes: u64,
    pub volumes: Vec<VolumeUse>,
    pub obeyed: MdsState,
    pub lazy: bool,
    pub ended: Option<Option<ErrorWord>>,
    /// Learners do not catch up.
    pub stalls: bool,
    mds: Option<SocketAddr>,
}

/// Replicas, what was obeyed, and the volumes it says it has.
type Kept = (BTreeMap<u32, ReplicaReport>, MdsState, Vec<VolumeInventory>);

impl Identity {
    fn inventory(&self, seen: &Seen) -> Inventory {
        let copyset = |replica: &ReplicaReport| CopysetInventory {
            copyset: replica.copyset,
            replica: replica.replica,
            role: replica.role,
            term: replica.term,
            members: replica.members.clone(),
            volumes: self.volumes.clone(),
        };
        let registered = registration(self);
        Inventory {
            chunkserver: self.id,
            token: self.token.clone(),
            cluster_id: self.cluster.clone(),
            address: registered.address,
            zone: registered.zone,
            server: registered.server,
            capacity_bytes: registered.capacity_bytes,
            version: registered.version,
            seen: Some(seen.obeyed.clone()),
            copysets: seen.replicas.values().map(copyset).collect(),
        }
    }
}

/// A person says that this MDS is to go on.
pub async fn accept(address: SocketAddr) {
    let request = AcceptMdsRequest { go_on: true };
    ClusterClient::new(channel(address).await).accept_mds(request).await.expect("accepted");
}

impl Chunkserver {
    pub async fn start(mds: SocketAddr, zone: &str) -> Self {
        Self::run(mds, first_registration(zone), Kept::default(), false).await
    }

    /// One that carries out no order.
    pub async fn start_lazy(mds: SocketAddr, zone: &str) -> Self {
        Self::run(mds, first_registration(zone), Kept::default(), true).await
    }

    /// The same disk, a new process.
    pub async fn start_again(mds: SocketAddr, identity: &Identity) -> Self {
        let kept = (identity.replicas.clone(), identity.obeyed.clone(), identity.volumes.clone());
        Self::run(mds, registration(identity), kept, false).await
    }

    async fn run(
        mds: SocketAddr,
        request: RegisterRequest,
        (replicas, obeyed, volumes): Kept,
        lazy: bool,
    ) -> Self {
        let (zone, instance) = (request.zone.clone(), request.instance.clone());
        let answer = register(mds, request).await.expect("registered");
        let identity = Identity {
            id: answer.chunkserver,
            token: answer.token,
            cluster: answer.cluster_id,
            zone,
            replicas,
            obeyed,
            volumes,
        };
        let seen = Seen {
            replicas: identity.replicas.clone(),
            obeyed: identity.obeyed.clone(),
            free_bytes: TIB - GIB,
            lazy,
            mds: Some(mds),
            ..Seen::default()
        };
        let seen = Arc::new(Mutex::new(seen));
        let (reports, outgoing) = mpsc::channel(64);
        let mut client = ChunkserversClient::new(channel(mds).await);
        let recalling = client.clone();
        let mut orders =
            client.heartbeat(ReceiverStream::new(outgoing)).await.expect("a stream").into_inner();
        let this_identity = identity.clone();
        let (seeing, answering, my_instance) = (seen.clone(), reports.clone(), instance.clone());
        let stream = tokio::spawn(async move {
            let end = loop {
                match orders.message().await {
                    Ok(Some(orders)) => {
                        let again = {
                            let mut seen = seeing.lock().expect("lock");
                            seen.addresses =
                                orders.addresses.into_iter().map(|a| (a.chunkserver, a.address)).collect();
                            seen.orders.extend(orders.orders.iter().cloned());
                            let mut again = !seen.lazy && !orders.orders.is_empty();
                            if let Some(state) = orders.mds_state {
                                again |= state.reign != seen.obeyed.reign;
                                seen.obeyed = state;
                            }
                            if orders.recall {
                                let inventory = this_identity.inventory(&seen);
                                let mut client = recalling.clone();
                                tokio::spawn(async move { client.recall(inventory).await });
                            }
                            if !seen.lazy {
                                orders
                                    .orders
                                    .into_iter()
                                    .for_each(|order| seen.obey(this_identity.id, order));
                            }
                            again.then(|| seen.report(&this_identity, &my_instance))
                        };
                        if let Some(report) = again {
                            let _ = answering.send(report).await;
                        }
                    }
                    Ok(None) => break None,
                    Err(status) => break ErrorWord::of(&status),
                }
            };
            seeing.lock().expect("lock").ended = Some(end);
        });
        let this = Self { identity, seen, instance, reports, stream, chatter: None };
        this.report().await;
        this
    }

    pub async fn report(&self) {
        let report = self.seen.lock().expect("lock").report(&self.identity, &self.instance);
        let _ = self.reports.send(report).await;
    }

    /// From now on it reports all the time.
    pub fn chatty(mut self) -> Self {
        let (seen, reports) = (self.seen.clone(), self.reports.clone());
        let (identity, instance) = (self.identity.clone(), self.instance.clone());
        self.chatter = Some(tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(50)).await;
                let report = seen.lock().expect("lock").report(&identity, &instance);
                if reports.send(report).await.is_err() {
                    return;
                }
            }
        }));
        self
    }

    /// As kill -9: the connection just ends. What is left is the disk.
    pub async fn kill(mut self) -> Identity {
        if let Some(chatter) = self.chatter.take() {
            chatter.abort();
            let _ = chatter.await;
        }
        self.stream.abort();
        let _ = self.stream.await;
        let seen = self.seen.lock().expect("lock");
        Identity { replicas: seen.replicas.clone(), obeyed: seen.obeyed.clone(), ..self.identity.clone() }
    }

    pub fn replicas(&self) -> usize {
        self.seen.lock().expect("lock").replicas.len()
    }
}

impl Seen {
    fn report(&mut self, identity: &Identity, instance: &[u8]) -> Report {
        let groups = GROUPS.lock().expect("lock");
        for replica in self.replicas.values_mut() {
            let group = self.mds.and_then(|mds| groups.get(&(mds, replica.copyset)));
            let me = |group: &&Group| group.members.iter().find(|m| m.replica == replica.replica).copied();
            let Some((group, me)) = group.and_then(|group| Some((group, me(&group)?))) else { continue };
            if me.voter && replica.role() == Role::Learner {
                replica.set_role(Role::Follower);
            }
            if group.term > replica.term {
                (replica.term, replica.leader_chunkserver) = (group.term, group.leader);
                replica.set_role(if group.leader == me.chunkserver { Role::Leader } else { Role::Follower });
            }
            replica.members.clone_from(&group.members);
        }
        drop(groups);
        Report {
            chunkserver: identity.id,
            token: identity.token.clone(),
            instance: instance.to_vec(),
            capacity_bytes: TIB,
            used_bytes: TIB - self.free_bytes,
            free_bytes: self.free_bytes,
            replicas: self.replicas.values().cloned().collect(),
            volumes: self.volumes.clone(),
            mds_seen: Some(self.obeyed.clone()),
            ..Report::default()
        }
    }

    fn obey(&mut self, id: u32, order: Order) {
        match order.what.expect("an order says what") {
            order::What::CreateReplica(create) => {
                self.replicas.entry(create.copyset).or_insert_with(|| created(id, &create));
            }
            order::What::DropVolume(drop) => {
                let replica = self.replicas.get_mut(&drop.copyset).expect("its own replica");
                assert_eq!(replica.role(), Role::Leader, "only leaders are told to drop");
                replica.dropped_volumes.push(drop.volume);
            }
            order::What::TransferLeader(transfer) => {
                let replica = self.replicas.get_mut(&transfer.copyset).expect("its own replica");
                let to = replica.members.iter().find(|m| m.replica == transfer.to_replica).expect("a member");
                replica.leader_chunkserver = to.chunkserver;
                replica.set_role(Role::Follower);
                replica.term += 1;
                agree(self.mds, replica);
            }
            order::What::ChangeMembers(change) => {
                let replica = self.replicas.get_mut(&change.copyset).expect("its own replica");
                // It may have handed over since it reported, and refuses then, as a chunkserver does.
                if replica.role() != Role::Leader {
                    return;
                }
                change_members(replica, &change, self.stalls);
                agree(self.mds, replica);
            }
            order::What::RemoveReplica(remove) => {
                if self.replicas.get(&remove.copyset).is_some_and(|mine| mine.replica == remove.replica) {
                    self.replicas.remove(&remove.copyset);
                }
            }
        }
    }
}

/// What this leader says is so for all members.
fn agree(mds: Option<SocketAddr>, replica: &ReplicaReport) {
    let (members, leader, term) = (replica.members.clone(), replica.leader_chunkserver, replica.term);
    let mds = mds.expect("it talks to one");
    GROUPS.lock().expect("lock").insert((mds, replica.copyset), Group { members, leader, term });
}

/// One step nearer to what was ordered: a learner first, then a voter in the place of another.
fn change_members(replica: &mut ReplicaReport, change: &ChangeMembers, stalls: bool) {
    if stalls {
        replica.last_index = 1000;
        replica.members.iter_mut().filter(|m| m.voter).for_each(|m| m.matched_index = 1000);
    }
    let matched_index = if stalls { 0 } else { replica.last_index };
    match &change.add {
        Some(add) if replica.members.iter().all(|member| member.replica != add.replica) => {
            replica.members.push(MemberReport { voter: false, matched_index, ..*add });
        }
        Some(_) if stalls => {}
        _ => {
            if let Some(add) = change.add.filter(|_| change.remove_replica == replica.replica) {
                // It hands its leadership over before it goes.
                (replica.term, replica.leader_chunkserver) = (replica.term + 1, add.chunkserver);
                replica.set_role(Role::Follower);
            }
            replica.members.retain(|member| member.replica != change.remove_replica);
            replica.members.iter_mut().for_each(|member| member.voter = true);
        }
    }
}

fn created(id: u32, create: &CreateReplica) -> ReplicaReport {
    let first =
        create.members.iter().find(|m| m.replica == create.first_leader).expect("a member leads first");
    let mine = create.members.iter().find(|m| m.replica == create.replica);
    assert_eq!(mine.map(|mine| mine.chunkserver), (!create.joining).then_some(id));
    let role = match first.chunkserver == id {
        _ if create.joining => Role::Learner,
        true => Role::Leader,
        false => Role::Follower,
    };
    ReplicaReport {
        copyset: create.copyset,
        replica: create.replica,
        role: i32::from(role),
        term: 1,
        leader_chunkserver: first.chunkserver,
        last_index: 1,
        committed_index: 1,
        applied_index: 1,
        members: create.members.iter().map(|m| MemberReport { matched_index: 1, ..*m }).collect(),
        ..ReplicaReport::default()
    }
}

/// The groups that `dead` led are led by others of these from now on.
pub fn elect(chunkservers: &[&Chunkserver], dead: u32) {
    let mut leaders: BTreeMap<u32, u32> = BTreeMap::new();
    for chunkserver in chunkservers {
        let mut seen = chunkserver.seen.lock().expect("lock");
        let led = seen.replicas.values_mut().filter(|replica| replica.leader_chunkserver == dead);
        for replica in led.filter(|replica| replica.role() != Role::Learner) {
            let leader = *leaders.entry(replica.copyset).or_insert(chunkserver.identity.id);
            replica.leader_chunkserver = leader;
            replica.term += 1;
            replica.set_role(if leader == chunkserver.identity.id { Role::Leader } else { Role::Follower });
        }
    }
}

/// Three chunkservers in three zones, and six copysets whose replicas all exist.
pub async fn three_chunkservers(mds: SocketAddr) -> [Chunkserver; 3] {
    let chunkservers = [
        Chunkserver::start(mds, "z1").await,
        Chunkserver::start(mds, "z2").await,
        Chunkserver::start(mds, "z3").await,
    ];
    six_healthy_copysets(mds).await;
    chunkservers
}

/// Waits for them.
pub async fn six_healthy_copysets(mds: SocketAddr) {
    until("six healthy copysets", || async {
        let status = status(mds).await;
        status.copysets.len() == 6 && status.health() == evolute_protocol::rpc::Health::Ok
    })
    .await;
}

/// `evolute-mds` as a process of its own. Killed when dropped.
pub struct Process {
    pub child: Child,
    pub address: SocketAddr,
}

impl Process {
    pub fn command(args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_evolute-mds"));
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Starts it and waits until it serves.
    pub async fn start(dir: &Path, args: &[&str]) -> Self {
        let ready = dir.join("ready.json");
        let _ = std::fs::remove_file(&ready);
        let data = dir.join("mds");
        let mut command = Self::command(&["--listen", "127.0.0.1:0"]);
        command.arg("--data-dir").arg(data).arg("--ready-file").arg(&ready).args(args);
        let mut child = command.spawn().expect("it is built");
        until("the MDS is ready", || {
            assert_eq!(child.try_wait().expect("its state"), None, "it ended");
            std::future::ready(ready.exists())
        })
        .await;
        let content: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&ready).expect("readable")).expect("JSON");
        assert_eq!(content["pid"], child.id());
        let address = content["address"].as_str().expect("an address").parse().expect("an address");
        Self { child, address }
    }

    pub fn kill(mut self) {
        self.child.kill().expect("ours to kill");
        self.child.wait().expect("it ends");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
