//! Which version of which resource was in force when: the log that a test oracle and `GET /debug/versions` read.
//!
//! It records what took effect, not what arrived: a staged workload appears when it takes force, and a removed policy when
//! its last user is gone. Bounded twice, by entries and by names, because one entry of a first sync names everything.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::state::Record;

/// At ten changes a second, more than three minutes.
const MAX_ENTRIES: usize = 2048;
/// Names of all entries together: 16 bytes each, and up to a kilobyte for a workload that is gone, of which the log is the
/// last to know. Eight megabytes at the worst, on a node whose pods come and go.
const MAX_NAMES: usize = 8192;

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
    /// Nobody decided by it before, microseconds since the Unix epoch.
    pub applied_unix_us: u64,
    /// Nobody decided by the one before any more; `None`: that has not been looked at yet.
    pub settled_unix_us: Option<u64>,
    /// The version in force since then, by resource; `None`: none any more.
    pub resources: BTreeMap<LogName, Option<Arc<str>>>,
}

/// One name of an entry as it is kept: a workload by its record, which the store has too.
#[derive(Debug)]
pub(super) enum Logged {
    /// A workload is so.
    Workload(Arc<Record>),
    /// A workload that was so is gone.
    Gone(Arc<Record>),
    /// Another resource, and the version in force.
    Other(Box<(LogName, Option<Arc<str>>)>),
}

/// An entry as it is kept. Of several items of one name the last counts.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) generation: u64,
    pub(super) applied_unix_us: u64,
    /// 0: not known yet.
    pub(super) settled_unix_us: AtomicU64,
    pub(super) items: Box<[Logged]>,
}

impl Kept {
    /// The entry as it is shown.
    pub(super) fn entry(&self) -> LogEntry {
        let shown = |item: &Logged| match item {
            Logged::Workload(record) => (LogName::Address(record.uid().into()), Some(record.version().into())),
            Logged::Gone(record) => (LogName::Address(record.uid().into()), None),
            Logged::Other(item) => (**item).clone(),
        };
        let settled = self.settled_unix_us.load(Ordering::Relaxed);
        LogEntry {
            generation: self.generation,
            applied_unix_us: self.applied_unix_us,
            settled_unix_us: (settled != 0).then_some(settled),
            resources: self.items.iter().map(shown).collect(),
        }
    }
}

/// See the module's header.
#[derive(Debug, Default)]
pub(super) struct VersionLog {
    entries: VecDeque<Arc<Kept>>,
    names: usize,
}

impl VersionLog {
    pub(super) fn push(&mut self, entry: Kept) {
        self.names += entry.items.len();
        self.entries.push_back(Arc::new(entry));
        // The newest entry stays, however large it is.
        while self.entries.len() > 1 && (self.entries.len() > MAX_ENTRIES || self.names > MAX_NAMES) {
            self.names -= self.entries.pop_front().map_or(0, |oldest| oldest.items.len());
        }
    }

    /// The newest entry has taken effect for everybody, if that was not said before.
    pub(super) fn settled(&self, now_unix_us: u64) {
        if let Some(newest) = self.entries.back() {
            let _ = newest.settled_unix_us.compare_exchange(0, now_unix_us, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Replaces records by others of the same content. An entry that is being read keeps its own a little longer.
    pub(super) fn exchange(&mut self, others: &HashMap<*const Record, Arc<Record>>) {
        let items = self.entries.iter_mut().filter_map(Arc::get_mut).flat_map(|entry| &mut entry.items);
        for item in items {
            if let Logged::Workload(record) | Logged::Gone(record) = item
                && let Some(other) = others.get(&Arc::as_ptr(record))
            {
                *record = other.clone();
            }
        }
    }

    /// The entries kept, oldest first.
    pub(super) fn entries(&self) -> Vec<Arc<Kept>> {
        self.entries.iter().cloned().collect()
    }
}
