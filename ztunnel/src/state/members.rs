//! What changed behind one service since its endpoints were prepared.
//!
//! The endpoints of a service are kept once, in the service; an update says which records came and which went, and the
//! new list is made of the old one. Records are told apart by identity: a new version of a workload is another record.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::sync::Arc;

use crate::state::Record;

/// See the module's header.
#[derive(Debug, Default)]
pub(super) struct Delta {
    /// Held, so that no other record can get the address of one.
    gone: Vec<Arc<Record>>,
    come: Vec<Arc<Record>>,
}

impl Delta {
    /// `record` is behind the service no longer.
    pub(super) fn gone(&mut self, record: &Arc<Record>) {
        self.gone.push(record.clone());
    }

    /// `record` is behind the service now.
    pub(super) fn come(&mut self, record: &Arc<Record>) {
        if !self.gone.is_empty() {
            self.gone.retain(|gone| !Arc::ptr_eq(gone, record));
        }
        self.come.push(record.clone());
    }

    /// The new list, in the order of the uids.
    pub(super) fn applied(self, list: impl Iterator<Item = Arc<Record>>) -> Vec<Arc<Record>> {
        let gone: HashSet<*const Record> = self.gone.iter().map(Arc::as_ptr).collect();
        let mut all: Vec<_> = list.chain(self.come).filter(|record| !gone.contains(&Arc::as_ptr(record))).collect();
        // Sorted already but for what came, which is what this sort is quick at.
        all.sort_by(|one, other| one.cmp_uid(other));
        all.dedup_by(|one, other| one.cmp_uid(other) == Ordering::Equal);
        all
    }
}
