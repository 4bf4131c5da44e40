//! Reads the command line, runs one command, turns its failure into words and an exit status.

use evolute_protocol::rpc::Decision;
use std::process::ExitCode;

use clap::Parser;
use evolute_cli::args::{Args, ChunkserverCommand, ClusterCommand, Command, VolumeCommand};
use evolute_cli::failure::Failure;
use evolute_cli::mds::Mds;
use evolute_cli::output::{self, Output};
use evolute_cli::{chunkserver, cluster, dev, import, volume};

fn main() -> ExitCode {
    let args = Args::parse();
    let output = Output::new(args.json);
    // One thread: `dev` starts children that die with the thread that started them.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(source) => return output.failure(&Failure::Io { doing: "starting".to_owned(), source }),
    };
    let status = match runtime.block_on(run(args, output)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => output.failure(&failure),
    };
    output::say_nothing_more();
    status
}

async fn run(args: Args, output: Output) -> Result<(), Failure> {
    let mds = || Mds::new(&args.mds, args.timeout);
    match args.command {
        Command::Volume(VolumeCommand::Create { name, size, width }) => {
            volume::create(&mut mds()?, output, name, size, width).await
        }
        Command::Volume(VolumeCommand::List) => volume::list(&mut mds()?, output).await,
        Command::Volume(VolumeCommand::Show { name }) => volume::show(&mut mds()?, output, name).await,
        Command::Volume(VolumeCommand::Delete { name, force }) => {
            volume::delete(&mut mds()?, output, name, force).await
        }
        Command::Volume(VolumeCommand::Import(wanted)) => import::run(mds()?, output, wanted).await,
        Command::Chunkserver(ChunkserverCommand::List) => chunkserver::list(&mut mds()?, output).await,
        Command::Chunkserver(ChunkserverCommand::Show { id }) => {
            chunkserver::show(&mut mds()?, output, id).await
        }
        Command::Chunkserver(ChunkserverCommand::Retire { id, wait }) => {
            chunkserver::retire(&mut mds()?, output, id, wait).await
        }
        Command::Chunkserver(ChunkserverCommand::Unretire { id }) => {
            chunkserver::unretire(&mut mds()?, output, id).await
        }
        Command::Chunkserver(ChunkserverCommand::Accept(said)) => {
            chunkserver::decide(&mut mds()?, output, &said, Decision::Accept).await
        }
        Command::Chunkserver(ChunkserverCommand::DeclareDead(said)) => {
            chunkserver::decide(&mut mds()?, output, &said, Decision::Dead).await
        }
        Command::Chunkserver(ChunkserverCommand::Remove(said)) => {
            chunkserver::decide(&mut mds()?, output, &said, Decision::Remove).await
        }
        Command::Cluster(ClusterCommand::Status) => cluster::status(&mut mds()?, output).await,
        Command::Cluster(ClusterCommand::AcceptMds { yes }) => {
            cluster::accept_mds(&mut mds()?, output, yes).await
        }
        Command::Dev(wanted) => dev::run(output, wanted).await,
    }
}
