//! Replicas that come back, in every order.

use evolute_models::members::{Bounds, Members, Mutant};
use stateright::{Checker, Model};

const BOUNDS: Bounds = Bounds { elections: 2, writes: 1, changes: 2 };

fn explore(mutant: Mutant) -> impl Checker<Members> {
    let start = std::time::Instant::now();
    let checker = Members { bounds: BOUNDS, mutant }.checker().spawn_bfs().join();
    println!("{mutant:?}: {} states in {:?}", checker.unique_state_count(), start.elapsed());
    checker
}

fn fails(mutant: Mutant) {
    let checker = explore(mutant);
    let path =
        checker.discovery("nothing goes wrong").unwrap_or_else(|| panic!("{mutant:?} was not noticed"));
    assert_eq!(path.last_state().wrong, Some("two leaders committed different entries in one place"));
}

#[test]
fn replicas_under_fresh_ids_come_back_and_nothing_committed_is_lost() {
    explore(Mutant::None).assert_properties();
}

#[test]
fn a_replica_that_comes_back_empty_under_its_former_id_splits_the_group() {
    fails(Mutant::SameIds);
}

#[test]
fn a_replica_that_comes_back_as_it_was_under_its_former_id_splits_the_group() {
    fails(Mutant::SameIdsOldData);
}
