//! The thread on which groups live, and how other threads reach them.

use std::future::Future;
use std::io;
use std::task::Poll;
use std::thread::JoinHandle;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::{Applied, ChangeError, Command, Group, GroupStatus, Member, ProcessId, ProposeError, ReplicaId};

/// Commands from other threads that may wait for one group's thread.
const HANDLE_QUEUE: usize = 1024;

/// Starts an OS thread named `name` that runs `f().await` on a runtime of its own. `tokio::task::spawn_local` works
/// inside; all of its tasks are dropped when `f` is done.
pub fn spawn_thread<F, Fut>(name: &str, f: F) -> io::Result<JoinHandle<Fut::Output>>
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future + 'static,
    Fut::Output: Send + 'static,
{
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let runtime = local_runtime().expect("the kernel gives a thread its epoll and eventfd");
        runtime.block_on(f())
    })
}

pub(crate) fn local_runtime() -> io::Result<tokio::runtime::LocalRuntime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())
}

/// Returns after everything that is ready on this thread now has had its turn, and what that made ready, `times` tasks
/// deep. Unlike `yield_now` it does not ask the kernel for news first, which takes longer than most of what is waited for.
pub async fn after_others(times: u32) {
    let mut left = times;
    std::future::poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(());
        }
        left -= 1;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// One group, seen from other threads.
#[derive(Debug, Clone)]
pub struct Handle {
    asking: mpsc::Sender<Ask>,
}

#[derive(Debug)]
enum Ask {
    Propose(Command, oneshot::Sender<Result<Applied, ProposeError>>),
    Status(oneshot::Sender<GroupStatus>),
    LeadsTerm(oneshot::Sender<Option<u64>>),
    Initialize(Vec<Member>, ReplicaId, oneshot::Sender<Result<(), Refused>>),
    AddLearner(Member, oneshot::Sender<Result<(), Refused>>),
    ChangeMembers(Vec<ReplicaId>, oneshot::Sender<Result<(), Refused>>),
    TransferLeader(ReplicaId, oneshot::Sender<Result<(), Refused>>),
}

/// [`ChangeError`] without the cause, which cannot leave its thread.
type Refused = HandleError;

/// Why a change asked for from another thread was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandleError {
    #[error("not the leader")]
    NotLeader { leader: Option<Member> },
    #[error("another change is in progress")]
    InProgress,
    #[error("{0} is not a member of the group")]
    NotAMember(ReplicaId),
    #[error("{replica} is {entries} entries behind")]
    Behind { replica: ReplicaId, entries: u64 },
    #[error("{0} did not answer lately")]
    Silent(ReplicaId),
    #[error("{replica} is hosted by {at}")]
    Elsewhere { replica: ReplicaId, at: ProcessId },
    #[error("the change is refused: {0}")]
    Refused(String),
    #[error("the replica stopped")]
    Stopped,
}

impl From<ChangeError> for HandleError {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::NotLeader { leader } => Self::NotLeader { leader },
            ChangeError::InProgress => Self::InProgress,
            ChangeError::NotAMember(replica) => Self::NotAMember(replica),
            ChangeError::Behind { replica, entries } => Self::Behind { replica, entries },
            ChangeError::Silent(replica) => Self::Silent(replica),
            ChangeError::Elsewhere { replica, at } => Self::Elsewhere { replica, at },
            ChangeError::Refused(why) => Self::Refused(why.to_string()),
            ChangeError::Stopped => Self::Stopped,
        }
    }
}

impl Handle {
    pub(crate) fn to(group: &Group) -> Self {
        let (asking, mut asked) = mpsc::channel(HANDLE_QUEUE);
        let group = group.clone();
        tokio::task::spawn_local(async move {
            // Ends when the last handle is gone.
            while let Some(ask) = asked.recv().await {
                answer(&group, ask);
            }
        });
        Self { asking }
    }

    /// [`Group::propose`]. Cancel-safe in that the command may be applied though nobody waits for it any more.
    pub async fn propose(&self, command: impl Into<Command>) -> Result<Applied, ProposeError> {
        let command = command.into();
        self.ask(|answer| Ask::Propose(command, answer)).await.unwrap_or(Err(ProposeError::Stopped))
    }

    /// [`Group::propose`] of one piece of bytes.
    pub async fn propose_bytes(&self, command: Bytes) -> Result<Applied, ProposeError> {
        self.propose(command).await
    }

    /// [`Group::status`]; `None` when the thread is gone.
    pub async fn status(&self) -> Option<GroupStatus> {
        self.ask(Ask::Status).await
    }

    /// The term of [`Group::leadership`].
    pub async fn leads_term(&self) -> Option<u64> {
        self.ask(Ask::LeadsTerm).await.flatten()
    }

    /// [`Group::initialize`].
    pub async fn initialize(&self, members: Vec<Member>, first: ReplicaId) -> Result<(), HandleError> {
        self.ask(|answer| Ask::Initialize(members, first, answer)).await.unwrap_or(Err(HandleError::Stopped))
    }

    /// [`Group::add_learner`].
    pub async fn add_learner(&self, member: Member) -> Result<(), HandleError> {
        self.ask(|answer| Ask::AddLearner(member, answer)).await.unwrap_or(Err(HandleError::Stopped))
    }

    /// [`Group::change_members`].
    pub async fn change_members(&self, voters: Vec<ReplicaId>) -> Result<(), HandleError> {
        self.ask(|answer| Ask::ChangeMembers(voters, answer)).await.unwrap_or(Err(HandleError::Stopped))
    }

    /// [`Group::transfer_leader`].
    pub async fn transfer_leader(&self, to: ReplicaId) -> Result<(), HandleError> {
        self.ask(|answer| Ask::TransferLeader(to, answer)).await.unwrap_or(Err(HandleError::Stopped))
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.asking.send(ask(answer)).await.ok()?;
        answered.await.ok()
    }
}

/// Whoever asked may be gone by the time there is an answer; nothing is lost with it.
fn answer(group: &Group, ask: Ask) {
    match ask {
        Ask::Propose(command, to) => group.propose(command, move |outcome| drop(to.send(outcome))),
        Ask::Status(to) => drop(to.send(group.status())),
        Ask::LeadsTerm(to) => drop(to.send(group.leadership().map(|leadership| leadership.term))),
        Ask::Initialize(members, first, to) => {
            let group = group.clone();
            later(to, async move { group.initialize(members, first).await });
        }
        Ask::AddLearner(member, to) => {
            let group = group.clone();
            later(to, async move { group.add_learner(member).await });
        }
        Ask::ChangeMembers(voters, to) => {
            let group = group.clone();
            later(to, async move { group.change_members(voters).await });
        }
        Ask::TransferLeader(replica, to) => {
            let group = group.clone();
            later(to, async move { group.transfer_leader(replica).await });
        }
    }
}

fn later(
    to: oneshot::Sender<Result<(), Refused>>,
    change: impl Future<Output = Result<(), ChangeError>> + 'static,
) {
    tokio::task::spawn_local(async move { drop(to.send(change.await.map_err(Refused::from))) });
}
