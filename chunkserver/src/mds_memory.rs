//! The newest state of an MDS that this chunkserver has obeyed: kept on disk before the orders are carried out, so that
//! an MDS whose directory was put back to an older copy is told, and not obeyed.
//!
//! ```text
//!  DIR/mds-obeyed   two slots of 256 bytes; the one with the higher count that is whole counts:
//!                   magic "EVMO", version u32, count u64, length u32, MdsState (protobuf), zeroes, crc32c u32
//! ```
//!
//! A slot is written over in place, the other one stays: it needs no room on a disk that is full, and a torn write
//! leaves what was there before. A file without a whole slot is one that remembers nothing.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use bytes::{Buf, BufMut};
use evolute_protocol::checksum::crc32c;
use evolute_protocol::rpc::MdsState;
use prost::Message;

const FILE: &str = "mds-obeyed";
const MAGIC: &[u8; 4] = b"EVMO";
const VERSION: u32 = 1;
const SLOT_BYTES: usize = 256;
const HEAD_BYTES: usize = 20;

/// What to make of orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orders {
    /// Of a state that is remembered, or older than it in the same reign: there is nothing to store.
    Obeyed,
    /// Of a newer one: to be stored first.
    Newer,
    /// Of an older one, or of one that says nothing about itself although others did.
    Refused,
}

/// Shared by the streams of this process.
#[derive(Debug)]
pub struct MdsMemory {
    file: File,
    known: Mutex<Known>,
}

#[derive(Debug, Clone, Default)]
struct Known {
    count: u64,
    state: MdsState,
}

impl MdsMemory {
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        let path = data_dir.join(FILE);
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
        let known = [0, 1].into_iter().filter_map(|slot| read(&file, slot)).max_by_key(|known| known.count);
        if file.metadata()?.len() < 2 * SLOT_BYTES as u64 {
            // Takes its place while there is some.
            file.write_all_at(&[0; 2 * SLOT_BYTES], 0)?;
            if let Some(known) = &known {
                file.write_all_at(&slot(known), at(known.count))?;
            }
            file.sync_all()?;
            File::open(data_dir)?.sync_all()?;
        }
        Ok(Self { file, known: Mutex::new(known.unwrap_or_default()) })
    }

    /// As it is told to an MDS; without a reign: nothing was ever obeyed.
    pub fn obeyed(&self) -> MdsState {
        self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).state.clone()
    }

    pub fn judge(&self, orders: Option<&MdsState>) -> Orders {
        judge(&self.obeyed(), orders)
    }

    /// Durable when it returns.
    pub fn store(&self, state: &MdsState) -> io::Result<()> {
        let mut known = self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let next = Known { count: known.count + 1, state: state.clone() };
        self.file.write_all_at(&slot(&next), at(next.count))?;
        self.file.sync_data()?;
        *known = next;
        Ok(())
    }
}

fn judge(obeyed: &MdsState, orders: Option<&MdsState>) -> Orders {
    match orders {
        None if obeyed.reign.is_empty() => Orders::Obeyed,
        None => Orders::Refused,
        Some(told) if told.reign == obeyed.reign && told.applied_index <= obeyed.applied_index => {
            Orders::Obeyed
        }
        Some(told) if told.reign == obeyed.reign || told.ordinal > obeyed.ordinal => Orders::Newer,
        Some(_) => Orders::Refused,
    }
}

fn at(count: u64) -> u64 {
    count % 2 * SLOT_BYTES as u64
}

fn slot(known: &Known) -> [u8; SLOT_BYTES] {
    let mut state = known.state.clone();
    // A name that is longer than ours is not one.
    state.reign.truncate(64);
    let body = state.encode_to_vec();
    let mut bytes = Vec::with_capacity(SLOT_BYTES);
    bytes.put_slice(MAGIC);
    bytes.put_u32_le(VERSION);
    bytes.put_u64_le(known.count);
    bytes.put_u32_le(u32::try_from(body.len()).unwrap_or(0));
    bytes.put_slice(&body);
    let mut slot = [0; SLOT_BYTES];
    slot[..bytes.len()].copy_from_slice(&bytes);
    let crc = crc32c(&slot[..SLOT_BYTES - 4]);
    slot[SLOT_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    slot
}

fn read(file: &File, which: u64) -> Option<Known> {
    let mut bytes = [0; SLOT_BYTES];
    file.read_exact_at(&mut bytes, which * SLOT_BYTES as u64).ok()?;
    let (body, mut crc) = bytes.split_at(SLOT_BYTES - 4);
    if crc.get_u32_le() != crc32c(body) || &body[..4] != MAGIC {
        return None;
    }
    let mut head = &body[4..HEAD_BYTES];
    if head.get_u32_le() != VERSION {
        return None;
    }
    let count = head.get_u64_le();
    let length = head.get_u32_le() as usize;
    let state = MdsState::decode(body.get(HEAD_BYTES..HEAD_BYTES + length)?).ok()?;
    Some(Known { count, state })
}

#[cfg(test)]
mod tests {
    use super::{Known, MdsMemory, Orders, SLOT_BYTES, judge, slot};
    use evolute_protocol::rpc::MdsState;

    fn state(reign: u8, ordinal: u64, applied_index: u64) -> MdsState {
        MdsState { reign: vec![reign; 16], ordinal, applied_index, volume: 7, ..MdsState::default() }
    }

    #[test]
    fn what_was_obeyed_is_remembered_and_a_torn_write_leaves_what_was_before() {
        let dir = tempfile::tempdir().expect("temp dir");
        let open = || MdsMemory::open(dir.path()).expect("opens");
        assert_eq!(open().obeyed(), MdsState::default());
        for index in 1..=5 {
            open().store(&state(1, 1, index)).expect("stored");
            assert_eq!(open().obeyed(), state(1, 1, index));
        }
        let file = dir.path().join("mds-obeyed");
        let whole = std::fs::read(&file).expect("read");
        assert_eq!(whole.len(), 2 * SLOT_BYTES);
        for damaged in SLOT_BYTES..2 * SLOT_BYTES {
            let mut bytes = whole.clone();
            bytes[damaged] ^= 0x10;
            std::fs::write(&file, &bytes).expect("written");
            assert_eq!(open().obeyed(), state(1, 1, 4), "the fifth is damaged at {damaged}");
        }
        for shorter in [0, 10, SLOT_BYTES, whole.len() - 1] {
            std::fs::write(&file, &whole[..shorter]).expect("written");
            let obeyed = open().obeyed();
            assert!(
                obeyed == MdsState::default() || obeyed == state(1, 1, 4),
                "cut to {shorter}: {obeyed:?}"
            );
            open().store(&state(2, 2, 9)).expect("stored");
            assert_eq!(open().obeyed(), state(2, 2, 9));
        }
    }

    /// Directories of this version have to be read by all later ones.
    #[test]
    fn the_bytes_of_a_slot_stay_as_they_are() {
        let known = Known {
            count: 3,
            state: MdsState {
                reign: vec![0xab; 16],
                ordinal: 4,
                applied_index: 300,
                chunkserver: 3,
                copyset: 6,
                replica: 18,
                volume: 2,
                attachment: 5,
            },
        };
        let bytes = slot(&known);
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let expected = concat!(
            "45564d4f",
            "01000000",
            "0300000000000000",
            "21000000",
            "0a10",
            "abababababababababababababababab",
            "1004",
            "18ac02",
            "2003",
            "2806",
            "3012",
            "3802",
            "4005"
        );
        assert_eq!(hex(&bytes[..20 + 33]), expected);
        assert!(bytes[20 + 33..SLOT_BYTES - 4].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn an_older_mds_is_not_obeyed() {
        let (nothing, obeyed) = (MdsState::default(), state(1, 5, 100));
        for (orders, expected) in [
            (Some(state(1, 5, 100)), Orders::Obeyed),
            (Some(state(1, 5, 101)), Orders::Newer),
            (Some(state(2, 6, 1)), Orders::Newer),
            (Some(state(2, 5, 200)), Orders::Refused),
            (Some(state(2, 4, 200)), Orders::Refused),
            (None, Orders::Refused),
        ] {
            assert_eq!(judge(&obeyed, orders.as_ref()), expected, "{orders:?}");
        }
        assert_eq!(judge(&nothing, None), Orders::Obeyed, "an MDS of a version that does not tell");
        assert_eq!(judge(&nothing, Some(&state(1, 1, 0))), Orders::Newer);
    }
}
