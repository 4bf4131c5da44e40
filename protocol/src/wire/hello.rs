//! The first bytes of a connection: who calls whom, and in which cluster. 64 bytes each way.

use crate::checksum::crc32c;
use crate::id::{ChunkserverId, ClusterId};

const MAGIC: [u8; 8] = *b"EVOLUTE\n";
/// Bytes of a [`Hello`] and of a [`HelloReply`].
pub const HELLO_BYTES: usize = 64;
const CRC_AT: usize = HELLO_BYTES - 4;

/// The wire's versions, newest first, one sentence each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum Version {
    /// The first one.
    V1 = 1,
}

/// What the caller is, and so what follows on the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A volume's client: requests and replies of this crate follow.
    Client,
    /// A chunkserver of the same cluster: Raft's messages follow.
    Peer { chunkserver: ChunkserverId },
}

/// What the caller says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    pub version: u16,
    pub role: Role,
    pub cluster: ClusterId,
    /// Whom the caller believes to have reached: an address may have passed to another chunkserver.
    pub to: ChunkserverId,
}

/// Why a connection is not welcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unwelcome {
    #[error("it speaks another version of the wire")]
    Version,
    #[error("it belongs to another cluster")]
    Cluster,
    #[error("it is another chunkserver than the one called")]
    NotMe,
}

/// The answer to a [`Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HelloReply {
    pub version: u16,
    pub welcome: Result<(), Unwelcome>,
}

/// The first bytes of a connection were not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the other side does not speak Evolute's protocol")]
pub struct NotOurs;

impl Hello {
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.version.to_le_bytes());
        let (role, from) = match self.role {
            Role::Client => (0, 0),
            Role::Peer { chunkserver } => (1, chunkserver.0),
        };
        bytes[10] = role;
        bytes[16..32].copy_from_slice(&self.cluster.0);
        bytes[32..36].copy_from_slice(&from.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.to.0.to_le_bytes());
        seal(bytes)
    }

    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, NotOurs> {
        check(bytes)?;
        let from = ChunkserverId(u32_at(bytes, 32));
        let role = match bytes[10] {
            0 => Role::Client,
            1 => Role::Peer { chunkserver: from },
            _ => return Err(NotOurs),
        };
        let mut cluster = ClusterId::default();
        cluster.0.copy_from_slice(&bytes[16..32]);
        let to = ChunkserverId(u32_at(bytes, 36));
        Ok(Self { version: u16::from_le_bytes([bytes[8], bytes[9]]), role, cluster, to })
    }

    /// What `me` answers to this.
    pub fn judge(&self, cluster: ClusterId, me: ChunkserverId) -> Result<(), Unwelcome> {
        if self.version != Version::V1 as u16 {
            Err(Unwelcome::Version)
        } else if self.cluster != cluster {
            Err(Unwelcome::Cluster)
        } else if self.to != me {
            Err(Unwelcome::NotMe)
        } else {
            Ok(())
        }
    }
}

impl HelloReply {
    pub fn new(welcome: Result<(), Unwelcome>) -> Self {
        Self { version: Version::V1 as u16, welcome }
    }

    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.version.to_le_bytes());
        bytes[10] = match self.welcome {
            Ok(()) => 0,
            Err(Unwelcome::Version) => 1,
            Err(Unwelcome::Cluster) => 2,
            Err(Unwelcome::NotMe) => 3,
        };
        seal(bytes)
    }

    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, NotOurs> {
        check(bytes)?;
        let welcome = match bytes[10] {
            0 => Ok(()),
            1 => Err(Unwelcome::Version),
            2 => Err(Unwelcome::Cluster),
            3 => Err(Unwelcome::NotMe),
            _ => return Err(NotOurs),
        };
        Ok(Self { version: u16::from_le_bytes([bytes[8], bytes[9]]), welcome })
    }
}

fn seal(mut bytes: [u8; HELLO_BYTES]) -> [u8; HELLO_BYTES] {
    let crc = crc32c(&bytes[..CRC_AT]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn check(bytes: &[u8; HELLO_BYTES]) -> Result<(), NotOurs> {
    if bytes[..8] != MAGIC || u32_at(bytes, CRC_AT) != crc32c(&bytes[..CRC_AT]) {
        Err(NotOurs)
    } else {
        Ok(())
    }
}

fn u32_at(bytes: &[u8; HELLO_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::{Hello, HelloReply, NotOurs, Role, Unwelcome};
    use crate::id::{ChunkserverId, ClusterId};

    #[test]
    fn both_sides_survive_their_bytes() {
        let cluster = ClusterId([9; 16]);
        for role in [Role::Client, Role::Peer { chunkserver: ChunkserverId(4) }] {
            let hello = Hello { version: 1, role, cluster, to: ChunkserverId(2) };
            assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
            assert_eq!(hello.judge(cluster, ChunkserverId(2)), Ok(()));
            assert_eq!(hello.judge(cluster, ChunkserverId(3)), Err(Unwelcome::NotMe));
            assert_eq!(hello.judge(ClusterId([1; 16]), ChunkserverId(2)), Err(Unwelcome::Cluster));
        }
        for welcome in [Ok(()), Err(Unwelcome::Version), Err(Unwelcome::Cluster), Err(Unwelcome::NotMe)] {
            let reply = HelloReply::new(welcome);
            assert_eq!(HelloReply::decode(&reply.encode()), Ok(reply));
        }
    }

    #[test]
    fn garbage_is_not_ours() {
        assert_eq!(Hello::decode(&[b'G'; 64]), Err(NotOurs));
        let mut bytes = HelloReply::new(Ok(())).encode();
        bytes[20] ^= 1;
        assert_eq!(HelloReply::decode(&bytes), Err(NotOurs));
    }
}
