//! The image to import: what it is, how large, and where in it there are data.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::Errno;

use crate::failure::Failure;

/// Far enough into the file for the magic of every format below.
const HEAD_BYTES: usize = 512;
/// A fixed-size VHD keeps its magic in the last sector.
const TAIL_BYTES: u64 = 512;

/// Formats that are not raw: where their magic is, the bytes, what they are called, and qemu-img's name of them.
const DISK_FORMATS: [(usize, &[u8], &str, &str); 9] = [
    (0, b"QFI\xfb", "a qcow2 image", "qcow2"),
    (0, b"QED\0", "a QED image", "qed"),
    (0, b"KDMV", "a VMDK image", "vmdk"),
    (0, b"COWD", "a VMDK image", "vmdk"),
    (0, b"# Disk DescriptorFile", "the descriptor of a VMDK image", "vmdk"),
    (64, b"\x7f\x10\xda\xbe", "a VirtualBox VDI image", "vdi"),
    (0, b"vhdxfile", "a VHDX image", "vhdx"),
    (0, b"conectix", "a VHD image", "vpc"),
    (0, b"WithoutFreeSpace", "a Parallels image", "parallels"),
];

/// Compressed files: the magic, what they are called, what unpacks them.
const COMPRESSED: [(&[u8], &str, &str); 5] = [
    (b"\x1f\x8b", "compressed with gzip", "gunzip"),
    (b"\xfd7zXZ\0", "compressed with xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unzstd"),
    (b"BZh", "compressed with bzip2", "bunzip2"),
    (b"PK\x03\x04", "a zip archive", "unzip"),
];

#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: File,
    pub bytes: u64,
    /// As it was when the import began; a block device has none.
    modified: Option<SystemTime>,
}

impl Image {
    /// `as_is` takes whatever the file holds for raw.
    pub fn open(path: &Path, as_is: bool) -> Result<Self, Failure> {
        let doing = |what: &str| Failure::io(format!("{what} {}", path.display()));
        let file = File::open(path).map_err(doing("opening"))?;
        let metadata = file.metadata().map_err(doing("looking at"))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Failure::NotRaw {
                path: path.to_owned(),
                what: if kind.is_dir() { "a directory" } else { "neither a file nor a block device" },
                next: "name the file of a raw disk image".to_owned(),
            });
        }
        let bytes = seek(&file, SeekFrom::End(0)).map_err(io::Error::from).map_err(doing("measuring"))?;
        let image = Self {
            path: path.to_owned(),
            modified: kind.is_file().then(|| metadata.modified().ok()).flatten(),
            file,
            bytes,
        };
        if bytes == 0 {
            return Err(Failure::NotRaw {
                path: path.to_owned(),
                what: "empty",
                next: "`evolute volume create` makes an empty volume".to_owned(),
            });
        }
        if !as_is {
            image.expect_raw()?;
        }
        // Only a wish: the kernel reads ahead further.
        let _ = fadvise(&image.file, 0, None, Advice::Sequential);
        Ok(image)
    }

    fn expect_raw(&self) -> Result<(), Failure> {
        let mut head = [0; HEAD_BYTES];
        let head_bytes = usize::try_from(self.bytes).unwrap_or(HEAD_BYTES).min(HEAD_BYTES);
        self.read(&mut head[..head_bytes], 0)?;
        let mut tail = [0; 8];
        if self.bytes >= TAIL_BYTES {
            self.read(&mut tail, self.bytes - TAIL_BYTES)?;
        }
        let refused = |what, next| Err(Failure::NotRaw { path: self.path.clone(), what, next });
        let path = self.path.display();
        let fixed_vhd = (&tail == b"conectix").then_some(("a VHD image", "vpc"));
        let disk = DISK_FORMATS
            .iter()
            .find(|(at, magic, ..)| head[*at..].starts_with(magic))
            .map(|(_, _, what, name)| (*what, *name))
            .or(fixed_vhd);
        if let Some((what, name)) = disk {
            return refused(
                what,
                format!(
                    "import reads raw images: qemu-img convert -f {name} -O raw {path} {path}.raw, then import that; \
                     --raw takes the bytes as they are"
                ),
            );
        }
        match COMPRESSED.iter().find(|(magic, ..)| head.starts_with(magic)) {
            Some((_, what, tool)) => refused(
                what,
                format!(
                    "unpack it first ({tool} {path}), then import the raw image; --raw takes the bytes as they are"
                ),
            ),
            None => Ok(()),
        }
    }

    /// Fills `buffer` from this offset; the file must have that much.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        self.file.read_exact_at(buffer, offset).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => self.changed(),
            _ => Failure::Io { doing: format!("reading {} at {offset}", self.path.display()), source },
        })
    }

    /// The next range from `offset` that holds data; none when only a hole is left. A file system that knows no holes
    /// gives everything.
    pub fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>, Failure> {
        if offset >= self.bytes {
            return Ok(None);
        }
        let all = Ok(Some(offset..self.bytes));
        let start = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return all,
            Err(error) => {
                let doing = format!("looking for data in {}", self.path.display());
                return Err(Failure::Io { doing, source: error.into() });
            }
        };
        let end = seek(&self.file, SeekFrom::Hole(start)).unwrap_or(self.bytes).min(self.bytes);
        // A file that grew meanwhile: what is new was not measured. The end of the import says so.
        Ok((start < end).then_some(start..end))
    }

    /// An image that was written meanwhile is a mixture of two.
    pub fn expect_unchanged(&self) -> Result<(), Failure> {
        let metadata =
            self.file.metadata().map_err(Failure::io(format!("looking at {}", self.path.display())))?;
        let now = self.modified.and_then(|_| metadata.modified().ok());
        if now == self.modified && (self.modified.is_none() || metadata.len() == self.bytes) {
            return Ok(());
        }
        Err(self.changed())
    }

    fn changed(&self) -> Failure {
        Failure::Import {
            what: format!("{} changed while it was read", self.path.display()),
            next: "stop whatever writes it (a running guest?) and import again".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;
    use std::path::{Path, PathBuf};

    use super::{DISK_FORMATS, Image};
    use crate::failure::Failure;

    fn file(dir: &Path, bytes: u64, content: &[(u64, &[u8])]) -> PathBuf {
        let path = dir.join("image");
        let file = File::create(&path).expect("create");
        file.set_len(bytes).expect("size");
        for (at, data) in content {
            file.write_all_at(data, *at).expect("write");
        }
        path
    }

    #[test]
    fn every_other_format_is_refused_with_the_way_to_raw() {
        let dir = tempfile::tempdir().expect("tempdir");
        for (at, magic, what, name) in DISK_FORMATS {
            let path = file(dir.path(), 1 << 20, &[(at as u64, magic)]);
            let refused = Image::open(&path, false).expect_err(what);
            assert!(refused.to_string().contains(what));
            let next = refused.next().expect("advice");
            assert!(next.contains(&format!("-f {name} -O raw")), "{next}");
            assert!(Image::open(&path, true).is_ok(), "taken when asked to");
        }
        let fixed_vhd = file(dir.path(), (1 << 20) + 512, &[(1 << 20, b"conectix")]);
        assert!(Image::open(&fixed_vhd, false).expect_err("VHD").to_string().contains("VHD"));
        let gzip = file(dir.path(), 100, &[(0, b"\x1f\x8b\x08")]);
        assert!(
            Image::open(&gzip, false).expect_err("gzip").next().is_some_and(|next| next.contains("gunzip"))
        );
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert!(matches!(Image::open(dir.path(), false), Err(Failure::NotRaw { what: "a directory", .. })));
        let empty = file(dir.path(), 0, &[]);
        assert!(matches!(Image::open(&empty, false), Err(Failure::NotRaw { what: "empty", .. })));
        assert!(matches!(Image::open(Path::new("/dev/zero"), false), Err(Failure::NotRaw { .. })));
        assert!(matches!(Image::open(&dir.path().join("none"), false), Err(Failure::Io { .. })));
        assert!(Image::open(&file(dir.path(), 1, &[(0, b"x")]), false).is_ok(), "one byte is an image");
    }

    #[test]
    fn data_are_found_between_holes() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = file(dir.path(), 8 << 20, &[(0, &[1; 4096]), (4 << 20, &[2; 8192])]);
        let image = Image::open(&path, false).expect("raw");
        let mut found = Vec::new();
        let mut at = 0;
        while let Some(range) = image.next_data(at).expect("readable") {
            at = range.end;
            found.push(range);
        }
        // A file system without holes gives one range; either way the data are in them.
        assert!(found.iter().any(|range| range.contains(&0)));
        assert!(found.iter().any(|range| range.contains(&(4 << 20))));
        assert_eq!(image.next_data(8 << 20).expect("the end"), None);
    }

    #[test]
    fn a_file_that_is_written_meanwhile_is_noticed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = file(dir.path(), 1 << 20, &[]);
        let image = Image::open(&path, false).expect("raw");
        image.expect_unchanged().expect("nobody wrote");
        File::options().write(true).open(&path).and_then(|f| f.set_len(4096)).expect("truncated");
        assert!(matches!(image.expect_unchanged(), Err(Failure::Import { .. })));
        let mut buffer = [0; 4096];
        assert!(matches!(image.read(&mut buffer, 8192), Err(Failure::Import { .. })));
        fs::remove_file(&path).expect("removed");
    }
}
