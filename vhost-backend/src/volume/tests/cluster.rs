//! Three chunkservers in this process that speak the real wire over real sockets, with one memory between them: a
//! perfect Raft, so that whatever goes wrong in a test is what the test made go wrong.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use evolute_protocol::checksum::checksums;
use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::{ChunkIndex, ChunkserverId, ClusterId, CopysetId, VolumeId};
use evolute_protocol::wire::hello::{HELLO_BYTES, Hello, HelloReply};
use evolute_protocol::wire::reply::{Freshness, Refusal, Reply, ReplyData};
use evolute_protocol::wire::request::{ChangeTag, ReadAtLeast, Request, Sequence};
use evolute_protocol::wire::{FrameReader, RequestId};

use crate::volume::routing::{ChunkserverPlace, CopysetMembers, Map};

pub const CLUSTER: ClusterId = ClusterId([7; 16]);
pub const VOLUME: VolumeId = VolumeId(5);
pub const SERVERS: [ChunkserverId; 3] = [ChunkserverId(1), ChunkserverId(2), ChunkserverId(3)];

/// What a chunkserver does wrong.
#[derive(Debug, Default, Clone)]
pub struct Faults {
    /// Takes requests and says nothing.
    pub hung: bool,
    /// Takes changes of these copysets and says nothing to them, but answers everything else.
    pub holds: HashSet<CopysetId>,
    /// Refuses everything so.
    pub refuse: Option<Refusal>,
    /// Refuses the next data requests so, one each.
    pub refuse_next: VecDeque<Refusal>,
    /// Answers the next so many changes with what is no answer to them.
    pub nonsense: u32,
    /// Cuts the connection at the next so many changes, before doing them.
    pub cut_before: u32,
    /// The same, after doing them: the answer is lost, the change is not.
    pub cut_after: u32,
    /// Flips a bit in the data of the next so many reads.
    pub damage: u32,
    /// Answers reads as if it still led in an old term, from memory as it was then.
    pub deposed: Option<Past>,
    /// Has applied no more than this, while it follows.
    pub behind: HashMap<CopysetId, Past>,
    /// What its log holds, while it follows, although it has not applied it: up to this index, by a leader of this term.
    pub logged: Option<Freshness>,
    /// Its answers say that their data can hold so many entries more, while it leads.
    pub shows_more: u64,
    /// Answers as a follower whether or not it has applied enough.
    pub careless: bool,
    /// Reads are answered this much later.
    pub slow: Duration,
    /// One request in so many: 0 for none. Cut before, cut after, refuse with something that passes.
    pub chaos: u32,
    /// Replies are held until this many have gathered (or a millisecond), and leave in another order.
    pub shuffle: usize,
}

/// What a deposed leader knows.
#[derive(Debug, Clone)]
pub struct Past {
    term: u64,
    index: u64,
    sectors: HashMap<(ChunkIndex, u32), [u8; 512]>,
}

/// One change as it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    pub server: ChunkserverId,
    pub copyset: CopysetId,
    pub tag: ChangeTag,
    pub what: String,
}

#[derive(Debug, Default)]
pub struct Group {
    /// `None`: an election without end.
    pub leader: Option<ChunkserverId>,
    pub term: u64,
    pub index: u64,
    pub epoch: Epoch,
    floor: Sequence,
    applied: BTreeSet<Sequence>,
}

#[derive(Debug, Default)]
pub struct State {
    pub groups: HashMap<CopysetId, Group>,
    pub faults: HashMap<ChunkserverId, Faults>,
    sectors: HashMap<(ChunkIndex, u32), [u8; 512]>,
    pub received: Vec<Received>,
    /// Fences that were committed, in order.
    pub fences: Vec<(CopysetId, Epoch)>,
    /// Data requests that came, by chunkserver: fences not counted.
    pub requests: HashMap<ChunkserverId, u64>,
    /// Reads that were answered as a follower, and those refused because it was behind.
    pub followed: HashMap<ChunkserverId, u64>,
    pub refused_behind: u64,
    /// What followers were asked.
    pub asked: Vec<ReadAtLeast>,
    down: HashSet<ChunkserverId>,
    addresses: HashMap<ChunkserverId, SocketAddr>,
    streams: Vec<(ChunkserverId, TcpStream)>,
    random: u32,
}

impl State {
    pub fn past(&self, copyset: CopysetId) -> Past {
        let group = &self.groups[&copyset];
        Past { term: group.term, index: group.index, sectors: self.sectors.clone() }
    }

    pub fn fault(&mut self, server: ChunkserverId) -> &mut Faults {
        self.faults.entry(server).or_default()
    }

    pub fn lead(&mut self, copyset: CopysetId, leader: Option<ChunkserverId>) {
        let group = self.groups.get_mut(&copyset).expect("a group of the test");
        group.term += 1;
        group.leader = leader;
    }

    fn random(&mut self) -> u32 {
        self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.random >> 8
    }
}

/// The cluster; its threads end with the process.
#[derive(Debug, Clone)]
pub struct Cluster {
    state: Arc<Mutex<State>>,
    addresses: Vec<SocketAddr>,
    copysets: Vec<CopysetId>,
}

/// What becomes of a request.
enum Deed {
    Reply(Reply),
    Later(Reply, Instant),
    Nothing,
    Cut,
}

impl Cluster {
    /// Copyset n is led by chunkserver n modulo three.
    pub fn start(copysets: u32) -> Self {
        let state = Arc::new(Mutex::new(State { random: 1, ..State::default() }));
        let copysets: Vec<_> = (1..=copysets).map(CopysetId).collect();
        for (copyset, leader) in copysets.iter().zip(SERVERS.iter().cycle()) {
            let group = Group { leader: Some(*leader), term: 1, ..Group::default() };
            state.lock().expect("sound").groups.insert(*copyset, group);
        }
        let addresses = SERVERS.iter().map(|server| listen(&state, *server)).collect();
        Self { state, addresses, copysets }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("sound")
    }

    pub fn address(&self, server: ChunkserverId) -> SocketAddr {
        self.addresses[server.0 as usize - 1]
    }

    /// Segment 0 is allocated, its chunks dealt over all copysets.
    pub fn map(&self) -> Map {
        let place = |server: &ChunkserverId| ChunkserverPlace {
            chunkserver: *server,
            address: self.address(*server).to_string(),
            resolved: Some(self.address(*server)),
        };
        let members = |copyset: &CopysetId| CopysetMembers {
            copyset: *copyset,
            replicas: SERVERS.to_vec(),
            leader: self.state().groups[copyset].leader,
        };
        Map {
            cluster: CLUSTER,
            segments: vec![(evolute_protocol::id::SegmentIndex(0), self.segment())],
            copysets: self.copysets.iter().map(members).collect(),
            chunkservers: SERVERS.iter().map(place).collect(),
        }
    }

    pub fn segment(&self) -> [CopysetId; 64] {
        std::array::from_fn(|chunk| self.copysets[chunk % self.copysets.len()])
    }

    /// Like kill -9: connections are cut, new ones are cut at once.
    pub fn kill(&self, server: ChunkserverId) {
        let mut state = self.state();
        state.down.insert(server);
        for (of, stream) in &state.streams {
            if *of == server {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
        state.streams.retain(|(of, _)| *of != server);
    }

    /// All of them at other addresses, at one moment. Nobody listens at the old ones.
    pub fn move_all(&mut self) {
        for server in SERVERS {
            self.kill(server);
            let address = listen(&self.state, server);
            self.addresses[server.0 as usize - 1] = address;
        }
        SERVERS.iter().for_each(|server| self.revive(*server));
    }

    /// So many were made in all.
    pub fn connections(&self) -> usize {
        self.state().streams.len()
    }

    pub fn revive(&self, server: ChunkserverId) {
        self.state().down.remove(&server);
    }
}

/// At a port of its own, until the process ends or it listens elsewhere.
fn listen(state: &Arc<Mutex<State>>, server: ChunkserverId) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    state.lock().expect("sound").addresses.insert(server, address);
    let state = Arc::clone(state);
    thread::spawn(move || accept(&state, server, address, &listener));
    address
}

fn accept(state: &Arc<Mutex<State>>, server: ChunkserverId, address: SocketAddr, listener: &TcpListener) {
    while let Ok((stream, _)) = listener.accept() {
        {
            let mut state = state.lock().expect("sound");
            if state.addresses[&server] != address {
                return;
            }
            if state.down.contains(&server) {
                continue;
            }
            state.streams.push((server, stream.try_clone().expect("a descriptor")));
        }
        let state = Arc::clone(state);
        thread::spawn(move || serve(&state, server, stream));
    }
}

fn serve(state: &Mutex<State>, server: ChunkserverId, mut stream: TcpStream) {
    let mut hello = [0; HELLO_BYTES];
    if stream.read_exact(&mut hello).is_err() {
        return;
    }
    let welcome = Hello::decode(&hello).expect("ours").judge(CLUSTER, server);
    let _ = stream.write_all(&HelloReply::new(welcome).encode());
    let mut reader = FrameReader::default();
    let mut held: Vec<(CopysetId, RequestId, Reply)> = Vec::new();
    let mut later: Vec<(Instant, CopysetId, RequestId, Reply)> = Vec::new();
    stream.set_read_timeout(Some(Duration::from_millis(1))).expect("settable");
    let mut buffer = vec![0; 64 << 10];
    loop {
        let quiet = match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(got) => {
                reader.space().extend_from_slice(&buffer[..got]);
                false
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => true,
            Err(_) => return,
        };
        while let Some(frame) = reader.next().expect("whole frames") {
            let request = Request::decode(&frame).expect("sense");
            let deed = state.lock().expect("sound").act(server, frame.copyset, &request);
            match deed {
                Deed::Reply(reply) => held.push((frame.copyset, frame.request, reply)),
                Deed::Later(reply, at) => later.push((at, frame.copyset, frame.request, reply)),
                Deed::Nothing => {}
                Deed::Cut => {
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                    return;
                }
            }
        }
        let due = later.extract_if(.., |(at, ..)| *at <= Instant::now());
        held.extend(due.map(|(_, copyset, request, reply)| (copyset, request, reply)));
        let (many, turn) = {
            let mut state = state.lock().expect("sound");
            (state.fault(server).shuffle, state.random() as usize)
        };
        if held.is_empty() || (held.len() < many && !quiet) {
            continue;
        }
        if many > 0 {
            held.reverse();
            let turn = turn % held.len();
            held.rotate_left(turn);
        }
        let mut out = BytesMut::new();
        for (copyset, request, reply) in held.drain(..) {
            reply.put(copyset, request, &mut out);
            if let Reply::Data { data, .. } = reply {
                data.iter().for_each(|part| out.extend_from_slice(part));
            }
        }
        if stream.write_all(&out).is_err() {
            return;
        }
    }
}

impl State {
    fn act(&mut self, server: ChunkserverId, copyset: CopysetId, request: &Request) -> Deed {
        let refused = |refusal| Deed::Reply(Reply::Refused(refusal));
        let tag = tag_of(request);
        if let Some(tag) = tag {
            assert!(tag.floor <= tag.sequence);
            self.received.push(Received { server, copyset, tag, what: describe(request) });
        }
        if !matches!(request, Request::Fence(_)) {
            *self.requests.entry(server).or_default() += 1;
        }
        let dice = self.random();
        let faults = self.fault(server);
        if faults.hung || (tag.is_some() && faults.holds.contains(&copyset)) {
            return Deed::Nothing;
        }
        if let Some(refusal) = faults.refuse {
            return refused(refusal);
        }
        if let (Some(past), Request::Read(read)) = (faults.deposed.clone(), request) {
            let fresh = Freshness { term: past.term, index: past.index };
            let data = collect(&past.sectors, read.chunk.index, read.range.offset(), read.range.length());
            return Deed::Reply(data_reply(fresh, read.range.offset(), data));
        }
        let data_request = !matches!(request, Request::Fence(_));
        if data_request && let Some(refusal) = faults.refuse_next.pop_front() {
            return refused(refusal);
        }
        let chaos = faults.chaos;
        let slow = faults.slow;
        let unlucky = chaos > 0 && dice.is_multiple_of(chaos);
        if unlucky {
            match dice / chaos % 6 {
                0 => return Deed::Cut,
                1 => return refused(Refusal::Busy),
                2 => return refused(Refusal::NotLeader { leader: None }),
                3 => return refused(Refusal::Damaged),
                4 if tag.is_some() => faults.cut_after = 1,
                _ => {}
            }
        }
        if tag.is_some() && faults.cut_before > 0 {
            faults.cut_before -= 1;
            return Deed::Cut;
        }
        if tag.is_some() && faults.nonsense > 0 {
            faults.nonsense -= 1;
            return Deed::Reply(data_reply(Freshness::default(), 0, vec![0; 512]));
        }
        let reply = match request {
            Request::ReadAtLeast(ask) => self.follow(server, copyset, ask),
            // The leader heard of it, and handed over.
            Request::TakeOver(_) => {
                self.lead(copyset, Some(server));
                Reply::Refused(Refusal::NotLeader { leader: None })
            }
            _ => self.apply(server, copyset, request),
        };
        if !slow.is_zero() && matches!(request, Request::Read(_)) {
            return Deed::Later(reply, Instant::now() + slow);
        }
        let faults = self.fault(server);
        if matches!(reply, Reply::Done(_)) && tag.is_some() && faults.cut_after > 0 {
            faults.cut_after -= 1;
            return Deed::Cut;
        }
        Deed::Reply(reply)
    }

    /// What a follower answers: from its own past if it is behind. A leader is never behind.
    fn follow(&mut self, server: ChunkserverId, copyset: CopysetId, ask: &ReadAtLeast) -> Reply {
        let faults = self.fault(server).clone();
        self.asked.push(*ask);
        let Some(group) = self.groups.get(&copyset) else {
            return Reply::Refused(Refusal::NoSuchCopyset);
        };
        if ask.read.epoch < group.epoch {
            return Reply::Refused(Refusal::Fenced { current: group.epoch });
        }
        let past = faults.behind.get(&copyset).or(faults.deposed.as_ref());
        let past = past.filter(|_| group.leader != Some(server));
        let applied = past.map_or(group.index, |past| past.index);
        let proven = |logged: Freshness| logged.term >= ask.term && logged.index >= ask.index;
        let ahead = applied < ask.index && faults.logged.is_some_and(proven);
        if applied < ask.index && !ahead && !faults.careless {
            self.refused_behind += 1;
            return Reply::Refused(Refusal::Behind { applied });
        }
        let applied = if ahead { ask.index } else { applied };
        let range = ask.read.range;
        let sectors = past.filter(|_| !ahead).map_or(&self.sectors, |past| &past.sectors);
        let data = collect(sectors, ask.read.chunk.index, range.offset(), range.length());
        let fresh = Freshness { term: group.term, index: applied };
        *self.followed.entry(server).or_default() += 1;
        data_reply(fresh, range.offset(), data)
    }

    fn apply(&mut self, server: ChunkserverId, copyset: CopysetId, request: &Request) -> Reply {
        let damage = {
            let faults = self.fault(server);
            let damage = matches!(request, Request::Read(_)) && faults.damage > 0;
            faults.damage -= u32::from(damage);
            damage
        };
        let Some(group) = self.groups.get_mut(&copyset) else {
            return Reply::Refused(Refusal::NoSuchCopyset);
        };
        if group.leader != Some(server) {
            return Reply::Refused(Refusal::NotLeader { leader: group.leader });
        }
        let epoch = match request {
            Request::Fence(fence) => fence.epoch,
            Request::Read(read) => read.epoch,
            Request::ChunkInfo(ask) => ask.epoch,
            Request::ReadAtLeast(_) | Request::TakeOver(_) | Request::Digests(_) | Request::Doubt(_) => {
                unreachable!("followers' business")
            }
            _ => tag_of(request).expect("a change").epoch,
        };
        if epoch < group.epoch {
            return Reply::Refused(Refusal::Fenced { current: group.epoch });
        }
        if let Request::Fence(fence) = request {
            assert_eq!(fence.volume, VOLUME);
            group.index += 1;
            if epoch > group.epoch {
                (group.epoch, group.floor) = (epoch, Sequence(0));
                group.applied.clear();
            }
            self.fences.push((copyset, epoch));
            return Reply::Done(Freshness { term: group.term, index: group.index });
        }
        if epoch > group.epoch {
            return Reply::Refused(Refusal::NotFenced);
        }
        if let Some(tag) = tag_of(request) {
            group.index += 1;
            let fresh = Freshness { term: group.term, index: group.index };
            if tag.sequence < group.floor || !group.applied.insert(tag.sequence) {
                return Reply::Done(fresh);
            }
            group.floor = group.floor.max(tag.floor);
            group.applied = group.applied.split_off(&group.floor);
            if !self.write(request) {
                return Reply::Refused(Refusal::Damaged);
            }
            return Reply::Done(fresh);
        }
        let fresh = Freshness { term: group.term, index: group.index };
        let Request::Read(read) = request else { unreachable!("the volume asks nothing else") };
        let mut data = collect(&self.sectors, read.chunk.index, read.range.offset(), read.range.length());
        let reply = data_reply(fresh, read.range.offset(), data.clone());
        let more = self.fault(server).shows_more;
        match reply {
            Reply::Data { fresh, shown, checksums, .. } if damage => {
                data[0] ^= 1;
                Reply::Data { fresh, shown, checksums, data: ReplyData::from_iter([Bytes::from(data)]) }
            }
            Reply::Data { fresh, shown, checksums, data } => {
                Reply::Data { fresh, shown: shown + more, checksums, data }
            }
            reply => reply,
        }
    }

    /// A change that its writer does not hear of: some have applied it.
    pub fn change_unheard(&mut self, copyset: CopysetId, sector: u32, bytes: [u8; 512]) {
        self.groups.get_mut(&copyset).expect("a group of the test").index += 1;
        self.sectors.insert((ChunkIndex(0), sector), bytes);
    }

    fn write(&mut self, request: &Request) -> bool {
        let (chunk, range, mut data) = match request {
            Request::Write(write) if write.damaged_piece().is_some() => return false,
            Request::Write(write) => (write.chunk.index, write.range, write.data.clone()),
            Request::Discard(discard) => (discard.chunk.index, discard.range, Bytes::new()),
            Request::WriteZeroes(zeroes) => (zeroes.chunk.index, zeroes.range, Bytes::new()),
            _ => unreachable!("changes only"),
        };
        if data.is_empty() {
            self.sectors.retain(|(of, sector), _| {
                *of != chunk
                    || *sector < range.offset() / 512
                    || *sector >= (range.offset() + range.length()) / 512
            });
            return true;
        }
        for sector in range.offset() / 512..(range.offset() + range.length()) / 512 {
            let mut bytes = [0; 512];
            data.copy_to_slice(&mut bytes);
            self.sectors.insert((chunk, sector), bytes);
        }
        true
    }
}

fn tag_of(request: &Request) -> Option<ChangeTag> {
    match request {
        Request::Write(write) => Some(write.tag),
        Request::Discard(discard) => Some(discard.tag),
        Request::WriteZeroes(zeroes) => Some(zeroes.tag),
        Request::Fence(_)
        | Request::Read(_)
        | Request::ReadAtLeast(_)
        | Request::Digests(_)
        | Request::Doubt(_)
        | Request::ChunkInfo(_)
        | Request::TakeOver(_) => None,
    }
}

/// All of a change but its tag.
fn describe(request: &Request) -> String {
    match request {
        Request::Write(write) => format!("{} {:?} {:?}", write.chunk, write.range, write.checksums),
        Request::Discard(discard) => format!("{} {:?}", discard.chunk, discard.range),
        Request::WriteZeroes(zeroes) => format!("{} {:?} {}", zeroes.chunk, zeroes.range, zeroes.unmap),
        other => format!("{other:?}"),
    }
}

fn collect(
    sectors: &HashMap<(ChunkIndex, u32), [u8; 512]>,
    chunk: ChunkIndex,
    offset: u32,
    length: u32,
) -> Vec<u8> {
    (offset / 512..(offset + length) / 512)
        .flat_map(|sector| sectors.get(&(chunk, sector)).copied().unwrap_or([0; 512]))
        .collect()
}

fn data_reply(fresh: Freshness, offset: u32, data: Vec<u8>) -> Reply {
    let data = Bytes::from(data);
    let checksums = checksums(u64::from(offset), &data);
    Reply::Data { fresh, shown: fresh.index, checksums, data: ReplyData::from_iter([data]) }
}
