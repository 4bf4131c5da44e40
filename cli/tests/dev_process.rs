//! A process of a dev cluster is watched, started again when it dies, and stopped in words.
//!
//! The daemons here are shell scripts that do what a daemon does at its edges: write the ready file, catch SIGTERM.

use std::fs;
use std::path::Path;
use std::time::Duration;

use evolute_cli::dev::process::{Event, Process, Spec};
use tokio::sync::mpsc;

/// `exec` keeps the process id that the ready file says.
const SERVES: &str = r#"
trap 'exit 0' TERM
printf '{"pid":%d}' $$ > "$2.new"; mv "$2.new" "$2"
while :; do sleep 0.05; done
"#;

fn spec(dir: &Path, script: &str, restarts_max: u32) -> Spec {
    Spec {
        name: "thing-1".to_owned(),
        program: "/bin/sh".into(),
        // The supervisor adds "--ready-file PATH": $1 and $2 of the script.
        arguments: vec!["-c".into(), script.into(), "thing".into()],
        log: dir.join("thing.log"),
        ready_file: dir.join("thing.json"),
        ready_within: Duration::from_secs(60),
        restarts_max: Some(restarts_max),
    }
}

async fn next(events: &mut mpsc::UnboundedReceiver<Event>) -> Event {
    tokio::time::timeout(Duration::from_secs(60), events.recv()).await.expect("in time").expect("an event")
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("ours");
}

#[tokio::test]
async fn a_killed_process_runs_again_and_then_stops_cleanly() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (out, mut events) = mpsc::unbounded_channel();
    let (process, pid) = Process::start(spec(dir.path(), SERVES, 5), out).await.expect("starts");
    kill(pid);
    assert!(
        matches!(next(&mut events).await, Event::Died { name, status } if name == "thing-1" && status == "signal 9")
    );
    let Event::Restarted { pid: second, .. } = next(&mut events).await else { panic!("not restarted") };
    assert_ne!(second, pid);
    assert_eq!(process.stop().await, None);
    assert!(!Path::new(&format!("/proc/{second}")).exists(), "gone");
}

#[tokio::test]
async fn a_process_that_dies_too_often_stays_down_with_its_last_words() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (out, mut events) = mpsc::unbounded_channel();
    let once = r#"
[ ! -e "$2.once" ] || { echo "no more ready than this"; exit 7; }
: > "$2.once"
printf '{"pid":%d}' $$ > "$2.new"; mv "$2.new" "$2"
while [ ! -e "$2.die" ]; do sleep 0.02; done
"#;
    let (process, _) = Process::start(spec(dir.path(), once, 2), out).await.expect("starts");
    fs::write(dir.path().join("thing.json.die"), "").expect("write");
    let mut deaths = 0;
    let why = loop {
        match next(&mut events).await {
            Event::Died { .. } => deaths += 1,
            Event::GivenUp { why, .. } => break why,
            Event::NotStarted { .. } => {}
            Event::Restarted { .. } => panic!("it never was ready again"),
        }
    };
    assert_eq!(deaths, 3);
    assert!(why.contains("no more ready than this"), "{why}");
    assert_eq!(process.stop().await, None);
}

#[tokio::test]
async fn however_often_a_process_dies_it_is_started_again() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (out, mut events) = mpsc::unbounded_channel();
    let spec = Spec { restarts_max: None, ..spec(dir.path(), SERVES, 0) };
    let (process, mut pid) = Process::start(spec, out).await.expect("starts");
    for _ in 0..6 {
        kill(pid);
        assert!(matches!(next(&mut events).await, Event::Died { .. }));
        let Event::Restarted { pid: again, .. } = next(&mut events).await else { panic!("not restarted") };
        pid = again;
    }
    // Nor when it cannot be started at all for a while.
    fs::remove_file(dir.path().join("thing.json")).expect("there");
    fs::create_dir(dir.path().join("thing.json")).expect("made");
    kill(pid);
    assert!(matches!(next(&mut events).await, Event::Died { .. }));
    assert!(matches!(next(&mut events).await, Event::NotStarted { .. }));
    fs::remove_dir(dir.path().join("thing.json")).expect("ours");
    loop {
        match next(&mut events).await {
            Event::NotStarted { .. } | Event::Died { .. } => {}
            Event::Restarted { .. } => break,
            Event::GivenUp { why, .. } => panic!("given up: {why}"),
        }
    }
    assert_eq!(process.stop().await, None);
}

#[tokio::test]
async fn a_start_that_fails_says_how_and_shows_the_log() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (out, _events) = mpsc::unbounded_channel();
    let script = "echo 'data directory belongs to another cluster' >&2; exit 3";
    let failure = Process::start(spec(dir.path(), script, 5), out).await.map(|_| ()).expect_err("it ended");
    let text = failure.to_string();
    assert!(text.contains("exit status 3") && text.contains("belongs to another cluster"), "{text}");
}

#[tokio::test]
async fn a_ready_file_of_a_former_run_is_not_believed() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (out, _events) = mpsc::unbounded_channel();
    fs::write(dir.path().join("thing.json"), format!("{{\"pid\":{}}}", std::process::id())).expect("write");
    let mut never = spec(dir.path(), "exec sleep 100", 5);
    never.ready_within = Duration::from_millis(200);
    let failure = Process::start(never, out).await.map(|_| ()).expect_err("never ready");
    assert!(failure.to_string().contains("was not ready within"), "{failure}");
}

#[tokio::test]
async fn an_unclean_end_is_said() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (out, _events) = mpsc::unbounded_channel();
    let script = SERVES.replace("exit 0", "exit 4");
    let (process, _) = Process::start(spec(dir.path(), &script, 5), out).await.expect("starts");
    let said = process.stop().await.expect("unclean");
    assert!(said.contains("exit status 4"), "{said}");
}

#[tokio::test]
async fn a_missing_program_says_what_to_build() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (out, _events) = mpsc::unbounded_channel();
    let mut missing = spec(dir.path(), "", 5);
    missing.program = dir.path().join("evolute-nothing");
    let failure = Process::start(missing, out).await.map(|_| ()).expect_err("not there");
    assert!(failure.next().is_some_and(|next| next.contains("make build")));
}
