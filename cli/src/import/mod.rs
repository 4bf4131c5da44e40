//! A raw disk image becomes a volume.
use crate::args::ImportArgs;
use crate::failure::Failure;
use crate::mds::Mds;
use crate::output::Output;
pub async fn run(_mds: Mds, _output: Output, _wanted: ImportArgs) -> Result<(), Failure> {
    Err(Failure::Usage { what: "not yet".to_owned(), next: None })
}
