//! The checker against brute force: whatever small history one thinks of, both say the same.

use evolute_torture::random::Random;
use evolute_torture::register::{
    History, NEVER, Read, Verdict, Violation, Write, ZERO, check, search, zones,
};

/// Tries every order. Uncertain writes may be left out, or must come before whatever began after their answer.
fn explained(history: &History) -> bool {
    #[derive(Clone, Copy)]
    struct Op(u64, u64, u64, bool, bool);
    fn go(value: u64, left: &[Op], latest: u64) -> bool {
        if left.iter().all(|op| !op.4) {
            return true;
        }
        (0..left.len()).any(|i| {
            let op = left[i];
            let after_all = left.iter().all(|other| !other.4 || other.1 >= op.0);
            let in_time = op.4 || latest <= op.1;
            let fits = op.3 || op.2 == value;
            let mut rest = left.to_vec();
            rest.remove(i);
            after_all && in_time && fits && go(if op.3 { op.2 } else { value }, &rest, latest.max(op.0))
        })
    }
    let mut ops: Vec<Op> =
        history.writes.iter().map(|w| Op(w.invoked, w.answered, w.value, true, w.certain)).collect();
    ops.extend(history.reads.iter().map(|r| Op(r.invoked, r.answered, r.value, false, true)));
    go(history.initial, &ops, 0)
}

/// Up to seven operations; half of the histories are nearly right, so that both verdicts are common.
fn random_history(random: &mut Random, zeroes: bool) -> History {
    let initial = if zeroes && random.chance(60) { ZERO } else { 1000 };
    let mut history = History { initial, ..History::default() };
    let ops = 2 + random.below(6);
    let span = 4 + random.below(20);
    let mut values = vec![initial];
    let mut now = 1;
    for id in 1..=ops {
        let sequential = random.chance(40);
        let invoked = if sequential { now } else { 1 + random.below(span) };
        let answered = invoked + random.below(if sequential { 3 } else { 8 });
        now = now.max(answered + 1);
        if random.chance(50) {
            let value = if zeroes && random.chance(50) { ZERO } else { id };
            let (answered, certain) = match random.below(10) {
                0 => (NEVER, false),
                1 => (answered, false),
                _ => (answered, true),
            };
            history.writes.push(Write { value, invoked, answered, certain });
            values.push(value);
        } else {
            let value =
                if random.chance(60) { values[values.len() - 1] } else { values[random.index(values.len())] };
            let value = if random.chance(3) { 77 } else { value };
            history.reads.push(Read { value, invoked, answered });
        }
    }
    history
}

fn agree(rounds: usize, zeroes: bool, verdict: impl Fn(&History) -> bool) -> (usize, usize) {
    let mut random = Random::new(if zeroes { 2 } else { 1 });
    let (mut legal, mut illegal) = (0, 0);
    for _ in 0..rounds {
        let history = random_history(&mut random, zeroes);
        let expected = explained(&history);
        assert_eq!(verdict(&history), expected, "{history:#?}");
        if expected { legal += 1 } else { illegal += 1 }
    }
    println!("{legal} legal, {illegal} illegal");
    (legal, illegal)
}

#[test]
fn zones_and_brute_force_agree_on_thirty_thousand_histories() {
    let (legal, illegal) = agree(30_000, false, |history| zones::check(history).is_ok());
    assert!(legal > 5000 && illegal > 5000, "{legal} legal, {illegal} illegal");
}

#[test]
fn the_search_and_brute_force_agree_with_values_written_many_times() {
    let (legal, illegal) = agree(30_000, true, |history| search::check(history, 1_000_000) == Verdict::Fine);
    assert!(legal > 5000 && illegal > 5000, "{legal} legal, {illegal} illegal");
}

#[test]
fn the_whole_check_and_brute_force_agree_with_values_written_many_times() {
    let (legal, illegal) = agree(30_000, true, |history| match check(history) {
        Verdict::Fine => true,
        Verdict::Violated(_) => false,
        Verdict::Undecided => panic!("seven operations are no effort"),
    });
    assert!(legal > 5000 && illegal > 5000, "{legal} legal, {illegal} illegal");
}

fn write(value: u64, invoked: u64, answered: u64) -> Write {
    Write { value, invoked, answered, certain: true }
}

#[test]
fn a_lost_write_is_named() {
    let history = History {
        initial: ZERO,
        writes: vec![write(1, 10, 20), write(2, 30, 40)],
        reads: vec![Read { value: 1, invoked: 50, answered: 60 }],
    };
    let violated = Violation::Stale { older: 1, older_seen_until: 50, newer: 2, newer_from: 40 };
    assert_eq!(check(&history), Verdict::Violated(violated));
}

#[test]
fn zeroes_after_an_acknowledged_write_are_a_lost_write() {
    let history = History {
        initial: ZERO,
        writes: vec![write(ZERO, 1, 2), write(1, 10, 20)],
        reads: vec![Read { value: ZERO, invoked: 50, answered: 60 }],
    };
    assert!(matches!(check(&history), Verdict::Violated(Violation::StaleZeroes { .. })));
}

#[test]
fn an_unanswered_write_may_appear_late_and_then_stays() {
    let late = Write { value: 1, invoked: 5, answered: NEVER, certain: false };
    let zero = Read { value: ZERO, invoked: 10, answered: 11 };
    let one = Read { value: 1, invoked: 20, answered: 21 };
    let back = Read { value: ZERO, invoked: 30, answered: 31 };
    let mut history = History { initial: ZERO, writes: vec![late], reads: vec![zero, one] };
    assert_eq!(check(&history), Verdict::Fine);
    history.reads.push(back);
    assert!(matches!(check(&history), Verdict::Violated(_)));
}

#[test]
fn a_failed_write_never_appears_after_its_answer() {
    let failed = Write { value: 1, invoked: 5, answered: 8, certain: false };
    let zero = Read { value: ZERO, invoked: 10, answered: 11 };
    let one = Read { value: 1, invoked: 20, answered: 21 };
    let history = History { initial: ZERO, writes: vec![failed], reads: vec![zero, one] };
    assert!(matches!(check(&history), Verdict::Violated(_)));
}

#[test]
fn a_million_operations_of_one_sector_are_judged_in_seconds() {
    let mut history = History { initial: ZERO, ..History::default() };
    for id in 1..=500_000_u64 {
        history.writes.push(write(id, id * 10, id * 10 + 25));
        history.reads.push(Read { value: id, invoked: id * 10 + 26, answered: id * 10 + 28 });
    }
    // Overlapping writes make some of these orders impossible; what matters here is that it ends.
    let _ = check(&history);
}
