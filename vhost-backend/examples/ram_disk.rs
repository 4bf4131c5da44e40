//! A disk in memory behind the real guest edge: what the edge itself costs, and a target for guests and load
//! generators without a cluster.
//!
//! `cargo run --release -p evolute-vhost-backend --example ram_disk -- SOCKET [SIZE_MIB] [FILE] [DELAY_US]`
//!
//! With FILE the bytes are in that file (put it in /dev/shm), so they outlive a kill -9; with DELAY_US answers come that
//! much later and in reversed order, so that a kill finds requests in flight.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use evolute_vhost_backend::backing::{Backing, Outcome, Request, Ticket};
use evolute_vhost_backend::device::{DeviceConfig, Endpoint, SocketAccess, StopSignal, run};
use smallvec::smallvec;
use vm_memory::{Bytes as _, FileOffset, MmapRegion, VolatileMemory};

struct RamDisk {
    bytes: MmapRegion<()>,
    delay: Duration,
    waiting: VecDeque<(Instant, Ticket, Request)>,
    done: Vec<(Ticket, Outcome)>,
}

impl RamDisk {
    fn perform(&self, request: Request) -> Outcome {
        let at = |offset: u64| usize::try_from(offset).expect("64 bits");
        match request {
            Request::Read { offset, len } => {
                let mut data = Vec::with_capacity(len as usize);
                let slice = self.bytes.get_slice(at(offset), len as usize).expect("checked by the device");
                slice.write_all_volatile_to(0, &mut data, len as usize).expect("a slice of that length");
                Outcome::Data(smallvec![Bytes::from(data)])
            }
            Request::Write { offset, data } => {
                self.bytes.as_volatile_slice().write_slice(&data, at(offset)).expect("checked by the device");
                Outcome::Done
            }
            Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => {
                let zeroes = vec![0; at(len)];
                self.bytes
                    .as_volatile_slice()
                    .write_slice(&zeroes, at(offset))
                    .expect("checked by the device");
                Outcome::Done
            }
        }
    }
}

impl Backing for RamDisk {
    fn submit(&mut self, ticket: Ticket, request: Request) {
        match self.delay.is_zero() {
            true => {
                let outcome = self.perform(request);
                self.done.push((ticket, outcome));
            }
            false => self.waiting.push_back((Instant::now() + self.delay, ticket, request)),
        }
    }

    fn on_wake(&mut self) {}

    fn settle(&mut self, now: Instant) {
        let from = self.done.len();
        while let Some((due, _, _)) = self.waiting.front() {
            if *due > now {
                break;
            }
            let (_, ticket, request) = self.waiting.pop_front().expect("looked");
            let outcome = self.perform(request);
            self.done.push((ticket, outcome));
        }
        self.done[from..].reverse();
    }

    fn take_completed(&mut self, out: &mut Vec<(Ticket, Outcome)>) {
        out.append(&mut self.done);
    }

    fn deadline(&self) -> Option<Instant> {
        self.waiting.front().map(|(due, _, _)| *due)
    }

    fn ready(&self) -> bool {
        true
    }
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    let mut args = std::env::args().skip(1);
    let socket = args.next().context("usage: ram_disk SOCKET [SIZE_MIB] [FILE|-] [DELAY_US] [SPIN_US]")?;
    let size = args.next().map_or(Ok(1024), |mib| mib.parse::<u64>())? << 20;
    let file = args.next().filter(|file| file != "-");
    let delay = Duration::from_micros(args.next().map_or(Ok(0), |us| us.parse())?);
    let spin_us = args.next().map_or(Ok(0), |us| us.parse())?;
    let bytes = match file {
        Some(path) => {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
            file.set_len(size)?;
            MmapRegion::from_file(FileOffset::new(file, 0), usize::try_from(size)?)?
        }
        None => MmapRegion::new(usize::try_from(size)?)?,
    };
    let mut config = DeviceConfig::new(size);
    config.serial = "evolute-ram-disk".into();
    config.spin_us = spin_us;
    let disk = move |_waker, _seat| -> Box<dyn Backing> {
        Box::new(RamDisk { bytes, delay, waiting: VecDeque::new(), done: Vec::new() })
    };
    run(config, Endpoint::listen(Path::new(&socket), SocketAccess::default())?, disk, StopSignal::new()?)?;
    Ok(())
}
