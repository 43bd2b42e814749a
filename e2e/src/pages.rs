//! Pages as tests read them: the commands that a page tells people to type, and what it says that they print.
//!
//! Commands are in `console` blocks, after `$ `; a here-document that ends with `END` belongs to its command. Whoever follows a page
//! says where its commands run. Limits: what a page tells in words is not checked.

use std::fs;
use std::path::Path;
use std::process::Output;

/// A command and the lines that it must print, where `…` stands for anything: a line of its own for any lines.
#[derive(Debug, Default, PartialEq)]
pub struct Step {
    /// What is typed.
    pub command: String,
    /// What it must print.
    pub expected: Vec<String>,
}

/// The steps of a page of the tree, of which there must be at least `least`: a page whose blocks nobody can read would be followed
/// without a word.
pub fn read(page: &str, least: usize) -> anyhow::Result<Vec<Step>> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or_else(|| Path::new("/"));
    let steps = steps(&fs::read_to_string(top.join(page))?);
    anyhow::ensure!(steps.len() >= least, "{page} has only {} commands", steps.len());
    Ok(steps)
}

/// Runs the steps one after another by `run`.
///
/// # Errors
/// The first command that fails, or that prints something else than the page says.
pub fn follow(steps: &[Step], mut run: impl FnMut(&str) -> anyhow::Result<Output>) -> anyhow::Result<()> {
    for step in steps {
        let output = run(&step.command)?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        eprintln!("$ {}\n{printed}", step.command);
        let status = output.status;
        anyhow::ensure!(status.success(), "`{}` ended with {status}:\n{printed}", step.command);
        let lines: Vec<&str> = printed.lines().collect();
        anyhow::ensure!(
            matches(&step.expected, &lines),
            "`{}` printed:\n{printed}\ninstead of {:?}",
            step.command,
            step.expected
        );
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use crate::pages::{Step, matches, steps};

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
}
