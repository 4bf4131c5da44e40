//! Entries that are not in memory any more, read back from the files.
//!
//! The reading happens on another thread: elections and writes do not wait for it.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use openraft::EntryPayload;
use openraft::entry::RaftEntry;

use super::LogError;
use super::file::LogFile;
use super::format::{self, Kind, RecordHeader};
use super::index::{Index, Place};
use crate::machine::{get_membership, put_membership};
use crate::types::{Entry, log_id};
use crate::{Command, GroupId, Position};

/// Neighbouring records are read together up to here.
const SPAN_BYTES: u64 = 1 << 20;

/// A piece of a file and the entries wanted from it.
pub struct Span {
    file: Arc<LogFile>,
    start: u64,
    end: u64,
    wanted: Vec<(Position, Place)>,
}

/// Which pieces of which files hold the entries of `[start, end)`, as far as about `bytes_max` of them. All of them are
/// entries of the group. `file` knows the live files by their sequence.
pub fn plan(
    file: impl Fn(u64) -> Option<Arc<LogFile>>,
    group: &Index,
    start: u64,
    end: u64,
    bytes_max: u64,
) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    let mut bytes = 0;
    for index in start..end {
        if bytes >= bytes_max {
            break;
        }
        let place = group.place(index).expect("the caller asks for entries that are here");
        let (from, to) = (u64::from(place.offset), u64::from(place.offset) + u64::from(place.length));
        bytes += u64::from(place.length);
        let wanted = (Position { term: place.term, index }, place);
        match spans.last_mut() {
            Some(span)
                if span.wanted.last().is_some_and(|last| last.1.sequence == place.sequence)
                    && from >= span.end
                    && to - span.start <= SPAN_BYTES =>
            {
                span.end = to;
                span.wanted.push(wanted);
            }
            _ => {
                let file = file(place.sequence).expect("an entry's file is live");
                spans.push(Span { file, start: from, end: to, wanted: vec![wanted] });
            }
        }
    }
    spans
}

/// Reads the planned pieces and takes the entries out of them.
pub async fn read(group: GroupId, spans: Vec<Span>) -> Result<Vec<Entry>, LogError> {
    let reading = tokio::task::spawn_blocking(move || read_waiting(group, spans));
    reading.await.unwrap_or_else(|stopped| {
        let source = Arc::new(io::Error::other(stopped));
        Err(LogError::Io { doing: "read from", file: "the log".into(), source })
    })
}

/// The same on this thread, which waits for the disk.
pub fn read_waiting(group: GroupId, spans: Vec<Span>) -> Result<Vec<Entry>, LogError> {
    let mut entries = Vec::new();
    for span in spans {
        let mut bytes = BytesMut::zeroed(usize::try_from(span.end - span.start).expect("within a file"));
        span.file.read_at(&mut bytes, span.start)?;
        let bytes = bytes.freeze();
        for (at, place) in span.wanted {
            let from = usize::try_from(u64::from(place.offset) - span.start).expect("within a file");
            let record = bytes.slice(from..from + place.length as usize);
            let entry = decode(group, at, &record).ok_or_else(|| LogError::Damaged {
                file: span.file.path.clone(),
                offset: u64::from(place.offset),
                what: "an entry is not what was written",
            })?;
            entries.push(entry);
        }
    }
    Ok(entries)
}

/// The entry in a record, if it is the one that belongs there.
fn decode(group: GroupId, at: Position, record: &Bytes) -> Option<Entry> {
    let (header, payload) = format::read_record(record)?;
    let RecordHeader { kind, group: found, at: there, .. } = header;
    if found != group || there != at {
        return None;
    }
    let payload = match kind {
        Kind::Blank => EntryPayload::Blank,
        Kind::Command => EntryPayload::Normal(Command::from(record.slice_ref(payload))),
        Kind::Membership => {
            let mut from = payload;
            let membership = get_membership(&mut from)?;
            from.is_empty().then_some(EntryPayload::Membership(membership))?
        }
        _ => return None,
    };
    Some(Entry::new(log_id(at), payload))
}

/// What a record says about an entry: its kind, and its payload when that is not a command's.
pub fn encode(entry: &Entry) -> (Kind, Option<Bytes>) {
    match &entry.payload {
        EntryPayload::Blank => (Kind::Blank, None),
        EntryPayload::Normal(_) => (Kind::Command, None),
        EntryPayload::Membership(membership) => {
            let mut out = BytesMut::new();
            put_membership(&mut out, membership);
            (Kind::Membership, Some(out.freeze()))
        }
    }
}
