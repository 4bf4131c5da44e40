//! What a directory remembers of its own past: how often it was started, and which of its replicas have forgotten
//! something and may never vote again.
//!
//! ```text
//!  start ──▶ starts + this one, synced ──▶ "these were my starts" ──▶ control plane: is the newest it knows among them?
//! ```
//!
//! An end in order is counted like a start, so that a copy that was made while the process ran lacks that.
//!
//! A directory that is put back to an older copy of itself, or that is a copy, lacks the newest start. It has forgotten
//! votes and entries that others count on. (A number alone would not tell: a copy can be started often.)
//!
//! What always holds: a start is durable here before anybody hears of it; a replica's log is begun, durably, before
//! this says so, and this says so before the replica's first vote.

use bytes::{Buf, BufMut, Bytes};
use evolute_protocol::id::{CopysetId, ReplicaId};

/// Starts kept that no control plane has confirmed yet. More than that while none answers, and the directory is taken
/// for a copy: then its replicas are made anew, which is safe.
const STARTS_MAX: usize = 1024;
/// Of one start's random name.
const START_BYTES_MAX: usize = 64;

const VALUE_VERSION: u8 = 1;

/// One start, or end in order, of a process that served this directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// Counted from 1.
    pub number: u64,
    /// The process's random name.
    pub instance: Bytes,
}

/// The starts since the last one that the control plane confirmed, which is the first, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Starts {
    pub all: Vec<Start>,
    /// The last one was refused, because another process was this chunkserver: then this directory may be a copy that
    /// somebody started beside the original.
    pub beside: bool,
}

impl Starts {
    pub fn begin(&mut self, instance: Bytes) {
        let number = self.all.last().map_or(0, |start| start.number).saturating_add(1);
        self.all.push(Start { number, instance });
        if self.all.len() > STARTS_MAX {
            self.all.remove(1);
        }
    }

    /// The newest is known to be the newest: the ones before it will not be asked for.
    pub fn confirm(&mut self) {
        self.all.drain(..self.all.len().saturating_sub(1));
        self.beside = false;
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut raw = vec![VALUE_VERSION, u8::from(self.beside)];
        for start in &self.all {
            raw.put_u64_le(start.number);
            raw.put_u8(u8::try_from(start.instance.len()).expect("checked when it was made"));
            raw.put_slice(&start.instance);
        }
        raw
    }

    pub fn decode(mut raw: &[u8]) -> Option<Self> {
        if raw.try_get_u8().ok()? != VALUE_VERSION {
            return None;
        }
        let beside = match raw.try_get_u8().ok()? {
            0 => false,
            1 => true,
            _ => return None,
        };
        let mut all = Vec::new();
        while raw.has_remaining() {
            let number = raw.try_get_u64_le().ok()?;
            let length = usize::from(raw.try_get_u8().ok()?);
            let (instance, rest) = raw.split_at_checked(length).filter(|_| length <= START_BYTES_MAX)?;
            raw = rest;
            all.push(Start { number, instance: Bytes::copy_from_slice(instance) });
        }
        Some(Self { all, beside })
    }
}

/// What is known of a replica beside its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    pub replica: ReplicaId,
    /// It has a log, durably: should there be none later, it was lost, and with it this replica's votes.
    pub log_begun: bool,
    /// It was put back to an older copy of itself and has forgotten votes and entries: it never votes again, unless an
    /// operator says that this copy is what counts.
    pub put_back: bool,
}

const LOG_BEGUN: u8 = 1;
const PUT_BACK: u8 = 2;

impl Standing {
    pub fn encode(self) -> Vec<u8> {
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        let mut raw = vec![VALUE_VERSION, flag(self.log_begun, LOG_BEGUN) | flag(self.put_back, PUT_BACK)];
        raw.put_u64_le(self.replica.0);
        raw
    }

    pub fn decode(key: &[u8], mut raw: &[u8]) -> Option<(CopysetId, Self)> {
        let copyset = CopysetId(u32::from_be_bytes(key.get(1..)?.try_into().ok()?));
        let known = raw.try_get_u8().ok()? == VALUE_VERSION;
        let flags = raw.try_get_u8().ok().filter(|flags| flags & !(LOG_BEGUN | PUT_BACK) == 0)?;
        let replica = ReplicaId(raw.try_get_u64_le().ok()?);
        let standing = Self { replica, log_begun: flags & LOG_BEGUN != 0, put_back: flags & PUT_BACK != 0 };
        (known && raw.is_empty()).then_some((copyset, standing))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use evolute_protocol::id::{CopysetId, ReplicaId};

    use super::{STARTS_MAX, Standing, Starts};

    fn starts(count: u8) -> Starts {
        let mut starts = Starts::default();
        (1..=count).for_each(|n| starts.begin(Bytes::copy_from_slice(&[n; 16])));
        starts
    }

    #[test]
    fn records_are_those_of_the_first_release_that_had_them() {
        let hex = |raw: Vec<u8>| raw.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let mut started = starts(2);
        started.all.iter_mut().for_each(|start| start.instance.truncate(2));
        let standing = Standing { replica: ReplicaId(7), log_begun: true, put_back: true };
        assert_eq!(hex(started.encode()), "01000100000000000000020101020000000000000002".to_owned() + "0202");
        assert_eq!(hex(standing.encode()), "01030700000000000000");
    }

    #[test]
    fn they_survive_their_bytes_and_truncated_ones_are_refused() {
        let mut started = starts(3);
        started.beside = true;
        let raw = started.encode();
        assert_eq!(Starts::decode(&raw), Some(started));
        assert_eq!(Starts::decode(&raw[..raw.len() - 1]), None);
        let standing = Standing { replica: ReplicaId(7), log_begun: true, put_back: false };
        let (key, raw) = ([b'l', 0, 0, 0, 3], standing.encode());
        assert_eq!(Standing::decode(&key, &raw), Some((CopysetId(3), standing)));
        (0..raw.len()).for_each(|end| assert_eq!(Standing::decode(&key, &raw[..end]), None, "{end}"));
    }

    #[test]
    fn starts_are_counted_on_and_kept_until_the_newest_is_confirmed() {
        let mut started = starts(5);
        assert_eq!(started.all.iter().map(|start| start.number).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        started.confirm();
        assert_eq!(started.all.len(), 1);
        for _ in 0..2 * STARTS_MAX {
            started.begin(Bytes::from_static(b"again"));
        }
        assert_eq!((started.all.len(), started.all[0].number), (STARTS_MAX, 5));
        assert_eq!(started.all.last().map(|start| start.number), Some(5 + 2 * STARTS_MAX as u64));
    }
}
