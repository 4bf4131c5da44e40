//! Who may write a volume, and the order between writers.

use std::fmt;

/// A volume's fencing number. It rises when the writer changes; nothing of a lower epoch is applied
/// after a higher one was fenced in.
///
/// The attachment is raised by the control plane (another host, or a forced attach); the incarnation by a
/// backend that restarts with the attachment it already holds. Ordered by attachment, then incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch {
    pub attachment: u32,
    pub incarnation: u32,
}

impl Epoch {
    /// Above every epoch a writer can hold: the fence of a deleted volume.
    pub const DELETED: Self = Self { attachment: u32::MAX, incarnation: u32::MAX };

    pub const fn to_u64(self) -> u64 {
        (self.attachment as u64) << 32 | self.incarnation as u64
    }

    #[expect(clippy::cast_possible_truncation, reason = "the two halves of a u64")]
    pub const fn from_u64(raw: u64) -> Self {
        Self { attachment: (raw >> 32) as u32, incarnation: raw as u32 }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.attachment, self.incarnation)
    }
}

#[cfg(test)]
mod tests {
    use super::Epoch;

    #[test]
    fn an_attachment_outweighs_any_incarnation() {
        let old = Epoch { attachment: 1, incarnation: u32::MAX };
        let new = Epoch { attachment: 2, incarnation: 0 };
        assert!(old < new && old.to_u64() < new.to_u64() && new < Epoch::DELETED);
        assert_eq!(Epoch::from_u64(new.to_u64()), new);
    }
}
