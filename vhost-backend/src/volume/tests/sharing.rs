//! Several volumes on one I/O thread: what they share, and what must not pass from one to another.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_protocol::geometry::CHUNK_BYTES;
use evolute_protocol::id::CopysetId;
use mio::{Events, Poll};

use super::cluster::{CLUSTER, Cluster, SERVERS};
use super::pattern;
use super::rig::{EPOCH, HANGS, attachment, data};
use crate::backing::{Backing, Outcome, Request, Ticket};
use crate::connections::{Connections, DISKS_PER_CONNECTION};
use crate::volume::control::{ControlEnd, link};
use crate::volume::{Volume, VolumeOptions};

/// Disks of one loop. Each writes to the chunk of its number, and so to a copyset that no other writes to.
struct Disks {
    poll: Poll,
    connections: Connections,
    disks: Vec<Option<(Volume, ControlEnd)>>,
    /// Those that were given something to do.
    given: HashSet<usize>,
    outcomes: HashMap<(usize, Ticket), Outcome>,
}

impl Disks {
    fn attached(cluster: &Cluster, count: usize) -> Self {
        let poll = Poll::new().expect("epoll");
        let connections = Connections::new(poll.registry()).expect("epoll");
        let (given, outcomes) = (HashSet::new(), HashMap::new());
        let mut disks = Self { poll, connections, disks: Vec::new(), given, outcomes };
        (0..count).for_each(|_| disks.join(cluster));
        disks
    }

    fn join(&mut self, cluster: &Cluster) {
        let (link, control) = link();
        let seat = self.connections.join().expect("room");
        let volume = Volume::without_waker(VolumeOptions::default(), link, seat);
        control.news.send(attachment(cluster, EPOCH, false));
        self.given.insert(self.disks.len());
        self.disks.push(Some((volume, control)));
        self.until("ready", |disks| disks.volumes().all(|(_, volume)| volume.ready()));
    }

    fn volumes(&mut self) -> impl Iterator<Item = (usize, &mut Volume)> {
        let disks = self.disks.iter_mut().enumerate();
        disks.filter_map(|(number, disk)| disk.as_mut().map(|(volume, _)| (number, volume)))
    }

    /// Connections each has lost.
    fn lost(&mut self) -> Vec<u64> {
        self.volumes().map(|(_, volume)| volume.counters().connections_lost).collect()
    }

    /// The same ticket for every disk.
    fn submit_to_all(&mut self, ticket: Ticket, request: impl Fn(usize) -> Request) {
        for number in 0..self.disks.len() {
            self.submit(number, ticket, request(number));
        }
    }

    fn submit(&mut self, number: usize, ticket: Ticket, request: Request) {
        if let Some((volume, _)) = &mut self.disks[number] {
            volume.submit(ticket, request);
            self.given.insert(number);
        }
    }

    /// As on the I/O thread, a disk works when it was called, was given something, or is due.
    fn turn(&mut self) {
        let mut events = Events::with_capacity(64);
        self.poll.poll(&mut events, Some(Duration::from_millis(2))).expect("epoll");
        events.iter().for_each(|event| self.connections.on_event(event));
        let (now, disks, given) = (Instant::now(), &mut self.disks, &mut self.given);
        self.connections.turn(now, |called| {
            for (number, disk) in disks.iter_mut().enumerate() {
                let Some((volume, _)) = disk else { continue };
                let is_called = called.iter().any(|disk| disk.place() == number);
                let is_given = given.remove(&number);
                if is_called || is_given || volume.deadline().is_some_and(|at| at <= now) {
                    volume.settle(now);
                }
            }
        });
        let mut completed = Vec::new();
        for (number, disk) in self.disks.iter_mut().enumerate() {
            let Some((volume, _)) = disk else { continue };
            volume.take_completed(&mut completed);
            for (ticket, outcome) in completed.drain(..) {
                let before = self.outcomes.insert((number, ticket), outcome);
                assert!(before.is_none(), "{ticket:?} of {number} was completed twice");
            }
        }
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < HANGS, "still not {what}");
            self.turn();
        }
    }

    fn answered(
        &mut self,
        tickets: impl Iterator<Item = Ticket> + Clone,
    ) -> HashMap<(usize, Ticket), Outcome> {
        self.until("answered", |disks| {
            let numbers: Vec<usize> = disks.volumes().map(|(number, _)| number).collect();
            let mut all = tickets.clone().flat_map(|ticket| numbers.iter().map(move |n| (*n, ticket)));
            all.all(|request| disks.outcomes.contains_key(&request))
        });
        std::mem::take(&mut self.outcomes)
    }
}

fn offset(disk: usize, n: u64) -> u64 {
    disk as u64 * CHUNK_BYTES + n * 4096
}

fn seed(disk: usize, n: u64) -> u64 {
    disk as u64 * 100 + n
}

fn write(disk: usize, n: u64) -> Request {
    Request::Write { offset: offset(disk, n), data: Bytes::from(pattern(seed(disk, n), 4096)) }
}

fn check_read(outcome: Outcome, disk: usize, n: u64) {
    assert!(data(outcome) == pattern(seed(disk, n), 4096), "disk {disk} read something else at {n}");
}

/// All ask under the same tickets and numbers of their own, and the answers come in another order.
#[test]
fn disks_share_connections_and_each_gets_its_own_answers() {
    let count = DISKS_PER_CONNECTION + 1;
    let cluster = Cluster::start(u32::try_from(count).expect("few"));
    SERVERS.iter().for_each(|server| cluster.state().fault(*server).shuffle = 20);
    let mut disks = Disks::attached(&cluster, count);
    for n in 0..20 {
        disks.submit_to_all(Ticket(n), |disk| write(disk, n));
    }
    assert!(disks.answered((0..20).map(Ticket)).into_values().all(|outcome| outcome == Outcome::Done));
    for n in 0..20 {
        disks.submit_to_all(Ticket(n), |disk| Request::Read { offset: offset(disk, n), len: 4096 });
    }
    for ((disk, ticket), outcome) in disks.answered((0..20).map(Ticket)) {
        check_read(outcome, disk, ticket.0);
    }
    // So many share one; the last is the first of the next.
    assert_eq!(cluster.connections(), 6, "to three chunkservers");
}

#[test]
fn every_disk_hears_of_a_lost_connection_and_goes_on() {
    let cluster = Cluster::start(3);
    let mut disks = Disks::attached(&cluster, 3);
    for round in 0..8 {
        for server in SERVERS {
            let mut state = cluster.state();
            let faults = state.fault(server);
            if round % 2 == 0 { faults.cut_before = 1 } else { faults.cut_after = 1 }
        }
        // Each leads the copyset of one disk, and cuts the connection that carries fences and reads of the others, too.
        for n in 0..10 {
            disks.submit_to_all(Ticket(n), |disk| write(disk, n));
        }
        let done = disks.answered((0..10).map(Ticket));
        assert!(done.into_values().all(|outcome| outcome == Outcome::Done), "round {round}");
    }
    for n in 0..10 {
        disks.submit_to_all(Ticket(n), |disk| Request::Read { offset: offset(disk, n), len: 4096 });
    }
    for ((disk, ticket), outcome) in disks.answered((0..10).map(Ticket)) {
        check_read(outcome, disk, ticket.0);
    }
    let lost = disks.lost();
    assert!(lost[0] >= 16 && lost.iter().all(|count| *count == lost[0]), "{lost:?}");
}

/// Its answers are still on their way when it goes, and the next disk asks under numbers that look the same.
#[test]
fn a_disk_that_left_gets_no_answers_and_disturbs_nobody() {
    let cluster = Cluster::start(3);
    let mut disks = Disks::attached(&cluster, 2);
    disks.submit_to_all(Ticket(0), |disk| write(disk, 0));
    disks.answered([Ticket(0)].into_iter());
    SERVERS.iter().for_each(|server| cluster.state().fault(*server).slow = Duration::from_millis(50));
    disks.submit_to_all(Ticket(1), |disk| Request::Read { offset: offset(disk, 0), len: 4096 });
    disks.turn();
    disks.disks[0] = None;
    disks.join(&cluster);
    disks.submit(2, Ticket(1), Request::Read { offset: offset(2, 0), len: 4096 });
    let mut outcomes = disks.answered([Ticket(1)].into_iter());
    let mut answer = |disk| outcomes.remove(&(disk, Ticket(1))).expect("answered");
    check_read(answer(1), 1, 0);
    assert_eq!(data(answer(2)), [0; 4096]);
    assert_eq!((cluster.connections(), disks.connections.count()), (3, 3));
    assert_eq!(disks.lost(), [0, 0]);
    disks.disks.clear();
    assert_eq!(disks.connections.count(), 0, "those of {CLUSTER:?} that nobody needs end");
}

/// One waits for a copyset that answers nothing. Its leader is as good as ever for the others, also for one that comes
/// only then.
#[test]
fn what_one_disk_waits_for_makes_nobody_mute_for_another() {
    let cluster = Cluster::start(3);
    let mut disks = Disks::attached(&cluster, 2);
    let searches = |disks: &mut Disks| disks.volumes().nth(1).expect("there").1.counters().searches;
    cluster.state().fault(SERVERS[0]).holds.insert(CopysetId(1));
    disks.submit(0, Ticket(0), write(0, 0));
    let silence = VolumeOptions::default().silence;
    let mut tickets = (0..).map(Ticket);
    let mut answered_in = |disks: &mut Disks, request: Request| {
        let (ticket, from) = (tickets.next().expect("endless"), Instant::now());
        disks.submit(1, ticket, request);
        disks.until("answered", |disks| disks.outcomes.contains_key(&(1, ticket)));
        from.elapsed()
    };
    // Long enough to be mute and silent, while the other disk has something to do elsewhere: until that once was answered
    // in time, for a machine that stands still makes anybody silent.
    loop {
        let (before, end) = (searches(&mut disks), Instant::now() + 2 * silence);
        let mut longest = Duration::ZERO;
        while Instant::now() < end {
            longest = longest.max(answered_in(&mut disks, write(1, 0)));
        }
        let of_copyset_1 = Request::Read { offset: 3 * CHUNK_BYTES, len: 4096 };
        longest = longest.max(answered_in(&mut disks, of_copyset_1));
        if longest < silence / 4 {
            assert_eq!(searches(&mut disks), before, "it never left a leader");
            break;
        }
    }
    disks.join(&cluster);
}

/// What makes no sense ends the connection, not the disk it was said to, and those that have nothing to do hear of it.
#[test]
fn nonsense_to_one_disk_ends_the_connection_for_all() {
    let cluster = Cluster::start(3);
    let mut disks = Disks::attached(&cluster, 3);
    cluster.state().fault(SERVERS[0]).nonsense = 1;
    (0..10).for_each(|n| disks.submit(0, Ticket(n), write(0, n)));
    disks.until("lost", |disks| disks.lost()[0] > 0);
    assert_eq!(disks.lost(), [1, 1, 1], "at the same time");
    disks.until("answered", |disks| disks.outcomes.len() == 10);
    assert!(disks.outcomes.values().all(|outcome| *outcome == Outcome::Done));
    assert_eq!(disks.lost(), [1, 1, 1]);
}
