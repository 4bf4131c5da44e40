//! `evolute volume create | list | show | delete`.

use evolute_protocol::rpc::{Attachment, ErrorWord, Volume};
use serde::Serialize;
use serde_json::json;

use crate::failure::Failure;
use crate::mds::Mds;
use crate::output::{Output, ago, table, time, unix_ms_now};
use crate::size::{VolumeSize, both, human};

/// A volume as `--json` shows it. The shape is in docs/cli.md.
#[derive(Debug, Serialize)]
pub struct VolumeView {
    id: u64,
    name: String,
    size_bytes: u64,
    allocated_bytes: u64,
    /// None: the chunkservers have not all said.
    used_bytes: Option<u64>,
    width: u32,
    copysets: Vec<u32>,
    attachment: u32,
    attached: Option<AttachmentView>,
    /// An import that has not ended: the volume holds a part of its image at most.
    importing: Option<AttachmentView>,
    created_unix_ms: u64,
}

#[derive(Debug, Serialize)]
struct AttachmentView {
    holder: String,
    since_unix_ms: u64,
}

impl From<Attachment> for AttachmentView {
    fn from(attachment: Attachment) -> Self {
        Self { holder: attachment.holder, since_unix_ms: attachment.since_unix_ms }
    }
}

impl From<Volume> for VolumeView {
    fn from(volume: Volume) -> Self {
        Self {
            id: volume.id,
            name: volume.name,
            size_bytes: volume.size_bytes,
            allocated_bytes: volume.allocated_bytes,
            used_bytes: (!volume.used_unknown).then_some(volume.used_bytes),
            width: volume.width,
            copysets: volume.copysets,
            attachment: volume.attachment,
            attached: volume.attached.map(AttachmentView::from),
            importing: volume.importing.map(AttachmentView::from),
            created_unix_ms: volume.created_unix_ms,
        }
    }
}

impl VolumeView {
    fn words(&self) -> String {
        let attached = match &self.attached {
            None => "no".to_owned(),
            Some(a) => {
                let since = ago(unix_ms_now().saturating_sub(a.since_unix_ms));
                format!("by {} ({since}, attachment {})", a.holder, self.attachment)
            }
        };
        let copysets: Vec<String> = self.copysets.iter().map(u32::to_string).collect();
        let rows = [
            ("name", self.name.clone()),
            ("id", self.id.to_string()),
            ("size", both(self.size_bytes)),
            ("allocated", both(self.allocated_bytes)),
            ("used", self.used_bytes.map_or("not known yet".to_owned(), both)),
            ("attached", attached),
            ("copysets", if copysets.is_empty() { "none yet".to_owned() } else { copysets.join(" ") }),
            ("width", self.width.to_string()),
            ("created", time(self.created_unix_ms)),
        ];
        let mut words = rows.map(|(key, value)| format!("{key:<10} {value}")).join("\n");
        if let Some(importing) = &self.importing {
            let since = ago(unix_ms_now().saturating_sub(importing.since_unix_ms));
            words += &format!(
                "\nimport     unfinished ({}, begun {since}): it holds a part of its image at most, and nobody else can \
                 attach it; unless that import still runs: evolute volume delete {} --force",
                importing.holder, self.name
            );
        }
        words
    }
}

/// The table of `volume list` and of `cluster status`.
pub fn volume_table(volumes: &[VolumeView]) -> String {
    let rows: Vec<Vec<String>> = volumes
        .iter()
        .map(|v| {
            let attached = match (&v.importing, &v.attached) {
                (Some(importing), _) => format!("{} (import unfinished)", importing.holder),
                (None, Some(attached)) => attached.holder.clone(),
                (None, None) => "-".to_owned(),
            };
            let used = v.used_bytes.map_or("?".to_owned(), human);
            vec![v.name.clone(), human(v.size_bytes), human(v.allocated_bytes), used, attached]
        })
        .collect();
    table(&["NAME", ">SIZE", ">ALLOCATED", ">USED", "ATTACHED BY"], &rows)
}

pub async fn create(
    mds: &mut Mds,
    output: Output,
    name: String,
    size: VolumeSize,
    width: u32,
) -> Result<(), Failure> {
    let view = VolumeView::from(mds.create(&name, size.0, width).await?);
    output.answer(&view, || format!("created volume {}, {}", view.name, both(view.size_bytes)));
    Ok(())
}

pub async fn list(mds: &mut Mds, output: Output) -> Result<(), Failure> {
    let mut volumes: Vec<VolumeView> = mds.list().await?.into_iter().map(VolumeView::from).collect();
    volumes.sort_by(|a, b| a.name.cmp(&b.name));
    output.answer(&json!({"volumes": volumes}), || {
        if volumes.is_empty() {
            "no volumes; `evolute volume create NAME --size 10G` makes one".to_owned()
        } else {
            volume_table(&volumes)
        }
    });
    Ok(())
}

pub async fn show(mds: &mut Mds, output: Output, name: String) -> Result<(), Failure> {
    let view = VolumeView::from(mds.show(&name).await?);
    output.answer(&view, || view.words());
    Ok(())
}

pub async fn delete(mds: &mut Mds, output: Output, name: String, force: bool) -> Result<(), Failure> {
    match mds.delete(&name, force).await {
        Ok(()) => {}
        Err(Failure::Refused { word: ErrorWord::AttachedElsewhere, message }) if force => {
            // The advice for this word is --force, which was given.
            return Err(Failure::ControlPlane { address: mds.addresses(), message });
        }
        Err(failure) => return Err(failure),
    }
    output.answer(&json!({"deleted": name}), || format!("deleted volume {name}"));
    Ok(())
}
