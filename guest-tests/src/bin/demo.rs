//! The demo: a real guest on a three-replica volume loses the chunkserver that leads most of it, keeps writing, and
//! finds every byte again after a power-off. Ends with a summary of what it showed; leaves nothing running.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use evolute_guest_tests::{Boot, Cluster, Guest, Scene, Verify, demonstrate, fault};

const PASS: Duration = Duration::from_secs(120);
const VOLUME: &str = "demo";
const SIZE: &str = "1G";

struct Shown {
    kernel: String,
    disk: String,
    file_system: String,
    verified: u64,
    victim: usize,
    led: u64,
    pause: Duration,
    usual: Duration,
}

fn main() -> ExitCode {
    let begun = Instant::now();
    match demonstrate("demo", show) {
        Ok(shown) => {
            println!("\n{}", summary(&shown, begun.elapsed()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show(scene: &Scene) -> Result<Shown> {
    scene.tell("starting a cluster on loopback: one MDS, three chunkservers in three zones");
    let mut cluster = Cluster::start(scene)?;
    cluster.create_volume(VOLUME, SIZE)?;
    scene.tell(format_args!(
        "volume {VOLUME}, {SIZE}, three replicas; its backend serves a vhost-user socket"
    ));
    let boot = Boot::tools().disk(cluster.serve(VOLUME)?);
    let mut guest = Guest::boot(scene, &boot)?;
    let kernel = guest.kernel().to_owned();
    let disk = guest.sh(
        "echo \"/dev/vda, $(($(cat /sys/block/vda/size) / 2048)) MiB, serial $(cat /sys/block/vda/serial), \
         $(cat /sys/block/vda/queue/write_cache), $(ls /sys/block/vda/mq | wc -l) queues\"",
    )?;
    scene.tell(format_args!("the guest sees {disk}"));

    let file_system = guest.sh(
        "mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt && \
         dd if=/dev/urandom of=/mnt/letter bs=1M count=8 2>/dev/null && sync && md5sum </mnt/letter | cut -d' ' -f1",
    )?;
    scene.tell("made an ext4 on it, and a file of 8 MiB in that");
    let job = Verify::of("/mnt/blocks").mib(32);
    let mut verifying = job.start(&mut guest)?;
    verifying.wait_passes(&mut guest, 1, PASS)?;
    let before = verifying.passes(&mut guest)?;
    scene.tell("fio writes and verifies 4 KiB blocks in the guest, sixteen at a time, again and again");

    let led = cluster.copysets_led()?;
    let victim = (0..led.len()).max_by_key(|&index| led[index]).context("no chunkserver")?;
    fault::kill9(cluster.chunkserver(victim))?;
    scene.tell(format_args!("kill -9 of chunkserver {}, which leads {} copysets", victim + 1, led[victim]));
    verifying.wait_passes(&mut guest, 2, PASS)?;
    scene.tell("the guest went on; starting that chunkserver again");
    cluster.chunkserver(victim).start()?;
    cluster.wait_whole()?;
    scene.tell("it has caught up: every copyset has three replicas again");
    let verified = verifying.finish(&mut guest, PASS)?;
    scene.tell(&verified);
    guest.expect_no_disk_trouble()?;
    guest.sh("umount /mnt")?;
    guest.power_off()?;

    scene.tell("powered off; booting again to look at what was written");
    let mut guest = Guest::boot(scene, &boot)?;
    let again = guest.sh("mkdir -p /mnt && mount /dev/vda /mnt && md5sum </mnt/letter | cut -d' ' -f1")?;
    ensure!(again == file_system, "the file's sum was {file_system} and is {again}");
    job.again(&mut guest, verified.passes)?;
    guest.expect_no_disk_trouble()?;
    guest.power_off()?;
    scene.tell("every byte is there; stopping everything");
    cluster.stop()?;
    Ok(Shown {
        kernel,
        disk,
        file_system,
        verified: verified.bytes + (u64::from(job.mib) << 20) + (8 << 20),
        victim: victim + 1,
        led: led[victim],
        pause: verified.longest,
        usual: verified.longest_of(1..=before).unwrap_or_default(),
    })
}

fn summary(shown: &Shown, took: Duration) -> String {
    let Shown { kernel, disk, file_system, verified, victim, led, pause, usual } = shown;
    format!(
        "What this showed ({:.0} s):
  guest kernel          Linux {kernel}, booted twice
  its disk              {disk}: an Evolute volume of {SIZE} with three replicas
  bytes verified        {} MiB by fio's crc32c, and an 8 MiB file by its md5 ({file_system})
  killed meanwhile      chunkserver {victim} (kill -9), which led {led} copysets; started again, caught up
  pause the guest felt  longest request {:.2} s (before the kill: {:.2} s); no I/O error
  left running          nothing",
        took.as_secs_f32(),
        verified >> 20,
        pause.as_secs_f32(),
        usual.as_secs_f32(),
    )
}
