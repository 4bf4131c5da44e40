//! Runs the schedulers and carries out what they decide, while this MDS leads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::heartbeat::orders::Transfer;
use crate::heartbeat::progress::Progress;
use crate::mds::Mds;
use crate::raft::NoOutcome;
use crate::scheduler::leaders::LEFT_ALONE_INTERVALS;
use crate::scheduler::{self, Decision};
use crate::standing::Now;

/// Nothing but time passed: chunkservers go offline and settle without a message.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

pub async fn run(mds: Arc<Mds>) {
    let mut version = mds.replicated.version();
    let mut news = mds.news();
    let stopping = mds.stopping();
    tokio::pin!(stopping);
    loop {
        tokio::select! {
            _ = version.changed() => {}
            _ = news.changed() => {}
            () = tokio::time::sleep(LOOK_AGAIN) => {}
            () = &mut stopping => return,
        }
        if let Err(NoOutcome::NotLeader) = turn(&mds).await {
            mds.transfers().clear();
            *mds.progress() = Progress::default();
        }
    }
}

/// An MDS that was put back learns what it forgot by itself once everybody has said what it has: nothing that is known to
/// anybody is lost by that. With somebody missing, a person decides.
async fn recover(mds: &Mds) -> Result<(), NoOutcome> {
    let unheard = mds.replicated.read(|state| mds.standing().unheard(state)).await?;
    if unheard.is_empty()
        && let Err(why) = mds.adopt(false).await?
    {
        tracing::info!(why, "what the chunkservers have does not fit together yet");
        mds.standing().ask_again();
        tokio::time::sleep(LOOK_AGAIN / 2).await;
        mds.tell();
    }
    Ok(())
}

async fn turn(mds: &Mds) -> Result<(), NoOutcome> {
    let (now, put_back) =
        mds.replicated.read(|state| (mds.standing().look(state), state.is_put_back())).await?;
    match now {
        Now::Held { .. } => return recover(mds).await,
        // Nothing is created, moved or removed before a person has looked at what came back.
        Now::Confirmed if !put_back => {}
        _ => return Ok(()),
    }
    let decisions = mds
        .replicated
        .read(|state| {
            let now = Instant::now();
            let reports = mds.reports();
            let mut transfers = mds.transfers();
            let over = reports.interval() * LEFT_ALONE_INTERVALS;
            transfers.retain(|_, transfer| {
                transfer.is_waiting(now) || now.saturating_duration_since(transfer.since) <= over
            });
            mds.progress().look(state, &reports, now);
            scheduler::plan(state, &reports, &transfers, &mds.limits, now)
        })
        .await?;
    for decision in decisions {
        // There can be thousands, and each waits for the disk; the next MDS decides the rest.
        if mds.is_stopping() {
            break;
        }
        match decision {
            Decision::Propose(command) => {
                tracing::info!(?command, "decided");
                if let Err(refused) = mds.replicated.propose(command).await? {
                    // The state moved on meanwhile; its change wakes us again.
                    tracing::info!(%refused, "decided too late");
                }
            }
            Decision::Transfer(handover) => {
                tracing::info!(?handover, "leadership is to be handed on");
                let transfer = Transfer {
                    from: handover.from,
                    to: handover.to,
                    to_chunkserver: handover.to_chunkserver,
                    since: Instant::now(),
                };
                mds.transfers().insert(handover.copyset, transfer);
                mds.tell();
            }
        }
    }
    Ok(())
}
