//! A folder of manifests as a source: contents in, one world and its problems out.
//!
//! This half is pure: [`Files::update`] takes what is on disk now and remembers what was good before. [`watch`] is the
//! half that looks at the disk. A file counts as a unit only as far as it must: a bad object keeps its own last good
//! version, and only a document that cannot be attributed to an object makes all objects of its file stay.

pub mod watch;

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use sha2::Digest;
use sha2::Sha256;

use crate::model::{Object, ObjectKey};
use crate::source::Loaded;
use crate::source::Problem;
use crate::source::decode;
use crate::source::tree;

/// Largest file, bytes. The objects of 10,000 pods fit; more is a mistake and would only use up memory.
pub const MAX_FILE_BYTES: u64 = 32 * 1024 * 1024;

/// One parsed file.
#[derive(Debug, Default, PartialEq)]
pub struct Parsed {
    /// Objects in order.
    pub objects: Vec<Object>,
    /// Errors with the object if known; lines count from the start of the file.
    pub errors: Vec<decode::DecodeError>,
    /// Kinds that are not ours, with line.
    pub unknown: Vec<(u64, String)>,
}

/// Reads a file's text: any number of YAML documents, or JSON, which is YAML. Never panics, whatever the bytes.
pub fn parse(bytes: &[u8]) -> Parsed {
    let mut parsed = Parsed::default();
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
        Err(error) => {
            let before = &bytes[..error.valid_up_to()];
            let line = 1 + before.iter().filter(|b| **b == b'\n').count() as u64;
            parsed.errors.push(anonymous(line, "is not UTF-8 text"));
            return parsed;
        }
    };
    for (first_line, document) in documents(text) {
        let node = match tree::parse(document) {
            Ok(node) => node,
            Err(mut error) => {
                error.line = first_line + error.line.max(1) - 1;
                parsed.errors.push(decode::DecodeError { object: None, error });
                continue;
            }
        };
        let decoded = decode::document(&node);
        parsed.objects.extend(decoded.objects);
        for mut error in decoded.errors {
            error.error.line = first_line + error.error.line.max(1) - 1;
            parsed.errors.push(error);
        }
        parsed.unknown.extend(decoded.unknown.into_iter().map(|kind| (first_line, kind)));
    }
    parsed
}

fn anonymous(line: u64, message: &str) -> decode::DecodeError {
    decode::DecodeError {
        object: None,
        error: tree::FieldError { line, field: String::new(), message: message.to_owned() },
    }
}

/// Splits at `---` and `...` lines. A marker at the start of a line cannot stand inside a scalar, so no parser is
/// needed, and one broken document does not swallow the next.
fn documents(text: &str) -> Vec<(u64, &str)> {
    let mut found = Vec::new();
    let (mut start, mut start_line) = (0, 1);
    let mut offset = 0;
    for (line, content) in (1u64..).zip(text.split_inclusive('\n')) {
        let rest = content.strip_prefix("---").or_else(|| content.strip_prefix("..."));
        if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n'])) {
            found.push((start_line, &text[start..offset]));
            // What follows the marker on its line belongs to the new document.
            start = offset + 3;
            start_line = line;
        }
        offset += content.len();
    }
    found.push((start_line, &text[start..]));
    found.retain(|(_, document)| !is_blank(document));
    found
}

fn is_blank(document: &str) -> bool {
    document.lines().map(str::trim).all(|line| line.is_empty() || line.starts_with('#'))
}

/// A file as found on disk: its content, or why it cannot be read.
pub type Content = Result<Vec<u8>, String>;

/// What is remembered of a file.
struct Known {
    sha256: String,
    /// Objects in force, and whether they are good (not a stand-in).
    objects: Vec<(Object, u64, bool)>,
    problems: Vec<Problem>,
    never_read: bool,
}

/// The folder's memory.
#[derive(Default)]
pub struct Files {
    known: BTreeMap<String, Known>,
}

impl Files {
    /// Takes over changed files and forgets removed ones. Unchanged files need not be given; `present` lists all.
    pub fn update(&mut self, present: &BTreeSet<String>, changed: Vec<(String, Content)>) -> Loaded {
        self.known.retain(|path, _| present.contains(path));
        for (path, content) in changed {
            let before = self.known.remove(&path);
            let now = read(&path, content, before);
            self.known.insert(path, now);
        }
        self.loaded()
    }

    fn loaded(&self) -> Loaded {
        let mut loaded = Loaded::default();
        for (path, known) in &self.known {
            loaded.files.insert(path.clone(), known.sha256.clone());
            loaded.problems.extend(known.problems.iter().cloned());
            if known.never_read {
                loaded.never_read.push(path.clone());
            }
            for (object, line, _) in &known.objects {
                if !loaded.world.insert_new(object.clone()) {
                    let key = object.key();
                    let first = self.first_with(&key).unwrap_or(path);
                    loaded.problems.push(Problem {
                        file: path.clone(),
                        line: *line,
                        object: show(&key.kind, &key.namespace, &key.name),
                        field: String::new(),
                        message: format!("is defined a second time; the definition in {first} holds"),
                        error: true,
                    });
                }
            }
        }
        loaded
    }

    /// The first file that has an object of this name.
    fn first_with(&self, key: &ObjectKey) -> Option<&str> {
        let has = |known: &Known| known.objects.iter().any(|(object, ..)| object.key() == *key);
        self.known.iter().find(|(_, known)| has(known)).map(|(path, _)| path.as_str())
    }
}

fn read(path: &str, content: Content, before: Option<Known>) -> Known {
    let (sha256, parsed) = match &content {
        Ok(bytes) => (hex(&Sha256::digest(bytes)), parse(bytes)),
        Err(reason) => {
            let mut parsed = Parsed::default();
            parsed.errors.push(anonymous(0, &format!("cannot be read: {reason}")));
            (String::new(), parsed)
        }
    };
    let anonymous_errors = parsed.errors.iter().any(|error| error.object.is_none());
    let never_read = anonymous_errors && before.as_ref().is_none_or(|known| known.never_read);
    let old = before.map_or_else(Vec::new, |known| known.objects);
    let (objects, kept) = merge(parsed.objects, &parsed.errors, old, anonymous_errors);
    let mut problems: Vec<Problem> =
        parsed.errors.iter().map(|error| problem(path, error, &kept, never_read)).collect();
    let mut warned = BTreeSet::new();
    for (line, kind) in parsed.unknown {
        if warned.insert(kind.clone()) {
            problems.push(Problem {
                file: path.to_owned(),
                line,
                object: String::new(),
                field: String::new(),
                message: format!("objects of kind {kind} are not read by the mesh"),
                error: false,
            });
        }
    }
    Known { sha256, objects, problems, never_read }
}

type Kept = BTreeSet<ObjectKey>;

/// New objects, with the last good version in the place of what cannot be read now.
fn merge(
    new: Vec<Object>,
    errors: &[decode::DecodeError],
    old: Vec<(Object, u64, bool)>,
    keep_all: bool,
) -> (Vec<(Object, u64, bool)>, Kept) {
    let bad: BTreeMap<ObjectKey, u64> = errors
        .iter()
        .filter_map(|error| {
            let (kind, namespace, name) = error.object.clone()?;
            Some((ObjectKey { kind, namespace, name }, error.error.line))
        })
        .collect();
    let mut kept = Kept::new();
    let mut merged: Vec<(Object, u64, bool)> = Vec::with_capacity(new.len());
    let mut present = BTreeSet::new();
    for object in new {
        let key = object.key();
        present.insert(key.clone());
        let line = bad.get(&key).copied();
        match old.iter().find(|(o, _, good)| line.is_some() && *good && o.key() == key) {
            Some(good) => {
                kept.insert(key);
                merged.push(good.clone());
            }
            None => merged.push((object, line.unwrap_or(0), line.is_none())),
        }
    }
    for entry in old {
        let key = entry.0.key();
        if !present.contains(&key) && (keep_all || bad.contains_key(&key)) {
            kept.insert(key);
            merged.push(entry);
        }
    }
    (merged, kept)
}

fn problem(path: &str, error: &decode::DecodeError, kept: &Kept, never_read: bool) -> Problem {
    let (object, consequence) = match &error.object {
        None if never_read => (String::new(), "; no object of this document is known"),
        None => (String::new(), "; the file's earlier objects stay in force"),
        Some((kind, namespace, name)) => {
            let key = ObjectKey { kind: kind.clone(), namespace: namespace.clone(), name: name.clone() };
            let policy = matches!(
                kind.as_str(),
                "AuthorizationPolicy" | "PeerAuthentication" | "NetworkPolicy" | "ClusterTrustBundle"
            );
            let consequence = if kept.contains(&key) {
                "; its last good version stays in force"
            } else if policy {
                "; it fails closed until it can be read"
            } else {
                "; the object is left out"
            };
            (show(kind, namespace, name), consequence)
        }
    };
    Problem {
        file: path.to_owned(),
        line: error.error.line,
        object,
        field: error.error.field.clone(),
        message: format!("{}{consequence}", error.error.message),
        error: true,
    }
}

fn show(kind: &str, namespace: &str, name: &str) -> String {
    if namespace.is_empty() { format!("{kind} {name}") } else { format!("{kind} {namespace}/{name}") }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
