//! A command: what an owner proposes, as a rope whose parts move by reference from socket to log to peers.
//!
//! The parts are how the bytes happen to lie in memory; only their concatenation means anything. A command that came
//! over the wire or from a file is one part.

use std::fmt;

use bytes::{Bytes, BytesMut};
use smallvec::{SmallVec, smallvec};

/// Bytes to be applied by the owner's state machine on every replica.
#[derive(Clone, Default)]
pub struct Command(pub SmallVec<[Bytes; 4]>);

impl Command {
    /// Bytes in all parts together.
    pub fn len(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Bytes::is_empty)
    }

    /// Reads the command from its front.
    pub fn into_cursor(self) -> Cursor {
        let left = self.len();
        Cursor { parts: self.0, next: 0, left }
    }
}

impl From<Bytes> for Command {
    fn from(bytes: Bytes) -> Self {
        Self(smallvec![bytes])
    }
}

impl From<Vec<u8>> for Command {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::from(bytes).into()
    }
}

impl FromIterator<Bytes> for Command {
    fn from_iter<I: IntoIterator<Item = Bytes>>(parts: I) -> Self {
        Self(parts.into_iter().collect())
    }
}

/// Two commands are equal when their bytes are, however they are cut.
impl PartialEq for Command {
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().flat_map(|part| part.iter()).eq(other.0.iter().flat_map(|part| part.iter()))
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Command({} bytes)", self.len())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Takes a command apart from its front.
#[derive(Debug)]
pub struct Cursor {
    parts: SmallVec<[Bytes; 4]>,
    next: usize,
    left: usize,
}

impl Cursor {
    /// Bytes not taken yet.
    pub fn remaining(&self) -> usize {
        self.left
    }

    /// The next `n` bytes, or `None` when fewer are left (and then nothing is taken). Copied only when they span parts.
    pub fn take(&mut self, n: usize) -> Option<Bytes> {
        if n > self.left {
            return None;
        }
        self.left -= n;
        if n == 0 {
            return Some(Bytes::new());
        }
        self.skip_taken();
        let part = &mut self.parts[self.next];
        if part.len() >= n {
            return Some(part.split_to(n));
        }
        let mut joined = BytesMut::with_capacity(n);
        while joined.len() < n {
            self.skip_taken();
            let part = &mut self.parts[self.next];
            let taken = part.split_to(part.len().min(n - joined.len()));
            joined.extend_from_slice(&taken);
        }
        Some(joined.freeze())
    }

    fn skip_taken(&mut self) {
        while self.parts[self.next].is_empty() {
            self.next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::Command;

    #[test]
    fn a_cursor_gives_the_same_bytes_however_the_command_is_cut() {
        let cuts: [&[&'static [u8]]; 4] = [
            &[b"abcdefgh"],
            &[b"", b"abc", b"", b"defgh", b""],
            &[b"a", b"b", b"cdefg", b"h"],
            &[b"abcd", b"efgh"],
        ];
        for parts in cuts {
            let command: Command = parts.iter().map(|part| Bytes::from_static(part)).collect();
            assert_eq!(command.len(), 8);
            assert_eq!(command, Command::from(Bytes::from_static(b"abcdefgh")));
            let mut cursor = command.into_cursor();
            assert_eq!(cursor.take(9), None);
            assert_eq!(cursor.take(0).as_deref(), Some(&b""[..]));
            assert_eq!(cursor.take(2).as_deref(), Some(&b"ab"[..]));
            assert_eq!(cursor.take(5).as_deref(), Some(&b"cdefg"[..]));
            assert_eq!((cursor.remaining(), cursor.take(2)), (1, None));
            assert_eq!(cursor.take(1).as_deref(), Some(&b"h"[..]));
            assert_eq!(cursor.take(0).as_deref(), Some(&b""[..]));
        }
    }

    #[test]
    fn taking_a_whole_part_does_not_copy_it() {
        let payload = Bytes::from(vec![7; 4096]);
        let command: Command = [Bytes::from_static(b"head"), payload.clone()].into_iter().collect();
        let mut cursor = command.into_cursor();
        cursor.take(4).expect("the head");
        assert_eq!(cursor.take(4096).expect("the payload").as_ptr(), payload.as_ptr());
    }
}
