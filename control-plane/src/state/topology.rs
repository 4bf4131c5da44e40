//! Who there is: pools, zones, servers, chunkservers.
//!
//! A pool is chunkservers that share copysets; a zone is what may fail at once; a server is a machine in a zone.
//! Zones and servers are names that chunkservers carry, pools too: there is nothing else to keep about them yet.

use bytes::Bytes;
use evolute_protocol::id::{ChunkserverId, ClusterId};

use super::command::{
    ChunkserverStarted, DecideChunkserver, Decided, InitCluster, RegisterChunkserver, RetireChunkserver,
    Started, UpdateChunkserver,
};
use super::outcome::{Done, Outcome, Why, refuse};
use super::{Changes, Key, State};

/// The one pool of this version. Chunkservers name none yet.
pub const DEFAULT_POOL: &str = "default";
/// 256 bits: not guessed, not met twice.
pub const TOKEN_BYTES: usize = 32;
/// Names that operators choose: they stand in status lines and messages.
pub const PLACE_NAME_BYTES_MAX: usize = 64;
/// A host name is at most 253 bytes, a port 5.
pub const ADDRESS_BYTES_MAX: usize = 260;

/// A chunkserver as the cluster knows it, whether it runs or not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chunkserver {
    pub address: String,
    pub zone: String,
    pub server: String,
    pub pool: String,
    pub capacity_bytes: u64,
    /// What proves that a process is this chunkserver.
    pub token: Bytes,
    pub version: String,
    /// The process that registered first; see [`RegisterChunkserver::instance`].
    pub registered_by: Bytes,
    pub registered_unix_ms: u64,
    /// Nothing new is placed there, and what is there moves away.
    pub retiring: bool,
    /// The newest start that is known: a directory that lacks it was put back to an older copy.
    pub started: Option<Started>,
    /// An operator takes the directory that it has now for the right one. Until it took note.
    pub accepted: bool,
    /// An operator knows that it does not come back. Until it does.
    pub dead: bool,
}

/// Why a chunkserver stays in its zone, and the way out.
pub fn cannot_move(id: ChunkserverId, known: &Chunkserver, zone: &str) -> String {
    format!(
        "{id} is in zone {}, and its copysets were placed by that: start it with --zone {0}; to move it to zone {zone}, \
         empty it first (evolute chunkserver retire {} --wait)",
        known.zone, id.0
    )
}

/// Zone and server names: what an operator types, and a status line shows.
pub fn check_place_name(what: &str, name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > PLACE_NAME_BYTES_MAX || !name.chars().all(plain) {
        return Err(format!(
            "a {what} name has 1 to {PLACE_NAME_BYTES_MAX} of A-Z a-z 0-9 . _ -, not {name:?}"
        ));
    }
    Ok(())
}

/// `host:port`, something another machine can connect to.
pub fn check_address(address: &str) -> Result<(), String> {
    let fail =
        |why: &str| Err(format!("the address {address:?} {why}; it has to be host:port of the data port"));
    if address.len() > ADDRESS_BYTES_MAX || !address.is_ascii() || address.contains(char::is_whitespace) {
        return fail("is not one");
    }
    let Some((host, port)) = address.rsplit_once(':') else { return fail("has no port") };
    if host.is_empty() {
        return fail("has no host");
    }
    if !matches!(port.parse::<u16>(), Ok(1..)) {
        return fail("has no valid port");
    }
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    if ip.is_ok_and(|ip| ip.is_unspecified()) {
        return fail("stands for every interface");
    }
    Ok(())
}

impl State {
    pub(super) fn init_cluster(&mut self, command: &InitCluster, changes: &mut Changes) -> Outcome {
        let Ok(asked) = <[u8; 16]>::try_from(&command.cluster[..]) else {
            return refuse(Why::Invalid, "a cluster id has 16 bytes");
        };
        let cluster = *self.cluster.get_or_insert_with(|| {
            changes.push(Key::Cluster);
            ClusterId(asked)
        });
        Ok(Done::Cluster(cluster))
    }

    pub(super) fn register_chunkserver(
        &mut self,
        command: &RegisterChunkserver,
        changes: &mut Changes,
    ) -> Outcome {
        if command.token.len() != TOKEN_BYTES {
            return refuse(Why::Invalid, format!("a token has {TOKEN_BYTES} bytes"));
        }
        let shape = check_address(&command.address)
            .and_then(|()| check_place_name("zone", &command.zone))
            .and_then(|()| check_place_name("server", &command.server))
            .and_then(|()| check_place_name("pool", &command.pool));
        if let Err(message) = shape {
            return refuse(Why::Invalid, message);
        }
        let again =
            |known: &&Chunkserver| !command.instance.is_empty() && known.registered_by == command.instance;
        if let Some((id, known)) = self.chunkservers.iter().find(|(_, known)| again(known)) {
            return Ok(Done::Registered { chunkserver: *id, token: known.token.clone() });
        }
        let Some(next) = self.given.chunkserver.checked_add(1) else {
            return refuse(Why::Invalid, "no chunkserver id is left");
        };
        self.given.chunkserver = next;
        let id = ChunkserverId(next);
        self.chunkservers.insert(
            id,
            Chunkserver {
                address: command.address.clone(),
                zone: command.zone.clone(),
                server: command.server.clone(),
                pool: command.pool.clone(),
                capacity_bytes: command.capacity_bytes,
                token: command.token.clone(),
                version: command.version.clone(),
                registered_by: command.instance.clone(),
                registered_unix_ms: command.at_unix_ms,
                retiring: false,
                started: None,
                accepted: false,
                dead: false,
            },
        );
        changes.extend([Key::Cluster, Key::Chunkserver(id)]);
        Ok(Done::Registered { chunkserver: id, token: command.token.clone() })
    }

    /// Is it a member of any copyset, or about to be one?
    pub fn holds_replicas(&self, id: ChunkserverId) -> bool {
        self.copysets.values().any(|copyset| copyset.everyone().any(|replica| replica.chunkserver == id))
    }

    pub(super) fn retire_chunkserver(
        &mut self,
        command: &RetireChunkserver,
        changes: &mut Changes,
    ) -> Outcome {
        let id = ChunkserverId(command.chunkserver);
        let Some(chunkserver) = self.chunkservers.get_mut(&id) else {
            return refuse(Why::NotFound, format!("there is no {id}"));
        };
        if chunkserver.retiring != command.retiring {
            chunkserver.retiring = command.retiring;
            changes.push(Key::Chunkserver(id));
        }
        Ok(Done::Plain)
    }

    pub(super) fn chunkserver_started(
        &mut self,
        command: &ChunkserverStarted,
        changes: &mut Changes,
    ) -> Outcome {
        let id = ChunkserverId(command.chunkserver);
        let Some(chunkserver) = self.chunkservers.get_mut(&id) else {
            return refuse(Why::NotFound, format!("there is no {id}"));
        };
        if command.start.is_some() {
            chunkserver.started.clone_from(&command.start);
        }
        chunkserver.dead = false;
        chunkserver.accepted &= !command.accepted;
        changes.push(Key::Chunkserver(id));
        Ok(Done::Plain)
    }

    pub(super) fn decide_chunkserver(
        &mut self,
        command: DecideChunkserver,
        changes: &mut Changes,
    ) -> Outcome {
        let id = ChunkserverId(command.chunkserver);
        let Some(chunkserver) = self.chunkservers.get_mut(&id) else {
            return refuse(Why::NotFound, format!("there is no {id}"));
        };
        match Decided::try_from(command.decided) {
            Ok(Decided::Accepted) => chunkserver.accepted = true,
            Ok(Decided::Dead) => chunkserver.dead = true,
            Ok(Decided::Removed) => {
                let holds = |copyset: &super::Copyset| copyset.everyone().any(|it| it.chunkserver == id);
                let held = self.copysets.values().filter(|copyset| holds(copyset)).count();
                if held > 0 {
                    return refuse(
                        Why::Invalid,
                        format!(
                            "{id} has replicas of {held} copysets: first they have to be elsewhere \
                             (`evolute chunkserver retire {0}`, or `declare-dead {0}` if it does not come back)",
                            id.0
                        ),
                    );
                }
                self.chunkservers.remove(&id);
            }
            Err(_) => return refuse(Why::Invalid, "a decision of a newer version"),
        }
        changes.push(Key::Chunkserver(id));
        Ok(Done::Plain)
    }

    /// The zone changes only while no copyset was placed by it.
    pub(super) fn update_chunkserver(
        &mut self,
        command: &UpdateChunkserver,
        changes: &mut Changes,
    ) -> Outcome {
        let shape =
            check_address(&command.address).and_then(|()| check_place_name("server", &command.server));
        if let Err(message) = shape {
            return refuse(Why::Invalid, message);
        }
        let id = ChunkserverId(command.chunkserver);
        let Some(known) = self.chunkservers.get(&id) else {
            return refuse(Why::NotFound, format!("there is no {id}"));
        };
        let moves = !command.zone.is_empty() && command.zone != known.zone;
        if moves {
            if let Err(message) = check_place_name("zone", &command.zone) {
                return refuse(Why::Invalid, message);
            }
            if self.holds_replicas(id) {
                return refuse(Why::Invalid, cannot_move(id, known, &command.zone));
            }
        }
        let chunkserver = self.chunkservers.get_mut(&id).expect("found above");
        if moves {
            chunkserver.zone = command.zone.clone();
        }
        chunkserver.address = command.address.clone();
        chunkserver.server = command.server.clone();
        chunkserver.capacity_bytes = command.capacity_bytes;
        chunkserver.version = command.version.clone();
        changes.push(Key::Chunkserver(id));
        Ok(Done::Plain)
    }
}

#[cfg(test)]
mod tests {
    use super::{check_address, check_place_name};

    #[test]
    fn an_address_is_something_to_connect_to() {
        for good in ["127.0.0.1:7801", "cs-1.rack4.example:1", "[::1]:65535", "localhost:7801"] {
            assert_eq!(check_address(good), Ok(()), "{good}");
        }
        let long = format!("{}:1", "a".repeat(300));
        for bad in [
            "",
            ":",
            ":80",
            "host",
            "host:",
            "host:0",
            "host:65536",
            "host:-1",
            "host:x",
            "0.0.0.0:7801",
            "[::]:7801",
            "a b:1",
            "hö:1",
            "host:80\n",
            long.as_str(),
        ] {
            assert!(check_address(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_place_name_can_stand_in_a_status_line() {
        for good in ["z1", "rack-4.row_2", &"x".repeat(64)] {
            assert_eq!(check_place_name("zone", good), Ok(()));
        }
        for bad in ["", "a b", "z\n", "zürich", "a/b", &"x".repeat(65)] {
            assert!(check_place_name("zone", bad).is_err(), "{bad:?}");
        }
    }
}
