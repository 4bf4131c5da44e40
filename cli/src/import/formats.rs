//! What a file is that is not raw, told by its first and last bytes, and how it becomes raw.
//!
//! File systems and partition tables are not here: an ISO image, a squashfs or a LUKS container on a whole disk are what
//! a guest may want to see as they are. What only looks like one of these is taken by `--raw`.

use std::path::Path;

use evolute_daemon::shell::quoted_path;

/// Far enough into the file for the magic of every format.
pub const HEAD_BYTES: usize = 512;
/// Some formats keep their magic in the last sector.
pub const TAIL_BYTES: usize = 512;

#[derive(Debug, Clone, Copy)]
enum At {
    Start(usize),
    /// So many bytes before the end.
    End(usize),
}

/// How it becomes raw.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// By qemu-img, under this name.
    QemuImg(&'static str),
    /// By this program, which is given the file and unpacks what is in it.
    Unpack(&'static str),
    /// By this program, which is given the file and the name of the raw image.
    Convert(&'static str),
    By(&'static str),
}

use At::{End, Start};
use Way::{By, Convert, QemuImg, Unpack};

struct Format {
    at: At,
    magic: &'static [u8],
    what: &'static str,
    way: Way,
}

const fn format(at: At, magic: &'static [u8], what: &'static str, way: Way) -> Format {
    Format { at, magic, what, way }
}

const WIM: Way = By("it holds files, not a disk: install from it in a guest");
const TEXT: Way = By("look into it: it is text, not a disk (the page of an error, a description?)");

const FORMATS: &[Format] = &[
    // Disk images.
    format(Start(0), b"QFI\xfb", "a qcow2 image", QemuImg("qcow2")),
    format(Start(0), b"QED\0", "a QED image", QemuImg("qed")),
    format(Start(0), b"KDMV", "a VMDK image", QemuImg("vmdk")),
    format(Start(0), b"COWD", "a VMDK image", QemuImg("vmdk")),
    format(Start(0), b"\xbe\xba\xfe\xca\0\0\0\0", "a VMDK image", QemuImg("vmdk")),
    format(Start(0), b"# Disk DescriptorFile", "the descriptor of a VMDK image", QemuImg("vmdk")),
    format(Start(64), b"\x7f\x10\xda\xbe", "a VirtualBox VDI image", QemuImg("vdi")),
    format(Start(0), b"vhdxfile", "a VHDX image", QemuImg("vhdx")),
    format(Start(0), b"conectix", "a VHD image", QemuImg("vpc")),
    // One of fixed size; Virtual PC before 2004 wrote a footer of 511 bytes.
    format(End(512), b"conectix", "a VHD image", QemuImg("vpc")),
    format(End(511), b"conectix", "a VHD image", QemuImg("vpc")),
    format(Start(0), b"WithoutFreeSpace", "a Parallels image", QemuImg("parallels")),
    format(Start(0), b"WithouFreSpacExt", "a Parallels image", QemuImg("parallels")),
    format(End(512), b"koly\0\0\0\x04", "an Apple disk image (DMG)", QemuImg("dmg")),
    format(Start(0), b"\x3a\xff\x26\xed", "an Android sparse image", Convert("simg2img")),
    format(Start(0), b"MSWIM\0\0\0", "a Windows image (WIM)", WIM),
    format(Start(0), b"WLPWM\0\0\0", "a Windows image (WIM)", WIM),
    format(Start(0), b"VMA\0", "a backup of Proxmox (VMA)", By("take the disks out of it with vma extract")),
    format(
        Start(0),
        b"rbd image v2",
        "an export of Ceph RBD",
        By("export it with --export-format 1, which is raw"),
    ),
    format(Start(0), b"rbd diff v", "a difference of Ceph RBD", By("export the whole image with rbd export")),
    format(Start(0), b"EVF\x09\x0d\x0a\xff\0", "an EWF image (E01)", By("make it raw with ewfexport")),
    format(Start(0), b"partclone-image", "a partclone image", By("make it raw with partclone.restore")),
    // Archives.
    format(Start(257), b"ustar", "a tar archive (an OVA is one)", Unpack("tar -xf")),
    format(Start(0), b"7z\xbc\xaf\x27\x1c", "a 7z archive", Unpack("7z x")),
    format(Start(0), b"PK\x03\x04", "a zip archive", Unpack("unzip")),
    format(Start(0), b"PK\x05\x06", "an empty zip archive", By("look for the right file")),
    format(Start(0), b"PK\x07\x08", "a zip archive", Unpack("unzip")),
    format(Start(0), b"Rar!\x1a\x07", "a RAR archive", Unpack("unrar x")),
    format(Start(0), b"MSCF\0\0\0\0", "a CAB archive", Unpack("cabextract")),
    format(Start(0), b"070701", "a cpio archive", Unpack("cpio -id <")),
    format(Start(0), b"070707", "a cpio archive", Unpack("cpio -id <")),
    format(Start(0), b"!<arch>\n", "an ar archive (a Debian package is one)", Unpack("ar x")),
    format(Start(0), b"\xed\xab\xee\xdb", "an RPM package", By("unpack it with rpm2cpio")),
    // Compressed files.
    format(Start(0), b"\x1f\x8b", "compressed with gzip", Unpack("gunzip")),
    format(Start(0), b"\x1f\x9d", "compressed with compress", Unpack("uncompress")),
    format(Start(0), b"\xfd7zXZ\0", "compressed with xz", Unpack("unxz")),
    format(Start(0), b"\x28\xb5\x2f\xfd", "compressed with zstd", Unpack("unzstd")),
    format(Start(0), b"BZh", "compressed with bzip2", Unpack("bunzip2")),
    format(Start(0), b"\x04\x22\x4d\x18", "compressed with lz4", Unpack("unlz4")),
    format(Start(0), b"\x02\x21\x4c\x18", "compressed with lz4", Unpack("unlz4")),
    format(Start(0), b"\x89LZO\0\r\n\x1a\n", "compressed with lzop", Unpack("lzop -d")),
    format(Start(0), b"LZIP", "compressed with lzip", Unpack("lzip -d")),
    // What a download leaves that went wrong.
    format(Start(0), b"<?xml", "an XML text", TEXT),
    format(Start(0), b"<!DOCTYPE", "a web page", TEXT),
    format(Start(0), b"<!doctype", "a web page", TEXT),
    format(Start(0), b"<html", "a web page", TEXT),
];

#[derive(Debug)]
pub struct NotRaw {
    pub what: &'static str,
    pub next: String,
}

/// `head` is the file's first [`HEAD_BYTES`], `tail` its last [`TAIL_BYTES`], or all where it is shorter.
pub fn not_raw(path: &Path, head: &[u8], tail: &[u8]) -> Option<NotRaw> {
    let is_there = |format: &&Format| match format.at {
        Start(at) => head.get(at..).is_some_and(|rest| rest.starts_with(format.magic)),
        End(before) => tail.len().checked_sub(before).is_some_and(|at| tail[at..].starts_with(format.magic)),
    };
    let (what, way) = match FORMATS.iter().find(is_there) {
        Some(format) => (format.what, format.way),
        None if is_lzma(head) => ("compressed with lzma", Unpack("unlzma")),
        None if is_skippable_frame(head) => ("compressed with zstd or lz4", Unpack("unzstd")),
        None => return None,
    };
    Some(NotRaw { what, next: way.words(path) })
}

/// LZMA alone has no magic, but its usual dictionary sizes, and a size that is not known is 2⁶⁴−1.
fn is_lzma(head: &[u8]) -> bool {
    head.starts_with(b"\x5d\0\0") && head.get(5..13).is_some_and(|size| size == [0xff; 8])
}

/// What parallel compressors write first, to be left out by others: 0x184D2A50 to 5F.
fn is_skippable_frame(head: &[u8]) -> bool {
    matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

impl Way {
    fn words(self, path: &Path) -> String {
        const AS_IS: &str = "--raw takes the bytes as they are";
        let file = quoted_path(path);
        match self {
            QemuImg(name) => format!(
                "import reads raw images: qemu-img convert -f {name} -O raw {file} {file}.raw, then import that; {AS_IS}"
            ),
            Convert(tool) => {
                format!("import reads raw images: {tool} {file} {file}.raw, then import that; {AS_IS}")
            }
            Unpack(tool) => format!("unpack it first ({tool} {file}), then import the image in it; {AS_IS}"),
            By(words) => format!("import reads raw images: {words}; {AS_IS}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{At, FORMATS, HEAD_BYTES, TAIL_BYTES, Way, not_raw};

    #[test]
    fn every_other_format_is_named_with_the_way_to_raw() {
        for format in FORMATS {
            let (mut head, mut tail) = (vec![0; HEAD_BYTES], vec![0; TAIL_BYTES]);
            match format.at {
                At::Start(at) => head[at..at + format.magic.len()].copy_from_slice(format.magic),
                At::End(before) => {
                    tail[TAIL_BYTES - before..][..format.magic.len()].copy_from_slice(format.magic);
                }
            }
            let found = not_raw(Path::new("/a b"), &head, &tail).expect(format.what);
            assert_eq!(found.what, format.what);
            let way = match format.way {
                Way::QemuImg(name) => format!("-f {name} -O raw '/a b' '/a b'.raw, then"),
                Way::Convert(tool) => format!("{tool} '/a b' '/a b'.raw, then"),
                Way::Unpack(tool) => format!("({tool} '/a b')"),
                Way::By(words) => words.to_owned(),
            };
            assert!(found.next.contains(&way) && found.next.contains("--raw"), "{}", found.next);
        }
    }

    #[test]
    fn compressors_that_write_no_magic_are_named_too() {
        let told = |head: &[u8]| not_raw(Path::new("f"), head, head).map(|found| found.what);
        assert_eq!(told(b"\x5d\0\0\x80\0\xff\xff\xff\xff\xff\xff\xff\xff\0"), Some("compressed with lzma"));
        assert_eq!(told(b"\x5d\0\0\x80\0"), None);
        assert_eq!(told(b"\x50\x2a\x4d\x18\x04\0\0\0"), Some("compressed with zstd or lz4"));
    }

    #[test]
    fn disks_and_file_systems_are_taken() {
        let mut mbr = [0; 512];
        mbr[..4].copy_from_slice(b"\xeb\x63\x90\x10");
        mbr[510..].copy_from_slice(b"\x55\xaa");
        let raw: [&[u8]; 7] =
            [&mbr, b"hsqs", b"LUKS\xba\xbe", b"\0", b"", &[0; 512], b"\x33\xc0\x8e\xd0\xbc\0\x7c"];
        for head in raw {
            assert!(not_raw(Path::new("f"), head, head).is_none(), "{head:?}");
        }
    }
}
