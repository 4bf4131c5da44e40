//! The highest numbers that anybody can mean, asked where one is read from the wire: a frame with a higher one is no
//! message, and ends its connection.
//!
//! Far above everything real, and so far below the end of its type that whoever counts on from one need not look.

use crate::epoch::Epoch;
use crate::geometry::{CHUNK_BYTES, VOLUME_BYTES_MAX};

/// Of a copyset's log: a million entries a second take two thousand years.
pub const INDEX_MAX: u64 = 1 << 56;
/// Of its elections: two a second take a thousand million years.
pub const TERM_MAX: u64 = 1 << 56;
/// Changes of one lane, from 1: ten million a second take two hundred years.
pub const SEQUENCE_MAX: u64 = 1 << 56;
/// Volumes, given one by one.
pub const VOLUME_MAX: u64 = 1 << 48;
/// Chunks of the largest volume.
#[expect(clippy::cast_possible_truncation, reason = "4 Mi")]
pub const CHUNKS_MAX: u32 = (VOLUME_BYTES_MAX / CHUNK_BYTES) as u32;
/// Times a volume is attached: sixty-eight years of once a second. What lies above is kept for the fence of a deleted one.
pub const ATTACHMENT_MAX: u32 = 1 << 31;
/// Times a backend comes back with one attachment; after that it attaches anew.
pub const INCARNATION_MAX: u32 = 1 << 31;
/// A chunkserver that knows of a volume believes a fence whose attachment is so far above the last one. Every attachment
/// fences every copyset of its volume, so one in between is missed only by a writer that came and went unheard.
pub const ATTACHMENTS_MISSED: u32 = 1 << 20;
/// One that does not know the volume, because the volume has just grown there, believes as many as once a minute since
/// thirty years make.
pub const ATTACHMENTS_UNHEARD: u32 = 1 << 24;
/// The same of incarnations. A backend that dies again and again does so once a second at most.
pub const INCARNATIONS_MISSED: u32 = 1 << 24;

const _: () = {
    assert!(VOLUME_BYTES_MAX.is_multiple_of(CHUNK_BYTES));
    assert!(ATTACHMENT_MAX < Epoch::DELETED.attachment);
};

impl Epoch {
    /// Whether a writer can hold it. [`Self::DELETED`] is nobody's to send: only a log entry raises a volume to it.
    pub const fn is_a_writers(self) -> bool {
        self.attachment <= ATTACHMENT_MAX && self.incarnation <= INCARNATION_MAX
    }

    /// Whether a writer may come with it where `known` is the newest that was fenced in, if any was. Older ones are judged
    /// elsewhere.
    pub const fn may_follow(self, known: Option<Self>) -> bool {
        let Some(known) = known else {
            return self.attachment <= ATTACHMENTS_UNHEARD && self.incarnation <= INCARNATIONS_MISSED;
        };
        let incarnations = if self.attachment == known.attachment { known.incarnation } else { 0 };
        self.attachment <= known.attachment.saturating_add(ATTACHMENTS_MISSED)
            && self.incarnation <= incarnations.saturating_add(INCARNATIONS_MISSED)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        ATTACHMENT_MAX, ATTACHMENTS_MISSED, ATTACHMENTS_UNHEARD, INCARNATION_MAX, INCARNATIONS_MISSED,
    };
    use crate::epoch::Epoch;

    fn epoch(attachment: u32, incarnation: u32) -> Epoch {
        Epoch { attachment, incarnation }
    }

    #[test]
    fn a_writer_s_epoch_ends_before_the_one_of_a_deleted_volume() {
        assert!(epoch(ATTACHMENT_MAX, INCARNATION_MAX).is_a_writers() && epoch(0, 0).is_a_writers());
        for beyond in [epoch(ATTACHMENT_MAX + 1, 0), epoch(1, INCARNATION_MAX + 1), Epoch::DELETED] {
            assert!(!beyond.is_a_writers(), "{beyond}");
        }
    }

    #[test]
    fn an_epoch_follows_what_is_known_by_no_more_than_can_have_been_missed() {
        let known = Some(epoch(7, 3));
        for (next, good) in [
            (epoch(7, 4), true),
            (epoch(7, 3 + INCARNATIONS_MISSED), true),
            (epoch(7, 4 + INCARNATIONS_MISSED), false),
            (epoch(8, 0), true),
            (epoch(8, INCARNATIONS_MISSED + 1), false),
            (epoch(7 + ATTACHMENTS_MISSED, 0), true),
            (epoch(8 + ATTACHMENTS_MISSED, 0), false),
            (epoch(1 << 31, 0), false),
        ] {
            assert_eq!(next.may_follow(known), good, "{next}");
        }
        assert!(epoch(ATTACHMENTS_UNHEARD, 9).may_follow(None));
        assert!(!epoch(ATTACHMENTS_UNHEARD + 1, 0).may_follow(None));
    }
}
