//! Reports in, orders out.

use evolute_protocol::rpc::{CreateVolumeRequest, Health};

use crate::support::{Mds, status, three_chunkservers, volumes};

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
    let addresses = chunkservers[0].seen.lock().expect("lock").addresses.len();
    assert_eq!(addresses, 3);

    let mut volumes = volumes(mds.address).await;
    let request = CreateVolumeRequest { name: "web".into(), size_bytes: 1 << 30, width: 0 };
    let volume = volumes.create(request).await.expect("created").into_inner();
    assert_eq!((volume.id, volume.width, volume.copysets.len()), (1, 6, 6));
}
