//! Disks that fail, fall short or finish in another order than they were asked.

use std::cell::{Cell, OnceCell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use openraft::AsyncRuntime;
use openraft::async_runtime::Oneshot;
use openraft::storage::RaftLogStorage;

use tokio::net::{TcpListener, TcpStream};

use super::{Model, OWNER, Op, apply, entry, groups, held, open, options, run};
use crate::log::device::{self, Completion, Device, Write};
use crate::log::{Log, LogError, LogOptions, LogOwner};
use crate::runtime::LocalRt;
use crate::types::{IoFlushed, Vote};
use crate::{
    Applying, ChangeError, Command, Dial, DialFuture, Group, GroupId, Member, Node, Peers, Position,
    ProcessId, ReplicaId, Restored, StateMachine, Timing, spawn_thread,
};

/// What happens to completions from now on.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// As after a failed sync.
    Error,
    /// One block less than asked.
    Short,
    /// The first is kept back; later ones pass it.
    Overtaken,
    /// All are kept back: the disk takes writes, and no more is heard of them.
    Stuck,
}

struct Faulty {
    inner: Box<dyn Device>,
    fault: Rc<Cell<Fault>>,
    kept: Rc<RefCell<Vec<Completion>>>,
    passed: Rc<Cell<usize>>,
}

impl Device for Faulty {
    unsafe fn submit(&mut self, write: Write) -> io::Result<()> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.inner.submit(write) }
    }

    fn reap(&mut self, completed: &mut Vec<Completion>) {
        let mut now = Vec::new();
        self.inner.reap(&mut now);
        for mut completion in now {
            match self.fault.get() {
                Fault::None => completed.push(completion),
                Fault::Error => {
                    completion.outcome = Err(io::Error::from_raw_os_error(libc::EIO));
                    completed.push(completion);
                }
                Fault::Short => {
                    completion.outcome = completion.outcome.map(|length| length - 4096);
                    completed.push(completion);
                }
                Fault::Stuck => self.kept.borrow_mut().push(completion),
                Fault::Overtaken if self.kept.borrow().is_empty() => self.kept.borrow_mut().push(completion),
                Fault::Overtaken => {
                    self.passed.set(self.passed.get() + 1);
                    completed.push(completion);
                }
            }
        }
        if !matches!(self.fault.get(), Fault::Overtaken | Fault::Stuck) {
            completed.append(&mut self.kept.borrow_mut());
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        // A test that failed half way: what is kept back is not waited for.
        let keeps = matches!(self.fault.replace(Fault::None), Fault::Overtaken | Fault::Stuck);
        if keeps && !self.kept.borrow().is_empty() {
            return Ok(());
        }
        self.inner.wait()
    }
}

/// What a test holds of its disk.
struct Disk {
    fault: Rc<Cell<Fault>>,
    kept: Rc<RefCell<Vec<Completion>>>,
    passed: Rc<Cell<usize>>,
    /// Tells the log that there is something to reap.
    event: Rc<OnceCell<OwnedFd>>,
}

impl Disk {
    /// It works again, and what was kept back is heard of.
    fn release(&self) {
        self.fault.set(Fault::None);
        let event = self.event.get().expect("set when the log was opened");
        rustix::io::write(event, &1_u64.to_ne_bytes()).expect("counted");
    }
}

/// What is readable when `event` is, and when the eventfd beside it is written.
fn either(event: &OwnedFd) -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::event::{EventfdFlags, epoll, eventfd};
    let written = eventfd(0, EventfdFlags::CLOEXEC)?;
    let both = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for one in [event, &written] {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&both, one, epoll::EventData::new_u64(0), flags)?;
    }
    Ok((both, written))
}

async fn open_faulty(dir: &std::path::Path) -> (Log, Disk) {
    open_faulty_with(dir, options()).await
}

async fn open_faulty_with(dir: &std::path::Path, options: LogOptions) -> (Log, Disk) {
    let disk = Disk {
        fault: Rc::new(Cell::new(Fault::None)),
        kept: Rc::default(),
        passed: Rc::default(),
        event: Rc::default(),
    };
    let (fault, kept, passed) = (disk.fault.clone(), disk.kept.clone(), disk.passed.clone());
    let waker = disk.event.clone();
    let log = Log::open_on(dir, options, move |io_uring| {
        let (inner, event) = device::open(io_uring, dir)?;
        let (event, released) = either(&event)?;
        waker.set(released).expect("opened once");
        Ok((Box::new(Faulty { inner, fault, kept, passed }), event))
    });
    (log.await.expect("a log"), disk)
}

#[test]
fn a_log_that_failed_is_dead_and_what_it_told_durable_is_there() {
    for fault in [Fault::Error, Fault::Short] {
        let dir = tempfile::tempdir().unwrap();
        let mut model = Model::default();
        run(async {
            let (log, disk) = open_faulty(dir.path()).await;
            let mut group = groups(&log).await.remove(0);
            for _ in 0..10 {
                apply(&mut group, &mut model, &Op::Append(500, 0)).await;
            }
            log.synced().await.expect("durable");
            assert!(log.failed().is_none());
            disk.fault.set(fault);
            let (tell, told) = <LocalRt as AsyncRuntime>::Oneshot::channel();
            let at = Position { term: model.term(), index: model.next() };
            group.append([entry(at, vec![1; 500])], IoFlushed::signal(tell)).await.expect("taken");
            assert!(told.await.unwrap().is_err(), "told of the failure");
            assert!(matches!(log.until_failed().await, LogError::Io { doing: "write", .. }));
            // It never comes back, though the disk does.
            disk.fault.set(Fault::None);
            assert!(group.save_vote(&Vote::new(9, 9)).await.is_err());
            assert!(log.synced().await.is_err());
            let next = Position { index: at.index + 1, ..at };
            assert!(group.append([entry(next, vec![1; 500])], IoFlushed::noop()).await.is_err());
        });
        run(async {
            let log = open(dir.path()).await.expect("a log");
            let found = held(&log).await[&0].clone();
            assert_eq!(found.vote, None);
            // What was being written may be there or not.
            assert_eq!(found.entries[..10], model.entries[..]);
        });
    }
}

#[test]
fn nobody_is_told_before_everything_earlier_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (log, disk) = open_faulty(dir.path()).await;
        let mut group = groups(&log).await.remove(0);
        disk.fault.set(Fault::Overtaken);
        let order = Rc::new(RefCell::new(Vec::new()));
        for index in 0..3 {
            if index == 2 {
                // The second write is on the disk, the first is not: nobody may know.
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
                assert!(order.borrow().is_empty(), "{:?} overtook", order.borrow());
                disk.fault.set(Fault::None);
            }
            let (tell, told) = <LocalRt as AsyncRuntime>::Oneshot::channel();
            let at = Position { term: 1, index };
            group.append([entry(at, vec![1; 500])], IoFlushed::signal(tell)).await.expect("taken");
            let noting = order.clone();
            tokio::task::spawn_local(async move {
                told.await.unwrap().unwrap();
                noting.borrow_mut().push(index);
            });
            // Each goes down in a write of its own.
            while (index == 0 && disk.kept.borrow().is_empty()) || (index == 1 && disk.passed.get() == 0) {
                tokio::task::yield_now().await;
            }
        }
        while order.borrow().len() < 3 {
            tokio::task::yield_now().await;
        }
        assert_eq!(*order.borrow(), [0, 1, 2]);
    });
}

/// A vote that is answered and then forgotten is two votes in one term, and two leaders.
#[test]
fn a_vote_is_answered_only_when_it_is_on_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (log, disk) = open_faulty(dir.path()).await;
        let mut groups = groups(&log).await;
        let (mut other, mut group) = (groups.remove(1), groups.remove(0));
        disk.fault.set(Fault::Overtaken);
        let answered = Rc::new(Cell::new(false));
        let noting = answered.clone();
        let saving = tokio::task::spawn_local(async move {
            group.save_vote(&Vote::new(7, 3)).await.expect("saved");
            noting.set(true);
        });
        while disk.kept.borrow().is_empty() {
            tokio::task::yield_now().await;
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!answered.get(), "its write is not complete");
        disk.fault.set(Fault::None);
        // Something else completes, and with it what was kept back.
        other.append([entry(Position { term: 1, index: 0 }, vec![1; 500])], IoFlushed::noop()).await.unwrap();
        log.synced().await.expect("durable");
        saving.await.unwrap();
        assert!(answered.get());
    });
}

struct At(Vec<SocketAddr>);

impl Dial for At {
    fn dial(&self, to: ProcessId) -> DialFuture {
        Box::pin(TcpStream::connect(self.0[to.0 as usize - 1]))
    }
}

/// Notes the commands that were applied.
struct Notes(Rc<RefCell<Vec<Bytes>>>);

impl StateMachine for Notes {
    fn restored(&self) -> Restored {
        Restored::default()
    }

    fn apply(&mut self, _at: Position, what: Applying) -> Bytes {
        if let Applying::Command(command) = what {
            let length = command.len();
            self.0.borrow_mut().push(command.into_cursor().take(length).expect("all of it"));
        }
        Bytes::new()
    }
}

/// A replica on a disk of its own.
struct Replica {
    log: Log,
    disk: Disk,
    node: Node,
    group: Group,
    applied: Rc<RefCell<Vec<Bytes>>>,
}

async fn replica(
    member: Member,
    dir: &std::path::Path,
    listener: TcpListener,
    all: Vec<SocketAddr>,
) -> Replica {
    let options =
        LogOptions { file_bytes: 1 << 20, ..LogOptions::new(LogOwner { process: member.process, ..OWNER }) };
    let (log, disk) = open_faulty_with(dir, options).await;
    let peers = Peers::new(member.process, Rc::new(At(all)));
    // Nobody stands because of a silence: whoever leads next was handed it.
    let timing = Timing { heartbeat_ms: 40, election_ms_min: 600_000, election_ms_max: 1_200_000 };
    let node = Node::new(log.clone(), peers.clone(), timing);
    let applied = Rc::<RefCell<Vec<Bytes>>>::default();
    let group = node.start_group(GroupId(1), member.replica, Notes(applied.clone())).await.expect("a group");
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            peers.accept(stream, None);
        }
    });
    Replica { log, disk, node, group, applied }
}

async fn until(mut there: impl FnMut() -> bool) {
    while !there() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// It does not fail, and it does not answer: nobody may wait for it but what needs that very disk. How long it has been
/// waited for is what the owner goes by when it gives its leaders away.
#[test]
fn a_leader_whose_disk_never_answers_hands_over_and_holds_nobody() {
    let test = || async {
        let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().expect("a directory")).collect();
        let mut listeners = Vec::new();
        for _ in 0..3 {
            listeners.push(TcpListener::bind("127.0.0.1:0").await.expect("a port"));
        }
        let all: Vec<_> = listeners.iter().map(|listener| listener.local_addr().expect("bound")).collect();
        let members = [1, 2, 3].map(|n| Member { replica: ReplicaId(n), process: ProcessId(n) });
        let mut replicas = Vec::new();
        for ((member, dir), listener) in members.into_iter().zip(&dirs).zip(listeners) {
            replicas.push(replica(member, dir.path(), listener, all.clone()).await);
        }
        let initialized = replicas.iter().map(|it| it.group.initialize(members.to_vec(), members[0].replica));
        futures::future::join_all(initialized).await.into_iter().for_each(|it| it.expect("a new group"));
        let [stuck, next, third] = &replicas[..] else { unreachable!("three") };
        until(|| stuck.group.leadership().is_some()).await;
        let answers = Rc::new(Cell::new(0));
        let propose = |to: &Replica, command: &'static [u8]| {
            let answers = answers.clone();
            to.group
                .propose(Command::from(Bytes::from_static(command)), move |_| answers.set(answers.get() + 1));
        };
        propose(stuck, b"a");
        until(|| replicas.iter().all(|it| it.applied.borrow().len() == 1)).await;

        stuck.disk.fault.set(Fault::Stuck);
        propose(stuck, b"b");
        until(|| stuck.log.take_latency().waiting >= Duration::from_millis(50)).await;
        assert!(stuck.log.failed().is_none());
        // It learns that it was relieved when its disk has kept that, so nobody waits for its word.
        let (group, to) = (stuck.group.clone(), members[1].replica);
        let handing_over = tokio::task::spawn_local(async move {
            loop {
                match group.transfer_leader(to).await {
                    // Nobody was heard while this machine stood still.
                    Err(ChangeError::Silent(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
                    done => break done,
                }
            }
        });
        until(|| next.group.leadership().is_some() && stuck.group.leadership().is_none()).await;
        propose(next, b"c");
        let wanted: Vec<Bytes> = [&b"a"[..], b"b", b"c"].map(Bytes::from_static).to_vec();
        until(|| [next, third].iter().all(|it| *it.applied.borrow() == wanted)).await;

        stuck.disk.release();
        until(|| *stuck.applied.borrow() == wanted && answers.get() == 3).await;
        handing_over.await.expect("no panic").expect("handed over");
        for replica in &replicas {
            replica.node.shutdown().await;
        }
    };
    let bounded =
        move || async move { tokio::time::timeout(Duration::from_secs(60), test()).await.expect("in time") };
    spawn_thread("raft", bounded).expect("a thread").join().expect("no panic");
}
