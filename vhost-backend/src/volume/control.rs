//! The control thread: everything the volume asks of the control plane, apart from the I/O thread.
//!
//! ```text
//!  main ──start──▶ Control ◀── attached? detach ──┐
//!                    control thread (tokio, tonic) ├──▶ MDS, one of a list
//!  Volume ──Ask──▶ ControlLink ──News + wake──▶ Volume
//! ```
//!
//! What always holds: an MDS that cannot be reached is waited for, for ever; what the volume must not forget is on disk
//! before the volume hears of it ([`super::attach`]); a question is in flight at most once, so a volume that asks
//! often does no harm.
//!
//! With a state directory and an attachment in it, the volume is attached before any MDS is asked.

use std::cell::RefCell;
use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use evolute_daemon::in_one_line;
use evolute_protocol::NotAnAddress;
use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::{SegmentIndex, VolumeId};
use evolute_protocol::rpc::{
    AllocateSegmentRequest, AttachRequest, DetachRequest, ErrorWord, MapRequest, Segment, ShowVolumeRequest,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tracing::{error, info, warn};

use super::attach::{Attachment, Remembered, StateError, StateFile};
use super::identity::Secret;
use super::mds::{self, BadMap, Endpoints, Mds, copysets_of, map_of, resolve};
use super::routing::{Map, SegmentCopysets};
use crate::backing::Capacity;
use crate::io_thread::WakerHandle;

/// Between two tries at what must not be given up: a state directory that is full, a map that is not there yet.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Between two tries at a volume that somebody else holds.
const HELD_ASK_EVERY: Duration = Duration::from_millis(300);

/// Which volume, for whom, and whom to ask.
#[derive(Debug, Clone)]
pub struct ControlOptions {
    pub volume: String,
    /// host:port of every MDS.
    pub mds: Vec<String>,
    /// Names the place that writes, for people: host and socket path.
    pub holder: String,
    /// Whoever has it is the holder, under any name, and may attach again.
    pub secret: Secret,
    /// By which the same place may have attached before.
    pub former_secret: Option<Secret>,
    /// Fence out whoever else holds the volume.
    pub takeover: bool,
    /// Where to remember the attachment, so that a restart needs no MDS.
    pub state_dir: Option<PathBuf>,
    /// Told as soon as it is known: before the volume hears that it is attached, and also while somebody else holds it.
    pub capacity: Capacity,
}

/// What main needs to know of an attached volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttachedVolume {
    pub volume: VolumeId,
    pub size_bytes: u64,
    pub epoch: Epoch,
}

/// Why the volume can not be attached, however long one waits.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("there is no volume {0:?}")]
    NotFound(String),
    /// Detach it there, or take it over.
    #[error(
        "volume {volume:?} is held elsewhere: {message}. Stop its backend there, or start this one with --takeover, which \
         ends the other one's right to write"
    )]
    AttachedElsewhere { volume: String, message: String },
    #[error("the control plane refused to attach {volume:?}: {message}")]
    Refused { volume: String, message: String },
    #[error("the state directory cannot be used")]
    State(#[from] StateError),
    #[error(transparent)]
    MdsAddress(#[from] NotAnAddress),
    #[error("the control thread cannot be started")]
    Thread(#[source] io::Error),
    #[error("volume {0:?} was taken over by somebody else: `evolute volume show` says by whom")]
    TakenOver(String),
    /// Not by this program: nothing but `volume delete` does it.
    #[error(
        "volume {0:?} was deleted while this had it attached (`evolute volume delete`, with --force): its data are gone, and \
         its guest's disk has ended; remove that disk from the guest, and do not start this again"
    )]
    Deleted(String),
    /// It ended, which it does only when told to.
    #[error("the control thread is gone")]
    Gone,
}

/// What the volume asks.
#[derive(Debug)]
pub enum Ask {
    /// Make this GiB writable.
    Segment(SegmentIndex),
    /// The current map.
    Map,
    /// What was remembered is of no use any more: attach through the control plane.
    AttachAnew,
    /// The cluster says that our right to write ended with this epoch's; main should hear of it.
    FencedOut(Epoch),
    /// Give the volume back, in this time. Says whether the control plane knows.
    Detach {
        timeout: Duration,
        done: mpsc::Sender<bool>,
    },
    Stop,
}

/// What the volume is told.
#[derive(Debug)]
pub enum News {
    Attached(Box<Attachment>),
    Map(Box<Map>),
    Segment {
        segment: SegmentIndex,
        result: Result<Box<SegmentCopysets>, SegmentRefused>,
    },
    /// Somebody else owns the volume, or it was deleted: main says which.
    Lost,
}

/// Why a segment was not allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentRefused {
    NoSpace,
    /// The control plane finds the question senseless.
    Invalid,
}

/// The I/O thread's end.
#[derive(Debug)]
pub struct ControlLink {
    asks: UnboundedSender<Ask>,
    news: mpsc::Receiver<News>,
    waker: Arc<OnceLock<WakerHandle>>,
}

impl ControlLink {
    /// From now on news wake the I/O thread. What came before is found without.
    pub fn set_waker(&self, waker: WakerHandle) {
        waker.wake();
        let _ = self.waker.set(waker);
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }

    pub fn ask(&self, ask: Ask) {
        // The control thread only ends after the volume was told to stop.
        let _ = self.asks.send(ask);
    }

    pub fn next(&self) -> Option<News> {
        self.news.try_recv().ok()
    }
}

/// The control thread's own end of a [`ControlLink`]; tests hold it instead of a thread.
#[derive(Debug)]
pub struct ControlEnd {
    pub asks: UnboundedReceiver<Ask>,
    pub news: NewsSender,
}

/// Tells the volume something and wakes its thread.
#[derive(Debug, Clone)]
pub struct NewsSender {
    news: mpsc::Sender<News>,
    waker: Arc<OnceLock<WakerHandle>>,
}

impl NewsSender {
    pub fn send(&self, news: News) {
        // Nobody listens once the I/O thread has ended.
        if self.news.send(news).is_ok()
            && let Some(waker) = self.waker.get()
        {
            waker.wake();
        }
    }
}

/// Both ends of a link.
pub fn link() -> (ControlLink, ControlEnd) {
    let (asks, asked) = unbounded_channel();
    let (news, heard) = mpsc::channel();
    let waker = Arc::new(OnceLock::new());
    let sender = NewsSender { news, waker: Arc::clone(&waker) };
    (ControlLink { asks, news: heard, waker }, ControlEnd { asks: asked, news: sender })
}

/// Main's handle to the control thread.
#[derive(Debug)]
pub struct Control {
    asks: UnboundedSender<Ask>,
    attached: Mutex<mpsc::Receiver<Result<AttachedVolume, AttachError>>>,
    thread: JoinHandle<()>,
}

/// Starts the control thread, which attaches the volume at once.
pub fn start(options: ControlOptions) -> Result<(Control, ControlLink), AttachError> {
    let mds = mds::endpoints(&options.mds)?;
    let state = match &options.state_dir {
        Some(directory) => Some(StateFile::new(directory, &options.volume)?),
        None => None,
    };
    let (link, end) = link();
    let (told, attached) = mpsc::channel();
    let asks = link.asks.clone();
    let thread = thread::Builder::new()
        .name("control".into())
        .spawn(move || run(options, mds, state, end, told))
        .map_err(AttachError::Thread)?;
    Ok((Control { asks, attached: Mutex::new(attached), thread }, link))
}

impl Control {
    /// Waits until the volume is attached, or can not be; `None` when that takes longer than `timeout`. That somebody else
    /// holds it may be heard again and again: it is asked for until it is let go of.
    pub fn wait_attached(&self, timeout: Duration) -> Result<Option<AttachedVolume>, AttachError> {
        match self.told().recv_timeout(timeout) {
            Ok(result) => result.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(AttachError::Gone),
        }
    }

    /// Why the volume is lost, once it is. After that every request fails, and a process can only end.
    pub fn lost(&self) -> Option<AttachError> {
        self.told().try_iter().find_map(Result::err)
    }

    /// The same for one whose request has just failed: the reason may be a moment behind.
    pub fn lost_within(&self, timeout: Duration) -> Option<AttachError> {
        let told = self.told();
        loop {
            match told.recv_timeout(timeout) {
                Ok(Ok(_)) => {}
                Ok(Err(lost)) => return Some(lost),
                Err(_) => return None,
            }
        }
    }

    fn told(&self) -> MutexGuard<'_, mpsc::Receiver<Result<AttachedVolume, AttachError>>> {
        // A panic aborts the process; a poisoned lock can only be seen in tests.
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the volume back and ends the thread. Call it when the I/O thread has ended. False: the control plane could
    /// not be told in time, and the volume stays ours until it is attached again.
    pub fn detach(self, timeout: Duration) -> bool {
        let (done, told) = mpsc::channel();
        let _ = self.asks.send(Ask::Detach { timeout, done });
        let detached = told.recv().unwrap_or(false);
        self.stop();
        detached
    }

    /// Asks for the volume no more, and keeps nobody waiting.
    pub fn give_up(&self) {
        let _ = self.asks.send(Ask::Stop);
    }

    /// Ends the thread and keeps the volume, for a successor with the same state directory.
    pub fn stop(self) {
        self.give_up();
        if self.thread.join().is_err() {
            error!("the control thread has panicked");
        }
    }
}

type Told = mpsc::Sender<Result<AttachedVolume, AttachError>>;

fn run(options: ControlOptions, mds: Endpoints, state: Option<StateFile>, end: ControlEnd, told: Told) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = told.send(Err(AttachError::Thread(error)));
            return;
        }
    };
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let ControlEnd { asks, news } = end;
        let controller = Rc::new(Controller {
            options,
            mds: Mds::new(mds),
            state,
            known: RefCell::new(None),
            news,
            told,
            busy: RefCell::new(HashSet::new()),
        });
        controller.serve(asks).await;
    });
}

/// A question that is being asked: not asked a second time meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Question {
    Attach,
    Map,
    Segment(SegmentIndex),
}

struct Controller {
    options: ControlOptions,
    mds: Mds,
    state: Option<StateFile>,
    /// What we hold; the same as in the state file, if there is one.
    known: RefCell<Option<Remembered>>,
    news: NewsSender,
    told: Told,
    busy: RefCell<HashSet<Question>>,
}

impl Controller {
    async fn serve(self: Rc<Self>, mut asks: UnboundedReceiver<Ask>) {
        match self.remembered().await {
            Ok(true) => self.spawn(Question::Map),
            Ok(false) => self.spawn(Question::Attach),
            Err(error) => {
                let _ = self.told.send(Err(error.into()));
            }
        }
        while let Some(ask) = asks.recv().await {
            match ask {
                Ask::Segment(segment) => self.spawn(Question::Segment(segment)),
                Ask::Map => self.spawn(Question::Map),
                Ask::AttachAnew => self.spawn(Question::Attach),
                Ask::FencedOut(by) => self.tell_lost(by == Epoch::DELETED),
                Ask::Detach { timeout, done } => {
                    let detached = tokio::time::timeout(timeout, self.detach()).await;
                    let _ = done.send(detached.unwrap_or(false));
                }
                Ask::Stop => break,
            }
        }
    }

    fn spawn(self: &Rc<Self>, question: Question) {
        if !self.busy.borrow_mut().insert(question) {
            return;
        }
        let this = Rc::clone(self);
        tokio::task::spawn_local(async move {
            match question {
                Question::Attach => this.attach().await,
                Question::Map => this.refresh_map().await,
                Question::Segment(segment) => this.allocate(segment).await,
            }
            this.busy.borrow_mut().remove(&question);
        });
    }

    /// Takes up the attachment a former process of this holder left, under the next incarnation.
    async fn remembered(&self) -> Result<bool, StateError> {
        let Some(state) = &self.state else { return Ok(false) };
        let Some(mut remembered) = state.load()? else { return Ok(false) };
        let (name, holder) = (&self.options.volume, &self.options.holder);
        let ours = match &remembered.fingerprint {
            Some(fingerprint) => *fingerprint == self.options.secret.fingerprint(),
            // An older program's.
            None => remembered.holder == *holder,
        };
        if remembered.name != *name || !ours {
            return Ok(false);
        }
        let Some(incarnation) = remembered.epoch.incarnation.checked_add(1) else { return Ok(false) };
        remembered.epoch.incarnation = incarnation;
        if !remembered.epoch.is_a_writers() {
            return Ok(false);
        }
        state.save(&remembered)?;
        resolve(&mut remembered.map).await;
        info!("{name}: taking up the attachment of before under epoch {}", remembered.epoch);
        self.mds.belong_to(remembered.map.cluster);
        self.announce(&remembered, true);
        *self.known.borrow_mut() = Some(remembered);
        Ok(true)
    }

    fn announce(&self, known: &Remembered, remembered: bool) {
        if !self.options.capacity.tell(known.size_bytes) {
            let size = known.size_bytes;
            self.news.send(News::Lost);
            let why = self.refused(format!("it is another volume of that name by now, of {size} bytes"));
            let _ = self.told.send(Err(why));
            return;
        }
        let attachment = Attachment {
            volume: known.volume,
            size_bytes: known.size_bytes,
            epoch: known.epoch,
            map: known.map.clone(),
            remembered,
        };
        self.news.send(News::Attached(Box::new(attachment)));
        let attached =
            AttachedVolume { volume: known.volume, size_bytes: known.size_bytes, epoch: known.epoch };
        let _ = self.told.send(Ok(attached));
    }

    /// Until it is ours, or never can be. Whoever had it before, here, does not wait for somebody else to let go of it: what
    /// its guest believes to be on the disk is not what will be there.
    async fn attach(&self) {
        let had_it = self.known.borrow().is_some();
        while let Err(error) = self.try_attach().await {
            let waits = !had_it && matches!(error, AttachError::AttachedElsewhere { .. });
            if !waits {
                self.news.send(News::Lost);
            }
            if self.told.send(Err(error)).is_err() || !waits {
                return;
            }
            self.learn_size().await;
            tokio::time::sleep(HELD_ASK_EVERY).await;
        }
    }

    /// A front end need not wait for it until the volume is ours.
    async fn learn_size(&self) {
        if self.options.capacity.get().is_some() {
            return;
        }
        let request = ShowVolumeRequest { name: self.options.volume.clone() };
        let answer = self.mds.call("show", |mut mds| {
            let request = request.clone();
            async move { mds.show(request).await }
        });
        if let Ok(volume) = answer.await {
            self.options.capacity.tell(volume.size_bytes);
        }
    }

    async fn try_attach(&self) -> Result<(), AttachError> {
        let request = AttachRequest {
            name: self.options.volume.clone(),
            holder: self.options.holder.clone(),
            takeover: self.options.takeover,
            secret: self.options.secret.bytes().to_vec(),
            former_secret: self.options.former_secret.map_or_else(Vec::new, |former| former.bytes().to_vec()),
        };
        let answer = self.mds.call("attach", |mut mds| {
            let request = request.clone();
            async move { mds.attach(request).await }
        });
        let known = match answer.await {
            Ok(answer) => match self.attached(answer).await {
                Ok(known) => known,
                Err(what) => return Err(self.refused(format!("its answer does not make sense: {what}"))),
            },
            Err(refusal) => {
                let volume = self.options.volume.clone();
                return Err(match refusal.word {
                    ErrorWord::NotFound => AttachError::NotFound(volume),
                    ErrorWord::AttachedElsewhere => {
                        AttachError::AttachedElsewhere { volume, message: refusal.message }
                    }
                    _ => self.refused(refusal.message),
                });
            }
        };
        self.save(&known).await;
        info!("{}: attached as {} under epoch {}", known.name, known.volume, known.epoch);
        self.mds.belong_to(known.map.cluster);
        self.announce(&known, false);
        *self.known.borrow_mut() = Some(known);
        Ok(())
    }

    fn tell_lost(&self, deleted: bool) {
        let volume = self.options.volume.clone();
        let why = if deleted { AttachError::Deleted(volume) } else { AttachError::TakenOver(volume) };
        let _ = self.told.send(Err(why));
    }

    fn lost(&self, deleted: bool) {
        self.tell_lost(deleted);
        self.news.send(News::Lost);
    }

    fn refused(&self, message: String) -> AttachError {
        AttachError::Refused { volume: self.options.volume.clone(), message }
    }

    async fn attached(&self, answer: evolute_protocol::rpc::AttachResponse) -> Result<Remembered, BadMap> {
        let volume = answer.volume.ok_or(BadMap("no volume"))?;
        let map = map_of(answer.map.ok_or(BadMap("no map"))?).await?;
        Ok(Remembered {
            name: self.options.volume.clone(),
            holder: self.options.holder.clone(),
            fingerprint: Some(self.options.secret.fingerprint()),
            volume: VolumeId(volume.id),
            size_bytes: volume.size_bytes,
            epoch: Epoch { attachment: answer.attachment, incarnation: 0 },
            map,
        })
    }

    /// On disk when this returns, however long that takes: nothing may be used before.
    async fn save(&self, known: &Remembered) {
        let Some(state) = &self.state else { return };
        let mut told = false;
        while let Err(error) = state.save(known) {
            if !told {
                error!("{}: I/O that needs this waits: {}", known.name, in_one_line(&error));
                told = true;
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    }

    async fn refresh_map(&self) {
        let Some(volume_id) = self.known.borrow().as_ref().map(|known| known.volume.0) else { return };
        let answer = self.mds.call("map", |mut mds| async move { mds.map(MapRequest { volume_id }).await });
        let map = match answer.await {
            Ok(map) => map_of(map).await,
            Err(refusal) if refusal.word == ErrorWord::NotFound => {
                return self.lost(true);
            }
            Err(refusal) => return warn!("the control plane does not give a map: {}", refusal.message),
        };
        match map {
            Ok(map) => self.take_map(map).await,
            Err(what) => warn!("the control plane's map does not make sense: {what}"),
        }
    }

    /// A newer map. Segments are never given back, so one we know and the map does not is kept.
    async fn take_map(&self, mut map: Map) {
        let (changed, grown) = {
            let mut known = self.known.borrow_mut();
            let Some(known) = known.as_mut() else { return };
            for (segment, copysets) in &known.map.segments {
                let all_known = copysets.iter().all(|id| map.copysets.iter().any(|of| of.copyset == *id));
                if all_known && !map.segments.iter().any(|(index, _)| index == segment) {
                    map.segments.push((*segment, *copysets));
                }
            }
            map.segments.sort_by_key(|(segment, _)| *segment);
            let (changed, grown) = (known.map != map, known.map.segments != map.segments);
            known.map = map.clone();
            (changed.then(|| known.clone()), grown)
        };
        // Nothing is lost with an address that is forgotten: it is looked up again. So a state directory that cannot be
        // written keeps no disk from finding its chunkservers.
        if !grown {
            self.news.send(News::Map(Box::new(map.clone())));
        }
        if let Some(known) = changed {
            self.save(&known).await;
        }
        if grown {
            self.news.send(News::Map(Box::new(map)));
        }
    }

    async fn allocate(&self, segment: SegmentIndex) {
        let Some((volume_id, attachment)) =
            self.known.borrow().as_ref().map(|known| (known.volume.0, known.epoch.attachment))
        else {
            return;
        };
        let request = AllocateSegmentRequest { volume_id, attachment, segment: segment.0 };
        let answer = self.mds.call("allocate", |mut mds| async move { mds.allocate_segment(request).await });
        let result = match answer.await {
            Ok(answer) => self.allocated(segment, answer).await,
            Err(refusal) => {
                warn!("{}: {segment} was not allocated: {}", self.options.volume, refusal.message);
                match refusal.word {
                    ErrorWord::NoPlacement => Err(SegmentRefused::NoSpace),
                    ErrorWord::FencedOut | ErrorWord::NotFound | ErrorWord::AttachedElsewhere => {
                        return self.lost(refusal.word == ErrorWord::NotFound);
                    }
                    _ => Err(SegmentRefused::Invalid),
                }
            }
        };
        self.news.send(News::Segment { segment, result });
    }

    async fn allocated(
        &self,
        segment: SegmentIndex,
        answer: Segment,
    ) -> Result<Box<SegmentCopysets>, SegmentRefused> {
        let copysets = match copysets_of(&answer) {
            Ok(copysets) if answer.index == segment.0 => copysets,
            _ => {
                error!("the control plane's answer for {segment} does not make sense");
                return Err(SegmentRefused::Invalid);
            }
        };
        // Normally all of them were in the first map: a volume's copysets are chosen when it is created.
        while !self.knows(&copysets) {
            self.refresh_map().await;
            if !self.knows(&copysets) {
                tokio::time::sleep(AGAIN_AFTER).await;
            }
        }
        let known = {
            let mut known = self.known.borrow_mut();
            known.as_mut().map(|known| {
                known.map.segments.retain(|(index, _)| *index != segment);
                known.map.segments.push((segment, copysets));
                known.map.segments.sort_by_key(|(index, _)| *index);
                known.clone()
            })
        };
        if let Some(known) = known {
            self.save(&known).await;
        }
        Ok(Box::new(copysets))
    }

    fn knows(&self, copysets: &SegmentCopysets) -> bool {
        self.known.borrow().as_ref().is_some_and(|known| {
            copysets.iter().all(|id| known.map.copysets.iter().any(|of| of.copyset == *id))
        })
    }

    async fn detach(&self) -> bool {
        let Some((volume_id, attachment)) =
            self.known.borrow().as_ref().map(|known| (known.volume.0, known.epoch.attachment))
        else {
            return true;
        };
        let request = DetachRequest { volume_id, attachment };
        let answer = self.mds.call("detach", |mut mds| async move { mds.detach(request).await });
        match answer.await {
            Ok(_) => {
                *self.known.borrow_mut() = None;
                if let Some(Err(error)) = self.state.as_ref().map(StateFile::forget) {
                    warn!("{}", in_one_line(&error));
                }
                true
            }
            Err(refusal) => {
                warn!("{}: not detached: {}", self.options.volume, refusal.message);
                false
            }
        }
    }
}
