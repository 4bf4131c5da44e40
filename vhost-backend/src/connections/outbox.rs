//! What waits to be written to one socket: many frames, as few system calls as can be.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use evolute_protocol::id::CopysetId;
use evolute_protocol::wire::RequestId;
use evolute_protocol::wire::request::Request;
use smallvec::SmallVec;

/// Parts of one `writev`; the kernel takes 1024 at most.
const PARTS_MAX: usize = 256;

/// Frames that wait to be written: their headers and fields one after the other in one buffer, data by reference
/// between them.
#[derive(Debug, Default)]
pub struct Outbox {
    heads: BytesMut,
    queue: VecDeque<Part>,
    /// Bytes of `heads` behind those of `queue`.
    tail: usize,
}

/// Some bytes of `heads`, then data.
#[derive(Debug)]
struct Part {
    head: usize,
    data: Bytes,
}

impl Outbox {
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty() && self.queue.is_empty()
    }

    pub fn put_bytes(&mut self, bytes: &[u8]) {
        self.heads.put_slice(bytes);
        self.tail += bytes.len();
    }

    pub fn put(&mut self, request: &Request, copyset: CopysetId, id: RequestId) {
        let before = self.heads.len();
        let data = request.put(copyset, id, &mut self.heads);
        self.tail += self.heads.len() - before;
        if let Some(data) = data {
            self.queue.push_back(Part { head: std::mem::take(&mut self.tail), data });
        }
    }

    pub fn write_to(&mut self, stream: &mut impl Write) -> io::Result<()> {
        let mut slices: SmallVec<[IoSlice<'_>; 64]> = SmallVec::new();
        let mut at = 0;
        for part in self.queue.iter().take(PARTS_MAX / 2) {
            if part.head > 0 {
                slices.push(IoSlice::new(&self.heads[at..at + part.head]));
            }
            if !part.data.is_empty() {
                slices.push(IoSlice::new(&part.data));
            }
            at += part.head;
        }
        if self.queue.len() <= PARTS_MAX / 2 && self.tail > 0 {
            slices.push(IoSlice::new(&self.heads[at..]));
        }
        let written = stream.write_vectored(&slices)?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        drop(slices);
        self.take(written);
        Ok(())
    }

    /// Forgets the first `written` bytes.
    fn take(&mut self, mut written: usize) {
        while written > 0 {
            let Some(part) = self.queue.front_mut() else {
                assert!(written <= self.tail, "wrote more than there was");
                self.tail -= written;
                self.heads.advance(written);
                return;
            };
            let head = written.min(part.head);
            part.head -= head;
            self.heads.advance(head);
            written -= head;
            let data = written.min(part.data.len());
            part.data.advance(data);
            written -= data;
            if part.head == 0 && part.data.is_empty() {
                self.queue.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, IoSlice, Write};

    use bytes::{BufMut, Bytes, BytesMut};
    use evolute_protocol::checksum::checksums;
    use evolute_protocol::epoch::Epoch;
    use evolute_protocol::id::{ChunkIndex, ChunkKey, CopysetId, VolumeId};
    use evolute_protocol::wire::RequestId;
    use evolute_protocol::wire::request::{
        ChangeTag, ChunkRange, Fence, Read, Request, Write as WriteRequest,
    };
    use proptest::prelude::{ProptestConfig, any, prop, prop_assert, prop_assert_eq, proptest};

    use super::Outbox;

    /// A socket that takes only so many bytes at a time.
    struct Narrow {
        takes: usize,
        got: Vec<u8>,
    }

    impl Write for Narrow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.write_vectored(&[IoSlice::new(bytes)])
        }

        fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
            assert!(parts.iter().all(|part| !part.is_empty()));
            let all: Vec<u8> = parts.iter().flat_map(|part| part.to_vec()).take(self.takes).collect();
            self.got.extend_from_slice(&all);
            Ok(all.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn request(kind: u8, blocks: usize) -> Request {
        let chunk = ChunkKey { volume: VolumeId(5), index: ChunkIndex(6) };
        let data = Bytes::from(vec![kind; blocks * 4096]);
        let range = ChunkRange::new(0, u32::try_from(data.len()).expect("small")).expect("valid");
        match kind % 3 {
            0 => Request::Fence(Fence { volume: VolumeId(1), epoch: Epoch::default() }),
            1 => Request::Read(Read { chunk, epoch: Epoch::default(), range }),
            _ => Request::Write(WriteRequest {
                chunk,
                tag: ChangeTag::default(),
                range,
                checksums: checksums(0, &data),
                data,
            }),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn frames_leave_in_order_however_little_the_socket_takes(
            kinds in prop::collection::vec((any::<u8>(), 1usize..4), 1..200),
            takes in 1usize..20_000,
            put_at_once in 1usize..50,
        ) {
            let mut outbox = Outbox::default();
            let mut expected = BytesMut::new();
            let mut socket = Narrow { takes, got: Vec::new() };
            for (n, (kind, blocks)) in kinds.into_iter().enumerate() {
                let request = request(kind, blocks);
                outbox.put(&request, CopysetId(1), RequestId(n as u64));
                if let Some(data) = request.put(CopysetId(1), RequestId(n as u64), &mut expected) {
                    expected.put(data);
                }
                if n % put_at_once == 0 {
                    outbox.write_to(&mut socket).expect("never refuses");
                }
            }
            while !outbox.is_empty() {
                outbox.write_to(&mut socket).expect("never refuses");
            }
            prop_assert!(outbox.tail == 0);
            prop_assert_eq!(socket.got, expected.to_vec());
        }
    }
}
