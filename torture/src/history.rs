//! One round: everything that was asked and answered since the device was last wholly known, and its check.
//!
//! A round begins with a value for every sector and ends with nothing under way and every sector read once more. What
//! that last read shows is the next round's beginning, so a long run is checked piece by piece, exactly, in bounded
//! memory.

use std::ops::Range;

use crate::content::OpId;
use crate::register::{self, NEVER, Read, Time, Verdict, Violation, Write, ZERO};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    /// A discard or a write of zeroes.
    Zero,
    Flush,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Done,
    Failed,
    /// Never answered.
    Unknown,
}

#[derive(Debug, Clone)]
pub struct Op {
    pub id: OpId,
    pub kind: Kind,
    /// Sectors of the checked area, counted from its beginning.
    pub sectors: Range<u32>,
    pub invoked: Time,
    /// [`NEVER`] while unknown.
    pub answered: Time,
    pub status: Status,
    /// A read's runs in [`Round::seen`].
    pub seen: Range<u32>,
}

/// A read saw damage, which was reported, and says nothing about which write was the last.
pub const NOTHING: OpId = OpId::MAX;

/// `sectors` in a row that showed the same write.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    pub sectors: u32,
    pub value: OpId,
}

#[derive(Debug, Clone, Default)]
pub struct Round {
    /// By sector.
    pub initial: Vec<OpId>,
    pub ops: Vec<Op>,
    pub seen: Vec<Run>,
}

/// What a check of one round found.
#[derive(Debug, Default)]
pub struct Checked {
    pub sector_operations: u64,
    pub violations: u64,
    /// The sectors of those, in order.
    pub violated: Vec<u32>,
    /// The first ones of each kind, for people.
    pub examples: Vec<(u32, Violation)>,
    pub undecided_sectors: u64,
}

const EXAMPLES_MAX: usize = 20;
/// Sectors whose events are gathered at once: bounds memory, not work.
const GATHERED: u32 = 2048;

/// One operation's part in one sector's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Event {
    op: u32,
    /// What a read saw.
    value: OpId,
}

impl Round {
    pub fn new(initial: Vec<OpId>) -> Self {
        Self { initial, ..Self::default() }
    }

    /// Adds what a read saw, sector by sector, run-length coded.
    pub fn saw(&mut self, op: usize, values: impl Iterator<Item = OpId>) {
        let from = self.seen.len();
        for value in values {
            match self.seen[from..].last_mut() {
                Some(run) if run.value == value => run.sectors += 1,
                _ => self.seen.push(Run { sectors: 1, value }),
            }
        }
        let index = |at: usize| u32::try_from(at).expect("fewer runs than 2^32 in a round");
        self.ops[op].seen = index(from)..index(self.seen.len());
    }

    /// Judges every sector.
    pub fn check(&self) -> Checked {
        let mut checked = Checked::default();
        let sectors = u32::try_from(self.initial.len()).expect("an area of fewer than 2^32 sectors");
        let mut by_start: Vec<u32> =
            (0..u32::try_from(self.ops.len()).expect("few ops in a round")).collect();
        by_start.sort_by_key(|&op| self.ops[op as usize].sectors.start);
        let longest = self.ops.iter().map(|op| op.sectors.end - op.sectors.start).max().unwrap_or(0);
        for first in (0..sectors).step_by(GATHERED as usize) {
            let gathered = first..sectors.min(first + GATHERED);
            let from = by_start.partition_point(|&op| {
                self.ops[op as usize].sectors.start.saturating_add(longest) < gathered.start
            });
            let until = by_start.partition_point(|&op| self.ops[op as usize].sectors.start < gathered.end);
            let mut events: Vec<Vec<Event>> = vec![Vec::new(); gathered.len()];
            for &op in &by_start[from..until] {
                self.scatter(op, &gathered, &mut events);
            }
            self.check_gathered(&gathered, &events, &mut checked);
        }
        checked
    }

    /// The operations on this sector that wrote or showed one of these values, in time, one line each.
    pub fn story(&self, sector: u32, values: [OpId; 2]) -> Vec<String> {
        let mut lines = Vec::new();
        for op in self.ops.iter().filter(|op| op.sectors.contains(&sector)) {
            let shown = self.shown(op, sector);
            let concerns = |value: OpId| match op.kind {
                Kind::Read => shown == Some(value),
                Kind::Write => op.id == value,
                Kind::Zero => value == ZERO,
                Kind::Flush => false,
            };
            if values.into_iter().any(concerns) {
                let shows = shown.map_or(String::new(), |value| format!(" shows {value}"));
                let answered = if op.status == Status::Unknown {
                    "never".to_owned()
                } else {
                    format!("at {}", op.answered)
                };
                lines.push(format!(
                    "{:?} {} of sectors {:?}{shows}: asked at {}, answered {answered}",
                    op.kind, op.id, op.sectors, op.invoked
                ));
            }
        }
        lines
    }

    fn shown(&self, op: &Op, sector: u32) -> Option<OpId> {
        let mut end = op.sectors.start;
        self.seen[op.seen.start as usize..op.seen.end as usize].iter().find_map(|run| {
            end += run.sectors;
            (sector < end).then_some(run.value)
        })
    }

    fn scatter(&self, index: u32, gathered: &Range<u32>, events: &mut [Vec<Event>]) {
        let op = &self.ops[index as usize];
        let mut add = |sector: u32, value: OpId| {
            if gathered.contains(&sector) {
                events[(sector - gathered.start) as usize].push(Event { op: index, value });
            }
        };
        match op.kind {
            Kind::Flush => {}
            Kind::Write | Kind::Zero => op.sectors.clone().for_each(|sector| add(sector, ZERO)),
            Kind::Read => {
                let mut sector = op.sectors.start;
                for run in &self.seen[op.seen.start as usize..op.seen.end as usize] {
                    if run.value != NOTHING {
                        (sector..sector + run.sectors).for_each(|sector| add(sector, run.value));
                    }
                    sector += run.sectors;
                }
            }
        }
    }

    fn check_gathered(&self, gathered: &Range<u32>, events: &[Vec<Event>], checked: &mut Checked) {
        let mut last: Option<(usize, Verdict)> = None;
        for (i, sector) in gathered.clone().enumerate() {
            checked.sector_operations += events[i].len() as u64;
            // Neighbours mostly share their whole history: judged once.
            let same = last.as_ref().filter(|(other, _)| {
                events[*other] == events[i]
                    && self.initial[gathered.start as usize + other] == self.initial[sector as usize]
            });
            let verdict = match same {
                Some((_, verdict)) => verdict.clone(),
                None => register::check(&self.history_of(self.initial[sector as usize], &events[i])),
            };
            match &verdict {
                Verdict::Fine => {}
                Verdict::Undecided => checked.undecided_sectors += 1,
                Verdict::Violated(violation) => {
                    checked.violations += 1;
                    checked.violated.push(sector);
                    if checked.examples.len() < EXAMPLES_MAX {
                        checked.examples.push((sector, *violation));
                    }
                }
            }
            last = Some((i, verdict));
        }
    }

    fn history_of(&self, initial: OpId, events: &[Event]) -> register::History {
        let mut history = register::History { initial, ..register::History::default() };
        for event in events {
            let op = &self.ops[event.op as usize];
            let (invoked, answered) = (op.invoked, op.answered);
            if op.kind == Kind::Read {
                history.reads.push(Read { value: event.value, invoked, answered });
            } else {
                let value = if op.kind == Kind::Zero { ZERO } else { op.id };
                let certain = op.status == Status::Done;
                let answered = if op.status == Status::Unknown { NEVER } else { answered };
                history.writes.push(Write { value, invoked, answered, certain });
            }
        }
        history
    }
}

#[cfg(test)]
mod tests {
    use super::{Kind, Op, Round, Status};
    use crate::register::ZERO;

    fn op(id: u64, kind: Kind, sectors: std::ops::Range<u32>, invoked: u64) -> Op {
        Op { id, kind, sectors, invoked, answered: invoked + 5, status: Status::Done, seen: 0..0 }
    }

    #[test]
    fn only_the_sector_with_the_stale_read_is_named() {
        let mut round = Round::new(vec![ZERO; 5000]);
        round.ops.push(op(1, Kind::Write, 2040..2060, 10));
        round.ops.push(op(2, Kind::Write, 2050..2052, 20));
        round.ops.push(op(3, Kind::Read, 2040..2060, 30));
        let mut values = [1; 20];
        values[10] = 2;
        round.saw(2, values.iter().copied());
        assert_eq!(round.seen.len(), 3);
        let checked = round.check();
        assert_eq!((checked.violations, checked.examples[0].0), (1, 2051));
        assert_eq!(checked.sector_operations, 20 + 2 + 20);
    }

    #[test]
    fn long_and_short_operations_meet_across_gathering_borders() {
        let mut round = Round::new(vec![ZERO; 10_000]);
        round.ops.push(op(1, Kind::Write, 0..9000, 10));
        round.ops.push(op(2, Kind::Zero, 4000..8000, 20));
        round.ops.push(op(3, Kind::Read, 3990..4010, 30));
        round.saw(2, (3990..4010).map(|sector| if sector < 4000 { 1 } else { 0 }));
        assert_eq!(round.check().violations, 0);
        round.ops.push(op(4, Kind::Read, 8500..8501, 40));
        round.saw(3, [0].into_iter());
        assert_eq!(round.check().violations, 1);
    }
}
