//! Which entries are kept, and for whom.
//!
//! An entry may go once the owner's checkpoint holds it. Beyond that it is kept
//!
//! - for a member that has not got it yet (the *retain floor*, which the leader tells everybody), as long as it lies
//!   in the newest log files ([`crate::Limits::log_retain_bytes`]): a member that was away for a while catches up from
//!   the log alone, one that was away for longer gets a raft snapshot;
//! - for a member that is being sent a raft snapshot (a *pin*, on the leader that sends it): it will need everything
//!   after it. The pin moves up with the member, and goes when it has caught up with the checkpoint, or moves no more.
//!
//! A group that never heard of a floor keeps everything up to the same bound.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use tokio::time::Instant;

use crate::state::State;
use crate::types::position;

/// A member that got a raft snapshot and then takes no entry for this long is left to another one: it must not hold the
/// log for ever.
const PIN_IDLE_MAX: Duration = Duration::from_secs(30);

/// What members that are sent raft snapshots will need next.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    by_target: BTreeMap<u64, Pin>,
    next: u64,
}

#[derive(Debug)]
struct Pin {
    number: u64,
    /// Entries after this one stay.
    after: u64,
    sending: bool,
    moved: Instant,
}

/// A pin whose snapshot is on its way. Dropped before [`Self::arrived`], it goes.
pub(crate) struct Pinned {
    state: Rc<State>,
    target: u64,
    number: u64,
}

impl Pinned {
    /// The target has installed it, and will ask for what comes after.
    pub fn arrived(self) {
        if let Some(pin) = self.state.pins.borrow_mut().of(self.target, self.number) {
            pin.sending = false;
            pin.moved = Instant::now();
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut pins = self.state.pins.borrow_mut();
        if pins.of(self.target, self.number).is_some_and(|pin| pin.sending) {
            pins.by_target.remove(&self.target);
        }
    }
}

impl Pins {
    /// The target's pin, unless a later one has replaced it.
    fn of(&mut self, target: u64, number: u64) -> Option<&mut Pin> {
        self.by_target.get_mut(&target).filter(|pin| pin.number == number)
    }
}

impl State {
    /// Keeps everything after `index` for `target`. `None`: too late, some of it may be gone.
    pub fn pin(self: &Rc<Self>, target: u64, index: u64) -> Option<Pinned> {
        if self.purging.get() > Some(index) {
            return None;
        }
        let mut pins = self.pins.borrow_mut();
        pins.next += 1;
        let number = pins.next;
        let pin = Pin { number, after: index, sending: true, moved: Instant::now() };
        pins.by_target.insert(target, pin);
        Some(Pinned { state: self.clone(), target, number })
    }

    /// The lowest index that is on every member, learners included: what the leader tells the others. `None` when
    /// this replica does not lead, or somebody has nothing yet.
    pub fn lowest_matched(&self) -> Option<u64> {
        self.leading.get()?;
        let metrics = self.running()?.metrics();
        let metrics = metrics.borrow_watched();
        let mut lowest = metrics.last_log_index;
        for (&replica, matched) in metrics.replication.as_ref()? {
            if replica != self.me.replica.0 {
                lowest = lowest.min(matched.as_ref().map(|id| id.index()));
            }
        }
        lowest
    }

    /// Nothing after this may go, for the sake of members that are sent a raft snapshot.
    fn pinned(&self, checkpointed: u64) -> Option<u64> {
        let mut pins = self.pins.borrow_mut();
        let metrics = self.running()?.metrics();
        let metrics = metrics.borrow_watched();
        let Some(replication) = &metrics.replication else {
            pins.by_target.clear();
            return None;
        };
        pins.by_target.retain(|target, pin| {
            let Some(matched) = replication.get(target) else { return false };
            let matched = matched.as_ref().map_or(0, |id| id.index());
            if matched > pin.after {
                pin.after = matched;
                pin.moved = Instant::now();
            }
            pin.sending || (pin.after < checkpointed && pin.moved.elapsed() < PIN_IDLE_MAX)
        });
        pins.by_target.values().map(|pin| pin.after).min()
    }

    /// Up to where the log may go now.
    fn free_upto(&self) -> Option<u64> {
        let checkpointed = self.checkpointed.borrow().last_log_id.as_ref().map(position)?.index;
        let beyond = self.log()?.last_beyond(self.retain_bytes);
        let upto = checkpointed.min(self.retain_floor.get().max(beyond)?);
        Some(self.pinned(checkpointed).map_or(upto, |pinned| upto.min(pinned)))
    }

    /// Purges what the owner holds durably and nobody is to have.
    pub async fn purge(&self) {
        let Some(raft) = self.running() else { return };
        if self.leading.get().is_some() {
            self.retain_floor.set(self.lowest_matched());
        }
        let Some(upto) = self.free_upto() else { return };
        let purged = raft.metrics().borrow_watched().purged.as_ref().map(|id| id.index());
        if Some(upto) > purged {
            self.purging.set(self.purging.get().max(Some(upto)));
            let _ = raft.trigger().purge_log(upto).await;
        }
    }

    /// openraft purges nothing that it is sending to a member, however slowly that one takes it. So a leader sends no
    /// more of what is to go: then openraft hears that the member is lost, purges, and sends a raft snapshot.
    pub fn is_given_up(&self, prev: Option<u64>) -> bool {
        self.leading.get().is_some() && self.purging.get() > prev
    }
}
