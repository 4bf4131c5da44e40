//! Processes that do not keep to the rules, speaking to one of ours over real sockets.

use std::cell::RefCell;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::net::{TcpListener, TcpStream};

use super::frame::{self, Frame, Kind, Outbox, Reader};
use super::message::{get_append, get_vote_request, put_append_result, put_vote_response};
use super::network::UNANSWERED_MAX;
use super::snapshot::{Answer, Begin, WINDOW, get_answer, put_answer, put_begin, put_end, put_frame};
use super::{Dial, DialFuture, Peers};
use crate::machine::{SnapshotHead, SnapshotSink, encode_membership};
use crate::types::{LeaderId, LogId, Payload, Vote, VoteResponse};
use crate::{
    Applying, Command, Group, GroupId, Limits, LocalFuture, Log, LogOptions, LogOwner, Member, Node,
    Position, ProcessId, ReplicaId, Restored, SNAPSHOT_FRAME_BYTES_MAX, StateMachine, Timing, group,
    spawn_thread,
};

const GROUP: GroupId = GroupId(1);
const ME: Member = Member { replica: ReplicaId(1), process: ProcessId(1) };
const OTHER: Member = Member { replica: ReplicaId(2), process: ProcessId(2) };

struct To(SocketAddr);

impl Dial for To {
    fn dial(&self, _to: ProcessId) -> DialFuture {
        Box::pin(TcpStream::connect(self.0))
    }
}

/// Takes snapshots whose frames are never staged.
struct Slow;

impl StateMachine for Slow {
    fn restored(&self) -> Restored {
        Restored::default()
    }

    fn apply(&mut self, _at: Position, _what: Applying) -> Bytes {
        Bytes::new()
    }

    fn receive(&mut self, _head: SnapshotHead) -> io::Result<Box<dyn SnapshotSink>> {
        Ok(Box::new(Self))
    }
}

impl SnapshotSink for Slow {
    fn put(&mut self, _frame: Bytes) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(pending())
    }

    fn into_any(self: Box<Self>) -> Box<dyn std::any::Any> {
        self
    }
}

async fn replica(dir: &std::path::Path, other: SocketAddr) -> (Node, Group) {
    replica_with(dir, other, Limits::default()).await
}

async fn replica_with(dir: &std::path::Path, other: SocketAddr, limits: Limits) -> (Node, Group) {
    let owner = LogOwner { cluster: [7; 16], process: ME.process };
    let log =
        Log::open(dir, LogOptions { file_bytes: 1 << 20, ..LogOptions::new(owner) }).await.expect("a log");
    let timing = Timing { heartbeat_ms: 20, election_ms_min: 100, election_ms_max: 200 };
    let node = Node::with_limits(log, Peers::new(ME.process, Rc::new(To(other))), timing, limits);
    let group = node.start_group(GROUP, ME.replica, Slow).await.expect("a group");
    (node, group)
}

fn on_a_thread<F: Future<Output = ()> + 'static>(test: impl FnOnce() -> F + Send + 'static) {
    let bounded = || async { tokio::time::timeout(Duration::from_secs(60), test()).await.expect("in time") };
    spawn_thread("raft", bounded).expect("a thread").join().expect("no panic");
}

/// One end of a connection, in the hands of the test.
struct End {
    outbox: Rc<Outbox>,
    reader: Reader,
}

impl End {
    fn new(stream: TcpStream) -> Self {
        let (read, write) = stream.into_split();
        let outbox = Rc::new(Outbox::default());
        tokio::task::spawn_local(frame::send(outbox.clone(), write));
        Self { outbox, reader: Reader::new(read) }
    }

    fn say(&self, kind: Kind, session: u64, body: impl FnOnce(&mut BytesMut)) {
        self.outbox.frame(kind, GROUP, session, body);
    }

    async fn hear(&mut self) -> Frame {
        self.reader.next().await.expect("a frame")
    }

    async fn until_ended(mut self) {
        while self.reader.next().await.is_ok() {}
    }

    /// Votes for whoever asks; gives back an append.
    async fn append(&mut self) -> (u64, Option<LogId>, Vec<(LogId, bool)>) {
        loop {
            let frame = self.hear().await;
            match frame.kind {
                Kind::Vote | Kind::PreVote => {
                    let (_, request) = get_vote_request(frame.body).expect("a vote");
                    let granted = VoteResponse { vote: request.vote, vote_granted: true, last_log_id: None };
                    self.say(Kind::Voted, frame.session, |out| put_vote_response(out, &granted));
                }
                Kind::Append => {
                    let request = get_append(frame.body).expect("an append").request;
                    let is_command = |payload: &Payload| matches!(payload, Payload::Normal(_));
                    let entries = request.entries.iter().map(|it| (it.log_id, is_command(&it.payload)));
                    return (frame.session, request.prev_log_id, entries.collect());
                }
                _ => {}
            }
        }
    }

    fn ack(&self, session: u64, upto: Option<LogId>) {
        self.say(Kind::Appended, session, |out| put_append_result(out, &Ok(upto)));
    }
}

/// An acknowledgement that outlived its connection might be of entries that were lost since. (openraft once counted
/// such, and committed what no majority had.)
#[test]
fn an_acknowledgement_of_a_session_that_is_over_is_not_counted() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_owned();
    on_a_thread(move || async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let (node, group) = replica(&path, listener.local_addr().expect("bound")).await;
        group.initialize(vec![ME, OTHER], ME.replica).await.expect("a new group");
        let mut follower = End::new(listener.accept().await.expect("a call").0);
        while group.leadership().is_none() {
            let (session, prev, entries) = follower.append().await;
            follower.ack(session, entries.last().map(|it| it.0).or(prev));
        }
        let outcome = Rc::new(RefCell::new(None));
        let told = outcome.clone();
        group.propose(Command::from(vec![1]), move |it| *told.borrow_mut() = Some(it));
        let (old, unknown) = loop {
            let (session, prev, entries) = follower.append().await;
            match entries.iter().find(|it| it.1) {
                Some(command) => break (session, command.0),
                None => follower.ack(session, prev),
            }
        };
        // The connection goes, the answer to what went over it comes on the next.
        follower.outbox.close();
        drop(follower);
        let mut follower = End::new(listener.accept().await.expect("another call").0);
        let (mut open, mut heard) = (None, 0);
        while heard < 10 {
            let (session, prev, entries) = follower.append().await;
            assert_ne!(session, old, "a session's number is used once");
            follower.ack(old, Some(unknown));
            match entries.iter().any(|it| it.1) {
                true => open = Some(session),
                false => follower.ack(session, prev),
            }
            heard += 1;
        }
        assert!(outcome.borrow().is_none(), "applied without a majority: {outcome:?}");
        // Now it is true.
        while outcome.borrow().is_none() {
            let (session, prev, entries) = follower.append().await;
            if let Some(open) = open.take() {
                follower.ack(open, Some(unknown));
            }
            follower.ack(session, entries.last().map(|it| it.0).or(prev));
        }
        assert!(outcome.borrow().as_ref().is_some_and(Result::is_ok), "{outcome:?}");
        node.shutdown().await;
    });
}

/// Proposes one command after the other, and applies each before the next.
async fn propose(group: &Group, commands: usize) {
    for _ in 0..commands {
        let (tell, told) = tokio::sync::oneshot::channel();
        group.propose(Command::from(vec![1; 32 << 10]), move |it| drop(tell.send(it)));
        told.await.expect("an answer").expect("applied");
    }
}

/// openraft purges nothing that it is sending to a member. One that takes it slowly, and is never silent, would hold
/// the log of all for as long as it likes.
#[test]
fn a_member_that_is_slow_to_take_what_is_to_be_purged_is_sent_no_more_of_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_owned();
    on_a_thread(move || async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (node, group) =
            replica_with(&path, address, Limits { log_retain_bytes: 0, ..Limits::default() }).await;
        group.initialize(vec![ME], ME.replica).await.expect("a new group");
        while group.leadership().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let adding = group.clone();
        tokio::task::spawn_local(async move { adding.add_learner(OTHER).await });
        let mut learner = End::new(listener.accept().await.expect("a call").0);
        // It keeps up, until what it is sent goes over one session.
        let (mut session, mut matched) = (0, 0);
        while matched < 10 {
            propose(&group, 1).await;
            let (of, prev, entries) = learner.append().await;
            let upto = entries.last().map(|it| it.0).or(prev);
            if !entries.is_empty() {
                (session, matched) = (of, upto.map_or(0, |id| id.index));
            }
            learner.ack(of, upto);
        }
        // From here on it takes everything and answers nothing, until no more is sent to it.
        let proposing = group.clone();
        let proposed = tokio::task::spawn_local(async move { propose(&proposing, 150).await });
        let (mut unanswered, mut first) = (0, None);
        while unanswered < UNANSWERED_MAX {
            let (of, prev, entries) = learner.append().await;
            if of == session {
                unanswered += 1;
                first = first.or(entries.first().map(|it| it.0));
            } else {
                learner.ack(of, prev);
            }
        }
        proposed.await.expect("all applied");
        let last = group.applied().expect("something");
        group.checkpointed(last, None);
        while group.status().purged.is_none() && group.0.purging.get().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // It has room for one more, and for another whenever it has answered that.
        learner.ack(session, first);
        loop {
            let frame = learner.hear().await;
            match frame.kind {
                Kind::Close if frame.session == session => break,
                Kind::Append if frame.session == session => {
                    let request = get_append(frame.body).expect("an append").request;
                    let upto = request.entries.last().map(|entry| entry.log_id);
                    assert!(upto.is_none_or(|id| id.index < last.index), "everything was sent");
                    learner.ack(session, upto.or(request.prev_log_id));
                }
                _ => {}
            }
        }
        while group.status().purged.is_none_or(|at| at.index < matched + UNANSWERED_MAX) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        node.shutdown().await;
    });
}

fn begin(to: u64, term: u64) -> Begin {
    let vote = Vote { leader_id: LeaderId { term, voted_for: OTHER.replica.0 }, committed: true };
    let membership = encode_membership(&group::no_membership());
    Begin { to, transfer: 5, vote, head: SnapshotHead { at: Position { term: 1, index: 9 }, membership } }
}

type Said = Box<dyn Fn(&End)>;

fn said(kind: Kind, body: impl Fn(&mut BytesMut) + 'static) -> Said {
    Box::new(move |end| end.say(kind, 1, |out| body(out)))
}

/// Every message of a raft snapshot that no sender of ours would send, after a good beginning or without one.
#[test]
fn senseless_messages_of_a_snapshot_end_the_connection_they_came_on_and_nothing_else() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_owned();
    on_a_thread(move || async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (node, group) = replica(&path, address).await;
        let call = async || {
            let caller = TcpStream::connect(address).await.expect("connected");
            node.peers().accept(listener.accept().await.expect("a call").0, None);
            End::new(caller)
        };
        let good = || said(Kind::Snapshot, |out| put_begin(out, &begin(ME.replica.0, 3)));
        let frame = |number: u64, bytes: usize| {
            said(Kind::SnapshotFrame, move |out| put_frame(out, number, &vec![0; bytes]))
        };
        let senseless: Vec<Vec<Said>> = vec![
            vec![said(Kind::Snapshot, |out| out.put_slice(b"not a beginning"))],
            vec![said(Kind::Snapshot, |_| {})],
            vec![said(Kind::Snapshot, |out| put_begin(out, &begin(ME.replica.0, 0)))],
            vec![said(Kind::SnapshotAnswer, |out| put_answer(out, &Answer::Unknown))],
            vec![good(), frame(1, 10)],
            vec![good(), frame(0, 10), frame(0, 10)],
            vec![good(), frame(0, SNAPSHOT_FRAME_BYTES_MAX + 1)],
            vec![good(), said(Kind::SnapshotFrame, |out| out.put_u8(0))],
            vec![good(), said(Kind::SnapshotEnd, |out| put_end(out, 1, 1))],
            vec![good(), said(Kind::SnapshotEnd, |out| out.put_u8(0))],
            vec![good(), frame(0, 1), said(Kind::SnapshotEnd, |out| put_end(out, 1, 1)), frame(1, 1)],
            // More than there is room for: nothing of it is staged.
            std::iter::once(good()).chain((0..WINDOW + 2).map(|number| frame(number, 1))).collect(),
        ];
        for (number, messages) in senseless.into_iter().enumerate() {
            let end = call().await;
            messages.iter().for_each(|say| say(&end));
            end.until_ended().await;
            assert!(group.applied().is_none() && node.log().failed().is_none(), "case {number}");
            // The transfer of the next case is another one.
            super::snapshot::receive::close(&group, 1);
        }
        // What may happen to anybody is answered.
        let mut end = call().await;
        frame(0, 10)(&end);
        let answer = end.hear().await;
        assert_eq!((answer.kind, get_answer(answer.body)), (Kind::SnapshotAnswer, Some(Answer::Unknown)));
        said(Kind::Snapshot, |out| put_begin(out, &begin(77, 3)))(&end);
        assert_eq!(end.hear().await.kind, Kind::NotHere);
        good()(&end);
        let taken = Some(Answer::Taken { arrived: 0, staged: 0 });
        assert_eq!(get_answer(end.hear().await.body), taken);
        // Again, over a later session: it goes on.
        end.say(Kind::Snapshot, 2, |out| put_begin(out, &begin(ME.replica.0, 3)));
        assert_eq!(get_answer(end.hear().await.body), taken);
        node.shutdown().await;
    });
}

#[test]
fn the_rate_is_shared_and_kept() {
    on_a_thread(|| async {
        let rate = Rc::new(super::Rate::new(1 << 20));
        let start = tokio::time::Instant::now();
        let takers = (0..4).map(|_| {
            let rate = rate.clone();
            async move {
                for _ in 0..4 {
                    rate.take(16 << 10).await;
                }
            }
        });
        futures::future::join_all(takers).await;
        // Sixteen times 16 KiB at 1 MiB in a second; the first costs nobody anything yet.
        assert!(start.elapsed() >= Duration::from_millis(15 * 1000 / 64 - 1), "{:?}", start.elapsed());
    });
}
