//! `tulle check`: what is wrong with a cluster before Tulle is installed and afterwards, and who would be cut off when a namespace
//! is enrolled or refuses plaintext.
//!
//! Reading ([`cluster`], [`objects`]) and judging are apart: every rule is a pure function of objects, so its tests are tables.
//! A finding says what is so, what follows, and what to do. Errors are what will fail; warnings are what may, and what could not
//! be looked at. Nothing is changed, and no pod is started: what only a node can know comes from the nodes' own conditions.

mod after;
mod before;
mod cluster;
mod enrol;
mod objects;
mod others;
mod strict;

use serde_json::{Value, json};

use crate::cli::check::objects::Objects;
use crate::cli::connect::Mesh;
use crate::cli::fetch::escape;
use crate::cli::render::cell;
use crate::cli::{Cli, Failure};

/// What is to be checked.
#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    /// What would change for this namespace when it is labelled tulle.dev/mesh=enabled.
    #[arg(long, value_name = "NAMESPACE", conflicts_with = "strict")]
    enrol: Option<String>,
    /// Who still speaks plaintext to this namespace, and would be refused under PeerAuthentication STRICT.
    #[arg(long, value_name = "NAMESPACE")]
    strict: Option<String>,
    /// Print the PeerAuthentications that keep those ports open that need it, as YAML to be reviewed and applied. Exit code 3
    /// where nothing needs one: `kubectl apply` refuses a file without objects.
    #[arg(long, requires = "strict")]
    pub(super) exceptions: bool,
}

impl Flags {
    pub(super) fn namespace(&self) -> Option<&str> {
        self.enrol.as_deref().or(self.strict.as_deref())
    }
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Severity {
    /// It will fail.
    Error,
    /// It may fail, or is not known.
    Warning,
    /// Worth knowing.
    Note,
}

impl Severity {
    fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        }
    }
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    severity: Severity,
    /// Stable name of the rule, for programs.
    id: &'static str,
    /// What it is about: `Kind namespace/name`, `Node name`; may be empty.
    object: String,
    /// What is so, and what follows.
    what: String,
    /// What to do; may be empty.
    fix: String,
}

impl Finding {
    fn new(severity: Severity, id: &'static str, object: impl Into<String>, what: impl Into<String>) -> Self {
        Self { severity, id, object: object.into(), what: what.into(), fix: String::new() }
    }

    fn fix(self, fix: impl Into<String>) -> Self {
        Self { fix: fix.into(), ..self }
    }
}

/// What control is known to say; `None`: it was not asked, or did not answer.
struct Live {
    /// `/debug/status`.
    status: Option<Value>,
    /// `/debug/callers` of the namespace.
    callers: Option<Value>,
    /// Why something is missing.
    why: String,
}

/// Looks at everything that can be looked at from here.
pub(super) fn run(cli: &Cli, flags: &Flags) -> Result<Value, Failure> {
    let root = &cli.flags.root_namespace;
    let (objects, facts) = match &cli.files {
        Some(dir) => (Objects::of_folder(dir)?, None),
        None => {
            let (objects, facts) = cluster::read(&cli.flags)?;
            (objects, Some(facts))
        }
    };
    let installed = after::is_installed(&objects, root);
    let live = ask(cli, flags, installed);
    let mut exceptions = Vec::new();
    let mut found = match (&flags.enrol, &flags.strict) {
        (Some(namespace), _) => enrol::findings(&objects, namespace, root),
        (None, Some(namespace)) => {
            let needs = strict::needs(&objects, namespace, live.callers.as_ref());
            exceptions = strict::exceptions(namespace, &needs);
            strict::findings(&objects, namespace, &needs, live.callers.as_ref(), &live.why)
        }
        (None, None) => {
            let mut found =
                facts.as_ref().map(|facts| before::findings(&objects, facts, installed)).unwrap_or_default();
            found.extend(others::findings(&objects));
            if installed {
                found.extend(after::findings(&objects, root, live.status.as_ref(), &live.why));
            }
            found
        }
    };
    let stage = if installed { "installed" } else { "not installed" };
    found.extend(objects.unknown().iter().map(|(kind, why)| {
        Finding::new(
            Severity::Warning,
            "unreadable",
            kind.as_str(),
            format!("{kind} objects could not be listed: {why}"),
        )
        .fix("ask as somebody who may list them; what depends on them was not checked")
    }));
    found.sort_by(|a, b| (a.severity, a.id, &a.object).cmp(&(b.severity, b.id, &b.object)));
    Ok(report(stage, flags, &found, exceptions))
}

/// Control's half. Files alone say nothing of a running control, so there it must be named.
fn ask(cli: &Cli, flags: &Flags, installed: bool) -> Live {
    let nobody = |why: &str| Live { status: None, callers: None, why: why.to_owned() };
    if cli.files.is_some() && cli.flags.control.is_none() {
        return nobody("no --control was given beside --files");
    }
    if cli.files.is_none() && !installed {
        return nobody("Tulle is not installed");
    }
    let mesh = match Mesh::open(&cli.flags) {
        Ok(mesh) => mesh,
        Err(failure) => return nobody(&failure.text),
    };
    let (mut why, mut get) = (String::new(), None);
    let path = match &flags.strict {
        Some(namespace) => format!("/debug/callers?namespace={}", escape(namespace)),
        None => "/debug/status".to_owned(),
    };
    match mesh.get(&path) {
        Ok(value) => get = Some(value),
        Err(failure) => why = failure.text,
    }
    let (status, callers) = if flags.strict.is_some() { (None, get) } else { (get, None) };
    Live { status, callers, why }
}

fn report(stage: &str, flags: &Flags, found: &[Finding], exceptions: Vec<Value>) -> Value {
    let count = |severity: Severity| found.iter().filter(|finding| finding.severity == severity).count();
    let shown = |finding: &Finding| {
        json!({
            "severity": finding.severity.word(),
            "id": finding.id,
            "object": finding.object,
            "what": finding.what,
            "fix": finding.fix,
        })
    };
    json!({
        "stage": stage,
        "namespace": flags.namespace(),
        "findings": found.iter().map(shown).collect::<Vec<_>>(),
        "errors": count(Severity::Error),
        "warnings": count(Severity::Warning),
        "notes": count(Severity::Note),
        "exceptions": exceptions,
    })
}

/// For people.
pub(super) fn table(report: &Value) -> String {
    let mut text = String::new();
    for finding in report["findings"].as_array().into_iter().flatten() {
        let object = match cell(&finding["object"]) {
            none if none.is_empty() => none,
            object => format!("{object}: "),
        };
        text.push_str(&format!("{:<8} {object}{}\n", cell(&finding["severity"]), cell(&finding["what"])));
        let fix = cell(&finding["fix"]);
        if !fix.is_empty() {
            text.push_str(&format!("         fix: {fix}\n"));
        }
    }
    if !all_exceptions(report).is_empty() {
        text.push_str("\nPorts to keep open (`--exceptions` prints this alone, to be read and applied):\n\n");
        text.push_str(&exceptions(report));
        text.push('\n');
    }
    let count = |key: &str, word: &str| {
        let number = report[key].as_u64().unwrap_or_default();
        format!("{number} {word}{}", if number == 1 { "" } else { "s" })
    };
    text.push_str(&format!(
        "{}, {}, {}\n",
        count("errors", "error"),
        count("warnings", "warning"),
        count("notes", "note")
    ));
    text
}

/// Exit code where there are no exceptions: `kubectl apply` refuses a file without an object, be it an empty list.
pub(super) const NO_EXCEPTIONS: u8 = 3;

/// The exceptions as YAML.
pub(super) fn exceptions(report: &Value) -> String {
    let list = all_exceptions(report);
    if list.is_empty() {
        return format!("# Nothing in namespace {} needs an exception.\n", cell(&report["namespace"]));
    }
    list.iter().map(strict::yaml).collect::<Vec<_>>().join("---\n")
}

/// The exceptions of a report.
pub(super) fn all_exceptions(report: &Value) -> &[Value] {
    report["exceptions"].as_array().map_or(&[][..], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::{Finding, Flags, Severity, report, table};

    #[test]
    fn a_report_says_what_is_so_what_to_do_and_how_bad_it_is() {
        let flags = Flags { enrol: None, strict: None, exceptions: false };
        let found = [
            Finding::new(Severity::Error, "a", "Node n1", "its kernel is old").fix("update it"),
            Finding::new(Severity::Note, "b", "", "all is\u{1b}[31m well"),
        ];
        let value = report("installed", &flags, &found, Vec::new());
        assert_eq!((&value["errors"], &value["warnings"]), (&1.into(), &0.into()));
        assert_eq!(
            table(&value),
            "error    Node n1: its kernel is old\n         fix: update it\nnote     all is[31m well\n1 error, 0 warnings, 1 note\n"
        );
    }
}
