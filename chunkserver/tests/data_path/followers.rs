//! Reads from replicas that do not lead: three shards of one copyset in this process.

use std::collections::BTreeMap;
use std::net::TcpListener;

use evolute_chunkserver::addresses::Addresses;
use evolute_chunkserver::chunk_store::StoreOptions;
use evolute_protocol::id::{ChunkserverId, ReplicaId};
use evolute_protocol::wire::reply::{Freshness, Refusal, Reply};

use super::client::{Client, block};
use super::{CLUSTER, COPYSET, FIRST, Running, SECOND, VOLUME, refusal};

pub struct Three {
    /// `None`: stopped.
    pub running: Vec<Option<Running>>,
    dirs: Vec<tempfile::TempDir>,
}

pub fn id(n: usize) -> ChunkserverId {
    ChunkserverId(u32::try_from(n).expect("small") + 1)
}

fn members() -> Vec<(ReplicaId, ChunkserverId)> {
    (0..3).map(|n| (ReplicaId(11 + n as u64), id(n))).collect()
}

impl Three {
    fn start() -> Self {
        Self::start_on(|_| StoreOptions::default())
    }

    /// Each on a disk of its own.
    pub fn start_on(disk: impl Fn(usize) -> StoreOptions) -> Self {
        let listeners: Vec<_> =
            (0..3).map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
        let addresses: BTreeMap<u32, String> = listeners
            .iter()
            .enumerate()
            .map(|(n, listener)| (id(n).0, listener.local_addr().expect("bound").to_string()))
            .collect();
        let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().expect("temp dir")).collect();
        let start = |(n, listener): (usize, TcpListener)| {
            Addresses::open(dirs[n].path()).learn(addresses.clone());
            Some(Running::start_on(id(n), dirs[n].path(), listener, members(), disk(n)))
        };
        let running = listeners.into_iter().enumerate().map(start).collect();
        Self { running, dirs }
    }

    /// A client of the one that leads, and which one that is.
    pub fn leader(&self) -> (usize, Client) {
        let mut clients: Vec<_> = (0..3).filter_map(|n| Some((n, self.client(n)?))).collect();
        loop {
            for (n, client) in &mut clients {
                // Not fenced yet, or data: only a leader says either.
                let asked = client.try_read(0, 512);
                if !matches!(asked, Reply::Refused(Refusal::NotLeader { .. } | Refusal::NoSuchCopyset)) {
                    return (*n, self.client(*n).expect("running"));
                }
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    fn client(&self, n: usize) -> Option<Client> {
        let running = self.running[n].as_ref()?;
        Some(Client::to(running.address, CLUSTER, id(n), COPYSET))
    }

    fn stop(&mut self, n: usize) {
        self.running[n].take().expect("running").stop();
    }

    /// Again, elsewhere: who calls it must learn the new address.
    fn start_again(&mut self, n: usize) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        self.running[n] = Some(Running::start_as(id(n), self.dirs[n].path(), listener, members()));
    }

    pub fn end(self) {
        self.running.into_iter().flatten().for_each(Running::stop);
    }
}

fn data(reply: Reply) -> Option<(Freshness, bytes::Bytes)> {
    match reply {
        Reply::Data { fresh, data, .. } => Some((fresh, data[0].clone())),
        Reply::Refused(Refusal::Behind { .. }) => None,
        other => panic!("neither data nor behind: {other:?}"),
    }
}

/// However soon after a write a follower is asked, it has the write, or says that it is behind; and when it answers,
/// it has answered for no less than what was asked for.
#[test]
fn a_follower_answers_with_what_was_asked_for_or_says_that_it_is_behind() {
    let three = Three::start();
    let (leader, mut writer) = three.leader();
    writer.fence(VOLUME, FIRST);
    let mut followers: Vec<_> =
        (0..3).filter(|n| *n != leader).map(|n| three.client(n).expect("running")).collect();
    for n in 1..=100u8 {
        let at = writer.write(0, block(n), u64::from(n));
        for follower in &mut followers {
            follower.epoch = FIRST;
            assert!(matches!(follower.try_read(0, 4096), Reply::Refused(Refusal::NotLeader { .. })));
            let mut answered = None;
            follower.until(|follower| {
                answered = data(follower.try_read_at_least(0, 4096, at.index));
                answered.is_some()
            });
            let (fresh, bytes) = answered.expect("until then");
            assert!(fresh.index >= at.index && bytes == block(n), "{fresh:?} of {at:?}, {}", bytes[0]);
        }
    }
    // An index that nobody has written: all are behind, the leader too.
    let beyond = writer.write(0, block(1), 101).index + 1;
    for client in followers.iter_mut().chain([&mut writer]) {
        assert!(matches!(client.try_read_at_least(0, 512, beyond), Reply::Refused(Refusal::Behind { .. })));
    }
    three.end();
}

#[test]
fn a_follower_serves_no_epoch_but_the_one_it_knows() {
    let three = Three::start();
    let (leader, mut writer) = three.leader();
    let mut follower = three.client((leader + 1) % 3).expect("running");
    follower.epoch = FIRST;
    assert!(matches!(refusal(follower.try_read_at_least(0, 512, 0)), Refusal::Behind { applied: 0 }));
    let first = writer.fence(VOLUME, FIRST);
    writer.write(0, block(1), 1);
    follower.until(|follower| data(follower.try_read_at_least(0, 4096, first.index)).is_some());
    writer.fence(VOLUME, SECOND);
    // Sooner or later it hears of the second; never again does it serve the first.
    follower.until(|follower| {
        matches!(follower.try_read_at_least(0, 512, first.index),
            Reply::Refused(Refusal::Fenced { current }) if current == SECOND)
    });
    follower.epoch = SECOND;
    assert!(data(follower.try_read_at_least(0, 4096, first.index)).is_some());
    three.end();
}

/// The leader is gone and there is no quorum, so nobody will ever lead: what is applied can still be read. A replica
/// that has just started does not know what of its log is committed: it says that it is behind.
#[test]
fn without_a_quorum_what_is_applied_is_read_but_not_from_one_that_just_started() {
    let mut three = Three::start();
    let (leader, mut writer) = three.leader();
    writer.fence(VOLUME, FIRST);
    let at = writer.write(0, block(1), 1);
    let (one, other) = ((leader + 1) % 3, (leader + 2) % 3);
    for n in [one, other] {
        let mut follower = three.client(n).expect("running");
        follower.epoch = FIRST;
        follower.until(|follower| data(follower.try_read_at_least(0, 4096, at.index)).is_some());
    }
    three.stop(leader);
    three.stop(other);
    let mut follower = three.client(one).expect("running");
    follower.epoch = FIRST;
    let (_, bytes) = data(follower.try_read_at_least(0, 4096, at.index)).expect("applied");
    assert_eq!(bytes, block(1));
    drop(follower);
    three.stop(one);
    three.start_again(one);
    let mut follower = three.client(one).expect("running");
    follower.epoch = FIRST;
    follower.until(|follower| {
        !matches!(follower.try_read_at_least(0, 512, 0), Reply::Refused(Refusal::NoSuchCopyset))
    });
    for _ in 0..50 {
        let reply = follower.try_read_at_least(0, 4096, at.index);
        assert!(matches!(reply, Reply::Refused(Refusal::Behind { .. })), "{reply:?}");
    }
    three.end();
}
