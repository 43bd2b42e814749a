//! All objects of one moment, indexed the way translation asks for them.
//!
//! Maps are ordered, so that whatever is computed from a world comes out in the same order in every process. They share
//! with the world of the moment before what did not change: a copy is cheap, and so is the difference of the two.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::base::{Change, SharedMap};
use crate::model::condition::ObjectKey;
use crate::model::egress::{EgressKind, EgressPolicy};
use crate::model::keys::{KeySource, KeySources};
use crate::model::meta::Meta;
use crate::model::network::NetworkPolicy;
use crate::model::policy::{AuthorizationPolicy, PeerAuthentication, Spec, Unenforced};
use crate::model::route::{HttpFault, HttpRateLimit, Route, RouteKind};
use crate::model::service::{EndpointSlice, LegacyEndpoints, Service};
use crate::model::traffic::{DestinationRule, JwtRule, RequestAuthentication};
use crate::model::trust::TrustBundle;
use crate::model::workload::{Namespace, Node, Pod, ServiceAccount};

/// (namespace, name).
pub type Key = (String, String);
/// Objects of one kind by namespace and name.
pub type ByKey<T> = SharedMap<Key, Arc<T>>;
/// What happened to an object: its key, before and after.
pub type ObjectChange<'a, T> = Change<'a, Key, Arc<T>>;

/// One object of any kind that is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// v1 Namespace.
    Namespace(Arc<Namespace>),
    /// v1 Node.
    Node(Arc<Node>),
    /// v1 ServiceAccount.
    ServiceAccount(Arc<ServiceAccount>),
    /// v1 Pod.
    Pod(Arc<Pod>),
    /// v1 Service.
    Service(Arc<Service>),
    /// discovery.k8s.io EndpointSlice.
    EndpointSlice(Arc<EndpointSlice>),
    /// v1 Endpoints.
    Endpoints(Arc<LegacyEndpoints>),
    /// security.istio.io AuthorizationPolicy.
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
    /// security.istio.io PeerAuthentication.
    PeerAuthentication(Arc<PeerAuthentication>),
    /// networking.k8s.io NetworkPolicy.
    NetworkPolicy(Arc<NetworkPolicy>),
    /// certificates.k8s.io ClusterTrustBundle with a trust domain.
    TrustBundle(Arc<TrustBundle>),
    /// gateway.networking.k8s.io HTTPRoute or GRPCRoute.
    Route(Arc<Route>),
    /// tulle.dev HTTPFault.
    HttpFault(Arc<HttpFault>),
    /// tulle.dev HTTPRateLimit.
    HttpRateLimit(Arc<HttpRateLimit>),
    /// networking.istio.io DestinationRule.
    DestinationRule(Arc<DestinationRule>),
    /// security.istio.io RequestAuthentication.
    RequestAuthentication(Arc<RequestAuthentication>),
    /// tulle.dev EgressPolicy or networking.istio.io ServiceEntry.
    EgressPolicy(Arc<EgressPolicy>),
    /// A kind without effect yet.
    Unenforced(Arc<Unenforced>),
}

impl Object {
    /// Kind as written in manifests.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Namespace(_) => "Namespace",
            Self::Node(_) => "Node",
            Self::ServiceAccount(_) => "ServiceAccount",
            Self::Pod(_) => "Pod",
            Self::Service(_) => "Service",
            Self::EndpointSlice(_) => "EndpointSlice",
            Self::Endpoints(_) => "Endpoints",
            Self::AuthorizationPolicy(_) => "AuthorizationPolicy",
            Self::PeerAuthentication(_) => "PeerAuthentication",
            Self::NetworkPolicy(_) => "NetworkPolicy",
            Self::TrustBundle(_) => "ClusterTrustBundle",
            Self::Route(object) => object.kind.name(),
            Self::HttpFault(_) => "HTTPFault",
            Self::HttpRateLimit(_) => "HTTPRateLimit",
            Self::DestinationRule(_) => "DestinationRule",
            Self::RequestAuthentication(_) => "RequestAuthentication",
            Self::EgressPolicy(object) => object.kind.name(),
            Self::Unenforced(object) => object.kind,
        }
    }

    /// Its metadata.
    pub fn meta(&self) -> &Meta {
        match self {
            Self::Namespace(object) => &object.meta,
            Self::Node(object) => &object.meta,
            Self::ServiceAccount(object) => &object.meta,
            Self::Pod(object) => &object.meta,
            Self::Service(object) => &object.meta,
            Self::EndpointSlice(object) => &object.meta,
            Self::Endpoints(object) => &object.meta,
            Self::AuthorizationPolicy(object) => &object.meta,
            Self::PeerAuthentication(object) => &object.meta,
            Self::NetworkPolicy(object) => &object.meta,
            Self::TrustBundle(object) => &object.meta,
            Self::Route(object) => &object.meta,
            Self::HttpFault(object) => &object.meta,
            Self::HttpRateLimit(object) => &object.meta,
            Self::DestinationRule(object) => &object.meta,
            Self::RequestAuthentication(object) => &object.meta,
            Self::EgressPolicy(object) => &object.meta,
            Self::Unenforced(object) => &object.meta,
        }
    }

    /// Kind, namespace and name.
    pub fn key(&self) -> ObjectKey {
        ObjectKey {
            kind: self.kind().to_owned(),
            namespace: self.meta().namespace.clone(),
            name: self.meta().name.clone(),
        }
    }
}

/// All objects of one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct World {
    /// By name.
    pub namespaces: SharedMap<String, Arc<Namespace>>,
    /// By name.
    pub nodes: SharedMap<String, Arc<Node>>,
    /// By namespace and name.
    pub service_accounts: ByKey<ServiceAccount>,
    /// By namespace and name.
    pub pods: ByKey<Pod>,
    /// By namespace and name.
    pub services: ByKey<Service>,
    /// By namespace and name.
    pub slices: ByKey<EndpointSlice>,
    /// By namespace and name.
    pub endpoints: ByKey<LegacyEndpoints>,
    /// By namespace and name.
    pub authorization_policies: ByKey<AuthorizationPolicy>,
    /// By namespace and name.
    pub peer_authentications: ByKey<PeerAuthentication>,
    /// By namespace and name.
    pub network_policies: ByKey<NetworkPolicy>,
    /// By name.
    pub trust_bundles: SharedMap<String, Arc<TrustBundle>>,
    /// By kind, namespace and name.
    pub routes: SharedMap<(RouteKind, String, String), Arc<Route>>,
    /// By namespace and name.
    pub http_faults: ByKey<HttpFault>,
    /// By namespace and name.
    pub http_rate_limits: ByKey<HttpRateLimit>,
    /// By namespace and name.
    pub destination_rules: ByKey<DestinationRule>,
    /// By namespace and name.
    pub request_authentications: ByKey<RequestAuthentication>,
    /// By kind, namespace and name.
    pub egress_policies: SharedMap<(EgressKind, String, String), Arc<EgressPolicy>>,
    /// By kind, namespace and name.
    pub unenforced: SharedMap<(&'static str, String, String), Arc<Unenforced>>,
    /// The key sets that RequestAuthentications name: no objects, but part of what nodes are told.
    pub keys: KeySources,
}

impl World {
    /// Zone of a node; empty if it has none.
    pub fn zone(&self, node: &str) -> &str {
        self.nodes.get(node).and_then(|node| node.meta.label("topology.kubernetes.io/zone")).unwrap_or_default()
    }

    /// Where the keys of RequestAuthentications are to be fetched from.
    pub fn key_sources(&self) -> BTreeSet<KeySource> {
        let specs = self.request_authentications.values().filter_map(|auth| match &auth.spec {
            Spec::Good(spec) => Some(spec),
            Spec::Unreadable { .. } => None,
        });
        specs.flat_map(|spec| &spec.rules).filter_map(JwtRule::key_source).collect()
    }

    /// Puts an object in the place of the one of its kind and name.
    pub fn put(&mut self, object: Object) {
        self.change(object, true);
    }

    /// Takes the object of this kind and name out.
    pub fn remove(&mut self, object: Object) {
        self.change(object, false);
    }

    /// The object of this kind and name. The namespace of a cluster-wide kind is empty.
    pub fn find(&self, kind: &str, namespace: &str, name: &str) -> Option<Object> {
        let key = || (namespace.to_owned(), name.to_owned());
        match kind {
            "Namespace" => self.namespaces.get(name).cloned().map(Object::Namespace),
            "Node" => self.nodes.get(name).cloned().map(Object::Node),
            "ServiceAccount" => self.service_accounts.get(&key()).cloned().map(Object::ServiceAccount),
            "Pod" => self.pods.get(&key()).cloned().map(Object::Pod),
            "Service" => self.services.get(&key()).cloned().map(Object::Service),
            "EndpointSlice" => self.slices.get(&key()).cloned().map(Object::EndpointSlice),
            "Endpoints" => self.endpoints.get(&key()).cloned().map(Object::Endpoints),
            "AuthorizationPolicy" => self.authorization_policies.get(&key()).cloned().map(Object::AuthorizationPolicy),
            "PeerAuthentication" => self.peer_authentications.get(&key()).cloned().map(Object::PeerAuthentication),
            "NetworkPolicy" => self.network_policies.get(&key()).cloned().map(Object::NetworkPolicy),
            "ClusterTrustBundle" => self.trust_bundles.get(name).cloned().map(Object::TrustBundle),
            "HTTPFault" => self.http_faults.get(&key()).cloned().map(Object::HttpFault),
            "HTTPRateLimit" => self.http_rate_limits.get(&key()).cloned().map(Object::HttpRateLimit),
            "DestinationRule" => self.destination_rules.get(&key()).cloned().map(Object::DestinationRule),
            "RequestAuthentication" => {
                self.request_authentications.get(&key()).cloned().map(Object::RequestAuthentication)
            }
            _ => self.find_shared(kind, namespace, name),
        }
    }

    /// Kinds that share a map with others.
    fn find_shared(&self, kind: &str, namespace: &str, name: &str) -> Option<Object> {
        let (space, name) = (namespace.to_owned(), name.to_owned());
        if let Some(route) = [RouteKind::Http, RouteKind::Grpc].into_iter().find(|route| route.name() == kind) {
            return self.routes.get(&(route, space, name)).cloned().map(Object::Route);
        }
        if let Some(egress) = [EgressKind::Policy, EgressKind::Entry].into_iter().find(|egress| egress.name() == kind) {
            return self.egress_policies.get(&(egress, space, name)).cloned().map(Object::EgressPolicy);
        }
        match kind {
            "ReferenceGrant" => self.unenforced.get(&("ReferenceGrant", space, name)).cloned().map(Object::Unenforced),
            _ => None,
        }
    }

    /// All objects of a kind.
    pub fn objects<'a>(&'a self, kind: &'a str) -> Box<dyn Iterator<Item = Object> + 'a> {
        fn all<'a, K: Ord, T>(
            map: &'a SharedMap<K, Arc<T>>,
            wrap: fn(Arc<T>) -> Object,
        ) -> Box<dyn Iterator<Item = Object> + 'a> {
            Box::new(map.values().cloned().map(wrap))
        }
        let mixed = match kind {
            "Namespace" => return all(&self.namespaces, Object::Namespace),
            "Node" => return all(&self.nodes, Object::Node),
            "ServiceAccount" => return all(&self.service_accounts, Object::ServiceAccount),
            "Pod" => return all(&self.pods, Object::Pod),
            "Service" => return all(&self.services, Object::Service),
            "EndpointSlice" => return all(&self.slices, Object::EndpointSlice),
            "Endpoints" => return all(&self.endpoints, Object::Endpoints),
            "AuthorizationPolicy" => return all(&self.authorization_policies, Object::AuthorizationPolicy),
            "PeerAuthentication" => return all(&self.peer_authentications, Object::PeerAuthentication),
            "NetworkPolicy" => return all(&self.network_policies, Object::NetworkPolicy),
            "ClusterTrustBundle" => return all(&self.trust_bundles, Object::TrustBundle),
            "HTTPFault" => return all(&self.http_faults, Object::HttpFault),
            "HTTPRateLimit" => return all(&self.http_rate_limits, Object::HttpRateLimit),
            "DestinationRule" => return all(&self.destination_rules, Object::DestinationRule),
            "RequestAuthentication" => return all(&self.request_authentications, Object::RequestAuthentication),
            "HTTPRoute" | "GRPCRoute" => all(&self.routes, Object::Route),
            "EgressPolicy" | "ServiceEntry" => all(&self.egress_policies, Object::EgressPolicy),
            _ => all(&self.unenforced, Object::Unenforced),
        };
        Box::new(mixed.filter(move |object| object.kind() == kind))
    }

    fn change(&mut self, object: Object, there: bool) {
        let meta = object.meta();
        let key = (meta.namespace.clone(), meta.name.clone());
        match object {
            Object::Namespace(o) => change(&mut self.namespaces, key.1, o, there),
            Object::Node(o) => change(&mut self.nodes, key.1, o, there),
            Object::ServiceAccount(o) => change(&mut self.service_accounts, key, o, there),
            Object::Pod(o) => change(&mut self.pods, key, o, there),
            Object::Service(o) => change(&mut self.services, key, o, there),
            Object::EndpointSlice(o) => change(&mut self.slices, key, o, there),
            Object::Endpoints(o) => change(&mut self.endpoints, key, o, there),
            Object::AuthorizationPolicy(o) => change(&mut self.authorization_policies, key, o, there),
            Object::PeerAuthentication(o) => change(&mut self.peer_authentications, key, o, there),
            Object::NetworkPolicy(o) => change(&mut self.network_policies, key, o, there),
            Object::TrustBundle(o) => change(&mut self.trust_bundles, key.1, o, there),
            Object::Route(o) => change(&mut self.routes, (o.kind, key.0, key.1), o, there),
            Object::HttpFault(o) => change(&mut self.http_faults, key, o, there),
            Object::HttpRateLimit(o) => change(&mut self.http_rate_limits, key, o, there),
            Object::DestinationRule(o) => change(&mut self.destination_rules, key, o, there),
            Object::RequestAuthentication(o) => change(&mut self.request_authentications, key, o, there),
            Object::EgressPolicy(o) => change(&mut self.egress_policies, (o.kind, key.0, key.1), o, there),
            Object::Unenforced(o) => change(&mut self.unenforced, (o.kind, key.0, key.1), o, there),
        }
    }
}

/// The objects of one namespace.
pub fn in_namespace<'a, T>(objects: &'a ByKey<T>, namespace: &'a str) -> impl Iterator<Item = &'a Arc<T>> {
    let first = (namespace.to_owned(), String::new());
    objects.range_from(&first).take_while(move |((of, _), _)| of == namespace).map(|(_, object)| object)
}

/// An equal object stays the one that it was, so that nothing is done for it.
fn change<K: Ord + Clone, V: PartialEq + Clone>(map: &mut SharedMap<K, V>, key: K, value: V, there: bool) {
    if !there {
        map.remove(&key);
    } else if map.get(&key) != Some(&value) {
        map.insert(key, value);
    }
}
