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

use super::DeviceConfig;
use super::callers::Peer;
use crate::backing::Capacity;

/// How long a VMM with a guest waits. A control plane that is there answers in milliseconds.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often the true size is said, until it is asked for.
pub const SAY_EVERY: Duration = Duration::from_secs(1);

/// What one front end knows of the size.
#[derive(Debug)]
pub struct Sizing {
    capacity: Capacity,
    starting_max: Duration,
    asking: Option<Asking>,
    channel: Option<Channel>,
    /// It was told a size of nothing, because ours was not known yet.
    owes: bool,
    said: Option<Instant>,
}

/// A front end that has asked and was not answered.
#[derive(Debug)]
struct Asking {
    since: Instant,
    is_starting: bool,
}

/// What becomes of a question for the size.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    Wait,
    /// The truth, or a nothing that can be corrected later.
    Say,
    HangUp,
}

impl Sizing {
    pub fn new(config: &DeviceConfig) -> Sizing {
        let (capacity, starting_max) = (config.capacity.clone(), config.starting_max);
        Sizing { capacity, starting_max, asking: None, channel: None, owes: false, said: None }
    }

    /// Of a message that is there and was not taken yet: where to say what nobody asked for.
    pub fn hear_of_channel(&mut self, stream: &UnixStream) {
        self.channel = Channel::peeked(stream).or(self.channel.take());
    }

    /// Its question is there and is not taken yet.
    pub fn keeps_waiting(&self) -> bool {
        self.asking.is_some()
    }

    pub fn asked(&mut self, peer: &Peer, now: Instant) -> Answer {
        self.owes = self.capacity.get().is_none();
        if self.owes {
            let starting_max = self.starting_max;
            let asking = self.asking.get_or_insert_with(|| {
                let is_starting = peer.age().is_some_and(|age| age <= starting_max);
                Asking { since: now, is_starting }
            });
            if asking.is_starting || now.duration_since(asking.since) < PATIENCE {
                return Answer::Wait;
            }
        }
        self.asking = None;
        if self.owes && self.channel.is_none() { Answer::HangUp } else { Answer::Say }
    }

    /// Whether the true size is still to be said.
    pub fn owes(&self) -> bool {
        self.owes && !self.keeps_waiting()
    }

    /// Says that the configuration changed, once the size is known. Whoever takes note asks for it anew; QEMU does only
    /// while its guest drives the disk, so it is said now and then until it is asked for.
    pub fn tell(&mut self, now: Instant) {
        let is_time = self.said.is_none_or(|said| now.duration_since(said) >= SAY_EVERY);
        if self.owes() && is_time && self.capacity.get().is_some() {
            self.owes = self.channel.as_ref().is_some_and(Channel::configuration_changed);
            self.said = Some(now);
        }
    }
}

/// The front end's ear for what we say unasked. The vhost crate keeps it to itself and cannot say what we have to.
#[derive(Debug)]
struct Channel(OwnedFd);

impl Channel {
    fn peeked(stream: &UnixStream) -> Option<Channel> {
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
    fn configuration_changed(&self) -> bool {
        const VERSION: u32 = 1;
        let header = [BackendReq::CONFIG_CHANGE_MSG as u32, VERSION, 0];
        let bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        match send(&self.0, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => sent == bytes.len(),
            Err(error) => error == rustix::io::Errno::AGAIN,
        }
    }
}
