//! openraft's messages as bytes, in the bodies of frames. Decoders return `None` for anything that is not one.
//!
//! Every message to a replica begins with the replica's id: a process that hosts another member of the group must not
//! answer for it.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use openraft::entry::RaftEntry;
use openraft::raft::{StreamAppendError, TransferLeaderRequest};

use super::frame::Body;
use crate::machine::{get_membership, put_membership};
use crate::types::{
    AppendRequest, AppendResult, Entry, LeaderId, LogId, Payload, TransferRequest, Vote, VoteRequest,
    VoteResponse, log_id, position,
};
use crate::{Command, Position};

const BLANK: u8 = 0;
const NORMAL: u8 = 1;
const MEMBERSHIP: u8 = 2;

fn put_log_id(out: &mut BytesMut, id: &Option<LogId>) {
    out.put_u8(u8::from(id.is_some()));
    let at = id.as_ref().map(position).unwrap_or_default();
    out.put_u64_le(at.term);
    out.put_u64_le(at.index);
}

fn get_log_id(from: &mut Bytes) -> Option<Option<LogId>> {
    let there = from.try_get_u8().ok()?;
    let at = get_position(from)?;
    match there {
        0 => Some(None),
        1 => Some(Some(log_id(at))),
        _ => None,
    }
}

pub(super) fn get_position(from: &mut Bytes) -> Option<Position> {
    Some(Position { term: from.try_get_u64_le().ok()?, index: from.try_get_u64_le().ok()? })
}

pub(super) fn put_vote(out: &mut BytesMut, vote: &Vote) {
    out.put_u64_le(vote.leader_id.term);
    out.put_u64_le(vote.leader_id.voted_for);
    out.put_u8(u8::from(vote.committed));
}

pub(super) fn get_vote(from: &mut Bytes) -> Option<Vote> {
    let leader_id = LeaderId { term: from.try_get_u64_le().ok()?, voted_for: from.try_get_u64_le().ok()? };
    let committed = match from.try_get_u8().ok()? {
        0 => false,
        1 => true,
        _ => return None,
    };
    Some(Vote { leader_id, committed })
}

/// An append, and the leader's word on what no member lacks any more.
pub(super) fn put_append(body: &mut Body<'_>, to: u64, request: &AppendRequest, floor: Option<u64>) {
    let out = &mut *body.bytes;
    out.put_u64_le(to);
    out.put_u8(u8::from(floor.is_some()));
    out.put_u64_le(floor.unwrap_or_default());
    put_vote(out, &request.vote);
    put_log_id(out, &request.prev_log_id);
    put_log_id(out, &request.leader_commit);
    out.put_u32_le(length(request.entries.len()));
    for entry in &request.entries {
        let out = &mut *body.bytes;
        let at = position(&entry.log_id());
        out.put_u64_le(at.term);
        out.put_u64_le(at.index);
        match &entry.payload {
            Payload::Blank => {
                out.put_u8(BLANK);
                out.put_u32_le(0);
            }
            Payload::Normal(command) => {
                out.put_u8(NORMAL);
                out.put_u32_le(length(command.len()));
                command.0.iter().for_each(|part| body.put(part));
            }
            Payload::Membership(membership) => {
                out.put_u8(MEMBERSHIP);
                let at = out.len();
                out.put_u32_le(0);
                put_membership(out, membership);
                let bytes = length(out.len() - at - 4);
                out[at..at + 4].copy_from_slice(&bytes.to_le_bytes());
            }
        }
    }
}

pub(super) struct Append {
    pub to: u64,
    pub floor: Option<u64>,
    pub request: AppendRequest,
}

pub(super) fn get_append(mut from: Bytes) -> Option<Append> {
    let to = from.try_get_u64_le().ok()?;
    let has_floor = from.try_get_u8().ok()? == 1;
    let floor = from.try_get_u64_le().ok()?;
    let vote = get_vote(&mut from)?;
    let prev_log_id = get_log_id(&mut from)?;
    let leader_commit = get_log_id(&mut from)?;
    let count = from.try_get_u32_le().ok()? as usize;
    // An entry takes 21 bytes at least: no more is allocated than what arrived can hold.
    let mut entries = Vec::with_capacity(count.min(from.len() / 21));
    let mut last = prev_log_id.as_ref().map(position);
    for _ in 0..count {
        let at = get_position(&mut from)?;
        // The log asserts that entries follow each other; what another process sends must not reach an assertion.
        let follows = match last {
            Some(last) => last.index.checked_add(1) == Some(at.index) && last.term <= at.term,
            None => at.index == 0,
        };
        if !follows {
            return None;
        }
        last = Some(at);
        let kind = from.try_get_u8().ok()?;
        let bytes = from.try_get_u32_le().ok()? as usize;
        if from.len() < bytes {
            return None;
        }
        let body = from.split_to(bytes);
        let payload = match kind {
            BLANK if body.is_empty() => Payload::Blank,
            NORMAL => Payload::Normal(Command::from(body)),
            MEMBERSHIP => {
                let mut rest = &body[..];
                let membership = get_membership(&mut rest)?;
                if !rest.is_empty() {
                    return None;
                }
                Payload::Membership(membership)
            }
            _ => return None,
        };
        entries.push(<Entry as RaftEntry>::new(log_id(at), payload));
    }
    let request = AppendRequest { vote, prev_log_id, entries, leader_commit };
    from.is_empty().then_some(Append { to, floor: has_floor.then_some(floor), request })
}

pub(super) fn put_append_result(out: &mut BytesMut, result: &AppendResult) {
    match result {
        Ok(matched) => {
            out.put_u8(0);
            put_log_id(out, matched);
        }
        Err(StreamAppendError::Conflict(at)) => {
            out.put_u8(1);
            put_log_id(out, &Some(*at));
        }
        Err(StreamAppendError::HigherVote(vote)) => {
            out.put_u8(2);
            put_vote(out, vote);
        }
    }
}

pub(super) fn get_append_result(mut from: Bytes) -> Option<AppendResult> {
    let result = match from.try_get_u8().ok()? {
        0 => Ok(get_log_id(&mut from)?),
        1 => Err(StreamAppendError::Conflict(get_log_id(&mut from)??)),
        2 => Err(StreamAppendError::HigherVote(get_vote(&mut from)?)),
        _ => return None,
    };
    from.is_empty().then_some(result)
}

pub(super) fn put_vote_request(out: &mut BytesMut, to: u64, request: &VoteRequest) {
    out.put_u64_le(to);
    put_vote(out, &request.vote);
    put_log_id(out, &request.last_log_id);
    out.put_u8(u8::from(request.leadership_transfer));
}

pub(super) fn get_vote_request(mut from: Bytes) -> Option<(u64, VoteRequest)> {
    let to = from.try_get_u64_le().ok()?;
    let mut request = VoteRequest::new(get_vote(&mut from)?, get_log_id(&mut from)?);
    request.leadership_transfer = from.try_get_u8().ok()? == 1;
    from.is_empty().then_some((to, request))
}

pub(super) fn put_vote_response(out: &mut BytesMut, response: &VoteResponse) {
    put_vote(out, &response.vote);
    out.put_u8(u8::from(response.vote_granted));
    put_log_id(out, &response.last_log_id);
}

pub(super) fn get_vote_response(mut from: Bytes) -> Option<VoteResponse> {
    let vote = get_vote(&mut from)?;
    let vote_granted = from.try_get_u8().ok()? == 1;
    let last_log_id = get_log_id(&mut from)?;
    from.is_empty().then_some(VoteResponse { vote, vote_granted, last_log_id })
}

pub(super) fn put_transfer(out: &mut BytesMut, to: u64, request: &TransferRequest) {
    out.put_u64_le(to);
    put_vote(out, request.from_leader());
    out.put_u64_le(*request.to_node_id());
    put_log_id(out, &request.last_log_id().copied());
}

pub(super) fn get_transfer(mut from: Bytes) -> Option<(u64, TransferRequest)> {
    let to = from.try_get_u64_le().ok()?;
    let vote = get_vote(&mut from)?;
    let target = from.try_get_u64_le().ok()?;
    let last = get_log_id(&mut from)?;
    from.is_empty().then(|| (to, TransferLeaderRequest::new(vote, target, last)))
}

pub(super) fn put_take_over(out: &mut BytesMut, to: u64, from: u64) {
    out.put_u64_le(to);
    out.put_u64_le(from);
}

pub(super) fn get_take_over(mut from: Bytes) -> Option<(u64, u64)> {
    let ids = (from.try_get_u64_le().ok()?, from.try_get_u64_le().ok()?);
    from.is_empty().then_some(ids)
}

pub(super) fn put_sleep(out: &mut BytesMut, to: u64, vote: &Vote, last: Position) {
    out.put_u64_le(to);
    put_vote(out, vote);
    out.put_u64_le(last.term);
    out.put_u64_le(last.index);
}

pub(super) fn get_sleep(mut from: Bytes) -> Option<(u64, Vote, Position)> {
    let to = from.try_get_u64_le().ok()?;
    let (vote, last) = (get_vote(&mut from)?, get_position(&mut from)?);
    from.is_empty().then_some((to, vote, last))
}

fn length(n: usize) -> u32 {
    u32::try_from(n).expect("a command is bounded far below 4 GiB")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use bytes::{Bytes, BytesMut};
    use openraft::entry::RaftEntry;
    use openraft::raft::StreamAppendError;
    use proptest::prelude::{any, prop, proptest};

    use super::super::frame::Body;
    use super::{
        get_append, get_append_result, get_sleep, get_take_over, get_transfer, get_vote_request,
        get_vote_response, put_append, put_append_result, put_sleep, put_take_over, put_transfer,
        put_vote_request, put_vote_response,
    };
    use crate::types::{
        AppendRequest, Entry, Host, LeaderId, Membership, Payload, TransferRequest, Vote, VoteRequest,
        VoteResponse, log_id,
    };
    use crate::{Command, Position};

    fn at(term: u64, index: u64) -> crate::types::LogId {
        log_id(Position { term, index })
    }

    fn vote() -> Vote {
        Vote { leader_id: LeaderId { term: 7, voted_for: 3 }, committed: true }
    }

    fn append() -> AppendRequest {
        let membership =
            Membership::new(vec![BTreeSet::from([1, 2])], BTreeMap::from([(1, Host(5)), (2, Host(6))]))
                .expect("good");
        let command: Command =
            [Bytes::from_static(b"head"), Bytes::from_static(b"data")].into_iter().collect();
        let entries = [Payload::Blank, Payload::Normal(command), Payload::Membership(membership)]
            .into_iter()
            .zip(10..)
            .map(|(payload, index)| <Entry as RaftEntry>::new(at(7, index), payload))
            .collect();
        AppendRequest { vote: vote(), prev_log_id: Some(at(6, 9)), entries, leader_commit: None }
    }

    fn of_append(request: &AppendRequest, floor: Option<u64>) -> Bytes {
        bytes(|out| put_append(&mut Body::of(out), 2, request, floor))
    }

    fn bytes(put: impl FnOnce(&mut BytesMut)) -> Bytes {
        let mut out = BytesMut::new();
        put(&mut out);
        out.freeze()
    }

    /// Decodes what was encoded, and nothing that was cut short or is longer.
    fn check<T: std::fmt::Debug>(bytes: &Bytes, get: impl Fn(Bytes) -> Option<T>, same: impl Fn(T) -> bool) {
        assert!(same(get(bytes.clone()).expect("ours")));
        for cut in 0..bytes.len() {
            assert!(get(bytes.slice(..cut)).is_none(), "cut at {cut}");
        }
        let longer = Bytes::from([&bytes[..], &[0]].concat());
        assert!(get(longer).is_none());
    }

    #[test]
    fn every_message_survives_its_bytes_and_nothing_else_passes_for_one() {
        let sent = append();
        for floor in [None, Some(4)] {
            check(
                &of_append(&sent, floor),
                |b| get_append(b).map(|a| (a.to, a.floor, a.request)),
                |(to, got, request)| (to, got) == (2, floor) && format!("{request:?}") == format!("{sent:?}"),
            );
        }
        for result in [
            Ok(Some(at(3, 4))),
            Ok(None),
            Err(StreamAppendError::Conflict(at(1, 2))),
            Err(StreamAppendError::HigherVote(vote())),
        ] {
            check(&bytes(|out| put_append_result(out, &result)), get_append_result, |got| got == result);
        }
        let request = VoteRequest { vote: vote(), last_log_id: Some(at(1, 2)), leadership_transfer: true };
        check(&bytes(|out| put_vote_request(out, 9, &request)), get_vote_request, |got| {
            got == (9, request.clone())
        });
        let response = VoteResponse { vote: vote(), vote_granted: true, last_log_id: None };
        check(&bytes(|out| put_vote_response(out, &response)), get_vote_response, |got| got == response);
        let transfer = TransferRequest::new(vote(), 8, Some(at(2, 2)));
        check(&bytes(|out| put_transfer(out, 8, &transfer)), get_transfer, |got| {
            got == (8, transfer.clone())
        });
        check(&bytes(|out| put_take_over(out, 7, 9)), get_take_over, |got| got == (7, 9));
        let last = Position { term: 3, index: 4 };
        check(&bytes(|out| put_sleep(out, 7, &vote(), last)), get_sleep, |got| got == (7, vote(), last));
    }

    #[test]
    fn entries_must_follow_each_other() {
        for index in [0, 9, 11, u64::MAX] {
            let mut request = append();
            request.entries[0].log_id.index = index;
            assert!(get_append(of_append(&request, None)).is_none(), "{index} after 9");
        }
        let mut request = append();
        request.entries[1].log_id = at(6, 11);
        assert!(get_append(of_append(&request, None)).is_none(), "a term that falls");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_none_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..150)) {
            let bytes = Bytes::from(bytes);
            let _ = get_append(bytes.clone());
            let _ = get_append_result(bytes.clone());
            let _ = get_vote_request(bytes.clone());
            let _ = get_vote_response(bytes.clone());
            let _ = get_take_over(bytes.clone());
            let _ = get_sleep(bytes.clone());
            let _ = get_transfer(bytes);
        }

        #[test]
        fn a_changed_byte_never_panics(place: prop::sample::Index, byte: u8) {
            let mut changed = of_append(&append(), None).to_vec();
            let place = place.index(changed.len());
            changed[place] = byte;
            let _ = get_append(changed.into());
        }
    }
}
