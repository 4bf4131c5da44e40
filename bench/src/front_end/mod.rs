//! A guest's driver without the guest: connects to a vhost-user-blk server, keeps its queues full, measures.
//!
//! ```text
//!  Options ──▶ Plan ──▶ Worker per queue: prefill ─▶ load (measured) ─▶ read back ──▶ Tally ──▶ Report
//! ```
//!
//! It needs of the server what the `virtio-driver` crate needs: VERSION_1 and the protocol features MQ, CONFIG,
//! REPLY_ACK and CONFIGURE_MEM_SLOTS. Whoever wants to look at other processes exactly while load is measured gives
//! an [`Observer`].

pub mod content;
mod memory;
pub mod options;
pub mod report;
mod worker;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use self::memory::SharedMemory;
use self::options::{Options, Plan};
use self::report::{CpuUse, Report, Tally};
use self::worker::{Clock, Request, Worker};

/// Why a run could not be made. I/O errors and stalls are no such reason: they are in the [`Report`].
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    #[error("{why}")]
    Usage { why: String },
    #[error("cannot connect to {}: {source}", socket.display())]
    Connect { socket: PathBuf, source: io::Error },
    #[error("{doing}: {source}")]
    Server { doing: &'static str, source: io::Error },
    #[error("cannot make shared memory: {source}")]
    Memory { source: io::Error },
    /// A thread of ours panicked.
    #[error("a worker died")]
    WorkerDied,
}

/// Hears when the measured time begins and ends.
pub trait Observer {
    /// The device is ours and nothing was asked of it yet: here one can watch it idle.
    fn connected(&mut self) {}
    fn begins(&mut self) {}
    fn ends(&mut self) {}
}

/// Nobody watches.
impl Observer for () {}

/// Runs what the options say. `cancelled` ends it early, with what was measured until then.
pub fn run(
    options: &Options,
    observer: &mut impl Observer,
    cancelled: &AtomicBool,
) -> Result<Report, FrontEndError> {
    drive(options, observer, cancelled).map(Driven::report)
}

/// The same on several devices at once, told as one: depths, sizes and counts are sums. The observer watches the
/// first; the others begin and end within milliseconds of it, so a ramp is what makes the sums right.
pub fn run_together(
    devices: &[Options],
    observer: &mut impl Observer,
    cancelled: &AtomicBool,
) -> Result<Report, FrontEndError> {
    let Some((first, others)) = devices.split_first() else {
        return Err(FrontEndError::Usage { why: "no device".to_owned() });
    };
    thread::scope(|scope| {
        let threads: Vec<_> =
            others.iter().map(|options| scope.spawn(move || drive(options, &mut (), cancelled))).collect();
        let mut all = drive(first, observer, cancelled);
        for thread in threads {
            let other = thread.join().unwrap_or(Err(FrontEndError::WorkerDied));
            all = all.and_then(|all| Ok(all.and(other?)));
        }
        all.map(Driven::report)
    })
}

/// One device after its run.
struct Driven {
    plan: Plan,
    capacity: u64,
    features: u64,
    tally: Tally,
    cpu: CpuUse,
    /// How many devices the sums are of.
    devices: usize,
}

impl Driven {
    fn and(mut self, other: Self) -> Self {
        self.plan.size += other.plan.size;
        self.capacity += other.capacity;
        self.tally.merge(other.tally);
        self.devices += other.devices;
        self
    }

    fn report(self) -> Report {
        let mut report = Report::new(&self.plan, self.capacity, self.features, self.tally, self.cpu);
        report.qd *= self.devices;
        report
    }
}

fn drive(
    options: &Options,
    observer: &mut impl Observer,
    cancelled: &AtomicBool,
) -> Result<Driven, FrontEndError> {
    Plan::check(options)?;
    let wanted = VirtioFeatureFlags::VERSION_1.bits()
        | VirtioFeatureFlags::RING_EVENT_IDX.bits()
        | VirtioBlkFeatureFlags::FLUSH.bits()
        | VirtioBlkFeatureFlags::BLK_SIZE.bits()
        | VirtioBlkFeatureFlags::MQ.bits();
    let socket = options.socket.to_str().ok_or_else(|| FrontEndError::Usage {
        why: format!("{} is not a path in UTF-8", options.socket.display()),
    })?;
    let mut transport: Box<VirtioBlkTransport> = Box::new(
        VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(socket, wanted)
            .map_err(|source| FrontEndError::Connect { socket: options.socket.clone(), source })?,
    );
    let config = transport
        .get_config()
        .map_err(|source| FrontEndError::Server { doing: "reading the device's configuration", source })?;
    let features = transport.get_features();
    let capacity = u64::from(config.capacity).saturating_mul(512);
    let has_flush = features & VirtioBlkFeatureFlags::FLUSH.bits() != 0;
    let plan = Plan::new(options.clone(), capacity, has_flush)?;

    // Before the queues and after them: whoever uses the memory is gone when it is unmapped.
    let slot_bytes = if options.prefill { plan.fill_block } else { plan.block };
    let memory = SharedMemory::new(plan.depth_per_queue * options.queues * slot_bytes)?;
    let queues = VirtioBlkQueue::<'static, Request>::setup_queues(&mut *transport, options.queues, plan.ring)
        .map_err(|source| FrontEndError::Server { doing: "setting up the queues", source })?;
    memory.share(&mut *transport)?;
    let mut workers: Vec<Worker> = queues
        .into_iter()
        .enumerate()
        .map(|(i, queue)| {
            let events = (transport.get_submission_notifier(i), transport.get_completion_fd(i));
            let slots = memory.slots(i * plan.depth_per_queue, plan.depth_per_queue, slot_bytes);
            Worker::new(&plan, cancelled, i, queue, events, slots)
        })
        .collect();

    observer.connected();
    if options.prefill {
        in_parallel(&mut workers, Worker::prefill, || {})?;
    }
    let cpu = measure(&mut workers, &plan, observer)?;
    in_parallel(&mut workers, Worker::read_back, || {})?;

    let mut tally = Tally::default();
    for worker in workers {
        tally.merge(worker.tally);
    }
    // The workers are gone, and with them what borrowed the plan.
    Ok(Driven { plan, capacity, features, tally, cpu, devices: 1 })
}

/// The measured phase. Gives this process's own CPU time in it.
fn measure(
    workers: &mut [Worker],
    plan: &Plan,
    observer: &mut impl Observer,
) -> Result<CpuUse, FrontEndError> {
    let count_from = Instant::now() + plan.options.ramp;
    let clock = Clock { count_from, end: count_from + plan.options.runtime };
    let finished = AtomicBool::new(false);
    let mut used = CpuUse::default();
    let load = |worker: &mut Worker| {
        let result = worker.load(clock);
        finished.store(true, Ordering::Relaxed);
        result
    };
    in_parallel(workers, load, || {
        sleep_until(clock.count_from, &finished);
        observer.begins();
        let before = CpuUse::now();
        sleep_until(clock.end, &finished);
        used = CpuUse::now().since(before);
        observer.ends();
    })?;
    Ok(used)
}

/// A phase: the same on every queue, each on its thread, while `meanwhile` runs here.
fn in_parallel<'p>(
    workers: &mut [Worker<'p>],
    phase: impl Fn(&mut Worker<'p>) -> Result<(), FrontEndError> + Sync,
    meanwhile: impl FnOnce(),
) -> Result<(), FrontEndError> {
    thread::scope(|scope| {
        let phase = &phase;
        let threads: Vec<_> = workers.iter_mut().map(|worker| scope.spawn(move || phase(worker))).collect();
        meanwhile();
        let results: Vec<_> =
            threads.into_iter().map(|t| t.join().unwrap_or(Err(FrontEndError::WorkerDied))).collect();
        results.into_iter().collect()
    })
}

/// Ends early when a queue has stalled or was cancelled; checked often enough for that, seldom enough to cost nothing.
fn sleep_until(when: Instant, finished: &AtomicBool) {
    const NAP: Duration = Duration::from_millis(50);
    loop {
        let left = when.saturating_duration_since(Instant::now());
        if left.is_zero() || finished.load(Ordering::Relaxed) {
            return;
        }
        thread::sleep(left.min(NAP));
    }
}
