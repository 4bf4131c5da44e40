//! `evolute chunkserver …` as an operator or a script runs it, against a control plane that moves one replica per look.

use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use evolute_protocol::rpc::cluster_server::{Cluster, ClusterServer};
use evolute_protocol::rpc::{
    AcceptMdsRequest, AcceptMdsResponse, ChunkserverStatus, ClusterStatus, CopysetStatus, DecideRequest,
    DecideResponse, Decision, ErrorWord, Health, RepairReason, RepairStage, RepairStatus, ReplicaStatus,
    RetireRequest, RetireResponse, StatusRequest,
};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

const OBSTACLE: &str = "the replicas of copyset-1 on chunkserver-4 cannot be made anew elsewhere: …";

/// One chunkserver, number 4, with as many replicas as are left.
#[derive(Debug, Default)]
struct Four {
    retiring: bool,
    left: u32,
}

struct FakeMds(Arc<Mutex<Four>>);

fn status(four: &Four) -> ClusterStatus {
    let chunkserver = ChunkserverStatus {
        id: 4,
        address: "127.0.0.1:7804".to_owned(),
        zone: "z3".to_owned(),
        online: true,
        retiring: four.retiring,
        replicas: four.left,
        scrubbed_bytes: 5 << 30,
        bad_blocks_found: 2,
        bad_blocks_repaired: 1,
        blocks_compared: 4096,
        blocks_differing: 2,
        blocks_not_compared: 5,
        blocks_undecided: 1,
        write_latency_us_p50: 80,
        write_latency_us_p99: 900,
        ..ChunkserverStatus::default()
    };
    let replica = ReplicaStatus { replica: 3, chunkserver: 4, online: true, ..ReplicaStatus::default() };
    let copyset = |id| CopysetStatus { id, replicas: vec![replica], ..CopysetStatus::default() };
    let repair = RepairStatus {
        copyset: four.left,
        old_chunkserver: 4,
        new_chunkserver: 3,
        reason: RepairReason::Retiring.into(),
        stage: RepairStage::CatchingUp.into(),
        bytes_total: 4 << 30,
        bytes_left: 1 << 30,
        eta_ms: 20_000,
        ..RepairStatus::default()
    };
    ClusterStatus {
        health: Health::Degraded.into(),
        reasons: vec!["because".to_owned()],
        chunkservers: vec![chunkserver],
        copysets: (1..=four.left).map(copyset).collect(),
        repairs: if four.retiring && four.left > 0 { vec![repair] } else { vec![] },
        ..ClusterStatus::default()
    }
}

#[tonic::async_trait]
impl Cluster for FakeMds {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<ClusterStatus>, Status> {
        let mut four = self.0.lock().expect("lock");
        let answer = status(&four);
        if four.retiring {
            four.left = four.left.saturating_sub(1);
        }
        Ok(Response::new(answer))
    }

    async fn accept_mds(&self, _: Request<AcceptMdsRequest>) -> Result<Response<AcceptMdsResponse>, Status> {
        Ok(Response::new(AcceptMdsResponse { is_needed: true, lines: vec!["because".to_owned()] }))
    }

    async fn decide(&self, request: Request<DecideRequest>) -> Result<Response<DecideResponse>, Status> {
        let request = request.into_inner();
        if request.chunkserver != 4 {
            return Err(
                ErrorWord::NotFound.status(format!("there is no chunkserver-{}", request.chunkserver))
            );
        }
        match request.decision() {
            Decision::Dead => Ok(Response::new(DecideResponse { obstacles: vec![OBSTACLE.to_owned()] })),
            Decision::Remove => Err(ErrorWord::Invalid.status("chunkserver-4 has replicas of 2 copysets")),
            Decision::Accept | Decision::Unknown => Ok(Response::new(DecideResponse::default())),
        }
    }

    async fn retire(&self, request: Request<RetireRequest>) -> Result<Response<RetireResponse>, Status> {
        let RetireRequest { chunkserver, retiring } = request.into_inner();
        if chunkserver != 4 {
            return Err(ErrorWord::NotFound.status(format!("there is no chunkserver-{chunkserver}")));
        }
        let mut four = self.0.lock().expect("lock");
        four.retiring = retiring;
        let obstacles = if retiring { vec![OBSTACLE.to_owned()] } else { vec![] };
        let chunkserver = status(&four).chunkservers.pop();
        Ok(Response::new(RetireResponse { chunkserver, obstacles }))
    }
}

/// A control plane, and the tool that talks to it.
struct Tool {
    mds: String,
}

impl Tool {
    async fn new(left: u32) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let mds = listener.local_addr().expect("address").to_string();
        let four = Arc::new(Mutex::new(Four { retiring: false, left }));
        let serving = tonic::transport::Server::builder().add_service(ClusterServer::new(FakeMds(four)));
        tokio::spawn(serving.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { mds }
    }

    async fn run(&self, words: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_evolute"));
        command.args(["--mds", &self.mds]).args(words);
        tokio::task::spawn_blocking(move || command.output().expect("it runs")).await.expect("joined")
    }

    async fn words(&self, words: &[&str]) -> String {
        let output = self.run(words).await;
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }
}

#[tokio::test]
async fn list_show_and_status_tell_of_integrity_and_of_what_moves() {
    let tool = Tool::new(2).await;
    let list = tool.words(&["chunkserver", "list"]).await;
    assert!(list.contains("2 found, 1 repaired") && list.contains("online"), "{list}");
    let list: Value =
        serde_json::from_str(&tool.words(&["--json", "chunkserver", "ls"]).await).expect("JSON");
    let four = &list["chunkservers"][0];
    assert_eq!(
        (&four["id"], &four["retiring"], &four["bad_blocks_found"]),
        (&4.into(), &false.into(), &2.into())
    );
    assert_eq!(
        (&four["last_full_scrub_unix_ms"], &four["write_latency_us_p99"]),
        (&Value::Null, &900.into())
    );

    let show = tool.words(&["chunkserver", "show", "4"]).await;
    for part in [
        "zone       z3",
        "copysets   1 2",
        "5 GiB",
        "not everything yet",
        "900 µs at the 99th",
        "compared   4096 blocks with other replicas; 5 could not be in their turn; 2 differed here and were put \
         right; 1 differ and no majority",
    ] {
        assert!(show.contains(part), "{part}: {show}");
    }
    let nothing_moves: Value =
        serde_json::from_str(&tool.words(&["--json", "chunkserver", "show", "chunkserver-4"]).await)
            .expect("JSON");
    assert_eq!(
        (&nothing_moves["repairs"], &nothing_moves["copysets"]),
        (&Value::Array(vec![]), &vec![1, 2].into())
    );

    tool.words(&["chunkserver", "retire", "4"]).await;
    let status = tool.words(&["cluster", "status"]).await;
    for part in ["- because", "retiring", "1 GiB of 4 GiB", "20 s"] {
        assert!(status.contains(part), "{part}: {status}");
    }
}

#[tokio::test]
async fn retire_waits_until_it_is_empty_and_says_what_is_in_the_way() {
    let tool = Tool::new(3).await;
    let lines = tool.words(&["--json", "chunkserver", "retire", "4", "--wait"]).await;
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let said: Vec<_> = events
        .iter()
        .map(|e| (e["event"].as_str().expect("a word"), &e["chunkserver"]["replicas"]))
        .collect();
    let expected =
        [("retiring", &3.into()), ("progress", &2.into()), ("progress", &1.into()), ("empty", &0.into())];
    assert_eq!(said, expected);
    assert_eq!(events[0]["obstacles"][0], OBSTACLE);

    let tool = Tool::new(3).await;
    let said = tool.words(&["chunkserver", "retire", "4"]).await;
    for part in ["3 replicas left, 1 on their way", "about 20 s", OBSTACLE, "evolute chunkserver show 4"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(tool.words(&["chunkserver", "unretire", "4"]).await.contains("chunkserver-4 stays"));
}

#[tokio::test]
async fn a_number_that_is_none_is_refused_with_advice() {
    let tool = Tool::new(1).await;
    for words in
        [["chunkserver", "show", "9"], ["chunkserver", "retire", "9"], ["chunkserver", "unretire", "9"]]
    {
        let output = tool.run(&words).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(said.contains("no chunkserver-9") && said.contains("evolute chunkserver list"), "{said}");
    }
    for wrong in ["0", "four", "-1"] {
        assert_eq!(tool.run(&["chunkserver", "show", "--", wrong]).await.status.code(), Some(2), "{wrong}");
    }
}

#[tokio::test]
async fn decisions_that_cannot_be_taken_back_are_asked_for_and_tell_what_stands_in_the_way() {
    let tool = Tool::new(2).await;
    let asked = tool.run(&["chunkserver", "declare-dead", "4"]).await;
    assert_eq!(asked.status.code(), Some(2), "nobody said yes: {asked:?}");
    let asked = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert!(asked.contains("made anew elsewhere") && asked.contains("--yes"), "{asked}");
    let dead = tool.words(&["chunkserver", "declare-dead", "4", "--yes"]).await;
    assert!(dead.contains("declared dead") && dead.contains(OBSTACLE), "{dead}");
    assert!(tool.words(&["chunkserver", "accept", "4", "--yes"]).await.contains("counts again"));
    let refused = tool.run(&["chunkserver", "remove", "4", "--yes"]).await;
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("has replicas of 2 copysets"), "{refused:?}");
    assert!(!tool.run(&["chunkserver", "accept", "5", "--yes"]).await.status.success());
}
