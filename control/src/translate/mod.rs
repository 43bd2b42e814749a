//! From the world to what nodes are told and what users are told: pure, total and in a fixed order.
//!
//! Bad input gives a condition, never an error. Everything is computed from the whole world each time, and equal worlds
//! give equal bytes, which is what makes versions hold over restarts. What is costly for each pod, encoding and hashing
//! its workload, is remembered ([`Memory`]) with everything it was made of: of 10,000 pods only the few that changed cost
//! that.

mod aliases;
mod authorization;
mod datagrams;
mod dns;
mod endpoints;
mod enrol;
mod groups;
mod l7;
mod mtls;
mod network;
mod request_auth;
mod route;
mod service;
mod telemetry;
mod traffic;
mod workload;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use tulle_proto::names;

pub use datagrams::endpoints as datagram_endpoints;
pub use workload::Memory;

use crate::model::{Condition, Meta, ObjectConditions, ObjectKey, ParentStatus, Pod, Status, World};
use crate::resource::{Kind, Resource};

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
        format!("{}//Pod/{}/{}", self.cluster_id, meta.namespace, meta.name)
    }

    /// Fully qualified name of a service.
    pub fn hostname(&self, meta: &Meta) -> String {
        format!("{}.{}.svc.{}", meta.name, meta.namespace, self.cluster_domain)
    }
}

/// The result.
#[derive(Debug, Default, PartialEq)]
pub struct Translation {
    /// Everything that nodes are told.
    pub resources: Vec<Arc<Resource>>,
    /// Everything that users are told, by object.
    pub conditions: Vec<ObjectConditions>,
    /// (namespace, account) of the unfinished pods of each node: what that node may ask certificates for.
    pub accounts: BTreeMap<String, BTreeSet<(String, String)>>,
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

/// A selector policy as a workload must name it.
struct Selecting<'a> {
    /// Resource name, `<namespace>/<name>`.
    name: String,
    /// Decides whether it applies to a pod.
    applies: Box<dyn Fn(&Pod) -> bool + 'a>,
}

/// Translates the whole world. The result does not depend on `memory`, which only saves work; it must have seen no other
/// settings.
pub fn translate(world: &World, settings: &Settings, memory: &mut Memory) -> Translation {
    let mut conditions = Conditions::default();
    let endpoints = endpoints::Endpoints::new(world, settings);
    let mut resources: Vec<Arc<Resource>> = Vec::with_capacity(world.pods.len() + world.services.len());
    let mut remembered = Memory::default();
    let mut selecting = Vec::new();
    for policy in world.authorization_policies.values() {
        let one = authorization::translate(policy, world, &endpoints, settings);
        one.conditions.into_iter().for_each(|c| conditions.add("AuthorizationPolicy", &policy.meta, c));
        resources.extend(one.resource.map(Arc::new));
        selecting.extend(one.selecting);
    }
    let mut authenticating = Vec::new();
    for auth in world.request_authentications.values() {
        let one = request_auth::translate(auth, world, &endpoints, settings);
        conditions.add("RequestAuthentication", &auth.meta, one.condition);
        resources.push(Arc::new(one.resource));
        authenticating.extend(one.selecting);
    }
    let mut groups = groups::Groups::new(world);
    let network_policies: Vec<_> = world.network_policies.values().collect();
    for policy in &network_policies {
        let (of_policy, condition) = network::translate(policy, &groups);
        conditions.add("NetworkPolicy", &policy.meta, condition);
        resources.extend(of_policy.into_iter().map(Arc::new));
    }
    let mtls = mtls::Plan::new(world, settings);
    resources.extend(mtls.resources().into_iter().map(Arc::new));
    mtls.conditions(&mut conditions);
    l7(world, settings, &mut resources, &mut conditions);
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
    for namespace in world.namespaces.values() {
        enrol::conditions(namespace, world, settings)
            .into_iter()
            .for_each(|c| conditions.add("Namespace", &namespace.meta, c));
    }
    let datagrams = datagrams::Datagrams::new(world);
    let claims = service::Claims::new(world);
    for service in world.services.values().filter(|s| !s.external_name) {
        let name = format!("{}/{}", service.meta.namespace, settings.hostname(&service.meta));
        claims.condition(service).into_iter().for_each(|c| conditions.add("Service", &service.meta, c));
        let other_ports = datagrams.of(service);
        let how = endpoints.balancing(&name);
        resources.push(Arc::new(service::translate(service, &claims, how, other_ports, settings)));
    }
    let aliases = world.services.values().filter(|s| s.external_name);
    resources.extend(aliases.filter_map(|service| dns::external_name(service, settings)).map(Arc::new));
    let mut accounts: BTreeMap<String, BTreeSet<(String, String)>> = BTreeMap::new();
    for pod in world.pods.values() {
        if !pod.node.is_empty() && !pod.finished() {
            let account = (pod.meta.namespace.clone(), pod.service_account.clone());
            match accounts.get_mut(&pod.node) {
                Some(of_node) => drop(of_node.insert(account)),
                None => drop(accounts.insert(pod.node.clone(), BTreeSet::from([account]))),
            }
        }
        if pod.takes_part() {
            let mut policies: Vec<String> =
                selecting.iter().filter(|policy| (policy.applies)(pod)).map(|policy| policy.name.clone()).collect();
            policies.extend(mtls.policy_for(pod));
            let membership = groups.of_pod(pod);
            let isolating = || membership.policies.iter().map(|index| network_policies[*index]);
            policies.extend(isolating().filter_map(|policy| network::stand_in_name(policy)));
            policies.sort();
            let named = workload::Policies {
                authorization: policies,
                network: isolating().map(|policy| network::name(policy)).collect(),
                groups: membership.groups.clone(),
                request: authenticating.iter().filter(|a| (a.applies)(pod)).map(|a| a.name.clone()).collect(),
            };
            let facts = workload::facts(pod, named, &endpoints, world, settings);
            resources.push(remembered.take_over(memory, pod, facts, settings));
        }
    }
    *memory = remembered;
    let nodes = accounts.keys().cloned().collect();
    resources.extend(workload::outsiders(&endpoints, settings).into_iter().map(Arc::new));
    Translation { resources, conditions: conditions.finish(), accounts, nodes }
}

/// What is about requests.
fn l7(world: &World, settings: &Settings, resources: &mut Vec<Arc<Resource>>, conditions: &mut Conditions) {
    let grpc_ports = route::grpc_ports(world);
    for route in world.routes.values() {
        let one = route::translate(route, &grpc_ports, world, settings);
        resources.extend(one.resource.map(Arc::new));
        conditions.of_parents(route.kind.name(), &route.meta, one.parents);
    }
    for (rule, resource, said) in traffic::translate(world, settings) {
        resources.extend(resource.map(Arc::new));
        said.into_iter().for_each(|condition| conditions.add("DestinationRule", &rule.meta, condition));
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
