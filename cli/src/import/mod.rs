//! `evolute volume import`: a raw disk image becomes a volume.
//!
//! ```text
//!  image ──▶ copy (holes and zeroes skipped) ──▶ Target: the cluster's own client, many writes in flight
//! ```
//!
//! What always holds: the volume is attached for as long as it is written, so nobody else writes it; a volume that
//! import created itself is removed again unless every byte is in it and durable; what is left is always said.

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
use evolute_protocol::rpc::Volume;
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
    let image = Image::open(&wanted.file, wanted.raw)?;
    let destination = Destination::find(&mut mds, &wanted, image.bytes).await?;
    let name = destination.name().to_owned();
    if let Destination::Created(volume) = &destination {
        output.event(&json!({"event": "created", "volume": name, "size_bytes": volume.size_bytes}), || {
            format!("created volume {name}, {}", both(volume.size_bytes))
        });
    }
    let begun = Progress::new(output, image.bytes);
    match copy_until_interrupted(&mds, name.clone(), image, begun).await {
        Ok(Done { copied, took }) => {
            let told = json!({
                "event": "done",
                "volume": name,
                "image_bytes": copied.done_bytes,
                "written_bytes": copied.written_bytes,
                "seconds": took.as_secs_f64(),
            });
            output.event(&told, || done_words(&wanted.file, &name, copied, took));
            Ok(())
        }
        Err(failure) => Err(destination.give_up(&mut mds, failure).await),
    }
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

/// Where the image goes.
enum Destination {
    /// Made for this import; it goes again if the import fails.
    Created(Volume),
    /// There before; its owner decides.
    Existing(Volume),
}

impl Destination {
    async fn find(mds: &mut Mds, wanted: &ImportArgs, image_bytes: u64) -> Result<Self, Failure> {
        let usage = |what: String, next: &str| Failure::Usage { what, next: Some(next.to_owned()) };
        match (&wanted.name, &wanted.into) {
            (Some(name), _) => {
                let size = match wanted.size {
                    Some(size) if size.0 < image_bytes => {
                        return Err(usage(
                            format!("the image has {}, more than --size {}", both(image_bytes), both(size.0)),
                            "give a larger --size, or none",
                        ));
                    }
                    Some(size) => size,
                    None => VolumeSize::holding(image_bytes)?,
                };
                Ok(Self::Created(mds.create(name, size.0, wanted.width).await?))
            }
            (None, Some(name)) => {
                let volume = mds.show(name).await?;
                if let Some(held) = &volume.attached {
                    return Err(usage(
                        format!("volume {name} is held by {}", held.holder),
                        "stop that backend first, or import into a new volume (--name)",
                    ));
                }
                if volume.allocated_bytes > 0 {
                    return Err(usage(
                        format!(
                            "volume {name} was written before ({} allocated)",
                            human(volume.allocated_bytes)
                        ),
                        "import skips zeroes, so old bytes would show through: use an empty volume, or a new one (--name)",
                    ));
                }
                if volume.size_bytes < image_bytes {
                    return Err(usage(
                        format!(
                            "the image has {}, volume {name} only {}",
                            both(image_bytes),
                            both(volume.size_bytes)
                        ),
                        "import into a new volume (--name), which gets the right size by itself",
                    ));
                }
                Ok(Self::Existing(volume))
            }
            (None, None) => Err(usage("no volume is named".to_owned(), "give --name or --into")),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Created(volume) | Self::Existing(volume) => &volume.name,
        }
    }

    /// Removes what was made for nothing; says what is left.
    async fn give_up(self, mds: &mut Mds, failure: Failure) -> Failure {
        let left = match self {
            Self::Existing(volume) => {
                format!(
                    "volume {0} holds a part of the image: delete it (evolute volume delete {0})",
                    volume.name
                )
            }
            Self::Created(volume) => match mds.delete(&volume.name, true).await {
                Ok(()) => format!("volume {} was removed again; nothing is left of it", volume.name),
                Err(error) => format!(
                    "volume {0} may hold a part of the image and could not be removed ({error}): \
                     evolute volume delete {0} --force",
                    volume.name
                ),
            },
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

struct Done {
    copied: Copied,
    took: Duration,
}

/// The copy blocks, so it has a thread; a thread that hangs ends with the process.
async fn copy_until_interrupted(
    mds: &Mds,
    volume: String,
    image: Image,
    mut progress: Progress,
) -> Result<Done, Failure> {
    let mut stop =
        Stop::new().map_err(|error| Failure::Import { what: format!("{error:#}"), next: String::new() })?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let seen = interrupted.clone();
    let addresses: Vec<String> = mds.addresses().split(',').map(str::to_owned).collect();
    let holder = format!("import on {}, process {}", hostname(), std::process::id());
    let (tell, mut told) = oneshot::channel();
    let work = move || {
        let result = attach_and_copy(&volume, &addresses, &holder, &image, &seen, &mut progress);
        progress.end_line();
        // Nobody waits any more: interrupted.
        let _ = tell.send(result.map(|copied| Done { copied, took: progress.elapsed() }));
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
) -> Result<Copied, Failure> {
    let failed = |error: evolute_vhost_backend::volume::client::ClientError| Failure::Volume {
        volume: volume.to_owned(),
        message: error.to_string(),
    };
    let mut client = Client::attach(volume, mds, holder).map_err(failed)?;
    let copied = copy(image, volume, &mut client, interrupted, |copied| progress.at(copied));
    match copied {
        Ok(copied) => client.detach().map(|()| copied).map_err(failed),
        Err(failure) => {
            // For the next one to take; that it holds only a part is what the failure says.
            let _ = client.detach();
            Err(failure)
        }
    }
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
