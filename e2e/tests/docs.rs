//! Promise: what the documents tell people to type does what the documents say.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use e2e::lab::programs_dir;
use e2e::pages;
use e2e::scenario;

#[test]
fn the_commands_of_the_opt_in_page_do_what_it_says() -> anyhow::Result<()> {
    follow("docs/opt-in.md", 10)
}

#[test]
fn the_commands_of_the_identity_page_do_what_it_says() -> anyhow::Result<()> {
    follow("docs/identity.md", 6)
}

#[test]
fn the_commands_of_the_upgrading_page_do_what_it_says() -> anyhow::Result<()> {
    follow("docs/upgrading.md", 4)
}

#[test]
fn the_commands_of_the_requests_page_do_what_it_says() -> anyhow::Result<()> {
    follow("docs/requests.md", 10)
}

#[test]
fn the_commands_of_the_resilience_page_do_what_it_says() -> anyhow::Result<()> {
    follow("docs/resilience.md", 7)
}

#[test]
fn the_dashboard_and_the_alerts_ask_for_metrics_that_there_are() -> anyhow::Result<()> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or_else(|| Path::new("/"));
    let mut code = String::new();
    for file in ["metrics.rs", "http.rs", "dns.rs", "breakers.rs"] {
        code.push_str(&fs::read_to_string(top.join("ztunnel/src/telemetry").join(file))?);
    }
    // Control's are written without their prefix.
    let control = fs::read_to_string(top.join("control/src/admin/metrics.rs"))?;
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for (file, least) in [("grafana-dashboard.json", 18), ("alerts.yaml", 6)] {
        let text = fs::read_to_string(top.join("deploy/observability").join(file))?;
        let names = text.split(|c| !word(c)).filter(|name| name.starts_with("istio_") || name.starts_with("tulle_"));
        let names: std::collections::BTreeSet<&str> =
            names.map(|name| name.trim_end_matches("_bucket").trim_end_matches("_total")).collect();
        anyhow::ensure!(names.len() >= least, "{file}: only {names:?}");
        for name in names {
            let known = match name.strip_prefix("tulle_control_") {
                Some(name) => control.contains(&format!("\"{name}\"")),
                None => code.contains(&format!("\"{name}\"")),
            };
            anyhow::ensure!(known, "{file}: nobody has the metric {name}");
        }
    }
    Ok(())
}

/// Runs the commands of a page, of which there are at least `least`.
fn follow(page: &str, least: usize) -> anyhow::Result<()> {
    if let Err(why) = scenario::possible() {
        assert!(std::env::var_os("CI").is_none(), "no lab on this machine: {why}");
        eprintln!("SKIPPED: no lab on this machine: {why}");
        return Ok(());
    }
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or_else(|| Path::new("/"));
    let steps = pages::read(page, least)?;
    // A `lab` that keeps its state out of the way of a lab that somebody is using.
    let dir = tempfile::tempdir()?;
    let programs = programs_dir()?;
    let wrapper = dir.path().join("lab");
    let state = dir.path().join("state");
    let (real, state) = (programs.join("lab"), state.display().to_string());
    fs::write(&wrapper, format!("#!/bin/sh\nsub=$1; shift\nexec {} $sub --state {state} \"$@\"\n", real.display()))?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}:{}", dir.path().display(), programs.display(), std::env::var("PATH")?);
    let run =
        |command: &str| Ok(Command::new("sh").args(["-c", command]).current_dir(top).env("PATH", &path).output()?);
    let result = pages::follow(&steps, run);
    if result.is_err() {
        run("lab down")?;
    }
    result
}
