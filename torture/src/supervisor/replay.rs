//! What a disk holds after a power cut: its write log replayed up to a moment, minus what was never flushed.
//!
//! The log is of dm-log-writes' format, written by QEMU's `blklogwrites`:
//!
//! ```text
//!   sector 0   magic "rhswfsj" (u64)   version (u64)   entries (u64)   sector size (u32)
//!   sector 1…  entry: sector, sectors, flags, data length (u64 each), padded to a sector; then the data
//! ```
//!
//! Everything up to the last flush is kept. Of what came after it, each write is kept, dropped or torn at 4 KiB,
//! independently: any of it may have been in a cache when the lights went out.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use crate::random::Random;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
/// What a disk of today writes whole. XFS counts on it for its own blocks: torn at 512 bytes some images did not mount any
/// more, which says nothing about us. Tearing at 512 is for the simulated disks of `raft/` and `chunkserver/`.
const TORN_AT: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    /// On the disk, in bytes.
    at: u64,
    bytes: u64,
    flags: u64,
    /// Of the data, in the log.
    data_at: u64,
}

/// How one cut went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Cut {
    pub entries: u64,
    pub flushes: u64,
    pub after_last_flush: u64,
    pub dropped: u64,
    pub torn: u64,
}

/// Entries in the log by its head, which is kept up to date while it is written.
pub fn entries(log: &File) -> Result<u64> {
    Ok(head(log)?.0)
}

/// Writes after the last flush.
pub fn unflushed(log: &File) -> Result<u64> {
    let all = read(log)?;
    Ok(all.iter().rev().take_while(|entry| entry.flags & FLUSH == 0).count() as u64)
}

fn head(log: &File) -> Result<(u64, u64)> {
    let mut bytes = [0; 28];
    log.read_exact_at(&mut bytes, 0).context("the write log has no head")?;
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    ensure!(word(0) == MAGIC && word(8) == 1, "this is no write log");
    let sector = u32::from_le_bytes(bytes[24..28].try_into().expect("four bytes"));
    ensure!(sector >= 512, "a sector of {sector} bytes");
    Ok((word(16), sector.into()))
}

fn read(log: &File) -> Result<Vec<Entry>> {
    let (count, sector) = head(log)?;
    let mut entries = Vec::new();
    let mut at = sector;
    for _ in 0..count {
        let mut bytes = [0; 32];
        log.read_exact_at(&mut bytes, at).context("the write log ends in the middle of an entry")?;
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let (bytes, flags) = (word(8) * sector, word(16));
        entries.push(Entry { at: word(0) * sector, bytes, flags, data_at: at + sector });
        at += sector + if flags & DISCARD == 0 { bytes } else { 0 };
    }
    Ok(entries)
}

/// Brings `base`, which is as it was when the log began, to what a power cut after `marked` entries may leave; and
/// `disk`, which has everything, to the same.
pub fn cut(log: &File, marked: u64, base: &File, disk: &File, random: &mut Random) -> Result<Cut> {
    let all = read(log)?;
    let marked = usize::try_from(marked)?.min(all.len());
    let flushed = all[..marked].iter().rposition(|entry| entry.flags & FLUSH != 0).map_or(0, |at| at + 1);
    let mut cut = Cut {
        entries: marked as u64,
        flushes: all[..marked].iter().filter(|entry| entry.flags & FLUSH != 0).count() as u64,
        after_last_flush: (marked - flushed) as u64,
        ..Cut::default()
    };
    for entry in &all[..flushed] {
        apply(log, entry, base, |_| true)?;
    }
    for entry in &all[flushed..marked] {
        match if entry.flags & FUA != 0 { 0 } else { random.below(4) } {
            0 | 1 => apply(log, entry, base, |_| true)?,
            2 => cut.dropped += 1,
            _ => {
                cut.torn += 1;
                apply(log, entry, base, |_| random.chance(50))?;
            }
        }
    }
    for entry in &all[flushed..] {
        copy(base, disk, entry)?;
    }
    Ok(cut)
}

fn apply(log: &File, entry: &Entry, to: &File, mut keeps: impl FnMut(u64) -> bool) -> Result<()> {
    let mut data = vec![0; usize::try_from(entry.bytes)?];
    if entry.flags & DISCARD == 0 {
        log.read_exact_at(&mut data, entry.data_at)?;
    }
    for (at, sector) in (entry.at..).step_by(TORN_AT).zip(data.chunks(TORN_AT)) {
        if keeps(at) {
            to.write_all_at(sector, at)?;
        }
    }
    Ok(())
}

fn copy(from: &File, to: &File, entry: &Entry) -> Result<()> {
    let mut data = vec![0; usize::try_from(entry.bytes)?];
    from.read_exact_at(&mut data, entry.at)?;
    to.write_all_at(&data, entry.at)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Cut, DISCARD, FLUSH, MAGIC, cut, entries, unflushed};
    use crate::random::Random;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    const SECTOR: usize = 512;

    /// A log of (sector, content byte per sector, flags).
    fn log(writes: &[(u64, &[u8], u64)]) -> File {
        let mut bytes = vec![0; SECTOR];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8] = 1;
        bytes[16..24].copy_from_slice(&(writes.len() as u64).to_le_bytes());
        bytes[24..28].copy_from_slice(&512_u32.to_le_bytes());
        for (sector, content, flags) in writes {
            let mut entry = vec![0; SECTOR];
            entry[..8].copy_from_slice(&sector.to_le_bytes());
            entry[8..16].copy_from_slice(&(content.len() as u64).to_le_bytes());
            entry[16..24].copy_from_slice(&flags.to_le_bytes());
            bytes.extend(entry);
            if flags & DISCARD == 0 {
                content.iter().for_each(|&byte| bytes.extend([byte; SECTOR]));
            }
        }
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(&bytes, 0).expect("room");
        file
    }

    fn sectors(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; 64 * SECTOR];
        file.read_exact_at(&mut bytes, 0).expect("64 sectors");
        bytes.chunks(SECTOR).map(|sector| sector[0]).collect()
    }

    fn image() -> File {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(64 * 512).expect("room");
        file
    }

    #[test]
    fn what_was_flushed_is_kept_and_what_was_not_may_be_lost_or_torn() {
        let log = log(&[
            (0, &[1, 1], 0),
            (1, &[2, 2], 0),
            (0, &[], FLUSH),
            (8, &[3; 32], 0),
            (60, &[9], 0),
            (0, &[8], 0),
        ]);
        assert_eq!((entries(&log).expect("a log"), unflushed(&log).expect("a log")), (6, 3));
        let (mut lost, mut torn, mut whole) = (0, 0, 0);
        for seed in 0..200 {
            let (base, disk) = (image(), image());
            // The live disk has everything, what came after the mark included.
            disk.write_all_at(&[8; SECTOR], 0).expect("room");
            disk.write_all_at(&[1; SECTOR], 512).expect("room");
            disk.write_all_at(&[2; 2 * SECTOR], 512).expect("room");
            disk.write_all_at(&[3; 32 * SECTOR], 8 * 512).expect("room");
            disk.write_all_at(&[9; SECTOR], 60 * 512).expect("room");
            let cut = cut(&log, 5, &base, &disk, &mut Random::new(seed)).expect("a log");
            assert_eq!((cut.entries, cut.flushes, cut.after_last_flush), (5, 1, 2));
            let found = sectors(&base);
            assert_eq!(found, sectors(&disk), "both are the same disk");
            assert_eq!(found[..2], [1, 2], "flushed, and the write after the mark never was");
            assert!(
                found[8..40].chunks(8).all(|block| block.iter().all(|&byte| byte == block[0])),
                "4 KiB is whole"
            );
            match found[8..40].iter().filter(|&&byte| byte == 3).count() {
                0 => lost += 1,
                32 => whole += 1,
                _ => torn += 1,
            }
        }
        assert!(lost > 20 && torn > 20 && whole > 20, "{lost} {torn} {whole}");
    }

    #[test]
    fn a_log_without_a_flush_may_lose_everything() {
        let log = log(&[(0, &[1], 0), (1, &[], DISCARD)]);
        let all: Vec<Cut> = (0..40)
            .map(|seed| cut(&log, 2, &image(), &image(), &mut Random::new(seed)).expect("a log"))
            .collect();
        assert!(all.iter().any(|cut| cut.dropped == 2));
        assert!(all.iter().any(|cut| cut.dropped + cut.torn == 0));
    }
}
