//! `evolute-mds`: settings → data directory → serve → wait for a signal.

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use evolute_control_plane::config::{Args, FileConfig};
use evolute_control_plane::mds::Server;
use serde::Serialize;

/// What whoever started us wants to know once we serve.
#[derive(Serialize)]
struct Ready {
    pid: u32,
    address: String,
    cluster: String,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let _log = evolute_daemon::start();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            evolute_daemon::last_words(&format!("evolute-mds: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let file = match &args.config {
        Some(path) => evolute_daemon::read_config(path)?,
        None => FileConfig::default(),
    };
    let config = args.over(file)?;
    // Requests are few and short; raft has its own thread.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let mut stop = evolute_daemon::Stop::new()?;
        let server = Server::start(&config).await?;
        let (address, cluster) = (server.address().to_string(), server.cluster().to_string());
        tracing::info!(address, cluster, data_dir = %config.data_dir.display(), "serving");
        if let Some(path) = &config.ready_file {
            evolute_daemon::write_ready_file(path, &Ready { pid: std::process::id(), address, cluster })?;
        }
        tokio::select! {
            () = stop.requested() => {}
            why = server.failed() => {
                server.stop().await;
                bail!("{why}");
            }
        }
        tracing::info!("stopping");
        server.stop().await;
        Ok(())
    })
}
