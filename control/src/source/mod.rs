//! Where mesh objects come from. The only readers of the outside world: a folder of manifests, or the API server of a
//! Kubernetes cluster. Both go through the same decoder.
//!
//! A source hands over a whole [`World`] at a time and never an empty one in between, and it keeps the last good
//! version of what it cannot read now. What it could not read comes along as problems, for people.

pub mod decode;
pub mod files;
pub mod kube;
pub mod tree;

use std::sync::Arc;

use serde::Serialize;

use crate::base::SharedMap;
use crate::model::World;

/// What a source knows at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Loaded {
    /// All objects.
    pub world: World,
    /// Files read, path relative to the folder, with the SHA-256 of their content in hex.
    pub files: SharedMap<Arc<str>, Arc<str>>,
    /// What could not be read or used.
    pub problems: Vec<Problem>,
    /// Files of which nothing is known because they never could be read. Not empty at start: not ready.
    pub never_read: Vec<String>,
    /// What else is not known yet, and why: sentences. Not empty at start: not ready.
    pub waiting: Vec<String>,
}

/// How one kind of object is followed at the API server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Followed {
    /// `httproutes.gateway.networking.k8s.io`.
    pub resource: String,
    /// In which version; empty as long as that is not known.
    pub version: String,
    /// How it stands.
    pub standing: Standing,
    /// Why it cannot be asked; empty if it can.
    pub reason: String,
    /// When the API server was last heard of it, Unix seconds; 0: never.
    pub heard: i64,
    /// Objects in the world.
    pub objects: usize,
    /// As of which resourceVersion.
    pub resource_version: String,
    /// Lists read to the end.
    pub lists: u64,
    /// Changes reported by watches.
    pub events: u64,
    /// Answers that failed or did not come.
    pub failures: u64,
}

/// How a kind stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// Its first list is not complete.
    Listing,
    /// What is known of it is what there is.
    Current,
    /// It cannot be asked; what was known stays.
    Stale,
    /// The API server does not have it.
    Absent,
}

/// Something that a user must fix.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// Path of the file, relative to the folder; empty: it is an object of the API server.
    pub file: String,
    /// Line in it, from 1; 0 if it is about the file.
    pub line: u64,
    /// `Kind namespace/name` if known, else empty.
    pub object: String,
    /// Path of the field if known, else empty.
    pub field: String,
    /// What is wrong and what holds meanwhile.
    pub message: String,
    /// False: only a hint.
    pub error: bool,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.file.is_empty() {
            write!(f, "{}:{}: ", self.file, self.line)?;
        }
        if !self.object.is_empty() {
            write!(f, "{}: ", self.object)?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

/// What holds while an object cannot be read. `kept`: there was a good version. `closed`: it is there as a policy that
/// fails closed.
fn consequence(kept: bool, closed: bool) -> &'static str {
    match (kept, closed) {
        (true, _) => "; its last good version stays in force",
        (false, true) => "; it fails closed until it can be read",
        (false, false) => "; the object is left out",
    }
}

/// Names an object for people.
fn show(kind: &str, namespace: &str, name: &str) -> String {
    if namespace.is_empty() { format!("{kind} {name}") } else { format!("{kind} {namespace}/{name}") }
}
