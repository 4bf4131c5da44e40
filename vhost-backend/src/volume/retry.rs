//! What went wrong → what to do next. A decision only: no clock, no socket, no state.
//!
//! An outage is a pause (design.md §4): nothing here gives up because somebody cannot be reached. Only what can never
//! succeed fails: a volume that somebody else owns, a cluster that is full, bytes no replica can vouch for.

use std::time::Duration;

use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::ChunkserverId;
use evolute_protocol::wire::reply::Refusal;

use crate::backing::Failure;
use crate::wait::{WAIT_MAX, WAIT_MIN, doubled, jittered};

/// How often in a row one is asked again that says it leads and does not serve yet: an entry of its own term must be
/// on a majority first, a matter of milliseconds.
pub const NEARLY_MAX: u32 = 20;
/// Hints followed without a pause. Two replicas may each believe the other leads.
pub const REDIRECTS_MAX: u32 = 3;
/// How often bytes are asked for that nobody could vouch for. A replica being repaired needs a moment.
pub const UNREADABLE_MAX: u32 = 5;
/// How often a request whose data arrived damaged is sent again. More often than a bad cable, less than for ever:
/// memory that changed under its checksum never becomes right again.
pub const DAMAGED_MAX: u32 = 16;

/// What came back for a request that was sent, other than the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    Refused(Refusal),
    /// The connection it was sent on is gone.
    ConnectionLost,
    /// No answer for as long as the setting `silence` says.
    Silent,
    /// A read was answered by a replica that knows less than this volume does: it does not lead any more.
    Stale,
    /// The data of a read does not match its checksums.
    DamagedOnTheWay,
}

/// How things stand with the request's copyset, and with the request.
#[derive(Debug, Clone, Copy)]
pub struct Standing {
    /// Our own epoch.
    pub epoch: Epoch,
    /// Since when the copyset has had no leader that answers.
    pub searching: Duration,
    /// Hints followed since the last pause.
    pub redirects: u32,
    /// Whether the chunkserver named by a hint is one we can talk to now, or may try, and have not asked yet.
    pub hint_usable: bool,
    /// The one that refused names itself: it has been elected and does not serve yet.
    pub hint_is_self: bool,
    /// Refusals in a row that asked for patience (`Busy`, `NotFenced`), without anything succeeding between them.
    pub setbacks: u32,
    /// How often this very request's data was refused or came damaged.
    pub failures: u32,
    /// Spreads the waits of many clients: any number.
    pub jitter: u32,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// It leads: go there at once.
    Follow(ChunkserverId),
    /// Nobody known leads: ask the next replica, after this long.
    Search { after: Duration },
    /// Like [`Move::Search`], and ask the control plane for a new map.
    SearchWithNewMap { after: Duration },
    /// Ask another replica too, and keep waiting for the first.
    AskAnother,
    /// The same place again, nothing to this copyset before.
    Pause { after: Duration },
    /// Fence the copyset with our epoch, then send again.
    Fence { after: Duration },
    /// This request alone again, wherever the leader is by then.
    Again { after: Duration },
    /// It can never succeed.
    Fail(Failure),
    /// Somebody else owns the volume: stop for ever.
    Stop { current: Epoch },
}

pub fn next_move(trouble: Trouble, now: &Standing) -> Move {
    match trouble {
        Trouble::Refused(refusal) => after_refusal(refusal, now),
        // The next replica is asked at once: it costs a round trip, and the lost one may have been the only one.
        Trouble::ConnectionLost => Move::Search { after: Duration::ZERO },
        Trouble::Silent => Move::AskAnother,
        Trouble::Stale => Move::Search { after: search_wait(now) },
        Trouble::DamagedOnTheWay => again(now, DAMAGED_MAX),
    }
}

fn after_refusal(refusal: Refusal, now: &Standing) -> Move {
    match refusal {
        Refusal::NotLeader { leader: Some(leader) } if now.hint_usable && now.redirects < REDIRECTS_MAX => {
            Move::Follow(leader)
        }
        Refusal::NotLeader { .. } if now.hint_is_self && now.setbacks < NEARLY_MAX => {
            Move::Pause { after: jittered(WAIT_MIN, now.jitter) }
        }
        // Only a follower is asked what it may be behind for; from a leader it is nonsense.
        Refusal::NotLeader { .. } | Refusal::Behind { .. } => Move::Search { after: search_wait(now) },
        Refusal::Fenced { current } if current > now.epoch => Move::Stop { current },
        // A replica that lost its memory of us, or nonsense: either way our fence settles it.
        Refusal::Fenced { .. } | Refusal::NotFenced => Move::Fence { after: patience(now) },
        Refusal::Busy => Move::Pause { after: patience(now).max(jittered(WAIT_MIN, now.jitter)) },
        Refusal::NoSpace => Move::Fail(Failure::NoSpace),
        Refusal::NoSuchCopyset => Move::SearchWithNewMap { after: search_wait(now) },
        Refusal::Unreadable { .. } => again(now, UNREADABLE_MAX),
        Refusal::Damaged => again(now, DAMAGED_MAX),
    }
}

fn again(now: &Standing, max: u32) -> Move {
    if now.failures >= max {
        return Move::Fail(Failure::Io);
    }
    let wait = if now.failures == 0 { Duration::ZERO } else { doubled(now.failures - 1) };
    Move::Again { after: jittered(wait, now.jitter) }
}

/// Grows with the time it already took: a sixteenth of it, so that finding the new leader never adds more than that to
/// an election, and a long outage costs few requests.
fn search_wait(now: &Standing) -> Duration {
    jittered((now.searching / 16).clamp(WAIT_MIN, WAIT_MAX), now.jitter)
}

/// Nothing at first, then longer with each setback.
fn patience(now: &Standing) -> Duration {
    if now.setbacks == 0 { Duration::ZERO } else { jittered(doubled(now.setbacks - 1), now.jitter) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use evolute_protocol::epoch::Epoch;
    use evolute_protocol::id::{BlockIndex, ChunkserverId};
    use evolute_protocol::wire::reply::Refusal;

    use super::{
        DAMAGED_MAX, Move, NEARLY_MAX, REDIRECTS_MAX, Standing, Trouble, UNREADABLE_MAX, WAIT_MAX, WAIT_MIN,
        next_move,
    };
    use crate::backing::Failure;

    const OURS: Epoch = Epoch { attachment: 2, incarnation: 1 };

    fn standing() -> Standing {
        Standing {
            epoch: OURS,
            searching: Duration::ZERO,
            redirects: 0,
            hint_usable: true,
            hint_is_self: false,
            setbacks: 0,
            failures: 0,
            jitter: 0,
        }
    }

    fn refused(refusal: Refusal, now: &Standing) -> Move {
        next_move(Trouble::Refused(refusal), now)
    }

    #[test]
    fn each_refusal_has_its_move() {
        let three = ChunkserverId(3);
        let hint = Refusal::NotLeader { leader: Some(three) };
        let block = BlockIndex(7);
        let newer = Epoch { attachment: 3, incarnation: 0 };
        let s = standing();
        let bounced = Standing { redirects: REDIRECTS_MAX, ..s };
        let unusable = Standing { hint_usable: false, ..s };
        let itself = Standing { hint_usable: false, hint_is_self: true, ..s };
        let itself_for_long = Standing { setbacks: NEARLY_MAX, ..itself };
        let late = Standing { searching: Duration::from_secs(60), ..s };
        let second = Standing { setbacks: 1, failures: 1, ..s };
        let worn = Standing { failures: UNREADABLE_MAX, ..s };
        let worn_out = Standing { failures: DAMAGED_MAX, ..s };
        let table = [
            (Trouble::Refused(hint), s, Move::Follow(three)),
            (Trouble::Refused(hint), bounced, Move::Search { after: WAIT_MIN }),
            (Trouble::Refused(hint), itself, Move::Pause { after: WAIT_MIN }),
            (Trouble::Refused(hint), itself_for_long, Move::Search { after: WAIT_MIN }),
            (Trouble::Refused(hint), unusable, Move::Search { after: WAIT_MIN }),
            (Trouble::Refused(Refusal::NotLeader { leader: None }), s, Move::Search { after: WAIT_MIN }),
            (Trouble::Refused(Refusal::Behind { applied: 3 }), s, Move::Search { after: WAIT_MIN }),
            (Trouble::Refused(Refusal::NotLeader { leader: None }), late, Move::Search { after: WAIT_MAX }),
            (Trouble::Refused(Refusal::Fenced { current: newer }), s, Move::Stop { current: newer }),
            (Trouble::Refused(Refusal::Fenced { current: OURS }), s, Move::Fence { after: Duration::ZERO }),
            (Trouble::Refused(Refusal::NotFenced), s, Move::Fence { after: Duration::ZERO }),
            (Trouble::Refused(Refusal::NotFenced), second, Move::Fence { after: WAIT_MIN }),
            (Trouble::Refused(Refusal::Busy), s, Move::Pause { after: WAIT_MIN }),
            (Trouble::Refused(Refusal::NoSpace), s, Move::Fail(Failure::NoSpace)),
            (Trouble::Refused(Refusal::NoSuchCopyset), s, Move::SearchWithNewMap { after: WAIT_MIN }),
            (Trouble::Refused(Refusal::Unreadable { block }), s, Move::Again { after: Duration::ZERO }),
            (Trouble::Refused(Refusal::Unreadable { block }), second, Move::Again { after: WAIT_MIN }),
            (Trouble::Refused(Refusal::Unreadable { block }), worn, Move::Fail(Failure::Io)),
            (Trouble::Refused(Refusal::Damaged), s, Move::Again { after: Duration::ZERO }),
            (Trouble::Refused(Refusal::Damaged), worn_out, Move::Fail(Failure::Io)),
            (Trouble::DamagedOnTheWay, worn, Move::Again { after: Duration::from_millis(80) }),
            (Trouble::DamagedOnTheWay, worn_out, Move::Fail(Failure::Io)),
            (Trouble::ConnectionLost, late, Move::Search { after: Duration::ZERO }),
            (Trouble::Silent, s, Move::AskAnother),
            (Trouble::Stale, s, Move::Search { after: WAIT_MIN }),
        ];
        for (trouble, now, expected) in table {
            assert_eq!(next_move(trouble, &now), expected, "{trouble:?} when {now:?}");
        }
    }

    #[test]
    fn waits_grow_stay_bounded_and_are_spread() {
        let mut last = Duration::ZERO;
        for setbacks in 1..40 {
            let Move::Pause { after } = refused(Refusal::Busy, &Standing { setbacks, ..standing() }) else {
                panic!("busy means wait");
            };
            assert!(after >= last && after <= WAIT_MAX, "{after:?} after {last:?}");
            last = after;
        }
        assert_eq!(last, WAIT_MAX);
        for jitter in [1, 500, 1023, u32::MAX] {
            let now = Standing { jitter, searching: Duration::from_secs(2), ..standing() };
            let Move::Search { after } = refused(Refusal::NotLeader { leader: None }, &now) else {
                panic!("no leader means search");
            };
            assert!(after > Duration::from_millis(93) && after < Duration::from_millis(125), "{after:?}");
        }
    }

    #[test]
    fn no_outage_ever_fails_a_request() {
        let hour = Duration::from_secs(3600);
        let worst =
            Standing { searching: hour, redirects: 1000, setbacks: 1000, hint_usable: false, ..standing() };
        for trouble in [
            Trouble::ConnectionLost,
            Trouble::Silent,
            Trouble::Stale,
            Trouble::Refused(Refusal::NotLeader { leader: None }),
            Trouble::Refused(Refusal::NotLeader { leader: Some(ChunkserverId(1)) }),
            Trouble::Refused(Refusal::Busy),
            Trouble::Refused(Refusal::NoSuchCopyset),
            Trouble::Refused(Refusal::NotFenced),
        ] {
            let next = next_move(trouble, &worst);
            assert!(!matches!(next, Move::Fail(_) | Move::Stop { .. }), "{trouble:?} → {next:?}");
        }
    }
}
