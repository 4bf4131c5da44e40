//! The backend is killed in the middle of what the guest asked of it. Started again on the same socket, it finds in
//! the in-flight region what was neither done nor refused, and does it: the guest saw a pause, no error, and no write
//! was lost or done twice over a newer one. It serves both disks of the guest: both come back.

use anyhow::ensure;
use evolute_guest_tests::{Boot, Cluster, Guest, Verify, fault, story};
use std::time::Duration;

const PASS: Duration = Duration::from_secs(120);

#[test]
fn the_backend_is_killed_under_a_verifying_guest() {
    story(|scene| {
        let mut cluster = Cluster::start(scene)?;
        cluster.create_volume("disk", "256M")?;
        cluster.create_volume("second", "128M")?;
        let sockets = cluster.serve_together(&["disk", "second"])?;
        let boot = sockets.into_iter().fold(Boot::tools(), Boot::disk);
        let mut guest = Guest::boot(scene, &boot)?;
        let beside = Verify::of("/dev/vdb").mib(32).depth(8);
        beside.once(&mut guest, 9)?;
        let job = Verify::of("/dev/vda").depth(32);
        let mut verifying = job.start(&mut guest)?;
        for round in 1..=4 {
            // Less than a pass apart, so that kills meet writes as well as reads.
            verifying.wait_progress(&mut guest, 400 * round, PASS)?;
            let backend = cluster.backend("disk+second")?;
            fault::kill9(backend)?;
            backend.start()?;
            scene.tell(format_args!("killed the backend and started it again, {round} of 4"));
        }
        verifying.wait_passes(&mut guest, 2, PASS)?;

        // With the MDS away it comes back as well: the attachment is on its disk.
        fault::kill9(cluster.mds())?;
        let backend = cluster.backend("disk+second")?;
        fault::kill9(backend)?;
        backend.start()?;
        verifying.wait_passes(&mut guest, 1, PASS)?;
        scene.tell("and once more while there was no MDS");
        cluster.mds().start()?;

        let verified = verifying.finish(&mut guest, PASS)?;
        scene.tell(&verified);
        ensure!(
            verified.longest < Duration::from_secs(30),
            "a restart of the backend took that long: {verified}"
        );
        job.again(&mut guest, verified.passes)?;
        beside.again(&mut guest, 9)?;
        beside.once(&mut guest, 10)?;
        guest.expect_no_disk_trouble()?;
        guest.power_off()?;
        cluster.stop()
    });
}
