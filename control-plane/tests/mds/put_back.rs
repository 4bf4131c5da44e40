//! An MDS whose directory is put back to an older copy: it gives nothing again that somebody has, and learns what it forgot.

use std::fs;
use std::path::Path;

use evolute_protocol::geometry::GIB;
use evolute_protocol::rpc::{
    AllocateSegmentRequest, AttachRequest, CreateVolumeRequest, ErrorWord, ListVolumesRequest, MapRequest,
    VolumeInventory,
};

use crate::support::{Chunkserver, Identity, Mds, accept, status, three_chunkservers, until, volumes, word};

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("made");
    for entry in fs::read_dir(from).expect("list") {
        let entry = entry.expect("an entry");
        let to = to.join(entry.file_name());
        match entry.file_type().expect("a type").is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).expect("copied")),
        }
    }
}

async fn killed(chunkservers: impl IntoIterator<Item = Chunkserver>) -> Vec<Identity> {
    let mut disks = Vec::new();
    for chunkserver in chunkservers {
        disks.push(chunkserver.kill().await);
    }
    disks
}

async fn again(mds: &Mds, disks: &[Identity]) -> Vec<Chunkserver> {
    let mut chunkservers = Vec::new();
    for disk in disks {
        chunkservers.push(Chunkserver::start_again(mds.address, disk).await);
    }
    chunkservers
}

fn create(name: &str) -> CreateVolumeRequest {
    CreateVolumeRequest { name: name.into(), size_bytes: 4 * GIB, width: 0 }
}

fn attach(name: &str, takeover: bool) -> AttachRequest {
    AttachRequest {
        name: name.into(),
        holder: format!("host of {name}"),
        takeover,
        ..AttachRequest::default()
    }
}

/// Volumes, attachments and segments that the copy does not have.
#[tokio::test]
async fn what_the_copy_forgot_is_learnt_back_and_no_number_is_given_twice() {
    let mut mds = Mds::start().await;
    let disks = killed(three_chunkservers(mds.address).await).await;
    mds.stop().await;
    let (dir, old) = (mds.dir.path().join("mds"), mds.dir.path().join("old"));
    mds.start_again().await;
    let chunkservers = again(&mds, &disks).await;
    let mut client = volumes(mds.address).await;
    assert_eq!(client.create(create("kept")).await.expect("created").into_inner().id, 1);
    let disks = killed(chunkservers).await;
    mds.stop().await;
    copy(&dir, &old);

    mds.start_again().await;
    let chunkservers = again(&mds, &disks).await;
    let mut client = volumes(mds.address).await;
    assert_eq!(client.attach(attach("kept", false)).await.expect("attached").into_inner().attachment, 1);
    let forgotten = client.create(create("forgotten")).await.expect("created").into_inner();
    assert_eq!(forgotten.id, 2);
    client.attach(attach("forgotten", false)).await.expect("attached");
    let allocate = AllocateSegmentRequest { volume_id: 2, attachment: 1, segment: 2 };
    client.allocate_segment(allocate).await.expect("space");
    // All of them are told; and of their disks, this is what their groups would hold.
    let mut disks = killed(chunkservers).await;
    let holds = |volume, first: u64| VolumeInventory {
        volume,
        attachment: 1,
        dropped: false,
        chunks: vec![first, 1],
    };
    for disk in &mut disks {
        disk.volumes = vec![holds(1, 0), holds(2, 130)];
    }
    mds.stop().await;
    fs::remove_dir_all(&dir).expect("removed");
    fs::rename(&old, &dir).expect("put back");
    mds.start_again().await;

    // One is missing: nobody knows what only that one knows.
    let (mut chunkservers, late) = (again(&mds, &disks[1..3]).await, &disks[0]);
    let mut client = volumes(mds.address).await;
    let refused = client.create(create("new")).await;
    assert_eq!(word(refused), ErrorWord::MdsPutBack);
    let said = status(mds.address).await.reasons.join("; ");
    assert!(
        said.contains("put back") && said.contains("accept-mds") && said.contains("chunkserver-1"),
        "{said}"
    );
    chunkservers.extend(again(&mds, std::slice::from_ref(late)).await);
    let address = mds.address;
    until("it has learnt what it forgot", || async {
        let listed = volumes(address).await.list(ListVolumesRequest {}).await.expect("a list").into_inner();
        listed.volumes.iter().any(|volume| volume.name == "recovered-2" && volume.size_bytes == 3 * GIB)
    })
    .await;
    let said = status(mds.address).await.reasons.join("; ");
    assert!(said.contains("put back from an older copy and has learnt"), "{said}");
    let new = client.create(create("new")).await.expect("created").into_inner();
    assert!(new.id > 2, "{new:?}");
    // Where the forgotten segment has its chunk, the map says so.
    let map = client.map(MapRequest { volume_id: 2 }).await.expect("a map").into_inner();
    assert_eq!(map.segments.iter().map(|segment| segment.index).collect::<Vec<_>>(), [2]);
    // Somebody has it, nobody knows who.
    let refused = client.attach(attach("kept", false)).await;
    assert_eq!(word(refused), ErrorWord::MdsPutBack);
    let allocate = AllocateSegmentRequest { volume_id: 1, attachment: 1, segment: 1 };
    client.allocate_segment(allocate).await.expect("whoever has it goes on");
    accept(mds.address).await;
    let attached = client.attach(attach("kept", false)).await.expect("attached").into_inner();
    assert!(attached.attachment > 1000, "{attached:?}");
    let refused = client.allocate_segment(AllocateSegmentRequest { segment: 2, ..allocate }).await;
    assert_eq!(word(refused), ErrorWord::FencedOut);
    drop(chunkservers);
}

/// Fewer than half of its chunkservers are there, and none of them knows anything newer: that proves nothing.
#[tokio::test]
async fn an_mds_that_started_gives_nothing_before_most_of_its_chunkservers_are_back() {
    let mut mds = Mds::start().await;
    let disks = killed(three_chunkservers(mds.address).await).await;
    mds.stop().await;
    mds.start_again().await;
    let mut chunkservers = again(&mds, &disks[..1]).await;
    let mut client = volumes(mds.address).await;
    assert_eq!(word(client.create(create("early")).await), ErrorWord::Busy);
    chunkservers.extend(again(&mds, &disks[1..2]).await);
    client.create(create("then")).await.expect("two of three are back");
    drop(chunkservers);
}
