//! What issue 5 asks for: one table, and what a run came to beside it.

use std::fmt::Write as _;

use super::markdown::{NONE, Set, table};
use super::results::{Results, Row, short};

/// A bound, and the side of it that is good.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

/// Where a value is found in the results.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// Of a load on Evolute: store, work, which of its numbers.
    Load(&'static str, &'static str, fn(&Row) -> f64),
    /// IOPS of the first load on tmpfs by those of the second.
    Ratio(&'static str, &'static str),
    /// The largest of a work's figures.
    Worst(&'static str),
}

#[derive(Debug, Clone, Copy)]
struct Goal {
    what: &'static str,
    unit: &'static str,
    /// Of the best open peer on this kind of machine, as `peer-measurements.md` has it.
    peer: &'static str,
    bounds: Option<Bounds>,
    source: Source,
    /// What qemu-storage-daemon came to at the same load on the machine of the peers' numbers.
    yardstick: Option<f64>,
}

#[derive(Debug, Clone, Copy)]
struct Bounds {
    step_1: Bound,
    goal: Bound,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    /// There is a peer to compare with, and no bound.
    NoBound,
    Nothing,
    Step1,
    Goal,
}

/// A goal beside what was measured.
#[derive(Debug, Clone, Copy)]
pub struct Judged {
    goal: &'static Goal,
    /// None: this run did not measure it.
    pub measured: Option<(f64, Reached)>,
    /// What that would be on the machine of the bounds, as far as the yardstick tells: a machine on which
    /// qemu-storage-daemon takes twice as long is half as fast. None: it was not measured, or says nothing about this.
    pub scaled: Option<(f64, Reached)>,
}

const TMPFS: &str = "tmpfs";
const DISK: &str = "disk";

const fn goal(
    (what, unit, peer): (&'static str, &'static str, &'static str),
    bounds: Option<Bounds>,
    source: Source,
) -> Goal {
    Goal { what, unit, peer, bounds, source, yardstick: None }
}

impl Goal {
    const fn beside(self, yardstick: f64) -> Self {
        Self { yardstick: Some(yardstick), ..self }
    }
}

const fn at_most(step_1: f64, goal: f64) -> Option<Bounds> {
    Some(Bounds { step_1: Bound::AtMost(step_1), goal: Bound::AtMost(goal) })
}

const fn at_least(step_1: f64, goal: f64) -> Option<Bounds> {
    Some(Bounds { step_1: Bound::AtLeast(step_1), goal: Bound::AtLeast(goal) })
}

fn iops(row: &Row) -> f64 {
    row.iops
}

fn mib_s(row: &Row) -> f64 {
    row.mib_s
}

fn p50(row: &Row) -> f64 {
    row.p50_us
}

fn cpu(row: &Row) -> f64 {
    row.cpu_us_per_io
}

fn tail(row: &Row) -> f64 {
    row.p99_us / row.p50_us
}

/// At depth 1 there is one after the other, so this is the whole time of each, the generator's included.
fn us_per_op(row: &Row) -> f64 {
    1e6 / row.iops
}

/// The table of issue 5, a line with two conditions being two; then what it names a peer's number for.
const GOALS: [Goal; 20] = [
    goal(
        ("4K randwrite QD1 p50, tmpfs", "µs", "169"),
        at_most(110.0, 70.0),
        Source::Load(TMPFS, "randwrite-4k-qd1", p50),
    )
    .beside(22.0),
    goal(
        ("4K randwrite QD32, tmpfs: CPU of all processes", "µs/IO", "127"),
        at_most(45.0, 25.0),
        Source::Load(TMPFS, "randwrite-4k-qd32", cpu),
    )
    .beside(4.9),
    goal(
        ("4K randwrite QD32, tmpfs", "IOPS", "11.3k"),
        at_least(40_000.0, 75_000.0),
        Source::Load(TMPFS, "randwrite-4k-qd32", iops),
    )
    .beside(169_200.0),
    goal(
        ("4K randwrite QD128, tmpfs", "IOPS", "16.9k"),
        at_least(50_000.0, 90_000.0),
        Source::Load(TMPFS, "randwrite-4k-qd128", iops),
    )
    .beside(192_300.0),
    goal(
        ("4K randread QD1 p50, tmpfs", "µs", "50"),
        at_most(45.0, 38.0),
        Source::Load(TMPFS, "randread-4k-qd1", p50),
    )
    .beside(23.3),
    goal(
        ("4K randread QD32, tmpfs: CPU of all processes", "µs/IO", "36.7"),
        at_most(18.0, 12.0),
        Source::Load(TMPFS, "randread-4k-qd32", cpu),
    )
    .beside(4.6),
    goal(
        ("4K 70/30 QD32, tmpfs", "IOPS", "17.7k"),
        at_least(45_000.0, 90_000.0),
        Source::Load(TMPFS, "randrw70-4k-qd32", iops),
    )
    .beside(175_700.0),
    goal(
        ("128K write QD16, tmpfs", "MiB/s", "268"),
        at_least(500.0, 800.0),
        Source::Load(TMPFS, "write-128k-qd16", mib_s),
    )
    .beside(3_987.0),
    goal(
        ("128K read QD16, tmpfs", "MiB/s", "1018"),
        at_least(1500.0, 2500.0),
        Source::Load(TMPFS, "read-128k-qd16", mib_s),
    )
    .beside(3_785.0),
    goal(
        ("4K randwrite QD1, disk: time per op", "µs", "690"),
        at_most(330.0, 280.0),
        Source::Load(DISK, "randwrite-4k-qd1", us_per_op),
    )
    .beside(109.5),
    goal(
        ("4K randwrite QD32, disk", "IOPS", "1.75k"),
        at_least(8_000.0, 15_000.0),
        Source::Load(DISK, "randwrite-4k-qd32", iops),
    )
    .beside(28_200.0),
    goal(
        ("4K randwrite QD32, tmpfs: p99 / p50", "", "2.7"),
        at_most(3.0, 2.0),
        Source::Load(TMPFS, "randwrite-4k-qd32", tail),
    ),
    goal(
        ("idle, one attached volume: the busiest process", "% of a core", "–"),
        at_most(0.5, 0.1),
        Source::Worst("idle"),
    ),
    goal(
        ("idle, 100 copysets on a chunkserver: the busiest one", "% of a core", "–"),
        at_most(0.5, 0.1),
        Source::Worst("idle-copysets-100"),
    ),
    goal(
        ("4K randwrite: device bytes per byte, per replica", "", "Curve ~4"),
        at_most(2.5, 2.2),
        Source::Worst("write-amplification"),
    ),
    goal(
        ("32 volumes of one backend at QD4 by one at QD128, tmpfs", "", "–"),
        at_least(0.8, 0.95),
        Source::Ratio("one-backend-32", "volumes-1"),
    ),
    goal(
        ("500 copysets per chunkserver by 12, QD32, tmpfs", "", "–"),
        at_least(0.8, 0.95),
        Source::Ratio("copysets-500", "copysets-12"),
    ),
    goal(
        ("restart after SIGTERM or SIGKILL until serving", "s", "–"),
        at_most(5.0, 2.0),
        Source::Worst("restart"),
    ),
    goal(
        ("4K randwrite QD1, tmpfs: CPU of all processes", "µs/IO", "211"),
        None,
        Source::Load(TMPFS, "randwrite-4k-qd1", cpu),
    )
    .beside(18.8),
    goal(
        ("4K randread QD1, tmpfs: CPU of all processes", "µs/IO", "73.9"),
        None,
        Source::Load(TMPFS, "randread-4k-qd1", cpu),
    )
    .beside(19.4),
];

impl Bound {
    fn is_met_by(self, value: f64) -> bool {
        match self {
            Self::AtMost(bound) => value <= bound,
            Self::AtLeast(bound) => value >= bound,
        }
    }

    fn words(self) -> String {
        match self {
            Self::AtMost(bound) => format!("≤ {bound}"),
            Self::AtLeast(bound) => format!("≥ {bound}"),
        }
    }
}

impl Source {
    /// What the yardstick came to at the same load.
    fn yardstick(self, results: &Results) -> Option<f64> {
        match self {
            Self::Load(store, work, of) => results.row(store, "qsd", work).map(of),
            Self::Ratio(..) | Self::Worst(_) => None,
        }
    }

    fn value(self, results: &Results) -> Option<f64> {
        let load = |store, work| results.row(store, "evolute", work);
        match self {
            Self::Load(store, work, of) => load(store, work).map(of),
            Self::Ratio(one, by) => Some(load(TMPFS, one)?.iops / load(TMPFS, by)?.iops),
            Self::Worst(work) => results.figures_of(work).map(|figure| figure.value).reduce(f64::max),
        }
    }
}

impl Goal {
    fn reached(&self, value: f64) -> Reached {
        match self.bounds {
            None => Reached::NoBound,
            Some(bounds) if bounds.goal.is_met_by(value) => Reached::Goal,
            Some(bounds) if bounds.step_1.is_met_by(value) => Reached::Step1,
            Some(_) => Reached::Nothing,
        }
    }

    fn bound(&self, of: fn(Bounds) -> Bound) -> String {
        self.bounds.map_or(NONE.to_owned(), |bounds| of(bounds).words())
    }
}

impl Reached {
    fn words(self) -> &'static str {
        match self {
            Self::NoBound => NONE,
            Self::Nothing => "NOT reached",
            Self::Step1 => "step 1",
            Self::Goal => "goal",
        }
    }
}

/// Every goal, in the order, whether this run measured it or not.
pub fn judge(results: &Results) -> Vec<Judged> {
    let judged = |goal: &Goal, value| (value, goal.reached(value));
    let judge = |goal: &'static Goal| {
        let value = goal.source.value(results);
        let scaled = || Some(value? * goal.yardstick? / goal.source.yardstick(results)?);
        Judged { goal, measured: value.map(|v| judged(goal, v)), scaled: scaled().map(|v| judged(goal, v)) }
    };
    GOALS.iter().map(judge).collect()
}

pub fn table_of_goals(judged: &[Judged]) -> String {
    let columns = [
        ("work", Set::Text),
        ("unit", Set::Text),
        ("peer best", Set::Number),
        ("step 1", Set::Number),
        ("goal", Set::Number),
        ("measured", Set::Number),
        ("reached", Set::Text),
        ("by the yardstick", Set::Number),
        ("reached by it", Set::Text),
    ];
    let cells: Vec<Vec<String>> = judged
        .iter()
        .map(|Judged { goal, measured, scaled }| {
            vec![
                goal.what.to_owned(),
                goal.unit.to_owned(),
                goal.peer.to_owned(),
                goal.bound(|bounds| bounds.step_1),
                goal.bound(|bounds| bounds.goal),
                measured.map_or(NONE.to_owned(), |(value, _)| short(value)),
                measured.map_or("not measured", |(_, reached)| reached.words()).to_owned(),
                scaled.map_or(NONE.to_owned(), |(value, _)| short(value)),
                scaled.map_or(NONE, |(_, reached)| reached.words()).to_owned(),
            ]
        })
        .collect();
    table(&columns, &cells)
}

/// One line for the end of a run.
pub fn summary(judged: &[Judged]) -> String {
    let count = |wanted| judged.iter().filter(|one| one.measured.map(|(_, r)| r) == wanted).count();
    let mut text = format!(
        "{} reached the goal, {} step 1, {} neither",
        count(Some(Reached::Goal)),
        count(Some(Reached::Step1)),
        count(Some(Reached::Nothing)),
    );
    if count(None) > 0 {
        let _ = write!(text, "; {} not measured", count(None));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Bound, GOALS, Reached, judge, summary, table_of_goals};
    use crate::runner::results::{Figure, Results, Row, tests::row};

    fn reached(results: &Results, what: &str) -> Option<(f64, Reached)> {
        let found = judge(results).into_iter().find(|judged| judged.goal.what.starts_with(what));
        found.expect("such a goal").measured
    }

    #[test]
    fn a_goal_is_at_least_as_hard_as_step_1_and_named_once() {
        let names: BTreeSet<&str> = GOALS.iter().map(|goal| goal.what).collect();
        assert_eq!(names.len(), GOALS.len());
        for goal in &GOALS {
            match goal.bounds.map(|bounds| (bounds.step_1, bounds.goal)) {
                None => {}
                Some((Bound::AtMost(step), Bound::AtMost(goal))) => assert!(goal < step),
                Some((Bound::AtLeast(step), Bound::AtLeast(goal))) => assert!(goal > step),
                _ => panic!("{}: bounds of two kinds", goal.what),
            }
        }
    }

    #[test]
    fn a_value_is_judged_by_the_better_bound_it_meets() {
        let measured = |iops| {
            let row = Row { iops, ..row("tmpfs", "randwrite-4k-qd128") };
            let results = Results { rows: vec![row], ..Results::default() };
            reached(&results, "4K randwrite QD128").map(|(_, reached)| reached)
        };
        assert_eq!(
            [90_000.0, 50_000.0, 49_999.0].map(measured),
            [Some(Reached::Goal), Some(Reached::Step1), Some(Reached::Nothing)]
        );
        assert_eq!(reached(&Results::default(), "4K randwrite QD128"), None);
    }

    #[test]
    fn a_slow_machine_is_told_by_the_yardstick() {
        let ours = Row { p50_us: 200.0, ..row("tmpfs", "randwrite-4k-qd1") };
        let qsd = Row { p50_us: 44.0, system: "qsd".into(), ..row("tmpfs", "randwrite-4k-qd1") };
        let results = Results { rows: vec![ours, qsd], ..Results::default() };
        let judged = judge(&results).into_iter().next().expect("the first goal");
        assert_eq!(judged.measured, Some((200.0, Reached::Nothing)));
        assert_eq!(judged.scaled, Some((100.0, Reached::Step1)));
    }

    #[test]
    fn values_that_are_not_in_a_row_are_made_of_what_is() {
        let with = |work: &str, iops| Row { iops, ..row("tmpfs", work) };
        let on_disk = Row { iops: 4000.0, ..row("disk", "randwrite-4k-qd1") };
        let figure = |name, value| Figure::new(("restart", "disk", "evolute"), name, value, "s");
        let results = Results {
            rows: vec![
                with("volumes-1", 100.0),
                with("one-backend-32", 90.0),
                with("randwrite-4k-qd32", 1.0),
                on_disk,
            ],
            figures: vec![figure("after SIGTERM", 1.0), figure("after SIGKILL", 3.0)],
        };
        assert_eq!(reached(&results, "32 volumes"), Some((0.9, Reached::Step1)));
        assert_eq!(reached(&results, "restart"), Some((3.0, Reached::Step1)), "the worse of the two");
        assert_eq!(reached(&results, "4K randwrite QD32, tmpfs: p99"), Some((2.0, Reached::Goal)));
        assert_eq!(reached(&results, "4K randwrite QD1, disk"), Some((250.0, Reached::Goal)));
        assert_eq!(reached(&results, "500 copysets"), None);
        let text = table_of_goals(&judge(&results));
        assert_eq!(text.lines().count(), GOALS.len() + 2);
        assert!(text.contains("not measured") && text.contains("NOT reached"), "{text}");
        assert!(summary(&judge(&results)).contains("not measured"));
    }
}
