//! What is asked of every system: the same list in the same order, reads first: before what follows a write we wait.

use std::path::Path;
use std::time::Duration;

use crate::front_end::options::{Options, Rw};

/// One load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    pub name: &'static str,
    rw: Rw,
    block: u64,
    depth: usize,
}

const fn work(name: &'static str, rw: Rw, block: u64, depth: usize) -> Work {
    Work { name, rw, block, depth }
}

const fn read(name: &'static str, depth: usize) -> Work {
    work(name, Rw::Randread, 4 * K, depth)
}

const fn write(name: &'static str, depth: usize) -> Work {
    work(name, Rw::Randwrite, 4 * K, depth)
}

const K: u64 = 1 << 10;

pub const ALL: [Work; 9] = [
    read("randread-4k-qd1", 1),
    read("randread-4k-qd32", 32),
    read("randread-4k-qd128", 128),
    work("read-128k-qd16", Rw::Read, 128 * K, 16),
    write("randwrite-4k-qd1", 1),
    write("randwrite-4k-qd32", 32),
    work("randrw70-4k-qd32", Rw::Randrw, 4 * K, 32),
    write("randwrite-4k-qd128", 128),
    work("write-128k-qd16", Rw::Write, 128 * K, 16),
];

/// The depths between those of [`ALL`] and above: the points of the curves over depth.
pub const CURVE: [Work; 12] = [
    read("randread-4k-qd2", 2),
    read("randread-4k-qd4", 4),
    read("randread-4k-qd8", 8),
    read("randread-4k-qd16", 16),
    read("randread-4k-qd64", 64),
    read("randread-4k-qd256", 256),
    write("randwrite-4k-qd2", 2),
    write("randwrite-4k-qd4", 4),
    write("randwrite-4k-qd8", 8),
    write("randwrite-4k-qd16", 16),
    write("randwrite-4k-qd64", 64),
    write("randwrite-4k-qd256", 256),
];

/// 4K random writes at a depth of the caller's.
pub const fn randwrite(depth: usize) -> Work {
    write("randwrite-4k", depth)
}

/// 4K random reads at a depth of the caller's.
pub const fn randread(depth: usize) -> Work {
    read("randread-4k", depth)
}

/// How long a load runs, for every system alike.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    pub seconds: Duration,
    pub ramp: Duration,
}

impl Pace {
    pub fn halved(self) -> Self {
        Self { seconds: self.seconds / 2, ramp: self.ramp / 2 }
    }
}

impl Work {
    pub fn writes(&self) -> bool {
        !matches!(self.rw, Rw::Read | Rw::Randread)
    }

    pub fn options(&self, socket: &Path, size: u64, pace: Pace) -> Options {
        Options {
            rw: self.rw,
            bs: self.block,
            qd: self.depth,
            runtime: pace.seconds,
            ramp: pace.ramp,
            ..plain(socket, size)
        }
    }
}

/// Writes every byte once: nobody is measured reading holes.
pub fn prefill(socket: &Path, size: u64) -> Options {
    Options {
        rw: Rw::Write,
        bs: 128 * K,
        qd: 16,
        runtime: Duration::from_millis(1),
        prefill: true,
        ..plain(socket, size)
    }
}

/// Whoever only looks at a system that has nothing to do still needs a driver at its socket: this one reads once.
pub fn next_to_nothing(socket: &Path, size: u64) -> Options {
    Options { runtime: Duration::from_millis(1), ..plain(socket, size) }
}

fn plain(socket: &Path, size: u64) -> Options {
    Options {
        socket: socket.to_owned(),
        rw: Rw::Read,
        rwmixread: 70,
        bs: 4 * K,
        qd: 1,
        queues: 1,
        runtime: Duration::ZERO,
        ramp: Duration::ZERO,
        size,
        offset: 0,
        seed: 1,
        poll: false,
        flush_every: 0,
        prefill: false,
        verify: false,
        stall: Duration::from_secs(20),
        timeline: 0,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::{ALL, CURVE, Pace};
    use crate::front_end::options::{Plan, Rw};

    #[test]
    fn a_work_is_what_its_name_says() {
        let pace = Pace { seconds: Duration::from_secs(1), ramp: Duration::ZERO };
        for work in ALL.into_iter().chain(CURVE) {
            let options = work.options(Path::new("s"), 1 << 30, pace);
            let rw = match options.rw {
                Rw::Randrw => format!("randrw{}", options.rwmixread),
                rw => format!("{rw:?}").to_lowercase(),
            };
            assert_eq!(work.name, format!("{rw}-{}k-qd{}", options.bs / 1024, options.qd));
            assert!(Plan::check(&options).is_ok());
        }
    }
}
