//! Volumes, as a CLI and a backend use them.

use evolute_protocol::geometry::{GIB, TIB};
use evolute_protocol::rpc::{
    AllocateSegmentRequest, AttachRequest, CreateVolumeRequest, DeleteVolumeRequest, DetachRequest,
    ErrorWord, ListVolumesRequest, MapRequest, ShowVolumeRequest, VolumeMap, VolumeUse,
};

use crate::support::{Mds, three_chunkservers, until, volumes, word};

fn create(name: &str, size_bytes: u64, width: u32) -> CreateVolumeRequest {
    CreateVolumeRequest { name: name.to_owned(), size_bytes, width }
}

fn attach(name: &str, holder: &str, takeover: bool) -> AttachRequest {
    AttachRequest { name: name.to_owned(), holder: holder.to_owned(), takeover, ..AttachRequest::default() }
}

fn allocate(attachment: u32, segment: u32) -> AllocateSegmentRequest {
    AllocateSegmentRequest { volume_id: 1, attachment, segment }
}

#[tokio::test]
async fn a_volume_from_creation_to_deletion() {
    let mds = Mds::start().await;
    assert_eq!(word(volumes(mds.address).await.create(create("web", GIB, 0)).await), ErrorWord::NoPlacement);
    let _chunkservers = three_chunkservers(mds.address).await;
    let mut volumes = volumes(mds.address).await;

    let volume = volumes.create(create("web", 2 * GIB + (1 << 20), 0)).await.expect("created").into_inner();
    assert_eq!((volume.width, volume.attachment, volume.allocated_bytes), (6, 0, 0));
    let narrow = volumes.create(create("narrow", 1 << 20, 2)).await.expect("created").into_inner();
    assert_eq!((narrow.id, narrow.copysets.len()), (2, 2));
    let wide = volumes.create(create("wide", 64 * TIB, 64)).await.expect("as wide as there are").into_inner();
    assert_eq!(wide.copysets.len(), 6);
    assert_eq!(word(volumes.create(create("web", GIB, 0)).await), ErrorWord::Exists);
    let names =
        |list: Vec<evolute_protocol::rpc::Volume>| list.into_iter().map(|v| v.name).collect::<Vec<_>>();
    let listed = volumes.list(ListVolumesRequest {}).await.expect("a list").into_inner().volumes;
    assert_eq!(names(listed), ["narrow", "web", "wide"]);

    let attached = volumes.attach(attach("web", "host-a", false)).await.expect("attached").into_inner();
    let map = attached.map.expect("a map");
    assert_eq!((attached.attachment, map.segments.len(), map.copysets.len()), (1, 0, 6));
    for copyset in &map.copysets {
        assert_eq!(copyset.replicas.len(), 3);
        assert!(copyset.replicas.iter().any(|replica| replica.chunkserver == copyset.leader_chunkserver));
        assert!(copyset.replicas.iter().all(|replica| replica.address == "127.0.0.1:7801"));
    }
    // 2 GiB and a bit: three segments.
    for segment in [0, 2] {
        let first = volumes.allocate_segment(allocate(1, segment)).await.expect("space").into_inner();
        let again = volumes.allocate_segment(allocate(1, segment)).await.expect("the same").into_inner();
        assert_eq!((first.index, first.chunk_copysets.len()), (segment, 64));
        assert_eq!(first, again);
        assert!(first.chunk_copysets.windows(2).all(|pair| pair[0] != pair[1]), "neighbours lie apart");
    }
    assert_eq!(word(volumes.allocate_segment(allocate(1, 3)).await), ErrorWord::Invalid);
    let shown = volumes.show(ShowVolumeRequest { name: "web".into() }).await.expect("shown").into_inner();
    assert_eq!(shown.allocated_bytes, 2 * GIB);
    assert_eq!(shown.attached.expect("attached").holder, "host-a");
    let map: VolumeMap = volumes.map(MapRequest { volume_id: 1 }).await.expect("a map").into_inner();
    assert_eq!(map.segments.iter().map(|s| s.index).collect::<Vec<_>>(), [0, 2]);

    let delete = |force| DeleteVolumeRequest { name: "web".into(), force };
    assert_eq!(word(volumes.delete(delete(false)).await), ErrorWord::AttachedElsewhere);
    volumes.delete(delete(true)).await.expect("deleted");
    assert_eq!(word(volumes.map(MapRequest { volume_id: 1 }).await), ErrorWord::NotFound);
    assert_eq!(word(volumes.allocate_segment(allocate(1, 1)).await), ErrorWord::NotFound);
    assert_eq!(word(volumes.show(ShowVolumeRequest { name: "web".into() }).await), ErrorWord::NotFound);
    assert_eq!(word(volumes.delete(delete(true)).await), ErrorWord::NotFound);
}

/// One writer: whoever attached last gets space, nobody before.
#[tokio::test]
async fn a_newer_attachment_fences_the_older_one() {
    let mds = Mds::start().await;
    let _chunkservers = three_chunkservers(mds.address).await;
    let mut volumes = volumes(mds.address).await;
    volumes.create(create("web", 8 * GIB, 0)).await.expect("created");
    let number =
        |response: tonic::Response<evolute_protocol::rpc::AttachResponse>| response.into_inner().attachment;

    assert_eq!(volumes.attach(attach("web", "host-a", false)).await.map(number).expect("attached"), 1);
    let refused = volumes.attach(attach("web", "host-b", false)).await.expect_err("held");
    assert_eq!(ErrorWord::of(&refused), Some(ErrorWord::AttachedElsewhere));
    assert!(refused.message().contains("host-a since 20"), "{}", refused.message());
    volumes.allocate_segment(allocate(1, 0)).await.expect("host-a writes");
    // It restarted and knows nothing of its former self.
    assert_eq!(volumes.attach(attach("web", "host-a", false)).await.map(number).expect("attached"), 2);
    assert_eq!(word(volumes.allocate_segment(allocate(1, 0)).await), ErrorWord::FencedOut);
    assert_eq!(volumes.attach(attach("web", "host-b", true)).await.map(number).expect("taken over"), 3);
    assert_eq!(word(volumes.allocate_segment(allocate(2, 1)).await), ErrorWord::FencedOut);
    volumes.detach(DetachRequest { volume_id: 1, attachment: 2 }).await.expect("ignored");
    volumes.allocate_segment(allocate(3, 1)).await.expect("host-b still writes");
    volumes.detach(DetachRequest { volume_id: 1, attachment: 3 }).await.expect("given back");
    assert_eq!(word(volumes.allocate_segment(allocate(3, 2)).await), ErrorWord::FencedOut);
    assert_eq!(volumes.attach(attach("web", "host-a", false)).await.map(number).expect("attached"), 4);
}

#[tokio::test]
async fn two_who_ask_at_the_same_time_get_the_same_segment_and_not_the_same_attachment() {
    let mds = Mds::start().await;
    let _chunkservers = three_chunkservers(mds.address).await;
    let mut client = volumes(mds.address).await;
    client.create(create("web", 64 * GIB, 0)).await.expect("created");
    let mut numbers = Vec::new();
    let attaching: Vec<_> = (0..20)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(
                async move { client.attach(attach("web", "host-a", false)).await.expect("attached") },
            )
        })
        .collect();
    for task in attaching {
        numbers.push(task.await.expect("done").into_inner().attachment);
    }
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=20).collect::<Vec<_>>());
    let allocating: Vec<_> = (0..64)
        .map(|i| {
            let mut client = client.clone();
            tokio::spawn(async move { client.allocate_segment(allocate(20, i % 8)).await.expect("space") })
        })
        .collect();
    let mut segments = Vec::new();
    for task in allocating {
        segments.push(task.await.expect("done").into_inner());
    }
    let map = client.map(MapRequest { volume_id: 1 }).await.expect("a map").into_inner();
    assert_eq!(map.segments.len(), 8);
    assert!(segments.iter().all(|segment| map.segments.contains(segment)));
}

/// With three chunkservers every copyset has a replica on each of them. One that is near-full is like one that is away.
#[tokio::test]
async fn one_near_full_disk_of_three_stops_nobody_and_two_do() {
    let mds = Mds::start().await;
    let [one, two, _three] = three_chunkservers(mds.address).await;
    let mut client = volumes(mds.address).await;
    client.create(create("web", 4 * GIB, 0)).await.expect("created");
    client.attach(attach("web", "host-a", false)).await.expect("attached");
    client.allocate_segment(allocate(1, 0)).await.expect("there is room");
    let say_free = async |chunkserver: &crate::support::Chunkserver, free_bytes| {
        chunkserver.seen.lock().expect("lock").free_bytes = free_bytes;
        chunkserver.report().await;
    };
    let warned = async |what: &'static str| {
        until(what, || async {
            crate::support::status(mds.address).await.reasons.iter().any(|reason| reason.starts_with(what))
        })
        .await;
    };
    say_free(&one, GIB).await;
    warned("new space is allocated in copysets with a near-full member").await;
    client.allocate_segment(allocate(1, 1)).await.expect("two of three have room");
    client.create(create("more", GIB, 0)).await.expect("two of three have room");
    say_free(&two, GIB).await;
    warned("new space is refused").await;
    let refused = client.allocate_segment(allocate(1, 2)).await.expect_err("full");
    assert_eq!(ErrorWord::of(&refused), Some(ErrorWord::NoPlacement));
    assert!(refused.message().contains("near-full"), "{}", refused.message());
    assert_eq!(word(client.create(create("most", GIB, 0)).await), ErrorWord::NoPlacement);
    client.allocate_segment(allocate(1, 0)).await.expect("what is there stays usable");
    say_free(&one, TIB - GIB).await;
    until("there is room again", || {
        let mut client = client.clone();
        async move { client.allocate_segment(allocate(1, 2)).await.is_ok() }
    })
    .await;
}

#[tokio::test]
async fn used_bytes_are_counted_once_per_copyset() {
    let mds = Mds::start().await;
    let [one, two, _three] = three_chunkservers(mds.address).await;
    let mut client = volumes(mds.address).await;
    client.create(create("web", 4 * GIB, 0)).await.expect("created");
    // Copyset 1 is led by one of them; the other led it before and has not said anything new.
    let used = |copyset, used_bytes| VolumeUse { volume: 1, copyset, used_bytes };
    let leads = |c: &crate::support::Chunkserver, copyset: u32| {
        c.seen.lock().expect("lock").replicas[&copyset].role() == evolute_protocol::rpc::Role::Leader
    };
    let (leader, former) = if leads(&one, 1) { (&one, &two) } else { (&two, &one) };
    assert!(leads(leader, 1), "copysets 1 and 2 are led by the first two");
    // It is written to, and nobody has said yet how much is there: that is not 0.
    client.attach(attach("web", "host", false)).await.expect("attached");
    client.allocate_segment(allocate(1, 0)).await.expect("allocated");
    let shown = client.show(ShowVolumeRequest { name: "web".into() }).await.expect("shown").into_inner();
    assert!(shown.used_unknown, "{shown:?}");
    let rest = (3..=6).map(|copyset| used(copyset, 0));
    leader.seen.lock().expect("lock").volumes = rest.chain([used(1, 4096)]).collect();
    leader.seen.lock().expect("lock").replicas.get_mut(&1).expect("a replica").term = 2;
    former.seen.lock().expect("lock").volumes = vec![used(1, 9999), used(2, 100)];
    leader.report().await;
    former.report().await;
    until("the sum is right", || {
        let mut client = client.clone();
        async move {
            let shown = client.show(ShowVolumeRequest { name: "web".into() }).await.expect("shown");
            let shown = shown.into_inner();
            !shown.used_unknown && shown.used_bytes == 4196
        }
    })
    .await;
}
