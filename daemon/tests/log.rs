//! What a whole process does when its stderr is closed, full, or a pipe whose reader stands still. The processes are
//! this test itself, started again.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What the process is to do; `None` in the test itself.
const ROLE: &str = "EVOLUTE_TEST_ROLE";
/// Far beyond what any machine needs for it.
const PATIENCE: Duration = Duration::from_secs(60);
const SIGABRT: i32 = 6;

/// Not a test of anything: the process that the others start.
#[test]
fn the_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    // As `main` does it; the test harness would write to stderr behind our back.
    let log = evolute_daemon::start();
    for n in 0..20_000 {
        tracing::info!(n, "something that happened on a path that must not wait");
    }
    tracing::error!("something went wrong");
    match role.as_str() {
        "panics" => panic!("on purpose"),
        _ => evolute_daemon::last_words("the process: could not go on"),
    }
    drop(log);
    std::process::exit(7);
}

fn process(role: &str, stderr: OwnedFd) -> Child {
    process_with(role, "info", stderr)
}

fn process_with(role: &str, setting: &str, stderr: OwnedFd) -> Child {
    Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "the_process", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env("EVOLUTE_LOG", setting)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .expect("started")
}

/// Its end; one that stands still is killed, and a failure.
fn end(mut child: Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().expect("ours") {
            return status;
        }
        if Instant::now() >= deadline {
            child.kill().expect("ours");
            child.wait().expect("ours");
            panic!("the process stood still");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_reader_that_stands_still_holds_nothing_up_not_even_an_end() {
    for (role, code, signal) in [("fails", Some(7), None), ("panics", None, Some(SIGABRT))] {
        let (_reader, writer) = rustix::pipe::pipe().expect("a pipe");
        let status = end(process(role, writer));
        assert_eq!((status.code(), status.signal()), (code, signal), "{role}");
    }
}

#[test]
fn a_stderr_that_cannot_be_written_ends_nothing() {
    let full = || File::options().write(true).open("/dev/full").expect("there").into();
    assert_eq!(end(process("fails", full())).code(), Some(7));
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    drop(reader);
    assert_eq!(end(process("fails", writer)).code(), Some(7));
}

/// More than was built in, and nonsense: what there is to say about it is a line of the log like any other.
#[test]
fn what_is_wrong_with_the_setting_of_the_log_waits_for_nobody_and_ends_nothing() {
    for setting in ["trace", "info,evolute_raft=loud", ""] {
        let (_reader, writer) = rustix::pipe::pipe().expect("a pipe");
        let size = rustix::pipe::fcntl_getpipe_size(&writer).expect("a size");
        assert_eq!(rustix::io::write(&writer, &vec![b'\n'; size]), Ok(size), "it is full");
        assert_eq!(end(process_with("fails", setting, writer)).code(), Some(7), "{setting:?}");
        let full = File::options().write(true).open("/dev/full").expect("there").into();
        assert_eq!(end(process_with("fails", setting, full)).code(), Some(7), "{setting:?}");
    }
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let child = process_with("fails", "info,evolute_raft=loud", writer);
    let mut text = String::new();
    File::from(reader).read_to_string(&mut text).expect("read");
    end(child);
    assert!(
        text.contains("loud\" is not used") && text.contains("something that happened"),
        "{:?}",
        text.get(..300)
    );
}

#[test]
fn a_setting_that_says_nothing_lets_errors_through() {
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let child = process_with("fails", "", writer);
    let mut text = String::new();
    File::from(reader).read_to_string(&mut text).expect("read");
    end(child);
    assert!(text.contains("something went wrong") && !text.contains("something that happened"), "{text}");
}

#[test]
fn the_reason_of_an_end_is_the_last_line() {
    for (role, words) in [("fails", "the process: could not go on\n"), ("panics", "on purpose\n")] {
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        let child = process(role, writer);
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).expect("read");
        end(child);
        assert!(text.contains(words), "{role}: {}", &text[text.len().saturating_sub(300)..]);
    }
}
