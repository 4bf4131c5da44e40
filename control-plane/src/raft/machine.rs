//! Committed entries → state, store, and the answer for whoever proposed.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use evolute_daemon::in_one_line;
use evolute_raft::{Applying, Position, Restored, StateMachine};

use super::Shared;
use super::store::Store;
use crate::state::{Changes, Command, outcome};

/// The answer when the store has failed: the entry is committed, but not applied here. No outcome begins like that
/// (an outcome is a protobuf message or nothing).
pub(super) const NOT_APPLIED: &[u8] = &[0xff];

/// What the store holds durably.
#[derive(Debug, Clone, Default)]
pub(super) struct Stored {
    pub at: Option<Position>,
    pub membership: Option<Bytes>,
}

pub(super) struct Machine {
    pub store: Store,
    pub shared: Arc<Shared>,
    /// Read by the task that tells raft how much of its log may go.
    pub stored: Rc<RefCell<Stored>>,
}

impl StateMachine for Machine {
    fn restored(&self) -> Restored {
        let stored = self.stored.borrow();
        Restored { applied: stored.at, membership: stored.membership.clone() }
    }

    fn apply(&mut self, at: Position, what: Applying) -> Bytes {
        if self.shared.failure().is_some() {
            return Bytes::from_static(NOT_APPLIED);
        }
        let (mut answer, mut changes, mut membership) = (Bytes::new(), Changes::new(), None);
        let mut state = self.shared.state_mut();
        match what {
            Applying::Command(command) => {
                let len = command.len();
                let bytes = command.into_cursor().take(len).unwrap_or_default();
                match Command::from_bytes(&bytes) {
                    Ok(command) => {
                        let (outcome, changed) = state.apply(&command);
                        answer = outcome::encode(&outcome);
                        changes = changed;
                    }
                    Err(error) => {
                        // To skip it would be to differ from the others for ever.
                        drop(state);
                        self.shared.fail(format!("cannot apply the entry at {at}: {error}"));
                        return Bytes::from_static(NOT_APPLIED);
                    }
                }
            }
            Applying::Membership(bytes) => membership = Some(bytes),
            Applying::Blank => {}
        }
        self.shared.applied.store(at.index, std::sync::atomic::Ordering::Release);
        changes.sort_unstable();
        changes.dedup();
        let records: Vec<_> = changes.iter().map(|&key| (key, state.record(key))).collect();
        // Whoever reads meanwhile sees what is committed and in the synced log: true, whether stored or not.
        drop(state);
        if let Err(error) = self.store.save(at, membership.as_ref(), records.into_iter()) {
            self.shared
                .fail(format!("cannot store the state after the entry at {at}: {}", in_one_line(&error)));
            return Bytes::from_static(NOT_APPLIED);
        }
        let mut stored = self.stored.borrow_mut();
        stored.at = Some(at);
        if membership.is_some() {
            stored.membership = membership;
        }
        if !changes.is_empty() {
            self.shared.changed();
        }
        answer
    }
}
