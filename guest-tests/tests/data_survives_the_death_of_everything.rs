//! Every process of the cluster is killed at one moment, under a guest that writes. Started again, the cluster has
//! every byte the guest was told is written; to the guest it was a pause.

use evolute_guest_tests::{Boot, Cluster, Guest, Verify, fault, story};
use std::time::Duration;

const PASS: Duration = Duration::from_secs(120);

#[test]
fn everything_is_killed_and_started_again_under_a_verifying_guest() {
    story(|scene| {
        let mut cluster = Cluster::start(scene)?;
        cluster.create_volume("disk", "256M")?;
        let boot = Boot::tools().disk(cluster.serve("disk")?);
        let mut guest = Guest::boot(scene, &boot)?;
        let job = Verify::of("/dev/vda");
        let mut verifying = job.start(&mut guest)?;
        for round in 1..=2 {
            verifying.wait_passes(&mut guest, 1, PASS)?;
            verifying.wait_progress(&mut guest, 800, PASS)?;
            fault::kill9_together(cluster.every_process())?;
            scene.tell(format_args!("killed the MDS, three chunkservers and the backend, {round} of 2"));
            cluster.start_servers()?;
            cluster.backend("disk")?.start()?;
        }
        verifying.wait_passes(&mut guest, 2, PASS)?;
        let verified = verifying.finish(&mut guest, PASS)?;
        scene.tell(&verified);
        guest.expect_no_disk_trouble()?;

        // Now the guest loses its power too, a moment after its last write was acknowledged.
        let last = verified.passes + 1;
        job.once(&mut guest, last)?;
        fault::kill9_together(cluster.every_process())?;
        guest.pull_plug()?;
        cluster.start_servers()?;
        cluster.backend("disk")?.start()?;
        let mut guest = Guest::boot(scene, &boot)?;
        job.again(&mut guest, last)?;
        scene.tell("and the last pass is there after the guest's power was cut as well");
        guest.expect_no_disk_trouble()?;
        guest.power_off()?;
        cluster.wait_whole()?;
        cluster.stop()
    });
}
