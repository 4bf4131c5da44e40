//! Reads from replicas that do not lead: three shards of one copyset in this process.

use std::collections::BTreeMap;
use std::net::TcpListener;

use bytes::Bytes;
use evolute_chunkserver::addresses::Addresses;
use evolute_chunkserver::chunk_store::StoreOptions;
use evolute_protocol::id::{ChunkserverId, ReplicaId};
use evolute_protocol::wire::reply::{Freshness, Refusal, Reply};
use evolute_protocol::wire::request::{Fence, Request};

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

fn data(reply: Reply) -> Option<(Freshness, Bytes)> {
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

/// One follower is gone, so the other has whatever is acknowledged, in its log: it knows of no commit yet, and need not,
/// because who asks does. Then the leader dies, and there will never be another one.
#[test]
fn what_was_acknowledged_is_read_from_a_follower_at_once_and_after_the_leader_died() {
    let mut three = Three::start();
    let (leader, mut writer) = three.leader();
    writer.fence(VOLUME, FIRST);
    let (one, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let mut follower = three.client(one).expect("running");
    follower.epoch = FIRST;
    let at = writer.write(0, block(255), 1);
    follower.until(|follower| data(follower.try_read_at_least(0, 4096, at.index)).is_some());
    three.stop(other);
    let mut last = at;
    for n in 1..=200u8 {
        last = writer.write(0, block(n), u64::from(n) + 1);
        let (fresh, bytes) = data(follower.try_read_ahead(0, 4096, last)).expect("it has it");
        assert!(fresh.index >= last.index && bytes == block(n), "{fresh:?} of {last:?}, {}", bytes[0]);
    }
    three.stop(leader);
    let (_, bytes) = data(follower.try_read_ahead(0, 4096, last)).expect("it has it");
    assert_eq!(bytes, block(200));
    let beyond = Freshness { index: last.index + 100, ..last };
    assert!(data(follower.try_read_ahead(0, 4096, beyond)).is_none());
    three.end();
}

/// A client says of entries that they are committed which never will be. It is shown what would be, by the rules that
/// hold for all: and nothing of it happened.
#[test]
fn who_names_an_entry_that_is_not_committed_spoils_their_own_read_and_nothing_else() {
    let mut three = Three::start();
    let (leader, mut writer) = three.leader();
    writer.fence(VOLUME, FIRST);
    let at = writer.write(0, Bytes::from(vec![1; 4 * 4096]), 1);
    (0..3).filter(|n| *n != leader).for_each(|n| three.stop(n));
    let mut reader = three.client(leader).expect("running");
    reader.epoch = FIRST;
    let before = reader.try_digests(0, 16384, at.index);
    assert!(matches!(before, Reply::Digests { .. }));
    writer.send_all(&[
        writer.write_of(512, Bytes::from(vec![2; 1024]), 2),
        writer.discard_of(4096 + 512, 4096, 3),
        // Again, as something else: the first counts. And what was applied long ago.
        writer.write_of(0, block(9), 2),
        writer.write_of(0, block(9), 1),
    ]);
    let ahead = Freshness { index: at.index + 1, ..at };
    let mut shown = None;
    reader.until(|reader| {
        shown = data(reader.try_read_ahead(0, 16384, ahead));
        shown.is_some()
    });
    let mut expected = vec![1; 16384];
    expected[512..1536].fill(2);
    expected[4608..8704].fill(0);
    let (fresh, bytes) = shown.expect("until then");
    assert!(bytes == expected && fresh == ahead, "{fresh:?} of {ahead:?}");
    // Part of it, by sectors, and one that nothing changed.
    let (_, part) = data(reader.try_read_ahead(1024, 1024, ahead)).expect("as before");
    assert!(part[..] == expected[1024..2048]);
    let (_, same) = data(reader.try_read_ahead(12288, 4096, ahead)).expect("as before");
    assert_eq!(same, block(1));
    // No leader of a later term knows of it.
    let later = Freshness { term: at.term + 1, ..ahead };
    assert!(data(reader.try_read_ahead(0, 4096, later)).is_none());
    // Nor is it there for anybody else.
    assert!(data(reader.try_read_at_least(0, 4096, ahead.index)).is_none());
    let (fresh, bytes) = data(reader.try_read_at_least(0, 4096, at.index)).expect("applied");
    assert_eq!((fresh.index, bytes), (at.index, block(1)));
    // A fence in the log ends the epoch for who believes in it.
    let fence = Request::Fence(Fence { volume: VOLUME, epoch: SECOND });
    writer.send_all(&[fence]);
    let fenced = Freshness { index: at.index + 2, ..at };
    reader.until(|reader| {
        matches!(reader.try_read_ahead(0, 4096, fenced),
            Reply::Refused(Refusal::Fenced { current }) if current == SECOND)
    });
    assert!(data(reader.try_read_ahead(0, 4096, ahead)).is_some());
    reader.epoch = SECOND;
    assert!(data(reader.try_read_ahead(0, 4096, ahead)).is_none());
    assert!(data(reader.try_read_ahead(0, 4096, fenced)).is_some());
    reader.epoch = FIRST;
    assert_eq!(reader.try_digests(0, 16384, at.index), before);
    drop((reader, writer));
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
