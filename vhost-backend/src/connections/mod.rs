//! The connections of one I/O thread to chunkservers, shared by its disks.
//!
//! ```text
//!  volume ─put─▶ Connection ─┐                                 ┌─▶ mail of disk 0 ─▶ volume
//!  volume ─put─▶ Connection ─┴─▶ flush: one writev each … read ┴─▶ mail of disk 1 ─▶ volume
//! ```
//!
//! A turn of the loop ([`Connections::turn`]) reads what has come from all of them, deals it out by the disk's number in
//! each answer's [`RequestId`], lets the disks work, and sends what they put out: one read and one write per chunkserver,
//! turn and 32 disks, as long as 256 KiB hold what has come.
//!
//! What always holds: an answer reaches the disk that asked and no other, and none that is gone (numbers are not given
//! twice); every disk of a connection hears of its end before it can put anything out on the next one.
//!
//! It does not know what the frames mean.

mod connection;
mod outbox;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Instant;

use evolute_protocol::id::{ChunkserverId, ClusterId};
use evolute_protocol::wire::RequestId;
use evolute_protocol::wire::frame::Frame;
use mio::{Registry, Token};
use tracing::{info, warn};

use self::connection::Progress;
pub use self::connection::{Connection, Lost, Readiness};
use crate::wait::Jitter;

/// Disks of one process, all told: what the bits of a [`RequestId`] hold.
pub const DISKS_MAX: usize = 1 << (32 - DISK_SHIFT);
/// Of a request's number, the bits from here to 31 are the disk's, those below and above them its own to choose.
const DISK_SHIFT: u32 = 20;
/// Tokens from here on are those of connections; whatever else a loop polls has lower ones.
pub(crate) const FIRST_TOKEN: usize = 1 << (usize::BITS - 1);
/// Disks that share a connection. A chunkserver reads no more from a connection with 256 Ki requests unanswered
/// (`UNANSWERED_MAX`, `chunkserver/src/server.rs`), and a copyset without a majority answers nothing: so many disks
/// with all they may have out (1024 operations, asked of a leader and of a follower, the oldest of each copyset once
/// more every few seconds) must fit, or one would hold up the others.
pub(crate) const DISKS_PER_CONNECTION: usize = 32;

/// Which disk of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskNumber(u16);

impl DiskNumber {
    pub fn place(self) -> usize {
        usize::from(self.0)
    }

    fn group(self) -> usize {
        self.place() / DISKS_PER_CONNECTION
    }

    fn place_in_group(self) -> usize {
        self.place() % DISKS_PER_CONNECTION
    }

    /// The number under which a chunkserver is asked.
    fn mark(self, id: RequestId) -> RequestId {
        assert!(own_bits(id) == id, "{id:?} is nobody's to choose");
        RequestId(id.0 | u64::from(self.0) << DISK_SHIFT)
    }

    fn of(id: RequestId) -> Option<Self> {
        let bits = (id.0 >> DISK_SHIFT) % DISKS_MAX as u64;
        u16::try_from(bits).ok().map(Self)
    }
}

/// What a disk can choose of a request's number: bits 0 to 19 and 32 to 63.
fn own_bits(id: RequestId) -> RequestId {
    RequestId(id.0 & !((DISKS_MAX as u64 - 1) << DISK_SHIFT))
}

/// Which of a volume's chunkservers: its place in the volume's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerIndex(pub u16);

/// What has come for a disk.
#[derive(Debug)]
pub enum Mail {
    Answer {
        from: PeerIndex,
        frame: Frame,
    },
    /// A connection is gone, and with it every answer that was to come on it. `misled`: its address or its cluster was
    /// wrong, a newer map may know better.
    Lost {
        of: PeerIndex,
        misled: bool,
    },
}

type Mailbox = Rc<RefCell<Vec<Mail>>>;

/// See the [module](self).
#[derive(Debug, Clone)]
pub struct Connections(Rc<RefCell<Table>>);

/// A disk's share of the connections; when it is dropped they forget the disk.
#[derive(Debug)]
pub struct Seat {
    disk: DiskNumber,
    mailbox: Mailbox,
    table: Rc<RefCell<Table>>,
}

#[derive(Debug)]
struct Table {
    registry: Rc<Registry>,
    /// At the place that their tokens say.
    links: Vec<Option<Link>>,
    /// By disk.
    mailboxes: Vec<Mailbox>,
    /// Disks that have mail or may put out what they could not before, each once.
    called: Vec<DiskNumber>,
    jitter: Jitter,
}

/// One connection, and who shares it.
#[derive(Debug)]
struct Link {
    to: (ClusterId, ChunkserverId),
    group: usize,
    connection: Rc<RefCell<Connection>>,
    /// By place in the group: what the disk calls the chunkserver.
    members: [Option<PeerIndex>; DISKS_PER_CONNECTION],
}

impl Connections {
    /// Those of the loop that polls `registry`.
    pub fn new(registry: &Registry) -> io::Result<Self> {
        Ok(Self(Rc::new(RefCell::new(Table {
            registry: Rc::new(registry.try_clone()?),
            links: Vec::new(),
            mailboxes: Vec::new(),
            called: Vec::new(),
            jitter: Jitter::default(),
        }))))
    }

    /// For one disk more, with the next number. `None`: there were [`DISKS_MAX`] already.
    pub fn join(&self) -> Option<Seat> {
        let mut table = self.0.borrow_mut();
        let number = u16::try_from(table.mailboxes.len()).ok().filter(|n| usize::from(*n) < DISKS_MAX)?;
        let mailbox = Mailbox::default();
        table.mailboxes.push(Rc::clone(&mailbox));
        Some(Seat { disk: DiskNumber(number), mailbox, table: Rc::clone(&self.0) })
    }

    pub fn on_event(&self, event: &mio::event::Event) {
        let table = self.0.borrow();
        let place = event.token().0.checked_sub(FIRST_TOKEN);
        if let Some(Some(link)) = place.and_then(|place| table.links.get(place)) {
            link.connection.borrow_mut().on_event(event);
        }
    }

    /// Receives, lets disks work, sends. `work` is told which of them have mail, and is called again when sending showed
    /// a connection to be lost: what was out on it may go elsewhere at once.
    pub fn turn(&self, now: Instant, mut work: impl FnMut(&[DiskNumber])) {
        self.0.borrow_mut().receive(now);
        loop {
            let called = std::mem::take(&mut self.0.borrow_mut().called);
            work(&called);
            let mut table = self.0.borrow_mut();
            table.flush(now);
            // Each round more there is one connection less.
            if table.called.is_empty() {
                return;
            }
        }
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.0.borrow().links.iter().flatten().count()
    }

    /// A turn is due at once. Not the disks': whoever it is for is told when it is read.
    pub fn has_unread(&self) -> bool {
        self.0.borrow().links.iter().flatten().any(|link| link.connection.borrow().has_unread())
    }

    /// When a turn is due although nothing happened.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let table = self.0.borrow();
        table.links.iter().flatten().filter_map(|link| link.connection.borrow().deadline(now)).min()
    }
}

impl Table {
    fn receive(&mut self, now: Instant) {
        for place in 0..self.links.len() {
            let Some(link) = &self.links[place] else { continue };
            let mut connection = link.connection.borrow_mut();
            let end = match connection.advance(now) {
                Progress::Lost(why) => Err(why),
                Progress::Nothing => Ok(()),
                Progress::Opened => {
                    info!("connected to {}", connection.id);
                    link.members().for_each(|(disk, _)| call(&mut self.called, disk));
                    Ok(())
                }
            };
            let end = end.and_then(|()| connection.receive());
            // What has come so far of a greeting is none.
            let end = loop {
                if !connection.is_open() {
                    break end;
                }
                match connection.next_frame() {
                    Ok(Some(frame)) => {
                        if let Some((disk, from)) = link.asked(frame.request) {
                            let frame = Frame { request: own_bits(frame.request), ..frame };
                            deliver(&self.mailboxes, &mut self.called, disk, Mail::Answer { from, frame });
                        }
                    }
                    Ok(None) => break end,
                    Err(nonsense) => break Err(nonsense.into()),
                }
            };
            drop(connection);
            if let Err(why) = end {
                self.lost(place, &why, now);
            }
        }
    }

    fn flush(&mut self, now: Instant) {
        for place in 0..self.links.len() {
            let Some(link) = &self.links[place] else { continue };
            let sent = link.connection.borrow_mut().flush();
            if let Err(why) = sent {
                self.lost(place, &why, now);
            }
        }
    }

    fn lost(&mut self, place: usize, why: &Lost, now: Instant) {
        let jitter = self.jitter.next();
        let Some(link) = &self.links[place] else { return };
        let mut connection = link.connection.borrow_mut();
        let was_open = connection.is_open();
        connection.close(why, now, jitter);
        if was_open || !std::mem::replace(&mut connection.reported, true) {
            warn!("{}: {}", connection.id, evolute_daemon::in_one_line(why));
        }
        let misled = matches!(why, Lost::Unwelcome(_) | Lost::NotOurs(_) | Lost::NoAddress);
        for (disk, of) in link.members() {
            deliver(&self.mailboxes, &mut self.called, disk, Mail::Lost { of, misled });
        }
    }

    fn leave(&mut self, disk: DiskNumber) {
        for place in &mut self.links {
            if let Some(link) = place.as_mut().filter(|link| link.group == disk.group()) {
                link.members[disk.place_in_group()] = None;
                if link.members().next().is_none() {
                    *place = None;
                }
            }
        }
        self.mailboxes[disk.place()].borrow_mut().clear();
    }
}

fn deliver(mailboxes: &[Mailbox], called: &mut Vec<DiskNumber>, disk: DiskNumber, mail: Mail) {
    mailboxes[disk.place()].borrow_mut().push(mail);
    call(called, disk);
}

fn call(called: &mut Vec<DiskNumber>, disk: DiskNumber) {
    if !called.contains(&disk) {
        called.push(disk);
    }
}

impl Link {
    fn members(&self) -> impl Iterator<Item = (DiskNumber, PeerIndex)> {
        let first = self.group * DISKS_PER_CONNECTION;
        self.members.iter().enumerate().filter_map(move |(at, member)| {
            let disk = u16::try_from(first + at).ok().map(DiskNumber)?;
            member.map(|index| (disk, index))
        })
    }

    /// Who asked this; nobody that is still there, perhaps, and whatever a chunkserver makes up.
    fn asked(&self, id: RequestId) -> Option<(DiskNumber, PeerIndex)> {
        let disk = DiskNumber::of(id).filter(|disk| disk.group() == self.group)?;
        self.members[disk.place_in_group()].map(|index| (disk, index))
    }
}

impl Seat {
    /// The connection to a chunkserver, which mail will call `index` from now on. Nothing is connected before it is
    /// wanted.
    pub fn link(&self, to: (ClusterId, ChunkserverId), index: PeerIndex) -> Rc<RefCell<Connection>> {
        let mut table = self.table.borrow_mut();
        let group = self.disk.group();
        let known = table
            .links
            .iter()
            .position(|link| link.as_ref().is_some_and(|link| link.to == to && link.group == group));
        let place = known.unwrap_or_else(|| {
            let place = table.links.iter().position(Option::is_none).unwrap_or(table.links.len());
            let token = Token(FIRST_TOKEN + place);
            let connection = Connection::new(to.0, to.1, token, Rc::clone(&table.registry));
            let connection = Rc::new(RefCell::new(connection));
            let link = Link { to, group, connection, members: [None; DISKS_PER_CONNECTION] };
            if place == table.links.len() {
                table.links.push(Some(link));
            } else {
                table.links[place] = Some(link);
            }
            place
        });
        let link = table.links[place].as_mut().expect("found or made");
        link.members[self.disk.place_in_group()] = Some(index);
        Rc::clone(&link.connection)
    }

    pub fn mark(&self, id: RequestId) -> RequestId {
        self.disk.mark(id)
    }

    /// Moves what has come to `out`.
    pub fn take_mail(&self, out: &mut Vec<Mail>) {
        out.append(&mut self.mailbox.borrow_mut());
    }

    /// Gives up its share of all connections.
    pub fn leave(&self) {
        self.table.borrow_mut().leave(self.disk);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.leave();
    }
}
