//! Which version of which resource was in force when: the log that a test oracle and `GET /debug/versions` read.
//!
//! It records what took effect, not what arrived: a staged workload appears when it takes force, and a removed policy when
//! its last user is gone. Bounded twice, by entries and by names, because one entry of a first sync names everything.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;

/// At ten changes a second, about seven minutes.
const MAX_ENTRIES: usize = 4096;
/// Names of all entries together, about 8 MB at most: one first sync of 50,000 resources and what follows it.
const MAX_NAMES: usize = 65_536;

/// Names a resource in the log: `<type>/<resource name>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogName {
    /// A workload or service.
    Address(Arc<str>),
    /// A policy.
    Authorization(Arc<str>),
    /// A NetworkPolicy; its resource name begins with the type.
    NetworkPolicy(Arc<str>),
    /// A resource of another own type; its resource name begins with the kind.
    Own(Arc<str>),
}

impl fmt::Display for LogName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(name) => write!(f, "Address/{name}"),
            Self::Authorization(name) => write!(f, "Authorization/{name}"),
            Self::NetworkPolicy(name) | Self::Own(name) => f.write_str(name),
        }
    }
}

/// What one published snapshot changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Generation of the snapshot.
    pub generation: u64,
    /// When it was published, microseconds since the Unix epoch.
    pub applied_unix_us: u64,
    /// The version in force since then, by resource; `None`: none any more.
    pub resources: BTreeMap<LogName, Option<Arc<str>>>,
}

/// See the module's header.
#[derive(Debug, Default)]
pub struct VersionLog {
    entries: VecDeque<Arc<LogEntry>>,
    names: usize,
}

impl VersionLog {
    pub(super) fn push(&mut self, entry: LogEntry) {
        self.names += entry.resources.len();
        self.entries.push_back(Arc::new(entry));
        // The newest entry stays, however large it is.
        while self.entries.len() > 1 && (self.entries.len() > MAX_ENTRIES || self.names > MAX_NAMES) {
            self.names -= self.entries.pop_front().map_or(0, |oldest| oldest.resources.len());
        }
    }

    /// The entries kept, oldest first.
    pub fn entries(&self) -> Vec<Arc<LogEntry>> {
        self.entries.iter().cloned().collect()
    }
}
