//! The checker is believed because it passes a server known to be good, and fails each kind of broken one.
//!
//! The good one is QEMU's own vhost-user-blk export over a file. The page cache beneath it lets a read see half of a sector
//! that is being written (this checker found it), so requests that overlap in time do not overlap in place here. The broken ones are the same, with the file changed
//! behind its back while the load runs, as a faulty disk, a lost write or a misdirected one would.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use evolute_torture::blkcheck::{
    self, Handle, options::Discard, options::Options, report::Report, report::Verdict,
};
use rustix::process::{Pid, Signal, kill_process};

const AREA_MIB: u64 = 4;
const PATIENCE: Duration = Duration::from_secs(60);

struct Server {
    folder: tempfile::TempDir,
    child: Child,
}

impl Server {
    fn start() -> Server {
        Server::start_with(&[])
    }

    /// So slow that nearly all of what it was asked, it has taken and not begun. Whatever it is that decides when it stops,
    /// it has writes left to do.
    fn start_slow() -> Server {
        Server::start_with(&["--object", "throttle-group,id=slow,x-iops-total=100"])
    }

    fn start_with(slow: &[&str]) -> Server {
        let folder = tempfile::tempdir().expect("a folder");
        let file = File::create(folder.path().join("disk")).expect("a file");
        file.set_len(16 << 20).expect("room");
        let child = spawn(folder.path(), "socket", slow);
        let mut server = Server { folder, child };
        server.wait_listening();
        server
    }

    fn wait_listening(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(self.socket()).is_err() {
            assert!(self.child.try_wait().expect("a child").is_none(), "qemu-storage-daemon ended");
            assert!(Instant::now() < deadline, "qemu-storage-daemon does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn disk(&self) -> File {
        File::options().read(true).write(true).open(self.folder.path().join("disk")).expect("the disk")
    }

    fn check(&self, seed: u64) -> Handle {
        let options = Options {
            seed,
            area_mib: AREA_MIB,
            duration: 0,
            discard: Discard::Off,
            size_max_kib: 256,
            no_overlap: true,
            depth: 4,
            stall: 30,
            ..Options::new(self.socket())
        };
        blkcheck::start(options).expect("it serves")
    }

    fn kill(&mut self) {
        self.child.kill().expect("a child of ours");
        self.child.wait().expect("a child of ours");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(folder: &Path, socket: &str, slow: &[&str]) -> Child {
    let (disk, socket) = (folder.join("disk"), folder.join(socket));
    let above = match slow {
        [] => "driver=raw,node-name=e,file=f",
        _ => "driver=throttle,node-name=e,throttle-group=slow,file=f",
    };
    Command::new("qemu-storage-daemon")
        .args(slow)
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=f,locking=off,filename={}", disk.display()))
        .args(["--blockdev", above, "--export"])
        .arg(format!(
            "type=vhost-user-blk,id=e,node-name=e,addr.type=unix,addr.path={},writable=on,num-queues=4",
            socket.display()
        ))
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-storage-daemon (package qemu-system-common)")
}

#[test]
fn qemus_own_export_passes() {
    let server = Server::start();
    let run = server.check(1);
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(300));
        assert!(run.round(PATIENCE), "a round ends");
    }
    assert!(run.round(PATIENCE), "a round without load in between ends too");
    let report = finish(run);
    assert_eq!(report.violations, 0, "{}", report.words());
    assert!(report.acked_changes > 100 && report.reads > 100, "{}", report.words());
    assert_eq!(report.undecided_sectors, 0, "{}", report.words());
}

/// Ends the run right after a complete check.
fn finish(run: Handle) -> Report {
    let report = run.finish().expect("the server kept the protocol");
    println!("{}", report.words());
    report
}

/// Loads, ends a round, breaks something, and looks at everything once more.
fn broken(seed: u64, harm: impl FnOnce(&File)) -> Report {
    let server = Server::start();
    let run = server.check(seed);
    until("much is written", || run.progress.acked_writes.load(Ordering::SeqCst) > 1000);
    harm(&server.disk());
    assert!(run.round(PATIENCE), "a round ends");
    finish(run)
}

fn assert_fails(report: &Report, words: &str) {
    assert_eq!(report.verdict, Verdict::Fail, "{}", report.words());
    assert!(report.examples.iter().any(|example| example.contains(words)), "{words}: {}", report.words());
}

/// Reads the area's beginning until it is other than it was, which shows that something was written there since.
fn old_and_new(disk: &File, at: u64, bytes: usize) -> (Vec<u8>, Vec<u8>) {
    let read = || {
        let mut content = vec![0; bytes];
        disk.read_exact_at(&mut content, at).expect("inside");
        content
    };
    let (old, deadline) = (read(), Instant::now() + PATIENCE);
    loop {
        let new = read();
        if new != old && new.iter().any(|&b| b != 0) && old.iter().any(|&b| b != 0) {
            return (old, new);
        }
        if old.iter().all(|&b| b == 0) && new.iter().any(|&b| b != 0) {
            return old_and_new(disk, at, bytes);
        }
        assert!(Instant::now() < deadline, "nothing is written at {at}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_lost_write_is_found() {
    // The old bytes come back over newer ones. A single time may be hidden by the next write, so it is done for a
    // while, as a disk would that forgets now and then.
    let report = broken(2, |disk| {
        for _ in 0..20 {
            let (old, _) = old_and_new(disk, 64 << 10, 32 << 10);
            disk.write_all_at(&old, 64 << 10).expect("inside");
        }
    });
    assert_fails(&report, "was still read");
}

#[test]
fn forgotten_blocks_that_read_as_zeroes_are_found() {
    let report = broken(3, |disk| disk.write_all_at(&vec![0; 1 << 20], 1 << 20).expect("inside"));
    assert_eq!(report.verdict, Verdict::Fail, "{}", report.words());
    assert!(report.damaged_sectors == 0, "zeroes are judged by time: {}", report.words());
}

#[test]
fn torn_sectors_are_found() {
    let report = broken(4, |disk| {
        for sector in 0..2048 {
            disk.write_all_at(&[0x5a; 100], sector * 512 + 400).expect("inside");
        }
    });
    assert_fails(&report, "torn");
}

#[test]
fn misdirected_blocks_are_found() {
    let report = broken(5, |disk| {
        let mut block = vec![0; 256 << 10];
        disk.read_exact_at(&mut block, 2 << 20).expect("inside");
        disk.write_all_at(&block, 3 << 20).expect("inside");
    });
    assert_fails(&report, "misdirected");
}

#[test]
fn bytes_of_an_earlier_run_are_found() {
    let server = Server::start();
    let run = server.check(6);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(finish(run).violations, 0);
    let run = server.check(6);
    assert!(run.round(PATIENCE), "a round ends");
    assert_fails(&finish(run), "another volume or an earlier run");
}

/// A server that stops answering is no pass, and the run ends.
#[test]
fn requests_that_are_never_answered_are_no_pass() {
    let mut server = Server::start();
    let options = Options {
        area_mib: AREA_MIB,
        duration: 0,
        discard: Discard::Off,
        stall: 2,
        no_overlap: true,
        ..Options::new(server.socket())
    };
    let run = blkcheck::start(options).expect("it serves");
    std::thread::sleep(Duration::from_millis(200));
    server.kill();
    let report = run.join().expect("the server kept the protocol");
    assert_eq!(report.verdict, Verdict::Unknown, "{}", report.words());
    assert!(report.unanswered > 0, "{}", report.words());
}

/// A server hangs with requests in its hands, and the load goes to another one with the same disk.
fn replaced(seed: u64, then: impl FnOnce(&mut Server, &Handle)) -> Report {
    let mut server = Server::start_slow();
    let run = server.check(seed);
    until("writes", || run.progress.acked_writes.load(Ordering::SeqCst) > 20);
    signal(&server.child, Signal::STOP);
    until("every slot is taken", || run.progress.under_way.load(Ordering::SeqCst) == 16);
    let mut successor = spawn(server.folder.path(), "socket2", &[]);
    let socket = server.folder.path().join("socket2");
    until("the successor listens", || UnixStream::connect(&socket).is_ok());
    assert!(run.move_to(socket, PATIENCE), "the load goes to the successor");
    assert!(run.round(PATIENCE), "what was left behind counts as done or never to be");
    then(&mut server, &run);
    assert!(run.round(PATIENCE), "a round ends");
    let report = finish(run);
    assert_eq!(report.left_behind, 16, "{}", report.words());
    successor.kill().expect("a child of ours");
    successor.wait().expect("a child of ours");
    report
}

#[test]
fn a_load_goes_to_another_server() {
    let report = replaced(7, |server, _| server.kill());
    assert_eq!(report.verdict, Verdict::Pass, "{}", report.words());
}

#[test]
fn what_a_replaced_server_still_writes_is_found() {
    let report = replaced(8, |server, run| {
        // So that nothing newer covers it up.
        assert!(run.pause(PATIENCE), "it drains");
        let disk = server.disk();
        let content = || {
            let mut content = vec![0; 16 << 20];
            disk.read_exact_at(&mut content, 0).expect("inside");
            content
        };
        let before = content();
        signal(&server.child, Signal::CONT);
        until("it writes", || content() != before);
    });
    assert_fails(&report, "which nobody ever wrote here since the round began");
}

/// While the load stands still nothing is asked; a round goes on from there.
#[test]
fn a_load_stands_still_until_the_next_round() {
    let server = Server::start();
    let run = server.check(9);
    until("writes", || run.progress.acked_writes.load(Ordering::SeqCst) > 100);
    assert!(run.pause(PATIENCE), "it drains");
    let answered = run.progress.answered.load(Ordering::SeqCst);
    // Time to do what it must not.
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(run.progress.under_way.load(Ordering::SeqCst), 0);
    assert_eq!(run.progress.answered.load(Ordering::SeqCst), answered);
    assert!(run.round(PATIENCE), "a round ends");
    until("it goes on", || run.progress.answered.load(Ordering::SeqCst) > answered + 100);
    assert!(run.pause(PATIENCE), "and stands still again");
    let report = finish(run);
    assert_eq!(report.verdict, Verdict::Pass, "{}", report.words());
}

/// The disk itself, read behind the server's back while the load stands still, is judged as a read is. In a copy of it every
/// sector that is not what it was is named, and no other one.
#[test]
fn an_image_is_judged_as_a_read_of_everything() {
    let server = Server::start();
    let run = server.check(10);
    let written = || run.progress.acked_writes.load(Ordering::SeqCst);
    until("writes", || written() > 100);
    let disk = server.folder.path().join("disk");
    assert!(run.judge_file(disk.clone(), PATIENCE).is_err(), "while the load goes on nothing can be said");
    // What the round before left counts, too.
    assert!(run.round(PATIENCE), "a round ends");
    let before = written();
    until("more writes", || written() > before + 20);
    assert!(run.pause(PATIENCE), "it drains");
    let judged = run.judge_file(disk.clone(), PATIENCE).expect("readable");
    assert_eq!((judged.sectors, judged.undecided), (8192, 0));
    assert!(judged.damaged.is_empty() && judged.stale.is_empty(), "{judged:?}");

    let copy = server.folder.path().join("copy");
    let mut bytes = std::fs::read(&disk).expect("readable");
    let is_written = |bytes: &[u8], sector: usize| bytes[sector * 512..][..512].iter().any(|&byte| byte != 0);
    let mut written = (0..8192).filter(|&sector| is_written(&bytes, sector));
    let (lost, rotten) = (written.next().expect("one"), written.next_back().expect("another one"));
    bytes[lost * 512..][..512].fill(0);
    bytes[rotten * 512 + 300] ^= 1;
    std::fs::write(&copy, bytes).expect("room");
    let judged = run.judge_file(copy, PATIENCE).expect("readable");
    let number = |sector: usize| vec![u32::try_from(sector).expect("small")];
    assert_eq!((&judged.stale, &judged.damaged), (&number(lost), &number(rotten)), "{judged:?}");
    // What is not there is zeroes.
    let none = run.judge_file("/dev/null".into(), PATIENCE).expect("readable");
    assert!(none.stale.len() > 100 && none.damaged.is_empty(), "{none:?}");
    assert!(run.judge_file("/nowhere".into(), PATIENCE).is_err());
    let report = finish(run);
    assert_eq!(report.verdict, Verdict::Pass, "{}", report.words());
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("a child of ours");
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
