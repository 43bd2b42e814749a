//! The published set, and the difference between two of them.
//!
//! Sets share what they have in common, so a set of 10,000 workloads that differs in one costs that one and its
//! neighbours; a session keeps the set that it sent last instead of a list of what its node knows.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::OnceLock;

use crate::base::SharedMap;
use crate::resource::index::Index;
use crate::resource::{Kind, Resource};

/// Resources of one kind by name.
pub type ByName = SharedMap<Arc<str>, Arc<Resource>>;

/// All resources of one generation.
#[derive(Debug, Clone, Default)]
pub struct ResourceSet {
    /// One for each of [`Kind::ALL`].
    kinds: [ByName; Kind::ALL.len()],
    /// Made when somebody first asks by something else than a name: most nodes take everything and never do. Copies share
    /// it, so that a set that is made of one whose index was asked for has one, too.
    index: Arc<OnceLock<Index>>,
}

/// What leads from one set to another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// New or with another version, by name.
    pub changed: BTreeMap<Arc<str>, Arc<Resource>>,
    /// No longer there.
    pub removed: BTreeSet<Arc<str>>,
}

impl PartialEq for ResourceSet {
    fn eq(&self, other: &Self) -> bool {
        self.kinds == other.kinds
    }
}

impl ResourceSet {
    /// All of one type, by name.
    pub fn of(&self, kind: Kind) -> &ByName {
        &self.kinds[kind as usize]
    }

    /// Puts a resource in the place of the one of its name. One with the same content stays the one that it was, so that
    /// it is told to nobody again.
    pub fn put(&mut self, resource: Resource) -> Arc<str> {
        let of_kind = &mut self.kinds[resource.kind as usize];
        match of_kind.get(&resource.name) {
            Some(known) if **known == resource => Arc::clone(&known.name),
            _ => {
                let (name, resource) = (Arc::clone(&resource.name), Arc::new(resource));
                let before = of_kind.insert(Arc::clone(&name), Arc::clone(&resource));
                self.reindex(before.as_ref(), Some(&resource));
                name
            }
        }
    }

    /// Takes a resource out, if there is one.
    pub fn remove(&mut self, kind: Kind, name: &str) {
        let before = self.kinds[kind as usize].remove(name);
        self.reindex(before.as_ref(), None);
    }

    /// Takes one change over into the index.
    fn reindex(&mut self, before: Option<&Arc<Resource>>, after: Option<&Arc<Resource>>) {
        if before.or(after).is_none_or(|resource| resource.kind != Kind::Address) {
            return;
        }
        if Arc::get_mut(&mut self.index).is_none() {
            // Others share it, and it stays theirs; or they make it for their content, which is not this set's any more.
            self.index = Arc::new(self.index.get().cloned().map_or_else(OnceLock::new, OnceLock::from));
        }
        if let Some(index) = Arc::get_mut(&mut self.index).and_then(OnceLock::get_mut) {
            before.into_iter().for_each(|resource| index.remove(resource));
            after.into_iter().for_each(|resource| index.add(resource));
        }
    }

    /// By name or, for addresses, by alias.
    pub fn find(&self, kind: Kind, name: &str) -> Option<&Arc<Resource>> {
        let resources = self.of(kind);
        resources.get(name).or_else(|| match kind {
            Kind::Address => resources.get(self.index().owner(name)?),
            _ => None,
        })
    }

    /// Workloads that are part of `whole`: endpoints of the Service of this name, or everything on a node
    /// (`names::ALL_OF_NODE`) or in a group of NetworkPolicies (`names::ALL_OF_GROUP`).
    pub fn members(&self, kind: Kind, whole: &str) -> Vec<&Arc<Resource>> {
        if kind != Kind::Address {
            return Vec::new();
        }
        let of_kind = self.of(Kind::Address);
        self.index().members(whole).filter_map(|name| of_kind.get(name)).collect()
    }

    fn index(&self) -> &Index {
        self.index.get_or_init(|| Index::of(self.of(Kind::Address).values()))
    }

    /// What must be sent to somebody who has `old` so that he has `self`.
    pub fn changes_since(&self, old: &Self, kind: Kind) -> Changes {
        let mut changes = Changes::default();
        for change in self.of(kind).changes_since(old.of(kind)) {
            match (change.before, change.after) {
                // The same bytes for other aliases or another audience.
                (Some(before), Some(after)) if before.version == after.version => {}
                (_, Some(after)) => drop(changes.changed.insert(Arc::clone(change.key), Arc::clone(after))),
                (_, None) => drop(changes.removed.insert(Arc::clone(change.key))),
            }
        }
        changes
    }

    /// The same for somebody who has these versions.
    pub fn changes_from_versions<'a>(
        &self,
        have: impl Iterator<Item = (&'a String, &'a String)>,
        kind: Kind,
    ) -> Changes {
        let all = self.of(kind).iter().map(|(name, resource)| (Arc::clone(name), Arc::clone(resource)));
        let mut changed: BTreeMap<Arc<str>, Arc<Resource>> = all.collect();
        let mut removed = BTreeSet::new();
        for (name, version) in have {
            match changed.get(name.as_str()) {
                Some(resource) if *resource.version == **version => {
                    changed.remove(name.as_str());
                }
                Some(_) => {}
                None => drop(removed.insert(Arc::from(name.as_str()))),
            }
        }
        Changes { changed, removed }
    }
}

impl Changes {
    /// True if there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.removed.is_empty()
    }
}

impl FromIterator<Resource> for ResourceSet {
    fn from_iter<I: IntoIterator<Item = Resource>>(resources: I) -> Self {
        let mut set = Self::default();
        resources.into_iter().for_each(|resource| drop(set.put(resource)));
        set
    }
}

#[cfg(test)]
mod tests {
    use tulle_proto::workload::address::Type;
    use tulle_proto::workload::{Address, Workload};

    use super::*;

    fn pod(name: &str, node: &str, alias: &str) -> Resource {
        let workload = Workload { uid: name.into(), node: node.into(), ..Workload::default() };
        let address = Address { r#type: Some(Type::Workload(workload)) };
        Resource::new(Kind::Address, name.into(), &address, vec![alias.into()])
    }

    fn found(set: &ResourceSet, alias: &str, node: &str) -> (String, Vec<String>) {
        let whole = format!("{}{node}", tulle_proto::names::ALL_OF_NODE);
        let owner = set.find(Kind::Address, alias).map(|resource| resource.name.to_string());
        let members = set.members(Kind::Address, &whole).into_iter().map(|resource| resource.name.to_string());
        (owner.unwrap_or_default(), members.collect())
    }

    #[test]
    fn what_was_asked_for_once_follows_every_change_and_copies_keep_their_own() {
        let mut set: ResourceSet = [pod("a", "n1", "/10.0.0.1"), pod("b", "n1", "/10.0.0.2")].into_iter().collect();
        let published = set.clone();
        assert_eq!(found(&published, "/10.0.0.1", "n1"), ("a".into(), vec!["a".into(), "b".into()]));
        assert!(set.index.get().is_some(), "the set that goes on has what was made of its copy");
        // Another pod with an address that is still somebody's, one that moves, one that goes.
        set.put(pod("0", "n1", "/10.0.0.1"));
        set.put(pod("a", "n2", "/10.0.0.3"));
        set.remove(Kind::Address, "b");
        assert!(set.index.get().is_some(), "it is not made anew");
        assert_eq!(found(&set, "/10.0.0.1", "n1"), ("0".into(), vec!["0".into()]));
        assert_eq!(found(&set, "/10.0.0.3", "n2"), ("a".into(), vec!["a".into()]));
        assert_eq!(found(&set, "/10.0.0.2", "n3"), (String::new(), vec![]));
        assert_eq!(found(&published, "/10.0.0.2", "n1"), ("b".into(), vec!["a".into(), "b".into()]));
        // A copy that was changed before anybody asked is not taken for the one that was asked.
        let fresh: ResourceSet = [pod("a", "n1", "/10.0.0.1")].into_iter().collect();
        let mut next = fresh.clone();
        next.put(pod("b", "n1", "/10.0.0.2"));
        assert_eq!(found(&fresh, "/10.0.0.2", "n1").1, ["a"]);
        assert_eq!(found(&next, "/10.0.0.2", "n1"), ("b".into(), vec!["a".into(), "b".into()]));
    }
}
