//! The loop: one thread, all queues.

mod elsewhere;
pub mod files;
mod judge;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::options::Options;
use super::report::Report;
use super::stalls::Stalls;
use super::work::{Wish, Work};
use super::{Command, Progress};
use crate::content::{self, OpId, SECTOR_BYTES, Stamp};
use crate::driver::device::REQUEST_BYTES_MAX;
use crate::driver::{Answer, Device, DriverError, Outcome, Request};
use crate::history::{Checked, Kind, NOTHING, Op, Round, Status};
use crate::random::Random;
use crate::register::{NEVER, Time, ZERO};

/// How long to sleep for answers at most: commands and reconnections are looked at in between.
const NAP: Duration = Duration::from_millis(5);
/// Sectors of one request of the reading pass.
const PASS_SECTORS: u32 = 2048;
const EXCLUSIVE: u16 = u16::MAX;
const EXAMPLES_MAX: usize = 30;
/// Of the first violation's story, so many from its beginning and its end.
const STORY_LINES: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Load,
    /// Nothing new; the round ends when nothing is under way.
    Drain,
    /// Nothing new; the load stands still when nothing is under way.
    Calm,
    /// Nothing is under way, until a round is asked for.
    Still,
    /// Every sector is read once; the next one to ask for.
    Pass {
        next: u32,
    },
    /// No more.
    Ended,
}

pub struct Run {
    options: Options,
    device: Device,
    progress: Arc<Progress>,
    began: Instant,
    volume: u64,
    work: Work,
    queue: usize,
    phase: Phase,
    stop_after: bool,
    round: Round,
    round_began: Instant,
    next_op: OpId,
    scratch: Vec<u8>,
    stalls: Stalls,
    /// What the reading pass found.
    last_known: Vec<OpId>,
    last_answer: Time,
    /// Requests made by the load, for its rate.
    made: u64,
    /// Where to go, until the server there is reached.
    moving_to: Option<PathBuf>,
    /// The device left behind: its server may still write to its memory.
    left: Option<Device>,
    /// By sector, with --no-overlap: reads under way, or [`EXCLUSIVE`].
    claims: Vec<u16>,
    totals: Totals,
}

#[derive(Debug, Default)]
struct Totals {
    rounds: u64,
    counts: HashMap<&'static str, u64>,
    acked_changes: u64,
    failed: u64,
    refused: u64,
    left_behind: u64,
    damaged: u64,
    checked: Checked,
    examples: Vec<String>,
}

impl Run {
    pub fn new(options: Options, device: Device, progress: Arc<Progress>, began: Instant) -> Self {
        let mut random = Random::new(options.seed);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let started = now.map_or(0, |at| u64::from(at.subsec_nanos()) ^ at.as_secs() << 30);
        // Unlike in every other run, even of the same seed: what an earlier one left must look foreign.
        let volume = Random::new(options.seed ^ started).draw();
        let work = Work::new(&options, &device.geometry, random.fork());
        let sectors = work.area_sectors() as usize;
        Self {
            device,
            progress,
            began,
            volume,
            queue: 0,
            phase: Phase::Load,
            stop_after: false,
            round: Round::new(vec![ZERO; sectors]),
            round_began: began,
            next_op: 1,
            scratch: vec![0; REQUEST_BYTES_MAX],
            stalls: Stalls::default(),
            last_known: vec![ZERO; sectors],
            last_answer: 0,
            made: 0,
            moving_to: None,
            left: None,
            claims: if options.no_overlap { vec![0; sectors] } else { Vec::new() },
            totals: Totals::default(),
            work,
            options,
        }
    }

    pub fn run(mut self, commands: &mpsc::Receiver<Command>) -> Result<Report, DriverError> {
        let end = self.began + Duration::from_secs(self.options.duration);
        let mut answers = Vec::new();
        while self.phase != Phase::Ended {
            self.obey(commands);
            self.go_elsewhere()?;
            let now = Instant::now();
            if self.options.duration > 0 && now >= end {
                self.stop_after = true;
            }
            let round_over = self.round_began.elapsed() >= Duration::from_secs(self.options.round);
            let pausing = matches!(self.phase, Phase::Calm | Phase::Still);
            if self.phase == Phase::Load && (self.stop_after || round_over) || pausing && self.stop_after {
                self.phase = Phase::Drain;
            }
            self.make_requests();
            self.device.tell();
            self.device.wait(NAP, &mut answers)?;
            if !answers.is_empty() {
                let now = self.now();
                if self.device.under_way() > 0 {
                    self.stalls.gap(now - self.last_answer.max(self.oldest_invoked(&answers)));
                }
                self.last_answer = now;
                for answer in answers.drain(..) {
                    self.settle(answer, now);
                }
                self.progress.last_answer_ns.store(now, Ordering::Relaxed);
            }
            self.advance();
            self.publish();
            if self.is_hung() {
                self.progress.hung.store(true, Ordering::SeqCst);
                break;
            }
        }
        Ok(self.report())
    }

    fn obey(&mut self, commands: &mpsc::Receiver<Command>) {
        loop {
            match commands.try_recv() {
                Ok(Command::Round) if matches!(self.phase, Phase::Calm | Phase::Still) => {
                    self.phase = Phase::Drain;
                }
                Ok(Command::Round) if self.phase == Phase::Load => self.phase = Phase::Drain,
                Ok(Command::Pause) if self.phase == Phase::Load => self.phase = Phase::Calm,
                // A round is on its way: the pause would come after it, and nobody waits for it then.
                Ok(Command::Pause) => {}
                // A pass that has begun before does not count as after the question: begin it again.
                Ok(Command::Round) if matches!(self.phase, Phase::Pass { .. }) => {
                    self.phase = Phase::Pass { next: 0 };
                }
                Ok(Command::Round) => {}
                Ok(Command::Finish) => self.stop_after = true,
                Ok(Command::Move(socket)) => self.moving_to = Some(socket),
                // Whoever asked may have given up.
                Ok(Command::JudgeFile(path, answer)) => drop(answer.send(self.judge_file(&path))),
                Ok(Command::Stop) => self.phase = Phase::Ended,
                Err(_) => return,
            }
        }
    }

    fn now(&self) -> Time {
        u64::try_from(self.began.elapsed().as_nanos()).expect("584 years")
    }

    fn oldest_invoked(&self, answers: &[Answer]) -> Time {
        answers.iter().map(|answer| self.round.ops[answer.token].invoked).min().unwrap_or(0)
    }

    fn make_requests(&mut self) {
        match self.phase {
            Phase::Load => {
                let queues = usize::from(self.options.queues);
                let allowed = if self.options.rate == 0 {
                    u64::MAX
                } else {
                    // As if it had begun with this round: an outage is not made good by a burst.
                    let since = self.round_began.elapsed().as_secs_f64();
                    #[allow(
                        clippy::cast_possible_truncation,
                        clippy::cast_sign_loss,
                        clippy::cast_precision_loss
                    )]
                    let allowed = (since * self.options.rate as f64) as u64;
                    allowed
                };
                let mut refused = 0;
                while refused < queues && self.made < allowed {
                    self.queue = (self.queue + 1) % queues;
                    if self.device.has_room(self.queue) {
                        refused = 0;
                        self.make_one();
                        self.made += 1;
                    } else {
                        refused += 1;
                    }
                }
            }
            Phase::Pass { mut next } => {
                let area = self.work.area_sectors();
                let queue = next / PASS_SECTORS % u32::from(self.options.queues);
                while next < area && self.device.has_room(queue as usize) {
                    let sectors = PASS_SECTORS.min(area - next);
                    self.submit(queue as usize, Wish::Read, next..next + sectors);
                    next += sectors;
                    if self.device.under_way() >= usize::from(self.options.queues) * 2 {
                        break;
                    }
                }
                self.phase = Phase::Pass { next };
            }
            Phase::Drain | Phase::Calm | Phase::Still | Phase::Ended => {}
        }
    }

    fn make_one(&mut self) {
        let (wish, sectors) = self.work.next();
        if self.options.no_overlap && !self.claim(wish, &sectors) {
            return;
        }
        self.submit(self.queue, wish, sectors);
    }

    fn claim(&mut self, wish: Wish, sectors: &std::ops::Range<u32>) -> bool {
        let claims = &mut self.claims[sectors.start as usize..sectors.end as usize];
        if wish == Wish::Read {
            let free = claims.iter().all(|&claim| claim != EXCLUSIVE);
            if free {
                claims.iter_mut().for_each(|claim| *claim += 1);
            }
            return free;
        }
        let free = claims.iter().all(|&claim| claim == 0);
        if free {
            claims.fill(EXCLUSIVE);
        }
        free
    }

    fn submit(&mut self, queue: usize, wish: Wish, sectors: std::ops::Range<u32>) {
        let id = self.next_op;
        self.next_op += 1;
        let token = self.round.ops.len();
        let kind = match wish {
            Wish::Read => Kind::Read,
            Wish::Write => Kind::Write,
            Wish::Discard | Wish::WriteZeroes { .. } => Kind::Zero,
            Wish::Flush => Kind::Flush,
        };
        let at = (self.options.offset_mib << 11) + u64::from(sectors.start);
        let count = sectors.end - sectors.start;
        let bytes = count as usize * SECTOR_BYTES;
        if kind == Kind::Write {
            let writer = u32::try_from(queue).expect("few queues");
            let stamp = Stamp { volume: self.volume, writer, epoch: self.device.connections, op: id };
            content::fill(&mut self.scratch[..bytes], stamp, at);
        }
        let request = match wish {
            Wish::Read => Request::Read { sectors: count },
            Wish::Write => Request::Write { data: &self.scratch[..bytes] },
            Wish::Discard => Request::Discard { sectors: count },
            Wish::WriteZeroes { unmap } => Request::WriteZeroes { sectors: count, unmap },
            Wish::Flush => Request::Flush,
        };
        // Taken before the ring shows it, so that it is never later than the true beginning.
        let invoked = self.now();
        let seen = 0..0;
        self.round.ops.push(Op {
            id,
            kind,
            sectors,
            invoked,
            answered: NEVER,
            status: Status::Unknown,
            seen,
        });
        self.device.submit(queue, token, at, request);
    }

    fn settle(&mut self, answer: Answer, now: Time) {
        let op = &mut self.round.ops[answer.token];
        op.answered = now;
        op.status = if answer.outcome == Outcome::Done { Status::Done } else { Status::Failed };
        let (kind, sectors, id, invoked) = (op.kind, op.sectors.clone(), op.id, op.invoked);
        self.stalls.answered(kind, invoked, now);
        if self.options.no_overlap && self.phase != Phase::Ended && !matches!(self.phase, Phase::Pass { .. })
        {
            for claim in &mut self.claims[sectors.start as usize..sectors.end as usize] {
                *claim = if kind == Kind::Read { *claim - 1 } else { 0 };
            }
        }
        let name = match kind {
            Kind::Read => "reads",
            Kind::Write => "writes",
            Kind::Zero => "zeroes",
            Kind::Flush => "flushes",
        };
        *self.totals.counts.entry(name).or_default() += 1;
        if let Outcome::Refused(status) = answer.outcome {
            self.totals.failed += 1;
            self.totals.refused += 1;
            self.example(format!("{kind:?} {id} of sectors {sectors:?} was answered with status {status}"));
        } else if kind == Kind::Read {
            let mut buffer = std::mem::take(&mut self.scratch);
            let base = self.options.offset_mib << 11;
            let data = self.device.data(answer, &mut buffer);
            let mut values = Vec::with_capacity(sectors.len());
            for (sector, bytes) in sectors.clone().zip(data.chunks_exact(SECTOR_BYTES)) {
                match content::read(bytes, self.volume, base + u64::from(sector)) {
                    Ok(value) => values.push(value),
                    Err(damage) => {
                        self.totals.damaged += 1;
                        self.totals.refused += 1;
                        self.example(format!("read {id} of sector {sector}, answered at {now} ns: {damage}"));
                        values.push(NOTHING);
                    }
                }
            }
            if matches!(self.phase, Phase::Pass { .. }) {
                for (sector, value) in sectors.zip(&values).filter(|(_, value)| **value != NOTHING) {
                    self.last_known[sector as usize] = *value;
                }
            }
            self.scratch = buffer;
            self.round.saw(answer.token, values.into_iter());
        } else if kind != Kind::Flush {
            self.totals.acked_changes += 1;
        }
        self.device.release(answer);
    }

    fn example(&mut self, words: String) {
        if self.totals.examples.len() < EXAMPLES_MAX {
            self.totals.examples.push(words);
        }
    }

    /// From load to drain to pass to the next round.
    fn advance(&mut self) {
        if self.device.under_way() > 0 {
            return;
        }
        match self.phase {
            Phase::Drain => self.phase = Phase::Pass { next: 0 },
            Phase::Calm => {
                self.phase = Phase::Still;
                self.publish();
                self.progress.pauses.fetch_add(1, Ordering::SeqCst);
            }
            Phase::Pass { next } if next >= self.work.area_sectors() => self.end_round(),
            _ => {}
        }
    }

    fn end_round(&mut self) {
        let initial = self.last_known.clone();
        let round = std::mem::replace(&mut self.round, Round::new(initial));
        self.judge(&round);
        self.totals.rounds += 1;
        self.publish();
        self.progress.rounds.fetch_add(1, Ordering::SeqCst);
        self.round_began = Instant::now();
        self.made = 0;
        self.last_answer = self.now();
        self.phase = if self.stop_after { Phase::Ended } else { Phase::Load };
    }

    fn publish(&self) {
        let p = &self.progress;
        let answered: u64 = self.totals.counts.values().sum();
        p.answered.store(answered, Ordering::Relaxed);
        p.acked_writes.store(self.totals.acked_changes, Ordering::Relaxed);
        p.violations.store(self.totals.checked.violations + self.totals.refused, Ordering::Relaxed);
        p.under_way.store(self.device.under_way() as u64, Ordering::Relaxed);
        p.connections.store(self.device.connections.into(), Ordering::Relaxed);
    }

    fn is_hung(&self) -> bool {
        let waited = Duration::from_nanos(self.now() - self.last_answer);
        self.device.under_way() > 0 && waited >= Duration::from_secs(self.options.stall)
    }
}
