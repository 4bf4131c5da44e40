//! The cluster as an operator sees it.

use std::time::Instant;

use evolute_protocol::id::ChunkserverId;
use evolute_protocol::rpc::cluster_server;
use evolute_protocol::rpc::{ClusterStatus, MdsStatus, RetireRequest, RetireResponse, StatusRequest};
use tonic::{Request, Response, Status};

use super::{Cluster, volumes};
use crate::health;
use crate::raft::NoOutcome;
use crate::scheduler::obstacles;
use crate::state::Command;
use crate::state::command::RetireChunkserver;

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
                let health = health::judge(state, &reports, &mds.limits, now);
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
