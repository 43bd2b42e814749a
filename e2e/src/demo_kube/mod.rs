//! The demonstration on a real cluster: the mesh is installed as a user installs it, a namespace is labelled while its
//! pods run, and then what clusters do to a mesh is done to it: a node reboots, the mesh is upgraded and removed.
//!
//! Every claim is checked by what clients got, by bytes on the link between the nodes, or by what the API server says;
//! each compares with what was seen before. Limits: as the cluster's ([`cluster`]); it takes some minutes.

mod shop;
mod steps;

use std::collections::BTreeMap;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::Context;

use crate::cluster;
use crate::cluster::Cluster;
use crate::cluster::Plan;
use crate::cluster::machine;
use crate::demo::judge;
use crate::demo_kube::shop::World;
use crate::lab::programs_dir;

/// Arguments of `lab demo-kube`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Break a part of the proxy on purpose: `weights`.
    #[arg(long = "break", env = "BREAK")]
    broken: Option<String>,
    /// Leave the cluster running afterwards.
    #[arg(long, env = "KEEP", value_parser = clap::builder::FalseyValueParser::new())]
    keep: bool,
    /// The cluster's folder.
    #[arg(long, default_value = cluster::cli::FOLDER)]
    state: PathBuf,
    /// Where the list of results goes [default: demo-kube.json in the parent of the programs' directory].
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Runs the demonstration; true when every step held, or with `--break` when exactly the right ones did not.
pub fn main(options: &Options) -> anyhow::Result<bool> {
    let began = Instant::now();
    let programs = programs_dir()?;
    ensure_tools()?;
    let broken = options.broken.as_deref().filter(|part| !part.is_empty());
    if let Some(part) = broken {
        let parts = steps::PARTS;
        anyhow::ensure!(parts.contains(&part), "{part} cannot be broken here; choose one of {}", parts.join(", "));
        println!("With `{part}` broken on purpose: the steps that rest on it must fail, and only they.\n");
    }
    println!("Starting a cluster of two nodes …");
    let settings = machine::settings();
    let plan = Plan { folder: options.state.clone(), nodes: 2, tied: !options.keep, sabotaged: broken.is_some() };
    let mut say = |text: &str| println!("  {:5.1} s  {text}", began.elapsed().as_secs_f64());
    let cluster = Cluster::up(&plan, &mut say)?;
    let mut world = World::new(cluster, broken);
    let outcomes = judge::run(steps::STEPS, steps::FIRST, |show| show(&mut world));
    let mut cluster = world.cluster;
    if options.keep {
        cluster.leave();
        let state = options.state.display();
        println!(
            "\nThe cluster stays up. Try:  lab cluster exec --state {state} control-plane -- kubectl get pods -A -o wide"
        );
    } else {
        cluster.down()?;
    }
    let mut outcomes = outcomes?;
    if !options.keep {
        let left = judge::step("nothing-left", "The cluster ends, and the machine is as it was.", || {
            nothing_left(&options.state, &settings)
        });
        outcomes.push(left);
    }
    let out = options.out.clone().unwrap_or_else(|| programs.parent().unwrap_or(&programs).join("demo-kube.json"));
    judge::write(&outcomes, &out)?;
    let well = judge::summary(steps::STEPS, &outcomes, broken, began);
    println!("The list is in {}.", out.display());
    Ok(well)
}

/// Fails when mounts of the cluster are left, or a setting of the kernel is another one than before.
fn nothing_left(state: &Path, before: &BTreeMap<String, String>) -> anyhow::Result<String> {
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    let own = state.display().to_string();
    let left: Vec<&str> = mounts.lines().filter(|line| line.contains(&own)).collect();
    anyhow::ensure!(left.is_empty(), "mounts are left: {left:?}");
    let now = machine::settings();
    anyhow::ensure!(now == *before, "the kernel's settings were {before:?} and are {now:?}");
    Ok(format!("no process, mount or cgroup; {} settings that a kubelet changes are as before", now.len()))
}

/// Makes sure of the packages and of Kubernetes' own programs, in the ways that the tree has for both.
fn ensure_tools() -> anyhow::Result<()> {
    let tree = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    for script in [&[".ci/tools.sh", "kube"][..], &[".ci/kube.sh", "all"]] {
        let Some((program, arguments)) = script.split_first() else { continue };
        let path = tree.join(program);
        if !path.is_file() {
            continue;
        }
        let status = Command::new(&path).args(arguments).current_dir(&tree).status();
        let status = status.with_context(|| format!("{program} cannot be run"))?;
        anyhow::ensure!(status.success(), "{} failed ({status})", script.join(" "));
    }
    Ok(())
}
