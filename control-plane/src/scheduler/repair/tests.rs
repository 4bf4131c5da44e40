//! Repair by situations, and from any situation to the end.

use std::collections::{BTreeMap, BTreeSet};

use evolute_protocol::id::{ChunkserverId, CopysetId, ReplicaId};
use evolute_protocol::rpc::{MemberReport, ReplicaReport, Role};
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};

use super::{BALANCE_MAX, PER_CHUNKSERVER_MAX, plan};
use crate::config::Limits;
use crate::scheduler::groups::{Groups, REPAIR_AFTER, STEP};
use crate::scheduler::world::World;
use crate::state::command::{
    AllocateSegment, Attach, BeginReplace, CancelReplace, CreateVolume, CreatedReplica, ReplaceUndone,
    ReplicasCreated, RetireChunkserver,
};
use crate::state::{Command, Reason};

/// Four chunkservers in z1, z2, z3, z3 and sixteen copysets.
fn with_a_spare() -> Groups {
    let mut groups = Groups::new(&["z1", "z2", "z3", "z3"], 3);
    groups.settle();
    groups
}

fn begun(commands: &[Command]) -> Vec<(u32, u32, Reason)> {
    commands
        .iter()
        .map(|command| match command {
            Command::BeginReplace(begin) => {
                (begin.copyset, begin.chunkserver, Reason::try_from(begin.reason).expect("a reason"))
            }
            other => panic!("{other:?}"),
        })
        .collect()
}

fn planned(groups: &Groups) -> Vec<Command> {
    plan(&groups.world.state, &groups.world.reports, &groups.limits, groups.world.now)
}

#[test]
fn a_silent_chunkserver_is_waited_for_and_then_replaced() {
    let mut groups = with_a_spare();
    groups.assert_whole();
    assert_eq!(groups.spread().into_values().collect::<Vec<_>>(), [16, 16, 8, 8]);
    groups.kill(3);
    groups.steps(9);
    assert_eq!(groups.pending(), [], "it may come back");
    groups.steps(1);
    let pending = groups.pending();
    assert_eq!(pending.len(), PER_CHUNKSERVER_MAX, "and not all at once");
    assert!(pending.iter().all(|(_, p)| p.new.chunkserver == ChunkserverId(4) && p.reason == Reason::Silent));
    groups.settle();
    groups.assert_whole();
    assert_eq!((groups.spread()[&3], groups.spread()[&4]), (0, 16));

    // Its replicas are no members any more when it comes back: they go, and then it gets its share.
    groups.start(3);
    groups.steps(1);
    groups.settle();
    groups.assert_whole();
    assert_eq!((groups.spread()[&3], groups.spread()[&4]), (8, 8));
}

#[test]
fn nothing_is_planned_where_it_could_not_be_done() {
    // No other chunkserver in that zone, and none in a fourth.
    let mut groups = Groups::new(&["z1", "z2", "z3", "z2"], 3);
    groups.settle();
    groups.kill(3);
    groups.steps(30);
    assert_eq!((groups.pending(), planned(&groups)), (vec![], vec![]));

    // Two of three away: whoever is left may not be the one who knows.
    let mut groups = with_a_spare();
    groups.kill(2);
    groups.kill(3);
    groups.steps(30);
    assert_eq!(groups.pending(), []);
    groups.start(2);
    groups.steps(1);
    assert!(!groups.pending().is_empty());
    groups.settle();
    assert_eq!(groups.spread()[&3], 0);
}

/// One leads, but who else is there is not enough: a majority could not agree on who the members are.
#[test]
fn a_leader_alone_is_not_enough_to_begin() {
    let mut filling = Filling::new(Reason::Silent);
    filling.cancel_and_undo();
    filling.world.pass(REPAIR_AFTER);
    silent(&mut filling, 2, 4);
    filling.say();
    assert_eq!(filling.planned(), [], "3 is silent for long, and 2 is away");
    filling.absent = vec![3];
    filling.say();
    assert_eq!(begun(&filling.planned()), [(1, 4, Reason::Silent)]);
}

#[test]
fn what_is_being_replaced_is_not_replaced_twice() {
    let mut groups = with_a_spare();
    groups.limits.repairs_max = 1;
    groups.kill(3);
    groups.steps(10);
    let [(id, _)] = groups.pending()[..] else { panic!("{:?}", groups.pending()) };
    groups.limits.repairs_max = 16;
    let begun = begun(&planned(&groups));
    assert!(!begun.is_empty() && begun.iter().all(|(copyset, ..)| *copyset != id.0), "{id}: {begun:?}");
}

#[test]
fn nobody_is_moved_away_while_another_one_is_not_there() {
    let mut groups = with_a_spare();
    groups.retire(3, true);
    groups.limits.repairs_max = 0;
    groups.kill(2);
    groups.steps(2);
    groups.limits.repairs_max = 16;
    assert_eq!(planned(&groups), [], "2 is away");
    groups.start(2);
    groups.limits.repairs_max = 0;
    groups.steps(3);
    groups.limits.repairs_max = 16;
    assert!(begun(&planned(&groups)).iter().all(|(.., reason)| *reason == Reason::Retiring));
    assert!(!planned(&groups).is_empty());
}

/// Copyset 1 on 1 (leads), 2 and 3; a replica on 4 is to take the place of the one on 3, which is away. It is hosted and
/// a learner, and lacks much. Everybody has been there for long.
struct Filling {
    world: World,
    new: ReplicaId,
    /// Chunkservers that do not report.
    absent: Vec<u32>,
    /// Those that do, without a replica of the copyset.
    without: Vec<u32>,
    failed: Vec<u32>,
    /// Entries that the one on each lacks.
    behind: BTreeMap<u32, u64>,
    voters: Vec<u32>,
}

impl Filling {
    fn new(reason: Reason) -> Self {
        let mut world = World::with_three_chunkservers();
        world.register("z3");
        let old = world.state.copysets()[&CopysetId(1)].replica_on(ChunkserverId(3)).expect("a member").id;
        let begin = BeginReplace { copyset: 1, old_replica: old.0, chunkserver: 4, reason: reason.into() };
        world.apply(&Command::BeginReplace(begin)).expect("begun");
        let new = ReplicaId(world.state.replicas_given());
        let mut filling = Self {
            world,
            new,
            absent: Vec::new(),
            without: Vec::new(),
            failed: Vec::new(),
            behind: BTreeMap::from([(4, 10_000)]),
            voters: vec![1, 2, 3],
        };
        filling.say();
        filling.world.pass(STEP * 6);
        filling.absent = vec![3];
        filling
    }

    fn created(&mut self) {
        let replicas = vec![CreatedReplica { copyset: 1, replica: self.new.0 }];
        self.world.apply(&Command::ReplicasCreated(ReplicasCreated { replicas })).expect("applied");
    }

    fn retire(&mut self, id: u32, retiring: bool) {
        let retire = RetireChunkserver { chunkserver: id, retiring };
        self.world.apply(&Command::RetireChunkserver(retire)).expect("known");
    }

    fn cancel(&mut self) {
        let cancel = CancelReplace { copyset: 1, new_replica: self.new.0 };
        self.world.apply(&Command::CancelReplace(cancel)).expect("cancelled");
    }

    fn cancel_and_undo(&mut self) {
        self.cancel();
        let undone = ReplaceUndone { copyset: 1, new_replica: self.new.0 };
        self.world.apply(&Command::ReplaceUndone(undone)).expect("undone");
    }

    /// Everybody who is not absent reports.
    fn say(&mut self) {
        let id = CopysetId(1);
        let mut hosts: Vec<(u32, u64)> = vec![(4, self.new.0)];
        let replicas = &self.world.state.copysets()[&id].replicas;
        hosts.extend(replicas.iter().map(|replica| (replica.chunkserver.0, replica.id.0)));
        let last_index = 100_000;
        let member = |&(chunkserver, replica): &(u32, u64)| MemberReport {
            replica,
            chunkserver,
            matched_index: last_index - self.behind.get(&chunkserver).copied().unwrap_or(0),
            voter: self.voters.contains(&chunkserver),
        };
        let members: Vec<_> = hosts.iter().map(member).collect();
        for (on, replica) in hosts.into_iter().filter(|(on, _)| !self.absent.contains(on)) {
            let role = if on == 1 { Role::Leader } else { Role::Follower };
            let here = ReplicaReport {
                copyset: 1,
                replica,
                role: role.into(),
                term: 3,
                leader_chunkserver: 1,
                last_index,
                members: members.clone(),
                failed: if self.failed.contains(&on) { "damaged".to_owned() } else { String::new() },
                ..ReplicaReport::default()
            };
            let reports = if self.without.contains(&on) { vec![] } else { vec![here] };
            self.world.take(ChunkserverId(on), reports);
        }
    }

    /// What is planned for the copyset.
    fn planned(&self) -> Vec<Command> {
        let limits = Limits { repair_after: REPAIR_AFTER, ..Limits::default() };
        let planned = plan(&self.world.state, &self.world.reports, &limits, self.world.now);
        let concerns = |command: &Command| match command {
            Command::BeginReplace(begin) => begin.copyset == 1,
            Command::CancelReplace(cancel) => cancel.copyset == 1,
            other => panic!("{other:?}"),
        };
        planned.into_iter().filter(concerns).collect()
    }
}

#[test]
fn the_way_back_is_taken_for_each_of_its_reasons_and_for_no_other() {
    type Happens = fn(&mut Filling);
    let comes_back: Happens = |it| it.absent = vec![];
    let stays_away: Happens = |_| {};
    let cases: [(&str, Reason, Happens, bool); 26] = [
        ("nothing", Reason::Silent, stays_away, false),
        // The new one is no good.
        ("it is silent for long", Reason::Silent, |it| silent(it, 4, 6), true),
        ("it may be a restart", Reason::Silent, |it| silent(it, 4, 5), false),
        ("it failed", Reason::Silent, |it| it.failed = vec![4], true),
        (
            "it was lost",
            Reason::Silent,
            |it| {
                it.created();
                it.without = vec![4];
            },
            true,
        ),
        ("it is not there yet", Reason::Silent, |it| it.without = vec![4], false),
        (
            "who lost it just came",
            Reason::Silent,
            |it| {
                it.created();
                it.without = vec![4];
                it.world.reconnect(ChunkserverId(4));
            },
            false,
        ),
        ("its place is to be empty", Reason::Silent, |it| it.retire(4, true), true),
        // The old one is back, and is as good.
        ("came back", Reason::Silent, comes_back, true),
        ("what was lost is there", Reason::Lost, comes_back, true),
        (
            "came back, and the new one knows as much",
            Reason::Silent,
            |it| {
                it.absent = vec![];
                it.behind = BTreeMap::new();
            },
            false,
        ),
        (
            "came back, and lacks much",
            Reason::Silent,
            |it| {
                it.absent = vec![];
                it.behind.insert(3, 10_000);
            },
            false,
        ),
        (
            "came back, and is to be empty",
            Reason::Silent,
            |it| {
                it.absent = vec![];
                it.retire(3, true);
            },
            false,
        ),
        (
            "came back without it",
            Reason::Silent,
            |it| {
                it.absent = vec![];
                it.without = vec![3];
            },
            false,
        ),
        // It is not wanted any more.
        (
            "retires",
            Reason::Retiring,
            |it| {
                it.absent = vec![];
                it.retire(3, true);
            },
            false,
        ),
        ("retires no more", Reason::Retiring, comes_back, true),
        ("evens out", Reason::Balance, comes_back, false),
        (
            "another is lost, while one retires",
            Reason::Retiring,
            |it| {
                it.absent = vec![];
                it.retire(3, true);
                it.failed = vec![2];
            },
            true,
        ),
        (
            "another is lost, while it evens out",
            Reason::Balance,
            |it| {
                it.absent = vec![];
                it.failed = vec![2];
            },
            true,
        ),
        (
            "another is silent for long",
            Reason::Balance,
            |it| {
                it.absent = vec![];
                silent(it, 2, 10);
            },
            true,
        ),
        (
            "another is away",
            Reason::Balance,
            |it| {
                it.absent = vec![];
                silent(it, 2, 9);
            },
            false,
        ),
        (
            "the one that goes is lost",
            Reason::Balance,
            |it| {
                it.absent = vec![];
                it.failed = vec![3];
            },
            false,
        ),
        // There is no way back, or it is taken already.
        (
            "it votes, and failed",
            Reason::Silent,
            |it| {
                it.voters.push(4);
                it.failed = vec![4];
            },
            false,
        ),
        (
            "it votes, and is silent",
            Reason::Silent,
            |it| {
                it.voters.push(4);
                silent(it, 4, 6);
            },
            false,
        ),
        (
            "it votes, and the old one came back",
            Reason::Silent,
            |it| {
                it.voters.push(4);
                it.absent = vec![];
            },
            false,
        ),
        (
            "it was cancelled",
            Reason::Silent,
            |it| {
                it.cancel();
                it.failed = vec![4];
            },
            false,
        ),
    ];
    for (case, reason, happens, cancels) in cases {
        let mut filling = Filling::new(reason);
        happens(&mut filling);
        filling.say();
        let cancel = CancelReplace { copyset: 1, new_replica: filling.new.0 };
        let expected = if cancels { vec![Command::CancelReplace(cancel)] } else { vec![] };
        assert_eq!(filling.planned(), expected, "{case}, {reason:?}");
    }
}

/// This one reports once more, and then not for so many report intervals.
fn silent(filling: &mut Filling, id: u32, intervals: u32) {
    filling.say();
    filling.absent.push(id);
    filling.world.pass(STEP * intervals);
}

#[test]
fn repair_can_be_stopped() {
    let mut groups = with_a_spare();
    groups.limits = Limits { repairs_max: 0, ..groups.limits };
    groups.kill(3);
    groups.steps(30);
    assert_eq!(groups.pending(), []);
    groups.limits = Limits { repairs_max: 1, ..groups.limits };
    groups.steps(1);
    assert_eq!(groups.pending().len(), 1);
}

#[test]
fn who_comes_back_first_stays() {
    // Before the new ones have caught up: the way back is shorter.
    let mut groups = with_a_spare();
    let before = groups.spread();
    groups.kill(3);
    groups.steps(10);
    let begun = groups.pending();
    assert!(!begun.is_empty());
    groups.start(3);
    groups.settle();
    groups.assert_whole();
    assert_eq!(groups.spread(), before);
    let members: BTreeSet<_> =
        groups.world.state.copysets().values().flat_map(|c| c.replicas.iter().map(|r| r.id)).collect();
    assert!(begun.iter().all(|(_, pending)| !members.contains(&pending.new.id)));

    // After: it is finished, and the one that came back goes.
    let mut groups = with_a_spare();
    groups.kill(3);
    while !groups.is_half_way() {
        groups.step();
    }
    let begun = groups.pending();
    groups.start(3);
    groups.steps(2);
    let copysets = groups.world.state.copysets();
    assert!(begun.iter().any(|(id, pending)| copysets[id].replica(pending.new.id).is_some()));
    groups.settle();
    groups.assert_whole();
}

#[test]
fn what_a_chunkserver_lost_is_made_anew_in_its_place() {
    for leaves_it in [false, true] {
        let mut groups = with_a_spare();
        let before = groups.spread();
        assert!(groups.lose(1, 1, leaves_it));
        groups.steps(1);
        let (id, pending) = groups.pending()[0];
        assert_eq!((id, pending.new.chunkserver), (CopysetId(1), ChunkserverId(1)));
        assert_eq!(pending.reason, Reason::Lost);
        assert!(pending.new.id > pending.old, "the old number has forgotten its votes");
        groups.settle();
        groups.assert_whole();
        assert_eq!(groups.spread(), before);
    }
}

#[test]
fn a_retiring_chunkserver_becomes_empty_without_waiting() {
    let mut groups = with_a_spare();
    groups.retire(3, true);
    groups.steps(1);
    assert!(groups.pending().iter().all(|(_, pending)| pending.reason == Reason::Retiring));
    assert_eq!(groups.pending().len(), PER_CHUNKSERVER_MAX);
    groups.settle();
    groups.assert_whole();
    assert_eq!(groups.spread()[&3], 0);
    // It stays empty while it retires, and gets its share again when it does not.
    groups.retire(3, false);
    groups.settle();
    assert_eq!(groups.spread()[&3], 8);
}

#[test]
fn who_does_not_retire_any_more_keeps_what_it_has() {
    let mut groups = with_a_spare();
    let before = groups.spread();
    groups.retire(3, true);
    groups.steps(2);
    assert!(!groups.pending().is_empty());
    groups.retire(3, false);
    groups.settle();
    groups.assert_whole();
    assert_eq!(groups.spread(), before);
}

#[test]
fn a_dead_one_goes_before_a_retiring_one() {
    // 5 in z1 is there for both.
    let mut groups = Groups::new(&["z1", "z2", "z3", "z3", "z1"], 3);
    groups.settle();
    groups.limits.repairs_max = 1;
    groups.retire(1, true);
    groups.kill(3);
    groups.steps(10);
    // Moves of copysets that have no replica on 3 began meanwhile; when the time is over 3 goes first.
    while groups.pending().iter().any(|(_, pending)| pending.reason == Reason::Retiring) {
        groups.step();
    }
    groups.steps(1);
    assert!(groups.pending().iter().all(|(_, p)| p.reason == Reason::Silent), "{:?}", groups.pending());
    groups.settle();
    assert_eq!((groups.spread()[&1], groups.spread()[&3]), (0, 0));
}

#[test]
fn when_the_new_one_dies_another_is_found() {
    let mut groups = Groups::new(&["z1", "z2", "z3", "z4", "z5"], 3);
    groups.kill(3);
    groups.steps(10);
    let filled = groups.pending()[0].1.new.chunkserver;
    groups.kill(filled.0);
    groups.steps(5);
    assert!(
        groups.pending().iter().any(|(_, p)| p.new.chunkserver == filled && !p.over),
        "it may be a restart"
    );
    groups.settle();
    assert!(groups.spread()[&3] == 0 && groups.spread()[&filled.0] == 0, "{:?}", groups.spread());
    groups.assert_whole();
}

#[test]
fn nobody_gets_a_replica_who_should_not() {
    for name in ["in trouble", "retiring", "just came", "near-full"] {
        let mut groups = Groups::new(&["z1", "z2", "z3", "z3"], 3);
        groups.limits.repairs_max = 0;
        groups.kill(3);
        groups.steps(12);
        match name {
            "in trouble" => {
                groups.world.trouble.insert(ChunkserverId(4), "its disk is slow".to_owned());
            }
            "retiring" => groups.retire(4, true),
            "just came" => {
                groups.kill(4);
                groups.steps(1);
                groups.start(4);
            }
            _ => groups.world.free_bytes = 15 << 30,
        }
        groups.limits.repairs_max = 16;
        groups.step();
        assert_eq!(groups.pending(), [], "{name}");
    }
}

#[test]
fn copysets_with_data_are_repaired_first() {
    let mut groups = with_a_spare();
    let holds = |id: &CopysetId| groups.world.state.copysets()[id].replica_on(ChunkserverId(3)).is_some();
    let last = groups.world.state.copysets().keys().copied().filter(holds).max().expect("some");
    // The replicas of the simulation hold data everywhere; what is placed decides only among empty ones.
    let (name, copyset) = ("web".to_owned(), last.0);
    let create =
        CreateVolume { name: name.clone(), size_bytes: 1 << 30, copysets: vec![copyset], at_unix_ms: 0 };
    let attach = Attach { name, holder: "h".to_owned(), ..Attach::default() };
    let chunk_copysets = vec![copyset; 64];
    let segment = AllocateSegment { volume: 1, attachment: 1, segment: 0, chunk_copysets };
    for command in [Command::CreateVolume(create), Command::Attach(attach), Command::AllocateSegment(segment)]
    {
        groups.world.apply(&command).expect("applied");
    }
    groups.no_data = true;
    groups.limits.repairs_max = 1;
    groups.kill(3);
    groups.steps(10);
    assert_eq!(groups.pending().iter().map(|(id, _)| *id).collect::<Vec<_>>(), [last]);
}

#[test]
fn a_new_chunkserver_gets_its_share_slowly() {
    let mut groups = Groups::new(&["z1", "z2", "z3"], 3);
    groups.settle();
    assert_eq!(planned(&groups), []);
    groups.join("z4");
    groups.steps(1);
    assert_eq!(groups.pending(), [], "it has just come");
    groups.steps(2);
    assert_eq!(groups.pending().len(), BALANCE_MAX);
    groups.settle();
    groups.assert_whole();
    let spread = groups.spread();
    let (least, most) = (spread.values().min().copied(), spread.values().max().copied());
    assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 1), "{spread:?}");
    // Repair has something to do: nothing is evened out.
    groups.join("z4");
    groups.kill(4);
    groups.steps(3);
    assert_eq!(begun(&planned(&groups)), []);
}

// ---------------------------------------------------------------- any situation

#[derive(Debug, Clone)]
enum Event {
    Kill(u32),
    Start(u32),
    Retire(u32, bool),
    Lose(u32, u32, bool),
    Join(u8),
    Pass(u8),
}

fn any_event() -> impl Strategy<Value = Event> {
    let id = || 1_u32..9;
    prop_oneof![
        2 => id().prop_map(Event::Kill),
        3 => id().prop_map(Event::Start),
        1 => (id(), any::<bool>()).prop_map(|(id, retiring)| Event::Retire(id, retiring)),
        1 => (1_u32..17, id(), any::<bool>()).prop_map(|(c, id, leaves)| Event::Lose(c, id, leaves)),
        1 => (0_u8..4).prop_map(Event::Join),
        4 => (1_u8..30).prop_map(Event::Pass),
        1 => Just(Event::Pass(3)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens on the way: nothing that the simulation forbids (`Groups::check`, `obey`), and when it stops
    /// happening everything comes to rest, with three well members each, nothing left over, and who retires empty.
    #[test]
    fn from_any_situation_to_rest(
        events in proptest::collection::vec(any_event(), 1..40),
        lose_every in 0_usize..5,
        dead in 1_u32..9,
    ) {
        let mut groups = Groups::new(&["z0", "z1", "z2", "z3", "z0", "z1", "z2", "z3"], 4);
        groups.lose_every = if lose_every == 1 { 0 } else { lose_every };
        for event in events {
            let count = u32::try_from(groups.world.state.chunkservers().len()).expect("few");
            match event {
                Event::Kill(id) if id <= count => groups.kill(id),
                Event::Start(id) if id <= count => groups.start(id),
                Event::Retire(id, retiring) if id <= count => groups.retire(id, retiring),
                Event::Lose(copyset, id, leaves) => { groups.lose(copyset, id, leaves); }
                Event::Join(zone) if count < 10 => groups.join(&format!("z{zone}")),
                Event::Pass(steps) => groups.steps(usize::from(steps)),
                _ => {}
            }
        }
        // All come back but one; one at most stays on its way out.
        let ids: Vec<u32> = groups.world.state.chunkservers().keys().map(|id| id.0).collect();
        for &id in &ids {
            groups.start(id);
            groups.retire(id, false);
        }
        groups.settle();
        groups.assert_whole();
        groups.kill(dead);
        let leaves = dead % 8 + 1;
        groups.retire(leaves, true);
        groups.steps(12);
        groups.settle();
        groups.assert_whole();
        assert_eq!((groups.spread()[&dead], groups.spread()[&leaves]), (0, 0));
    }
}
