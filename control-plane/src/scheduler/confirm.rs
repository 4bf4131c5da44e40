//! What the reports show to be done, put into the state: replicas that exist, deleted volumes that are gone.

use std::time::Instant;

use crate::heartbeat::reports::Reports;
use crate::state::command::{CreatedReplica, ReplicasCreated, VolumeDropped};
use crate::state::{Command, State};

pub fn plan(state: &State, reports: &Reports, now: Instant) -> Vec<Command> {
    let mut commands = Vec::new();
    let mut replicas = Vec::new();
    for (&id, copyset) in state.copysets() {
        for replica in copyset.replicas.iter().filter(|replica| !replica.created) {
            let reported =
                reports.online(replica.chunkserver, now).and_then(|report| report.replicas.get(&id));
            if reported.is_some_and(|reported| reported.replica == replica.id.0) {
                replicas.push(CreatedReplica { copyset: id.0, replica: replica.id.0 });
            }
        }
    }
    if !replicas.is_empty() {
        commands.push(Command::ReplicasCreated(ReplicasCreated { replicas }));
    }
    for (&volume, copysets) in state.dropping() {
        for &copyset in copysets {
            let members = state.copysets().get(&copyset).into_iter().flat_map(|record| &record.replicas);
            // A leader says so after the drop was committed; it stays true whoever leads by now.
            let dropped = members.into_iter().any(|replica| {
                let report = reports.online(replica.chunkserver, now);
                report.and_then(|report| report.replicas.get(&copyset)).is_some_and(|reported| {
                    reported.replica == replica.id.0 && reported.dropped_volumes.contains(&volume.0)
                })
            });
            if dropped {
                commands.push(Command::VolumeDropped(VolumeDropped { copyset: copyset.0, volume: volume.0 }));
            }
        }
    }
    commands
}
