//! Where mesh objects come from. The only readers of the outside world; today a folder of manifests.
//!
//! A source hands over a whole [`World`] at a time and never an empty one in between, and it keeps the last good
//! version of what it cannot read now. What it could not read comes along as problems, for people.

pub mod decode;
pub mod files;
pub mod statuses;
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
}

/// Something that a user must fix.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// Path of the file, relative to the folder.
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
        write!(f, "{}:{}: ", self.file, self.line)?;
        if !self.object.is_empty() {
            write!(f, "{}: ", self.object)?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}
