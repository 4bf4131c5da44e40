//! Reads that need not wait for the leader: when it is slow, silent, gone or unknown, another replica answers.
//!
//! ```text
//!  leader known and answering ──▶ Read to the leader … and, when that takes long, one ReadAtLeast elsewhere (paid for)
//!  leader silent or unknown ────▶ ReadAtLeast to the other replicas, one after the other; again after a while, or a leader
//! ```
//!
//! The first good answer ends the read; the other finds nobody. Why no such answer is ever stale is argued in
//! `docs/semantics.md`, section "Reads". What it takes of this side, and what always holds:
//!
//! - The replica must have every acknowledged change to these bytes ([`super::recent`]): applied, or in a log that proves
//!   that it is committed, by the term we name with it.
//! - Of bytes that a change in flight overlaps it must have everything that we were ever shown: whether that change is
//!   visible must not depend on whom the guest's next read happens to reach.
//! - What any replica has shown raises that ([`Route::show`](super::routing::Route::show)), and what a follower has shown
//!   raises what the leader must know.
//! - A follower's word moves no route: it neither makes nor deposes a leader, unless it knows that we are fenced out.

use std::time::Duration;

use evolute_protocol::wire::reply::{Freshness, Refusal, Reply, data_is_intact};
use evolute_protocol::wire::request::{Read, ReadAtLeast, Request as WireRequest};

use super::inflight::{Asked, AskedAs, Key};
use super::recent::overlap;
use super::routing::{Fencing, RouteIndex};
use super::{Stage, Volume};
use crate::connections::{Lost, PeerIndex};

/// How often reads out are looked over for late ones.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How soon followers that could not answer are asked again while no leader does: a busy one applies what it has, or is
/// sent what it lacks, in less. Each time twice as long, up to sixteen times.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(20);
const DOUBLINGS_MAX: u32 = 4;
/// How often lost connections to replicas that lead nothing are made again, so that they are there when needed.
const COMPANY_EVERY: Duration = Duration::from_secs(2);

impl Volume {
    /// The leader of a route is not known, cannot be talked to, or says nothing.
    pub(super) fn leader_is_away(&self, index: RouteIndex) -> bool {
        let route = &self.routing[index];
        let target = &self.peers[route.target];
        !route.confirmed || !target.is_open() || target.is_mute(self.now)
    }

    /// Asks a replica that was not asked yet, whether it leads or not. False: this is not a read, or no replica but the
    /// leader can answer it.
    pub(super) fn ask_follower(&mut self, key: Key) -> bool {
        let Some((index, ask)) = self.question(key) else { return false };
        let Some(to) = self.follower(index, key) else { return false };
        let copyset = self.routing[index].copyset;
        let place = self.routing[index].replicas.iter().position(|peer| *peer == to);
        let Some(operation) = self.operations.get_mut(key) else { return false };
        operation.followers_tried |= 1 << place.unwrap_or_default();
        operation.follower_asked = Some(self.now);
        operation.asked.push(Asked { peer: to, at: self.now, how: AskedAs::Follower { index: ask.index } });
        let id = key.to_follower_request_id();
        self.peers.put(to, &WireRequest::ReadAtLeast(ask), copyset, id, self.now);
        self.counters.sent += 1;
        self.counters.followers_asked += 1;
        true
    }

    /// The same once more, when all have been asked and have said that they cannot answer.
    fn ask_follower_again(&mut self, key: Key) {
        let Some(operation) = self.operations.get_mut(key) else { return };
        let wait = ASK_AGAIN_AFTER * (1 << operation.rounds.min(DOUBLINGS_MAX));
        if operation.follower_asked.is_some_and(|at| self.now.saturating_duration_since(at) < wait) {
            return;
        }
        if std::mem::take(&mut operation.followers_tried) != 0 {
            operation.rounds += 1;
        }
        self.ask_follower(key);
    }

    /// What to ask, if anybody but the leader can answer.
    fn question(&self, key: Key) -> Option<(RouteIndex, ReadAtLeast)> {
        let operation = self.operations.get(key)?;
        let (WireRequest::Read(read), Some(index)) = (&operation.request, operation.route) else {
            return None;
        };
        let route = &self.routing[index];
        if self.stage != Stage::Serving || route.fencing != Fencing::Done {
            return None;
        }
        let Freshness { term, index: shown } = route.shown;
        let changed = route.recent.needed(read.chunk.index, read.range);
        let needed = changed.filter(|_| !self.is_being_changed(read)).unwrap_or(shown);
        // Each acknowledgement was shown to us. So a leader that has the one entry has the other, below it.
        debug_assert!(needed <= shown, "entry {needed} is needed of {}, and {shown} known", route.copyset);
        Some((index, ReadAtLeast { read: *read, index: needed, term }))
    }

    fn is_being_changed(&self, read: &Read) -> bool {
        let bytes = (read.chunk.index, read.range);
        self.operations.iter().any(|operation| operation.changes().is_some_and(|other| overlap(other, bytes)))
    }

    /// One that can be talked to and was not tried; not always the same.
    fn follower(&self, index: RouteIndex, key: Key) -> Option<PeerIndex> {
        let (route, operation) = (&self.routing[index], self.operations.get(key)?);
        let count = route.replicas.len();
        (0..count)
            .map(|step| (step + key.place()) % count)
            .filter(|at| *at < 8 && operation.followers_tried & 1 << at == 0)
            .map(|at| route.replicas[at])
            .find(|peer| {
                let leads = route.confirmed && *peer == route.target;
                let peer = &self.peers[*peer];
                !leads && peer.is_open() && !peer.is_mute(self.now)
            })
    }

    /// A replica answered what was asked of it as a follower.
    pub(super) fn follower_answered(&mut self, key: Key, peer: PeerIndex, reply: Reply) -> Result<(), Lost> {
        let Some(operation) = self.operations.get_mut(key) else { return Ok(()) };
        let (WireRequest::Read(read), Some(index)) = (&operation.request, operation.route) else {
            return Err(Lost::WrongAnswer);
        };
        let (range, ours) = (read.range, read.epoch);
        let Some((at, needed)) = operation.take_follower(peer) else { return Ok(()) };
        match reply {
            Reply::Data { fresh, shown, checksums, data } => {
                let data = data.into_iter().next().unwrap_or_default();
                if !data_is_intact(range.offset(), range.length(), &data, &checksums) {
                    self.counters.damaged += 1;
                } else if fresh.index < needed {
                    self.counters.stale_reads += 1;
                } else {
                    self.counters.followers_answered += 1;
                    self.pace.note(peer, self.now.saturating_duration_since(at));
                    self.routing[index].seen(Freshness { index: shown.max(fresh.index), ..fresh });
                    self.end_operation(key, Ok(data));
                    return Ok(());
                }
            }
            Reply::Refused(Refusal::Fenced { current }) if current > ours => {
                self.fenced_out(current);
                return Ok(());
            }
            // Whatever keeps it from answering, the leader is asked or waited for as if it had not been there.
            Reply::Refused(_) => {}
            Reply::Done(_) | Reply::Info { .. } | Reply::Digests { .. } => return Err(Lost::WrongAnswer),
        }
        self.follower_failed(key);
        Ok(())
    }

    /// A follower will not answer: another may, or the leader, or all wait.
    pub(super) fn follower_failed(&mut self, key: Key) {
        let Some(operation) = self.operations.get(key) else { return };
        let (Some(index), nobody_asked) = (operation.route, operation.asked.is_empty()) else { return };
        if self.leader_is_away(index) && self.ask_follower(key) {
            return;
        }
        if nobody_asked {
            self.park(key);
        }
    }

    /// A read went to its leader: it is looked after.
    pub(super) fn read_sent(&mut self) {
        self.pace.earn();
        self.look_soon();
    }

    /// There is something to look after.
    pub(super) fn look_soon(&mut self) {
        if self.next_look.is_none() {
            self.next_look = Some(self.now + LOOK_EVERY);
        }
    }

    /// Asks elsewhere what the leader has not answered for long: as often as is paid for, or, when there is none or it
    /// says nothing to anybody, all of it, again and again.
    pub(super) fn look_after_reads(&mut self) {
        if self.next_look.is_none_or(|at| at > self.now) {
            return;
        }
        let waiting: Vec<(Key, RouteIndex)> = self
            .operations
            .iter_mut()
            .filter(|(_, operation)| {
                matches!(operation.request, WireRequest::Read(_)) && operation.waits_for_no_follower()
            })
            .filter_map(|(key, operation)| Some((key, operation.route?)))
            .collect();
        self.next_look = (!waiting.is_empty()).then_some(self.now + LOOK_EVERY);
        for (key, index) in waiting {
            let Some(operation) = self.operations.get(key) else { continue };
            let mute = operation.asked.iter().all(|asked| self.peers[asked.peer].is_mute(self.now));
            if self.leader_is_away(index) || (mute && !operation.asked.is_empty()) {
                self.ask_follower_again(key);
            } else if let [Asked { at, .. }] = operation.asked[..]
                && operation.followers_tried == 0
                && self.now.saturating_duration_since(at) >= self.pace.delay(&self.routing[index].replicas)
                && self.pace.can_spend()
                && self.ask_follower(key)
            {
                self.pace.spend();
                self.counters.second_questions += 1;
            }
        }
    }

    /// Gives up leaders that say nothing, of routes on which only reads are under way: those were answered elsewhere, so nobody
    /// is silent who is waited for, and a new leader would never be looked for.
    pub(super) fn leave_mute_leaders(&mut self) {
        let silence = self.options.silence;
        for index in self.routing.indices() {
            let route = &mut self.routing[index];
            if (route.confirmed || route.hinted) && self.peers[route.target].silent_for(self.now) >= silence {
                self.counters.searches += 1;
                route.search(self.now, Duration::ZERO);
            }
        }
    }

    /// Keeps connections to all replicas, leaders or not.
    pub(super) fn keep_company(&mut self) {
        if self.stage != Stage::Serving || self.next_company.is_some_and(|at| at > self.now) {
            return;
        }
        self.next_company = Some(self.now + COMPANY_EVERY);
        let jitter = self.jitter.next();
        for route in self.routing.iter() {
            for peer in &route.replicas {
                // One that cannot be reached is tried again another time.
                let _ = self.peers[*peer].want(self.now, jitter);
            }
        }
    }
}
