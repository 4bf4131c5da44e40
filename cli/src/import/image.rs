//! The image to import: what it is, how large, and where in it there are data.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{Advice, OFlags, SeekFrom, fadvise, seek};
use rustix::io::Errno;

use super::formats::{HEAD_BYTES, NotRaw, TAIL_BYTES, not_raw};
use crate::failure::Failure;

#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: File,
    pub bytes: u64,
    /// As it was when the import began; a block device has none.
    modified: Option<SystemTime>,
}

/// An image is measured, searched for holes and read: only files and block devices allow that.
fn expect_image(path: &Path, metadata: &Metadata) -> Result<(), Failure> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    const NAME_A_FILE: &str = "name the file of a raw disk image";
    let (what, next) = if kind.is_dir() {
        ("a directory", NAME_A_FILE)
    } else if kind.is_fifo() {
        (
            "a pipe",
            "import reads files and block devices, which tell their size and their holes: write what comes out of it \
             into a file first (… > image.raw), and import that",
        )
    } else if kind.is_socket() {
        ("a socket", NAME_A_FILE)
    } else {
        ("a character device", NAME_A_FILE)
    };
    Err(Failure::NotRaw { path: path.to_owned(), what, next: next.to_owned() })
}

impl Image {
    /// `as_is` takes whatever the file holds for raw. `-` is standard input, as other tools have it.
    pub fn open(path: &Path, as_is: bool) -> Result<Self, Failure> {
        let path = if path == Path::new("-") { Path::new("/dev/stdin") } else { path };
        let doing = |what: &str| Failure::io(format!("{what} {}", path.display()));
        // Before it is opened: to open a pipe is to wait for whoever writes it, and some devices act when opened.
        expect_image(path, &std::fs::metadata(path).map_err(doing("looking at"))?)?;
        // Should it have become a pipe in this very moment, nothing waits either.
        let mut options = File::options();
        options.read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
        let file = options.open(path).map_err(doing("opening"))?;
        let metadata = file.metadata().map_err(doing("looking at"))?;
        expect_image(path, &metadata)?;
        let kind = metadata.file_type();
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
        let at_most = |bytes: usize| usize::try_from(self.bytes).unwrap_or(bytes).min(bytes);
        let (mut head, mut tail) = (vec![0; at_most(HEAD_BYTES)], vec![0; at_most(TAIL_BYTES)]);
        self.read(&mut head, 0)?;
        let tail_at = self.bytes - tail.len() as u64;
        self.read(&mut tail, tail_at)?;
        match not_raw(&self.path, &head, &tail) {
            Some(NotRaw { what, next }) => Err(Failure::NotRaw { path: self.path.clone(), what, next }),
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
    use std::os::unix::net::UnixListener;
    use std::path::{Path, PathBuf};

    use rustix::fs::{FileType, Mode};

    use super::Image;
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
    fn another_format_is_refused_wherever_its_magic_stands() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mib = 1 << 20;
        let cases: [(u64, u64, &[u8], &str); 6] = [
            (mib, 0, b"QFI\xfb", "-f qcow2 -O raw"),
            (mib, 64, b"\x7f\x10\xda\xbe", "-f vdi -O raw"),
            (mib, 257, b"ustar", "tar -xf"),
            (mib + 512, mib, b"conectix", "-f vpc -O raw"),
            (mib + 512, mib, b"koly\0\0\0\x04", "-f dmg -O raw"),
            (100, 0, b"\x1f\x8b\x08", "gunzip"),
        ];
        for (bytes, at, magic, says) in cases {
            let path = file(dir.path(), bytes, &[(at, magic)]);
            let next = Image::open(&path, false).expect_err(says).next().expect("advice");
            assert!(next.contains(says), "{next}");
            assert!(Image::open(&path, true).is_ok(), "taken when asked to");
        }
    }

    /// Nobody writes into the pipe: to open it would be to wait for ever.
    #[test]
    fn what_is_no_file_is_refused_by_its_kind_and_never_waited_for() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (pipe, socket) = (dir.path().join("pipe"), dir.path().join("socket"));
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .expect("mkfifo");
        let _listener = UnixListener::bind(&socket).expect("bind");
        let cases: [(&Path, &str); 4] = [
            (&pipe, "a pipe"),
            (&socket, "a socket"),
            (Path::new("/dev/null"), "a character device"),
            (dir.path(), "a directory"),
        ];
        for (path, kind) in cases {
            for as_is in [false, true] {
                let refused = Image::open(path, as_is).expect_err(kind);
                assert!(matches!(&refused, Failure::NotRaw { what, .. } if *what == kind), "{refused}");
                assert!(refused.next().is_some(), "{kind}");
            }
        }
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
