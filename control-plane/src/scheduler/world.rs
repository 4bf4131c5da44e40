//! A small cluster for the tests of decisions: a state, the reports of its chunkservers, and a clock that stands still
//! until told otherwise.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_protocol::geometry::{GIB, TIB};
use evolute_protocol::id::{ChunkserverId, CopysetId};
use evolute_protocol::rpc::{MemberReport, ReplicaReport, Report, Role};

use crate::config::Limits;
use crate::heartbeat::reports::{Reports, StreamNumber};
use crate::scheduler::create;
use crate::state::command::{CreateCopysets, NewCopyset, RegisterChunkserver};
use crate::state::{Command, Done, Outcome, State};

pub struct World {
    pub state: State,
    pub reports: Reports,
    pub now: Instant,
    pub behind: BTreeMap<ChunkserverId, u64>,
    pub trouble: BTreeMap<ChunkserverId, String>,
    pub free_bytes: u64,
    pub full: BTreeSet<ChunkserverId>,
    streams: BTreeMap<ChunkserverId, StreamNumber>,
}

/// Of a TiB.
const FREE_BYTES: u64 = TIB - GIB;

impl World {
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            state: State::default(),
            reports: Reports::new(Duration::from_secs(10), now),
            now,
            behind: BTreeMap::new(),
            trouble: BTreeMap::new(),
            free_bytes: FREE_BYTES,
            full: BTreeSet::new(),
            streams: BTreeMap::new(),
        }
    }

    /// In the zones z1, z2, z3, with six copysets whose replicas exist.
    pub fn with_three_chunkservers() -> Self {
        let mut world = Self::new();
        for zone in ["z1", "z2", "z3"] {
            let id = world.register(zone);
            world.report(id);
        }
        let create = create::plan(&world.state, &world.reports, &Limits::default(), world.now);
        world.apply(&create.expect("three zones")).expect("created");
        world.lead(&[1, 2, 3, 1, 2, 3]);
        for command in super::confirm::plan(&world.state, &world.reports, world.now) {
            world.apply(&command).expect("confirmed");
        }
        world
    }

    pub fn apply(&mut self, command: &Command) -> Outcome {
        self.state.apply(command).0
    }

    pub fn register(&mut self, zone: &str) -> ChunkserverId {
        let number = self.state.chunkservers().len() + 1;
        let done = self.apply(&Command::RegisterChunkserver(RegisterChunkserver {
            token: Bytes::from(vec![7; 32]),
            instance: Bytes::from(format!("instance-{number}")),
            address: format!("127.0.0.1:{}", 7800 + number),
            zone: zone.to_owned(),
            server: format!("server-{number}"),
            pool: "default".to_owned(),
            capacity_bytes: TIB,
            version: "0".to_owned(),
            at_unix_ms: 0,
        }));
        match done {
            Ok(Done::Registered { chunkserver, .. }) => chunkserver,
            other => panic!("registering gave {other:?}"),
        }
    }

    pub fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    pub fn reconnect(&mut self, id: ChunkserverId) {
        self.streams.insert(id, self.reports.open_stream(id, instance(id), self.now));
    }

    pub fn disconnect(&mut self, id: ChunkserverId) {
        let stream = self.streams.remove(&id).expect("connected");
        self.reports.close_stream(id, stream, self.now);
    }

    /// A report without replicas.
    pub fn report(&mut self, id: ChunkserverId) {
        self.take(id, Vec::new());
    }

    /// Every connected chunkserver reports all of its replicas; the copyset i + 1 is led by `leaders[i]` (0: nobody).
    pub fn lead(&mut self, leaders: &[u32]) {
        self.lead_without(ChunkserverId(0), leaders);
    }

    /// The same without one of them.
    pub fn lead_without(&mut self, away: ChunkserverId, leaders: &[u32]) {
        let ids: Vec<_> = self.state.chunkservers().keys().copied().filter(|&id| id != away).collect();
        for id in ids {
            let copysets = self
                .state
                .copysets()
                .iter()
                .filter_map(|(c, record)| Some((c, record, record.replica_on(id)?)));
            let replicas = copysets.map(|(&copyset, record, replica)| {
                let leader = leaders[copyset.0 as usize - 1];
                let role = if leader == id.0 { Role::Leader } else { Role::Follower };
                let member = |replica: &crate::state::Replica| MemberReport {
                    replica: replica.id.0,
                    chunkserver: replica.chunkserver.0,
                    matched_index: 1000 - self.behind.get(&replica.chunkserver).copied().unwrap_or(0),
                    voter: true,
                };
                ReplicaReport {
                    copyset: copyset.0,
                    replica: replica.id.0,
                    role: i32::from(role),
                    term: 2,
                    leader_chunkserver: leader,
                    last_index: 1000,
                    committed_index: 1000,
                    applied_index: 1000 - self.behind.get(&id).copied().unwrap_or(0),
                    members: record.replicas.iter().map(member).collect(),
                    ..ReplicaReport::default()
                }
            });
            let replicas = replicas.collect();
            self.take(id, replicas);
        }
    }

    /// As [`World::lead`], but the leader of one copyset says that it dropped a volume.
    pub fn say_dropped(&mut self, id: ChunkserverId, copyset: CopysetId, volume: u64) {
        let mut replicas: Vec<_> = self
            .reports
            .last(id)
            .map(|report| report.replicas.values().cloned().collect())
            .unwrap_or_default();
        for replica in replicas.iter_mut().filter(|replica: &&mut ReplicaReport| replica.copyset == copyset.0)
        {
            replica.dropped_volumes.push(volume);
        }
        self.take(id, replicas);
    }

    /// Its last report again, with less free.
    pub fn say_free(&mut self, id: ChunkserverId, free_bytes: u64) {
        let replicas = self.reports.last(id).map(|report| report.replicas.values().cloned().collect());
        self.free_bytes = free_bytes;
        self.take(id, replicas.unwrap_or_default());
        self.free_bytes = FREE_BYTES;
    }

    /// One more copyset, with the first of these as its first leader. Nobody has created it.
    pub fn add_copyset(&mut self, chunkservers: [u32; 3]) {
        let copyset = NewCopyset { chunkservers: chunkservers.to_vec(), first_leader: chunkservers[0] };
        let create = CreateCopysets {
            pool: "default".to_owned(),
            seen: self.state.copysets_given(),
            copysets: vec![copyset],
        };
        self.apply(&Command::CreateCopysets(create)).expect("created");
    }

    /// A report of one replica, and of no other.
    pub fn report_only(&mut self, id: ChunkserverId, copyset: CopysetId, replica: u64) {
        let replica = ReplicaReport { copyset: copyset.0, replica, ..ReplicaReport::default() };
        self.take(id, vec![replica]);
    }

    /// A report of these replicas.
    pub fn take(&mut self, id: ChunkserverId, replicas: Vec<ReplicaReport>) {
        let now = self.now;
        let reports = &mut self.reports;
        let stream = *self.streams.entry(id).or_insert_with(|| reports.open_stream(id, instance(id), now));
        let report = Report {
            capacity_bytes: TIB,
            free_bytes: self.free_bytes,
            used_bytes: TIB - self.free_bytes,
            replicas,
            trouble: self.trouble.get(&id).cloned().unwrap_or_default(),
            full: self.full.contains(&id),
            ..Report::default()
        };
        assert!(reports.take(id, stream, report, now));
    }
}

fn instance(id: ChunkserverId) -> Bytes {
    Bytes::from(format!("instance-{}", id.0))
}
