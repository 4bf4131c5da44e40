//! The command line of the checker: one device, one report.

use std::process::ExitCode;

use clap::Parser;
use evolute_torture::blkcheck::{self, options::Options, report::Verdict};
use evolute_torture::driver::DriverError;

const WRONG_USAGE: u8 = 2;
const COULD_NOT_RUN: u8 = 3;
const UNKNOWN: u8 = 4;

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(wrong) = options.wrong() {
        eprintln!("blkcheck: {wrong}");
        return ExitCode::from(WRONG_USAGE);
    }
    let json = options.json;
    let report = match blkcheck::start(options).and_then(blkcheck::Handle::join) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("blkcheck: {error}");
            let broken = matches!(error, DriverError::Broken(_));
            return if broken { ExitCode::FAILURE } else { ExitCode::from(COULD_NOT_RUN) };
        }
    };
    if json {
        println!("{}", serde_json::to_string(&report).expect("numbers and words are JSON"));
    } else {
        println!("{}", report.words());
    }
    match report.verdict {
        Verdict::Pass => ExitCode::SUCCESS,
        Verdict::Fail => ExitCode::FAILURE,
        Verdict::Unknown => ExitCode::from(UNKNOWN),
    }
}
