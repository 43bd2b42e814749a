//! Serving resources to nodes: one incremental ADS stream a node, carrying all types.
//!
//! [`session`] is the state machine without I/O; [`server`] reads and writes streams and shows what goes on. A slow
//! node delays nobody: a session keeps the set that it sent last, not a queue, and when the node is ready again it is
//! sent the difference to the newest.

pub mod server;
pub mod session;

use std::collections::BTreeMap;
use std::sync::Arc;

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
}

impl Published {
    /// The next generation.
    pub fn next(&self, set: ResourceSet) -> Self {
        let step = Kind::ALL.into_iter().map(|kind| (kind, set.changes_since(&self.set, kind))).collect();
        Self { generation: self.generation + 1, set: Arc::new(set), step: Arc::new(step) }
    }
}
