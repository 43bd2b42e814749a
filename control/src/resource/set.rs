//! The published set, and the difference between two of them.
//!
//! Sets share their unchanged resources, so a set of 10,000 workloads that differs in one costs one resource and the
//! map; a session keeps the set that it sent last instead of a list of what its node knows.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use crate::resource::{Kind, Resource};

/// All resources of one generation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResourceSet {
    authorizations: BTreeMap<Arc<str>, Arc<Resource>>,
    network_policies: BTreeMap<Arc<str>, Arc<Resource>>,
    addresses: BTreeMap<Arc<str>, Arc<Resource>>,
    aliases: BTreeMap<String, Arc<str>>,
}

/// What leads from one set to another.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// New or with another version, by name.
    pub changed: BTreeMap<Arc<str>, Arc<Resource>>,
    /// No longer there.
    pub removed: BTreeSet<Arc<str>>,
}

impl ResourceSet {
    /// Makes a set; resources equal to those of `previous` are shared with it. Of two with one name the first stays.
    pub fn new(resources: Vec<Resource>, previous: &Self) -> Self {
        let mut set = Self::default();
        for resource in resources {
            let kind = resource.kind;
            let shared = match previous.of(kind).get(&resource.name) {
                Some(old) if **old == resource => Arc::clone(old),
                _ => Arc::new(resource),
            };
            for alias in &shared.aliases {
                set.aliases.entry(alias.clone()).or_insert_with(|| Arc::clone(&shared.name));
            }
            set.of_mut(kind).entry(Arc::clone(&shared.name)).or_insert(shared);
        }
        set
    }

    /// All of one type, by name.
    pub fn of(&self, kind: Kind) -> &BTreeMap<Arc<str>, Arc<Resource>> {
        match kind {
            Kind::Authorization => &self.authorizations,
            Kind::NetworkPolicy => &self.network_policies,
            Kind::Address => &self.addresses,
        }
    }

    fn of_mut(&mut self, kind: Kind) -> &mut BTreeMap<Arc<str>, Arc<Resource>> {
        match kind {
            Kind::Authorization => &mut self.authorizations,
            Kind::NetworkPolicy => &mut self.network_policies,
            Kind::Address => &mut self.addresses,
        }
    }

    /// By name or, for addresses, by alias.
    pub fn find(&self, kind: Kind, name: &str) -> Option<&Arc<Resource>> {
        let resources = self.of(kind);
        resources.get(name).or_else(|| match kind {
            Kind::Address => resources.get(self.aliases.get(name)?),
            Kind::Authorization | Kind::NetworkPolicy => None,
        })
    }

    /// What must be sent to somebody who has `old` so that he has `self`.
    pub fn changes_since(&self, old: &Self, kind: Kind) -> Changes {
        let (new, old) = (self.of(kind), old.of(kind));
        let changed = new.iter().filter(|(name, resource)| {
            old.get(*name).is_none_or(|o| !Arc::ptr_eq(o, resource) && o.version != resource.version)
        });
        let removed = old.keys().filter(|name| !new.contains_key(*name));
        Changes {
            changed: changed.map(|(name, resource)| (Arc::clone(name), Arc::clone(resource))).collect(),
            removed: removed.map(Arc::clone).collect(),
        }
    }

    /// The same for somebody who has these versions.
    pub fn changes_from_versions<'a>(
        &self,
        have: impl Iterator<Item = (&'a String, &'a String)>,
        kind: Kind,
    ) -> Changes {
        let mut changed = self.of(kind).clone();
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
