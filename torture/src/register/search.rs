//! Any history, values written many times included: a search for an order, exact and bounded.
//!
//! Invocations and answers are gone through in time. What is carried along is every state the register may be in: the
//! value it holds, and which of the operations under way have taken effect already. Nothing takes effect before it must:
//! only when an operation is answered, those states that lack it are led on, through any of the operations under way,
//! until it has. So the effort grows with what overlaps, not with the length of the history.
//!
//! Two things keep the states few and lose none that matters: a read under way of the value held takes effect at once;
//! and a write whose value no read will show any more takes effect just before another write, where nobody sees it.

use super::{History, Time, Value, Verdict, Violation};
use std::collections::{HashMap, HashSet};

#[derive(Debug, Clone, Copy)]
struct Op {
    invoked: Time,
    answered: Time,
    value: Value,
    is_write: bool,
    /// It must have taken effect by its answer.
    certain: bool,
}

/// The value held and the set of places (in `Search::under_way`) that have taken effect.
type State = (Value, u128);
const PLACES: usize = 128;

struct Search {
    under_way: [Option<Op>; PLACES],
    /// By value: reads that are not answered yet.
    reads_left: HashMap<Value, usize>,
    effort: usize,
}

pub fn check(history: &History, states_max: usize) -> Verdict {
    let mut ops: Vec<Op> = Vec::with_capacity(history.writes.len() + history.reads.len());
    ops.extend(history.writes.iter().map(|w| Op {
        invoked: w.invoked,
        answered: w.answered,
        value: w.value,
        is_write: true,
        certain: w.certain,
    }));
    ops.extend(history.reads.iter().map(|r| Op {
        invoked: r.invoked,
        answered: r.answered,
        value: r.value,
        is_write: false,
        certain: true,
    }));
    // At the same moment beginnings come first: only a strictly earlier answer orders two operations.
    let mut events: Vec<(Time, bool, usize)> = Vec::with_capacity(2 * ops.len());
    let mut reads_left = HashMap::new();
    for (i, op) in ops.iter().enumerate() {
        events.push((op.invoked, false, i));
        events.push((op.answered, true, i));
        if !op.is_write {
            *reads_left.entry(op.value).or_default() += 1;
        }
    }
    events.sort_unstable();
    let mut places: Vec<Option<usize>> = vec![None; ops.len()];
    let mut search = Search { under_way: [None; PLACES], reads_left, effort: states_max };
    let mut states: HashSet<State> = HashSet::from([(history.initial, 0)]);
    for (_, is_answer, i) in events {
        if !is_answer {
            let Some(free) = search.under_way.iter().position(Option::is_none) else {
                return Verdict::Undecided;
            };
            search.under_way[free] = Some(ops[i]);
            places[i] = Some(free);
            continue;
        }
        let place = places[i].expect("nothing is answered before it began");
        let Some(next) = search.answered(place, &states) else { return Verdict::Undecided };
        if next.is_empty() {
            return Verdict::Violated(Violation::NoOrder);
        }
        states = next;
        search.under_way[place] = None;
        if !ops[i].is_write {
            *search.reads_left.get_mut(&ops[i].value).expect("counted above") -= 1;
        }
    }
    Verdict::Fine
}

impl Search {
    /// The states after this answer; `None`: too much effort.
    fn answered(&mut self, place: usize, states: &HashSet<State>) -> Option<HashSet<State>> {
        let op = self.under_way[place].expect("under way until answered");
        let bit = 1_u128 << place;
        let mut results = HashSet::new();
        let mut seen = HashSet::new();
        let mut stack = Vec::new();
        for &(value, done) in states {
            if done & bit != 0 {
                results.insert((value, done & !bit));
                continue;
            }
            if !op.certain {
                // It never took effect.
                results.insert((value, done));
            }
            stack.push((value, done));
        }
        let hidden = self.nobody_will_see();
        while let Some((value, done)) = stack.pop() {
            let done = self.with_reads(value, done);
            if !seen.insert((value, done)) {
                continue;
            }
            self.effort = self.effort.checked_sub(1)?;
            if done & bit != 0 {
                results.insert((value, done & !bit));
                continue;
            }
            if op.is_write {
                results.insert((op.value, (done | hidden) & !bit));
            }
            for (other, write) in self.under_way.iter().enumerate() {
                let other_bit = 1_u128 << other;
                let candidate = write.filter(|w| w.is_write && (done | hidden | bit) & other_bit == 0);
                if let Some(write) = candidate {
                    stack.push((write.value, done | hidden | other_bit));
                }
            }
        }
        Some(results)
    }

    /// Writes under way whose value no read will show.
    fn nobody_will_see(&self) -> u128 {
        let unseen = |op: &Op| op.is_write && self.reads_left.get(&op.value).is_none_or(|&left| left == 0);
        self.places(unseen)
    }

    fn with_reads(&self, value: Value, done: u128) -> u128 {
        done | self.places(|op| !op.is_write && op.value == value)
    }

    fn places(&self, which: impl Fn(&Op) -> bool) -> u128 {
        let taken = self.under_way.iter().enumerate();
        taken.filter(|(_, op)| op.as_ref().is_some_and(&which)).fold(0, |set, (place, _)| set | 1 << place)
    }
}
