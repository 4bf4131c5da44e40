//! The front end against a server that is known to work: qemu-storage-daemon and a file whose bytes we can see.
//!
//! Where that program is not installed the tests say so and pass: `make deps` installs it.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use clap::Parser;
use evolute_bench::front_end::content::check;
use evolute_bench::front_end::options::Options;
use evolute_bench::front_end::report::Report;
use evolute_bench::front_end::{FrontEndError, Observer, run, run_together};

const SIZE: u64 = 32 << 20;

struct Server {
    dir: tempfile::TempDir,
    child: Child,
}

impl Server {
    /// None where there is no qemu-storage-daemon.
    fn start(queues: usize) -> Option<Self> {
        let dir = tempfile::tempdir().expect("tempdir");
        let (image, socket) = (dir.path().join("image"), dir.path().join("sock"));
        File::create(&image).and_then(|file| file.set_len(SIZE)).expect("an image");
        let started = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=f,filename={}", image.display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
                socket.display()
            ))
            .stdin(Stdio::null())
            .spawn();
        let child = match started {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: qemu-storage-daemon is not installed");
                return None;
            }
            Err(error) => panic!("qemu-storage-daemon: {error}"),
        };
        let server = Self { dir, child };
        let deadline = Instant::now() + Duration::from_secs(30);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "no socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(server)
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn run(&self, words: &str) -> Result<Report, FrontEndError> {
        run(&options(&self.dir.path().join("sock"), words), &mut (), &AtomicBool::new(false))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn options(socket: &Path, words: &str) -> Options {
    let socket = socket.to_str().expect("UTF-8");
    Options::parse_from(["vublk-bench", "--socket", socket].into_iter().chain(words.split_whitespace()))
}

#[test]
fn what_was_written_is_verified_and_is_in_the_file() {
    let Some(server) = Server::start(2) else { return };
    let report = server
        .run("--rw randrw --bs 4k --qd 16 --queues 2 --runtime 0.5 --prefill --verify --seed 9")
        .expect("runs");
    assert_eq!(
        (report.errors, report.verify_errors, report.stalled),
        (0, 0, false),
        "{:?}",
        report.first_error
    );
    assert!(report.verified >= SIZE / 4096, "every block was read back: {}", report.verified);
    assert!(report.read.ios > 0 && report.write.ios > 0);
    assert_eq!(report.exit_status(), 0);
    // The file holds what the generator thinks it wrote: the generation is in the sector, the rest follows from it.
    let mut block = [0; 4096];
    let mut scratch = [0; 4096];
    let mut file = File::open(server.image()).expect("image");
    for offset in (0..SIZE).step_by(4096) {
        file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(&mut block)).expect("read");
        let generation = u32::from_le_bytes(block[8..12].try_into().expect("4 bytes"));
        assert!(generation >= 1);
        check(&block, &mut scratch, 9, offset, generation).expect("what was written");
    }
}

/// Changes a block under the server while the front end believes it knows the content.
struct Spoils(PathBuf);

impl Observer for Spoils {
    fn ends(&mut self) {
        let file = fs::OpenOptions::new().write(true).open(&self.0).expect("image");
        file.write_all_at(&[0xEE; 512], 1 << 20).expect("written");
    }
}

#[test]
fn a_block_that_changed_by_itself_is_found_when_it_is_read_back() {
    let Some(server) = Server::start(1) else { return };
    let wanted =
        options(&server.dir.path().join("sock"), "--rw randread --qd 4 --runtime 0.2 --prefill --verify");
    let report = run(&wanted, &mut Spoils(server.image()), &AtomicBool::new(false)).expect("runs");
    assert_eq!(report.verify_errors, 1);
    assert_eq!(report.exit_status(), 1);
    let first = report.first_error.expect("named");
    assert!(first.contains(&format!("block at {}", 1 << 20)), "{first}");
}

#[test]
fn a_server_that_answers_no_more_is_a_stall_and_not_a_hang() {
    let Some(server) = Server::start(1) else { return };
    struct Freezes(i32);
    impl Observer for Freezes {
        fn begins(&mut self) {
            let pid = rustix::process::Pid::from_raw(self.0).expect("a pid");
            rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("ours");
        }
    }
    let pid = i32::try_from(server.child.id()).expect("a pid");
    let wanted =
        options(&server.dir.path().join("sock"), "--rw randwrite --qd 4 --runtime 60 --ramp 0.1 --stall 0.5");
    let report = run(&wanted, &mut Freezes(pid), &AtomicBool::new(false)).expect("runs");
    assert!(report.stalled);
    assert_eq!(report.exit_status(), 2);
}

#[test]
fn every_kind_of_load_completes_without_an_error() {
    let Some(server) = Server::start(1) else { return };
    for words in [
        "--rw read --bs 128k --qd 16",
        "--rw write --bs 128k --qd 16 --flush-every 4 --timeline 50",
        "--rw rw --bs 512 --qd 3",
        "--rw randwrite --qd 128 --verify",
        "--rw randread --qd 32 --poll --offset 1M --size 2M",
    ] {
        let report = server.run(&format!("{words} --runtime 0.2")).expect(words);
        assert_eq!((report.errors, report.verify_errors, report.stalled), (0, 0, false), "{words}");
        assert!(report.all.ios > 0, "{words}");
        assert_eq!(report.timeline.is_empty(), !words.contains("timeline"), "{words}");
        assert_eq!(report.flush.ios > 0, words.contains("flush"), "{words}");
    }
}

/// Notes when it was called.
#[derive(Default)]
struct Notes(Vec<&'static str>);

impl Observer for Notes {
    fn connected(&mut self) {
        self.0.push("connected");
    }
    fn begins(&mut self) {
        self.0.push("begins");
    }
    fn ends(&mut self) {
        self.0.push("ends");
    }
}

#[test]
fn two_devices_at_once_are_told_as_one() {
    let (Some(a), Some(b)) = (Server::start(1), Server::start(1)) else { return };
    let both = [&a, &b].map(|server| {
        options(&server.dir.path().join("sock"), "--rw randwrite --qd 4 --runtime 0.3 --prefill")
    });
    let mut notes = Notes::default();
    let report = run_together(&both, &mut notes, &AtomicBool::new(false)).expect("runs");
    assert_eq!((report.errors, report.stalled, report.qd, report.size), (0, false, 8, 2 * SIZE));
    assert!(report.write.ios > 0);
    assert_eq!(notes.0, ["connected", "begins", "ends"]);
    for server in [a, b] {
        let mut first = [0; 512];
        File::open(server.image()).and_then(|mut file| file.read_exact(&mut first)).expect("read");
        assert_ne!(first, [0; 512], "both were written");
    }
    assert!(run_together(&[], &mut (), &AtomicBool::new(false)).is_err());
    let gone = [options(Path::new("/nonexistent/x.sock"), "")];
    assert!(run_together(&gone, &mut (), &AtomicBool::new(false)).is_err());
}

#[test]
fn nobody_at_the_socket_is_said_with_its_path() {
    let failed = run(&options(Path::new("/nonexistent/x.sock"), ""), &mut (), &AtomicBool::new(false));
    assert!(failed.expect_err("nobody").to_string().contains("/nonexistent/x.sock"));
}
