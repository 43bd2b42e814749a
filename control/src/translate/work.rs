//! What changed between two worlds, and what is to be translated anew because of it.
//!
//! The rule that keeps this right: whoever decides something from another object than its own adds to the work whom a
//! change of that object concerns. Too much work gives the same result later; too little gives a wrong one, which the
//! random walk of this module's tests is there to find. What is few (policies, routes) may be translated whole each time.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::base::Change;
use crate::model::{
    AuthorizationPolicy, EgressKind, EgressPolicy, EndpointSlice, Key, LegacyEndpoints, Namespace, NetworkPolicy,
    ObjectChange, PeerAuthentication, Pod, RequestAuthentication, Service, World, in_namespace,
};
use crate::translate::Settings;
use crate::translate::endpoints::Outside;
use crate::translate::index::Index;
use crate::translate::workload;

/// The objects that are not the same in two worlds.
pub(super) struct Changed<'a> {
    pub(super) namespaces: Vec<Change<'a, String, Arc<Namespace>>>,
    pub(super) pods: Vec<ObjectChange<'a, Pod>>,
    pub(super) services: Vec<ObjectChange<'a, Service>>,
    pub(super) slices: Vec<ObjectChange<'a, EndpointSlice>>,
    pub(super) endpoints: Vec<ObjectChange<'a, LegacyEndpoints>>,
    pub(super) authorization_policies: Vec<ObjectChange<'a, AuthorizationPolicy>>,
    pub(super) peer_authentications: Vec<ObjectChange<'a, PeerAuthentication>>,
    pub(super) network_policies: Vec<ObjectChange<'a, NetworkPolicy>>,
    pub(super) request_authentications: Vec<ObjectChange<'a, RequestAuthentication>>,
    pub(super) egress_policies: Vec<Change<'a, (EgressKind, String, String), Arc<EgressPolicy>>>,
    /// Nodes that are somewhere else now.
    pub(super) moved_nodes: BTreeSet<String>,
    /// The pods on those.
    pub(super) moved_pods: Vec<&'a Arc<Pod>>,
}

impl<'a> Changed<'a> {
    pub(super) fn between(old: &'a World, new: &'a World) -> Self {
        let nodes = new.nodes.changes_since(&old.nodes);
        let moved = nodes.iter().filter(|node| workload::locality(old, node.key) != workload::locality(new, node.key));
        let moved_nodes: BTreeSet<String> = moved.map(|node| node.key.clone()).collect();
        let on_moved = |pod: &&Arc<Pod>| moved_nodes.contains(&pod.node);
        let pods = (!moved_nodes.is_empty()).then(|| new.pods.values().filter(on_moved).collect());
        Self {
            namespaces: new.namespaces.changes_since(&old.namespaces),
            pods: new.pods.changes_since(&old.pods),
            services: new.services.changes_since(&old.services),
            slices: new.slices.changes_since(&old.slices),
            endpoints: new.endpoints.changes_since(&old.endpoints),
            authorization_policies: new.authorization_policies.changes_since(&old.authorization_policies),
            peer_authentications: new.peer_authentications.changes_since(&old.peer_authentications),
            network_policies: new.network_policies.changes_since(&old.network_policies),
            request_authentications: new.request_authentications.changes_since(&old.request_authentications),
            egress_policies: new.egress_policies.changes_since(&old.egress_policies),
            moved_pods: pods.unwrap_or_default(),
            moved_nodes,
        }
    }

    /// Namespaces in which a pod changed, or that changed themselves.
    pub(super) fn touched_namespaces(&self) -> BTreeSet<&'a str> {
        let of_pods = self.pods.iter().map(|pod| pod.key.0.as_str());
        of_pods.chain(self.namespaces.iter().map(|namespace| namespace.key.as_str())).collect()
    }
}

/// What is to be translated anew.
#[derive(Default)]
pub(super) struct Work {
    /// These pods.
    pub(super) pods: BTreeSet<Key>,
    /// All pods of these namespaces.
    pub(super) namespaces: BTreeSet<String>,
    /// All pods.
    pub(super) all_pods: bool,
    /// These Services.
    pub(super) services: BTreeSet<Key>,
    /// These endpoints that are no pods.
    pub(super) outsiders: BTreeSet<Outside>,
}

impl Work {
    /// What an object's own change makes necessary, before anything that looks at others adds to it.
    pub(super) fn of(changed: &Changed<'_>, settings: &Settings, index: &Index) -> Self {
        let mut work = Self::default();
        work.pods.extend(changed.pods.iter().map(|pod| pod.key.clone()));
        work.pods.extend(changed.moved_pods.iter().map(|pod| key(pod)));
        work.namespaces.extend(changed.namespaces.iter().map(|namespace| namespace.key.clone()));
        for service in &changed.services {
            // A policy may name a Service for the pods that it selects, also where slices say who serves it.
            let selects = |service: &Arc<Service>| index.select(&service.meta.namespace, &service.selector);
            if service.before.map(|before| &before.selector) != service.after.map(|after| &after.selector) {
                work.pods.extend(service.sides().flat_map(selects).map(|pod| key(pod)));
            }
        }
        for policy in &changed.peer_authentications {
            work.below(&policy.key.0, settings);
        }
        for auth in &changed.request_authentications {
            work.below(&auth.key.0, settings);
        }
        for policy in &changed.egress_policies {
            work.below(&policy.key.1, settings);
        }
        work
    }

    /// The pods that a policy of this namespace may be about.
    pub(super) fn below(&mut self, namespace: &str, settings: &Settings) {
        if settings.is_root(namespace) {
            self.all_pods = true;
        } else {
            self.namespaces.insert(namespace.to_owned());
        }
    }

    /// The pods to be translated anew, also those that are gone.
    pub(super) fn all_of(&mut self, world: &World) -> BTreeSet<Key> {
        let mut pods = std::mem::take(&mut self.pods);
        if self.all_pods {
            pods.extend(world.pods.keys().cloned());
        } else {
            pods.extend(self.namespaces.iter().flat_map(|name| in_namespace(&world.pods, name)).map(|pod| key(pod)));
        }
        pods
    }
}

fn key(pod: &Pod) -> Key {
    (pod.meta.namespace.clone(), pod.meta.name.clone())
}
