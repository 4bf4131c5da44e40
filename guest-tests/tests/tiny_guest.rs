//! A VMM stops its guest, writes it to a file and reads it back, with a backend that is killed in between, and with a request
//! that the cluster does not answer: whatever was answered stays as it was, and what waited is done once it can be.

use anyhow::{Result, ensure};
use evolute_guest_tests::{Cluster, TinyGuest, fault, story};
use std::time::Duration;

/// Sectors that are in segments nobody has written: of a volume of 3 GiB, the second and the third.
const UNALLOCATED: u64 = 1 << 21;
const ALSO_UNALLOCATED: u64 = 2 << 21;
const CHECKED: [&str; 3] = ["done 256", "wrong 0", "errors 0"];
/// Sixteen requests at a time, until [`end_load`].
const LOAD: &str = "load 16";

/// Lets it go on for a moment. Whatever happened to the guest before, nothing it read was wrong.
fn end_load(guest: &mut TinyGuest) -> Result<()> {
    std::thread::sleep(Duration::from_millis(200));
    guest.tell("end")?;
    let answer = guest.answer()?;
    ensure!(answer[0] != "done 0" && answer[1..] == CHECKED[1..], "the guest says {answer:?} of its load");
    Ok(())
}

#[test]
fn a_stopped_and_restored_guest_goes_on_where_it_was() {
    story(|scene| {
        let mut cluster = Cluster::start(scene)?;
        cluster.create_volume("disk", "3G")?;
        let disk = cluster.serve("disk")?;
        let saved = scene.folder().join("saved");
        let mut guest = TinyGuest::boot(scene, &disk)?;
        guest.tell(LOAD)?;
        end_load(&mut guest)?;
        scene.tell("the tiny guest wrote and read");

        // Under load: stopped and let go on, and its backend killed. One after the other: QEMU 7.2 answers its monitor in the
        // middle of a handshake with a backend, and a `cont` there leaves the disk dead.
        for _ in 0..3 {
            guest.tell(LOAD)?;
            std::thread::sleep(Duration::from_millis(200));
            guest.stop()?;
            guest.go_on()?;
            std::thread::sleep(Duration::from_millis(200));
            let backend = cluster.backend("disk")?;
            fault::kill9(backend)?;
            backend.start()?;
            end_load(&mut guest)?;
        }
        guest.expect("check", &CHECKED)?;
        scene.tell("and went on over stops and kills of its backend");

        // Written to a file in the middle of its load, and read back.
        guest.tell(LOAD)?;
        std::thread::sleep(Duration::from_millis(300));
        guest.stop()?;
        guest.save(&saved)?;
        let mut guest = TinyGuest::restore(scene, &disk, &saved)?;
        end_load(&mut guest)?;
        guest.expect("check", &CHECKED)?;
        scene.tell("and went on from a file");

        // The same while one write cannot be answered, a later one was, and its buffer is used for something else.
        for (held, here) in [(UNALLOCATED, 8000), (ALSO_UNALLOCATED, 8800)] {
            let mds = fault::freeze(cluster.mds())?;
            guest.expect(&format!("hold {held} {here}"), &["held 1", "status 0"])?;
            guest.stop()?;
            if held == UNALLOCATED {
                guest.go_on()?;
                guest.stop()?;
            } else {
                guest.save(&saved)?;
                guest = TinyGuest::restore(scene, &disk, &saved)?;
            }
            scene.tell("stopped, and went on, with a write that waits");
            guest.go_on()?;
            mds.thaw();
            guest.expect("held", &["status 0"])?;
            guest.expect(&format!("read {held} 43690"), &["status 0", "differ 0"])?;
            guest.expect(&format!("read {here} 52428"), &["status 0", "differ 0"])?;
        }
        guest.expect("check", &CHECKED)?;
        guest.end()?;
        cluster.stop()
    })
}
