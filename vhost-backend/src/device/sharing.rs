//! Whether a front end shares its guest's memory with us, or keeps to itself what is written there.
//!
//! A VMM that maps the file of its guest's memory privately (QEMU without `share=on`) gives us the file all the same. What
//! the guest writes is in the VMM's own copy then: rings never move, and a buffer that is written to the disk is zeroes.
//! Nothing in the protocol says so, but the kernel does, to those who may look: root, and who runs as the same user.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;

use super::callers::Peer;

/// What to type, for whoever reads the log.
pub const HOW_TO_SHARE: &str = "QEMU: -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem (and \
    share=on for every -numa memdev); libvirt: <memoryBacking><source type='memfd'/><access mode='shared'/>; cloud-hypervisor: \
    --memory size=SIZE,shared=on";

/// True: the process has this file mapped at this address of its own, and not shared. False: shared, or nobody tells.
pub fn is_private(front_end: &Peer, user_addr: u64, file: &File) -> bool {
    let (Ok(stat), Some(pid)) = (rustix::fs::fstat(file.as_fd()), front_end.pid()) else { return false };
    let Ok(maps) = File::open(format!("/proc/{pid}/maps")) else { return false };
    let device = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let mut lines = BufReader::new(maps).lines().map_while(Result::ok);
    lines.find_map(|line| Mapping::parse(&line).filter(|it| it.range.contains(&user_addr))).is_some_and(
        // Somebody else may have connected for it: then this is another process's address.
        |it| it.is_private && (it.device, it.inode) == (device, stat.st_ino),
    )
}

/// A line of `maps`: `7f0000000000-7f0020000000 rw-s 00000000 00:01 1234 /memfd:mem (deleted)`.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    range: std::ops::Range<u64>,
    is_private: bool,
    device: (u32, u32),
    inode: u64,
}

impl Mapping {
    fn parse(line: &str) -> Option<Mapping> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let range = u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?;
        let is_private = words.next()?.ends_with('p');
        let (major, minor) = words.nth(1)?.split_once(':')?;
        let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
        Some(Mapping { range, is_private, device, inode: words.next()?.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::Mapping;

    #[test]
    fn a_line_of_maps_is_understood_and_garbage_is_nothing() {
        let line =
            "7f1c00000000-7f1c20000000 rw-p 00000000 00:01 8245                       /memfd:m (deleted)";
        let mapping = Mapping {
            range: 0x7f1c_0000_0000..0x7f1c_2000_0000,
            is_private: true,
            device: (0, 1),
            inode: 8245,
        };
        assert_eq!(Mapping::parse(line), Some(mapping));
        assert_eq!(
            Mapping::parse("7f1c00000000-7f1c20000000 rw-s 0 fe:1f 9").map(|it| it.is_private),
            Some(false)
        );
        for garbage in ["", "7f", "1-2 rw-p", "1-2 rw-p 0 0", "g-2 rw-p 0 0:0 1", "1-2 rw-p 0 0:0 x"] {
            assert_eq!(Mapping::parse(garbage), None, "{garbage}");
        }
    }
}
