//! All objects of one moment, indexed the way translation asks for them.
//!
//! Maps are ordered, so that whatever is computed from a world comes out in the same order in every process. A world
//! is built whole by the source and never changed afterwards.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use crate::model::condition::ObjectKey;
use crate::model::meta::Meta;
use crate::model::network::NetworkPolicy;
use crate::model::policy::{AuthorizationPolicy, PeerAuthentication, Unenforced};
use crate::model::route::{HttpFault, HttpRateLimit, Route, RouteKind};
use crate::model::service::{EndpointSlice, LegacyEndpoints, Service};
use crate::model::traffic::{DestinationRule, RequestAuthentication};
use crate::model::workload::{Namespace, Node, Pod, ServiceAccount};

/// (namespace, name).
pub(super) type Key = (String, String);

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
            Self::Route(object) => object.kind.name(),
            Self::HttpFault(_) => "HTTPFault",
            Self::HttpRateLimit(_) => "HTTPRateLimit",
            Self::DestinationRule(_) => "DestinationRule",
            Self::RequestAuthentication(_) => "RequestAuthentication",
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
            Self::Route(object) => &object.meta,
            Self::HttpFault(object) => &object.meta,
            Self::HttpRateLimit(object) => &object.meta,
            Self::DestinationRule(object) => &object.meta,
            Self::RequestAuthentication(object) => &object.meta,
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
    pub namespaces: BTreeMap<String, Arc<Namespace>>,
    /// By name.
    pub nodes: BTreeMap<String, Arc<Node>>,
    /// By namespace and name.
    pub service_accounts: BTreeMap<Key, Arc<ServiceAccount>>,
    /// By namespace and name.
    pub pods: BTreeMap<Key, Arc<Pod>>,
    /// By namespace and name.
    pub services: BTreeMap<Key, Arc<Service>>,
    /// By namespace and name.
    pub slices: BTreeMap<Key, Arc<EndpointSlice>>,
    /// By namespace and name.
    pub endpoints: BTreeMap<Key, Arc<LegacyEndpoints>>,
    /// By namespace and name.
    pub authorization_policies: BTreeMap<Key, Arc<AuthorizationPolicy>>,
    /// By namespace and name.
    pub peer_authentications: BTreeMap<Key, Arc<PeerAuthentication>>,
    /// By namespace and name.
    pub network_policies: BTreeMap<Key, Arc<NetworkPolicy>>,
    /// By kind, namespace and name.
    pub routes: BTreeMap<(RouteKind, String, String), Arc<Route>>,
    /// By namespace and name.
    pub http_faults: BTreeMap<Key, Arc<HttpFault>>,
    /// By namespace and name.
    pub http_rate_limits: BTreeMap<Key, Arc<HttpRateLimit>>,
    /// By namespace and name.
    pub destination_rules: BTreeMap<Key, Arc<DestinationRule>>,
    /// By namespace and name.
    pub request_authentications: BTreeMap<Key, Arc<RequestAuthentication>>,
    /// By kind, namespace and name.
    pub unenforced: BTreeMap<(&'static str, String, String), Arc<Unenforced>>,
}

impl World {
    /// Zone of a node; empty if it has none.
    pub fn zone(&self, node: &str) -> &str {
        self.nodes.get(node).and_then(|node| node.meta.label("topology.kubernetes.io/zone")).unwrap_or_default()
    }

    /// Adds an object unless there is one of the same kind and name; says whether it did.
    pub fn insert_new(&mut self, object: Object) -> bool {
        let meta = object.meta();
        let key = (meta.namespace.clone(), meta.name.clone());
        match object {
            Object::Namespace(o) => vacant(&mut self.namespaces, key.1, o),
            Object::Node(o) => vacant(&mut self.nodes, key.1, o),
            Object::ServiceAccount(o) => vacant(&mut self.service_accounts, key, o),
            Object::Pod(o) => vacant(&mut self.pods, key, o),
            Object::Service(o) => vacant(&mut self.services, key, o),
            Object::EndpointSlice(o) => vacant(&mut self.slices, key, o),
            Object::Endpoints(o) => vacant(&mut self.endpoints, key, o),
            Object::AuthorizationPolicy(o) => vacant(&mut self.authorization_policies, key, o),
            Object::PeerAuthentication(o) => vacant(&mut self.peer_authentications, key, o),
            Object::NetworkPolicy(o) => vacant(&mut self.network_policies, key, o),
            Object::Route(o) => vacant(&mut self.routes, (o.kind, key.0, key.1), o),
            Object::HttpFault(o) => vacant(&mut self.http_faults, key, o),
            Object::HttpRateLimit(o) => vacant(&mut self.http_rate_limits, key, o),
            Object::DestinationRule(o) => vacant(&mut self.destination_rules, key, o),
            Object::RequestAuthentication(o) => vacant(&mut self.request_authentications, key, o),
            Object::Unenforced(o) => vacant(&mut self.unenforced, (o.kind, key.0, key.1), o),
        }
    }
}

fn vacant<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: V) -> bool {
    match map.entry(key) {
        Entry::Vacant(entry) => {
            entry.insert(value);
            true
        }
        Entry::Occupied(_) => false,
    }
}
