//! openraft's network of one group: appends in a pipelined stream, votes and transfers as calls.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{ReplicationClosed, Unreachable};
use openraft::network::{RPCOption, RaftNetworkV2};
use openraft::raft::{AppendEntriesResponse, StreamAppendError};
use openraft::{OptionalSend, RaftNetworkFactory};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::Peers;
use super::frame::{Body, Frame, Kind};
use super::link::{Connection, Link};
use super::message::{get_vote_response, put_append, put_transfer, put_vote_request};
use super::snapshot::{Rate, send};
use crate::bounds::{Beyond, Bounded};
use crate::machine::SnapshotData;
use crate::state::State;
use crate::types::{
    AppendRequest, AppendResult, Host, RpcError, Snapshot, SnapshotResponse, StreamingError, TransferRequest,
    TransferResponse, Types, Vote, VoteRequest, VoteResponse,
};
use crate::{GroupId, ProcessId};

/// An append without entries only tells a newer commit index. It is held back this long for the next one, which
/// tells the same or a newer one: 15–35 % less CPU at depth 32 (`reference/rust-stack.md` §2.5).
const COMMIT_HELD: Duration = Duration::from_millis(5);
/// A follower that leaves appends unanswered for this long is asked again in a new session.
const SILENCE_MAX: Duration = Duration::from_secs(2);
/// Calls are given up after this at the latest, whatever openraft allows: an election does not wait longer.
const CALL_MAX: Duration = Duration::from_secs(1);
/// Appends of one session on their way: a bound on what a slow follower is sent before it answers.
pub(super) const UNANSWERED_MAX: u64 = 64;

pub(crate) struct Network {
    peers: Peers,
    state: Rc<State>,
    rate: Rc<Rate>,
}

impl Network {
    pub fn new(state: Rc<State>, peers: Peers, rate: Rc<Rate>) -> Self {
        Self { peers, state, rate }
    }

    fn target(&self, to: u64, host: &Host, single: bool) -> Target {
        let process = ProcessId(host.0);
        let (link, bulk) = (self.peers.link(process), self.peers.bulk_link(process));
        let (state, rate) = (self.state.clone(), self.rate.clone());
        Target { to, group: self.state.id, link, bulk, rate, state, single }
    }
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Target;

    async fn new_client(&mut self, target: u64, host: &Host) -> Target {
        self.target(target, host, false)
    }

    async fn new_heartbeat_client(&mut self, target: u64, host: &Host) -> Target {
        self.target(target, host, true)
    }
}

/// One member of the group, as seen from this one.
pub(crate) struct Target {
    to: u64,
    group: GroupId,
    link: Rc<Link>,
    /// For raft snapshots.
    bulk: Rc<Link>,
    rate: Rc<Rate>,
    state: Rc<State>,
    /// Sends one append at a time: heartbeats.
    single: bool,
}

fn unreachable(error: &io::Error) -> RpcError {
    Unreachable::new(error).into()
}

fn lost() -> RpcError {
    unreachable(&io::ErrorKind::ConnectionAborted.into())
}

/// What the pump and the answers of a session share.
struct Session {
    connection: Rc<Connection>,
    group: GroupId,
    number: u64,
    sent: Cell<u64>,
    answered: Cell<u64>,
    input_ended: Cell<bool>,
    /// What the other side lacks is to be purged.
    given_up: Cell<bool>,
    /// An append was sent, an answer came, or the input ended.
    moved: Notify,
    pump: Cell<Option<JoinHandle<()>>>,
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(pump) = self.pump.take() {
            pump.abort();
        }
        self.connection.close_session(self.number);
        self.connection.outbox.frame(Kind::Close, self.group, self.number, |_| {});
    }
}

/// Sends what openraft wants appended. Does not own the session: the answers do, and end it.
struct Pump {
    connection: Rc<Connection>,
    session: std::rc::Weak<Session>,
    state: Rc<State>,
    to: u64,
    group: GroupId,
    number: u64,
}

impl Pump {
    fn send(&mut self, request: &AppendRequest) -> bool {
        let Some(session) = self.session.upgrade() else { return false };
        // Every time: "nobody may purge anything", because a new member has nothing yet, must not come late.
        let floor = self.state.lowest_matched();
        let body = |out: &mut Body<'_>| put_append(out, self.to, request, floor);
        self.connection.outbox.frame_with(Kind::Append, self.group, self.number, body);
        session.sent.set(session.sent.get() + 1);
        session.moved.notify_one();
        true
    }

    /// Waits until another append may be sent. False: the session is over.
    async fn room(&self) -> bool {
        self.connection.outbox.room().await;
        loop {
            let Some(session) = self.session.upgrade() else { return false };
            // A connection that is lost counts as an answer, too.
            if session.sent.get().saturating_sub(session.answered.get()) < UNANSWERED_MAX {
                return true;
            }
            drop(session);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn run<S: Stream<Item = AppendRequest> + Unpin>(mut self, mut input: S) {
        let mut held: Option<AppendRequest> = None;
        let mut first = true;
        loop {
            let next = match &held {
                None => input.next().await,
                Some(_) => match timeout(COMMIT_HELD, input.next()).await {
                    Ok(next) => next,
                    Err(_) => {
                        let request = held.take();
                        if request.is_some_and(|request| !self.send(&request)) {
                            return;
                        }
                        continue;
                    }
                },
            };
            let Some(request) = next else { break };
            // A held one is told by this one too.
            held = None;
            if !first && request.entries.is_empty() {
                held = Some(request);
                continue;
            }
            first = false;
            let prev = request.prev_log_id.as_ref().map(|id| id.index());
            if !request.entries.is_empty() && self.state.is_given_up(prev) {
                if let Some(session) = self.session.upgrade() {
                    session.given_up.set(true);
                    session.moved.notify_one();
                }
                return;
            }
            if !(self.room().await && self.send(&request)) {
                return;
            }
        }
        if let Some(session) = self.session.upgrade() {
            session.input_ended.set(true);
            session.moved.notify_one();
        }
    }
}

/// The next answer of a session. The stream ends when the input has ended and everything sent is answered: a stream
/// that ended earlier or later would hang replication (`reference/rust-stack.md` §2.6). Answers may be fewer than
/// appends: each acknowledges all before it.
async fn next_answer(
    session: &Session,
    answers: &mut mpsc::UnboundedReceiver<AppendResult>,
) -> Option<Result<AppendResult, RpcError>> {
    loop {
        if session.input_ended.get() && session.answered.get() >= session.sent.get() {
            return None;
        }
        if session.given_up.get() {
            return Some(Err(unreachable(&io::Error::other("what it lacks is to be purged"))));
        }
        let waits = session.sent.get() > session.answered.get();
        let silence = if waits { SILENCE_MAX } else { Duration::from_secs(3600) };
        tokio::select! {
            biased;
            answer = answers.recv() => {
                if session.answered.get() == session.sent.get() && answer.is_some() {
                    return Some(Err(unreachable(&io::Error::other("an answer to nothing"))));
                }
                session.answered.set(session.answered.get() + 1);
                return Some(answer.ok_or_else(lost));
            }
            () = session.moved.notified() => {}
            () = tokio::time::sleep(silence) => {
                if waits {
                    return Some(Err(unreachable(&io::ErrorKind::TimedOut.into())));
                }
            }
        }
    }
}

/// An answer that names a term nobody can have reached, or entries that were never sent, is none: openraft would follow the
/// one, and count the other.
fn appended(state: &State, from: u64, answer: AppendResult) -> Result<AppendResult, RpcError> {
    let last = state.log().and_then(|log| log.bounds().1).map(|at| at.index);
    let judged = answer.bounded().and_then(|()| match &answer {
        Err(StreamAppendError::HigherVote(vote)) => state.believes(vote.leader_id.term),
        Ok(Some(matched)) if Some(matched.index()) > last => Err(Beyond::Index(matched.index())),
        Ok(_) | Err(StreamAppendError::Conflict(_)) => Ok(()),
    });
    judged.map(|()| answer).map_err(|what| refused(state, from, what))
}

fn refused(state: &State, from: u64, what: Beyond) -> RpcError {
    tracing::warn!(group = %state.id, from, %what, "refused a peer's answer");
    senseless()
}

impl Target {
    async fn open<S>(
        &mut self,
        mut input: S,
    ) -> Result<BoxStream<'static, Result<AppendResult, RpcError>>, RpcError>
    where
        S: Stream<Item = AppendRequest> + OptionalSend + Unpin + 'static,
    {
        let connection = match self.link.up().await {
            Ok(connection) => connection,
            Err(error) => {
                // openraft waits out its back-off inside this stream: not to ask it for anything would be to be
                // called again at once, for ever, while a peer is away.
                input.next().await;
                return Err(unreachable(&error));
            }
        };
        let (number, answers) = connection.open();
        let session = Rc::new(Session {
            connection: connection.clone(),
            group: self.group,
            number,
            sent: Cell::new(0),
            answered: Cell::new(0),
            input_ended: Cell::new(false),
            given_up: Cell::new(false),
            moved: Notify::new(),
            pump: Cell::new(None),
        });
        let mut pump = Pump {
            connection,
            session: Rc::downgrade(&session),
            state: self.state.clone(),
            to: self.to,
            group: self.group,
            number,
        };
        if self.single {
            if let Some(request) = input.next().await {
                pump.send(&request);
            }
            session.input_ended.set(true);
        } else {
            session.pump.set(Some(tokio::task::spawn_local(pump.run(input))));
        }
        let (state, from) = (self.state.clone(), self.to);
        let stream = futures::stream::unfold(Some((session, answers)), move |open| {
            let state = state.clone();
            async move {
                let (session, mut answers) = open?;
                let answer = next_answer(&session, &mut answers).await?;
                let answer = answer.and_then(|answer| appended(&state, from, answer));
                let over = !matches!(answer, Ok(Ok(_)));
                Some((answer, (!over).then_some((session, answers))))
            }
        });
        Ok(Box::pin(stream))
    }

    /// An answer with a term that cannot be is none: openraft would follow it.
    fn voted(&self, answer: Frame) -> Result<VoteResponse, RpcError> {
        let response = get_vote_response(answer.body).ok_or_else(senseless)?;
        let term = response.vote.leader_id.term;
        let judged = response.bounded().and_then(|()| self.state.believes(term));
        judged.map(|()| response).map_err(|what| refused(&self.state, self.to, what))
    }

    async fn call(
        &self,
        kind: Kind,
        option: &RPCOption,
        body: impl FnOnce(&mut bytes::BytesMut),
    ) -> Result<Frame, RpcError> {
        let asking = async {
            let connection = self.link.up().await.map_err(|error| unreachable(&error))?;
            connection.call(kind, self.group, body).await.ok_or_else(lost)
        };
        match timeout(option.hard_ttl().min(CALL_MAX), asking).await {
            Ok(answer) => answer,
            Err(_) => Err(unreachable(&io::ErrorKind::TimedOut.into())),
        }
    }
}

fn senseless() -> RpcError {
    unreachable(&io::ErrorKind::InvalidData.into())
}

impl RaftNetworkV2<Types> for Target {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        request: AppendRequest,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RpcError> {
        // openraft appends through `stream_append` alone; this is the same with one request.
        let mut answers = self.open(futures::stream::iter([request])).await?;
        match answers.next().await {
            Some(answer) => Ok(answer?.into()),
            None => Err(lost()),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<AppendResult, RpcError>>, RpcError>>
    where
        S: Stream<Item = AppendRequest> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            let stream: BoxStream<'s, _> = self.open(input).await?;
            Ok(stream)
        })
    }

    async fn vote(&mut self, request: VoteRequest, option: RPCOption) -> Result<VoteResponse, RpcError> {
        let answer = self.call(Kind::Vote, &option, |out| put_vote_request(out, self.to, &request)).await?;
        self.voted(answer)
    }

    async fn pre_vote(&mut self, request: VoteRequest, option: RPCOption) -> Result<VoteResponse, RpcError> {
        let answer =
            self.call(Kind::PreVote, &option, |out| put_vote_request(out, self.to, &request)).await?;
        self.voted(answer)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse, StreamingError> {
        let SnapshotData::Source(source) = snapshot.snapshot else {
            // openraft waits out its back-off and asks again.
            tracing::warn!(group = %self.group, to = self.to, "a replica needs a raft snapshot, and there is none");
            return Err(send::unreachable("there is no raft snapshot here"));
        };
        let (link, rate, state) = (self.bulk.clone(), self.rate.clone(), self.state.clone());
        send::send(link, rate, state, self.to, vote, source, cancel).await
    }

    async fn transfer_leader(
        &mut self,
        request: TransferRequest,
        option: RPCOption,
    ) -> Result<TransferResponse, RpcError> {
        // The target stands for election or not; either shows in the votes that follow.
        self.call(Kind::Transfer, &option, |out| put_transfer(out, self.to, &request)).await?;
        Ok(Ok(()))
    }
}
