//! `make bench`: measures Evolute and qemu-storage-daemon side by side.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Parser;
use evolute_bench::runner::{self, Options};
use evolute_daemon::Stop;

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    let stop = stop_on_signals()?;
    let outcome = runner::run(&options, &stop)?;
    println!("\n{}", outcome.table);
    println!(
        "CPU µs/IO: all processes of the system, then each; the generator, which stands for the guest, is apart.\n\
         others %: what everybody else took of the machine meanwhile.\n\
         evolute: three replicas, durable when answered. qsd: one local copy, nothing flushed."
    );
    for goal in &outcome.goals {
        println!("{goal}");
    }
    for failure in &outcome.failures {
        eprintln!("{failure}");
    }
    Ok(if outcome.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// True once SIGINT or SIGTERM came. The systems must be started from the main thread, with whose end they end, so
/// the signals are waited for on another.
fn stop_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let raised = flag.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("signals")?;
    let mut signals = {
        let _entered = runtime.enter();
        Stop::new()?
    };
    std::thread::spawn(move || {
        runtime.block_on(signals.requested());
        raised.store(true, Ordering::Relaxed);
    });
    Ok(flag)
}
