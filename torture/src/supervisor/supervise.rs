//! The run: start, break, heal, check; end clean.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::about::About;
use super::acks::Acks;
use super::active::{self, Active, process};
use super::cluster::Cluster;
use super::course::{Next, Scene};
use super::coverage::Program;
use super::fault::Fault;
use super::leaders::Leader;
use super::network::Place;
use super::options::Options;
use super::process::{State, tool};
use super::report::{Happened, Report, attribute, by_fault};
use crate::blkcheck::report::Verdict;
use crate::blkcheck::{self, Handle};
use crate::random::Random;

/// A handshake with a server that is there.
const MOVED_WITHIN: Duration = Duration::from_secs(30);
pub(super) const TICK: Duration = Duration::from_millis(10);
const PROGRESS_EVERY: Duration = Duration::from_secs(2);
/// A healed cluster is whole again by then, or never.
const WHOLE_WITHIN: Duration = Duration::from_secs(90);
/// A drained and completely read area.
const ROUND_WITHIN: Duration = Duration::from_secs(150);
/// With images everything written is kept in memory until the next power cut of that disk, so requests are shorter.
const SIZE_MAX_KIB_WITH_IMAGES: u32 = 64;

/// Between two faults so much is acknowledged, or so long passes: what nobody wrote cannot be lost.
const ACKS_BETWEEN: u64 = 100;
const PATIENCE_BETWEEN: Duration = Duration::from_secs(3);

pub(super) struct Run<'o> {
    pub(super) options: &'o Options,
    pub(super) listed: Vec<Fault>,
    pub(super) random: Random,
    pub(super) cluster: Cluster,
    pub(super) load: Handle,
    pub(super) stop: &'o AtomicBool,
    pub(super) active: Vec<Active>,
    pub(super) history: Vec<Happened>,
    pub(super) deck: Vec<Fault>,
    pub(super) failures: Vec<String>,
    pub(super) unknowns: Vec<String>,
    pub(super) said: Instant,
    pub(super) checks_without_one: usize,
    pub(super) led: BTreeSet<Leader>,
    pub(super) replicas: usize,
    pub(super) replicas_in_files: usize,
    pub(super) sectors_in_files: u64,
    pub(super) acks: Acks,
}

/// Does it all. An error is a run that could not be made; everything else is in the report.
pub fn run(options: &Options, stop: &AtomicBool) -> Result<Report> {
    let began = Instant::now();
    let about = About::gather(&options.programs()?, options.commit.as_deref());
    let listed = Fault::parse_list(&options.faults).map_err(anyhow::Error::msg)?;
    let with_images = listed.iter().any(|fault| fault.needs_images());
    if with_images {
        mounts_of_our_own()?;
    }
    let folder = options.work.join(format!("evolute-torture-{}", std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let result = run_in(options, stop, &listed, with_images, &folder);
    let mut report = match result {
        Ok(report) => report,
        Err(error) => {
            return Err(error.context(format!("logs are kept in {}", folder.display())));
        }
    };
    report.about = Some(about);
    report.seconds = began.elapsed().as_secs_f64();
    if options.keep || report.verdict == Verdict::Fail {
        report.folder = Some(folder.display().to_string());
    } else {
        std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(report)
}

fn run_in(
    options: &Options,
    stop: &AtomicBool,
    listed: &[Fault],
    with_images: bool,
    folder: &Path,
) -> Result<Report> {
    println!("starting a cluster in {}", folder.display());
    let cluster =
        Cluster::start(options, folder, with_images, listed.iter().any(|fault| fault.needs_proxy()))?;
    let load = blkcheck::start(blkcheck::options::Options {
        duration: 0,
        seed: options.seed,
        area_mib: options.area_mib,
        rate: options.rate,
        size_max_kib: if with_images { SIZE_MAX_KIB_WITH_IMAGES } else { 1024 },
        round: 3600,
        stall: ROUND_WITHIN.as_secs(),
        ..blkcheck::options::Options::new(cluster.socket.clone())
    })?;
    let mut random = Random::new(options.seed);
    let run = Run {
        options,
        listed: listed.to_vec(),
        random: random.fork(),
        cluster,
        load,
        stop,
        active: Vec::new(),
        history: Vec::new(),
        deck: Vec::new(),
        failures: Vec::new(),
        unknowns: Vec::new(),
        said: Instant::now(),
        checks_without_one: 0,
        led: BTreeSet::new(),
        replicas: 0,
        replicas_in_files: 0,
        sectors_in_files: 0,
        acks: Acks::default(),
    };
    run.go()
}

impl Run<'_> {
    fn go(mut self) -> Result<Report> {
        if self.settle("before the first fault") {
            self.torment()?;
            if self.settle("after the last fault") && !self.stop.load(Ordering::SeqCst) {
                self.through_each_leader()?;
                self.without_each()?;
                self.through_each_disk()?;
            }
        }
        let leader_changes = self.cluster.view().leader_changes;
        let interrupted = self.stop.load(Ordering::SeqCst);
        let load = match if interrupted { self.load.abort() } else { self.load.finish() } {
            Ok(load) => Some(load),
            Err(error) => {
                self.failures.push(format!("the backend broke the protocol: {error}"));
                None
            }
        };
        self.failures.extend(self.cluster.stop());
        if interrupted {
            self.unknowns.push("it was ended early".to_owned());
        }
        let slow = load.as_ref().map_or(&[][..], |load| &load.slow);
        attribute(&mut self.history, slow);
        let of = |fault: Fault| self.history.iter().filter(|one| one.fault == fault && one.happened).count();
        let servers = self.options.chunkservers;
        let mut report = Report {
            verdict: Verdict::Unknown,
            seed: self.options.seed,
            seconds: 0.0,
            about: None,
            window_acks: self.options.window_acks,
            faults: by_fault(&self.listed, &self.history, self.options.window_acks),
            kills: of(Fault::KillLeader)
                + of(Fault::KillFollower)
                + of(Fault::KillMds)
                + of(Fault::KillBackend)
                + (of(Fault::KillChunkservers) + of(Fault::AllAddressesMoved)) * servers
                + of(Fault::KillEverything) * (servers + 2)
                + self.checks_without_one
                + if self.replicas_in_files > 0 { servers } else { 0 },
            power_cuts_one: of(Fault::PowerOne),
            power_cuts_all: of(Fault::PowerAll),
            leader_changes,
            violations: 0,
            failures: self.failures,
            unknowns: self.unknowns,
            checks_without_one: self.checks_without_one,
            leaders_read_through: self.led.iter().map(|(_, on)| on).collect::<BTreeSet<_>>().len(),
            replicas_read_through: self.led.len(),
            replicas: self.replicas,
            replicas_in_files: self.replicas_in_files,
            sectors_in_files: self.sectors_in_files,
            load_average_at_end: load_average(),
            load,
            history: self.history,
            folder: None,
        };
        report.settle_verdict();
        Ok(report)
    }

    /// Faults until the time is over, a violation is found, or somebody wants us to end.
    fn torment(&mut self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(self.options.duration);
        let mut next_fault = Instant::now();
        let mut acked_before = 0;
        let mut next_round = Instant::now() + Duration::from_secs(self.options.round);
        let last = end + Duration::from_secs(self.options.until_covered);
        while !self.must_end() {
            let over = Instant::now() >= end;
            let lacking = if over { self.lacking() } else { Vec::new() };
            if over && (lacking.is_empty() || Instant::now() >= last) {
                break;
            }
            self.tick()?;
            if Instant::now() >= next_round {
                if !self.settle("at the end of a round") {
                    return Ok(());
                }
                next_round = Instant::now() + Duration::from_secs(self.options.round);
                next_fault = Instant::now();
            }
            let acked = self.load.progress.acked_writes.load(Ordering::Relaxed);
            let worth =
                acked >= acked_before + ACKS_BETWEEN || Instant::now() >= next_fault + PATIENCE_BETWEEN;
            if Instant::now() >= next_fault && worth && self.active.len() < self.options.overlap {
                acked_before = acked;
                let pause = self.options.every_ms;
                next_fault = Instant::now() + Duration::from_millis(pause / 2 + self.random.below(pause));
                if over {
                    self.deck = lacking.into_iter().filter(|&fault| !self.is_pending(fault)).collect();
                }
                self.break_something(!over)?;
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    /// Moves the load to a backend that has taken the volume, and looks after those that lost it.
    fn go_to_successors(&mut self) -> Result<()> {
        for failure in self.cluster.backends.bury()? {
            self.fail(failure);
        }
        let Some(socket) = self.cluster.backends.has_succeeded() else { return Ok(()) };
        if !self.load.move_to(socket, MOVED_WITHIN) {
            self.fail(format!("the load could not go to another backend within {MOVED_WITHIN:?}"));
        }
        self.cluster.backends.replace(&mut self.cluster.backend)?;
        let wakes = Instant::now() + Duration::from_millis(self.random.below(3000));
        for active in self.active.iter_mut().filter(|active| active.fault == Fault::ZombieBackend) {
            active.succeeded = true;
            active.heal_at = wakes;
        }
        Ok(())
    }

    pub(super) fn must_end(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
            || self.load.is_finished()
            || self.load.progress.violations.load(Ordering::Relaxed) > 0
    }

    /// The next card of a shuffled deck of all that were listed, so that all happen even in a short run. What cannot
    /// be done now is done as soon as it can.
    fn break_something(&mut self, anew: bool) -> Result<()> {
        if self.deck.is_empty() && anew {
            self.deck.clone_from(&self.listed);
            for i in (1..self.deck.len()).rev() {
                let other = self.random.index(i + 1);
                self.deck.swap(i, other);
            }
        }
        for i in (0..self.deck.len()).rev() {
            let fault = self.deck[i];
            let under_way = self.load.progress.under_way.load(Ordering::Relaxed);
            let begun = active::begin(fault, &mut self.cluster, &self.active, &mut self.random)?;
            if let Some(mut begun) = begun {
                begun.under_way = under_way;
                self.deck.remove(i);
                self.tell(&format!("{fault}: {}", begun.detail));
                self.active.push(begun);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Looks after processes and heals what is due.
    fn tick(&mut self) -> Result<()> {
        self.look_after_processes()?;
        self.close_windows();
        self.go_to_successors()?;
        self.go_on_with_courses()?;
        let mut i = 0;
        while i < self.active.len() {
            if active::is_due(&self.active[i], &mut self.cluster) {
                let over = self.active.swap_remove(i);
                self.heal(over)?;
            } else {
                i += 1;
            }
        }
        if self.said.elapsed() >= PROGRESS_EVERY {
            self.tell("");
        }
        Ok(())
    }

    fn go_on_with_courses(&mut self) -> Result<()> {
        let acked = self.load.progress.acked_writes.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for active in &mut self.active {
            let Some(course) = &mut active.course else { continue };
            let mut scene = Scene {
                cluster: &mut self.cluster,
                places: &mut active.places,
                detail: &mut active.detail,
                random: &mut self.random,
                acked,
                failures: Vec::new(),
            };
            let next = course.go_on(&mut scene).with_context(|| format!("{} cannot go on", active.fault))?;
            failures.append(&mut scene.failures);
            if next != Next::GoesOn {
                active.happened = next == Next::Over;
                active.course = None;
            }
        }
        failures.into_iter().for_each(|failure| self.fail(failure));
        Ok(())
    }

    fn heal(&mut self, mut over: Active) -> Result<()> {
        if let Some(failure) = active::heal(&mut over, &mut self.cluster)? {
            self.fail(failure);
        }
        if !over.happened {
            // Nobody ran into it: once more.
            self.deck.push(over.fault);
        }
        self.history.push(Happened {
            detail: over.detail,
            happened: over.happened,
            led: over.led,
            program: over.fault.takes_turns().then(|| Program::at(over.places[0])),
            under_way: over.under_way,
            ..Happened::new(
                over.fault,
                self.on_the_loads_clock(over.began),
                self.on_the_loads_clock(Instant::now()),
            )
        });
        Ok(())
    }

    /// A program that ends without being asked to is a failure, except when its disk failed; it is started again.
    fn look_after_processes(&mut self) -> Result<()> {
        let count = self.cluster.chunkservers.len();
        let places = [Place::Mds, Place::Backend].into_iter().chain((0..count).map(Place::Chunkserver));
        for place in places {
            let before = process(&mut self.cluster, place).state();
            let Some(status) = process(&mut self.cluster, place).ended()? else { continue };
            let name = process(&mut self.cluster, place).name.clone();
            let excused = self.active.iter().any(|a| a.fault == Fault::FailingSync && a.holds(place));
            if before == State::Stopping {
                if !status.success() {
                    self.fail(format!("{name} was asked to stop and ended with {status}"));
                }
                continue;
            }
            if excused {
                continue;
            }
            let during: Vec<&str> = self.active.iter().map(|active| active.fault.name()).collect();
            self.fail(format!("{name} ended by itself ({status}) during {during:?}"));
            process(&mut self.cluster, place).start()?;
        }
        Ok(())
    }

    pub(super) fn fail(&mut self, failure: String) {
        self.tell(&format!("FAILURE: {failure}"));
        // One that repeats itself says no more the tenth time.
        if self.failures.len() < 50 {
            self.failures.push(failure);
        }
    }

    /// Heals everything, waits until the cluster is whole, and checks every sector.
    fn settle(&mut self, when: &str) -> bool {
        let (by_themselves, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.active)
            .into_iter()
            .partition(|one| one.fault == Fault::ZombieBackend || one.goes_by_steps);
        self.active = by_themselves;
        for over in others {
            // A program that was asked to stop gets its time.
            while !active::is_due(&over, &mut self.cluster)
                && over.places.iter().any(|&p| process(&mut self.cluster, p).state() == State::Stopping)
            {
                if self.look_after_processes().is_err() {
                    break;
                }
                std::thread::sleep(TICK);
            }
            if let Err(error) = self.heal(over) {
                self.unknowns.push(format!("a fault could not be healed: {error:#}"));
                return false;
            }
        }
        // With everything else healed a takeover comes to its end, so does what goes by steps, and a backend that lost its
        // volume.
        while (!self.active.is_empty() || self.cluster.backends.has_zombies())
            && !self.stop.load(Ordering::SeqCst)
        {
            if let Err(error) = self.tick() {
                self.unknowns.push(format!("a fault did not end: {error:#}"));
                return false;
            }
            std::thread::sleep(TICK);
        }
        self.wait_for_windows();
        self.check_all(when, true)
    }

    pub(super) fn check_all(&mut self, when: &str, must_be_whole: bool) -> bool {
        let (whole, words) = if must_be_whole { self.wait_whole() } else { (true, String::new()) };
        if !whole {
            self.fail(format!("the cluster is not whole {when}: {words}"));
        }
        if !self.load.round(ROUND_WITHIN) {
            let hung = self.load.progress.hung.load(Ordering::SeqCst);
            let what = if hung { "requests were not answered" } else { "the check did not end" };
            self.fail(format!("{what} {when}, with everything healed"));
            return false;
        }
        self.tell(&format!("every sector checked {when}"));
        self.load.progress.violations.load(Ordering::Relaxed) == 0
    }

    /// As [`Cluster::wait_whole`], with an eye on processes that die meanwhile.
    pub(super) fn wait_whole(&mut self) -> (bool, String) {
        let deadline = Instant::now() + WHOLE_WITHIN;
        loop {
            let (whole, words) = self.cluster.wait_whole(Duration::from_secs(1));
            let (late, stopped) = (Instant::now() >= deadline, self.stop.load(Ordering::SeqCst));
            if late && self.cluster.view().is_only_slow {
                self.tell(&format!("disks are slow here, by themselves: {words}"));
                return (true, words);
            }
            if whole || late || stopped {
                return (whole || stopped, words);
            }
            if let Err(error) = self.look_after_processes() {
                return (false, format!("{error:#}"));
            }
        }
    }

    pub(super) fn tell(&mut self, news: &str) {
        self.said = Instant::now();
        let progress = &self.load.progress;
        let now: Vec<&str> = self.active.iter().map(|active| active.fault.name()).collect();
        let view = self.cluster.view();
        println!(
            "{:7.1} s  acked {:>8}  under way {:>3}  faults {:>4}  leaders {:?}, {} changes  now [{}]  {news}",
            self.load.began.elapsed().as_secs_f64(),
            progress.acked_writes.load(Ordering::Relaxed),
            progress.under_way.load(Ordering::Relaxed),
            self.history.len(),
            view.led,
            view.leader_changes,
            now.join(" "),
        );
    }
}

/// A mount namespace that somebody else makes meanwhile holds a copy of all mounts that are not: the file system of a disk
/// whose power is cut would live on in it, and could not be mounted again.
fn mounts_of_our_own() -> Result<()> {
    // SAFETY: no descriptors are taken away from anybody: only this thread's mounts become its own, and its children's.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context("cannot have mounts of our own")?;
    tool("mount", &["--make-rprivate", "/"]).map(drop)
}

fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}
