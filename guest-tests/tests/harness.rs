//! The harness itself, before it judges anybody: on QEMU's own local disk a guest boots, writes and reads back;
//! on a disk that loses a byte, or fails, the same steps fail. Only then does a green test of ours mean something.

use anyhow::{Context, Result, ensure};
use evolute_guest_tests::{Boot, Guest, Images, Process, Scene, Verify, fault, story, until};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// A file behind `qemu-storage-daemon`: a vhost-user disk that is not ours.
struct LocalDisk {
    server: Process,
    socket: PathBuf,
    file: PathBuf,
}

impl LocalDisk {
    fn new(scene: &Scene, mib: u64, filter: Option<&str>) -> Result<LocalDisk> {
        let file = scene.folder().join("disk.raw");
        File::create_new(&file)?.set_len(mib * MIB)?;
        LocalDisk::serve(scene, file, filter)
    }

    fn serve(scene: &Scene, file: PathBuf, filter: Option<&str>) -> Result<LocalDisk> {
        let socket = scene.folder().join("disk.sock");
        let mut node = "file";
        let mut arguments = vec![
            "--blockdev".to_string(),
            format!("driver=file,node-name=file,filename={},discard=unmap", file.display()),
        ];
        if let Some(filter) = filter {
            arguments.extend(["--blockdev".to_string(), format!("{filter},node-name=filter,image=file")]);
            node = "filter";
        }
        arguments.extend([
            "--export".to_string(),
            format!(
                "type=vhost-user-blk,id=disk,node-name={node},addr.type=unix,addr.path={},writable=on,num-queues=2",
                socket.display()
            ),
        ]);
        let server = Process::new(scene, "qsd", "qemu-storage-daemon", arguments);
        let mut disk = LocalDisk { server, socket, file };
        disk.start()?;
        Ok(disk)
    }

    fn start(&mut self) -> Result<()> {
        self.server.start()?;
        until("qemu-storage-daemon to listen", Duration::from_secs(20), || {
            ensure!(self.server.ended()?.is_none(), "qemu-storage-daemon ended");
            Ok(self.socket.exists().then_some(()))
        })
    }
}

/// A guest sees the disk with its size, makes a file system, verifies what it writes; after a power-off another
/// guest finds all of it.
#[test]
fn a_guest_on_a_sound_disk_finds_what_it_wrote_after_a_power_off() {
    story(|scene| {
        let disk = LocalDisk::new(scene, 256, None)?;
        let boot = Boot::tools().qemus_disk(&disk.socket);
        let job = Verify::of("/mnt/data");
        let mut guest = Guest::boot(scene, &boot)?;
        assert_eq!(guest.sh("cat /sys/block/vda/size")?, (256 * MIB / 512).to_string());
        guest.sh("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")?;
        job.once(&mut guest, 7)?;
        guest.expect_no_disk_trouble()?;
        guest.power_off()?;

        let mut guest = Guest::boot(scene, &boot)?;
        guest.sh("mount /dev/vda /mnt")?;
        job.again(&mut guest, 7)?;
        // The seed is in the blocks: data of another pass would not be taken for these.
        assert!(job.again(&mut guest, 8).is_err(), "blocks of pass 7 passed for those of pass 8");
        guest.expect_no_disk_trouble()?;
        guest.power_off()
    });
}

/// One bit of one block changes behind the guest's back, then a whole block is an old one: fio says so both times.
#[test]
fn a_disk_that_loses_data_fails_the_verification() {
    story(|scene| {
        let disk = LocalDisk::new(scene, 64, None)?;
        let mut guest = Guest::boot(scene, &Boot::tools().qemus_disk(&disk.socket))?;
        let job = Verify::of("/dev/vda").writes_percent(100);
        let file = OpenOptions::new().read(true).write(true).open(&disk.file)?;
        let block_at = |block: u64| block * 4096;

        job.once(&mut guest, 1)?;
        let mut old = vec![0; 4096];
        file.read_exact_at(&mut old, block_at(1000))?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, block_at(77) + 2000)?;
        file.write_all_at(&[byte[0] ^ 1], block_at(77) + 2000)?;
        let error = job.again(&mut guest, 1).expect_err("a flipped bit went unnoticed").to_string();
        ensure!(error.contains("verify"), "fio failed, but not by its verification: {error}");

        job.once(&mut guest, 2)?;
        file.write_all_at(&old, block_at(1000))?;
        let error = job.again(&mut guest, 2).expect_err("a stale block went unnoticed").to_string();
        ensure!(error.contains("verify"), "fio failed, but not by its verification: {error}");
        Ok(())
    });
}

/// The third write fails with EIO: the guest's kernel says so, and the harness hears it.
#[test]
fn a_disk_that_fails_is_heard_of() {
    story(|scene| {
        let broken = "driver=blkdebug,inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=5,\
                      inject-error.0.once=on,inject-error.0.sector=800";
        let disk = LocalDisk::new(scene, 64, Some(broken))?;
        let mut guest = Guest::boot(scene, &Boot::tools().qemus_disk(&disk.socket))?;
        guest.expect_no_disk_trouble()?;
        assert!(Verify::of("/dev/vda").once(&mut guest, 1).is_err(), "fio did not notice a failed write");
        let error = guest.expect_no_disk_trouble().expect_err("the harness missed an I/O error").to_string();
        ensure!(error.contains("I/O error, dev vda"), "{error}");
        Ok(())
    });
}

/// The backend is killed between two passes and started again: QEMU connects again by itself. (Between two
/// passes, because qemu-storage-daemon does not promise to finish what was in flight.)
#[test]
fn a_guest_goes_on_when_its_backend_comes_back() {
    story(|scene| {
        let mut disk = LocalDisk::new(scene, 64, None)?;
        let mut guest = Guest::boot(scene, &Boot::tools().qemus_disk(&disk.socket))?;
        let job = Verify::of("/dev/vda");
        job.once(&mut guest, 1)?;
        fault::kill9(&mut disk.server)?;
        std::fs::remove_file(&disk.socket)?;
        disk.start()?;
        job.again(&mut guest, 1)?;

        // A frozen backend is a pause as well, and a running verification goes through it.
        let mut verifying = job.start(&mut guest)?;
        verifying.wait_passes(&mut guest, 1, Duration::from_secs(120))?;
        let frozen = fault::freeze(&disk.server)?;
        let before = verifying.passes(&mut guest)?;
        guest.sh("sleep 2")?;
        ensure!(
            verifying.passes(&mut guest)? <= before + 1,
            "passes went on although the backend was frozen"
        );
        frozen.thaw();
        verifying.wait_passes(&mut guest, 1, Duration::from_secs(120))?;
        let verified = verifying.finish(&mut guest, Duration::from_secs(120))?;
        scene.tell(&verified);
        ensure!(verified.longest >= Duration::from_secs(1), "fio did not feel the pause: {verified}");
        guest.expect_no_disk_trouble()?;
        guest.power_off().context("after all that")
    });
}

/// The Debian image is sound before anybody imports it: systemd comes up on it, twice, with nothing failed.
#[test]
fn the_debian_image_boots_and_reboots_on_a_local_disk() {
    story(|scene| {
        let file = scene.folder().join("disk.raw");
        let copied =
            Command::new("cp").arg("--sparse=always").arg(Images::find()?.debian()?).arg(&file).status()?;
        ensure!(copied.success(), "cp ended with {copied}");
        let disk = LocalDisk::serve(scene, file, None)?;
        let mut guest = Guest::boot(scene, &Boot::first_disk().qemus_disk(&disk.socket))?;
        let state = |guest: &mut Guest| guest.run("systemctl is-system-running --wait; systemctl --failed");
        ensure!(state(&mut guest)?.text.starts_with("running"), "{}", state(&mut guest)?.text);
        guest.sh("echo it was here >/root/note")?;
        guest.reboot()?;
        ensure!(state(&mut guest)?.text.starts_with("running"), "{}", state(&mut guest)?.text);
        assert_eq!(guest.sh("cat /root/note")?, "it was here");
        guest.expect_no_disk_trouble()?;
        guest.power_off()
    });
}
