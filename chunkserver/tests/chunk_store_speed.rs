//! How fast the store is on this machine. Says, never judges; run by hand:
//! `cargo test --release -p evolute-chunkserver --test chunk_store_speed -- --ignored --nocapture`
//! (`TMPDIR=/dev/shm` for the same without a disk).

use std::fs;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_chunkserver::chunk_store::{ChunkStore, CopysetRecord, Identity, StoreOptions};
use evolute_protocol::checksum::crc32c;
use evolute_protocol::geometry::MIB;
use evolute_protocol::id::{ChunkIndex, ChunkKey, ChunkserverId, ClusterId, CopysetId, VolumeId};

const COPYSET: CopysetId = CopysetId(1);
const BLOCKS: u32 = 32_768;

fn record() -> CopysetRecord {
    CopysetRecord { copyset: COPYSET, applied: 1, state: Bytes::new(), created: Bytes::new() }
}

struct Places(u64);

impl Places {
    /// A random block of `chunks` chunks.
    fn next(&mut self, chunks: u64) -> (ChunkKey, u32) {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let block = (self.0 >> 33) % (chunks * 4096);
        let index = ChunkIndex(u32::try_from(block / 4096).unwrap());
        (ChunkKey { volume: VolumeId(1), index }, u32::try_from(block % 4096).unwrap() * 4096)
    }
}

fn each(took: Duration, count: u32) -> f64 {
    took.as_secs_f64() * 1e9 / f64::from(count)
}

/// Bytes this process caused to be written to devices.
fn written() -> u64 {
    let io = fs::read_to_string("/proc/self/io").unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.unwrap().parse().unwrap()
}

#[test]
#[ignore = "measures"]
fn speed() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for (name, chunks) in [("1 GiB", 64), ("16 GiB", 1024)] {
        let dir = tempfile::tempdir().unwrap();
        let identity =
            Identity { cluster: ClusterId([1; 16]), chunkserver: ChunkserverId(1), token: Bytes::new() };
        let options = StoreOptions { overlay_bytes_max: 1024 * MIB, ..StoreOptions::default() };
        let (mut store, _) = ChunkStore::open(&dir.path().join("store"), options, &identity).unwrap();
        store.put_copyset(record()).unwrap();
        let checkpoint = |store: &mut ChunkStore, what: &str| {
            let (before, start) = (written(), Instant::now());
            let draining = store.begin_checkpoint(vec![record()]);
            let froze = start.elapsed();
            let done = runtime.block_on(draining).unwrap();
            let took = start.elapsed();
            let bytes = u32::try_from(written() - before).unwrap();
            println!(
                "  checkpoint of {} {what} blocks in {} chunks: {:.0} MiB/s, {:.0} ms, {:.2} device bytes per byte; freeze {:.1} µs",
                done.blocks,
                done.chunks,
                done.blocks as f64 / 256.0 / took.as_secs_f64(),
                took.as_secs_f64() * 1e3,
                f64::from(bytes) / (done.blocks as f64 * 4096.0),
                froze.as_secs_f64() * 1e6,
            );
        };
        println!("random 4 KiB blocks over {name}:");
        for round in ["new", "overwritten", "overwritten"] {
            let mut places = Places(7);
            let blocks: Vec<_> = (0..BLOCKS)
                .map(|n| {
                    let data = Bytes::from(n.to_le_bytes().repeat(1024));
                    let crc = crc32c(&data);
                    (places.next(chunks), data, crc)
                })
                .collect();
            let start = Instant::now();
            for ((chunk, offset), data, crc) in blocks {
                store.write(COPYSET, chunk, offset, data, &[crc]);
            }
            println!("  apply: {:.0} ns", each(start.elapsed(), BLOCKS));
            let (start, mut places) = (Instant::now(), Places(7));
            for _ in 0..BLOCKS {
                let (chunk, offset) = places.next(chunks);
                assert!(store.try_read(chunk, offset, 4096).unwrap().is_some());
            }
            println!("  read from memory: {:.0} ns", each(start.elapsed(), BLOCKS));
            checkpoint(&mut store, round);
        }
        let (start, mut places, mut waited) = (Instant::now(), Places(7), 0);
        for _ in 0..BLOCKS {
            let (chunk, offset) = places.next(chunks);
            if store.try_read(chunk, offset, 4096).unwrap().is_none() {
                waited += 1;
                runtime.block_on(store.read(chunk, offset, 4096)).unwrap();
            }
        }
        println!("  first read of files: {:.2} µs, {waited} waited", each(start.elapsed(), BLOCKS) / 1e3);
        let (start, mut places, mut waited) = (Instant::now(), Places(7), 0);
        for _ in 0..BLOCKS {
            let (chunk, offset) = places.next(chunks);
            waited += u32::from(store.try_read(chunk, offset, 4096).unwrap().is_none());
        }
        println!(
            "  read from the page cache: {:.2} µs, {waited} would wait",
            each(start.elapsed(), BLOCKS) / 1e3
        );
        let mut places = Places(99);
        for _ in 0..BLOCKS / 4 {
            let (chunk, offset) = places.next(chunks);
            store.write(COPYSET, chunk, offset + 512, Bytes::from_static(&[1; 512]), &[crc32c(&[1; 512])]);
        }
        checkpoint(&mut store, "partly written");
        let (start, data) = (Instant::now(), Bytes::from(vec![5; 1 << 20]));
        let sums = vec![crc32c(&data[..4096]); 256];
        for mib in 0..128_u32 {
            let chunk = ChunkKey { volume: VolumeId(2), index: ChunkIndex(mib / 16) };
            store.write(COPYSET, chunk, (mib % 16) << 20, data.clone(), &sums);
        }
        println!("  apply of 1 MiB: {:.1} µs", each(start.elapsed(), 128) / 1e3);
        checkpoint(&mut store, "sequential");
    }
}
