//! The published set, and the difference between two of them.
//!
//! Sets share their unchanged resources, so a set of 10,000 workloads that differs in one costs one resource and the
//! map; a session keeps the set that it sent last instead of a list of what its node knows. Names are long and begin
//! alike, so sets are made and compared by walking two ordered lists side by side, where shared resources are equal by
//! their address, and not by look-ups.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::OnceLock;

use crate::resource::{Kind, Resource};

/// All resources of one generation.
#[derive(Debug, Clone, Default)]
pub struct ResourceSet {
    authorizations: BTreeMap<Arc<str>, Arc<Resource>>,
    network_policies: BTreeMap<Arc<str>, Arc<Resource>>,
    request_auths: BTreeMap<Arc<str>, Arc<Resource>>,
    traffic_policies: BTreeMap<Arc<str>, Arc<Resource>>,
    routes: BTreeMap<Arc<str>, Arc<Resource>>,
    addresses: BTreeMap<Arc<str>, Arc<Resource>>,
    /// Made when somebody first asks by alias: most nodes take everything and never do.
    aliases: OnceLock<BTreeMap<String, Arc<str>>>,
}

/// What leads from one set to another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// New or with another version, by name.
    pub changed: BTreeMap<Arc<str>, Arc<Resource>>,
    /// No longer there.
    pub removed: BTreeSet<Arc<str>>,
}

impl ResourceSet {
    /// Makes a set; resources equal to those of `previous` are shared with it. Of two with one name the first stays.
    pub fn new<R: Into<Arc<Resource>>>(resources: Vec<R>, previous: &Self) -> Self {
        let mut kinds: BTreeMap<Kind, Vec<Arc<Resource>>> = BTreeMap::new();
        for resource in resources {
            let resource = resource.into();
            kinds.entry(resource.kind).or_default().push(resource);
        }
        let mut set = Self::default();
        for (kind, mut list) in kinds {
            // Stable, and translation's order is nearly this one.
            list.sort_by(|a, b| a.name.cmp(&b.name));
            list.dedup_by(|later, first| later.name == first.name);
            share(&mut list, previous.of(kind));
            *set.of_mut(kind) = list.into_iter().map(|resource| (Arc::clone(&resource.name), resource)).collect();
        }
        set
    }

    /// All of one type, by name.
    pub fn of(&self, kind: Kind) -> &BTreeMap<Arc<str>, Arc<Resource>> {
        match kind {
            Kind::Authorization => &self.authorizations,
            Kind::NetworkPolicy => &self.network_policies,
            Kind::RequestAuth => &self.request_auths,
            Kind::Address => &self.addresses,
            Kind::TrafficPolicy => &self.traffic_policies,
            Kind::Route => &self.routes,
        }
    }

    fn of_mut(&mut self, kind: Kind) -> &mut BTreeMap<Arc<str>, Arc<Resource>> {
        match kind {
            Kind::Authorization => &mut self.authorizations,
            Kind::NetworkPolicy => &mut self.network_policies,
            Kind::RequestAuth => &mut self.request_auths,
            Kind::Address => &mut self.addresses,
            Kind::TrafficPolicy => &mut self.traffic_policies,
            Kind::Route => &mut self.routes,
        }
    }

    /// By name or, for addresses, by alias.
    pub fn find(&self, kind: Kind, name: &str) -> Option<&Arc<Resource>> {
        let resources = self.of(kind);
        resources.get(name).or_else(|| match kind {
            Kind::Address => resources.get(self.aliases().get(name)?),
            _ => None,
        })
    }

    fn aliases(&self) -> &BTreeMap<String, Arc<str>> {
        self.aliases.get_or_init(|| {
            let mut aliases = BTreeMap::new();
            for resource in self.addresses.values() {
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
        let (mut new, mut old) = (self.of(kind).values().peekable(), old.of(kind).values().peekable());
        loop {
            let order = match (new.peek(), old.peek()) {
                (Some(new), Some(old)) if Arc::ptr_eq(new, old) => Ordering::Equal,
                (Some(new), Some(old)) => new.name.cmp(&old.name),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return changes,
            };
            let is_new = new.next_if(|_| order != Ordering::Greater);
            let was_old = old.next_if(|_| order != Ordering::Less);
            match (is_new, was_old) {
                (Some(now), Some(before)) if Arc::ptr_eq(now, before) || now.version == before.version => {}
                (Some(now), _) => drop(changes.changed.insert(Arc::clone(&now.name), Arc::clone(now))),
                (None, Some(before)) => drop(changes.removed.insert(Arc::clone(&before.name))),
                (None, None) => return changes,
            }
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

/// Replaces what is equal to one of `previous` by it. Both are ordered by name.
fn share(list: &mut [Arc<Resource>], previous: &BTreeMap<Arc<str>, Arc<Resource>>) {
    let mut previous = previous.values().peekable();
    for resource in list {
        while previous.next_if(|old| !Arc::ptr_eq(old, resource) && old.name < resource.name).is_some() {}
        if let Some(old) = previous.next_if(|old| Arc::ptr_eq(old, resource) || old.name == resource.name)
            && (Arc::ptr_eq(old, resource) || **old == **resource)
        {
            *resource = Arc::clone(old);
        }
    }
}

impl Changes {
    /// True if there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.removed.is_empty()
    }
}
