//! A VMM stops its guest, writes it to a file and reads it back, moves it, reboots it, adds a disk and takes it out, with a
//! backend that is killed in between, and with requests that the cluster does not answer: whatever was answered stays as it
//! was, and what waited is done once it can be.

use anyhow::{Result, ensure};
use evolute_guest_tests::{Cluster, Memory, Process, Scene, TinyGuest, Under, fault, story, until};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Sectors that are in segments nobody has written: of a volume of 4 GiB, the second to the fourth.
const UNALLOCATED: u64 = 1 << 21;
const ALSO_UNALLOCATED: u64 = 2 << 21;
const LAST_UNALLOCATED: u64 = 3 << 21;
/// Beyond the blocks that load writes.
const ELSEWHERE: u64 = 9600;
const CHECKED: [&str; 3] = ["done 256", "wrong 0", "errors 0"];
/// Sixteen requests at a time, until [`end_load`].
const LOAD: &str = "load 16";
/// For something to be out. Nothing depends on how much.
const A_MOMENT: Duration = Duration::from_millis(200);

struct Place<'a> {
    scene: &'a Scene,
    under: Under,
    cluster: Cluster<'a>,
    disk: PathBuf,
}

#[test]
fn a_guest_of_qemu_goes_on_where_it_was_whatever_qemu_does() {
    story(|scene| {
        let (mut place, mut guest) = Place::with_guest(scene, Under::Qemu)?;
        stopped_and_its_backend_killed(&mut place, &mut guest)?;
        disk_added_and_taken_out(&mut place, &mut guest)?;
        let guest = saved_and_restored(&place, guest)?;
        let guest = saved_while_one_waits(&mut place, guest)?;
        let mut guest = saved_while_nothing_is_answered(&mut place, guest)?;
        rebooted(&place, &mut guest)?;
        moved_to_another_backend(&mut place, guest)?;
        place.cluster.stop()
    })
}

#[test]
fn a_guest_of_cloud_hypervisor_goes_on_where_it_was_whatever_that_does() {
    let Some(under) = Under::cloud_hypervisor() else {
        // Past the test harness, which swallows what a test that passes says.
        let _ =
            std::io::stderr().write_all(b"  skipped: CLOUD_HYPERVISOR is not set, the path of its program\n");
        return;
    };
    story(|scene| {
        let (mut place, guest) = Place::with_guest(scene, under)?;
        // First: it refuses to copy a guest's memory once its backend was away, or once it was read back or moved.
        let mut guest = moved_within_the_host(&mut place, guest, Memory::Copied, 1)?;
        stopped_and_its_backend_killed(&mut place, &mut guest)?;
        disk_added_and_taken_out(&mut place, &mut guest)?;
        let guest = saved_and_restored(&place, guest)?;
        let guest = saved_while_one_waits(&mut place, guest)?;
        let guest = saved_while_nothing_is_answered(&mut place, guest)?;
        let guest = moved_within_the_host(&mut place, guest, Memory::Given, 5)?;
        let mut guest = moved_while_one_waits(&mut place, guest)?;
        rebooted(&place, &mut guest)?;
        guest.end()?;
        place.cluster.stop()
    })
}

impl<'a> Place<'a> {
    fn with_guest(scene: &'a Scene, under: Under) -> Result<(Place<'a>, TinyGuest)> {
        let mut cluster = Cluster::start(scene)?;
        cluster.create_volume("disk", "4G")?;
        let disk = cluster.serve("disk")?;
        let mut guest = TinyGuest::boot(scene, &under, &disk)?;
        guest.tell(LOAD)?;
        end_load(&mut guest)?;
        scene.tell("the tiny guest wrote and read");
        Ok((Place { scene, under, cluster, disk }, guest))
    }

    fn saved(&self) -> PathBuf {
        self.scene.folder().join("saved")
    }

    /// Written to a file or a folder, thrown away, and read back.
    fn through_a_file(&self, guest: TinyGuest) -> Result<TinyGuest> {
        guest.save(&self.saved())?;
        TinyGuest::restore(self.scene, &self.under, &self.disk, &self.saved())
    }
}

/// Lets it go on for a moment. Whatever happened to the guest before, nothing it read was wrong.
fn end_load(guest: &mut TinyGuest) -> Result<()> {
    std::thread::sleep(A_MOMENT);
    guest.tell("end")?;
    let answer = guest.answer()?;
    ensure!(answer[0] != "done 0" && answer[1..] == CHECKED[1..], "the guest says {answer:?} of its load");
    Ok(())
}

/// One after the other: QEMU 7.2 answers its monitor in the middle of a handshake with a backend, and a `cont` there leaves the
/// disk dead.
fn stopped_and_its_backend_killed(place: &mut Place<'_>, guest: &mut TinyGuest) -> Result<()> {
    for _ in 0..3 {
        guest.tell(LOAD)?;
        std::thread::sleep(A_MOMENT);
        guest.stop()?;
        guest.go_on()?;
        std::thread::sleep(A_MOMENT);
        let backend = place.cluster.backend("disk")?;
        fault::kill9(backend)?;
        backend.start()?;
        end_load(guest)?;
    }
    guest.expect("check", &CHECKED)?;
    place.scene.tell("and went on over stops and kills of its backend");
    Ok(())
}

/// While the first disk is under load. The second is there again with its data when it is added again.
fn disk_added_and_taken_out(place: &mut Place<'_>, guest: &mut TinyGuest) -> Result<()> {
    place.cluster.create_volume("second", "1G")?;
    let second = place.cluster.serve("second")?;
    let add = |guest: &mut TinyGuest, second: &Path| {
        guest.tell(LOAD)?;
        std::thread::sleep(A_MOMENT);
        guest.plug(second)?;
        end_load(guest)?;
        guest.expect("init 1", &["init 0"])
    };
    add(guest, &second)?;
    guest.tell(LOAD)?;
    std::thread::sleep(A_MOMENT);
    let backend = place.cluster.backend("second")?;
    fault::kill9(backend)?;
    backend.start()?;
    end_load(guest)?;
    guest.unplug()?;
    guest.expect("check", &CHECKED)?;
    add(guest, &second)?;
    guest.expect("check", &CHECKED)?;
    guest.unplug()?;
    place.cluster.stop_serving("second")?;
    place.scene.tell("and went on while a disk was added, taken out and added again");
    Ok(())
}

/// In the middle of its load.
fn saved_and_restored(place: &Place<'_>, mut guest: TinyGuest) -> Result<TinyGuest> {
    guest.tell(LOAD)?;
    std::thread::sleep(A_MOMENT);
    guest.stop()?;
    let mut guest = place.through_a_file(guest)?;
    end_load(&mut guest)?;
    guest.expect("check", &CHECKED)?;
    place.scene.tell("and went on from a file");
    Ok(guest)
}

/// One write cannot be answered, a later one was, and its buffer is used for something else. Then what the VMM does.
fn with_one_that_waits(
    place: &mut Place<'_>,
    mut guest: TinyGuest,
    held: u64,
    vmm_does: impl FnOnce(&Place<'_>, TinyGuest) -> Result<TinyGuest>,
) -> Result<TinyGuest> {
    let here = ELSEWHERE + 8 * (held >> 21);
    let mds = fault::freeze(place.cluster.mds())?;
    guest.expect(&format!("hold {held} {here}"), &["held 1", "status 0"])?;
    let mut guest = vmm_does(place, guest)?;
    mds.thaw();
    guest.expect("held", &["status 0"])?;
    guest.expect(&format!("read {held} 43690"), &["status 0", "differ 0"])?;
    guest.expect(&format!("read {here} 52428"), &["status 0", "differ 0"])?;
    guest.expect("check", &CHECKED)?;
    Ok(guest)
}

fn saved_while_one_waits(place: &mut Place<'_>, guest: TinyGuest) -> Result<TinyGuest> {
    let guest = with_one_that_waits(place, guest, UNALLOCATED, |_, mut guest| {
        guest.stop()?;
        guest.go_on()?;
        Ok(guest)
    })?;
    let guest = with_one_that_waits(place, guest, ALSO_UNALLOCATED, |place, mut guest| {
        guest.stop()?;
        place.through_a_file(guest)
    })?;
    place.scene.tell("stopped, and went on, also from a file, with a write that waits");
    Ok(guest)
}

/// All chunkservers stand still, with the whole of its load out.
fn saved_while_nothing_is_answered(place: &mut Place<'_>, mut guest: TinyGuest) -> Result<TinyGuest> {
    guest.tell(LOAD)?;
    std::thread::sleep(A_MOMENT);
    let frozen: Vec<_> = place.cluster.chunkservers().map(|it| fault::freeze(it)).collect::<Result<_>>()?;
    guest.stop()?;
    guest.go_on()?;
    guest.stop()?;
    let mut guest = place.through_a_file(guest)?;
    drop(frozen);
    end_load(&mut guest)?;
    guest.expect("check", &CHECKED)?;
    place.scene.tell("and went on from a file that holds all of its load");
    Ok(guest)
}

/// Reset in the middle of its load: what was answered before is there, and no block is torn.
fn rebooted(place: &Place<'_>, guest: &mut TinyGuest) -> Result<()> {
    guest.tell("sum")?;
    let sum = guest.answer()?;
    guest.reboot()?;
    guest.expect("learn", &["torn 0", "errors 0", &sum[0]])?;
    guest.expect(&format!("write {ELSEWHERE} 4711"), &["status 0"])?;
    guest.tell(LOAD)?;
    std::thread::sleep(A_MOMENT);
    guest.reboot()?;
    guest.tell("learn")?;
    let learnt = guest.answer()?;
    ensure!(learnt[..2] == ["torn 0", "errors 0"], "after a reset the guest says {learnt:?}");
    guest.expect(&format!("read {ELSEWHERE} 4711"), &["status 0", "differ 0"])?;
    guest.tell(LOAD)?;
    end_load(guest)?;
    guest.expect("check", &CHECKED)?;
    place.scene.tell("and went on after resets");
    Ok(())
}

/// From one VMM to another of the same host, at the same socket, which the first one leaves before the second one comes.
fn moved_within_the_host(
    place: &mut Place<'_>,
    mut guest: TinyGuest,
    memory: Memory,
    times: u32,
) -> Result<TinyGuest> {
    for _ in 0..times {
        guest.tell(LOAD)?;
        std::thread::sleep(A_MOMENT);
        guest = guest.migrate(place.scene, &place.disk, memory)?;
        end_load(&mut guest)?;
    }
    guest.expect("check", &CHECKED)?;
    place.scene.tell(format_args!("and went on in another process, {memory:?}, {times} times, under load"));
    Ok(guest)
}

fn moved_while_one_waits(place: &mut Place<'_>, guest: TinyGuest) -> Result<TinyGuest> {
    let guest = with_one_that_waits(place, guest, LAST_UNALLOCATED, |place, guest| {
        guest.migrate(place.scene, &place.disk, Memory::Given)
    })?;
    place.scene.tell("and went on in another process, with a write that waits");
    Ok(guest)
}

/// From one VMM to another that has a backend of its own, as on another host: QEMU's new process wants its disk before the old
/// one is done. That backend waits for the volume until the first one is stopped.
fn moved_to_another_backend(place: &mut Place<'_>, mut guest: TinyGuest) -> Result<()> {
    let (mut next, disk) = place.cluster.waiting_backend("disk")?;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let unit = threads.spawn(|| kept_running(&mut next, &is_over));
        let moved = (|| {
            guest.tell(LOAD)?;
            std::thread::sleep(A_MOMENT);
            guest = guest.migrate(place.scene, &disk, Memory::Copied)?;
            place.cluster.stop_serving("disk")?;
            end_load(&mut guest)?;
            guest.expect("check", &CHECKED)?;
            place.scene.tell("and went on in another process, at another backend");
            guest.end()
        })();
        is_over.store(true, Ordering::Relaxed);
        moved.and(unit.join().expect("no panic"))
    })
}

/// Started again whenever it ends, as its unit does, and stopped in the end.
fn kept_running(process: &mut Process, is_over: &AtomicBool) -> Result<()> {
    process.spawn()?;
    until("the end of the test", Duration::from_secs(300), || {
        if process.ended()?.is_some() {
            process.wait_ended(A_MOMENT)?;
            process.spawn()?;
        }
        Ok(is_over.load(Ordering::Relaxed).then_some(()))
    })?;
    process.stop()
}
