//! What to do next, decided from the state and the reports: plain functions, `plan(…) → decisions`.
//!
//! - [`create`]: more copysets, when there are chunkservers for them.
//! - [`confirm`]: what the reports show done, put into the state.
//! - [`repair`]: replicas that are missing, or should be elsewhere, replaced.
//! - [`obstacles`]: what keeps repair from what it should do, in words.
//! - [`leaders`]: leaders spread evenly again.
//!
//! A decision only: the caller proposes it, so a leader that was deposed decides nothing. Run by `steward`.

pub mod confirm;
pub mod create;
pub mod leaders;
pub mod obstacles;
pub mod repair;

use std::time::Instant;

use crate::config::Limits;
use crate::heartbeat::orders::Transfers;
use crate::heartbeat::reports::Reports;
use crate::state::{Command, State};

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Change the state.
    Propose(Command),
    /// Have a chunkserver told to hand on its leadership.
    Transfer(leaders::Handover),
}

/// Everything there is to do now.
pub fn plan(
    state: &State,
    reports: &Reports,
    transfers: &Transfers,
    limits: &Limits,
    now: Instant,
) -> Vec<Decision> {
    let mut decisions: Vec<Decision> =
        confirm::plan(state, reports, now).into_iter().map(Decision::Propose).collect();
    decisions.extend(repair::plan(state, reports, limits, now).into_iter().map(Decision::Propose));
    decisions.extend(create::plan(state, reports, limits, now).map(Decision::Propose));
    decisions.extend(leaders::plan(state, reports, transfers, now).into_iter().map(Decision::Transfer));
    decisions
}

#[cfg(test)]
pub(crate) mod groups;
#[cfg(test)]
pub(crate) mod world;
