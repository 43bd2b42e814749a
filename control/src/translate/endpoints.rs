//! Which pod serves which port of which Service, and which of them get traffic.
//!
//! Endpoints come from selectors or, where a Service has endpoint slices, from those; a Service without either uses its
//! Endpoints object. An endpoint that is no pod of ours becomes a plain workload of its own.
//!
//! Who gets traffic is the cluster's own rule, so that enrolment changes no balancing: ready endpoints; where there is none,
//! those that are terminating and still serve; with publishNotReadyAddresses, all. Under internalTrafficPolicy Local each
//! node is looked at alone. WDS says health by pod and not by Service, so a Service that must use unready endpoints is sent
//! with health policy ALLOW_ALL and names only those that it uses. A headless Service is its names, which stand for ready
//! endpoints, and has no other rule.
//!
//! Hints narrow the choice only where all ready endpoints have them, for clients whose zone (or node) some endpoint is
//! meant for. Without slices they are what trafficDistribution gives, the endpoint's own zone and node; without a zone
//! there are none. Where they are the endpoints' own places, the service's routing preference says so to any proxy; others
//! go to ours with the workload.
//!
//! They are found for one Service at a time ([`members`]) and kept, with what each depends on; a change of an object is
//! followed to the Services that depend on it, and from those to the pods whose part in them is another one than before.

mod members;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::net::IpAddr;

use tulle_proto::workload;

use crate::model::{Hints, Key, Pod, Service, TrafficScope, World, in_namespace};
use crate::translate::Settings;
use crate::translate::endpoints::members::{Dependency, Members, Who};
use crate::translate::index::Index;
use crate::translate::work::{Changed, Work};

/// Service resource name to the ports served there.
pub(super) type Membership = BTreeMap<String, Vec<workload::Port>>;

/// Service resource name to the clients that an endpoint is meant for.
pub(super) type ServiceHints = BTreeMap<String, Hints>;

/// An endpoint that is no pod.
#[derive(Clone, PartialEq)]
pub(super) struct Outsider {
    pub(super) slice: Key,
    pub(super) node: String,
    pub(super) zone: String,
    /// Its name in DNS, and the Service below which it is one.
    pub(super) hostname: (String, String),
    pub(super) services: Membership,
    pub(super) hints: ServiceHints,
}

/// An address outside, as slices of one namespace name it.
pub(super) type Outside = (String, IpAddr);

/// Who serves what.
#[derive(Default)]
pub(super) struct Endpoints {
    services: BTreeMap<Key, OfService>,
    /// Services behind which a pod is, with or without traffic.
    pods: HashMap<Key, BTreeSet<Key>>,
    /// Services behind which an outsider is.
    outsiders: HashMap<Outside, BTreeSet<Key>>,
    /// Services by what they depend on.
    dependants: HashMap<Dependency, BTreeSet<Key>>,
}

/// The endpoints of one service.
#[derive(Default)]
struct OfService {
    /// Resource name.
    name: String,
    balancing: Balancing,
    pods: BTreeMap<Key, Part>,
    outsiders: BTreeMap<Outside, Outsider>,
    dependencies: BTreeSet<Dependency>,
}

/// A pod's part in a service.
#[derive(PartialEq)]
struct Part {
    /// Where it gets traffic.
    ports: Option<Vec<workload::Port>>,
    /// Whom it is meant for, if the scope of the balancing cannot say that.
    hints: Option<Hints>,
}

/// What a service's endpoints say about the choice among them.
#[derive(Clone, Copy)]
pub(super) struct Balancing {
    /// Also those that are not ready get traffic.
    pub(super) all: bool,
    /// What is preferred to what.
    pub(super) scope: TrafficScope,
}

impl Default for Balancing {
    fn default() -> Self {
        Self { all: false, scope: TrafficScope::Cluster }
    }
}

impl Endpoints {
    /// Follows the changes to `world`, which the index has taken already, and adds to the work whom they concern.
    pub(super) fn update(
        &mut self,
        changed: &Changed<'_>,
        world: &World,
        index: &Index,
        settings: &Settings,
        work: &mut Work,
    ) {
        for service in self.concerned(changed, world) {
            self.renew(&service, world, index, settings, work);
            work.services.insert(service);
        }
    }

    /// The services whose endpoints may be others now.
    fn concerned(&self, changed: &Changed<'_>, world: &World) -> BTreeSet<Key> {
        let mut found: BTreeSet<Key> = changed.services.iter().map(|change| change.key.clone()).collect();
        found.extend(changed.endpoints.iter().map(|change| change.key.clone()));
        for slice in changed.slices.iter().flat_map(|change| change.sides()).filter(|slice| !slice.service.is_empty()) {
            found.insert((slice.meta.namespace.clone(), slice.service.clone()));
        }
        let mut depend = |dependency| found.extend(self.dependants.get(&dependency).into_iter().flatten().cloned());
        for node in &changed.moved_nodes {
            depend(Dependency::Node(node.clone()));
        }
        for pod in changed.pods.iter().flat_map(|change| change.sides()).chain(changed.moved_pods.iter().copied()) {
            depend(Dependency::Pod((pod.meta.namespace.clone(), pod.meta.name.clone())));
            pod.addresses.iter().for_each(|ip| depend(Dependency::Address(*ip)));
        }
        // Services that select a pod, as it was or is. Those that are found already need no look.
        let mut others: BTreeMap<&str, Vec<&Service>> = BTreeMap::new();
        for pod in changed.pods.iter().flat_map(|change| change.sides()).chain(changed.moved_pods.iter().copied()) {
            let namespace = pod.meta.namespace.as_str();
            let others = others.entry(namespace).or_insert_with(|| {
                let services = in_namespace(&world.services, namespace).map(|service| &**service);
                services.filter(|service| !service.selector.is_empty() && !found.contains(&key(service))).collect()
            });
            others.retain(|service| {
                let selects = service.selector.iter().all(|(label, value)| pod.meta.labels.get(label) == Some(value));
                if selects {
                    found.insert(key(service));
                }
                !selects
            });
        }
        found
    }

    /// Finds the endpoints of one service anew.
    fn renew(&mut self, service: &Key, world: &World, index: &Index, settings: &Settings, work: &mut Work) {
        let old = self.services.remove(service).unwrap_or_default();
        let object = world.services.get(service).filter(|object| !object.external_name);
        let new = object.map(|object| {
            let given = members::given(object, service, index, world);
            let dependencies = given.as_deref().map(members::dependencies).unwrap_or_default();
            let found = members::members(object, given.as_deref(), index, world);
            let name = format!("{}/{}", service.0, settings.hostname(&object.meta));
            OfService { dependencies, ..of_service(object, name, found) }
        });
        let here = new.is_some();
        let new = new.unwrap_or_default();
        relate(&mut self.dependants, service, old.dependencies.iter(), new.dependencies.iter());
        relate(&mut self.pods, service, old.pods.keys(), new.pods.keys());
        relate(&mut self.outsiders, service, old.outsiders.keys(), new.outsiders.keys());
        // A pod that does not know its part yet, or no longer has it.
        work.pods.extend(differing(&old.pods, &new.pods));
        work.outsiders.extend(differing(&old.outsiders, &new.outsiders));
        if here {
            self.services.insert(service.clone(), new);
        }
    }

    /// Whether the pod is an endpoint of the service, with or without traffic.
    pub(super) fn serves(&self, pod: &Pod, service: &Key) -> bool {
        let pod = (pod.meta.namespace.clone(), pod.meta.name.clone());
        self.services.get(service).is_some_and(|service| service.pods.contains_key(&pod))
    }

    /// How to choose among a service's endpoints.
    pub(super) fn balancing(&self, service: &Key) -> Balancing {
        self.services.get(service).map(|service| service.balancing).unwrap_or_default()
    }

    /// A pod's parts, each with the name of the service.
    fn parts(&self, pod: &Pod) -> impl Iterator<Item = (&String, &Part)> {
        let pod = (pod.meta.namespace.clone(), pod.meta.name.clone());
        let services = self.pods.get(&pod).into_iter().flatten().filter_map(|service| self.services.get(service));
        services.filter_map(move |service| Some((&service.name, service.pods.get(&pod)?)))
    }

    /// Hints of a pod that no service's balancing says.
    pub(super) fn hints_of(&self, pod: &Pod) -> ServiceHints {
        self.parts(pod).filter_map(|(name, part)| Some((name.clone(), part.hints.clone()?))).collect()
    }

    /// Where a pod gets traffic.
    pub(super) fn of_pod(&self, pod: &Pod) -> Membership {
        self.parts(pod).filter_map(|(name, part)| Some((name.clone(), part.ports.clone()?))).collect()
    }

    /// An endpoint that is no pod, with all its services; the first of them says where it is.
    pub(super) fn outsider(&self, outside: &Outside) -> Option<Outsider> {
        let services = self.outsiders.get(outside)?.iter().filter_map(|service| self.services.get(service));
        let mut parts = services.filter_map(|service| service.outsiders.get(outside));
        let mut whole = parts.next()?.clone();
        for part in parts {
            whole.services.extend(part.services.clone());
            whole.hints.extend(part.hints.clone());
        }
        Some(whole)
    }
}

fn key(service: &Service) -> Key {
    (service.meta.namespace.clone(), service.meta.name.clone())
}

/// Notes the service at what it now has to do with, and no longer at what it had.
fn relate<'a, T: Clone + Ord + std::hash::Hash + 'a>(
    related: &mut HashMap<T, BTreeSet<Key>>,
    service: &Key,
    old: impl Iterator<Item = &'a T>,
    new: impl Iterator<Item = &'a T>,
) {
    for gone in old {
        if let Some(services) = related.get_mut(gone) {
            services.remove(service);
            if services.is_empty() {
                related.remove(gone);
            }
        }
    }
    for there in new {
        related.entry(there.clone()).or_default().insert(service.clone());
    }
}

/// Keys of what is not the same in both.
fn differing<'a, K: Ord + Clone, V: PartialEq>(
    old: &'a BTreeMap<K, V>,
    new: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = K> + 'a {
    let gone = old.keys().filter(|key| !new.contains_key(*key));
    let other = new.iter().filter(|(key, value)| old.get(*key) != Some(*value)).map(|(key, _)| key);
    gone.chain(other).cloned()
}

/// The endpoints of one service as far as they get traffic, or are told apart by their health.
fn of_service(service: &Service, name: String, members: Members<'_>) -> OfService {
    let used = members::used(service, &members);
    let all = service.publish_not_ready || used.iter().any(|who| !members[*who].ready);
    let of_used: Vec<_> = used.iter().map(|who| &members[*who]).collect();
    let scope = members::scope(service, &of_used);
    let hinted = scope == TrafficScope::Cluster && members::all_hinted(&of_used);
    let used: BTreeSet<Who> = used.into_iter().cloned().collect();
    let (mut pods, mut outsiders) = (BTreeMap::new(), BTreeMap::new());
    for (who, member) in members {
        let keep = used.contains(&who) || (!all && member.unhealthy);
        let hints = member.hints.filter(|_| keep && hinted).cloned();
        match (who, member.named) {
            (Who::Pod(pod), _) => {
                let ports = Some(member.ports).filter(|ports| keep && !ports.is_empty());
                pods.insert(pod, Part { ports, hints });
            }
            (Who::Address(ip), Some((slice, endpoint))) if keep => {
                let outsider = Outsider {
                    slice: (slice.meta.namespace.clone(), slice.meta.name.clone()),
                    node: endpoint.node.clone(),
                    zone: member.zone.to_owned(),
                    hostname: (endpoint.hostname.clone(), slice.service.clone()),
                    services: Membership::from([(name.clone(), member.ports)]),
                    hints: hints.into_iter().map(|hints| (name.clone(), hints)).collect(),
                };
                outsiders.insert((slice.meta.namespace.clone(), ip), outsider);
            }
            (Who::Address(_), _) => {}
        }
    }
    OfService { name, balancing: Balancing { all, scope }, pods, outsiders, dependencies: BTreeSet::new() }
}
