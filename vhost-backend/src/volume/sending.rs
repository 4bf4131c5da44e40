//! Operations out: to the leader at once where it is known, parked where it is not, one probe ahead while we search.

use std::time::{Duration, Instant};

use evolute_protocol::wire::reply::Freshness;
use evolute_protocol::wire::request::{Fence, Request as WireRequest, TakeOver};
use smallvec::SmallVec;

use super::inflight::{Asked, AskedAs, Key, Operation, Purpose};
use super::routing::{Fencing, RouteIndex};
use super::{Stage, Volume};
use crate::connections::{PeerIndex, Readiness};

/// After this many times `silence`, one that said nothing is asked a second time: it may have lost the question with
/// its leadership, and got that back.
const SILENCES_TO_REPEAT: u32 = 5;

/// A leader that was not reached for this long, although its followers hear it, is cut off from us alone. Some 0.5 s of
/// silence went before; with an election by silence (1 s) under way, asking is in vain and costs nobody anything.
const TAKE_OVER_AFTER: Duration = Duration::from_millis(500);

/// Where a route's next frame may go.
enum Reach {
    Open(PeerIndex),
    /// Being connected; its event will bring us back.
    Soon,
    /// No replica can be tried before then.
    Nobody(Instant),
}

impl Volume {
    /// An operation whose route is known: out, or parked.
    pub(super) fn dispatch(&mut self, key: Key) {
        let Some(index) = self.operations.get(key).and_then(|operation| operation.route) else { return };
        let route = &self.routing[index];
        let target = route.target;
        if !route.is_clear() || !self.peers[target].is_open() {
            self.park(key);
        } else if !self.peers[target].is_mute(self.now) || !self.ask_follower(key) {
            self.send(key, target);
        }
    }

    /// Puts an operation out to a chunkserver, with the floor as it is now.
    fn send(&mut self, key: Key, to: PeerIndex) {
        let Some(operation) = self.operations.get_mut(key) else { return };
        let Some(route) = operation.route else { return };
        self.counters.retries += u64::from(operation.sent);
        operation.sent = true;
        operation.set_floor(self.sequences.floor());
        operation.forget(to);
        operation.asked.push(Asked { peer: to, at: self.now, how: AskedAs::Leader });
        let reads = matches!(operation.request, WireRequest::Read(_));
        let copyset = self.routing[route].copyset;
        self.peers.put(to, &operation.request, copyset, key.to_request_id(), self.now);
        self.counters.sent += 1;
        if reads {
            self.read_sent();
        }
    }

    /// Makes the fence of a copyset; it goes before everything else there.
    pub(super) fn fence(&mut self, index: RouteIndex) {
        let Some(attachment) = &self.attachment else { return };
        let fence = Fence { volume: attachment.volume, epoch: attachment.epoch };
        let key = self.operations.insert(Operation {
            request: WireRequest::Fence(fence),
            route: Some(index),
            purpose: Purpose::Fence,
            floor: Freshness::default(),
            asked: SmallVec::new(),
            followers_tried: 0,
            rounds: 0,
            follower_asked: None,
            sent: false,
            since: self.now,
            failures: 0,
        });
        self.routing[index].fencing = Fencing::Asked(key);
        self.counters.fences += 1;
    }

    /// Sends what can be sent of what is parked.
    pub(super) fn pump(&mut self) {
        if matches!(self.stage, Stage::Attaching | Stage::Stopped) {
            return;
        }
        for index in self.routing.indices() {
            let route = &mut self.routing[index];
            if route.paused_until.is_some_and(|until| until <= self.now) {
                route.paused_until = None;
            }
            let idle = route.parked.is_empty() && route.probe.is_none() && route.fencing == Fencing::Done;
            if !idle && route.paused_until.is_none() {
                self.pump_route(index);
            }
        }
    }

    fn pump_route(&mut self, index: RouteIndex) {
        let Some(ahead) = self.goes_ahead(index) else {
            if self.routing[index].confirmed {
                self.send_parked(index);
            }
            return;
        };
        let target = match self.reach(index, ahead) {
            Reach::Open(target) => target,
            Reach::Soon => return,
            Reach::Nobody(until) => {
                let wait = until.saturating_duration_since(self.now).max(Duration::from_millis(1));
                self.routing[index].pause(self.now, wait);
                return;
            }
        };
        if !self.waits_at(ahead, target) {
            self.send(ahead, target);
        }
    }

    /// It was asked this very thing, not long ago, and may yet answer.
    pub(super) fn waits_at(&self, key: Key, peer: PeerIndex) -> bool {
        let repeat = self.options.silence * SILENCES_TO_REPEAT;
        let asked = self.operations.get(key).and_then(|operation| operation.was_asked(peer));
        asked.is_some_and(|at| self.now.saturating_duration_since(at) < repeat)
    }

    /// The one operation a route may send now: its fence, or the probe of a search. `None`: no such limit, or nothing
    /// to send.
    fn goes_ahead(&mut self, index: RouteIndex) -> Option<Key> {
        let route = &mut self.routing[index];
        if let Fencing::Asked(fence) = route.fencing {
            return Some(fence);
        }
        if route.confirmed && self.peers[route.target].is_open() {
            return None;
        }
        if route.probe.is_none_or(|key| self.operations.get(key).is_none()) {
            route.probe = None;
            while let Some(key) = route.parked.pop_front() {
                if self.operations.get(key).is_some() {
                    route.probe = Some(key);
                    break;
                }
            }
        }
        route.probe
    }

    fn send_parked(&mut self, index: RouteIndex) {
        let target = self.routing[index].target;
        while let Some(key) = self.routing[index].parked.pop_front() {
            // It may have been parked twice: as itself, and when a follower did not answer it.
            let asked = self.operations.get(key).and_then(|operation| operation.was_asked(target));
            if asked.is_none() {
                self.send(key, target);
            }
        }
    }

    /// The target if it can be talked to, says something and was not asked by `ahead`, or was named as the leader; else
    /// another replica that can, or may be tried.
    fn reach(&mut self, index: RouteIndex, ahead: Key) -> Reach {
        let jitter = self.jitter.next();
        let waits_at: SmallVec<[PeerIndex; 3]> =
            self.routing[index].replicas.iter().copied().filter(|peer| self.waits_at(ahead, *peer)).collect();
        let route = &mut self.routing[index];
        let (mut earliest, mut soon, mut mute) = (None, false, None);
        for _ in 0..route.replicas.len().max(1) {
            let peer = &self.peers[route.target];
            match peer.want(self.now, jitter) {
                Readiness::Open
                    if !route.hinted && (peer.is_mute(self.now) || waits_at.contains(&route.target)) =>
                {
                    mute = mute.or(Some(route.target))
                }
                Readiness::Open => return Reach::Open(route.target),
                Readiness::Soon if !peer.is_doubtful(self.now) => return Reach::Soon,
                Readiness::Soon => soon = true,
                Readiness::Down(until) => {
                    earliest = Some(earliest.map_or(until, |earliest: Instant| earliest.min(until)));
                }
            }
            let next = route.next_replica();
            route.hinted = false;
            route.retarget(next, self.now);
        }
        if let Some(mute) = mute {
            route.retarget(mute, self.now);
            return Reach::Open(mute);
        }
        match earliest {
            Some(until) => Reach::Nobody(until),
            None if soon => Reach::Soon,
            None => Reach::Nobody(self.now),
        }
    }

    /// `follower` follows a leader that we have not reached for long: may it lead itself. The copyset has one client that
    /// does not reach the leader, and nobody else can know.
    pub(super) fn ask_to_take_over(
        &mut self,
        index: RouteIndex,
        follower: PeerIndex,
        leader: evolute_protocol::id::ChunkserverId,
    ) {
        let (Some(leader), Some(attachment)) = (self.peers.find(leader), &self.attachment) else { return };
        let leader = &self.peers[leader];
        let route = &mut self.routing[index];
        // One that is only slow keeps its group: to move it would make it slower.
        let reached = leader.is_open() && leader.silent_for(self.now) < self.options.silence;
        let lately =
            route.take_over_asked.is_some_and(|at| self.now.saturating_duration_since(at) < TAKE_OVER_AFTER);
        if self.stage != Stage::Serving
            || reached
            || lately
            || route.searching(self.now) < TAKE_OVER_AFTER
            || !self.peers[follower].is_open()
        {
            return;
        }
        route.take_over_asked = Some(self.now);
        let ask = TakeOver { volume: attachment.volume, epoch: attachment.epoch };
        let copyset = route.copyset;
        self.peers.put(follower, &WireRequest::TakeOver(ask), copyset, Key::nobody_s_request_id(), self.now);
        self.counters.take_overs_asked += 1;
    }

    /// A route has found its leader: what is parked goes there, and so does what still waits elsewhere.
    pub(super) fn leader_found(&mut self, index: RouteIndex) {
        let leader = self.routing[index].target;
        if let Some(probe) = self.routing[index].probe.take()
            && self.operations.get(probe).is_some_and(|operation| operation.asked.is_empty())
        {
            self.routing[index].parked.push_front(probe);
        }
        let elsewhere: Vec<Key> = self
            .operations
            .iter_mut()
            .filter(|(_, operation)| {
                operation.route == Some(index)
                    && operation.purpose != Purpose::Fence
                    && !operation.asked.is_empty()
                    && operation.was_asked(leader).is_none()
            })
            .map(|(key, _)| key)
            .collect();
        if self.peers[leader].is_open() {
            elsewhere.into_iter().for_each(|key| self.send(key, leader));
        }
    }

    /// A connection is gone, and with it every answer we waited for on it.
    pub(super) fn peer_lost(&mut self, peer: PeerIndex, misled: bool) {
        self.counters.connections_lost += 1;
        self.peers[peer].lost();
        if misled {
            self.want_map();
        }
        self.unanswered_by(peer);
    }
}
