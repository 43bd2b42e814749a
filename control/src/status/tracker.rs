//! Since when each object is published as it is now, and whether all nodes have had it. Pure.
//!
//! "Programmed" is about a generation of an object: once every node with pods had acknowledged it, it is true and stays so;
//! a node that joins later is told everything before it is ready. That keeps the coming and going of nodes from writing to
//! every object. After a start nothing is known of before, and what the object's own status says counts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::model::{Condition, ObjectConditions, ObjectKey, Status};
use crate::status::desired::Programmed;

/// Names of nodes that a message gives.
const NAMED: usize = 3;

/// What is said of one object.
#[derive(Debug, Clone)]
pub(super) struct Tracked {
    /// Conditions, and what its parents say.
    pub said: Arc<ObjectConditions>,
    /// Generation of what is published in which it came to be as it is.
    since: u64,
    /// Every node has had it.
    done: bool,
    /// It was like this when the process began.
    first: bool,
}

/// All objects of which something is said.
#[derive(Debug, Default)]
pub(super) struct Tracker {
    objects: BTreeMap<ObjectKey, Tracked>,
    begun: bool,
}

impl Tracker {
    /// Takes what is said in a generation; gives the objects of which something else is said than before.
    pub(super) fn update(&mut self, generation: u64, said: Vec<ObjectConditions>) -> Vec<ObjectKey> {
        let first = !std::mem::replace(&mut self.begun, true);
        let mut before = std::mem::take(&mut self.objects);
        let mut changed = Vec::new();
        for one in said {
            let key = one.object.clone();
            let tracked = match before.remove(&key) {
                Some(known) if *known.said == one => known,
                _ => {
                    changed.push(key.clone());
                    Tracked { said: Arc::new(one), since: generation, done: false, first }
                }
            };
            self.objects.insert(key, tracked);
        }
        changed.extend(before.into_keys());
        changed
    }

    /// What is said of an object.
    pub(super) fn get(&self, key: &ObjectKey) -> Option<&Tracked> {
        self.objects.get(key)
    }

    /// Those that some node may not have had yet.
    pub(super) fn unfinished(&self) -> impl Iterator<Item = &ObjectKey> {
        self.objects.iter().filter(|(_, tracked)| !tracked.done).map(|(key, _)| key)
    }

    /// How far the nodes are with an object. `acked`: the generation that each has; `nodes`: those that run pods;
    /// `says_so`: whether its status says already that all have it.
    pub(super) fn programmed(
        &mut self,
        key: &ObjectKey,
        acked: &BTreeMap<String, u64>,
        nodes: &BTreeSet<String>,
        says_so: bool,
    ) -> Programmed {
        let Some(tracked) = self.objects.get_mut(key) else { return Programmed::Stays };
        tracked.done |= tracked.first && says_so;
        if tracked.done && says_so {
            return Programmed::Stays;
        }
        let has = |node: &&String| acked.get(*node).is_some_and(|acked| *acked >= tracked.since);
        let missing: Vec<&String> = nodes.iter().filter(|node| !has(node)).collect();
        if missing.is_empty() || tracked.done {
            tracked.done = true;
            return Programmed::On { have: nodes.len(), of: nodes.len(), missing: Vec::new() };
        }
        Programmed::On {
            have: nodes.len() - missing.len(),
            of: nodes.len(),
            missing: missing.into_iter().take(NAMED).cloned().collect(),
        }
    }
}

/// What is said of an object that could not be read.
pub(super) fn unreadable(key: &ObjectKey, generation: i64, message: &str) -> ObjectConditions {
    let condition = Condition::failing("Accepted", "Invalid", message.to_owned());
    ObjectConditions { object: key.clone(), generation, conditions: vec![condition], parents: Vec::new() }
}

/// The same with what could not be read in it: what else is said is about an older generation.
pub(super) fn outdated(said: &ObjectConditions, generation: i64, message: &str) -> ObjectConditions {
    let wrong = Condition::failing("Accepted", "Invalid", message.to_owned());
    let mut all = said.clone();
    all.generation = generation;
    for list in std::iter::once(&mut all.conditions).chain(all.parents.iter_mut().map(|parent| &mut parent.conditions))
    {
        list.retain(|one| one.kind != wrong.kind);
        list.insert(0, wrong.clone());
    }
    debug_assert!(all.conditions.iter().any(|one| one.status == Status::False));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(name: &str, generation: i64) -> ObjectConditions {
        unreadable(&key(name), generation, "x")
    }

    fn key(name: &str) -> ObjectKey {
        ObjectKey { kind: "HTTPRoute".into(), namespace: "shop".into(), name: name.into() }
    }

    fn on(have: usize, of: usize, missing: &[&str]) -> Programmed {
        Programmed::On { have, of, missing: missing.iter().map(|name| (*name).to_owned()).collect() }
    }

    #[test]
    fn an_object_is_programmed_once_all_nodes_had_it_whoever_joins_later() {
        let nodes = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let acked =
            |all: &[(&str, u64)]| all.iter().map(|(name, at)| ((*name).to_owned(), *at)).collect::<BTreeMap<_, _>>();
        let mut tracker = Tracker::default();
        assert_eq!(tracker.update(1, vec![said("a", 1), said("b", 1)]), [key("a"), key("b")]);
        let two = nodes(&["n1", "n2"]);
        // Of before this process: the status counts where it says something.
        assert_eq!(tracker.programmed(&key("a"), &acked(&[]), &two, true), Programmed::Stays);
        assert_eq!(tracker.programmed(&key("b"), &acked(&[("n1", 1)]), &two, false), on(1, 2, &["n2"]));
        assert_eq!(tracker.unfinished().collect::<Vec<_>>(), [&key("b")]);
        // A change.
        assert_eq!(tracker.update(7, vec![said("a", 2), said("b", 1)]), [key("a")]);
        let old = acked(&[("n1", 6), ("n2", 7)]);
        assert_eq!(tracker.programmed(&key("a"), &old, &two, true), on(1, 2, &["n1"]), "what it says is of before");
        assert_eq!(tracker.programmed(&key("b"), &old, &two, false), on(2, 2, &[]));
        let new = acked(&[("n1", 7), ("n2", 9)]);
        assert_eq!(tracker.programmed(&key("a"), &new, &two, false), on(2, 2, &[]));
        assert_eq!(tracker.programmed(&key("a"), &new, &two, true), Programmed::Stays);
        // A node joins, another loses its stream.
        let three = nodes(&["n1", "n2", "n3"]);
        assert_eq!(tracker.programmed(&key("a"), &acked(&[("n1", 0)]), &three, true), Programmed::Stays);
        assert_eq!(tracker.unfinished().count(), 0);
        assert_eq!(tracker.programmed(&key("a"), &acked(&[]), &three, false), on(3, 3, &[]), "somebody took it away");
        assert_eq!(tracker.update(8, vec![said("b", 1)]), [key("a")], "gone");
        assert_eq!(tracker.programmed(&key("a"), &acked(&[]), &three, false), Programmed::Stays);
    }

    #[test]
    fn many_missing_nodes_are_some_names() {
        let mut tracker = Tracker::default();
        tracker.update(3, vec![said("a", 1)]);
        let nodes: BTreeSet<String> = (10..20).map(|at| format!("n{at}")).collect();
        let found = tracker.programmed(&key("a"), &BTreeMap::new(), &nodes, false);
        assert_eq!(found, on(0, 10, &["n10", "n11", "n12"]));
    }
}
