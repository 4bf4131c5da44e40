//! Answers in: matched by their number, checked, and either the end of an operation or the start of a retry.

use std::time::Duration;

use bytes::Bytes;
use evolute_protocol::id::CopysetId;
use evolute_protocol::wire::frame::Frame;
use evolute_protocol::wire::reply::{Freshness, Refusal, Reply, data_is_intact};
use evolute_protocol::wire::request::Request as WireRequest;

use super::Volume;
use super::inflight::{Key, Purpose};
use super::retry::{Move, Standing, Trouble, next_move};
use super::routing::{Fencing, Route, RouteIndex};
use crate::connections::{Lost, Mail, PeerIndex};

/// A good answer, how much its sender knew, and how much of that it can have shown.
struct Answer {
    fresh: Freshness,
    shown: u64,
    data: Bytes,
}

impl Volume {
    /// Takes in whatever has come from all chunkservers.
    pub(super) fn receive(&mut self) {
        let mut mail = std::mem::take(&mut self.mail);
        self.peers.take_mail(&mut mail);
        for mail in mail.drain(..) {
            match mail {
                Mail::Answer { from, frame } => {
                    self.peers[from].heard(self.now);
                    if let Err(why) = self.answered(from, &frame) {
                        self.peers[from].give_up(why);
                    }
                }
                Mail::Lost { of, misled } => self.peer_lost(of, misled),
            }
        }
        self.mail = mail;
    }

    fn answered(&mut self, peer: PeerIndex, frame: &Frame) -> Result<(), Lost> {
        let reply = Reply::decode(frame)?;
        let (key, follower) = Key::from_request_id(frame.request);
        let Some(operation) = self.operations.get(key) else {
            if !follower {
                self.answered_in_vain(peer, frame.copyset, &reply);
            }
            return Ok(());
        };
        let Some(index) = operation.route else { return Err(Lost::WrongAnswer) };
        if frame.copyset != self.routing[index].copyset {
            return Err(Lost::WrongAnswer);
        }
        if follower {
            return self.follower_answered(key, peer, reply);
        }
        if operation.was_asked(peer).is_none() {
            return Ok(());
        }
        let answer = match (reply, &operation.request) {
            (Reply::Refused(refusal), _) => Err(Trouble::Refused(refusal)),
            (Reply::Data { fresh, shown, checksums, data }, WireRequest::Read(read)) => {
                let data = data.into_iter().next().unwrap_or_default();
                if !data_is_intact(read.range.offset(), read.range.length(), &data, &checksums) {
                    Err(Trouble::DamagedOnTheWay)
                } else if !Route::is_fresh(fresh, operation.floor) {
                    Err(Trouble::Stale)
                } else {
                    Ok(Answer { fresh, shown, data })
                }
            }
            (Reply::Data { .. } | Reply::Info { .. } | Reply::Digests { .. }, _)
            | (
                Reply::Done(_),
                WireRequest::Read(_)
                | WireRequest::ReadAtLeast(_)
                | WireRequest::Digests(_)
                | WireRequest::Doubt(_)
                | WireRequest::ChunkInfo(_)
                | WireRequest::TakeOver(_),
            ) => {
                return Err(Lost::WrongAnswer);
            }
            (Reply::Done(fresh), _) => Ok(Answer { fresh, shown: fresh.index, data: Bytes::new() }),
        };
        match answer {
            Ok(answer) => self.succeeded(key, index, peer, answer),
            Err(trouble) => self.failed(key, peer, trouble),
        }
        Ok(())
    }

    /// Nobody waits for this any more: somebody else's answer came first, or the request was given up. That its sender
    /// leads is worth knowing all the same: where followers are always quicker, no leader would ever be found.
    fn answered_in_vain(&mut self, peer: PeerIndex, copyset: CopysetId, reply: &Reply) {
        let (Reply::Done(fresh) | Reply::Data { fresh, .. }) = reply else { return };
        let Some(index) = self.routing.find(copyset) else { return };
        let route = &mut self.routing[index];
        if !route.confirmed && route.replicas.contains(&peer) && route.answered(peer, *fresh) {
            self.leader_found(index);
            self.resumed(index);
        }
    }

    fn succeeded(&mut self, key: Key, index: RouteIndex, peer: PeerIndex, answer: Answer) {
        let Some(operation) = self.operations.get(key) else { return };
        let is_fence = operation.purpose == Purpose::Fence;
        if let Some((chunk, range)) = operation.changes() {
            self.routing[index].recent.changed(chunk, range, answer.fresh.index);
        } else if is_fence {
            self.routing[index].recent.fenced(answer.fresh.index);
        } else if let Some(at) = operation.was_asked(peer) {
            self.pace.note(peer, self.now.saturating_duration_since(at));
        }
        let route = &mut self.routing[index];
        route.show(Freshness { index: answer.shown, ..answer.fresh });
        let found = route.answered(peer, answer.fresh);
        if !is_fence {
            self.routing[index].setbacks = 0;
        }
        self.end_operation(key, Ok(answer.data));
        if is_fence {
            self.routing[index].fencing = Fencing::Done;
            self.serve_if_fenced();
        }
        if found {
            self.leader_found(index);
        }
        self.resumed(index);
    }

    /// One sending of an operation came to nothing: decide, and do it.
    pub(super) fn failed(&mut self, key: Key, peer: PeerIndex, trouble: Trouble) {
        let Some(operation) = self.operations.get_mut(key) else { return };
        let Some(index) = operation.route else { return };
        operation.forget(peer);
        let failures = operation.failures;
        let is_fence = operation.purpose == Purpose::Fence;
        let jitter = self.jitter.next();
        let next = next_move(trouble, &self.standing(key, index, peer, trouble, failures, jitter));
        let from_target = self.routing[index].target == peer;
        if let Trouble::Refused(refusal) = trouble {
            self.note_refusal(index, peer, refusal);
        }
        match trouble {
            Trouble::Stale => self.counters.stale_reads += 1,
            Trouble::DamagedOnTheWay | Trouble::Refused(Refusal::Damaged) => self.counters.damaged += 1,
            Trouble::Refused(Refusal::NotLeader { leader: Some(leader) })
                if self.member(index, leader).is_none() =>
            {
                // Its members changed, or it names itself by an id we never heard of.
                self.want_map();
            }
            Trouble::Refused(Refusal::NotLeader { leader: Some(leader) }) => {
                self.ask_to_take_over(index, peer, leader);
            }
            _ => {}
        }
        match next {
            Move::Follow(leader) => {
                if let Some(leader) = self.member(index, leader)
                    && from_target
                {
                    self.counters.redirects += 1;
                    self.routing[index].follow(leader, self.now);
                }
                self.park(key);
            }
            Move::Search { after } | Move::SearchWithNewMap { after } => {
                if matches!(next, Move::SearchWithNewMap { .. }) {
                    self.want_map();
                }
                if from_target {
                    self.counters.searches += 1;
                    self.routing[index].search(self.now, after);
                }
                self.park(key);
            }
            Move::AskAnother => self.ask_another(index, key),
            Move::Pause { .. } if !from_target => self.park(key),
            Move::Pause { after } => self.wait_with_all(index, key, after),
            Move::Fence { after } => {
                if self.routing[index].fencing == Fencing::Done {
                    self.routing[index].fencing = Fencing::Needed;
                    self.fence(index);
                }
                self.wait_with_all(index, key, after);
            }
            Move::Again { after } => {
                if let Some(operation) = self.operations.get_mut(key) {
                    operation.failures += 1;
                }
                if after.is_zero() {
                    self.park(key);
                } else {
                    // It stands back; whoever is next may go ahead meanwhile.
                    if self.routing[index].probe == Some(key) {
                        self.routing[index].probe = None;
                    }
                    self.delayed.push((self.now + after, key));
                }
            }
            // A fence needs no room worth speaking of, and without it nothing ever goes on here.
            Move::Fail(_) if is_fence => self.wait_with_all(index, key, Duration::from_millis(100)),
            Move::Fail(failure) => self.fail_and_tell(key, failure),
            Move::Stop { current } => self.fenced_out(current),
        }
    }

    fn standing(
        &self,
        key: Key,
        index: RouteIndex,
        peer: PeerIndex,
        trouble: Trouble,
        failures: u32,
        jitter: u32,
    ) -> Standing {
        let route = &self.routing[index];
        let hint_is_self = matches!(trouble, Trouble::Refused(Refusal::NotLeader { leader: Some(leader) })
            if leader == self.peers[peer].id);
        let hint_usable = match trouble {
            Trouble::Refused(Refusal::NotLeader { leader: Some(leader) }) => self
                .member(index, leader)
                .is_some_and(|leader| leader != peer && self.may_answer(leader, key)),
            _ => false,
        };
        Standing {
            epoch: self.attachment.as_ref().map(|attachment| attachment.epoch).unwrap_or_default(),
            searching: route.searching(self.now),
            redirects: route.redirects,
            hint_usable,
            hint_is_self,
            setbacks: route.setbacks,
            failures,
            jitter,
        }
    }

    /// One that was asked this very thing, or says nothing to anything, is waited for already: others are to be asked
    /// meanwhile whether somebody else leads by now.
    fn may_answer(&self, leader: PeerIndex, key: Key) -> bool {
        let peer = &self.peers[leader];
        !self.waits_at(key, leader) && !peer.is_doubtful(self.now) && !peer.is_mute(self.now)
    }

    fn member(
        &self,
        index: RouteIndex,
        chunkserver: evolute_protocol::id::ChunkserverId,
    ) -> Option<PeerIndex> {
        self.peers.find(chunkserver).filter(|peer| self.routing[index].replicas.contains(peer))
    }

    /// The whole copyset asked for patience; the first to hear of it sets the time.
    fn wait_with_all(&mut self, index: RouteIndex, key: Key, after: Duration) {
        let route = &mut self.routing[index];
        if route.paused_until.is_none() {
            route.setbacks = route.setbacks.saturating_add(1);
            route.pause(self.now, after);
        }
        self.park(key);
    }

    /// Keeps an operation until its route knows where to. One that still waits for an answer elsewhere, and the one
    /// that goes ahead, are kept already. A read does not wait for a leader that is away if a follower can answer it.
    pub(super) fn park(&mut self, key: Key) {
        let Some(operation) = self.operations.get(key) else { return };
        let Some(index) = operation.route else { return };
        let waits_elsewhere = !operation.asked.is_empty();
        if waits_elsewhere || self.routing[index].probe == Some(key) || operation.purpose == Purpose::Fence {
            return;
        }
        let asked = self.leader_is_away(index) && self.ask_follower(key);
        if !asked {
            self.look_soon();
        }
        // Somebody must go on looking for the leader.
        let route = &mut self.routing[index];
        let looks = route.confirmed || route.probe.is_some() || !route.parked.is_empty();
        if (!asked || !looks) && !route.parked.contains(&key) {
            route.parked.push_back(key);
        }
    }

    /// Nothing that was asked of `peer` will be answered.
    pub(super) fn unanswered_by(&mut self, peer: PeerIndex) {
        let asked: Vec<Key> = self
            .operations
            .iter_mut()
            .filter(|(_, operation)| operation.was_asked(peer).is_some())
            .map(|(key, _)| key)
            .collect();
        for key in asked {
            self.failed(key, peer, Trouble::ConnectionLost);
        }
        let asked_as_follower: Vec<Key> = self
            .operations
            .iter_mut()
            .filter_map(|(key, operation)| operation.take_follower(peer).map(|_| key))
            .collect();
        asked_as_follower.into_iter().for_each(|key| self.follower_failed(key));
        // Routes that had nothing out there must not go on to believe in it.
        for index in self.routing.indices() {
            let route = &mut self.routing[index];
            if route.target == peer && route.confirmed {
                route.search(self.now, Duration::ZERO);
            }
        }
    }
}
