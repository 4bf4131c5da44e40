//! Writing that proves itself: fio with `--verify=crc32c`, pass after pass until it is told to stop.
//!
//! A pass visits every block of its range once, in random order and at depth, to write it or (fewer) to read it, and
//! then reads back what it wrote. Each pass has its own seed, which fio puts into every block and compares: a block
//! left over from the pass before is as wrong as a torn one. A pass can be verified again later, from another boot.
//!
//! That comparison is why the job is `randrw` even when it only writes: for `randwrite` fio 3.33 takes
//! any seed it finds for the right one, and a stale block passes (`tests/harness.rs` looks after this).

use crate::guest::{Background, Guest};
use crate::wait::until;
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// What to write, and how.
#[derive(Clone, Debug)]
pub struct Verify {
    pub target: String,
    pub mib: u32,
    pub depth: u32,
    pub block: &'static str,
    pub writes_percent: u32,
}

/// A verification that is running in a guest.
#[must_use = "finish it, or nobody will know whether it failed"]
pub struct Verifying {
    job: Verify,
    background: Background,
}

/// What a finished verification showed. Errors are not in here: they fail the test.
#[derive(Clone, Debug)]
pub struct Verified {
    pub passes: u32,
    pub bytes: u64,
    /// The longest any one request took: the pause the guest felt.
    pub longest: Duration,
    longest_of_pass: Vec<Duration>,
}

impl Verify {
    /// 4 KiB blocks at depth 16: small enough for many passes under TCG, deep enough to have a queue to lose.
    pub fn of(target: &str) -> Verify {
        Verify { target: target.to_string(), mib: 16, depth: 16, block: "4k", writes_percent: 75 }
    }

    pub fn mib(self, mib: u32) -> Verify {
        Verify { mib, ..self }
    }

    pub fn depth(self, depth: u32) -> Verify {
        Verify { depth, ..self }
    }

    pub fn block(self, block: &'static str) -> Verify {
        Verify { block, ..self }
    }

    pub fn writes_percent(self, writes_percent: u32) -> Verify {
        Verify { writes_percent, ..self }
    }

    /// The command line but for the seed, without which nothing is written and nothing can be verified.
    fn fio(&self) -> String {
        let Verify { target, mib, depth, block, writes_percent } = self;
        format!(
            "fio --name=verify --filename={target} --rw=randrw --rwmixwrite={writes_percent} --bs={block} \
             --size={mib}M --iodepth={depth} --ioengine=libaio --direct=1 --thread \
             --verify=crc32c --verify_fatal=1 --verify_dump=0 --do_verify=1"
        )
    }

    /// One pass, here and now.
    pub fn once(&self, guest: &mut Guest, seed: u32) -> Result<()> {
        let output =
            guest.run_within(Duration::from_secs(180), &format!("{} --randseed={seed}", self.fio()))?;
        ensure!(output.status == 0, "fio could not write and verify {}: {}", self.target, output.text.trim());
        Ok(())
    }

    /// Reads back what a pass with that seed wrote, however long ago.
    pub fn again(&self, guest: &mut Guest, seed: u32) -> Result<()> {
        let command = format!("{} --randseed={seed} --verify_only", self.fio());
        let output = guest.run_within(Duration::from_secs(180), &command)?;
        ensure!(
            output.status == 0,
            "what was written to {} is not there: {}",
            self.target,
            output.text.trim()
        );
        Ok(())
    }

    /// Pass after pass in the background, with seeds 1, 2, 3, …, until [`Verifying::finish`].
    pub fn start(&self, guest: &mut Guest) -> Result<Verifying> {
        let fio = self.fio();
        // The seed after the last complete pass is in `seed`, whole at any time, so a test sees that it goes on.
        let background = guest.start(&format!(
            "mkdir -p /run/verify; cd /run/verify; rm -f stop *.json; seed=0; echo 0 >seed
            until [ -e stop ]; do
                seed=$((seed + 1))
                {fio} --randseed=$seed --output-format=json --output=$seed.json || {{ status=$?; cat $seed.json; exit $status; }}
                echo $seed >seed.new && mv seed.new seed
            done"
        ))?;
        Ok(Verifying { job: self.clone(), background })
    }
}

impl Verifying {
    /// How many passes are complete. Fails as soon as one has failed.
    pub fn passes(&mut self, guest: &mut Guest) -> Result<u32> {
        if guest.has_ended(&self.background)? {
            let output = guest.sh(&format!("tail -c 3000 /run/bg{}.out", self.background.number()))?;
            anyhow::bail!("fio in the guest ended: {output}");
        }
        Ok(guest.sh("cat /run/verify/seed")?.parse()?)
    }

    /// Waits until the guest has completed `more` passes from now on.
    pub fn wait_passes(&mut self, guest: &mut Guest, more: u32, deadline: Duration) -> Result<()> {
        let goal = self.passes(guest)? + more;
        let what = format!("{more} more passes of fio in the guest");
        until(&what, deadline, || Ok((self.passes(guest)? >= goal).then_some(())))
    }

    /// How many requests the guest's first disk has answered since it booted.
    pub fn progress(&mut self, guest: &mut Guest) -> Result<u64> {
        self.passes(guest)?;
        let counts = guest.sh("cat /sys/block/vda/stat")?;
        // Reads are the first number, writes the fifth: Documentation/block/stat.rst.
        let count = |field| counts.split_whitespace().nth(field).and_then(|text| text.parse::<u64>().ok());
        let (reads, writes) =
            count(0).zip(count(4)).with_context(|| format!("no I/O counts in {counts:?}"))?;
        Ok(reads + writes)
    }

    /// Waits until the disk has answered `more` requests from now on.
    pub fn wait_progress(&mut self, guest: &mut Guest, more: u64, deadline: Duration) -> Result<()> {
        let goal = self.progress(guest)? + more;
        let what = format!("{more} more requests to be answered");
        until(&what, deadline, || Ok((self.progress(guest)? >= goal).then_some(())))
    }

    /// Lets the pass that is running come to its end, and sums up.
    pub fn finish(self, guest: &mut Guest, deadline: Duration) -> Result<Verified> {
        guest.sh("touch /run/verify/stop")?;
        let output = guest.wait(self.background, deadline)?;
        ensure!(output.status == 0, "fio in the guest failed with {}: {}", output.status, output.text.trim());
        let passes: u32 = guest.sh("cat /run/verify/seed")?.parse()?;
        let mut verified =
            Verified { passes, bytes: 0, longest: Duration::ZERO, longest_of_pass: Vec::new() };
        for seed in 1..=passes {
            let report = guest.sh(&format!("cat /run/verify/{seed}.json"))?;
            verified.add(&report).with_context(|| format!("fio's report of pass {seed}: {report}"))?;
        }
        // That fio ended well is not enough: it has to have read every block, either way.
        let expected = (u64::from(passes) * u64::from(self.job.mib)) << 20;
        ensure!(verified.bytes == expected, "fio read {} bytes of {expected}", verified.bytes);
        Ok(verified)
    }
}

impl Verified {
    fn add(&mut self, report: &str) -> Result<()> {
        // Notes may stand in front of the JSON.
        let json = &report[report.find('{').context("no JSON")?..];
        let report: serde_json::Value = serde_json::from_str(json)?;
        let job = &report["jobs"][0];
        self.bytes += job["read"]["io_bytes"].as_u64().context("no read.io_bytes")?;
        let longest = |direction: &str| job[direction]["lat_ns"]["max"].as_u64().map(Duration::from_nanos);
        let (read, write) = longest("read").zip(longest("write")).context("no lat_ns.max")?;
        let longest = read.max(write);
        self.longest = self.longest.max(longest);
        self.longest_of_pass.push(longest);
        Ok(())
    }

    /// The longest request of some passes, which count from 1.
    pub fn longest_of(&self, passes: impl Iterator<Item = u32>) -> Option<Duration> {
        passes
            .filter_map(|pass| self.longest_of_pass.get(usize::try_from(pass).ok()?.checked_sub(1)?))
            .max()
            .copied()
    }
}

impl std::fmt::Display for Verified {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Verified { passes, bytes, longest, .. } = self;
        write!(
            f,
            "{} MiB verified in {passes} passes, longest request {:.1} s",
            bytes >> 20,
            longest.as_secs_f32()
        )
    }
}
