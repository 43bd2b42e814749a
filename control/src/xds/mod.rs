//! Serving resources to nodes: one incremental ADS stream a node, carrying all types.
//!
//! [`session`] is the state machine without I/O; [`server`] reads and writes streams and shows what goes on. A slow
//! node delays nobody: a session keeps the set that it sent last, not a queue, and when the node is ready again it is
//! sent the difference to the newest.

pub mod server;
pub mod session;

use std::collections::BTreeMap;
use std::sync::Arc;

use sha2::Digest;
use sha2::Sha256;

use crate::resource::{Changes, Kind, ResourceSet};

/// What all sessions share: a generation and its resources.
#[derive(Debug, Clone, Default)]
pub struct Published {
    /// Counted from 1 since the process started. 0: nothing is published, and nobody is served.
    pub generation: u64,
    /// All resources.
    pub set: Arc<ResourceSet>,
    /// What led here from the generation before: the difference is the same for each of a thousand nodes.
    pub step: Arc<BTreeMap<Kind, Changes>>,
    /// Digest of all resources but workloads and Services: equal on every replica that publishes the same policies and
    /// routes, whatever its generations are.
    pub policies: Arc<str>,
}

impl Published {
    /// The next generation.
    pub fn next(&self, set: ResourceSet) -> Self {
        let step: BTreeMap<Kind, Changes> =
            Kind::ALL.into_iter().map(|kind| (kind, set.changes_since(&self.set, kind))).collect();
        let same = step.iter().all(|(kind, changes)| *kind == Kind::Address || changes.is_empty());
        let policies = if same && self.generation > 0 { Arc::clone(&self.policies) } else { digest(&set) };
        Self { generation: self.generation + 1, set: Arc::new(set), step: Arc::new(step), policies }
    }
}

fn digest(set: &ResourceSet) -> Arc<str> {
    let mut digest = Sha256::new();
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Address) {
        for resource in set.of(kind).values() {
            // Neither name nor version has a line break.
            digest.update(format!("{} {} {}\n", kind.short(), resource.name, resource.version));
        }
    }
    digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>().into()
}
