//! The disk as its user sees it: requests in, answers out, in any order, whatever becomes of the server.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::DriverError;
use super::memory::{DATA_AT, GuestMemory};
use super::ring::{Buffer, Ring};
use super::session::{Inflight, Session};
use crate::content::SECTOR_BYTES;
use crate::random::Random;

/// The feature bits we speak of.
pub mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const FLUSH: u64 = 1 << 9;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const WANTED: u64 = SIZE_MAX
        | SEG_MAX
        | FLUSH
        | MQ
        | DISCARD
        | WRITE_ZEROES
        | INDIRECT
        | EVENT_IDX
        | PROTOCOL
        | VERSION_1;
}

/// The longest request we make, and a server must take: virtio's and ours.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;
/// A data slot is larger than a request, so that a request need not begin at its start.
const SLOT_BYTES: u64 = REQUEST_BYTES_MAX as u64 + 4096;
/// Header, status, payload of a discard, indirect table.
const CONTROL_BYTES: u64 = 512;
const STATUS_AT: u64 = 16;
const RANGE_AT: u64 = 32;
const TABLE_AT: u64 = 64;
/// Descriptors a request's data is cut into, at most; the table above has room for two more.
const PIECES_MAX: usize = 6;
const RING_SIZE: u16 = 128;
/// What the status byte holds until the device writes it.
const STATUS_UNSET: u8 = 0xff;

const _: () = {
    assert!(TABLE_AT + 16 * (PIECES_MAX as u64 + 2) <= CONTROL_BYTES);
};

#[derive(Debug, Clone)]
pub struct DeviceOptions {
    pub socket: PathBuf,
    pub queues: u16,
    /// Requests under way per queue, at most.
    pub depth: usize,
    /// Pause between two attempts to reach a server that went away. QEMU's `reconnect=1` is a second.
    pub reconnect_every: Duration,
    pub seed: u64,
}

/// What the device says of itself.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    pub sectors: u64,
    pub queues: u16,
    pub has_flush: bool,
    /// 0: not offered.
    pub discard_sectors_max: u32,
    pub zeroes_sectors_max: u32,
}

impl Geometry {
    pub fn parse(config: &[u8], features: u64) -> Self {
        let u32_at = |at: usize| {
            config.get(at..at + 4).map_or(0, |b| u32::from_le_bytes(b.try_into().expect("four bytes")))
        };
        let if_offered = |bit: u64, value: u32| if features & bit != 0 { value } else { 0 };
        let queues = config.get(34..36).map_or(1, |b| u16::from_le_bytes([b[0], b[1]]));
        Self {
            sectors: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            queues: if features & feature::MQ != 0 { queues } else { 1 },
            has_flush: features & feature::FLUSH != 0,
            discard_sectors_max: if_offered(feature::DISCARD, u32_at(36)),
            zeroes_sectors_max: if_offered(feature::WRITE_ZEROES, u32_at(48)),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request<'d> {
    Read { sectors: u32 },
    Write { data: &'d [u8] },
    Discard { sectors: u32 },
    WriteZeroes { sectors: u32, unmap: bool },
    Flush,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// The device's status byte, other than OK.
    Refused(u8),
}

#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// As given with the request.
    pub token: usize,
    pub slot: usize,
    pub outcome: Outcome,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    token: usize,
    /// Where the data is, and how long.
    data: (u64, usize),
}

pub struct Device {
    options: DeviceOptions,
    memory: GuestMemory,
    rings: Vec<Ring>,
    inflight: Option<Inflight>,
    session: Option<Session>,
    next_attempt: Instant,
    /// Connections made, the first included.
    pub connections: u32,
    pub geometry: Geometry,
    features: u64,
    /// Per queue; a slot belongs to its queue.
    free: Vec<Vec<usize>>,
    slots: Vec<Option<Slot>>,
    random: Random,
    taken: Vec<(usize, u32)>,
    /// Why the last attempt to connect failed.
    pub trouble: Option<String>,
}

impl Device {
    /// Connects for the first time. A server that is not there (yet) is an error here.
    pub fn connect(options: DeviceOptions) -> Result<Self, DriverError> {
        let slots = usize::from(options.queues) * options.depth;
        let rings_bytes = u64::from(options.queues) * Ring::bytes(RING_SIZE);
        let memory = GuestMemory::new(rings_bytes + slots as u64 * CONTROL_BYTES, slots as u64 * SLOT_BYTES)?;
        let mut rings = (0..options.queues)
            .map(|queue| Ring::new(u64::from(queue) * Ring::bytes(RING_SIZE), RING_SIZE))
            .collect::<Result<Vec<_>, _>>()?;
        let mut inflight = None;
        let session = Session::connect(&options.socket, &memory, &mut rings, &mut inflight)?;
        let free = (0..usize::from(options.queues))
            .map(|queue| (queue * options.depth..(queue + 1) * options.depth).collect())
            .collect();
        Ok(Self {
            geometry: session.geometry,
            features: session.features,
            session: Some(session),
            memory,
            rings,
            inflight,
            next_attempt: Instant::now(),
            connections: 1,
            free,
            slots: vec![None; slots],
            random: Random::new(options.seed ^ 0x0064_7269_7665_7221),
            taken: Vec::new(),
            trouble: None,
            options,
        })
    }

    /// Another device, at another server: what was under way here stays so for ever.
    pub fn elsewhere(&self, socket: PathBuf) -> Result<Self, DriverError> {
        let mut other = Self::connect(DeviceOptions { socket, ..self.options.clone() })?;
        other.connections += self.connections;
        Ok(other)
    }

    /// Requests that are not answered.
    pub fn tokens_under_way(&self) -> Vec<usize> {
        self.slots.iter().flatten().map(|slot| slot.token).collect()
    }

    pub fn is_connected(&self) -> bool {
        self.session.is_some()
    }

    /// The server keeps what is under way where its successor finds it.
    pub fn has_inflight(&self) -> bool {
        self.inflight.is_some()
    }

    pub fn under_way(&self) -> usize {
        self.slots.iter().filter(|slot| slot.is_some()).count()
    }

    /// The queue can take one more request, whatever its shape.
    pub fn has_room(&self, queue: usize) -> bool {
        !self.free[queue].is_empty() && self.rings[queue].free_descriptors() >= PIECES_MAX + 2
    }

    /// Puts a request on a queue that [`Device::has_room`]; the device hears of it by [`Device::tell`].
    pub fn submit(&mut self, queue: usize, token: usize, sector: u64, request: Request<'_>) {
        let slot = self.free[queue].pop().expect("the caller asked has_room");
        let control = self.control_at(slot);
        let (kind, bytes, device_writes) = match request {
            Request::Read { sectors } => (0_u32, sectors as usize * SECTOR_BYTES, true),
            Request::Write { data } => (1, data.len(), false),
            Request::Flush => (4, 0, false),
            Request::Discard { .. } => (11, 0, false),
            Request::WriteZeroes { .. } => (13, 0, false),
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        let ranged = matches!(request, Request::Discard { .. } | Request::WriteZeroes { .. });
        let header_sector = if ranged || kind == 4 { 0 } else { sector };
        header[8..].copy_from_slice(&header_sector.to_le_bytes());
        self.memory.write(control, &header);
        self.memory.write(control + STATUS_AT, &[STATUS_UNSET]);
        let mut buffers = vec![Buffer { at: control, bytes: 16, device_writes: false }];
        let data = DATA_AT + slot as u64 * SLOT_BYTES + 512 * self.random.below(8);
        if let Request::Discard { sectors } | Request::WriteZeroes { sectors, .. } = request {
            let unmap = u32::from(matches!(request, Request::WriteZeroes { unmap: true, .. }));
            let mut range = [0; 16];
            range[..8].copy_from_slice(&sector.to_le_bytes());
            range[8..12].copy_from_slice(&sectors.to_le_bytes());
            range[12..].copy_from_slice(&unmap.to_le_bytes());
            self.memory.write(control + RANGE_AT, &range);
            buffers.push(Buffer { at: control + RANGE_AT, bytes: 16, device_writes: false });
        }
        if let Request::Write { data: content } = request {
            self.memory.write(data, content);
        }
        self.cut(data, bytes, device_writes, &mut buffers);
        buffers.push(Buffer { at: control + STATUS_AT, bytes: 1, device_writes: true });
        let indirect = self.features & feature::INDIRECT != 0 && self.random.chance(75);
        let table = indirect.then_some(control + TABLE_AT);
        self.slots[slot] = Some(Slot { token, data: (data, bytes) });
        self.rings[queue].offer(&self.memory, slot, &buffers, table);
    }

    /// Cuts the data into pieces of whole sectors, as a page cache would.
    fn cut(&mut self, mut at: u64, mut bytes: usize, device_writes: bool, buffers: &mut Vec<Buffer>) {
        let pieces = 1 + self.random.index(PIECES_MAX);
        for left in (0..pieces).rev() {
            let sectors = bytes / SECTOR_BYTES;
            if sectors == 0 {
                return;
            }
            let taken = if left == 0 { sectors } else { 1 + self.random.index(sectors) };
            let piece = u32::try_from(taken * SECTOR_BYTES).expect("a request is short");
            buffers.push(Buffer { at, bytes: piece, device_writes });
            at += u64::from(piece);
            bytes -= piece as usize;
        }
    }

    /// Kicks the queues that want it.
    pub fn tell(&mut self) {
        for ring in &mut self.rings {
            ring.tell(&self.memory);
        }
    }

    /// Waits for answers, at most `timeout`; reconnects when it is time to.
    pub fn wait(&mut self, timeout: Duration, answers: &mut Vec<Answer>) -> Result<(), DriverError> {
        self.take(answers)?;
        if answers.is_empty() {
            self.sleep(timeout);
            self.take(answers)?;
        }
        if self.session.as_ref().is_some_and(Session::is_gone) {
            self.session = None;
            self.next_attempt = Instant::now();
        }
        if self.session.is_none() && Instant::now() >= self.next_attempt {
            self.reconnect()?;
        }
        Ok(())
    }

    fn take(&mut self, answers: &mut Vec<Answer>) -> Result<(), DriverError> {
        for (queue, ring) in self.rings.iter_mut().enumerate() {
            ring.take(&self.memory, &mut self.taken)?;
            for (slot, _) in self.taken.drain(..) {
                let token = self.slots[slot].as_ref().expect("a slot under way").token;
                let mut status = [0];
                let control =
                    u64::from(self.options.queues) * Ring::bytes(RING_SIZE) + slot as u64 * CONTROL_BYTES;
                self.memory.read(control + STATUS_AT, &mut status);
                let outcome = match status[0] {
                    0 => Outcome::Done,
                    STATUS_UNSET => {
                        return Err(DriverError::Broken(format!(
                            "it answered slot {slot} of queue {queue} without a status"
                        )));
                    }
                    refused => Outcome::Refused(refused),
                };
                answers.push(Answer { token, slot, outcome });
            }
        }
        Ok(())
    }

    /// The data of an answered read. The slot is free after [`Device::release`].
    pub fn data<'b>(&self, answer: Answer, buffer: &'b mut [u8]) -> &'b [u8] {
        let (at, bytes) = self.slots[answer.slot].as_ref().expect("not released yet").data;
        self.memory.read(at, &mut buffer[..bytes]);
        &buffer[..bytes]
    }

    pub fn release(&mut self, answer: Answer) {
        self.slots[answer.slot] = None;
        self.free[answer.slot / self.options.depth].push(answer.slot);
    }

    fn sleep(&mut self, timeout: Duration) {
        let calls: Vec<BorrowedFd<'_>> = self
            .rings
            .iter()
            // SAFETY: the eventfds live as long as the rings, which are borrowed for the call.
            .map(|ring| unsafe { BorrowedFd::borrow_raw(ring.call.as_raw_fd()) })
            .collect();
        let mut polled: Vec<PollFd<'_>> =
            calls.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        if let Some(session) = &self.session {
            polled.push(PollFd::from_borrowed_fd(session.stream(), PollFlags::RDHUP));
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // Interrupted or not, the rings are looked at next.
        let _ = poll(&mut polled, Some(&timeout));
        for ring in &self.rings {
            let _ = ring.call.read();
        }
    }

    /// A server that is not there yet, or dies in the handshake, is tried again; one that lacks what the first one
    /// had is not.
    fn reconnect(&mut self) -> Result<(), DriverError> {
        match Session::connect(&self.options.socket, &self.memory, &mut self.rings, &mut self.inflight) {
            Ok(session) => {
                if session.features != self.features {
                    return Err(DriverError::Lacks("the features its predecessor offered"));
                }
                self.session = Some(session);
                self.connections += 1;
                self.trouble = None;
                Ok(())
            }
            Err(error @ (DriverError::Connect { .. } | DriverError::Gone { .. })) => {
                self.trouble = Some(error.to_string());
                self.next_attempt = Instant::now() + self.options.reconnect_every;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn control_at(&self, slot: usize) -> u64 {
        u64::from(self.options.queues) * Ring::bytes(RING_SIZE) + slot as u64 * CONTROL_BYTES
    }
}
