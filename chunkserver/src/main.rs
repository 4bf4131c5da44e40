//! `evolute-chunkserver`: config → directory → identity → shard → heartbeats, until told to stop. Or a look at the
//! directory of one that is stopped.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Parser;
use evolute_chunkserver::addresses::Addresses;
use evolute_chunkserver::chunk_store::{ChunkStore, Identity, Starts, StoreOptions};
use evolute_chunkserver::config::{Args, Config, Task};
use evolute_chunkserver::data_dir::{Absent, DataDir};
use evolute_chunkserver::heartbeat::{self, Introduction};
use evolute_chunkserver::impossible::repair;
use evolute_chunkserver::inspect::inspect;
use evolute_chunkserver::loopback;
use evolute_chunkserver::mds_memory::MdsMemory;
use evolute_chunkserver::scrub::ScrubOptions;
use evolute_chunkserver::shard::{self, ShardError, ShardHandle, ShardOptions, ToShard};
use evolute_daemon::Stop;
use evolute_protocol::geometry::MIB;
use evolute_protocol::id::{ChunkserverId, ClusterId};
use evolute_raft::Timing;

/// `inspect` has read everything, and not all of it is sound; `repair` has something left to do.
const UNSOUND: u8 = 3;

/// Open files without which it could not work.
const DESCRIPTORS_MIN: usize = 192;
/// The overlay, threads, and what RocksDB takes.
const ADDRESS_SPACE_MIN: u64 = 1 << 30;

fn main() -> ExitCode {
    let args = Args::parse();
    let _log = evolute_daemon::start();
    let done = match &args.task {
        Some(Task::Init { data_dir }) => init(data_dir),
        Some(Task::Inspect { data_dir, json, export }) => look(data_dir, *json, export.as_deref()),
        Some(Task::Repair { data_dir, json, yes, above, unfence }) => {
            put_right(data_dir, *json, *above, unfence, *yes)
        }
        None => run(args).map(|()| ExitCode::SUCCESS),
    };
    match done {
        Ok(status) => status,
        Err(error) => {
            evolute_daemon::last_words(&format!("evolute-chunkserver: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn init(data_dir: &Path) -> Result<ExitCode> {
    DataDir::init(data_dir)?;
    let done = format!("{} may be taken by a chunkserver\n", data_dir.display());
    evolute_daemon::print(&done).context("cannot write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

fn run(args: Args) -> Result<()> {
    evolute_daemon::door::enough_descriptors(DESCRIPTORS_MIN)?;
    evolute_daemon::door::enough_address_space(ADDRESS_SPACE_MIN)?;
    let file = args.config.as_deref().map(evolute_daemon::read_config).transpose()?.unwrap_or_default();
    let config = args.or(file).check()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(serve(config))
}

fn look(data_dir: &Path, json: bool, export: Option<&Path>) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let inspection = runtime.block_on(inspect(data_dir, export))?;
    let words = match json {
        true => format!("{}\n", serde_json::to_string(&inspection)?),
        false => inspection.words(),
    };
    evolute_daemon::print(&words).context("cannot write to standard output")?;
    Ok(if inspection.is_sound() { ExitCode::SUCCESS } else { ExitCode::from(UNSOUND) })
}

fn put_right(data_dir: &Path, json: bool, above: u64, unfence: &[u64], yes: bool) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let repaired = runtime.block_on(async { repair(data_dir, above, unfence, yes) })?;
    if json {
        println!("{}", serde_json::to_string(&repaired)?);
    } else {
        print!("{}", repaired.words());
    }
    Ok(if repaired.is_done() { ExitCode::SUCCESS } else { ExitCode::from(UNSOUND) })
}

async fn serve(config: Config) -> Result<()> {
    let mut stop = Stop::new()?;
    let absent = if config.existing { Absent::Refused } else { Absent::Made };
    let data_dir = DataDir::take(&config.data_dir, absent)?;
    let listener = std::net::TcpListener::bind(config.listen)
        .with_context(|| format!("cannot listen on {} (is the port in use?)", config.listen))?;
    listener.set_nonblocking(true)?;
    let address = match &config.advertise {
        Some(address) => address.clone(),
        None => listener.local_addr()?.to_string(),
    };
    warn_if_only_here(address.clone(), config.mds.clone());
    let memory = MdsMemory::open(data_dir.path()).context("cannot open mds-obeyed in the data directory")?;
    let who = Introduction {
        mds: config.mds.clone(),
        address: address.clone(),
        zone: config.zone.clone(),
        server: config.server.clone(),
        capacity_bytes: capacity(data_dir.path(), config.capacity_bytes)?,
        instance: instance()?,
        heartbeat_interval_s: config.heartbeat_interval_s,
        memory: Arc::new(memory),
    };
    let identity = tokio::select! {
        identity = identity(&data_dir, &who) => identity?,
        () = stop.requested() => return Ok(()),
    };
    let addresses = Addresses::open(data_dir.path());
    let store = StoreOptions {
        overlay_bytes_max: config.overlay_mib * MIB,
        capacity_bytes: config.capacity_bytes,
        ..StoreOptions::default()
    };
    let mut starting = shard::begin(ShardOptions {
        data_dir: data_dir.path().to_owned(),
        identity: identity.clone(),
        store,
        log_file_mib: config.log_file_mib,
        log_retain_mib: config.log_retain_mib,
        scrub: ScrubOptions {
            bytes_per_second: config.scrub_mib_s * MIB,
            period_ms: config.scrub_period_h * 3600 * 1000,
        },
        trash_delay_ms: config.trash_delay_s * 1000,
        listener,
        addresses: addresses.clone(),
        timing: Timing::default(),
        start: Some(Bytes::copy_from_slice(&who.instance)),
    })?;
    // It may have to wait for space. Nothing has been changed before it serves that a crash would not leave as well.
    let serves = tokio::select! {
        serves = starting.serves() => serves,
        () = stop.requested() => {
            starting.give_up().await;
            return Ok(());
        }
    };
    let (handle, thread) = starting.outcome(serves)?;
    let mut joined = tokio::task::spawn_blocking(move || thread.join());
    tracing::info!(chunkserver = %identity.chunkserver, cluster = %identity.cluster, address, "serving");
    let told = tell_ready(&config, &address, &identity);
    let ended = async {
        told?;
        tokio::select! {
            () = stop.requested() => Ok(()),
            refused = heartbeat::run(&who, &identity, &handle, &addresses) => Err(refused.into()),
            ended = &mut joined => return Ok(Some(ended)),
        }
        .map(|()| None)
    }
    .await;
    evolute_daemon::notify::stopping();
    // However it ends: what uses the store is gone before this process is, or RocksDB aborts it.
    let (joined, why) = match ended {
        Ok(Some(ended)) => (ended, Ok(())),
        Ok(None) => (stopped(&handle, joined).await, Ok(())),
        Err(why) => (stopped(&handle, joined).await, Err(why)),
    };
    let starts = joined?.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    if why.is_ok() {
        heartbeat::end(&who, &identity, starts).await;
    }
    why
}

/// Looks up names, which can take long: on a thread of its own.
fn warn_if_only_here(address: String, mds: Vec<String>) {
    std::thread::spawn(move || {
        if let Some(elsewhere) = loopback::mds_elsewhere(&address, &mds) {
            tracing::warn!(
                "others are told {address}, which is loopback, and the control plane is not on this machine alone \
                 ({elsewhere}): nobody elsewhere reaches this chunkserver; give --listen or --advertise an address that \
                 they reach"
            );
        }
    });
}

/// What the shard's thread ended with, as far as it could be seen.
type Ended = Result<std::thread::Result<Result<Starts, ShardError>>, tokio::task::JoinError>;

async fn stopped(
    handle: &ShardHandle,
    joined: tokio::task::JoinHandle<std::thread::Result<Result<Starts, ShardError>>>,
) -> Ended {
    handle.send(ToShard::Stop);
    joined.await
}

fn tell_ready(config: &Config, address: &str, identity: &Identity) -> Result<()> {
    if let Some(path) = &config.ready_file {
        let content = serde_json::json!({
            "pid": std::process::id(), "address": address, "chunkserver": identity.chunkserver.0,
        });
        evolute_daemon::write_ready_file(path, &content)?;
    }
    evolute_daemon::notify::ready();
    Ok(())
}

/// Who we are: what the disk says, or, for an empty one, what the control plane gives us.
async fn identity(data_dir: &DataDir, who: &Introduction) -> Result<Identity> {
    if let Some(identity) = ChunkStore::identity(&data_dir.store())? {
        return Ok(identity);
    }
    let given = heartbeat::first_registration(who).await?;
    let cluster =
        given.cluster_id.try_into().ok().context("the control plane gave a cluster id that is none")?;
    Ok(Identity {
        cluster: ClusterId(cluster),
        chunkserver: ChunkserverId(given.chunkserver),
        token: Bytes::from(given.token),
    })
}

fn capacity(data_dir: &Path, limit: Option<u64>) -> Result<u64> {
    let disk = rustix::fs::statvfs(data_dir).context("cannot ask the file system for its size")?;
    let size = disk.f_blocks * disk.f_frsize;
    Ok(limit.map_or(size, |limit| limit.min(size)))
}

/// Random, new at every start: tells two running servers with one identity apart.
fn instance() -> Result<Vec<u8>> {
    let mut bytes = vec![0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}
