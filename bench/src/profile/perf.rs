//! The program `perf`: what of it works here, sampling, counting.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use super::ProfileError;
use super::samples::{Sample, parse};
use super::stations::{self, EVENTS, Event};
use crate::runner::cpu::Watched;

/// Virtual machines seldom have counters of the processor; the kernel's timer is everywhere.
const CLOCK: &str = "cpu-clock";
/// Not a divisor of the ticks of anything.
const SAMPLES_PER_SECOND: &str = "1997";
const ALL_CALLS: &str = "raw_syscalls:sys_enter";
const SWITCHES: &str = "context-switches";
/// The system calls an I/O may be made of; the rest of all is told as such.
const CALLS: [&str; 17] = [
    "sendto",
    "sendmsg",
    "write",
    "writev",
    "recvfrom",
    "recvmsg",
    "read",
    "readv",
    "epoll_wait",
    "epoll_pwait",
    "ppoll",
    "poll",
    "futex",
    "io_uring_enter",
    "pwrite64",
    "pwritev2",
    "fdatasync",
];

/// How often something happened in the time that was watched.
#[derive(Debug, Clone, PartialEq)]
pub struct Count {
    pub name: String,
    pub times: u64,
}

/// Refuses with what is missing, before a cluster is started.
pub fn check() -> Result<(), ProfileError> {
    let tried = output(Command::new("perf").args(["stat", "-e", SWITCHES, "-e", ALL_CALLS, "true"]))?;
    if tried.status.success() {
        return Ok(());
    }
    Err(ProfileError::NoTracepoints { said: String::from_utf8_lossy(&tried.stderr).trim().to_owned() })
}

/// Begins to sample; ends by itself.
pub fn record(processes: &[Watched], time: Duration, into: &Path) -> Result<Child, ProfileError> {
    let mut command = Command::new("perf");
    command.args(["record", "--quiet", "--event", CLOCK, "--freq", SAMPLES_PER_SECOND, "-g", "--output"]);
    command.arg(into).args(["--pid", &pids(processes)]);
    spawn(&mut command, time)
}

/// Begins to note the system calls of [`EVENTS`], each with its time; ends by itself.
pub fn note(processes: &[Watched], time: Duration, into: &Path) -> Result<Child, ProfileError> {
    let events = EVENTS.map(|event| format!("syscalls:{event}"));
    let mut command = Command::new("perf");
    command.args(["record", "--quiet", "--mmap-pages", "16M", "--event", &events.join(",")]);
    command.args(["--pid", &pids(processes), "--output"]).arg(into);
    spawn(&mut command, time)
}

fn pids(processes: &[Watched]) -> String {
    processes.iter().map(|process| process.pid.to_string()).collect::<Vec<_>>().join(",")
}

pub fn events(noted: &Path) -> Result<Vec<Event>, ProfileError> {
    Ok(stations::parse(&script(&["--ns", "--fields", "pid,time,event,trace"], noted)?))
}

pub fn samples(recorded: &Path) -> Result<Vec<Sample>, ProfileError> {
    // Inlined functions would have to be looked up one by one, which takes minutes.
    Ok(parse(&script(&["--no-inline", "--fields", "pid,ip,sym,dso"], recorded)?))
}

/// What was recorded, as text.
fn script(how: &[&str], recorded: &Path) -> Result<String, ProfileError> {
    let output = output(Command::new("perf").arg("script").args(how).arg("--input").arg(recorded))?;
    if !output.status.success() {
        return Err(ProfileError::Perf { said: String::from_utf8_lossy(&output.stderr).trim().to_owned() });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Begins to count; ends by itself, and then the counts are in the file.
pub fn count(process: &Watched, time: Duration, into: &Path) -> Result<Child, ProfileError> {
    let calls = CALLS.map(|call| format!("syscalls:sys_enter_{call}"));
    let events: Vec<&str> =
        [SWITCHES, ALL_CALLS].into_iter().chain(calls.iter().map(String::as_str)).collect();
    let mut command = Command::new("perf");
    command.args(["stat", "--field-separator", ",", "--event", &events.join(","), "--output"]);
    command.arg(into).args(["--pid", &process.pid.to_string()]);
    spawn(&mut command, time)
}

pub fn counts(counted: &Path) -> Result<Vec<Count>, ProfileError> {
    let doing = || format!("reading {}", counted.display());
    let text = fs::read_to_string(counted).map_err(|source| ProfileError::Io { doing: doing(), source })?;
    Ok(parse_counts(&text))
}

/// Waits for its end.
pub fn finish(mut child: Child) -> Result<(), ProfileError> {
    let doing = || "waiting for perf".to_owned();
    let status = child.wait().map_err(|source| ProfileError::Io { doing: doing(), source })?;
    if status.success() {
        return Ok(());
    }
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = io::Read::read_to_string(&mut stderr, &mut said);
    }
    Err(ProfileError::Perf { said: format!("{status}: {}", said.trim()) })
}

fn spawn(command: &mut Command, time: Duration) -> Result<Child, ProfileError> {
    command.args(["--", "sleep", &time.as_secs_f64().to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().map_err(not_started)
}

fn output(command: &mut Command) -> Result<Output, ProfileError> {
    command.stdin(Stdio::null()).output().map_err(not_started)
}

fn not_started(source: io::Error) -> ProfileError {
    match source.kind() {
        io::ErrorKind::NotFound => ProfileError::NoPerf,
        _ => ProfileError::Io { doing: "starting perf".to_owned(), source },
    }
}

/// Lines of `COUNT,UNIT,EVENT,…`. An event that never came or cannot be counted is none.
fn parse_counts(text: &str) -> Vec<Count> {
    let count = |line: &str| {
        let mut fields = line.split(',');
        let times = fields.next()?.trim().parse().ok()?;
        let event = fields.nth(1)?;
        let name = event.strip_prefix("syscalls:sys_enter_").unwrap_or(event);
        let name = if name == ALL_CALLS { "all system calls" } else { name };
        Some(Count { name: name.to_owned(), times })
    };
    text.lines().filter_map(count).filter(|count| count.times > 0).collect()
}

/// Where the files of one pass are.
pub fn file(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.perf"))
}

#[cfg(test)]
mod tests {
    use super::{Count, parse_counts};

    #[test]
    fn counts_are_read_and_what_never_came_is_left_out() {
        let text = "# started on Thu Nov 26\n\n12,,context-switches,1000,100.00,,\n340,,raw_syscalls:sys_enter,1000,100.00,,\n\
                    0,,syscalls:sys_enter_poll,1000,100.00,,\n<not counted>,,syscalls:sys_enter_read,0,0.00,,\n\
                    300,,syscalls:sys_enter_sendto,1000,100.00,,\n";
        let count = |name: &str, times| Count { name: name.to_owned(), times };
        let wanted = [count("context-switches", 12), count("all system calls", 340), count("sendto", 300)];
        assert_eq!(parse_counts(text), wanted);
    }
}
