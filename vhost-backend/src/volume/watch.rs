//! The passing of time: silence, patience, and telling the operator when I/O is held.
//!
//! Operations carry no timers of their own. Now and then, while anything waits (sent or not, routed or not, admitted or
//! not), all of it is looked over at once.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::control::Ask;
use super::inflight::{Key, Purpose};
use super::retry::{Move, Standing, Trouble, next_move};
use super::routing::RouteIndex;
use super::{Stage, Volume};
use crate::backing::{Failure, Outcome};

/// I/O that waited this long is held: an election never takes so long.
const HELD_AFTER: Duration = Duration::from_secs(3);
/// How long a copyset has no leader before a new map might help.
const SEARCH_FOR_MAP: Duration = Duration::from_millis(500);
/// At most one map in this time.
const MAP_EVERY: Duration = Duration::from_secs(2);

impl Volume {
    /// Does what is due.
    pub(super) fn expire(&mut self) {
        if self.stage == Stage::Stopped {
            // There are no peers any more to look at.
            return;
        }
        self.resend_delayed();
        self.look_after_reads();
        if self.next_sweep.is_some_and(|at| at <= self.now) {
            self.next_sweep = None;
            self.sweep();
        }
    }

    /// At the end of every turn, and nowhere else: whatever waits, wherever and for whomever it does, is looked over in a
    /// while. Nobody who makes something wait has to think of it.
    pub(super) fn wind_clock(&mut self) {
        let waits = !self.operations.is_empty() || !self.waiting.is_empty() || !self.requests.is_empty();
        if waits && self.next_sweep.is_none() {
            let every =
                (self.options.silence / 4).clamp(Duration::from_millis(5), Duration::from_millis(250));
            self.next_sweep = Some(self.now + every);
        }
    }

    fn resend_delayed(&mut self) {
        let mut at = 0;
        while at < self.delayed.len() {
            if self.delayed[at].0 <= self.now {
                let (_, key) = self.delayed.swap_remove(at);
                self.park(key);
            } else {
                at += 1;
            }
        }
    }

    /// Looks over everything that is out.
    fn sweep(&mut self) {
        self.give_up_old();
        self.keep_company();
        self.leave_mute_leaders();
        let mut silent: Vec<(RouteIndex, Key, Instant)> = Vec::new();
        let mut oldest: Vec<(RouteIndex, Instant)> = Vec::new();
        let mut oldest_unallocated = None;
        let (now, silence) = (self.now, self.options.silence);
        for (key, operation) in self.operations.iter_mut() {
            let Some(route) = operation.route else {
                oldest_unallocated = earlier(oldest_unallocated, operation.since);
                continue;
            };
            match oldest.iter_mut().find(|(index, _)| *index == route) {
                Some((_, since)) => *since = operation.since.min(*since),
                None => oldest.push((route, operation.since)),
            }
            let last_asked = operation.asked.iter().map(|asked| asked.at).max();
            if last_asked.is_some_and(|at| now.saturating_duration_since(at) >= silence) {
                match silent.iter_mut().find(|(index, ..)| *index == route) {
                    Some((_, oldest, since)) if operation.since < *since => {
                        (*oldest, *since) = (key, operation.since);
                    }
                    Some(_) => {}
                    None => silent.push((route, key, operation.since)),
                }
            }
        }
        for (index, key, _) in silent {
            self.silent(index, key);
        }
        for (index, since) in oldest {
            if now.saturating_duration_since(since) >= HELD_AFTER {
                self.held(index, since);
            }
            if self.routing[index].searching(now) >= SEARCH_FOR_MAP {
                self.want_map();
            }
        }
        if self.stage == Stage::Attaching
            && let Some((.., since)) = self.waiting.front()
            && now.saturating_duration_since(*since) >= HELD_AFTER
            && !std::mem::replace(&mut self.attaching_held, true)
        {
            warn!("I/O is held: the control plane has not attached the volume yet");
        }
        if let Some(since) = oldest_unallocated
            && now.saturating_duration_since(since) >= HELD_AFTER
            && self.segments_held_since.is_none()
        {
            warn!("I/O is held: {} segments wait for the control plane", self.unallocated.len());
            self.segments_held_since = Some(since);
        }
    }

    fn silent(&mut self, index: RouteIndex, key: Key) {
        let standing = Standing {
            epoch: self.attachment.as_ref().map(|attachment| attachment.epoch).unwrap_or_default(),
            searching: self.routing[index].searching(self.now),
            redirects: 0,
            hint_usable: false,
            hint_is_self: false,
            setbacks: 0,
            failures: 0,
            jitter: 0,
        };
        if next_move(Trouble::Silent, &standing) == Move::AskAnother {
            self.ask_another(index, key);
        }
    }

    /// The route's oldest operation goes to the next replica, too; if another leads by now, the others follow.
    pub(super) fn ask_another(&mut self, index: RouteIndex, key: Key) {
        self.counters.asked_another += 1;
        let is_fence = self.operations.get(key).is_some_and(|operation| operation.purpose == Purpose::Fence);
        let route = &mut self.routing[index];
        if let Some(former) = route.probe.take().filter(|former| *former != key) {
            // It waits for an answer like any other, or it was never sent and goes back.
            self.park(former);
        }
        let route = &mut self.routing[index];
        route.search(self.now, Duration::ZERO);
        route.probe = (!is_fence).then_some(key);
    }

    fn held(&mut self, index: RouteIndex, since: Instant) {
        if self.routing[index].held_since.is_some() {
            return;
        }
        let seconds = self.now.saturating_duration_since(since).as_secs_f64();
        let (copyset, target) = (self.name(index), self.peers[self.routing[index].target].id);
        let why = self.why_held(index);
        if self.routing[index].confirmed {
            warn!("I/O is held since {seconds:.1} s: {target} leads {copyset} and does not do it: {why}");
        } else {
            warn!("I/O is held since {seconds:.1} s: nobody serves {copyset}: {why}");
        }
        self.routing[index].held_since = Some(since);
    }

    /// A copyset answers.
    pub(super) fn resumed(&mut self, index: RouteIndex) {
        let Some(route) = self.routing.get_mut(index) else { return };
        route.refusals.clear();
        if let Some(since) = route.held_since.take() {
            let seconds = self.now.saturating_duration_since(since).as_secs_f64();
            let (copyset, target) = (self.name(index), self.peers[self.routing[index].target].id);
            info!("I/O goes on after {seconds:.1} s: {target} leads {copyset}");
        }
    }

    /// With the setting `fail_after`: fails what could not be done for that long.
    fn give_up_old(&mut self) {
        let Some(fail_after) = self.options.fail_after else { return };
        let now = self.now;
        let too_old = |since: Instant| now.saturating_duration_since(since) >= fail_after;
        let old: Vec<Key> = self
            .operations
            .iter_mut()
            .filter(|(_, operation)| operation.purpose != Purpose::Fence && too_old(operation.since))
            .map(|(key, _)| key)
            .collect();
        if !old.is_empty() {
            warn!(
                "{} operations could not be done for {:.1} s and fail",
                old.len(),
                fail_after.as_secs_f64()
            );
        }
        old.into_iter().for_each(|key| self.fail_operation(key, Failure::Io));
        for waiting in self.unallocated.values_mut() {
            waiting.retain(|key| self.operations.get(*key).is_some());
        }
        while self.waiting.front().is_some_and(|(_, _, since)| too_old(*since)) {
            if let Some((ticket, _, _)) = self.waiting.pop_front() {
                self.complete(ticket, Outcome::Failed(Failure::Io));
            }
        }
    }

    /// Asks for a new map, now and then.
    pub(super) fn want_map(&mut self) {
        if self.stage != Stage::Stopped && self.next_map.is_none_or(|at| at <= self.now) {
            self.next_map = Some(self.now + MAP_EVERY);
            self.control.ask(Ask::Map);
        }
    }
}

fn earlier(a: Option<Instant>, b: Instant) -> Option<Instant> {
    Some(a.map_or(b, |a| a.min(b)))
}
