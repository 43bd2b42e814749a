//! The `control` program: reads its command line and runs the library.
//!
//! Exit codes: 0 after a stop that was asked for, 1 on an error, 2 for a wrong command line.

use std::process::ExitCode;

use clap::Parser;
use control::app;
use control::cli;
use control::config::{Cli, Command, LogFormat};
use control::telemetry;

fn main() -> ExitCode {
    let cli = Cli::parse();
    telemetry::init(cli.log_format == LogFormat::Json);
    // One provider for everything, before the first use of TLS. A second installation could only be ours, too.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Token(token) => {
            println!("{}", app::token(&token)?);
            Ok(())
        }
        Command::Rotate(rotate) => {
            println!("{}", cli::rotate(&rotate)?);
            Ok(())
        }
        Command::Revoke(revoke) => {
            println!("{}", cli::revoke(&revoke)?);
            Ok(())
        }
        Command::Probe(probe) => cli::probe(&probe),
        Command::Serve(serve) => {
            tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(app::serve(*serve))
        }
    }
}
