//! What the chunkservers last said, and which process speaks for which chunkserver.
//!
//! In memory, on the leader: lost with it, and said again by every chunkserver as soon as it finds the new one. This is
//! the only place that holds times; every question about liveness takes `now`.
//!
//! What always holds:
//!
//! - One process (`instance`) speaks for a chunkserver at a time. Another one gets in only when the one before is gone:
//!   its stream closed, or silent for longer than a lost report explains.
//! - Only the newest stream of that process counts; what an older one still brings is dropped.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId, VolumeId};
use evolute_protocol::rpc::{LogEnd, ReplicaReport, Report, Role};

/// Reports that may be missed in a row before a chunkserver counts as offline. One is a lost packet, two a bad
/// moment.
pub const MISSED_REPORTS_MAX: u32 = 3;
/// A closed stream is a dead process or a broken connection. The latter comes back within a second (chunkservers
/// reconnect at once), so only after this it is the former.
pub const CLOSED_STREAM_GRACE: Duration = Duration::from_secs(2);
/// A process that registered opens its stream next. One that was killed in between must not keep its successor out.
pub const REGISTERED_GRACE: Duration = Duration::from_secs(2);
/// A second process is refused while the first reported within this many intervals.
const SPOKEN_FOR_INTERVALS: u32 = 2;
/// An operator reads it in one line.
const TROUBLE_CHARS_MAX: usize = 300;

/// One heartbeat stream; newer ones have higher numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamNumber(u64);

/// Another process speaks for this chunkserver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpokenFor {
    pub since: Duration,
}

#[derive(Debug)]
pub struct Reports {
    of: BTreeMap<ChunkserverId, Presence>,
    interval: Duration,
    streams: u64,
    began: Instant,
    /// How far each replica has come: what it had acknowledged, and was committed, when a leader last said so.
    reached: BTreeMap<CopysetId, BTreeMap<ReplicaId, u64>>,
    /// What imports wrote that ended lately, and when.
    imported: BTreeMap<VolumeId, (u64, Instant)>,
}

#[derive(Debug)]
struct Presence {
    instance: Bytes,
    /// This process's registration or first stream.
    since: Instant,
    stream: Option<(StreamNumber, Instant)>,
    closed: Option<Instant>,
    /// The last report of this process.
    report: Option<Received>,
    /// The last report of any process for this chunkserver.
    heard: Option<Instant>,
}

/// A report, as the rest of the control plane uses it.
#[derive(Debug, Clone, Default)]
pub struct Received {
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    pub free_bytes: u64,
    pub replicas: BTreeMap<CopysetId, ReplicaReport>,
    pub volumes: Vec<(VolumeId, CopysetId, u64)>,
    pub trouble: String,
    pub integrity: Integrity,
    /// Of one synced write of its log.
    pub write_latency: Latency,
    /// Its disk has no room for a new chunk.
    pub full: bool,
    /// Its disk takes far longer than usual.
    pub slow: bool,
}

/// What a chunkserver has found out about its own data since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Integrity {
    pub scrubbed_bytes: u64,
    /// 0: not yet.
    pub last_full_scrub_unix_ms: u64,
    pub bad_blocks_found: u64,
    pub bad_blocks_repaired: u64,
    pub blocks_compared: u64,
    pub blocks_differing: u64,
    pub blocks_not_compared: u64,
    pub blocks_undecided: u64,
}

/// 0: not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Latency {
    pub us_p50: u64,
    pub us_p99: u64,
}

/// The leader of a copyset, as it says itself or as its followers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KnownLeader {
    pub term: u64,
    /// Itself, rather than a follower of its.
    pub itself: bool,
    pub chunkserver: ChunkserverId,
}

impl Reports {
    pub fn new(interval: Duration, now: Instant) -> Self {
        Self {
            of: BTreeMap::new(),
            interval,
            streams: 0,
            began: now,
            reached: BTreeMap::new(),
            imported: BTreeMap::new(),
        }
    }

    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// How long this MDS has been listening.
    pub fn listening_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
    }

    /// Every chunkserver that runs has had the time to report.
    pub fn all_heard(&self, now: Instant) -> bool {
        self.listening_for(now) > self.interval * MISSED_REPORTS_MAX
    }

    /// May this process speak for the chunkserver?
    pub fn check_instance(&self, id: ChunkserverId, instance: &[u8], now: Instant) -> Result<(), SpokenFor> {
        let Some(presence) = self.of.get(&id) else { return Ok(()) };
        if presence.instance == instance {
            return Ok(());
        }
        let since = |at: Instant| now.saturating_duration_since(at);
        let alive = match (presence.stream, presence.closed) {
            (Some((_, opened)), _) => {
                let last = presence.heard.map_or(opened, |heard| heard.max(opened));
                since(last) <= self.interval * SPOKEN_FOR_INTERVALS
            }
            // Its stream was closed: it is gone, or will find itself refused when it comes back.
            (None, Some(_)) => false,
            (None, None) => since(presence.since) <= REGISTERED_GRACE,
        };
        if alive { Err(SpokenFor { since: since(presence.since) }) } else { Ok(()) }
    }

    /// From now on this process speaks for the chunkserver. Check before.
    pub fn registered(&mut self, id: ChunkserverId, instance: Bytes, now: Instant) {
        let heard = self.of.get(&id).and_then(|presence| presence.heard);
        match self.of.get_mut(&id) {
            // Again: its answer was lost, or it lost its stream.
            Some(presence) if presence.instance == instance => presence.since = now,
            _ => {
                let presence =
                    Presence { instance, since: now, stream: None, closed: None, report: None, heard };
                self.of.insert(id, presence);
            }
        }
    }

    /// A stream of this process begins; older ones of it are over. Check before.
    pub fn open_stream(&mut self, id: ChunkserverId, instance: Bytes, now: Instant) -> StreamNumber {
        if self.of.get(&id).is_none_or(|presence| presence.instance != instance) {
            // It registered with another MDS.
            self.registered(id, instance, now);
        }
        self.streams += 1;
        let number = StreamNumber(self.streams);
        if let Some(presence) = self.of.get_mut(&id) {
            presence.stream = Some((number, now));
            presence.closed = None;
        }
        number
    }

    /// A stream ended.
    pub fn close_stream(&mut self, id: ChunkserverId, stream: StreamNumber, now: Instant) {
        if let Some(presence) = self.of.get_mut(&id)
            && presence.stream.is_some_and(|(newest, _)| newest == stream)
        {
            presence.stream = None;
            presence.closed = Some(now);
        }
    }

    pub fn is_newest(&self, id: ChunkserverId, stream: StreamNumber) -> bool {
        self.of.get(&id).and_then(|presence| presence.stream).is_some_and(|(newest, _)| newest == stream)
    }

    /// Takes a report in. False: the stream is over, a newer one or another process took its place.
    pub fn take(&mut self, id: ChunkserverId, stream: StreamNumber, report: Report, now: Instant) -> bool {
        if !self.is_newest(id, stream) {
            return false;
        }
        let Some(presence) = self.of.get_mut(&id) else { return false };
        presence.heard = Some(now);
        let received = Received::from(report);
        for (&copyset, says) in received.replicas.iter().filter(|(_, says)| says.role() == Role::Leader) {
            let before = self.reached.remove(&copyset).unwrap_or_default();
            let reached = says.members.iter().map(|member| {
                let now = member.matched_index.min(says.committed_index);
                let replica = ReplicaId(member.replica);
                (replica, now.max(before.get(&replica).copied().unwrap_or(0)))
            });
            self.reached.insert(copyset, reached.collect());
        }
        presence.report = Some(received);
        true
    }

    /// The first of these replicas whose log ends before what it had acknowledged and was committed, and that index. (What
    /// is committed and on a disk is never taken back by anybody.)
    pub fn lacks<'a>(&self, ends: &'a [LogEnd]) -> Option<(&'a LogEnd, u64)> {
        ends.iter().find_map(|end| {
            let reached = self.reached.get(&CopysetId(end.copyset))?.get(&ReplicaId(end.replica))?;
            (end.last_index < *reached).then_some((end, *reached))
        })
    }

    /// What these replicas have is all that counts from now on.
    pub fn accept(&mut self, ends: &[LogEnd]) {
        for end in ends {
            if let Some(of) = self.reached.get_mut(&CopysetId(end.copyset)) {
                of.remove(&ReplicaId(end.replica));
            }
        }
    }

    /// Its process is there: it may be given work and counted on.
    pub fn is_online(&self, id: ChunkserverId, now: Instant) -> bool {
        let Some(presence) = self.of.get(&id) else { return false };
        if presence.report.is_none() {
            return false;
        }
        let since = |at: Instant| now.saturating_duration_since(at);
        let connected = match presence.closed {
            Some(closed) => since(closed) <= CLOSED_STREAM_GRACE,
            None => presence.stream.is_some(),
        };
        connected && presence.heard.is_some_and(|heard| since(heard) <= self.interval * MISSED_REPORTS_MAX)
    }

    /// How long its present stream has been open.
    pub fn connected_for(&self, id: ChunkserverId, now: Instant) -> Option<Duration> {
        let (_, opened) = self.of.get(&id)?.stream?;
        Some(now.saturating_duration_since(opened))
    }

    /// The time since its last report to this MDS, whichever process of it made it.
    pub fn silent_for(&self, id: ChunkserverId, now: Instant) -> Option<Duration> {
        Some(now.saturating_duration_since(self.of.get(&id)?.heard?))
    }

    /// The last report of the process that speaks for it, online or not.
    pub fn last(&self, id: ChunkserverId) -> Option<&Received> {
        self.of.get(&id)?.report.as_ref()
    }

    /// The last report of a chunkserver that is online.
    pub fn online(&self, id: ChunkserverId, now: Instant) -> Option<&Received> {
        if self.is_online(id, now) { self.last(id) } else { None }
    }

    /// What a synced write usually takes the other chunkservers that are online, in µs: the middle one of them, the
    /// quicker of the two middle ones. One of two others that is slow too must not hide that this one is.
    pub fn usual_write_us(&self, but: ChunkserverId, now: Instant) -> Option<u64> {
        let others = self.of.keys().filter(|&&id| id != but);
        let mut took: Vec<u64> = others
            .filter_map(|&id| Some(self.online(id, now)?.write_latency.us_p50))
            .filter(|&us| us > 0)
            .collect();
        took.sort_unstable();
        took.get(took.len().checked_sub(1)? / 2).copied()
    }

    /// An import ended, having written this much.
    pub fn imported(&mut self, volume: VolumeId, bytes: u64, now: Instant) {
        let lately = self.interval * MISSED_REPORTS_MAX;
        self.imported.retain(|_, (_, at)| now.saturating_duration_since(*at) <= lately);
        self.imported.insert(volume, (bytes, now));
    }

    /// What an import wrote into a volume, as long as one of those that hold it has not reported since.
    pub fn imported_since(
        &self,
        volume: VolumeId,
        mut members: impl Iterator<Item = ChunkserverId>,
        now: Instant,
    ) -> Option<u64> {
        let &(bytes, at) = self.imported.get(&volume)?;
        let silent = |id| self.is_online(id, now) && self.of.get(&id).is_some_and(|p| p.heard <= Some(at));
        members.any(silent).then_some(bytes)
    }

    /// Who leads, by the newest term anybody online among `members` knows of.
    pub fn leader(
        &self,
        copyset: CopysetId,
        members: impl Iterator<Item = ChunkserverId>,
        now: Instant,
    ) -> Option<KnownLeader> {
        members
            .filter_map(|id| {
                let replica = self.online(id, now)?.replicas.get(&copyset)?;
                let itself = replica.role() == Role::Leader;
                let chunkserver = if itself { id } else { ChunkserverId(replica.leader_chunkserver) };
                (chunkserver.0 != 0).then_some(KnownLeader { term: replica.term, itself, chunkserver })
            })
            .max()
    }
}

impl Received {
    /// How many of its replicas do not vote because its directory was put back to an older copy.
    pub fn put_back(&self) -> u32 {
        u32::try_from(self.replicas.values().filter(|replica| replica.put_back).count()).unwrap_or(u32::MAX)
    }
}

/// An exabyte: those of all chunkservers are added up without a look. Some file systems say more than they have.
const BYTES_MAX: u64 = 1 << 60;

impl From<Report> for Received {
    fn from(report: Report) -> Self {
        let plain = |c: &char| !c.is_control();
        Self {
            capacity_bytes: report.capacity_bytes.min(BYTES_MAX),
            used_bytes: report.used_bytes.min(BYTES_MAX),
            free_bytes: report.free_bytes.min(BYTES_MAX),
            replicas: report
                .replicas
                .into_iter()
                .map(|mut replica| {
                    replica.failed = replica.failed.chars().filter(plain).take(TROUBLE_CHARS_MAX).collect();
                    replica.data_bytes = replica.data_bytes.min(BYTES_MAX);
                    (CopysetId(replica.copyset), replica)
                })
                .collect(),
            volumes: report
                .volumes
                .into_iter()
                .map(|used| (VolumeId(used.volume), CopysetId(used.copyset), used.used_bytes.min(BYTES_MAX)))
                .collect(),
            trouble: report.trouble.chars().filter(plain).take(TROUBLE_CHARS_MAX).collect(),
            integrity: Integrity {
                scrubbed_bytes: report.scrubbed_bytes,
                last_full_scrub_unix_ms: report.last_full_scrub_unix_ms,
                bad_blocks_found: report.bad_blocks_found,
                bad_blocks_repaired: report.bad_blocks_repaired,
                blocks_compared: report.blocks_compared,
                blocks_differing: report.blocks_differing,
                blocks_not_compared: report.blocks_not_compared,
                blocks_undecided: report.blocks_undecided,
            },
            write_latency: Latency {
                us_p50: report.write_latency_us_p50,
                us_p99: report.write_latency_us_p99,
            },
            full: report.full,
            slow: report.slow,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Reports, SpokenFor, StreamNumber};
    use bytes::Bytes;
    use evolute_protocol::id::{ChunkserverId, CopysetId};
    use evolute_protocol::rpc::{ReplicaReport, Report, Role};
    use std::time::{Duration, Instant};

    const ID: ChunkserverId = ChunkserverId(1);
    const A: Bytes = Bytes::from_static(b"a");
    const B: Bytes = Bytes::from_static(b"b");

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// A table with a report interval of 10 s in which process A speaks, and when it began.
    fn a_speaks() -> (Reports, StreamNumber, Instant) {
        let t = Instant::now();
        let mut reports = Reports::new(seconds(10), t);
        reports.registered(ID, A, t);
        let stream = reports.open_stream(ID, A, t);
        assert!(reports.take(ID, stream, Report::default(), t));
        (reports, stream, t)
    }

    #[test]
    fn a_second_process_is_refused_while_the_first_speaks() {
        let (reports, _, t) = a_speaks();
        assert_eq!(reports.check_instance(ID, b"b", t + seconds(5)), Err(SpokenFor { since: seconds(5) }));
        assert_eq!(reports.check_instance(ID, b"a", t + seconds(5)), Ok(()), "itself may come again");
        assert!(reports.check_instance(ID, b"b", t + seconds(20)).is_err());
        // Its stream is open still, but it says nothing: a machine without power closes no connection.
        assert_eq!(reports.check_instance(ID, b"b", t + seconds(21)), Ok(()));
    }

    #[test]
    fn a_killed_process_is_followed_at_once() {
        let (mut reports, stream, t) = a_speaks();
        reports.close_stream(ID, stream, t + seconds(1));
        assert_eq!(reports.check_instance(ID, b"b", t + seconds(1)), Ok(()));
        reports.registered(ID, B, t + seconds(1));
        assert!(!reports.is_online(ID, t + seconds(1)), "B has not reported");
        assert!(reports.check_instance(ID, b"a", t + seconds(2)).is_err(), "A is not the one any more");
        // B was killed before it opened a stream.
        assert_eq!(reports.check_instance(ID, b"a", t + seconds(4)), Ok(()));
    }

    #[test]
    fn the_newest_stream_of_a_process_counts() {
        let (mut reports, old, t) = a_speaks();
        let new = reports.open_stream(ID, A, t + seconds(1));
        assert!(!reports.take(ID, old, Report::default(), t + seconds(2)));
        reports.close_stream(ID, old, t + seconds(3));
        assert!(reports.is_online(ID, t + seconds(9)), "the old stream's end says nothing");
        assert!(reports.take(ID, new, Report::default(), t + seconds(10)));
    }

    #[test]
    fn offline_is_three_missed_reports_or_a_closed_stream() {
        let (mut reports, stream, t) = a_speaks();
        assert!(reports.is_online(ID, t + seconds(30)));
        assert!(!reports.is_online(ID, t + seconds(31)));
        assert!(reports.take(ID, stream, Report::default(), t + seconds(40)));
        reports.close_stream(ID, stream, t + seconds(41));
        assert!(reports.is_online(ID, t + seconds(43)), "it may be reconnecting");
        assert!(!reports.is_online(ID, t + seconds(44)));
        assert_eq!(reports.silent_for(ID, t + seconds(44)), Some(seconds(4)));
    }

    #[test]
    fn what_is_usual_is_the_middle_of_the_others() {
        let t = Instant::now();
        let mut reports = Reports::new(seconds(10), t);
        assert_eq!(reports.usual_write_us(ID, t), None, "there are no others");
        for (id, us) in [(1, 900_000), (2, 500), (3, 800_000), (4, 0), (5, 400)] {
            let id = ChunkserverId(id);
            let stream = reports.open_stream(id, A, t);
            let report = Report { write_latency_us_p50: us, ..Report::default() };
            assert!(reports.take(id, stream, report, t));
        }
        let usual = |but| reports.usual_write_us(ChunkserverId(but), t);
        assert_eq!(usual(1), Some(500), "4 has written nothing");
        assert_eq!(usual(5), Some(800_000));
        assert_eq!(usual(4), Some(500), "the quicker of the two in the middle");
        assert_eq!(reports.usual_write_us(ID, t + seconds(31)), None, "nobody is online");
    }

    #[test]
    fn the_newest_term_says_who_leads() {
        let t = Instant::now();
        let mut reports = Reports::new(seconds(10), t);
        let mut say = |id: u32, role, term, leader| {
            let id = ChunkserverId(id);
            let stream = reports.open_stream(id, A, t);
            let replica = ReplicaReport {
                copyset: 1,
                role: i32::from(role),
                term,
                leader_chunkserver: leader,
                ..ReplicaReport::default()
            };
            assert!(reports.take(id, stream, Report { replicas: vec![replica], ..Report::default() }, t));
            let members = (1..=3).map(ChunkserverId);
            reports
                .leader(CopysetId(1), members, t)
                .map_or((0, 0), |leader| (leader.chunkserver.0, leader.term))
        };
        assert_eq!(say(1, Role::Follower, 4, 0), (0, 0), "in an election");
        assert_eq!(say(1, Role::Leader, 4, 1), (1, 4));
        assert_eq!(say(2, Role::Follower, 5, 3), (3, 5), "a follower of a newer term");
        assert_eq!(say(3, Role::Leader, 5, 3), (3, 5));
        assert_eq!(say(2, Role::Candidate, 6, 0), (3, 5), "a candidate knows of nobody");
    }
}
