//! Ports of a dev cluster: chosen once, outside the range the kernel hands out by itself, and who holds one that
//! is taken.

use std::collections::HashSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::failure::Failure;

/// Below Linux's ephemeral range (32768 up): a port kept in a file must not be given to some outgoing connection
/// the next day. 12,768 ports, so that clusters started at the same moment rarely meet.
const RANGE: std::ops::Range<u16> = 20_000..32_768;
/// Where every tool looks for a control plane when nobody says otherwise.
pub const MDS_PORT: u16 = 7700;

/// How long a process that was killed is waited for. It takes as long as the kernel needs to give its memory back.
const ENDING_MAX: Duration = Duration::from_secs(5);
const ENDING_POLL: Duration = Duration::from_millis(50);

pub fn is_free(port: u16) -> bool {
    TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).is_ok()
}

/// Free ports, different from each other. `seed` spreads clusters that start at the same moment.
pub fn choose<const N: usize>(seed: u64) -> Result<[u16; N], Failure> {
    let span = u64::from(RANGE.end - RANGE.start);
    let first = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    let mut found = (0..span)
        .map(|step| u16::try_from(u64::from(RANGE.start) + (first + step) % span).unwrap_or(RANGE.start))
        .filter(|port| is_free(*port));
    let mut ports = [0; N];
    for port in &mut ports {
        *port = found.next().ok_or_else(|| Failure::Dev {
            what: format!("no free port between {} and {}", RANGE.start, RANGE.end),
            next: "free some".to_owned(),
        })?;
    }
    Ok(ports)
}

/// Refuses with the name of whoever listens there; `instead` is the other way out. A process of this cluster, with its
/// data under `data`, or one that cannot be seen, may be ending just now: its `evolute dev` was killed.
pub async fn expect_free(port: u16, wanted_by: &str, instead: &str, data: &Path) -> Result<(), Failure> {
    let deadline = Instant::now() + ENDING_MAX;
    let held_by = loop {
        if is_free(port) {
            return Ok(());
        }
        let held_by = holder(port);
        let may_end = held_by.as_ref().is_none_or(|(_, command)| command.contains(&*data.to_string_lossy()));
        if !may_end || Instant::now() >= deadline {
            break held_by;
        }
        sleep(ENDING_POLL).await;
    };
    let holder = match held_by {
        Some((pid, name)) => format!("process {pid} ({name})"),
        None => "another process (of another user, or ending just now)".to_owned(),
    };
    Err(Failure::Dev {
        what: format!("port {port}, meant for the {wanted_by} of this cluster, is taken by {holder}"),
        next: format!("stop that process, or {instead}"),
    })
}

/// Who listens on a port, as far as /proc lets us see.
fn holder(port: u16) -> Option<(u32, String)> {
    let inodes: HashSet<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| listening_inodes(&table, port))
        .collect();
    if inodes.is_empty() {
        return None;
    }
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if holds(&process.path(), &inodes) {
            let command = fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
            let mut words: Vec<&str> = command.split('\0').filter(|word| !word.is_empty()).collect();
            words.truncate(4);
            return Some((pid, words.join(" ")));
        }
    }
    None
}

fn listening_inodes(table: &str, port: u16) -> Vec<String> {
    const LISTEN: &str = "0A";
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (_, hex) = fields.get(1)?.rsplit_once(':')?;
            let wanted = u16::from_str_radix(hex, 16).ok()? == port && *fields.get(3)? == LISTEN;
            wanted.then(|| format!("socket:[{}]", fields.get(9).unwrap_or(&"")))
        })
        .collect()
}

fn holds(process: &Path, inodes: &HashSet<String>) -> bool {
    let Ok(files) = fs::read_dir(process.join("fd")) else { return false };
    files
        .flatten()
        .filter_map(|file| fs::read_link(file.path()).ok())
        .any(|target| target.to_str().is_some_and(|target| inodes.contains(target)))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::path::Path;

    use super::{choose, expect_free, is_free};

    #[test]
    fn chosen_ports_are_free_and_different() {
        for seed in 0..50 {
            let [a, b, c] = choose::<3>(seed).expect("ports");
            assert!(a != b && b != c && a != c);
            assert!([a, b, c].iter().all(|port| (20_000..32_768).contains(port)));
        }
    }

    #[tokio::test]
    async fn a_taken_port_names_its_holder() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = listener.local_addr().expect("address").port();
        assert!(!is_free(port));
        let refused = expect_free(port, "control plane", "think again", Path::new("/nobody's")).await;
        let refused = refused.expect_err("taken").to_string();
        let me = std::process::id().to_string();
        assert!(refused.contains(&port.to_string()) && refused.contains(&me), "{refused}");
    }

    /// The `evolute dev` before this one was killed, and its processes are about to follow it.
    #[tokio::test]
    async fn a_port_of_a_process_that_is_ending_is_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = listener.local_addr().expect("address").port();
        let mine = std::env::args().next().expect("this test's program");
        let ending = async {
            tokio::task::yield_now().await;
            drop(listener);
        };
        let (free, ()) = tokio::join!(expect_free(port, "control plane", "wait", Path::new(&mine)), ending);
        free.expect("free by now");
    }
}
