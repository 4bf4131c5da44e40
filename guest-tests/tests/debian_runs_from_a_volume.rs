//! A Debian image imported into a volume is a machine's root disk: systemd comes up on it, it is written, rebooted
//! and powered off, and comes back as it was left.

use anyhow::{Result, ensure};
use evolute_guest_tests::{Boot, Cluster, Guest, Images, story};

#[test]
fn an_imported_debian_boots_writes_and_reboots() {
    story(|scene| {
        let mut cluster = Cluster::start(scene)?;
        cluster.import_volume("debian", &Images::find()?.debian()?)?;
        scene.tell("the Debian image is imported");
        let boot = Boot::first_disk().disk(cluster.serve("debian")?);

        let mut guest = Guest::boot(scene, &boot)?;
        expect_debian(&mut guest)?;
        guest.sh(
            "head -c 16M /dev/urandom >/root/random && sha256sum /root/random >/root/random.sum && sync",
        )?;
        guest.sh("echo first >/root/boots")?;
        guest.expect_no_disk_trouble()?;

        guest.reboot()?;
        scene.tell("rebooted");
        expect_debian(&mut guest)?;
        guest.sh("sha256sum --check /root/random.sum")?;
        guest.sh("echo second >>/root/boots")?;
        guest.expect_no_disk_trouble()?;
        guest.power_off()?;

        let mut guest = Guest::boot(scene, &boot)?;
        expect_debian(&mut guest)?;
        guest.sh("sha256sum --check /root/random.sum")?;
        let boots = guest.sh("cat /root/boots")?;
        ensure!(boots == "first\nsecond", "the file says {boots:?}");
        guest.expect_no_disk_trouble()?;
        guest.power_off()?;
        cluster.stop()
    });
}

/// It is Debian, from our disk, writable, and nothing of it failed.
fn expect_debian(guest: &mut Guest) -> Result<()> {
    guest.sh("grep -q 'ID=debian' /etc/os-release")?;
    let root = guest.sh("grep ' / ' /proc/mounts")?;
    ensure!(root.starts_with("/dev/vda / ext4 rw"), "the root file system is {root:?}");
    let state = guest.run("systemctl is-system-running --wait")?.text;
    ensure!(
        state.trim() == "running",
        "systemd is {}: {}",
        state.trim(),
        guest.run("systemctl --failed")?.text
    );
    Ok(())
}
