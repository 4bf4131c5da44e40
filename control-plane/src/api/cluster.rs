//! The cluster as an operator sees it.

use std::time::Instant;

use evolute_protocol::rpc::cluster_server;
use evolute_protocol::rpc::{ClusterStatus, MdsStatus, StatusRequest};
use tonic::{Request, Response, Status};

use super::{Cluster, volumes};
use crate::health;
use crate::raft::NoOutcome;

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
                let health = health::judge(state, &reports, now);
                ClusterStatus {
                    cluster_id: mds.replicated.cluster().0.to_vec(),
                    mds: vec![myself],
                    chunkservers: health.chunkservers,
                    copysets: health.copysets,
                    volumes: volumes::all(state, &reports, now),
                    health: i32::from(health.health),
                    reasons: health.reasons,
                    repairs: Vec::new(),
                }
            })
            .await?;
        Ok(Response::new(status))
    }
}
