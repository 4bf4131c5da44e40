//! The bytes of a log file, in the order of `docs/log-format.md`. Pure: slices in, values out.
//!
//! What was read from a disk is not yet what it claims to be: everything here that reads returns `None` for bytes
//! that are not exactly what this module writes.

use crc_fast::CrcAlgorithm;

use super::LogOwner;
use crate::{GroupId, Position, ProcessId};

/// Everything is written in multiples of this, at multiples of this: what O_DIRECT asks of any disk we know.
pub const BLOCK: usize = 4096;

/// The newest format this program knows, and the one it writes.
pub const VERSION: u32 = 1;

// ---- file header: the first block of a file

pub const FILE_HEADER: usize = BLOCK;
const FILE_MAGIC: [u8; 8] = *b"EVOLOG\r\n";
const F_MAGIC: usize = 0;
const F_VERSION: usize = 8;
const F_LENGTH: usize = 12;
const F_SEQUENCE: usize = 16;
const F_PREVIOUS: usize = 24;
const F_PREVIOUS_END: usize = 32;
const F_CLUSTER: usize = 40;
const F_PROCESS: usize = 56;
const F_FILE_BYTES: usize = 64;
const F_CRC: usize = FILE_HEADER - 4;

// ---- batch header: the start of every write

pub const BATCH_HEADER: usize = 64;
const BATCH_MAGIC: u32 = u32::from_le_bytes(*b"EVLB");
const B_MAGIC: usize = 0;
const B_LENGTH: usize = 4;
const B_COUNT: usize = 8;
const B_SEQUENCE: usize = 16;
const B_OFFSET: usize = 24;
const B_DURABLE_SEQUENCE: usize = 32;
const B_DURABLE_OFFSET: usize = 40;
const B_FIRST_LIVE: usize = 48;
const B_CRC: usize = BATCH_HEADER - 4;

// ---- record header

pub const RECORD_HEADER: usize = 40;
const R_CRC: usize = 0;
const R_LENGTH: usize = 4;
const R_KIND: usize = 8;
const R_GROUP: usize = 16;
const R_TERM: usize = 24;
const R_INDEX: usize = 32;

// ---- one group in a state record

const STATE_HEADER: usize = 8;
const STATE_GROUP: usize = 72;

const _: () = {
    assert!(F_FILE_BYTES + 8 <= F_CRC);
    assert!(B_FIRST_LIVE + 8 <= B_CRC);
    assert!(R_INDEX + 8 == RECORD_HEADER);
};

/// A place in the log: files in the order of their sequence, bytes in a file in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Mark {
    pub sequence: u64,
    pub offset: u64,
}

/// What a file says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileHeader {
    /// Rises with every life of every file. Bytes of a former life carry a lower one.
    pub sequence: u64,
    /// The file before this one ended here. Sequence 0: there was none.
    pub previous: Mark,
    pub owner: LogOwner,
    pub file_bytes: u64,
}

/// What the first block of a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstBlock {
    Header(FileHeader),
    /// Ours, and newer than this program.
    Newer(u32),
    /// Never written, torn or rotten.
    Nothing,
}

/// The start of one write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// Bytes of the records, without this header and without padding.
    pub length: u32,
    pub count: u32,
    /// Where this batch is. Bytes that were written to the wrong place do not pass.
    pub at: Mark,
    /// Everything before this was durable when the batch was written.
    pub durable: Mark,
    /// Files of a lower sequence are not needed any more.
    pub first_live: u64,
}

/// What a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// An entry without content.
    Blank = 1,
    /// An entry with a command.
    Command = 2,
    /// An entry with a membership.
    Membership = 3,
    /// The group's vote.
    Vote = 4,
    /// Entries from `index` on are gone.
    Truncate = 5,
    /// Entries up to `index` are gone.
    Purge = 6,
    /// The group has a log from here on.
    Created = 7,
    /// The group, its entries and its vote are gone.
    Removed = 8,
    /// What all groups are at the beginning of a file.
    State = 9,
    /// The owner is about to replace its state by a raft snapshot of up to this position.
    Installing = 10,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Blank,
            Self::Command,
            Self::Membership,
            Self::Vote,
            Self::Truncate,
            Self::Purge,
            Self::Created,
            Self::Removed,
            Self::State,
            Self::Installing,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// One record without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    pub kind: Kind,
    pub group: GroupId,
    pub at: Position,
    /// Bytes of the payload.
    pub length: u32,
}

/// A vote as the log keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VoteRecord {
    pub term: u64,
    pub voted_for: u64,
    pub committed: bool,
}

/// One group in a state record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupRecord {
    pub group: GroupId,
    pub replica: u64,
    pub vote: Option<VoteRecord>,
    pub purged: Option<Position>,
    pub last: Option<Position>,
}

#[expect(clippy::cast_possible_truncation, reason = "a 32-bit crc in a u64")]
fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn u32_at(from: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(from[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(from: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(from[at..at + 8].try_into().expect("eight bytes"))
}

/// `n` rounded up to whole blocks.
pub fn blocks(n: usize) -> usize {
    n.next_multiple_of(BLOCK)
}

/// Writes a file header over the first block of `out`.
pub fn write_file_header(out: &mut [u8], header: &FileHeader) {
    let out = &mut out[..FILE_HEADER];
    out.fill(0);
    put(out, F_MAGIC, &FILE_MAGIC);
    put(out, F_VERSION, &VERSION.to_le_bytes());
    put(out, F_LENGTH, &4096_u32.to_le_bytes());
    put(out, F_SEQUENCE, &header.sequence.to_le_bytes());
    put(out, F_PREVIOUS, &header.previous.sequence.to_le_bytes());
    put(out, F_PREVIOUS_END, &header.previous.offset.to_le_bytes());
    put(out, F_CLUSTER, &header.owner.cluster);
    put(out, F_PROCESS, &header.owner.process.0.to_le_bytes());
    put(out, F_FILE_BYTES, &header.file_bytes.to_le_bytes());
    let crc = crc32c(&out[..F_CRC]);
    put(out, F_CRC, &crc.to_le_bytes());
}

pub fn read_file_header(from: &[u8]) -> FirstBlock {
    if from.len() < FILE_HEADER || from[..F_VERSION] != FILE_MAGIC {
        return FirstBlock::Nothing;
    }
    let version = u32_at(from, F_VERSION);
    if version > VERSION {
        return FirstBlock::Newer(version);
    }
    if u32_at(from, F_CRC) != crc32c(&from[..F_CRC]) {
        return FirstBlock::Nothing;
    }
    FirstBlock::Header(FileHeader {
        sequence: u64_at(from, F_SEQUENCE),
        previous: Mark { sequence: u64_at(from, F_PREVIOUS), offset: u64_at(from, F_PREVIOUS_END) },
        owner: LogOwner {
            cluster: from[F_CLUSTER..F_PROCESS].try_into().expect("sixteen bytes"),
            process: ProcessId(u64_at(from, F_PROCESS)),
        },
        file_bytes: u64_at(from, F_FILE_BYTES),
    })
}

/// Writes a batch header over the start of `out`.
pub fn write_batch_header(out: &mut [u8], header: &BatchHeader) {
    let out = &mut out[..BATCH_HEADER];
    out.fill(0);
    put(out, B_MAGIC, &BATCH_MAGIC.to_le_bytes());
    put(out, B_LENGTH, &header.length.to_le_bytes());
    put(out, B_COUNT, &header.count.to_le_bytes());
    put(out, B_SEQUENCE, &header.at.sequence.to_le_bytes());
    put(out, B_OFFSET, &header.at.offset.to_le_bytes());
    put(out, B_DURABLE_SEQUENCE, &header.durable.sequence.to_le_bytes());
    put(out, B_DURABLE_OFFSET, &header.durable.offset.to_le_bytes());
    put(out, B_FIRST_LIVE, &header.first_live.to_le_bytes());
    let crc = crc32c(&out[..B_CRC]);
    put(out, B_CRC, &crc.to_le_bytes());
}

/// The batch header at the start of `from`, whatever file and place it was meant for.
pub fn read_batch_header(from: &[u8]) -> Option<BatchHeader> {
    let from = from.get(..BATCH_HEADER)?;
    if u32_at(from, B_MAGIC) != BATCH_MAGIC || u32_at(from, B_CRC) != crc32c(&from[..B_CRC]) {
        return None;
    }
    Some(BatchHeader {
        length: u32_at(from, B_LENGTH),
        count: u32_at(from, B_COUNT),
        at: Mark { sequence: u64_at(from, B_SEQUENCE), offset: u64_at(from, B_OFFSET) },
        durable: Mark { sequence: u64_at(from, B_DURABLE_SEQUENCE), offset: u64_at(from, B_DURABLE_OFFSET) },
        first_live: u64_at(from, B_FIRST_LIVE),
    })
}

/// Makes a record of `out`, whose payload is already in place after the room for the header.
pub fn seal_record(out: &mut [u8], header: &RecordHeader) {
    debug_assert_eq!(out.len(), RECORD_HEADER + header.length as usize);
    out[..RECORD_HEADER].fill(0);
    put(out, R_LENGTH, &header.length.to_le_bytes());
    out[R_KIND] = header.kind as u8;
    put(out, R_GROUP, &header.group.0.to_le_bytes());
    put(out, R_TERM, &header.at.term.to_le_bytes());
    put(out, R_INDEX, &header.at.index.to_le_bytes());
    let crc = crc32c(&out[R_LENGTH..]);
    put(out, R_CRC, &crc.to_le_bytes());
}

/// The record at the start of `from`, and its payload.
pub fn read_record(from: &[u8]) -> Option<(RecordHeader, &[u8])> {
    let header = from.get(..RECORD_HEADER)?;
    let length = u32_at(header, R_LENGTH);
    let end = RECORD_HEADER.checked_add(length as usize)?;
    let record = from.get(..end)?;
    if u32_at(header, R_CRC) != crc32c(&record[R_LENGTH..]) {
        return None;
    }
    let header = RecordHeader {
        kind: Kind::from_byte(header[R_KIND])?,
        group: GroupId(u64_at(header, R_GROUP)),
        at: Position { term: u64_at(header, R_TERM), index: u64_at(header, R_INDEX) },
        length,
    };
    Some((header, &record[RECORD_HEADER..]))
}

pub const VOTE_PAYLOAD: usize = 16;

pub fn vote_payload(vote: &VoteRecord) -> [u8; VOTE_PAYLOAD] {
    let mut out = [0; VOTE_PAYLOAD];
    put(&mut out, 0, &vote.voted_for.to_le_bytes());
    out[8] = u8::from(vote.committed);
    out
}

pub fn read_vote(term: u64, payload: &[u8]) -> Option<VoteRecord> {
    if payload.len() != VOTE_PAYLOAD || payload[8] > 1 {
        return None;
    }
    Some(VoteRecord { term, voted_for: u64_at(payload, 0), committed: payload[8] == 1 })
}

const HAS_VOTE: u8 = 1;
const COMMITTED: u8 = 2;
const HAS_PURGED: u8 = 4;
const HAS_LAST: u8 = 8;

/// The payload of a state record.
pub fn state_payload(groups: &[GroupRecord]) -> Vec<u8> {
    let mut out = vec![0; STATE_HEADER + groups.len() * STATE_GROUP];
    put(&mut out, 0, &(groups.len() as u64).to_le_bytes());
    for (group, out) in groups.iter().zip(out[STATE_HEADER..].chunks_exact_mut(STATE_GROUP)) {
        let mut flags = 0;
        let mut place = |at: usize, flag: u8, position: Option<Position>| {
            if let Some(position) = position {
                flags |= flag;
                put(out, at, &position.term.to_le_bytes());
                put(out, at + 8, &position.index.to_le_bytes());
            }
        };
        place(40, HAS_PURGED, group.purged);
        place(56, HAS_LAST, group.last);
        if let Some(vote) = group.vote {
            flags |= HAS_VOTE | if vote.committed { COMMITTED } else { 0 };
            put(out, 24, &vote.term.to_le_bytes());
            put(out, 32, &vote.voted_for.to_le_bytes());
        }
        put(out, 0, &group.group.0.to_le_bytes());
        put(out, 8, &group.replica.to_le_bytes());
        out[16] = flags;
    }
    out
}

pub fn read_state(payload: &[u8]) -> Option<Vec<GroupRecord>> {
    let count = u64_at(payload.get(..STATE_HEADER)?, 0);
    let groups = &payload[STATE_HEADER..];
    if groups.len() as u64 != count.checked_mul(STATE_GROUP as u64)? {
        return None;
    }
    let read = |from: &[u8]| {
        let flags = from[16];
        let position = |at: usize, flag: u8| {
            (flags & flag != 0).then(|| Position { term: u64_at(from, at), index: u64_at(from, at + 8) })
        };
        GroupRecord {
            group: GroupId(u64_at(from, 0)),
            replica: u64_at(from, 8),
            vote: (flags & HAS_VOTE != 0).then(|| VoteRecord {
                term: u64_at(from, 24),
                voted_for: u64_at(from, 32),
                committed: flags & COMMITTED != 0,
            }),
            purged: position(40, HAS_PURGED),
            last: position(56, HAS_LAST),
        }
    };
    Some(groups.chunks_exact(STATE_GROUP).map(read).collect())
}
