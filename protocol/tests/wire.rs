//! The wire's bytes never change by accident, and no bytes make a decoder panic.

use bytes::{BufMut, Bytes, BytesMut};
use evolute_protocol::checksum::checksums;
use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::{BlockIndex, ChunkIndex, ChunkKey, ChunkserverId, ClusterId, CopysetId, VolumeId};
use evolute_protocol::wire::hello::{HELLO_BYTES, Hello, HelloReply, Role, Unwelcome};
use evolute_protocol::wire::reply::{ChunkInfo, Freshness, Refusal, Reply};
use evolute_protocol::wire::request::{
    AskChunkInfo, AskDigests, ChangeTag, ChunkRange, Discard, Doubt, Fence, Lane, Read, ReadAtLeast, Request,
    Sequence, TakeOver, Write, WriteZeroes,
};
use evolute_protocol::wire::{FrameReader, RequestId};
use proptest::prelude::{Strategy, any, prop, proptest};

const COPYSET: CopysetId = CopysetId(8);
const ID: RequestId = RequestId(0x0102_0304_0506_0708);

fn requests() -> Vec<Request> {
    let chunk = ChunkKey { volume: VolumeId(5), index: ChunkIndex(6) };
    let epoch = Epoch { attachment: 3, incarnation: 1 };
    let tag = ChangeTag { epoch, lane: Lane(2), sequence: Sequence(10), floor: Sequence(7) };
    let range = ChunkRange::new(3584, 1024).expect("valid");
    let blocks = ChunkRange::new(8192, 4096).expect("valid");
    let data = Bytes::from((0..1024u32).map(|n| n.to_le_bytes()[0]).collect::<Vec<_>>());
    let checksums = checksums(3584, &data);
    vec![
        Request::Fence(Fence { volume: VolumeId(5), epoch }),
        Request::Write(Write { chunk, tag, range, checksums, data }),
        Request::Read(Read { chunk, epoch, range }),
        Request::Discard(Discard { chunk, tag, range }),
        Request::WriteZeroes(WriteZeroes { chunk, tag, range, unmap: true }),
        Request::ChunkInfo(AskChunkInfo { chunk, epoch }),
        Request::ReadAtLeast(ReadAtLeast { read: Read { chunk, epoch, range }, index: 99, term: 4 }),
        Request::Digests(AskDigests {
            of: ReadAtLeast {
                read: Read { chunk, epoch, range: blocks },
                index: 99,
                term: ReadAtLeast::APPLIED_ONLY,
            },
        }),
        Request::Doubt(Doubt { of: Read { chunk, epoch, range: blocks } }),
        Request::TakeOver(TakeOver { volume: VolumeId(5), epoch }),
    ]
}

fn replies() -> Vec<Reply> {
    let fresh = Freshness { term: 4, index: 99 };
    let data = Bytes::from_static(&[7; 512]);
    vec![
        Reply::Done(fresh),
        Reply::Data { fresh, shown: 101, checksums: checksums(0, &data), data: [data].into_iter().collect() },
        Reply::Info { fresh, info: ChunkInfo { allocated_bytes: 8192, generation: 2 } },
        Reply::Refused(Refusal::NotLeader { leader: Some(ChunkserverId(3)) }),
        Reply::Refused(Refusal::Fenced { current: Epoch { attachment: 2, incarnation: 7 } }),
        Reply::Refused(Refusal::Unreadable { block: BlockIndex(4095) }),
        Reply::Refused(Refusal::Behind { applied: 98 }),
        Reply::Digests { fresh, digests: [7, 9].into_iter().collect() },
    ]
}

fn all_bytes() -> Vec<(String, BytesMut)> {
    let cluster = ClusterId([9; 16]);
    let hello = Hello {
        version: 1,
        role: Role::Peer { chunkserver: ChunkserverId(4) },
        cluster,
        to: ChunkserverId(2),
    };
    let mut all = vec![
        ("hello".to_owned(), BytesMut::from(&hello.encode()[..])),
        ("welcome".to_owned(), BytesMut::from(&HelloReply::new(Err(Unwelcome::Cluster)).encode()[..])),
    ];
    for request in requests() {
        let mut bytes = BytesMut::new();
        let payload = request.put(COPYSET, ID, &mut bytes);
        bytes.put(payload.unwrap_or_default());
        all.push((name(&request), bytes));
    }
    for reply in replies() {
        let mut bytes = BytesMut::new();
        reply.put(COPYSET, ID, &mut bytes);
        if let Reply::Data { data, .. } = &reply {
            data.iter().for_each(|part| bytes.put_slice(part));
        }
        all.push((name(&reply), bytes));
    }
    all
}

/// The first words of a value's debug text.
fn name(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    text.split(['{', ':', ','])
        .next()
        .unwrap_or_default()
        .replace(['(', ')', ' '], " ")
        .trim()
        .replace(' ', "-")
}

/// Frames of version 1, byte for byte. When this fails, an older client or chunkserver would not understand us: a
/// change of the wire is a new version. `EVOLUTE_GOLDEN=write` writes the file for a deliberate one.
#[test]
fn the_bytes_of_version_1_stay_as_they_are() {
    // cargo runs tests in their package's folder.
    let path = "tests/golden/wire-v1.txt";
    let text: String = all_bytes()
        .into_iter()
        .map(|(name, bytes)| {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{name} {hex}\n")
        })
        .collect();
    if std::env::var("EVOLUTE_GOLDEN").is_ok_and(|what| what == "write") {
        std::fs::write(path, &text).expect("written");
    }
    assert_eq!(std::fs::read_to_string(path).expect("there"), text);
}

fn decode_all(bytes: &[u8]) {
    let mut reader = FrameReader::default();
    reader.space().put_slice(bytes);
    while let Ok(Some(frame)) = reader.next() {
        let _ = Request::decode(&frame);
        let _ = Reply::decode(&frame);
    }
    if let Some(first) = bytes.first_chunk::<HELLO_BYTES>() {
        let _ = Hello::decode(first);
        let _ = HelloReply::decode(first);
    }
}

/// A frame with intact checksums and arbitrary fields, as a hostile client would make it.
fn hostile_frame() -> impl Strategy<Value = Vec<u8>> {
    (any::<u8>(), prop::collection::vec(any::<u8>(), 0..200), prop::collection::vec(any::<u8>(), 0..2000))
        .prop_map(|(kind, head, payload)| {
            let mut out = BytesMut::new();
            evolute_protocol::wire::frame::put_frame(&mut out, kind, COPYSET, ID, payload.len(), |b| {
                b.put_slice(&head)
            });
            out.put_slice(&payload);
            out.to_vec()
        })
}

proptest! {
    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        decode_all(&bytes);
    }

    #[test]
    fn no_intact_frame_makes_a_decoder_panic(bytes in hostile_frame()) {
        decode_all(&bytes);
    }

    #[test]
    fn no_damage_to_a_good_frame_makes_a_decoder_panic(which in 0usize..19, at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (_, mut bytes) = all_bytes().swap_remove(which);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        decode_all(&bytes);
    }
}
