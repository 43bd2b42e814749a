//! `lab cluster`: a Kubernetes cluster for people to try things in.
//!
//! The demonstration and tests use the same through [`Cluster`]. Limits: no decisions here.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Subcommand;

use crate::cluster::Cluster;
use crate::cluster::Plan;
use crate::cluster::dns;
use crate::cluster::layout;
use crate::cluster::machine;

/// Where a cluster is when nobody says.
pub const FOLDER: &str = "/var/tmp/tulle-cluster";

/// `lab cluster …`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a cluster, and wait until its nodes are ready.
    Up {
        /// Its folder.
        #[arg(long, default_value = FOLDER)]
        state: PathBuf,
        /// Number of nodes.
        #[arg(long, default_value_t = 2)]
        nodes: u16,
    },
    /// Run a command on `control-plane` (where kubectl finds the cluster), `node-1`, … or `outside`.
    Exec {
        /// The cluster's folder.
        #[arg(long, default_value = FOLDER)]
        state: PathBuf,
        /// Machine.
        place: String,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
    /// Show nodes and pods.
    Status {
        /// The cluster's folder.
        #[arg(long, default_value = FOLDER)]
        state: PathBuf,
    },
    /// Cut a node's power and start it again.
    Reboot {
        /// The cluster's folder.
        #[arg(long, default_value = FOLDER)]
        state: PathBuf,
        /// node-1, …
        node: String,
    },
    /// End the cluster and remove its folder.
    Down {
        /// Its folder.
        #[arg(long, default_value = FOLDER)]
        state: PathBuf,
    },
    /// Make a machine and keep it.
    #[command(hide = true)]
    Keep {
        /// Its folder.
        folder: PathBuf,
        /// End with standard input.
        #[arg(long)]
        tied: bool,
    },
    /// A machine's first process.
    #[command(hide = true)]
    Init {
        /// Its folder.
        folder: PathBuf,
        /// End with standard input.
        #[arg(long)]
        tied: bool,
    },
    /// The cluster's name server.
    #[command(hide = true)]
    Dns(dns::Options),
}

/// Runs one of them.
pub fn main(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Up { state, nodes } => {
            let began = Instant::now();
            let mut say = |text: &str| println!("{:5.1} s  {text}", began.elapsed().as_secs_f64());
            let cluster = Cluster::up(&Plan { folder: state.clone(), nodes, tied: false, sabotaged: false }, &mut say)?;
            cluster.leave();
            println!("Try:  lab cluster exec {} -- kubectl get nodes", layout::CONTROL);
            Ok(())
        }
        Command::Exec { state, place, argv } => {
            let words: Vec<&str> = argv.iter().map(String::as_str).collect();
            let error = Cluster::attach(&state)?.command(&place, &words)?.exec();
            Err(error).with_context(|| format!("{place} cannot be entered"))
        }
        Command::Status { state } => {
            let cluster = Cluster::attach(&state)?;
            print!("{}", cluster.kubectl(&["get", "nodes", "-o", "wide"])?);
            print!("\n{}", cluster.kubectl(&["get", "pods", "-A", "-o", "wide"])?);
            Ok(())
        }
        Command::Reboot { state, node } => {
            let mut cluster = Cluster::attach(&state)?;
            cluster.power_off(&node)?;
            cluster.power_on(&node)?;
            cluster.await_ready(&node)?;
            cluster.leave();
            Ok(())
        }
        Command::Down { state } => Cluster::attach(&state)?.down(),
        Command::Keep { folder, tied } => machine::keep(&folder, tied),
        Command::Init { folder, tied } => machine::init(&folder, tied),
        Command::Dns(options) => dns::serve(&options),
    }
}
