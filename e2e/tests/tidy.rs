//! Holds the shape of the tree: what review would otherwise have to remember, as plain text checks over every source file.
//!
//! The layer tables come from ARCHITECTURE.md, so the document cannot say one thing and the code another. Standard library
//! only, and textual: code inside macros and paths through re-exports can escape it, which is the price of running in a
//! second. Every checker is a function of text and is itself tested on bad input at the end of this file.

#![allow(clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::path::PathBuf;

/// Crates whose sources are checked.
const CRATES: &[&str] = &["proto", "certs", "control", "ztunnel", "e2e"];
/// Crates with a layer table.
const LAYERED: &[&str] = &["ztunnel", "control"];

/// Lines of a file, tests included, above which it needs an entry below.
const FILE_LINES: usize = 700;
/// Files that are longer, with their length. This list may only shrink, and so may its numbers.
const LONG_FILES: &[(&str, usize)] = &[];

/// Lines of a function, from `fn` to its closing brace, above which it needs an entry below.
const FUNCTION_LINES: usize = 100;
/// Functions that are longer, as `file:function`. This list may only shrink.
const LONG_FUNCTIONS: &[&str] = &[];

/// Files and folders that decide: one moment's facts in, a value out. Nothing in them may wait.
const PURE: &[&str] = &[
    "ztunnel/src/outcome.rs",
    "ztunnel/src/policy",
    "ztunnel/src/lb",
    "ztunnel/src/dns/zone.rs",
    "ztunnel/src/inbound/decide.rs",
    "ztunnel/src/outbound/decide.rs",
    "ztunnel/src/outbound/gateway.rs",
    "ztunnel/src/gateway/decide.rs",
    "ztunnel/src/capture/rules.rs",
    "ztunnel/src/cluster/plan.rs",
    "ztunnel/src/cluster/view.rs",
    "ztunnel/src/app/cluster/state.rs",
    "control/src/model",
    "control/src/resource",
    "control/src/translate",
    "control/src/ca/grant.rs",
];

/// External crates that only some places may name: a new place is a decision, not an accident.
const FENCES: &[(&str, &str, &[&str])] = &[
    ("ztunnel", "h2::", &["hbone", "http", "relay", "inbound", "outbound", "gateway"]),
    ("ztunnel", "hyper::", &["http", "inbound", "outbound", "gateway", "admin"]),
    ("ztunnel", "nix::", &["base", "capture", "relay", "app"]),
    ("ztunnel", "kube::", &["cluster"]),
    ("ztunnel", "k8s_openapi::", &["cluster"]),
    ("ztunnel", "tonic::", &["xds", "identity"]),
    ("control", "tonic::", &["authn", "stream", "xds", "ca", "nodes", "app"]),
    ("control", "notify::", &["source"]),
    ("control", "kube::", &["cluster", "source", "status", "install", "cli"]),
    ("control", "k8s_openapi::", &["cluster", "source", "status", "install"]),
];

/// Words that say nothing about a thing.
const EMPTY_WORDS: &[&str] = &["Manager", "Helper", "Util"];

/// A source file.
struct Source {
    /// From the top of the tree, with `/`.
    path: String,
    text: String,
}

#[test]
fn imports_follow_the_layer_tables() {
    let architecture = read("ARCHITECTURE.md");
    let mut wrong = Vec::new();
    for name in LAYERED {
        let rows = table(&architecture, name).unwrap_or_else(|error| panic!("{error}"));
        wrong.extend(check_table(name, &rows));
        let sources = sources(&[&format!("{name}/src")]);
        wrong.extend(check_modules(name, &rows, &sources));
        for source in &sources {
            let Some(module) = module_of(name, &source.path) else { continue };
            wrong.extend(check_imports(&source.path, &source.text, module, &rows));
        }
    }
    report(&wrong);
}

#[test]
fn every_source_file_explains_itself() {
    let mut wrong = Vec::new();
    for source in all_sources() {
        // A tests.rs is explained by the module that it tests; a test program by one sentence and its names.
        let sentences = match &source.path {
            path if path.ends_with("/tests.rs") => 0,
            path if path.contains("/tests/") => 1,
            _ => 2,
        };
        wrong.extend(check_header(&source.path, &source.text, sentences));
    }
    report(&wrong);
}

#[test]
fn files_and_functions_stay_readable() {
    let mut wrong = Vec::new();
    let sources = all_sources();
    for source in &sources {
        let entry = LONG_FILES.iter().find(|(path, _)| *path == source.path).map(|(_, lines)| *lines);
        wrong.extend(check_length(&source.path, source.text.lines().count(), entry));
        // A table of cases is as long as its cases.
        if !source.path.ends_with("/tests.rs") && !source.path.contains("/tests/") {
            wrong.extend(check_functions(&source.path, &source.text, LONG_FUNCTIONS));
        }
    }
    for (path, _) in LONG_FILES {
        if !sources.iter().any(|source| source.path == *path) {
            wrong.push(format!("LONG_FILES names {path}, which does not exist; remove the entry"));
        }
    }
    report(&wrong);
}

#[test]
fn nothing_is_left_for_later() {
    let mut wrong = Vec::new();
    for source in all_sources() {
        wrong.extend(check_leftovers(&source.path, &source.text));
    }
    report(&wrong);
}

#[test]
fn names_say_something() {
    let mut wrong = Vec::new();
    for source in all_sources() {
        wrong.extend(check_names(&source.path, &source.text));
    }
    report(&wrong);
}

#[test]
fn imports_are_one_line_a_parent() {
    let mut wrong = Vec::new();
    for source in all_sources() {
        // A crate without layers has its items at the root.
        if LAYERED.iter().any(|name| module_of(name, &source.path).is_some()) {
            wrong.extend(check_groups(&source.path, &source.text));
        }
    }
    report(&wrong);
}

#[test]
fn decisions_never_wait() {
    let mut wrong = Vec::new();
    for source in all_sources() {
        if PURE.iter().any(|pure| source.path == *pure || source.path.starts_with(&format!("{pure}/"))) {
            wrong.extend(check_pure(&source.path, &source.text));
        }
    }
    for pure in PURE {
        if !root().join(pure).exists() {
            wrong.push(format!("PURE names {pure}, which does not exist; correct the list"));
        }
    }
    report(&wrong);
}

#[test]
fn external_crates_stay_behind_their_fences() {
    let mut wrong = Vec::new();
    for source in all_sources() {
        for (name, path, allowed) in FENCES {
            if let Some(module) = module_of(name, &source.path) {
                wrong.extend(check_fence(&source.path, &source.text, module, path, allowed));
            }
        }
    }
    report(&wrong);
}

#[test]
fn every_testdata_file_is_used() {
    let mut wrong = Vec::new();
    for name in CRATES {
        let code: String = rust_below(name).into_iter().map(|source| source.text).collect();
        for file in files(&root().join(name)) {
            if file.contains("/testdata/") && !is_used(&file, &code) {
                wrong.push(format!("{file} is used by no test; use it or remove it"));
            }
        }
    }
    report(&wrong);
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut wrong = Vec::new();
    let mut documents = vec![];
    for entry in fs::read_dir(root()).expect("the tree can be listed").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".md") {
            documents.push(name);
        }
    }
    for folder in ["docs", "deploy", "fuzz"] {
        documents.extend(files(&root().join(folder)).into_iter().filter(|file| file.ends_with(".md")));
    }
    for document in documents {
        let text = read(&document);
        let folder = root().join(&document).parent().map(Path::to_path_buf).unwrap_or_default();
        for link in links(&text) {
            if !folder.join(&link).exists() {
                wrong.push(format!("{document}: the link to {link} leads nowhere"));
            }
        }
    }
    report(&wrong);
}

// The checkers. Each returns one sentence a fault: where, what, and what to do.

/// One row of a layer table.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    module: String,
    imports: Vec<String>,
}

/// The table between `<!-- layers:NAME -->` and `<!-- /layers -->`.
fn table(document: &str, name: &str) -> Result<Vec<Row>, String> {
    let open = format!("<!-- layers:{name} -->");
    let (_, rest) = document.split_once(&open).ok_or_else(|| format!("ARCHITECTURE.md has no {open}"))?;
    let (body, _) = rest.split_once("<!-- /layers -->").ok_or_else(|| format!("{open} is not closed"))?;
    let mut rows = Vec::new();
    // The first two lines are the heading and its rule.
    for line in body.lines().filter(|line| line.starts_with('|')).skip(2) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [module, _, imports] = cells[..] else {
            return Err(format!("layers:{name}: {line:?} has {} cells instead of 3", cells.len()));
        };
        let imports = imports.split([',', ' ']).map(|word| word.trim_matches('`')).filter(|word| !word.is_empty());
        rows.push(Row {
            module: module.trim_matches('`').to_owned(),
            imports: imports.filter(|word| *word != "—").map(str::to_owned).collect(),
        });
    }
    if rows.is_empty() { Err(format!("layers:{name} has no rows")) } else { Ok(rows) }
}

/// Imports in the table point to rows above.
fn check_table(name: &str, rows: &[Row]) -> Vec<String> {
    let mut above: BTreeSet<&str> = BTreeSet::new();
    let mut wrong = Vec::new();
    for row in rows {
        for import in &row.imports {
            if !above.contains(import.as_str()) {
                wrong.push(format!("layers:{name}: {} may import {import}, which is not above it", row.module));
            }
        }
        if !above.insert(&row.module) {
            wrong.push(format!("layers:{name}: {} has two rows", row.module));
        }
    }
    wrong
}

/// Rows and modules are the same, and `lib.rs` lists them in the order of the table.
fn check_modules(name: &str, rows: &[Row], sources: &[Source]) -> Vec<String> {
    let on_disk: BTreeSet<&str> = sources.iter().filter_map(|source| module_of(name, &source.path)).collect();
    let in_table: BTreeSet<&str> = rows.iter().map(|row| row.module.as_str()).collect();
    let mut wrong: Vec<String> = on_disk
        .difference(&in_table)
        .map(|module| format!("{name}/src/{module} has no row in ARCHITECTURE.md; add one where it belongs"))
        .collect();
    wrong.extend(in_table.difference(&on_disk).map(|module| {
        format!("ARCHITECTURE.md has a row {module}, but {name}/src has no such module; remove the row")
    }));
    let lib = sources.iter().find(|source| source.path == format!("{name}/src/lib.rs"));
    let declared: Vec<&str> = lib
        .map(|lib| lib.text.lines().filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod ")).collect())
        .unwrap_or_default();
    let declared: Vec<&str> = declared.into_iter().map(|rest| rest.trim_end_matches(';')).collect();
    let order: Vec<&str> = rows.iter().map(|row| row.module.as_str()).collect();
    if declared != order {
        wrong.push(format!("{name}/src/lib.rs declares {declared:?}; in the order of ARCHITECTURE.md it is {order:?}"));
    }
    wrong
}

/// The top-level module of a file, `None` for the crate's roots.
fn module_of<'a>(name: &str, path: &'a str) -> Option<&'a str> {
    let rest = path.strip_prefix(name)?.strip_prefix("/src/")?;
    let first = rest.split('/').next()?;
    let module = first.strip_suffix(".rs").unwrap_or(first);
    (!matches!(module, "lib" | "main" | "bin")).then_some(module)
}

/// `crate::` paths of a file of `module` stay within its row.
fn check_imports(path: &str, text: &str, module: &str, rows: &[Row]) -> Vec<String> {
    let Some(at) = rows.iter().position(|row| row.module == module) else { return Vec::new() };
    let (row, above) = (&rows[at], &rows[..at]);
    // Tests may build their world with anything below them.
    let is_test = path.ends_with("/tests.rs") || path.contains("/tests/");
    let may = |target: &str| {
        row.imports.iter().any(|import| import == target) || is_test && above.iter().any(|row| row.module == target)
    };
    let mut wrong = Vec::new();
    for (line, code) in code_lines(text) {
        for (_, rest) in code.match_indices("crate::").map(|(at, found)| code.split_at(at + found.len())) {
            let target: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let known = rows.iter().any(|row| row.module == target);
            if known && target != module && !may(&target) {
                wrong.push(format!("{path}:{line}: {module} must not import {target} (ARCHITECTURE.md, layer table)"));
            }
        }
    }
    wrong
}

/// A `//!` header of at least so many sentences.
fn check_header(path: &str, text: &str, least: usize) -> Vec<String> {
    let header: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("//!")).map(str::trim).collect();
    let header = header.join(" ");
    let ends = header.char_indices().filter(|(at, c)| {
        matches!(c, '.' | '!' | '?') && header[at + 1..].chars().next().is_none_or(|next| next == ' ')
    });
    let sentences = ends.count();
    if sentences < least {
        let text = format!(
            "{path}: the //! header has {sentences} sentences; say in {least} or more what it is for and why so"
        );
        return vec![text];
    }
    Vec::new()
}

fn check_length(path: &str, lines: usize, entry: Option<usize>) -> Vec<String> {
    match entry {
        None if lines > FILE_LINES => vec![format!("{path} has {lines} lines; split it, {FILE_LINES} are the limit")],
        Some(most) if lines > most => vec![format!("{path} grew from {most} to {lines} lines; it may only shrink")],
        Some(_) if lines <= FILE_LINES => vec![format!("{path} has {lines} lines; remove it from LONG_FILES")],
        Some(most) if lines + 50 < most => vec![format!("{path} has {lines} lines; lower its number in LONG_FILES")],
        _ => Vec::new(),
    }
}

/// Relies on rustfmt: a function ends with a brace in the column where its line begins.
fn check_functions(path: &str, text: &str, known: &[&str]) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let mut wrong = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let code = line.trim_start();
        let words = ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe", "extern", "\"C\""];
        let mut rest = code.split(' ').skip_while(|word| words.contains(word));
        if rest.next() != Some("fn") {
            continue;
        }
        let name: String = rest.next().unwrap_or("").chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        let closing = format!("{}}}", " ".repeat(indent));
        let Some(length) = lines[start..].iter().position(|line| *line == closing) else { continue };
        let key = format!("{path}:{name}");
        let is_known = known.contains(&key.as_str());
        if length + 1 > FUNCTION_LINES && !is_known {
            let text = format!("{path}:{}: {name} has {} lines; {FUNCTION_LINES} are the limit", start + 1, length + 1);
            wrong.push(text);
        } else if length < FUNCTION_LINES && is_known {
            wrong.push(format!("{key} is short now; remove it from LONG_FUNCTIONS"));
        }
    }
    wrong
}

fn check_leftovers(path: &str, text: &str) -> Vec<String> {
    // Written in two parts, so that this file does not find itself.
    let banned = [
        (concat!("todo", "!("), "finish it"),
        (concat!("unimplemented", "!("), "return an error that says what is not supported"),
        (concat!("#[", "ignore"), "a test runs or does not exist"),
        (concat!("TO", "DO"), "open an issue instead"),
        (concat!("FIX", "ME"), "fix it or open an issue"),
        (concat!("super::", "super"), "name the module from crate::"),
        (concat!("dbg", "!("), "remove it"),
    ];
    let mut wrong = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for (word, advice) in banned {
            if line.contains(word) {
                wrong.push(format!("{path}:{}: {word} is not allowed; {advice}", number + 1));
            }
        }
    }
    wrong
}

fn check_names(path: &str, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let file = path.rsplit('/').next().unwrap_or(path);
    for word in EMPTY_WORDS {
        let lower = word.to_lowercase();
        if file.trim_end_matches(".rs").split('_').any(|part| part == lower || part == format!("{lower}s")) {
            wrong.push(format!("{path}: `{lower}` in a file name says nothing; name what it holds"));
        }
    }
    for (line, code) in code_lines(text) {
        let mut words = code.split_whitespace().skip_while(|word| word.starts_with("pub"));
        let Some("struct" | "enum" | "trait" | "type") = words.next() else { continue };
        let name: String = words.next().unwrap_or("").chars().take_while(|c| c.is_alphanumeric()).collect();
        for word in EMPTY_WORDS {
            if name.contains(word) {
                wrong.push(format!("{path}:{line}: the type {name} is named {word}; name what it is"));
            }
        }
    }
    wrong
}

/// `use crate::{a, b}` hides imports from review and from the check above.
fn check_groups(path: &str, text: &str) -> Vec<String> {
    code_lines(text)
        .filter(|(_, code)| code.trim_start().trim_start_matches("pub ").starts_with("use crate::{"))
        .map(|(line, _)| format!("{path}:{line}: write one `use` for each parent module instead of crate::{{…}}"))
        .collect()
}

fn check_pure(path: &str, text: &str) -> Vec<String> {
    code_lines(text)
        .filter(|(_, code)| code.contains(".await") || code.contains("async fn") || code.contains("async move"))
        .map(|(line, _)| format!("{path}:{line}: a decision must not wait; hand it what it needs"))
        .collect()
}

fn check_fence(path: &str, text: &str, module: &str, external: &str, allowed: &[&str]) -> Vec<String> {
    if allowed.contains(&module) {
        return Vec::new();
    }
    code_lines(text)
        .filter(|(_, code)| {
            code.match_indices(external).any(|(at, _)| {
                // `hyper_h2::` is another crate, and `crate::nix::` is ours.
                !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
            })
        })
        .map(|(line, _)| format!("{path}:{line}: {external} belongs to {allowed:?}; {module} has no business with it"))
        .collect()
}

/// A file is used if its name or stem is in the code, or if the code lists the folder.
fn is_used(file: &str, code: &str) -> bool {
    let name = file.rsplit('/').next().unwrap_or(file);
    let stem = name.split('.').next().unwrap_or(name);
    code.contains(name)
        || code.contains(&format!("\"{stem}\""))
        || (code.contains("testdata") && code.contains("read_dir("))
}

/// Relative targets of Markdown links, without anchors, outside code fences.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        fenced ^= line.starts_with("```");
        if fenced {
            continue;
        }
        for (at, _) in line.match_indices("](") {
            let target: String = line[at + 2..].chars().take_while(|c| *c != ')').collect();
            let target = target.split('#').next().unwrap_or("").to_owned();
            if !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:") {
                found.push(target);
            }
        }
    }
    found
}

/// Lines without comments, numbered from 1. Strings are kept: a path in a string is rare, and suspicious.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(number, line)| {
        let code = match line.find("//") {
            Some(at) if !line[..at].ends_with(':') => &line[..at],
            _ => line,
        };
        (number + 1, code)
    })
}

// The tree.

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Files below a folder, as paths from the top of the tree, sorted. A folder that does not exist has none.
fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                if !path.ends_with("target") {
                    folders.push(path);
                }
            } else if let Ok(path) = path.strip_prefix(root()) {
                found.push(path.to_string_lossy().replace('\\', "/"));
            }
        }
    }
    found.sort();
    found
}

fn sources(folders: &[&str]) -> Vec<Source> {
    let paths = folders.iter().flat_map(|folder| files(&root().join(folder)));
    paths.filter(|path| path.ends_with(".rs")).map(|path| Source { text: read(&path), path }).collect()
}

/// What ships: every `src`, and the integration tests.
fn all_sources() -> Vec<Source> {
    let found: Vec<Source> = CRATES.iter().flat_map(|name| rust_below(name)).collect();
    assert!(found.len() > 50, "only {} source files were found; is the tree where it should be?", found.len());
    found
}

fn rust_below(name: &str) -> Vec<Source> {
    sources(&[
        &format!("{name}/src"),
        &format!("{name}/tests"),
        &format!("{name}/benches"),
        &format!("{name}/build.rs"),
    ])
}

fn report(wrong: &[String]) {
    assert!(wrong.is_empty(), "{} faults:\n{}", wrong.len(), wrong.join("\n"));
}

// Tests of the checkers: a check that cannot fail proves nothing.

const TABLE: &str = "\
<!-- layers:x -->
| Module | Owns | May import |
|---|---|---|
| `base` | sockets | — |
| `state` | facts | base |
| `flow` | handles | base, state |
<!-- /layers -->";

fn rows() -> Vec<Row> {
    table(TABLE, "x").expect("the sample is a table")
}

#[test]
fn a_table_is_read_and_a_broken_one_is_not() {
    let rows = rows();
    assert_eq!(rows.iter().map(|row| row.module.as_str()).collect::<Vec<_>>(), ["base", "state", "flow"]);
    assert_eq!(rows[2].imports, ["base", "state"]);
    assert!(rows[0].imports.is_empty());
    assert!(table(TABLE, "y").is_err());
    assert!(table("<!-- layers:x -->", "x").is_err());
    assert!(table("<!-- layers:x -->\n| a |\n|---|\n| b |\n<!-- /layers -->", "x").is_err());
    assert!(check_table("x", &rows).is_empty());
    let upward = TABLE.replace("| facts | base |", "| facts | flow |");
    assert_eq!(check_table("x", &table(&upward, "x").expect("a table")).len(), 1);
}

#[test]
fn an_import_that_points_up_is_found() {
    for (module, text, faults) in [
        ("state", "use crate::base::Sockets;", 0),
        ("state", "use crate::flow::Shared;", 1),
        ("state", "fn f(_: crate::flow::Shared) {}", 1),
        ("state", "use crate::state::Store;", 0),
        ("base", "use crate::state::Store; // why", 1),
        ("base", "// use crate::state::Store;", 0),
        ("flow", "use crate::{base, state};", 0),
    ] {
        assert_eq!(check_imports("x/src/y.rs", text, module, &rows()).len(), faults, "{module}: {text}");
    }
    assert_eq!(check_groups("a.rs", "use crate::{base, state};\nuse std::{fs, io};").len(), 1);
}

#[test]
fn modules_without_a_row_and_rows_without_a_module_are_found() {
    let source = |path: &str, text: &str| Source { path: path.into(), text: text.into() };
    let lib = source("x/src/lib.rs", "pub mod base;\nmod state;\npub mod flow;");
    let tree = |paths: &[&str]| {
        let mut all: Vec<Source> = paths.iter().map(|path| source(path, "")).collect();
        all.push(source(&lib.path, &lib.text));
        all
    };
    assert!(check_modules("x", &rows(), &tree(&["x/src/base.rs", "x/src/state/mod.rs", "x/src/flow.rs"])).is_empty());
    assert_eq!(check_modules("x", &rows(), &tree(&["x/src/base.rs", "x/src/state/mod.rs"])).len(), 1);
    let extra = tree(&["x/src/base.rs", "x/src/state/mod.rs", "x/src/flow.rs", "x/src/more.rs"]);
    assert_eq!(check_modules("x", &rows(), &extra).len(), 1);
    let mut disorder = tree(&["x/src/base.rs", "x/src/state/mod.rs", "x/src/flow.rs"]);
    disorder[3].text = "pub mod state;\npub mod base;\npub mod flow;".into();
    assert_eq!(check_modules("x", &rows(), &disorder).len(), 1);
    assert_eq!(module_of("x", "x/src/main.rs"), None);
    assert_eq!(module_of("x", "x/src/state/store.rs"), Some("state"));
}

#[test]
fn thin_headers_long_files_and_leftovers_are_found() {
    for (text, faults) in [
        ("//! What it is for. Why it is so.\n", 0),
        ("//! What it is for.\n", 1),
        ("//! Version 1.2 is one thing.\n", 1),
        ("fn main() {}\n", 1),
    ] {
        assert_eq!(check_header("a.rs", text, 2).len(), faults, "{text}");
    }
    for (lines, entry, faults) in [
        (FILE_LINES, None, 0),
        (FILE_LINES + 1, None, 1),
        (FILE_LINES + 1, Some(FILE_LINES + 1), 0),
        (FILE_LINES + 2, Some(FILE_LINES + 1), 1),
        (FILE_LINES, Some(FILE_LINES + 1), 1),
        (FILE_LINES + 10, Some(FILE_LINES + 100), 1),
    ] {
        assert_eq!(check_length("a.rs", lines, entry).len(), faults, "{lines} {entry:?}");
    }
    let long = format!("    pub async fn walk() {{\n{}    }}\n", "        step();\n".repeat(FUNCTION_LINES));
    assert_eq!(check_functions("a.rs", &long, &[]).len(), 1);
    assert!(check_functions("a.rs", &long, &["a.rs:walk"]).is_empty());
    assert!(check_functions("a.rs", "fn short() {\n    step();\n}\n", &[]).is_empty());
    assert_eq!(check_functions("a.rs", "fn short() {\n    step();\n}\n", &["a.rs:short"]).len(), 1);
    for word in [
        concat!("todo", "!()"),
        concat!("#[", "ignore]"),
        concat!("// TO", "DO: later"),
        concat!("super::", "super::x"),
    ] {
        assert_eq!(check_leftovers("a.rs", word).len(), 1, "{word}");
    }
    assert!(check_leftovers("a.rs", "let done = true;").is_empty());
}

#[test]
fn empty_names_waits_and_broken_fences_are_found() {
    assert_eq!(check_names("a.rs", "pub struct PodManager {").len(), 1);
    assert_eq!(check_names("src/string_utils.rs", "").len(), 1);
    assert!(check_names("src/pods.rs", "pub struct Pods;\nlet manager = 1;").is_empty());
    assert_eq!(check_pure("decide.rs", "let x = ask().await;").len(), 1);
    assert!(check_pure("decide.rs", "// never .await").is_empty());
    assert_eq!(check_fence("a.rs", "use h2::client;", "state", "h2::", &["hbone"]).len(), 1);
    assert!(check_fence("a.rs", "use h2::client;", "hbone", "h2::", &["hbone"]).is_empty());
    assert!(check_fence("a.rs", "use my_h2::client;", "state", "h2::", &["hbone"]).is_empty());
}

#[test]
fn unused_data_and_dead_links_are_found() {
    let code = "include_str!(\"testdata/rules.nft\")";
    assert!(is_used("x/testdata/rules.nft", code));
    assert!(!is_used("x/testdata/other.nft", code));
    assert!(is_used("x/testdata/other.nft", "for f in fs::read_dir(dir.join(\"testdata\"))"));
    let text = "see [a](docs/a.md#part), [b](https://example.org) and [c](#here)\n```\n[d](gone.md)\n```";
    assert_eq!(links(text), ["docs/a.md"]);
}
