//! The command line of the guest-free front end: one run, one JSON object.

use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use evolute_bench::front_end::{self, options::Options};

fn main() -> ExitCode {
    const SET_UP_FAILED: u8 = 3;
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(SET_UP_FAILED) } else { ExitCode::SUCCESS };
        }
    };
    match front_end::run(&options, &mut (), &AtomicBool::new(false)) {
        Ok(report) => {
            println!("{}", serde_json::to_string(&report).expect("numbers and names are JSON"));
            ExitCode::from(report.exit_status())
        }
        Err(error) => {
            eprintln!("vublk-bench: {error}");
            ExitCode::from(SET_UP_FAILED)
        }
    }
}
