//! Who may come in: the connections of one port, when there are fewer places than callers.
//!
//! ```text
//!  accept ─▶ unknown ──says who it is──▶ caller, or peer ──is of use──▶ last to be shown out
//! ```
//!
//! What always holds: places are computed from the descriptors that this process may have ([`Places`]), so that files
//! find theirs; whoever comes is let in, and when there is no place somebody is shown out for it: of the unknown the
//! one that has waited longest, of the address with most of them; of others one that was of no use yet, then one that
//! has not been lately. Unknown ones, callers and peers never take each other's places.
//!
//! It does not know what a caller says.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use tokio::sync::Notify;

/// How long a usefulness is remembered while places are short.
const LATELY: Duration = Duration::from_secs(10);
/// Between attempts to accept while nothing is there to accept with.
const PAUSE: Duration = Duration::from_millis(200);

/// Descriptors that this process may have.
pub fn descriptors() -> usize {
    getrlimit(Resource::Nofile)
        .current
        .map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

/// Refuses to start a program that could not work with what it may open.
pub fn enough_descriptors(needed: usize) -> anyhow::Result<()> {
    let limit = descriptors();
    anyhow::ensure!(
        limit >= needed,
        "the limit of open files (RLIMIT_NOFILE) is {limit}, and this program needs {needed} at least: raise it \
         (ulimit -n, or LimitNOFILE= of its unit)"
    );
    Ok(())
}

/// The same for memory that may be mapped (`ulimit -v`): threads that do not start would end the process without a word.
pub fn enough_address_space(needed: u64) -> anyhow::Result<()> {
    if let Some(limit) = getrlimit(Resource::As).current {
        anyhow::ensure!(
            limit >= needed,
            "the limit of address space (RLIMIT_AS) is {} MiB, and this program needs {} MiB at least: raise it \
             (ulimit -v, or LimitAS= of its unit)",
            limit >> 20,
            needed >> 20
        );
    }
    Ok(())
}

/// Nothing to open or accept with just now: no matter of whatever was to be opened, and it passes.
pub fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS))
}

/// How many connections of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// They have not said who they are.
    pub unknown: usize,
    pub callers: usize,
    pub peers: usize,
}

impl Places {
    /// A third of `descriptors`, `most` at most; the rest is for files.
    pub fn of(descriptors: usize, most: usize) -> Self {
        let all = (descriptors / 3).min(most);
        let unknown = (all / 4).clamp(2, 256);
        let peers = (all / 4).clamp(4, 512);
        Self { unknown, peers, callers: all.saturating_sub(unknown + peers).max(4) }
    }
}

/// Of one port.
#[derive(Debug, Clone)]
pub struct Door(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    places: Places,
    /// What all may hold that have sent half of something.
    unfinished_max: u64,
    unfinished: AtomicU64,
    made: Instant,
    seated: Mutex<Seated>,
}

#[derive(Debug)]
struct Seated {
    seats: BTreeMap<u64, Arc<Sitter>>,
    next: u64,
    counts: [usize; 3],
    /// Since when usefulness counts as late.
    since: Instant,
    shown_out: u64,
    /// When that was last logged, and how many it had been.
    told: Option<(Instant, u64)>,
}

/// What a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Unknown = 0,
    Caller = 1,
    Peer = 2,
}

#[derive(Debug)]
struct Sitter {
    from: Option<IpAddr>,
    kind: AtomicU8,
    /// 0: never of use, 1: once, 2: lately.
    use_: AtomicU8,
    unfinished: AtomicU64,
    /// When that began, in milliseconds of the door.
    unfinished_since: AtomicU64,
    leave: Notify,
    /// Out already: it counts no more.
    out: AtomicU8,
}

/// A place, while its connection lives.
#[derive(Debug, Clone)]
pub struct Seat(Arc<Held>);

#[derive(Debug)]
struct Held {
    door: Arc<Inner>,
    number: u64,
    sitter: Arc<Sitter>,
}

impl Door {
    /// `unfinished_max`: bytes of messages that have not arrived whole, for all connections together.
    pub fn new(places: Places, unfinished_max: u64) -> Self {
        let seated = Seated {
            seats: BTreeMap::new(),
            next: 0,
            counts: [0; 3],
            since: Instant::now(),
            shown_out: 0,
            told: None,
        };
        let seated = Mutex::new(seated);
        Self(Arc::new(Inner {
            places,
            unfinished_max,
            unfinished: AtomicU64::new(0),
            made: Instant::now(),
            seated,
        }))
    }

    /// A place for somebody unknown.
    pub fn enter(&self, from: Option<IpAddr>) -> Seat {
        let sitter = Arc::new(Sitter {
            from,
            kind: AtomicU8::new(Kind::Unknown as u8),
            use_: AtomicU8::new(0),
            unfinished: AtomicU64::new(0),
            unfinished_since: AtomicU64::new(0),
            leave: Notify::new(),
            out: AtomicU8::new(0),
        });
        let mut seated = self.0.lock();
        self.0.make_room(&mut seated, Kind::Unknown);
        let number = seated.next;
        seated.next += 1;
        seated.counts[Kind::Unknown as usize] += 1;
        seated.seats.insert(number, Arc::clone(&sitter));
        drop(seated);
        Seat(Arc::new(Held { door: Arc::clone(&self.0), number, sitter }))
    }

    /// Connections of each kind that have a place.
    pub fn seated(&self) -> Places {
        let [unknown, callers, peers] = self.0.lock().counts;
        Places { unknown, callers, peers }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Seated> {
        self.seated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make_room(&self, seated: &mut Seated, kind: Kind) {
        let most = match kind {
            Kind::Unknown => self.places.unknown,
            Kind::Caller => self.places.callers,
            Kind::Peer => self.places.peers,
        };
        while seated.counts[kind as usize] >= most {
            let victim = match kind {
                Kind::Unknown => seated.unknown_victim(),
                Kind::Caller | Kind::Peer => seated.useless_victim(kind),
            };
            let Some(victim) = victim else { return };
            self.show_out(seated, victim);
        }
    }

    fn show_out(&self, seated: &mut Seated, number: u64) {
        let Some(sitter) = seated.remove(number) else { return };
        self.finished(&sitter);
        sitter.leave.notify_one();
        seated.shown_out += 1;
        let now = Instant::now();
        let (told, before) = seated.told.map_or((None, 0), |(at, count)| (Some(at), count));
        if told.is_none_or(|at| now.duration_since(at) >= Duration::from_secs(60)) {
            let count = seated.shown_out - before;
            seated.told = Some((now, seated.shown_out));
            tracing::warn!(
                shown_out = count,
                from = ?sitter.from,
                places = ?self.places,
                "more connections than places: those of least use are closed"
            );
        }
    }

    fn finished(&self, sitter: &Sitter) {
        let bytes = sitter.unfinished.swap(0, Ordering::Relaxed);
        self.unfinished.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Sitter {
    fn is(&self, kind: Kind) -> bool {
        self.kind.load(Ordering::Relaxed) == kind as u8
    }
}

impl Seated {
    fn remove(&mut self, number: u64) -> Option<Arc<Sitter>> {
        let sitter = self.seats.remove(&number)?;
        self.counts[usize::from(sitter.kind.load(Ordering::Relaxed))] -= 1;
        sitter.out.store(1, Ordering::Relaxed);
        Some(sitter)
    }

    fn unknown_victim(&self) -> Option<u64> {
        let mut by_address: HashMap<Option<IpAddr>, (usize, u64)> = HashMap::new();
        for (number, sitter) in self.seats.iter().filter(|(_, sitter)| sitter.is(Kind::Unknown)) {
            by_address.entry(sitter.from).or_insert((0, *number)).0 += 1;
        }
        by_address.into_values().max_by_key(|(count, _)| *count).map(|(_, oldest)| oldest)
    }

    fn useless_victim(&mut self, kind: Kind) -> Option<u64> {
        let of_kind = self.seats.iter().filter(|(_, sitter)| sitter.is(kind));
        let victim = of_kind.map(|(number, sitter)| (sitter.use_.load(Ordering::Relaxed), *number)).min();
        if self.since.elapsed() >= LATELY {
            self.since = Instant::now();
            for sitter in self.seats.values() {
                let _ = sitter.use_.compare_exchange(2, 1, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
        victim.map(|(_, number)| number)
    }
}

impl Seat {
    /// It has said who it is, so that it takes a place of that kind. Once shown out it stays so.
    pub fn is_a(&self, kind: Kind) {
        let Held { door, sitter, .. } = &*self.0;
        if sitter.is(kind) {
            return;
        }
        let mut seated = door.lock();
        if sitter.out.load(Ordering::Relaxed) == 1 {
            return;
        }
        door.make_room(&mut seated, kind);
        let before = sitter.kind.swap(kind as u8, Ordering::Relaxed);
        seated.counts[usize::from(before)] -= 1;
        seated.counts[kind as usize] += 1;
    }

    pub fn kind(&self) -> Kind {
        match self.0.sitter.kind.load(Ordering::Relaxed) {
            0 => Kind::Unknown,
            1 => Kind::Caller,
            _ => Kind::Peer,
        }
    }

    /// It was of use just now. Costs next to nothing.
    pub fn of_use(&self) {
        self.0.sitter.use_.store(2, Ordering::Relaxed);
    }

    /// Bytes that it has sent of something that is not whole. When all hold too much, whoever has been at it for longest
    /// leaves.
    pub fn unfinished(&self, bytes: u64) {
        let Held { door, sitter, .. } = &*self.0;
        let before = sitter.unfinished.swap(bytes, Ordering::Relaxed);
        if before == bytes {
            return;
        }
        if before == 0 {
            let ms = u64::try_from(door.made.elapsed().as_millis()).unwrap_or(u64::MAX);
            sitter.unfinished_since.store(ms, Ordering::Relaxed);
        }
        let more = bytes.wrapping_sub(before);
        let all = door.unfinished.fetch_add(more, Ordering::Relaxed).wrapping_add(more);
        if bytes > before && all > door.unfinished_max {
            let mut seated = door.lock();
            let unfinished = seated.seats.iter().filter(|(_, it)| it.unfinished.load(Ordering::Relaxed) > 0);
            let longest = unfinished.min_by_key(|(_, it)| it.unfinished_since.load(Ordering::Relaxed));
            if let Some(number) = longest.map(|(number, _)| *number) {
                door.show_out(&mut seated, number);
            }
        }
    }

    /// More of it.
    pub fn more_unfinished(&self, bytes: u64) {
        self.unfinished(self.0.sitter.unfinished.load(Ordering::Relaxed) + bytes);
    }

    /// Waits until it has to leave: shown out, or unknown still after `patience`. Cancel-safe; for one at a time.
    pub fn has_to_leave(&self, patience: Duration) -> impl Future<Output = ()> + Send + use<> {
        let held = Arc::clone(&self.0);
        async move {
            let shown_out = held.sitter.leave.notified();
            let mut shown_out: Pin<Box<_>> = Box::pin(shown_out);
            if tokio::time::timeout(patience, &mut shown_out).await.is_err() && !held.sitter.is(Kind::Unknown)
            {
                shown_out.await;
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.door.lock().remove(self.number);
        self.door.finished(&self.sitter);
    }
}

/// An accept loop's way through a time without descriptors: it pauses, and says so once.
#[derive(Debug, Default)]
pub struct Shortage {
    since: Option<Instant>,
}

impl Shortage {
    /// Accepting failed: how long to wait before the next attempt.
    pub fn failed(&mut self, error: &io::Error) -> Duration {
        if self.since.is_none() {
            self.since = Some(Instant::now());
            tracing::warn!(%error, "cannot accept connections; those that are there are served on");
        }
        PAUSE
    }

    /// It works again.
    pub fn over(&mut self) {
        if let Some(since) = self.since.take() {
            tracing::info!(after_ms = since.elapsed().as_millis(), "connections are accepted again");
        }
    }
}

/// Opens a file, and waits while there is nothing to open it with: that says nothing of the file or its disk.
///
/// After `OPEN_PATIENCE` it gives up: then this process is better started anew.
pub fn open<T>(mut open: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let begun = Instant::now();
    let mut told = false;
    loop {
        match open() {
            Err(error) if is_shortage(&error) && begun.elapsed() < OPEN_PATIENCE => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "a file cannot be opened just now; waiting");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            done => return done,
        }
    }
}

const OPEN_PATIENCE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::net::{IpAddr, Ipv4Addr};
    use std::pin::pin;
    use std::task::{Context, Waker};
    use std::time::Duration;

    use super::{Door, Kind, Places, Seat};

    const PLACES: Places = Places { unknown: 4, callers: 4, peers: 2 };
    const PATIENCE: Duration = Duration::from_secs(3600);

    fn from(last: u8) -> Option<IpAddr> {
        Some(IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)))
    }

    fn leaves(seat: &Seat) -> bool {
        let future = pin!(seat.has_to_leave(PATIENCE));
        future.poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[tokio::test]
    async fn whoever_comes_finds_a_place_and_the_address_with_most_loses_one() {
        let door = Door::new(PLACES, u64::MAX);
        let quiet = door.enter(from(1));
        let flood: Vec<_> = (0..50).map(|_| door.enter(from(2))).collect();
        assert!(!leaves(&quiet), "one address does not lock out another");
        assert_eq!(door.seated().unknown, PLACES.unknown);
        assert_eq!(flood.iter().filter(|seat| !leaves(seat)).count(), PLACES.unknown - 1);
    }

    #[tokio::test]
    async fn who_is_of_use_stays_and_peers_have_places_of_their_own() {
        let door = Door::new(PLACES, u64::MAX);
        let serves = door.enter(from(1));
        serves.is_a(Kind::Caller);
        serves.of_use();
        let peer = door.enter(from(1));
        peer.is_a(Kind::Peer);
        let idle: Vec<_> = (0..100)
            .map(|_| {
                let seat = door.enter(from(1));
                seat.is_a(Kind::Caller);
                seat
            })
            .collect();
        assert!(!leaves(&serves) && !leaves(&peer));
        assert!(!leaves(idle.last().expect("many")), "the newest is let in");
        assert_eq!(door.seated(), Places { unknown: 0, callers: 4, peers: 1 });
        drop((serves, peer, idle));
        assert_eq!(door.seated(), Places { unknown: 0, callers: 0, peers: 0 });
    }

    #[tokio::test]
    async fn when_halves_of_messages_are_too_many_the_oldest_leaves() {
        let door = Door::new(PLACES, 100);
        let seats: Vec<_> = (0..3).map(|n| door.enter(from(n))).collect();
        seats[1].unfinished(60);
        std::thread::sleep(Duration::from_millis(5));
        seats[0].unfinished(30);
        assert!(seats.iter().all(|seat| !leaves(seat)));
        std::thread::sleep(Duration::from_millis(5));
        seats[2].unfinished(20);
        assert!(leaves(&seats[1]) && !leaves(&seats[0]) && !leaves(&seats[2]));
        seats[0].unfinished(0);
        seats[2].unfinished(90);
        assert!(!leaves(&seats[2]));
    }

    #[test]
    fn who_finds_no_descriptor_for_a_file_waits_and_other_failures_are_told_at_once() {
        let mut codes = vec![libc::EIO, libc::ENOMEM, libc::ENFILE, libc::EMFILE];
        let mut tries = 0;
        let opened = super::open(|| -> std::io::Result<()> {
            tries += 1;
            Err(std::io::Error::from_raw_os_error(codes.pop().expect("not asked again after the last")))
        });
        assert_eq!((opened.expect_err("it fails").raw_os_error(), tries), (Some(libc::EIO), 4));
    }

    #[test]
    fn there_is_a_place_for_everybody_with_few_descriptors_and_files_have_more() {
        for descriptors in [96, 256, 1024, 20_000, 1 << 20] {
            let places = Places::of(descriptors, 4608);
            let all = places.unknown + places.callers + places.peers;
            assert!(
                places.callers >= 4 && places.peers >= 4 && places.unknown >= 2 && all <= descriptors / 3
            );
        }
    }
}
