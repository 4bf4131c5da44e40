//! A backend hangs with requests in its hands. An operator believes it dead and gives the volume to another, whose
//! guest writes everything anew. Then the first one wakes up and sends what it had: not a byte of it may land.

use anyhow::ensure;
use evolute_guest_tests::{Boot, Cluster, Guest, Verify, fault, story, until};
use std::time::Duration;

const PASS: Duration = Duration::from_secs(120);

#[test]
fn a_backend_that_wakes_up_after_a_takeover_is_refused() {
    story(|scene| {
        let mut cluster = Cluster::start(scene)?;
        cluster.create_volume("disk", "64M")?;
        let mut old = Guest::boot(scene, &Boot::tools().disk(cluster.serve("disk")?))?;
        let job = Verify::of("/dev/vda");
        let mut writing = job.depth(32).writes_percent(100).start(&mut old)?;
        writing.wait_passes(&mut old, 1, PASS)?;
        let frozen = fault::freeze(cluster.backend("disk")?)?;
        scene.tell("the first backend hangs, with requests in flight");

        let successor = cluster.take_over("disk")?;
        let mut new = Guest::boot(scene, &Boot::tools().disk(successor))?;
        // A seed the old guest does not come to: what is its, is recognised.
        let (job, seed) = (Verify::of("/dev/vda").writes_percent(100), 1_000_000);
        job.once(&mut new, seed)?;
        scene.tell("a second one has the volume, and its guest has written every block");

        frozen.thaw();
        until("the old guest to hear that it has lost its disk", PASS, || {
            Ok(writing.passes(&mut old).is_err().then_some(()))
        })?;
        // Its backend has ended, so what the old guest writes now may wait for ever; it is never acknowledged.
        let late = old.start("dd if=/dev/zero of=/dev/vda bs=4k count=256 oflag=direct")?;
        scene.tell("the first one is back and was refused");

        job.again(&mut new, seed)?;
        if old.has_ended(&late)? {
            let late = old.wait(late, PASS)?;
            ensure!(late.status != 0, "the old guest still writes: {}", late.text);
        }
        new.expect_no_disk_trouble()?;
        new.power_off()?;
        old.pull_plug()?;
        cluster.stop_serving("disk-successor")?;
        Ok(())
    });
}
