//! Measurements that need a cluster of their own: each starts what it needs, and asks one question.
//!
//! They are chosen by name like the loads, are made on one store, and tell [`Figure`]s or rows
//! in which something else than the load varies.

mod amplification;
mod copysets;
mod idle;
mod in_flight;
mod restart;
mod volumes;

use super::BenchError;
use super::lab::{Lab, Subject};
use super::machine::Store;
use super::record::Record;
use super::results::Figure;

#[derive(Debug, Clone, Copy)]
pub struct Special {
    pub name: &'static str,
    pub store: Store,
    /// Left out of a quick run: it takes longer than all of that.
    pub slow: bool,
    /// About, of a whole run; for whoever waits.
    pub seconds: u32,
    run: fn(&Lab<'_>, &mut Record) -> Result<(), BenchError>,
}

pub const ALL: [Special; 6] = [
    Special { name: "idle", store: Store::Tmpfs, slow: false, seconds: 50, run: idle::run },
    Special { name: "volumes", store: Store::Tmpfs, slow: false, seconds: 210, run: volumes::run },
    Special { name: "copysets", store: Store::Tmpfs, slow: false, seconds: 120, run: copysets::run },
    Special { name: "in-flight", store: Store::Tmpfs, slow: false, seconds: 15, run: in_flight::run },
    Special {
        name: amplification::WORK,
        store: Store::Disk,
        slow: true,
        seconds: 120,
        run: amplification::run,
    },
    Special { name: restart::WORK, store: Store::Disk, slow: true, seconds: 90, run: restart::run },
];

impl Special {
    /// What goes wrong is a failure of this one alone, unless the run was stopped or its results cannot be kept.
    pub fn run(&self, lab: &Lab<'_>, record: &mut Record) -> Result<(), BenchError> {
        println!("\n{} on {}, about {} s", self.name, self.store.name(), self.seconds);
        match (self.run)(lab, record) {
            Err(BenchError::Interrupted) => Err(BenchError::Interrupted),
            Err(error) => {
                record.failed(format!("{} on {}: {error}", self.name, self.store.name()));
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// A figure of ours on the store of a cluster.
fn figure(cluster: &Subject, work: &str, name: impl Into<String>, value: f64, unit: &str) -> Figure {
    Figure::new((work, cluster.place.store.name(), cluster.system.name), name, value, unit)
}

fn stop(cluster: Subject, of: &str, record: &mut Record) {
    if !cluster.stop() {
        record.failed(format!("{of}: the cluster did not stop cleanly"));
    }
}

const KIB: f64 = 1024.0;
/// The work under which memory is told, whichever run saw it.
pub const MEMORY: &str = "memory";

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::ALL;
    use crate::runner::works;

    #[test]
    fn no_two_works_share_a_name() {
        let loads = works::ALL.iter().chain(&works::CURVE).map(|work| work.name);
        let names: Vec<&str> = loads.chain(ALL.iter().map(|special| special.name)).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    }
}
