//! The demonstration: a small shop on two nodes is put into the mesh while it runs, and every claim is checked on the
//! spot, by bytes on the link, by what clients got, or by what the proxies logged.
//!
//! A step that cannot fail proves nothing, so the same program runs against a proxy broken on purpose (`--break`) and
//! then expects exactly the steps that rest on the broken part to fail. Limits: it needs no Kubernetes and no network;
//! it takes under a minute.

mod breaker;
mod canary;
mod egress;
mod gateway;
pub mod judge;
mod requests;
mod steps;

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::Context;

use crate::lab::Lab;
use crate::lab::LabConfig;
use crate::lab::programs_dir;
use crate::state::Paths;
use crate::topology;

/// Arguments of `lab demo`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Break a part of the proxy on purpose: `rules`, `authz`, `tls`, `weights`, `mirror`,
    /// `retries`, `jwt`, `breaker`, `gateway`, `sni` or `fence`.
    #[arg(long = "break", env = "BREAK")]
    broken: Option<String>,
    /// Leave the lab running afterwards.
    #[arg(long, env = "KEEP", value_parser = clap::builder::FalseyValueParser::new())]
    keep: bool,
    /// Where the list of results goes [default: demo.json in the parent of the programs' directory].
    #[arg(long)]
    out: Option<PathBuf>,
}

/// One step of the demonstration.
type Step = judge::Step<fn(&Lab) -> anyhow::Result<String>>;

/// Runs the demonstration; true when every step held, or with `--break` when exactly the right ones did not.
pub fn main(options: &Options) -> anyhow::Result<bool> {
    let began = Instant::now();
    ensure_tools()?;
    let broken = options.broken.as_deref().filter(|part| !part.is_empty());
    let programs = programs_dir()?;
    let mut config = LabConfig::default();
    if options.keep {
        // A place that can be typed; otherwise one that nobody else uses.
        config.state = Some(Paths::default_dir().with_file_name("tulle-demo"));
    }
    if let Some(part) = broken {
        anyhow::ensure!(
            steps::PARTS.contains(&part),
            "{part} cannot be broken; choose one of {}",
            steps::PARTS.join(", ")
        );
        let program = programs.join("ztunnel-sabotage");
        anyhow::ensure!(
            program.is_file(),
            "{} does not exist; build it with `cargo build -p ztunnel --features sabotage --bin ztunnel-sabotage`",
            program.display()
        );
        config.programs.insert("ztunnel".into(), program);
        config = config.env("ztunnel", "TULLE_BREAK", part);
        println!("With `{part}` broken on purpose: the steps that rest on it must fail, and only they.\n");
    }
    println!("Starting two nodes with a small shop …");
    let lab = Lab::start(&config, !options.keep)?;
    let outcomes = judge::run(steps::STEPS, steps::FIRST, |show| show(&lab)).with_context(|| {
        format!("the shop does not run, so there is nothing to show; logs: {}", lab.paths().logs().display())
    })?;
    let out = options.out.clone().unwrap_or_else(|| programs.parent().unwrap_or(&programs).join("demo.json"));
    judge::write(&outcomes, &out)?;
    let well = judge::summary(steps::STEPS, &outcomes, broken, began);
    println!("The list is in {}.", out.display());
    if options.keep {
        hints(&lab);
        lab.leave();
    }
    Ok(well)
}

fn hints(lab: &Lab) {
    let state = lab.paths().0.display();
    println!(
        "\nThe lab stays up. Try:\n  lab status --state {state}\n  lab exec --state {state} shop/frontend -- shop call http://cart/\n  \
         lab logs --state {state} node-1\n  lab exec --state {state} control -- tulle status\n  lab down --state {state}"
    );
}

/// Installs what is missing where that is expected of a program run by root on a Debian-like system; else says how.
fn ensure_tools() -> anyhow::Result<()> {
    let Some(missing) = topology::missing_tools() else { return Ok(()) };
    let debian = std::path::Path::new("/usr/bin/apt-get").is_file();
    anyhow::ensure!(nix::unistd::geteuid().is_root() && debian, "{missing}");
    println!("{missing}; doing so now");
    for arguments in [&["update", "-q"][..], &["install", "-y", "-q", "iproute2", "nftables"]] {
        let status = Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive").status()?;
        anyhow::ensure!(status.success(), "apt-get {} failed ({status}); {missing}", arguments.join(" "));
    }
    topology::missing_tools().map_or(Ok(()), |missing| Err(anyhow::anyhow!("{missing}")))
}
