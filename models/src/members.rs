//! A copyset whose replicas moved away and come back: Raft with membership changes, in small.
//!
//! It begins where copyset {1, 2, 3} has moved to {1, 4, 5}, one member at a time, and what members 1, 4 and 5 have is
//! committed. Now two replicas come back to the hosts of 2 and 3. What they are called, and what they bring, is the
//! question: a replica that is being brought up to date replays *historical* memberships from the log, and one that finds
//! itself in such a membership may stand for election and be elected by another like it.
//!
//! The rule of `raft/` and `control-plane/`: a replica id is fresh for every membership, and never comes back.

use std::collections::{BTreeMap, BTreeSet};

use stateright::{Model, Property};

/// What is broken, one thing at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    None,
    /// M18: the replicas come back under their former ids, with empty logs.
    SameIds,
    /// M18: the same, with what they had when they left.
    SameIdsOldData,
}

type Id = u8;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum What {
    Members(BTreeSet<Id>),
    Write,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Entry {
    term: u8,
    what: What,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Replica {
    term: u8,
    leads: bool,
    log: Vec<Entry>,
}

impl Replica {
    /// The newest membership in its log, committed or not, as Raft demands.
    fn members(&self) -> BTreeSet<Id> {
        let newest = self.log.iter().rev().find_map(|entry| match &entry.what {
            What::Members(members) => Some(members.clone()),
            What::Write => None,
        });
        newest.unwrap_or_default()
    }

    fn last(&self) -> (u8, usize) {
        (self.log.last().map_or(0, |entry| entry.term), self.log.len())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct State {
    replicas: BTreeMap<Id, Replica>,
    /// What some leader has told to be committed.
    committed: Vec<Entry>,
    elections: u8,
    writes: u8,
    changes: u8,
    pub wrong: Option<&'static str>,
}

#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub elections: u8,
    pub writes: u8,
    /// Replicas that become voters.
    pub changes: u8,
}

#[derive(Debug, Clone, Copy)]
pub struct Members {
    pub bounds: Bounds,
    pub mutant: Mutant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// With the votes of all that would give theirs.
    Elect(Id),
    Write(Id),
    /// A leader makes a voter of a replica that is not one.
    AddVoter {
        leader: Id,
        replica: Id,
    },
    /// The next entry the other lacks, or has otherwise.
    Append {
        leader: Id,
        to: Id,
    },
    /// All that is committed at once.
    Snapshot {
        leader: Id,
        to: Id,
    },
    /// A leader counts who has its entries, and tells.
    Commit(Id),
}

fn members(ids: impl IntoIterator<Item = Id>) -> Entry {
    Entry { term: 1, what: What::Members(ids.into_iter().collect()) }
}

/// How {1, 2, 3} became {1, 4, 5}.
fn history() -> Vec<Entry> {
    vec![
        members([1, 2, 3]),
        members([1, 2, 3, 4]),
        members([1, 3, 4]),
        members([1, 3, 4, 5]),
        members([1, 4, 5]),
    ]
}

fn is_quorum(of: &BTreeSet<Id>, who: impl Fn(Id) -> bool) -> bool {
    of.iter().filter(|id| who(**id)).count() * 2 > of.len()
}

impl Members {
    fn coming_back(&self) -> [Id; 2] {
        match self.mutant {
            Mutant::SameIds | Mutant::SameIdsOldData => [2, 3],
            Mutant::None => [6, 7],
        }
    }

    fn elect(state: &mut State, id: Id) -> Option<()> {
        let candidate = &state.replicas[&id];
        let (of, term, last) = (candidate.members(), candidate.term + 1, candidate.last());
        let votes: BTreeSet<Id> = of
            .iter()
            .copied()
            .filter(|voter| {
                *voter == id || state.replicas.get(voter).is_some_and(|v| v.term < term && v.last() <= last)
            })
            .collect();
        if !of.contains(&id) || !is_quorum(&of, |voter| votes.contains(&voter)) {
            return None;
        }
        for voter in votes {
            let voter = state.replicas.get_mut(&voter)?;
            (voter.term, voter.leads) = (term, false);
        }
        state.replicas.get_mut(&id)?.leads = true;
        state.elections += 1;
        Some(())
    }

    fn append(state: &mut State, leader: Id, to: Id) -> Option<()> {
        let Replica { term, log, .. } = state.replicas[&leader].clone();
        let other = state.replicas.get_mut(&to)?;
        let same = other.log.iter().zip(&log).take_while(|(a, b)| a == b).count();
        if other.term > term || same == log.len() {
            return None;
        }
        other.log.truncate(same);
        other.log.push(log[same].clone());
        (other.term, other.leads) = (term, false);
        Some(())
    }

    fn snapshot(state: &mut State, leader: Id, to: Id) -> Option<()> {
        let Replica { term, log, .. } = state.replicas[&leader].clone();
        let upto = Self::committed_by(state, leader);
        let other = state.replicas.get_mut(&to)?;
        if other.term > term || other.log.len() >= upto {
            return None;
        }
        other.log = log[..upto].to_vec();
        (other.term, other.leads) = (term, false);
        Some(())
    }

    /// How many entries a leader may tell to be committed.
    fn committed_by(state: &State, leader: Id) -> usize {
        let is = &state.replicas[&leader];
        let of = is.members();
        (0..is.log.len())
            .rev()
            .find(|at| {
                is.log[*at].term == is.term
                    && is_quorum(&of, |id| {
                        state.replicas.get(&id).is_some_and(|r| r.log.get(*at) == Some(&is.log[*at]))
                    })
            })
            .map_or(0, |at| at + 1)
    }

    fn commit(state: &mut State, leader: Id) -> Option<()> {
        let upto = Self::committed_by(state, leader);
        let log = &state.replicas[&leader].log[..upto];
        let same = log.iter().zip(&state.committed).all(|(a, b)| a == b);
        if !same {
            state.wrong = Some("two leaders committed different entries in one place");
        } else if upto <= state.committed.len() {
            return None;
        } else {
            state.committed = log.to_vec();
        }
        Some(())
    }

    fn add_voter(state: &mut State, leader: Id, replica: Id) -> Option<()> {
        let is = &state.replicas[&leader];
        let (committed, term, mut of) = (Self::committed_by(state, leader), is.term, is.members());
        // One change at a time, and only by a leader that has committed something of its own term.
        let settled = committed == is.log.len();
        let caught_up = state.replicas.get(&replica)?.log == is.log;
        if !settled || !caught_up || !of.insert(replica) {
            return None;
        }
        state.changes += 1;
        state.replicas.get_mut(&leader)?.log.push(Entry { term, what: What::Members(of) });
        Some(())
    }
}

impl Model for Members {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let history = history();
        let mut state = State { committed: history.clone(), ..State::default() };
        for id in [1, 4, 5] {
            state.replicas.insert(id, Replica { term: 1, leads: id == 1, log: history.clone() });
        }
        for id in self.coming_back() {
            let log = if self.mutant == Mutant::SameIdsOldData { history[..1].to_vec() } else { Vec::new() };
            state.replicas.insert(id, Replica { term: u8::from(!log.is_empty()), leads: false, log });
        }
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (&id, replica) in &state.replicas {
            if !replica.leads {
                if state.elections < self.bounds.elections {
                    actions.push(Action::Elect(id));
                }
                continue;
            }
            if state.writes < self.bounds.writes {
                actions.push(Action::Write(id));
            }
            actions.push(Action::Commit(id));
            for &to in state.replicas.keys().filter(|to| **to != id) {
                actions.push(Action::Append { leader: id, to });
                if !replica.members().contains(&to) {
                    actions.push(Action::Snapshot { leader: id, to });
                    if state.changes < self.bounds.changes {
                        actions.push(Action::AddVoter { leader: id, replica: to });
                    }
                }
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        if last.wrong.is_some() {
            return None;
        }
        let mut state = last.clone();
        match action {
            Action::Elect(id) => Self::elect(&mut state, id)?,
            Action::Write(id) => {
                state.writes += 1;
                let leader = state.replicas.get_mut(&id)?;
                leader.log.push(Entry { term: leader.term, what: What::Write });
            }
            Action::AddVoter { leader, replica } => Self::add_voter(&mut state, leader, replica)?,
            Action::Append { leader, to } => Self::append(&mut state, leader, to)?,
            Action::Snapshot { leader, to } => Self::snapshot(&mut state, leader, to)?,
            Action::Commit(id) => Self::commit(&mut state, id)?,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing goes wrong", |_, state: &State| state.wrong.is_none()),
            Property::sometimes("a write is committed", |_, state: &State| {
                state.committed.contains(&Entry { term: 1, what: What::Write })
            }),
            Property::sometimes("both are voters", |model: &Members, state: &State| {
                let back = model.coming_back();
                state.committed.iter().any(|entry| {
                    matches!(&entry.what, What::Members(of) if of.is_superset(&back.into()) && of.len() == 5)
                })
            }),
        ]
    }
}
