//! docs/reference.md says what the code says about the flags of `control` and `tulle`, docs/install.md about values and rights.
//! `make reference` writes the parts between `<!-- generated:… -->` marks from the code, and this test fails when they differ.

#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use clap::Command;
use clap::CommandFactory as _;

#[test]
fn settings_of_control_in_the_reference_are_those_of_the_code() {
    check("reference.md", "control-settings", &settings(&control::config::Cli::command()));
}

#[test]
fn settings_of_tulle_in_the_reference_are_those_of_the_code() {
    check("reference.md", "tulle-settings", &settings(&control::cli::Cli::command()));
}

#[test]
fn values_of_the_install_page_are_those_of_the_chart() {
    check("install.md", "values", &values());
}

#[test]
fn rights_of_the_install_page_are_those_of_the_roles() {
    let mut table = "| Who | May | Of | Why |\n|---|---|---|---|\n".to_owned();
    for one in control::install::manifests::permissions() {
        let group = if one.group.is_empty() { String::new() } else { format!(" ({})", one.group) };
        let names = if one.names.is_empty() { String::new() } else { format!(" `{}` alone", one.names.join("`, `")) };
        let place = match (one.namespaced, one.names.is_empty()) {
            (false, _) => "",
            (true, true) => " in the own namespace",
            (true, false) => ", in the own namespace",
        };
        let _ = writeln!(
            table,
            "| {} | {} | {}{group}{names}{place} | {} |",
            one.role.trim_start_matches("tulle-"),
            one.verbs.join(", "),
            one.resources.join(", "),
            one.reason
        );
    }
    check("install.md", "rights", &table);
}

/// A table of values.yaml: each value by its path, its default, and the comment above it.
fn values() -> String {
    let mut table = "| Value | Default | Meaning |\n|---|---|---|\n".to_owned();
    let mut path: Vec<(usize, String)> = Vec::new();
    let mut meaning = String::new();
    let mut whole: Option<(usize, String, Vec<String>)> = None;
    let lines = control::install::values::DEFAULTS.lines().chain([""]);
    for line in lines {
        let text = line.trim();
        let depth = line.len() - line.trim_start().len();
        if let Some((at, row, parts)) = &mut whole {
            if depth > *at && !text.is_empty() {
                parts.push(text.to_owned());
                continue;
            }
            let _ = writeln!(table, "{}", row.replace('\u{1}', &format!("`{{{}}}`", parts.join(", "))));
            whole = None;
        }
        if let Some(comment) = text.strip_prefix("# ") {
            meaning = comment.to_owned();
            continue;
        }
        let Some((key, value)) = text.split_once(':') else {
            meaning.clear();
            continue;
        };
        path.retain(|(indent, _)| *indent < depth);
        path.push((depth, key.to_owned()));
        let name: Vec<_> = path.iter().map(|(_, key)| key.as_str()).collect();
        let name = name.join(".");
        match value.trim() {
            "" if meaning.is_empty() => {}
            "" => whole = Some((depth, format!("| `{name}` | \u{1} | {meaning} |"), Vec::new())),
            value => {
                assert!(!meaning.is_empty(), "values.yaml says nothing of {name}");
                let _ = writeln!(table, "| `{name}` | `{value}` | {meaning} |");
            }
        }
        meaning.clear();
    }
    table
}

/// A table of all commands of a program.
fn settings(program: &Command) -> String {
    let mut table = "| Command | Flag | Variable | Default | Meaning |\n|---|---|---|---|---|\n".to_owned();
    let name = program.get_name();
    rows(&mut table, name, program);
    for command in program.get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = format!("{name} {}", command.get_name());
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(table, "| `{name}` | | | | **{about}** |");
        rows(&mut table, &name, command);
    }
    table
}

fn rows(table: &mut String, name: &str, command: &Command) {
    for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
        let id = argument.get_id().as_str();
        let flag = argument.get_long().map_or_else(|| format!("<{id}>"), |long| format!("--{long}"));
        let variable = argument.get_env().map(|name| format!("`{}`", name.to_string_lossy())).unwrap_or_default();
        let values: Vec<_> = argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        let default = if values.is_empty() { String::new() } else { format!("`{}`", values.join(",")) };
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(table, "| `{name}` | `{flag}` | {variable} | {default} | {help} |");
    }
}

/// Compares one part of the page, or writes it with `UPDATE` set.
fn check(page_name: &str, part: &str, expected: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs").join(page_name);
    // The tests of this file run side by side; the lock makes their updates one after another.
    let lock = fs::File::open(path.parent().unwrap()).unwrap();
    lock.lock().unwrap();
    let page = fs::read_to_string(&path).unwrap();
    let (open, close) = (format!("<!-- generated:{part} -->\n"), "<!-- /generated -->");
    let start = page.find(&open).unwrap_or_else(|| panic!("docs/{page_name} has no {open}")) + open.len();
    let end = start + page[start..].find(close).unwrap_or_else(|| panic!("{open} is not closed"));
    if page[start..end] == *expected {
        return;
    }
    assert!(
        std::env::var_os("UPDATE").is_some(),
        "docs/{page_name} ({part}) differs from the code; run `make reference`"
    );
    fs::write(&path, format!("{}{expected}{}", &page[..start], &page[end..])).unwrap();
}
