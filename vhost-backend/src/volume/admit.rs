//! Requests in, outcomes out: admission, the making of operations, and putting their answers together.

use std::time::Instant;

use bytes::Bytes;
use evolute_protocol::checksum::checksums;
use evolute_protocol::id::ChunkKey;
use evolute_protocol::wire::reply::Freshness;
use evolute_protocol::wire::request::{ChangeTag, Discard, Read, Request as WireRequest, Write, WriteZeroes};
use smallvec::SmallVec;

use super::changing::changed_by;
use super::control::Ask;
use super::inflight::{Key, Kind, Operation, Pending, Purpose};
use super::routing::RouteIndex;
use super::split::{ChunkIo, Split};
use super::{LANE, Stage, Volume};
use crate::backing::{Failure, Outcome, Request, Ticket};

/// Pieces of one long request that are out at a time: enough to keep every copyset of a volume busy, few enough to
/// leave room for others.
const PIECES_OUT_MAX: u32 = 8;

/// What a read of never-written space is made of. A longest request is sixteen of them.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

impl Volume {
    /// Lets requests in as far as the bounds allow: changes in their order, and reads past changes that wait for others.
    pub(super) fn admit(&mut self) {
        for (ticket, request) in std::mem::take(&mut self.submitted) {
            self.counters.requests += 1;
            self.waiting.push_back((ticket, request, self.now));
        }
        if self.stage == Stage::Stopped {
            while let Some((ticket, _, _)) = self.waiting.pop_front() {
                self.complete(ticket, Outcome::Failed(Failure::Io));
            }
            return;
        }
        if self.stage != Stage::Serving {
            return;
        }
        for _ in 0..self.long.len() {
            let Some(key) = self.long.pop_front() else { break };
            self.make_pieces(key);
        }
        // So many at the front are changes that must wait.
        let mut held = 0;
        while let Some((_, request, _)) = self.waiting.get(held) {
            let (bytes, changes) = (cost(request), request.changes_data());
            if !self.admitted.admits(&self.bounds, self.operations.len(), bytes) {
                break;
            }
            // Changes go in their order: what comes after one may be about the same bytes. Reads are owed none, and go past.
            let overlaps = changed_by(request).is_some_and(|range| self.changing.overlaps(&range));
            if overlaps || (changes && (held > 0 || self.sequences.is_full())) {
                held += 1;
                continue;
            }
            let Some((ticket, request, since)) = self.waiting.remove(held) else { break };
            if changes && self.options.read_only {
                self.complete(ticket, Outcome::Failed(Failure::ReadOnly));
            } else {
                self.begin(ticket, request, since, bytes);
            }
        }
    }

    fn begin(&mut self, ticket: Ticket, request: Request, since: Instant, bytes: u64) {
        let changes = changed_by(&request);
        if let Some(range) = &changes {
            self.changing.begin(range.clone());
        }
        let (kind, rest) = match request {
            Request::Read { offset, len } => (Kind::Read, Split::new(offset, u64::from(len))),
            Request::Write { offset, data } => {
                let rest = Split::new(offset, data.len() as u64);
                (Kind::Write { data }, rest)
            }
            Request::Discard { offset, len } => (Kind::Discard, Split::new(offset, len)),
            Request::WriteZeroes { offset, len, unmap } => {
                (Kind::WriteZeroes { unmap }, Split::new(offset, len))
            }
        };
        self.admitted.bytes += bytes;
        let key = self.requests.insert(Pending {
            ticket,
            kind,
            changes,
            rest,
            since,
            out: 0,
            bytes,
            made: 0,
            data: [Bytes::new(), Bytes::new()],
            zeroes: [0, 0],
            failure: None,
        });
        self.make_pieces(key);
    }

    /// Makes the operations of a request, as many as may be out, and ends it when there is nothing to do.
    fn make_pieces(&mut self, key: Key) {
        loop {
            let Some(pending) = self.requests.get_mut(key) else { return };
            let Some(piece) = pending.rest.peek() else { break };
            let full = self.operations.len() >= self.bounds.operations_max || self.sequences.is_full();
            if pending.out >= PIECES_OUT_MAX || (pending.out > 0 && full) {
                self.long.push_back(key);
                return;
            }
            let route = self.routing.route_of(piece.chunk);
            let nothing_there = route.is_none();
            match &mut pending.kind {
                Kind::Read if nothing_there => {
                    pending.zeroes[usize::from(pending.made)] = piece.range.length();
                    pending.made += 1;
                    pending.rest.next();
                }
                // What was never written reads as zeroes already.
                Kind::Discard | Kind::WriteZeroes { .. } if nothing_there => {
                    pending.rest.skip_segment();
                }
                _ => {
                    pending.rest.next();
                    pending.out += 1;
                    let second = pending.made == 1;
                    pending.made = pending.made.saturating_add(1);
                    let purpose = Purpose::Guest { request: key, second };
                    self.make_operation(key, piece, route, purpose);
                }
            }
        }
        self.end_if_done(key);
    }

    fn make_operation(&mut self, key: Key, piece: ChunkIo, route: Option<RouteIndex>, purpose: Purpose) {
        let (Some(pending), Some(attachment)) = (self.requests.get_mut(key), &self.attachment) else {
            return;
        };
        let chunk = ChunkKey { volume: attachment.volume, index: piece.chunk };
        let (epoch, range) = (attachment.epoch, piece.range);
        let mut floor = Freshness::default();
        let mut tag = || ChangeTag {
            epoch,
            lane: LANE,
            sequence: self.sequences.take(),
            floor: self.sequences.floor(),
        };
        let request = match &mut pending.kind {
            Kind::Read => {
                floor = route.map_or(floor, |route| self.routing[route].fresh);
                WireRequest::Read(Read { chunk, epoch, range })
            }
            Kind::Write { data } => {
                // Pieces are made in order, so each takes the front.
                let data = data.split_to(data.len().min(range.length() as usize));
                let checksums = checksums(u64::from(range.offset()), &data);
                WireRequest::Write(Write { chunk, tag: tag(), range, checksums, data })
            }
            Kind::Discard => WireRequest::Discard(Discard { chunk, tag: tag(), range }),
            Kind::WriteZeroes { unmap } => {
                WireRequest::WriteZeroes(WriteZeroes { chunk, tag: tag(), range, unmap: *unmap })
            }
        };
        let since = pending.since;
        let operation = self.operations.insert(Operation {
            request,
            route,
            purpose,
            floor,
            asked: SmallVec::new(),
            followers_tried: 0,
            rounds: 0,
            follower_asked: None,
            sent: false,
            since,
            failures: 0,
        });
        match route {
            Some(_) => self.dispatch(operation),
            None => {
                // The first that needs the segment asks for it.
                let waiting = self.unallocated.entry(piece.segment()).or_default();
                waiting.push(operation);
                if waiting.len() == 1 {
                    self.control.ask(Ask::Segment(piece.segment()));
                }
            }
        }
    }

    /// The segment an operation waited for is there.
    pub(super) fn route(&mut self, key: Key) {
        let Some(operation) = self.operations.get_mut(key) else { return };
        let chunk = match &operation.request {
            WireRequest::Write(write) => write.chunk.index,
            WireRequest::Fence(_)
            | WireRequest::Read(_)
            | WireRequest::ReadAtLeast(_)
            | WireRequest::Digests(_)
            | WireRequest::Doubt(_)
            | WireRequest::Discard(_)
            | WireRequest::WriteZeroes(_)
            | WireRequest::ChunkInfo(_)
            | WireRequest::TakeOver(_) => return,
        };
        operation.route = self.routing.route_of(chunk);
        assert!(operation.route.is_some(), "its segment has just been learned");
        self.dispatch(key);
    }

    /// An operation was answered. Its ticket is completed with the last of its pieces.
    pub(super) fn end_operation(&mut self, key: Key, result: Result<Bytes, Failure>) {
        let Some(operation) = self.operations.remove(key) else { return };
        if let Some(sequence) = operation.sequence() {
            self.sequences.answered(sequence);
        }
        if let (true, Some((chunk, range)), Some(route)) =
            (result.is_err() && operation.sent, operation.changes(), operation.route)
        {
            self.routing[route].recent.gave_up(chunk, range);
        }
        let Purpose::Guest { request, second } = operation.purpose else { return };
        let Some(pending) = self.requests.get_mut(request) else { return };
        pending.out -= 1;
        match result {
            Ok(data) => pending.data[usize::from(second)] = data,
            Err(failure) => {
                pending.failure.get_or_insert(failure);
                pending.rest = Split::new(0, 0);
            }
        }
        self.end_if_done(request);
    }

    pub(super) fn fail_operation(&mut self, key: Key, failure: Failure) {
        self.end_operation(key, Err(failure));
    }

    fn end_if_done(&mut self, key: Key) {
        let done = self.requests.get(key).is_some_and(|pending| pending.out == 0 && pending.rest.is_empty());
        if !done {
            return;
        }
        let Some(pending) = self.requests.remove(key) else { return };
        self.admitted.bytes -= pending.bytes;
        if let Some(range) = &pending.changes {
            self.changing.end(range);
        }
        let outcome = match (pending.failure, pending.kind) {
            (Some(failure), _) => Outcome::Failed(failure),
            (None, Kind::Read) => {
                let mut data = SmallVec::new();
                for (piece, zeroes) in pending.data.into_iter().zip(pending.zeroes) {
                    if zeroes > 0 {
                        put_zeroes(&mut data, zeroes as usize);
                    } else if !piece.is_empty() {
                        data.push(piece);
                    }
                }
                Outcome::Data(data)
            }
            (None, _) => Outcome::Done,
        };
        self.complete(pending.ticket, outcome);
    }
}

fn put_zeroes(data: &mut SmallVec<[Bytes; 4]>, mut bytes: usize) {
    while bytes > 0 {
        let part = bytes.min(ZEROES.len());
        data.push(Bytes::from_static(&ZEROES[..part]));
        bytes -= part;
    }
}

/// Bytes of memory a request needs while it is out.
fn cost(request: &Request) -> u64 {
    match request {
        Request::Read { len, .. } => u64::from(*len),
        Request::Write { data, .. } => data.len() as u64,
        Request::Discard { .. } | Request::WriteZeroes { .. } => 0,
    }
}
