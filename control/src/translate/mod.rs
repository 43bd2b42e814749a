//! From the world to what nodes are told and what users are told: pure, total and in a fixed order.
//!
//! Bad input gives a condition, never an error. The result depends on the world alone, and equal worlds give equal bytes,
//! which is what makes versions hold over restarts. The work depends on what changed since the world before ([`Memory`]):
//! of 10,000 pods those are translated that an object is about that is not the same as it was.

mod aliases;
mod authorization;
mod beside;
mod datagrams;
mod dns;
mod egress;
mod endpoints;
mod enrol;
mod groups;
mod index;
mod l7;
mod memory;
mod mtls;
mod network;
mod request_auth;
mod route;
mod service;
mod telemetry;
mod traffic;
mod trust;
mod work;
mod workload;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use tulle_proto::names;
use tulle_proto::tulle_workload::EgressMode;

pub use beside::{Beside, beside};
pub use datagrams::endpoints as datagram_endpoints;
pub use enrol::why_outside;
pub use memory::Memory;

use crate::model::{Condition, Meta, ObjectConditions, ObjectKey, ParentStatus, Status, World};
use crate::resource::{Kind, Resource, ResourceSet};
use crate::translate::work::{Changed, Work};

/// What translation must know besides the world.
#[derive(Debug, Clone)]
pub struct Settings {
    /// First part of workload uids.
    pub cluster_id: String,
    /// Suffix of service host names.
    pub cluster_domain: String,
    /// Trust domain of all workloads.
    pub trust_domain: String,
    /// Other names of it.
    pub trust_domain_aliases: Vec<String>,
    /// Namespace whose policies without selector hold for the mesh.
    pub root_namespace: String,
    /// A second such namespace, for what was written for Istio; empty: none.
    pub istio_root_namespace: String,
    /// What may leave namespaces without a label that says so. Not for system namespaces, which say for themselves.
    pub egress_default: EgressMode,
    /// An enrolled pod of which nothing is published (annotation `ambient.istio.io/redirection`) counts as captured. In a
    /// cluster it does not: the agent of its node has not said so yet, or none runs there.
    pub captured_unless_told: bool,
    /// The moment, Unix seconds, for conditions about what has expired. Resources do not depend on it.
    pub now: i64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cluster_id: names::DEFAULT_CLUSTER.into(),
            cluster_domain: names::DEFAULT_DOMAIN.into(),
            trust_domain: names::DEFAULT_DOMAIN.into(),
            trust_domain_aliases: Vec::new(),
            root_namespace: names::DEFAULT_ROOT_NAMESPACE.into(),
            istio_root_namespace: "istio-system".into(),
            egress_default: EgressMode::Allow,
            captured_unless_told: true,
            now: 0,
        }
    }
}

impl Settings {
    /// True for the root namespace and Istio's.
    pub fn is_root(&self, namespace: &str) -> bool {
        namespace == self.root_namespace || (!namespace.is_empty() && namespace == self.istio_root_namespace)
    }

    /// WDS uid of a pod.
    pub fn pod_uid(&self, meta: &Meta) -> String {
        self.uid_of(&meta.namespace, &meta.name)
    }

    fn uid_of(&self, namespace: &str, name: &str) -> String {
        format!("{}//Pod/{namespace}/{name}", self.cluster_id)
    }

    /// Fully qualified name of a service.
    pub fn hostname(&self, meta: &Meta) -> String {
        format!("{}.{}.svc.{}", meta.name, meta.namespace, self.cluster_domain)
    }
}

/// (namespace, account) by node. Nodes where nothing changed are shared with the result before.
pub type Accounts = BTreeMap<String, Arc<BTreeSet<(String, String)>>>;

/// The result.
#[derive(Debug, Default, PartialEq)]
pub struct Translation {
    /// Everything that nodes are told.
    pub resources: ResourceSet,
    /// Everything that users are told, by object.
    pub conditions: Vec<ObjectConditions>,
    /// (namespace, account) of the unfinished pods of each node: what that node may ask certificates for.
    pub accounts: Accounts,
    /// Nodes that run pods of the mesh.
    pub nodes: BTreeSet<String>,
}

/// Conditions under construction.
#[derive(Default)]
struct Conditions(BTreeMap<ObjectKey, (i64, Vec<Condition>, Vec<ParentStatus>)>);

impl Conditions {
    fn add(&mut self, kind: &str, meta: &Meta, condition: Condition) {
        let key = ObjectKey { kind: kind.to_owned(), namespace: meta.namespace.clone(), name: meta.name.clone() };
        let (_, list, _) = self.0.entry(key).or_insert((meta.generation, Vec::new(), Vec::new()));
        list.push(condition);
    }

    /// What the parents of a route say, and for the route as a whole the first that fails.
    fn of_parents(&mut self, kind: &str, meta: &Meta, parents: Vec<ParentStatus>) {
        for wanted in ["Accepted", "ResolvedRefs"] {
            let mut all = parents.iter().flat_map(|parent| &parent.conditions).filter(|one| one.kind == wanted);
            let first = all.clone().next();
            if let Some(condition) = all.find(|one| one.status == Status::False).or(first) {
                self.add(kind, meta, condition.clone());
            }
        }
        let key = ObjectKey { kind: kind.to_owned(), namespace: meta.namespace.clone(), name: meta.name.clone() };
        if let Some((_, _, list)) = self.0.get_mut(&key) {
            *list = parents;
        }
    }

    fn extend(&mut self, kind: &str, meta: &Meta, conditions: &[Condition]) {
        conditions.iter().for_each(|condition| self.add(kind, meta, condition.clone()));
    }

    fn finish(self) -> Vec<ObjectConditions> {
        self.0
            .into_iter()
            .map(|(object, (generation, mut conditions, parents))| {
                conditions.sort_by_key(|condition| condition.kind);
                ObjectConditions { object, generation, conditions, parents }
            })
            .collect()
    }
}

/// Translates the world. The result does not depend on `memory`, which only saves work; it must have seen no other
/// settings.
pub fn translate(world: &World, settings: &Settings, memory: &mut Memory) -> Translation {
    let before = std::mem::replace(&mut memory.world, world.clone());
    let changed = Changed::between(&before, world);
    memory.index.update(&changed);
    let mut work = Work::of(&changed, settings, &memory.index);
    let mut conditions = Conditions::default();
    memory.endpoints.update(&changed, world, &memory.index, settings, &mut work);
    memory.authorizations(&changed, settings, &mut work);
    memory.network_policies(&changed, world, &mut work);
    memory.services(world, settings, &mut work, &mut conditions);
    let mtls = mtls::Plan::new(world, settings);
    memory.pods(world, settings, &mtls, &mut work);
    memory.outsiders(settings, &mut work);
    memory.conditions(&changed, world, settings, &mut conditions);
    let whole = whole(world, settings, &mtls, &mut conditions);
    memory.publish(("whole", <_>::default()), whole);
    let accounts = memory.index.accounts().clone();
    let nodes = accounts.keys().cloned().collect();
    Translation { resources: memory.set.clone(), conditions: conditions.finish(), accounts, nodes }
}

/// Kinds of which there are few: translated whole at every change of anything, so that what they depend on needs no care.
fn whole(world: &World, settings: &Settings, mtls: &mtls::Plan<'_>, conditions: &mut Conditions) -> Vec<Resource> {
    mtls.conditions(conditions);
    for unenforced in world.unenforced.values() {
        if unenforced.kind == "ReferenceGrant" {
            let message = "References of routes of the mesh need no grant; it says nothing here".to_owned();
            conditions.add(unenforced.kind, &unenforced.meta, Condition::holding("Accepted", "Accepted", message));
            continue;
        }
        let message = format!("This version reads {} objects but does not act on them yet", unenforced.kind);
        let condition = Condition::failing("Enforced", "NotEnforcedYet", message);
        conditions.add(unenforced.kind, &unenforced.meta, condition);
    }
    let used = |kind, meta: &Meta, conditions: &mut Conditions| {
        let message = "Read whole; routes of its namespace may refer to it".to_owned();
        conditions.add(kind, meta, Condition::holding("Accepted", "Accepted", message));
    };
    world.http_faults.values().for_each(|fault| used("HTTPFault", &fault.meta, conditions));
    world.http_rate_limits.values().for_each(|limit| used("HTTPRateLimit", &limit.meta, conditions));
    let (mut resources, of_bundles) = trust::translate(world, settings);
    of_bundles.into_iter().for_each(|(meta, condition)| conditions.add("ClusterTrustBundle", meta, condition));
    resources.extend(mtls.resources());
    for policy in world.egress_policies.values() {
        let (resource, said) = egress::translate(policy, world, settings);
        resources.push(resource);
        conditions.extend(policy.kind.name(), &policy.meta, &said);
    }
    l7(world, settings, &mut resources, conditions);
    resources
}

/// What is about requests.
fn l7(world: &World, settings: &Settings, resources: &mut Vec<Resource>, conditions: &mut Conditions) {
    let grpc_ports = route::grpc_ports(world);
    for route in world.routes.values() {
        let one = route::translate(route, &grpc_ports, world, settings);
        resources.extend(one.resource);
        conditions.of_parents(route.kind.name(), &route.meta, one.parents);
    }
    for (rule, resource, said) in traffic::translate(world, settings) {
        resources.extend(resource);
        said.into_iter().for_each(|condition| conditions.add("DestinationRule", &rule.meta, condition));
    }
    for auth in world.request_authentications.values() {
        let (resource, said) = request_auth::translate(auth, &world.keys);
        resources.push(resource);
        conditions.extend("RequestAuthentication", &auth.meta, &said);
    }
}

/// A denial of everything in the place of what cannot be enforced.
fn denial(namespace: &str, name: &str, scope: tulle_proto::security::Scope) -> Resource {
    use tulle_proto::security;
    let message = security::Authorization {
        name: name.to_owned(),
        namespace: match scope {
            security::Scope::Global => String::new(),
            _ => namespace.to_owned(),
        },
        scope: scope.into(),
        action: security::Action::Deny.into(),
        // A rule without clauses always matches.
        rules: vec![security::Rule::default()],
        dry_run: false,
        extensions: vec![security::Extension { name: names::EXTENSION_DENIES_ALL.into(), config: None }],
    };
    let path = format!("{namespace}/{name}");
    Resource::new(Kind::Authorization, path, &message, Vec::new())
}

/// Oldest first, then by name: which of several policies of one rank counts.
fn age(meta: &Meta) -> (i64, &str, &str) {
    (meta.created, &meta.namespace, &meta.name)
}

#[cfg(test)]
mod tests;
