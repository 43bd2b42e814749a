//! How workloads and services are found by something else than their names: by alias, and by what they are part of. Only
//! nodes that do not take everything ask.
//!
//! It is made when somebody first asks, and from then on follows each change of the set, since making it reads every
//! workload. Copies share what they have in common, as sets do.

use std::sync::Arc;

use crate::base::SharedMap;
use crate::resource::Resource;

/// Pairs of what is asked for and a resource's name.
type Pairs = SharedMap<(Arc<str>, Arc<str>), ()>;

/// See the module's header.
#[derive(Debug, Clone, Default)]
pub(super) struct Index {
    aliases: Pairs,
    parts: Pairs,
}

impl Index {
    /// Of all these.
    pub(super) fn of<'a>(resources: impl Iterator<Item = &'a Arc<Resource>>) -> Self {
        let mut index = Self::default();
        resources.for_each(|resource| index.add(resource));
        index
    }

    /// Takes one in.
    pub(super) fn add(&mut self, resource: &Resource) {
        for alias in &resource.aliases {
            self.aliases.insert((alias.as_str().into(), Arc::clone(&resource.name)), ());
        }
        for whole in resource.part_of() {
            self.parts.insert((whole.into(), Arc::clone(&resource.name)), ());
        }
    }

    /// Takes one out, as it was taken in.
    pub(super) fn remove(&mut self, resource: &Resource) {
        for alias in &resource.aliases {
            self.aliases.remove(&(alias.as_str().into(), Arc::clone(&resource.name)));
        }
        for whole in resource.part_of() {
            self.parts.remove(&(whole.into(), Arc::clone(&resource.name)));
        }
    }

    /// Whose alias that is: the first one's, by name.
    pub(super) fn owner(&self, alias: &str) -> Option<&Arc<str>> {
        names(&self.aliases, alias).next()
    }

    /// Names of what is part of `whole`, in order.
    pub(super) fn members(&self, whole: &str) -> impl Iterator<Item = &Arc<str>> {
        names(&self.parts, whole)
    }
}

fn names<'a>(pairs: &'a Pairs, of: &str) -> impl Iterator<Item = &'a Arc<str>> + use<'a> {
    let first: (Arc<str>, Arc<str>) = (of.into(), "".into());
    let of = Arc::clone(&first.0);
    pairs.range_from(&first).map(|(pair, ())| pair).take_while(move |(asked, _)| *asked == of).map(|(_, name)| name)
}
