//! Attach, fence, restart, retry, de-duplication and the reads of leaders and followers, in every order.

use evolute_models::writers::{Bounds, Mutant, Writers};
use stateright::{Checker, Model};

const ONE: Bounds = Bounds {
    copysets: 1,
    replicas: 2,
    writes: 2,
    reads: 0,
    restart: false,
    takeover: false,
    elections: 1,
    entries: 5,
    proofs: false,
};

/// Two guests' writes in turn to one block: an old message may come at any time, also after a restart.
const RETRIES: Bounds = Bounds { restart: true, ..ONE };
/// Two blocks in two copysets, and somebody takes the volume over.
const TAKEOVER: Bounds = Bounds { copysets: 2, replicas: 1, takeover: true, elections: 0, entries: 4, ..ONE };
/// One of them in memory would do, were it not for the next leader.
const TAKEOVER_AND_ELECTION: Bounds = Bounds { takeover: true, writes: 1, ..ONE };
/// Two reads beside two writes.
const READS: Bounds = Bounds { reads: 2, entries: 4, proofs: true, ..ONE };
/// One that led comes back with what it had.
const RETURN: Bounds = Bounds { writes: 1, entries: 3, elections: 2, ..READS };

fn explore(bounds: Bounds, mutant: Mutant) -> impl Checker<Writers> {
    let start = std::time::Instant::now();
    let checker = Writers { bounds, mutant }.checker().spawn_bfs().join();
    println!("{mutant:?}: {} states in {:?}", checker.unique_state_count(), start.elapsed());
    checker
}

fn holds(bounds: Bounds) {
    explore(bounds, Mutant::None).assert_properties();
}

fn fails(bounds: Bounds, mutant: Mutant, how: &str) {
    let checker = explore(bounds, mutant);
    let path =
        checker.discovery("nothing goes wrong").unwrap_or_else(|| panic!("{mutant:?} was not noticed"));
    assert_eq!(path.last_state().wrong, Some(how), "{path:?}");
}

const LATE: &str = "an older write came over a newer one";
const OLD_EPOCH: &str = "a change of an older epoch was applied after an attach returned";
const STALE: &str = "a read went back in time";

#[test]
fn a_retry_changes_nothing_twice_whatever_comes_late() {
    holds(RETRIES);
}

#[test]
fn nothing_of_an_older_epoch_is_applied_once_an_attach_returned() {
    holds(TAKEOVER);
    holds(TAKEOVER_AND_ELECTION);
}

#[test]
fn no_read_goes_back_in_time_whoever_answers() {
    holds(READS);
    holds(RETURN);
}

#[test]
fn without_deduplication_a_late_copy_comes_over_a_newer_write() {
    fails(RETRIES, Mutant::NoDeduplication, LATE);
}

#[test]
fn a_retry_under_a_new_sequence_is_a_second_write() {
    fails(RETRIES, Mutant::RetryWithNewSequence, LATE);
}

#[test]
fn a_fence_in_memory_is_forgotten_by_the_next_leader() {
    fails(TAKEOVER_AND_ELECTION, Mutant::FenceInMemory, OLD_EPOCH);
}

#[test]
fn an_attach_that_returns_before_the_last_fence_is_overtaken() {
    fails(TAKEOVER, Mutant::LazyFence, OLD_EPOCH);
}

#[test]
fn a_follower_asked_for_no_index_is_stale() {
    fails(READS, Mutant::FollowerWithoutIndex, STALE);
}

#[test]
fn a_follower_asked_beside_a_change_for_what_was_acknowledged_unsees_it() {
    fails(READS, Mutant::NeededBesideChange, STALE);
}

#[test]
fn what_a_leader_showed_and_did_not_name_is_unseen() {
    fails(READS, Mutant::LeaderNamesLess, STALE);
}

#[test]
fn a_log_that_is_long_enough_proves_nothing_without_its_term() {
    fails(READS, Mutant::ProofWithoutTerm, STALE);
}

#[test]
fn the_term_of_an_entry_is_not_the_term_it_was_committed_in() {
    fails(RETURN, Mutant::TermOfEntry, STALE);
}

#[test]
fn a_leader_that_need_not_know_what_a_follower_showed_unsees_it() {
    fails(READS, Mutant::FollowerNotRemembered, STALE);
}

#[test]
fn a_leader_that_is_not_judged_by_its_term_unsees_a_change_in_flight() {
    fails(READS, Mutant::NoTerm, STALE);
}
