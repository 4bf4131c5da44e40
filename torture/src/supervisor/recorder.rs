//! Changes that went by, kept to be said again once newer ones of the same sectors were acknowledged.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Kept at a time, each at most a frame: 64 MiB at worst, 3 MiB with the usual load.
const KEPT_MAX: usize = 64;
/// Changes whose answers are waited for; a connection that ends leaves some.
const UNDER_WAY_MAX: usize = 4096;
const WRITE: u8 = 2;
const DISCARD: u8 = 4;
const WRITE_ZEROES: u8 = 5;

/// Which bytes: offsets of `docs/wire.md`, a frame's header and then chunk and range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    volume: u64,
    chunk: u32,
    from: u32,
    until: u32,
}

impl Change {
    fn of(frame: &[u8]) -> Option<Self> {
        if !matches!(frame.get(4), Some(&(WRITE | DISCARD | WRITE_ZEROES))) || frame.len() < 60 {
            return None;
        }
        let u32_at = |at: usize| u32::from_le_bytes(frame[at..at + 4].try_into().expect("four bytes"));
        let volume = u64::from_le_bytes(frame[32..40].try_into().expect("eight bytes"));
        let (chunk, from) = (u32_at(48), u32_at(52));
        Some(Self { volume, chunk, from, until: from.checked_add(u32_at(56))? })
    }

    /// The number a frame, either way, has in its connection.
    pub fn request_of(frame: &[u8]) -> u64 {
        u64::from_le_bytes(frame[16..24].try_into().expect("eight bytes"))
    }

    fn meets(self, other: Self) -> bool {
        (self.volume, self.chunk) == (other.volume, other.chunk)
            && self.from < other.until
            && other.from < self.until
    }
}

#[derive(Debug)]
pub struct Kept {
    /// Where it went the first time.
    pub server: usize,
    pub frame: Vec<u8>,
    change: Change,
    name: (u64, u64),
    /// On the recorder's clock.
    answered: Option<u64>,
    overtaken: Option<Instant>,
}

#[derive(Debug, Default)]
pub struct Recorder {
    /// One more for everything that goes by.
    clock: u64,
    under_way: HashMap<(u64, u64), (Change, u64)>,
    kept: Vec<Kept>,
}

impl Recorder {
    pub fn sent(&mut self, connection: u64, server: usize, frame: &[u8], keep: bool) {
        let Some(change) = Change::of(frame) else { return };
        self.clock += 1;
        let name = (connection, Change::request_of(frame));
        if self.under_way.len() >= UNDER_WAY_MAX {
            self.under_way.clear();
        }
        self.under_way.insert(name, (change, self.clock));
        if keep && self.kept.len() < KEPT_MAX {
            let frame = frame.to_vec();
            self.kept.push(Kept { server, frame, change, name, answered: None, overtaken: None });
        }
    }

    /// What was sent after another was answered, and is answered itself, has overtaken it.
    pub fn done(&mut self, connection: u64, request: u64) {
        self.clock += 1;
        let name = (connection, request);
        let Some((change, sent)) = self.under_way.remove(&name) else { return };
        for kept in &mut self.kept {
            if kept.name == name {
                kept.answered = Some(self.clock);
            } else if kept.overtaken.is_none()
                && kept.answered.is_some_and(|answered| answered < sent)
                && kept.change.meets(change)
            {
                kept.overtaken = Some(Instant::now());
            }
        }
    }

    /// One that was overtaken so long ago.
    pub fn take_overtaken(&mut self, ago: Duration) -> Option<Kept> {
        let due = |kept: &Kept| kept.overtaken.is_some_and(|at| at.elapsed() >= ago);
        let at = self.kept.iter().position(due)?;
        Some(self.kept.swap_remove(at))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Recorder, WRITE};

    fn write(request: u64, from: u32, bytes: u32) -> Vec<u8> {
        let mut frame = vec![0; 78];
        frame[4] = WRITE;
        frame[16..24].copy_from_slice(&request.to_le_bytes());
        frame[52..56].copy_from_slice(&from.to_le_bytes());
        frame[56..60].copy_from_slice(&bytes.to_le_bytes());
        frame
    }

    #[test]
    fn only_what_a_newer_acknowledged_change_covers_is_said_again() {
        let mut recorder = Recorder::default();
        recorder.sent(1, 0, &write(1, 0, 4096), true);
        recorder.sent(1, 0, &write(2, 2048, 512), false);
        recorder.done(1, 1);
        recorder.done(1, 2);
        assert!(recorder.take_overtaken(Duration::ZERO).is_none(), "they were under way together");
        recorder.sent(2, 1, &write(1, 4096, 512), false);
        recorder.done(2, 1);
        assert!(recorder.take_overtaken(Duration::ZERO).is_none(), "of other sectors");
        recorder.sent(2, 1, &write(2, 3584, 1024), false);
        assert!(recorder.take_overtaken(Duration::ZERO).is_none(), "not acknowledged");
        recorder.done(2, 2);
        let kept = recorder.take_overtaken(Duration::ZERO).expect("overtaken");
        assert_eq!((kept.server, kept.frame), (0, write(1, 0, 4096)));
        assert!(recorder.take_overtaken(Duration::ZERO).is_none());
    }
}
