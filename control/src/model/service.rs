//! Services and the endpoints that somebody else computed for them.
//!
//! Endpoints are chosen for TCP ports only: the mesh carries nothing else, and other ports pass it untouched. What names and
//! NetworkPolicies must know of those is in [`ServiceNames`].

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::model::meta::Meta;

/// A Kubernetes Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Name and labels.
    pub meta: Meta,
    /// Selects pods of its namespace. Empty: endpoints come from slices only.
    pub selector: BTreeMap<String, String>,
    /// Virtual addresses. Empty: headless.
    pub addresses: Vec<IpAddr>,
    /// Addresses besides, that clients in the cluster reach it at: spec.externalIPs, and those of its load balancer that
    /// the cluster's own balancing takes over.
    pub external: Vec<IpAddr>,
    /// TCP ports.
    pub ports: Vec<ServicePort>,
    /// spec.ipFamilies, as (IPv4, IPv6). Both false: not said.
    pub families: (bool, bool),
    /// Where clients look for endpoints first.
    pub scope: TrafficScope,
    /// Endpoints get traffic before they are ready.
    pub publish_not_ready: bool,
    /// sessionAffinity ClientIP: how long a quiet client stays with its endpoint, in seconds. None: no affinity.
    pub affinity: Option<u32>,
    /// type ExternalName: no endpoints of its own.
    pub external_name: bool,
    /// What its name stands for beyond addresses.
    pub names: ServiceNames,
}

/// What DNS must know of a Service besides its endpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceNames {
    /// clusterIP: None.
    pub headless: bool,
    /// spec.clusterIPs: what the name stands for.
    pub addresses: Vec<IpAddr>,
    /// Every port, also those that are not TCP.
    pub ports: Vec<NamedPort>,
    /// spec.externalName, if the type is ExternalName and it is a name; else empty.
    pub external_name: String,
}

/// A port of any transport.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPort {
    /// Name; may be empty when it is the only one.
    pub name: String,
    /// Number that clients dial.
    pub number: u16,
    /// Transport.
    pub transport: Transport,
    /// Where it leads.
    pub target: TargetPort,
    /// spec.ports[].appProtocol, else empty.
    pub app_protocol: String,
}

/// What carries a port's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// One port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Name; may be empty when it is the only one.
    pub name: String,
    /// Number that clients dial.
    pub port: u16,
    /// Where it leads.
    pub target: TargetPort,
    /// spec.ports[].appProtocol, else empty.
    pub app_protocol: String,
}

/// A service port's target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPort {
    /// The same number on every endpoint.
    Number(u16),
    /// The container port of this name, which may differ from pod to pod.
    Name(String),
}

/// internalTrafficPolicy and trafficDistribution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrafficScope {
    /// Any endpoint.
    Cluster,
    /// Endpoints of the client's node or none.
    NodeOnly,
    /// The client's node first, then its zone, then all: PreferSameNode.
    PreferNode,
    /// The client's zone first, then all: PreferSameZone, PreferClose.
    PreferZone,
}

/// A part of a service's endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Name; the namespace is the service's.
    pub meta: Meta,
    /// Name of the service, from the label `kubernetes.io/service-name`.
    pub service: String,
    /// TCP ports.
    pub ports: Vec<SlicePort>,
    /// Other ports: name, transport, number.
    pub datagrams: Vec<(String, Transport, u16)>,
    /// Endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// A v1 Endpoints object, from before there were slices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegacyEndpoints {
    /// Name and namespace of the Service that it is of.
    pub meta: Meta,
    /// As slices.
    pub subsets: Vec<EndpointSlice>,
}

/// A port as the endpoints have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlicePort {
    /// Name of the service port.
    pub name: String,
    /// Number at the endpoint.
    pub port: u16,
}

/// Clients that an endpoint is meant for. Both empty: no hints.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hints {
    /// forZones.
    pub zones: BTreeSet<String>,
    /// forNodes.
    pub nodes: BTreeSet<String>,
}

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// conditions.ready; true if absent.
    pub ready: bool,
    /// conditions.serving; as ready if absent.
    pub serving: bool,
    /// conditions.terminating; false if absent.
    pub terminating: bool,
    /// Name of the pod behind it, if targetRef says so.
    pub pod: Option<String>,
    /// nodeName; may be empty.
    pub node: String,
    /// zone; may be empty.
    pub zone: String,
    /// hints: for whose clients it is.
    pub hints: Hints,
    /// hostname: its name below the Service's; may be empty.
    pub hostname: String,
}
