//! `make bench`: measures Evolute and qemu-storage-daemon side by side. And what is made of the results.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::{Parser, Subcommand};
use evolute_bench::{profile, report, runner};
use evolute_daemon::Stop;

/// Measures Evolute and qemu-storage-daemon side by side and prints tables
#[derive(Debug, Parser)]
#[command(name = "evolute-bench", version, args_conflicts_with_subcommands = true)]
#[command(after_help = "Examples:
  evolute-bench --quick
  evolute-bench --out results.jsonl && evolute-bench report results.jsonl
  evolute-bench --store tmpfs --system evolute --work randwrite-4k-qd32 --seconds 20
  evolute-bench --work restart --restart-bytes 256M
  evolute-bench profile --work randwrite-4k-qd32")]
struct Args {
    #[command(subcommand)]
    task: Option<Task>,
    #[command(flatten)]
    run: runner::Options,
}

#[derive(Debug, Subcommand)]
enum Task {
    Report(report::Options),
    Profile(profile::Options),
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    match args.task {
        None => measure(&args.run),
        Some(Task::Report(options)) => {
            for path in report::run(&options)? {
                println!("{}", path.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        Some(Task::Profile(options)) => {
            let stop = stop_on_signals()?;
            profile::run(&options, &stop)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn measure(options: &runner::Options) -> anyhow::Result<ExitCode> {
    let stop = stop_on_signals()?;
    let outcome = runner::run(options, &stop)?;
    for table in &outcome.tables {
        println!("\n{table}");
    }
    println!(
        "CPU µs/IO: all processes of the system, then each; the generator, which stands for the guest, is apart.\n\
         others %: what everybody else took of the machine meanwhile; stolen %: the part of it that the host took; runs: of so\n\
         many, the one of which least was stolen.\n\
         evolute: three replicas, durable when answered. qsd: one local copy, nothing flushed.\n\
         Goals: {}.",
        outcome.summary
    );
    if !outcome.left_out.is_empty() {
        println!("Left out of a quick run: {}.", outcome.left_out.join("; "));
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
