//! The command line of `ztunnel`. It only chooses what to run; `config` has the settings, `app` the rest.
//!
//! In the library, because the sabotaged test build is a second program with the same command line.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::Node;
use crate::config::gateway::Gateway;

#[derive(Parser)]
#[command(name = "ztunnel", about = "Tulle's node proxy", disable_version_flag = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Proxy the pods of this node (the default).
    #[command(alias = "proxy")]
    Node(Box<NodeArgs>),
    /// Lead pods' connections out of the cluster, from one address, to hosts that are asked for by name.
    Gateway(Box<Gateway>),
    /// Print the version.
    Version,
}

#[derive(clap::Args)]
struct NodeArgs {
    #[command(flatten)]
    node: Node,
    /// Role, as Istio's charts give it; ignored.
    #[arg(hide = true)]
    role: Option<String>,
}

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().collect();
    // Without a command it is the node proxy, as in Istio's image.
    let named = args.get(1).is_some_and(|first| !first.starts_with('-') || matches!(first.as_str(), "-h" | "--help"));
    if !named {
        args.insert(1.min(args.len()), "node".to_owned());
    }
    let result = match Cli::parse_from(args).command {
        Command::Version => {
            println!("ztunnel {} (aws-lc-rs)", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Command::Node(args) => crate::app::run(args.node),
        Command::Gateway(config) => crate::app::gateway::run(*config),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ztunnel: {error:#}");
            ExitCode::FAILURE
        }
    }
}
