//! Volumes: their names, their place, and who may write them.
//!
//! What always holds:
//!
//! - An attachment number is given once, and only the newest counts. Whoever shows an older one gets no segment.
//! - A volume id is given once. A deleted volume's name is free at once; its id is dead for ever, so a writer that
//!   slept through the deletion finds nothing that it could damage.
//! - A deleted volume is remembered until each of its copysets has committed its end.

use std::collections::{BTreeMap, BTreeSet};

use evolute_daemon::utc;
use evolute_protocol::geometry::{CHUNKS_PER_SEGMENT, SEGMENT_BYTES, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};
use evolute_protocol::id::{CopysetId, SegmentIndex, VolumeId};

use super::command::{AllocateSegment, Attach, CreateVolume, DeleteVolume, Detach, VolumeDropped};
use super::import::Importing;
use super::outcome::{Done, Outcome, Refused, Why, refuse};
use super::reign::FORGOTTEN_HOLDER;
use super::{Changes, Key, State};

pub const NAME_BYTES_MAX: usize = 128;
/// A host name and a socket path (108 bytes on Linux) fit.
pub const HOLDER_BYTES_MAX: usize = 512;
/// Wider volumes pay a Raft round per copyset and gain nothing; a segment has only 64 chunks to spread.
pub const WIDTH_MAX: u32 = 64;
const _: () = assert!(WIDTH_MAX as u64 <= CHUNKS_PER_SEGMENT);
/// One below the fence of a deleted volume, which must stay above every writer.
pub use evolute_protocol::bounds::ATTACHMENT_MAX;

/// The copyset of each chunk of one segment: [`CHUNKS_PER_SEGMENT`] of them.
pub type SegmentMap = Box<[CopysetId]>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    pub name: String,
    pub size_bytes: u64,
    /// The copysets it spreads over, in the order in which chunks go round.
    pub copysets: Vec<CopysetId>,
    /// The number given at the latest attach; 0: never attached.
    pub attachment: u32,
    pub attached: Option<Attached>,
    /// An import that has not ended: the volume holds a part of its image at most.
    pub importing: Option<Importing>,
    pub created_unix_ms: u64,
    pub segments: BTreeMap<SegmentIndex, SegmentMap>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    pub holder: String,
    pub since_unix_ms: u64,
    /// SHA-256 of what only the holder knows; empty: an older program's, or one that was forgotten, which told nothing.
    pub secret_hash: Vec<u8>,
}

impl Attached {
    /// Whether who asks is the one who has it, or may have it unasked.
    fn yields_to(&self, command: &Attach) -> bool {
        let known = match self.secret_hash.is_empty() {
            true => self.holder == command.holder,
            false => [&command.secret_hash, &command.former_secret_hash].contains(&&self.secret_hash),
        };
        known || self.holder == FORGOTTEN_HOLDER || command.takeover
    }
}

impl Volume {
    pub fn segment_count(&self) -> u64 {
        self.size_bytes.div_ceil(SEGMENT_BYTES)
    }

    /// May the writer with this attachment number have space?
    pub fn check_attachment(&self, id: VolumeId, attachment: u32) -> Result<(), Refused> {
        let refused = |why, message| Err(Refused { why, message });
        if attachment == 0 || attachment > self.attachment {
            return refused(Why::Invalid, format!("attachment {attachment} of {id} was never given"));
        }
        if attachment < self.attachment {
            return refused(
                Why::FencedOut,
                format!("attachment {attachment} of {id} is over: {} was given since", self.attachment),
            );
        }
        if self.attached.is_none() {
            return refused(Why::FencedOut, format!("attachment {attachment} of {id} was given back"));
        }
        Ok(())
    }

    pub fn check_segment(&self, id: VolumeId, segment: SegmentIndex) -> Result<(), Refused> {
        if u64::from(segment.0) < self.segment_count() {
            return Ok(());
        }
        let message = format!("{id} has {} segments, there is no {segment}", self.segment_count());
        Err(Refused { why: Why::Invalid, message })
    }
}

/// 1–128 of `[A-Za-z0-9._-]`, beginning with a letter or digit.
pub fn check_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let begins = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if !begins || name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
        let shown: String = name.chars().take(NAME_BYTES_MAX + 1).collect();
        return Err(format!(
            "a volume name has 1 to {NAME_BYTES_MAX} of A-Z a-z 0-9 . _ - and begins with a letter or digit, not {shown:?}"
        ));
    }
    Ok(())
}

pub fn check_size(size_bytes: u64) -> Result<(), String> {
    if !(VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&size_bytes)
        || !size_bytes.is_multiple_of(VOLUME_BYTES_MIN)
    {
        return Err(format!("a volume has 1 MiB to 64 TiB in whole MiB, not {size_bytes} bytes"));
    }
    Ok(())
}

pub fn check_holder(holder: &str) -> Result<(), String> {
    if holder.is_empty() || holder.len() > HOLDER_BYTES_MAX || holder.chars().any(char::is_control) {
        return Err(format!(
            "a holder is named by 1 to {HOLDER_BYTES_MAX} bytes of text, not {} bytes",
            holder.len()
        ));
    }
    Ok(())
}

impl State {
    pub(super) fn create_volume(&mut self, command: &CreateVolume, changes: &mut Changes) -> Outcome {
        if let Err(message) = check_name(&command.name).and_then(|()| check_size(command.size_bytes)) {
            return refuse(Why::Invalid, message);
        }
        let copysets: Vec<_> = command.copysets.iter().copied().map(CopysetId).collect();
        let different: BTreeSet<_> = copysets.iter().collect();
        if copysets.is_empty() || copysets.len() > WIDTH_MAX as usize || different.len() != copysets.len() {
            return refuse(
                Why::Invalid,
                format!("a volume spreads over 1 to {WIDTH_MAX} different copysets"),
            );
        }
        if let Some(id) = copysets.iter().find(|id| !self.copysets.contains_key(id)) {
            return refuse(Why::NotFound, format!("there is no {id}"));
        }
        if let Some((_, there)) = self.volume_named(&command.name) {
            return refuse(Why::Exists, exists(there));
        }
        // 2^64 volumes are not reached by counting.
        self.given.volume += 1;
        let id = VolumeId(self.given.volume);
        self.names.insert(command.name.clone(), id);
        let volume = Volume {
            name: command.name.clone(),
            size_bytes: command.size_bytes,
            copysets,
            attachment: 0,
            attached: None,
            importing: None,
            created_unix_ms: command.at_unix_ms,
            segments: BTreeMap::new(),
        };
        self.volumes.insert(id, volume);
        changes.extend([Key::Cluster, Key::Volume(id)]);
        Ok(Done::Created { volume: id })
    }

    pub(super) fn delete_volume(&mut self, command: &DeleteVolume, changes: &mut Changes) -> Outcome {
        let Some((id, volume)) = self.volume_named(&command.name) else {
            return refuse(Why::NotFound, no_volume_named(&command.name));
        };
        if let Some(attached) = &volume.attached
            && !command.force
        {
            return refuse(Why::AttachedElsewhere, is_attached(&command.name, attached));
        }
        self.drop_volume(id, changes);
        Ok(Done::Plain)
    }

    pub(super) fn drop_volume(&mut self, id: VolumeId, changes: &mut Changes) {
        let volume = self.volumes.remove(&id).expect("its caller found it");
        self.names.remove(&volume.name);
        changes.extend(volume.segments.keys().map(|&segment| Key::Segment(id, segment)));
        // All of its copysets: a writer fences every one of them, with or without chunks there.
        self.dropping.insert(id, volume.copysets.into_iter().collect());
        changes.extend([Key::Volume(id), Key::Dropping(id)]);
    }

    pub(super) fn volume_dropped(&mut self, command: &VolumeDropped, changes: &mut Changes) -> Outcome {
        let id = VolumeId(command.volume);
        // Reports repeat themselves; what is not waited for changes nothing.
        let Some(waiting) = self.dropping.get_mut(&id) else { return Ok(Done::Plain) };
        if waiting.remove(&CopysetId(command.copyset)) {
            if waiting.is_empty() {
                self.dropping.remove(&id);
            }
            changes.push(Key::Dropping(id));
        }
        Ok(Done::Plain)
    }

    pub(super) fn attach(&mut self, command: &Attach, changes: &mut Changes) -> Outcome {
        if let Err(message) = check_holder(&command.holder) {
            return refuse(Why::Invalid, message);
        }
        let Some(&id) = self.names.get(&command.name) else {
            return refuse(Why::NotFound, no_volume_named(&command.name));
        };
        let volume = self.volumes.get_mut(&id).expect("a name points to a volume");
        if let Some(importing) = &volume.importing
            && importing.by != command.holder
        {
            // Not by takeover either: half an image must not boot.
            return refuse(Why::Invalid, importing.is_unfinished(&command.name));
        }
        if let Some(attached) = &volume.attached
            && !attached.yields_to(command)
        {
            return refuse(Why::AttachedElsewhere, is_attached(&command.name, attached));
        }
        // Above what a state that was put back has forgotten, whichever volume it was given for.
        let last = volume.attachment.max(self.attachment_floor);
        if last >= ATTACHMENT_MAX {
            return refuse(
                Why::Invalid,
                format!("volume {} has used up its attachment numbers", command.name),
            );
        }
        volume.attachment = last + 1;
        volume.attached = Some(Attached {
            holder: command.holder.clone(),
            since_unix_ms: command.at_unix_ms,
            secret_hash: command.secret_hash.clone(),
        });
        changes.push(Key::Volume(id));
        Ok(Done::Attached { volume: id, attachment: volume.attachment })
    }

    pub(super) fn detach(&mut self, command: &Detach, changes: &mut Changes) -> Outcome {
        let id = VolumeId(command.volume);
        let Some(volume) = self.volumes.get_mut(&id) else {
            return refuse(Why::NotFound, self.no_volume(id));
        };
        if command.attachment == 0 || command.attachment > volume.attachment {
            return refuse(
                Why::Invalid,
                format!("attachment {} of {id} was never given", command.attachment),
            );
        }
        // An older holder has nothing to give back; that is no error, somebody took the volume over meanwhile.
        if command.attachment == volume.attachment && volume.attached.take().is_some() {
            changes.push(Key::Volume(id));
        }
        Ok(Done::Plain)
    }

    pub(super) fn allocate_segment(&mut self, command: &AllocateSegment, changes: &mut Changes) -> Outcome {
        let (id, segment) = (VolumeId(command.volume), SegmentIndex(command.segment));
        let Some(volume) = self.volumes.get_mut(&id) else {
            return refuse(Why::NotFound, self.no_volume(id));
        };
        volume.check_attachment(id, command.attachment)?;
        volume.check_segment(id, segment)?;
        if let Some(map) = volume.segments.get(&segment) {
            return Ok(Done::Segment { chunk_copysets: map.to_vec() });
        }
        let map: SegmentMap = command.chunk_copysets.iter().copied().map(CopysetId).collect();
        if map.len() as u64 != CHUNKS_PER_SEGMENT || !map.iter().all(|id| volume.copysets.contains(id)) {
            return refuse(
                Why::Invalid,
                format!("a segment maps {CHUNKS_PER_SEGMENT} chunks to copysets of its volume"),
            );
        }
        let outcome = Done::Segment { chunk_copysets: map.to_vec() };
        volume.segments.insert(segment, map);
        changes.push(Key::Segment(id, segment));
        Ok(outcome)
    }

    pub(crate) fn no_volume(&self, id: VolumeId) -> String {
        let ever = id.0 != 0 && id.0 <= self.given.volume;
        if ever { format!("{id} was deleted") } else { format!("there is no {id}") }
    }
}

pub(crate) fn no_volume_named(name: &str) -> String {
    let shown: String = name.chars().take(NAME_BYTES_MAX).collect();
    format!("there is no volume named {shown:?}")
}

/// Why a name is taken.
fn exists(there: &Volume) -> String {
    match &there.importing {
        Some(importing) => importing.is_unfinished(&there.name),
        None => format!("a volume named {} exists", there.name),
    }
}

pub(super) fn is_attached(name: &str, attached: &Attached) -> String {
    format!("volume {name} is attached at {} since {}", attached.holder, utc(attached.since_unix_ms / 1000))
}

#[cfg(test)]
mod tests {
    use super::{check_holder, check_name, check_size};
    use evolute_protocol::geometry::{MIB, TIB};

    #[test]
    fn names_sizes_and_holders_are_checked() {
        for good in ["a", "0", "web-1.root_disk", &"x".repeat(128)] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in ["", "-a", ".a", "_a", "a b", "a/b", "ä", "a\0", "a\n", &"x".repeat(129)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        for good in [MIB, 3 * MIB, 64 * TIB] {
            assert_eq!(check_size(good), Ok(()));
        }
        for bad in [0, 1, MIB - 1, MIB + 1, 64 * TIB + MIB, u64::MAX] {
            assert!(check_size(bad).is_err(), "{bad}");
        }
        assert_eq!(check_holder("host-a /run/evolute/web.sock"), Ok(()));
        for bad in ["", "a\nb", &"x".repeat(513)] {
            assert!(check_holder(bad).is_err());
        }
    }
}
