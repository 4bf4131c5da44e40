//! The tool finds the control plane that leads, whatever the others on its list do, and never sends a change twice.
//!
//! Real gRPC over real sockets; the control planes here say one thing each.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evolute_cli::failure::Failure;
use evolute_cli::mds::Mds;
use evolute_protocol::rpc::volumes_server::{Volumes, VolumesServer};
use evolute_protocol::rpc::{
    AbandonImportRequest, AbandonImportResponse, AllocateSegmentRequest, AttachRequest, AttachResponse,
    BeginImportRequest, CreateVolumeRequest, DeleteVolumeRequest, DeleteVolumeResponse, DetachRequest,
    DetachResponse, ErrorWord, FinishImportRequest, FinishImportResponse, ListVolumesRequest,
    ListVolumesResponse, MapRequest, Segment, ShowVolumeRequest, Volume, VolumeMap,
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// What a control plane of these tests does with every request.
#[derive(Clone)]
enum Answers {
    Leads,
    Refuses(ErrorWord),
    /// Takes the request and never answers.
    Hangs,
}

struct FakeMds {
    answers: Answers,
    asked: Arc<AtomicUsize>,
}

impl FakeMds {
    async fn answer<T>(&self, good: T) -> Result<Response<T>, Status> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        match self.answers {
            Answers::Leads => Ok(Response::new(good)),
            Answers::Refuses(word) => Err(word.status(format!("because {word}"))),
            Answers::Hangs => std::future::pending().await,
        }
    }
}

#[tonic::async_trait]
impl Volumes for FakeMds {
    async fn create(&self, request: Request<CreateVolumeRequest>) -> Result<Response<Volume>, Status> {
        let CreateVolumeRequest { name, size_bytes, width } = request.into_inner();
        self.answer(Volume { id: 1, name, size_bytes, width, ..Volume::default() }).await
    }
    async fn list(&self, _: Request<ListVolumesRequest>) -> Result<Response<ListVolumesResponse>, Status> {
        self.answer(ListVolumesResponse::default()).await
    }
    async fn show(&self, request: Request<ShowVolumeRequest>) -> Result<Response<Volume>, Status> {
        self.answer(Volume { name: request.into_inner().name, ..Volume::default() }).await
    }
    async fn delete(
        &self,
        _: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        self.answer(DeleteVolumeResponse::default()).await
    }
    async fn attach(&self, _: Request<AttachRequest>) -> Result<Response<AttachResponse>, Status> {
        self.answer(AttachResponse::default()).await
    }
    async fn detach(&self, _: Request<DetachRequest>) -> Result<Response<DetachResponse>, Status> {
        self.answer(DetachResponse::default()).await
    }
    async fn allocate_segment(
        &self,
        _: Request<AllocateSegmentRequest>,
    ) -> Result<Response<Segment>, Status> {
        self.answer(Segment::default()).await
    }
    async fn map(&self, _: Request<MapRequest>) -> Result<Response<VolumeMap>, Status> {
        self.answer(VolumeMap::default()).await
    }

    async fn begin_import(&self, _: Request<BeginImportRequest>) -> Result<Response<Volume>, Status> {
        self.answer(Volume::default()).await
    }

    async fn finish_import(
        &self,
        _: Request<FinishImportRequest>,
    ) -> Result<Response<FinishImportResponse>, Status> {
        self.answer(FinishImportResponse::default()).await
    }

    async fn abandon_import(
        &self,
        _: Request<AbandonImportRequest>,
    ) -> Result<Response<AbandonImportResponse>, Status> {
        self.answer(AbandonImportResponse::default()).await
    }
}

/// A control plane on a port of its own, and how often it was asked.
async fn serve(answers: Answers) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let asked = Arc::new(AtomicUsize::new(0));
    let service = VolumesServer::new(FakeMds { answers, asked: asked.clone() });
    let serving = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(serving.serve_with_incoming(TcpListenerStream::new(listener)));
    (address, asked)
}

/// A port at which nobody listens.
async fn nobody() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    listener.local_addr().expect("address")
}

fn client(addresses: &[SocketAddr], timeout: Duration) -> Mds {
    let list: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
    Mds::new(&list.join(","), timeout).expect("addresses")
}

const PATIENT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn the_leader_is_found_behind_a_dead_one_and_a_follower() {
    let (follower, _) = serve(Answers::Refuses(ErrorWord::NotLeader)).await;
    let (leader, asked) = serve(Answers::Leads).await;
    let mut mds = client(&[nobody().await, follower, leader], PATIENT);
    let volume = mds.create("disk", 1 << 30, 3).await.expect("the leader answers");
    assert_eq!((volume.name.as_str(), volume.size_bytes, volume.width), ("disk", 1 << 30, 3));
    mds.list().await.expect("the leader answers");
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_refusal_keeps_its_word_and_is_not_asked_again() {
    for word in [ErrorWord::Exists, ErrorWord::NotFound, ErrorWord::NoPlacement, ErrorWord::AttachedElsewhere]
    {
        let (mds, asked) = serve(Answers::Refuses(word)).await;
        let (other, other_asked) = serve(Answers::Leads).await;
        let refused = client(&[mds, other], PATIENT).delete("disk", false).await.expect_err("refused");
        assert!(
            matches!(&refused, Failure::Refused { word: w, message } if *w == word && message.contains("because"))
        );
        assert!(refused.next().is_some());
        assert_eq!((asked.load(Ordering::SeqCst), other_asked.load(Ordering::SeqCst)), (1, 0));
    }
}

#[tokio::test]
async fn a_change_whose_answer_never_came_is_not_sent_twice() {
    let (hangs, asked) = serve(Answers::Hangs).await;
    let (other, other_asked) = serve(Answers::Leads).await;
    let failure = client(&[hangs, other], Duration::from_millis(300)).create("disk", 1 << 20, 0).await;
    let failure = failure.expect_err("nobody knows");
    assert!(matches!(failure, Failure::Uncertain { .. }), "{failure}");
    assert_eq!((asked.load(Ordering::SeqCst), other_asked.load(Ordering::SeqCst)), (1, 0));
}

#[tokio::test]
async fn a_question_is_asked_elsewhere_when_no_answer_came() {
    let (hangs, _) = serve(Answers::Hangs).await;
    let (leader, _) = serve(Answers::Leads).await;
    let volume = client(&[hangs, leader], PATIENT).show("disk").await.expect("the second answers");
    assert_eq!(volume.name, "disk");
}

#[tokio::test]
async fn nobody_there_is_told_soon_although_the_deadline_is_far() {
    let begun = Instant::now();
    let failure = client(&[nobody().await], PATIENT).list().await.expect_err("nobody is there");
    assert!(matches!(&failure, Failure::Unreachable { last, .. } if last.contains("refused")), "{failure}");
    assert!(begun.elapsed() < PATIENT / 2);
}

#[tokio::test]
async fn a_cluster_without_a_leader_is_given_up_at_the_deadline() {
    let (follower, asked) = serve(Answers::Refuses(ErrorWord::NotLeader)).await;
    let failure = client(&[follower], Duration::from_secs(1)).list().await.expect_err("nobody leads");
    assert!(
        matches!(&failure, Failure::Unreachable { last, .. } if last.contains("not-leader")),
        "{failure}"
    );
    assert!(asked.load(Ordering::SeqCst) > 1, "asked again until the deadline");
}

#[tokio::test]
async fn something_else_at_that_port_is_an_error_in_words() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"220 mail.example.com ESMTP\r\n").await;
        }
    });
    let failure = client(&[address], Duration::from_secs(1)).list().await.expect_err("not a control plane");
    assert!(failure.to_string().contains(&address.to_string()), "{failure}");
}
