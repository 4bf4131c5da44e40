//! Image to volume: holes and zero blocks are skipped, the rest is written in order with many writes in flight.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use evolute_protocol::geometry::{BLOCK_BYTES, REQUEST_BYTES_MAX};

use super::image::Image;
use crate::failure::Failure;

/// What one read of the image takes: as much as one request may carry.
const PART_BYTES: u64 = REQUEST_BYTES_MAX;
const BLOCK: usize = 4096;
const _: () = assert!(BLOCK as u64 == BLOCK_BYTES && PART_BYTES.is_multiple_of(BLOCK_BYTES));

/// An attached volume that never held anything, so that what is not written reads as zeroes.
pub trait Target {
    /// May return before the data are durable, and waits while too much is in flight. A failure may be that of an
    /// earlier write.
    fn write(&mut self, offset: u64, data: Bytes) -> Result<(), String>;
    /// Everything written is durable, or something failed.
    fn flush(&mut self) -> Result<(), String>;
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Of the image, skipped or written.
    pub done_bytes: u64,
    pub written_bytes: u64,
}

/// Copies all of the image. `progress` is called often and decides itself what is worth telling.
pub fn copy(
    image: &Image,
    volume: &str,
    target: &mut dyn Target,
    interrupted: &AtomicBool,
    mut progress: impl FnMut(Copied),
) -> Result<Copied, Failure> {
    let failed = |message| Failure::Volume { volume: volume.to_owned(), message };
    let mut copied = Copied::default();
    let mut at = 0;
    while let Some(data) = image.next_data(at)? {
        // Whole blocks from a part's border on, so that a block is never written in two pieces.
        let mut part = data.start / BLOCK_BYTES * BLOCK_BYTES;
        while part < data.end {
            if interrupted.load(Ordering::Relaxed) {
                return Err(Failure::Interrupted { left: String::new() });
            }
            let end =
                (part / PART_BYTES * PART_BYTES + PART_BYTES).min(data.end.next_multiple_of(BLOCK_BYTES));
            let bytes = read_padded(image, part, end)?;
            for run in runs_of_data(&bytes) {
                copied.written_bytes += run.len() as u64;
                let offset = part + run.start as u64;
                target.write(offset, bytes.slice(run)).map_err(failed)?;
            }
            part = end;
            copied.done_bytes = end.min(image.bytes);
            progress(copied);
        }
        at = part;
    }
    target.flush().map_err(failed)?;
    image.expect_unchanged()?;
    copied.done_bytes = image.bytes;
    progress(copied);
    Ok(copied)
}

/// The last block of an image that ends within one is filled with zeroes.
fn read_padded(image: &Image, from: u64, to: u64) -> Result<Bytes, Failure> {
    let length = usize::try_from(to - from).expect("at most PART_BYTES");
    let there = usize::try_from(to.min(image.bytes) - from).expect("at most PART_BYTES");
    let mut buffer = vec![0; length];
    image.read(&mut buffer[..there], from)?;
    Ok(Bytes::from(buffer))
}

/// Ranges of blocks that are not zero, each as long as it gets.
fn runs_of_data(bytes: &Bytes) -> Vec<std::ops::Range<usize>> {
    const ZEROES: [u8; BLOCK] = [0; BLOCK];
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (start, block) in (0..).step_by(BLOCK).zip(bytes.chunks(BLOCK)) {
        if *block == ZEROES[..block.len()] {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == start => run.end += block.len(),
            _ => runs.push(start..start + block.len()),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, Ordering};

    use bytes::Bytes;

    use super::{Copied, Target, copy};
    use crate::failure::Failure;
    use crate::import::image::Image;

    /// A volume in memory: zeroes until written.
    struct Memory {
        bytes: Vec<u8>,
        writes: Vec<(u64, usize)>,
        flushed: bool,
        fails_at: Option<usize>,
    }

    impl Memory {
        fn new(bytes: usize) -> Self {
            Self { bytes: vec![0; bytes], writes: Vec::new(), flushed: false, fails_at: None }
        }
    }

    impl Target for Memory {
        fn write(&mut self, offset: u64, data: Bytes) -> Result<(), String> {
            if self.fails_at == Some(self.writes.len()) {
                return Err("no space".to_owned());
            }
            assert!(offset.is_multiple_of(4096) && data.len().is_multiple_of(4096) && data.len() <= 1 << 20);
            let at = usize::try_from(offset).expect("small");
            self.bytes[at..at + data.len()].copy_from_slice(&data);
            self.writes.push((offset, data.len()));
            self.flushed = false;
            Ok(())
        }
        fn flush(&mut self) -> Result<(), String> {
            self.flushed = true;
            Ok(())
        }
    }

    fn image(dir: &tempfile::TempDir, bytes: u64, content: &[(u64, &[u8])]) -> (PathBuf, Image) {
        let path = dir.path().join("image");
        let file = File::create(&path).expect("create");
        file.set_len(bytes).expect("size");
        for (at, data) in content {
            file.write_all_at(data, *at).expect("write");
        }
        let image = Image::open(&path, false).expect("raw");
        (path, image)
    }

    #[test]
    fn every_byte_arrives_and_zeroes_are_not_written() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut large = vec![7; 3 << 20];
        // Zero blocks inside data: a hole that nobody punched.
        large[(1 << 20)..(1 << 20) + 65536].fill(0);
        let size = (9 << 20) + 777;
        let (path, image) = image(&dir, size, &[(1000, b"x"), (5 << 20, &large), (size - 1, b"end")]);
        let wanted = std::fs::read(&path).expect("readable");
        // The write of "end" made the file two bytes longer than `size`.
        let mut memory = Memory::new(10 << 20);
        let mut seen = Vec::new();
        let image = {
            drop(image);
            Image::open(&path, false).expect("raw")
        };
        let copied =
            copy(&image, "disk", &mut memory, &AtomicBool::new(false), |c| seen.push(c)).expect("copied");
        assert!(memory.bytes[..wanted.len()] == wanted[..]);
        assert!(memory.bytes[wanted.len()..].iter().all(|byte| *byte == 0));
        assert!(memory.flushed);
        assert_eq!(copied.done_bytes, image.bytes);
        assert_eq!(copied.written_bytes, 4096 + (3 << 20) - 65536 + 4096);
        assert!(seen.is_sorted_by_key(|c| c.done_bytes));
        assert_eq!(seen.last(), Some(&copied));
    }

    #[test]
    fn an_image_of_holes_writes_nothing() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (_, image) = image(&dir, 64 << 20, &[]);
        let mut memory = Memory::new(0);
        let copied = copy(&image, "disk", &mut memory, &AtomicBool::new(false), |_| {}).expect("copied");
        assert_eq!(copied, Copied { done_bytes: 64 << 20, written_bytes: 0 });
    }

    #[test]
    fn a_failed_write_ends_the_copy_with_the_volumes_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (_, image) = image(&dir, 4 << 20, &[(0, &vec![1; 4 << 20])]);
        let mut memory = Memory::new(4 << 20);
        memory.fails_at = Some(2);
        let failed =
            copy(&image, "disk", &mut memory, &AtomicBool::new(false), |_| {}).expect_err("no space");
        assert!(
            matches!(failed, Failure::Volume { volume, message } if volume == "disk" && message == "no space")
        );
    }

    #[test]
    fn an_interrupt_ends_the_copy_between_two_parts() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (_, image) = image(&dir, 4 << 20, &[(0, &vec![1; 4 << 20])]);
        let mut memory = Memory::new(4 << 20);
        let interrupted = AtomicBool::new(false);
        let ended = copy(&image, "disk", &mut memory, &interrupted, |copied| {
            interrupted.store(copied.done_bytes >= 2 << 20, Ordering::Relaxed);
        });
        assert!(matches!(ended, Err(Failure::Interrupted { .. })));
        assert_eq!(memory.writes.len(), 2);
    }
}
