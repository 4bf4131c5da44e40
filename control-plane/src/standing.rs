//! Whether this MDS may give numbers and orders: is its state the newest that its chunkservers have obeyed?
//!
//! ```text
//!  waiting ──most are here, none contradicts──▶ telling ──most have stored this reign──▶ confirmed
//!     │                                            │                                        │
//!     └────────────────────────── somebody obeyed a newer state ◀──────────────────────────┘
//!                                              ▼
//!                                            held ──all said what they have: Adopt──▶ waiting, in a new reign
//! ```
//!
//! What always holds: before it is confirmed nothing is given that could have been given before. A number is given only
//! while most chunkservers durably remember the reign in which it is; so a directory that was put back to before that
//! reign meets one that contradicts it.
//!
//! In memory, on the leader. A pure table: no clock.

use std::collections::{BTreeMap, BTreeSet};

use evolute_protocol::id::ChunkserverId;
use evolute_protocol::rpc::{Inventory, MdsState};

use crate::adopt::{Inventories, seen_of};
use crate::state::State;

/// May it lead?
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Now {
    /// For these: more than half of all have to be here.
    Waiting {
        missing: Vec<ChunkserverId>,
    },
    /// Enough are here; they are told of this reign, and have to say that they remember it.
    Telling,
    Confirmed,
    /// Chunkservers have obeyed a newer state of this MDS.
    Held {
        why: String,
    },
}

#[derive(Debug, Default)]
pub struct Standing {
    /// Who reported, and whether it remembers the present reign.
    here: BTreeMap<ChunkserverId, bool>,
    confirmed: bool,
    held: Option<String>,
    inventories: Inventories,
    /// Who said that it has obeyed something newer: expected to say what it has.
    contradicted_by: BTreeSet<ChunkserverId>,
}

impl Standing {
    /// A chunkserver proved who it is, and says what it has obeyed; none: it is of a version that does not remember.
    pub fn introduce(&mut self, id: ChunkserverId, seen: Option<&MdsState>, state: &State) {
        let seen = match seen {
            None => {
                self.here.insert(id, true);
                return;
            }
            Some(seen) => seen_of(seen),
        };
        let Some(seen) = seen else {
            self.here.insert(id, false);
            return;
        };
        if !state.has_been(&seen) {
            self.hold(id, format!("{id} has obeyed a newer state of this MDS"));
        }
        let remembers = state.reign().is_some_and(|reign| reign.id == seen.reign);
        self.here.insert(id, remembers);
    }

    /// A chunkserver with a number that this state never gave.
    pub fn forgot(&mut self, id: ChunkserverId) {
        self.hold(id, format!("{id} has its number from a newer state of this MDS"));
    }

    fn hold(&mut self, id: ChunkserverId, why: String) {
        self.confirmed = false;
        self.contradicted_by.insert(id);
        if self.held.is_none() {
            tracing::warn!(why, "this MDS is older than what its chunkservers have obeyed: it does not lead");
            self.held = Some(why);
            self.inventories.clear();
        }
    }

    /// Its stream is over; it has to introduce itself again, unless that was enough already.
    pub fn left(&mut self, id: ChunkserverId) {
        self.here.remove(&id);
    }

    /// A person says that those that are here are all there will be.
    pub fn go_on(&mut self) {
        self.confirmed = self.held.is_none();
    }

    /// Called with every change; what was confirmed once stays so until somebody contradicts.
    pub fn look(&mut self, state: &State) -> Now {
        if let Some(why) = &self.held {
            return Now::Held { why: why.clone() };
        }
        if self.confirmed {
            return Now::Confirmed;
        }
        let registered = state.chunkservers().keys();
        let missing: Vec<_> = registered.copied().filter(|id| !self.here.contains_key(id)).collect();
        let all = state.chunkservers().len();
        let most = all / 2 + 1;
        if all > 0 && all - missing.len() < most {
            return Now::Waiting { missing };
        }
        let remember = state.chunkservers().keys().filter(|id| self.here.get(id) == Some(&true)).count();
        if all > 0 && remember < most {
            return Now::Telling;
        }
        self.confirmed = true;
        Now::Confirmed
    }

    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Should this one be asked what it has?
    pub fn wants_inventory(&self, id: ChunkserverId) -> bool {
        self.held.is_some() && !self.inventories.contains_key(&id)
    }

    pub fn take_inventory(&mut self, id: ChunkserverId, inventory: Inventory) {
        if self.held.is_some() {
            self.inventories.insert(id, inventory);
        }
    }

    pub fn inventories(&self) -> &Inventories {
        &self.inventories
    }

    /// Who has not said what it has.
    pub fn unheard(&self, state: &State) -> Vec<ChunkserverId> {
        let expected: BTreeSet<_> =
            state.chunkservers().keys().copied().chain(self.contradicted_by.iter().copied()).collect();
        expected.into_iter().filter(|id| !self.inventories.contains_key(id)).collect()
    }

    /// What was said does not fit together (yet): everybody is asked again.
    pub fn ask_again(&mut self) {
        self.inventories.clear();
    }

    /// The state has learnt what they have: a new reign begins.
    pub fn adopted(&mut self) {
        *self = Self { here: std::mem::take(&mut self.here), ..Self::default() };
        for remembers in self.here.values_mut() {
            *remembers = false;
        }
    }
}
