//! What can happen, by name.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    KillLeader,
    KillFollower,
    KillChunkservers,
    KillMds,
    KillBackend,
    KillEverything,
    StopLeader,
    StopFollower,
    StopMds,
    StopBackend,
    RestartChunkserver,
    RestartMds,
    RestartBackend,
    CutLeader,
    CutOneWay,
    CutBridge,
    IsolateLeader,
    CutClient,
    PowerOne,
    PowerAll,
    SlowDisk,
    StuckDisk,
    FailingSync,
    FullDisk,
    ZombieBackend,
    DelayRequests,
    DuplicateRequests,
    AllAddressesMoved,
    RollbackChunkserver,
    RollbackMds,
    WrongMds,
    LogReaderStopped,
    DescriptorsGone,
}

/// Name, group, what it does. The order is the order of reports.
const ALL: [(Fault, &str, &str, &str); 33] = [
    (Fault::KillLeader, "kill-leader", "kills", "kill -9 of the chunkserver that leads most copysets"),
    (Fault::KillFollower, "kill-follower", "kills", "kill -9 of the one that leads fewest"),
    (Fault::KillChunkservers, "kill-chunkservers", "kills", "kill -9 of all chunkservers at one moment"),
    (Fault::KillMds, "kill-mds", "kills", "kill -9 of the control plane"),
    (Fault::KillBackend, "kill-backend", "kills", "kill -9 of the backend, requests under way"),
    (Fault::KillEverything, "kill-everything", "kills", "kill -9 of all of them at one moment"),
    (Fault::StopLeader, "stop-leader", "stops", "SIGSTOP of the leader, 0.1 to 10 s"),
    (Fault::StopFollower, "stop-follower", "stops", "SIGSTOP of a follower, 0.1 to 10 s"),
    (Fault::StopMds, "stop-mds", "stops", "SIGSTOP of the control plane, 0.1 to 10 s"),
    (Fault::StopBackend, "stop-backend", "stops", "SIGSTOP of the backend, 0.1 to 10 s"),
    (Fault::RestartChunkserver, "restart-chunkserver", "restarts", "SIGTERM, clean end, start"),
    (Fault::RestartMds, "restart-mds", "restarts", "the same for the control plane"),
    (Fault::RestartBackend, "restart-backend", "restarts", "the same for the backend, requests under way"),
    (
        Fault::CutLeader,
        "cut-leader",
        "partitions",
        "the leader's cable is pulled: nobody hears it, it hears nobody",
    ),
    (
        Fault::CutOneWay,
        "cut-one-way",
        "partitions",
        "a chunkserver hears everybody and nobody hears it, or the reverse",
    ),
    (
        Fault::CutBridge,
        "cut-bridge",
        "partitions",
        "two chunkservers do not hear each other; the third hears both",
    ),
    (
        Fault::IsolateLeader,
        "isolate-leader",
        "partitions",
        "the leader hears only the backend and the control plane",
    ),
    (Fault::CutClient, "cut-client", "partitions", "the backend and the leader do not hear each other"),
    (Fault::PowerOne, "power-one", "power", "power cut of one chunkserver: unsynced sectors lost or torn"),
    (Fault::PowerAll, "power-all", "power", "power cut of all chunkservers at one moment"),
    (Fault::SlowDisk, "slow-disk", "disks", "a chunkserver's disk does 20 operations a second"),
    (
        Fault::StuckDisk,
        "stuck-disk",
        "disks",
        "a chunkserver's disk answers nothing for a while: no error, no end",
    ),
    (
        Fault::FailingSync,
        "failing-sync",
        "disks",
        "a chunkserver's disk fails flushes; then the process is started again",
    ),
    (Fault::FullDisk, "full-disk", "disks", "a chunkserver's file system has no room"),
    (
        Fault::ZombieBackend,
        "zombie-backend",
        "stale",
        "the backend hangs, another takes the volume and the load goes there; then the first wakes up",
    ),
    (
        Fault::DelayRequests,
        "delay-requests",
        "stale",
        "some requests of the backend are held for 0.1 to 5 s, each with what comes behind it on its connection",
    ),
    (
        Fault::DuplicateRequests,
        "duplicate-requests",
        "stale",
        "changes of the backend arrive again, after newer ones of the same sectors were acknowledged",
    ),
    (
        Fault::AllAddressesMoved,
        "all-addresses-moved",
        "moves",
        "kill -9 of all chunkservers at one moment; each comes back at another address",
    ),
    (
        Fault::RollbackChunkserver,
        "rollback-chunkserver",
        "operators",
        "a chunkserver's directory is put back to an older copy while only one other has what was acknowledged since",
    ),
    (
        Fault::RollbackMds,
        "rollback-mds",
        "operators",
        "the control plane's directory is put back to an older copy, and an operator accepts it",
    ),
    (
        Fault::WrongMds,
        "wrong-mds",
        "operators",
        "the control plane of another cluster serves at the address of the right one for 3 to 6 s",
    ),
    (
        Fault::LogReaderStopped,
        "log-reader-stopped",
        "starved",
        "a program, each in its turn, is started with a full pipe as stderr that nobody reads for 4 to 8 s",
    ),
    (
        Fault::DescriptorsGone,
        "descriptors-gone",
        "starved",
        "a program, each in its turn, may open at most two more files for 5 to 10 s",
    ),
];

impl Fault {
    pub fn name(self) -> &'static str {
        self.row().1
    }

    fn row(self) -> &'static (Fault, &'static str, &'static str, &'static str) {
        ALL.iter().find(|row| row.0 == self).expect("the table has all of them")
    }

    pub fn needs_networks(self) -> bool {
        self.row().2 == "partitions"
    }

    pub fn needs_images(self) -> bool {
        matches!(self.row().2, "power" | "disks")
    }

    pub fn needs_proxy(self) -> bool {
        matches!(self, Fault::DelayRequests | Fault::DuplicateRequests)
    }

    /// It begins with a program that is asked to stop.
    pub fn stops_well(self) -> bool {
        matches!(self.row().2, "restarts" | "operators") || self == Fault::LogReaderStopped
    }

    /// It hits one program after the other, and must have hit each.
    pub fn takes_turns(self) -> bool {
        self.row().2 == "starved"
    }

    /// Names, groups, `all`, separated by commas; a leading `-` takes away.
    pub fn parse_list(text: &str) -> Result<Vec<Fault>, String> {
        let mut chosen: Vec<Fault> = Vec::new();
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let (remove, word) = word.strip_prefix('-').map_or((false, word), |rest| (true, rest));
            let named: Vec<Fault> = ALL
                .iter()
                .filter(|(_, name, group, _)| word == "all" || word == *name || word == *group)
                .map(|row| row.0)
                .collect();
            if named.is_empty() {
                return Err(format!("{word:?} is no fault and no group; see --help"));
            }
            chosen.retain(|fault| !named.contains(fault));
            if !remove {
                chosen.extend(named);
            }
        }
        chosen.sort_unstable();
        Ok(chosen)
    }

    /// For `--help`.
    pub fn table() -> String {
        let mut lines = String::from("Faults and their groups:\n");
        for (_, name, group, words) in ALL {
            lines.push_str(&format!("  {name:<21} {group:<11} {words}\n"));
        }
        lines
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Fault {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Fault {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = String::deserialize(deserializer)?;
        let row = ALL.iter().find(|row| row.1 == word);
        row.map(|row| row.0)
            .ok_or_else(|| de::Error::custom(format!("{word:?} is no fault this program knows")))
    }
}

#[cfg(test)]
mod tests {
    use super::{ALL, Fault};

    #[test]
    fn a_list_names_faults_groups_and_exceptions() {
        assert_eq!(Fault::parse_list("all").map(|all| all.len()), Ok(ALL.len()));
        let kills = Fault::parse_list("kills,-kill-mds").expect("a list");
        assert_eq!(kills.len(), 5);
        assert!(!kills.contains(&Fault::KillMds));
        assert_eq!(Fault::parse_list("power-one, power-one"), Ok(vec![Fault::PowerOne]));
        assert!(Fault::parse_list("kill-leeder").expect_err("a slip").contains("kill-leeder"));
    }
}
