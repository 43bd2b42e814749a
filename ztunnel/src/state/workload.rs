//! A workload: a pod or an external endpoint, with everything that a decision about it needs.
//!
//! Values are exact types made once by `xds::decode`; nothing in here is parsed again on the data path. Strings are
//! shared, because thousands of workloads repeat the same namespaces, nodes and zones.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use tulle_certs::SpiffeId;

use crate::state::IpFamily;

/// How a workload is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Plain TCP to its port.
    Plain,
    /// HTTP/2 CONNECT over mutual TLS to port 15008.
    Hbone,
}

/// Declared application protocol of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AppProtocol {
    /// Not declared.
    #[default]
    Unknown,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
    /// gRPC.
    Grpc,
    /// Bytes.
    Tcp,
    /// TLS that the application itself speaks.
    Tls,
}

/// One port of a service, or of an endpoint of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Port {
    /// Port that clients of the service dial.
    pub service_port: u16,
    /// Port of the application. 0 in a service: named, each endpoint says its own.
    pub target_port: u16,
    /// Declared protocol.
    pub app_protocol: AppProtocol,
}

/// Where a workload runs. Empty: unknown.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Locality {
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
    /// Subzone.
    pub subzone: Arc<str>,
}

/// Kind of the workload's owner, for telemetry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WorkloadType {
    /// Deployment.
    Deployment,
    /// CronJob.
    CronJob,
    /// Pod.
    Pod,
    /// Job.
    Job,
}

impl WorkloadType {
    /// The word of the `baggage` key and of labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// What may leave the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EgressMode {
    /// Everything.
    #[default]
    Allow,
    /// Everything, and each attempt is recorded.
    Audit,
    /// Nothing that no EgressPolicy allows.
    Deny,
}

/// A gateway or waypoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GatewayAddress {
    /// Which one.
    pub target: GatewayTarget,
    /// Its HBONE port.
    pub hbone_port: u16,
}

/// How a gateway is named.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GatewayTarget {
    /// A service or workload by host name.
    Hostname {
        /// Namespace.
        namespace: Arc<str>,
        /// Fully qualified host name.
        hostname: Arc<str>,
    },
    /// An address.
    Address {
        /// Network of the address.
        network: Arc<str>,
        /// The address.
        ip: IpAddr,
    },
}

/// An application behind the proxy that wants the tunnel's metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ApplicationTunnel {
    /// PROXY protocol version 2 in front of the bytes.
    pub proxy_protocol: bool,
    /// Port that overrides the destination's. `None`: not overridden.
    pub port: Option<u16>,
}

/// The services that a workload is an endpoint of, with its ports for each.
///
/// A sorted list and not a map: there are one or two, in each of thousands of workloads, and a tree node has room for
/// eleven.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Memberships(Box<[Membership]>);

type Membership = (Arc<str>, Box<[Port]>);

impl Memberships {
    /// Names of the services, `<namespace>/<hostname>`, in order.
    pub fn keys(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.iter().map(|(service, _)| service)
    }

    /// The workload's ports for a service. `None`: it is no endpoint of it.
    pub fn get(&self, service: &str) -> Option<&[Port]> {
        let index = self.0.binary_search_by(|(own, _)| (**own).cmp(service)).ok()?;
        self.0.get(index).map(|(_, ports)| &**ports)
    }

    /// Whether it is an endpoint of a service.
    pub fn contains_key(&self, service: &str) -> bool {
        self.get(service).is_some()
    }
}

impl FromIterator<(Arc<str>, Vec<Port>)> for Memberships {
    fn from_iter<I: IntoIterator<Item = (Arc<str>, Vec<Port>)>>(services: I) -> Self {
        // Through a map, which sorts, and of which the last of equal names stays.
        let sorted: BTreeMap<Arc<str>, Vec<Port>> = services.into_iter().collect();
        Self(sorted.into_iter().map(|(service, ports)| (service, ports.into())).collect())
    }
}

/// The name of an endpoint below a service's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsName {
    /// spec.hostname of the pod, one label in lower case.
    pub hostname: Arc<str>,
    /// Name of the service, in the workload's own namespace.
    pub subdomain: Arc<str>,
}

/// Clients that a workload is meant for as an endpoint of one service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointHints {
    /// The service, `<namespace>/<hostname>`.
    pub service: Arc<str>,
    /// Their zones.
    pub zones: Box<[Arc<str>]>,
    /// Their nodes.
    pub nodes: Box<[Arc<str>]>,
}

/// See the module's header. The fields are those of `workload.proto`, which documents units and defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// WDS uid, `<cluster-id>//Pod/<namespace>/<name>`: unique, and the resource name.
    pub uid: Arc<str>,
    /// Version of the resource as control named it. Empty: it has none.
    pub version: Arc<str>,
    /// Pod name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Addresses, never v4-mapped.
    pub addresses: Vec<IpAddr>,
    /// DNS name to resolve where there are no addresses. Empty: none.
    pub hostname: Arc<str>,
    /// Network of the addresses.
    pub network: Arc<str>,
    /// How it is reached.
    pub protocol: Protocol,
    /// What it proves in TLS.
    pub identity: SpiffeId,
    /// Node that it runs on. Empty: unknown.
    pub node: Arc<str>,
    /// Whether services send it new connections.
    pub healthy: bool,
    /// Shares its node's address: never found by address.
    pub host_network: bool,
    /// Speaks HBONE itself.
    pub native_tunnel: bool,
    /// Services that it is an endpoint of.
    pub services: Memberships,
    /// Where it runs.
    pub locality: Locality,
    /// For whom it is, where a service's routing preference cannot say so.
    pub hints: Box<[EndpointHints]>,
    /// Relative weight in balancing. 0: never chosen.
    pub capacity: u32,
    /// Selector policies, `<namespace>/<name>`. Namespace-wide and mesh-wide ones are implied.
    pub policies: Vec<Arc<str>>,
    /// Content versions of those policies that control had in mind. Absent: any version does.
    pub policy_versions: BTreeMap<Arc<str>, Arc<str>>,
    /// Set by the store: one of `policies` has not arrived and no earlier version of the workload was complete.
    pub policies_pending: bool,
    /// What may leave the cluster.
    pub egress: EgressMode,
    /// `metadata.uid` of the pod. Empty: not said.
    pub pod_uid: Arc<str>,
    /// Declared ports of the kubelet's probes.
    pub probe_ports: Vec<u16>,
    /// Groups of NetworkPolicies that it belongs to, in order.
    pub groups: Box<[u64]>,
    /// NetworkPolicies that isolate it, `NetworkPolicy/<namespace>/<name>`.
    pub network_policies: Vec<Arc<str>>,
    /// RequestAuthentications that apply to it, `RequestAuthentication/<namespace>/<name>`.
    pub request_auths: Vec<Arc<str>>,
    /// EgressPolicies and ServiceEntries about what it may reach outside, by resource name.
    pub egress_policies: Vec<Arc<str>>,
    /// Its name below a service's. `None`: that of its address.
    pub dns_name: Option<Box<DnsName>>,
    /// Canonical service name, for telemetry.
    pub canonical_name: Arc<str>,
    /// Canonical revision, for telemetry.
    pub canonical_revision: Arc<str>,
    /// Owner's name, for telemetry.
    pub workload_name: Arc<str>,
    /// Owner's kind, for telemetry.
    pub workload_type: WorkloadType,
    /// Cluster id.
    pub cluster: Arc<str>,
    /// Waypoint for traffic addressed to this workload.
    pub waypoint: Option<Box<GatewayAddress>>,
    /// Gateway to its network.
    pub network_gateway: Option<Box<GatewayAddress>>,
    /// An application that wants the tunnel's metadata.
    pub application_tunnel: Option<ApplicationTunnel>,
}

impl Workload {
    /// Whether it is a pod, and not an external endpoint or a gateway.
    pub fn is_pod(&self) -> bool {
        self.uid.contains("//Pod/")
    }

    /// For whom it is as an endpoint of a service.
    pub fn hints_for(&self, service: &str) -> Option<&EndpointHints> {
        self.hints.iter().find(|hints| *hints.service == *service)
    }

    /// Whether it belongs to a group of NetworkPolicies.
    pub fn is_in(&self, group: u64) -> bool {
        self.groups.binary_search(&group).is_ok()
    }

    /// The first address of the preferred family, or else the first one. `None`: it has no address at all.
    pub fn address(&self, prefer: IpFamily) -> Option<IpAddr> {
        let preferred = self.addresses.iter().find(|ip| IpFamily::of(**ip) == prefer);
        preferred.or_else(|| self.addresses.first()).copied()
    }
}
