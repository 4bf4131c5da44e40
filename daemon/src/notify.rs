//! What systemd wants to hear of a service of `Type=notify`: that it is ready, and that it stops. One datagram each, to
//! the socket that `NOTIFY_SOCKET` names; without one nobody asks.
//!
//! Whoever does not listen is no failure of ours.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// It serves.
pub fn ready() {
    tell("READY=1\n");
}

/// It ends in good order.
pub fn stopping() {
    tell("STOPPING=1\n");
}

fn tell(what: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&socket, what) {
        tracing::warn!(%error, ?socket, "systemd could not be told {:?}", what.trim_end());
    }
}

fn send(socket: &OsStr, what: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        // A name that is in no file system.
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    let ours = UnixDatagram::unbound()?;
    // A manager that stands still holds up nobody.
    ours.set_nonblocking(true)?;
    ours.send_to_addr(what.as_bytes(), &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    use super::send;

    fn heard(manager: &UnixDatagram) -> String {
        let mut bytes = [0; 100];
        let got = manager.recv(&mut bytes).expect("a datagram");
        String::from_utf8_lossy(&bytes[..got]).into_owned()
    }

    #[test]
    fn a_socket_of_either_kind_hears_it() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).expect("bound");
        send(path.as_os_str(), "READY=1\n").expect("sent");
        assert_eq!(heard(&manager), "READY=1\n");

        let name = format!("evolute-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let manager = UnixDatagram::bind_addr(&address).expect("bound");
        send(&OsString::from(format!("@{name}")), "STOPPING=1\n").expect("sent");
        assert_eq!(heard(&manager), "STOPPING=1\n");
    }

    #[test]
    fn nobody_listens_and_that_is_only_said() {
        assert!(send(&OsString::from("/nonexistent/notify"), "READY=1\n").is_err());
    }
}
