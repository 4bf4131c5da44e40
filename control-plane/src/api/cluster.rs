//! The cluster as an operator sees it.

use std::path::Path;
use std::time::Instant;

use evolute_protocol::id::ChunkserverId;
use evolute_protocol::rpc::cluster_server;
use evolute_protocol::rpc::{
    AcceptMdsRequest, AcceptMdsResponse, ClusterStatus, DecideRequest, DecideResponse, Decision, ErrorWord,
    Health, MdsStatus, RetireRequest, RetireResponse, StatusRequest,
};
use tonic::{Request, Response, Status};

use super::{Cluster, invalid, volumes};
use crate::health;
use crate::mds::Mds;
use crate::raft::NoOutcome;
use crate::scheduler::obstacles;
use crate::standing::Now;
use crate::state::command::{Accept, DecideChunkserver, Decided, RetireChunkserver};
use crate::state::{Command, State};

#[tonic::async_trait]
impl cluster_server::Cluster for Cluster {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<ClusterStatus>, Status> {
        let mds = &self.0;
        let group = mds.replicated.status().await.ok_or(NoOutcome::NotLeader)?;
        let myself = MdsStatus {
            address: mds.address.to_string(),
            leader: true,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            term: group.term,
            applied_index: group.applied.map_or(0, |at| at.index),
        };
        let status = mds
            .replicated
            .read(|state| {
                let (reports, now) = (mds.reports(), Instant::now());
                let mut health = health::judge(state, &reports, &mds.limits, now);
                let mut standing = standing_in_words(mds, state);
                let full = free_bytes(&mds.data_dir).and_then(|free| disk_in_words(&mds.data_dir, free));
                let amiss = mds.standing().is_held() || state.is_put_back() || full.is_some();
                standing.extend(full);
                if !standing.is_empty() {
                    health.reasons.splice(0..0, standing);
                    health.health = match health.health {
                        Health::Ok | Health::Unknown if amiss => Health::Degraded,
                        Health::Ok => Health::Unknown,
                        worse => worse,
                    };
                }
                ClusterStatus {
                    cluster_id: mds.replicated.cluster().0.to_vec(),
                    mds: vec![myself],
                    chunkservers: health.chunkservers,
                    copysets: health.copysets,
                    volumes: volumes::all(state, &reports, now),
                    health: i32::from(health.health),
                    reasons: health.reasons,
                    repairs: mds.progress().status(state, &reports, now),
                }
            })
            .await?;
        Ok(Response::new(status))
    }

    async fn accept_mds(
        &self,
        request: Request<AcceptMdsRequest>,
    ) -> Result<Response<AcceptMdsResponse>, Status> {
        let mds = &self.0;
        let look = |state: &State| {
            let now = mds.standing().look(state);
            (now, state.is_put_back(), standing_in_words(mds, state))
        };
        let (now, put_back, mut lines) = mds.replicated.read(look).await?;
        let is_needed = now != Now::Confirmed || put_back;
        if is_needed {
            lines.extend(going_on_means(&now));
        }
        if is_needed && request.into_inner().go_on {
            tracing::warn!(?now, "a person says that this MDS is to go on");
            match now {
                Now::Held { .. } => {
                    if let Err(why) = mds.adopt(true).await? {
                        return Err(ErrorWord::Busy.status(format!("not yet: {why}; try again")));
                    }
                }
                Now::Waiting { .. } | Now::Telling => mds.standing().go_on(),
                Now::Confirmed => {}
            }
            if put_back {
                mds.carry_out(Command::Accept(Accept {})).await?;
            }
            mds.tell();
        }
        Ok(Response::new(AcceptMdsResponse { is_needed, lines }))
    }

    async fn decide(&self, request: Request<DecideRequest>) -> Result<Response<DecideResponse>, Status> {
        let (mds, request) = (&self.0, request.into_inner());
        let id = ChunkserverId(request.chunkserver);
        let decided = match request.decision() {
            Decision::Accept => Decided::Accepted,
            Decision::Dead => Decided::Dead,
            Decision::Remove => Decided::Removed,
            Decision::Unknown => return Err(invalid("a decision this version does not know")),
        };
        {
            let (reports, now) = (mds.reports(), Instant::now());
            let online = reports.is_online(id, now);
            match decided {
                Decided::Accepted if reports.online(id, now).is_none_or(|report| report.put_back() == 0) => {
                    return Err(invalid(format!(
                        "{id} does not report a replica that was put back: there is nothing to accept"
                    )));
                }
                Decided::Dead if online => {
                    return Err(invalid(format!(
                        "{id} reports: it is not dead (`evolute chunkserver retire {}` empties it)",
                        id.0
                    )));
                }
                Decided::Removed if online => {
                    return Err(invalid(format!("{id} reports: it has to be stopped before it is removed")));
                }
                Decided::Accepted | Decided::Dead | Decided::Removed => {}
            }
        }
        let command = DecideChunkserver { chunkserver: id.0, decided: decided.into() };
        mds.carry_out(Command::DecideChunkserver(command)).await?;
        tracing::info!(chunkserver = %id, ?decided, "an operator decided");
        let obstacles = |state: &State| match decided {
            Decided::Dead => obstacles::of(id, state, &mds.reports(), &mds.limits, Instant::now()),
            Decided::Accepted | Decided::Removed => Vec::new(),
        };
        let obstacles = mds.replicated.read(obstacles).await?;
        Ok(Response::new(DecideResponse { obstacles }))
    }

    async fn retire(&self, request: Request<RetireRequest>) -> Result<Response<RetireResponse>, Status> {
        let (mds, RetireRequest { chunkserver, retiring }) = (&self.0, request.into_inner());
        mds.carry_out(Command::RetireChunkserver(RetireChunkserver { chunkserver, retiring })).await?;
        tracing::info!(chunkserver, retiring, "an operator decided");
        let id = ChunkserverId(chunkserver);
        let answer = mds
            .replicated
            .read(|state| {
                let (reports, now) = (mds.reports(), Instant::now());
                let judged = health::judge(state, &reports, &mds.limits, now);
                RetireResponse {
                    chunkserver: judged.chunkservers.into_iter().find(|known| known.id == chunkserver),
                    obstacles: if retiring {
                        obstacles::of(id, state, &reports, &mds.limits, now)
                    } else {
                        Vec::new()
                    },
                }
            })
            .await?;
        Ok(Response::new(answer))
    }
}

/// What keeps this MDS from leading, or was to be looked at by a person; one sentence each, and none if all is well.
fn standing_in_words(mds: &Mds, state: &State) -> Vec<String> {
    let mut standing = mds.standing();
    let mut words = Vec::new();
    match standing.look(state) {
        Now::Confirmed => {}
        Now::Telling => words.push("this MDS started lately and introduces itself to its chunkservers".to_owned()),
        Now::Waiting { missing } => words.push(format!(
            "this MDS started lately and gives nothing before more than half of its chunkservers are back; {} are missing",
            missing.len()
        )),
        Now::Held { why } => {
            words.push(format!(
                "this MDS was put back from a copy that is older than what its chunkservers have obeyed ({why}): it does \
                 not lead; put the newer directory back, or type: evolute cluster accept-mds"
            ));
            let unheard = standing.unheard(state);
            words.extend(unheard.iter().map(|id| format!("{id} has not said what it has")));
        }
    }
    if state.is_put_back() {
        words.push(
            "this MDS was put back from an older copy and has learnt from its chunkservers what it forgot; nothing is \
             created, moved or repaired before somebody has looked at the volumes (those whose names are lost are called \
             recovered-N) and types: evolute cluster accept-mds"
                .to_owned(),
        );
    }
    words
}

/// Below this the MDS cannot make many more files of its log, each of 8 MiB, nor of its state.
const ROOM_BYTES_MIN: u64 = 64 << 20;

fn free_bytes(data_dir: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(data_dir).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

fn disk_in_words(data_dir: &Path, free_bytes: u64) -> Option<String> {
    (free_bytes < ROOM_BYTES_MIN).then(|| {
        format!(
            "the disk of this MDS is full: {} MiB are free where {} is; volumes cannot be created, attached or given space \
             once nothing is: free some there",
            free_bytes >> 20,
            data_dir.display()
        )
    })
}

fn going_on_means(now: &Now) -> Vec<String> {
    let text: &[&str] = match now {
        Now::Waiting { .. } | Now::Telling => &[
            "going on means: numbers are given although fewer than half of the chunkservers could say whether this MDS is \
             older than what they have obeyed",
        ],
        Now::Held { .. } => &[
            "going on means: the MDS takes over what the chunkservers that were heard have, and gives numbers above all \
             that they remember",
            "what only those know that were not heard is lost to it: their newest segments may read as zeroes",
        ],
        Now::Confirmed => &["going on means: copysets are created, balanced and repaired again"],
    };
    text.iter().map(|&text| text.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{ROOM_BYTES_MIN, disk_in_words, free_bytes};

    #[test]
    fn a_full_disk_of_the_mds_is_said_and_one_with_room_is_not() {
        let dir = tempfile::tempdir().expect("temp dir");
        assert!(free_bytes(dir.path()).is_some() && free_bytes(&dir.path().join("none")).is_none());
        let words = disk_in_words(Path::new("/srv/mds"), ROOM_BYTES_MIN - 1).expect("full");
        assert!(words.contains("63 MiB") && words.contains("/srv/mds"), "{words}");
        assert_eq!(disk_in_words(Path::new("/srv/mds"), ROOM_BYTES_MIN), None);
    }
}
