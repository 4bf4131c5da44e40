//! A volume on the test's own thread, its loop turned by hand, the control thread's place taken by the test.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_protocol::epoch::Epoch;
use mio::{Events, Poll};

use super::cluster::{Cluster, VOLUME};
use crate::backing::{Backing, Outcome, Request, Ticket};
use crate::connections::Connections;
use crate::volume::attach::Attachment;
use crate::volume::control::{Ask, ControlEnd, News, link};
use crate::volume::{Stage, Volume, VolumeOptions};

/// Nothing here takes long; what takes this long hangs.
pub const HANGS: Duration = Duration::from_secs(30);
pub const EPOCH: Epoch = Epoch { attachment: 3, incarnation: 0 };

pub struct Rig {
    pub volume: Volume,
    pub control: ControlEnd,
    pub asked: Vec<Ask>,
    connections: Connections,
    poll: Poll,
    events: Events,
    next_ticket: u64,
    pub outcomes: HashMap<Ticket, Outcome>,
}

pub fn attachment(cluster: &Cluster, epoch: Epoch, remembered: bool) -> News {
    let map = cluster.map();
    News::Attached(Box::new(Attachment { volume: VOLUME, size_bytes: 1 << 40, epoch, map, remembered }))
}

/// What a read found.
pub fn data(outcome: Outcome) -> Vec<u8> {
    match outcome {
        Outcome::Data(parts) => parts.concat(),
        other => panic!("a read ended as {other:?}"),
    }
}

impl Rig {
    /// Not attached yet.
    pub fn new(options: VolumeOptions) -> Self {
        let (link, control) = link();
        let poll = Poll::new().expect("epoll");
        let connections = Connections::new(poll.registry()).expect("epoll");
        let volume = Volume::without_waker(options, link, connections.join().expect("the first"));
        let events = Events::with_capacity(64);
        Self {
            volume,
            control,
            asked: Vec::new(),
            connections,
            poll,
            events,
            next_ticket: 0,
            outcomes: HashMap::new(),
        }
    }

    /// Attached to the cluster and ready.
    pub fn attached(cluster: &Cluster, options: VolumeOptions) -> Self {
        let mut rig = Self::new(options);
        rig.attach(cluster, EPOCH, false);
        rig.until("serving", |rig| rig.volume.stage == Stage::Serving);
        rig
    }

    pub fn attach(&mut self, cluster: &Cluster, epoch: Epoch, remembered: bool) {
        self.control.news.send(attachment(cluster, epoch, remembered));
    }

    pub fn submit(&mut self, request: Request) -> Ticket {
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        self.volume.submit(ticket, request);
        ticket
    }

    /// One turn of the loop.
    pub fn turn(&mut self) {
        let due = self.volume.deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let most = Duration::from_millis(2);
        self.poll.poll(&mut self.events, Some(due.map_or(most, |due| due.min(most)))).expect("epoll");
        self.volume.on_wake();
        self.work();
    }

    fn work(&mut self) {
        for event in &self.events {
            self.connections.on_event(event);
        }
        self.events.clear();
        let now = Instant::now();
        self.connections.turn(now, |_| self.volume.settle(now));
        let mut completed = Vec::new();
        self.volume.take_completed(&mut completed);
        for (ticket, outcome) in completed {
            let before = self.outcomes.insert(ticket, outcome);
            assert!(before.is_none(), "{ticket:?} was completed twice");
        }
        while let Ok(ask) = self.control.asks.try_recv() {
            self.asked.push(ask);
        }
    }

    /// Turns as the loop of a process does: it sleeps until an event, or until the time that it set itself. What came of
    /// the control plane is said with [`Rig::tell`].
    pub fn until_by_its_own_clock(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        // What was submitted came with an event.
        self.work();
        while !done(self) {
            assert!(start.elapsed() < HANGS, "still not {what}: {:?}", self.volume);
            let now = Instant::now();
            let unread = self.connections.has_unread().then_some(now);
            let due = [self.volume.deadline(), self.connections.deadline(now), unread];
            let due = due.into_iter().flatten().min();
            let sleep = due.map_or(HANGS, |at| at.saturating_duration_since(now));
            self.poll.poll(&mut self.events, Some(sleep)).expect("epoll");
            self.work();
        }
    }

    /// Says it, and wakes the loop.
    pub fn tell(&mut self, news: News) {
        self.control.news.send(news);
        self.volume.on_wake();
        self.work();
    }

    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < HANGS, "still not {what}: {:?}", self.volume);
            self.turn();
        }
    }

    pub fn turn_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.turn();
        }
    }

    pub fn wait(&mut self, ticket: Ticket) -> Outcome {
        self.until("answered", |rig| rig.outcomes.contains_key(&ticket));
        self.outcomes.remove(&ticket).expect("there")
    }

    pub fn perform(&mut self, request: Request) -> Outcome {
        let ticket = self.submit(request);
        self.wait(ticket)
    }

    pub fn write(&mut self, offset: u64, data: Vec<u8>) -> Outcome {
        self.perform(Request::Write { offset, data: Bytes::from(data) })
    }

    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        data(self.perform(Request::Read { offset, len }))
    }

    /// Segments asked for, in order.
    pub fn segments_asked(&self) -> Vec<u32> {
        let segment = |ask: &Ask| match ask {
            Ask::Segment(segment) => Some(segment.0),
            _ => None,
        };
        self.asked.iter().filter_map(segment).collect()
    }
}
