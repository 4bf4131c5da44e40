//! The state machine by tables, and what holds for any log.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use evolute_protocol::geometry::{GIB, TIB};
use evolute_protocol::id::{ChunkserverId, ClusterId, CopysetId, ReplicaId, VolumeId};
use proptest::prelude::{
    BoxedStrategy, Just, ProptestConfig, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest,
};

use super::command::{
    AbandonImport, AllocateSegment, Attach, BeginImport, BeginReplace, CancelReplace, CreateCopysets,
    CreateVolume, CreatedReplica, DeleteVolume, Detach, FinishImport, InitCluster, NewCopyset,
    RegisterChunkserver, ReplaceDone, ReplaceUndone, ReplicasCreated, RetireChunkserver, UpdateChunkserver,
    VolumeDropped,
};
use super::volume::ATTACHMENT_MAX;
use super::{Command, Done, Outcome, Reason, State, Why};

fn register(instance: u8, zone: &str) -> Command {
    Command::RegisterChunkserver(RegisterChunkserver {
        token: Bytes::from(vec![instance; 32]),
        instance: Bytes::from(vec![instance; 16]),
        address: format!("127.0.0.1:{}", 7800 + u16::from(instance)),
        zone: zone.to_owned(),
        server: "s".to_owned(),
        pool: "default".to_owned(),
        capacity_bytes: TIB,
        version: "0".to_owned(),
        at_unix_ms: 5,
    })
}

fn copysets(seen: u32, members: &[[u32; 3]]) -> Command {
    let new = |m: &[u32; 3]| NewCopyset { chunkservers: m.to_vec(), first_leader: m[0] };
    let copysets = members.iter().map(new).collect();
    Command::CreateCopysets(CreateCopysets { pool: "default".to_owned(), seen, copysets })
}

fn create(name: &str, copysets: &[u32]) -> Command {
    let copysets = copysets.to_vec();
    Command::CreateVolume(CreateVolume {
        name: name.to_owned(),
        size_bytes: 3 * GIB,
        copysets,
        at_unix_ms: 7,
    })
}

fn delete(name: &str, force: bool) -> Command {
    Command::DeleteVolume(DeleteVolume { name: name.to_owned(), force })
}

fn attach(name: &str, holder: &str, takeover: bool) -> Command {
    let (name, holder) = (name.to_owned(), holder.to_owned());
    Command::Attach(Attach { name, holder, takeover, at_unix_ms: 1000, ..Attach::default() })
}

fn detach(volume: u64, attachment: u32) -> Command {
    Command::Detach(Detach { volume, attachment })
}

fn allocate(volume: u64, attachment: u32, segment: u32, copyset: u32) -> Command {
    let chunk_copysets = vec![copyset; 64];
    Command::AllocateSegment(AllocateSegment { volume, attachment, segment, chunk_copysets })
}

fn dropped(copyset: u32, volume: u64) -> Command {
    Command::VolumeDropped(VolumeDropped { copyset, volume })
}

fn retire(chunkserver: u32, retiring: bool) -> Command {
    Command::RetireChunkserver(RetireChunkserver { chunkserver, retiring })
}

fn begin(copyset: u32, old_replica: u64, chunkserver: u32, reason: Reason) -> Command {
    let reason = reason.into();
    Command::BeginReplace(BeginReplace { copyset, old_replica, chunkserver, reason })
}

fn done(copyset: u32, old_replica: u64, new_replica: u64, chunkserver: u32) -> Command {
    Command::ReplaceDone(ReplaceDone { copyset, old_replica, new_replica, chunkserver })
}

fn cancel(copyset: u32, new_replica: u64) -> Command {
    Command::CancelReplace(CancelReplace { copyset, new_replica })
}

fn undone(copyset: u32, new_replica: u64) -> Command {
    Command::ReplaceUndone(ReplaceUndone { copyset, new_replica })
}

/// Three chunkservers, two copysets.
fn cluster() -> State {
    let mut state = State::default();
    for (instance, zone) in [(1, "a"), (2, "b"), (3, "c")] {
        state.apply(&register(instance, zone)).0.expect("registered");
    }
    state.apply(&copysets(0, &[[1, 2, 3], [2, 3, 1]])).0.expect("created");
    state
}

fn why(outcome: Outcome) -> Why {
    outcome.expect_err("refused").why
}

fn run(state: &mut State, command: &Command) -> Outcome {
    let before = state.clone();
    let outcome = state.apply(command).0;
    assert!(outcome.is_ok() || *state == before, "{command:?} was refused and changed something");
    outcome
}

#[test]
fn the_first_cluster_id_stays() {
    let mut state = State::default();
    for asked in [7, 9] {
        let init = InitCluster { cluster: Bytes::from(vec![asked; 16]) };
        assert_eq!(run(&mut state, &Command::InitCluster(init)), Ok(Done::Cluster(ClusterId([7; 16]))));
    }
    let short = InitCluster { cluster: Bytes::from_static(b"short") };
    assert_eq!(why(run(&mut state, &Command::InitCluster(short))), Why::Invalid);
}

#[test]
fn a_lost_answer_does_not_make_two_chunkservers() {
    let mut state = State::default();
    let first = run(&mut state, &register(1, "a"));
    assert!(matches!(first, Ok(Done::Registered { chunkserver: ChunkserverId(1), .. })));
    // The same process asks again; the token proposed this time is another one.
    let Command::RegisterChunkserver(mut again) = register(1, "a") else { unreachable!() };
    again.token = Bytes::from(vec![99; 32]);
    assert_eq!(run(&mut state, &Command::RegisterChunkserver(again)), first);
    let other = run(&mut state, &register(2, "a"));
    assert!(matches!(other, Ok(Done::Registered { chunkserver: ChunkserverId(2), .. })));
}

#[test]
fn copysets_are_what_was_decided_or_nothing() {
    let mut state = cluster();
    assert_eq!(state.copysets()[&CopysetId(2)].first_leader, ReplicaId(4));
    run(&mut state, &register(4, "a")).expect("registered");
    for (command, expected) in [
        (copysets(0, &[[1, 2, 3]]), Why::Stale),
        (copysets(2, &[[1, 2, 3], [1, 2, 4]]), Why::Invalid), // 1 and 4 are both in a
        (copysets(2, &[[1, 2, 9]]), Why::Invalid),
        (copysets(2, &[[1, 2, 2]]), Why::Invalid),
    ] {
        assert_eq!(why(run(&mut state, &command)), expected, "{command:?}");
    }
    let lead = NewCopyset { chunkservers: vec![1, 2, 3], first_leader: 4 };
    let two = NewCopyset { chunkservers: vec![1, 2], first_leader: 1 };
    for copyset in [lead, two] {
        let command = CreateCopysets { pool: "default".to_owned(), seen: 2, copysets: vec![copyset] };
        assert_eq!(why(run(&mut state, &Command::CreateCopysets(command))), Why::Invalid);
    }
    run(&mut state, &copysets(2, &[[4, 2, 3]])).expect("created");
    let ids: Vec<_> = state.copysets().values().flat_map(|c| c.replicas.iter().map(|r| r.id.0)).collect();
    assert_eq!(ids, (1..=9).collect::<Vec<_>>(), "every replica has an id of its own");
}

#[test]
fn who_attached_last_is_the_writer() {
    let mut state = cluster();
    run(&mut state, &create("web", &[1, 2])).expect("created");
    let attached = |attachment| Ok(Done::Attached { volume: VolumeId(1), attachment });
    for (step, (command, expected)) in [
        (allocate(1, 0, 0, 1), Err(Why::Invalid)), // never attached
        (allocate(1, 1, 0, 1), Err(Why::Invalid)),
        (attach("web", "host-a", false), attached(1)),
        (attach("web", "host-b", false), Err(Why::AttachedElsewhere)),
        (attach("web", "host-a", false), attached(2)), // itself, restarted: fences its former self
        (allocate(1, 1, 0, 1), Err(Why::FencedOut)),
        (allocate(1, 2, 0, 1), Ok(Done::Segment { chunk_copysets: vec![CopysetId(1); 64] })),
        (attach("web", "host-b", true), attached(3)),
        (allocate(1, 2, 0, 1), Err(Why::FencedOut)), // even what is allocated already
        (detach(1, 2), Ok(Done::Plain)),             // host-a gives up what it lost: host-b keeps it
        (attach("web", "host-c", false), Err(Why::AttachedElsewhere)),
        (detach(1, 4), Err(Why::Invalid)),
        (detach(1, 0), Err(Why::Invalid)),
        (detach(9, 1), Err(Why::NotFound)),
        (detach(1, 3), Ok(Done::Plain)),
        (detach(1, 3), Ok(Done::Plain)),             // its answer was lost
        (allocate(1, 3, 1, 1), Err(Why::FencedOut)), // given back is over
        (attach("web", "host-c", false), attached(4)),
        (attach("nothing", "host-c", false), Err(Why::NotFound)),
        (attach("web", "", true), Err(Why::Invalid)),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(run(&mut state, &command).map_err(|r| r.why), expected, "step {step}: {command:?}");
    }
}

/// With what only the holder knows the name is for people; of who told nothing, it is all there is.
#[test]
fn a_holder_is_who_has_its_secret_and_not_who_has_its_name() {
    let with = |holder: &str, secret: &[u8]| {
        let secret_hash = secret.to_vec();
        let (name, holder) = ("web".to_owned(), holder.to_owned());
        Command::Attach(Attach { name, holder, secret_hash, ..Attach::default() })
    };
    let moved = |holder: &str, secret: &[u8], former: &[u8]| {
        let Command::Attach(attach) = with(holder, secret) else { unreachable!("made above") };
        Command::Attach(Attach { former_secret_hash: former.to_vec(), ..attach })
    };
    let attached = |attachment| Ok(Done::Attached { volume: VolumeId(1), attachment });
    let mut state = cluster();
    run(&mut state, &create("web", &[1])).expect("created");
    for (step, (command, expected)) in [
        (attach("web", "node", false), attached(1)), // an older program
        (with("other", b"mine"), Err(Why::AttachedElsewhere)),
        (with("node", b"mine"), attached(2)), // it was upgraded
        (with("node", b"mine"), attached(3)),
        (with("node", b"another's of the same name"), Err(Why::AttachedElsewhere)),
        (attach("web", "node", false), Err(Why::AttachedElsewhere)), // the name alone
        (with("node.example.net", b"mine"), attached(4)),            // it was renamed
        (with("node", b""), Err(Why::AttachedElsewhere)),
        (moved("node", b"of its directory", b"another's"), Err(Why::AttachedElsewhere)),
        (moved("node", b"of its directory", b"mine"), attached(5)), // it was given a state directory
        (with("node", b"mine"), Err(Why::AttachedElsewhere)),
        (with("node", b"of its directory"), attached(6)),
        (attach("web", "host-b", true), attached(7)),
        (with("node.example.net", b"mine"), Err(Why::AttachedElsewhere)),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(run(&mut state, &command).map_err(|r| r.why), expected, "step {step}: {command:?}");
    }
}

#[test]
fn a_refusal_names_the_holder_and_since_when() {
    let mut state = cluster();
    run(&mut state, &create("web", &[1])).expect("created");
    run(&mut state, &attach("web", "host-a:/run/web.sock", false)).expect("attached");
    let refused = run(&mut state, &attach("web", "host-b", false)).expect_err("held");
    assert_eq!(refused.message, "volume web is attached at host-a:/run/web.sock since 1970-01-01T00:00:01Z");
}

#[test]
fn attachment_numbers_stay_below_the_fence_of_a_deleted_volume() {
    let mut state = cluster();
    run(&mut state, &create("web", &[1])).expect("created");
    state.volumes.get_mut(&VolumeId(1)).expect("there").attachment = ATTACHMENT_MAX - 1;
    run(&mut state, &attach("web", "a", true)).expect("the last one");
    assert_eq!(why(run(&mut state, &attach("web", "a", true))), Why::Invalid);
}

fn begin_import(name: &str, existing: bool, by: &str) -> Command {
    let copysets = if existing { vec![] } else { vec![1, 2] };
    let (name, by) = (name.to_owned(), by.to_owned());
    Command::BeginImport(BeginImport { name, size_bytes: 3 * GIB, copysets, existing, by, at_unix_ms: 1000 })
}

fn finish_import(volume: u64, attachment: u32) -> Command {
    Command::FinishImport(FinishImport { volume, attachment })
}

fn abandon_import(volume: u64, by: &str) -> Command {
    Command::AbandonImport(AbandonImport { volume, by: by.to_owned() })
}

/// An import dies at any step; nobody may take what it leaves for a whole image, and it may not take anybody else's
/// volume with it.
#[test]
fn half_an_image_is_attached_by_nobody_but_its_import() {
    let mut state = cluster();
    run(&mut state, &create("empty", &[1])).expect("created");
    run(&mut state, &create("held", &[1])).expect("created");
    run(&mut state, &attach("held", "host-a", false)).expect("attached");
    run(&mut state, &create("written", &[1])).expect("created");
    run(&mut state, &attach("written", "host-a", false)).expect("attached");
    run(&mut state, &allocate(3, 1, 0, 1)).expect("allocated");
    run(&mut state, &detach(3, 1)).expect("detached");
    let attached = |volume, attachment| Ok(Done::Attached { volume: VolumeId(volume), attachment });
    let created = |volume| Ok(Done::Created { volume: VolumeId(volume) });
    for (step, (command, expected)) in [
        (begin_import("held", true, "i"), Err(Why::AttachedElsewhere)),
        (begin_import("written", true, "i"), Err(Why::Invalid)),
        (begin_import("nothing", true, "i"), Err(Why::NotFound)),
        (begin_import("empty", false, "i"), Err(Why::Exists)),
        (begin_import("new", false, ""), Err(Why::Invalid)),
        (begin_import("new", false, "i"), created(4)),
        (begin_import("new", false, "j"), Err(Why::Exists)),
        (begin_import("new", true, "j"), Err(Why::Exists)),
        (create("new", &[1]), Err(Why::Exists)),
        (attach("new", "host-a", true), Err(Why::Invalid)), // before the import attached
        (attach("new", "i", false), attached(4, 1)),
        (attach("new", "host-a", true), Err(Why::Invalid)), // not by takeover either
        (attach("new", "i", false), attached(4, 2)),        // its answer was lost
        (finish_import(4, 1), Err(Why::FencedOut)),
        (detach(4, 2), Ok(Done::Plain)),
        (attach("new", "host-a", false), Err(Why::Invalid)), // given back, and still half
        (finish_import(4, 2), Err(Why::FencedOut)),
        (attach("new", "i", false), attached(4, 3)),
        (finish_import(4, 3), Ok(Done::Plain)),
        (finish_import(4, 3), Ok(Done::Plain)), // its answer was lost
        (abandon_import(4, "i"), Err(Why::Invalid)), // too late: it is whole, and stays
        (attach("new", "host-a", false), attached(4, 4)),
        // Into one that is there.
        (begin_import("empty", true, "k"), Ok(Done::Plain)),
        (attach("empty", "host-a", true), Err(Why::Invalid)),
        (attach("empty", "k", false), attached(1, 1)),
        (delete("empty", true), Ok(Done::Plain)), // the way out that a person has
        (create("empty", &[1]), created(5)),
        (abandon_import(1, "k"), Ok(Done::Plain)), // its number is dead, its name is another volume's
        (attach("empty", "host-a", false), attached(5, 1)),
        (begin_import("left", false, "l"), created(6)),
        (abandon_import(6, "m"), Err(Why::Invalid)),
        (abandon_import(6, "l"), Ok(Done::Plain)),
        (attach("left", "l", false), Err(Why::NotFound)),
        (abandon_import(6, "l"), Ok(Done::Plain)),
        (finish_import(6, 1), Err(Why::NotFound)),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(run(&mut state, &command).map_err(|r| r.why), expected, "step {step}: {command:?}");
    }
    assert!(state.volume_named("new").is_some() && state.dropping().contains_key(&VolumeId(6)));
    run(&mut state, &begin_import("left", false, "import on host-a, process 7")).expect("created");
    let refused = run(&mut state, &attach("left", "host-b", true)).expect_err("half an image").message;
    assert!(refused.contains("unfinished import") && refused.contains("process 7"), "{refused}");
    // The mark outlives a restart.
    let mut loaded = State::default();
    for (key, value) in state.records() {
        loaded.load(&key, &value).expect("a record");
    }
    assert_eq!(loaded, state);
}

#[test]
fn an_empty_chunkserver_moves_to_another_zone_and_one_with_replicas_stays() {
    let mut state = cluster();
    run(&mut state, &register(4, "default")).expect("registered");
    let update = |chunkserver, zone: &str| {
        Command::UpdateChunkserver(UpdateChunkserver {
            chunkserver,
            address: "127.0.0.1:9".to_owned(),
            server: "s".to_owned(),
            capacity_bytes: 1,
            version: "0".to_owned(),
            zone: zone.to_owned(),
        })
    };
    for (command, expected) in [
        (update(4, "b"), Ok(Done::Plain)),
        (update(4, ""), Ok(Done::Plain)), // written before zones could change
        (update(4, "no zone"), Err(Why::Invalid)),
        (update(1, "b"), Err(Why::Invalid)),
        (update(1, "a"), Ok(Done::Plain)),
        (begin(1, 2, 4, Reason::Silent), Ok(Done::Plain)),
        (update(4, "c"), Err(Why::Invalid)), // about to be a member
    ] {
        assert_eq!(run(&mut state, &command).map_err(|r| r.why), expected, "{command:?}");
    }
    assert_eq!(state.chunkservers()[&ChunkserverId(4)].zone, "b");
}

#[test]
fn a_segment_is_allocated_once() {
    let mut state = cluster();
    run(&mut state, &create("web", &[1, 2])).expect("created");
    run(&mut state, &attach("web", "a", false)).expect("attached");
    let at = |copyset| Ok(Done::Segment { chunk_copysets: vec![CopysetId(copyset); 64] });
    for (command, expected) in [
        (allocate(1, 1, 0, 1), at(1)),
        (allocate(1, 1, 0, 2), at(1)), // somebody placed it at the same time: the first one counts
        (allocate(1, 1, 2, 2), at(2)), // 3 GiB have the segments 0, 1, 2
        (allocate(1, 1, 3, 1), Err(Why::Invalid)),
        (allocate(1, 1, u32::MAX, 1), Err(Why::Invalid)),
        (allocate(1, 1, 1, 3), Err(Why::Invalid)), // not a copyset of the volume
        (allocate(2, 1, 0, 1), Err(Why::NotFound)),
    ] {
        assert_eq!(run(&mut state, &command).map_err(|r| r.why), expected, "{command:?}");
    }
    let Command::AllocateSegment(mut short) = allocate(1, 1, 1, 1) else { unreachable!() };
    short.chunk_copysets.pop();
    assert_eq!(why(run(&mut state, &Command::AllocateSegment(short))), Why::Invalid);
}

#[test]
fn a_deleted_volume_is_gone_at_once_and_its_id_for_ever() {
    let mut state = cluster();
    run(&mut state, &create("web", &[2, 1])).expect("created");
    assert_eq!(why(run(&mut state, &create("web", &[1]))), Why::Exists);
    run(&mut state, &attach("web", "a", false)).expect("attached");
    run(&mut state, &allocate(1, 1, 0, 2)).expect("allocated");
    assert_eq!(why(run(&mut state, &delete("web", false))), Why::AttachedElsewhere);
    assert_eq!(run(&mut state, &delete("web", true)), Ok(Done::Plain));
    assert_eq!(why(run(&mut state, &delete("web", true))), Why::NotFound);
    // Who held it gets nothing more, neither now nor when its name is taken again.
    let refused = run(&mut state, &allocate(1, 1, 1, 2)).expect_err("gone");
    assert_eq!((refused.why, refused.message.as_str()), (Why::NotFound, "volume-1 was deleted"));
    assert_eq!(run(&mut state, &create("web", &[1])), Ok(Done::Created { volume: VolumeId(2) }));
    assert_eq!(why(run(&mut state, &detach(1, 1))), Why::NotFound);

    // Remembered until both copysets have committed its end.
    let left = |state: &State| state.dropping().get(&VolumeId(1)).map_or(0, |waiting| waiting.len());
    assert_eq!(left(&state), 2);
    for (command, expected) in [
        (dropped(9, 1), 2),
        (dropped(1, 2), 2), // a volume that nobody deleted
        (dropped(2, 1), 1),
        (dropped(2, 1), 1),
        (dropped(1, 1), 0),
        (dropped(1, 1), 0),
    ] {
        run(&mut state, &command).expect("reports repeat themselves");
        assert_eq!(left(&state), expected, "{command:?}");
    }
    assert!(state.dropping().is_empty() && state.volumes().contains_key(&VolumeId(2)));
    // Not attached: no force needed.
    run(&mut state, &delete("web", false)).expect("deleted");
}

/// Two copysets, {1, 2, 3} and {4, 5, 6}, on chunkservers in a, b, c; 4 is in a as well, 5 in d, 7 in
/// another pool.
#[test]
fn a_replica_is_replaced_by_a_fresh_one_in_a_zone_of_its_own() {
    let mut state = cluster();
    for (instance, zone) in [(4, "a"), (5, "d"), (6, "d")] {
        run(&mut state, &register(instance, zone)).expect("registered");
    }
    run(&mut state, &retire(6, true)).expect("known");
    let Command::RegisterChunkserver(mut other_pool) = register(7, "e") else { unreachable!() };
    other_pool.pool = "archive".to_owned();
    run(&mut state, &Command::RegisterChunkserver(other_pool)).expect("registered");
    let done_plain = Ok(Done::Plain);
    let refused = |why| Err(why);
    for (step, (command, expected)) in [
        (begin(9, 1, 4, Reason::Silent), refused(Why::NotFound)),
        (begin(1, 1, 9, Reason::Silent), refused(Why::NotFound)),
        (begin(1, 9, 4, Reason::Silent), refused(Why::Stale)),
        (begin(1, 2, 4, Reason::Silent), refused(Why::Invalid)), // 1 is in zone a and stays
        (begin(1, 1, 2, Reason::Silent), refused(Why::Invalid)), // 2 is a member
        (begin(1, 1, 1, Reason::Silent), refused(Why::Invalid)), // only what was lost is replaced in place
        (begin(1, 1, 7, Reason::Silent), refused(Why::Invalid)), // of another pool
        (begin(1, 1, 6, Reason::Silent), refused(Why::Stale)),   // retiring
        (begin(1, 1, 4, Reason::Silent), done_plain.clone()),    // replica 7
        (begin(1, 2, 5, Reason::Silent), refused(Why::Stale)),   // one at a time
        (undone(1, 7), refused(Why::Invalid)),                   // not cancelled
        (cancel(1, 6), refused(Why::Stale)),
        (cancel(1, 7), done_plain.clone()),
        (cancel(1, 7), done_plain.clone()),
        (begin(1, 1, 5, Reason::Silent), refused(Why::Stale)), // still in the group, perhaps
        (undone(1, 7), done_plain.clone()),
        (undone(1, 7), refused(Why::Stale)),
        (begin(1, 1, 1, Reason::Lost), done_plain.clone()), // replica 8, in place
        (done(1, 1, 99, 1), refused(Why::Invalid)),         // never given
        (done(1, 1, 6, 5), refused(Why::Invalid)),          // of the other copyset
        (done(1, 1, 8, 7), refused(Why::Invalid)),          // of another pool
        (done(1, 9, 8, 1), refused(Why::Stale)),
        (done(1, 1, 8, 1), done_plain.clone()),
        (done(1, 1, 8, 1), done_plain.clone()), // said again
        // A change that was cancelled too late has happened all the same.
        (begin(2, 5, 5, Reason::Retiring), done_plain.clone()), // replica 9, on chunkserver 5
        (cancel(2, 9), done_plain.clone()),
        (undone(2, 9), done_plain.clone()),
        (done(2, 5, 9, 5), done_plain.clone()),
        (retire(9, true), refused(Why::NotFound)),
        (retire(6, false), done_plain.clone()),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(run(&mut state, &command).map_err(|r| r.why), expected, "step {step}: {command:?}");
    }
    let members = |id: u32| {
        let copyset = &state.copysets()[&CopysetId(id)];
        assert_eq!(copyset.pending, None);
        copyset.replicas.iter().map(|r| (r.id.0, r.chunkserver.0)).collect::<Vec<_>>()
    };
    assert_eq!(members(1), [(8, 1), (2, 2), (3, 3)]);
    assert_eq!(state.copysets()[&CopysetId(1)].first_leader, ReplicaId(8), "it leads first in its place");
    assert_eq!(members(2), [(4, 2), (9, 5), (6, 1)]);
}

#[test]
fn volumes_are_made_of_what_there_is() {
    let mut state = cluster();
    for (command, expected) in [
        (create("a b", &[1]), Why::Invalid),
        (create("web", &[]), Why::Invalid),
        (create("web", &[1, 1]), Why::Invalid),
        (create("web", &[3]), Why::NotFound),
    ] {
        assert_eq!(why(run(&mut state, &command)), expected, "{command:?}");
    }
    let Command::CreateVolume(mut large) = create("web", &[1]) else { unreachable!() };
    large.size_bytes += 1;
    assert_eq!(why(run(&mut state, &Command::CreateVolume(large))), Why::Invalid);
}

// ---------------------------------------------------------------- any log

/// Few names and numbers, so that commands meet each other.
fn any_command() -> BoxedStrategy<Command> {
    let name = || prop_oneof![Just("a"), Just("b"), Just("c-1"), Just("no name")];
    let holder = prop_oneof![Just("host-a"), Just("host-b")];
    let zone = prop_oneof![Just("z1"), Just("z2"), Just("z3")];
    let id = || 0_u32..6;
    prop_oneof![
        any::<u8>().prop_map(|n| Command::InitCluster(InitCluster { cluster: Bytes::from(vec![n; 16]) })),
        (1_u8..9, zone).prop_map(|(instance, zone)| register(instance, zone)),
        (id(), 0_u16..3).prop_map(|(id, n)| Command::UpdateChunkserver(UpdateChunkserver {
            chunkserver: id,
            address: format!("host:{n}"),
            server: "s".to_owned(),
            capacity_bytes: GIB * u64::from(n),
            version: n.to_string(),
            zone: format!("z{n}"),
        })),
        (id(), proptest::collection::vec([id(), id(), id()], 0..3)).prop_map(|(seen, m)| copysets(seen, &m)),
        // The likely ones, or there would hardly ever be a copyset.
        id().prop_map(|seen| copysets(seen, &[[1, 2, 3]])),
        (id(), 0_u64..12).prop_map(|(copyset, replica)| Command::ReplicasCreated(ReplicasCreated {
            replicas: vec![CreatedReplica { copyset, replica }]
        })),
        (name(), proptest::collection::vec(id(), 0..4)).prop_map(|(name, copysets)| create(name, &copysets)),
        name().prop_map(|name| create(name, &[1])),
        (name(), any::<bool>()).prop_map(|(name, force)| delete(name, force)),
        (id(), 0_u64..6).prop_map(|(copyset, volume)| dropped(copyset, volume)),
        (name(), holder, any::<bool>()).prop_map(|(name, holder, takeover)| attach(name, holder, takeover)),
        (0_u64..6, id()).prop_map(|(volume, attachment)| detach(volume, attachment)),
        (0_u64..6, id(), id(), id())
            .prop_map(|(v, attachment, segment, c)| allocate(v, attachment, segment, c)),
        (name(), any::<bool>(), any::<bool>()).prop_map(|(name, existing, other)| begin_import(
            name,
            existing,
            if other { "a" } else { "b" }
        )),
        (0_u64..6, id()).prop_map(|(volume, attachment)| finish_import(volume, attachment)),
        (0_u64..6).prop_map(|volume| abandon_import(volume, "a")),
        any_replacement(),
        any_replacement(),
    ]
    .boxed()
}

fn any_replacement() -> BoxedStrategy<Command> {
    let reason =
        prop_oneof![Just(Reason::Silent), Just(Reason::Lost), Just(Reason::Retiring), Just(Reason::Balance)];
    let (id, replica) = (|| 0_u32..6, || 0_u64..14);
    prop_oneof![
        (id(), any::<bool>()).prop_map(|(id, retiring)| retire(id, retiring)),
        (1_u32..3, replica(), id(), reason).prop_map(|(c, old, to, reason)| begin(c, old, to, reason)),
        // The likely one.
        (1_u64..4, 1_u32..6).prop_map(|(old, to)| begin(1, old, to, Reason::Silent)),
        (1_u32..3, replica(), replica(), id()).prop_map(|(c, old, new, on)| done(c, old, new, on)),
        (1_u32..3, replica()).prop_map(|(c, new)| cancel(c, new)),
        (1_u32..3, replica()).prop_map(|(c, new)| undone(c, new)),
    ]
    .boxed()
}

/// A log that begins with a cluster, so that something can happen.
fn any_log() -> impl Strategy<Value = Vec<Command>> {
    proptest::collection::vec(any_command(), 0..120).prop_map(|mut rest| {
        let mut log =
            vec![register(1, "z1"), register(2, "z2"), register(3, "z3"), copysets(0, &[[1, 2, 3]])];
        log.append(&mut rest);
        log
    })
}

fn records(state: &State) -> BTreeMap<Vec<u8>, Vec<u8>> {
    state.records().collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Two replicas that applied the same log hold the same bytes, although one of them was killed in between and
    /// started again from the records that its entries had changed.
    #[test]
    fn replicas_of_one_log_are_equal_byte_for_byte(log in any_log(), killed_at in 0_usize..124) {
        let (mut one, mut other) = (State::default(), State::default());
        let mut store: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        for (i, command) in log.iter().enumerate() {
            if i == killed_at {
                other = State::default();
                for (key, value) in &store {
                    other.load(key, value).expect("what we wrote");
                }
            }
            // The other one reads it from its log.
            let command_read = Command::from_bytes(&command.to_bytes()).expect("what we wrote");
            let before = one.clone();
            let (outcome, _) = one.apply(command);
            let (outcome_other, changes) = other.apply(&command_read);
            prop_assert_eq!(&outcome, &outcome_other);
            prop_assert!(outcome.is_ok() || one == before, "refused, yet changed");
            for key in changes {
                match other.record(key) {
                    Some(record) => store.insert(key.encode(), record),
                    None => store.remove(&key.encode()),
                };
            }
            prop_assert_eq!(&one, &other);
        }
        prop_assert_eq!(records(&one), records(&other));
        // Every change was told, and nothing is left of what is gone.
        store.entry(super::Key::Cluster.encode()).or_insert_with(|| one.record(super::Key::Cluster).unwrap());
        prop_assert_eq!(records(&one), store);
    }

    /// Numbers are given once; attachments only rise; only the newest gets space.
    #[test]
    fn nothing_is_given_twice(log in any_log()) {
        let mut state = State::default();
        let mut volumes_seen = 0;
        let mut attachments: BTreeMap<VolumeId, u32> = BTreeMap::new();
        for command in &log {
            let before = state.clone();
            match (command, state.apply(command).0) {
                (_, Ok(Done::Created { volume })) => {
                    prop_assert!(volume.0 > volumes_seen);
                    volumes_seen = volume.0;
                }
                (_, Ok(Done::Attached { volume, attachment })) => {
                    prop_assert!(Some(attachment) > attachments.insert(volume, attachment));
                }
                (Command::AllocateSegment(asked), Ok(Done::Segment { .. })) => {
                    let volume = VolumeId(asked.volume);
                    prop_assert_eq!(Some(&asked.attachment), attachments.get(&volume));
                    prop_assert!(before.volumes()[&volume].attached.is_some());
                }
                _ => {}
            }
            prop_assert_eq!(state.names.len(), state.volumes.len());
            prop_assert!(state.dropping.keys().all(|id| !state.volumes.contains_key(id)));
            prop_assert!(state.dropping.values().all(|waiting| !waiting.is_empty()));
            let mut replicas = BTreeSet::new();
            for (&id, copyset) in &state.copysets {
                prop_assert_eq!(state.check_copyset(id), Ok(()));
                prop_assert!(copyset.everyone().all(|r| replicas.insert(r.id)), "one number, two replicas");
                let was = before.copysets.get(&id);
                let was_pending = was.and_then(|was| was.pending);
                if let Some(pending) = copyset.pending.filter(|now| was_pending.is_none_or(|was| was.new.id != now.new.id)) {
                    prop_assert!(pending.new.id.0 > before.given.replica, "a number was given again");
                    prop_assert!(was_pending.is_none(), "two changes at once");
                }
                if let Some(was) = was {
                    let stay = was.replicas.iter().filter(|r| copyset.replica(r.id).is_some()).count();
                    prop_assert!(stay >= 2, "two members were replaced at once");
                }
            }
        }
    }
}

#[test]
fn a_damaged_record_is_named() {
    let mut state = cluster();
    state.apply(&create("web", &[1])).0.expect("created");
    state.apply(&attach("web", "a", false)).0.expect("attached");
    state.apply(&allocate(1, 1, 0, 1)).0.expect("allocated");
    for (key, value) in state.records() {
        // Cut off in the middle of a field. (A single-byte value has none.)
        if value.len() > 1 {
            State::default().load(&key, &value[..value.len() - 1]).expect_err("cut off");
        }
        State::default().load(&key[..key.len() - 1], &value).expect_err("half a key");
    }
    for (key, value) in [(&b""[..], &b""[..]), (b"z", b""), (b"v12345678", b""), (b"w123456781234", b"")] {
        State::default().load(key, value).expect_err("no such record");
    }
}
