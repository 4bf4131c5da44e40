//! Any one of three chunkservers may die, leader or not: the guest feels a pause at most, never an error, and
//! reads back every byte. A chunkserver that comes back catches up, so that the next one may die.

use anyhow::ensure;
use evolute_guest_tests::{Boot, Cluster, Guest, Verify, fault, story};
use std::time::Duration;

const PASS: Duration = Duration::from_secs(120);

#[test]
fn each_chunkserver_in_turn_is_killed_under_a_verifying_guest() {
    story(|scene| {
        let mut cluster = Cluster::start(scene)?;
        cluster.create_volume("disk", "256M")?;
        let mut guest = Guest::boot(scene, &Boot::tools().disk(cluster.serve("disk")?))?;
        let job = Verify::of("/dev/vda");
        let mut verifying = job.start(&mut guest)?;
        verifying.wait_passes(&mut guest, 1, PASS)?;

        let mut leaders_killed = 0;
        for victim in 0..3 {
            let led = cluster.copysets_led()?[victim];
            leaders_killed += u32::from(led > 0);
            fault::kill9(cluster.chunkserver(victim))?;
            scene.tell(format_args!("killed chunkserver {}, which led {led} copysets", victim + 1));
            // One pass began before or just after the kill, the next lies wholly in the absence.
            verifying.wait_passes(&mut guest, 2, PASS)?;
            cluster.chunkserver(victim).start()?;
            cluster.wait_whole()?;
            scene.tell("started again, and caught up");
        }
        ensure!(
            leaders_killed > 0,
            "no leader was among the killed, so the test has not shown what it should"
        );

        let verified = verifying.finish(&mut guest, PASS)?;
        scene.tell(&verified);
        // The last pass once more: its blocks now come from whoever leads at the end.
        job.again(&mut guest, verified.passes)?;
        guest.expect_no_disk_trouble()?;
        guest.power_off()?;
        cluster.stop()
    });
}

/// Hung is worse than dead: the connections stay, and nobody says anything.
#[test]
fn a_frozen_chunkserver_is_survived() {
    story(|scene| {
        let mut cluster = Cluster::start(scene)?;
        cluster.create_volume("disk", "256M")?;
        let mut guest = Guest::boot(scene, &Boot::tools().disk(cluster.serve("disk")?))?;
        let mut verifying = Verify::of("/dev/vda").start(&mut guest)?;
        verifying.wait_passes(&mut guest, 1, PASS)?;
        let led = cluster.copysets_led()?;
        let victim = (0..led.len()).max_by_key(|&index| led[index]).unwrap_or(0);
        let frozen = fault::freeze(cluster.chunkserver(victim))?;
        scene.tell(format_args!("froze chunkserver {}, which led {} copysets", victim + 1, led[victim]));
        verifying.wait_passes(&mut guest, 2, PASS)?;
        frozen.thaw();
        verifying.wait_passes(&mut guest, 1, PASS)?;
        cluster.wait_whole()?;
        scene.tell(verifying.finish(&mut guest, PASS)?);
        guest.expect_no_disk_trouble()?;
        guest.power_off()?;
        cluster.stop()
    });
}
