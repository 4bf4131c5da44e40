//! One volume's writers and readers, and copysets of one block each.
//!
//! ```text
//!  backend ──Fence, Write──▶ network (keeps all, delivers any, any time, again) ──▶ leader ──▶ log ──commit──▶ applied
//!     └──── Read ──▶ a leader, a deposed leader, or any replica that has applied enough
//! ```
//!
//! Consensus is taken for granted: one log per copyset, a committed prefix that stays, a tail that a new leader may or may
//! not have. A replica is how far it has applied; one that led before and has not heard of its end still says that it
//! leads. What else a replica holds is decided when somebody looks: the log of any leader there was, as far as that one
//! came ([`Bounds::proofs`]). So one that was cut off may lead again, and an entry of its former term be committed then.
//! Values are numbers in the order in which the guests wrote them, so that newer is greater.
//!
//! The rules are those of `chunkserver/src/copyset/{fence,apply,read,write}.rs` and
//! `vhost-backend/src/volume/{sending,answers,followers,recent}.rs`.

use std::collections::BTreeSet;

use stateright::{Model, Property};

/// What is broken, one thing at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    None,
    /// M5: what was applied before is applied again.
    NoDeduplication,
    /// M6: the fence is only in the leader's memory, checked when a request comes in.
    FenceInMemory,
    /// Attach returns when the first copyset is fenced, not the last.
    LazyFence,
    /// M17: a retry gets a new sequence.
    RetryWithNewSequence,
    /// M13: a follower is asked for whatever it has applied.
    FollowerWithoutIndex,
    /// For bytes that a change in flight overlaps no more is named than what was acknowledged of them.
    NeededBesideChange,
    /// What a leader's answer names is what it had applied before it read, not what the data can hold.
    LeaderNamesLess,
    /// A replica answers from its log if that is long enough, whoever wrote it.
    ProofWithoutTerm,
    /// A follower names what it shows by the term of the last entry applied, not by the one it heard of it in.
    TermOfEntry,
    /// What a follower has shown does not raise what a leader must know.
    FollowerNotRemembered,
    /// A leader's answer is not judged by its term.
    NoTerm,
}

/// How far the exploration goes.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub copysets: u8,
    pub replicas: u8,
    /// Values the first guest writes, to the copysets in turn.
    pub writes: u8,
    /// Reads of each backend.
    pub reads: u8,
    /// The first backend may die and come back under the next incarnation.
    pub restart: bool,
    /// A second backend takes the volume over, and writes one value.
    pub takeover: bool,
    pub elections: u8,
    pub entries: u8,
    /// Followers answer from their logs, too. Then entries have terms, and a leader begins with a blank one.
    pub proofs: bool,
}

#[derive(Debug, Clone, Copy)]
pub struct Writers {
    pub bounds: Bounds,
    pub mutant: Mutant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Message {
    Fence { copyset: u8, epoch: u8 },
    Write { copyset: u8, epoch: u8, sequence: u8, floor: u8, value: u8 },
}

impl Message {
    fn copyset(self) -> u8 {
        match self {
            Self::Fence { copyset, .. } | Self::Write { copyset, .. } => copyset,
        }
    }

    fn epoch(self) -> u8 {
        match self {
            Self::Fence { epoch, .. } | Self::Write { epoch, .. } => epoch,
        }
    }
}

/// A place in the log, and a term: the leaders of this one and of all later ones have every entry up to there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Place {
    term: u8,
    index: u8,
}

impl Place {
    /// Remembers the one that covers more; of two that cover the same, the one that more logs come up to.
    fn raise(&mut self, to: Self) {
        if (to.index, self.term) > (self.index, to.term) {
            *self = to;
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Entry {
    /// Of the leader that wrote it.
    term: u8,
    /// `None`: a leader's first.
    message: Option<Message>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Replica {
    applied: u8,
    /// The term in which it heard that this is committed.
    heard_in: u8,
    /// It believes that it leads, in this term.
    leads: Option<u8>,
    /// Only with [`Mutant::FenceInMemory`].
    epoch_in_memory: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Copyset {
    log: Vec<Entry>,
    /// Logs of leaders that were deposed, as far as they are not part of the log.
    former: Vec<Vec<Entry>>,
    committed: u8,
    term: u8,
    leader: u8,
    replicas: Vec<Replica>,
}

/// What a log makes of a replica.
#[derive(Debug, Clone, Default)]
struct Applied {
    epoch: u8,
    floor: u8,
    sequences: BTreeSet<u8>,
    value: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Apply,
    Already,
    Fenced,
    NotFenced,
}

/// A write that has no answer yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Out {
    copyset: u8,
    sequence: u8,
    value: u8,
}

/// A read that has no answer yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Reading {
    copyset: u8,
    /// The least value that may be given to the guest.
    least: u8,
    /// What a leader's answer must carry.
    term: u8,
    index: u8,
    /// The followers were asked, for this.
    asked: Option<Place>,
}

/// What a backend knows of one copyset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Seen {
    fenced: bool,
    term: u8,
    index: u8,
    /// The most that anything seen can have been part of.
    shown: Place,
    /// Index of the newest acknowledged change, or of the fence.
    changed: u8,
    /// The newest value acknowledged, or read.
    value: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Backend {
    /// 0: not there.
    epoch: u8,
    serving: bool,
    stopped: bool,
    sequence: u8,
    /// Sequences that were answered, or given up by a mutant.
    answered: BTreeSet<u8>,
    out: Option<Out>,
    reading: Option<Reading>,
    reads: u8,
    written: u8,
    retried: bool,
    seen: Vec<Seen>,
}

impl Backend {
    fn floor(&self) -> u8 {
        (1..).find(|sequence| !self.answered.contains(sequence)).unwrap_or(u8::MAX)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct State {
    copysets: Vec<Copyset>,
    network: BTreeSet<Message>,
    backends: [Backend; 2],
    restarted: bool,
    elections: u8,
    /// Per copyset: the newest acknowledged value.
    acknowledged: Vec<u8>,
    /// What must never happen, once it did.
    pub wrong: Option<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The second backend attaches, or the first comes back under its next incarnation.
    Attach(usize),
    Write(usize),
    Retry(usize),
    Deliver(Message),
    /// The next entry is committed and applied by its leader; the answer arrives or is lost.
    Commit {
        copyset: u8,
        answered: bool,
    },
    /// A follower applies the next committed entry.
    Apply {
        copyset: u8,
        replica: u8,
    },
    /// Another leads, with so much of the log, or of a former leader's. The one before has not heard of it.
    Elect {
        copyset: u8,
        replica: u8,
        of: Option<u8>,
        keeps: u8,
    },
    BeginRead {
        backend: usize,
        copyset: u8,
    },
    AskFollowers(usize),
    /// It has applied what was asked for.
    FollowerAnswers {
        backend: usize,
        replica: u8,
    },
    /// Its log is the leader's, or a former one's.
    FollowerProves {
        backend: usize,
        of: Option<u8>,
    },
    /// One that believes that it leads; its answer says that it knows so much less than the data holds.
    LeaderAnswers {
        backend: usize,
        replica: u8,
        less: u8,
    },
}

impl Writers {
    fn apply(&self, log: &[Entry]) -> Applied {
        let mut applied = Applied::default();
        for message in log.iter().filter_map(|entry| entry.message) {
            match message {
                Message::Fence { epoch, .. } if epoch > applied.epoch => {
                    applied = Applied { epoch, value: applied.value, ..Applied::default() };
                }
                Message::Fence { .. } => {}
                Message::Write { sequence, floor, value, .. } => {
                    if self.judge(&applied, message) == Verdict::Apply {
                        applied.floor = applied.floor.max(floor);
                        applied.sequences.insert(sequence);
                        applied.value = value;
                    }
                }
            }
        }
        applied
    }

    fn judge(&self, applied: &Applied, message: Message) -> Verdict {
        let in_memory = self.mutant == Mutant::FenceInMemory;
        match message {
            _ if !in_memory && message.epoch() < applied.epoch => Verdict::Fenced,
            Message::Fence { epoch, .. } if epoch == applied.epoch => Verdict::Already,
            Message::Fence { .. } => Verdict::Apply,
            Message::Write { epoch, .. } if !in_memory && epoch > applied.epoch => Verdict::NotFenced,
            Message::Write { sequence, .. }
                if self.mutant != Mutant::NoDeduplication
                    && (sequence < applied.floor || applied.sequences.contains(&sequence)) =>
            {
                Verdict::Already
            }
            Message::Write { .. } => Verdict::Apply,
        }
    }

    fn applied(&self, state: &State, copyset: u8, replica: u8) -> Applied {
        let copyset = &state.copysets[usize::from(copyset)];
        let upto = usize::from(copyset.replicas[usize::from(replica)].applied);
        self.apply(&copyset.log[..upto])
    }

    /// A backend hears that its message is done, at this index.
    fn answer(&self, state: &mut State, message: Message, term: u8, index: u8) {
        let copysets = state.copysets.len();
        let of = |backend: &&mut Backend| backend.epoch == message.epoch() && !backend.stopped;
        let Some(backend) = state.backends.iter_mut().find(of) else { return };
        let seen = &mut backend.seen[usize::from(message.copyset())];
        match message {
            Message::Fence { .. } => {
                seen.fenced = true;
                let fenced = backend.seen.iter().filter(|seen| seen.fenced).count();
                let enough = if self.mutant == Mutant::LazyFence { 1 } else { copysets };
                if fenced >= enough && !backend.serving {
                    backend.serving = true;
                    for (seen, value) in backend.seen.iter_mut().zip(&state.acknowledged) {
                        seen.value = *value;
                    }
                }
            }
            Message::Write { copyset, sequence, value, .. } => {
                let same = backend.out.is_some_and(|out| {
                    out.copyset == copyset && out.value == value && out.sequence == sequence
                });
                if !same {
                    return;
                }
                backend.out = None;
                backend.answered.insert(sequence);
                seen.value = seen.value.max(value);
                let newest = &mut state.acknowledged[usize::from(copyset)];
                *newest = (*newest).max(value);
            }
        }
        let seen = &mut state.backends.iter_mut().find(of).expect("found above").seen;
        let seen = &mut seen[usize::from(message.copyset())];
        seen.term = seen.term.max(term);
        seen.index = seen.index.max(index);
        seen.changed = seen.changed.max(index);
        self.name(seen, Place { term, index });
    }

    fn name(&self, seen: &mut Seen, shown: Place) {
        if self.bounds.reads > 0 {
            seen.shown.raise(shown);
        }
    }

    /// The log of the leader, or of a former one.
    fn log_of(copyset: &Copyset, of: Option<u8>) -> &[Entry] {
        of.map_or(&copyset.log, |of| &copyset.former[usize::from(of)])
    }

    fn give_to_guest(state: &mut State, backend: usize, value: u8) {
        let Some(reading) = state.backends[backend].reading.take() else { return };
        if value < reading.least {
            state.wrong = Some("a read went back in time");
        }
        let seen = &mut state.backends[backend].seen[usize::from(reading.copyset)];
        seen.value = seen.value.max(value);
    }

    fn attach(state: &mut State, backend: usize) {
        let of = &mut state.backends[backend];
        let before = std::mem::take(of);
        of.epoch = if before.epoch == 0 {
            10 * (u8::try_from(backend).unwrap_or_default() + 1)
        } else {
            before.epoch + 1
        };
        of.seen = vec![Seen::default(); state.copysets.len()];
        (of.written, of.reads) = (before.written, before.reads);
        // What was in flight is done again, under the new epoch and a new sequence.
        of.out = before.out.map(|out| {
            of.sequence = 1;
            Out { sequence: 1, ..out }
        });
        for copyset in (0..).take(state.copysets.len()) {
            state.network.insert(Message::Fence { copyset, epoch: of.epoch });
        }
    }

    fn send(state: &mut State, backend: usize) {
        let of = &state.backends[backend];
        let Some(Out { copyset, sequence, value }) = of.out else { return };
        let (epoch, floor) = (of.epoch, of.floor());
        state.network.insert(Message::Write { copyset, epoch, sequence, floor, value });
    }

    fn deliver(&self, state: &mut State, message: Message) -> Option<()> {
        let at = usize::from(message.copyset());
        let leader = state.copysets[at].leader;
        let applied = self.applied(state, message.copyset(), leader);
        let copyset = &mut state.copysets[at];
        let (term, index) = (copyset.term, copyset.replicas[usize::from(leader)].applied);
        if self.mutant == Mutant::FenceInMemory {
            let memory = &mut copyset.replicas[usize::from(leader)].epoch_in_memory;
            if message.epoch() < *memory {
                return None;
            }
            if let Message::Fence { epoch, .. } = message {
                *memory = epoch;
                self.answer(state, message, term, index);
                return Some(());
            }
        }
        match self.judge(&applied, message) {
            Verdict::Already => self.answer(state, message, term, index),
            Verdict::Fenced => {
                let epoch = message.epoch();
                let backend = state.backends.iter_mut().find(|of| of.epoch == epoch && !of.stopped)?;
                backend.stopped = true;
            }
            Verdict::NotFenced => return None,
            Verdict::Apply => {
                if copyset.log.len() >= usize::from(self.bounds.entries) {
                    return None;
                }
                let term = if self.bounds.proofs { term } else { 0 };
                copyset.log.push(Entry { term, message: Some(message) });
            }
        }
        Some(())
    }

    fn commit(&self, state: &mut State, at: u8, answered: bool) {
        let copyset = &mut state.copysets[usize::from(at)];
        let (leader, term) = (usize::from(copyset.leader), copyset.term);
        let index = usize::from(copyset.committed);
        let entry = copyset.log[index];
        copyset.committed += 1;
        copyset.replicas[leader].applied = copyset.committed;
        let Some(message) = entry.message else { return };
        let before = self.apply(&copyset.log[..index]);
        let verdict = self.judge(&before, message);
        if let (Verdict::Apply, Message::Write { epoch, value, .. }) = (verdict, message) {
            if state.backends.iter().any(|backend| backend.serving && backend.epoch > epoch) {
                state.wrong = Some("a change of an older epoch was applied after an attach returned");
            }
            if value < before.value {
                state.wrong = Some("an older write came over a newer one");
            }
        }
        let index = state.copysets[usize::from(at)].committed;
        match verdict {
            Verdict::Apply | Verdict::Already if answered => self.answer(state, message, term, index),
            Verdict::Fenced if answered => {
                let of = state.backends.iter_mut().find(|of| of.epoch == message.epoch());
                of.into_iter().for_each(|of| of.stopped = true);
            }
            _ => {}
        }
        // What was acknowledged is there.
        let applied = self.applied(state, at, state.copysets[usize::from(at)].leader);
        if applied.value < state.acknowledged[usize::from(at)] {
            state.wrong = state.wrong.or(Some("an acknowledged write is lost"));
        }
    }

    fn read_actions(&self, state: &State, backend: usize, actions: &mut Vec<Action>) {
        let of = &state.backends[backend];
        let Some(reading) = of.reading else {
            if of.reads < self.bounds.reads {
                let all = 0..self.bounds.copysets;
                actions.extend(all.map(|copyset| Action::BeginRead { backend, copyset }));
            }
            return;
        };
        let copyset = &state.copysets[usize::from(reading.copyset)];
        if reading.asked.is_none() {
            actions.push(Action::AskFollowers(backend));
        } else if self.bounds.proofs {
            let former = (0..).zip(&copyset.former).map(|(of, _)| Some(of));
            let all = std::iter::once(None).chain(former);
            actions.extend(all.map(|of| Action::FollowerProves { backend, of }));
        }
        for (replica, is) in (0..).zip(&copyset.replicas) {
            if reading.asked.is_some() {
                actions.push(Action::FollowerAnswers { backend, replica });
            }
            if is.leads.is_some() {
                actions.extend([0, 1].map(|less| Action::LeaderAnswers { backend, replica, less }));
            }
        }
    }

    fn leader_answers(&self, state: &mut State, backend: usize, replica: u8, less: u8) -> Option<()> {
        let reading = state.backends[backend].reading?;
        let applied = self.applied(state, reading.copyset, replica);
        let is = &state.copysets[usize::from(reading.copyset)].replicas[usize::from(replica)];
        let (term, index, applies) = (is.leads?, is.applied.checked_sub(less)?, is.applied);
        let known = self.mutant == Mutant::FenceInMemory || applied.epoch == state.backends[backend].epoch;
        let fresh = (term >= reading.term || self.mutant == Mutant::NoTerm) && index >= reading.index;
        if !known || !fresh {
            return None;
        }
        let seen = &mut state.backends[backend].seen[usize::from(reading.copyset)];
        (seen.term, seen.index) = (seen.term.max(term), seen.index.max(index));
        let shown = if self.mutant == Mutant::LeaderNamesLess { index } else { applies };
        self.name(seen, Place { term, index: shown });
        Self::give_to_guest(state, backend, applied.value);
        Some(())
    }

    /// What followers are asked to have.
    fn needed(&self, state: &State, backend: usize) -> Option<Place> {
        let of = &state.backends[backend];
        let reading = of.reading?;
        let seen = &of.seen[usize::from(reading.copyset)];
        let changing = of.out.is_some_and(|out| out.copyset == reading.copyset);
        Some(match self.mutant {
            Mutant::FollowerWithoutIndex => Place { index: 0, ..seen.shown },
            Mutant::NeededBesideChange => Place { index: seen.changed, ..seen.shown },
            _ if changing => seen.shown,
            _ => Place { index: seen.changed, ..seen.shown },
        })
    }

    fn follower_answers(&self, state: &mut State, backend: usize, replica: u8) -> Option<()> {
        let reading = state.backends[backend].reading?;
        let applied = self.applied(state, reading.copyset, replica);
        let copyset = &state.copysets[usize::from(reading.copyset)];
        let is = &copyset.replicas[usize::from(replica)];
        let (index, heard_in) = (is.applied, is.heard_in);
        let known = self.mutant == Mutant::FenceInMemory || applied.epoch == state.backends[backend].epoch;
        if !known || index < reading.asked?.index {
            return None;
        }
        let last = usize::from(index).checked_sub(1).map_or(0, |last| copyset.log[last].term);
        let term = if self.mutant == Mutant::TermOfEntry { last } else { heard_in };
        let seen = &mut state.backends[backend].seen[usize::from(reading.copyset)];
        if self.mutant != Mutant::FollowerNotRemembered {
            seen.index = seen.index.max(index);
        }
        self.name(seen, Place { term, index });
        Self::give_to_guest(state, backend, applied.value);
        Some(())
    }

    /// A replica whose log's last entry is of the term that was asked for, or a later one, has what was asked for as it
    /// is committed. It shows that and no more, whatever it has applied.
    fn follower_proves(&self, state: &mut State, backend: usize, of: Option<u8>) -> Option<()> {
        let reading = state.backends[backend].reading?;
        let asked = reading.asked?;
        let log = Self::log_of(&state.copysets[usize::from(reading.copyset)], of);
        let term = log.last()?.term;
        if term < asked.term && self.mutant != Mutant::ProofWithoutTerm {
            return None;
        }
        let shown = self.apply(log.get(..usize::from(asked.index))?);
        if shown.epoch != state.backends[backend].epoch {
            return None;
        }
        Self::give_to_guest(state, backend, shown.value);
        Some(())
    }
}

impl Model for Writers {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut replicas = vec![Replica::default(); usize::from(self.bounds.replicas)];
        replicas[0].leads = Some(0);
        let copyset = Copyset { replicas, ..Copyset::default() };
        let copysets = vec![copyset; usize::from(self.bounds.copysets)];
        let mut state = State { acknowledged: vec![0; copysets.len()], copysets, ..State::default() };
        Self::attach(&mut state, 0);
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if self.bounds.takeover && state.backends[1].epoch == 0 {
            actions.push(Action::Attach(1));
        }
        if self.bounds.restart && !state.restarted && !state.backends[0].stopped {
            actions.push(Action::Attach(0));
        }
        for (at, backend) in state.backends.iter().enumerate() {
            if !backend.serving || backend.stopped {
                continue;
            }
            let writes = if at == 0 { self.bounds.writes } else { 1 };
            if backend.out.is_none() && backend.written < writes {
                actions.push(Action::Write(at));
            }
            if backend.out.is_some() && !backend.retried {
                actions.push(Action::Retry(at));
            }
            self.read_actions(state, at, actions);
        }
        actions.extend(state.network.iter().copied().map(Action::Deliver));
        for (at, copyset) in (0..).zip(&state.copysets) {
            let committed = usize::from(copyset.committed);
            if let Some(next) = copyset.log.get(committed) {
                let answered = [true, false].into_iter().take(1 + usize::from(next.message.is_some()));
                actions.extend(answered.map(|answered| Action::Commit { copyset: at, answered }));
            }
            let logs = std::iter::once(None).chain((0..).zip(&copyset.former).map(|(of, _)| Some(of)));
            let whole = logs
                .filter(|of| Self::log_of(copyset, *of).get(..committed) == Some(&copyset.log[..committed]));
            let whole: Vec<_> = whole.collect();
            for (n, replica) in (0..).zip(&copyset.replicas) {
                if replica.applied < copyset.committed && n != copyset.leader {
                    actions.push(Action::Apply { copyset: at, replica: n });
                }
                if n != copyset.leader && state.elections < self.bounds.elections {
                    for &of in &whole {
                        let length = u8::try_from(Self::log_of(copyset, of).len()).unwrap_or(u8::MAX);
                        let elect = |keeps| Action::Elect { copyset: at, replica: n, of, keeps };
                        actions.extend((copyset.committed..=length).map(elect));
                    }
                }
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        if last.wrong.is_some() {
            return None;
        }
        let mut state = last.clone();
        match action {
            Action::Attach(backend) => {
                state.restarted |= backend == 0;
                Self::attach(&mut state, backend);
            }
            Action::Write(at) => {
                let bounds = self.bounds;
                let backend = &mut state.backends[at];
                backend.written += 1;
                backend.sequence += 1;
                let copyset = (backend.written - 1) % bounds.copysets;
                let value = if at == 0 { backend.written } else { bounds.writes + 1 };
                backend.out = Some(Out { copyset, sequence: backend.sequence, value });
                backend.retried = false;
                Self::send(&mut state, at);
            }
            Action::Retry(at) => {
                let backend = &mut state.backends[at];
                backend.retried = true;
                // A retry as it should be is a message that is delivered once more.
                let fresh = self.mutant == Mutant::RetryWithNewSequence;
                let sequence = backend.sequence + u8::from(fresh);
                if let Some(out) = backend.out.as_mut().filter(|_| fresh) {
                    (out.sequence, backend.sequence) = (sequence, sequence);
                }
                Self::send(&mut state, at);
            }
            Action::Deliver(message) => self.deliver(&mut state, message)?,
            Action::Commit { copyset, answered } => self.commit(&mut state, copyset, answered),
            Action::Apply { copyset, replica } => {
                let copyset = &mut state.copysets[usize::from(copyset)];
                let is = &mut copyset.replicas[usize::from(replica)];
                is.applied += 1;
                if self.bounds.proofs {
                    // Whoever hears of it hears it from the leader.
                    (is.heard_in, is.leads) = (copyset.term, None);
                }
            }
            Action::Elect { copyset, replica, of, keeps } => {
                state.elections += 1;
                let copyset = &mut state.copysets[usize::from(copyset)];
                copyset.term += 1;
                copyset.leader = replica;
                let mut log = Self::log_of(copyset, of)[..usize::from(keeps)].to_vec();
                if self.bounds.proofs {
                    log.push(Entry { term: copyset.term, message: None });
                }
                let before = std::mem::replace(&mut copyset.log, log);
                if self.bounds.proofs && !copyset.log.starts_with(&before) {
                    copyset.former.push(before);
                }
                // It serves once it has applied what was committed before.
                let heard_in = if self.bounds.proofs { copyset.term } else { 0 };
                let new = &mut copyset.replicas[usize::from(replica)];
                let leads = Some(copyset.term);
                *new = Replica { applied: copyset.committed, heard_in, leads, epoch_in_memory: 0 };
            }
            Action::BeginRead { backend, copyset } => {
                let of = &mut state.backends[backend];
                of.reads += 1;
                let Seen { term, index, value, .. } = of.seen[usize::from(copyset)];
                of.reading = Some(Reading { copyset, least: value, term, index, asked: None });
            }
            Action::AskFollowers(backend) => {
                let needed = self.needed(&state, backend);
                state.backends[backend].reading.as_mut()?.asked = needed;
            }
            Action::FollowerAnswers { backend, replica } => {
                self.follower_answers(&mut state, backend, replica)?;
            }
            Action::FollowerProves { backend, of } => self.follower_proves(&mut state, backend, of)?,
            Action::LeaderAnswers { backend, replica, less } => {
                self.leader_answers(&mut state, backend, replica, less)?;
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing goes wrong", |_, state: &State| state.wrong.is_none()),
            // Without these the exploration could be empty and nobody would notice.
            Property::sometimes("the last write is acknowledged", |model: &Writers, state: &State| {
                state.acknowledged.iter().any(|value| *value >= model.bounds.writes)
            }),
            Property::sometimes(
                "a takeover serves, or none is asked for",
                |model: &Writers, state: &State| state.backends[1].serving || !model.bounds.takeover,
            ),
        ]
    }
}
