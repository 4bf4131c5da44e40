//! Who may speak for a chunkserver.

use evolute_protocol::id::ClusterId;
use evolute_protocol::rpc::{
    CLUSTER_KEY, ErrorWord, LogEnd, MapRequest, RegisterRequest, Role, Start, StartDecision,
};

use crate::support::{
    Chunkserver, Mds, first_registration, instance, register, registration, status, three_chunkservers,
    until, volumes, word,
};

#[tokio::test]
async fn only_the_one_with_the_token_is_that_chunkserver() {
    let mds = Mds::start().await;
    let disk = Chunkserver::start(mds.address, "z1").await.kill().await;
    let other = Mds::start().await;
    let stranger = Chunkserver::start(other.address, "z1").await.kill().await;
    assert_eq!((disk.token.len(), disk.cluster.len()), (32, 16));
    assert_ne!(disk.token, stranger.token);

    let good = || registration(&disk);
    let mut flipped = disk.token.clone();
    flipped[31] ^= 1;
    for (request, expected) in [
        (RegisterRequest { token: flipped, ..good() }, ErrorWord::WrongToken),
        (RegisterRequest { token: disk.token[..31].to_vec(), ..good() }, ErrorWord::WrongToken),
        (RegisterRequest { token: stranger.token.clone(), ..good() }, ErrorWord::WrongToken),
        (registration(&stranger), ErrorWord::WrongCluster),
        (
            RegisterRequest { cluster_id: stranger.cluster.clone(), ..first_registration("z1") },
            ErrorWord::WrongCluster,
        ),
        (RegisterRequest { cluster_id: vec![1], ..good() }, ErrorWord::WrongCluster),
        (RegisterRequest { chunkserver: 77, ..good() }, ErrorWord::NotFound),
        (RegisterRequest { token: vec![], ..good() }, ErrorWord::Invalid),
        (RegisterRequest { cluster_id: vec![], ..good() }, ErrorWord::Invalid),
        (RegisterRequest { chunkserver: 0, ..good() }, ErrorWord::Invalid),
    ] {
        assert_eq!(word(register(mds.address, request.clone()).await), expected, "{request:?}");
    }
    let answer = register(mds.address, good()).await.expect("it is the one");
    assert_eq!((answer.chunkserver, answer.token, answer.cluster_id), (disk.id, disk.token, disk.cluster));
    assert_eq!(status(mds.address).await.chunkservers.len(), 1, "nobody else came in");
}

#[tokio::test]
async fn an_answer_that_was_lost_is_given_again() {
    let mds = Mds::start().await;
    let request = first_registration("z1");
    let first = register(mds.address, request.clone()).await.expect("registered");
    assert_eq!(register(mds.address, request).await.expect("registered"), first);
    let second =
        register(mds.address, first_registration("z1")).await.expect("another process, another disk");
    assert_ne!(second.chunkserver, first.chunkserver);
}

/// A copied data directory: two processes, one identity. The one that runs goes on undisturbed.
#[tokio::test]
async fn a_second_process_with_the_same_identity_is_refused() {
    let mds = Mds::start().await;
    let first = Chunkserver::start(mds.address, "z1").await;
    until("it is online", || async { status(mds.address).await.chunkservers[0].online }).await;
    let copy = registration(&first.identity);
    let refused = register(mds.address, copy.clone()).await.expect_err("a duplicate");
    assert_eq!(ErrorWord::of(&refused), Some(ErrorWord::DuplicateChunkserver));
    assert!(
        refused.message().contains("chunkserver-1") && refused.message().contains("127.0.0.1"),
        "{refused}"
    );
    // The process itself may ask again.
    let again = RegisterRequest { instance: first.instance.clone(), ..copy.clone() };
    register(mds.address, again).await.expect("itself");
    first.report().await;
    assert!(first.seen.lock().expect("lock").ended.is_none());

    // Killed: its successor gets in at once, also when it asks before the end of the other's stream was seen.
    let asking = tokio::spawn(register(mds.address, copy));
    first.kill().await;
    asking.await.expect("asked").expect("the successor is in");
}

/// The address and the rest of what may change follow the process.
#[tokio::test]
async fn everybody_hears_of_a_new_address() {
    let mds = Mds::start().await;
    let (one, two) =
        (Chunkserver::start(mds.address, "z1").await, Chunkserver::start(mds.address, "z2").await);
    let disk = two.kill().await;
    let moved = RegisterRequest {
        address: "127.0.0.1:9".into(),
        server: "elsewhere".into(),
        capacity_bytes: 5,
        version: "9".into(),
        instance: instance(),
        ..registration(&disk)
    };
    register(mds.address, moved).await.expect("it is back");
    until("the other one knows", || async {
        one.seen.lock().expect("lock").addresses.get(&disk.id).is_some_and(|address| address == "127.0.0.1:9")
    })
    .await;
    let status = status(mds.address).await;
    let known = &status.chunkservers[1];
    assert_eq!((known.server.as_str(), known.capacity_bytes, known.version.as_str()), ("elsewhere", 5, "9"));
}

/// A directory remembers its starts; a copy of it lacks those that came after it was made.
#[tokio::test]
async fn a_directory_that_lacks_a_start_was_put_back() {
    let mds = Mds::start().await;
    let disk = Chunkserver::start(mds.address, "z1").await.kill().await;
    let name = |number: u8| vec![number; 16];
    let start = |number: u8| Start { number: number.into(), instance: name(number) };
    let with = |starts: Vec<Start>, decided: StartDecision| RegisterRequest {
        instance: starts.last().expect("this one").instance.clone(),
        starts,
        decided: decided.into(),
        ..registration(&disk)
    };
    let ask = |starts: Vec<Start>, decided| {
        let request = with(starts, decided);
        // One process at a time: the one before has not opened a stream, and gives the place up in a while.
        async move {
            loop {
                match register(mds.address, request.clone()).await {
                    Err(status) if ErrorWord::of(&status) == Some(ErrorWord::DuplicateChunkserver) => {}
                    answer => break answer.expect("answered"),
                }
            }
        }
    };
    let undecided = StartDecision::None;
    assert_eq!(ask(vec![start(1)], undecided).await.put_back, "", "the first that is counted");
    assert_eq!(ask(vec![start(1), start(2)], undecided).await.put_back, "");
    // As before start 2, with another start after it: by number alone it would be as new.
    let copy = vec![start(1), Start { number: 2, instance: vec![9; 16] }];
    for _ in 0..2 {
        let answer = ask(copy.clone(), undecided).await;
        assert!(answer.put_back.contains("chunkserver-1 was put back to an older copy"), "{answer:?}");
    }
    // It took note: from now on this is the directory, and the one before is the older one.
    assert_eq!(ask(copy.clone(), StartDecision::Forgotten).await.put_back, "");
    assert_eq!(ask(copy, undecided).await.put_back, "");
    assert_ne!(ask(vec![start(1), start(2)], undecided).await.put_back, "");
    // One whose past begins later than what an MDS remembers is newer than the MDS.
    assert_eq!(ask(vec![start(7), start(8)], undecided).await.put_back, "");
    // A start that is not this process's is no proof of anything.
    let forged = RegisterRequest { instance: name(5), ..with(vec![start(8), start(9)], undecided) };
    assert_eq!(word(register(mds.address, forged).await), ErrorWord::Invalid);
}

/// A copy that was made while the chunkserver ran knows of all its starts. What its leaders said shows how far it had come.
#[tokio::test]
async fn a_directory_whose_log_ends_before_what_it_had_acknowledged_was_put_back() {
    let mds = Mds::start().await;
    let [one, two, _three] = three_chunkservers(mds.address).await;
    let (replica, copyset) = {
        let mut seen = two.seen.lock().expect("lock");
        let led = seen.replicas.values_mut().find(|replica| replica.role() == Role::Leader).expect("leads");
        (led.committed_index, led.applied_index) = (100, 100);
        // What it acknowledged and is not committed may be gone when it comes back.
        led.members.iter_mut().for_each(|member| member.matched_index = 120);
        let of_one = led.members.iter().find(|member| member.chunkserver == 1).expect("a member");
        (of_one.replica, led.copyset)
    };
    two.report().await;
    until("that was heard", || async {
        let status = status(mds.address).await;
        let of = status.copysets.iter().find(|of| of.id == copyset).expect("it is there");
        of.replicas.iter().any(|of| of.applied_index == 100)
    })
    .await;
    let disk = one.kill().await;
    let start = |number: u8| Start { number: number.into(), instance: vec![number; 16] };
    let ask = async |last_index: u64, number: u8, decided: StartDecision| {
        let request = RegisterRequest {
            instance: start(number).instance,
            starts: vec![start(number)],
            ends: vec![LogEnd { copyset, replica, last_index }],
            decided: decided.into(),
            ..registration(&disk)
        };
        loop {
            match register(mds.address, request.clone()).await {
                Err(status) if ErrorWord::of(&status) == Some(ErrorWord::DuplicateChunkserver) => {}
                answer => break answer.expect("answered"),
            }
        }
    };
    let undecided = StartDecision::None;
    let answer = ask(99, 1, undecided).await;
    let why = "ends at entry 99, and it had acknowledged entry 100";
    assert!(answer.put_back.contains(why), "{answer:?}");
    assert_eq!(ask(100, 2, undecided).await.put_back, "");
    // It is known, and serves: a leader may have heard more of it than it knew when it asked.
    assert_eq!(ask(99, 2, undecided).await.put_back, "");
    assert_ne!(ask(99, 3, undecided).await.put_back, "");
    // An operator accepted it: that is all there is.
    assert_eq!(ask(99, 3, StartDecision::Accepted).await.put_back, "");
    assert_eq!(ask(99, 4, undecided).await.put_back, "");
}

/// A backend that has come to the wrong address must not hear that its volume was deleted, nor where its data goes.
#[tokio::test]
async fn who_belongs_to_another_cluster_hears_nothing_about_volumes() {
    let mds = Mds::start().await;
    let ours = ClusterId(status(mds.address).await.cluster_id.try_into().expect("16 bytes"));
    let mut client = volumes(mds.address).await;
    for (named, expected) in [
        (None, ErrorWord::NotFound),
        (Some(ours.to_string()), ErrorWord::NotFound),
        (Some(ClusterId([7; 16]).to_string()), ErrorWord::WrongCluster),
        (Some("nonsense".to_owned()), ErrorWord::WrongCluster),
    ] {
        let mut request = tonic::Request::new(MapRequest { volume_id: 1 });
        if let Some(named) = &named {
            request.metadata_mut().insert(CLUSTER_KEY, named.parse().expect("ASCII"));
        }
        assert_eq!(word(client.map(request).await), expected, "{named:?}");
    }
}
