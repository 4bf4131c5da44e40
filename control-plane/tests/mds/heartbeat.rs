//! Reports in, orders out.

use std::time::Duration;

use evolute_protocol::bounds::INDEX_MAX;
use evolute_protocol::rpc::chunkservers_client::ChunkserversClient;
use evolute_protocol::rpc::{
    CreateVolumeRequest, DeleteVolumeRequest, ErrorWord, Health, ReplicaReport, Report, VolumeUse, order,
};
use tokio_stream::StreamExt;

use crate::support::{
    Chunkserver, Mds, channel, first_registration, register, six_healthy_copysets, status,
    three_chunkservers, until, volumes, word,
};

/// From nothing to a volume with space, as a new cluster lives it.
#[tokio::test]
async fn three_chunkservers_become_a_cluster() {
    let mds = Mds::start().await;
    let before = status(mds.address).await;
    assert_eq!(before.health(), Health::Degraded);
    assert!(before.reasons[0].contains("3 zones"), "{:?}", before.reasons);

    let chunkservers = three_chunkservers(mds.address).await;
    let status = status(mds.address).await;
    assert_eq!(status.health(), Health::Ok, "{:?}", status.reasons);
    assert_eq!(chunkservers.iter().map(|c| c.replicas()).collect::<Vec<_>>(), [6, 6, 6]);
    for chunkserver in &status.chunkservers {
        assert_eq!((chunkserver.online, chunkserver.replicas, chunkserver.leaders), (true, 6, 2));
    }
    assert_eq!(chunkservers[0].seen.lock().expect("lock").addresses.len(), 3);
    assert!(status.mds[0].leader && status.mds[0].address == mds.address.to_string());
}

#[tokio::test]
async fn an_order_is_repeated_until_a_report_shows_it_done() {
    let mds = Mds::start().await;
    let lazy = Chunkserver::start_lazy(mds.address, "z1").await;
    let _two = Chunkserver::start(mds.address, "z2").await;
    let _three = Chunkserver::start(mds.address, "z3").await;
    let count = || lazy.seen.lock().expect("lock").orders.len();
    until("it is told to create six replicas", || async { count() == 6 }).await;
    lazy.report().await;
    until("it is told again", || async { count() == 12 }).await;
    let stalled = status(mds.address).await;
    assert!(
        stalled.copysets.iter().all(|c| c.reason.contains("is creating its replica")),
        "{:?}",
        stalled.reasons
    );

    lazy.seen.lock().expect("lock").lazy = false;
    lazy.report().await;
    until("it has them", || async { lazy.replicas() == 6 }).await;
    until("all is well", || async { status(mds.address).await.health() == Health::Ok }).await;
    let told = count();
    lazy.report().await;
    lazy.report().await;
    until("both reports arrived", || async {
        status(mds.address).await.chunkservers[0].last_report_ms_ago < 5000
    })
    .await;
    assert_eq!(count(), told, "nothing more to do");
}

/// The disk was wiped but for its identity. A replica made anew under its old id could undo a commit.
#[tokio::test]
async fn a_lost_replica_is_not_created_again() {
    let mds = Mds::start().await;
    let [one, _two, _three] = three_chunkservers(mds.address).await;
    let mut disk = one.kill().await;
    until("it is missed", || async { !status(mds.address).await.chunkservers[0].online }).await;
    disk.replicas.clear();
    let wiped = Chunkserver::start_again(mds.address, &disk).await;
    until("the loss is seen", || async {
        status(mds.address)
            .await
            .reasons
            .iter()
            .any(|reason| reason.contains("chunkserver-1") && reason.contains("has lost its replica"))
    })
    .await;
    assert_eq!(wiped.seen.lock().expect("lock").orders, []);
}

#[tokio::test]
async fn a_deleted_volume_is_dropped_by_its_leaders() {
    let mds = Mds::start().await;
    let chunkservers = three_chunkservers(mds.address).await;
    let mut volumes = volumes(mds.address).await;
    let create = CreateVolumeRequest { name: "web".into(), size_bytes: 1 << 30, width: 0 };
    volumes.create(create.clone()).await.expect("created");
    volumes.delete(DeleteVolumeRequest { name: "web".into(), force: false }).await.expect("deleted");
    // The name is free at once, whatever the chunkservers still have to do.
    assert_eq!(volumes.create(create).await.expect("created").into_inner().id, 2);
    let drops = |chunkserver: &Chunkserver| {
        let seen = chunkserver.seen.lock().expect("lock");
        let is_drop = |order: &&evolute_protocol::rpc::Order| matches!(&order.what, Some(order::What::DropVolume(drop)) if drop.volume == 1);
        seen.orders.iter().filter(is_drop).count()
    };
    for chunkserver in &chunkservers {
        until("its two copysets drop it", || async { drops(chunkserver) >= 2 }).await;
    }
    // Once all have reported it, nobody is told again.
    until("the end is known", || async {
        let before: usize = chunkservers.iter().map(drops).sum();
        for chunkserver in &chunkservers {
            chunkserver.report().await;
        }
        status(mds.address).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        before == chunkservers.iter().map(drops).sum::<usize>()
    })
    .await;
}

#[tokio::test]
async fn a_chunkserver_that_went_away_is_offline_and_named() {
    let mds = Mds::with_interval(Duration::from_millis(500)).await;
    let mut chunkservers = Vec::new();
    for zone in ["z1", "z2", "z3"] {
        // All the time: whoever has said nothing for 1.5 s is offline.
        chunkservers.push(Chunkserver::start(mds.address, zone).await.chatty());
    }
    six_healthy_copysets(mds.address).await;
    chunkservers.remove(1).kill().await;
    until("it is offline", || async {
        let status = status(mds.address).await;
        let named = status.reasons.iter().any(|reason| {
            reason.contains("of 3 replicas")
                && reason.contains("chunkserver-2 (127.0.0.1:7801) has not reported for ")
        });
        !status.chunkservers[1].online && named
    })
    .await;
}

/// Whoever cannot prove to be a chunkserver reports nothing.
#[tokio::test]
async fn a_stream_is_as_guarded_as_a_registration() {
    let mds = Mds::start().await;
    let request = first_registration("z1");
    let mine = register(mds.address, request.clone()).await.expect("registered");
    let good = Report {
        chunkserver: mine.chunkserver,
        token: mine.token.clone(),
        instance: request.instance.clone(),
        ..Report::default()
    };
    let end = async |reports: Vec<Report>| {
        let mut client = ChunkserversClient::new(channel(mds.address).await);
        let reports = tokio_stream::iter(reports).chain(tokio_stream::pending());
        let mut orders = client.heartbeat(reports).await.expect("a stream").into_inner();
        loop {
            match orders.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("an end without a reason"),
                Err(status) => return word::<()>(Err(status)),
            }
        }
    };
    // It speaks: one that has only registered is waited for 2 s, and then its place is free.
    let mut client = ChunkserversClient::new(channel(mds.address).await);
    let speaking = tokio_stream::iter([good.clone()]).chain(tokio_stream::pending());
    let _speaks = client.heartbeat(speaking).await.expect("a stream");
    until("it is heard", || async { status(mds.address).await.chunkservers[0].online }).await;
    for (report, expected) in [
        (Report { token: vec![7; 32], ..good.clone() }, ErrorWord::WrongToken),
        (Report { chunkserver: 9, ..good.clone() }, ErrorWord::NotFound),
        (Report { chunkserver: 0, ..good.clone() }, ErrorWord::NotFound),
        (Report { instance: vec![], ..good.clone() }, ErrorWord::Invalid),
        (Report { instance: vec![1; 65], ..good.clone() }, ErrorWord::Invalid),
        (Report { instance: vec![1; 16], ..good.clone() }, ErrorWord::DuplicateChunkserver),
    ] {
        assert_eq!(end(vec![report.clone()]).await, expected, "{report:?}");
    }
    let other = Report { chunkserver: 9, ..good.clone() };
    assert_eq!(end(vec![good.clone(), other]).await, ErrorWord::Invalid);
    let other = Report { instance: vec![1; 16], ..good.clone() };
    assert_eq!(end(vec![good, other]).await, ErrorWord::Invalid);
}

/// A leader on a full disk must know at once whether another has room, and a slow disk what is usual.
#[tokio::test]
async fn everybody_is_told_whose_disk_is_full_and_what_a_write_usually_takes() {
    let mds = Mds::start().await;
    let stream = async |zone: &str, first: Report| {
        let request = first_registration(zone);
        let mine = register(mds.address, request.clone()).await.expect("registered");
        let who =
            Report { chunkserver: mine.chunkserver, token: mine.token, instance: request.instance, ..first };
        let (reports, outgoing) = tokio::sync::mpsc::channel(4);
        reports.send(who.clone()).await.expect("room");
        let mut client = ChunkserversClient::new(channel(mds.address).await);
        let outgoing = tokio_stream::wrappers::ReceiverStream::new(outgoing);
        let orders = client.heartbeat(outgoing).await.expect("a stream").into_inner();
        (who, reports, orders)
    };
    let first = Report { full: true, write_latency_us_p50: 500, ..Report::default() };
    let (one, says, _told) = stream("z1", first).await;
    let (_, _says, mut hears) = stream("z2", Report { slow: true, ..Report::default() }).await;
    let disks = |orders: &evolute_protocol::rpc::Orders| -> Vec<_> {
        orders.addresses.iter().map(|of| (of.chunkserver, of.full, of.slow)).collect()
    };
    // Other news may come first.
    let mut until = async |expected: [(u32, bool, bool); 2]| {
        let hearing = async {
            loop {
                let told = hears.message().await.expect("no end").expect("orders");
                if disks(&told) == expected {
                    return told;
                }
            }
        };
        tokio::time::timeout(crate::support::PATIENCE, hearing).await.expect("it is told")
    };
    let told = until([(1, true, false), (2, false, true)]).await;
    assert_eq!(told.usual_write_latency_us, 500);
    // Without being asked.
    says.send(Report { full: false, ..one }).await.expect("room");
    until([(1, false, false), (2, false, true)]).await;
}

/// A term that nobody reached would be believed before every other; a size that nothing has is taken for a lot.
#[tokio::test]
async fn a_report_of_what_nobody_can_have_reached_is_refused() {
    let mds = Mds::start().await;
    let chunkservers = three_chunkservers(mds.address).await;
    six_healthy_copysets(mds.address).await;
    let request = first_registration("z4");
    let stranger = register(mds.address, request.clone()).await.expect("registered");
    let report = |replica: ReplicaReport| Report {
        chunkserver: stranger.chunkserver,
        token: stranger.token.clone(),
        instance: request.instance.clone(),
        capacity_bytes: u64::MAX,
        used_bytes: u64::MAX,
        free_bytes: u64::MAX,
        volumes: vec![VolumeUse { volume: 1, copyset: 1, used_bytes: u64::MAX }],
        replicas: vec![ReplicaReport { copyset: 1, replica: 1, data_bytes: u64::MAX, ..replica }],
        ..Report::default()
    };
    for edge in [INDEX_MAX + 1, 1 << 63, u64::MAX] {
        for replica in [
            ReplicaReport { term: edge, ..ReplicaReport::default() },
            ReplicaReport { last_index: edge, ..ReplicaReport::default() },
            ReplicaReport { committed_index: edge, ..ReplicaReport::default() },
            ReplicaReport { applied_index: edge, ..ReplicaReport::default() },
        ] {
            let mut client = ChunkserversClient::new(channel(mds.address).await);
            let reports = tokio_stream::iter([report(replica)]).chain(tokio_stream::pending());
            let mut orders = client.heartbeat(reports).await.expect("a stream").into_inner();
            let refused = loop {
                match orders.message().await {
                    Ok(orders) => assert!(orders.is_some(), "an end without a reason"),
                    Err(status) => break status,
                }
            };
            assert_eq!(ErrorWord::of(&refused), Some(ErrorWord::Invalid), "{refused}");
        }
    }
    let mut client = ChunkserversClient::new(channel(mds.address).await);
    let reports = tokio_stream::iter([report(ReplicaReport::default())]).chain(tokio_stream::pending());
    let _speaks = client.heartbeat(reports).await.expect("a stream");
    until("it is heard", || async {
        status(mds.address).await.chunkservers.iter().filter(|it| it.online).count() == 4
    })
    .await;
    drop(chunkservers);
}
