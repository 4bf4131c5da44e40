//! An image on its way into a volume: marked from before its first byte until after its last.
//!
//! ```text
//!            BeginImport                    FinishImport
//!  nothing ─────────────▶ marked, filling ────────────────▶ a volume like any other
//!                             │ AbandonImport, or a person deletes it
//!                             └──────────────▶ nothing
//! ```
//!
//! What always holds: while the mark is there, only the import that set it attaches the volume. So whatever way an import
//! ends, nobody takes half an image for a whole one; what a killed one leaves says itself what it is.

use evolute_daemon::utc;
use evolute_protocol::id::VolumeId;

use super::command::{AbandonImport, BeginImport, CreateVolume, FinishImport};
use super::outcome::{Done, Outcome, Refused, Why, refuse};
use super::volume::{check_holder, is_attached, no_volume_named};
use super::{Changes, Key, State};

/// Which import, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Importing {
    /// The holder it attaches as.
    pub by: String,
    pub since_unix_ms: u64,
}

impl Importing {
    pub fn is_unfinished(&self, name: &str) -> String {
        format!(
            "volume {name} is an unfinished import ({}, begun {}): it holds a part of its image at most; unless that \
             import still runs, delete it: evolute volume delete {name} --force",
            self.by,
            utc(self.since_unix_ms / 1000)
        )
    }
}

impl State {
    pub(super) fn begin_import(&mut self, command: &BeginImport, changes: &mut Changes) -> Outcome {
        if let Err(message) = check_holder(&command.by) {
            return refuse(Why::Invalid, message);
        }
        let done = if command.existing {
            changes.push(Key::Volume(self.check_importable(&command.name)?));
            Done::Plain
        } else {
            let create = CreateVolume {
                name: command.name.clone(),
                size_bytes: command.size_bytes,
                copysets: command.copysets.clone(),
                at_unix_ms: command.at_unix_ms,
            };
            self.create_volume(&create, changes)?
        };
        let id = self.names[&command.name];
        let volume = self.volumes.get_mut(&id).expect("a name points to a volume");
        volume.importing = Some(Importing { by: command.by.clone(), since_unix_ms: command.at_unix_ms });
        Ok(done)
    }

    /// A volume that nobody holds and nobody wrote: an import leaves zeroes out.
    fn check_importable(&self, name: &str) -> Result<VolumeId, Refused> {
        let refused = |why, message| Err(Refused { why, message });
        let Some((id, volume)) = self.volume_named(name) else {
            return refused(Why::NotFound, no_volume_named(name));
        };
        if let Some(importing) = &volume.importing {
            return refused(Why::Exists, importing.is_unfinished(name));
        }
        if let Some(attached) = &volume.attached {
            return refused(Why::AttachedElsewhere, is_attached(name, attached));
        }
        if !volume.segments.is_empty() {
            return refused(Why::Invalid, format!("volume {name} was written before"));
        }
        Ok(id)
    }

    /// Said twice, its first answer lost, it changes nothing.
    pub(super) fn finish_import(&mut self, command: &FinishImport, changes: &mut Changes) -> Outcome {
        let id = VolumeId(command.volume);
        let Some(volume) = self.volumes.get_mut(&id) else {
            return refuse(Why::NotFound, self.no_volume(id));
        };
        if volume.importing.is_some() {
            volume.check_attachment(id, command.attachment)?;
            volume.importing = None;
            volume.attached = None;
            changes.push(Key::Volume(id));
        }
        Ok(Done::Plain)
    }

    /// By number and by import, never by name: meanwhile the name may be another volume's.
    pub(super) fn abandon_import(&mut self, command: &AbandonImport, changes: &mut Changes) -> Outcome {
        let id = VolumeId(command.volume);
        let Some(volume) = self.volumes.get(&id) else { return Ok(Done::Plain) };
        match &volume.importing {
            Some(importing) if importing.by == command.by => {
                self.drop_volume(id, changes);
                Ok(Done::Plain)
            }
            Some(importing) => refuse(Why::Invalid, format!("{id} is filled by {}", importing.by)),
            None => refuse(Why::Invalid, format!("{id} holds its whole image")),
        }
    }
}
