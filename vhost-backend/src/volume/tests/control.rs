//! The control thread and the client against a control plane that speaks the real services over a real socket.

use std::collections::HashMap;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_protocol::epoch::Epoch;
use evolute_protocol::geometry::{CHUNK_BYTES, GIB, MIB};
use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId};
use evolute_protocol::rpc::volumes_server::{Volumes, VolumesServer};
use evolute_protocol::rpc::{
    AbandonImportRequest, AbandonImportResponse, AllocateSegmentRequest, AttachRequest, AttachResponse,
    BeginImportRequest, CLUSTER_KEY, CopysetRoute, CreateVolumeRequest, DeleteVolumeRequest,
    DeleteVolumeResponse, DetachRequest, DetachResponse, ErrorWord, FinishImportRequest,
    FinishImportResponse, ListVolumesRequest, ListVolumesResponse, MapRequest, ReplicaRoute, Segment,
    ShowVolumeRequest, Volume, VolumeMap,
};
use tonic::{Request, Response, Status};

use super::cluster::{CLUSTER, Cluster, SERVERS, VOLUME};
use super::pattern;
use crate::backing::Capacity;
use crate::volume::VolumeOptions;
use crate::volume::attach::StateError;
use crate::volume::client::{Client, ClientError};
use crate::volume::control::{self, AttachError, ControlOptions};
use crate::volume::identity::Secret;

const C1: CopysetId = CopysetId(1);

#[derive(Debug, Default)]
struct Mds {
    attachment: u32,
    holder: Option<String>,
    segments: HashMap<u32, Vec<u32>>,
    /// Calls, by name.
    calls: HashMap<&'static str, u32>,
    /// Refuses the next calls so.
    refuse: Vec<ErrorWord>,
    full: bool,
    deleted: bool,
    /// Whose MDS it is, if that matters: whoever names another cluster is refused.
    of: Option<ClusterId>,
}

#[derive(Clone)]
struct Service {
    mds: Arc<Mutex<Mds>>,
    cluster: Cluster,
}

impl Service {
    fn call<T>(&self, name: &'static str, request: &Request<T>) -> Result<MutexGuard<'_, Mds>, Status> {
        let mut mds = self.mds.lock().expect("sound");
        let named = request.metadata().get(CLUSTER_KEY);
        if named.zip(mds.of).is_some_and(|(named, ours)| named.as_bytes() != ours.to_string().as_bytes()) {
            return Err(ErrorWord::WrongCluster.status("another cluster"));
        }
        *mds.calls.entry(name).or_default() += 1;
        match mds.refuse.pop() {
            Some(word) => Err(word.status("as the test says")),
            None if mds.deleted => Err(ErrorWord::NotFound.status("deleted")),
            None => Ok(mds),
        }
    }

    fn map(&self, mds: &Mds) -> VolumeMap {
        let replica = |server: &ChunkserverId| ReplicaRoute {
            replica: u64::from(server.0),
            chunkserver: server.0,
            // A name, not a number: it has to be looked up.
            address: format!("localhost:{}", self.cluster.address(*server).port()),
        };
        let mut copysets: Vec<_> = self.cluster.map().copysets;
        copysets.sort_by_key(|members| members.copyset);
        VolumeMap {
            segments: mds
                .segments
                .iter()
                .map(|(index, copysets)| Segment { index: *index, chunk_copysets: copysets.clone() })
                .collect(),
            copysets: copysets
                .iter()
                .map(|members| CopysetRoute {
                    copyset: members.copyset.0,
                    replicas: SERVERS.iter().map(replica).collect(),
                    leader_chunkserver: 0,
                })
                .collect(),
            cluster_id: CLUSTER.0.to_vec(),
        }
    }
}

#[tonic::async_trait]
impl Volumes for Service {
    async fn attach(&self, request: Request<AttachRequest>) -> Result<Response<AttachResponse>, Status> {
        let mut mds = self.call("attach", &request)?;
        let request = request.into_inner();
        if request.name != "disk" {
            return Err(ErrorWord::NotFound.status("no such volume"));
        }
        if mds.holder.as_ref().is_some_and(|holder| *holder != request.holder) && !request.takeover {
            return Err(ErrorWord::AttachedElsewhere.status(format!("held by {:?}", mds.holder)));
        }
        mds.attachment += 1;
        mds.holder = Some(request.holder);
        let volume = Volume { id: VOLUME.0, name: request.name, size_bytes: 16 * GIB, ..Volume::default() };
        let map = self.map(&mds);
        Ok(Response::new(AttachResponse { volume: Some(volume), attachment: mds.attachment, map: Some(map) }))
    }

    async fn detach(&self, request: Request<DetachRequest>) -> Result<Response<DetachResponse>, Status> {
        let mut mds = self.call("detach", &request)?;
        if request.into_inner().attachment == mds.attachment {
            mds.holder = None;
        }
        Ok(Response::new(DetachResponse {}))
    }

    async fn allocate_segment(
        &self,
        request: Request<AllocateSegmentRequest>,
    ) -> Result<Response<Segment>, Status> {
        let mut mds = self.call("allocate", &request)?;
        let request = request.into_inner();
        if request.attachment != mds.attachment {
            return Err(ErrorWord::FencedOut.status("an older attachment"));
        }
        if mds.full {
            return Err(ErrorWord::NoPlacement.status("full"));
        }
        let copysets: Vec<u32> = self.cluster.segment().iter().map(|id| id.0).collect();
        let copysets = mds.segments.entry(request.segment).or_insert(copysets).clone();
        Ok(Response::new(Segment { index: request.segment, chunk_copysets: copysets }))
    }

    async fn map(&self, request: Request<MapRequest>) -> Result<Response<VolumeMap>, Status> {
        let mds = self.call("map", &request)?;
        Ok(Response::new(Service::map(self, &mds)))
    }

    async fn create(&self, _: Request<CreateVolumeRequest>) -> Result<Response<Volume>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list(&self, _: Request<ListVolumesRequest>) -> Result<Response<ListVolumesResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn show(&self, _: Request<ShowVolumeRequest>) -> Result<Response<Volume>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete(
        &self,
        _: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn begin_import(&self, _: Request<BeginImportRequest>) -> Result<Response<Volume>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn finish_import(
        &self,
        _: Request<FinishImportRequest>,
    ) -> Result<Response<FinishImportResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn abandon_import(
        &self,
        _: Request<AbandonImportRequest>,
    ) -> Result<Response<AbandonImportResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// A control plane of one, until it is dropped.
struct Plane {
    service: Service,
    address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Plane {
    fn start(cluster: &Cluster) -> Self {
        let service = Service { mds: Arc::default(), cluster: cluster.clone() };
        Self::serve(service, "127.0.0.1:0".parse().expect("an address"))
    }

    fn serve(service: Service, address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).expect("a free port");
        let address = listener.local_addr().expect("bound");
        listener.set_nonblocking(true).expect("settable");
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let served = service.clone();
        let thread = thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                let incoming = tonic::transport::server::TcpIncoming::from(listener);
                let server = tonic::transport::Server::builder()
                    .add_service(VolumesServer::new(served))
                    .serve_with_incoming(incoming);
                tokio::select! {
                    served = server => served.expect("served"),
                    _ = stopped => {}
                }
            });
        });
        Self { service, address, stop: Some(stop), thread: Some(thread) }
    }

    /// Gone from the network; what it knows comes back with [`Plane::serve`].
    fn stop(mut self) -> (Service, SocketAddr) {
        self.end();
        (self.service.clone(), self.address)
    }

    fn end(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("ended well");
        }
    }

    fn mds(&self) -> MutexGuard<'_, Mds> {
        self.service.mds.lock().expect("sound")
    }

    fn calls(&self, name: &str) -> u32 {
        self.mds().calls.get(name).copied().unwrap_or(0)
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.end();
    }
}

fn options(mds: &[SocketAddr], state_dir: Option<&Path>) -> ControlOptions {
    ControlOptions {
        volume: "disk".into(),
        mds: mds.iter().map(ToString::to_string).collect(),
        holder: "host:/run/disk.sock".into(),
        secret: Secret::of_boot("/run/disk.sock"),
        former_secret: None,
        takeover: false,
        state_dir: state_dir.map(Path::to_path_buf),
        capacity: Capacity::default(),
    }
}

fn client(mds: &[SocketAddr], state_dir: Option<&Path>) -> Result<Client, ClientError> {
    Client::attach_with(options(mds, state_dir), VolumeOptions::default())
}

fn data(seed: u64, len: usize) -> Bytes {
    Bytes::from(pattern(seed, len))
}

#[test]
fn a_client_writes_flushes_reads_and_gives_the_volume_back() {
    let cluster = Cluster::start(3);
    let plane = Plane::start(&cluster);
    let client = client(&[plane.address], None).expect("attached");
    assert_eq!(client.size_bytes(), 16 * GIB);
    for n in 0..100u64 {
        client.write(n * MIB + 512, data(n, 1 << 20)).expect("taken");
    }
    client.write(GIB, Bytes::from(vec![7; 3 << 20])).expect("longer than one request may be");
    client.discard(8 * GIB, 8 * GIB).expect("taken");
    client.flush().expect("durable");
    for n in [0u64, 15, 63, 99] {
        assert_eq!(client.read(n * MIB + 512, 1 << 20).expect("read"), data(n, 1 << 20));
    }
    assert_eq!(client.read(GIB - 512, (3 << 20) + 512).expect("read")[511..513], [0, 7]);
    let outside = client.write(16 * GIB - 512, data(1, 1024));
    assert!(matches!(outside, Err(ClientError::OutOfBounds { .. })));
    client.detach().expect("detached");
    assert_eq!(plane.mds().holder, None);
    // Two segments were touched: two questions, however many writes waited.
    assert_eq!((plane.calls("allocate"), plane.calls("attach")), (2, 1));
}

#[test]
fn an_mds_that_is_away_does_not_lead_or_is_busy_is_waited_for() {
    let cluster = Cluster::start(1);
    let plane = Plane::start(&cluster);
    plane.mds().refuse = vec![ErrorWord::NotLeader, ErrorWord::Busy, ErrorWord::NotLeader];
    let nobody = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
    let client = client(&[nobody, plane.address], None).expect("attached");
    client.write(0, data(1, 4096)).expect("taken");
    client.flush().expect("durable");
    client.detach().expect("detached");
}

#[test]
fn a_control_plane_that_comes_late_is_waited_for() {
    let cluster = Cluster::start(1);
    let (service, address) = Plane::start(&cluster).stop();
    let (control, _link) = control::start(options(&[address], None)).expect("started");
    assert!(matches!(control.wait_attached(Duration::from_millis(300)), Ok(None)));
    let plane = Plane::serve(service, address);
    let attached = control.wait_attached(Duration::from_secs(30)).expect("no error").expect("in time");
    assert_eq!(attached.epoch, Epoch { attachment: 1, incarnation: 0 });
    assert!(control.detach(Duration::from_secs(10)));
    drop(plane);
}

#[test]
fn what_can_never_succeed_is_told_at_once() {
    let cluster = Cluster::start(1);
    let plane = Plane::start(&cluster);
    let other = ControlOptions { volume: "nothing".into(), ..options(&[plane.address], None) };
    let refused = Client::attach_with(other, VolumeOptions::default()).expect_err("no such volume");
    assert!(matches!(refused, ClientError::Attach(AttachError::NotFound(name)) if name == "nothing"));
    plane.mds().holder = Some("somebody:else".into());
    let refused = client(&[plane.address], None).expect_err("held").to_string();
    assert!(refused.contains("held elsewhere") && refused.contains("somebody:else"), "{refused}");
    let taken = ControlOptions { takeover: true, ..options(&[plane.address], None) };
    Client::attach_with(taken, VolumeOptions::default()).expect("taken over").detach().expect("detached");
    for bad in ["", "localhost", "host:port", "host:99999"] {
        let options = ControlOptions { mds: vec![bad.into()], ..options(&[], None) };
        assert!(matches!(control::start(options), Err(AttachError::MdsAddress(_))), "{bad:?}");
    }
}

/// The backend is killed while the control plane is away. It has to come back by what it remembers, and find all it
/// ever wrote: also in the segment that was allocated last.
#[test]
fn a_restart_needs_no_control_plane_and_forgets_no_segment() {
    let cluster = Cluster::start(2);
    let directory = tempfile::tempdir().expect("a directory");
    let plane = Plane::start(&cluster);
    let first = client(&[plane.address], Some(directory.path())).expect("attached");
    first.write(3 * GIB, data(3, 4096)).expect("taken");
    first.flush().expect("durable");
    let (service, address) = plane.stop();
    drop(first);
    for incarnation in 1..4 {
        let again = client(&[address], Some(directory.path())).expect("attached without anybody's help");
        assert_eq!(again.attached().epoch, Epoch { attachment: 1, incarnation });
        assert_eq!(again.read(3 * GIB, 4096).expect("read"), data(3, 4096));
        again.write(3 * GIB + 4096, data(u64::from(incarnation), 4096)).expect("taken");
        again.flush().expect("durable");
        drop(again);
    }
    let plane = Plane::serve(service, address);
    let last = client(&[address], Some(directory.path())).expect("attached");
    assert_eq!(plane.calls("attach"), 1);
    last.write(5 * GIB, data(5, 4096)).expect("taken");
    last.detach().expect("detached");
    // Given back: the next one asks again.
    let anew = client(&[address], Some(directory.path())).expect("attached");
    assert_eq!(anew.attached().epoch, Epoch { attachment: 2, incarnation: 0 });
    assert_eq!(anew.read(5 * GIB, 4096).expect("read"), data(5, 4096));
}

/// The disk that holds the state directory is full or gone while all chunkservers move: their new addresses are used all
/// the same, and remembered once that is possible again.
#[test]
fn new_addresses_are_used_although_they_cannot_be_remembered() {
    let mut cluster = Cluster::start(1);
    let directory = tempfile::tempdir().expect("a directory");
    let state_dir = directory.path().join("state");
    let plane = Plane::start(&cluster);
    let client = client(&[plane.address], Some(&state_dir)).expect("attached");
    client.write(0, data(1, 4096)).expect("taken");
    client.flush().expect("durable");
    fs::remove_dir_all(&state_dir).expect("removed");
    let (mut service, address) = plane.stop();
    cluster.move_all();
    service.cluster = cluster.clone();
    let _plane = Plane::serve(service, address);
    assert_eq!(client.read(0, 4096).expect("read"), data(1, 4096));
    fs::create_dir(&state_dir).expect("made");
    let remembered = state_dir.join("disk.attachment");
    let until = Instant::now() + Duration::from_secs(30);
    while !remembered.exists() {
        assert!(Instant::now() < until, "not remembered");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_is_remembered_is_of_who_has_the_secret_whatever_its_host_is_called() {
    let cluster = Cluster::start(1);
    let directory = tempfile::tempdir().expect("a directory");
    let plane = Plane::start(&cluster);
    drop(client(&[plane.address], Some(directory.path())).expect("attached"));
    let with = |holder: &str, place: &str| {
        let secret = Secret::of_boot(place);
        let options = options(&[plane.address], Some(directory.path()));
        let options = ControlOptions { holder: holder.into(), secret, ..options };
        Client::attach_with(options, VolumeOptions::default())
    };
    let renamed = with("host.example.net:/run/disk.sock", "/run/disk.sock").expect("the same holder");
    assert_eq!(renamed.attached().epoch, Epoch { attachment: 1, incarnation: 1 });
    drop(renamed);
    let clone = with("host:/run/disk.sock", "/run/disk.sock on the clone").expect("asks, and this MDS gives");
    assert_eq!(
        clone.attached().epoch.attachment,
        2,
        "not by what the directory says of another's attachment"
    );
    assert_eq!(plane.calls("attach"), 2);
}

#[test]
fn a_damaged_state_file_is_refused_by_name() {
    let cluster = Cluster::start(1);
    let directory = tempfile::tempdir().expect("a directory");
    let plane = Plane::start(&cluster);
    drop(client(&[plane.address], Some(directory.path())).expect("attached"));
    let path = directory.path().join("disk.attachment");
    let mut bytes = fs::read(&path).expect("remembered");
    let at = bytes.len() / 2;
    bytes[at] ^= 4;
    fs::write(&path, &bytes).expect("written");
    let refused = client(&[plane.address], Some(directory.path())).expect_err("damaged");
    let ClientError::Attach(AttachError::State(StateError::Damaged(named))) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(named, path);
    assert_eq!(fs::read(&path).expect("still there"), bytes, "it was not overwritten");
    assert_eq!(plane.calls("attach"), 1);
}

#[test]
fn somebody_elses_attachment_ends_this_one_and_says_so() {
    let cluster = Cluster::start(1);
    let plane = Plane::start(&cluster);
    let old = client(&[plane.address], None).expect("attached");
    old.write(0, data(1, 4096)).expect("taken");
    old.flush().expect("durable");
    let theirs = ControlOptions {
        holder: "other:/run/disk.sock".into(),
        takeover: true,
        ..options(&[plane.address], None)
    };
    let new = Client::attach_with(theirs, VolumeOptions::default()).expect("attached");
    new.write(0, data(2, 4096)).expect("taken");
    new.flush().expect("durable");
    let refused = old.write(0, data(3, 4096)).and_then(|()| old.flush()).expect_err("fenced out");
    assert!(matches!(refused, ClientError::Attach(AttachError::TakenOver(_))), "{refused:?}");
    assert_eq!(new.read(0, 4096).expect("read"), data(2, 4096));
    drop(old);
    assert!(plane.mds().holder.is_some(), "the old one must not detach the new one");
    new.detach().expect("detached");
}

#[test]
fn a_full_cluster_and_a_deleted_volume_are_told() {
    let cluster = Cluster::start(1);
    let plane = Plane::start(&cluster);
    let first = client(&[plane.address], None).expect("attached");
    plane.mds().full = true;
    first.write(0, data(1, 4096)).expect("taken");
    assert!(matches!(first.flush(), Err(ClientError::NoSpace)));
    assert!(matches!(first.write(0, data(1, 4096)), Err(ClientError::NoSpace)), "told by every call after");
    drop(first);
    plane.mds().full = false;
    let second = client(&[plane.address], None).expect("attached");
    plane.mds().deleted = true;
    second.write(0, data(1, 4096)).expect("taken");
    assert!(matches!(second.flush(), Err(ClientError::Attach(AttachError::Deleted(_)))));
}

/// The chunkservers know it by the fence of a deleted volume before the control plane is asked for anything.
#[test]
fn a_volume_that_was_deleted_is_not_said_to_be_somebody_elses() {
    let cluster = Cluster::start(1);
    let plane = Plane::start(&cluster);
    let guest = client(&[plane.address], None).expect("attached");
    guest.write(0, data(1, 4096)).expect("taken");
    guest.flush().expect("durable");
    cluster.state().groups.values_mut().for_each(|group| group.epoch = Epoch::DELETED);
    let refused = guest.write(0, data(2, 4096)).and_then(|()| guest.flush()).expect_err("deleted");
    assert!(matches!(refused, ClientError::Attach(AttachError::Deleted(_))), "{refused:?}");
    assert!(refused.to_string().contains("was deleted"), "{refused}");
}

/// It knows no such volume, or one of its own by the same number. Neither is ours: what needs an MDS waits for the right one.
#[test]
fn the_mds_of_another_cluster_takes_no_disk_away_and_places_none_of_its_data() {
    let cluster = Cluster::start(1);
    let plane = Plane::start(&cluster);
    plane.mds().of = Some(CLUSTER);
    let client = client(&[plane.address], None).expect("attached");
    client.write(0, data(1, 4096)).expect("taken");
    client.flush().expect("durable");
    let (service, address) = plane.stop();
    for deleted in [true, false] {
        let attachment = service.mds.lock().expect("sound").attachment;
        let wrong = Mds { of: Some(ClusterId([9; 16])), attachment, deleted, ..Mds::default() };
        let wrong =
            Plane::serve(Service { mds: Arc::new(Mutex::new(wrong)), cluster: cluster.clone() }, address);
        client.write(9 * GIB, data(2, 4096)).expect("taken");
        thread::sleep(Duration::from_millis(500));
        assert!(wrong.mds().segments.is_empty());
        drop(wrong);
    }
    let _plane = Plane::serve(service, address);
    client.flush().expect("durable");
    assert_eq!(client.read(9 * GIB, 4096).expect("read"), data(2, 4096));
}

/// With every MDS dead, an attached volume goes on: reads, writes, leader changes (P12).
#[test]
fn an_attached_volume_does_not_need_the_control_plane() {
    let cluster = Cluster::start(2);
    let plane = Plane::start(&cluster);
    let client = client(&[plane.address], None).expect("attached");
    client.write(0, data(1, 4096)).expect("taken");
    client.flush().expect("durable");
    let (service, address) = plane.stop();
    cluster.kill(SERVERS[0]);
    cluster.state().lead(C1, Some(SERVERS[1]));
    client.write(4096, data(2, 4096)).expect("taken");
    client.flush().expect("durable");
    assert_eq!(client.read(0, 4096).expect("read"), data(1, 4096));
    // What needs a segment waits, and goes on by itself.
    client.write(9 * GIB + CHUNK_BYTES, data(4, 4096)).expect("taken");
    let before = Instant::now();
    let _plane = Plane::serve(service, address);
    client.flush().expect("durable");
    assert!(before.elapsed() < Duration::from_secs(30));
    assert_eq!(client.read(9 * GIB + CHUNK_BYTES, 4096).expect("read"), data(4, 4096));
}

/// A process that is told to end while the control plane is away must not hang on saying goodbye.
#[test]
fn giving_the_volume_back_to_nobody_takes_no_longer_than_asked() {
    let cluster = Cluster::start(1);
    let plane = Plane::start(&cluster);
    let (control, _link) = control::start(options(&[plane.address], None)).expect("started");
    control.wait_attached(Duration::from_secs(30)).expect("no error").expect("in time");
    drop(plane);
    assert!(!control.detach(Duration::from_millis(50)));
}
