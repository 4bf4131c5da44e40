//! A stranger at the data port, with frames whose every checksum is right and whose numbers nobody can have reached. The
//! volume is served on, a newer writer gets it, and the chunkserver starts again.

use std::io::{Read as _, Write as _};

use bytes::{BufMut, BytesMut};
use evolute_protocol::bounds::{ATTACHMENT_MAX, ATTACHMENTS_MISSED, INDEX_MAX};
use evolute_protocol::epoch::Epoch;
use evolute_protocol::wire::RequestId;
use evolute_protocol::wire::frame::put_frame;
use evolute_protocol::wire::reply::Refusal;

use crate::client::{block, hello};
use crate::{CLUSTER, COPYSET, FIRST, ME, Running, VOLUME, refusal};

const FENCE: u8 = 1;
const KINDS: [u8; 10] = [FENCE, 2, 3, 4, 5, 6, 7, 8, 9, 10];

/// Where each field of a kind lies, and how long it is.
fn fields(kind: u8) -> Vec<(usize, usize)> {
    let chunk = [(0, 8), (8, 8), (16, 4)];
    let range = [(20, 4), (24, 4)];
    let tag = [(28, 8), (36, 8), (44, 2)];
    match kind {
        1 | 10 => vec![(0, 8), (8, 8)],
        2 | 4 => [&chunk[..], &range, &tag].concat(),
        5 => [&chunk[..], &range, &tag, &[(46, 1)]].concat(),
        3 | 9 => [&chunk[..], &range].concat(),
        6 => chunk.to_vec(),
        _ => [&chunk[..], &range, &[(28, 8), (36, 8)]].concat(),
    }
}

/// A request of an old writer, so that nothing but a number can do any harm.
fn request(kind: u8, change: Option<((usize, usize), u64)>) -> BytesMut {
    let mut head = BytesMut::new();
    head.put_u64_le(VOLUME.0);
    head.put_u64_le(0);
    if !matches!(kind, 1 | 10) {
        head.put_u32_le(0);
    }
    if !matches!(kind, 1 | 6 | 10) {
        head.put_u32_le(0);
        head.put_u32_le(4096);
    }
    match kind {
        2 | 4 | 5 => {
            head.put_u64_le(5);
            head.put_u64_le(1);
            head.put_u16_le(0);
        }
        7 | 8 => {
            head.put_u64_le(0);
            head.put_u64_le(0);
        }
        _ => {}
    }
    match kind {
        2 => head.put_u32_le(0),
        5 => head.put_u8(0),
        _ => {}
    }
    if let Some(((at, bytes), value)) = change {
        head[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    }
    let data = if kind == 2 { 4096 } else { 0 };
    let mut out = BytesMut::new();
    put_frame(&mut out, kind, COPYSET, RequestId(7), data, |out| out.put_slice(&head));
    out.put_bytes(0, data);
    out
}

/// Whether it was answered; else its connection was ended.
fn is_answered(running: &Running, request: &[u8]) -> bool {
    let mut stranger = hello(running.address, CLUSTER, ME);
    stranger.write_all(request).expect("sent");
    stranger.read_exact(&mut [0; 32]).is_ok()
}

/// One number of each request at a time is moved to each edge.
#[test]
fn no_number_in_any_request_ends_a_chunkserver_or_a_volume() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, FIRST);
    client.write(0, block(1), 1);
    for kind in KINDS {
        assert!(is_answered(&running, &request(kind, None)), "kind {kind}");
        for field in fields(kind) {
            for edge in
                [0, 1, 1 << 24, 1 << 31, 1 << 32, INDEX_MAX, INDEX_MAX + 1, 1 << 63, u64::MAX - 1, u64::MAX]
            {
                // What this writer, or the next, may say. What it then means is not for a bound to judge.
                let epoch = Epoch::from_u64(edge);
                if field == (8, 8) && epoch.may_follow(Some(FIRST)) {
                    continue;
                }
                is_answered(&running, &request(kind, Some((field, edge))));
            }
        }
        client.write(4096, block(kind), 10 + u64::from(kind));
    }
    assert_eq!((client.read(0, 4096), client.read(4096, 4096)), (block(1), block(10)));
    running.stop();

    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, Epoch { attachment: 2, incarnation: 0 });
    assert_eq!(client.read(0, 4096), block(1));
    client.write(0, block(3), 1);
    running.stop();
}

/// Only a log entry raises a volume to the last epoch there is, and nobody comes near it.
#[test]
fn a_fence_that_no_writer_can_have_is_refused() {
    let dir = tempfile::tempdir().expect("temp dir");
    let running = Running::start(dir.path());
    let mut client = running.client();
    client.fence(VOLUME, FIRST);
    let fence = |epoch: u64| request(FENCE, Some(((8, 8), epoch)));
    for epoch in
        [u64::MAX, u64::MAX - 1, (1 << 63) + (1 << 32), u64::from(ATTACHMENT_MAX) << 32 | u64::from(u32::MAX)]
    {
        assert!(!is_answered(&running, &fence(epoch)), "{epoch:#x}");
    }
    // As far as the frame goes it can be, and then it is too far from what is known.
    for epoch in [
        Epoch { attachment: ATTACHMENT_MAX, incarnation: 0 },
        Epoch { attachment: FIRST.attachment + ATTACHMENTS_MISSED + 1, incarnation: 0 },
        Epoch { attachment: FIRST.attachment, incarnation: 1 << 31 },
    ] {
        let mut stranger = running.client();
        assert_eq!(refusal(stranger.try_fence(VOLUME, epoch)), Refusal::Busy, "{epoch}");
    }
    client.write(0, block(1), 1);
    let last = Epoch { attachment: FIRST.attachment + ATTACHMENTS_MISSED, incarnation: 9 };
    client.fence(VOLUME, last);
    client.write(0, block(2), 1);
    assert_eq!(client.read(0, 4096), block(2));
    running.stop();
}
