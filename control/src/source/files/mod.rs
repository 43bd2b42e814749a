//! A folder of manifests as a source: contents in, one world and its problems out.
//!
//! This half is pure: [`Files::update`] takes what is on disk now and remembers what was good before. [`watch`] is the
//! half that looks at the disk. A file counts as a unit only as far as it must: a bad object keeps its own last good
//! version, and only a document that cannot be attributed to an object makes all objects of its file stay.

pub mod watch;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::sync::Arc;

use sha2::Digest;
use sha2::Sha256;

use crate::base::SharedMap;
use crate::model::{Object, ObjectKey, World};
use crate::source::decode;
use crate::source::tree;
use crate::source::{Loaded, Problem, consequence, show};

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

/// Where an object is defined: path, and place among the file's objects.
type Place = (Arc<str>, usize);

/// The folder's memory. What it gives out is kept and changed by what a look found, so a look costs what it found.
#[derive(Default)]
pub struct Files {
    known: BTreeMap<Arc<str>, Known>,
    /// Every definition of every object, in order of paths: the first one holds.
    definitions: HashMap<ObjectKey, Vec<Place>>,
    /// Objects that are defined more than once.
    repeated: BTreeSet<ObjectKey>,
    world: World,
    digests: SharedMap<Arc<str>, Arc<str>>,
}

impl Files {
    /// Takes over changed files and forgets removed ones. Unchanged files need not be given; `present` lists all.
    pub fn update(&mut self, present: &BTreeSet<String>, changed: Vec<(String, Content)>) -> Loaded {
        let gone: Vec<Arc<str>> = self.known.keys().filter(|path| !present.contains(&***path)).cloned().collect();
        for path in gone {
            self.digests.remove(&path);
            let before = self.known.remove(&path);
            self.redefine(&path, before.map_or_else(Vec::new, |known| known.objects));
        }
        for (path, content) in changed {
            let path: Arc<str> = path.into();
            let before = self.known.remove(&path);
            let old = before.as_ref().map_or_else(Vec::new, |known| known.objects.clone());
            let now = read(&path, content, before);
            self.digests.insert(Arc::clone(&path), now.sha256.as_str().into());
            self.known.insert(Arc::clone(&path), now);
            self.redefine(&path, old);
        }
        self.loaded()
    }

    /// Brings the world to what the file says now. `old`: what it said before.
    fn redefine(&mut self, path: &Arc<str>, old: Vec<(Object, u64, bool)>) {
        let mut touched = BTreeMap::new();
        for (object, ..) in old {
            let key = object.key();
            if let Some(places) = self.definitions.get_mut(&key) {
                places.retain(|(of, _)| of != path);
            }
            touched.insert(key, object);
        }
        for (index, (object, ..)) in self.known.get(path).iter().flat_map(|known| &known.objects).enumerate() {
            let key = object.key();
            let places = self.definitions.entry(key.clone()).or_default();
            places.push((Arc::clone(path), index));
            places.sort_unstable();
            touched.insert(key, object.clone());
        }
        for (key, object) in touched {
            let places = self.definitions.get(&key).map_or(0, Vec::len);
            match self.first_with(&key).cloned() {
                Some(first) => self.world.put(first),
                None => {
                    self.definitions.remove(&key);
                    self.world.remove(object);
                }
            }
            if places > 1 {
                self.repeated.insert(key);
            } else {
                self.repeated.remove(&key);
            }
        }
    }

    /// The definition that holds.
    fn first_with(&self, key: &ObjectKey) -> Option<&Object> {
        let (path, index) = self.definitions.get(key)?.first()?;
        self.known.get(path)?.objects.get(*index).map(|(object, ..)| object)
    }

    fn loaded(&self) -> Loaded {
        let mut problems: Vec<Problem> = self.known.values().flat_map(|known| &known.problems).cloned().collect();
        let mut repeated: Vec<(&Place, &ObjectKey, &str)> = Vec::new();
        for key in &self.repeated {
            if let Some(((first, _), others)) = self.definitions.get(key).and_then(|places| places.split_first()) {
                repeated.extend(others.iter().map(|place| (place, key, &**first)));
            }
        }
        repeated.sort_unstable();
        problems.extend(repeated.into_iter().map(|((path, index), key, first)| Problem {
            file: path.to_string(),
            line: self.known.get(path).and_then(|known| known.objects.get(*index)).map_or(0, |(_, line, _)| *line),
            object: show(&key.kind, &key.namespace, &key.name),
            field: String::new(),
            message: format!("is defined a second time; the definition in {first} holds"),
            error: true,
        }));
        // Stable: a file's own errors stay before its repetitions.
        problems.sort_by(|a, b| a.file.cmp(&b.file));
        let never_read = self.known.iter().filter(|(_, known)| known.never_read);
        Loaded {
            world: self.world.clone(),
            files: self.digests.clone(),
            problems,
            never_read: never_read.map(|(path, _)| path.to_string()).collect(),
            waiting: Vec::new(),
        }
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
    let known: HashMap<ObjectKey, &(Object, u64, bool)> =
        old.iter().rev().map(|entry| (entry.0.key(), entry)).collect();
    for object in new {
        let key = object.key();
        let line = bad.get(&key).copied();
        match known.get(&key) {
            Some(entry) if line.is_some() && entry.2 => {
                kept.insert(key.clone());
                merged.push((*entry).clone());
            }
            // What did not change stays the object that others have, too.
            Some((same, ..)) if line.is_none() && *same == object => merged.push((same.clone(), 0, true)),
            _ => merged.push((object, line.unwrap_or(0), line.is_none())),
        }
        present.insert(key);
    }
    drop(known);
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
            (show(kind, namespace, name), consequence(kept.contains(&key), policy))
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
