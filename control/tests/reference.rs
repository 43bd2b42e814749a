//! docs/reference.md says what the code says about the flags of `control` and `tulle`. `make reference` writes the parts
//! between `<!-- generated:… -->` marks from the code, and this test fails when they differ.

#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use clap::Command;
use clap::CommandFactory as _;

#[test]
fn settings_of_control_in_the_reference_are_those_of_the_code() {
    check("control-settings", &settings(&control::config::Cli::command()));
}

#[test]
fn settings_of_tulle_in_the_reference_are_those_of_the_code() {
    check("tulle-settings", &settings(&control::cli::Cli::command()));
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
fn check(part: &str, expected: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/reference.md");
    // The tests of this file run side by side; the lock makes their updates one after another.
    let lock = fs::File::open(path.parent().unwrap()).unwrap();
    lock.lock().unwrap();
    let page = fs::read_to_string(&path).unwrap();
    let (open, close) = (format!("<!-- generated:{part} -->\n"), "<!-- /generated -->");
    let start = page.find(&open).unwrap_or_else(|| panic!("docs/reference.md has no {open}")) + open.len();
    let end = start + page[start..].find(close).unwrap_or_else(|| panic!("{open} is not closed"));
    if page[start..end] == *expected {
        return;
    }
    assert!(
        std::env::var_os("UPDATE").is_some(),
        "docs/reference.md ({part}) differs from the code; run `make reference`"
    );
    fs::write(&path, format!("{}{expected}{}", &page[..start], &page[end..])).unwrap();
}
