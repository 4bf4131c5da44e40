//! Replicas that are missing or should be elsewhere: what a real MDS orders, and what becomes of it.

use std::collections::BTreeSet;
use std::time::Duration;

use evolute_control_plane::config::Limits;
use evolute_protocol::rpc::cluster_client::ClusterClient;
use evolute_protocol::rpc::{
    ClusterStatus, CreateVolumeRequest, ErrorWord, Health, MapRequest, RepairReason, RetireRequest,
    RetireResponse, Role, order,
};
use tonic::Status;

use crate::support::{Chunkserver, Mds, channel, elect, status, until, volumes, word};

/// An MDS that does not wait long, and chunkservers 1 to 4 in z1, z2, z3, z3, with their shares.
async fn cluster() -> (Mds, [Chunkserver; 4]) {
    let limits = Limits { repair_after: Duration::from_millis(2500), ..Limits::default() };
    let mds = Mds::with(Duration::from_millis(400), limits).await;
    let mut chunkservers = Vec::new();
    for zone in ["z1", "z2", "z3", "z3"] {
        chunkservers.push(Chunkserver::start(mds.address, zone).await.chatty());
    }
    until("everybody has its share", || async {
        let status = status(mds.address).await;
        let replicas: Vec<_> = status.chunkservers.iter().map(|c| c.replicas).collect();
        // What was moved away may still be there, for a moment.
        let here: Vec<_> = chunkservers.iter().map(Chunkserver::replicas).collect();
        is_quiet(&status) && replicas == [8, 8, 4, 4] && here == [8, 8, 4, 4]
    })
    .await;
    let Ok(chunkservers) = <[Chunkserver; 4]>::try_from(chunkservers) else { panic!("four") };
    (mds, chunkservers)
}

fn is_quiet(status: &ClusterStatus) -> bool {
    status.copysets.len() == 8 && status.repairs.is_empty() && status.health() == Health::Ok
}

async fn retire(mds: &Mds, chunkserver: u32, retiring: bool) -> Result<RetireResponse, Status> {
    let mut client = ClusterClient::new(channel(mds.address).await);
    client.retire(RetireRequest { chunkserver, retiring }).await.map(tonic::Response::into_inner)
}

fn stall(chunkservers: &[&Chunkserver], stalls: bool) {
    for chunkserver in chunkservers {
        chunkserver.seen.lock().expect("lock").stalls = stalls;
    }
}

fn orders(chunkserver: &Chunkserver) -> Vec<order::What> {
    let seen = chunkserver.seen.lock().expect("lock");
    seen.orders.iter().filter_map(|order| order.what.clone()).collect()
}

#[tokio::test]
async fn a_silent_chunkservers_replicas_are_made_anew_elsewhere() {
    let (mds, [one, two, three, four]) = cluster().await;
    let mut volumes = volumes(mds.address).await;
    let create = CreateVolumeRequest { name: "web".into(), size_bytes: 1 << 30, width: 8 };
    let volume = volumes.create(create).await.expect("created").into_inner().id;

    // Nobody catches up until the repair was seen: on a busy machine it is over between two looks.
    stall(&[&one, &two, &four], true);
    let mut disk = three.kill().await;
    elect(&[&one, &two, &four], 3);
    until("a repair is shown, with its reason", || async {
        let status = status(mds.address).await;
        status.repairs.iter().any(|r| (r.reason(), r.old_chunkserver) == (RepairReason::Silent, 3))
    })
    .await;
    stall(&[&one, &two, &four], false);
    until("it has no replica any more", || async {
        let status = status(mds.address).await;
        status.chunkservers[2].replicas == 0 && is_quiet(&status)
    })
    .await;
    let map = volumes.map(MapRequest { volume_id: volume }).await.expect("a map").into_inner();
    for route in &map.copysets {
        let on: BTreeSet<_> = route.replicas.iter().map(|replica| replica.chunkserver).collect();
        assert_eq!(on, BTreeSet::from([1, 2, 4]), "clients ask those that know");
    }
    let joined =
        orders(&four).into_iter().filter(|o| matches!(o, order::What::CreateReplica(c) if c.joining));
    let joined: BTreeSet<_> = joined.map(|o| format!("{o:?}")).collect();
    assert!(joined.len() >= 4, "{joined:?}");

    // It comes back: what it has belongs nowhere, and is not made a member again under its old numbers.
    let old: BTreeSet<u64> = disk.replicas.values().map(|replica| replica.replica).collect();
    for replica in disk.replicas.values_mut() {
        replica.set_role(Role::Follower);
        replica.leader_chunkserver = 0;
    }
    let back = Chunkserver::start_again(mds.address, &disk).await.chatty();
    let removed = || {
        let orders = orders(&back).into_iter();
        let removed = orders.filter_map(|o| match o {
            order::What::RemoveReplica(remove) => Some(remove.replica),
            _ => None,
        });
        removed.collect::<BTreeSet<_>>()
    };
    until("all of it is to go", || async { removed().is_superset(&old) }).await;
    for what in orders(&back) {
        assert!(!matches!(what, order::What::CreateReplica(c) if old.contains(&c.replica)));
    }
}

#[tokio::test]
async fn a_retiring_chunkserver_becomes_empty_and_can_come_back() {
    let (mds, _chunkservers) = cluster().await;
    assert_eq!(word(retire(&mds, 9, true).await), ErrorWord::NotFound);
    // A copyset whose leader is just changing is one, for a moment.
    until("nothing is in its way", || async {
        let answer = retire(&mds, 4, true).await.expect("known");
        assert!(answer.chunkserver.is_some_and(|c| c.retiring));
        answer.obstacles.is_empty()
    })
    .await;
    until("it is empty", || async {
        let status = status(mds.address).await;
        (status.chunkservers[3].replicas, status.chunkservers[2].replicas) == (0, 8) && is_quiet(&status)
    })
    .await;
    // The other zones have nobody else: it says so at once, and in the status.
    let names_them = |what: &String| what.contains("outside of zone z2 and zone z3");
    // Copysets whose leader is just changing have another obstacle, for a moment.
    until("it is the only one, and the status has it, too", || async {
        let obstacles = retire(&mds, 1, true).await.expect("known").obstacles;
        let reasons = status(mds.address).await.reasons;
        obstacles.len() == 1 && names_them(&obstacles[0]) && reasons.contains(&obstacles[0])
    })
    .await;
    assert!(!retire(&mds, 1, false).await.expect("known").chunkserver.expect("shown").retiring);
    retire(&mds, 4, false).await.expect("known");
    until("it has its share again", || async {
        let status = status(mds.address).await;
        status.chunkservers[3].replicas == 4 && is_quiet(&status)
    })
    .await;
}

#[tokio::test]
async fn who_comes_back_while_it_is_being_replaced_stays() {
    let (mds, [one, two, three, four]) = cluster().await;
    stall(&[&one, &two, &four], true);
    let mut disk = three.kill().await;
    elect(&[&one, &two, &four], 3);
    let had = disk.replicas.len();
    until("a replacement catches up", || async {
        let repairs = status(mds.address).await.repairs;
        !repairs.is_empty() && repairs.iter().any(|repair| repair.entries_left == 1000)
    })
    .await;
    for replica in disk.replicas.values_mut() {
        replica.set_role(Role::Follower);
        replica.leader_chunkserver = 0;
    }
    let back = Chunkserver::start_again(mds.address, &disk).await.chatty();
    until("everything is as before", || async {
        let status = status(mds.address).await;
        status.chunkservers[2].replicas as usize == had && is_quiet(&status)
    })
    .await;
    assert_eq!(back.replicas(), had);
    until("the learners were taken out again", || async {
        let mut all = [&one, &two].into_iter().flat_map(orders);
        all.any(|o| matches!(o, order::What::ChangeMembers(c) if c.add.is_none()))
    })
    .await;
    until("and what was begun is gone", || async {
        let removed = orders(&four).iter().any(|o| matches!(o, order::What::RemoveReplica(_)));
        removed && four.replicas() == 4
    })
    .await;
}
