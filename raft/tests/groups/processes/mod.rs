//! Processes of a test: each a raft thread with its own log directory, listening on a real port of this machine.

mod owner;

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_raft::{
    Dial, DialFuture, Group, GroupId, GroupStatus, Handle, HandleError, Limits, Log, LogOptions, LogOwner,
    Member, Node, Peers, ProcessId, ReplicaId, Role, Timing, spawn_thread,
};
pub use owner::{Commands, Hold, Owner, Recorder, Watch};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc as queue, oneshot};

pub const GROUP: GroupId = GroupId(1);
pub const TIMING: Timing = Timing { heartbeat_ms: 40, election_ms_min: 250, election_ms_max: 500 };
/// Nobody stands for election because of a silence before a test has long failed, and no leader's lease runs out: not
/// because this machine stood still, either. Whoever is gone is missed by its connections.
pub const ENDLESS: Timing = Timing { heartbeat_ms: 40, election_ms_min: 600_000, election_ms_max: 1_200_000 };
/// Half of what a member misses of another with [`TIMING`] before that one counts as silent. A thread that stands still for
/// longer may be taken for dead.
const STOOD_STILL: Duration = Duration::from_millis(TIMING.heartbeat_ms * 5 / 2);
/// How often a thread shows that it runs.
const BEAT: Duration = Duration::from_millis(10);

/// Who listens where, and who is cut off. A process that starts again listens elsewhere.
#[derive(Clone, Default)]
pub struct Directory(Arc<Mutex<Known>>);

#[derive(Default)]
pub struct Known {
    addresses: HashMap<ProcessId, SocketAddr>,
    isolated: HashSet<ProcessId>,
}

impl Directory {
    pub fn tell(&self, process: ProcessId, address: SocketAddr) {
        self.0.lock().unwrap().addresses.insert(process, address);
    }

    fn address(&self, process: ProcessId) -> SocketAddr {
        self.0.lock().unwrap().addresses[&process]
    }

    fn forget(&self, process: ProcessId) {
        self.0.lock().unwrap().addresses.remove(&process);
    }

    fn is_isolated(&self, process: ProcessId) -> bool {
        self.0.lock().unwrap().isolated.contains(&process)
    }

    /// No connection from or to this process is made any more.
    fn isolate(&self, process: ProcessId, isolated: bool) {
        let mut known = self.0.lock().unwrap();
        if isolated {
            known.isolated.insert(process);
        } else {
            known.isolated.remove(&process);
        }
    }
}

/// One process's way to the others.
pub struct Dialer(pub ProcessId, pub Directory);

impl Dial for Dialer {
    fn dial(&self, to: ProcessId) -> DialFuture {
        let known = self.1.0.lock().unwrap();
        let reachable = !known.isolated.contains(&self.0) && !known.isolated.contains(&to);
        let address = known.addresses.get(&to).copied().filter(|_| reachable);
        Box::pin(async move { TcpStream::connect(address.ok_or(io::ErrorKind::NotFound)?).await })
    }
}

/// How a process is made.
#[derive(Clone)]
pub struct Setup {
    pub options: LogOptions,
    pub limits: Limits,
    pub timing: Timing,
    pub watch: Watch,
}

impl Setup {
    pub fn of(member: Member) -> Self {
        let options = LogOptions { file_bytes: 1 << 20, ..options(member) };
        Self { options, limits: Limits::default(), timing: TIMING, watch: Watch::default() }
    }
}

/// Something to be done on a process's thread.
type Job = Box<dyn FnOnce(Node, Rc<Owner>) + Send>;

pub struct Process {
    pub member: Member,
    pub commands: Commands,
    pub watch: Watch,
    jobs: queue::UnboundedSender<Job>,
    connections: Arc<Mutex<Vec<std::net::TcpStream>>>,
    deaf: Arc<AtomicBool>,
    /// When its thread ran last, and the longest that it ever stood still.
    beats: Arc<Mutex<(Instant, Duration)>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts a process on the log in `dir`, with one replica of [`GROUP`].
    pub fn start(member: Member, dir: &Path, directory: &Directory, setup: Setup) -> Self {
        let (dir, directory): (PathBuf, _) = (dir.to_owned(), directory.clone());
        let (ready, started) = mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let (jobs, mut todo) = queue::unbounded_channel::<Job>();
        let commands = Commands::default();
        let connections = Arc::new(Mutex::new(Vec::new()));
        let deaf = Arc::new(AtomicBool::new(false));
        let (recorded, accepted, ignoring) = (commands.clone(), connections.clone(), deaf.clone());
        let watch = setup.watch.clone();
        let beats = Arc::new(Mutex::new((Instant::now(), Duration::ZERO)));
        let beating = beats.clone();
        let thread = spawn_thread(&format!("{}", member.process), move || async move {
            let log = Log::open(&dir, setup.options).await.expect("a log");
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            directory.tell(member.process, listener.local_addr().expect("bound"));
            let peers = Peers::new(member.process, Rc::new(Dialer(member.process, directory)));
            let node = Node::with_limits(log, peers.clone(), setup.timing, setup.limits);
            let owner = Rc::new(Owner::open(&dir.join("owner"), recorded, setup.watch));
            node.start_group(GROUP, member.replica, Recorder(owner.clone())).await.expect("a group");
            tokio::task::spawn_local(async move {
                let mut unheard = Vec::new();
                while let Ok((stream, _)) = listener.accept().await {
                    let stream = stream.into_std().expect("a stream");
                    accepted.lock().unwrap().push(stream.try_clone().expect("another of it"));
                    let stream = TcpStream::from_std(stream).expect("a stream");
                    match ignoring.load(Ordering::SeqCst) {
                        true => unheard.push(stream),
                        false => peers.accept(stream, None),
                    }
                }
            });
            beating.lock().unwrap().0 = Instant::now();
            tokio::task::spawn_local(async move {
                loop {
                    tokio::time::sleep(BEAT).await;
                    let mut beats = beating.lock().unwrap();
                    *beats = (Instant::now(), beats.1.max(beats.0.elapsed()));
                }
            });
            ready.send(()).expect("the test waits");
            let doing = node.clone();
            tokio::task::spawn_local(async move {
                while let Some(job) = todo.recv().await {
                    job(doing.clone(), owner.clone());
                }
            });
            // Whatever comes, this is all there is of an end: the tasks are dropped where they are.
            let _ = stopped.await;
        })
        .expect("a thread");
        started.recv().expect("it starts");
        Self {
            member,
            commands,
            watch,
            jobs,
            connections,
            deaf,
            beats,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// Runs something on the process's thread.
    pub fn on_thread<T: Send + 'static>(&self, job: impl FnOnce(Node, Rc<Owner>) -> T + Send + 'static) -> T {
        let (tell, told) = mpsc::channel();
        let job: Job = Box::new(move |node, owner| drop(tell.send(job(node, owner))));
        assert!(self.jobs.send(job).is_ok(), "it runs");
        told.recv().expect("it ran")
    }

    /// Runs something with the group on the process's thread.
    pub fn with_group<T: Send + 'static>(&self, job: impl FnOnce(Group) -> T + Send + 'static) -> T {
        self.on_thread(|node, _| job(node.group(GROUP).expect("it is hosted")))
    }

    /// The group's handle.
    pub fn handle(&self) -> Handle {
        self.with_group(|group| group.handle())
    }

    /// What is applied here becomes durable, and the log may go as far.
    pub fn checkpoint(&self) {
        self.on_thread(|node, owner| {
            let Some(restored) = owner.checkpoint() else { return };
            let group = node.group(GROUP).expect("it is hosted");
            group.checkpointed(restored.applied.expect("something"), restored.membership);
        });
    }

    /// Gives up the replica that is here, and starts another.
    pub fn replace(&mut self, member: Member) {
        let (tell, told) = mpsc::channel();
        self.on_thread(move |node, owner| {
            tokio::task::spawn_local(async move {
                node.remove_group(GROUP).await.expect("forgotten");
                owner.clear();
                node.start_group(GROUP, member.replica, Recorder(owner)).await.expect("a group");
                tell.send(()).expect("the test waits");
            });
        });
        told.recv().expect("it is done");
        self.member = member;
    }

    /// Ends every connection others have made to this process.
    pub fn cut(&self) {
        for stream in self.connections.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// From now on connections are taken, and nothing is read from them; or it is again, from new ones.
    pub fn deafen(&self, deaf: bool) {
        self.deaf.store(deaf, Ordering::SeqCst);
        self.cut();
    }

    /// Its thread stands still, as SIGSTOP would have it, until something is sent.
    pub fn freeze(&self) -> mpsc::Sender<()> {
        let (thaw, thawed) = mpsc::channel();
        let job: Job = Box::new(move |_, _| {
            let _ = thawed.recv();
        });
        assert!(self.jobs.send(job).is_ok(), "it runs");
        thaw
    }

    /// Its thread stood still since it started, or does, for so long that it may be taken for dead.
    fn stood_still(&self) -> bool {
        let beats = self.beats.lock().unwrap();
        beats.1.max(beats.0.elapsed()) > STOOD_STILL
    }

    /// As kill -9 would: nothing is said to anybody, nothing more is written.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("no panic");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

pub fn options(member: Member) -> LogOptions {
    LogOptions::new(LogOwner { cluster: [9; 16], process: member.process })
}

pub fn member(number: u64) -> Member {
    Member { replica: ReplicaId(100 + number), process: ProcessId(number) }
}

/// Three processes, or however many, and their directories.
pub struct Cluster {
    pub directory: Directory,
    pub dirs: Vec<tempfile::TempDir>,
    pub processes: Vec<Option<Process>>,
    pub members: Vec<Member>,
    limits: Limits,
    timing: Timing,
    runtime: tokio::runtime::Runtime,
}

impl Cluster {
    /// A group whose members are all of `n` processes.
    pub fn of(n: usize) -> Self {
        Self::with_limits(n, Limits::default())
    }

    pub fn with_limits(n: usize, limits: Limits) -> Self {
        Self::with_timing(n, limits, TIMING)
    }

    pub fn with_timing(n: usize, limits: Limits, timing: Timing) -> Self {
        let mut cluster = Self {
            directory: Directory::default(),
            dirs: Vec::new(),
            processes: Vec::new(),
            members: Vec::new(),
            limits,
            timing,
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
        };
        for _ in 0..n {
            cluster.add();
        }
        let members = cluster.members.clone();
        let handles: Vec<Handle> = cluster.running().map(Process::handle).collect();
        for initialized in cluster.wait_for(futures::future::join_all(
            handles.iter().map(|handle| handle.initialize(members.clone(), members[0].replica)),
        )) {
            initialized.expect("initialized");
        }
        cluster
    }

    /// One more process, with an empty log, in no group yet.
    pub fn add(&mut self) -> Member {
        let member = member(self.processes.len() as u64 + 1);
        self.members.push(member);
        self.dirs.push(tempfile::tempdir().expect("a directory"));
        self.processes.push(None);
        self.restart(self.members.len() - 1);
        member
    }

    /// Where a process listens.
    pub fn address(&self, at: usize) -> SocketAddr {
        self.directory.address(self.members[at].process)
    }

    pub fn running(&self) -> impl Iterator<Item = &Process> {
        self.processes.iter().flatten()
    }

    pub fn process(&self, at: usize) -> &Process {
        self.processes[at].as_ref().expect("it runs")
    }

    /// As kill -9 would. A kernel refuses whoever calls on a process that died, from then on; here its listening socket is
    /// dropped some time after its connections, which on a busy machine was once later than anybody asks.
    pub fn kill(&mut self, at: usize) {
        self.directory.forget(self.members[at].process);
        self.processes[at].take().expect("it runs").kill();
    }

    pub fn restart(&mut self, at: usize) {
        let member = self.members[at];
        let setup = Setup { limits: self.limits, timing: self.timing, ..Setup::of(member) };
        let process = Process::start(member, self.dirs[at].path(), &self.directory, setup);
        self.processes[at] = Some(process);
    }

    /// The replica of a process leaves, and another takes its place there, in no group yet.
    pub fn replace(&mut self, at: usize, replica: ReplicaId) -> Member {
        self.members[at].replica = replica;
        self.processes[at].as_mut().expect("it runs").replace(self.members[at]);
        self.members[at]
    }

    /// Nothing gets to this process or from it, until it is healed.
    pub fn isolate(&self, at: usize) {
        self.directory.isolate(self.members[at].process, true);
        self.running().for_each(Process::cut);
    }

    pub fn heal(&self, at: usize) {
        self.directory.isolate(self.members[at].process, false);
    }

    pub fn wait_for<F: Future>(&self, future: F) -> F::Output {
        self.runtime
            .block_on(async { tokio::time::timeout(PATIENCE, future).await.expect("it happens in time") })
    }

    /// Has the leader hand over, once it has heard of the other one lately.
    pub fn transfer(&self, leader: usize, to: ReplicaId) {
        let handle = self.process(leader).handle();
        eventually("it is handed over", || match self.wait_for(handle.transfer_leader(to)) {
            Ok(()) => Some(()),
            Err(HandleError::Silent(_)) => None,
            Err(error) => panic!("{error}"),
        });
    }

    /// None of the processes that run now ever stood still, but for the one that was `frozen`: whoever leads was not taken
    /// for dead because this machine had no time for it.
    pub fn all_ran(&self, frozen: Option<usize>) -> bool {
        let mut others = self.processes.iter().enumerate().filter(|(at, _)| Some(*at) != frozen);
        !others.any(|(_, process)| process.as_ref().is_some_and(Process::stood_still))
    }

    pub fn status(&self, at: usize) -> GroupStatus {
        self.process(at).with_group(|group| group.status())
    }

    /// Waits until a running process that is not cut off leads and may serve; which.
    pub fn leader(&self) -> usize {
        let reachable = |at: &usize| !self.directory.is_isolated(self.members[*at].process);
        self.leader_among(&(0..self.processes.len()).filter(reachable).collect::<Vec<_>>())
    }

    /// The same among these.
    pub fn leader_among(&self, these: &[usize]) -> usize {
        eventually("a leader", || {
            these.iter().copied().find(|&at| {
                let process = self.processes[at].as_ref();
                process.is_some_and(|it| it.with_group(|group| group.leadership().is_some()))
            })
        })
    }

    /// Proposes until somebody applies it.
    pub fn propose(&self, command: &'static str) {
        self.propose_to(
            &(0..self.processes.len()).collect::<Vec<_>>(),
            Bytes::from_static(command.as_bytes()),
        );
    }

    /// The same to the leader among these.
    pub fn propose_to(&self, these: &[usize], command: Bytes) {
        eventually("a command applied", || {
            let leader = self.leader_among(these);
            self.wait_for(self.process(leader).handle().propose(command.clone())).ok()
        });
    }

    /// Waits until a process has applied exactly these.
    pub fn applied(&self, at: usize, wanted: &[&str]) {
        let commands = &self.process(at).commands;
        eventually("everything applied", || {
            let commands = commands.lock().unwrap();
            assert!(commands.len() <= wanted.len(), "{commands:?} and not {wanted:?}");
            (commands.len() == wanted.len()).then(|| assert!(commands.values().eq(wanted)))
        });
    }

    /// Waits until all of these processes hold the same, at the same position.
    pub fn equal(&self, these: &[usize]) {
        let state = |at: &usize| {
            let applied = self.process(*at).with_group(|group| group.applied());
            (applied, self.process(*at).commands.lock().unwrap().clone())
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let first = state(&these[0]);
            if these[1..].iter().all(|at| state(at) == first) {
                return;
            }
            let why = || these.iter().map(|&at| self.status(at)).collect::<Vec<_>>();
            assert!(Instant::now() < deadline, "not equal: {:?}", why());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn role(&self, at: usize) -> Role {
        self.status(at).role
    }

    /// Makes these the voting members, as often as it takes.
    pub fn change(&self, voters: &[usize]) {
        let voters: Vec<ReplicaId> = voters.iter().map(|&at| self.members[at].replica).collect();
        eventually("the members are changed", || {
            let handle = self.process(self.leader()).handle();
            self.wait_for(handle.change_members(voters.clone())).ok()
        });
    }

    /// Adds a process's replica as a learner.
    pub fn learn(&self, at: usize) {
        let member = self.members[at];
        eventually("a learner", || {
            let handle = self.process(self.leader()).handle();
            self.wait_for(handle.add_learner(member)).ok()
        });
    }
}

/// Far beyond anything that should happen here, on a machine that is busy with something else.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn eventually<T>(what: &str, mut happened: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = happened() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}
