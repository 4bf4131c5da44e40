//! The command line of the supervisor.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;
use evolute_torture::blkcheck::report::Verdict;
use evolute_torture::sheet;
use evolute_torture::supervisor::options::{Options, Task};
use evolute_torture::supervisor::supervise;
use rustix::process::Signal;

const WRONG_USAGE: u8 = 2;
const COULD_NOT_RUN: u8 = 3;
const UNKNOWN: u8 = 4;

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    STOP.store(true, Ordering::SeqCst);
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(Task::Report { files, out }) = &options.task {
        return match sheet::write(files, out) {
            Ok(words) => {
                println!("{words}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("torture: {error:#}");
                ExitCode::from(COULD_NOT_RUN)
            }
        };
    }
    if let Some(wrong) = options.wrong() {
        eprintln!("torture: {wrong}");
        return ExitCode::from(WRONG_USAGE);
    }
    for signal in [Signal::INT, Signal::TERM] {
        if let Err(error) = vmm_sys_util::signal::register_signal_handler(signal.as_raw(), stop) {
            eprintln!("torture: cannot handle {signal:?}: {error}");
            return ExitCode::from(COULD_NOT_RUN);
        }
    }
    let report = match supervise::run(&options, &STOP) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("torture: {error:#}");
            return ExitCode::from(COULD_NOT_RUN);
        }
    };
    println!("{}", report.words());
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&report).expect("numbers and words are JSON");
        if let Err(error) = std::fs::write(path, json) {
            eprintln!("torture: cannot write {}: {error}", path.display());
            return ExitCode::from(COULD_NOT_RUN);
        }
    }
    match report.verdict {
        Verdict::Pass => ExitCode::SUCCESS,
        Verdict::Fail => ExitCode::FAILURE,
        Verdict::Unknown => ExitCode::from(UNKNOWN),
    }
}
