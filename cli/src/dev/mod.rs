//! `evolute dev`: a whole cluster under one directory on loopback, without root.
//!
//! One control plane, three chunkservers in three zones, a backend per named volume (or one for all); real programs, found next to
//! this one, talking over the same sockets as in a machine room. [`layout`] says what is where, [`ports`] who listens
//! where, [`process`] keeps each program running, [`cluster`] knows their order: up from the control plane, down from
//! the backends, so that no guest sees an error on the way.

pub mod cluster;
pub mod layout;
pub mod lines;
pub mod ports;
pub mod process;

use std::path::{Path, PathBuf};

use evolute_daemon::{Stop, check_ready_file, remove_ready_file, write_ready_file};
use tokio::sync::mpsc;

use crate::args::DevArgs;
use crate::dev::cluster::{Cluster, Running, Wanted};
use crate::dev::layout::{Kept, Layout};
use crate::dev::process::Event;
use crate::failure::Failure;
use crate::output::{Output, say, say_error, wait_for_no_reader};

pub async fn run(output: Output, args: Box<DevArgs>) -> Result<(), Failure> {
    wait_for_no_reader().map_err(Failure::io("starting"))?;
    let mut stop =
        Stop::new().map_err(|error| Failure::Dev { what: format!("{error:#}"), next: String::new() })?;
    if let Some(path) = &args.ready_file {
        let next = "name another file".to_owned();
        check_ready_file(path).map_err(|error| Failure::Dev { what: format!("{error:#}"), next })?;
    }
    let layout = Layout::open(&args.dir)?;
    let programs = programs(args.bin_dir.as_deref())?;
    let kept = settle(&layout, &args).await?;
    let (events_out, mut events) = mpsc::unbounded_channel();
    let wanted = Wanted {
        programs,
        volumes: args.volumes.clone(),
        one_backend: args.one_backend,
        socket_mode: args.socket_mode.clone(),
        socket_group: args.socket_group.clone(),
        copysets_min: args.copysets,
        start_timeout: args.start_timeout,
        restarts_max: args.restarts,
    };
    let mut cluster = Cluster::new(layout, kept, wanted, events_out, progress(output));
    let started = tokio::select! {
        started = cluster.start() => started.map(Some),
        () = stop.requested() => Ok(None),
    };
    let result = match started {
        Ok(Some(mut running)) => {
            announce(output, &args, &running)?;
            loop {
                tokio::select! {
                    () = stop.requested() => break Ok(()),
                    Some(event) = events.recv() => {
                        if heard(&event, &mut running, output) {
                            write(&args, &running)?;
                        }
                    }
                }
            }
        }
        Ok(None) => Ok(()),
        Err(failure) => Err(failure),
    };
    note(output, "stopping");
    tokio::select! {
        unclean = cluster.stop() => {
            for what in unclean {
                note(output, &what);
            }
        }
        // Asked twice: what still runs dies with us.
        () = stop.requested() => note(output, "asked to stop twice: killing what still runs"),
    }
    if let Some(path) = &args.ready_file {
        // It would say that a cluster is up.
        let _ = remove_ready_file(path);
    }
    note(output, "stopped");
    result
}

/// The three daemons.
#[derive(Debug, Clone)]
pub struct Programs {
    pub mds: PathBuf,
    pub chunkserver: PathBuf,
    pub vhost: PathBuf,
}

fn programs(bin_dir: Option<&Path>) -> Result<Programs, Failure> {
    let beside = match bin_dir {
        Some(dir) => dir.to_owned(),
        None => {
            let me = std::env::current_exe().map_err(Failure::io("looking for this program's own file"))?;
            me.parent().map(Path::to_owned).unwrap_or_default()
        }
    };
    let find = |name: &str| {
        let path = beside.join(name);
        if path.is_file() {
            return Ok(path);
        }
        Err(Failure::Dev {
            what: format!("there is no {name} in {}", beside.display()),
            next: "build the programs (`make build`), or say where they are by --bin-dir".to_owned(),
        })
    };
    Ok(Programs {
        mds: find("evolute-mds")?,
        chunkserver: find("evolute-chunkserver")?,
        vhost: find("evolute-vhost")?,
    })
}

/// Ports, data and volumes: what the last start kept, changed by what this one asks for.
async fn settle(layout: &Layout, args: &DevArgs) -> Result<Kept, Failure> {
    let data_on = match &args.data_on {
        Some(path) => Some(std::path::absolute(path).map_err(Failure::io("finding --data-on"))?),
        None => None,
    };
    let seed = u64::from(std::process::id()) ^ crate::output::unix_ms_now();
    let former = layout.kept()?;
    let instead = match former {
        Some(_) => "add --new-ports to choose others (the data stay)",
        None => "choose another --mds-port",
    };
    let mut kept = match former {
        Some(kept) => {
            if data_on.is_some() && data_on != kept.data_on {
                return Err(Failure::Dev {
                    what: format!("the data of this cluster are in {}", layout.data(&kept).display()),
                    next: "leave out --data-on, or start a new cluster in another --dir".to_owned(),
                });
            }
            if args.new_ports {
                let [mds, a, b, c] = ports::choose(seed)?;
                Kept { mds_port: mds, chunkserver_ports: [a, b, c], ..kept }
            } else {
                kept
            }
        }
        None => {
            let [mds, a, b, c] = ports::choose(seed)?;
            let mds = match args.mds_port {
                Some(0) => mds,
                Some(port) => port,
                None if ports::is_free(ports::MDS_PORT) => ports::MDS_PORT,
                None => mds,
            };
            Kept::new(mds, [a, b, c], data_on)
        }
    };
    let data = layout.data(&kept);
    ports::expect_free(kept.mds_port, "control plane", instead, &data).await?;
    for (i, port) in kept.chunkserver_ports.iter().enumerate() {
        ports::expect_free(*port, &format!("chunkserver {}", i + 1), instead, &data).await?;
    }
    for volume in &args.volumes {
        layout.socket(&volume.name)?;
        if !kept.volumes.contains(&volume.name) {
            kept.volumes.push(volume.name.clone());
        }
    }
    layout.keep(&kept)?;
    Ok(kept)
}

fn announce(output: Output, args: &DevArgs, running: &Running) -> Result<(), Failure> {
    write(args, running)?;
    output.event(running, || running.words());
    Ok(())
}

fn write(args: &DevArgs, running: &Running) -> Result<(), Failure> {
    let Some(path) = &args.ready_file else { return Ok(()) };
    write_ready_file(path, running)
        .map_err(|error| Failure::Dev { what: format!("{error:#}"), next: String::new() })
}

/// True when what the ready file says has changed.
fn heard(event: &Event, running: &mut Running, output: Output) -> bool {
    match event {
        Event::Died { name, status } => {
            note(output, &format!("{name} died ({status})"));
            false
        }
        Event::Restarted { name, pid } => {
            note(output, &format!("{name} runs again, process {pid}"));
            running.set_pid(name, *pid);
            true
        }
        Event::NotStarted { name, why, again_in } => {
            note(output, &format!("{name} did not start, and is started again in {again_in:?}: {why}"));
            false
        }
        Event::GivenUp { name, why } => {
            note(output, &format!("{name} stays down: {why}"));
            running.set_pid(name, 0);
            true
        }
    }
}

/// What happens, one line each: to people on standard output; with --json that belongs to the one object.
fn note(output: Output, what: &str) {
    if output.json {
        say_error(what);
    } else {
        say(what);
    }
}

fn progress(output: Output) -> impl Fn(&str) + Copy {
    move |what| note(output, what)
}
