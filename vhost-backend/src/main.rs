//! `evolute-vhost`: config → sockets → attach → serve, until told to stop.

use std::os::fd::{FromRawFd, OwnedFd};
use std::panic::resume_unwind;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread::{JoinHandle, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use evolute_daemon::Stop;
use evolute_vhost_backend::backing::Capacity;
use evolute_vhost_backend::config::{self, Args, CAPABILITIES, Config, Socket};
use evolute_vhost_backend::device::{self, DeviceConfig, DeviceError, Endpoint, SocketAccess, StopSignal};
use evolute_vhost_backend::io_thread::IoLoop;
use evolute_vhost_backend::volume::control::{
    self, AttachError, AttachedVolume, Control, ControlLink, ControlOptions,
};
use evolute_vhost_backend::volume::identity::Secret;
use evolute_vhost_backend::volume::{Volume, VolumeOptions};

/// How often main looks whether it was told to stop, or the volume was taken away.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The control plane gets this long to hear that the volume is free; it is not worth delaying a shutdown more.
const DETACH_TIMEOUT: Duration = Duration::from_secs(2);
/// Somebody else took the volume, or deleted it: not a failure of this program, and not to be restarted against.
const EXIT_TAKEN_OVER: u8 = 3;

/// Somebody else's volume may be about to be let go of, as when a virtual machine moves. It is asked for this long; then the
/// program ends and says so, and whoever runs it as a service starts it again.
const HELD_PATIENCE: Duration = Duration::from_secs(3);

/// Open files without which it could not work.
const DESCRIPTORS_MIN: usize = 32;

fn main() -> ExitCode {
    let args = Args::parse();
    if args.print_capabilities {
        let printed = evolute_daemon::print(&format!("{CAPABILITIES}\n"));
        return if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let _log = evolute_daemon::start();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            evolute_daemon::last_words(&format!("evolute-vhost: {error:#}"));
            match error.downcast_ref() {
                Some(AttachError::TakenOver(_) | AttachError::Deleted(_)) => ExitCode::from(EXIT_TAKEN_OVER),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(args: Args) -> Result<()> {
    evolute_daemon::door::enough_descriptors(DESCRIPTORS_MIN)?;
    let file = args.config.as_deref().map(evolute_daemon::read_config).transpose()?.unwrap_or_default();
    let config = args.or(file).check()?;
    config.ready_file.as_deref().map(evolute_daemon::check_ready_file).transpose()?;
    let stop = stop_requests()?;
    // The sockets first: a front end that connects now is answered, whether there is a control plane or not.
    let endpoints =
        config.disks.iter().map(|disk| endpoint(disk, config.access)).collect::<Result<Vec<_>>>()?;
    let io = Arc::new(IoLoop::start(config.spin).context("cannot start the I/O thread")?);
    let mut disks = Vec::new();
    let begun = config.disks.iter().zip(endpoints).try_for_each(|(disk, endpoint)| {
        disks.push(Disk::attach(&config, &io, disk.clone(), endpoint)?);
        Ok(())
    });
    let ended = begun.and_then(|()| serve(&config, &mut disks, &stop));
    evolute_daemon::notify::stopping();
    let stopped = stop_all(disks);
    // The last one: every device has let go of it.
    if let Some(io) = Arc::into_inner(io) {
        io.end().context("the I/O thread failed")?;
    }
    ended.and(stopped)
}

/// One volume on its way to its guest, and while it is served.
struct Disk {
    of: config::Disk,
    control: Control,
    state: State,
}

enum State {
    /// Its front end is answered, and its guest waits. Held: somebody else has the volume, and since when we know.
    Attaching {
        device: Device,
        held: Option<Instant>,
    },
    Serving {
        attached: AttachedVolume,
        device: Device,
    },
    /// Its guest has left, or nothing can be done for it any more. `ours`: the volume is still to be given back.
    Over {
        ours: bool,
    },
}

/// The thread that answers a disk's front end.
struct Device {
    signal: StopSignal,
    thread: JoinHandle<Result<(), DeviceError>>,
}

impl Device {
    fn start(
        config: &Config,
        io: &Arc<IoLoop>,
        (of, capacity): (&config::Disk, Capacity),
        endpoint: Endpoint,
        link: ControlLink,
    ) -> Result<Self> {
        let settings = DeviceConfig {
            capacity,
            serial: of.serial.clone(),
            read_only: config.read_only,
            queues: config.queues,
            ..DeviceConfig::default()
        };
        let options = VolumeOptions {
            read_only: config.read_only,
            fail_after: config.fail_after,
            ..VolumeOptions::default()
        };
        let signal = StopSignal::new().context("cannot make the stop signal")?;
        let (io, stop) = (Arc::clone(io), signal.clone());
        let make = move |waker, seat| Box::new(Volume::new(options, link, waker, seat)) as _;
        let thread = std::thread::Builder::new()
            .name("vhost-user".into())
            .spawn(move || device::serve(&io, settings, endpoint, make, stop))
            .context("cannot start the socket's thread")?;
        Ok(Self { signal, thread })
    }

    fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// What is out has its time.
    fn stop(self) -> Result<()> {
        self.signal.stop();
        self.thread.join().unwrap_or_else(|panic| resume_unwind(panic)).context("the device ended")
    }
}

impl Disk {
    fn attach(config: &Config, io: &Arc<IoLoop>, of: config::Disk, endpoint: Endpoint) -> Result<Self> {
        let capacity = Capacity::default();
        let place = place(&of.socket);
        let (control, link) = control::start(ControlOptions {
            volume: of.volume.clone(),
            mds: config.mds.clone(),
            holder: format!("{}:{place}", rustix::system::uname().nodename().to_string_lossy()),
            secret: Secret::of_place(config.state_dir.as_deref(), &place).map_err(AttachError::State)?,
            // It may have run without a state directory until now.
            former_secret: Some(Secret::of_boot(&place)),
            takeover: config.takeover,
            state_dir: config.state_dir.clone(),
            capacity: capacity.clone(),
        })?;
        let device = Device::start(config, io, (&of, capacity), endpoint, link)?;
        Ok(Self { of, control, state: State::Attaching { device, held: None } })
    }

    fn is_attaching(&self) -> bool {
        matches!(self.state, State::Attaching { .. })
    }

    /// Takes it further, waiting for the control plane no longer than `patience`. An error is its end.
    fn look(&mut self, patience: Duration) -> Result<()> {
        match std::mem::replace(&mut self.state, State::Over { ours: false }) {
            State::Attaching { device, .. } | State::Serving { device, .. } if device.has_ended() => {
                self.state = State::Over { ours: true };
                device.stop()?;
            }
            State::Attaching { device, held } => {
                self.state = match self.control.wait_attached(patience) {
                    Ok(None) => State::Attaching { device, held },
                    Ok(Some(attached)) => {
                        let AttachedVolume { volume, size_bytes, epoch } = attached;
                        tracing::info!(%volume, size_bytes, %epoch, "serving {:?}", self.of.volume);
                        State::Serving { attached, device }
                    }
                    Err(error @ AttachError::AttachedElsewhere { .. })
                        if held.is_none_or(|since| since.elapsed() < HELD_PATIENCE) =>
                    {
                        if held.is_none() {
                            tracing::warn!("{error}; waiting a moment for it");
                        }
                        State::Attaching { device, held: held.or_else(|| Some(Instant::now())) }
                    }
                    Err(error) => {
                        // Nobody would serve what it still got.
                        self.control.give_up();
                        let _ = device.stop();
                        return Err(error.into());
                    }
                };
            }
            State::Serving { attached, device } => match self.control.lost() {
                None => self.state = State::Serving { attached, device },
                Some(lost) => {
                    let _ = device.stop();
                    return Err(lost.into());
                }
            },
            over @ State::Over { .. } => self.state = over,
        }
        Ok(())
    }
}

/// Until told to stop, or until no disk is left; then, why. One disk's end is not that of the others.
fn serve(config: &Config, disks: &mut [Disk], stop: &mpsc::Receiver<()>) -> Result<()> {
    let mut ready = false;
    let mut last = Ok(());
    loop {
        let attaching = disks.iter().filter(|disk| disk.is_attaching()).count();
        // It waits either here or for the control plane's answers.
        let (here, there) = match u32::try_from(attaching).unwrap_or(u32::MAX) {
            0 => (LOOK_EVERY, Duration::ZERO),
            n => (Duration::ZERO, LOOK_EVERY / n),
        };
        if stop.recv_timeout(here) == Ok(()) {
            return Ok(());
        }
        for disk in disks.iter_mut() {
            if let Err(error) = disk.look(there) {
                if config.lists_disks {
                    tracing::error!("volume {:?} is not served: {error:#}", disk.of.volume);
                }
                last = Err(error);
            }
        }
        if disks.iter().all(|disk| matches!(disk.state, State::Over { .. })) {
            return last;
        }
        if !ready && !disks.iter().any(Disk::is_attaching) {
            ready = true;
            tell_ready(config, disks)?;
        }
    }
}

/// All at the same time: what is out on one has its time, and so has the control plane.
fn stop_all(disks: Vec<Disk>) -> Result<()> {
    for disk in &disks {
        if let State::Attaching { device, .. } | State::Serving { device, .. } = &disk.state {
            device.signal.stop();
        }
    }
    let stop = |disk: Disk| {
        let (served, ours) = match disk.state {
            State::Serving { device, .. } => (device.stop(), true),
            State::Attaching { device, .. } => (device.stop(), false),
            State::Over { ours } => (Ok(()), ours),
        };
        if ours && !disk.control.detach(DETACH_TIMEOUT) {
            tracing::info!(
                "the control plane was not told that the volume is free; the next attach here takes it"
            );
        }
        served
    };
    std::thread::scope(|scope| {
        let stopping: Vec<_> = disks.into_iter().map(|disk| scope.spawn(move || stop(disk))).collect();
        // The scope waits for all of them, whichever fails first.
        let ended =
            |thread: ScopedJoinHandle<'_, _>| thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        stopping.into_iter().try_for_each(ended)
    })
}

fn endpoint(disk: &config::Disk, access: SocketAccess) -> Result<Endpoint> {
    match &disk.socket {
        Socket::Listen(path) => Ok(Endpoint::listen(path, access)?),
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

/// The place on this host that writes: who serves the same socket again is the same holder.
fn place(socket: &Socket) -> String {
    match socket {
        Socket::Listen(path) => {
            std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string()
        }
        Socket::Connected(_) => format!("pid {}", std::process::id()),
    }
}

fn tell_ready(config: &Config, disks: &[Disk]) -> Result<()> {
    evolute_daemon::notify::ready();
    let Some(path) = &config.ready_file else { return Ok(()) };
    let served = disks.iter().filter_map(|disk| match &disk.state {
        State::Serving { attached, .. } => Some((&disk.of, attached)),
        State::Attaching { .. } | State::Over { .. } => None,
    });
    let mut told: Vec<_> = served
        .map(|(of, attached)| {
            let socket = match &of.socket {
                Socket::Listen(path) => Some(path),
                Socket::Connected(_) => None,
            };
            serde_json::json!({ "socket": socket, "volume": of.volume, "size_bytes": attached.size_bytes })
        })
        .collect();
    let mut content = match config.lists_disks {
        true => serde_json::json!({ "disks": told }),
        false => told.pop().unwrap_or_default(),
    };
    content["pid"] = std::process::id().into();
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
