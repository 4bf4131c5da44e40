//! Two of three chunkservers are away for 20 s. Nothing can be promised, so nothing is answered: the guest waits,
//! hears of no error, and goes on by itself once a second one is back.

use anyhow::ensure;
use evolute_guest_tests::{Boot, Cluster, Guest, Verify, fault, story};
use std::time::Duration;

const PASS: Duration = Duration::from_secs(120);
const AWAY_SECONDS: u64 = 20;

#[test]
fn no_quorum_is_a_pause_and_never_an_error() {
    story(|scene| {
        let mut cluster = Cluster::start(scene)?;
        cluster.create_volume("disk", "256M")?;
        let mut guest = Guest::boot(scene, &Boot::tools().disk(cluster.serve("disk")?))?;
        let job = Verify::of("/dev/vda");
        let mut verifying = job.start(&mut guest)?;
        verifying.wait_passes(&mut guest, 1, PASS)?;

        fault::kill9_together(cluster.chunkservers().take(2))?;
        scene.tell("killed two of three chunkservers");
        // What a leader had already sent may still come in; after that, silence.
        guest.sh("sleep 2")?;
        let before = verifying.progress(&mut guest)?;
        guest.sh(&format!("sleep {}", AWAY_SECONDS - 2))?;
        let after = verifying.progress(&mut guest)?;
        ensure!(before == after, "requests were answered without a quorum: {before} before, {after} after");
        guest.expect_no_disk_trouble()?;

        cluster.start_servers()?;
        verifying.wait_passes(&mut guest, 2, PASS)?;
        let verified = verifying.finish(&mut guest, PASS)?;
        scene.tell(&verified);
        let away = Duration::from_secs(AWAY_SECONDS - 1);
        ensure!(verified.longest >= away, "no request waited through the outage, so it was none: {verified}");
        job.again(&mut guest, verified.passes)?;
        guest.expect_no_disk_trouble()?;
        guest.power_off()?;
        cluster.wait_whole()?;
        cluster.stop()
    });
}
