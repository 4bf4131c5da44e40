//! From one server to another, in the middle of everything.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Phase, Run};
use crate::driver::DriverError;
use crate::history::Status;

impl Run {
    /// What the old device was still asked has taken effect by now or not at all, whatever becomes of its server: the new
    /// one has the volume. A server that is not there yet is tried again.
    pub(super) fn go_elsewhere(&mut self) -> Result<(), DriverError> {
        let Some(socket) = self.moving_to.take() else { return Ok(()) };
        let mut answers = Vec::new();
        self.device.wait(Duration::ZERO, &mut answers)?;
        let now = self.now();
        for answer in answers {
            self.settle(answer, now);
        }
        let other = match self.device.elsewhere(socket.clone()) {
            Ok(other) => other,
            Err(DriverError::Connect { .. } | DriverError::Gone { .. }) => {
                self.moving_to = Some(socket);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let now = self.now();
        for token in self.device.tokens_under_way() {
            let op = &mut self.round.ops[token];
            op.answered = now;
            op.status = Status::Failed;
            self.totals.left_behind += 1;
        }
        self.left = Some(std::mem::replace(&mut self.device, other));
        self.claims.fill(0);
        if matches!(self.phase, Phase::Pass { .. }) {
            // Some of what it asked for will never be answered.
            self.phase = Phase::Pass { next: 0 };
        }
        self.last_answer = now;
        self.progress.moves.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
