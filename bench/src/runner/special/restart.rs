//! How long a chunkserver that holds something takes from its start until it serves all its copysets again.
//!
//! Serving is what an operator sees: its ready file is there, and the control plane has heard from it since, with every
//! replica of it online in a role. The end before is left out: it is told beside it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;

use super::{figure, stop};
use crate::runner::BenchError;
use crate::runner::lab::{Lab, Subject};
use crate::runner::machine::{Store, expect_room};
use crate::runner::process::age;
use crate::runner::record::Record;
use crate::runner::system::Wanted;
use crate::runner::works::randwrite;

pub const WORK: &str = "restart";
/// The one that is restarted.
const NAME: &str = "chunkserver-2";
const DEPTH: usize = 32;
const BACK_MAX: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(5);

pub fn run(lab: &Lab<'_>, record: &mut Record) -> Result<(), BenchError> {
    let base = Store::Disk.base().map_err(BenchError::NoStore)?;
    expect_room(Store::Disk, &base, lab.restart_bytes).map_err(BenchError::NoStore)?;
    let wanted = Wanted { restarts: 5, ..Wanted::volume(lab.restart_bytes) };
    let cluster = lab.cluster(Store::Disk, &wanted)?;
    cluster.fill(lab)?;
    let note = format!("{} MiB written", lab.restart_bytes >> 20);
    for (signal, name) in [(Signal::TERM, "after SIGTERM"), (Signal::KILL, "after SIGKILL")] {
        // The worst moment: log and overlay are full of what was just written at random.
        cluster.run(lab, randwrite(DEPTH), lab.pace, &mut ())?;
        let times = restart(&cluster, lab, signal)?;
        record.figure(
            figure(&cluster, WORK, name, times.serving.as_secs_f64(), "s until serving").noted(&note),
        )?;
        let part = |what: &str, time: Duration| {
            figure(&cluster, "restart-parts", format!("{name}: {what}"), time.as_secs_f64(), "s")
        };
        record.figure(part("signal to ready file of the next", times.away))?;
        record.figure(part("start to ready file", times.ready))?;
    }
    stop(cluster, WORK, record);
    Ok(())
}

#[derive(Debug)]
struct Times {
    /// From the signal until the next process was ready.
    away: Duration,
    /// From the start of the next process until its ready file.
    ready: Duration,
    /// From the start of the next process until everything of it serves.
    serving: Duration,
}

fn restart(cluster: &Subject, lab: &Lab<'_>, signal: Signal) -> Result<Times, BenchError> {
    let ready_file = cluster.system.run_dir.join(format!("{NAME}.json"));
    let before =
        ready(&ready_file).ok_or(BenchError::NotBack { what: "it was not even there", log: None })?;
    let pid = i32::try_from(before.pid).ok().and_then(Pid::from_raw);
    let sent = Instant::now();
    if let Some(pid) = pid {
        kill_process(pid, signal)
            .map_err(|error| BenchError::Io { doing: format!("signalling {NAME}"), source: error.into() })?;
    }
    let deadline = sent + BACK_MAX;
    let now = loop {
        match ready(&ready_file) {
            Some(now) if now.pid != before.pid => break now,
            _ => next_look(lab, deadline, "no ready file")?,
        }
    };
    let (away, ready_at) = (sent.elapsed(), Instant::now());
    let ready_after = age(now.pid)?;
    loop {
        let status = status(cluster, lab)?;
        // What was reported before the ready file is of the process before.
        if status.serves(now.chunkserver, ready_at.elapsed()) {
            return Ok(Times { away, ready: ready_after, serving: age(now.pid)? });
        }
        next_look(lab, deadline, "ready, but the control plane does not see it serve")?;
    }
}

fn next_look(lab: &Lab<'_>, deadline: Instant, what: &'static str) -> Result<(), BenchError> {
    lab.go_on()?;
    if Instant::now() >= deadline {
        return Err(BenchError::NotBack { what, log: Some(NAME) });
    }
    sleep(POLL);
    Ok(())
}

/// A chunkserver's ready file.
#[derive(Debug, Deserialize)]
struct Ready {
    pid: u32,
    chunkserver: u32,
}

fn ready(path: &Path) -> Option<Ready> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// The parts of `evolute cluster status --json` that matter here; its shape is in docs/cli.md.
#[derive(Debug, Deserialize)]
struct Status {
    chunkservers: Vec<Chunkserver>,
    copysets: Vec<Copyset>,
}

#[derive(Debug, Deserialize)]
struct Chunkserver {
    id: u32,
    online: bool,
    last_report_ms_ago: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Copyset {
    replicas: Vec<Replica>,
}

#[derive(Debug, Deserialize)]
struct Replica {
    chunkserver: u32,
    online: bool,
    role: String,
}

impl Status {
    fn serves(&self, chunkserver: u32, ready_since: Duration) -> bool {
        let heard = self.chunkservers.iter().any(|one| {
            let ago = one.last_report_ms_ago.map(Duration::from_millis);
            one.id == chunkserver && one.online && ago.is_some_and(|ago| ago < ready_since)
        });
        let mut replicas = self.copysets.iter().flat_map(|copyset| &copyset.replicas);
        heard
            && replicas.all(|replica| {
                let in_a_role = matches!(replica.role.as_str(), "leader" | "follower");
                replica.chunkserver != chunkserver || (replica.online && in_a_role)
            })
    }
}

fn status(cluster: &Subject, lab: &Lab<'_>) -> Result<Status, BenchError> {
    let program = lab.bin_dir.join("evolute");
    let doing = || format!("running {} cluster status", program.display());
    let answer = Command::new(&program)
        .args(["--mds", &cluster.system.mds, "--json", "cluster", "status"])
        .output()
        .map_err(|source| BenchError::Io { doing: doing(), source })?;
    serde_json::from_slice(&answer.stdout).map_err(|_| BenchError::Unreadable {
        path: format!("{}: {}", doing(), String::from_utf8_lossy(&answer.stderr).trim()),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Status;

    fn status(report_ms_ago: u64, role: &str, online: bool) -> Status {
        let text = format!(
            r#"{{"health": "ok",
                "chunkservers": [{{"id": 1, "online": true, "last_report_ms_ago": 1}},
                                 {{"id": 2, "online": true, "last_report_ms_ago": {report_ms_ago}}}],
                "copysets": [{{"id": 1, "replicas": [{{"chunkserver": 1, "online": false, "role": "unknown"}},
                                                     {{"chunkserver": 2, "online": {online}, "role": "{role}"}}]}}]}}"#
        );
        serde_json::from_str(&text).expect("a status")
    }

    #[test]
    fn a_report_of_the_process_before_does_not_count() {
        let ready_since = Duration::from_millis(100);
        assert!(status(50, "follower", true).serves(2, ready_since));
        assert!(!status(150, "follower", true).serves(2, ready_since));
        assert!(!status(50, "unknown", true).serves(2, ready_since));
        assert!(!status(50, "follower", false).serves(2, ready_since));
        assert!(!status(50, "follower", true).serves(3, ready_since), "nobody of that number");
    }
}
