//! Read what is in the log and not applied yet, where the log proves that it is committed.
//!
//! A follower hears that an entry is committed only with the next message of its leader. When the leader dies before
//! that, its followers have its last entries and do not know. Who asks knows: some leader answered for entry I in term T.
//! Every leader of T or later has that entry, so a log whose last entry was written by one of them, and which reaches I,
//! has everything up to I as it is committed. (The whole argument: `docs/semantics.md`, "Reads".)
//!
//! ```text
//!  store, as applied ──read──▶ data ──▶ what the entries (applied, I] make of it ──▶ answer
//!                     Writers, a copy ──┘ the same verdicts as in apply.rs
//! ```
//!
//! What always holds: nothing is applied here, and neither the replica's state nor raft hears of it. Whoever names an
//! entry that is not committed spoils their own read, of their own volume, and nothing else.

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use evolute_protocol::checksum::{Checksums, crc32c, pieces};
use evolute_protocol::id::ChunkKey;
use evolute_protocol::wire::reply::{Freshness, Refusal, Reply};
use evolute_protocol::wire::request::{ChunkRange, Read, ReadAtLeast};
use smallvec::smallvec;

use super::Copyset;
use super::apply::refusal_of;
use super::command::{self, Change};
use super::fence::{Verdict, Writers};
use super::read::data_reply;
use crate::chunk_store::ReadData;

/// A follower lacks the entries in flight when its leader died: two (`write.rs`), and as many of which it had not heard
/// the end. One that lacks sixteen times as much is catching up, and does better to go on with that.
const ENTRIES_MAX: u64 = 64;
/// Four entries of the longest, which are a little over 2 MiB.
const BYTES_MAX: u64 = 10 << 20;

impl Copyset {
    /// Whether the log has what is asked for, as it is committed.
    pub(super) fn may_read_ahead(&self, ask: &ReadAtLeast) -> bool {
        let applied = self.state.borrow().applied().map_or(0, |at| at.index);
        let proven =
            self.group.last_logged().is_some_and(|last| last.term >= ask.term && last.index >= ask.index);
        let near = (1..=ENTRIES_MAX).contains(&ask.index.saturating_sub(applied));
        proven && near && self.group.consistent_from().is_none()
    }

    /// Answers as of entry `ask.index`. `None`: it was passed meanwhile.
    ///
    /// Entries up to there may be applied while the data is read. That does no harm: whatever they change of these bytes
    /// is laid over them again.
    pub(super) async fn read_ahead(self: &Rc<Self>, ask: &ReadAtLeast) -> Option<Reply> {
        let ReadAtLeast { read, index, term } = *ask;
        let Read { chunk, epoch, range } = read;
        let (writers, applied) = {
            let state = self.state.borrow();
            let writers = state.writers().get(&chunk.volume).cloned().unwrap_or_default();
            (writers, state.applied().map_or(0, |at| at.index))
        };
        let behind = Reply::Refused(Refusal::Behind { applied: writers.last_index() });
        let Some(commands) = self.group.commands(applied + 1, index, BYTES_MAX).await else {
            return if self.has_passed(index) { None } else { Some(behind) };
        };
        let mut ahead = Ahead { chunk, range, writers, laid: Vec::new() };
        for (at, command) in commands {
            // A checksum of the log covers them, and a leader of a version we know made them (`apply.rs`). It is not for
            // a reader to end a replica.
            let Ok(changes) = command::decode(command) else { return Some(behind) };
            for change in &changes {
                if ahead.take(at.index, change).is_err() {
                    return Some(behind);
                }
            }
        }
        match ahead.writers.judge_epoch(epoch) {
            Verdict::Apply => {}
            // Its own fence may be on the way here.
            Verdict::NotFenced => return Some(behind),
            verdict => return refusal_of(verdict).map(Reply::Refused),
        }
        let tried = self.store.borrow().try_read(chunk, range.offset(), range.length());
        let data = match tried {
            Ok(Some(data)) => Ok(data),
            _ => {
                let reading = self.store.borrow().read(chunk, range.offset(), range.length());
                reading.await
            }
        };
        let data = match data {
            Ok(data) => data,
            Err(error) => return Some(self.repair_later(&read, &error)),
        };
        if self.group.consistent_from().is_some() {
            return Some(behind);
        }
        if self.has_passed(index) {
            return None;
        }
        let fresh = Freshness { term, index: ahead.writers.last_index() };
        Some(data_reply(Ok((fresh, fresh.index)), ahead.lay_over(data)))
    }

    /// More than the entry at `index` is applied, or just that.
    fn has_passed(&self, index: u64) -> bool {
        self.state.borrow().applied().is_some_and(|at| at.index >= index)
    }
}

/// What some entries make of a range of a chunk.
struct Ahead {
    chunk: ChunkKey,
    range: ChunkRange,
    /// Of the chunk's volume, as of the last entry taken.
    writers: Writers,
    /// In the order in which it is to be laid. `None`: zeroes.
    laid: Vec<(ChunkRange, Option<Bytes>)>,
}

/// The log's bytes are not those that the client made checksums of.
struct Damaged;

impl Ahead {
    fn take(&mut self, index: u64, change: &Change) -> Result<(), Damaged> {
        if change.volume() != self.chunk.volume || self.writers.take(index, change) != Verdict::Apply {
            return Ok(());
        }
        let (chunk, range, data) = match change {
            Change::Write(write) => (write.chunk, write.range, Some(&write.data)),
            Change::Discard(discard) => (discard.chunk, discard.range, None),
            Change::WriteZeroes(zeroes) => (zeroes.chunk, zeroes.range, None),
            // The epoch says the rest.
            Change::Fence(_) | Change::DropVolume(_) | Change::Unfence(_) => return Ok(()),
        };
        if chunk != self.chunk || !range.overlaps(self.range) {
            return Ok(());
        }
        if let Change::Write(write) = change
            && write.damaged_piece().is_some()
        {
            return Err(Damaged);
        }
        self.laid.push((range, data.cloned()));
        Ok(())
    }

    /// Pieces that nothing is laid over stay as they were read, with their checksums.
    fn lay_over(self, read: ReadData) -> ReadData {
        if self.laid.is_empty() {
            return read;
        }
        let mut bytes = BytesMut::with_capacity(self.range.length() as usize);
        read.data.iter().for_each(|part| bytes.extend_from_slice(part));
        let start = self.range.offset();
        let whole: Vec<_> = pieces(u64::from(start), bytes.len()).collect();
        // A piece that was damaged where it lay stays so: a new checksum would vouch for it.
        let damaged: Vec<_> = whole
            .iter()
            .zip(&read.checksums)
            .map(|(piece, crc)| crc32c(&bytes[piece.clone()]) != *crc)
            .collect();
        for (range, data) in &self.laid {
            let from = range.offset().max(start);
            let to = (range.offset() + range.length()).min(start + self.range.length());
            let into = &mut bytes[(from - start) as usize..(to - start) as usize];
            match data {
                None => into.fill(0),
                Some(data) => {
                    let skipped = (from - range.offset()) as usize;
                    into.copy_from_slice(&data[skipped..skipped + into.len()]);
                }
            }
        }
        let checksums: Checksums = whole
            .into_iter()
            .zip(damaged)
            .map(|(piece, damaged)| {
                let crc = crc32c(&bytes[piece]);
                if damaged { !crc } else { crc }
            })
            .collect();
        ReadData { data: smallvec![bytes.freeze()], checksums }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use evolute_protocol::checksum::{checksums, first_mismatch};
    use evolute_protocol::epoch::Epoch;
    use evolute_protocol::id::{ChunkIndex, ChunkKey, VolumeId};
    use evolute_protocol::wire::request::{ChangeTag, ChunkRange, Discard, Lane, Sequence, Write};
    use proptest::prelude::{ProptestConfig, Strategy, prop, prop_assert, prop_assert_eq, proptest};
    use smallvec::smallvec;

    use super::Ahead;
    use crate::chunk_store::ReadData;
    use crate::copyset::command::Change;
    use crate::copyset::fence::{Verdict, Writers};

    const EPOCH: Epoch = Epoch { attachment: 1, incarnation: 0 };
    const CHUNK: ChunkKey = ChunkKey { volume: VolumeId(5), index: ChunkIndex(3) };
    const SECTORS: u32 = 40;

    fn sectors(first: u32, count: u32) -> ChunkRange {
        ChunkRange::new(first * 512, count * 512).expect("inside")
    }

    /// What a change leaves: each sector is another one, or all are zeroes.
    fn pattern(first: u32, count: u32, byte: u8) -> Vec<u8> {
        let sector = |n: u32| [if byte == 0 { 0 } else { byte * 40 + n.to_le_bytes()[0] }; 512];
        (first..first + count).flat_map(sector).collect()
    }

    fn change(first: u32, count: u32, byte: u8, sequence: u64) -> Change {
        let tag = ChangeTag { epoch: EPOCH, lane: Lane(0), sequence: Sequence(sequence), floor: Sequence(1) };
        let range = sectors(first, count);
        if byte == 0 {
            return Change::Discard(Discard { chunk: CHUNK, tag, range });
        }
        let data = Bytes::from(pattern(first, count, byte));
        let checksums = checksums(u64::from(range.offset()), &data);
        Change::Write(Write { chunk: CHUNK, tag, range, checksums, data })
    }

    fn ahead(range: ChunkRange, writers: Writers) -> Ahead {
        Ahead { chunk: CHUNK, range, writers, laid: Vec::new() }
    }

    fn read(bytes: &[u8], range: ChunkRange) -> ReadData {
        let end = (range.offset() + range.length()) as usize;
        let data = Bytes::copy_from_slice(&bytes[range.offset() as usize..end]);
        // In two parts, as a store may give it.
        let checksums = checksums(u64::from(range.offset()), &data);
        ReadData { data: smallvec![data.slice(..512), data.slice(512..)], checksums }
    }

    fn changes() -> impl Strategy<Value = Vec<(u32, u32, u8, u64)>> {
        let change = (0..SECTORS).prop_flat_map(|first| (prop::strategy::Just(first), 1..=SECTORS - first));
        // Few sequences, so that some come twice.
        prop::collection::vec((change, 0u8..5, 1u64..12).prop_map(|((a, b), c, d)| (a, b, c, d)), 0..16)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        /// However far a replica has applied, and however far it comes while it is read.
        #[test]
        fn what_is_laid_over_is_what_applying_makes_of_it(
            changes in changes(), applied in 0usize..17, more in 0usize..17, first in 0..SECTORS - 2, count in 2..SECTORS,
        ) {
            let range = sectors(first, count.min(SECTORS - first));
            let applied = applied.min(changes.len());
            let more = (applied + more).min(changes.len());
            let mut writers = Writers::default();
            writers.fence(EPOCH);
            let mut bytes = vec![0; SECTORS as usize * 512];
            let (mut found, mut known) = (bytes.clone(), writers.clone());
            for (n, (first, count, byte, sequence)) in changes.iter().copied().enumerate() {
                if writers.take(n as u64 + 1, &change(first, count, byte, sequence)) == Verdict::Apply {
                    let into = &mut bytes[first as usize * 512..(first + count) as usize * 512];
                    into.copy_from_slice(&pattern(first, count, byte));
                }
                if n + 1 == applied { known = writers.clone(); }
                if n + 1 == more { found = bytes.clone(); }
            }
            let mut ahead = ahead(range, known);
            for (n, (first, count, byte, sequence)) in changes.into_iter().enumerate().skip(applied) {
                prop_assert!(ahead.take(n as u64 + 1, &change(first, count, byte, sequence)).is_ok());
            }
            prop_assert_eq!(&ahead.writers, &writers);
            let laid = ahead.lay_over(read(&found, range));
            let data = Bytes::from(laid.data.concat());
            prop_assert!(data == read(&bytes, range).data.concat());
            prop_assert_eq!(first_mismatch(u64::from(range.offset()), &data, &laid.checksums), None);
        }
    }

    #[test]
    fn what_was_damaged_where_it_lay_is_not_vouched_for() {
        let mut stored = read(&[7; 8192], sectors(0, 16));
        stored.checksums[0] ^= 1;
        let mut writers = Writers::default();
        writers.fence(EPOCH);
        let mut ahead = ahead(sectors(0, 16), writers);
        assert!(ahead.take(1, &change(1, 1, 4, 1)).is_ok());
        let laid = ahead.lay_over(stored);
        assert_eq!(first_mismatch(0, &Bytes::from(laid.data.concat()), &laid.checksums), Some(0));
        assert_eq!(laid.checksums[1], checksums(0, &[7; 4096])[0]);
    }

    #[test]
    fn what_was_damaged_in_the_log_is_not_shown() {
        let mut writers = Writers::default();
        writers.fence(EPOCH);
        let mut ahead = ahead(sectors(0, 8), writers);
        let Change::Write(mut write) = change(0, 8, 4, 1) else { unreachable!("it is one") };
        write.checksums[0] ^= 1;
        assert!(ahead.take(1, &Change::Write(write)).is_err());
    }
}
