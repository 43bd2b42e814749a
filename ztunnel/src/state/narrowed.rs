//! Policies of a whole namespace or mesh that have just got a selector.
//!
//! From then on each workload must name the policy, and what names it comes in another response than the policy
//! itself. In between nobody would be held to it. So the version before stays in force for every workload that it
//! applied to and that does not name the policy, for [`HOLD_US`]: long enough for the other response, and a wider policy
//! for a moment is the safe side.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::state::{Policy, Scope};

/// How long. Control sends the two responses back to back; a slow one takes a second.
pub(super) const HOLD_US: u64 = 5_000_000;

/// Old versions, and until when they hold.
#[derive(Debug, Default)]
pub(super) struct Narrowed(BTreeMap<Arc<str>, (Arc<Policy>, u64)>);

impl Narrowed {
    /// Takes note that `new` replaces `old`. Whether that changed anything.
    pub(super) fn replaced(&mut self, old: Option<&Arc<Policy>>, new: &Policy, now_us: u64) -> bool {
        let Some(old) = old else { return false };
        match (old.scope, new.scope) {
            (Scope::Global | Scope::Namespace, Scope::Selector) => {
                self.0.insert(new.id.clone(), (old.clone(), now_us.saturating_add(HOLD_US)));
                true
            }
            (_, Scope::Selector) => false,
            (_, Scope::Global | Scope::Namespace) => self.0.remove(&new.id).is_some(),
        }
    }

    /// The policy is gone; so is its past.
    pub(super) fn removed(&mut self, id: &str) -> bool {
        self.0.remove(id).is_some()
    }

    /// Lets go of what held long enough; whose it was, with the version that is left.
    pub(super) fn expire(&mut self, now_us: u64) -> Vec<Arc<str>> {
        let over: Vec<_> = self.0.iter().filter(|(_, (_, until))| *until <= now_us).map(|(id, _)| id.clone()).collect();
        over.iter().for_each(|id| drop(self.0.remove(id)));
        over
    }

    /// When the next one is over.
    pub(super) fn next(&self) -> Option<u64> {
        self.0.values().map(|(_, until)| *until).min()
    }

    /// For the snapshot.
    pub(super) fn list(&self) -> Arc<[Arc<Policy>]> {
        self.0.values().map(|(policy, _)| policy.clone()).collect()
    }
}
