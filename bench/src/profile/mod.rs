//! Stub.
use crate::runner::BenchError;
use std::sync::atomic::AtomicBool;
/// Stub
#[derive(Debug, clap::Args)]
pub struct Options {}
pub fn run(_: &Options, _: &AtomicBool) -> Result<(), BenchError> {
    Ok(())
}
