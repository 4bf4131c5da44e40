//! What was answered is there after the process was killed, and after a clean stop.

use std::time::Duration;

use evolute_protocol::geometry::GIB;
use evolute_protocol::rpc::{
    AllocateSegmentRequest, AttachRequest, CreateVolumeRequest, DeleteVolumeRequest, ErrorWord, Health,
    ListVolumesRequest, MapRequest,
};

use crate::support::{Chunkserver, Mds, Process, accept, status, three_chunkservers, until, volumes, word};

/// kill -9 at any moment: every volume, attachment and segment that was answered is there again, every chunkserver is
/// known by the token it has, and no number is given twice.
#[tokio::test]
async fn a_killed_mds_forgets_nothing_it_answered() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut process = Process::start(dir.path(), &[]).await;
    let chunkservers = three_chunkservers(process.address).await;
    let mut disks = Vec::new();
    for chunkserver in chunkservers {
        disks.push(chunkserver.kill().await);
    }
    let cluster = status(process.address).await.cluster_id;
    let mut expected = Vec::new();
    for round in 0..4_u32 {
        let mut client = volumes(process.address).await;
        let name = format!("volume-{round}");
        let create = CreateVolumeRequest { name: name.clone(), size_bytes: 64 * GIB, width: 0 };
        let volume = client.create(create).await.expect("created").into_inner();
        assert_eq!(volume.id, u64::from(round) + 1, "no number is given twice");
        let attach = AttachRequest {
            name,
            holder: "host-a".into(),
            takeover: false,
            secret: vec![7; 32],
            ..AttachRequest::default()
        };
        for _ in 0..=round {
            client.attach(attach.clone()).await.expect("attached");
        }
        for segment in 0..3 {
            let request = AllocateSegmentRequest { volume_id: volume.id, attachment: round + 1, segment };
            client.allocate_segment(request).await.expect("space");
        }
        let map = client.map(MapRequest { volume_id: volume.id }).await.expect("a map").into_inner();
        expected.push((volume.id, round + 1, map));
        // In the middle of the next one, whose answer nobody gets.
        let asking = tokio::spawn(async move {
            let create = CreateVolumeRequest { name: "half".into(), size_bytes: GIB, width: 0 };
            let _ = client.create(create).await;
        });
        process.kill();
        asking.await.expect("refused or answered");
        process = Process::start(dir.path(), &[]).await;
        // Its chunkservers stay away.
        accept(process.address).await;
        let mut client = volumes(process.address).await;
        let delete = DeleteVolumeRequest { name: "half".into(), force: false };
        match client.delete(delete).await {
            // Committed before the kill: it took a number.
            Ok(_) => return again(dir.path(), process).await,
            Err(status) => assert_eq!(ErrorWord::of(&status), Some(ErrorWord::NotFound)),
        }
        for (id, attachment, map) in &expected {
            let mut found = client.map(MapRequest { volume_id: *id }).await.expect("a map").into_inner();
            // Who leads is not in the state: the chunkservers say it again.
            let mut map = map.clone();
            map.copysets.iter_mut().chain(&mut found.copysets).for_each(|c| c.leader_chunkserver = 0);
            assert_eq!(found, map);
            let stale = AllocateSegmentRequest { volume_id: *id, attachment: attachment + 1, segment: 9 };
            assert_eq!(word(client.allocate_segment(stale).await), ErrorWord::Invalid, "never given");
        }
        let namesake = AttachRequest { secret: vec![8; 32], ..attach };
        assert_eq!(
            word(client.attach(namesake).await),
            ErrorWord::AttachedElsewhere,
            "a secret is not forgotten"
        );
        assert_eq!(status(process.address).await.cluster_id, cluster);
    }
    for disk in &disks {
        let back = Chunkserver::start_again(process.address, disk).await;
        assert_eq!(back.identity.id, disk.id);
        assert_eq!(back.seen.lock().expect("lock").orders, [], "its replicas are known to be there");
        back.kill().await;
    }
}

/// The rare road of the test above, when the unanswered volume made it: it is a volume like any other.
async fn again(dir: &std::path::Path, process: Process) {
    let before =
        volumes(process.address).await.list(ListVolumesRequest {}).await.expect("a list").into_inner();
    process.kill();
    let process = Process::start(dir, &[]).await;
    let after =
        volumes(process.address).await.list(ListVolumesRequest {}).await.expect("a list").into_inner();
    assert_eq!(before, after);
}

/// In memory is only what the chunkservers say again: after a clean restart all is well as soon as they did.
#[tokio::test]
async fn a_restarted_mds_learns_the_rest_from_its_chunkservers() {
    let mut mds = Mds::with_interval(Duration::from_secs(60)).await;
    let [one, two, three] = three_chunkservers(mds.address).await;
    let create = CreateVolumeRequest { name: "web".into(), size_bytes: GIB, width: 3 };
    volumes(mds.address).await.create(create).await.expect("created");
    mds.stop().await;
    until("the streams were closed", || async { one.seen.lock().expect("lock").ended.is_some() }).await;
    assert_eq!(one.seen.lock().expect("lock").ended, Some(Some(ErrorWord::NotLeader)));
    mds.start_again().await;
    let before = status(mds.address).await;
    assert_eq!((before.health(), before.volumes.len()), (Health::Unknown, 1), "{:?}", before.reasons);
    let mut back = Vec::new();
    for chunkserver in [one, two, three] {
        back.push(Chunkserver::start_again(mds.address, &chunkserver.kill().await).await);
    }
    until("all is well", || async { status(mds.address).await.health() == Health::Ok }).await;
    assert!(status(mds.address).await.copysets.iter().all(|copyset| copyset.leader_chunkserver != 0));
}
