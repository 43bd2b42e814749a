//! Promise: what the documents tell people to type does what the documents say.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use e2e::lab::programs_dir;
use e2e::scenario;

/// A command and the lines that it must print, where `…` stands for anything: a line of its own for any lines.
#[derive(Debug, Default, PartialEq)]
struct Step {
    command: String,
    expected: Vec<String>,
}

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
    let page = fs::read_to_string(top.join(page))?;
    let steps = steps(&page);
    assert!(steps.len() >= least, "the page has only {} commands", steps.len());

    // A `lab` that keeps its state out of the way of a lab that somebody is using.
    let dir = tempfile::tempdir()?;
    let programs = programs_dir()?;
    let wrapper = dir.path().join("lab");
    let state = dir.path().join("state");
    let (real, state) = (programs.join("lab"), state.display().to_string());
    fs::write(&wrapper, format!("#!/bin/sh\nsub=$1; shift\nexec {} $sub --state {state} \"$@\"\n", real.display()))?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}:{}", dir.path().display(), programs.display(), std::env::var("PATH")?);
    let run = |command: &str| {
        let output = Command::new("sh").args(["-c", command]).current_dir(top).env("PATH", &path).output()?;
        anyhow::Ok((
            output.status,
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
        ))
    };
    let result = steps.iter().try_for_each(|step| {
        let (status, printed) = run(&step.command)?;
        anyhow::ensure!(status.success(), "`{}` ended with {status}:\n{printed}", step.command);
        let lines: Vec<&str> = printed.lines().collect();
        anyhow::ensure!(
            matches(&step.expected, &lines),
            "`{}` printed:\n{printed}\ninstead of {:?}",
            step.command,
            step.expected
        );
        Ok(())
    });
    if result.is_err() {
        run("lab down")?;
    }
    result
}

/// The commands of the `console` blocks: lines after `$ `, with a here-document if one begins.
fn steps(page: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let (mut inside, mut document) = (false, false);
    for line in page.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if !inside {
        } else if let Some(command) = line.strip_prefix("$ ") {
            document = command.contains("<<END");
            steps.push(Step { command: command.to_owned(), expected: Vec::new() });
        } else if let Some(step) = steps.last_mut() {
            if document {
                step.command = format!("{}\n{line}", step.command);
                document = line != "END";
            } else {
                step.expected.push(line.to_owned());
            }
        }
    }
    steps
}

fn matches(expected: &[String], lines: &[&str]) -> bool {
    match expected.split_first() {
        None => lines.is_empty(),
        Some((first, rest)) if first == "…" => (0..=lines.len()).any(|skipped| matches(rest, &lines[skipped..])),
        Some((first, rest)) => {
            lines.split_first().is_some_and(|(line, lines)| line_matches(first, line) && matches(rest, lines))
        }
    }
}

/// The parts between `…` appear in this order, the first one at the beginning.
fn line_matches(expected: &str, line: &str) -> bool {
    let mut rest = line;
    for (index, part) in expected.split('…').enumerate() {
        match rest.find(part.trim()) {
            Some(at) if index > 0 || at == 0 || part.starts_with(' ') => rest = &rest[at + part.trim().len()..],
            _ => return false,
        }
    }
    rest.is_empty() || expected.ends_with('…')
}

#[test]
fn a_page_that_is_wrong_is_found_out() {
    let page = "```console\n$ a <<END\nx\nEND\nout …\n$ b\n```\n```sh\n$ c\n```";
    let found = steps(page);
    assert_eq!(found.len(), 2);
    assert_eq!(found[0], Step { command: "a <<END\nx\nEND".into(), expected: vec!["out …".into()] });
    let page = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    for (expected, lines, good) in [
        (page(&["a", "…", "c …"]), vec!["a", "b", "b", "c d"], true),
        (page(&["a", "…", "c"]), vec!["a", "b", "c d"], false),
        (page(&["200 …"]), vec!["failed: 200"], false),
        (page(&[]), vec!["noise"], false),
        (page(&["x … z"]), vec!["x y z"], true),
    ] {
        assert_eq!(matches(&expected, &lines), good, "{expected:?} {lines:?}");
    }
}
