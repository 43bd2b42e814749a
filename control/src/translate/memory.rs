//! What translation keeps from one world to the next: the last world, its resources, and what they were made of.
//!
//! Each stage translates what its objects' changes and the [`Work`] name, and puts the result into the set; what an object
//! no longer becomes is taken out. A memory of nothing takes every object for new, so a translation from the beginning is
//! the same code. Limits: it is a second copy of the indexes only; objects and resources are shared with everybody else.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{AuthorizationPolicy, Condition, Key, Pod, Service, Target, World};
use crate::resource::{Kind, Resource, ResourceSet};
use crate::translate::Conditions;
use crate::translate::Settings;
use crate::translate::authorization;
use crate::translate::datagrams;
use crate::translate::dns;
use crate::translate::egress;
use crate::translate::endpoints::Endpoints;
use crate::translate::enrol;
use crate::translate::groups::Groups;
use crate::translate::index::Index;
use crate::translate::mtls;
use crate::translate::network;
use crate::translate::request_auth;
use crate::translate::service;
use crate::translate::work::{Changed, Work};
use crate::translate::workload;

/// All that is kept. It belongs to one value of the settings.
#[derive(Default)]
pub struct Memory {
    pub(super) world: World,
    pub(super) set: ResourceSet,
    pub(super) index: Index,
    pub(super) endpoints: Endpoints,
    authorizations: BTreeMap<Key, Authorization>,
    groups: Groups,
    network: BTreeMap<Key, Condition>,
    namespaces: BTreeMap<String, Vec<Condition>>,
    /// External addresses that Services have got.
    granted: BTreeMap<Key, Vec<IpAddr>>,
    /// Whether ports that are not TCP were told with their endpoints.
    datagrams: bool,
    /// The resources of everything that may have another number of them than one, or another name.
    owned: BTreeMap<Owner, Vec<(Kind, Arc<str>)>>,
}

/// A stage and its object.
type Owner = (&'static str, Key);

/// An AuthorizationPolicy, translated.
struct Authorization {
    policy: Arc<AuthorizationPolicy>,
    selects: Option<Target>,
    conditions: Vec<Condition>,
}

impl Memory {
    /// Puts the resources of an object in the place of those that it had.
    pub(super) fn publish(&mut self, of: Owner, resources: impl IntoIterator<Item = Resource>) {
        let set = &mut self.set;
        let named = |resource: Resource| (resource.kind, set.put(resource));
        let now: Vec<(Kind, Arc<str>)> = resources.into_iter().map(named).collect();
        let before = self.owned.remove(&of).unwrap_or_default();
        for (kind, name) in before.iter().filter(|resource| !now.contains(resource)) {
            self.set.remove(*kind, name);
        }
        if !now.is_empty() {
            self.owned.insert(of, now);
        }
    }

    /// AuthorizationPolicies: each is made of nothing but itself; whom it selects has to name it.
    pub(super) fn authorizations(&mut self, changed: &Changed<'_>, settings: &Settings, work: &mut Work) {
        for change in &changed.authorization_policies {
            let before = self.authorizations.remove(change.key).and_then(|before| before.selects);
            let mut after = None;
            let mut resource = None;
            if let Some(policy) = change.after {
                let one = authorization::translate(policy, settings);
                (after, resource) = (one.selects.clone(), one.resource);
                let known =
                    Authorization { policy: Arc::clone(policy), selects: one.selects, conditions: one.conditions };
                self.authorizations.insert(change.key.clone(), known);
            }
            if before != after {
                work.below(&change.key.0, settings);
            }
            self.publish(("AuthorizationPolicy", change.key.clone()), resource);
        }
    }

    /// NetworkPolicies: each is made of itself and of the groups of all, which pods have to name.
    pub(super) fn network_policies(&mut self, changed: &Changed<'_>, world: &World, work: &mut Work) {
        if !changed.namespaces.is_empty() {
            self.groups.forget_judgements();
        }
        if changed.network_policies.is_empty() && self.groups.has_numbers_of(&self.index) {
            return;
        }
        let groups = Groups::new(world, &self.index);
        match groups.differ_in(&self.groups) {
            Some(namespaces) => work.namespaces.extend(namespaces.into_iter().map(str::to_owned)),
            None => work.all_pods = true,
        }
        for change in &changed.network_policies {
            work.namespaces.insert(change.key.0.clone());
            if change.after.is_none() {
                self.network.remove(change.key);
                self.publish(("NetworkPolicy", change.key.clone()), None);
            }
        }
        for (key, policy) in world.network_policies.iter() {
            let (resources, condition) = network::translate(policy, &groups);
            self.publish(("NetworkPolicy", key.clone()), resources);
            self.network.insert(key.clone(), condition);
        }
        self.groups = groups;
    }

    /// Services: made of themselves, their endpoints, and the external addresses that they get.
    pub(super) fn services(
        &mut self,
        world: &World,
        settings: &Settings,
        work: &mut Work,
        conditions: &mut Conditions,
    ) {
        let claims = service::Claims::new(world, &self.index);
        let mut granted = BTreeMap::new();
        for (key, service) in self.index.external().iter().filter_map(|key| Some((key, world.services.get(key)?))) {
            let refused = claims.condition(service).filter(|_| !service.external_name);
            refused.into_iter().for_each(|condition| conditions.add("Service", &service.meta, condition));
            let now = claims.granted(service);
            if self.granted.get(key) != Some(&now) {
                work.services.insert(key.clone());
            }
            granted.insert(key.clone(), now);
        }
        let datagrams = datagrams::needed(world);
        if datagrams != self.datagrams {
            work.services.extend(world.services.keys().cloned());
        }
        let translate = |key: &Key, service: &Service| {
            if service.external_name {
                return dns::external_name(service, settings);
            }
            let slices = self.index.slices_of(key);
            let other_ports = || datagrams::of(service, slices.as_deref(), world);
            let other_ports = if datagrams { other_ports() } else { Vec::new() };
            Some(service::translate(service, &claims, self.endpoints.balancing(key), other_ports, settings))
        };
        let one = |key: &Key| world.services.get(key).and_then(|service| translate(key, service));
        let done: Vec<_> = std::mem::take(&mut work.services).into_iter().map(|key| (one(&key), key)).collect();
        for (resource, key) in done {
            self.publish(("Service", key), resource);
        }
        (self.granted, self.datagrams) = (granted, datagrams);
    }

    /// Pods: made of everything that is about them.
    pub(super) fn pods(&mut self, world: &World, settings: &Settings, mtls: &mtls::Plan<'_>, work: &mut Work) {
        for key in work.all_of(world) {
            match world.pods.get(&key).filter(|pod| pod.takes_part()) {
                None => self.set.remove(Kind::Address, &settings.uid_of(&key.0, &key.1)),
                Some(pod) => {
                    let policies = self.policies_of(pod, world, settings, mtls);
                    let facts = workload::facts(pod, policies, &self.endpoints, world, settings);
                    self.set.put(workload::translate(pod, &facts, settings));
                }
            }
        }
    }

    fn policies_of(
        &mut self,
        pod: &Pod,
        world: &World,
        settings: &Settings,
        mtls: &mtls::Plan<'_>,
    ) -> workload::Policies {
        let own = pod.meta.namespace.as_str();
        let roots = [settings.root_namespace.as_str(), settings.istio_root_namespace.as_str()];
        let mut namespaces = vec![own];
        for root in roots {
            if !root.is_empty() && !namespaces.contains(&root) {
                namespaces.push(root);
            }
        }
        let of = |namespace: &str| {
            let name = namespace.to_owned();
            let from = self.authorizations.range((namespace.to_owned(), String::new())..);
            from.take_while(move |((of, _), _)| *of == name).map(|(_, known)| known)
        };
        let applies = |known: &&Authorization| {
            let meta = &known.policy.meta;
            let target = known.selects.as_ref();
            target.is_some_and(|it| authorization::applies(meta, it, pod, world, &self.endpoints, settings))
        };
        let selecting = namespaces.into_iter().flat_map(of).filter(applies);
        let mut authorization: Vec<String> = selecting.map(|known| known.policy.meta.path()).collect();
        authorization.extend(mtls.policy_for(pod));
        let membership = self.groups.of_pod(pod, world);
        let isolating = || membership.policies.iter().filter_map(|index| self.groups.policy(*index));
        authorization.extend(isolating().filter_map(network::stand_in_name));
        authorization.sort();
        let network = isolating().map(network::name).collect();
        let auths = world.request_authentications.values();
        let request = auths.filter(|auth| request_auth::applies(auth, pod, world, &self.endpoints, settings));
        let request = request.map(|auth| request_auth::name(auth)).collect();
        let egress = egress::of_pod(pod, world, settings);
        workload::Policies { authorization, network, groups: membership.groups, request, egress }
    }

    /// Endpoints that are no pods.
    pub(super) fn outsiders(&mut self, settings: &Settings, work: &mut Work) {
        for outside in std::mem::take(&mut work.outsiders) {
            let found = self.endpoints.outsider(&outside);
            let resource = found.map(|outsider| workload::outsider(&outside.1, &outsider, settings));
            self.publish(("endpoint", (outside.0, outside.1.to_string())), resource);
        }
    }

    /// What there is to say about objects whose stages keep it.
    pub(super) fn conditions(
        &mut self,
        changed: &Changed<'_>,
        world: &World,
        settings: &Settings,
        conditions: &mut Conditions,
    ) {
        for name in changed.touched_namespaces() {
            self.namespaces.remove(name);
            let said = world.namespaces.get(name).map(|namespace| enrol::conditions(namespace, world, settings));
            if let Some(said) = said.filter(|said| !said.is_empty()) {
                self.namespaces.insert(name.to_owned(), said);
            }
        }
        for (name, said) in &self.namespaces {
            let meta = world.namespaces.get(name).map(|namespace| &namespace.meta);
            meta.into_iter().for_each(|meta| conditions.extend("Namespace", meta, said));
        }
        for known in self.authorizations.values() {
            conditions.extend("AuthorizationPolicy", &known.policy.meta, &known.conditions);
        }
        for (key, condition) in &self.network {
            let meta = world.network_policies.get(key).map(|policy| &policy.meta);
            meta.into_iter().for_each(|meta| conditions.add("NetworkPolicy", meta, condition.clone()));
        }
    }
}
