//! `evolute-mds`: settings → data directory → serve → wait for a signal.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::Parser;
use evolute_control_plane::config::{Args, FileConfig, Task};
use evolute_control_plane::mds::Server;
use evolute_control_plane::raft::data_dir::DataDir;
use evolute_protocol::id::ClusterId;
use serde::Serialize;

/// What whoever started us wants to know once we serve.
#[derive(Serialize)]
struct Ready {
    pid: u32,
    address: String,
    cluster: String,
}

/// Open files without which it could not work.
const DESCRIPTORS_MIN: usize = 64;

fn main() -> ExitCode {
    let args = Args::parse();
    let _log = evolute_daemon::start();
    let done = match &args.task {
        Some(Task::Init { data_dir }) => init(data_dir),
        None => run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            evolute_daemon::last_words(&format!("evolute-mds: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn init(data_dir: &Path) -> anyhow::Result<()> {
    let cluster = DataDir::init(data_dir, ClusterId(rand::random()))?;
    let dir = data_dir.display();
    evolute_daemon::print(&format!(
        "{dir} is ready for cluster {cluster}, which begins when evolute-mds serves from it\n"
    ))
    .context("cannot write to standard output")
}

fn run(args: Args) -> anyhow::Result<()> {
    evolute_daemon::door::enough_descriptors(DESCRIPTORS_MIN)?;
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
        let told = match &config.ready_file {
            Some(path) => {
                evolute_daemon::write_ready_file(path, &Ready { pid: std::process::id(), address, cluster })
            }
            None => Ok(()),
        };
        let ended = match told {
            Ok(()) => {
                evolute_daemon::notify::ready();
                tokio::select! {
                    () = stop.requested() => Ok(()),
                    why = server.failed() => Err(anyhow!("{why}")),
                }
            }
            told => told,
        };
        evolute_daemon::notify::stopping();
        tracing::info!("stopping");
        // However it ends: what uses the state is gone before this process is, or RocksDB aborts it.
        server.stop().await;
        ended
    })
}
