//! The socket in the file system: made at a name that is free, taken away again when it is ours, and nothing else touched.
//!
//! What always holds:
//!
//! - Only a dead *socket* is replaced: one in which nobody listens any more. Whatever else has the name (an image, a
//!   directory, a link) stays, byte for byte, and is named in the refusal.
//! - Two that start at one name at the same time do not take each other's socket away: who looks, removes and binds holds
//!   the directory's lock meanwhile, and what is removed is first moved aside and looked at once more.
//! - Nobody can connect before the socket has its mode and its group.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use evolute_daemon::shell::quoted_path;
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Whoever can connect can read and write the disk.
pub const SOCKET_MODE: u32 = 0o600;
/// Front ends that may wait to be accepted.
const BACKLOG: i32 = 128;
/// The directory's lock is held for some system calls. Longer: somebody holds it who is not one of us.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Who may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAccess {
    pub mode: u32,
    /// None: the process's own.
    pub group: Option<u32>,
}

impl Default for SocketAccess {
    fn default() -> SocketAccess {
        SocketAccess { mode: SOCKET_MODE, group: None }
    }
}

/// Why there is no socket at that name.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("somebody serves it already")]
    Served,
    #[error("there is {0} with this name, and only a socket that nobody serves any more is replaced")]
    Occupied(&'static str),
    #[error(
        "the path has {0} bytes; a socket's has at most 107: name one in a directory such as /run/evolute"
    )]
    TooLong(usize),
    /// After a reboot, too: /run is made anew by it.
    #[error("its directory does not exist: mkdir -p {}", quoted_path(.0))]
    NoDirectory(PathBuf),
    #[error("{} is no directory: name a socket in one", .0.display())]
    NotInDirectory(PathBuf),
    #[error(
        "this user ({user}) may not make a socket in {}: run it as one who may, or name a socket in another directory",
        .directory.display()
    )]
    NotAllowed {
        directory: PathBuf,
        user: u32,
        #[source]
        source: io::Error,
    },
    #[error("the file system of {} is read-only: name a socket in another directory, such as /run/evolute", .0.display())]
    ReadOnly(PathBuf),
    #[error("the lock of its directory is held by somebody else")]
    Locked,
    #[error("cannot give it mode {0:o} and its group")]
    Access(u32, #[source] io::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl ListenError {
    /// What a system call about this path came to, as whoever named the path can mend it.
    fn at(path: &Path, errno: Errno) -> ListenError {
        let directory = directory_of(path).to_owned();
        match errno {
            Errno::NAMETOOLONG => ListenError::TooLong(path.as_os_str().len()),
            Errno::NOENT => ListenError::NoDirectory(directory),
            Errno::NOTDIR => ListenError::NotInDirectory(directory),
            Errno::ACCESS | Errno::PERM => {
                let user = rustix::process::geteuid().as_raw();
                ListenError::NotAllowed { directory, user, source: errno.into() }
            }
            Errno::ROFS => ListenError::ReadOnly(directory),
            other => other.into(),
        }
    }
}

impl From<Errno> for ListenError {
    fn from(errno: Errno) -> ListenError {
        ListenError::Io(errno.into())
    }
}

/// A bound socket, removed again when dropped.
#[derive(Debug)]
pub struct Listening {
    pub(super) listener: UnixListener,
    pub(super) path: PathBuf,
    /// Device and inode: a successor's socket at the same name is not ours to remove.
    identity: (u64, u64),
}

fn identity(of: &fs::Metadata) -> (u64, u64) {
    (of.st_dev(), of.st_ino())
}

fn kind(of: fs::FileType) -> &'static str {
    match of {
        kind if kind.is_file() => "a regular file",
        kind if kind.is_dir() => "a directory",
        kind if kind.is_symlink() => "a symbolic link",
        kind if kind.is_fifo() => "a FIFO",
        kind if kind.is_block_device() => "a block device",
        kind if kind.is_char_device() => "a character device",
        _ => "something",
    }
}

impl Listening {
    /// Binds now, so that a front end can connect while the rest still starts.
    pub fn at(path: &Path, access: SocketAccess) -> Result<Listening, ListenError> {
        let address = SocketAddrUnix::new(path).map_err(|errno| ListenError::at(path, errno))?;
        let _lock = lock_directory(path)?;
        remove_dead(path, &address)?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        // It fails where anything is: nothing is ever replaced by it.
        rustix::net::bind(&socket, &address).map_err(|errno| ListenError::at(path, errno))?;
        let mut made = Listening {
            listener: UnixListener::from(socket),
            path: path.to_owned(),
            identity: identity(&fs::symlink_metadata(path)?),
        };
        made.open(access)?;
        Ok(made)
    }

    /// From here on front ends can connect; until here all are refused.
    fn open(&mut self, access: SocketAccess) -> Result<(), ListenError> {
        let failed = |error| ListenError::Access(access.mode, error);
        // The group first: between the two nobody has a right that he does not keep.
        if let Some(group) = access.group {
            std::os::unix::fs::lchown(&self.path, None, Some(group)).map_err(failed)?;
        }
        fs::set_permissions(&self.path, fs::Permissions::from_mode(access.mode)).map_err(failed)?;
        Ok(rustix::net::listen(&self.listener, BACKLOG)?)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // A successor may listen at the same path already. It holds the lock while it replaces ours.
        let Ok(_lock) = lock_directory(&self.path) else { return };
        if fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Held by whoever makes or removes a socket in this directory; a lock on the directory itself leaves no file behind.
fn lock_directory(path: &Path) -> Result<File, ListenError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory_of(path), flags, Mode::empty())
        .map_err(|errno| ListenError::at(path, errno))?;
    let directory = File::from(directory);
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(directory),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(Errno::WOULDBLOCK) => return Err(ListenError::Locked),
            // A file system without locks: what is removed is still looked at twice.
            Err(_) => return Ok(directory),
        }
    }
}

/// Makes the name free if what has it is a socket in which nobody listens.
fn remove_dead(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if !found.file_type().is_socket() {
        return Err(ListenError::Occupied(kind(found.file_type())));
    }
    if is_served(address)? {
        return Err(ListenError::Served);
    }
    // Not `remove`: whoever put something else at this name since we looked would lose it.
    let aside = aside(path);
    match renameat_with(CWD, path, CWD, &aside, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    }
    let moved = fs::symlink_metadata(&aside)?;
    if moved.file_type().is_socket() && identity(&moved) == identity(&found) {
        return Ok(fs::remove_file(&aside)?);
    }
    renameat_with(CWD, &aside, CWD, path, RenameFlags::NOREPLACE)?;
    Err(ListenError::Occupied("something newer"))
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".dead.{}", std::process::id()));
    path.with_file_name(name)
}

/// Whether somebody listens in this socket.
fn is_served(address: &SocketAddrUnix) -> Result<bool, ListenError> {
    // Not blocking: one whose queue of callers is full is alive, and must not be waited for.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, address) {
        Ok(()) | Err(Errno::AGAIN | Errno::INPROGRESS) => Ok(true),
        Err(Errno::CONNREFUSED) => Ok(false),
        // Gone between two looks.
        Err(Errno::NOENT) => Ok(false),
        Err(Errno::PROTOTYPE) => Err(ListenError::Occupied("a socket of another kind")),
        Err(errno) => Err(errno.into()),
    }
}

/// The number of a group given by number or by name.
pub fn group_of(text: &str) -> Result<u32, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let name = CString::new(text).map_err(|_| format!("{text:?} cannot be a group's name"))?;
    look_up(&name).ok_or_else(|| format!("there is no group {text:?}"))
}

fn look_up(name: &CStr) -> Option<u32> {
    let mut buffer = vec![0; 1 << 16];
    // SAFETY: all zeroes is a valid `group`: null pointers and a number.
    let mut group: libc::group = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: every pointer is to something that outlives the call, and the buffer is as long as is said.
    let failed = unsafe {
        libc::getgrnam_r(name.as_ptr(), &raw mut group, buffer.as_mut_ptr(), buffer.len(), &raw mut found)
    };
    (failed == 0 && !found.is_null()).then_some(group.gr_gid)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
    use std::path::Path;

    use rustix::io::Errno;

    use super::{ListenError, Listening, SocketAccess, group_of};

    fn listen(path: &Path) -> Result<Listening, ListenError> {
        Listening::at(path, SocketAccess::default())
    }

    /// An image named where the socket's path belongs (`--disk vm1=/srv/vm1.raw`) is somebody's only copy.
    #[test]
    fn what_is_no_socket_survives_and_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        fs::write(path("image"), "my only copy").expect("written");
        fs::create_dir(path("directory")).expect("made");
        symlink(path("image"), path("link")).expect("made");
        symlink(path("nowhere"), path("dangling")).expect("made");
        let other = UnixDatagram::bind(path("datagram")).expect("bound");
        rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .expect("made");
        for (name, what) in [
            ("image", "a regular file"),
            ("directory", "a directory"),
            ("link", "a symbolic link"),
            ("dangling", "a symbolic link"),
            ("fifo", "a FIFO"),
            ("datagram", "a socket of another kind"),
        ] {
            let refused = listen(&path(name)).expect_err("refused").to_string();
            assert!(refused.contains(what), "{name}: {refused}");
        }
        drop(other);
        assert_eq!(fs::read(path("image")).expect("still there"), b"my only copy");
        for (name, is) in [("directory", "dir"), ("link", "link"), ("dangling", "link"), ("fifo", "other")] {
            let kind = fs::symlink_metadata(path(name)).expect("still there").file_type();
            let found = if kind.is_dir() {
                "dir"
            } else if kind.is_symlink() {
                "link"
            } else {
                "other"
            };
            assert_eq!(found, is, "{name}");
        }
        assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 6, "nothing is left beside");
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk.sock");
        drop(UnixListener::bind(&path).expect("bound"));
        let first = listen(&path).expect("the dead one is replaced");
        assert!(matches!(listen(&path), Err(ListenError::Served)));
        // Even with as many callers as can wait.
        let callers: Vec<_> = (0..2 * super::BACKLOG)
            .map_while(|_| {
                let socket = rustix::net::socket_with(
                    rustix::net::AddressFamily::UNIX,
                    rustix::net::SocketType::STREAM,
                    rustix::net::SocketFlags::NONBLOCK,
                    None,
                );
                let socket = socket.expect("a socket");
                let address = rustix::net::SocketAddrUnix::new(&path).expect("an address");
                rustix::net::connect(&socket, &address).ok().map(|()| socket)
            })
            .collect();
        assert!(matches!(listen(&path), Err(ListenError::Served)), "{} callers", callers.len());
        drop((first, callers));
        assert!(!path.exists(), "it takes its socket away");
        let long = dir.path().join("s".repeat(120));
        assert!(matches!(listen(&long), Err(ListenError::TooLong(_))));
    }

    /// /run is empty after every boot, and the path is often pasted.
    #[test]
    fn a_directory_that_is_not_there_is_named_with_what_makes_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let missing = dir.path().join("a run");
        let refused = listen(&missing.join("disk.sock")).expect_err("refused").to_string();
        let mends = format!("mkdir -p '{}'", missing.display());
        assert!(refused.contains(&mends), "{refused}");
        let mended = std::process::Command::new("sh").args(["-c", &mends]).status().expect("sh");
        assert!(mended.success());
        listen(&missing.join("disk.sock")).expect("that was all");
    }

    #[test]
    fn why_a_directory_holds_no_socket_is_said() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("vm1.raw");
        fs::write(&file, "an image").expect("written");
        let refused = listen(&file.join("disk.sock")).expect_err("refused").to_string();
        assert!(refused.contains(&format!("{} is no directory", file.display())), "{refused}");
        for (errno, why) in [
            (Errno::ACCESS, "may not make a socket in /run/evolute"),
            (Errno::PERM, "may not make a socket in /run/evolute"),
            (Errno::ROFS, "the file system of /run/evolute is read-only"),
        ] {
            let refused = ListenError::at(Path::new("/run/evolute/disk.sock"), errno).to_string();
            assert!(refused.contains(why), "{refused}");
        }
        assert!(ListenError::at(Path::new("disk.sock"), Errno::NOTDIR).to_string().starts_with(". is no"));
    }

    #[test]
    fn a_successors_socket_is_not_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk.sock");
        let first = listen(&path).expect("listens");
        fs::remove_file(&path).expect("somebody's doing");
        let _second = listen(&path).expect("the name is free");
        drop(first);
        assert!(UnixStream::connect(&path).is_ok());
    }

    /// Many start at one dead socket at the same time: one of them has it in the end, and it is the one that says so.
    #[test]
    fn of_many_that_start_at_once_one_listens() {
        let dir = tempfile::tempdir().expect("a directory");
        for round in 0..20 {
            let path = dir.path().join(format!("{round}.sock"));
            drop(UnixListener::bind(&path).expect("bound"));
            let listening: Vec<_> = std::thread::scope(|scope| {
                let all: Vec<_> = (0..4).map(|_| scope.spawn(|| listen(&path))).collect();
                all.into_iter().map(|one| one.join().expect("no panic")).collect()
            });
            let good = listening.iter().filter(|one| one.is_ok()).count();
            assert_eq!(good, 1, "{listening:?}");
            assert!(UnixStream::connect(&path).is_ok());
        }
    }

    #[test]
    fn mode_and_group_are_as_wanted() {
        use std::os::linux::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk.sock");
        let own = rustix::process::getegid().as_raw();
        let _open = Listening::at(&path, SocketAccess { mode: 0o660, group: Some(own) }).expect("listens");
        let found = fs::metadata(&path).expect("there");
        assert_eq!((found.permissions().mode() & 0o777, found.st_gid()), (0o660, own));
        assert_eq!((group_of("root"), group_of("7")), (Ok(0), Ok(7)));
        assert!(group_of("no such group").is_err());
    }
}
