//! The road of one request at depth 1, timed from outside: the system calls that every process makes for it, in their order.
//!
//! Whatever lies between two calls is a station: a thread that is woken, the work it does until it passes the request on.
//! The log that the leader writes meanwhile is not on the road.

use std::time::Duration;

/// A process's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    Generator,
    Backend,
    Chunkserver(usize),
    Other,
}

/// Which process makes a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Generator,
    Backend,
    /// The chunkserver that the request came to.
    Leader,
    /// The first of the others that answers the leader.
    Follower,
}

pub struct Step {
    /// What has been done when this call is made, or has returned.
    name: &'static str,
    by: By,
    calls: &'static [&'static str],
}

const fn step(name: &'static str, by: By, calls: &'static [&'static str]) -> Step {
    Step { name, by, calls }
}

/// Calls that sent something, by when they began; calls that got something, by when they returned.
pub const EVENTS: [&str; 8] = [
    "sys_enter_write",
    "sys_enter_writev",
    "sys_enter_sendto",
    "sys_enter_pwrite64",
    "sys_enter_io_uring_enter",
    "sys_exit_read",
    "sys_exit_readv",
    "sys_exit_recvfrom",
];
const SENDS: &[&str] = &["sys_enter_sendto", "sys_enter_writev"];
const GETS: &[&str] = &["sys_exit_recvfrom", "sys_exit_read", "sys_exit_readv"];
const KICK: &[&str] = &["sys_enter_write"];
const LOG: &[&str] = &["sys_enter_pwrite64", "sys_enter_io_uring_enter"];

const ROUTED: Step = step("backend: woken; parsed, split, routed, framed", By::Backend, SENDS);
const RECEIVED: Step = step("leader: woken, received", By::Leader, GETS);
const ANSWERED: Step = step("backend: woken, received", By::Backend, GETS);
const CALLED: Step = step("guest: woken", By::Generator, GETS);
const NEXT: Step = step("guest: next request", By::Generator, KICK);

/// After the kick, with which a request begins.
const WRITE: [Step; 12] = [
    ROUTED,
    RECEIVED,
    step("leader: fenced, one entry, on its way to the followers", By::Leader, SENDS),
    step("follower: woken, received", By::Follower, GETS),
    step("follower: openraft, the log's batch", By::Follower, LOG),
    step("follower: log written, acknowledged", By::Follower, SENDS),
    RECEIVED,
    step("leader: committed, applied, replied", By::Leader, SENDS),
    ANSWERED,
    step("backend: completed, the guest called", By::Backend, KICK),
    CALLED,
    NEXT,
];

const READ: [Step; 7] = [
    ROUTED,
    RECEIVED,
    step("leader: read, verified, replied", By::Leader, SENDS),
    ANSWERED,
    step("backend: verified, completed, the guest called", By::Backend, KICK),
    CALLED,
    NEXT,
];

/// The road of a load's requests. `None`: it cannot be told.
pub fn road(work: &str) -> Option<&'static [Step]> {
    match work {
        "randwrite-4k-qd1" => Some(&WRITE),
        "randread-4k-qd1" => Some(&READ),
        _ => None,
    }
}

/// One system call begun or returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub pid: u32,
    pub at: Duration,
    pub name: String,
}

/// Lines of `PID SECONDS: syscalls:EVENT: …`. Calls that returned nothing are left out: nobody got anything by them.
pub fn parse(text: &str) -> Vec<Event> {
    text.lines().filter_map(event).collect()
}

fn event(line: &str) -> Option<Event> {
    let mut words = line.split_whitespace();
    let pid = words.next()?.parse().ok()?;
    let (seconds, nanoseconds) = words.next()?.strip_suffix(':')?.split_once('.')?;
    let at = Duration::new(seconds.parse().ok()?, nanoseconds.parse().ok()?);
    let name = words.next()?.strip_prefix("syscalls:")?.strip_suffix(':')?.to_owned();
    if name.starts_with("sys_exit_") {
        let returned = i64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
        return (returned > 0).then_some(Event { pid, at, name });
    }
    Some(Event { pid, at, name })
}

/// A station: its number and name, and the µs it took, one number per request.
pub type Station = (String, Vec<f64>);

/// Of all requests whose whole road was seen.
pub fn stations(road: &[Step], events: &[Event], who: impl Fn(u32) -> Who) -> Vec<Station> {
    let numbered = (1..).zip(road).map(|(number, step)| (format!("{number:02} {}", step.name), Vec::new()));
    let mut found: Vec<Station> = numbered.collect();
    let events: Vec<(Who, Duration, &str)> =
        events.iter().map(|event| (who(event.pid), event.at, event.name.as_str())).collect();
    let kicks: Vec<usize> = (0..events.len())
        .filter(|at| events[*at].0 == Who::Generator && KICK.contains(&events[*at].2))
        .collect();
    for kick in kicks.windows(2) {
        let Some(times) = walk(road, &events[kick[0]..=kick[1]]) else { continue };
        for (station, pair) in found.iter_mut().zip(times.windows(2)) {
            station.1.push(pair[1].saturating_sub(pair[0]).as_secs_f64() * 1e6);
        }
    }
    found
}

/// When one request began, and when each step of it was made: from its kick to the next.
fn walk(road: &[Step], events: &[(Who, Duration, &str)]) -> Option<Vec<Duration>> {
    let leader = events.iter().skip_while(|event| event.0 != Who::Backend);
    let leader = leader.map(|event| event.0).find(|who| matches!(who, Who::Chunkserver(_)))?;
    let is_other = |who: Who| matches!(who, Who::Chunkserver(_)) && who != leader;
    // The one that is heard first is not always the one that was asked first.
    let answered = events.iter().position(|event| is_other(event.0) && event.2.starts_with("sys_enter_send"));
    let follower = answered.map(|at| events[at].0);
    let mut times = vec![events.first()?.1];
    let mut from = 1;
    for step in road {
        let by = |who: Who| match step.by {
            By::Generator => who == Who::Generator,
            By::Backend => who == Who::Backend,
            By::Leader => who == leader,
            By::Follower => Some(who) == follower,
        };
        let at = (from..events.len()).find(|at| by(events[*at].0) && step.calls.contains(&events[*at].2))?;
        times.push(events[at].1);
        from = at + 1;
    }
    (from == events.len()).then_some(times)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Event, WRITE, Who, parse, road, stations};

    /// Generator 1, backend 2, chunkservers 3 to 5.
    fn who(pid: u32) -> Who {
        match pid {
            1 => Who::Generator,
            2 => Who::Backend,
            3..=5 => Who::Chunkserver(pid as usize - 3),
            _ => Who::Other,
        }
    }

    fn event(pid: u32, us: u64, name: &str) -> Event {
        Event { pid, at: Duration::from_micros(us), name: name.to_owned() }
    }

    /// One write that chunkserver 4 leads; 5 answers first. Beside it, what is not on the road.
    fn write(at: u64) -> Vec<Event> {
        let names = [
            (1, 0, "sys_enter_write"),
            (9, 1, "sys_enter_write"),
            (2, 10, "sys_enter_writev"),
            (4, 30, "sys_exit_recvfrom"),
            (4, 40, "sys_enter_sendto"),
            (4, 41, "sys_enter_sendto"),
            (4, 42, "sys_enter_pwrite64"),
            (3, 60, "sys_exit_recvfrom"),
            (5, 61, "sys_exit_recvfrom"),
            (5, 70, "sys_enter_pwrite64"),
            (5, 75, "sys_exit_pwrite64"),
            (5, 80, "sys_enter_sendto"),
            (3, 85, "sys_enter_pwrite64"),
            (4, 90, "sys_exit_recvfrom"),
            (3, 95, "sys_enter_sendto"),
            (4, 100, "sys_enter_sendto"),
            (2, 120, "sys_exit_read"),
            (2, 125, "sys_enter_write"),
            (1, 140, "sys_exit_read"),
        ];
        names.iter().map(|(pid, us, name)| event(*pid, at + us, name)).collect()
    }

    #[test]
    fn the_road_of_a_write_is_found_among_everything_else() {
        let mut events = write(0);
        events.extend(write(150));
        // The second has no end, and one whose reply was not seen is no request.
        let found = stations(&WRITE, &events, who);
        let times: Vec<f64> = found.iter().map(|(_, times)| times[0]).collect();
        assert_eq!(found[8].0, "09 backend: woken, received");
        assert_eq!(times, [10.0, 20.0, 10.0, 21.0, 9.0, 10.0, 10.0, 10.0, 20.0, 5.0, 15.0, 10.0]);
        assert!(found.iter().all(|(_, times)| times.len() == 1));
        let without: Vec<Event> = events.into_iter().filter(|event| event.pid != 2).collect();
        let found = stations(&WRITE, &without, who);
        assert!(found.iter().all(|(_, times)| times.is_empty()));
        assert!(road("randwrite-4k-qd1").is_some() && road("randwrite-4k-qd32").is_none());
    }

    #[test]
    fn what_perf_prints_is_read_and_calls_that_got_nothing_are_left_out() {
        let text = "27724 30692.346508842:   syscalls:sys_exit_read: 0x1000\n\
                    27724 30692.346511183: syscalls:sys_enter_write: fd: 0x00000001, buf: 0x55da, count: 0x1000\n\
                    27724 30692.346512130:  syscalls:sys_exit_recvfrom: 0xfffffffffffffff5\n\
                    27724 30692.346513208:   syscalls:sys_exit_read: 0x0\n nonsense\n";
        let at = |nanoseconds| Duration::new(30692, nanoseconds);
        let event =
            |name: &str, nanoseconds| Event { pid: 27724, at: at(nanoseconds), name: name.to_owned() };
        assert_eq!(parse(text), [event("sys_exit_read", 346_508_842), event("sys_enter_write", 346_511_183)]);
    }
}
