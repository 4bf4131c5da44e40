//! Processes of a test: each a raft thread with its own log directory, listening on a real port of this machine.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_raft::{
    Applying, Dial, DialFuture, Group, GroupId, GroupStatus, Handle, Log, LogOptions, LogOwner, Member, Node,
    Peers, Position, ProcessId, ReplicaId, Restored, Role, StateMachine, Timing, spawn_thread,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc as queue, oneshot};

pub const GROUP: GroupId = GroupId(1);
pub const TIMING: Timing = Timing { heartbeat_ms: 40, election_ms_min: 250, election_ms_max: 500 };

/// Who listens where. A process that starts again listens elsewhere.
#[derive(Clone, Default)]
pub struct Directory(Arc<Mutex<HashMap<ProcessId, SocketAddr>>>);

impl Directory {
    pub fn tell(&self, process: ProcessId, address: SocketAddr) {
        self.0.lock().unwrap().insert(process, address);
    }
}

impl Dial for Directory {
    fn dial(&self, to: ProcessId) -> DialFuture {
        let address = self.0.lock().unwrap().get(&to).copied();
        Box::pin(async move { TcpStream::connect(address.ok_or(io::ErrorKind::NotFound)?).await })
    }
}

/// What a replica has applied, in order: for everybody to look at.
pub type Commands = Arc<Mutex<Vec<Bytes>>>;

/// Keeps every command; "restores" nothing unless told how far a former life came.
pub struct Recorder {
    pub commands: Commands,
    pub restored: Rc<RefCell<Restored>>,
}

impl StateMachine for Recorder {
    fn restored(&self) -> Restored {
        self.restored.borrow().clone()
    }

    fn apply(&mut self, at: Position, what: Applying) -> Bytes {
        self.restored.borrow_mut().applied = Some(at);
        match what {
            Applying::Command(command) => {
                let length = command.len();
                self.commands.lock().unwrap().push(command.into_cursor().take(length).unwrap());
            }
            Applying::Membership(membership) => self.restored.borrow_mut().membership = Some(membership),
            Applying::Blank => {}
        }
        Bytes::new()
    }
}

/// Something to be done on a process's thread.
type Job = Box<dyn FnOnce(Node, Group, Rc<RefCell<Restored>>) + Send>;

pub struct Process {
    pub member: Member,
    pub handle: Handle,
    pub commands: Commands,
    jobs: queue::UnboundedSender<Job>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts a process on the log in `dir`, with one replica of [`GROUP`].
    pub fn start(member: Member, dir: &Path, directory: &Directory) -> Self {
        Self::start_with(member, dir, directory, LogOptions { file_bytes: 1 << 20, ..options(member) })
    }

    pub fn start_with(member: Member, dir: &Path, directory: &Directory, options: LogOptions) -> Self {
        let (dir, directory): (PathBuf, _) = (dir.to_owned(), directory.clone());
        let (ready, started) = mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let (jobs, mut todo) = queue::unbounded_channel::<Job>();
        let commands = Commands::default();
        let recorded = commands.clone();
        let thread = spawn_thread(&format!("{}", member.process), move || async move {
            let log = Log::open(&dir, options).await.expect("a log");
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            directory.tell(member.process, listener.local_addr().expect("bound"));
            let peers = Peers::new(member.process, Rc::new(directory));
            let node = Node::new(log, peers.clone(), TIMING);
            let restored = Rc::new(RefCell::new(Restored::default()));
            let recorder = Recorder { commands: recorded, restored: restored.clone() };
            let group = node.start_group(GROUP, member.replica, recorder).await.expect("a group");
            tokio::task::spawn_local(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    peers.accept(stream);
                }
            });
            ready.send(group.handle()).expect("the test waits");
            let (doing, with) = (node.clone(), group.clone());
            tokio::task::spawn_local(async move {
                while let Some(job) = todo.recv().await {
                    job(doing.clone(), with.clone(), restored.clone());
                }
            });
            // Whatever comes, this is all there is of an end: the tasks are dropped where they are.
            let _ = stopped.await;
        })
        .expect("a thread");
        let handle = started.recv().expect("it starts");
        Self { member, handle, commands, jobs, stop: Some(stop), thread: Some(thread) }
    }

    /// Runs something on the process's thread.
    pub fn on_thread<T: Send + 'static>(
        &self,
        job: impl FnOnce(Node, Group, Rc<RefCell<Restored>>) -> T + Send + 'static,
    ) -> T {
        let (tell, told) = mpsc::channel();
        let job: Job = Box::new(move |node, group, restored| drop(tell.send(job(node, group, restored))));
        assert!(self.jobs.send(job).is_ok(), "it runs");
        told.recv().expect("it ran")
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
    runtime: tokio::runtime::Runtime,
}

impl Cluster {
    /// A group whose members are all of `n` processes.
    pub fn of(n: usize) -> Self {
        let mut cluster = Self {
            directory: Directory::default(),
            dirs: Vec::new(),
            processes: Vec::new(),
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
        };
        for _ in 0..n {
            cluster.add();
        }
        let members: Vec<Member> = cluster.running().map(|process| process.member).collect();
        let handles: Vec<Handle> = cluster.running().map(|process| process.handle.clone()).collect();
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
        let dir = tempfile::tempdir().expect("a directory");
        self.processes.push(Some(Process::start(member, dir.path(), &self.directory)));
        self.dirs.push(dir);
        member
    }

    pub fn running(&self) -> impl Iterator<Item = &Process> {
        self.processes.iter().flatten()
    }

    pub fn process(&self, at: usize) -> &Process {
        self.processes[at].as_ref().expect("it runs")
    }

    pub fn kill(&mut self, at: usize) {
        self.processes[at].take().expect("it runs").kill();
    }

    pub fn restart(&mut self, at: usize) {
        let process = Process::start(member(at as u64 + 1), self.dirs[at].path(), &self.directory);
        self.processes[at] = Some(process);
    }

    pub fn wait_for<F: Future>(&self, future: F) -> F::Output {
        self.runtime
            .block_on(async { tokio::time::timeout(PATIENCE, future).await.expect("it happens in time") })
    }

    pub fn status(&self, at: usize) -> GroupStatus {
        self.wait_for(self.process(at).handle.status()).expect("it runs")
    }

    /// Waits until a running process leads and may serve; which.
    pub fn leader(&self) -> usize {
        eventually("a leader", || {
            (0..self.processes.len()).find(|&at| {
                self.processes[at].as_ref().is_some_and(|p| self.wait_for(p.handle.leads_term()).is_some())
            })
        })
    }

    /// Proposes until somebody applies it.
    pub fn propose(&self, command: &'static str) {
        eventually(command, || {
            let leader = self.leader();
            self.wait_for(self.process(leader).handle.propose(Bytes::from_static(command.as_bytes()))).ok()
        });
    }

    /// Waits until a process has applied exactly these.
    pub fn applied(&self, at: usize, wanted: &[&str]) {
        let commands = &self.process(at).commands;
        eventually("everything applied", || {
            let commands = commands.lock().unwrap();
            assert!(commands.len() <= wanted.len(), "{commands:?} and not {wanted:?}");
            (commands.len() == wanted.len()).then(|| assert_eq!(*commands, wanted))
        });
    }

    pub fn role(&self, at: usize) -> Role {
        self.status(at).role
    }
}

/// Far beyond anything that should happen here, on a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(60);

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
