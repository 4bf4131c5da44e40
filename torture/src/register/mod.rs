//! Is this the history of a register? Exact, for one sector at a time.
//!
//! A register holds one value; every operation takes effect at one moment between its invocation and its answer. A
//! history that no such choice of moments explains is a violation, and one that some choice explains is none.
//!
//! Where every value was written once, the answer takes O(n log n) ([`zones`]). Zeroes are written by many operations
//! (never-written space, discard, write-zeroes); a sector where it is not clear which of them a read of zeroes shows
//! goes to an exact [`search`], whose effort is bounded: beyond it the verdict is [`Verdict::Undecided`], which counts
//! as unknown.
//!
//! It knows no clock, no sector number and no bytes. Start at [`check`].

pub mod search;
pub mod zones;

use std::collections::HashMap;

/// What the register may hold. [`ZERO`] may be written many times, every other value once.
pub type Value = u64;
pub const ZERO: Value = 0;

/// Nanoseconds of one clock. Operations are ordered only if one was answered strictly before the other began.
pub type Time = u64;
/// The answer of a write that was never answered.
pub const NEVER: Time = Time::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write {
    pub value: Value,
    pub invoked: Time,
    pub answered: Time,
    /// Answered with success. Otherwise it took effect before its answer (which may be [`NEVER`]) or not at all.
    pub certain: bool,
}

/// A read that was answered with success. Others say nothing and are not part of a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    pub value: Value,
    pub invoked: Time,
    pub answered: Time,
}

/// Everything that touched one register, in any order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    pub initial: Value,
    pub writes: Vec<Write>,
    pub reads: Vec<Read>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Fine,
    Violated(Violation),
    /// The exact search would take longer than it may.
    Undecided,
}

/// Why no order explains the history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("a read shows {value}, which nobody ever wrote here since the round began")]
    NeverWritten { value: Value, read: Read },
    #[error("a read shows {value} and was answered before that was even written")]
    FromTheFuture { value: Value, read: Read },
    /// One of them must lie between the other's write and its last read, whichever came first: an acknowledged
    /// write was lost, or a read was stale.
    #[error(
        "{older} was still read at {older_seen_until}, although {newer} was there from {newer_from} at the latest"
    )]
    Stale { older: Value, older_seen_until: Time, newer: Value, newer_from: Time },
    #[error("zeroes were read when no write of zeroes can have been the last")]
    StaleZeroes { read: Read },
    #[error("no order of the reads and writes of zeroes explains all of them")]
    NoOrder,
}

/// States the exact search may visit for one sector. Seconds of work; sectors that need it are rare.
const SEARCH_STATES_MAX: usize = 2_000_000;

pub fn check(history: &History) -> Verdict {
    match resolve_zeroes(history) {
        Zeroes::Clear(history) => match zones::check(&history) {
            Ok(()) => Verdict::Fine,
            Err(violation) => Verdict::Violated(violation),
        },
        Zeroes::Impossible(read) => Verdict::Violated(Violation::StaleZeroes { read }),
        Zeroes::Ambiguous => search::check(history, SEARCH_STATES_MAX),
    }
}

enum Zeroes {
    /// Every value written once: zeroes have been given distinct names.
    Clear(History),
    Impossible(Read),
    Ambiguous,
}

/// Distinct names for writes of zeroes. No operation number of a run is this large.
const NAMED_ZERO: Value = 1 << 62;

/// Gives each write of zeroes a value of its own, and each read of zeroes the only one it can show, if there is
/// only one. A source is out of question when it began after the read ended, or when some certain write surely came
/// after it and surely before the read.
fn resolve_zeroes(history: &History) -> Zeroes {
    let named = |i: usize| NAMED_ZERO + i as u64;
    let mut clear = history.clone();
    let mut sources: Vec<(Value, Time, Time)> = Vec::new();
    if history.initial == ZERO {
        sources.push((ZERO, 0, 0));
    }
    for (i, write) in clear.writes.iter_mut().enumerate() {
        if write.value == ZERO {
            write.value = named(i);
            sources.push((named(i), write.invoked, write.answered));
        }
    }
    if sources.first().is_some_and(|first| first.0 == ZERO) && sources.len() == 1 {
        return Zeroes::Clear(clear);
    }
    let mut certain: Vec<(Time, Time)> =
        history.writes.iter().filter(|w| w.certain).map(|w| (w.invoked, w.answered)).collect();
    certain.sort_unstable();
    for read in clear.reads.iter_mut().filter(|read| read.value == ZERO) {
        let mut only = None;
        for &(name, invoked, answered) in &sources {
            let is_initial = name == ZERO;
            if !is_initial && invoked > read.answered {
                continue;
            }
            let after = if is_initial { 0 } else { certain.partition_point(|&(begun, _)| begun <= answered) };
            let covered = certain[after..].iter().take_while(|&&(begun, _)| begun < read.invoked);
            if covered.into_iter().any(|&(_, ended)| ended < read.invoked) {
                continue;
            }
            if only.replace(name).is_some() {
                return Zeroes::Ambiguous;
            }
        }
        match only {
            Some(name) => read.value = name,
            None => return Zeroes::Impossible(*read),
        }
    }
    Zeroes::Clear(clear)
}

/// The writes by value.
fn by_value(history: &History) -> HashMap<Value, &Write> {
    history.writes.iter().map(|write| (write.value, write)).collect()
}
