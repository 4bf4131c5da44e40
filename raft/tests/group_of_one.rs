//! A group of one replica commits by itself, and everything it answered is there after a restart.

use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use evolute_raft::{
    Applied, Applying, Command, Dial, DialFuture, Group, GroupId, Log, LogOptions, LogOwner, Member, Node,
    Peers, Position, ProcessId, ReplicaId, Restored, StateMachine, Timing, spawn_thread,
};

const ME: Member = Member { replica: ReplicaId(1), process: ProcessId(1) };

struct Nobody;

impl Dial for Nobody {
    fn dial(&self, _to: ProcessId) -> DialFuture {
        Box::pin(async { Err(io::ErrorKind::ConnectionRefused.into()) })
    }
}

/// Keeps every command, and answers with how many there are.
#[derive(Clone, Default)]
struct Kept(Rc<RefCell<Vec<Bytes>>>);

impl StateMachine for Kept {
    fn restored(&self) -> Restored {
        Restored::default()
    }

    fn apply(&mut self, _at: Position, what: Applying) -> Bytes {
        if let Applying::Command(command) = what {
            let len = command.len();
            self.0.borrow_mut().push(command.into_cursor().take(len).expect("all of it"));
        }
        Bytes::from(self.0.borrow().len().to_string())
    }
}

async fn start(dir: &Path) -> (Node, Group, Kept) {
    let owner = LogOwner { cluster: [7; 16], process: ME.process };
    let log = Log::open(dir, LogOptions::new(owner)).await.expect("a log");
    let timing = Timing { heartbeat_ms: 20, election_ms_min: 100, election_ms_max: 200 };
    let node = Node::new(log, Peers::new(ME.process, Rc::new(Nobody)), timing);
    let kept = Kept::default();
    let group = node.start_group(GroupId(1), ME.replica, kept.clone()).await.expect("a group");
    group.initialize(vec![ME], ME.replica).await.expect("a new group, or an old one");
    while group.leadership().is_none() {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    (node, group, kept)
}

async fn propose(group: &Group, command: &'static [u8]) -> Applied {
    let (tell, told) = tokio::sync::oneshot::channel();
    group.propose(Command::from(Bytes::from_static(command)), move |outcome| drop(tell.send(outcome)));
    told.await.expect("an answer").expect("applied")
}

#[test]
fn it_applies_what_it_answers_in_order() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_owned();
    spawn_thread("raft", move || async move {
        let (node, group, kept) = start(&path).await;
        let first = propose(&group, b"a").await;
        let second = propose(&group, b"b").await;
        assert!(first.at < second.at);
        assert_eq!((&first.result[..], &second.result[..]), (&b"1"[..], &b"2"[..]));
        assert_eq!(*kept.0.borrow(), [&b"a"[..], b"b"]);
        let handle = group.handle();
        assert_eq!(handle.propose(Bytes::from_static(b"c")).await.expect("applied").result, b"3"[..]);
        assert_eq!(group.status().applied, group.applied());
        node.shutdown().await;
        assert_eq!(group.leadership(), None);
    })
    .expect("a thread")
    .join()
    .expect("no panic");
}

#[test]
fn everything_it_answered_is_applied_again_after_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    for life in 0..4_usize {
        let path = dir.path().to_owned();
        spawn_thread("raft", move || async move {
            let (node, group, kept) = start(&path).await;
            assert_eq!(kept.0.borrow().len(), 10 * life, "leadership means that everything is applied");
            for _ in 0..10 {
                propose(&group, b"again").await;
            }
            // Half of the lives end without a clean stop.
            if life % 2 == 0 {
                node.shutdown().await;
            }
        })
        .expect("a thread")
        .join()
        .expect("no panic");
    }
}

/// Remembers in the test's hand what a store would keep on its disk.
#[derive(Clone, Default)]
struct Stored(Rc<RefCell<(Vec<Bytes>, Restored)>>);

impl StateMachine for Stored {
    fn restored(&self) -> Restored {
        self.0.borrow().1.clone()
    }

    fn apply(&mut self, at: Position, what: Applying) -> Bytes {
        let mut stored = self.0.borrow_mut();
        stored.1.applied = Some(at);
        match what {
            Applying::Command(command) => stored.0.push(command.into_cursor().take(1).expect("a byte")),
            Applying::Membership(membership) => stored.1.membership = Some(membership),
            Applying::Blank => {}
        }
        Bytes::new()
    }
}

#[test]
fn a_checkpoint_lets_files_be_used_again_and_a_restart_go_on_from_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_owned();
    spawn_thread("raft", move || async move {
        let owner = LogOwner { cluster: [7; 16], process: ME.process };
        let options =
            LogOptions { file_bytes: 256 << 10, memory_bytes_max: 64 << 10, ..LogOptions::new(owner) };
        let timing = Timing { heartbeat_ms: 20, election_ms_min: 100, election_ms_max: 200 };
        let stored = Stored::default();
        for life in 0..3_usize {
            let log = Log::open(&path, options.clone()).await.expect("a log");
            let node = Node::new(log, Peers::new(ME.process, Rc::new(Nobody)), timing);
            let group = node.start_group(GroupId(1), ME.replica, stored.clone()).await.expect("a group");
            group.initialize(vec![ME], ME.replica).await.expect("initialized");
            while group.leadership().is_none() {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            assert_eq!(stored.0.borrow().0.len(), 1000 * life, "nothing twice, nothing missing");
            for _ in 0..10 {
                for _ in 0..100 {
                    let (tell, told) = tokio::sync::oneshot::channel();
                    group.propose(Command::from(vec![1; 4096]), move |outcome| drop(tell.send(outcome)));
                    told.await.expect("an answer").expect("applied");
                }
                node.log().synced().await.expect("a log");
                let restored = stored.0.borrow().1.clone();
                group.checkpointed(restored.applied.expect("applied"), restored.membership);
                while group.status().purged != restored.applied {
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
            }
            let usage = node.log().usage();
            assert!(usage.appended_bytes > 4_000_000, "{usage:?}");
            assert!(usage.file_bytes <= 8 * options.file_bytes, "4 MiB went through few files: {usage:?}");
            assert!(usage.memory_bytes <= options.memory_bytes_max, "{usage:?}");
            node.shutdown().await;
        }
    })
    .expect("a thread")
    .join()
    .expect("no panic");
}
