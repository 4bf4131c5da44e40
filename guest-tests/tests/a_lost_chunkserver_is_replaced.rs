//! A chunkserver that does not come back is made up for: its replicas are made anew elsewhere, while a guest writes, so
//! that the next one may die too. One that comes back too late is told to forget what it had.

use anyhow::ensure;
use evolute_guest_tests::{Boot, Cluster, Guest, Verify, fault, story};
use std::time::Duration;

const PASS: Duration = Duration::from_secs(120);

#[test]
fn two_chunkservers_are_lost_one_after_the_other_and_nothing_with_them() {
    story(|scene| {
        let mut cluster = Cluster::start_repairing(scene)?;
        cluster.create_volume("disk", "256M")?;
        let mut guest = Guest::boot(scene, &Boot::tools().disk(cluster.serve("disk")?))?;
        let job = Verify::of("/dev/vda");
        let mut verifying = job.start(&mut guest)?;
        verifying.wait_passes(&mut guest, 1, PASS)?;

        cluster.add_chunkserver()?;
        fault::kill9(cluster.chunkserver(0))?;
        cluster.wait_repaired()?;
        scene.tell("the first is lost, and the fourth has its replicas");
        verifying.wait_passes(&mut guest, 1, PASS)?;

        // Without the repair, copysets of the first and the second would have no majority now.
        fault::kill9(cluster.chunkserver(1))?;
        verifying.wait_passes(&mut guest, 2, PASS)?;
        scene.tell("the second is lost, and the guest goes on");

        cluster.chunkserver(0).start()?;
        cluster.wait_repaired()?;
        scene.tell("the first came back, empty-handed, and has the replicas of the second");
        let status = cluster.status()?;
        for copyset in status["copysets"].as_array().into_iter().flatten() {
            ensure!(copyset["replicas"].as_array().is_some_and(|them| them.len() == 3), "{copyset}");
        }

        let verified = verifying.finish(&mut guest, PASS)?;
        scene.tell(&verified);
        job.again(&mut guest, verified.passes)?;
        guest.expect_no_disk_trouble()?;
        guest.power_off()?;
        cluster.chunkserver(1).start()?;
        cluster.stop()
    });
}
