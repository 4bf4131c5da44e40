//! The services of `protocol/proto/evolute.proto`: translate, check the shape, propose or read. They decide nothing
//! that the state or placement could.

mod chunkservers;
mod cluster;
mod volumes;

use std::sync::Arc;

use evolute_protocol::rpc::ErrorWord;
use tonic::Status;

use crate::mds::Mds;
use crate::raft::NoOutcome;
use crate::state::{Command, Done, Refused, Why};

pub struct Volumes(pub Arc<Mds>);
pub struct Chunkservers(pub Arc<Mds>);
pub struct Cluster(pub Arc<Mds>);

impl From<NoOutcome> for Status {
    fn from(why: NoOutcome) -> Self {
        match why {
            NoOutcome::NotLeader => ErrorWord::NotLeader.status(why.to_string()),
            NoOutcome::Busy => ErrorWord::Busy.status(why.to_string()),
        }
    }
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let word = match refused.why {
            Why::NotFound => ErrorWord::NotFound,
            Why::Exists => ErrorWord::Exists,
            Why::Invalid => ErrorWord::Invalid,
            Why::AttachedElsewhere => ErrorWord::AttachedElsewhere,
            Why::FencedOut => ErrorWord::FencedOut,
            Why::Stale => ErrorWord::Busy,
        };
        word.status(refused.message)
    }
}

fn invalid(message: impl Into<String>) -> Status {
    ErrorWord::Invalid.status(message)
}

impl Mds {
    /// Has the command carried out, or says why not as a caller understands it.
    async fn carry_out(&self, command: Command) -> Result<Done, Status> {
        Ok(self.replicated.propose(command).await??)
    }
}

/// What apply answers to a command is fixed by the command.
fn unexpected(done: &Done) -> Status {
    Status::internal(format!("the state answered {done:?} to another question"))
}
