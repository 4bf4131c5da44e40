//! What is written: every sector names the volume, place and write it belongs to, so that a read can be judged.
//!
//! ```text
//!   0 magic "EvBlkChk"   8 volume   16 sector number   24 writer (queue)   28 epoch (connections made before)
//!  32 op                40 crc32c of all else          44 zero             48 filler, a function of (op, sector)
//! ```
//! All little-endian. Torn, misdirected, foreign and rotten sectors are told apart at once; which of the writes
//! a sound sector may still show is the business of [`crate::register`].

use crate::random::Random;

pub const SECTOR_BYTES: usize = 512;
const MAGIC: u64 = u64::from_le_bytes(*b"EvBlkChk");
const VOLUME_AT: usize = 8;
const SECTOR_AT: usize = 16;
const WRITER_AT: usize = 24;
const EPOCH_AT: usize = 28;
const OP_AT: usize = 32;
const CRC_AT: usize = 40;
const FILLER_AT: usize = 48;

/// The number of an operation, unique in a run; 0 stands for zeroes.
pub type OpId = u64;
/// What a sector of zeroes shows.
pub const ZEROES: OpId = 0;

/// What all sectors of one write have in common.
#[derive(Debug, Clone, Copy)]
pub struct Stamp {
    pub volume: u64,
    pub writer: u32,
    pub epoch: u32,
    pub op: OpId,
}

/// Fills whole sectors from `first` on.
pub fn fill(buffer: &mut [u8], stamp: Stamp, first: u64) {
    for (sector, bytes) in (first..).zip(buffer.chunks_exact_mut(SECTOR_BYTES)) {
        bytes[..VOLUME_AT].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[VOLUME_AT..SECTOR_AT].copy_from_slice(&stamp.volume.to_le_bytes());
        bytes[SECTOR_AT..WRITER_AT].copy_from_slice(&sector.to_le_bytes());
        bytes[WRITER_AT..EPOCH_AT].copy_from_slice(&stamp.writer.to_le_bytes());
        bytes[EPOCH_AT..OP_AT].copy_from_slice(&stamp.epoch.to_le_bytes());
        bytes[OP_AT..CRC_AT].copy_from_slice(&stamp.op.to_le_bytes());
        bytes[CRC_AT..FILLER_AT].fill(0);
        let mut filler = Random::new(stamp.op ^ sector.rotate_left(40));
        for word in bytes[FILLER_AT..].chunks_exact_mut(8) {
            word.copy_from_slice(&filler.draw().to_le_bytes());
        }
        let crc = crc32c(bytes);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// A sector that no write of ours can have left there, whatever the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Damage {
    #[error("neither zeroes nor anything we wrote")]
    Garbage,
    #[error("torn or rotten: it begins as write {op} of sector {at}, and its checksum does not hold")]
    Torn { op: OpId, at: u64 },
    #[error("misdirected: it is write {op} of sector {at}")]
    Misdirected { op: OpId, at: u64 },
    #[error("of another volume or an earlier run ({volume:#x})")]
    Foreign { volume: u64 },
}

/// Which write this sector shows.
pub fn read(bytes: &[u8], volume: u64, sector: u64) -> Result<OpId, Damage> {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes of a sector"));
    if word(0) != MAGIC {
        return if bytes.iter().all(|&b| b == 0) { Ok(ZEROES) } else { Err(Damage::Garbage) };
    }
    let (op, at) = (word(OP_AT), word(SECTOR_AT));
    let written = u32::from_le_bytes(bytes[CRC_AT..CRC_AT + 4].try_into().expect("four bytes of a sector"));
    let mut copy = [0; SECTOR_BYTES];
    copy.copy_from_slice(bytes);
    copy[CRC_AT..CRC_AT + 4].fill(0);
    if crc32c(&copy) != written {
        return Err(Damage::Torn { op, at });
    }
    if word(VOLUME_AT) != volume {
        return Err(Damage::Foreign { volume: word(VOLUME_AT) });
    }
    if at != sector {
        return Err(Damage::Misdirected { op, at });
    }
    Ok(op)
}

fn crc32c(bytes: &[u8]) -> u32 {
    let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes);
    u32::try_from(sum).expect("crc32c has 32 bits")
}

#[cfg(test)]
mod tests {
    use super::{Damage, SECTOR_BYTES, Stamp, ZEROES, fill, read};

    fn written(op: u64, first: u64) -> Vec<u8> {
        let mut bytes = vec![0; 4 * SECTOR_BYTES];
        fill(&mut bytes, Stamp { volume: 7, writer: 1, epoch: 2, op }, first);
        bytes
    }

    #[test]
    fn every_sector_names_its_write_wherever_the_read_begins() {
        let bytes = written(9, 100);
        for (i, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
            assert_eq!(read(sector, 7, 100 + i as u64), Ok(9));
        }
        assert_eq!(read(&[0; SECTOR_BYTES], 7, 3), Ok(ZEROES));
    }

    #[test]
    fn each_kind_of_damage_is_told_apart() {
        let (old, new) = (written(8, 100), written(9, 100));
        let mut torn = new[..SECTOR_BYTES].to_vec();
        torn[256..].copy_from_slice(&old[256..SECTOR_BYTES]);
        assert_eq!(read(&torn, 7, 100), Err(Damage::Torn { op: 9, at: 100 }));
        for bit in 0..SECTOR_BYTES * 8 {
            let mut rotten = new[..SECTOR_BYTES].to_vec();
            rotten[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&rotten, 7, 100).is_err(), "bit {bit}");
        }
        assert_eq!(read(&new[..SECTOR_BYTES], 7, 101), Err(Damage::Misdirected { op: 9, at: 100 }));
        assert_eq!(read(&new[..SECTOR_BYTES], 6, 100), Err(Damage::Foreign { volume: 7 }));
        assert_eq!(read(&[1; SECTOR_BYTES], 7, 100), Err(Damage::Garbage));
    }
}
