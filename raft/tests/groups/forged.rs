//! A stranger at the peers' port, with frames whose every checksum is right and whose numbers nobody can have reached. No
//! process ends, at once or at its next start, and the group goes on.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use crc_fast::CrcAlgorithm;
use evolute_raft::{
    ImpossibleVote, Log, Member, Node, OfflineLog, Peers, TERM_MAX, lower_votes, spawn_thread,
};

use crate::processes::{
    Cluster, Commands, Dialer, Directory, GROUP, Owner, Recorder, Setup, TIMING, Watch, options,
};

const APPEND: u8 = 1;
const VOTE: u8 = 4;
const PRE_VOTE: u8 = 5;
const TRANSFER: u8 = 7;
const SNAPSHOT: u8 = 10;
const SNAPSHOT_END: u8 = 12;
const TAKE_OVER: u8 = 14;
const SLEEP: u8 = 15;
const WAKE: u8 = 17;

/// Small, at the bound, beyond it, and where 64 bits end.
const EDGES: [u64; 9] =
    [0, 1, 1 << 32, TERM_MAX - 1, TERM_MAX, TERM_MAX + 1, 1 << 63, u64::MAX - 1, u64::MAX];

fn frame(kind: u8, group: u64, session: u64, body: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    out.put_slice(b"EVR1");
    out.put_u8(kind);
    out.put_bytes(0, 3);
    out.put_u32_le(u32::try_from(body.len()).expect("short"));
    out.put_u32_le(0);
    out.put_u64_le(group);
    out.put_u64_le(session);
    let crc = crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, &[&out[..], body].concat());
    out.put_u32_le(u32::try_from(crc).expect("32 bits"));
    out.put_u32_le(0);
    out.put_slice(body);
    out.to_vec()
}

/// A field of a message: how many bytes it takes, and what it is when another one is tried.
#[derive(Clone, Copy)]
struct Field(usize, u64);

const BYTE: usize = 1;
const LONG: usize = 8;

fn vote(term: u64, replica: u64, committed: u64) -> [Field; 3] {
    [Field(LONG, term), Field(LONG, replica), Field(BYTE, committed)]
}

fn maybe(there: u64, term: u64, index: u64) -> [Field; 3] {
    [Field(BYTE, there), Field(LONG, term), Field(LONG, index)]
}

/// Every message that a process takes, in the name of a stranger and of an old term, so that nothing but a number can do
/// any harm.
fn messages(to: u64) -> Vec<(u8, Vec<Field>)> {
    let to = [Field(LONG, to)];
    let membership = [Field(BYTE, 1), Field(LONG, 0), Field(LONG, 0), Field(4, 0), Field(4, 0)];
    vec![
        (
            APPEND,
            [
                &to[..],
                &[Field(BYTE, 1), Field(LONG, 0)],
                &vote(0, 77, 1),
                &maybe(1, 0, 1000),
                &maybe(1, 0, 0),
            ]
            .concat()
            .into_iter()
            .chain([Field(4, 1), Field(LONG, 0), Field(LONG, 1001), Field(BYTE, 0), Field(4, 0)])
            .collect(),
        ),
        (VOTE, [&to[..], &vote(0, 77, 0), &maybe(1, 0, 0), &[Field(BYTE, 0)]].concat()),
        (PRE_VOTE, [&to[..], &vote(0, 77, 0), &maybe(1, 0, 0), &[Field(BYTE, 0)]].concat()),
        // As good a log as anybody's, and by the leader's leave.
        (VOTE, [&to[..], &vote(0, 77, 0), &maybe(1, TERM_MAX, TERM_MAX), &[Field(BYTE, 1)]].concat()),
        (TRANSFER, [&to[..], &vote(0, 77, 1), &[Field(LONG, 77)], &maybe(1, 0, 0)].concat()),
        (
            SNAPSHOT,
            [&to[..], &[Field(LONG, 5)], &vote(0, 77, 1), &[Field(LONG, 0), Field(LONG, 0)], &membership]
                .concat(),
        ),
        (SNAPSHOT_END, vec![Field(LONG, 0), Field(LONG, 0)]),
        (TAKE_OVER, [&to[..], &[Field(LONG, 77)]].concat()),
        (SLEEP, [&to[..], &vote(0, 77, 1), &[Field(LONG, 0), Field(LONG, 0)]].concat()),
        (WAKE, to.to_vec()),
    ]
}

fn body(fields: &[Field]) -> Vec<u8> {
    fields.iter().flat_map(|Field(bytes, value)| value.to_le_bytes()[..*bytes].to_vec()).collect()
}

fn say(cluster: &Cluster, at: usize, frames: &[Vec<u8>]) {
    let mut stranger = TcpStream::connect(cluster.address(at)).expect("connected");
    for frame in frames {
        // It may have been ended by the frame before.
        if stranger.write_all(frame).is_err() {
            return;
        }
    }
}

/// What the process says to it, or nothing: it ends the connection.
fn answer(cluster: &Cluster, at: usize, frame: &[u8]) -> Option<u8> {
    let mut stranger = TcpStream::connect(cluster.address(at)).expect("connected");
    stranger.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket");
    stranger.write_all(frame).expect("sent");
    let mut header = [0; 40];
    stranger.read_exact(&mut header).is_ok().then_some(header[4])
}

/// A vote for a stranger whose log is as good as any, by the leader's leave.
fn a_vote(cluster: &Cluster, at: usize, term: u64) -> Vec<u8> {
    let to = cluster.process(at).member.replica.0;
    let fields =
        [&[Field(LONG, to)][..], &vote(term, 77, 0), &maybe(1, TERM_MAX, TERM_MAX), &[Field(BYTE, 1)]];
    frame(VOTE, 1, 9, &body(&fields.concat()))
}

/// One number of each message at a time is moved to each edge.
#[test]
fn no_number_in_any_message_ends_a_process_or_the_group() {
    let mut cluster = Cluster::of(3);
    cluster.propose("a");
    let mut wanted = vec!["a"];
    for at in 0..3 {
        for (kind, fields) in messages(cluster.process(at).member.replica.0) {
            for field in 0..fields.len() {
                let mut frames = Vec::new();
                for edge in EDGES {
                    let mut changed = fields.clone();
                    changed[field].1 = edge;
                    frames.push(frame(kind, 1, edge, &body(&changed)));
                }
                frames.iter().for_each(|one| say(&cluster, at, std::slice::from_ref(one)));
                say(&cluster, at, &frames);
            }
        }
        cluster.propose("b");
        wanted.push("b");
    }
    for at in 0..3 {
        cluster.applied(at, &wanted);
        assert!(cluster.status(at).term < TERM_MAX / 2, "{:?}", cluster.status(at));
    }
    (0..3).for_each(|at| cluster.kill(at));
    (0..3).for_each(|at| cluster.restart(at));
    cluster.propose("c");
    wanted.push("c");
    (0..3).for_each(|at| cluster.applied(at, &wanted));
}

/// One beyond the bound is nobody's: its connection ends. One that is merely far away is refused, and whoever else is on
/// that connection is served on.
#[test]
fn a_vote_that_cannot_be_is_refused() {
    let cluster = Cluster::of(3);
    cluster.propose("a");
    for at in 0..3 {
        for term in [TERM_MAX + 1, 1 << 63, u64::MAX] {
            assert_eq!(answer(&cluster, at, &a_vote(&cluster, at, term)), None, "{term}");
        }
        for term in [1 << 40, TERM_MAX] {
            assert_eq!(answer(&cluster, at, &a_vote(&cluster, at, term)), Some(9), "{term}: not here");
        }
        let mine = cluster.process(at).member.replica.0;
        let fields = [&[Field(LONG, mine)][..], &vote(9, mine, 0), &maybe(0, 0, 0), &[Field(BYTE, 1)]];
        assert_eq!(
            answer(&cluster, at, &frame(VOTE, 1, 9, &body(&fields.concat()))),
            None,
            "in its own name"
        );
        assert!(cluster.status(at).term < 1 << 32);
    }
    cluster.propose("b");
    (0..3).for_each(|at| cluster.applied(at, &["a", "b"]));
}

/// Elections may have gone on without it: it is not left behind for that.
#[test]
fn a_term_that_elections_can_have_reached_is_taken() {
    let cluster = Cluster::of(3);
    cluster.propose("a");
    for at in 0..3 {
        assert_eq!(answer(&cluster, at, &a_vote(&cluster, at, 1 << 31)), Some(6), "voted");
    }
    cluster.propose("b");
    (0..3).for_each(|at| cluster.applied(at, &["a", "b"]));
    assert!(cluster.status(0).term > 1 << 31);
}

/// As a program of before has left it: all three have voted in the last term there is. None of them runs, each says why,
/// and when their votes are lowered they are what they were.
#[test]
fn a_group_that_voted_in_the_last_term_is_repaired() {
    let mut cluster = Cluster::of(3);
    cluster.propose("a");
    (0..3).for_each(|at| cluster.applied(at, &["a"]));
    (0..3).for_each(|at| cluster.kill(at));
    for at in 0..3 {
        let (dir, member) = (cluster.dirs[at].path().to_owned(), cluster.members[at]);
        let found = OfflineLog::open(&dir, options(member).owner).expect("a log");
        assert_eq!(found.impossible_votes(0), []);
        let group = found.groups().next().expect("a group");
        drop(found);
        let poisoned =
            ImpossibleVote { group: group.0, replica: member.replica, term: 0, lowered: Some(u64::MAX) };
        let setup = Setup::of(member).options;
        let refused = on_a_thread(move || async move {
            lower_votes(&dir, setup.clone(), &[poisoned]).await.expect("written");
            let log = Log::open(&dir, setup).await.expect("the log itself is well");
            start(log, member, &dir).await
        });
        assert!(refused.contains("repair") && refused.contains(&member.replica.to_string()), "{refused}");
    }
    for at in 0..3 {
        let (dir, member) = (cluster.dirs[at].path().to_owned(), cluster.members[at]);
        let found = OfflineLog::open(&dir, options(member).owner).expect("a log");
        let votes = found.impossible_votes(0);
        drop(found);
        assert_eq!((votes.len(), votes[0].term), (1, u64::MAX));
        assert!(votes[0].lowered.is_some_and(|term| term > 1 << 30), "{votes:?}");
        let setup = Setup::of(member).options;
        on_a_thread(move || async move { lower_votes(&dir, setup, &votes).await.expect("written") });
    }
    (0..3).for_each(|at| cluster.restart(at));
    cluster.propose("b");
    (0..3).for_each(|at| cluster.applied(at, &["a", "b"]));
}

/// Why a replica does not start.
async fn start(log: Log, member: Member, dir: &Path) -> String {
    let peers = Peers::new(member.process, Rc::new(Dialer(member.process, Directory::default())));
    let node = Node::new(log, peers, TIMING);
    let owner = Rc::new(Owner::open(&dir.join("owner"), Commands::default(), Watch::default()));
    let started = node.start_group(GROUP, member.replica, Recorder(owner)).await;
    let why = started.err().expect("it does not").to_string();
    node.shutdown().await;
    why
}

/// Only one was reached by the forger: the two others take it back as it is repaired.
#[test]
fn one_that_is_repaired_is_taken_back_by_those_who_are_well() {
    let mut cluster = Cluster::of(3);
    cluster.propose("a");
    (0..3).for_each(|at| cluster.applied(at, &["a"]));
    let at = (cluster.leader() + 1) % 3;
    cluster.kill(at);
    let (dir, member) = (cluster.dirs[at].path().to_owned(), cluster.members[at]);
    let group =
        OfflineLog::open(&dir, options(member).owner).expect("a log").groups().next().expect("a group").0;
    let poisoned = ImpossibleVote { group, replica: member.replica, term: 0, lowered: Some(u64::MAX) };
    let setup = Setup::of(member).options;
    on_a_thread(move || async move {
        lower_votes(&dir, setup.clone(), &[poisoned]).await.expect("written");
        let owner = setup.owner;
        let votes = OfflineLog::open(&dir, owner).expect("a log").impossible_votes(0);
        lower_votes(&dir, setup, &votes).await.expect("written");
    });
    cluster.restart(at);
    cluster.propose("b");
    (0..3).for_each(|at| cluster.applied(at, &["a", "b"]));
}

fn on_a_thread<T: Send + 'static, F: Future<Output = T> + 'static>(
    job: impl FnOnce() -> F + Send + 'static,
) -> T {
    let (tell, told) = std::sync::mpsc::channel();
    let thread = spawn_thread("job", move || async move { tell.send(job().await).expect("the test waits") });
    thread.expect("a thread").join().expect("no panic");
    told.recv().expect("done")
}
