//! The command line of `ztunnel`. It only chooses what to run; `config` has the settings, `app` the rest.
//!
//! In the library, because the sabotaged test build is a second program with the same command line.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};

use crate::cni::conf::{PLUGIN, VERSIONS};
use crate::cni::install::{Keeper, Memory, State, begin, once, uninstall};
use crate::cni::plugin;
use crate::config::Node;
use crate::config::cni::{Installation, environment};
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
    /// Be the CNI plugin, as container runtimes call it (CNI_COMMAND); or put it into this node's chain of plugins.
    Cni(CniArgs),
    /// Print the version.
    Version,
}

#[derive(clap::Args)]
struct CniArgs {
    #[command(subcommand)]
    command: Option<CniCommand>,
}

#[derive(Subcommand)]
enum CniCommand {
    /// Install the plugin: the program, and a configuration that sorts first and ends in it.
    Install {
        #[command(flatten)]
        install: Box<Installation>,
        /// Keep it installed, whatever becomes of the node's configuration, until it is uninstalled.
        #[arg(long)]
        watch: bool,
    },
    /// Release every pod of the node, then remove the configuration and the program.
    Uninstall(Box<Installation>),
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
    // The plugin is run for every pod that begins or ends: nothing is parsed or started that it does not need.
    let name = args.first().map(|program| Path::new(program).file_name().unwrap_or_default().to_owned());
    if name.is_some_and(|name| name == PLUGIN) || args.len() == 2 && args[1] == "cni" {
        return be_plugin();
    }
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
        Command::Cni(CniArgs { command: None }) => return be_plugin(),
        Command::Cni(CniArgs { command: Some(CniCommand::Install { install, watch }) }) => {
            install_plugin(&install, watch)
        }
        Command::Cni(CniArgs { command: Some(CniCommand::Uninstall(install)) }) => uninstall_plugin(&install),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ztunnel: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn be_plugin() -> ExitCode {
    let env = environment();
    if env.command.is_empty() {
        eprintln!("{PLUGIN} {}: a CNI plugin of versions {}", env!("CARGO_PKG_VERSION"), VERSIONS.join(", "));
        eprintln!(
            "A container runtime runs it with CNI_COMMAND set; `ztunnel cni install` puts it into a node's chain."
        );
        return ExitCode::FAILURE;
    }
    let said = plugin::run(env, io::stdin());
    // A runtime that does not listen any more has no use for the answer.
    let _ = io::stdout().write_all(said.stdout.as_bytes());
    if said.success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn install_plugin(install: &Installation, watch: bool) -> anyhow::Result<()> {
    let settings = install.settings()?;
    if watch {
        Keeper::start(settings, |report| eprintln!("ztunnel cni install: {report}"))?.wait();
        return Ok(());
    }
    begin(&settings).map_err(anyhow::Error::msg)?;
    let report = once(&settings, &mut Memory::default(), Instant::now());
    anyhow::ensure!(matches!(report.state, State::Installed(_) | State::Kept(_)), "{report}");
    println!("{report}");
    Ok(())
}

fn uninstall_plugin(install: &Installation) -> anyhow::Result<()> {
    let done = |step: uninstall::Step| println!("{}", step.done());
    uninstall::run(&install.settings()?, &install.proc, done).map_err(anyhow::Error::msg)
}
