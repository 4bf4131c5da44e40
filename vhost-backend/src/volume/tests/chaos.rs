//! Everything at once: cuts before and after, refusals, replies in any order, leaders that change, followers that are
//! behind, chunkservers that die and come back, while a guest reads and writes. No matter what:
//!
//! - every ticket is completed exactly once, and none fails;
//! - a read returns what the last completed write to that block put there;
//! - a sequence means one change.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use evolute_protocol::geometry::CHUNK_BYTES;
use evolute_protocol::id::CopysetId;
use proptest::prelude::{ProptestConfig, any, prop, prop_assert, proptest};

use super::cluster::{Cluster, SERVERS};
use super::rig::Rig;
use super::{check_sequences, pattern};
use crate::backing::{Backing, Outcome, Request, Ticket};
use crate::volume::VolumeOptions;

const BLOCKS: u64 = 48;

/// Eight blocks in each of six chunks, the first of which crosses into it.
fn place(block: u64) -> u64 {
    (block / 8 + 1) * CHUNK_BYTES + (block % 8) * 4096 - 512
}

#[derive(Debug)]
enum Out {
    Write { block: u64, value: Vec<u8> },
    Read { block: u64 },
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 40, ..ProptestConfig::default() })]
    #[test]
    fn every_request_ends_once_and_reads_follow_the_model(
        steps in prop::collection::vec((any::<u8>(), 0..BLOCKS, any::<u8>()), 100..300),
        chaos in prop::sample::select(vec![0u32, 6, 17]),
        shuffle in 0usize..12,
    ) {
        let cluster = Cluster::start(3);
        let options = VolumeOptions {
            silence: Duration::from_millis(40),
            operations_max: 24,
            ..VolumeOptions::default()
        };
        let mut rig = Rig::attached(&cluster, options);
        for server in SERVERS {
            let mut state = cluster.state();
            let faults = state.fault(server);
            (faults.chaos, faults.shuffle) = (chaos, shuffle);
        }
        let mut model: HashMap<u64, Vec<u8>> = HashMap::new();
        let mut out: HashMap<Ticket, Out> = HashMap::new();
        for (what, block, seed) in steps {
            match what % 16 {
                0 => {
                    let copyset = CopysetId(u32::from(seed) % 3 + 1);
                    cluster.state().lead(copyset, Some(SERVERS[usize::from(seed / 3) % 3]));
                }
                1 => cluster.kill(SERVERS[usize::from(seed) % 3]),
                2 => {
                    let mut state = cluster.state();
                    let hung = &mut state.fault(SERVERS[usize::from(seed) % 3]).hung;
                    *hung = !*hung;
                }
                3 => SERVERS.iter().for_each(|server| cluster.revive(*server)),
                4 => {
                    // A follower stays where it is now, or comes up to date again.
                    let mut state = cluster.state();
                    let copyset = CopysetId(u32::from(seed) % 3 + 1);
                    let past = state.past(copyset);
                    let behind = &mut state.fault(SERVERS[usize::from(seed / 3) % 3]).behind;
                    if behind.remove(&copyset).is_none() {
                        behind.insert(copyset, past);
                    }
                }
                _ => {
                    // Overlapping requests in flight have no order; the model stays out of that.
                    let busy = out.values().any(|of| match of {
                        Out::Write { block: other, .. } | Out::Read { block: other } => *other == block,
                    });
                    if !busy && what % 16 < 11 {
                        let value = pattern(u64::from(seed), 4096);
                        let data = Bytes::from(value.clone());
                        let ticket = rig.submit(Request::Write { offset: place(block), data });
                        out.insert(ticket, Out::Write { block, value });
                    } else if !busy {
                        let ticket = rig.submit(Request::Read { offset: place(block), len: 4096 });
                        out.insert(ticket, Out::Read { block });
                    }
                }
            }
            rig.turn();
            take(&mut rig, &mut out, &mut model)?;
        }
        // All is well again, and so everything ends.
        for server in SERVERS {
            cluster.revive(server);
            cluster.state().fault(server).hung = false;
            cluster.state().fault(server).chaos = 0;
        }
        rig.until("all answered", |rig| rig.outcomes.len() == out.len());
        take(&mut rig, &mut out, &mut model)?;
        prop_assert!(out.is_empty());
        for block in 0..BLOCKS {
            let expected = model.get(&block).cloned().unwrap_or(vec![0; 4096]);
            prop_assert!(rig.read(place(block), 4096) == expected, "block {}", block);
        }
        if !cluster.state().received.is_empty() {
            check_sequences(&cluster);
        }
        let counters = rig.volume.counters();
        prop_assert!(counters.requests == counters.completed && counters.failed == 0, "{:?}", counters);
        prop_assert!(rig.volume.ready());
    }
}

fn take(
    rig: &mut Rig,
    out: &mut HashMap<Ticket, Out>,
    model: &mut HashMap<u64, Vec<u8>>,
) -> Result<(), proptest::test_runner::TestCaseError> {
    for (ticket, outcome) in std::mem::take(&mut rig.outcomes) {
        match (out.remove(&ticket), outcome) {
            (Some(Out::Write { block, value }), Outcome::Done) => {
                model.insert(block, value);
            }
            (Some(Out::Read { block }), Outcome::Data(parts)) => {
                let expected = model.get(&block).cloned().unwrap_or(vec![0; 4096]);
                prop_assert!(parts.concat() == expected, "block {} is not what was written last", block);
            }
            (of, outcome) => prop_assert!(false, "{:?} ended as {:?}", of, outcome),
        }
    }
    Ok(())
}
