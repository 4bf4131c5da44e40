//! Names of things: each a type of its own, so that two bare numbers never stand side by side.

use std::fmt;
use std::str::FromStr;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($raw:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $raw);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

number_id!(
    /// A guest's disk. Given by the control plane, never used again after the volume is deleted.
    VolumeId(u64), "volume-"
);
number_id!(
    /// A Raft group and its members. Given by the control plane, never reused.
    CopysetId(u32), "copyset-"
);
number_id!(
    /// A chunkserver process and its disk. Given by the control plane at the first registration.
    ChunkserverId(u32), "chunkserver-"
);
number_id!(
    /// One member's place in one copyset. Fresh for every membership, never the chunkserver's id:
    /// a replica that left and comes back must not be taken for its former self.
    ReplicaId(u64), "replica-"
);
number_id!(
    /// Which GiB of a volume.
    SegmentIndex(u32), "segment-"
);
number_id!(
    /// Which 16 MiB of a volume.
    ChunkIndex(u32), "chunk-"
);
number_id!(
    /// Which 4 KiB of a chunk.
    BlockIndex(u16), "block-"
);

/// A chunk of a volume: the key under which replicas store it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkKey {
    pub volume: VolumeId,
    pub index: ChunkIndex,
}

impl fmt::Display for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.volume, self.index)
    }
}

/// Which cluster a process, a data directory or a connection belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ClusterId(pub [u8; 16]);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// The text is not 32 hexadecimal digits.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a cluster id is 32 hexadecimal digits")]
pub struct NotAClusterId;

impl FromStr for ClusterId {
    type Err = NotAClusterId;

    fn from_str(text: &str) -> Result<Self, NotAClusterId> {
        if text.len() != 32 || !text.is_ascii() {
            return Err(NotAClusterId);
        }
        let mut id = [0; 16];
        for (i, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| NotAClusterId)?;
        }
        Ok(Self(id))
    }
}

#[cfg(test)]
mod tests {
    use super::ClusterId;

    #[test]
    fn a_cluster_id_survives_its_text() {
        let id = ClusterId([7, 0, 255, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("xyz".parse::<ClusterId>().is_err());
        assert!("ä".repeat(16).parse::<ClusterId>().is_err());
    }
}
