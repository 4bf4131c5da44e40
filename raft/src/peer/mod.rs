//! Connections to other processes (stand-in; the real ones follow in the next commit with the same interface).

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;

use openraft::RaftNetworkFactory;
use openraft::errors::{ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkV2};
use openraft::raft::{AppendEntriesResponse, SnapshotResponse};
use tokio::net::TcpStream;

use crate::group::{Group, State};
use crate::types::{AppendRequest, Host, RpcError, Snapshot, Types, Vote, VoteRequest, VoteResponse};
use crate::{GroupId, ProcessId};

/// What [`Dial::dial`] returns.
pub type DialFuture = Pin<Box<dyn Future<Output = io::Result<TcpStream>>>>;

/// How the owner reaches another process: connects, and shakes hands as the two need it.
pub trait Dial {
    /// A connection to `to` on which the other side has called [`Peers::accept`] or is about to. Bounded by us: a dial
    /// that takes too long is dropped.
    fn dial(&self, to: ProcessId) -> DialFuture;
}

/// The connections of one thread to other processes.
#[derive(Clone)]
pub struct Peers(Rc<Inner>);

struct Inner {
    me: ProcessId,
    _dial: Rc<dyn Dial>,
}

impl Peers {
    pub fn new(me: ProcessId, dial: Rc<dyn Dial>) -> Self {
        Self(Rc::new(Inner { me, _dial: dial }))
    }

    /// Who this process is to others.
    pub fn me(&self) -> ProcessId {
        self.0.me
    }

    /// Serves an incoming, handshaken connection of another process, for all groups of this thread.
    pub fn accept(&self, _stream: TcpStream) {}

    pub(crate) fn serve(&self, _group: Group) {}

    pub(crate) fn stop_serving(&self, _group: GroupId) {}

    pub(crate) fn close(&self) {}
}

/// openraft's network of one group.
pub(crate) struct Network {
    _peers: Peers,
    _state: Rc<State>,
}

impl Network {
    pub fn new(state: Rc<State>, peers: Peers) -> Self {
        Self { _peers: peers, _state: state }
    }
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Target;

    async fn new_client(&mut self, _target: u64, _host: &Host) -> Target {
        Target
    }
}

pub(crate) struct Target;

fn unreachable() -> Unreachable<Types> {
    Unreachable::new(&io::Error::from(io::ErrorKind::NotConnected))
}

impl RaftNetworkV2<Types> for Target {
    type SnapshotData = ();

    async fn append_entries(
        &mut self,
        _request: AppendRequest,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RpcError> {
        Err(unreachable().into())
    }

    async fn vote(&mut self, _request: VoteRequest, _option: RPCOption) -> Result<VoteResponse, RpcError> {
        Err(unreachable().into())
    }

    async fn full_snapshot(
        &mut self,
        _vote: Vote,
        _snapshot: Snapshot,
        _cancel: impl Future<Output = ReplicationClosed> + openraft::OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        Err(unreachable().into())
    }
}
