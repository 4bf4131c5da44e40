//! `evolute volume import`: a raw disk image becomes a volume.
//!
//! ```text
//!  image ──▶ copy (holes and zeroes skipped) ──▶ Target: the cluster's own client, many writes in flight
//! ```
//!
//! What always holds: the volume carries the mark of its import until every byte is in it and durable, and nobody but the
//! import attaches a marked one, so whatever ends an import, half an image is never taken for a whole one; a volume that
//! import created itself is removed again unless it was killed; what is left is always said.

mod copy;
mod formats;
mod image;
mod progress;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use evolute_daemon::Stop;
use evolute_daemon::shell::quoted;
use evolute_protocol::rpc::{BeginImportRequest, FinishImportRequest, Volume};
use evolute_vhost_backend::volume::client::Client;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::timeout;

use self::copy::{Copied, Target, copy};
use self::image::Image;
use self::progress::Progress;
use crate::args::ImportArgs;
use crate::failure::Failure;
use crate::mds::Mds;
use crate::output::Output;
use crate::size::{VolumeSize, both, human};

/// A write may wait for a cluster without quorum for ever; an interrupted import does not wait with it.
const INTERRUPT_MAX: Duration = Duration::from_secs(5);

impl Target for Client {
    fn write(&mut self, offset: u64, data: Bytes) -> Result<(), String> {
        Self::write(self, offset, data).map_err(|error| error.to_string())
    }

    fn flush(&mut self) -> Result<(), String> {
        Self::flush(self).map_err(|error| error.to_string())
    }
}

pub async fn run(mut mds: Mds, output: Output, wanted: ImportArgs) -> Result<(), Failure> {
    // Before anything is made that would have to go again.
    let mut stop =
        Stop::new().map_err(|error| Failure::Import { what: format!("{error:#}"), next: String::new() })?;
    let image = Image::open(&wanted.file, wanted.raw)?;
    let destination = find_until_interrupted(&mut mds, &wanted, image.bytes, &mut stop).await?;
    let Volume { name, size_bytes, .. } = destination.volume.clone();
    if !destination.existing {
        output.event(&json!({"event": "created", "volume": name, "size_bytes": size_bytes}), || {
            format!("created volume {name}, {}", both(size_bytes))
        });
    }
    let begun = Progress::new(output, image.bytes);
    let copied = match copy_until_interrupted(&mds, &destination, image, begun, &mut stop).await {
        Ok(done) => finish(&mut mds, &destination, done).await,
        Err(failure) => Err(failure),
    };
    match copied {
        Ok(Done { copied, took, .. }) => {
            let told = json!({
                "event": "done",
                "volume": name,
                "image_bytes": copied.done_bytes,
                "written_bytes": copied.written_bytes,
                "seconds": took.as_secs_f64(),
            });
            output.event(&told, || {
                let done = done_words(&wanted.file, &name, copied, took);
                format!("{done}\n{}", next_words(&mds.addresses(), &name))
            });
            Ok(())
        }
        Err(failure) => Err(destination.give_up(&mut mds, failure).await),
    }
}

/// The mark goes, and the attachment with it, in one step: a volume is never whole and held by nobody that lives.
async fn finish(mds: &mut Mds, destination: &Destination, done: Done) -> Result<Done, Failure> {
    let request = FinishImportRequest {
        volume_id: destination.volume.id,
        attachment: done.client.attached().epoch.attachment,
        used_bytes: done.copied.written_bytes,
    };
    mds.finish_import(request).await?;
    Ok(done)
}

fn done_words(file: &Path, volume: &str, copied: Copied, took: Duration) -> String {
    format!(
        "imported {} into volume {volume}: {} written, {} of holes and zeroes skipped, {:.1} s",
        file.display(),
        human(copied.written_bytes),
        human(copied.done_bytes.saturating_sub(copied.written_bytes)),
        took.as_secs_f64()
    )
}

/// What a person wants to type after this.
fn next_words(mds: &str, volume: &str) -> String {
    let (mds, volume) = (quoted(mds), quoted(volume));
    format!(
        "a backend gives it to a guest:\n  \
         mkdir -p /run/evolute && evolute-vhost --mds {mds} --volume {volume} --socket-path /run/evolute/{volume}.sock --state-dir /var/lib/evolute/{volume}\n\
         and QEMU attaches it, with shared memory (evolute-vhost --help has the whole line), by:\n  \
         -chardev socket,id=disk,path=/run/evolute/{volume}.sock,reconnect=1 -device vhost-user-blk-pci,chardev=disk\n\
         in a cluster of `evolute dev`, start that again with --volume {volume}: it prints the lines"
    )
}

/// Where the image goes: a volume that carries the mark of this import.
struct Destination {
    volume: Volume,
    /// It was there before, so its owner decides when the import fails; else it goes again.
    existing: bool,
    /// What we attach as.
    by: String,
}

async fn find_until_interrupted(
    mds: &mut Mds,
    wanted: &ImportArgs,
    image_bytes: u64,
    stop: &mut Stop,
) -> Result<Destination, Failure> {
    let interrupted = || Failure::Interrupted { left: String::new() };
    let mut finding = Box::pin(Destination::find(mds, wanted, image_bytes));
    let found = tokio::select! {
        found = &mut finding => return found,
        // What is being made has to be known to be removed.
        () = stop.requested() => timeout(INTERRUPT_MAX, &mut finding).await,
    };
    drop(finding);
    match found {
        Ok(Ok(destination)) => Err(destination.give_up(mds, interrupted()).await),
        Ok(Err(failure)) => Err(failure),
        Err(_) => {
            let name = wanted.name.as_ref().or(wanted.into.as_ref()).map_or("", String::as_str);
            let left =
                format!("nobody answered in time: `evolute volume show {name}` says whether it is marked");
            Err(Failure::Interrupted { left })
        }
    }
}

impl Destination {
    async fn find(mds: &mut Mds, wanted: &ImportArgs, image_bytes: u64) -> Result<Self, Failure> {
        let usage = |what: String, next: &str| Failure::Usage { what, next: Some(next.to_owned()) };
        let (name, existing) = match (&wanted.name, &wanted.into) {
            (Some(name), _) => (name, false),
            (None, Some(name)) => (name, true),
            (None, None) => return Err(usage("no volume is named".to_owned(), "give --name or --into")),
        };
        let size_bytes = match wanted.size {
            _ if existing => {
                expect_fit(&mds.show(name).await?, image_bytes)?;
                0
            }
            Some(size) if size.0 < image_bytes => {
                return Err(usage(
                    format!("the image has {}, more than --size {}", both(image_bytes), both(size.0)),
                    "give a larger --size, or none",
                ));
            }
            Some(size) => size.0,
            None => VolumeSize::holding(image_bytes)?.0,
        };
        let by = format!("import on {}, process {}", hostname(), std::process::id());
        let request = BeginImportRequest {
            name: name.clone(),
            size_bytes,
            width: wanted.width,
            existing,
            by: by.clone(),
        };
        let volume = mds.begin_import(request).await?;
        Ok(Self { volume, existing, by })
    }

    /// Removes what was made for nothing; says what is left.
    async fn give_up(self, mds: &mut Mds, failure: Failure) -> Failure {
        let name = &self.volume.name;
        let left = if self.existing {
            format!(
                "volume {name} holds a part of the image, and nobody can attach it: evolute volume delete {name} --force"
            )
        } else {
            match mds.abandon_import(self.volume.id, &self.by).await {
                Ok(()) => format!("volume {name} was removed again; nothing is left of it"),
                Err(error) => format!(
                    "volume {name} may hold a part of the image and could not be removed ({error}): \
                     evolute volume delete {name} --force"
                ),
            }
        };
        match failure {
            Failure::Interrupted { .. } => Failure::Interrupted { left },
            other => {
                let next = other.next().map_or(left.clone(), |next| format!("{left}; {next}"));
                Failure::Import { what: other.to_string(), next }
            }
        }
    }
}

/// An image goes into a volume that is there, nobody holds and nobody wrote. The control plane looks again when it sets
/// the mark.
fn expect_fit(volume: &Volume, image_bytes: u64) -> Result<(), Failure> {
    let name = &volume.name;
    let usage = |what: String, next: &str| Err(Failure::Usage { what, next: Some(next.to_owned()) });
    if let (Some(held), None) = (&volume.attached, &volume.importing) {
        return usage(
            format!("volume {name} is held by {}", held.holder),
            "stop that backend first, or import into a new volume (--name)",
        );
    }
    if volume.allocated_bytes > 0 && volume.importing.is_none() {
        return usage(
            format!("volume {name} was written before ({} allocated)", human(volume.allocated_bytes)),
            "import skips zeroes, so old bytes would show through: use an empty volume, or a new one (--name)",
        );
    }
    if volume.size_bytes < image_bytes {
        return usage(
            format!("the image has {}, volume {name} only {}", both(image_bytes), both(volume.size_bytes)),
            "import into a new volume (--name), which gets the right size by itself",
        );
    }
    Ok(())
}

/// A whole copy, and the attachment by which it was made: kept until the mark is gone.
struct Done {
    client: Client,
    copied: Copied,
    took: Duration,
}

/// The copy blocks, so it has a thread; a thread that hangs ends with the process.
async fn copy_until_interrupted(
    mds: &Mds,
    destination: &Destination,
    image: Image,
    mut progress: Progress,
    stop: &mut Stop,
) -> Result<Done, Failure> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let seen = interrupted.clone();
    let addresses: Vec<String> = mds.addresses().split(',').map(str::to_owned).collect();
    let (volume, holder) = (destination.volume.name.clone(), destination.by.clone());
    let (tell, mut told) = oneshot::channel();
    let work = move || {
        let result = attach_and_copy(&volume, &addresses, &holder, &image, &seen, &mut progress);
        progress.end_line();
        // Nobody waits any more: interrupted.
        let _ = tell.send(result.map(|(client, copied)| Done { client, copied, took: progress.elapsed() }));
    };
    std::thread::Builder::new()
        .name("import".to_owned())
        .spawn(work)
        .map_err(Failure::io("starting a thread"))?;
    let gone = |_| Failure::Import { what: "the import thread ended".to_owned(), next: String::new() };
    tokio::select! {
        result = &mut told => result.map_err(gone)?,
        () = stop.requested() => {
            interrupted.store(true, Ordering::Relaxed);
            // It may just have finished; then it did.
            match timeout(INTERRUPT_MAX, &mut told).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) | Err(_) => Err(Failure::Interrupted { left: String::new() }),
            }
        }
    }
}

fn attach_and_copy(
    volume: &str,
    mds: &[String],
    holder: &str,
    image: &Image,
    interrupted: &AtomicBool,
    progress: &mut Progress,
) -> Result<(Client, Copied), Failure> {
    let failed = |error: evolute_vhost_backend::volume::client::ClientError| Failure::Volume {
        volume: volume.to_owned(),
        message: error.to_string(),
    };
    let mut client = Client::attach(volume, mds, holder).map_err(failed)?;
    match copy(image, volume, &mut client, interrupted, |copied| progress.at(copied)) {
        Ok(copied) => Ok((client, copied)),
        Err(failure) => {
            // Given back, and marked all the same: that it holds only a part is what the failure says.
            let _ = client.detach();
            Err(failure)
        }
    }
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::next_words;

    #[test]
    fn what_to_type_after_an_import_can_be_pasted() {
        let words = next_words("10.0.0.1:7700,[::1]:7700", "debian");
        assert!(
            words.contains("mkdir -p /run/evolute && evolute-vhost --mds '10.0.0.1:7700,[::1]:7700' --volume debian --socket-path /run/evolute/debian.sock"),
            "{words}"
        );
        assert!(words.contains("path=/run/evolute/debian.sock,reconnect=1"), "{words}");
    }
}
