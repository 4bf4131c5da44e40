//! Faults: how each begins and how it is undone.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::cluster::Cluster;
use super::course::Course;
use super::coverage::Led;
use super::fault::Fault;
use super::network::{Cut, Place};
use super::process::{Process, State};
use super::proxy::Proxy;
use super::{no_descriptors, put_back, put_back_mds, unread_log, wrong_mds};
use crate::random::Random;

/// A program that was asked to stop must have ended by then.
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// A control plane that is stopped or killed meanwhile comes back within half of it.
const SUCCEEDED_WITHIN: Duration = Duration::from_secs(60);

/// Moments looked at for one with unflushed writes; each costs a few milliseconds.
const POWER_ATTEMPTS: u32 = 40;

/// A fault that has begun and is not healed.
#[derive(Debug)]
pub struct Active {
    pub fault: Fault,
    pub places: Vec<Place>,
    pub cuts: Vec<Cut>,
    pub began: Instant,
    pub heal_at: Instant,
    /// For the report: which, how long, what of the disk.
    pub detail: String,
    /// Of the one chunkserver that was hit, just before.
    pub led: Option<Led>,
    /// A backend that was called has the volume.
    pub succeeded: bool,
    /// Requests when it began.
    pub under_way: u64,
    /// Known to have hit: cuts are so only once they dropped something.
    pub happened: bool,
    /// What it goes by, if it goes by steps; none any more: it is over.
    pub course: Option<Box<dyn Course>>,
    /// Goes by steps, and is over only when they are.
    pub goes_by_steps: bool,
}

impl Active {
    pub fn holds(&self, place: Place) -> bool {
        self.places.contains(&place)
    }
}

/// Chooses who is hit and begins the fault. `None`: whoever it would hit is already down or out.
pub fn begin(
    fault: Fault,
    cluster: &mut Cluster,
    active: &[Active],
    random: &mut Random,
) -> Result<Option<Active>> {
    let Some((places, cuts)) = targets(fault, cluster, active, random) else { return Ok(None) };
    let is_cut = !cuts.is_empty();
    if is_cut && active.iter().any(|other| !other.cuts.is_empty()) {
        return Ok(None);
    }
    if !is_cut
        && places.iter().any(|&place| {
            active.iter().any(|other| !other.places.is_empty() && other.cuts.is_empty() && other.holds(place))
        })
    {
        return Ok(None);
    }
    if !is_cut && places.iter().any(|&place| process(cluster, place).state() != State::Running) {
        return Ok(None);
    }
    // A program that was only just started does not know yet how to end well.
    if fault.stops_well() && !places.iter().all(|&place| process(cluster, place).is_ready()) {
        return Ok(None);
    }
    let began = Instant::now();
    let led = match places[..] {
        [Place::Chunkserver(index)] => cluster.view().led_by(index),
        _ => None,
    };
    let mut detail = format!("{places:?}");
    let course = course(fault, cluster, &places, random)?;
    let lasts = match fault {
        Fault::KillLeader | Fault::KillFollower | Fault::KillMds | Fault::KillBackend => {
            kill(cluster, &places)?;
            random.below(3000)
        }
        Fault::KillChunkservers | Fault::KillEverything => {
            kill(cluster, &places)?;
            random.below(1000)
        }
        Fault::AllAddressesMoved => {
            kill(cluster, &places)?;
            detail = cluster.move_chunkservers();
            random.below(1000)
        }
        Fault::StopLeader | Fault::StopFollower | Fault::StopMds | Fault::StopBackend => {
            for &place in &places {
                process(cluster, place).signal(Signal::STOP)?;
            }
            // Short ones are as telling as long ones: as many below a second as above.
            if random.chance(50) { 100 + random.below(900) } else { 1000 + random.below(9000) }
        }
        Fault::RestartChunkserver | Fault::RestartMds | Fault::RestartBackend => {
            for &place in &places {
                process(cluster, place).signal(Signal::TERM)?;
            }
            u64::try_from(STOP_WITHIN.as_millis()).unwrap_or(u64::MAX)
        }
        Fault::CutLeader | Fault::CutOneWay | Fault::CutBridge | Fault::IsolateLeader | Fault::CutClient => {
            cluster.network.cut(cuts.iter().copied())?;
            1000 + random.below(7000)
        }
        Fault::PowerOne | Fault::PowerAll => {
            detail = cut_power(cluster, &places)?;
            random.below(1000)
        }
        Fault::SlowDisk => {
            image(cluster, places[0])?.slow(true)?;
            4000 + random.below(8000)
        }
        Fault::StuckDisk => {
            image(cluster, places[0])?.freeze(true)?;
            4000 + random.below(8000)
        }
        Fault::FailingSync => {
            image(cluster, places[0])?.fail_flushes()?;
            2000 + random.below(3000)
        }
        Fault::FullDisk => {
            image(cluster, places[0])?.fill()?;
            2000 + random.below(6000)
        }
        Fault::ZombieBackend => {
            process(cluster, Place::Backend).signal(Signal::STOP)?;
            cluster.backends.call_successor()?;
            u64::try_from(SUCCEEDED_WITHIN.as_millis()).unwrap_or(u64::MAX)
        }
        Fault::DelayRequests => {
            proxy(cluster)?.hold(true);
            3000 + random.below(5000)
        }
        Fault::DuplicateRequests => {
            proxy(cluster)?.repeat(true);
            4000 + random.below(8000)
        }
        Fault::RollbackChunkserver
        | Fault::RollbackMds
        | Fault::WrongMds
        | Fault::LogReaderStopped
        | Fault::DescriptorsGone => 0,
    };
    let heal_at = Instant::now() + Duration::from_millis(lasts);
    let happened = !is_cut;
    Ok(Some(Active {
        fault,
        places,
        cuts,
        began,
        heal_at,
        detail,
        led,
        succeeded: false,
        under_way: 0,
        happened,
        goes_by_steps: course.is_some(),
        course,
    }))
}

/// Begins what goes by steps.
fn course(
    fault: Fault,
    cluster: &mut Cluster,
    places: &[Place],
    random: &mut Random,
) -> Result<Option<Box<dyn Course>>> {
    let turn = *cluster.turns.entry(fault).and_modify(|turn| *turn += 1).or_insert(1);
    Ok(Some(match fault {
        Fault::RollbackChunkserver => put_back::begin(cluster, places)?,
        Fault::RollbackMds => put_back_mds::begin(cluster, turn, random)?,
        Fault::WrongMds => wrong_mds::begin(cluster)?,
        Fault::LogReaderStopped => unread_log::begin(cluster, places[0])?,
        Fault::DescriptorsGone => no_descriptors::begin(cluster, places[0], random)?,
        _ => return Ok(None),
    }))
}

/// Whether it is over: by time, or because a program asked to stop has stopped.
pub fn is_due(active: &Active, cluster: &mut Cluster) -> bool {
    let stopping = |place: &Place, cluster: &mut Cluster| process(cluster, *place).state() == State::Stopping;
    match active.fault {
        _ if active.goes_by_steps => active.course.is_none(),
        Fault::RestartChunkserver | Fault::RestartMds | Fault::RestartBackend => {
            Instant::now() >= active.heal_at || !active.places.iter().any(|place| stopping(place, cluster))
        }
        _ => Instant::now() >= active.heal_at,
    }
}

/// Undoes it. What it says is a failure of the programs, not of ours.
pub fn heal(active: &mut Active, cluster: &mut Cluster) -> Result<Option<String>> {
    let mut failure = None;
    match active.fault {
        Fault::KillLeader
        | Fault::KillFollower
        | Fault::KillChunkservers
        | Fault::KillMds
        | Fault::KillBackend
        | Fault::KillEverything
        | Fault::AllAddressesMoved => {}
        Fault::StopLeader | Fault::StopFollower | Fault::StopMds | Fault::StopBackend => {
            for &place in &active.places {
                if process(cluster, place).state() == State::Frozen {
                    process(cluster, place).signal(Signal::CONT)?;
                }
            }
            return Ok(None);
        }
        Fault::RestartChunkserver | Fault::RestartMds | Fault::RestartBackend => {
            for &place in &active.places {
                let stopped = process(cluster, place);
                if stopped.state() == State::Stopping {
                    failure = Some(format!("{} did not stop within {STOP_WITHIN:?}", stopped.name));
                    stopped.kill9()?;
                }
            }
        }
        Fault::CutLeader | Fault::CutOneWay | Fault::CutBridge | Fault::IsolateLeader | Fault::CutClient => {
            let dropped = cluster.network.mend(&active.cuts)?;
            active.happened = dropped > 0;
            active.detail = format!("{:?}, {dropped} packets dropped", active.cuts);
            return Ok(None);
        }
        Fault::PowerOne | Fault::PowerAll => {
            for &place in &active.places {
                image(cluster, place)?.power_on()?;
            }
        }
        Fault::SlowDisk => {
            image(cluster, active.places[0])?.slow(false)?;
            return Ok(None);
        }
        Fault::StuckDisk => {
            image(cluster, active.places[0])?.freeze(false)?;
            return Ok(None);
        }
        Fault::FailingSync => {
            let place = active.places[0];
            let ended_itself = process(cluster, place).state() == State::Down;
            process(cluster, place).kill9()?;
            image(cluster, place)?.recover_flushes()?;
            active.detail =
                format!("{place:?}, {}", if ended_itself { "it ended itself" } else { "it lived on" });
        }
        Fault::FullDisk => {
            image(cluster, active.places[0])?.empty()?;
            return Ok(None);
        }
        Fault::ZombieBackend if active.succeeded => {
            cluster.backends.wake()?;
            return Ok(None);
        }
        Fault::ZombieBackend => {
            cluster.backends.give_up();
            process(cluster, Place::Backend).signal(Signal::CONT)?;
            active.happened = false;
            return Ok(Some(format!("nobody could take over the volume within {SUCCEEDED_WITHIN:?}")));
        }
        Fault::DelayRequests => {
            let held = proxy(cluster)?.hold(false);
            active.happened = held > 0;
            active.detail = format!("{held} requests held");
            return Ok(None);
        }
        Fault::DuplicateRequests => {
            let (done, refused) = proxy(cluster)?.repeat(false);
            active.happened = done > 0;
            active.detail = format!("{done} old changes said again and answered as done, {refused} refused");
            return Ok(None);
        }
        Fault::RollbackChunkserver
        | Fault::RollbackMds
        | Fault::WrongMds
        | Fault::LogReaderStopped
        | Fault::DescriptorsGone => return Ok(None),
    }
    for &place in &active.places {
        process(cluster, place).start()?;
    }
    Ok(failure)
}

type Targets = (Vec<Place>, Vec<Cut>);

fn targets(fault: Fault, cluster: &Cluster, active: &[Active], random: &mut Random) -> Option<Targets> {
    let count = cluster.chunkservers.len();
    let led = cluster.view().led;
    let free: Vec<usize> = (0..count)
        .filter(|&index| !active.iter().any(|other| other.holds(Place::Chunkserver(index))))
        .collect();
    let all: Vec<usize> = (0..count).collect();
    let most = |among: &[usize]| among.iter().copied().max_by_key(|&index| led[index]);
    let least = |among: &[usize]| among.iter().copied().min_by_key(|&index| led[index]);
    let places = |one: usize| (vec![Place::Chunkserver(one)], Vec::new());
    let servers = || all.iter().map(|&index| Place::Chunkserver(index));
    let any = |random: &mut Random| (!free.is_empty()).then(|| free[random.index(free.len())]);
    Some(match fault {
        Fault::KillLeader | Fault::StopLeader => places(most(&free).filter(|&one| led[one] > 0)?),
        Fault::KillFollower | Fault::StopFollower => places(least(&free)?),
        Fault::KillChunkservers | Fault::PowerAll | Fault::AllAddressesMoved => {
            (servers().collect(), Vec::new())
        }
        Fault::KillEverything => (servers().chain([Place::Mds, Place::Backend]).collect(), Vec::new()),
        Fault::KillMds | Fault::StopMds | Fault::RestartMds => (vec![Place::Mds], Vec::new()),
        Fault::KillBackend | Fault::StopBackend | Fault::RestartBackend | Fault::ZombieBackend => {
            (vec![Place::Backend], Vec::new())
        }
        // These hit nobody in particular; one of each at a time.
        Fault::DelayRequests | Fault::DuplicateRequests => {
            if active.iter().any(|other| other.fault == fault) {
                return None;
            }
            (Vec::new(), Vec::new())
        }
        Fault::RollbackChunkserver | Fault::RollbackMds if is_rolled_back(cluster, active) => return None,
        Fault::RollbackChunkserver => {
            let mds_is_free = !active.iter().any(|other| other.holds(Place::Mds));
            (put_back::places(cluster, &free, mds_is_free, random)?, Vec::new())
        }
        Fault::RollbackMds | Fault::WrongMds => (vec![Place::Mds], Vec::new()),
        Fault::LogReaderStopped | Fault::DescriptorsGone => (vec![cluster.turn(fault, random)], Vec::new()),
        Fault::RestartChunkserver
        | Fault::PowerOne
        | Fault::SlowDisk
        | Fault::StuckDisk
        | Fault::FailingSync
        | Fault::FullDisk => places(any(random)?),
        Fault::CutLeader | Fault::CutOneWay | Fault::CutBridge | Fault::IsolateLeader | Fault::CutClient => {
            let one = most(&all)?;
            let other = (one + 1 + random.index(count - 1)) % count;
            let hit =
                Place::Chunkserver(if fault == Fault::CutOneWay { all[random.index(count)] } else { one });
            let peers: Vec<Place> = servers().filter(|&place| place != hit).collect();
            let everybody = peers.iter().copied().chain([Place::Mds, Place::Backend]);
            let both = |others: Vec<Place>| -> Vec<Cut> {
                others.into_iter().flat_map(|place| [(place, hit), (hit, place)]).collect()
            };
            let cuts = match fault {
                Fault::CutLeader => both(everybody.collect()),
                Fault::CutOneWay if random.chance(50) => everybody.map(|place| (hit, place)).collect(),
                Fault::CutOneWay => everybody.map(|place| (place, hit)).collect(),
                Fault::CutBridge => both(vec![Place::Chunkserver(other)]),
                Fault::IsolateLeader => both(peers),
                _ => both(vec![Place::Backend]),
            };
            (vec![hit], cuts)
        }
    })
}

/// What is being learnt or made anew is not there to be counted on: one at a time, of a cluster that is complete.
fn is_rolled_back(cluster: &Cluster, active: &[Active]) -> bool {
    let rolls_back = |other: &Active| matches!(other.fault, Fault::RollbackChunkserver | Fault::RollbackMds);
    active.iter().any(rolls_back) || !cluster.view().is_complete_now()
}

/// All at one moment: stopped first, so that none goes on while the others are killed.
fn kill(cluster: &mut Cluster, places: &[Place]) -> Result<()> {
    if places.len() > 1 {
        for &place in places {
            process(cluster, place).signal(Signal::STOP)?;
        }
    }
    places.iter().try_for_each(|&place| process(cluster, place).kill9())
}

/// The disks stand still first: from then on nothing is reported as synced, so nobody is told more than is in the logs
/// at that moment. A moment between a write and its flush is waited for, as it tells more.
fn cut_power(cluster: &mut Cluster, places: &[Place]) -> Result<String> {
    for attempt in 0..POWER_ATTEMPTS {
        let mut unflushed = 0;
        for &place in places {
            image(cluster, place)?.freeze(true)?;
        }
        for &place in places {
            unflushed += image(cluster, place)?.unflushed()?;
        }
        if unflushed > 0 || attempt + 1 == POWER_ATTEMPTS {
            break;
        }
        for &place in places {
            image(cluster, place)?.freeze(false)?;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    for &place in places {
        process(cluster, place).signal(Signal::STOP)?;
    }
    let mut marks = Vec::new();
    for &place in places {
        marks.push(image(cluster, place)?.mark()?);
    }
    let mut details = Vec::new();
    for (&place, mark) in places.iter().zip(marks) {
        // A process is gone only when its writes are.
        image(cluster, place)?.freeze(false)?;
        process(cluster, place).kill9()?;
        let cut = image(cluster, place)?.cut(mark)?;
        details.push(format!(
            "{place:?}: {} entries, {} flushes, {} unflushed of which {} lost, {} torn",
            cut.entries, cut.flushes, cut.after_last_flush, cut.dropped, cut.torn
        ));
    }
    Ok(details.join("; "))
}

pub fn process(cluster: &mut Cluster, place: Place) -> &mut Process {
    match place {
        Place::Mds => &mut cluster.mds,
        Place::Backend => &mut cluster.backend,
        Place::Chunkserver(index) => &mut cluster.chunkservers[index],
    }
}

fn proxy(cluster: &Cluster) -> Result<&Proxy> {
    cluster.proxy.as_ref().context("there is a proxy when such faults are listed")
}

fn image(cluster: &mut Cluster, place: Place) -> Result<&mut super::image::Image> {
    let Place::Chunkserver(index) = place else { anyhow::bail!("{place:?} has no image") };
    cluster.disks[index].of_image().context("disks are images when such faults are listed")
}
