//! Disks that fail, fall short or finish in another order than they were asked.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

use openraft::AsyncRuntime;
use openraft::async_runtime::Oneshot;
use openraft::storage::RaftLogStorage;

use super::{Model, Op, apply, entry, groups, held, open, options, run};
use crate::Position;
use crate::log::device::{self, Completion, Device, Write};
use crate::log::{Log, LogError};
use crate::runtime::LocalRt;
use crate::types::{IoFlushed, Vote};

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
                Fault::Overtaken if self.kept.borrow().is_empty() => self.kept.borrow_mut().push(completion),
                Fault::Overtaken => {
                    self.passed.set(self.passed.get() + 1);
                    completed.push(completion);
                }
            }
        }
        if self.fault.get() != Fault::Overtaken {
            completed.append(&mut self.kept.borrow_mut());
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        // A test that failed half way: what is kept back is not waited for.
        if self.fault.replace(Fault::None) == Fault::Overtaken && !self.kept.borrow().is_empty() {
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
}

async fn open_faulty(dir: &std::path::Path) -> (Log, Disk) {
    let disk = Disk { fault: Rc::new(Cell::new(Fault::None)), kept: Rc::default(), passed: Rc::default() };
    let (fault, kept, passed) = (disk.fault.clone(), disk.kept.clone(), disk.passed.clone());
    let log = Log::open_on(dir, options(), move |io_uring| {
        let (inner, event) = device::open(io_uring)?;
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
