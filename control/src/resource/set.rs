//! The published set, and the difference between two of them.
//!
//! Sets share what they have in common, so a set of 10,000 workloads that differs in one costs that one and its
//! neighbours; a session keeps the set that it sent last instead of a list of what its node knows.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::OnceLock;

use crate::base::SharedMap;
use crate::resource::{Kind, Resource};

/// Resources of one kind by name.
pub type ByName = SharedMap<Arc<str>, Arc<Resource>>;

/// All resources of one generation.
#[derive(Debug, Clone, Default)]
pub struct ResourceSet {
    /// One for each of [`Kind::ALL`].
    kinds: [ByName; Kind::ALL.len()],
    /// Made when somebody first asks by alias: most nodes take everything and never do.
    aliases: OnceLock<BTreeMap<String, Arc<str>>>,
    /// Workloads by what they are part of. Made when somebody first asks, too.
    parts: OnceLock<BTreeMap<String, Vec<Arc<str>>>>,
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
        (self.aliases, self.parts) = <_>::default();
        let of_kind = &mut self.kinds[resource.kind as usize];
        match of_kind.get(&resource.name) {
            Some(known) if **known == resource => Arc::clone(&known.name),
            _ => {
                let name = Arc::clone(&resource.name);
                of_kind.insert(Arc::clone(&name), Arc::new(resource));
                name
            }
        }
    }

    /// Takes a resource out, if there is one.
    pub fn remove(&mut self, kind: Kind, name: &str) {
        (self.aliases, self.parts) = <_>::default();
        self.kinds[kind as usize].remove(name);
    }

    /// By name or, for addresses, by alias.
    pub fn find(&self, kind: Kind, name: &str) -> Option<&Arc<Resource>> {
        let resources = self.of(kind);
        resources.get(name).or_else(|| match kind {
            Kind::Address => resources.get(self.aliases().get(name)?),
            Kind::TrustBundle | Kind::Authorization | Kind::NetworkPolicy => None,
        })
    }

    /// Workloads that are part of `whole`: endpoints of the Service of this name, or everything on a node
    /// (`names::ALL_OF_NODE`) or in a group of NetworkPolicies (`names::ALL_OF_GROUP`).
    pub fn members(&self, kind: Kind, whole: &str) -> Vec<&Arc<Resource>> {
        if kind != Kind::Address {
            return Vec::new();
        }
        let parts = self.parts.get_or_init(|| {
            let mut parts: BTreeMap<String, Vec<Arc<str>>> = BTreeMap::new();
            for resource in self.of(Kind::Address).values() {
                for whole in resource.part_of() {
                    parts.entry(whole).or_default().push(Arc::clone(&resource.name));
                }
            }
            parts
        });
        let names = parts.get(whole).into_iter().flatten();
        names.filter_map(|name| self.of(Kind::Address).get(name)).collect()
    }

    fn aliases(&self) -> &BTreeMap<String, Arc<str>> {
        self.aliases.get_or_init(|| {
            let mut aliases = BTreeMap::new();
            for resource in self.of(Kind::Address).values() {
                for alias in &resource.aliases {
                    aliases.entry(alias.clone()).or_insert_with(|| Arc::clone(&resource.name));
                }
            }
            aliases
        })
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
