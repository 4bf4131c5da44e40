//! A front end that asks how large its disk is before the volume is known.
//!
//! A VMM asks in the middle of what it does for its guest, and waits for the answer with its big lock held: a guest that
//! runs stands still meanwhile, all of it, because a disk is being added. So a VMM that has been there for a while is told
//! a size of nothing within half a second, and the true one once it is known: to a guest the disk grows. A VMM that has
//! just started has no guest yet; it waits, and its firmware finds the disk whole.
//!
//! A front end to which nothing can be said unasked (cloud-hypervisor) is hung up on instead.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use vhost::vhost_user::message::BackendReq;

use super::callers::Peer;

/// How long a VMM with a guest waits. A control plane that is there answers in milliseconds.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often the true size is said, until it is asked for.
pub const SAY_EVERY: Duration = Duration::from_secs(1);

/// A front end that has asked and was not answered.
#[derive(Debug)]
pub struct Asking {
    since: Instant,
    is_starting: bool,
}

impl Asking {
    pub fn new(peer: &Peer, starting_max: Duration, now: Instant) -> Asking {
        Asking { since: now, is_starting: peer.age().is_some_and(|age| age <= starting_max) }
    }

    /// Whether it can go on waiting.
    pub fn waits(&self, now: Instant) -> bool {
        self.is_starting || now.duration_since(self.since) < PATIENCE
    }
}

/// The front end's ear for what we say unasked. The vhost crate keeps it to itself and cannot say what we have to.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Of a message that is there and was not taken yet.
    pub fn peeked(stream: &UnixStream) -> Option<Channel> {
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags).ok()?;
        ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next().map(Channel),
            _ => None,
        })
    }

    /// Says that the configuration changed, without waiting. False: nobody will hear it any more.
    pub fn configuration_changed(&self) -> bool {
        const VERSION: u32 = 1;
        let header = [BackendReq::CONFIG_CHANGE_MSG as u32, VERSION, 0];
        let bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        match send(&self.0, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => sent == bytes.len(),
            Err(error) => error == rustix::io::Errno::AGAIN,
        }
    }
}
