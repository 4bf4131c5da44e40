//! `evolute-vhost`: config → socket → attach → serve, until told to stop.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use evolute_daemon::Stop;
use evolute_vhost_backend::config::{Args, CAPABILITIES, Config, Socket};
use evolute_vhost_backend::device::{self, DeviceConfig, Endpoint, StopSignal};
use evolute_vhost_backend::volume::control::{self, AttachError, AttachedVolume, Control, ControlOptions};
use evolute_vhost_backend::volume::{Volume, VolumeOptions};

/// How often main looks whether it was told to stop, or the volume was taken away.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The control plane gets this long to hear that the volume is free; it is not worth delaying a shutdown more.
const DETACH_TIMEOUT: Duration = Duration::from_secs(2);
/// Somebody else took the volume: not a failure of this program, and not to be restarted against.
const EXIT_TAKEN_OVER: u8 = 3;

fn main() -> ExitCode {
    let args = Args::parse();
    if args.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    evolute_daemon::start();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("evolute-vhost: {error:#}");
            match error.downcast_ref() {
                Some(AttachError::TakenOver(_)) => ExitCode::from(EXIT_TAKEN_OVER),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(args: Args) -> Result<()> {
    let file = args.config.as_deref().map(evolute_daemon::read_config).transpose()?.unwrap_or_default();
    let config = args.or(file).check()?;
    let stop = stop_requests()?;
    // The socket first: a front end that connects now waits for us instead of failing.
    let endpoint = endpoint(&config)?;
    let (control, link) = control::start(ControlOptions {
        volume: config.volume.clone(),
        mds: config.mds.clone(),
        holder: holder(&config),
        takeover: config.takeover,
        state_dir: config.state_dir.clone(),
    })?;
    let Some(attached) = wait_attached(&control, &stop)? else { return Ok(()) };
    let device = DeviceConfig {
        serial: config.serial.clone(),
        read_only: config.read_only,
        queues: config.queues,
        spin_us: u32::try_from(config.spin.as_micros()).unwrap_or(u32::MAX),
        ..DeviceConfig::new(attached.size_bytes)
    };
    let options = VolumeOptions {
        read_only: config.read_only,
        fail_after: config.fail_after,
        ..VolumeOptions::default()
    };
    let signal = StopSignal::new().context("cannot make the stop signal")?;
    let serving = {
        let signal = signal.clone();
        let make = move |waker| Box::new(Volume::new(options, link, waker)) as _;
        std::thread::Builder::new()
            .name("vhost-user".into())
            .spawn(move || device::run(device, endpoint, make, signal))
            .context("cannot start the socket's thread")?
    };
    ready(&config, attached)?;
    let mut lost = None;
    while !serving.is_finished() {
        if let Some(error) = control.lost() {
            lost = Some(error);
            break;
        }
        if stop.recv_timeout(LOOK_EVERY) == Ok(()) {
            break;
        }
    }
    signal.stop();
    let served = serving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    if lost.is_none() && !control.detach(DETACH_TIMEOUT) {
        tracing::info!(
            "the control plane was not told that the volume is free; the next attach here takes it"
        );
    }
    if let Some(error) = lost {
        return Err(error.into());
    }
    served.context("the device ended")
}

fn endpoint(config: &Config) -> Result<Endpoint> {
    match &config.socket {
        Socket::Listen(path) => Ok(Endpoint::listen(path)?),
        Socket::Connected(fd) => {
            // SAFETY: fcntl with F_GETFD touches nothing but the descriptor table.
            if unsafe { libc::fcntl(*fd, libc::F_GETFD) } < 0 {
                bail!("--fd {fd} is not a descriptor given to this process");
            }
            // SAFETY: whoever started us gave this open descriptor to us, and nothing else here uses its number.
            let fd = unsafe { OwnedFd::from_raw_fd(*fd) };
            Ok(Endpoint::connected(fd))
        }
    }
}

/// Names the place that writes: the same socket on the same host is the same holder, and may attach again.
fn holder(config: &Config) -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    match &config.socket {
        Socket::Listen(path) => {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            format!("{host}:{}", path.display())
        }
        Socket::Connected(_) => format!("{host}:pid {}", std::process::id()),
    }
}

/// Waits as long as it takes; `None`: told to stop meanwhile.
fn wait_attached(control: &Control, stop: &mpsc::Receiver<()>) -> Result<Option<AttachedVolume>> {
    loop {
        if let Some(attached) = control.wait_attached(LOOK_EVERY)? {
            return Ok(Some(attached));
        }
        if stop.try_recv().is_ok() {
            return Ok(None);
        }
    }
}

fn ready(config: &Config, attached: AttachedVolume) -> Result<()> {
    let AttachedVolume { volume, size_bytes, epoch } = attached;
    tracing::info!(%volume, size_bytes, %epoch, "serving {:?}", config.volume);
    let Some(path) = &config.ready_file else { return Ok(()) };
    let socket = match &config.socket {
        Socket::Listen(path) => Some(path),
        Socket::Connected(_) => None,
    };
    let content = serde_json::json!({
        "pid": std::process::id(), "socket": socket, "volume": config.volume, "size_bytes": size_bytes,
    });
    evolute_daemon::write_ready_file(path, &content)
}

/// SIGTERM and SIGINT, as a channel.
fn stop_requests() -> Result<mpsc::Receiver<()>> {
    let (sender, receiver) = mpsc::channel();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut stop = {
        let _inside = runtime.enter();
        Stop::new()?
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            runtime.block_on(async {
                loop {
                    stop.requested().await;
                    if sender.send(()).is_err() {
                        return;
                    }
                }
            });
        })
        .context("cannot start the signals' thread")?;
    Ok(receiver)
}
