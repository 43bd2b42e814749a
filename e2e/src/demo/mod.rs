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
mod requests;
mod steps;

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::Context;
use serde::Serialize;

use crate::lab::Lab;
use crate::lab::LabConfig;
use crate::lab::programs_dir;
use crate::state::Paths;
use crate::topology;

/// Arguments of `lab demo`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Break a part of the proxy on purpose: `rules`, `authz`, `tls`, `weights`, `jwt`, `breaker`,
    /// `gateway`, `sni` or `fence`.
    #[arg(long = "break", env = "BREAK")]
    broken: Option<String>,
    /// Leave the lab running afterwards.
    #[arg(long, env = "KEEP", value_parser = clap::builder::FalseyValueParser::new())]
    keep: bool,
    /// Where the list of results goes [default: demo.json in the parent of the programs' directory].
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Result of a step, as in `demo.json`.
#[derive(Clone, Debug, Serialize)]
struct Outcome {
    step: &'static str,
    held: bool,
    detail: String,
}

/// One step.
struct Step {
    /// Name, stable.
    name: &'static str,
    /// What is claimed.
    claim: &'static str,
    /// Parts of the proxy on which the claim rests: broken, they must turn the step red.
    rests_on: &'static [&'static str],
    /// Shows it: what was seen, or why the claim does not hold.
    show: fn(&Lab) -> anyhow::Result<String>,
}

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
    let outcomes = run(&lab)?;
    let out = options.out.clone().unwrap_or_else(|| programs.parent().unwrap_or(&programs).join("demo.json"));
    std::fs::write(&out, serde_json::to_string_pretty(&outcomes)?)
        .with_context(|| format!("{} cannot be written", out.display()))?;
    let well = summary(&outcomes, broken, began);
    println!("The list is in {}.", out.display());
    if options.keep {
        hints(&lab);
        lab.leave();
    }
    Ok(well)
}

fn run(lab: &Lab) -> anyhow::Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for step in steps::STEPS {
        println!("\n{}", step.claim);
        let began = Instant::now();
        let (held, detail) = match (step.show)(lab) {
            Ok(detail) => (true, detail),
            Err(error) => (false, format!("{error:#}")),
        };
        let sign = if held { "✓" } else { "✗" };
        println!("  {sign} {detail}  ({:.1} s)", began.elapsed().as_secs_f64());
        outcomes.push(Outcome { step: step.name, held, detail });
        if step.name == steps::FIRST && !held {
            anyhow::bail!("the shop does not run, so there is nothing to show; logs: {}", lab.paths().logs().display());
        }
    }
    Ok(outcomes)
}

fn summary(outcomes: &[Outcome], broken: Option<&str>, began: Instant) -> bool {
    let held = outcomes.iter().filter(|outcome| outcome.held).count();
    println!("\n{held} of {} steps held after {:.0} s.", outcomes.len(), began.elapsed().as_secs_f64());
    let wrong = misjudged(outcomes, broken);
    for (step, expected) in &wrong {
        let expected = if *expected { "hold" } else { "fail" };
        println!("  ✗ `{step}` should {expected}");
    }
    match (broken, wrong.is_empty()) {
        (Some(part), true) => println!("Exactly the steps that rest on `{part}` failed: the demonstration can fail."),
        (Some(part), false) => println!("With `{part}` broken other steps failed than those that rest on it."),
        (None, _) => {}
    }
    wrong.is_empty()
}

/// Steps that did not end as they should, and whether they should have held.
fn misjudged(outcomes: &[Outcome], broken: Option<&str>) -> Vec<(&'static str, bool)> {
    let should_hold = |name: &str| {
        let step = steps::STEPS.iter().find(|step| step.name == name);
        !step.is_some_and(|step| broken.is_some_and(|part| step.rests_on.contains(&part)))
    };
    outcomes
        .iter()
        .map(|outcome| (outcome.step, outcome.held, should_hold(outcome.step)))
        .filter(|(_, held, should)| held != should)
        .map(|(step, _, should)| (step, should))
        .collect()
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

#[cfg(test)]
mod tests {
    use crate::demo::Outcome;
    use crate::demo::misjudged;
    use crate::demo::steps;

    #[test]
    fn a_sabotaged_run_is_right_only_when_exactly_its_own_steps_fail() {
        let run = |red: &dyn Fn(&crate::demo::Step) -> bool| -> Vec<Outcome> {
            let outcome =
                |step: &crate::demo::Step| Outcome { step: step.name, held: !red(step), detail: String::new() };
            steps::STEPS.iter().map(outcome).collect()
        };
        assert!(misjudged(&run(&|_| false), None).is_empty());
        for part in steps::PARTS {
            assert!(misjudged(&run(&|step| step.rests_on.contains(&part)), Some(part)).is_empty());
            assert!(!misjudged(&run(&|_| false), Some(part)).is_empty(), "{part}: a run that stays green is wrong");
            assert!(!misjudged(&run(&|_| true), Some(part)).is_empty(), "{part}: so is one that is all red");
        }
    }
}
