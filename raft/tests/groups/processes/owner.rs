//! An owner that keeps every command under its index, in memory and, from checkpoint to checkpoint, in a file.
//!
//! Applying is absolute: the same command at the same index changes nothing. So a raft snapshot may be read from the
//! living state, and hold more than its position says, as a chunkserver's does.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use evolute_raft::{
    Applying, LocalFuture, Position, Restored, SnapshotHead, SnapshotSink, SnapshotSource, StateMachine,
};

/// What a replica has applied, by index: for everybody to look at.
pub type Commands = Arc<Mutex<BTreeMap<u64, Bytes>>>;

/// Where an owner can be made to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    Source,
    Put,
    BeforeSwitch,
    AfterSwitch,
}

/// What a test sees of raft snapshots, and how it stops them.
#[derive(Clone)]
pub struct Watch {
    held: Arc<Mutex<Option<(Hold, u64)>>>,
    refusal: Arc<Mutex<String>>,
    /// Somebody waits.
    pub waits: Arc<AtomicU64>,
    pub begun: Arc<AtomicU64>,
    pub frames_read: Arc<AtomicU64>,
    pub frames_put: Arc<AtomicU64>,
    pub installed: Arc<AtomicU64>,
    /// Commands in one frame.
    pub frame_commands: Arc<AtomicU64>,
}

impl Default for Watch {
    fn default() -> Self {
        let zero = || Arc::new(AtomicU64::new(0));
        Self {
            held: Arc::default(),
            refusal: Arc::default(),
            waits: zero(),
            begun: zero(),
            frames_read: zero(),
            frames_put: zero(),
            installed: zero(),
            frame_commands: Arc::new(AtomicU64::new(1)),
        }
    }
}

impl Watch {
    /// From the `after`th time on, whoever comes to `what` waits.
    pub fn hold(&self, what: Hold, after: u64) {
        *self.held.lock().unwrap() = Some((what, after));
    }

    pub fn release(&self) {
        *self.held.lock().unwrap() = None;
    }

    /// No raft snapshot is received, for this reason; none: they are again.
    pub fn refuse(&self, why: &str) {
        *self.refusal.lock().unwrap() = why.to_owned();
    }

    pub fn is_waiting(&self) -> bool {
        self.waits.load(Ordering::SeqCst) > 0
    }

    async fn pass(&self, what: Hold, count: u64) {
        let held = || self.held.lock().unwrap().is_some_and(|(held, after)| held == what && count >= after);
        if !held() {
            return;
        }
        self.waits.fetch_add(1, Ordering::SeqCst);
        let _waits = Waits(&self.waits);
        while held() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Somebody who waits, and may be dropped while it does.
struct Waits<'a>(&'a AtomicU64);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The state of one process's replica.
pub struct Owner {
    dir: PathBuf,
    commands: Commands,
    applied: RefCell<Restored>,
    durable: RefCell<Restored>,
    restored: Option<Position>,
    watch: Watch,
    staged: Cell<u64>,
}

fn put(out: &mut BytesMut, index: u64, command: &[u8]) {
    out.put_u64_le(index);
    out.put_u32_le(u32::try_from(command.len()).expect("small"));
    out.put_slice(command);
}

fn get(from: &mut Bytes) -> (u64, Bytes) {
    let (index, length) = (from.get_u64_le(), from.get_u32_le() as usize);
    (index, from.split_to(length))
}

impl Owner {
    pub fn open(dir: &Path, commands: Commands, watch: Watch) -> Self {
        std::fs::create_dir_all(dir).expect("a directory");
        let mut restored = Restored::default();
        for entry in std::fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.file_name().expect("a name") != "state" {
                std::fs::remove_file(path).expect("a staged file is removed");
            }
        }
        if let Ok(bytes) = std::fs::read(dir.join("state")) {
            let mut from = Bytes::from(bytes);
            let (_, membership) = get(&mut from);
            restored.membership = Some(membership);
            restored.applied = Some(Position { term: from.get_u64_le(), index: from.get_u64_le() });
            let mut commands = commands.lock().unwrap();
            while !from.is_empty() {
                let (index, command) = get(&mut from);
                commands.insert(index, command);
            }
        }
        Self {
            dir: dir.to_owned(),
            commands,
            restored: restored.applied,
            applied: RefCell::new(restored.clone()),
            durable: RefCell::new(restored),
            watch,
            staged: Cell::new(0),
        }
    }

    /// What this life began with.
    pub fn restored(&self) -> Option<Position> {
        self.restored
    }

    /// Everything that was ever here is gone.
    pub fn clear(&self) {
        let _ = std::fs::remove_file(self.dir.join("state"));
        self.commands.lock().unwrap().clear();
        *self.applied.borrow_mut() = Restored::default();
        *self.durable.borrow_mut() = Restored::default();
    }

    /// What is applied becomes durable; `None` when there is nothing.
    pub fn checkpoint(&self) -> Option<Restored> {
        let restored = self.applied.borrow().clone();
        let (at, membership) = (restored.applied?, restored.membership.clone()?);
        let mut out = header(at, &membership);
        for (&index, command) in self.commands.lock().unwrap().iter() {
            put(&mut out, index, command);
        }
        std::fs::write(self.dir.join("next"), &out).expect("written");
        std::fs::rename(self.dir.join("next"), self.dir.join("state")).expect("renamed");
        *self.durable.borrow_mut() = restored.clone();
        Some(restored)
    }
}

fn header(at: Position, membership: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    put(&mut out, 0, membership);
    out.put_u64_le(at.term);
    out.put_u64_le(at.index);
    out
}

pub struct Recorder(pub Rc<Owner>);

impl StateMachine for Recorder {
    fn restored(&self) -> Restored {
        self.0.durable.borrow().clone()
    }

    fn apply(&mut self, at: Position, what: Applying) -> Bytes {
        let mut applied = self.0.applied.borrow_mut();
        let next = applied.applied.map_or(0, |at| at.index + 1);
        assert_eq!(at.index, next, "entries are applied in order, each once");
        applied.applied = Some(at);
        match what {
            Applying::Command(command) => {
                let length = command.len();
                let command = command.into_cursor().take(length).unwrap();
                let old = self.0.commands.lock().unwrap().insert(at.index, command.clone());
                assert!(old.is_none_or(|old| old == command), "another command at {at}");
            }
            Applying::Membership(membership) => applied.membership = Some(membership),
            Applying::Blank => {}
        }
        Bytes::new()
    }

    fn snapshot(&mut self) -> Option<Box<dyn SnapshotSource>> {
        let durable = self.0.durable.borrow().clone();
        let head = SnapshotHead { at: durable.applied?, membership: durable.membership? };
        Some(Box::new(Source { owner: self.0.clone(), head, next: 0, frames: 0 }))
    }

    fn receive(&mut self, head: SnapshotHead) -> io::Result<Box<dyn SnapshotSink>> {
        let owner = self.0.clone();
        owner.watch.begun.fetch_add(1, Ordering::SeqCst);
        let refusal = owner.watch.refusal.lock().unwrap().clone();
        if !refusal.is_empty() {
            return Err(io::Error::other(refusal));
        }
        owner.staged.set(owner.staged.get() + 1);
        let file = owner.dir.join(format!("staged-{}", owner.staged.get()));
        std::fs::write(&file, header(head.at, &head.membership))?;
        Ok(Box::new(Sink { owner, file, frames: 0 }))
    }

    fn install<'a>(
        &'a mut self,
        head: SnapshotHead,
        sink: Box<dyn SnapshotSink>,
    ) -> LocalFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let sink = sink.into_any().downcast::<Sink>().expect("one of ours");
            let owner = &self.0;
            owner.watch.pass(Hold::BeforeSwitch, 0).await;
            let bytes = Bytes::from(std::fs::read(&sink.file)?);
            std::fs::rename(&sink.file, owner.dir.join("state"))?;
            let restored = Restored { applied: Some(head.at), membership: Some(head.membership) };
            *owner.durable.borrow_mut() = restored.clone();
            *owner.applied.borrow_mut() = restored;
            let mut from = bytes;
            get(&mut from);
            from.advance(16);
            {
                let mut commands = owner.commands.lock().unwrap();
                commands.clear();
                while !from.is_empty() {
                    let (index, command) = get(&mut from);
                    commands.insert(index, command);
                }
            }
            owner.watch.installed.fetch_add(1, Ordering::SeqCst);
            owner.watch.pass(Hold::AfterSwitch, 0).await;
            Ok(())
        })
    }
}

struct Source {
    owner: Rc<Owner>,
    head: SnapshotHead,
    next: u64,
    frames: u64,
}

impl SnapshotSource for Source {
    fn head(&self) -> SnapshotHead {
        self.head.clone()
    }

    fn next(&mut self) -> LocalFuture<'_, io::Result<Option<Bytes>>> {
        Box::pin(async move {
            self.owner.watch.pass(Hold::Source, self.frames).await;
            let count = self.owner.watch.frame_commands.load(Ordering::SeqCst);
            let mut out = BytesMut::new();
            // What is there now, not what was there at the checkpoint.
            for (&index, command) in
                self.owner.commands.lock().unwrap().range(self.next..).take(usize::try_from(count).unwrap())
            {
                put(&mut out, index, command);
                self.next = index + 1;
            }
            if out.is_empty() {
                return Ok(None);
            }
            self.frames += 1;
            self.owner.watch.frames_read.fetch_add(1, Ordering::SeqCst);
            Ok(Some(out.freeze()))
        })
    }
}

struct Sink {
    owner: Rc<Owner>,
    file: PathBuf,
    frames: u64,
}

impl SnapshotSink for Sink {
    fn put(&mut self, frame: Bytes) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.owner.watch.pass(Hold::Put, self.frames).await;
            let mut file = std::fs::OpenOptions::new().append(true).open(&self.file)?;
            io::Write::write_all(&mut file, &frame)?;
            self.frames += 1;
            self.owner.watch.frames_put.fetch_add(1, Ordering::SeqCst);
            Ok(())
        })
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}
