//! A guest sees a disk it can use as any other: the right size, a serial, the features its kernel makes use of. It
//! makes file systems on it, writes at depth and reads everything back, and after a power-off it is all there.

use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Result, ensure};
use evolute_guest_tests::{Boot, Cluster, Guest, Verify, story, until};

const MIB: u64 = 1 << 20;
/// Until what was written or discarded is in the chunk files and has been reported.
const REPORTED_WITHIN: Duration = Duration::from_secs(60);

#[test]
fn a_guest_uses_its_disks_and_finds_everything_after_a_power_off() {
    story(|scene| {
        let mut cluster = Cluster::start(scene)?;
        cluster.create_volume("with-ext4", "1G")?;
        cluster.create_volume("with-xfs", "512M")?;
        let boot = Boot::tools().disk(cluster.serve("with-ext4")?).disk(cluster.serve("with-xfs")?);

        let mut guest = Guest::boot(scene, &boot)?;
        expect_disk(&mut guest, "vda", 1 << 30, "with-ext4")?;
        expect_disk(&mut guest, "vdb", 512 << 20, "with-xfs")?;
        guest.sh("mkdir -p /mnt/ext4 /mnt/xfs")?;
        guest.sh("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt/ext4")?;
        guest.sh("mkfs.xfs -q /dev/vdb && mount /dev/vdb /mnt/xfs")?;
        scene.tell("file systems made and mounted");
        let jobs = [
            (Verify::of("/mnt/ext4/small").mib(32).depth(32), 1),
            (Verify::of("/mnt/ext4/large").mib(64).block("128k").writes_percent(100), 2),
            (Verify::of("/mnt/xfs/small").mib(32).depth(32), 3),
            (Verify::of("/mnt/xfs/large").mib(64).block("256k").writes_percent(100), 4),
        ];
        for (job, seed) in &jobs {
            job.once(&mut guest, *seed)?;
        }
        scene.tell("192 MiB written and verified");
        guest.expect_no_disk_trouble()?;
        guest.power_off()?;

        let mut guest = Guest::boot(scene, &boot)?;
        guest.sh("mkdir -p /mnt/ext4 /mnt/xfs; mount /dev/vda /mnt/ext4; mount /dev/vdb /mnt/xfs")?;
        for (job, seed) in &jobs {
            job.again(&mut guest, *seed)?;
        }
        guest.sh("umount /mnt/ext4 /mnt/xfs")?;
        guest.sh("e2fsck -fn /dev/vda && xfs_repair -n /dev/vdb")?;
        scene.tell("verified again after the power-off, both file systems are clean");
        guest.expect_no_disk_trouble()?;
        guest.power_off()?;
        cluster.stop()
    });
}

/// Space that was never written, or was given back, reads as zeroes and costs nothing; what lies next to it is untouched.
#[test]
fn discarded_and_unwritten_space_reads_as_zeroes_and_is_free() {
    story(|scene| {
        let mut cluster = Cluster::start(scene)?;
        cluster.create_volume("disk", "256M")?;
        let mut guest = Guest::boot(scene, &Boot::tools().disk(cluster.serve("disk")?))?;
        // Silent: without -s busybox's cmp goes on after the first difference and prints every byte.
        let is_zero = |mib: u32, count: u32| {
            format!(
                "dd if=/dev/vda bs=1M skip={mib} count={count} iflag=direct 2>/dev/null |
                 cmp -s -n $(({count} << 20)) - /dev/zero"
            )
        };
        guest.sh(&is_zero(0, 64))?;
        // Three times 8 MiB over a chunk border, then the middle goes in two ways.
        let job = Verify::of("/dev/vda").mib(24).block("64k").writes_percent(100);
        job.once(&mut guest, 1)?;
        ensure!(guest.run(&is_zero(8, 8))?.status != 0, "what was written reads as zeroes");
        guest.sh("dd if=/dev/vda of=/tmp/first bs=1M count=8 iflag=direct && dd if=/dev/vda of=/tmp/last bs=1M skip=16 count=8 iflag=direct")?;
        let used = |bytes: RangeInclusive<u64>| {
            let what = format!("a volume that uses {bytes:?} bytes");
            until(&what, REPORTED_WITHIN, || {
                Ok(cluster.used_bytes("disk")?.filter(|used| bytes.contains(used)).map(drop))
            })
        };
        used(24 * MIB..=25 * MIB)?;
        // Each replica writes its chunk files in its own time.
        let on_disk = |wanted: RangeInclusive<u64>| {
            let what = format!("chunk files of {wanted:?} bytes on each chunkserver");
            until(&what, REPORTED_WITHIN, || {
                Ok(cluster.chunk_file_bytes()?.iter().all(|bytes| wanted.contains(bytes)).then_some(()))
            })
        };
        on_disk(24 * MIB..=25 * MIB)?;
        // By its path: busybox's shell prefers its own blkdiscard, which cannot zero.
        guest.sh("/usr/bin/blkdiscard --offset 8M --length 4M /dev/vda")?;
        guest.sh("/usr/bin/blkdiscard --zeroout --offset 12M --length 4M /dev/vda")?;
        guest.sh(&is_zero(8, 8))?;
        used(16 * MIB..=17 * MIB)?;
        on_disk(16 * MIB..=17 * MIB)?;
        guest.sh("dd if=/dev/vda bs=1M count=8 iflag=direct | cmp - /tmp/first")?;
        guest.sh("dd if=/dev/vda bs=1M skip=16 count=8 iflag=direct | cmp - /tmp/last")?;
        guest.expect_no_disk_trouble()?;
        guest.power_off()?;
        cluster.stop()
    });
}

/// What the guest's kernel knows about the disk: /sys, and the features both sides agreed on.
fn expect_disk(guest: &mut Guest, disk: &str, bytes: u64, serial: &str) -> Result<()> {
    let sys = format!("/sys/block/{disk}");
    let mut expect = |file: &str, wanted: &dyn Fn(&str) -> bool, why: &str| -> Result<()> {
        let found = guest.sh(&format!("cat {sys}/{file}"))?;
        ensure!(wanted(&found), "{sys}/{file} is {found:?}: {why}");
        Ok(())
    };
    let above_zero = |text: &str| text.parse::<u64>().is_ok_and(|number| number > 0);
    expect("size", &|it| it == (bytes / 512).to_string(), "not the size of the volume")?;
    expect("serial", &|it| it == serial, "not the serial number of the volume")?;
    expect("ro", &|it| it == "0", "a writable volume")?;
    expect("queue/logical_block_size", &|it| it == "512", "virtio counts in sectors")?;
    expect(
        "queue/physical_block_size",
        &|it| it == "4096",
        "our block, so that partitions and file systems align",
    )?;
    expect("queue/discard_max_bytes", &above_zero, "fstrim has to give space back")?;
    expect("queue/write_zeroes_max_bytes", &above_zero, "zeroing has to be cheap")?;
    // One hardware queue per guest CPU, of the four the backend offers.
    expect("mq/1/cpu_list", &|it| it == "1", "the second CPU has no queue of its own")?;

    // A string of 64 digits, feature 0 first.
    let features = guest.sh(&format!("cat {sys}/device/features"))?;
    let wanted = [
        (2, "SEG_MAX"),
        (6, "BLK_SIZE"),
        (9, "FLUSH"),
        (12, "MQ"),
        (13, "DISCARD"),
        (14, "WRITE_ZEROES"),
        (28, "INDIRECT_DESC"),
        (29, "EVENT_IDX"),
        (32, "VERSION_1"),
    ];
    for (bit, name) in wanted {
        ensure!(features.as_bytes().get(bit) == Some(&b'1'), "{disk} came without {name}: {features}");
    }
    Ok(())
}
